"""The key/value cache: preallocated, one row per sequence, each row with its own length."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer for `batch_size` sequences of up to `max_len` tokens.

    k, v: (n_layer, B, n_kv_head, max_len, head_dim). lengths: (B,) tokens held by each row.
    previous: (B, 1, C) normed embedding of each row's last token (what `GPT` mixes into the next), None when empty.
    """

    def __init__(
        self,
        n_layer: int,
        n_kv_head: int,
        head_dim: int,
        *,
        batch_size: int,
        max_len: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (n_layer, batch_size, n_kv_head, max_len, head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.previous: Tensor | None = None
        self.longest = 0  # max of lengths, kept on the host so that slicing needs no device sync

    @property
    def max_len(self) -> int:
        """Return the room for tokens in each row."""
        return self.k.size(3)

    def positions(self, t: int) -> Tensor:
        """Return the (B, t) absolute positions that the next t tokens of each row will take."""
        return self.lengths[:, None] + torch.arange(t, device=self.lengths.device)

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v: (B, Hkv, t, D) at `positions` (B, t); return the keys and values to attend to (B, Hkv, S, D)."""
        t = k.size(2)
        if self.longest + t > self.max_len:
            raise ValueError(f"{self.longest + t} tokens do not fit the cache of {self.max_len}")
        if k.size(0) == 1 or self.longest == 0:  # all rows at the same place: a plain slice
            place = slice(self.longest, self.longest + t)
            self.k[layer, :, :, place] = k
            self.v[layer, :, :, place] = v
        else:
            rows = torch.arange(k.size(0), device=k.device)[:, None]
            self.k[layer].transpose(1, 2)[rows, positions] = k.transpose(1, 2)
            self.v[layer].transpose(1, 2)[rows, positions] = v.transpose(1, 2)
        end = self.longest + t
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def advance(self, counts: Tensor) -> None:
        """Count `counts` (B,) written tokens as held; what was written beyond them is padding, overwritten later."""
        self.lengths = self.lengths + counts
        self.longest = int(self.lengths.max())

    def keep(self, rows: Tensor) -> None:
        """Drop every row not listed in `rows` (indices): finished sequences leave the batch."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.lengths = self.lengths[rows]
        self.previous = None if self.previous is None else self.previous[rows]
        self.longest = int(self.lengths.max()) if len(rows) else 0
