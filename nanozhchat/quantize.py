"""Int8 weights: one scale per output, so that the largest weight of each row becomes 127."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST = 127
SCALE = ".scale"  # suffix of the array that holds a quantized array's scales

Arrays = dict[str, NDArray[Any]]


def quantize_rows(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(rows, columns) float -> int8 of the same shape and float32 scales (rows,), so that int8 * scale is near it."""
    most = np.abs(weight).max(1)
    most[most < np.finfo(np.float32).tiny * LARGEST] = LARGEST  # rows of zeros: sums with a subnormal scale crawl
    scale = most / np.float32(LARGEST)
    with np.errstate(invalid="ignore"):  # a weight that is not finite shows in its row's scale
        return (weight / scale[:, None]).round().clip(-LARGEST, LARGEST).astype(np.int8), scale


def is_quantized(name: str, weight: NDArray[np.float32]) -> bool:
    """Whether a parameter becomes int8: embeddings and matrices do, gates and vectors are too small to matter."""
    return weight.ndim == 2 and "gate" not in name


def quantize(parameters: Mapping[str, NDArray[np.float32]]) -> Arrays:
    """Named parameters -> arrays to store: int8 with `<name>.scale` beside it, or float32 as they are."""
    out: Arrays = {}
    for name, p in parameters.items():
        out[name] = p
        if is_quantized(name, p):
            out[name], out[name + SCALE] = quantize_rows(p)
    return out


def dequantize(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """Undo `quantize`, up to rounding."""
    return {name: a.astype(np.float32) * arrays[name + SCALE][:, None] if name + SCALE in arrays else a
            for name, a in arrays.items() if not name.endswith(SCALE)}  # fmt: skip
