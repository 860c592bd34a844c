"""Attention against a dense, masked reference written out in full."""

import math

import pytest
import torch

from nanozhchat import attention
from nanozhchat.attention import cached_attention, causal_attention


def reference(q, k, v, positions, window):
    """Softmax over every key, then over those in the window; heads of a group share keys. float64."""
    group = q.size(1) // k.size(1)
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    distance = positions[:, :, None] - torch.arange(k.size(2))
    seen = (distance >= 0) & (distance < window)
    scores = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(~seen[:, None], -torch.inf)
    return scores.softmax(-1) @ v


def random_qkv(b, h, hkv, t, s, d=8):
    g = torch.Generator().manual_seed(b * 1000 + t * 10 + s)
    return [scale * torch.randn(b, n, m, d, generator=g) for n, m, scale in ((h, t, 2), (hkv, s, 2), (hkv, s, 1))]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("t", [1, 2, 9, 64, 65, 150])  # blocks are of 64 queries here
@pytest.mark.parametrize("window", [1, 3, 16, 63, 64, 100, 200])
def test_causal_attention_and_its_gradients_are_those_of_the_dense_masked_softmax(t, window, heads):
    inputs = [x.requires_grad_() for x in random_qkv(3, *heads, t, t)]
    got, want = causal_attention(*inputs, window), reference(*inputs, torch.arange(t).expand(3, t), window)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    weight = torch.randn(3, 4, t, 8, generator=torch.Generator().manual_seed(0))
    gradients = [torch.autograd.grad((out * weight).sum(), inputs) for out in (got, want)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_bfloat16_attention_is_right_within_its_precision_and_probabilities_made_again_are_the_kept_ones(monkeypatch):
    inputs = [x.bfloat16().requires_grad_() for x in random_qkv(2, 4, 2, 150, 150)]
    want = reference(*inputs, torch.arange(150).expand(2, 150), 150)
    gradients = [torch.autograd.grad(want.sum(), inputs)]
    for kept in (attention.KEPT_ELEMENTS, 0):
        monkeypatch.setattr(attention, "KEPT_ELEMENTS", kept)
        got = causal_attention(*inputs, 150)
        assert (got.double() - want).norm() < 0.01 * want.norm()
        gradients.append(torch.autograd.grad(got.sum(), inputs))
    assert all(torch.equal(a, b) for a, b in zip(*gradients[1:], strict=True))
    assert all(
        (a - b).float().norm() < 0.02 * b.float().norm() for a, b in zip(gradients[1], gradients[0], strict=True)
    )


@pytest.mark.parametrize("window", [1, 4, 100])
@pytest.mark.parametrize("t", [1, 3])
def test_cached_attention_lets_every_row_be_at_its_own_place_whatever_lies_beyond(t, window):
    q, k, v = random_qkv(3, 4, 2, t, 12)
    positions = torch.tensor([[0], [4], [12 - t]]) + torch.arange(t)
    got = cached_attention(q, k, v, positions, window)
    torch.testing.assert_close(got.double(), reference(q, k, v, positions, window), atol=1e-5, rtol=1e-5)
    k[1, :, 4 + t :], v[1, :, 4 + t :] = 1e3, -1e3
    assert torch.equal(cached_attention(q, k, v, positions, window), got)
