"""The index holds what the tokenizer says, Megatron-Core reads it, and nothing that goes wrong spoils it."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Never

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_klear.data import SftIndex, describe_source, load_chat_tokenizer, prepare_index
from megatron_klear.data.__main__ import main
from megatron_klear.data.chat import ChatTokenizer
from megatron_klear.data.index import build, merge, parts, tokenize
from megatron_klear.data.index.parts import Part, plan_parts, read_part
from megatron_klear.errors import DataError

Writer = Callable[..., Path]
Maker = Callable[..., SftIndex]
Row = dict[str, Any]


def conversation(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def row(number: int) -> Row:
    texts = [f"what is {number}?", f"<think>\n{'hm ' * (number % 7)}\n</think>\n\n{number}"]
    if number % 5 == 0:  # several turns; the template keeps the thinking of the last one
        texts += ["and more?", f"<think>\nsum\n</think>\n\n{number + 1}"]
    return {"id": f"r{number}", "messages": conversation(*texts), "source": ("web", "book", "")[number % 3]}


def write_parquet(path: Path, rows: list[Row], **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


@pytest.fixture(scope="module")
def chat(thinking_tokenizer: Path) -> ChatTokenizer:
    return load_chat_tokenizer(thinking_tokenizer)


def contents(index: SftIndex) -> dict[str, bytes]:
    """Every file of an index."""
    return {file.name: file.read_bytes() for file in index.directory.iterdir() if file.name != ".lock"}


def test_tokens_masks_sources_and_places_over_files_and_parts(
    chat: ChatTokenizer, write_jsonl: Writer, make_index: Maker, tmp_path: Path
) -> None:
    rows = [row(n) for n in range(60)]
    first = write_jsonl(*rows[:25], name="a.jsonl")
    second = write_parquet(tmp_path / "b.parquet", rows[25:45], row_group_size=6)
    third = write_jsonl(*rows[45:], name="c.jsonl")
    index = make_index(first, second, third, part_bytes=900)
    expected = chat.encode_conversations([r["messages"] for r in rows])
    assert len(index) == len(rows)
    assert index.rejected == 0
    places = [f"{first}:{n + 1}" for n in range(25)] + [f"{second}:{n + 1}" for n in range(20)]
    places += [f"{third}:{n + 1}" for n in range(15)]
    for number, (one, encoded) in enumerate(zip(rows, expected, strict=True)):
        np.testing.assert_array_equal(index.tokens(number), encoded.token_ids)
        mask = np.zeros(len(encoded.token_ids), dtype=bool)
        for start, end in encoded.trained_spans:
            mask[start:end] = True
        np.testing.assert_array_equal(index.trained_mask(number), mask)
        assert (index.lengths[number], index.trained[number]) == (len(mask), mask.sum())
        assert (index.row_id(number), index.source(number), index.where(number)) == (
            one["id"],
            one["source"],
            places[number],
        )
    assert len({len(e.trained_spans) for e in expected}) == 1
    whole = make_index(first, second, third, index_dir=tmp_path / "other")
    assert contents(whole) == contents(index), "parts leave no trace"


def test_megatron_reads_the_answer_as_mode_1(chat: ChatTokenizer, write_jsonl: Writer, make_index: Maker) -> None:
    index = make_index(write_jsonl(row(3), row(4)))
    stored = IndexedDataset(str(index.directory / "conversations"), multimodal=True)
    assert len(stored.document_indices) == 3
    pieces, modes = stored[stored.document_indices[1] : stored.document_indices[2]]
    assert modes.tolist() == [0, 1]
    assert chat.decode(pieces[0]) == "<|im_start|>user\nwhat is 4?<|im_end|>\n<|im_start|>assistant\n"
    assert chat.decode(pieces[1]) == "<think>\nhm hm hm hm \n</think>\n\n4<|im_end|>"
    plain = IndexedDataset(str(index.directory / "conversations"))
    np.testing.assert_array_equal(plain[3], pieces[1])
    sources = IndexedDataset(str(index.directory / "sources"))
    names = json.loads((index.directory / "index.json").read_text())["sources"]
    assert [names[int(sources[n][0])] for n in range(2)] == ["web", "book"]


def test_every_line_is_in_exactly_one_part_wherever_files_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = [b'{"n": %d}' % n + b" " * (n % 5) for n in range(12)]
    lines[4], lines[7] = b"", b"{"
    for end in (b"", b"\n"):
        path.write_bytes(b"\n".join(lines) + end)
        wanted = list(read_part(Part(file=0, start=0, end=path.stat().st_size, input_bytes=1), str(path)))
        assert [value["n"] if isinstance(value, dict) else value for value in wanted[:5]] == [0, 1, 2, 3, None]
        assert len(wanted) == 12
        for part_bytes in range(1, path.stat().st_size + 2):
            parts = plan_parts([str(path)], part_bytes)
            assert [value for part in parts for value in read_part(part, str(path))] == wanted


@pytest.mark.parametrize("end", [b"", b"\n", b'\n{"n": 2}', b'\n{"n": 2}\n'])
def test_a_line_may_be_as_long_as_is_said_wherever_it_stands(tmp_path: Path, end: bytes) -> None:
    path, limit = tmp_path / "x.jsonl", 40
    for length in (limit - 1, limit, limit + 1, 2 * limit, 2 * limit + 1):
        path.write_bytes(b'{"n": 1}'.ljust(length) + end)
        first, *others = read_part(Part(file=0, start=0, end=path.stat().st_size, input_bytes=1), str(path), limit)
        assert first == ({"n": 1} if length <= limit else "is longer than 40 bytes"), length
        assert others == ([{"n": 2}] if b"2" in end else []), length


def test_unusable_rows_are_listed_with_file_line_and_reason_and_the_others_kept(
    write_jsonl: Writer, make_index: Maker, tmp_path: Path
) -> None:
    first = tmp_path / "a.jsonl"
    good = [json.dumps(row(n)).encode() for n in range(4)]
    bad = [
        b'{"id": "x", ',
        b'{"id": "caf\xe9"}',
        b"[]",
        b'{"messages": []}',
        json.dumps({"id": "e", "messages": conversation("q", "")}).encode(),
        json.dumps({"id": "m", "messages": conversation("q", "<|im_end|>")}).encode(),
        json.dumps({"id": "t", "messages": conversation("q", "<think>\nand then he")}).encode(),
        json.dumps({"id": "u", "messages": conversation("q", "<think>a</think> b </think> c")}).encode(),
        json.dumps({"id": "n", "messages": conversation("q\0", "a")}).encode(),
        b"\0" * 20,
        b"x" * 5000,
        json.dumps(row(1)).encode(),
    ]
    first.write_bytes(b"\n".join([good[0], b"", *bad[:5], good[1], *bad[5:], good[2]]) + b"\n")
    second = write_jsonl(row(3), row(2), name="b.jsonl")
    index = make_index(first, second, part_bytes=400, line_bytes=2000)
    assert [index.row_id(n) for n in range(len(index))] == ["r0", "r1", "r2", "r3"]
    found = [(file, line, reason) for file, line, reason in index.rejects(100)]
    assert index.rejected == len(found) == 13
    assert [(file, line) for file, line, _ in found] == [(str(first), n) for n in (3, 4, 5, 6, 7, *range(9, 16))] + [
        (str(second), 2)
    ]
    wanted = [
        "is not JSON",
        "is not UTF-8 (byte 12 of the line)",
        "must be a JSON object, got a list",
        "id must be a non-empty string or a whole number, got none; messages must be a non-empty list",
        "message 2: content is empty",
        "message 2 holds the chat marker <|im_end|>",
        "the last answer opens <think> and never closes it",
        "the chat template leaves out a part of the answer, 'b'",
        "message 1: holds a NUL character",
        "is not JSON",
        "is longer than 2000 bytes",
        f"has the id 'r1' of {first}:8; ids must be unique",
        f"has the id 'r2' of {first}:16; ids must be unique",
    ]
    for (_, _, reason), text in zip(found, wanted, strict=True):
        assert text in reason


def test_a_bad_text_or_a_damaged_row_group_of_a_parquet_file_costs_its_rows_only(
    make_index: Maker, tmp_path: Path
) -> None:
    rows = [row(n) for n in range(8)]
    texts = pa.array([b"caf\xe9" if n == 2 else f"r{n}".encode() for n in range(8)]).cast(pa.binary())
    table = pa.Table.from_pylist(rows).set_column(0, "id", pa.StringArray.from_buffers(8, *texts.buffers()[1:]))
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=4, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = column.data_page_offset
    content[start : start + 20] = b"\xff" * 20
    path.write_bytes(content)
    index = make_index(path)
    assert [index.row_id(n) for n in range(len(index))] == ["r0", "r1", "r3"]
    found = list(index.rejects(10))
    assert [line for _, line, _ in found] == [3, 5, 6, 7, 8]
    assert found[0][2] == "is not UTF-8"
    assert all("row group 1 cannot be read" in reason for _, _, reason in found[1:])


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_what_the_system_cannot_read_is_named_and_no_row_of_it_rejected(
    kind: str, make_index: Maker, write_jsonl: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system that fails now has all rows later."""
    rows = [row(n) for n in range(8)]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_jsonl(*rows, name=path.name)
    else:
        write_parquet(path, rows)

    def failing(*_: object, **__: object) -> Never:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(parts, "open", failing, raising=False)
        broken.setattr(pq.ParquetFile, "iter_batches", failing)
        with pytest.raises(DataError, match=rf"data\.sft: {path} cannot be read: Input/output error\. Start again"):
            make_index(path)
    index = make_index(path)
    assert (len(index), index.rejected) == (8, 0)


