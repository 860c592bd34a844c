"""Counting n-grams: interpolated Kneser-Ney with three discounts an order (Chen and Goodman 1998)."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nanozhchat.ngrams import NGrams
from nanozhchat.packing import shuffled
from nanozhchat.recipe import ngram_order
from nanozhchat.token_store import TokenStore

MIN_COUNTS = {2: 1, 3: 2, 4: 2}  # rarer n-grams are left out: a quarter of the size for 0.03 bits per byte

Array = npt.NDArray[Any]


def unread(store: TokenStore, n_tokens: int, seed: int, bos_id: int) -> Array:
    """About n_tokens of the training documents that a loader with this seed comes to last, each after a BOS."""
    n = store.n_docs("train")
    pieces: list[Array] = []
    for doc in shuffled(n, seed, 0, np.arange(n))[::-1]:
        if n_tokens <= 0:
            break
        pieces += [np.array([bos_id]), store.doc("train", int(doc))]
        n_tokens -= len(pieces[-1]) + 1
    return np.concatenate(pieces)


def count(tokens: Array, vocab_size: int) -> NGrams:
    """Count a text. tokens: (n,) ids, documents end to end, each beginning with BOS."""
    order = ngram_order(vocab_size)
    keys = tokens = tokens.astype(np.int64)
    for n in range(2, order + 1):
        keys = keys[:-1] * vocab_size + tokens[n - 1 :]
    grams = _distinct(keys)
    del keys, tokens  # as large as all that follows
    tensors, sizes = {}, []
    for n in range(order, 1, -1):
        table = _order(*grams, vocab_size, MIN_COUNTS[n])
        sizes.insert(0, (len(table[0]), len(table[2])))
        for name, values in zip(("grams", "seen", "contexts", "back"), table, strict=True):
            tensors[f"{name}{n}"] = torch.from_numpy(values)
        grams = _distinct(grams[0] % vocab_size ** (n - 1))  # shorter ones count how many tokens they follow
    ids, counts = grams
    unigram = np.full(vocab_size, 0.5 * len(ids) / counts.sum() / vocab_size)
    unigram[ids] += (counts - 0.5) / counts.sum()
    found = NGrams(vocab_size, tuple(sizes))
    found.load_state_dict(tensors | {"unigram": torch.from_numpy(unigram).float()})
    return found


def _distinct(keys: Array) -> tuple[Array, Array]:
    """Distinct keys, ascending, and how often each occurs. The array given ends up sorted."""
    keys.sort()
    first = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    return keys[first], np.diff(np.append(first, len(keys)))


def _order(keys: Array, counts: Array, vocab_size: int, min_count: int) -> tuple[Array, Array, Array, Array]:
    """Discount the n-grams of one order: (kept keys, seen, contexts, back)."""
    context = keys // vocab_size
    first = np.flatnonzero(np.concatenate(([True], context[1:] != context[:-1])))
    total = np.repeat(np.add.reduceat(counts, first), np.diff(np.append(first, len(keys))))
    seen = (counts - _discounts(counts)[np.minimum(counts, 3)]) / total
    kept = counts >= min_count
    back = 1 - np.add.reduceat(np.where(kept, seen, 0.0), first)
    used = np.logical_or.reduceat(kept, first)
    return keys[kept], seen[kept].astype(np.float32), context[first][used], back[used].astype(np.float32)


def _discounts(counts: Array) -> Array:
    """What is taken off counts of 0, 1, 2 and more; a text too small to tell takes a half."""
    n1, n2, n3, n4 = (float((counts == i).sum()) for i in (1, 2, 3, 4))
    if not min(n1, n2, n3, n4):
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n1 / (n1 + 2 * n2)
    return np.clip([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3], 0.0, [0.0, 0.99, 1.99, 2.99])
