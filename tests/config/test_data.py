"""Which files `data.sft` names, and settings of SFT data that cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_klear.config import checks as checks_file
from megatron_klear.config import load_data_settings, row_files
from megatron_klear.errors import ConfigError


def touch(directory: Path, *names: str) -> list[str]:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("{}\n")
    return [str(directory / name) for name in names]


def test_directories_and_patterns_name_their_files_in_order(tmp_path):
    files = touch(tmp_path, "a/2.parquet", "a/10.jsonl", "b.jsonl", "c/x/1.jsonl", "c/y/0.jsonl", "a[1].jsonl")
    touch(tmp_path, "a/notes.txt", "a/klear_index/k/rejects.jsonl")
    assert row_files([str(tmp_path / "a")]) == [files[1], files[0]]
    assert row_files([files[2], f"{tmp_path}/c/**/*.jsonl"]) == [files[2], files[3], files[4]]
    assert row_files([f"{tmp_path}/a/**/*.jsonl"]) == [files[1]], "an index has such files as well"
    assert row_files([files[5]]) == [files[5]], "a file of that very name is no pattern"
    assert row_files([f"{tmp_path}/none-*.jsonl"]) == [f"{tmp_path}/none-*.jsonl"]


def test_what_names_nothing_or_something_twice_is_told(problems, tmp_path):
    (file,) = touch(tmp_path, "d/a.jsonl")
    (tmp_path / "empty").mkdir()
    entries = f"{tmp_path}/empty,{tmp_path}/none-*.jsonl,{tmp_path}/d,{file}"
    assert problems(f"data.sft=[{entries}]", entry="sft") == [
        f"data.sft: directory {tmp_path}/empty holds no .jsonl or .parquet file",
        f"data.sft: no file {tmp_path}/none-*.jsonl",
        f"data.sft: {file} is named more than once",
    ]


def test_bins_fit_a_context_parallel_size_that_divides(problems):
    (text,) = problems("sft.batch_bins=8", "parallel.cp=3", "packing.token_budget=1536", entry="sft", world_size=3)
    assert text.startswith("sft.batch_bins: got 8; sequences lie in bins at multiples of 32 tokens")
    assert problems("sft.batch_bins=8", "parallel.cp=4", entry="sft", world_size=4) == []
    assert problems("parallel.cp=3", "packing.token_budget=1536", entry="sft", world_size=3) == []


def test_dali_is_asked_for_and_not_there(problems, monkeypatch):
    assert problems("data.loader=dali", entry="sft") == []
    monkeypatch.setattr(checks_file, "dali_installed", lambda: False)
    (text,) = problems("data.loader=dali", entry="sft")
    assert text.startswith("data.loader: got dali, and nvidia-dali-cuda130 is not installed")
    assert problems("data.loader=auto", entry="sft") == []


def test_tokenizing_needs_neither_model_nor_ranks(config_file, tmp_path):
    settings = load_data_settings(config_file, ["model.hf_dir=/nowhere", "parallel.tp=64", "model.preset=null"])
    assert settings.data.sft == (str(tmp_path / "sft.jsonl"),)
    with pytest.raises(ConfigError) as caught:
        load_data_settings(config_file, ["data.sft=[]", "tokenizer.dir=/nowhere", "data.max_reject_share=2"])
    paths = [text.split(":")[0] for text in caught.value.problems]
    assert sorted(paths) == ["data.max_reject_share", "data.sft", "tokenizer.dir"]
