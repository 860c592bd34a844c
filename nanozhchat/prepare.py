"""From data specs to what training reads: corpus and token shards, made once by rank 0, reused afterwards."""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from nanozhchat import corpus, paths, sources, token_store
from nanozhchat.compute import Compute
from nanozhchat.recipe import FEW_DOCUMENTS
from nanozhchat.token_store import TokenStore
from nanozhchat.tokenizer import Tokenizer

log = logging.getLogger(__name__)
T = TypeVar("T")
TOKENS_PER_ENTRY = 50  # of training text: with fewer, most of a vocabulary is hardly ever seen
TOKENIZER_BYTES = 256 * 2**20  # text that a default tokenizer is trained on at most


def prepare(
    specs: Sequence[str], tokenizer: Tokenizer, compute: Compute, *, text_field: str | None = None
) -> TokenStore:
    """Return the token shards of the data, building corpus and shards where they are missing or out of date."""
    name, weigh = corpus.name_of(specs), None
    if len(specs) > 1 and any(sources.parse(spec).weight is not None for spec in specs):  # the ratio holds by tokens
        name += f"-{tokenizer.hash[:6]}"
        weigh = (f"tokens of {tokenizer.hash}", lambda text: len(tokenizer.encode(text)))

    def build() -> TokenStore:
        made = corpus.build(specs, name, text_field=text_field, weigh=weigh, progress=log.info)
        return token_store.tokenize(made, tokenizer, progress=log.info)

    store = main_first(build, compute)
    tokens, entries = store.n_tokens("train"), tokenizer.vocab_size
    if compute.is_main and tokens < TOKENS_PER_ENTRY * entries:
        used, better = vocabulary_use(store), max(512, 2 ** int(math.log2(1 + tokens / TOKENS_PER_ENTRY)))
        log.warning("the vocabulary is too large for the data: %d tokens of text for %d entries, of which %d (%.0f %%) "
                    "occur in it; the embeddings of the others are never trained. Give more text, or a tokenizer of "
                    "about %d entries", tokens, entries, used, 100 * used / entries, better)  # fmt: skip
    if compute.is_main and (documents := store.n_docs("val")) < FEW_DOCUMENTS:
        log.warning("only %d document(s) with %d tokens are held out: figures measured on them say little", documents,
                    store.n_tokens("val"))  # fmt: skip
    return store


def vocabulary_use(store: TokenStore) -> int:
    """Count the different ids that occur in the training data."""
    seen = np.zeros(store.manifest["vocab_size"], bool)
    for i in range(store.n_docs("train")):
        seen[store.doc("train", i)] = True
    return int(seen.sum())


def main_first(build: Callable[[], T], compute: Compute) -> T:
    """Let rank 0 do expensive work that leaves files behind; the others then find them made."""
    made: list[T] = []

    def first() -> None:
        with compute.work_of_main():
            if compute.is_main:
                made.append(build())

    compute.together(first)
    return made[0] if made else build()


def load_or_train_tokenizer(
    name: str | None, vocab_size: int, specs: Sequence[str], compute: Compute, *, text_field: str | None = None
) -> tuple[str, Tokenizer]:
    """Load a tokenizer by name; without a name, use (or train) the default one for this data and vocabulary.

    Returns the name and the tokenizer. Raises FileNotFoundError with the command to run for an unknown name.
    """
    if name is not None:
        return name, Tokenizer.load(paths.tokenizer_dir(name))
    name = corpus.tokenizer_name(specs, vocab_size)
    folder = paths.tokenizer_dir(name)

    def build() -> Tokenizer:
        if not (folder / "meta.json").exists():
            log.info("no --tokenizer given: training %s (%d tokens) on the data", name, vocab_size)
            documents = sources.documents(specs, "train", text_field=text_field, max_bytes=TOKENIZER_BYTES)
            Tokenizer.train(documents, vocab_size).save(folder)
        return Tokenizer.load(folder)

    return name, main_first(build, compute)


def adopt_tokenizer(folder: Path, compute: Compute) -> str:
    """Take over the tokenizer of an exported model; returns the name that it has from then on."""
    tokenizer = Tokenizer.load(folder)
    name = f"of-model-{tokenizer.hash[:8]}"
    main_first(lambda: tokenizer.save(paths.tokenizer_dir(name)), compute)
    return name
