"""Tokenizer: text and conversations to token ids and back.

A byte-level BPE learned by `rustbpe` (ids are ranks: 256 bytes, then one per merge), then the special tokens.
Text never becomes a special token: only `render` and `render_prompt` place those, by id.
"""

import base64
import codecs
import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nanozhchat.conversation import BOS, END, ROLE_TOKEN, SPECIAL_TOKENS, TOOL_CALL, Message, make_conversation
from nanozhchat.errors import DamagedError
from nanozhchat.files import atomic_write, read_json, write_json
from nanozhchat.foreign import BPE, HubBPE, byte_alphabet, read, vocabulary

if TYPE_CHECKING:
    import tiktoken

FORMAT_VERSION = 1
KINDS = ("bpe", "char")

Progress = Callable[[str, int, int], object]


class Tokenizer:
    """A tokenizer. kind: "bpe", "char" whose tokens never cross a character, or "foreign" or "hub" from elsewhere."""

    def __init__(self, bpe: BPE | HubBPE, kind: str, trained_on: Mapping[str, int]) -> None:
        self.kind, self.trained_on = kind, dict(trained_on)
        self._bpe = bpe
        first = bpe.vocab_size
        self._special = {name: first + i for i, name in enumerate(SPECIAL_TOKENS)}
        self._special_names = {i: name for name, i in self._special.items()}
        self._ranks = bpe.ranks()
        self.vocab_size = first + len(SPECIAL_TOKENS)
        self.bos_id, self.end_id = self._special[BOS], self._special[END]

    def __repr__(self) -> str:
        return f"Tokenizer(kind={self.kind!r}, vocab_size={self.vocab_size}, hash={self.hash[:12]!r})"

    # --- making, saving, loading

    @classmethod
    def train(
        cls, docs: Iterable[str], vocab_size: int, kind: str = "bpe", *, threads: int = 0,
        progress: Progress | None = None, char_coverage: float = 0.0,
    ) -> "Tokenizer":  # fmt: skip
        """Learn a tokenizer of exactly `vocab_size` tokens, bytes and special tokens included.

        threads: 0 = one per core; the result does not depend on it. progress(stage, done, total) counts bytes read
        (stage "count", total 0 while unknown), then merges (stage "merge"). char_coverage: the most frequent
        characters that make up this share of the text become tokens before any two are joined.
        Raises ValueError if there is no text or it cannot give that many tokens.
        """
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} is unknown; kinds are {', '.join(KINDS)}")
        with _without_special(vocab_size) as size:
            bpe = BPE.train(docs, size, kind, threads, progress, char_coverage)
        return cls(bpe, kind, bpe.stats)

    @classmethod
    def train_from_files(
        cls, counted: Sequence[Path], vocab_size: int, kind: str, totals: Mapping[str, int], memory_bytes: int, *,
        threads: int = 0, merges: Sequence[Sequence[int]] = (), progress: Progress | None = None,
        saved: Callable[[list[tuple[int, int, int]]], object] | None = None,
    ) -> "Tokenizer":  # fmt: skip
        """Learn from files of `rustbpe.count_to_files`; totals: documents, bytes and chunks they were made from.

        merges, saved: what is certain, to go on from (see `rustbpe.BPE.train_from_files`). The rest is as in `train`.
        """
        known = [(left, right, count) for left, right, count in merges]
        with _without_special(vocab_size) as size:
            bpe = BPE.train_from_files(counted, totals["bytes"], size, memory_bytes, kind, threads, known, progress,
                                       saved)  # fmt: skip
        return cls(bpe, kind, totals)

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        """Take over a tokenizer.json, or tiktoken's ranks; raises ValueError if it is no byte-level BPE."""
        bpe = read(path)
        return cls(bpe, "hub" if isinstance(bpe, HubBPE) else "foreign", {})

    def save(self, folder: Path) -> None:
        """Write tokenizer.json (Hugging Face), ranks.tiktoken, vocab.txt; last meta.json, which vouches for them."""
        folder = Path(folder)
        tokens = [*map(readable, self._ranks), *self._special]
        counts = itertools.chain(["-"] * 256, self._bpe.counts, itertools.repeat("-"))  # when the token was made
        vocab = (f"{i}\t{count}\t{token}\n" for i, (token, count) in enumerate(zip(tokens, counts, strict=False)))
        atomic_write(folder / "vocab.txt", "".join(vocab).encode())
        atomic_write(folder / "tokenizer.json", self.json_file)
        lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(self._ranks)]
        atomic_write(folder / "ranks.tiktoken", "".join(lines).encode())
        meta = {
            "format_version": FORMAT_VERSION, "kind": self.kind, "pattern": self.pattern, "vocab_size": self.vocab_size,
            "special_tokens": self._special, "trained_on": self.trained_on, "hash": self.hash,
        }  # fmt: skip
        write_json(folder / "meta.json", meta)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read what `save` wrote.

        Raises FileNotFoundError if there is no tokenizer, DamagedError if its files are not as they were written.
        """
        folder = Path(folder)
        train_it = f"run: python -m scripts.tok_train --name={folder.name} --data <your text>"
        if not (folder / "meta.json").exists():
            raise FileNotFoundError(f"there is no tokenizer at {folder}; {train_it}")
        try:
            meta = read_json(folder / "meta.json")
            content = (folder / "tokenizer.json").read_bytes()
            if meta["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format_version {meta['format_version']} instead of {FORMAT_VERSION}")
            if meta["hash"] != hashlib.sha256(content).hexdigest():
                raise ValueError("tokenizer.json does not match the hash in meta.json")
            found = json.loads(content)
            if meta["kind"] == "hub":
                tokenizer = cls(HubBPE(found), "hub", {})
            else:
                pattern = found["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
                tokenizer = cls(BPE.from_ranks(vocabulary(found), pattern), meta["kind"], meta["trained_on"])
            if tokenizer._special != meta["special_tokens"]:
                raise ValueError(f"special tokens {meta['special_tokens']} instead of {tokenizer._special}")
        except (KeyError, TypeError, ValueError, OSError, DamagedError) as error:
            raise DamagedError(f"the tokenizer at {folder} is damaged ({error}); {train_it} --force") from error
        return tokenizer

    # --- what it is

    @property
    def pattern(self) -> str:
        """The regular expression that cuts text into chunks, which tokens never cross."""
        return self._bpe.pattern

    @cached_property
    def hash(self) -> str:
        """Identity: SHA-256 of tokenizer.json as hex. Equal hashes mean equal ids for every text."""
        return hashlib.sha256(self.json_file).hexdigest()

    def special(self, name: str) -> int:
        """Return the id of a special token, such as "<|bos|>"; raises ValueError for an unknown name."""
        if name not in self._special:
            raise ValueError(f"special token {name!r} is unknown; they are {', '.join(self._special)}")
        return self._special[name]

    def token_bytes(self) -> np.ndarray:
        """Return how many UTF-8 bytes each id stands for: int32 (vocab_size,), 0 for special tokens."""
        return np.array([*map(len, self._ranks), *[0] * len(self._special)], dtype=np.int32)

    # --- text

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text. Half a surrogate pair, which UTF-8 cannot express, is read as U+FFFD."""
        return self._bpe.encode(text)

    def encode_bytes(self, data: bytes) -> list[int]:
        """Return the ids of any bytes, valid UTF-8 or not."""
        return self._bpe.encode_bytes(data)

    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[list[int]]:
        """Return the ids of each text, encoded in parallel. threads: 0 = one per core."""
        return self._bpe.encode_batch(texts, threads)

    def encode_batch_flat(self, texts: Sequence[str], threads: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return all ids end to end, uint32 (n_ids,), and the offsets between texts, uint64 (n_texts + 1,)."""
        ids, offsets = self._bpe.encode_batch_flat(texts, threads)
        return np.frombuffer(ids, dtype="<u4"), np.frombuffer(offsets, dtype="<u8")

    def encode_joined(self, data: bytes, offsets: np.ndarray, threads: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Do the same for texts end to end as UTF-8, with int64 offsets between them, (n_texts + 1,)."""
        ids, ends = self._bpe.encode_joined(data, offsets.astype("<i8").tobytes(), threads)
        return np.frombuffer(ids, dtype="<u4"), np.frombuffer(ends, dtype="<u8")

    def decode_bytes(self, ids: Iterable[int], *, show_special: bool = False) -> bytes:
        """Return the bytes of ids. Special tokens give nothing, or their names if shown.

        Raises ValueError for an id outside the vocabulary.
        """
        return b"".join(self._bytes_of(i, show_special) for i in ids)

    def decode(self, ids: Iterable[int], *, show_special: bool = False) -> str:
        """Return the text of ids, U+FFFD where bytes are not UTF-8. Special tokens as in `decode_bytes`."""
        return self.decode_bytes(ids, show_special=show_special).decode("utf-8", errors="replace")

    def _bytes_of(self, i: int, show_special: bool = False) -> bytes:
        if 0 <= i < len(self._ranks):
            return self._ranks[i]
        if i in self._special_names:
            return self._special_names[i].encode() if show_special else b""
        raise ValueError(f"id {i} is not in this vocabulary, which has ids 0 to {self.vocab_size - 1}")

    # --- conversations

    def render(
        self, conversation: Iterable[Mapping[str, Any] | Message], *, max_tokens: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Return (ids, mask) of a conversation; mask is 1 where the model must learn to produce the id.

        That is the assistant's words, its calls of tools, and the <|end|> after them, never what a tool answered.
        Longer than `max_tokens`, it loses the oldest exchanges after the system message, and if the last one alone is
        too long, what is over at its end.
        """
        ids, mask = [self.bos_id], [0]
        for message in self._fit(make_conversation(conversation), max_tokens):
            learn = int(message[0] == self._special[ROLE_TOKEN["assistant"]])
            ids += message
            mask += [0, *[learn] * (len(message) - 1)]
        return ids[:max_tokens], mask[:max_tokens]

    def render_prompt(
        self, conversation: Iterable[Mapping[str, Any] | Message], *, max_tokens: int | None = None
    ) -> list[int]:
        """Return the ids of a conversation that ends with the user's or a tool's turn, then <|assistant|>.

        Longer than `max_tokens`, it loses the oldest exchanges after the system message, never the question: the
        result may stay too long, and it is the caller who knows what to say then.
        """
        messages = make_conversation(conversation)
        if messages[-1].role not in ("user", "tool"):
            raise ValueError(f"the last message is the {messages[-1].role}'s; a prompt must end with the user's")
        budget = None if max_tokens is None else max_tokens - 1
        ids = [self.bos_id]
        for message in self._fit(messages, budget):
            ids += message
        return [*ids, self._special[ROLE_TOKEN["assistant"]]]

    def render_message(self, message: Message) -> list[int]:
        """Return the ids of one turn: role, words, call of a tool if any, <|end|>."""
        call = [self._special[TOOL_CALL], *self.encode(message.tool_call)] if message.tool_call else []
        return [self._special[ROLE_TOKEN[message.role]], *self.encode(message.content), *call, self.end_id]

    def _fit(self, messages: Sequence[Message], max_tokens: int | None) -> list[list[int]]:
        """Encode messages, each with its control tokens, without the oldest exchanges that do not fit after <|bos|>."""
        rendered = [self.render_message(m) for m in messages]
        if max_tokens is None:
            return rendered
        first = int(messages[0].role == "system")
        starts = [i for i, m in enumerate(messages) if m.role == "user"]
        total = 1 + sum(map(len, rendered))
        while total > max_tokens and len(starts) > 1:
            total -= sum(map(len, rendered[starts[0] : starts[1]]))
            del starts[0]
        return rendered[:first] + rendered[starts[0] :]

    # --- other libraries

    def to_tiktoken(self) -> "tiktoken.Encoding":
        """Return the same tokenizer as a tiktoken.Encoding; raises ValueError for one that only its library can run."""
        if isinstance(self._bpe, HubBPE):
            raise ValueError("this tokenizer is not ranks and one pattern, so tiktoken cannot run it")
        import tiktoken

        ranks = {token: rank for rank, token in enumerate(self._ranks)}
        name = f"nanozhchat-{self.hash[:12]}"
        return tiktoken.Encoding(name, pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=self._special)

    @cached_property
    def json_file(self) -> bytes:
        """tokenizer.json, of Hugging Face's `tokenizers`: byte-level BPE with the same pattern, merges and ids."""
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = [{"id": i, "content": name, **flags, "special": True} for name, i in self._special.items()]
        if isinstance(self._bpe, HubBPE):
            return (json.dumps({**self._bpe.content, "added_tokens": added}, indent=1) + "\n").encode()
        to_char = byte_alphabet()
        names = ["".join(to_char[byte] for byte in token) for token in self._ranks]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                 "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                 "vocab": {name: i for i, name in enumerate(names)},
                 "merges": [f"{names[left]} {names[right]}" for left, right in self._bpe.merges()]}  # fmt: skip
        content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
                   "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}, "post_processor": None,
                   "decoder": byte_level, "model": model}  # fmt: skip
        return (json.dumps(content, indent=1) + "\n").encode()


