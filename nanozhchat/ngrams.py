"""N-gram counts as a part of the model: what is in the text that the network has no time to read.

Interpolated Kneser-Ney: h is a context, h' is h without its oldest token; every order adds what it has seen to what the
shorter context says, so each row sums to one by construction:

    p(w | h) = seen(h, w) + back(h) * p(w | h')        back(h) = 1 - sum over w of seen(h, w); 1 for unknown contexts
"""

from typing import cast

import torch
from torch import Tensor, nn

from nanozhchat.gpt_config import Sizes

DENSE_ELEMENTS = 2**26  # largest table of all bigrams that training lays out
NO_TOKEN = -1  # in a context: before the row began


class NGrams(nn.Module):
    """Tables of one vocabulary, as buffers. Key of an n-gram: its ids as digits of a number in base V, oldest first."""

    def __init__(self, vocab_size: int, sizes: Sizes) -> None:
        super().__init__()
        self.vocab_size, self.sizes, self.order = vocab_size, sizes, len(sizes) + 1
        self._bigrams: Tensor | None = None  # (V, V)
        self.register_buffer("unigram", torch.full((vocab_size,), 1 / vocab_size))
        for n, (n_grams, n_contexts) in enumerate(sizes, start=2):
            self.register_buffer(f"grams{n}", torch.zeros(n_grams, dtype=torch.long))  # keys, ascending
            self.register_buffer(f"seen{n}", torch.zeros(n_grams))
            self.register_buffer(f"contexts{n}", torch.zeros(n_contexts, dtype=torch.long))  # keys, ascending
            self.register_buffer(f"back{n}", torch.ones(n_contexts))

    def _table(self, name: str, n: int) -> Tensor:
        return cast(Tensor, getattr(self, f"{name}{n}"))

    def contexts(self, idx: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, order - 1): the tokens up to each position, its own last."""
        padded = torch.nn.functional.pad(idx, (self.order - 2, 0), value=NO_TOKEN)
        return padded.unfold(1, self.order - 1, 1)

    def probability(self, context: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) probability of each target after its context (N, order - 1), and the order of the longest one known."""
        p, matched = self.unigram[targets], torch.ones_like(targets)
        for n in range(2, self.order + 1):
            key, known, back = self._context(context, n)
            gram, found = _find(self._table("grams", n), key * self.vocab_size + targets, known)
            p = torch.where(found, self._table("seen", n)[gram], 0.0) + back * p
            matched = torch.where(known, n, matched)
        return p, matched

    def rows(self, context: Tensor) -> Tensor:
        """(N, V) probabilities of all tokens after each context (N, order - 1)."""
        dense = self._bigrams
        p = self.unigram.repeat(len(context), 1) if dense is None else dense.index_select(0, context[:, -1])
        for n in range(2 if dense is None else 3, self.order + 1):
            self._lengthen(p, context, n)
        return p

    def _lengthen(self, p: Tensor, context: Tensor, n: int) -> None:
        """Turn rows of order n - 1 into rows of order n, in place."""
        grams, (key, known, back) = self._table("grams", n), self._context(context, n)
        p *= back[:, None]
        first = torch.searchsorted(grams, key * self.vocab_size)
        counts = torch.where(known, torch.searchsorted(grams, (key + 1) * self.vocab_size) - first, 0)
        row = torch.repeat_interleave(counts)
        at = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts - first)[row]
        p.index_put_((row, grams[at] % self.vocab_size), self._table("seen", n)[at], accumulate=True)

    def prepare_rows(self) -> None:
        """Lay out all bigrams, if the vocabulary is small, so that `rows` is fast enough for training."""
        if self._bigrams is None and self.vocab_size**2 <= DENSE_ELEMENTS:
            context = torch.full((self.vocab_size, self.order - 1), NO_TOKEN, device=self.unigram.device)
            context[:, -1] = torch.arange(self.vocab_size)
            rows = self.unigram.repeat(self.vocab_size, 1)
            for part, ids in zip(rows.split(256), context.split(256), strict=True):
                self._lengthen(part, ids, 2)
            self._bigrams = rows

    def _context(self, context: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Key of the last n - 1 tokens of each context, whether they are known, and their `back`."""
        last = context[:, self.order - n :]
        key = (last * self.vocab_size ** torch.arange(n - 2, -1, -1, device=context.device)).sum(1)
        place, known = _find(self._table("contexts", n), key, (last >= 0).all(1))
        return key, known, torch.where(known, self._table("back", n)[place], 1.0)


def _find(keys: Tensor, wanted: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Places of keys in an ascending list (any place where it is missing), and whether each is there and `among`."""
    place = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
    return place, (keys[place] == wanted) & among
