"""From data specs to what training reads: corpus and token shards, made once by rank 0, reused afterwards."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from nanozhchat import corpus, paths, sources, token_store
from nanozhchat.compute import Compute
from nanozhchat.token_store import TokenStore
from nanozhchat.tokenizer import Tokenizer

log = logging.getLogger(__name__)
T = TypeVar("T")


def corpus_name(specs: Sequence[str]) -> str:
    """Name a corpus after its data: `builtin` as it is, else the last words of the specs and a short hash."""
    if list(specs) == ["builtin"]:
        return "builtin"
    words = re.findall(r"[A-Za-z0-9]+", " ".join(Path(s).name for s in specs)) or ["data"]
    digest = hashlib.blake2b("\n".join(specs).encode(), digest_size=4).hexdigest()
    return f"{'-'.join(words)[:32].strip('-')}-{digest}"


def prepare(
    specs: Sequence[str], tokenizer: Tokenizer, compute: Compute, *, text_field: str | None = None
) -> TokenStore:
    """Return the token shards of the data, building corpus and shards where they are missing or out of date."""
    name = corpus_name(specs)

    def build() -> TokenStore:
        made = corpus.build(specs, name, text_field=text_field, progress=log.info)
        return token_store.tokenize(made, tokenizer, progress=log.info)

    return main_first(build, compute)


def main_first(build: Callable[[], T], compute: Compute) -> T:
    """Let rank 0 do expensive work that leaves files behind; the others then find them made."""
    if compute.is_main:
        made = build()
        compute.long_barrier()
        return made
    compute.long_barrier()
    return build()


def load_or_train_tokenizer(
    name: str | None, vocab_size: int, specs: Sequence[str], compute: Compute, *, text_field: str | None = None
) -> tuple[str, Tokenizer]:
    """Load a tokenizer by name; without a name, use (or train) the default one for this data and vocabulary.

    Returns the name and the tokenizer. Raises FileNotFoundError with the command to run for an unknown name.
    """
    if name is not None:
        return name, Tokenizer.load(paths.tokenizer_dir(name))
    name = default_tokenizer_name(specs, vocab_size)
    folder = paths.tokenizer_dir(name)

    def build() -> Tokenizer:
        if not (folder / "meta.json").exists():
            log.info("no --tokenizer given: training %s (%d tokens) on the data", name, vocab_size)
            documents = sources.documents(specs, "train", text_field=text_field, max_bytes=TOKENIZER_BYTES)
            Tokenizer.train(documents, vocab_size).save(folder)
        return Tokenizer.load(folder)

    return name, main_first(build, compute)


TOKENIZER_BYTES = 256 * 2**20  # text that a default tokenizer is trained on at most


def default_tokenizer_name(specs: Sequence[str], vocab_size: int) -> str:
    """Name of the tokenizer trained on this data with this vocabulary."""
    return f"{corpus_name(specs)}-{vocab_size}"