def test_files_that_are_no_parquet_or_lack_a_column_are_refused_together(make_index: Maker, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"nonsense")
    write_parquet(tmp_path / "b.parquet", [{"id": "x", "text": "y"}])
    with pytest.raises(DataError) as caught:
        make_index(tmp_path / "a.parquet", tmp_path / "b.parquet")
    assert "a.parquet: is not a Parquet file" in str(caught.value)
    assert "b.parquet: has no column messages; it has id, text" in str(caught.value)


FORK = multiprocessing.get_context("fork")


def make_and_stop(paths: list[str], tokenizer: Path, index_dir: Path, part_bytes: int, stop: int, told: Any) -> None:
    """Makes an index, but says so and stops, alive, when it comes to the part of number `stop`."""
    make = tokenize._make_part

    def until(job: tokenize.PartJob) -> tokenize.PartCounts:
        if job.number == stop:
            told.send("stopped")
            time.sleep(600)
        return make(job)

    tokenize._make_part = until
    source = describe_source(paths, str(tokenizer), "<think>", "</think>", index_dir=str(index_dir))
    prepare_index(source, processes=1, part_bytes=part_bytes)


def make_without_room(paths: list[str], tokenizer: Path, index_dir: Path, file_bytes: int, told: Any) -> None:
    """Makes an index where no file may become larger; sends the error."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    source = describe_source(paths, str(tokenizer), "<think>", "</think>", index_dir=str(index_dir))
    try:
        prepare_index(source, processes=1)
    except DataError as error:
        told.send(str(error))


def stopped_before(stop: int, path: Path, tokenizer: Path, index_dir: Path, part_bytes: int) -> Any:
    """A process that has stopped in the middle of making an index."""
    here, there = FORK.Pipe()
    process = FORK.Process(
        target=make_and_stop, args=([str(path)], tokenizer, index_dir, part_bytes, stop, there), daemon=True
    )
    process.start()
    assert here.poll(60)
    assert here.recv() == "stopped"
    return process


def test_killed_in_the_middle_it_goes_on_with_the_unfinished_parts(
    thinking_tokenizer: Path, write_jsonl: Writer, make_index: Maker, tmp_path: Path
) -> None:
    path = write_jsonl(*(row(n) for n in range(40)), "{")
    process = stopped_before(3, path, thinking_tokenizer, tmp_path / "index", 1200)
    process.kill()
    process.join()
    (directory,) = (tmp_path / "index").iterdir()
    finished = sorted((directory / "parts").glob("00000?"))
    assert [part.name for part in finished] == ["000000", "000001", "000002"]
    tokens = finished[1] / "conversations.bin"
    damaged = bytearray(tokens.read_bytes())
    damaged[40] ^= 1
    tokens.write_bytes(damaged)

    made: list[str] = []
    original = tokenize._make_part
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "_make_part", lambda job: made.append(f"{job.number:06d}") or original(job))
        resumed = make_index(path, part_bytes=777)  # other parts than were planned: the plan that was begun holds
    assert "000000" not in made
    assert "000001" in made, "its content is not what was noted"
    assert "000002" not in made
    assert set(made) > {"000003"}
    assert contents(resumed) == contents(make_index(path, index_dir=tmp_path / "whole"))
    assert not (directory / "parts").exists()


def test_asked_to_stop_it_keeps_what_is_finished(
    thinking_tokenizer: Path, write_jsonl: Writer, make_index: Maker, tmp_path: Path
) -> None:
    path = write_jsonl(*(row(n) for n in range(40)))
    source = describe_source(
        [str(path)], str(thinking_tokenizer), "<think>", "</think>", index_dir=str(tmp_path / "index")
    )
    calls = []

    def alive() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_index(source, processes=1, alive=alive, part_bytes=1200)
    finished = sorted(part.name for part in (source.directory / "parts").glob("00000?"))
    assert finished == ["000000", "000001", "000002"]
    assert contents(make_index(path)) == contents(make_index(path, index_dir=tmp_path / "whole"))


def test_two_that_ask_at_once_make_it_once(
    thinking_tokenizer: Path, write_jsonl: Writer, make_index: Maker, tmp_path: Path
) -> None:
    path = write_jsonl(*(row(n) for n in range(10)))
    first = stopped_before(0, path, thinking_tokenizer, tmp_path / "index", 10**9)  # it holds the lock now
    beats: list[float] = []

    def alive() -> None:
        beats.append(time.monotonic())
        if len(beats) == 2:
            first.kill()

    source = describe_source(
        [str(path)], str(thinking_tokenizer), "<think>", "</think>", index_dir=str(tmp_path / "index")
    )
    beside_the_other: list[bool] = []
    original = tokenize._make_part
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "_make_part", lambda job: beside_the_other.append(first.is_alive()) or original(job))
        prepare_index(source, processes=1, alive=alive)
    first.join()
    assert beside_the_other == [False], "it waited for the other, and took over when that died"
    assert len(SftIndex(source.directory)) == 10


def without_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_without_locks_it_warns_and_leaves_alone_what_another_maker_has_begun(
    write_jsonl: Writer, make_index: Maker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two makers, one inside the other: the second begins and ends while the first merges."""
    path = write_jsonl(*(row(n) for n in range(10)))
    merging: list[Path] = []
    original = merge._write

    def write(fresh: Path, *arguments: Any) -> Any:
        done = original(fresh, *arguments)
        merging.append(fresh)
        if len(merging) == 1:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(merge.socket, "gethostname", lambda: "another")
                make_index(path)
            assert (fresh / "conversations.bin").is_file(), "the second has not removed what the first had written"
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build.fcntl, "flock", without_locks)
        patch.setattr(merge, "_write", write)
        index = make_index(path)
    first, second = merging
    assert first.parent == second.parent
    assert first != second
    assert len(index) == 10
    assert not list(index.directory.glob("merged*"))
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 2
    assert all(text.startswith(f"{index.directory}: no lock can be had there (No locks available)") for text in told)
    whole = make_index(path, index_dir=tmp_path / "whole")
    names = contents(whole).keys()
    assert {name: (index.directory / name).read_bytes() for name in names} == contents(whole)


