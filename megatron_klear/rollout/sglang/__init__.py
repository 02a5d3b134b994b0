"""SGLang as the rollout engine: server processes, their HTTP interface, and rollouts over several of them."""

from __future__ import annotations

from megatron_klear.rollout.sglang.answering import shown, wait_until_answering
from megatron_klear.rollout.sglang.compatibility import EngineFacts, Expected, examine
from megatron_klear.rollout.sglang.connection import Connection
from megatron_klear.rollout.sglang.endpoint import SglangEndpoint
from megatron_klear.rollout.sglang.engine import EndpointPool
from megatron_klear.rollout.sglang.fleet import ServerFleet
from megatron_klear.rollout.sglang.place import FleetPlace
from megatron_klear.rollout.sglang.serving import ConnectedEngine, SglangCaller, SglangEngine
from megatron_klear.rollout.sglang.start_report import StartReport

__all__ = [
    "ConnectedEngine",
    "Connection",
    "EndpointPool",
    "EngineFacts",
    "Expected",
    "FleetPlace",
    "ServerFleet",
    "SglangCaller",
    "SglangEndpoint",
    "SglangEngine",
    "StartReport",
    "examine",
    "shown",
    "wait_until_answering",
]
