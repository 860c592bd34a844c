"""Softcapped cross-entropy of a linear head, chunk by chunk: the (N, V) logits never exist whole.

Where n-gram counts take part, the prediction is share * network + (1 - share) * counts, and the loss is the mixture's.
The share is learnt from it, but the network from its own cross-entropy, as a mixture's gradient starves what starts far
behind; and what it is taught is partly the counts' whole distribution, which says more than one token (dev/LOG.md).

The gradient of a chunk is computed right after its loss, while its logits are at hand, so the backward pass only
scales what the forward pass left. The idea is that of fused linear cross-entropy kernels (arXiv 2410.10989).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 2**20  # logits held at a time,
CHUNK_ROWS = 256  # or so many rows of them: fewer would spend their time on the gradient of the weights


@dataclass(frozen=True)
class Counts:
    """What n-gram counts say. p: (N,) probability of each target; gate: (N,) logit of the network's share.

    teacher: (start, stop) -> (stop - start, V) all probabilities; the network is taught trust * teacher + (1 - trust)
    * target.
    """

    p: Tensor
    gate: Tensor
    teacher: Callable[[int, int], Tensor]
    trust: float


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float, counts: Counts | None = None
) -> Tensor:
    """Cross-entropy of softmax(softcap * tanh(x @ weight.T / softcap)) in nats; softcap 0 = of softmax(x @ weight.T).

    x: (N, C) activations; weight: (V, C) float32; targets: (N,) ids, -1 = not scored.
    Returns the sum as a float32 scalar, differentiable once.
    """
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(x, weight, targets, softcap, counts, counts.gate if counts else None)
    low = weight.to(x.dtype)
    losses = torch.cat([_chunk_loss(a, low, t, softcap)[0] for a, t in _chunks(x, targets, weight.size(0))])
    return (losses if counts is None else _mixture(losses, counts.p, counts.gate)[0] * (targets >= 0)).sum()


def _mixture(losses: Tensor, p: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of the mixture from the network's, and their gradient to the gate, (N,) each."""
    share = torch.sigmoid(gate)
    network = share * torch.exp(-losses)
    total = network + (1 - share) * p
    return -total.log(), share - network / total


def _chunks(x: Tensor, targets: Tensor, vocab: int) -> list[tuple[Tensor, Tensor]]:
    size = max(CHUNK_ROWS, CHUNK_ELEMENTS // vocab)
    return list(zip(x.split(size), targets.split(size), strict=True))


def capped_(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap) in place (0 = as it is), as a sigmoid: a tenth of the time on a CPU."""
    return logits.mul_(2 / softcap).sigmoid_().mul_(2 * softcap).sub_(softcap) if softcap else logits


def _chunk_loss(x: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses (n,), logits (n, V), their softmax (n, V), mask (n,), all float32."""
    logits = capped_(F.linear(x, weight).float(), softcap)
    shares = torch.softmax(logits, 1)
    log_total = logits.amax(1) - shares.amax(1).log()
    mask = targets >= 0
    chosen = logits.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    return (log_total - chosen) * mask, logits, shares, mask


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, softcap: float, counts: Counts | None, gate: Tensor | None
    ) -> Tensor:
        low = weight.to(x.dtype)
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros_like(weight)
        grad_gate = None if gate is None else torch.zeros_like(gate)
        total = torch.zeros((), device=x.device)
        start = 0
        for part, ids in _chunks(x, targets, weight.size(0)):
            losses, logits, grad, mask = _chunk_loss(part, low, ids, softcap)
            here = slice(start, start + len(ids))
            if counts is not None and gate is not None and grad_gate is not None:
                losses, slope = _mixture(losses, counts.p[here], gate[here])
                losses, grad_gate[here] = losses * mask, slope * mask
            total += losses.sum()
            # d loss / d logit = (softmax - one hot) * (1 - tanh^2), zero where not scored
            trust = counts.trust if counts is not None else 0.0
            if counts is not None and trust:
                grad.sub_(counts.teacher(here.start, here.stop), alpha=trust)
            grad.scatter_add_(1, ids.clamp(min=0)[:, None], grad.new_full((len(ids), 1), trust - 1.0))
            if softcap:
                grad.mul_(logits.square_().mul_(-(softcap**-2)).add_(1.0))
            grad.mul_(mask[:, None])
            low_grad = grad.to(x.dtype)
            torch.mm(low_grad, low, out=grad_x[here])
            if low_grad.dtype == grad_weight.dtype:
                grad_weight.addmm_(low_grad.t(), part)
            else:
                grad_weight += (low_grad.t() @ part).float()
            start += len(ids)
        ctx.save_for_backward(grad_x, grad_weight, grad_gate)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_x, grad_weight, grad_gate = ctx.saved_tensors
        gate = None if grad_gate is None else grad_gate * grads[0]
        return (grad_x * grads[0]).to(grad_x.dtype), grad_weight * grads[0], None, None, None, gate