def test_what_a_killed_merge_left_is_removed_by_who_holds_the_lock(
    thinking_tokenizer: Path, write_jsonl: Writer, make_index: Maker, tmp_path: Path
) -> None:
    path = write_jsonl(*(row(n) for n in range(10)))
    source = describe_source(
        [str(path)], str(thinking_tokenizer), "<think>", "</think>", index_dir=str(tmp_path / "index")
    )
    for name in ("merged", "merged.node7.123"):
        (source.directory / name).mkdir(parents=True)
        (source.directory / name / "rows.parquet").write_bytes(b"half")
    index = make_index(path)
    assert len(index) == 10
    assert not list(source.directory.glob("merged*"))


def test_a_disk_that_is_full_is_told_with_the_setting(
    thinking_tokenizer: Path, write_jsonl: Writer, tmp_path: Path
) -> None:
    path = write_jsonl(*(row(n) for n in range(40)))
    here, there = FORK.Pipe()
    process = FORK.Process(
        target=make_without_room, args=([str(path)], thinking_tokenizer, tmp_path / "index", 2048, there), daemon=True
    )
    process.start()
    assert here.poll(60)
    text = here.recv()
    process.join()
    assert "data.index_dir: the tokens of data.sft cannot be written to" in text
    assert "File too large. Make room, or set data.index_dir; what is finished is kept." in text


