"""Conversions in one process: exactness, what travels along, and what is refused."""

from __future__ import annotations

import json
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from megatron_klear.checkpoint import layout
from megatron_klear.checkpoint.convert_from_hf import hf_to_megatron
from megatron_klear.checkpoint.convert_to_hf import megatron_to_hf
from megatron_klear.checkpoint.safetensors_stream import StoredTensor
from megatron_klear.checkpoint.torch_dist_stream import TorchDistReader
from megatron_klear.config.yarn import YarnSettings
from megatron_klear.errors import CheckpointError, DataError

MakeHf = Callable[..., Path]


@pytest.fixture(scope="module")
def hf(make_hf: MakeHf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied, bfloat16, several files."""
    return make_hf(tmp_path_factory.mktemp("source") / "hf", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def run(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory that it was converted to."""
    out = tmp_path_factory.mktemp("converted") / "run"
    hf_to_megatron(hf, out)
    return out


@pytest.fixture
def damaged(run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage; the checkpoint in it."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run" / "checkpoints" / "step_00000000"


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert ours[name].shape == tensor.shape
        assert torch.equal(bits(ours[name]), bits(tensor)), name


def everything_below(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


def save_metadata_free(tensors: dict[str, torch.Tensor], hf: Path, target: Path) -> Path:
    """A directory like `hf` with other weights, in one file."""
    shutil.copytree(hf, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, target / "model.safetensors")
    return target


# --- exactness ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_multiple", [1, 128])
def test_there_and_back_is_exact(
    make_hf: MakeHf, tmp_path: Path, tied: bool, dtype: torch.dtype, vocab_multiple: int
) -> None:
    hf = make_hf(tmp_path / "hf", dtype=dtype, tie_word_embeddings=tied, seed=3)
    hf_to_megatron(hf, tmp_path / "run", vocab_multiple=vocab_multiple)
    done = megatron_to_hf(tmp_path / "run", tmp_path / "back", shard_gb=1e-4)
    original = tensors_of(hf)
    assert_same_bits(tensors_of(tmp_path / "back"), original)
    assert done.num_tensors == len(original)
    assert done.num_bytes == sum(t.nbytes for t in original.values())
    for name in ("config.json", "generation_config.json", "tokenizer.json", "merges.txt", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes(), name


def test_special_values_survive(hf: Path, tmp_path: Path) -> None:
    tensors = tensors_of(hf)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for number, tensor in enumerate(tensors.values()):
        flat = tensor.view(torch.int16).flatten()
        flat.copy_(patterns.roll(number * 997).repeat(flat.numel() // patterns.numel() + 1)[: flat.numel()])
    source = save_metadata_free(tensors, hf, tmp_path / "hf")
    hf_to_megatron(source, tmp_path / "run")
    megatron_to_hf(tmp_path / "run", tmp_path / "back")
    assert_same_bits(tensors_of(tmp_path / "back"), tensors)  # every bfloat16 there is: NaNs, infinities, -0


def test_transformers_computes_the_same_with_the_exported_model(hf: Path, run: Path, tmp_path: Path) -> None:
    megatron_to_hf(run, tmp_path / "back", shard_gb=1e-4)
    ids = torch.arange(40).view(2, 20)
    before = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)(ids).logits
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)(ids).logits
    assert torch.equal(before, after)


def test_number_format_is_converted_when_asked(hf: Path, tmp_path: Path) -> None:
    hf_to_megatron(hf, tmp_path / "run", dtype="float32")
    step = tmp_path / "run" / "checkpoints" / "step_00000000"
    assert set(TorchDistReader(step).dtypes.values()) == {torch.float32}
    assert yaml.safe_load((step / "config.yaml").read_text())["model"]["dtype"] == "float32"
    megatron_to_hf(tmp_path / "run", tmp_path / "wide")
    assert_same_bits(tensors_of(tmp_path / "wide"), {name: t.float() for name, t in tensors_of(hf).items()})
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    megatron_to_hf(tmp_path / "run", tmp_path / "narrow", dtype="bfloat16")
    assert_same_bits(tensors_of(tmp_path / "narrow"), tensors_of(hf))
    assert (tmp_path / "narrow" / "config.json").read_bytes() == (hf / "config.json").read_bytes()


def test_a_vocabulary_in_many_blocks(monkeypatch: pytest.MonkeyPatch, hf: Path, tmp_path: Path) -> None:
    monkeypatch.setattr("megatron_klear.checkpoint.convert_from_hf._BLOCK_BYTES", 64 * 2 * 45)
    hf_to_megatron(hf, tmp_path / "run")
    reader = TorchDistReader(tmp_path / "run" / "checkpoints" / "step_00000000")
    assert reader.row_blocks("output_layer.weight") == [(n, min(n + 45, 384)) for n in range(0, 384, 45)]
    megatron_to_hf(tmp_path / "run", tmp_path / "back")
    assert_same_bits(tensors_of(tmp_path / "back"), tensors_of(hf))


def test_a_checkpoint_in_many_files(monkeypatch: pytest.MonkeyPatch, hf: Path, tmp_path: Path) -> None:
    monkeypatch.setattr("megatron_klear.checkpoint.torch_dist_stream._FILE_BYTES", 50_000)
    hf_to_megatron(hf, tmp_path / "run")
    assert len(list((tmp_path / "run" / "checkpoints" / "step_00000000").glob("*.distcp"))) > 5
    megatron_to_hf(tmp_path / "run", tmp_path / "back")
    assert_same_bits(tensors_of(tmp_path / "back"), tensors_of(hf))


def test_random_boxes_of_a_checkpoint_are_read_right(hf: Path, run: Path) -> None:
    reader = TorchDistReader(run / "checkpoints" / "step_00000000")
    key = "decoder.layers.mlp.linear_fc2.weight"
    whole = torch.stack([tensors_of(hf)[f"model.layers.{n}.mlp.down_proj.weight"] for n in range(4)])
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        starts = [int(torch.randint(size, (), generator=generator)) for size in whole.shape]
        sizes = [
            1 + int(torch.randint(size - start, (), generator=generator))
            for size, start in zip(whole.shape, starts, strict=True)
        ]
        expected = whole
        for dim, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            expected = expected.narrow(dim, start, size)
        assert torch.equal(reader.read(key, starts, sizes), expected)


# --- safetensors -------------------------------------------------------------------------------------------------


def test_files_stay_below_the_limit_and_the_index_is_right(run: Path, tmp_path: Path) -> None:
    megatron_to_hf(run, tmp_path / "back", shard_gb=1e-4)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert files == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    total = 0
    for file in files:
        with safe_open(tmp_path / "back" / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            names = set(opened.keys())
            assert names == {name for name, place in index["weight_map"].items() if place == file}
            size = sum(opened.get_tensor(name).nbytes for name in names)
            assert size <= 100_000
            total += size
    assert index["metadata"]["total_size"] == total


def test_one_file_has_no_index(run: Path, tmp_path: Path) -> None:
    megatron_to_hf(run, tmp_path / "back")
    assert [path.name for path in (tmp_path / "back").glob("*safetensors*")] == ["model.safetensors"]


# --- what travels along ------------------------------------------------------------------------------------------


def test_the_checkpoint_describes_itself(hf: Path, run: Path) -> None:
    step = run / "checkpoints" / "step_00000000"
    model = yaml.safe_load((step / "config.yaml").read_text())["model"]
    assert (model["num_layers"], model["vocab_size"], model["tie_embeddings"]) == (4, 300, False)
    assert model["dtype"] == "bfloat16"
    assert json.loads((step / "run_state.json").read_text())["step"] == 0
    expected = layout.read_manifest(step)
    assert sorted(expected) == layout.files_of(step)
    assert {"hf_files/config.json", "hf_files/tokenizer.json", "hf_files/generation_config.json"} <= set(expected)
    assert layout.damage(step, expected) == []
    assert everything_below(run.parent / "run" / "checkpoints")[0] == "step_00000000"  # nothing hidden is left


def rewrite(step: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change a YAML file of a checkpoint and its manifest with it, as another run would have written them."""
    path = step / name
    path.write_text(yaml.safe_dump(change(yaml.safe_load(path.read_text()))))
    layout.write_manifest(step, layout.checksums(step, layout.files_of(step)))


def without_hf_files(step: Path) -> None:
    shutil.rmtree(step / "hf_files")
    layout.write_manifest(step, layout.checksums(step, layout.files_of(step)))


def test_config_is_made_from_the_settings_when_none_was_carried(hf: Path, damaged: Path, tmp_path: Path) -> None:
    without_hf_files(damaged)
    done = megatron_to_hf(damaged, tmp_path / "back", tokenizer=hf)
    assert done.notes == ()
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == 7
    ids = torch.arange(40).view(2, 20)
    before = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    assert torch.equal(before(ids).logits, after(ids).logits)
    for name in ("rope_parameters", "rms_norm_eps", "max_position_embeddings", "initializer_range", "head_dim"):
        assert getattr(after.config, name) == getattr(before.config, name), name


def test_files_of_the_run_that_training_started_from_are_used(
    run: Path, damaged: Path, hf: Path, tmp_path: Path
) -> None:
    for number, start in enumerate((run, run / "checkpoints", run / "checkpoints" / "step_00000000")):
        step = tmp_path / f"trained{number}" / "checkpoints" / "step_00000009"
        shutil.copytree(damaged, step)
        rewrite(
            step, "config.yaml", lambda tree, at=start: {"model": tree["model"], "checkpoint": {"start_from": str(at)}}
        )
        without_hf_files(step)
        done = megatron_to_hf(step, tmp_path / f"back{number}")
        assert done.notes == ()
        for name in ("config.json", "generation_config.json", "tokenizer.json"):
            assert (tmp_path / f"back{number}" / name).read_bytes() == (hf / name).read_bytes(), name


def test_files_of_the_first_checkpoint_of_the_same_run_are_used(damaged: Path, hf: Path, tmp_path: Path) -> None:
    step = damaged.with_name("step_00000009")
    shutil.copytree(damaged, step)
    without_hf_files(step)
    megatron_to_hf(damaged.parent, tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()


def test_the_tokenizer_that_training_used_goes_first(damaged: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    rewrite(damaged, "config.yaml", lambda tree: {**tree, "tokenizer": {"dir": str(tmp_path / "tokenizer")}})
    megatron_to_hf(damaged, tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "back" / "merges.txt").exists()  # files of two tokenizers are not mixed


def test_missing_tokenizer_is_said(damaged: Path, tmp_path: Path) -> None:
    without_hf_files(damaged)
    done = megatron_to_hf(damaged, tmp_path / "back")
    assert len(done.notes) == 1
    assert "--tokenizer" in done.notes[0]


def test_files_of_the_directory_a_run_was_started_from_are_used(hf: Path, damaged: Path, tmp_path: Path) -> None:
    rewrite(damaged, "config.yaml", lambda tree: {"model": {**tree["model"], "hf_dir": str(hf)}})
    without_hf_files(damaged)
    megatron_to_hf(damaged, tmp_path / "back")
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes(), name


def test_what_training_changed_is_changed_in_the_config(hf: Path, damaged: Path, tmp_path: Path) -> None:
    changed = {"rope_theta": 1e6, "max_position_embeddings": 4096}
    rewrite(damaged, "config.yaml", lambda tree: {"model": {**tree["model"], **changed}})
    megatron_to_hf(damaged, tmp_path / "back")
    before = json.loads((hf / "config.json").read_text())
    after = json.loads((tmp_path / "back" / "config.json").read_text())
    before["rope_parameters"]["rope_theta"] = 1e6
    before["max_position_embeddings"] = 4096
    assert after == before


def test_newest_whole_checkpoint_of_a_run_is_used(damaged: Path, tmp_path: Path) -> None:
    root = damaged.parent
    for step in (3, 7):
        shutil.copytree(damaged, layout.step_directory(root, step))
    (layout.step_directory(root, 7) / ".metadata").write_bytes(b"")
    for number, place in enumerate((root.parent, root)):
        done = megatron_to_hf(place, tmp_path / f"back{number}")
        assert done.source == layout.step_directory(root, 3)
        assert len(done.notes) == 1
        assert "step_00000007 is damaged" in done.notes[0]


# --- refusals ----------------------------------------------------------------------------------------------------


def refused(hf: Path, tmp_path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        hf_to_megatron(hf, tmp_path / "runs" / "out", **options)
    assert not (tmp_path / "runs").exists()
    return str(caught.value)


def test_missing_unexpected_and_misshapen_tensors_are_all_named(hf: Path, tmp_path: Path) -> None:
    tensors = tensors_of(hf)
    del tensors["model.layers.2.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(96)
    tensors["lm_head.weight"] = torch.zeros(299, 64)
    text = refused(save_metadata_free(tensors, hf, tmp_path / "bad"), tmp_path)
    assert "missing: model.layers.2.mlp.up_proj.weight [96, 64]" in text
    assert "missing: model.norm.weight [64]" in text
    assert "unexpected: model.layers.0.self_attn.q_proj.bias [96]" in text
    assert "wrong shape: lm_head.weight is [299, 64], must be [300, 64]" in text


def test_lm_head_of_a_tied_model_is_ignored(make_hf: MakeHf, tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", tie_word_embeddings=True)
    tensors = tensors_of(hf)
    source = save_metadata_free(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, hf, tmp_path / "extra"
    )
    hf_to_megatron(source, tmp_path / "run")
    megatron_to_hf(tmp_path / "run", tmp_path / "back")
    assert_same_bits(tensors_of(tmp_path / "back"), tensors)


def test_a_file_that_the_index_names_is_missing(hf: Path, tmp_path: Path) -> None:
    shutil.copytree(hf, tmp_path / "bad")
    sorted((tmp_path / "bad").glob("*.safetensors"))[1].unlink()
    assert "missing file: model-00002-of-" in refused(tmp_path / "bad", tmp_path)


def test_files_beside_the_index_are_not_read(hf: Path, tmp_path: Path) -> None:
    shutil.copytree(hf, tmp_path / "more")
    save_file({"stray": torch.zeros(3)}, tmp_path / "more" / "consolidated.safetensors")
    hf_to_megatron(tmp_path / "more", tmp_path / "run")
    megatron_to_hf(tmp_path / "run", tmp_path / "back")
    assert_same_bits(tensors_of(tmp_path / "back"), tensors_of(hf))


def test_a_tensor_in_two_files(hf: Path, tmp_path: Path) -> None:
    source = save_metadata_free(tensors_of(hf), hf, tmp_path / "bad")
    save_file({"model.norm.weight": torch.zeros(64)}, source / "other.safetensors")
    assert "twice: model.norm.weight is in model.safetensors and other.safetensors" in refused(source, tmp_path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-100], "cut short"),
        (lambda data: data[:5], "not a safetensors file"),
        (lambda data: b"", "not a safetensors file"),
        (lambda data: struct.pack("<Q", 2**60) + data[8:], "not a safetensors file"),
        (lambda data: data[:8] + b"x" + data[9:], "header is damaged"),
        (lambda data: data.replace(b'"data_offsets"', b'"date_offsets"', 1), "header is damaged"),
        (lambda data: data.replace(b'"shape":[64]', b'"shape":[63]', 1), "its shape needs 126"),
    ],
    ids=["short", "no header", "empty", "long header", "json", "offsets", "size"],
)
def test_damaged_safetensors(hf: Path, tmp_path: Path, damage: Callable[[bytes], bytes], said: str) -> None:
    source = save_metadata_free(tensors_of(hf), hf, tmp_path / "bad")
    file = source / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    text = refused(source, tmp_path)
    assert said in text
    assert str(file) in text


def test_integer_weights(hf: Path, tmp_path: Path) -> None:
    tensors = tensors_of(hf)
    tensors["model.norm.weight"] = torch.ones(64, dtype=torch.int8)
    text = refused(save_metadata_free(tensors, hf, tmp_path / "bad"), tmp_path)
    assert "number format: model.norm.weight is I8, must be one of BF16, F16, F32" in text


def test_layers_of_several_formats_are_kept_only_if_they_are_not_stacked(hf: Path, tmp_path: Path) -> None:
    tensors = tensors_of(hf)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    mixed = save_metadata_free(tensors, hf, tmp_path / "mixed")
    hf_to_megatron(mixed, tmp_path / "run")
    megatron_to_hf(tmp_path / "run", tmp_path / "back")
    assert_same_bits(tensors_of(tmp_path / "back"), tensors)
    name = "model.layers.3.mlp.down_proj.weight"
    tensors[name] = tensors[name].float()
    uneven = save_metadata_free(tensors, hf, tmp_path / "uneven")
    assert f"{name} is F32, model.layers.0.mlp.down_proj.weight is BF16" in refused(uneven, tmp_path)
    hf_to_megatron(uneven, tmp_path / "run2", dtype="float32")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"num_key_value_heads": 3}, "must divide"),
        ({"attention_bias": True}, "attention_bias is set"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"head_dim": 23}, "head_dim: got 23, must be even"),
    ],
    ids=["family", "heads", "bias", "missing", "odd"],
)
def test_other_models(hf: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    shutil.copytree(hf, tmp_path / "bad")
    path = tmp_path / "bad" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    text = refused(tmp_path / "bad", tmp_path)
    assert said in text
    assert "model.hf_dir" not in text  # there is no such setting here


def test_nothing_there(hf: Path, tmp_path: Path) -> None:
    assert "no such directory" in refused(tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(tmp_path / "empty", tmp_path)
    shutil.copyfile(hf / "config.json", tmp_path / "empty" / "config.json")
    assert "no *.safetensors files" in refused(tmp_path / "empty", tmp_path)


def test_a_run_that_has_checkpoints_is_not_added_to(hf: Path, damaged: Path) -> None:
    before = everything_below(damaged.parent)
    with pytest.raises(DataError, match="already holds checkpoints"):
        hf_to_megatron(hf, damaged.parent.parent)
    assert everything_below(damaged.parent) == before


def export_refused(checkpoint: Path, tmp_path: Path) -> str:
    with pytest.raises(DataError) as caught:
        megatron_to_hf(checkpoint, tmp_path / "exports" / "out")
    assert not (tmp_path / "exports").exists()
    return str(caught.value)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "config.yaml", "common.pt", "hf_files/config.json"])
def test_one_flipped_bit_is_refused(damaged: Path, tmp_path: Path, name: str) -> None:
    data = bytearray((damaged / name).read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / name).write_bytes(data)
    assert f"{name} has another checksum" in export_refused(damaged, tmp_path)
    assert f"{name} has another checksum" in export_refused(damaged.parent.parent, tmp_path)


def test_missing_and_short_files_are_all_named(damaged: Path, tmp_path: Path) -> None:
    (damaged / "common.pt").unlink()
    with (damaged / "__0_0.distcp").open("r+b") as file:
        file.truncate(1000)
    text = export_refused(damaged, tmp_path)
    assert "common.pt is missing" in text
    assert "__0_0.distcp has 1000 bytes" in text


def test_no_manifest(damaged: Path, tmp_path: Path) -> None:
    (damaged / "manifest.json").unlink()
    assert "no readable manifest.json" in export_refused(damaged, tmp_path)


def test_a_checkpoint_of_another_model_than_its_settings_say(damaged: Path, tmp_path: Path) -> None:
    other = {"num_layers": 5, "tie_embeddings": True, "ffn_hidden_size": 100}
    rewrite(damaged, "config.yaml", lambda tree: {"model": {**tree["model"], **other}})
    text = export_refused(damaged, tmp_path)
    assert "unexpected: output_layer.weight [384, 64]" in text
    assert "wrong shape: decoder.layers.mlp.linear_fc2.weight is [4, 64, 96], must be [5, 64, 100]" in text
    rewrite(damaged, "config.yaml", lambda tree: {"model": {**tree["model"], "tie_embeddings": False}})
    rewrite(damaged, "config.yaml", lambda tree: {"model": {**tree["model"], "vocab_size": 385}})
    assert "embedding.word_embeddings.weight is [384, 64], must be [512, 64]" in export_refused(damaged, tmp_path)


@pytest.mark.parametrize("text", ["a: 1\n", "model: 3\n", "model: {num_layers: 2}\n", "model: {layers: 2}\n", "[", ""])
def test_settings_without_a_model(damaged: Path, tmp_path: Path, text: str) -> None:
    (damaged / "config.yaml").write_text(text)
    layout.write_manifest(damaged, layout.checksums(damaged, layout.files_of(damaged)))
    assert str(damaged / "config.yaml") in export_refused(damaged, tmp_path)


def test_nothing_to_export(tmp_path: Path) -> None:
    assert "no such directory" in export_refused(tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "no checkpoints there" in export_refused(tmp_path / "empty", tmp_path)


def test_a_directory_with_something_in_it_is_not_written_to(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    megatron_to_hf(run, tmp_path / "out")
    before = everything_below(tmp_path)
    with pytest.raises(DataError, match="already exists"):
        megatron_to_hf(run, tmp_path / "out")
    assert everything_below(tmp_path) == before


def test_a_tokenizer_directory_without_tokenizer(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer files"):
        megatron_to_hf(run, tmp_path / "out", tokenizer=tmp_path)
    assert everything_below(tmp_path) == []


# --- failures while writing --------------------------------------------------------------------------------------


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """The system refuses to let any file of this process grow beyond 100 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files_only")
def test_a_write_that_fails_leaves_nothing(hf: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing was kept"):
        hf_to_megatron(hf, tmp_path / "runs" / "out")
    assert everything_below(tmp_path) == []
    with pytest.raises(CheckpointError, match="nothing was kept"):
        megatron_to_hf(run, tmp_path / "exports" / "out")
    assert everything_below(tmp_path) == []


def test_too_little_space_is_noticed_before_writing(
    monkeypatch: pytest.MonkeyPatch, hf: Path, run: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"0\.00 GB are needed and 0\.00 GB are free"):
        hf_to_megatron(hf, tmp_path / "runs" / "out")
    with pytest.raises(CheckpointError, match="are needed"):
        megatron_to_hf(run, tmp_path / "exports" / "out")
    assert everything_below(tmp_path) == []


def test_a_source_that_shrinks_while_it_is_read(monkeypatch: pytest.MonkeyPatch, hf: Path, tmp_path: Path) -> None:
    source = save_metadata_free(tensors_of(hf), hf, tmp_path / "hf")
    whole = StoredTensor.whole

    def cut_then_read(stored: StoredTensor) -> torch.Tensor:
        with stored.file.open("r+b") as file:
            file.truncate(60_000)
        return whole(stored)

    monkeypatch.setattr(StoredTensor, "whole", cut_then_read)
    with pytest.raises(DataError, match="cut short while being read"):
        hf_to_megatron(source, tmp_path / "runs" / "out")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("carried", [True, False])
def test_yarn_of_the_settings_is_written_for_transformers_and_the_weights_stay(
    carried: bool, hf: Path, damaged: Path, tmp_path: Path
) -> None:
    scaling = {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 512}
    rewrite(damaged, "config.yaml", lambda tree: {**tree, "yarn": {"factor": 2.5}})
    if not carried:
        without_hf_files(damaged)
    megatron_to_hf(damaged, tmp_path / "back")
    before = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    assert after.config.rope_parameters == {**scaling, "rope_theta": 5e4}
    assert after.config.max_position_embeddings == 1280
    assert all(torch.equal(one, other) for one, other in zip(before.parameters(), after.parameters(), strict=True))
    ids = torch.arange(40).view(2, 20)
    assert not torch.allclose(before(ids).logits, after(ids).logits)
    asked = Qwen3Config(**{**before.config.to_dict(), "rope_parameters": after.config.rope_parameters})
    reference = Qwen3ForCausalLM(asked)
    reference.load_state_dict(before.state_dict())
    assert torch.equal(reference(ids).logits, after(ids).logits)

    megatron_to_hf(damaged, tmp_path / "plain", yarn=YarnSettings())
    assert "yarn" not in (tmp_path / "plain" / "config.json").read_text(), "asked for without"
    # What was exported can be converted back, and says so again when it is exported.
    hf_to_megatron(tmp_path / "back", tmp_path / "again")
    megatron_to_hf(tmp_path / "again", tmp_path / "twice", yarn=None)
    assert (tmp_path / "twice" / "config.json").read_bytes() == (tmp_path / "back" / "config.json").read_bytes()
