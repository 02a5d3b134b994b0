"""The usable rows of an index: too long ones, too many rejected ones, and what tells data apart."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_klear.data import SftData, SftIndex
from megatron_klear.errors import DataError

Writer = Callable[..., Path]
Maker = Callable[..., SftIndex]


def row(row_id: str, question: str = "1+1?", answer: str = "<think>\nhm\n</think>\n\n2", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": row_id, "messages": messages, **more}


def test_rows_count_the_usable_conversations_only(write_jsonl: Writer, make_index: Maker) -> None:
    index = make_index(write_jsonl(row("a"), row("long", answer="x" * 500), row("b", "2+2?")))
    data = SftData(index, token_budget=300, oversize="drop")
    assert [data.row_id(i) for i in range(len(data))] == ["a", "b"]
    for position, number in ((0, 0), (1, 2)):
        np.testing.assert_array_equal(data.tokens(position), index.tokens(number))
        np.testing.assert_array_equal(data.trained_mask(position), index.trained_mask(number))
        assert data.lengths[position] == len(data.tokens(position))
        assert data.trained[position] == data.trained_mask(position).sum() > 0
    assert data.tokens(0).dtype == np.int64
    (dropped,) = data.dropped_rows()
    assert dropped["line"] == 2
    assert dropped["id"] == "long"
    assert "tokens do not fit into packing.token_budget" in str(dropped["reason"])
    assert "1 dropped for their length" in data.described()


def test_sources_are_told_by_tokens_the_largest_first(write_jsonl: Writer, make_index: Maker) -> None:
    names = ["web", "", *(f"s{n}" for n in range(5)), "web", "web", "book", "book"]
    rows = [row(f"{n}", answer="x" * (40 - 3 * n), source=name) for n, name in enumerate(names)]
    index = make_index(write_jsonl(*rows, row("long", answer="x" * 500, source="web")))
    data = SftData(index, token_budget=300, oversize="drop")
    tokens = {name: sum(int(data.lengths[n]) for n, one in enumerate(names) if one == name) for name in names}
    found = index.by_source(data.numbers)
    assert {name: (count, kept) for name, count, kept in found} == {n: (tokens[n], names.count(n)) for n in names}
    assert [count for _, count, _ in found] == sorted(tokens.values(), reverse=True)
    total = int(data.lengths.sum())
    lines = data.sources_described()
    assert lines[0] == f"source web: {tokens['web']} tokens ({tokens['web'] / total:.1%}), 3 conversations"
    assert lines[2] == f"source (none): {tokens['']} tokens ({tokens[''] / total:.1%}), 1 conversations"
    rest = sum(count for _, count, _ in found[5:])
    assert lines[5:] == [f"3 other sources: {rest} tokens ({rest / total:.1%}), 3 conversations"]


def test_few_sources_are_all_named(write_jsonl: Writer, make_index: Maker) -> None:
    data = SftData(make_index(write_jsonl(*(row(f"{n}", source=f"s{n}") for n in range(6)))), token_budget=300)
    lines = data.sources_described()
    assert sorted(line.partition(":")[0] for line in lines) == [f"source s{n}" for n in range(6)]


def test_long_conversations_are_refused_by_name(write_jsonl: Writer, make_index: Maker) -> None:
    path = write_jsonl(row("short"), row("long", answer="<think>\n" + "x" * 500 + "\n</think>\n\n2"))
    index = make_index(path)
    with pytest.raises(DataError) as caught:
        SftData(index, token_budget=300)
    assert f"sequence long ({path}:2): " in str(caught.value)
    assert "packing.oversize=drop" in str(caught.value)
    with pytest.raises(DataError, match=r"all 2 conversations are over packing\.token_budget = 10 tokens") as caught:
        SftData(index, token_budget=10, oversize="drop")
    assert f"the shortest has {int(index.lengths.min())}:" in str(caught.value)
    with pytest.raises(DataError, match=r"1 conversations are longer than model\.max_position_embeddings = 200: long"):
        SftData(index, token_budget=1000, max_positions=200)


def test_padding_counts_towards_the_budget(write_jsonl: Writer, make_index: Maker) -> None:
    index = make_index(write_jsonl(row("a")))
    length = int(index.lengths[0])
    assert len(SftData(index, token_budget=length)) == 1
    with pytest.raises(DataError, match="padded to a multiple of 64"):
        SftData(index, token_budget=length, multiple=64)


def test_rejects_are_tolerated_up_to_a_share(write_jsonl: Writer, make_index: Maker) -> None:
    path = write_jsonl(*(row(f"{n}") for n in range(9)), "{", row("end"))
    index = make_index(path)
    data = SftData(index, token_budget=300, max_reject_share=0.1)
    assert len(data) == 10
    assert "1 rows rejected, see " in data.described()
    with pytest.raises(DataError) as caught:
        SftData(index, token_budget=300, max_reject_share=0.09)
    text = str(caught.value)
    assert text.startswith("data.sft: 1 of 11 rows cannot be used (9.1%):")
    assert f"{path}:10: is not JSON" in text
    assert "data.max_reject_share is 0.09" in text


def test_a_run_goes_on_without_rejects_and_warns_of_many(write_jsonl: Writer, make_index: Maker) -> None:
    path = write_jsonl(*(row(f"{n}") for n in range(4)), *["{"] * 7)
    data = SftData(make_index(path), token_budget=300)
    assert len(data) == 4
    told = data.many_rejects_described()
    assert told[0] == "data.sft: 7 of 11 rows cannot be used (63.6%):"
    assert told[1].startswith(f"  - {path}:5: is not JSON")
    assert told[5].startswith(f"  - {path}:9: is not JSON")
    assert told[6] == f"  ... and 2 more, all in {data.index.rejects_file}"
    assert "data.max_reject_share" in told[7]
    assert len(told) == 8


def test_few_rejects_are_only_counted(write_jsonl: Writer, make_index: Maker) -> None:
    data = SftData(make_index(write_jsonl(*(row(f"{n}") for n in range(99)), "{")), token_budget=300)
    assert data.many_rejects_described() == []
    assert "1 rows rejected, see " in data.described()


def test_of_very_many_rejects_the_first_are_told(write_jsonl: Writer, make_index: Maker) -> None:
    path = write_jsonl(*["{"] * 1000)
    index = make_index(path)
    with pytest.raises(DataError) as caught:
        SftData(index, token_budget=300, max_reject_share=1.0)  # not a single usable one
    assert f"{path}:20: " in str(caught.value)
    assert f"{path}:21: " not in str(caught.value)
    assert f"... and 980 more, all in {index.rejects_file}" in str(caught.value)


@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_an_empty_data_set_is_refused(write_jsonl: Writer, make_index: Maker, lines: list[str]) -> None:
    path = write_jsonl(*lines)
    with pytest.raises(DataError, match=rf"data\.sft: no rows at all in {path}"):
        SftData(make_index(path), token_budget=300)


def test_the_fingerprint_tells_data_apart(write_jsonl: Writer, make_index: Maker, tmp_path: Path) -> None:
    def fingerprint(*rows: dict[str, Any], budget: int = 400) -> str:
        name = f"{len(list(tmp_path.iterdir()))}.jsonl"
        return SftData(
            make_index(write_jsonl(*rows, name=name)), token_budget=budget, oversize="drop", max_reject_share=1.0
        ).fingerprint

    same = fingerprint(row("a"), row("b"))
    assert fingerprint(row("a"), row("b", source="other")) == same
    others = [
        fingerprint(row("a")),
        fingerprint(row("b"), row("a")),
        fingerprint(row("a"), row("b", "?")),
        fingerprint(row("a"), row("long", answer="x" * 500), row("b")),
    ]
    assert len({same, *others}) == 5
    assert fingerprint(row("a"), row("long", answer="x" * 500), row("b"), budget=5000) not in {same, *others}


def test_it_can_be_sent_to_another_process(write_jsonl: Writer, make_index: Maker) -> None:
    data = SftData(make_index(write_jsonl(row("a"), row("b", "2+2?"))), token_budget=300)
    sent = pickle.loads(pickle.dumps(data))
    np.testing.assert_array_equal(sent.tokens(1), data.tokens(1))
    np.testing.assert_array_equal(sent.lengths, data.lengths)
    assert sent.fingerprint == data.fingerprint
    assert len(pickle.dumps(data)) < 4000, "no tokens travel"