def test_several_processes_make_the_same(write_jsonl: Writer, make_index: Maker, tmp_path: Path) -> None:
    path = write_jsonl(*(row(n) for n in range(40)), "{")
    several = make_index(path, processes=2, part_bytes=1500)
    assert contents(several) == contents(make_index(path, index_dir=tmp_path / "one"))


def test_a_changed_input_or_tokenizer_is_another_index(
    thinking_tokenizer: Path, make_tokenizer: Callable[..., Path], write_jsonl: Writer
) -> None:
    def key(path: Path, tokenizer: Path = thinking_tokenizer, think_end: str = "</think>") -> str:
        return describe_source([str(path)], str(tokenizer), "<think>", think_end).directory.name

    path = write_jsonl(row(1))
    first = key(path)
    assert key(path) == first
    assert describe_source([str(path)], str(thinking_tokenizer), "", "").directory.parent == path.parent / "klear_index"
    other_template = make_tokenizer("{%- for m in messages -%}{{ m.content }}{%- endfor -%}")
    keys = {first, key(path, other_template), key(path, think_end="</t>")}
    os.utime(path, ns=(1, 1))
    keys.add(key(path))
    write_jsonl(row(1), row(2))
    keys.add(key(path))
    assert len(keys) == 5


def test_a_damaged_or_missing_index_is_refused(write_jsonl: Writer, make_index: Maker, tmp_path: Path) -> None:
    index = make_index(write_jsonl(row(1), row(2)))
    with pytest.raises(DataError, match=r"data\.index_dir: .*nowhere/index\.json is not there"):
        SftIndex(tmp_path / "nowhere")
    tokens = index.directory / "conversations.bin"
    tokens.write_bytes(tokens.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"conversations\.bin in .* changed since it was made"):
        SftIndex(index.directory)
    (index.directory / "index.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot be read .*; remove it to make it anew"):
        SftIndex(index.directory)


