"""Muon for one matrix, slow and readable: numbers in, numbers out, float64, an exact decomposition for a check."""

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


def polynomial_polar(g: Matrix, coefficients: tuple[tuple[float, float, float], ...], safety: float) -> Matrix:
    """Apply odd polynomials a s + b s^3 + c s^5 to the singular values, after scaling them to at most 1 / safety."""
    u, s, vt = np.linalg.svd(g, full_matrices=False)
    s = s / (np.sqrt((g**2).sum()) * safety + 1e-7)
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt


class Muon:
    """Momentum, orthogonalised, rows brought to equal variance, cautious decay."""

    def __init__(self, shape: tuple[int, int], coefficients: tuple[tuple[float, float, float], ...], safety: float):
        self.momentum, self.variance, self.steps = np.zeros(shape), np.zeros((shape[0], 1)), 0
        self.coefficients, self.safety = coefficients, safety

    def step(self, w: Matrix, g: Matrix, *, lr: float, mu: float, beta2: float, decay: float) -> Matrix:
        """Return the new weights."""
        self.steps += 1
        self.momentum = mu * self.momentum + (1 - mu) * g
        ahead = (1 - mu) * g + mu * self.momentum  # Nesterov
        direction = polynomial_polar(ahead, self.coefficients, self.safety)
        self.variance = beta2 * self.variance + (1 - beta2) * (direction**2).mean(axis=1, keepdims=True)
        even = direction / np.sqrt(self.variance / (1 - beta2**self.steps))
        even *= np.sqrt((direction**2).sum()) / np.sqrt((even**2).sum())  # the same overall size as before
        delta = even * max(1.0, w.shape[0] / w.shape[1]) ** 0.5
        shrinks = (delta * w) > 0
        return w - lr * delta - lr * decay * np.where(shrinks, w, 0.0)
