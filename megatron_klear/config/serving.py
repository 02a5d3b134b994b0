"""Settings of the serving engines: what they are, what they generate when, and how weights reach them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_klear.config.fields import (
    SECTION,
    NonNegative,
    Positive,
    PositiveFloat,
    Ranks,
    Responses,
    Seconds,
    StepsOrNever,
    Tokens,
    Unit,
)


@dataclass(frozen=True, kw_only=True, config=SECTION)
class SglangSettings:
    """SGLang's servers; used when `rollout.engine` is sglang."""

    venv: Annotated[str, Field(min_length=1)] = ".venv-sglang"
    """Virtual environment that the servers run in, as tools/setup_sglang.sh makes it; not used with `sglang.urls`."""

    urls: tuple[str, ...] = ()
    """Servers that run already, as http://HOST:PORT; none starts `sglang.servers` on each of the trainer's machines."""

    router_url: str | None = None
    """A running sglang_router in front of exactly `sglang.urls`; null picks the server with the fewest requests
    itself, and so notices which is slow or hangs. Weights, pauses and interruptions go past the router."""

    connect_seconds: Annotated[float, Unit("seconds"), Field(ge=0)] = 0.0
    """How long servers at `sglang.urls` may take until they answer, because they are being started at the same time."""

    restart_requests: str | None = None
    """Directory in which a file HOST_PORT asks whoever runs the server at that URL to end and restart it, as one that
    hangs; they remove the file when it has ended. tools/gppo.slurm does so; null only waits until it answers."""

    servers: Annotated[int, Unit("servers"), Positive] = 1
    """Servers to start on each machine of the trainer, each on `sglang.server_tp` GPUs of its own where it has any."""

    server_tp: Ranks = 1
    """Tensor parallel size of each server."""

    placement: Literal["separate", "colocated"] = "separate"
    """separate gives servers GPUs that the trainer does not use; colocated has both take turns on the trainer's GPUs:
    servers give up their memory while it trains, and its optimizer state waits on the host while they generate."""

    offload_weights: bool = False
    """colocated: move the trainer's weights to the host, too, while servers generate; optimizer and gradients always
    give way. Leaves more for the KV cache."""

    first_gpu: Annotated[int, Unit("number"), NonNegative] = 0
    """Number of a machine's first GPU for the servers that are started; the others take the GPUs after it."""

    host: Annotated[str, Field(min_length=1)] = "auto"
    """Address that started servers listen on; auto is 127.0.0.1 where all ranks are on one machine, and otherwise each
    machine's address as it reaches the first one (`MASTER_ADDR`); 0.0.0.0 is all of its addresses."""

    port: Annotated[int | None, Unit("number"), Field(ge=1, le=65535)] = None
    """Port of a machine's first started server, the others take the ports after it; null finds free ones."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of weights and computation in started servers; auto takes `model.dtype`."""

    quantization: Literal["none", "fp8"] = "none"
    """fp8 has started servers quantise the weights they are sent; their checksums are then no longer the trainer's.
    They start from those of `model.hf_dir`."""

    deterministic: bool = False
    """Draw each token by its position and its response's seed: SGLang's deterministic inference, slower. The seed is
    made of `run.seed`, prompt, number of the response, and epoch (evaluation, `scheduling.rollout_only`: step)."""

    memory_fraction: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Share of a GPU's memory for weights and KV cache; null leaves it to SGLang."""

    max_total_tokens: Annotated[int | None, Unit("tokens"), Positive] = None
    """Tokens that a server's KV cache holds; null leaves it to SGLang, on a CPU it fits `rollout.batch_responses`."""

    stream_interval: Tokens = 64
    """Tokens between two reports of progress on a response."""

    extra_args: tuple[str, ...] = ()
    """More arguments of `sglang.launch_server`, as they would stand on its command line; none that a setting gives."""

    start_seconds: Seconds = 1800.0
    """How long a server may take to start, compiling included, before it is given up."""

    idle_seconds: Seconds = 600.0
    """How long a response may go without a new token before it is given up. It may be waiting for its turn while its
    server brings tokens for others: then ten times as long; and until a server's first token of all, while it may be
    compiling, `sglang.start_seconds` count. There is no limit on its whole time. Where no rollout manager runs, a
    server that brings nobody a token for so long is started anew."""

    retries: Annotated[int, Unit("retries"), NonNegative] = 3
    """How often a response is asked for again after a failure that may pass, on another server where there is one."""


