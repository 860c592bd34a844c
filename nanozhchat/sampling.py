"""From logits to the next token: penalties and bans, temperature, top-k, top-p, min-p, and one draw.

Plain NumPy on one row of logits: for a vocabulary of thousands its calls cost less than a tensor library's.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ids = NDArray[np.intp]

MIN_TEMPERATURE = 1e-6  # keeps logits finite when divided; below it only the likeliest is drawn anyway
NEGLIGIBLE = 2.0**-24  # of the likeliest's probability: if all the others have less together, float32 does not see them


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. temperature 0 = the likeliest.

    Off are: top_k 0, top_p 1, min_p 0, repetition_penalty 1, the other penalties 0, no_repeat_ngram 0.
    repetition_penalty and no_repeat_ngram look at prompt and answer, presence and frequency penalty at the answer.
    logit_bias: id -> what is added to its logit. logprobs: likeliest tokens to report per place (0 = the chosen
    one alone), None = report nothing.
    """

    temperature: float = 0.5
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_tokens: int = 512
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        limits = {"temperature": (0.0, 2.0), "top_k": (0, 1000), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0),
                  "repetition_penalty": (0.1, 10.0), "presence_penalty": (-2.0, 2.0), "frequency_penalty": (-2.0, 2.0),
                  "no_repeat_ngram": (0, 1000), "max_tokens": (1, 10**9), "logprobs": (0, 20)}  # fmt: skip
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and low <= value <= high):
                raise ValueError(f"{name}={value} must be between {low} and {high}")
        if self.top_p == 0:
            raise ValueError("top_p=0 leaves no token to choose; use temperature=0 for the likeliest")
        if any(not s for s in self.stop):
            raise ValueError("stop strings must not be empty")
        for i, bias in self.logit_bias.items():
            if i < 0 or not -100 <= bias <= 100:
                raise ValueError(f"logit_bias {i}: {bias} must be a token id and a number between -100 and 100")


@dataclass(frozen=True)
class Choice:
    """A chosen token. logprob, top: under the model itself (temperature 1, nothing filtered), if asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def filtered_probabilities(logits: Floats, params: SamplingParams) -> tuple[Ids, Floats]:
    """Return the ids that may be drawn, ascending, and their probabilities. logits: (V,); params.temperature > 0."""
    x = (logits - logits.max()) / np.float32(max(params.temperature, MIN_TEMPERATURE))
    ids = np.flatnonzero(x >= math.log(max(params.min_p, NEGLIGIBLE / x.size)))
    x = x.take(ids)  # all else is done for few tokens, as a rule, instead of all
    if 0 < params.top_k < ids.size:
        kept = np.sort(np.argpartition(-x, params.top_k - 1)[: params.top_k])
        ids, x = ids[kept], x[kept]
    p = np.exp(x)
    if params.top_p < 1:
        kept = _nucleus(p, params.top_p)
        ids, p = ids[kept], p[kept]
    return ids, p / p.sum()


def _nucleus(p: Floats, top_p: float) -> Ids:
    """Where the likeliest are that together reach `top_p` of the mass (arXiv 1904.09751), one at least, ascending."""
    total = p.sum()
    kept = np.flatnonzero(p > (1 - top_p) * total / (2 * p.size))  # the others together are less than what is cut off
    few = p[kept]
    falling = np.sort(few)[::-1]  # sorting values costs a fraction of sorting indices
    before = np.cumsum(falling) - falling  # mass of the likelier ones
    n = max(1, int(np.searchsorted(before, top_p * total)))
    wanted = few >= falling[n - 1]
    wanted[np.flatnonzero(few == falling[n - 1])[n - int((few > falling[n - 1]).sum()) :]] = False
    return kept[wanted]


def draw(p: Floats, uniform: float | NDArray[np.float64]) -> Ids:
    """Turn numbers from [0, 1) into indices distributed as `p`, by inverting the cumulative distribution."""
    mass = np.cumsum(p, dtype=np.float64)
    return np.searchsorted(mass, uniform * mass[-1], side="right")


def penalize(logits: Floats, seen: Sequence[int], penalty: float) -> Floats:
    """Make tokens already seen less likely (arXiv 1909.05858): positive logits shrink, negative ones grow."""
    if penalty == 1.0 or not seen:
        return logits
    ids = np.unique(seen)
    out, values = logits.copy(), logits[ids]
    out[ids] = np.where(values > 0, values / penalty, values * penalty)
    return out


def completes_ngram(seen: Sequence[int], n: int) -> list[int]:
    """Ids that would repeat a run of `n` tokens that `seen` already holds."""
    if n < 1 or len(seen) < n:
        return []
    tail = list(seen[len(seen) - n + 1 :])
    return [seen[i + n - 1] for i in range(len(seen) - n + 1) if list(seen[i : i + n - 1]) == tail]


class Sampler:
    """Chooses the tokens of one answer; knows what was said so far. index: which of a request's answers."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], index: int = 0) -> None:
        self.params, self.seen = params, list(prompt)
        self._counts: Counter[int] = Counter()
        seed = None if params.seed is None else [params.seed % 2**64, index]
        self._random = np.random.Generator(np.random.PCG64(seed))  # the same numbers on every machine

    def choose(self, logits: Floats) -> Choice:
        """Choose a token and remember it. logits: (V,) float32.

        Raises FloatingPointError when the logits are not finite: nothing can be drawn from them.
        """
        if not np.isfinite(logits.sum()):
            raise FloatingPointError("the model's output is not finite; the checkpoint is not usable")
        adjusted = self._adjusted(logits)
        if self.params.temperature == 0:
            token = int(adjusted.argmax())
        else:
            ids, p = filtered_probabilities(adjusted, self.params)
            token = int(ids[draw(p, self._random.random())])
        self.seen.append(token)
        self._counts[token] += 1
        return self._with_logprobs(token, logits)

    def _adjusted(self, logits: Floats) -> Floats:
        """Apply penalties, bias and bans, to a copy if anything changes."""
        p = self.params
        out = penalize(logits, self.seen, p.repetition_penalty)
        if self._counts and (p.presence_penalty or p.frequency_penalty):
            out = out.copy()
            ids = np.fromiter(self._counts, np.intp)
            out[ids] -= p.presence_penalty + p.frequency_penalty * np.fromiter(self._counts.values(), np.float32)
        if p.logit_bias:
            out = out.copy()
            for i, bias in p.logit_bias.items():
                if i < out.size:
                    out[i] += bias
        if banned := completes_ngram(self.seen, p.no_repeat_ngram):
            out = out.copy()
            out[banned] = -np.inf
        return out

    def _with_logprobs(self, token: int, logits: Floats) -> Choice:
        if self.params.logprobs is None:
            return Choice(token)
        shifted = logits.astype(np.float64) - logits.max()
        logprobs = shifted - np.log(np.exp(shifted).sum())
        likeliest = np.argsort(-logprobs, kind="stable")[: self.params.logprobs]
        return Choice(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in likeliest))
