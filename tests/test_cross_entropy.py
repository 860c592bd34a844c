"""Chunked cross-entropy against the plain one, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from nanozhchat import cross_entropy
from nanozhchat.cross_entropy import linear_cross_entropy

SOFTCAP = 15.0


def plain(x, weight, targets):
    logits = SOFTCAP * torch.tanh(x.double() @ weight.double().T / SOFTCAP)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")


def problem(n=37, c=16, v=50, scale=3.0):
    """Logits of about +-40, so that the cap matters; a third of the targets not scored."""
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, c, generator=g).requires_grad_()
    weight = (scale * torch.randn(v, c, generator=g)).requires_grad_()
    targets = torch.randint(0, v, (n,), generator=g)
    targets[torch.rand(n, generator=g) < 1 / 3] = -1
    return x, weight, targets


@pytest.mark.parametrize("elements", [10**6, 50 * 8, 50, 1], ids=["one_chunk", "eight_rows", "one_row", "less"])
def test_loss_and_gradients_are_those_of_the_plain_cross_entropy(elements, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 1)
    x, weight, targets = problem()
    loss, want = linear_cross_entropy(x, weight, targets, SOFTCAP), plain(x, weight, targets)
    torch.testing.assert_close(loss.double(), want, atol=1e-4, rtol=1e-6)
    got = torch.autograd.grad(loss * 0.7, (x, weight))  # a factor as gradient scaling would apply
    for a, b in zip(got, torch.autograd.grad(want * 0.7, (x, weight)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert torch.equal(got[0].abs().amax(1) > 0, targets >= 0)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, weight, targets, SOFTCAP), loss)


def test_nothing_scored_gives_zeros_and_huge_activations_finite_loss_and_gradients():
    x, weight, targets = problem()
    loss = linear_cross_entropy(x, weight, torch.full_like(targets, -1), SOFTCAP)
    loss.backward()
    assert [float(t.detach().abs().max()) for t in (loss, x.grad, weight.grad)] == [0.0] * 3
    x, weight, targets = problem(scale=1e4)
    loss = linear_cross_entropy(x, weight, targets, SOFTCAP)
    loss.backward()
    assert torch.isfinite(x.grad).all()
    torch.testing.assert_close(loss.detach().double(), plain(x, weight, targets).detach(), atol=1e-3, rtol=1e-6)


def test_bfloat16_activations_give_the_same_loss_within_their_precision():
    x, weight, targets = problem(n=200, scale=0.3)
    low = x.detach().bfloat16().requires_grad_()
    loss = linear_cross_entropy(low, weight, targets, SOFTCAP)
    loss.backward()
    assert loss.dtype == torch.float32
    assert (low.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    want = plain(low, weight, targets)
    torch.testing.assert_close(loss.detach().double(), want.detach(), rtol=0.01, atol=0.0)
    (grad,) = torch.autograd.grad(want, weight)
    assert (weight.grad - grad).norm() < 0.02 * grad.norm()
