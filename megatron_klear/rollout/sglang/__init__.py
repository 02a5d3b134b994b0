"""SGLang as the rollout engine: server processes, their HTTP interface, and rollouts over several of them."""

from __future__ import annotations

from megatron_klear.rollout.sglang.compatibility import EngineFacts, Expected, examine
from megatron_klear.rollout.sglang.connection import Connection
from megatron_klear.rollout.sglang.endpoint import SglangEndpoint
from megatron_klear.rollout.sglang.engine import EndpointPool
from megatron_klear.rollout.sglang.fleet import FleetPlace, ServerFleet, wait_until_answering
from megatron_klear.rollout.sglang.serving import ConnectedEngine, SglangCaller, SglangEngine

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
    "examine",
    "wait_until_answering",
]
