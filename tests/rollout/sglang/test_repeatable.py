"""Tokens by seed and position: SGLang's deterministic inference, on a CPU through our plugin of SGLang."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from megatron_klear.config import Architecture
from megatron_klear.config.serving import SglangSettings
from megatron_klear.conformance.compare import architecture
from megatron_klear.conformance.reference import reference_model
from megatron_klear.model import hf_config
from megatron_klear.rollout import SamplingParams
from megatron_klear.rollout.endpoint import GeneratedPart, GenerationRequest
from megatron_klear.rollout.sglang import Expected, ServerFleet, SglangEngine
from megatron_klear.rollout.sglang.command import CPU_PLUGIN
from megatron_klear.weight_sync import EngineGroup, TensorTransport
from megatron_klear.weight_sync.buckets import bucketed, converted

VOCAB, LONGEST = 83, 96


@pytest.fixture(scope="module")
def plugin() -> ModuleType:
    """The plugin, which needs SGLang only when it is registered."""
    spec = importlib.util.spec_from_file_location("plugin", CPU_PLUGIN / "klear_sglang_repeatable.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def murmur(data: bytes, state: int = 0) -> int:
    """MurmurHash3_x86_32 of whole blocks of four bytes, with plain integers."""
    for (block,) in struct.iter_unpack("<I", data):
        block = block * 0xCC9E2D51 % 2**32
        block = (block << 15 | block >> 17) % 2**32 * 0x1B873593 % 2**32
        state ^= block
        state = ((state << 13 | state >> 19) % 2**32 * 5 + 0xE6546B64) % 2**32
    state ^= len(data)
    state = (state ^ state >> 16) * 0x85EBCA6B % 2**32
    state = (state ^ state >> 13) * 0xC2B2AE35 % 2**32
    return state ^ state >> 16


def test_the_hash_is_murmur3(plugin: ModuleType) -> None:
    assert murmur(b"test") == 0xBA6BD213  # published with the hash
    seeds = [0, 1, 2**32 + 5, 2**63 - 1, -7]
    positions, columns = [0, 3, 99, 40_000, 2**20], [0, 1, 82, 151_935]
    found = plugin.murmur_hash32(torch.tensor(seeds), torch.tensor(positions), torch.tensor(columns))
    for (i, seed), (j, column) in itertools.product(enumerate(seeds), enumerate(columns)):
        assert int(found[i, j]) == murmur(struct.pack("<qII", seed, positions[i], column))


def test_a_product_does_not_depend_on_its_other_rows(plugin: ModuleType) -> None:
    rng = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16):
        rows, matrix = (torch.randn(37, 53, generator=rng).to(dtype), torch.randn(53, 29, generator=rng).to(dtype))
        whole = plugin.rows_times_matrix(rows, matrix)
        for first, last in ((0, 1), (3, 20), (36, 37)):
            assert torch.equal(plugin.rows_times_matrix(rows[first:last], matrix), whole[first:last])
        exact = rows.double() @ matrix.double()
        scale = (rows.double().abs() @ matrix.double().abs()).max()
        assert (whole.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * scale
    bias = torch.randn(29, generator=rng)
    rows, matrix = rows.float(), matrix.float()
    found = plugin.rows_times_matrix_and_bias(bias, rows, matrix, beta=0.5, alpha=2.0)
    torch.testing.assert_close(found, torch.addmm(bias, rows, matrix, beta=0.5, alpha=2.0))
    assert plugin.rows_times_matrix(rows[:0], matrix).shape == (0, 29)


class Served:
    """A deterministic server with the weights of `reference_model(seed=60)`, and ways to ask it."""

    def __init__(self, engine: SglangEngine) -> None:
        self.engine = engine
        self._names = itertools.count()

    def ask(self, *requests: tuple[np.ndarray, int, int], top_p: float = 1.0) -> list[GeneratedPart]:
        """Responses to (token ids, tokens to draw, seed), all asked for at once."""
        endpoint = self.engine.engines[0].endpoint

        async def one(ids: np.ndarray, count: int, seed: int) -> GeneratedPart:
            sampling = SamplingParams(temperature=0.8, top_p=top_p, max_response_tokens=count, stop_token_ids=())
            return await endpoint.generate(
                GenerationRequest(
                    request_id=f"r{next(self._names)}",
                    token_ids=ids,
                    max_new_tokens=count,
                    sampling=sampling,
                    seed=seed,
                )
            )

        async def all_of_them() -> list[GeneratedPart]:
            return await asyncio.gather(*(one(*request) for request in requests))

        return self.engine._loop.run(all_of_them())


@contextmanager
def serving(venv: str, folder: Path, arch: Architecture, dtype: str, *, on_cpu: bool) -> Iterator[Served]:
    """A deterministic server for as long as the context lasts."""
    settings = SglangSettings(
        venv=venv, stream_interval=4, start_seconds=400.0, deterministic=True,
        memory_fraction=None if on_cpu else 0.5,  # without it GPU 0 is the trainer's alone
    )  # fmt: skip
    with ServerFleet(
        settings, hf_config(arch, dtype=dtype), folder, dtype=dtype, on_cpu=on_cpu, batch_responses=16,
        longest_sequence=LONGEST,
    ) as fleet:  # fmt: skip
        expected = Expected(vocab_size=VOCAB, longest_sequence=LONGEST, deterministic=True)
        engine = SglangEngine(fleet.start_all(), settings, expected, in_flight=16)
        group = EngineGroup([e.caller for e in engine.engines], 120.0)
        transport = TensorTransport(group, tp=1, by_value=True)
        transport.begin(1)
        weights = reference_model(arch, seed=60).named_parameters()
        for bucket in bucketed(converted(weights, getattr(torch, dtype)), 2**20):
            transport.send(bucket)
        transport.finish()
        group.call("/update_weight_version", {"new_version": "1", "abort_all_requests": False})
        engine.use_version(1)
        yield Served(engine)
        engine.close()


@pytest.fixture(scope="module")
def served(sglang_settings: SglangSettings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("repeatable")
    with serving(sglang_settings.venv, folder, architecture(tied=False), "float32", on_cpu=True) as made:
        yield made


def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, VOCAB, length) for length in (1, 6, 17, 40)]


def same_bits(one: GeneratedPart, other: GeneratedPart) -> bool:
    return one.token_ids.tobytes() == other.token_ids.tobytes() and one.logprobs.tobytes() == other.logprobs.tobytes()


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_tokens_and_logprobs_are_the_same_bits_in_any_company_and_when_continued(served: Served, top_p: float) -> None:
    requests = [(ids, 44, 2**40 + i) for i, ids in enumerate(prompts())]
    alone = [served.ask(request, top_p=top_p)[0] for request in requests]
    others = [(ids[: 1 + len(ids) // 2], 30 + i, i) for i, ids in enumerate([*prompts(), *prompts()])]
    crowd = served.ask(*others[:4], *requests, *others[4:], top_p=top_p)
    assert all(same_bits(one, other) for one, other in zip(alone, crowd[4:8], strict=True))
    for cut in (1, 19, 43):
        heads = [np.concatenate([ids, one.token_ids[:cut]]) for (ids, _, _), one in zip(requests, alone, strict=True)]
        rest = served.ask(
            *((head, 44 - cut, seed) for head, (_, _, seed) in zip(heads, requests, strict=True)), top_p=top_p
        )
        for one, part in zip(alone, rest, strict=True):
            assert part.token_ids.tolist() == one.token_ids[cut:].tolist()
            assert part.logprobs.tobytes() == one.logprobs[cut:].tobytes()
    reseeded = served.ask(*((ids, count, seed + 1) for ids, count, seed in requests), top_p=top_p)
    assert not any(
        one.token_ids.tolist() == other.token_ids.tolist() for one, other in zip(alone, reseeded, strict=True)
    )


@pytest.mark.gpu
def test_on_a_gpu_company_leaves_no_trace(sglang_settings: SglangSettings, tmp_path: Path) -> None:
    arch = replace(architecture(tied=False), head_dim=64)
    with serving(sglang_settings.venv, tmp_path, arch, "bfloat16", on_cpu=False) as served:
        requests = [(ids, 44, 2**40 + i) for i, ids in enumerate(prompts())]
        alone = [served.ask(request)[0] for request in requests]
        crowd = served.ask(*((ids, 30, i) for i, ids in enumerate(prompts())), *requests)
        assert all(same_bits(one, other) for one, other in zip(alone, crowd[4:], strict=True))


def test_each_token_is_the_one_that_seed_and_position_choose(served: Served) -> None:
    """The Gumbel trick by hand: argmax of log p + g, g from the hash of seed, position and token, p by float64."""
    model = reference_model(architecture(tied=False), seed=60).double()
    checked = 0
    for i, ids in enumerate(prompts()):
        seed = 2**50 + i
        (part,) = served.ask((ids, 24, seed))
        whole = np.concatenate([ids, part.token_ids])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.from_numpy(whole)[None]).logits[0] / 0.8, dim=-1).numpy()
        for step, token in enumerate(part.token_ids):
            position = len(ids) + step - 1
            uniform = [murmur(struct.pack("<qII", seed, position, column)) / (2**32 - 1) for column in range(VOCAB)]
            scores = logprobs[position] + [
                -math.log(max(-math.log(u), 2.0**-32)) if u > 0 else -np.inf for u in uniform
            ]
            best, second = np.argsort(scores)[::-1][:2]
            if scores[best] - scores[second] > 1e-4:  # far above what float32 makes of log p
                assert int(token) == best
                checked += 1
    assert checked >= 90
