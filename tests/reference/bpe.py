"""Byte-level BPE, slow and readable: the twin that `rustbpe` is tested against.

Splitting is left to the `regex` library; training recounts every pair after every merge.
"""

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
