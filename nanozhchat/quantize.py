"""Int8 weights: one scale per output, so that the largest weight of each row becomes 127."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

LARGEST = 127
SCALE = ".scale"  # suffix of the tensor that holds a quantized tensor's scales


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) float -> int8 of the same shape and float32 scales (rows,), so that int8 * scale is near it."""
    scale = weight.float().abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
    return (weight.float() / scale[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8), scale


def is_quantized(name: str, weight: Tensor) -> bool:
    """Whether a parameter becomes int8: embeddings and matrices do, gates and vectors are too small to matter."""
    return weight.dim() == 2 and "gate" not in name


def quantize(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Named parameters -> tensors to store: int8 with `<name>.scale` beside it, or float32 as they are."""
    out: dict[str, Tensor] = {}
    for name, p in parameters:
        if is_quantized(name, p):
            out[name], out[name + SCALE] = quantize_rows(p.detach())
        else:
            out[name] = p.detach().float()
    return out


def dequantize(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `quantize`, up to rounding."""
    return {name: t.float() * tensors[name + SCALE][:, None] if name + SCALE in tensors else t
            for name, t in tensors.items() if not name.endswith(SCALE)}  # fmt: skip
