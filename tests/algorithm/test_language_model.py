"""The LM loss against torch's cross entropy."""

from __future__ import annotations

import torch

from megatron_klear.algorithm import lm_token_loss


def test_equals_cross_entropy_with_its_gradient() -> None:
    rng = torch.Generator().manual_seed(4)
    labels = torch.randint(0, 13, (20,), generator=rng)
    ours = torch.randn(20, 13, generator=rng, dtype=torch.float64).requires_grad_(True)
    theirs = ours.detach().clone().requires_grad_(True)
    lm_token_loss(torch.log_softmax(ours, -1).gather(1, labels[:, None])[:, 0]).sum().backward()
    torch.nn.functional.cross_entropy(theirs, labels, reduction="sum").backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-14)


def test_narrow_input_is_widened() -> None:
    assert lm_token_loss(torch.tensor([-1.5], dtype=torch.bfloat16)).dtype == torch.float32
    assert lm_token_loss(torch.tensor([-1.5], dtype=torch.float64)).dtype == torch.float64
