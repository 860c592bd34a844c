"""Byte-level BPE, slow and readable: the twin that `rustbpe` is tested against.

Splitting is left to the `regex` library, training recounts every pair after every merge, encoding looks up every
neighbouring pair in every round.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import regex


def train(docs: Iterable[str], vocab_size: int, pattern: str) -> list[tuple[int, int]]:
    """Return the merges as (left id, right id); fewer than asked for if the text runs out of pairs."""
    chunks = [list(chunk.encode()) for doc in docs for chunk in regex.findall(pattern, doc)]
    merges: list[tuple[int, int]] = []
    for token in range(256, vocab_size):
        counts = Counter(pair for chunk in chunks for pair in zip(chunk, chunk[1:]))
        if not counts:
            break
        merges.append(best := min(counts, key=lambda pair: (-counts[pair], pair)))
        for n, chunk in enumerate(chunks):
            chunks[n] = []
            for i in chunk:  # replace the pair wherever it stands, from the left
                chunks[n].append(i)
                if tuple(chunks[n][-2:]) == best:
                    chunks[n][-2:] = [token]
    return merges


def encode(text: str, ranks: list[bytes], pattern: str) -> list[int]:
    """Merge, in each chunk, the neighbours that make the lowest-ranked token, leftmost first, until none do."""
    rank_of, ids = {token: rank for rank, token in enumerate(ranks)}, []
    for chunk in regex.findall(pattern, text):
        parts = [bytes([byte]) for byte in chunk.encode()]
        while found := [(rank_of[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in rank_of]:
            _, i = min(found)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [rank_of[part] for part in parts]
    return ids
