"""The native decoder (`rustinfer`): the same network without Python or operator overhead, on CPUs, float32 or int8.

What a sequence gets does not depend on what runs beside it or on how it is fed, bit for bit.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanozhchat.batching import Decoder, Part
from nanozhchat.gpt import GATE_CHANNELS, GPT, QK_SCALE
from nanozhchat.quantize import SCALE, quantize
from nanozhchat.sampling import Floats

try:
    from rustinfer import Model
except ImportError as error:
    raise ImportError("the native decoder is not built; run `uv sync`, or choose --engine=torch") from error


def native_model(model: GPT, *, int8: bool = False, isa: str | None = None) -> Model:
    """Pack a model's weights for this machine. int8: bytes, keys and values too. isa: None = the best."""
    c = model.config
    sizes = {"n_layer": c.n_layer, "n_head": c.n_head, "n_kv_head": c.n_kv_head, "head_dim": c.head_dim,
             "context": c.sequence_len, "n_embd": c.n_embd, "vocab_size": c.vocab_size, "softcap": c.logit_cap,
             "windows": [c.window(layer) for layer in range(c.n_layer)],
             "gate_channels": GATE_CHANNELS, "qk_scale": 0.0 if c.plain else QK_SCALE}  # fmt: skip
    named = dict(model.named_parameters())
    tensors = quantize(named.items()) if int8 else {name: p.detach().float() for name, p in named.items()}
    raw = {name: t.cpu().contiguous().numpy().tobytes() for name, t in tensors.items()}
    given = {name: (raw[name], raw[name + SCALE]) if name + SCALE in raw else raw[name] for name in named}
    cos, sin = model.rope(torch.arange(c.sequence_len, device=model.wte.weight.device))
    given |= {"rope.cos": cos.float().cpu().numpy().tobytes(), "rope.sin": sin.float().cpu().numpy().tobytes()}
    return Model(sizes, given, threads=torch.get_num_threads(), isa=isa)


class NativeDecoder(Decoder):
    """Slots of a native model."""

    def __init__(self, model: Model, *, n_slots: int, context: int, vocab_size: int) -> None:
        super().__init__(n_slots, context)
        self._vocab_size = vocab_size
        self._slots = model.slots(n_slots)

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


class Scorer(torch.nn.Module):
    """Cross-entropy by a native decoder, called like `GPT`: what int8 weights cost in bits per byte."""

    def __init__(self, decoder: NativeDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Sum over `targets` (B, T), -1 = not scored, in nats."""
        total = torch.zeros(())
        for ids, wanted in zip(idx.tolist(), targets, strict=True):
            self.decoder.truncate(0, 0)
            logits = torch.from_numpy(self.decoder.forward([Part(0, ids, len(ids))])[0].copy())
            total += F.cross_entropy(logits, wanted, ignore_index=-1, reduction="sum")
        return total
