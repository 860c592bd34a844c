"""How much of a benchmark stands in a corpus: runs of N_GRAM folded characters, as GPT-3's check had of words."""

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nanozhchat import sources
from nanozhchat.corpus import Corpus
from nanozhchat.dedup import NOT_WORDS, ngram_hashes, units
from nanozhchat.records import ReadStats

N_GRAM = 13
MOSTLY = 0.8  # of an item's n-grams: it stands there as a whole
EXAMPLES = 5


def fold(text: str) -> str:
    """Reduce a text to letters, digits and Han: width, case, marks and blanks do not count."""
    return NOT_WORDS.sub("", unicodedata.normalize("NFKC", text).lower())


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def check(corpus: Corpus, benchmark: Sequence[str], *, split: str = "train") -> dict[str, Any]:
    """Look for every record of a benchmark (data specs; all its strings count) in one split of a corpus.

    Returns {"items", "too_short", "touched", "contained", "documents", "n_gram", "examples"}: items with one n-gram or
    with MOSTLY of them in the corpus, documents that hold any. Raises ValueError when no item is long enough.
    """
    read = (sources.file_records(sources.parse(spec), stats=ReadStats()) for spec in benchmark)
    items = ["\n".join(_strings(record.value)) for records in read for record in records]
    grams = [np.unique(ngram_hashes(units(fold(text)), N_GRAM)) for text in items]
    if not any(map(len, grams)):
        raise ValueError(f"{' '.join(benchmark)}: none of {len(items)} items has {N_GRAM} characters")
    known = np.unique(np.concatenate(grams))
    found, documents, first = np.zeros(len(known), bool), 0, dict[int, str]()
    for text in corpus.documents(split):
        own = ngram_hashes(units(fold(text)), N_GRAM)
        at = np.searchsorted(known, own).clip(max=len(known) - 1)
        hits = np.unique(at[known[at] == own])
        documents += bool(len(hits))
        for i in hits[~found[hits]]:
            first[int(i)] = text[:120]
        found[hits] = True
    places = [np.searchsorted(known, own) for own in grams]
    shares = np.array([found[place].mean() if len(place) else 0.0 for place in places])
    examples = [{"item": items[i][:120], "share": round(float(shares[i]), 3),
                "document": next(first[p] for p in places[i].tolist() if p in first)}
                for i in np.argsort(-shares, kind="stable")[:EXAMPLES].tolist() if shares[i] > 0]  # fmt: skip
    return {
        "items": len(items), "too_short": sum(not len(own) for own in grams), "touched": int((shares > 0).sum()),
        "contained": int((shares >= MOSTLY).sum()), "documents": documents, "n_gram": N_GRAM, "examples": examples,
    }  # fmt: skip
