"""Loading a stream of Hugging Face tensors into a model, with every deviation named."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from megatron_klear.errors import WeightSyncError

_SHOWN = 12
_TIED_HEAD = "lm_head.weight"


def load_weights(model: PreTrainedModel, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy a full set of tensors into the model's parameters, one at a time.

    Parameters are overwritten as the stream is read, so after an error the model holds a mixture. A model with tied
    embeddings may be given `lm_head.weight` too, as long as it equals the embedding.

    Args:
        model: takes any dtype and device; values are converted to its own.
        named_tensors: every parameter of the model exactly once, in any order.

    Raises:
        WeightSyncError: tensors that are missing, unknown, repeated, of another shape or not finite.
    """
    parameters = dict(model.named_parameters())
    problems: dict[str, list[str]] = {
        "missing": [],
        "unknown": [],
        "repeated": [],
        "of another shape": [],
        "not finite": [],
        "unlike the embedding it is tied to": [],
    }
    received: set[str] = set()
    head: torch.Tensor | None = None
    for name, tensor in named_tensors:
        parameter = parameters.get(name)
        if name in received:
            problems["repeated"].append(name)
        elif parameter is None and name == _TIED_HEAD and _is_tied(model):
            head = tensor.detach().clone()
        elif parameter is None:
            problems["unknown"].append(name)
        elif tensor.shape != parameter.shape:
            problems["of another shape"].append(f"{name} (got {list(tensor.shape)}, needs {list(parameter.shape)})")
        else:
            with torch.no_grad():
                parameter.copy_(tensor)
                if not torch.isfinite(parameter).all():
                    problems["not finite"].append(name)
        received.add(name)
    problems["missing"] = [name for name in parameters if name not in received]
    if head is not None and not problems["missing"] and not _equals_embedding(model, head):
        problems["unlike the embedding it is tied to"].append(_TIED_HEAD)
    if any(problems.values()):
        texts = [f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names]
        raise WeightSyncError("the weights sent to the rollout engine do not fit its model: " + "; ".join(texts))


def _is_tied(model: PreTrainedModel) -> bool:
    return bool(model.config.tie_word_embeddings)


def _equals_embedding(model: PreTrainedModel, head: torch.Tensor) -> bool:
    embedding = model.get_input_embeddings().weight
    return head.shape == embedding.shape and torch.equal(head.to(embedding), embedding)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
