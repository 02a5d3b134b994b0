"""The whole CUDA backend against float64 of the bfloat16 inputs, its compiled part emulated or real."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch

from klear_kernels import PolicyLossOutput, linear_logprob, linear_policy_loss
from klear_kernels.backends import choose_backend
from klear_kernels.head_problem import HeadOptions, HeadProblem
from klear_kernels.linear_logprob.reference import reference_logprob
from klear_kernels.linear_policy_loss import cuda_backend
from klear_kernels.linear_policy_loss.policy_terms import PolicyTerms
from klear_kernels.linear_policy_loss.reference import reference_policy_loss
from klear_kernels.vocab_shard import VocabShard
from megatron_klear.algorithm import PolicyObjective, policy_token_loss

CudaPart = tuple[Any, torch.device]
GPPO = PolicyObjective(kind="gppo")
IGNORED = -100


class Inputs(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    policy_weight: torch.Tensor
    lm_weight: torch.Tensor


def make_inputs(device: torch.device, tokens: int = 48, words: int = 70, size: int = 16, seed: int = 0) -> Inputs:
    """Ratios on both sides of the clip range; ignored, untrained, lm-only and policy-only tokens; confident labels."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, size, generator=generator)
    weight = torch.randn(words, size, generator=generator) * 3 / math.sqrt(size)
    labels = torch.randint(0, words, (tokens,), generator=generator)
    confident = torch.arange(tokens) % 3 == 0
    hidden[confident] += 2.5 * weight[labels[confident]]
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    exact = reference_logprob(hidden, weight, labels).logprobs
    draw = torch.rand(tokens, generator=generator)
    labels[draw < 0.2] = IGNORED
    weights = torch.rand(2, tokens, generator=generator) / tokens
    weights[0, (draw > 0.2) & (draw < 0.4)] = 0.0
    weights[1, (draw > 0.6) | ((draw > 0.3) & (draw < 0.4))] = 0.0
    old_logprobs = (exact + 0.5 * torch.randn(tokens, generator=generator)).float()
    advantages = torch.randn(tokens, generator=generator)
    tensors = (hidden, weight, labels, old_logprobs, advantages, *weights)
    inputs = Inputs(*(tensor.to(device) for tensor in tensors))
    return inputs._replace(hidden=inputs.hidden.requires_grad_(), weight=inputs.weight.requires_grad_())


