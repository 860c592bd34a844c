"""From logits to the next token: temperature, top-k, top-p, min-p, repetition penalty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_TEMPERATURE = 1e-6  # keeps logits finite when divided; below it only the likeliest is drawn anyway


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. temperature 0 = the likeliest; top_k 0, top_p 1, min_p 0, repetition_penalty 1 = off."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 512
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        limits = {
            "temperature": (0.0, 2.0),
            "top_k": (0, 1000),
            "top_p": (0.0, 1.0),
            "min_p": (0.0, 1.0),
            "repetition_penalty": (0.1, 10.0),
            "max_tokens": (1, 10**9),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise ValueError(f"{name}={value} must be between {low} and {high}")
        if self.top_p == 0:
            raise ValueError("top_p=0 leaves no token to choose; use temperature=0 for the likeliest")
        if any(not s for s in self.stop):
            raise ValueError("stop strings must not be empty")

    def generator(self, index: int = 0) -> torch.Generator:
        """Return this request's own source of randomness (on the CPU, so that a seed means the same anywhere)."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed((self.seed * 1_000_003 + index) % 2**63)
        return generator


def filtered_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Return the (V,) probabilities to draw from. logits: (V,) float32; params.temperature > 0."""
    logits = logits / max(params.temperature, MIN_TEMPERATURE)
    if 0 < params.top_k < logits.numel():
        values, ids = logits.topk(params.top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(0, ids, values)
    probabilities = logits.softmax(-1)
    if params.min_p > 0:
        probabilities = probabilities.masked_fill(probabilities < params.min_p * probabilities.max(), 0.0)
    if params.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # mass of the likelier ones: the first is always kept
        probabilities[order[before >= params.top_p * probabilities.sum()]] = 0.0
    return probabilities / probabilities.sum()


def penalize(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Make tokens already seen less likely (arXiv 1909.05858): positive logits shrink, negative ones grow."""
    if penalty == 1.0 or not seen:
        return logits
    ids = torch.tensor(sorted(set(seen)), device=logits.device)
    values = logits[ids]
    return logits.index_copy(0, ids, torch.where(values > 0, values / penalty, values * penalty))


def choose(logits: Tensor, params: SamplingParams, generator: torch.Generator, seen: Sequence[int]) -> int:
    """Choose one token. logits: (V,) float32; seen: ids of the prompt and the answer so far.

    Raises FloatingPointError when the logits are not finite: nothing can be drawn from them.
    """
    logits = penalize(logits, seen, params.repetition_penalty)
    if not torch.isfinite(logits).all():
        raise FloatingPointError("the model's output is not finite; the checkpoint is not usable")
    if params.temperature == 0:
        return int(logits.argmax())
    probabilities = filtered_probabilities(logits.cpu(), params)
    return int(torch.multinomial(probabilities, 1, generator=generator))
