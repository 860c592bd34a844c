"""Held-out loss: bits per byte, comparable across vocabularies, and what general compressors reach."""

import gzip
import lzma
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanozhchat.compute import Compute
from nanozhchat.dataloader import Batch
from nanozhchat.errors import StoppedError


@dataclass(frozen=True)
class HeldOut:
    """Loss over held-out text. loss: nats per token; bpb: bits per UTF-8 byte; ppl: exp(loss)."""

    loss: float
    bpb: float
    ppl: float
    tokens: int
    bytes: int


def bits_per_byte(nats: float, n_bytes: float) -> float:
    """Convert summed cross-entropy into bits per UTF-8 byte.

    nats: summed over all scored tokens; n_bytes: UTF-8 length of the text they stand for, special tokens count 0.
    Raises ValueError if no byte was scored. Bytes per character differ by script: compare like with like.
    """
    if n_bytes <= 0:
        raise ValueError("no byte was scored: the held-out data is empty")
    return nats / math.log(2) / n_bytes


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], token_bytes: Tensor, compute: Compute, stop: Sequence[int] = ()
) -> HeldOut:
    """Score batches (of this rank; results are summed over ranks). token_bytes: (V,) UTF-8 bytes of each id.

    model: a `GPT`, or anything called like one. stop: signals received; once there is one on any rank, all of them
    raise StoppedError.
    """
    was_training = model.training
    model.eval()
    nats, tokens, n_bytes = 0.0, 0, 0
    for batch in batches:
        if stop:
            break
        scored = batch.targets >= 0
        nats += float(model(batch.inputs, batch.targets))
        tokens += int(scored.sum())
        n_bytes += int(token_bytes[batch.targets.clamp(min=0)][scored].sum())
    model.train(was_training)
    nats, total, n_bytes_all, stopped = compute.sum([nats, float(tokens), float(n_bytes), float(bool(stop))])
    if stopped:
        raise StoppedError("stopped while evaluating")
    if total == 0:
        raise ValueError("no token was scored: the held-out data is empty; give more text or --val-data")
    loss = nats / total
    bpb = bits_per_byte(nats, n_bytes_all) if n_bytes_all else float("nan")
    return HeldOut(loss, bpb, math.exp(min(loss, 700.0)), int(total), int(n_bytes_all))


def compressor_bpb(text: bytes) -> dict[str, float]:
    """Bits per byte of gzip -9 and xz -9 on the same bytes in one piece: what to beat."""
    packed = {"gzip": gzip.compress(text, 9), "xz": lzma.compress(text, preset=9)}
    return {name: 8 * len(data) / len(text) for name, data in packed.items()}