def gradients(output: PolicyLossOutput, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(output.loss, (inputs.hidden, inputs.weight), retain_graph=True)


def widened(inputs: Inputs) -> Inputs:
    """The same numbers in float64, so that exact gradients are not rounded to bfloat16 on their way out."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in inputs[:2])
    return inputs._replace(hidden=hidden, weight=weight)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def rounded_gradients(inputs: Inputs, objective: PolicyObjective, temperature: float = 1.0) -> tuple[torch.Tensor, ...]:
    """What exact logits give when the gradient of the logits, and the results, are rounded to bfloat16."""
    keep = inputs.labels != IGNORED
    hidden, weight = inputs.hidden.detach()[keep].double(), inputs.weight.detach().double()
    logits = (hidden @ weight.t() / temperature).requires_grad_()
    logprobs = torch.log_softmax(logits, -1).gather(1, inputs.labels[keep].unsqueeze(1)).squeeze(1)
    terms = [tensor[keep].double() for tensor in inputs[3:]]
    policy = policy_token_loss(logprobs, terms[0], terms[1], objective)
    (gradient,) = torch.autograd.grad((terms[2] * policy - terms[3] * logprobs).sum(), logits)
    gradient = (gradient / temperature).bfloat16().double()
    for_hidden = torch.zeros_like(inputs.hidden)
    for_hidden[keep] = (gradient @ weight).bfloat16()
    return for_hidden, (gradient.t() @ hidden).bfloat16()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "objective",
    [
        GPPO,
        PolicyObjective(kind="gppo", beta_low=0.5, beta_high=1.7),
        PolicyObjective(kind="clip"),
        PolicyObjective(kind="cispo"),
    ],
)
def test_against_float64(cuda_part: CudaPart, objective: PolicyObjective, temperature: float) -> None:
    inputs = make_inputs(cuda_part[1], tokens=400, words=150, size=32)
    settings: dict[str, Any] = {"objective": objective, "temperature": temperature}
    got = linear_policy_loss(*inputs, **settings, chunk_tokens=90, backend="cuda")
    wide = widened(inputs)
    want = reference_policy_loss(*wide, **settings)
    # float32 sums of exact products: logits of up to 40 are off by 32 units at most, temperature included
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    base = rounded_gradients(inputs, objective, temperature)
    for mine, exact, rounded in zip(gradients(got, inputs), gradients(want, wide), base, strict=True):
        assert mine.dtype == torch.bfloat16
        assert relative_error(mine, exact) <= 1.5 * relative_error(rounded, exact)


def test_worst_row_of_confident_tokens(cuda_part: CudaPart) -> None:
    # Each label wins by 8 to 20 nats: without its own entry, the gradient would be the rounding of probabilities.
    device = cuda_part[1]
    words, size, tokens = 40, 16, 13
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(words, size, generator=generator) * 0.1
    weight[:, 0] = 0.0
    weight[17, 0] = 1.0
    hidden = torch.randn(tokens, size, generator=generator)
    hidden[:, 0] = torch.arange(8.0, 21.0)
    ones = torch.ones(tokens)
    tensors = (hidden.bfloat16(), weight.bfloat16(), torch.full((tokens,), 17), -ones, ones, 0 * ones, ones)
    inputs = Inputs(*(tensor.to(device) for tensor in tensors))
    inputs = inputs._replace(hidden=inputs.hidden.requires_grad_(), weight=inputs.weight.requires_grad_())
    got = linear_policy_loss(*inputs, objective=GPPO, backend="cuda")
    wide = widened(inputs)
    want = reference_policy_loss(*wide, objective=GPPO)
    torch.testing.assert_close(got.logprobs.double(), want.logprobs, rtol=1e-4, atol=0.0)
    ours, theirs = gradients(got, inputs)[0].double(), gradients(want, wide)[0].double()
    # E rounded, and the result rounded: half a unit in the eighth bit each, the sum over words adding up no more
    assert float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max()) < 2 * 2.0**-8


def test_results_do_not_depend_on_the_chunks_and_repeat_to_the_bit(cuda_part: CudaPart) -> None:
    inputs = make_inputs(cuda_part[1])
    want = linear_policy_loss(*inputs, objective=GPPO, chunk_tokens=48, backend="cuda")
    for chunk_tokens in (1, 7, 47, None):
        got, again = (
            linear_policy_loss(*inputs, objective=GPPO, chunk_tokens=chunk_tokens, backend="cuda") for _ in range(2)
        )
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)
        for mine, second, first in zip(
            gradients(got, inputs), gradients(again, inputs), gradients(want, inputs), strict=True
        ):
            assert torch.equal(mine, second)
            assert relative_error(mine, first) <= 2.0**-8


def test_padded_words_ignored_tokens_and_what_they_hold(cuda_part: CudaPart) -> None:
    inputs = make_inputs(cuda_part[1])
    words = 61
    labels = torch.where(inputs.labels >= words, words - 1, inputs.labels)
    ignored = labels == IGNORED
    inputs = inputs._replace(labels=labels)
    wide = widened(inputs)
    want = reference_policy_loss(*wide, objective=GPPO, vocab_size=words)
    exact = gradients(want, wide)
    with torch.no_grad():
        inputs.weight[words:] = float("nan")
        inputs.hidden[ignored] = float("nan")
    inputs = inputs._replace(policy_weight=torch.where(ignored, float("nan"), inputs.policy_weight))
    got = linear_policy_loss(*inputs, objective=GPPO, vocab_size=words, chunk_tokens=10, backend="cuda")
    grad_hidden, grad_weight = gradients(got, inputs)
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-5, atol=1e-6)
    assert not grad_hidden[ignored].any()
    assert not grad_weight[words:].any()
    assert relative_error(grad_hidden, exact[0]) < 2.0**-8
    assert relative_error(grad_weight[:words], exact[1][:words]) < 2.0**-8


def test_only_what_is_wanted(cuda_part: CudaPart) -> None:
    inputs = make_inputs(cuda_part[1])
    settings: dict[str, Any] = {"objective": GPPO, "backend": "cuda"}
    both = linear_policy_loss(*inputs, **settings)
    grad_hidden, grad_weight = gradients(both, inputs)
    only_hidden = linear_policy_loss(inputs.hidden, inputs.weight.detach(), *inputs[2:], **settings)
    only_weight = linear_policy_loss(inputs.hidden.detach(), inputs.weight, *inputs[2:], **settings)
    assert torch.equal(torch.autograd.grad(only_hidden.loss, inputs.hidden)[0], grad_hidden)
    assert torch.equal(torch.autograd.grad(only_weight.loss, inputs.weight)[0], grad_weight)
    with torch.no_grad():
        assert torch.equal(linear_policy_loss(*inputs, **settings).logprobs, both.logprobs)
    without = linear_policy_loss(*inputs, **settings, with_entropy=False)
    assert without.entropy is None
    assert torch.equal(without.loss, both.loss)


def test_nothing_to_compute(cuda_part: CudaPart) -> None:
    inputs = make_inputs(cuda_part[1])
    inputs.labels.fill_(IGNORED)
    output = linear_policy_loss(*inputs, objective=GPPO, backend="cuda")
    assert output.loss.item() == 0.0
    assert not any(gradient.any() for gradient in gradients(output, inputs))


def test_two_microbatches_into_one_main_grad(cuda_part: CudaPart) -> None:
    inputs = make_inputs(cuda_part[1])
    words = 61
    labels = torch.where(inputs.labels >= words, words - 1, inputs.labels)
    inputs = inputs._replace(labels=labels)
    settings: dict[str, Any] = {"objective": GPPO, "vocab_size": words, "chunk_tokens": 20}
    wide = widened(inputs)
    (exact,) = torch.autograd.grad(reference_policy_loss(*wide, objective=GPPO, vocab_size=words).loss, (wide.weight,))
    before = torch.randn(inputs.weight.shape, device=cuda_part[1]) * exact.abs().max().float()
    inputs.weight.main_grad = before.clone()
    for upstream in (1.0, 0.5):  # the second is put right in the backward pass
        output = linear_policy_loss(*inputs, **settings, backend="cuda", into_main_grad=True)
        (output.loss * upstream).backward()
    assert inputs.weight.grad is None
    added = inputs.weight.main_grad.double() - before.double()
    assert not added[words:].any()
    # E and v X are rounded to bfloat16, the sum is not; the second call adds its half in two parts
    assert relative_error(added[:words], 1.5 * exact[:words].double()) < 2.0**-8


@pytest.mark.parametrize("with_entropy", [False, True])
def test_logprobs_with_any_upstream_gradient(cuda_part: CudaPart, with_entropy: bool) -> None:
    inputs = make_inputs(cuda_part[1], tokens=200, words=150, size=32)
    generator = torch.Generator().manual_seed(9)
    upstream = torch.randn(2, 200, generator=generator).to(cuda_part[1])
    upstream[0, ::7] = 0.0
    errors = []
    for backend in ("cuda", "torch"):
        got = linear_logprob(*inputs[:3], temperature=0.8, chunk_tokens=70, backend=backend)
        wide = widened(inputs)
        want = reference_logprob(*wide[:3], temperature=0.8)
        totals = []
        for output, leaves in ((got, inputs), (want, wide)):
            total = (output.logprobs * upstream[0]).sum()
            if with_entropy:
                assert output.entropy is not None
                total = total + (output.entropy * upstream[1]).sum()
            totals.append(torch.autograd.grad(total, (leaves.hidden, leaves.weight)))
        for ours, theirs in zip(got, want, strict=True):
            assert ours is not None
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
        errors.append([relative_error(mine, exact) for mine, exact in zip(*totals, strict=True)])
    # On a CPU the torch backend rounds the results alone; here E, v X and the results are: three alike instead of one.
    for ours, theirs in zip(*errors, strict=True):
        assert ours <= 2 * theirs


@dataclass(frozen=True, kw_only=True)
class _ThreadShard(VocabShard):
    """A shard whose group is threads of this process."""

    barrier: threading.Barrier
    slots: list[Any] = field(default_factory=list)

    def _exchange(self, values: torch.Tensor) -> torch.Tensor:
        self.slots[self.rank] = values.clone()
        self.barrier.wait(timeout=60)
        every = torch.stack(list(self.slots))
        self.barrier.wait(timeout=60)
        return every

    def max_(self, values: torch.Tensor) -> torch.Tensor:
        return values.copy_(self._exchange(values).amax(dim=0))

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        return values.copy_(self._exchange(values).sum(dim=0))

    def start_sum_(self, values: torch.Tensor) -> Callable[[], object]:
        self.sum_(values)
        return lambda: None


@pytest.mark.parametrize("case", ["plain", "no-words-in-the-last", "one-shard-far-below"])
def test_two_shards(cuda_part: CudaPart, case: str) -> None:
    device = cuda_part[1]
    words, rows = (40 if case == "no-words-in-the-last" else 70), 40
    inputs = make_inputs(device, tokens=200, words=words)
    if case == "one-shard-far-below":
        # Words 40 to 69 lie about 150 nats below the others, labels among them included.
        with torch.no_grad():
            inputs.hidden[:, 0] = 10.0
            inputs.weight[40:, 0] = -15.0
        assert int((inputs.labels >= 40).sum()) > 50
        exact_logprobs = reference_logprob(*inputs[:3]).logprobs.detach()
        assert bool((exact_logprobs[inputs.labels >= 40] < -100).all())
        inputs = inputs._replace(old_logprobs=exact_logprobs.float() - 0.1)
    wide = widened(inputs)
    want = reference_policy_loss(*wide, objective=GPPO)
    exact = gradients(want, wide)
    weight = torch.full((2 * rows, 16), float("nan"), dtype=torch.bfloat16, device=device)
    weight[:words] = inputs.weight.detach()
    barrier, slots, results = threading.Barrier(2), [None, None], [None, None]
    kept = (inputs.labels != IGNORED).nonzero().squeeze(1)
    terms = PolicyTerms(**dict(zip(inputs._fields[3:], inputs[3:], strict=True)), objective=GPPO)

    def run(rank: int) -> None:
        shard = _ThreadShard(
            group=None,
            rank=rank,
            size=2,
            rows=rows,
            valid_rows=min(max(words - rank * rows, 0), rows),
            sequence_parallel=False,
            barrier=barrier,
            slots=slots,
        )
        options = HeadOptions(
            shard=shard, temperature=1.0, with_entropy=True, chunk_tokens=64, ignore_index=IGNORED, backend="cuda"
        )
        problem = HeadProblem(
            hidden=inputs.hidden.detach(),
            weight=weight[rank * rows :][: shard.valid_rows],
            labels=inputs.labels,
            rows=kept,
            options=options,
        )
        results[rank] = cuda_backend.forward(
            problem, terms.select(kept, torch.float32), for_hidden=True, for_weight=True
        )

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = results
    assert first is not None
    assert second is not None
    assert torch.equal(first.rows.logprobs, second.rows.logprobs)
    assert torch.equal(first.grad_hidden, second.grad_hidden)
    torch.testing.assert_close(first.rows.logprobs.double(), want.logprobs[kept], rtol=1e-5, atol=1e-5)
    assert want.entropy is not None
    torch.testing.assert_close(first.rows.entropy.double(), want.entropy[kept], rtol=1e-5, atol=1e-5)
    base = rounded_gradients(inputs, GPPO)
    grad_weight = torch.cat([first.grad_weight, second.grad_weight])
    assert not grad_weight[words:].any()
    assert relative_error(first.grad_hidden, exact[0]) <= 1.5 * relative_error(base[0], exact[0])
    assert relative_error(grad_weight[:words], exact[1]) <= 1.5 * relative_error(base[1], exact[1])


def test_too_many_words_are_refused_by_name(cuda_part: CudaPart) -> None:
    device = cuda_part[1]
    words = cuda_part[0].max_words + 1
    one = torch.ones(1, device=device)
    with pytest.raises(ValueError, match=r"backend: got 'cuda' for 163841 words per shard, it holds .* 163840 at most"):
        linear_policy_loss(
            torch.ones(1, 1, dtype=torch.bfloat16, device=device),
            torch.ones(words, 1, dtype=torch.bfloat16, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            *(one, one, one, one),
            objective=GPPO,
            backend="cuda",
        )


def test_a_machine_without_the_compiled_part_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from klear_kernels import cuda_extension

    def missing() -> Any:
        raise ImportError("No module named 'klear_kernels._cuda'")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda_extension, "extension", missing)
    cuda_extension.import_error.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"got 'cuda', .*klear_kernels._cuda cannot be imported \(No module"):
            choose_backend("linear_policy_loss", "cuda", torch.device("cuda", 0), torch.bfloat16)
    finally:
        cuda_extension.import_error.cache_clear()
    with pytest.raises(ValueError, match="got 'cuda', allowed on cpu: torch, or None; it runs on cuda devices"):
        choose_backend("linear_policy_loss", "cuda", torch.device("cpu"), torch.bfloat16)
