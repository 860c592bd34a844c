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
    return (
        torch.randn(b, h, t, d, generator=g) * 2,
        torch.randn(b, hkv, s, d, generator=g) * 2,
        torch.randn(b, hkv, s, d, generator=g),
    )


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("t", [1, 2, 7, 9, 64, 65, 150])  # blocks are of 64 queries here
@pytest.mark.parametrize("window", [1, 2, 3, 16, 63, 64, 100])
def test_causal_attention_is_the_dense_masked_softmax(t, window, heads):
    q, k, v = random_qkv(3, *heads, t, t)
    positions = torch.arange(t).expand(3, t)
    got = causal_attention(q, k, v, window)
    torch.testing.assert_close(got.double(), reference(q, k, v, positions, window), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [3, 8, 70])
def test_gradients_through_windows_are_those_of_the_dense_softmax(window):
    q, k, v = (x.requires_grad_() for x in random_qkv(2, 4, 2, 150, 150))
    weight = torch.randn(2, 4, 150, 8, generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad((causal_attention(q, k, v, window) * weight).sum(), (q, k, v))
    positions = torch.arange(150).expand(2, 150)
    want = torch.autograd.grad((reference(q, k, v, positions, window) * weight).sum(), (q, k, v))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [1, 4, 100])
@pytest.mark.parametrize("t", [1, 3])
def test_cached_attention_lets_every_row_be_at_its_own_place(window, t):
    q, k, v = random_qkv(3, 4, 2, t, 12)
    positions = torch.tensor([[0], [4], [12 - t]]) + torch.arange(t)
    got = cached_attention(q, k, v, positions, window)
    torch.testing.assert_close(got.double(), reference(q, k, v, positions, window), atol=1e-5, rtol=1e-5)


def test_what_lies_beyond_a_query_in_the_cache_does_not_matter():
    q, k, v = random_qkv(1, 4, 2, 1, 12)
    positions = torch.tensor([[5]])
    before = cached_attention(q, k, v, positions, 100)
    k[:, :, 6:], v[:, :, 6:] = 1e3, -1e3
    torch.testing.assert_close(cached_attention(q, k, v, positions, 100), before, atol=0, rtol=0)
