"""Options of `sglang.launch_server` that `sglang.extra_args` may not give, as the program gives them itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

OWN_OPTIONS = {
    "--model-path": "servers start from model.*",
    "--model": "servers start from model.*",
    "--load-format": "the trainer's weights arrive before the first request",
    "--served-model-name": "by it the program knows that a server is its own",
    "--host": "set sglang.host",
    "--port": "set sglang.port",
    "--tp-size": "set sglang.server_tp",
    "--tensor-parallel-size": "set sglang.server_tp",
    "--dp-size": "set sglang.servers; weights are sent to one tensor parallel group a server",
    "--data-parallel-size": "set sglang.servers; weights are sent to one tensor parallel group a server",
    "--pp-size": "set sglang.server_tp; weights are sent to one tensor parallel group a server",
    "--pipeline-parallel-size": "set sglang.server_tp; weights are sent to one tensor parallel group a server",
    "--dtype": "set sglang.dtype",
    "--context-length": "it follows from data.max_prompt_tokens and rollout.max_response_tokens",
    "--max-running-requests": "set rollout.batch_responses",
    "--stream-interval": "set sglang.stream_interval",
    "--max-total-tokens": "set sglang.max_total_tokens",
    "--mem-fraction-static": "set sglang.memory_fraction",
    "--quantization": "set sglang.quantization",
    "--enable-deterministic-inference": "set sglang.deterministic",
    "--device": "set run.device",
}
"""What to do instead, by option, SGLang's aliases included.

Flags that are given always may stand twice, and `--attention-backend` is given on a CPU only, as a default.
"""


def own_arguments(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (argument, what to do instead) for each of these; the last one would win, unnoticed.

    SGLang takes the beginning of an option for the option (`--tp` for `--tp-size`), and so does this.
    """
    for argument in arguments:
        given = argument.partition("=")[0]
        if not given.startswith("--") or given == "--":
            continue
        instead = next((text for option, text in OWN_OPTIONS.items() if option.startswith(given)), None)
        if instead is not None:
            yield argument, instead
