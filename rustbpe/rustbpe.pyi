"""Byte-level BPE for Chinese: training and encoding. Long calls release the interpreter and honour Ctrl-C."""

from collections.abc import Callable, Iterable, Sequence
from typing import final

BPE_PATTERN: str
"""The regular expression "bpe" stands for: Han runs, words with one leading space, single digits, punctuation."""

CHAR_PATTERN: str
"""The regular expression "char" stands for: every character is a chunk."""

@final
class BPE:
    """A byte-level BPE tokenizer without special tokens. Ids are ranks.

    Wherever a str holds half of a surrogate pair, which UTF-8 cannot express, it is read as U+FFFD.
    """

    @staticmethod
    def train(
        docs: Iterable[str],
        vocab_size: int,
        pattern: str = "bpe",
        threads: int = 0,
        progress: Callable[[str, int, int], object] | None = None,
    ) -> BPE:
        """Learn a vocabulary of exactly `vocab_size` tokens (256 or more) from an iterable of documents.

        pattern: "bpe", "char" or a regular expression. threads: 0 = one per core; the result does not depend on it.
        progress(stage, done, total): "count" with bytes (total 0: unknown), then "merge" with merges.
        Raises ValueError if there is no text or it cannot give that many tokens; the attribute `reached` of the latter
        is the largest size it can give.
        """

    @staticmethod
    def from_ranks(ranks: Sequence[bytes], pattern: str = "bpe") -> BPE:
        """Build from the byte strings of all tokens; the index is the id. Raises ValueError if the list is damaged."""

    def ranks(self) -> list[bytes]:
        """Return the byte strings of all tokens; the index is the id."""

    def merges(self) -> list[tuple[int, int]]:
        """Return the merges in order, as (left id, right id).

        Raises ValueError for a vocabulary from elsewhere with tokens that no merge makes.
        """

    @property
    def pattern(self) -> str:
        """The full regular expression that cuts text into chunks."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""

    @property
    def stats(self) -> dict[str, int]:
        """What was counted in training: documents, bytes, chunks, distinct_chunks; empty if built from ranks."""

    def split(self, text: str) -> list[str]:
        """Return the chunks of a text; put together they are the text."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""

    def encode_bytes(self, data: bytes) -> list[int]:
        """Return the ids of any bytes, valid UTF-8 or not."""

    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[list[int]]:
        """Return the ids of each text. threads: 0 = one per core."""

    def encode_batch_flat(self, texts: Sequence[str], threads: int = 0) -> tuple[bytes, bytes]:
        """Return all ids end to end as little-endian uint32, and the len(texts) + 1 offsets between texts as uint64."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of a list of ids. Raises ValueError for an id outside the vocabulary."""
