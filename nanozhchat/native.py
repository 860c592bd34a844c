"""The native decoder (`rustinfer`): the same network without Python or operator overhead, on CPUs, float32 or int8.

What a sequence gets does not depend on what runs beside it or on how it is fed, bit for bit. From file to text it needs
no torch, whose import takes longer than a short answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from nanozhchat.batching import Decoder, Part
from nanozhchat.errors import DamagedError
from nanozhchat.gpt_config import GATE_CHANNELS, QK_SCALE, GPTConfig
from nanozhchat.hardware import physical_cores
from nanozhchat.quantize import SCALE, quantize
from nanozhchat.sampling import Floats

if TYPE_CHECKING:
    from nanozhchat.gpt import GPT

try:
    from rustinfer import Model
except ImportError as error:
    raise ImportError("the native decoder is not built; run `uv sync`, or choose --engine=torch") from error


@dataclass(frozen=True)
class NativeModel:
    """Weights packed for this machine."""

    config: GPTConfig
    packed: Model
    int8: bool


def refuse_unknown(config: GPTConfig) -> None:
    """Raise ValueError for a network that the native code does not know."""
    if config.gpt2:
        raise ValueError("the native engine does not know GPT-2's network; choose --engine=torch")
    if config.ngrams:
        raise ValueError("the native engine does not know n-gram counts, which only base models have; choose "
                         "--engine=torch, or the chat model")  # fmt: skip


def pack(
    config: GPTConfig, weights: Mapping[str, Floats], *, int8: bool = False, isa: str | None = None,
    threads: int | None = None,
) -> NativeModel:  # fmt: skip
    """Pack named float32 weights. int8: bytes, keys and values too. isa, threads: None = the best, one a core.

    Raises ValueError for a network that the native code does not know, or weights that do not fit.
    """
    c = config
    refuse_unknown(c)
    sizes = {"n_layer": c.n_layer, "n_head": c.n_head, "n_kv_head": c.n_kv_head, "head_dim": c.head_dim,
             "context": c.sequence_len, "n_embd": c.n_embd, "vocab_size": c.vocab_size, "softcap": c.logit_cap,
             "windows": [c.window(layer) for layer in range(c.n_layer)],
             "offset_heads": c.offset_heads, "gate_channels": GATE_CHANNELS,
             "qk_scale": 0.0 if c.plain else QK_SCALE}  # fmt: skip
    raw = {name: array.tobytes() for name, array in (quantize(weights) if int8 else weights).items()}
    given = {name: (raw[name], raw[name + SCALE]) if name + SCALE in raw else raw[name] for name in weights}
    half = c.head_dim // 2
    frequency = np.float32(c.rope_base) ** -(np.arange(half, dtype=np.float32) / np.float32(half))
    angle = np.arange(c.sequence_len, dtype=np.float32)[:, None] * frequency
    given |= {"rope.cos": np.cos(angle).tobytes(), "rope.sin": np.sin(angle).tobytes()}
    return NativeModel(c, Model(sizes, given, threads=threads or physical_cores(), isa=isa), int8)


def pack_file(config: GPTConfig, path: Path, *, int8: bool = False) -> NativeModel:
    """Pack the weights of a checkpoint; raises DamagedError if they cannot be read or do not fit."""
    refuse_unknown(config)
    try:
        return pack(config, load_file(path), int8=int8)
    except (OSError, SafetensorError, ValueError) as error:
        raise DamagedError(f"{path} is damaged: {error}") from error


def native_model(model: GPT, *, int8: bool = False, isa: str | None = None) -> NativeModel:
    """Pack a model's weights, with as many threads as torch has."""
    import torch

    if model.wte.weight.device.type != "cpu" or model.dtype != torch.float32:
        raise ValueError("the native engine runs on a CPU from float32 weights; choose --engine=torch")
    weights = {name: p.detach().float().contiguous().numpy() for name, p in model.named_parameters()}
    return pack(model.config, weights, int8=int8, isa=isa, threads=torch.get_num_threads())


class NativeDecoder(Decoder):
    """Slots of a native model."""

    def __init__(self, model: NativeModel, n_slots: int) -> None:
        super().__init__(n_slots, model.config.sequence_len)
        self._vocab_size = model.config.vocab_size
        self._slots = model.packed.slots(n_slots)

    def forward(self, parts: Sequence[Part]) -> list[Floats]:
        """Append each part to its slot; return (wanted, vocab_size) logits for each."""
        held = [self.held[p.slot] for p in parts]
        given = [(p.slot, len(h), h[-1] if h else None, p.ids, p.wanted) for p, h in zip(parts, held, strict=True)]
        logits = np.frombuffer(self._slots.forward(given), np.float32).reshape(-1, self._vocab_size)
        for part, h in zip(parts, held, strict=True):
            h += part.ids
        ends = np.cumsum([p.wanted for p in parts])
        return [logits[end - p.wanted : end] for p, end in zip(parts, ends, strict=True)]

    def copy(self, source: int, target: int, n: int) -> None:
        """Make `target` hold the first n tokens of `source`."""
        self._slots.copy(source, target, n)
        super().copy(source, target, n)

    def clear(self, slot: int) -> None:
        """Empty a slot whose content may not be finite."""
        self._slots.clear(slot)
        super().clear(slot)
