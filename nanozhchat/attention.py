"""Causal attention over PyTorch's scaled_dot_product_attention, with windows that save work, not only mask it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attend from each position to itself and the `window - 1` before it.

    q: (B, H, T, D); k, v: (B, Hkv, T, D) with H a multiple of Hkv. Returns (B, H, T, D).
    """
    gqa = q.size(1) != k.size(1)
    if window >= q.size(2):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    return _windowed_attention(q, k, v, window)


def _windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Cut time into blocks of `window`: a block sees itself and the one before, so cost grows with T * window."""
    B, H, T, D = q.shape
    n_blocks = -(-T // window)
    end = n_blocks * window - T
    q = _fold(F.pad(q, (0, 0, 0, end)).unfold(2, window, window))  # (B * n_blocks, H, window, D)
    k = _fold(F.pad(k, (0, 0, window, end)).unfold(2, 2 * window, window))  # (B * n_blocks, Hkv, 2 window, D)
    v = _fold(F.pad(v, (0, 0, window, end)).unfold(2, 2 * window, window))
    i = torch.arange(window, device=q.device)[:, None]
    j = torch.arange(2 * window, device=q.device)[None, :]
    mask = ((j > i) & (j <= i + window)).expand(n_blocks, 1, window, 2 * window).clone()
    mask[0, :, :, :window] = False  # before the first block there is nothing
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(B, 1, 1, 1), enable_gqa=k.size(1) != H)
    y = y.view(B, n_blocks, H, window, D).transpose(1, 2).reshape(B, H, n_blocks * window, D)
    return y[:, :, :T]


def _fold(blocks: Tensor) -> Tensor:
    """(B, H, n_blocks, D, size) -> (B * n_blocks, H, size, D)."""
    B, H, n_blocks, D, size = blocks.shape
    return blocks.permute(0, 2, 1, 4, 3).reshape(B * n_blocks, H, size, D)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int) -> Tensor:
    """Attend from new queries to a cache in which each row has its own length.

    q: (B, H, t, D); k, v: (B, Hkv, S, D); positions: (B, t) absolute position of each query. Key j sits at position
    j; keys after the query's position, or `window` or more before it, are not seen. Returns (B, H, t, D).
    """
    keys = torch.arange(k.size(2), device=q.device)
    distance = positions[:, None, :, None] - keys  # (B, 1, t, S)
    mask = (distance >= 0) & (distance < window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.size(1) != k.size(1))
