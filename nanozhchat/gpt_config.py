"""Sizes and switches of the model, without torch: what a checkpoint says of the network."""

from dataclasses import asdict, dataclass
from typing import Any

GATE_CHANNELS = 16  # channels that a gate looks at
QK_SCALE = 1.2  # sharpens attention after the norm has made all queries and keys the same length

Sizes = tuple[tuple[int, int], ...]  # of n-gram tables, per order from 2: n-grams, contexts


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes of the model. window_pattern: one letter a layer, repeated; L = full context, S = a quarter of it.

    plain: only what other software knows (the Arcee architecture): no norm of queries and keys, value embeddings,
    smear, backout, first-embedding scales or softcap.
    gpt2: GPT-2's network instead (`gpt2.py`), plain as well.
    offset_heads: key heads whose keys are those of the token before (`gpt.offset_keys`).
    ngrams: sizes of the tables of n-gram counts (`ngrams.NGrams`), () = none.
    """

    sequence_len: int = 512
    vocab_size: int = 4096
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 4
    n_embd: int = 256
    window_pattern: str = "L"
    value_embeddings: bool = True
    softcap: float = 15.0
    rope_base: float = 100_000.0
    plain: bool = False
    offset_heads: int = 0
    gpt2: bool = False
    ngrams: Sizes = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ngrams", tuple((grams, contexts) for grams, contexts in self.ngrams))  # from JSON
        extras = self.value_embeddings or self.offset_heads or self.ngrams
        if self.plain and (extras or set(self.window_pattern) != {"L"}):
            raise ValueError("plain models have no value_embeddings, offset_heads or ngrams; their window_pattern is L")
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise ValueError(f"n_embd={self.n_embd} must be n_head={self.n_head} times an even head size")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}")
        if not 0 <= self.offset_heads <= self.n_kv_head:
            raise ValueError(f"offset_heads={self.offset_heads} must be from 0 to n_kv_head={self.n_kv_head}")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(f"window_pattern={self.window_pattern!r} may hold the letters S and L only")

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.n_embd // self.n_head

    @property
    def kv_dim(self) -> int:
        """Channels of all key (or value) heads together."""
        return self.n_kv_head * self.head_dim

    @property
    def logit_cap(self) -> float:
        """What logits are squeezed into, plus or minus; 0 = not at all."""
        return 0.0 if self.plain else self.softcap

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the head: a multiple of 64, for tensor cores."""
        return -(-self.vocab_size // 64) * 64

    def window(self, layer: int) -> int:
        """Tokens that a layer's attention sees; the last layer always sees all."""
        letter = self.window_pattern[layer % len(self.window_pattern)]
        full = letter == "L" or layer == self.n_layer - 1
        return self.sequence_len if full else max(1, self.sequence_len // 4)

    def has_value_embedding(self, layer: int) -> bool:
        """Alternate layers, the last always included."""
        return self.value_embeddings and layer % 2 == (self.n_layer - 1) % 2

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)
