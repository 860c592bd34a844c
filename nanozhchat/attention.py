"""Causal attention over PyTorch's scaled_dot_product_attention, with windows that save work, not only mask it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_BLOCK = 64  # queries; with fewer, calls cost more than the keys that are spared


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attend from each position to itself and the `window - 1` before it.

    q: (B, H, T, D); k, v: (B, Hkv, T, D) with H a multiple of Hkv. Returns (B, H, T, D).
    """
    if window >= q.size(2):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
    if torch.compiler.is_compiling():
        return torch.cat([_attend(q[:, :, rows], k[:, :, keys], v[:, :, keys], window)
                          for rows, keys in _blocks(q.size(2), window)], dim=2)  # fmt: skip
    return _Windowed.apply(q, k, v, window)


def _blocks(T: int, window: int) -> list[tuple[slice, slice]]:
    """Cut the queries into blocks, each with the keys it sees: cost grows with T * window, not with T * T."""
    size = max(MIN_BLOCK, window // 4)
    return [(slice(i, min(T, i + size)), slice(max(0, i - window + 1), min(T, i + size))) for i in range(0, T, size)]


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attend within a window from queries (B, H, t, D) to keys (B, Hkv, S, D) of which the last t are their own."""
    mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device)
    offset = k.size(2) - q.size(2)
    mask = mask.tril_(offset).triu_(offset + 1 - window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.size(1) != k.size(1))


class _Windowed(torch.autograd.Function):
    """Attention block by block over views of q, k, v; the backward pass does each block again and stores nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.window = window
        B, H, T, D = q.shape
        y = q.new_empty(B, T, H, D).transpose(1, 2)  # so that joining the heads needs no copy
        for rows, keys in _blocks(T, window):
            y[:, :, rows] = _attend(q[:, :, rows], k[:, :, keys], v[:, :, keys], window)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, keys in _blocks(q.size(2), ctx.window):
            parts = [x.detach().requires_grad_() for x in (q[:, :, rows], k[:, :, keys], v[:, :, keys])]
            with torch.enable_grad():
                y = _attend(parts[0], parts[1], parts[2], ctx.window)
            dq[:, :, rows], part_dk, part_dv = torch.autograd.grad(y, parts, grads[0][:, :, rows])
            dk[:, :, keys] += part_dk
            dv[:, :, keys] += part_dv
        return dq, dk, dv, None


def cached_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int) -> Tensor:
    """Attend from new queries to a cache in which each row has its own length.

    q: (B, H, t, D); k, v: (B, Hkv, S, D); positions: (B, t) absolute position of each query. Key j sits at position
    j; keys after the query's position, or `window` or more before it, are not seen. Returns (B, H, t, D).
    """
    keys = torch.arange(k.size(2), device=q.device)
    distance = positions[:, None, :, None] - keys  # (B, 1, t, S)
    mask = (distance >= 0) & (distance < window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.size(1) != k.size(1))
