"""Muon for the matrices of the blocks, AdamW for the rest, single or sharded over ranks.

Sharding (ZeRO-2 style, arXiv 1910.02054): gradients are reduce-scattered, each rank keeps the optimizer state of its
share and updates it, and the new weights are all-gathered. Muon shards whole matrices, AdamW rows of a tensor.

A step has two halves, so that a bad gradient can be refused before it does harm:
`norm = optimizer.reduce(scale)`, and then `optimizer.apply(...)` or `optimizer.discard()`.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from nanozhchat.compute import Compute, all_gather, all_reduce, reduce_scatter
from nanozhchat.gpt import GPT
from nanozhchat.recipe import Recipe

# Polar Express (arXiv 2505.16932): odd polynomials that drive all singular values to one, best first step first.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
POLAR_SAFETY = 1.02  # keeps the largest singular value below one in low precision
WIDE = 2  # columns a row from which multiplying small matrices first pays (1.5 by count, 2 as measured)
SHARD_MIN_ELEMENTS = 4096  # smaller tensors are updated on every rank
EPS = 1e-8  # far below real gradients, far above rounding noise, which it must not turn into full steps


@dataclass(frozen=True, kw_only=True)
class ParamGroup:
    """Parameters that share a rule. kind: "adamw" or "muon"."""

    kind: str
    params: dict[str, nn.Parameter]
    lr: float
    betas: tuple[float, float] = (0.8, 0.95)
    weight_decay: float = 0.0


def param_groups(model: GPT, recipe: Recipe) -> list[ParamGroup]:
    """Sort a model's parameters into groups with the recipe's learning rates."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if model.config.gpt2:
        tables = {n: p for n, p in named.items() if p.dim() > 1}
        rest = {n: p for n, p in named.items() if p.dim() == 1}
        adam: dict[str, Any] = {"kind": "adamw", "lr": recipe.matrix_lr, "betas": (0.9, 0.95)}
        return [ParamGroup(params=tables, weight_decay=0.1, **adam), ParamGroup(params=rest, **adam)]
    matrices = dict(model.named_matrices())
    scalars = {"resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda", *({"ngram_bias"} & named.keys())}
    gates = {n for n in named if n.endswith("_gate.weight")}

    def pick(names: Iterable[str]) -> dict[str, nn.Parameter]:
        return {n: named[n] for n in names if n in named}

    embeddings = [n for n in named if n.startswith(("wte.", "value_embeds."))]
    return [
        ParamGroup(kind="adamw", params=pick(embeddings), lr=recipe.embedding_lr),
        ParamGroup(kind="adamw", params=pick(["lm_head.weight"]), lr=recipe.head_lr, betas=(0.8, 0.96)),
        ParamGroup(kind="adamw", params=pick(["resid_lambdas"]), lr=recipe.scalar_lr * 0.01),
        ParamGroup(
            kind="adamw", params=pick(sorted(scalars - {"resid_lambdas"})), lr=recipe.scalar_lr, betas=(0.96, 0.95)
        ),
        ParamGroup(kind="adamw", params=pick(sorted(gates)), lr=recipe.head_lr),
        ParamGroup(kind="muon", params=matrices, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay),
    ]


def orthogonalize(g: Tensor) -> Tensor:
    """Replace the singular values of each matrix by about one. g: (K, m, n); returns the same shape and dtype.

    Each polynomial is odd: x -> p(x @ x.mT) @ x. In float32 the p of a wide matrix are multiplied with each other
    first, all of them m x m, and meet x once: the same result for half the work; bfloat16 has not the digits for it.
    """
    tall = g.size(-2) > g.size(-1)
    x = g.mT.contiguous() if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * POLAR_SAFETY + 1e-7)
    if x.dtype is torch.float32 and x.size(-1) >= WIDE * x.size(-2):
        x = _polar_factor(x @ x.mT) @ x
    else:
        for coefficients in POLAR_EXPRESS:
            x = _even(x @ x.mT, *coefficients) @ x
    return x.mT if tall else x


