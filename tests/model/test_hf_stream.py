"""Weights under Hugging Face names: out of the model, into it, and directories that hold another model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_klear.config import Architecture
from megatron_klear.conformance.reference import reference_model
from megatron_klear.errors import CheckpointError
from megatron_klear.model import Qwen3Model, hf_named_tensors, load_hf_weights, open_hf_directory
from megatron_klear.model.hf_stream import compare_hf_tensors, local_parameters
from megatron_klear.records import ParallelContext


def theirs(arch: Architecture, seed: int = 0) -> dict[str, torch.Tensor]:
    """What transformers would save."""
    state = {
        name: tensor.detach().contiguous() for name, tensor in reference_model(arch, seed=seed).state_dict().items()
    }
    if arch.tie_embeddings:
        state.pop("lm_head.weight", None)
    return state


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_come_out_as_they_went_in(
    tied: bool,
    dtype: str,
    make_arch: Callable[..., Architecture],
    make_model: Callable[..., Qwen3Model],
    context: ParallelContext,
) -> None:
    arch = make_arch(tie_embeddings=tied)
    stream = list(hf_named_tensors(make_model(arch, dtype=dtype), arch, context))
    names = [name for name, _ in stream]
    assert len(names) == len(set(names))
    found, wanted = dict(stream), theirs(arch)
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == getattr(torch, dtype)
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name


def test_loading_into_the_model_again_changes_no_bit_and_padding_rows_are_zero(
    make_arch: Callable[..., Architecture], make_model: Callable[..., Qwen3Model], context: ParallelContext
) -> None:
    arch = make_arch()
    model = make_model(arch)
    stream = dict(hf_named_tensors(model, arch, context))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    stream = {name: tensor.clone() for name, tensor in stream.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    load_hf_weights(model, arch, context, stream.__getitem__)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert not model.embedding.word_embeddings.weight[arch.vocab_size :].any()


def test_something_else_than_weights_can_be_streamed(
    make_arch: Callable[..., Architecture], make_model: Callable[..., Qwen3Model], context: ParallelContext
) -> None:
    arch = make_arch()
    model = make_model(arch)
    doubled = dict(hf_named_tensors(model, arch, context, of=lambda parameter: parameter.detach() * 2))
    for name, tensor in theirs(arch).items():
        assert torch.equal(doubled[name], tensor * 2), name


def test_weights_are_settled_before_they_are_read(
    make_arch: Callable[..., Architecture], make_model: Callable[..., Qwen3Model], context: ParallelContext
) -> None:
    arch = make_arch()
    model = make_model(arch)

    def finish() -> None:
        with torch.no_grad():
            model.decoder.final_layernorm.weight.fill_(3.0)

    model.finish_update = finish
    assert dict(hf_named_tensors(model, arch, context))["model.norm.weight"].tolist() == [3.0] * arch.hidden_size
    with torch.no_grad():
        model.decoder.final_layernorm.weight.fill_(0.0)
    shards = model.sharded_state_dict(metadata={"dp_cp_group": context.dp_cp.group})
    assert shards["decoder.final_layernorm.weight"].data.tolist() == [3.0] * arch.hidden_size


def test_layers_are_numbered_over_the_whole_model(
    make_arch: Callable[..., Architecture], make_model: Callable[..., Qwen3Model]
) -> None:
    model = make_model(make_arch())
    for number, layer in enumerate(model.decoder.layers):
        layer.layer_number = number + 5  # as on a later pipeline stage, counted from 1
    names = {name.split(".")[2] for name in local_parameters(model) if name.startswith("decoder.layers.")}
    assert names == {"4", "5"}


def write(directory: Path, tensors: dict[str, torch.Tensor], files: int = 1) -> Path:
    directory.mkdir(exist_ok=True)
    names = sorted(tensors)
    for number in range(files):
        save_file({name: tensors[name] for name in names[number::files]}, directory / f"model-{number}.safetensors")
    return directory


@pytest.mark.parametrize("files", [1, 3])
def test_a_directory_is_read_tensor_by_tensor(
    files: int, tmp_path: Path, make_arch: Callable[..., Architecture]
) -> None:
    arch = make_arch()
    tensors = theirs(arch)
    read = open_hf_directory(write(tmp_path, tensors, files), arch)
    for name, tensor in tensors.items():
        assert torch.equal(read(name), tensor), name


def test_everything_that_is_wrong_with_a_directory_is_listed(
    tmp_path: Path, make_arch: Callable[..., Architecture]
) -> None:
    arch = make_arch()
    tensors = theirs(arch)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    del tensors["model.norm.weight"]
    tensors["model.layers.7.input_layernorm.weight"] = torch.ones(24)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.ones(8, 24)
    with pytest.raises(CheckpointError) as error:
        open_hf_directory(write(tmp_path, tensors), arch)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{tmp_path} does not hold this model:"
    assert set(lines[1:]) == {
        "  - missing: model.layers.0.mlp.up_proj.weight [40, 24]",
        "  - missing: model.norm.weight [24]",
        "  - unexpected: model.layers.0.self_attn.q_proj.bias [64]",
        "  - unexpected: model.layers.7.input_layernorm.weight [24]",
        "  - wrong shape: model.layers.1.self_attn.k_proj.weight is [8, 24], must be [32, 24]",
    }


@pytest.mark.parametrize("size", [4, 100, -8])
def test_a_damaged_file_is_named(tmp_path: Path, make_arch: Callable[..., Architecture], size: int) -> None:
    arch = make_arch()
    write(tmp_path, theirs(arch))
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=rf"{file.name}: not a safetensors file, or cut short"):
        open_hf_directory(tmp_path, arch)


def test_a_directory_without_weights_is_refused(tmp_path: Path, make_arch: Callable[..., Architecture]) -> None:
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors files; model\.hf_dir must hold"):
        open_hf_directory(tmp_path, make_arch())


@pytest.mark.parametrize(("tied", "problems"), [(True, 0), (False, 1)])
def test_a_copy_of_tied_embeddings_may_be_there_or_not(
    tied: bool, problems: int, make_arch: Callable[..., Architecture]
) -> None:
    arch = make_arch(tie_embeddings=tied)
    shapes: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in theirs(arch).items()}
    shapes.pop("lm_head.weight", None)
    assert len(compare_hf_tensors(shapes, arch)) == problems
    assert compare_hf_tensors(shapes | {"lm_head.weight": (61, 24)}, arch) == []