ENGINE_FREE_SECONDS = 60.0
"""How long an engine may take to get free of a broadcast that is given up, and again to leave its group; one that does
not is lost, too. Where `weight_sync.timeout_seconds` is shorter, it has only that."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class WeightSyncSettings:
    """How the trainer's weights reach the serving engines; used when `rollout.engine` is sglang."""

    transport: Literal["auto", "disk", "distributed", "tensor"] = "auto"
    """By files in `run.dir`/weights, by broadcast (gloo or NCCL), or through memory of the machine (of the GPU itself
    where `sglang.placement` is colocated); auto takes tensor when all servers run on the first rank's machine, and
    distributed otherwise. A server in a container of its own that does not see this machine's /dev/shm ends when it is
    sent a tensor: it needs disk or distributed."""

    pause_mode: Literal["abort", "in_place", "retract"] = "abort"
    """What a publish does to unfinished responses: end them, the run's own to be continued from where they were; hold
    them in the server with their KV cache, which the old weights computed; or hold them and have the new weights
    compute it again. The run's own are in flight during a publish with `scheduling.mode=async` and
    `scheduling.partial_rollouts` only, and otherwise waited for before."""

    bucket_bytes: Annotated[int, Unit("bytes"), Field(ge=2**10)] = 512 * 2**20
    """Weights are sent in buckets of about this size, a larger tensor in one of its own; two of them are in memory at a
    time, and with tensor up to three in /dev/shm. Where it is too small, or engines are elsewhere, tensor has the bytes
    go in requests, which is slow: two of them are under way, each 4/3 of a bucket for each of an engine's ranks, and up
    to 5/3 of a bucket more is in memory while one is made. They are the same however many engines there are."""

    verify: Literal["checksum", "logprobs", "checksum_or_logprobs"] = "checksum"
    """Proof of every publish: each tensor's checksum; the log-probabilities of a probe sequence; or checksums where
    the engine can tell them and log-probabilities where not. Without a proof the run stops."""

    logprob_tolerance: PositiveFloat = 0.05
    """Largest difference between engine and trainer on the probe sequence, in nats."""

    timeout_seconds: Seconds = 900.0
    """How long one exchange with an engine may take during a publish, a broadcast of a bucket too. The other ranks wait
    in an exchange of their own meanwhile, so at least two minutes less than `parallel.timeout_seconds`."""

    keep_on_disk: bool = True
    """Write each published set of weights to `run.dir`/weights, too, the newest only, so that a started server that
    was lost can be started anew with them, and one at `sglang.urls` that answers again be given them; false lets the
    run go on without it. Not done with `sglang.router_url`."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class SchedulingSettings:
    """When responses are generated, on which engines, and which of them a step is trained on."""

    mode: Literal["sync", "one_step_off", "async"] = "sync"
    """sync generates a step, then trains it; one_step_off generates the next meanwhile; async never stops engines."""

    max_staleness: StepsOrNever = 4
    """async: most publishes between the sampling of a group's oldest token and its training; older is drawn again."""

    order: Literal["fixed", "completion"] = "fixed"
    """fixed trains prompts in the order of the data, repeatable; completion takes those first that are ready first."""

    partial_rollouts: bool = True
    """async: a publish interrupts responses, which go on under the new weights; false waits until they are finished."""

    in_flight: Responses = 256
    """Most responses in flight on one engine. What is beyond those that a server generates at a time
    (`rollout.batch_responses`) waits with the trainer, so that it goes to whichever server has room first."""

    min_engines: Annotated[int, Unit("engines"), Positive] = 1
    """Fewest engines that the run goes on with."""

    stall_seconds: Seconds = 120.0
    """A busy engine that brings no token for so long is given up and its responses go to others, which draw again what
    it had drawn of them since the last publish or interruption."""

    start_seconds: Seconds = 1800.0
    """The same for an engine that has brought none yet: it may be loading or compiling. Also the limit of a restart,
    not counting what it waits for the trainer's turn (`sglang.placement` colocated) or the end of a publish."""

    outage_seconds: Seconds = 300.0
    """How long fewer than `scheduling.min_engines` may serve, none of them starting, before the run ends."""

    slow_factor: Annotated[float, Field(gt=1)] = 5.0
    """An engine so many times slower per response than the median of the others hands its responses to others, and is
    started anew; one that is slow after three such starts gets one response at a time until it is quick again."""

    max_failures: Annotated[int, Unit("requests"), Positive] = 8
    """Requests for one response that may fail on engines that are well, before the run ends."""

    keep_steps: StepsOrNever = 0
    """Steps whose tokens stay in the ledger after training (lengths and rewards always do), those after the newest
    checkpoint in any case; 0 keeps all."""

    replay_from: str | None = None
    """Run directory whose recorded responses are trained on, step by step, in place of generating any; there is an
    engine for evaluations only."""

    replay_first_step: Annotated[int, Unit("number"), Positive] = 1
    """First step of `scheduling.replay_from` to train on, under its own number. A fresh run then starts from that run's
    checkpoint of the step before (weights, optimizer, learning rate), or from its first weights where there is none."""

    replay_last_step: Annotated[int | None, Unit("number"), Field(ge=1)] = None
    """Last step of `scheduling.replay_from` to train on, where the run then ends; null goes on to `rl.steps`, by which
    the learning rate goes in any case."""

    rollout_only: bool = False
    """Generate and grade, but never update: the ledger then holds steps of one set of weights, ready to be replayed."""

    @property
    def staleness(self) -> int:
        """Most publishes between the sampling of a group's oldest token and its training, in this mode."""
        return {"sync": 0, "one_step_off": 1, "async": self.max_staleness}[self.mode]