class StreamDecoder:
    """Turns ids into text one at a time, complete characters only: at most 3 bytes wait for the rest of theirs.

    The pieces and `flush()` put together are `tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes_of = tokenizer._bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, i: int) -> str:
        """Take an id; return the characters it completes. Bytes that cannot be UTF-8 become U+FFFD at once."""
        return self._decoder.decode(self._bytes_of(i))

    def flush(self) -> str:
        """Return what is left at the end: U+FFFD for an incomplete character, else nothing. Then start afresh."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def readable(token: bytes) -> str:
    """Return the text of a token on one line: what cannot be shown, and bytes that are no text, as <E4> or \\n."""
    shown = token.decode("utf-8", errors="surrogateescape")
    return "".join(
        c if c.isprintable() else f"<{ord(c) - 0xDC00:02X}>" if 0xDC80 <= ord(c) <= 0xDCFF else ascii(c)[1:-1]
        for c in shown
    )


@contextlib.contextmanager
def _without_special(vocab_size: int) -> Iterator[int]:
    """Give the size without special tokens, and count them in when that is too little, or more than the text gives."""
    n_special = len(SPECIAL_TOKENS)
    if vocab_size < 256 + n_special:
        raise ValueError(f"vocab_size={vocab_size} is too small: 256 bytes and {n_special} special tokens are always "
                         f"there; pass --vocab-size={256 + n_special} or more")  # fmt: skip
    try:
        yield vocab_size - n_special
    except ValueError as error:
        if (reached := getattr(error, "reached", None)) is None:
            raise
        most = reached + n_special
        raise ValueError(f"vocab_size={vocab_size} is too large: the text gives at most {most} tokens; "
                         f"pass --vocab-size={most} (better less), or give more text") from error  # fmt: skip
