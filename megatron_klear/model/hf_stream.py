"""Weights in Hugging Face names, one tensor at a time: out of a sharded model, and into one.

Export, weight publishing to rollout engines and initialisation from a Hugging Face directory all go
through here, so there is one place where the two layouts meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_klear.config import Architecture
from megatron_klear.errors import CheckpointError
from megatron_klear.model.hf_names import (
    TensorRule,
    hf_from_whole,
    shard,
    shard_shape,
    tensor_rules,
    unshard,
    whole_from_hf,
)
from megatron_klear.model.precision import note_loaded, plain
from megatron_klear.model.qwen3 import Qwen3Model
from megatron_klear.records import ParallelContext


def local_parameters(model: Qwen3Model) -> dict[str, torch.nn.Parameter]:
    """This stage's parameters by name, with layers numbered over the whole model."""
    numbers = {str(i): layer.layer_number - 1 for i, layer in enumerate(model.decoder.layers)}
    named = {}
    for name, parameter in model.named_parameters():
        if name.startswith("decoder.layers."):
            _, _, index, rest = name.split(".", 3)
            name = f"decoder.layers.{numbers[index]}.{rest}"
        named[name] = parameter
    return named


def hf_named_tensors(
    model: Qwen3Model,
    arch: Architecture,
    context: ParallelContext,
    *,
    of: Callable[[torch.nn.Parameter], torch.Tensor] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of the model as Hugging Face names it, whole, in forward order.

    A collective: every rank of a data-parallel replica must iterate it to the end, and every rank receives every
    tensor. Holds one Megatron tensor at a time.

    Args:
        model: this rank's stage.
        arch: sizes of the model.
        context: the layout.
        of: what to take of each parameter, with its shape and one data type throughout; the weight by default
            (conformance checks take the gradient).
    """
    model.settle()
    take = of or (lambda parameter: parameter)
    parameters = {name: take(parameter).detach() for name, parameter in local_parameters(model).items()}
    padded_vocab = model.vocab_size
    dtype = next(iter(parameters.values())).dtype
    for rule in tensor_rules(arch, layer_kind=model.layer_kind):
        whole = _whole(rule, parameters, arch, context, padded_vocab, dtype)
        yield from zip(rule.hf_names, hf_from_whole(rule, whole, arch), strict=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class HfWeights:
    """`hf_named_tensors` of a model, from its first tensor on each time that this is iterated (a collective).

    Attributes:
        model: this rank's stage.
        arch: sizes of the model.
        context: the layout.
    """

    model: Qwen3Model
    arch: Architecture
    context: ParallelContext

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return hf_named_tensors(self.model, self.arch, self.context)


def _whole(
    rule: TensorRule,
    parameters: dict[str, torch.Tensor],
    arch: Architecture,
    context: ParallelContext,
    padded_vocab: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    held = parameters.get(rule.name)
    if held is not None:
        local = plain(held).contiguous()
    else:
        local = torch.empty(shard_shape(rule, arch, context.tp.size, padded_vocab), dtype=dtype, device=context.device)
    if context.pp.size > 1:
        owner = dist.get_global_rank(
            context.pp.group, _owning_stage(rule, model_layers=arch.num_layers, context=context)
        )
        local = local.clone() if held is not None else local
        dist.broadcast(local, src=owner, group=context.pp.group)
    if rule.split_dim is None or context.tp.size == 1:
        return local
    shards = [torch.empty_like(local) for _ in range(context.tp.size)]
    dist.all_gather(shards, local, group=context.tp.group)
    return unshard(rule, shards)


def _owning_stage(rule: TensorRule, *, model_layers: int, context: ParallelContext) -> int:
    """The pipeline stage that holds a parameter; layers are spread evenly."""
    if rule.layer is not None:
        return rule.layer // (model_layers // context.pp.size)
    return 0 if rule.name.startswith("embedding.") else context.pp.size - 1


def load_hf_weights(
    model: Qwen3Model,
    arch: Architecture,
    context: ParallelContext,
    tensor: Callable[[str], torch.Tensor],
) -> None:
    """Fill this rank's parameters from Hugging Face tensors; no communication.

    Args:
        model: the model to fill.
        arch: its architecture.
        context: the layout.
        tensor: returns a whole Hugging Face tensor by name, any data type.
    """
    parameters = local_parameters(model)
    padded_vocab = model.vocab_size
    for rule in tensor_rules(arch, layer_kind=model.layer_kind):
        names = [rule.name]
        if arch.tie_embeddings and rule.name == "embedding.word_embeddings.weight":
            names.append("output_layer.weight")  # the last pipeline stage's copy of a tied embedding
        targets = [parameters[name] for name in names if name in parameters]
        if not targets:
            continue
        whole = whole_from_hf(rule, [tensor(name) for name in rule.hf_names], arch, padded_vocab)
        for target in targets:
            part = shard(rule, whole, context.tp.rank, context.tp.size)
            with torch.no_grad():
                target.copy_(part)
            note_loaded(target, part)


def open_hf_directory(directory: Path, arch: Architecture) -> Callable[[str], torch.Tensor]:
    """A reader of the tensors in a directory of safetensors files.

    Raises:
        CheckpointError: files are missing, or tensors are missing, unexpected or misshapen; lists all of them.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory}: no *.safetensors files; model.hf_dir must hold a model's weights")
    where: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (a safetensors handle, not a dict)
                    where[name] = file
                    shapes[name] = tuple(opened.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not a safetensors file, or cut short: {error}") from error
    problems = compare_hf_tensors(shapes, arch)
    if problems:
        raise CheckpointError(f"{directory} does not hold this model:\n" + "\n".join(f"  - {p}" for p in problems))

    def read(name: str) -> torch.Tensor:
        with safe_open(where[name], framework="pt") as opened:
            found: torch.Tensor = opened.get_tensor(name)
            return found

    return read


def compare_hf_tensors(shapes: dict[str, tuple[int, ...]], arch: Architecture) -> list[str]:
    """Problems that keep tensors of these names and shapes from being this model; empty when there are none."""
    expected = {
        name: shape
        for rule in tensor_rules(arch)
        for name, shape in zip(rule.hf_names, rule.hf_shapes, strict=True)
    }  # fmt: skip
    ignorable = {"lm_head.weight"} if arch.tie_embeddings else set()
    problems = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in shapes]
    problems += [f"unexpected: {name} {list(shapes[name])}" for name in sorted(set(shapes) - set(expected) - ignorable)]
    problems += [
        f"wrong shape: {name} is {list(shapes[name])}, must be {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    return problems
