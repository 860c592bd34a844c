"""The key/value cache: preallocated slots, each holding one sequence of its own length."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer for `n_slots` sequences of up to `max_len` tokens.

    k, v: (n_layer, n_slots, n_kv_head, max_len + 1, head_dim); on a CPU, memory is taken only where tokens are stored.
    lengths: tokens held by each slot. Place n may hold keys of the first n tokens (`CacheRows.write`).
    """

    def __init__(
        self, n_layer: int, n_kv_head: int, head_dim: int, *, n_slots: int, max_len: int, device: torch.device,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.max_len = max_len
        shape = (n_layer, n_slots, n_kv_head, max_len + 1, head_dim)
        self.k, self.v = _zeros(shape, device, dtype), _zeros(shape, device, dtype)
        self.lengths = [0] * n_slots

    def copy(self, source: int, target: int, n: int) -> None:
        """Make `target` hold the first n tokens of `source`."""
        for part in (self.k, self.v):
            part[:, target, :, : n + 1] = part[:, source, :, : n + 1]
        self.lengths[target] = n

    def clear(self, slot: int) -> None:
        """Empty a slot and overwrite what it held, which may not have been finite."""
        for part in (self.k, self.v):
            part[:, slot, :, : self.lengths[slot] + 1] = 0
        self.lengths[slot] = 0


class CacheRows:
    """Rows of a batch, each continuing the sequence of a slot: what the model reads and writes.

    previous: (B, 1, C) normed embedding of each row's last token, which `GPT` mixes into the next; None = no row
    holds any.
    """

    def __init__(self, cache: KVCache, slots: Sequence[int], previous: Tensor | None = None) -> None:
        self.cache, self.slots, self.previous = cache, list(slots), previous
        held = [cache.lengths[s] for s in slots]
        self.longest, self.device = max(held), cache.k.device
        self.lengths = torch.tensor(held, device=self.device)
        together = self.slots == list(range(self.slots[0], self.slots[0] + len(self.slots)))
        # Neighbouring slots are used where they lie; others are gathered for each layer.
        self._place = slice(self.slots[0], self.slots[-1] + 1) if together else self.slots

    def positions(self, t: int) -> Tensor:
        """Return the (B, t) absolute positions that the next t tokens of each row will take."""
        return self.lengths[:, None] + torch.arange(t, device=self.device)

    def write(
        self, layer: int, positions: Tensor, k: Tensor, v: Tensor, offset_heads: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Store k, v: (B, Hkv, t, D) at `positions` (B, t); return the keys and values to attend to (B, Hkv, S, D).

        offset_heads: the keys of the first heads belong one place later, as in `gpt.offset_keys`.
        """
        end = self.longest + k.size(2)
        if end > self.cache.max_len:
            raise ValueError(f"{end} tokens do not fit the cache of {self.cache.max_len}")
        slots = torch.tensor(self.slots, device=self.device)[:, None]

        def put(part: Tensor, new: Tensor, at: Tensor) -> None:
            part.transpose(1, 2)[slots, at] = new.transpose(1, 2)

        put(self.cache.v[layer], v, positions)
        put(self.cache.k[layer][:, offset_heads:], k[:, offset_heads:], positions)
        put(self.cache.k[layer][:, :offset_heads], k[:, :offset_heads], positions + 1)
        return self.cache.k[layer][self._place][:, :, :end], self.cache.v[layer][self._place][:, :, :end]

    def advance(self, t: int) -> None:
        """Count the t tokens written to each row as held."""
        self.lengths, self.longest = self.lengths + t, self.longest + t
        for slot in self.slots:
            self.cache.lengths[slot] += t


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros; on a CPU the system hands out the memory page by page, when it is first written."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
