"""Causal attention with windows that save work, not only mask it: PyTorch's scaled_dot_product_attention, or on a CPU,
where that is slow, matrix products block by block."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_BLOCK, MAX_BLOCK = 64, 128  # queries at a time: fewer cost more calls, more see more keys in vain
KEPT_ELEMENTS = 2**24  # of probabilities for the backward pass; more are computed again


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attend from each position to itself and the `window - 1` before it.

    q: (B, H, T, D); k, v: (B, Hkv, T, D) with H a multiple of Hkv. Returns (B, H, T, D).
    """
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        return _Blocked.apply(q, k, v, window)
    if window >= q.size(2):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
    return torch.cat([_attend(q[:, :, rows], k[:, :, keys], v[:, :, keys], window)
                      for rows, keys in _blocks(q.size(2), window)], dim=2)  # fmt: skip


def _blocks(T: int, window: int) -> list[tuple[slice, slice]]:
    """Cut the queries into blocks, each with the keys it sees: cost grows with T * window, not with T * T."""
    size = min(MAX_BLOCK, max(MIN_BLOCK, window // 4))
    return [(slice(i, min(T, i + size)), slice(max(0, i - window + 1), min(T, i + size))) for i in range(0, T, size)]


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attend within a window from queries (B, H, t, D) to keys (B, Hkv, S, D) of which the last t are their own."""
    mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device)
    offset = k.size(2) - q.size(2)
    mask = mask.tril_(offset).triu_(offset + 1 - window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.size(1) != k.size(1))


class _Blocked(torch.autograd.Function):
    """Three times as fast in bfloat16, 1.2 to 1.5 times in float32, as PyTorch's kernel for CPUs (dev/LOG.md).

    N = B * Hkv below; the G = H / Hkv heads that share keys have their queries one below the other.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        B, H, T, D = q.shape
        shape = (B, k.size(1), H // k.size(1), T, D)
        q, k, v = (q * D**-0.5).reshape(-1, *shape[2:]), k.reshape(-1, T, D), v.reshape(-1, T, D)
        y = q.new_empty(B, T, H, D).transpose(1, 2)  # so that joining the heads needs no copy
        out, blocks, kept = y.view(shape), _blocks(T, window), []
        keeps = q.size(0) * q.size(1) * sum((b.stop - b.start) * (s.stop - s.start) for b, s in blocks) <= KEPT_ELEMENTS
        for rows, keys in blocks:
            p = _probabilities(q[:, :, rows], k[:, keys], window)
            out[:, :, :, rows] = torch.bmm(p, v[:, keys]).view(*shape[:3], -1, D)
            kept += [p] * keeps
        ctx.save_for_backward(q, k, v, *kept)
        ctx.window, ctx.shape = window, shape
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *kept = ctx.saved_tensors
        B, Hkv, G, T, D = ctx.shape
        dy = grads[0].reshape(-1, G, T, D)
        dq = q.new_empty(B, T, Hkv * G, D).transpose(1, 2)
        dq_rows, (dk, dv) = dq.view(ctx.shape), torch.zeros(2, *k.shape)
        for i, (rows, keys) in enumerate(_blocks(T, ctx.window)):
            p = kept[i] if kept else _probabilities(q[:, :, rows], k[:, keys], ctx.window)
            q_rows, dy_rows = (x[:, :, rows].reshape(len(k), -1, D) for x in (q, dy))
            dp = torch.bmm(dy_rows, v[:, keys].mT)
            dv[:, keys] += torch.bmm(p.mT, dy_rows)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq_rows[:, :, :, rows] = torch.bmm(ds, k[:, keys]).mul_(D**-0.5).view(B, Hkv, G, -1, D)
            dk[:, keys] += torch.bmm(ds.mT, q_rows)
        return dq, dk.to(k.dtype).view(B, Hkv, T, D), dv.to(v.dtype).view(B, Hkv, T, D), None


def _probabilities(q: Tensor, k: Tensor, window: int) -> Tensor:
    """Softmax of scores of scaled queries (N, G, t, D) with keys (N, S, D), the last t their own -> (N, G * t, S)."""
    N, G, t, D = q.shape
    scores, offset = torch.bmm(q.reshape(N, -1, D), k.mT), k.size(1) - t
    unseen = scores.new_full((t, k.size(1)), -torch.inf)
    scores.view(N, G, t, -1).add_(unseen.triu(offset + 1)).add_(unseen.tril_(offset - window))
    return torch.softmax(scores, -1)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int) -> Tensor:
    """Attend from new queries to a cache in which each row has its own length.

    q: (B, H, t, D); k, v: (B, Hkv, S, D); positions: (B, t) absolute position of each query. Key j sits at position
    j; keys after the query's position, or `window` or more before it, are not seen. Returns (B, H, t, D).
    """
    keys = torch.arange(k.size(2), device=q.device)
    distance = positions[:, None, :, None] - keys  # (B, 1, t, S)
    mask = (distance >= 0) & (distance < window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.size(1) != k.size(1))
