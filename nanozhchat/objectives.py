"""What a batch is trained on: (model, batch) -> sum of losses and number of scored tokens, never a mean."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nanozhchat.dataloader import Batch
from nanozhchat.gpt import GPT


@dataclass(frozen=True)
class Loss:
    """total: summed nats, differentiable. count: tokens scored."""

    total: Tensor
    count: Tensor


def next_token(model: GPT, batch: Batch) -> Loss:
    """Cross-entropy of every scored target (-1 = not scored): documents score all, conversations the answers."""
    return Loss(model(batch.inputs, batch.targets), (batch.targets >= 0).sum())
