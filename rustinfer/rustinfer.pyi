"""Batched decoding of nanozhchat models on CPUs, float32 and int8. Numbers cross as bytes, native endian."""

from collections.abc import Mapping, Sequence

class Model:
    """A model's weights, packed for this machine; slots share them.

    config: n_layer, n_head, n_kv_head, head_dim, context, n_embd, vocab_size, windows (tokens seen, per layer),
    gate_channels, qk_scale and softcap (0 = none). tensors: names of the Python model -> float32 bytes, or (int8 bytes,
    float32 bytes of a scale per row); beside them rope.cos and rope.sin, (context, head_dim / 2) each. isa: one of
    `instruction_sets()`, None = the best. Raises ValueError when a setting or tensor is missing or not known.
    """

    def __new__(
        cls,
        config: Mapping[str, object],
        tensors: Mapping[str, bytes | tuple[bytes, bytes]],
        *,
        threads: int = 1,
        isa: str | None = None,
    ) -> Model: ...
    def slots(self, n: int) -> Slots:
        """Return empty slots for n sequences."""

class Slots:
    """Sequences in flight."""

    def forward(self, parts: Sequence[tuple[int, int, int | None, Sequence[int], int]]) -> bytes:
        """Append to slots. A part: slot, tokens held, the last of them, ids to append, places at the end to score.

        Returns float32 (places scored, vocab_size) logits. Raises ValueError when a part does not fit.
        """

    def copy(self, source: int, target: int, n: int) -> None:
        """Make `target` hold the first n tokens of `source`."""

    def clear(self, slot: int) -> None:
        """Empty a slot and give its memory back."""

def instruction_sets() -> list[str]:
    """Names of the instruction sets that this machine has, the best first."""
