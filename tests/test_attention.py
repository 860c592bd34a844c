"""Attention against a dense, masked reference written out in full."""

import math

import pytest
import torch

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


@pytest.mark.parametrize("window", [1, 4, 100])
@pytest.mark.parametrize("t", [1, 3])
def test_cached_attention_lets_every_row_be_at_its_own_place_whatever_lies_beyond(t, window):
    q, k, v = random_qkv(3, 4, 2, t, 12)
    positions = torch.tensor([[0], [4], [12 - t]]) + torch.arange(t)
    got = cached_attention(q, k, v, positions, window)
    torch.testing.assert_close(got.double(), reference(q, k, v, positions, window), atol=1e-5, rtol=1e-5)
    k[1, :, 4 + t :], v[1, :, 4 + t :] = 1e3, -1e3
    assert torch.equal(cached_attention(q, k, v, positions, window), got)
