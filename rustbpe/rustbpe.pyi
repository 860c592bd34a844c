"""Byte-level BPE for Chinese: training and encoding. Long calls release the interpreter and honour Ctrl-C."""

from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from typing import final

BPE_PATTERN: str
"""The regular expression "bpe" stands for: Han runs, words with one leading space, single digits, punctuation."""

CHAR_PATTERN: str
"""The regular expression "char" stands for: every character is a chunk."""

def count_to_files(
    docs: Iterable[str],
    directory: str | PathLike[str],
    prefix: str,
    memory: int,
    pattern: str = "bpe",
    threads: int = 0,
    progress: Callable[[str, int, int], object] | None = None,
) -> tuple[list[str], dict[str, int]]:
    """Count the chunks of documents into new files `PREFIX*.counts` in a folder, using about `memory` bytes for tables.

    Returns the names of the files, which are safely on disk, and what was counted: documents, bytes, chunks.
    progress("count", bytes, 0) as in `BPE.train`. Raises OSError if a file exists already or cannot be written.
    """

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
        coverage: float = 0.0,
    ) -> BPE:
        """Learn a vocabulary of exactly `vocab_size` tokens (256 or more) from an iterable of documents.

        pattern: "bpe", "char" or a regular expression. threads: 0 = one per core; the result does not depend on it.
        progress(stage, done, total): "count" with bytes (total 0: unknown), then "merge" with merges. coverage: the
        most frequent characters that are this share of the text become tokens before any two are joined; 0 = by
        frequency.
        Raises ValueError if there is no text or it cannot give that many tokens; the attribute `reached` of the latter
        is the largest size it can give.
        """

    @staticmethod
    def train_from_files(
        files: Sequence[str | PathLike[str]],
        bytes: int,
        vocab_size: int,
        memory: int,
        pattern: str = "bpe",
        threads: int = 0,
        merges: Sequence[tuple[int, int, int]] = ...,
        progress: Callable[[str, int, int], object] | None = None,
        saved: Callable[[list[tuple[int, int, int]]], object] | None = None,
    ) -> BPE:
        """Learn a vocabulary from files of counted chunks (see `count_to_files`), in about `memory` bytes.

        bytes: UTF-8 bytes of the text that was counted. merges: [(left id, right id, count)] of an earlier call to go
        on from; saved(merges) is handed such a list now and then, never a wrong one. The rest is as in `train`.
        Writes a `*.tokens.counts` of about the same size beside every file, and removes it in the end.
        Raises OSError if a file cannot be read or written.
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
    def counts(self) -> list[int]:
        """How often the pair of each merge stood in the text when it was merged; empty if built from ranks."""

    @property
    def stats(self) -> dict[str, int]:
        """What was counted in training: documents, bytes, chunks; empty if built from ranks."""

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

    def encode_joined(self, data: bytes, offsets: bytes, threads: int = 0) -> tuple[bytes, bytes]:
        """Do the same for texts end to end as UTF-8, with the len(texts) + 1 offsets between them, little-endian int64.

        Raises ValueError for data that is not UTF-8, or offsets that do not ascend within it between characters.
        """

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of a list of ids. Raises ValueError for an id outside the vocabulary."""