def test_the_command_line(
    thinking_tokenizer: Path, write_jsonl: Writer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(row(1), row(2), name="shard-0.jsonl")
    write_jsonl(row(3), "{", name="shard-1.jsonl")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"run: {{dir: {tmp_path}/run}}\ntokenizer: {{dir: {thinking_tokenizer}}}\n"
        f"parallel: {{tp: 4}}\ndata: {{sft: ['{tmp_path}/shard-*.jsonl'], index_dir: {tmp_path}/index}}\n"
    )
    assert main([str(config), "data.max_reject_share=0.01"]) == 2
    assert capsys.readouterr().err.splitlines()[-3:] == [
        "data.sft: 1 of 4 rows cannot be used (25.0%):",
        f"  - {tmp_path}/shard-1.jsonl:2: is not JSON: Expecting property name enclosed in double quotes at column 1",
        "Mend them, or leave them out: data.max_reject_share is 0.01.",
    ]
    assert main([str(config)]) == 0
    told, warned = capsys.readouterr()
    assert f"  - {tmp_path}/shard-1.jsonl:2: is not JSON" in warned
    assert "3 conversations, " in told
    assert "1 rows rejected, see " in told
    assert main([str(config), "data.sft=[/nowhere]"]) == 2
    assert "data.sft: no file /nowhere" in capsys.readouterr().err
    shown = subprocess.run(
        [sys.executable, "-m", "megatron_klear.data", "-h"], capture_output=True, text=True, check=True
    )
    assert "python -m megatron_klear.data CONFIG.yaml" in shown.stdout


def test_files_alike_in_name_size_and_time_have_indexes_of_their_own(
    make_index: Maker, write_jsonl: Writer, tmp_path: Path
) -> None:
    """As archives and buckets that set times leave them."""
    found = []
    for number in (1, 2):
        made = write_jsonl({**row(1), "id": f"r{number}"})
        path = tmp_path / f"set{number}" / "rows.jsonl"
        path.parent.mkdir()
        made.rename(path)
        os.utime(path, ns=(10**18, 10**18))
        found.append(make_index(path))
    first, second = found
    assert (tmp_path / "set1" / "rows.jsonl").stat().st_size == (tmp_path / "set2" / "rows.jsonl").stat().st_size
    assert first.directory != second.directory
    assert contents(first)["rows.parquet"] != contents(second)["rows.parquet"]


def test_rows_without_a_source_are_used_from_parquet_too(make_index: Maker, tmp_path: Path) -> None:
    rows = [row(number) for number in range(10)]
    for without in rows[1:]:
        without["source"] = None
    index = make_index(write_parquet(tmp_path / "rows.parquet", rows))
    assert (index.directory / "rejects.jsonl").read_text() == ""
    assert len(index) == 10


def test_a_parquet_file_without_row_groups_is_an_empty_data_set(make_index: Maker, tmp_path: Path) -> None:
    path = tmp_path / "empty.parquet"
    with pq.ParquetWriter(path, pa.Table.from_pylist([row(0)]).schema):
        pass
    with pytest.raises(DataError, match=r"data.sft: no rows at all in .*empty\.parquet"):
        make_index(path)
