"""What a batch is trained on: (model, batch) -> sum of losses and number of scored tokens, never a mean."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nanozhchat.dataloader import Batch, RolloutBatch
from nanozhchat.gpt import GPT

LOGIT_ROWS = 1024  # whose logits are held at a time


@dataclass(frozen=True)
class Loss:
    """total: summed nats, differentiable. count: tokens scored."""

    total: Tensor
    count: Tensor


def next_token(model: GPT, batch: Batch) -> Loss:
    """Cross-entropy of every scored target (-1 = not scored): documents score all, conversations the answers."""
    return Loss(model(batch.inputs, batch.targets), (batch.targets >= 0).sum())


def chosen_logprobs(model: GPT, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of the N scored targets, (N,) float32 row by row, differentiable."""

    def chosen(hidden: Tensor, ids: Tensor) -> Tensor:
        return (model.logits(hidden) / temperature).log_softmax(-1).gather(1, ids[:, None]).squeeze(1)

    scored = batch.targets >= 0
    hidden, ids = model.hidden(batch.inputs)[scored], batch.targets[scored]
    parts = zip(hidden.split(LOGIT_ROWS), ids.split(LOGIT_ROWS), strict=True)
    return torch.cat([checkpoint(chosen, x, wanted, use_reentrant=False) for x, wanted in parts])


def row_logprobs(model: GPT, batch: Batch) -> Tensor:
    """Sum of the log-probabilities of each row's scored targets, (B,) float32, differentiable."""
    total = torch.zeros(len(batch.targets), device=batch.targets.device)
    return total.index_add(0, (batch.targets >= 0).nonzero()[:, 0], chosen_logprobs(model, batch))


def preference_margins(model: GPT, reference: GPT, batch: Batch) -> Tensor:
    """How much more than the reference the model prefers each better answer to its worse one, in nats.

    batch: rows in turns better, worse (`preference_loader`). Returns (pairs,), pairs of padding left out.
    """
    with torch.no_grad():
        start = row_logprobs(reference, batch)
    gain = (row_logprobs(model, batch) - start).view(-1, 2)
    real = (batch.targets >= 0).any(1).view(-1, 2).all(1)
    return (gain[:, 0] - gain[:, 1])[real]


@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation (arXiv 2305.18290): log 2 a pair at the start. reference: the frozen start."""

    reference: GPT
    beta: float

    def __call__(self, model: GPT, batch: Batch) -> Loss:
        """Sum the loss of the pairs; `count` counts pairs."""
        margins = self.beta * preference_margins(model, self.reference, batch)
        return Loss(F.softplus(-margins).sum(), torch.tensor(len(margins), device=margins.device))


def policy_gradient(model: GPT, batch: RolloutBatch, *, temperature: float = 1.0, kl: float = 0.0) -> Loss:
    """Make answers likelier by their advantage over the other answers to the same problem (arXiv 2402.03300).

    The answers come from these very weights, so the ratio that methods of this family clip is 1 and only carries the
    gradient. temperature: that they were sampled with. kl: weight of the divergence from `batch.reference`.
    """
    scored = batch.targets >= 0
    logprobs = chosen_logprobs(model, batch, temperature)
    total = -(batch.advantages[scored] * torch.exp(logprobs - logprobs.detach())).sum()
    if kl and batch.reference is not None:
        difference = batch.reference[scored] - logprobs
        total = total + kl * (torch.exp(difference) - difference - 1).sum()
    return Loss(total, scored.sum())