def _even(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """a + b * gram + c * gram @ gram, (K, m, m)."""
    p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    p.diagonal(dim1=-2, dim2=-1).add_(a)
    return p


def _polar_factor(gram: Tensor) -> Tensor:
    """Product of all polynomials for the matrix x with `gram` = x @ x.mT, (K, m, m)."""
    product = factor = _even(gram, *POLAR_EXPRESS[0])
    for coefficients in POLAR_EXPRESS[1:]:
        gram = factor @ gram @ factor
        factor = _even(gram, *coefficients)
        product = factor @ product
    return product


def _pieces(grads: Any, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """On a CPU one matrix at a time, which stays in the cache for all that is done to it, else all at once."""
    return zip(grads, *tensors, strict=True) if tensors[0].device.type == "cpu" else [(grads, *tensors)]


class _Muon:
    """Momentum, orthogonalised, with per-row variance normalisation (arXiv 2510.05491), for matrices of one shape.

    The weights move into one tensor, of which each parameter is a matrix; with zeros at its end all ranks have as many.
    """

    def __init__(self, group: ParamGroup, params: dict[str, nn.Parameter], compute: Compute) -> None:
        self.group, self.compute = group, compute
        self.names, self.params = list(params), list(params.values())
        self.dtype = compute.dtype if compute.dtype is torch.bfloat16 else torch.float32
        self.per_rank = -(-len(self.params) // compute.world_size)
        self.weights = self._stacked([p.detach() for p in self.params])
        for p, own in zip(self.params, self.weights, strict=False):
            p.data = own
        self.momentum = torch.zeros_like(self.weights[: self.per_rank])
        self.variance = torch.zeros_like(self.momentum[..., :1])
        self.grad: Tensor | list[Tensor] = []

    def reduce(self) -> Tensor:
        """Leave this rank's summed gradients in `self.grad`; return their sum of squares."""
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.params]
        alone = self.compute.world_size == 1 and self.weights.device.type == "cpu"  # then none need be moved
        self.grad = grads if alone else reduce_scatter(self._stacked(grads), self.compute)
        return get_total_norm(self.grad).square()

    def apply(self, scale: float, lr_multiplier: float, momentum: float, decay: float, step: int) -> None:
        """Update the weights from the gradients times `scale`."""
        update = torch.empty_like(self.momentum, dtype=self.dtype)
        for grad, average, out in _pieces(self.grad, self.momentum, update):
            average.lerp_(grad.mul_(scale), 1 - momentum)
            out.copy_(torch.lerp(grad, average, momentum))  # Nesterov
        update = orthogonalize(update)
        (m, n), beta, lr = update.shape[-2:], self.group.betas[1], self.group.lr * lr_multiplier
        own = self.weights[self.compute.rank * self.per_rank :][: self.per_rank]
        for weight, piece, variance in _pieces(own, update, self.variance):
            direction = piece.contiguous().float()
            square = torch.linalg.vector_norm(direction, dim=-1, keepdim=True).square() / n
            variance.lerp_(square, 1 - beta)
            deviation = (variance / (1 - beta**step)).sqrt().clamp_min(1e-8)
            normal = (square / deviation.square()).sum(dim=-2, keepdim=True).clamp_min(1e-16)
            size = (square.sum(dim=-2, keepdim=True) / normal).sqrt() * max(1.0, m / n) ** 0.5
            delta = direction * (lr * size / deviation)
            # Decay only where the update shrinks the weight too (arXiv 2510.12402). Signs cost a fifth of a comparison.
            cautious = (delta * weight).sign_().clamp_(min=0)
            weight.addcmul_(weight, cautious, value=-lr * self.group.weight_decay * decay).sub_(delta)
        all_gather(self.weights, own, self.compute)

    def _stacked(self, matrices: Sequence[Tensor]) -> Tensor:
        """Stack one matrix a parameter, and zeros so that every rank has as many."""
        missing = self.per_rank * self.compute.world_size - len(matrices)
        return torch.stack([*matrices, *[torch.zeros_like(matrices[0])] * missing])

    def _owned(self) -> list[tuple[int, str]]:
        first = self.compute.rank * self.per_rank
        return list(enumerate(self.names[first : first + self.per_rank]))

    def owned_grads(self) -> list[tuple[str, Tensor]]:
        """Reduced gradients of this rank's matrices."""
        return [(name, grad) for (_, name), grad in zip(self._owned(), self.grad, strict=False)]

    def state(self) -> dict[str, Tensor]:
        """Momentum and variance of the matrices that this rank owns, by parameter name."""
        kept = {"momentum": self.momentum, "variance": self.variance}
        return {f"muon/{name}/{field}": kept[field][i] for i, name in self._owned() for field in kept}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take this rank's matrices from the merged state of all ranks."""
        for i, name in self._owned():
            self.momentum[i] = state[f"muon/{name}/momentum"]
            self.variance[i] = state[f"muon/{name}/variance"]


class _AdamW:
    """PyTorch's fused AdamW over the rows that this rank owns of every tensor."""

    def __init__(self, groups: list[ParamGroup], compute: Compute) -> None:
        self.compute, self.groups = compute, groups
        self.shards: dict[str, tuple[nn.Parameter, Tensor, int]] = {}  # name -> parameter, owned rows, first row
        torch_groups = []
        for group in groups:
            owned = []
            for name, p in group.params.items():
                rows, first = self._rows(p)
                shard = p.detach()[first : first + rows]
                self.shards[name] = (p, shard, first)
                owned.append(shard)
            options = {"lr": group.lr, "betas": group.betas, "weight_decay": group.weight_decay}
            torch_groups.append({"params": owned, **options})
        self.inner = torch.optim.AdamW(torch_groups, eps=EPS, fused=True)

    def _rows(self, p: Tensor) -> tuple[int, int]:
        world = self.compute.world_size
        if world == 1 or p.numel() < SHARD_MIN_ELEMENTS or p.size(0) % world:
            return p.size(0), 0
        return p.size(0) // world, p.size(0) // world * self.compute.rank

    def reduce(self) -> Tensor:
        """Leave the summed gradient of the owned rows on each shard; return their sum of squares.

        Tensors that every rank updates in full count once: rank 0 adds them.
        """
        total = torch.zeros((), device=self.compute.device)
        for p, shard, _ in self.shards.values():
            grad = p.grad if p.grad is not None else torch.zeros_like(p)
            whole = shard.size(0) == p.size(0)
            shard.grad = all_reduce(grad, self.compute) if whole else reduce_scatter(grad, self.compute)
            if not whole or self.compute.is_main:
                total += shard.grad.norm().square()
        return total

    def apply(self, scale: float, lr_multiplier: float) -> None:
        """Update the owned rows with gradients times `scale`, and share them."""
        for group, options in zip(self.groups, self.inner.param_groups, strict=True):
            options["lr"] = group.lr * lr_multiplier
            for shard in options["params"]:
                shard.grad.mul_(scale)
        self.inner.step()
        for p, shard, _ in self.shards.values():
            if shard.size(0) != p.size(0):
                all_gather(p.detach(), shard, self.compute)
            shard.grad = None

    def owned_grads(self) -> list[tuple[str, Tensor]]:
        """Reduced gradients of the owned rows; tensors updated by every rank come from rank 0 alone."""
        return [(name, shard.grad) for name, (p, shard, _) in self.shards.items()
                if shard.grad is not None and (self.compute.is_main or shard.size(0) != p.size(0))]  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        """Moments of the owned rows; the key says which rows they are."""
        out = {}
        for name, (_, shard, first) in self.shards.items():
            for field in ("exp_avg", "exp_avg_sq"):
                value = self.inner.state[shard].get(field)
                if value is not None:
                    out[f"adamw/{name}/{field}/{first}"] = value
        return out

    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        """Take the owned rows from the merged state of all ranks, which may have been cut differently."""
        pieces: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
        for key, value in state.items():
            kind, _, rest = key.partition("/")
            if kind == "adamw":
                stem, _, first = rest.rpartition("/")
                pieces[stem].append((int(first), value))
        for name, (_, shard, first) in self.shards.items():
            for field in ("exp_avg", "exp_avg_sq"):
                rows = torch.cat([v for _, v in sorted(pieces[f"{name}/{field}"], key=lambda piece: piece[0])])
                own = rows[first : first + shard.size(0)].to(shard.device, copy=True)
                self.inner.state[shard][field] = own
            self.inner.state[shard]["step"] = torch.tensor(float(step), device=shard.device)


def layer_of(name: str) -> str:
    """Layer that a parameter belongs to: h.3 of h.3.attn.c_q.weight, else its first word."""
    words = name.split(".")
    return ".".join(words[: 2 if words[0] == "h" else 1])


class Optimizer:
    """All parameters of a model: Muon and AdamW behind one step."""

    def __init__(self, groups: list[ParamGroup], compute: Compute) -> None:
        self.compute, self.steps_done = compute, 0
        self.params = [p for group in groups for p in group.params.values()]
        self.names = [name for group in groups for name in group.params]
        by_shape: dict[tuple[int, torch.Size], dict[str, nn.Parameter]] = defaultdict(dict)
        for i, group in enumerate(groups):
            if group.kind == "muon":
                for name, p in group.params.items():
                    by_shape[i, p.shape][name] = p
        self.muon = [_Muon(groups[i], params, compute) for (i, _), params in by_shape.items()]
        self.adamw = _AdamW([g for g in groups if g.kind == "adamw"], compute)

    @torch.no_grad()
    def reduce(self, scale: float) -> float:
        """Sum gradients over ranks and return the norm of `scale` times the sum. Collective."""
        squares = self.adamw.reduce() + sum(group.reduce() for group in self.muon)
        for p in self.params:
            p.grad = None
        return float(all_reduce(squares, self.compute)) ** 0.5 * scale

    @torch.no_grad()
    def apply(self, scale: float, *, lr_multiplier: float, momentum: float, decay_multiplier: float) -> None:
        """Update all weights from the reduced gradients times `scale`. Collective."""
        self.steps_done += 1
        self.adamw.apply(scale, lr_multiplier)
        for group in self.muon:
            group.apply(scale, lr_multiplier, momentum, decay_multiplier, self.steps_done)

    def discard(self) -> None:
        """Forget gradients, reduced or not, without a step."""
        for p in [*self.params, *(shard for _, shard, _ in self.adamw.shards.values())]:
            p.grad = None

    @torch.no_grad()
    def layer_norms(self, scale: float) -> dict[str, float]:
        """Norm of the reduced gradient times `scale`, per layer: which one went wrong. Collective."""
        squares = dict.fromkeys(sorted({layer_of(n) for n in self.names}), 0.0)
        for name, grad in [*self.adamw.owned_grads(), *(pair for group in self.muon for pair in group.owned_grads())]:
            squares[layer_of(name)] += float(grad.double().square().sum())
        sums = self.compute.sum(list(squares.values()))
        return {layer: total**0.5 * scale for layer, total in zip(squares, sums, strict=True)}

    def state_dict(self) -> dict[str, Tensor]:
        """Return this rank's share of the optimizer state as flat tensors, to be merged over ranks on loading."""
        return {key: value for part in (self.adamw, *self.muon) for key, value in part.state().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], steps_done: int) -> None:
        """Restore from the merged state of all ranks, whatever their number was."""
        self.steps_done = steps_done
        if steps_done:
            self.adamw.load(state, steps_done)
            for group in self.muon:
                group.load(state)
