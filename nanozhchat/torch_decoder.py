"""Decoding with the model itself, in PyTorch; and losses of any decoder."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nanozhchat.batching import Decoder, Part
from nanozhchat.gpt import GPT, rms_norm
from nanozhchat.kv_cache import CacheRows, KVCache
from nanozhchat.sampling import Floats


class TorchDecoder(Decoder):
    """The plain PyTorch path: any device, any dtype, and the reference for every faster one."""

    def __init__(self, model: GPT, n_slots: int) -> None:
        c = model.config
        super().__init__(n_slots, c.sequence_len)
        self.model, self.device = model, model.wte.weight.device
        sizes = {"n_slots": n_slots, "max_len": self.context, "device": self.device, "dtype": model.dtype}
        self.cache = KVCache(c.n_layer, c.n_kv_head, c.head_dim, **sizes)

    def rows(self, slots: Sequence[int]) -> CacheRows:
        """Return slots as rows of a batch, ready to be continued."""
        empty = torch.tensor([not self.held[s] for s in slots], device=self.device)
        last = torch.tensor([[self.held[s][-1] if self.held[s] else 0] for s in slots], device=self.device)
        previous = rms_norm(self.model.wte(last).to(self.model.dtype))
        return CacheRows(self.cache, slots, previous.masked_fill(empty[:, None, None], 0))

    @torch.inference_mode()
    def forward(self, parts: Sequence[Part]) -> list[Floats]:
        """Append each part to its slot; return (wanted, vocab_size) logits for each. Equal lengths run together."""
        out: dict[int, Floats] = {}
        for length in {len(p.ids) for p in parts}:
            group = sorted((p for p in parts if len(p.ids) == length), key=lambda p: p.slot)
            ids = torch.tensor([list(p.ids) for p in group], device=self.device)
            hidden = self.model.hidden(ids, self.rows([p.slot for p in group]))  # (B, T, C)
            for part in group:
                self.held[part.slot] += part.ids
            if wanted := max(p.wanted for p in group):
                context = self.model.context([self.held[p.slot] for p in group], wanted)
                logits = self.model.logits(hidden[:, -wanted:], context).cpu().numpy()  # (B, wanted, V)
                out |= {p.slot: logits[row, wanted - p.wanted :] for row, p in enumerate(group)}
        return [out.get(p.slot, NO_LOGITS) for p in parts]

    def copy(self, source: int, target: int, n: int) -> None:
        """Make `target` hold the first n tokens of `source`."""
        self.cache.copy(source, target, n)
        super().copy(source, target, n)

    def truncate(self, slot: int, n: int) -> None:
        """Keep only the first n tokens of a slot."""
        self.cache.lengths[slot] = n
        super().truncate(slot, n)

    def clear(self, slot: int) -> None:
        """Empty a slot whose content may not be finite."""
        self.cache.clear(slot)
        super().clear(slot)


NO_LOGITS: Floats = torch.empty(0, 0).numpy()


class Scorer(torch.nn.Module):
    """Cross-entropy by a decoder, called like `GPT`: what int8 weights cost in bits per byte."""

    def __init__(self, decoder: Decoder) -> None:
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
