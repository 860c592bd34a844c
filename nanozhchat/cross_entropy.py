"""Softcapped cross-entropy of a linear head, chunk by chunk: the (N, V) logits never exist whole.

The gradient of a chunk is computed right after its loss, while its logits are at hand, so the backward pass only
scales what the forward pass left. The idea is that of fused linear cross-entropy kernels (arXiv 2410.10989).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 2**20  # logits held at a time,
CHUNK_ROWS = 256  # or so many rows of them: fewer would spend their time on the gradient of the weights


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float, *, per_token: bool = False
) -> Tensor:
    """Cross-entropy of softmax(softcap * tanh(x @ weight.T / softcap)) in nats; softcap 0 = of softmax(x @ weight.T).

    x: (N, C) activations; weight: (V, C) float32; targets: (N,) ids, -1 = not scored.
    Returns the sum as a float32 scalar, differentiable once; or the (N,) losses without gradient when `per_token`.
    """
    if per_token:
        with torch.no_grad():
            parts = [_chunk_loss(a, weight.to(a.dtype), t, softcap)[0] for a, t in _chunks(x, targets, weight.size(0))]
            return torch.cat(parts)
    if not torch.is_grad_enabled():
        return linear_cross_entropy(x, weight, targets, softcap, per_token=True).sum()
    return _LinearCrossEntropy.apply(x, weight, targets, softcap)


def _chunks(x: Tensor, targets: Tensor, vocab: int) -> list[tuple[Tensor, Tensor]]:
    size = max(CHUNK_ROWS, CHUNK_ELEMENTS // vocab)
    return list(zip(x.split(size), targets.split(size), strict=True))


def _chunk_loss(x: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses (n,), logits over softcap (n, V), log-sum-exp (n, 1), mask (n,), all float32."""
    squashed = F.linear(x, weight).float()
    if softcap:
        squashed.div_(softcap).tanh_()
    scale = softcap or 1.0
    log_total = torch.logsumexp(squashed * scale, dim=1, keepdim=True)
    mask = targets >= 0
    chosen = squashed.gather(1, targets.clamp(min=0)[:, None]) * scale
    losses = (log_total - chosen).squeeze(1) * mask
    return losses, squashed, log_total, mask


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> Tensor:
        low = weight.to(x.dtype)
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros_like(weight)
        total = torch.zeros((), device=x.device)
        start = 0
        for part, ids in _chunks(x, targets, weight.size(0)):
            losses, squashed, log_total, mask = _chunk_loss(part, low, ids, softcap)
            total += losses.sum()
            # d loss / d logit = (softmax - one hot) * (1 - tanh^2), zero where not scored
            grad = torch.sub(squashed * (softcap or 1.0), log_total).exp_()
            grad.scatter_add_(1, ids.clamp(min=0)[:, None], grad.new_full((len(ids), 1), -1.0))
            if softcap:
                grad.mul_(squashed.square_().neg_().add_(1.0))
            grad.mul_(mask[:, None])
            low_grad = grad.to(x.dtype)
            torch.mm(low_grad, low, out=grad_x[start : start + len(ids)])
            if low_grad.dtype == grad_weight.dtype:
                grad_weight.addmm_(low_grad.t(), part)
            else:
                grad_weight += (low_grad.t() @ part).float()
            start += len(ids)
        ctx.save_for_backward(grad_x, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        grad_x, grad_weight = ctx.saved_tensors
        return (grad_x * grads[0]).to(grad_x.dtype), grad_weight * grads[0], None, None
