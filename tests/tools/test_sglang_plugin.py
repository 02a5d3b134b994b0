"""The plugin's attention over whole batches against a plain loop in float64, and what it leaves to SGLang."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

PLUGIN = Path(__file__).parents[2] / "tools" / "sglang_cpu" / "klear_sglang_plugin.py"


@pytest.fixture
def plugin() -> ModuleType:
    spec = importlib.util.spec_from_file_location("klear_sglang_plugin", PLUGIN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cache(lengths: list[int], *, heads: int = 6, key_heads: int = 2, head_dim: int = 8) -> dict[str, Any]:
    """Requests whose rows end in slots that do not exist, in an order of their own."""
    rng = torch.Generator().manual_seed(len(lengths))
    requests, longest = len(lengths) + 2, max(lengths)
    slots = torch.full((requests, longest + 5), 10**9, dtype=torch.int32)
    order = torch.randperm(requests, generator=rng)[: len(lengths)]
    free = torch.randperm(sum(lengths) + 50, generator=rng)
    for request, length in zip(order, lengths, strict=True):
        slots[request, :length], free = free[:length].int(), free[length:]
    shape = (sum(lengths) + 50, key_heads, head_dim)
    return {
        "query": torch.randn(len(lengths), heads, head_dim, generator=rng),
        "output": torch.full((len(lengths), heads, head_dim), torch.nan),
        "k_cache": torch.randn(shape, generator=rng),
        "v_cache": torch.randn(shape, generator=rng),
        "req_to_token": slots,
        "req_pool_indices": order,
        "seq_lens": torch.tensor(lengths),
    }


def by_hand(given: dict[str, Any], scale: float) -> torch.Tensor:
    """softmax(q k^T * scale) v of one sequence and head after the other, in float64."""
    rows = []
    for query, request, length in zip(given["query"], given["req_pool_indices"], given["seq_lens"], strict=True):
        slots = given["req_to_token"][request, :length].long()
        group = query.shape[0] // given["k_cache"].shape[1]
        heads = []
        for head, vector in enumerate(query.double()):
            keys = given["k_cache"][slots, head // group].double()
            values = given["v_cache"][slots, head // group].double()
            heads.append(torch.softmax(keys @ vector * scale, 0) @ values)
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def never(*_: Any, **__: Any) -> None:
    pytest.fail("SGLang's own method was asked")


@pytest.mark.parametrize("lengths", [[1], [7], [3, 1, 9, 9, 2], list(range(1, 60))])
@pytest.mark.parametrize("most_padded", [1, 500, 2**18])
def test_a_batch_is_what_each_sequence_is_by_itself(plugin: ModuleType, lengths: list[int], most_padded: int) -> None:
    plugin.MOST_PADDED = most_padded
    given = cache(lengths)
    found = plugin.decode(never, None, *given.values(), None, scaling=0.3, enable_gqa=True, causal=False)
    assert found is given["output"]
    # Sums of up to 60 products of numbers of size 1, in float32.
    assert (found.double() - by_hand(given, 0.3)).abs().max() < 60 * 2**-23


@pytest.mark.parametrize(
    "change",
    [
        {"encoder_lens": torch.ones(3)},
        {"is_cross_attn": True},
        {"sliding_window_size": 128},
        {"v_cache": torch.float64},
    ],
)
def test_other_kinds_of_attention_are_left_to_sglang(plugin: ModuleType, change: dict[str, Any]) -> None:
    given = cache([4, 2, 3])
    options: dict[str, Any] = {"scaling": 0.3, "enable_gqa": True, "is_cross_attn": False, "sliding_window_size": None}
    encoder_lens = change.get("encoder_lens")
    if "v_cache" in change:
        given["v_cache"] = given["v_cache"].double()
    options |= {name: value for name, value in change.items() if name in options}
    asked: list[Any] = []

    def original(*arguments: Any, **named: Any) -> str:
        asked.append((arguments, named))
        return "theirs"

    assert plugin.decode(original, "backend", *given.values(), encoder_lens, **options) == "theirs"
    assert asked == [(("backend", *given.values(), encoder_lens), options)]


def test_it_registers_with_sglangs_hooks(plugin: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[Any] = []
    hooks: Any = ModuleType("sglang.srt.plugins.hook_registry")
    hooks.HookRegistry = SimpleNamespace(register=lambda *arguments: registered.append(arguments))
    hooks.HookType = SimpleNamespace(AROUND="around")
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, hooks.__name__, hooks)
    plugin.register()
    assert registered == [(plugin.TARGET, plugin.decode, "around")]
