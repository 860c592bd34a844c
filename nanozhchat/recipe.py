"""The depth dial: from one number, everything a run needs. Pure arithmetic: no torch, files, clock or printing.

`resolve(depth, vocab_size=..., ...)` gives a `Recipe`; `explain(recipe)` gives each field's formula for people.
"""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

# Reference point and laws. D = tokens of the full horizon; B = tokens a step.
REF_BATCH = 2**19  # tokens/step that suit REF_TOKENS; nanochat's sweep at depth 12
REF_TOKENS = 1.32e9  # target_ratio * scaling_params at depth 12 with 32K tokens
BATCH_EXPONENT = 0.383  # B grows with D^0.383 (arXiv 2505.13738)
MIN_STEPS = 2000  # about: a short run takes smaller batches rather than fewer steps (own runs, dev/LOG.md)
MIN_BATCH = 2048  # below this the optimizer costs more than it teaches
TARGET_RATIO = 12.0  # tokens per scaling parameter; nanochat's fit
ASPECT = 64  # channels per layer
WIDTH_REF = 768  # width at which the AdamW learning rates below were found
EMBEDDING_LR, HEAD_LR = 0.3, 0.008
SCALAR_LR = 0.05  # ten times as much made early steps explode (own trial, dev/LOG.md)
MATRIX_LR = 0.02
WEIGHT_DECAY = 0.28  # at REF_TOKENS and REF_BATCH
LR_EXPONENT_LARGE, LR_EXPONENT_SMALL = 0.5, 0.1  # of B / REF_BATCH, above and below it (small: own trial, dev/LOG.md)
WARMUP_STEPS, WARMUP_FRAC_MAX = 40, 0.2
FEW_DOCUMENTS = 20  # held out: a loss or a score on fewer is an anecdote
FEW_STEPS = 50  # of a stage: from fewer little may be learnt, which log and report say
WARMDOWN_FRAC, FINAL_LR_FRAC = 0.65, 0.05
MOMENTUM_START, MOMENTUM_PEAK, MOMENTUM_RAMP_FRAC = 0.85, 0.95, 0.1
SFT_WARMUP_FRAC, SFT_WARMDOWN_FRAC = 0.02, 0.8
BUDGET_RATIO = 1.5  # tokens per scaling parameter that a wall-clock budget should at least allow (dev/LOG.md)
BUDGET_DEPTHS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24)
GATE_CHANNELS = 16  # inputs of each gate (gpt.py)
VOCAB_BY_DEPTH = ((5, 4096), (8, 8192), (12, 16384), (10**9, 32768))  # up to this depth -> advised vocabulary
# N-gram counts: up to this depth, in so many times what is read, at most (2 GiB while counting)
NGRAM_MAX_DEPTH, NGRAM_TOKENS = 8, 12_000_000
CONTEXT_BY_DEPTH = ((7, 512), (11, 1024), (10**9, 2048))
ACTIVATION_FACTOR = 40  # kept activations per token, layer and channel, in elements (measured on a CPU at depth 4)


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """What a user fixes by hand; None = derived from the depth."""

    max_seq_len: int | None = None
    device_batch_size: int | None = None
    total_batch_size: int | None = None
    num_steps: int | None = None
    target_flops: float | None = None
    target_ratio: float | None = None
    window_pattern: str | None = None
    arch: str | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, (int, float)) and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be positive and finite")
        if self.arch not in (None, "full", "plain"):
            raise ValueError(f"arch={self.arch!r} is unknown; choose full or plain")
        if len(self.horizon) > 1:
            raise ValueError(f"{' and '.join(self.horizon)} both set the length of the run; give only one")

    @property
    def horizon(self) -> list[str]:
        """Names of the overrides that set the length of the run."""
        return [n for n in ("num_steps", "target_flops", "target_ratio") if getattr(self, n) is not None]

    def refuse_budget(self) -> None:
        """Raise ValueError if a budget would set the length of the run a second time."""
        if self.horizon:
            raise ValueError("--budget sets the length of the run; drop --num-steps, --target-flops and --target-ratio")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every derived number of a run; `explain` tells where each comes from."""

    depth: int
    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int
    head_dim: int
    vocab_size: int
    padded_vocab_size: int
    sequence_len: int
    window_pattern: str
    value_embeddings: bool
    plain: bool = False
    offset_heads: int = 0
    ngram_tokens: int = 0
    num_params: int
    scaling_params: int
    flops_per_token: int
    train_tokens: int
    total_batch_size: int
    device_batch_size: int
    world_size: int
    grad_accum_steps: int
    num_steps: int
    train_flops: float
    budget_s: float | None
    embedding_lr: float
    head_lr: float
    scalar_lr: float
    matrix_lr: float
    weight_decay: float
    warmup_frac: float
    warmdown_frac: float
    final_lr_frac: float
    momentum_start: float
    momentum_peak: float
    momentum_ramp_steps: int
    memory_bytes: int
    overridden: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {**asdict(self), "overridden": list(self.overridden)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """Read back what `to_dict` gave; raises ValueError on unknown or missing fields."""
        names = {f.name for f in fields(cls)}
        if set(values) != names:
            raise ValueError(f"recipe fields differ: {sorted(names ^ set(values))}")
        options: dict[str, Any] = {**values, "overridden": tuple(values["overridden"])}
        return cls(**options)


def _by_depth(table: tuple[tuple[int, int], ...], depth: int) -> int:
    return next(value for limit, value in table if depth <= limit)


def advise_vocab_size(depth: int) -> int:
    """Vocabulary that suits a depth: in a small model a large one spends its time on the head."""
    return _by_depth(VOCAB_BY_DEPTH, depth)


def ngram_order(vocab_size: int) -> int:
    """Longest n-grams that are counted: four tokens, as long as their ids make a 63-bit number."""
    return min(4, int(63 / math.log2(max(2, vocab_size))))


def model_sizes(depth: int, vocab_size: int, overrides: Overrides = Overrides()) -> dict[str, Any]:
    """Return the fields of `Recipe` that shape the model."""
    if depth < 1:
        raise ValueError(f"depth={depth} must be at least 1")
    if vocab_size < 1:
        raise ValueError(f"vocab_size={vocab_size} must be positive")
    head_dim = 64 if depth < 12 else 128
    n_head = math.ceil(depth * ASPECT / head_dim)
    n_embd = head_dim * n_head
    plain = overrides.arch == "plain"
    sequence_len = overrides.max_seq_len or _by_depth(CONTEXT_BY_DEPTH, depth)
    return {"depth": depth, "n_layer": depth, "n_embd": n_embd, "n_head": n_head,
            "n_kv_head": n_head, "head_dim": head_dim, "vocab_size": vocab_size,
            "padded_vocab_size": -(-vocab_size // 64) * 64, "sequence_len": sequence_len,
            "window_pattern": overrides.window_pattern or ("L" if sequence_len <= 1024 or plain else "SSSL"),
            "value_embeddings": depth >= 6 and not plain, "plain": plain, "ngram_tokens": 0,
            "offset_heads": 0 if plain else n_head // 3 or int(n_head > 1)}  # fmt: skip


def count_params(sizes: dict[str, Any]) -> dict[str, int]:
    """Return parameter counts in closed form: matrices, head, embeddings, other, total."""
    n, c, v = sizes["n_layer"], sizes["n_embd"], sizes["padded_vocab_size"]
    kv = sizes["n_kv_head"] * sizes["head_dim"]
    with_ve = sum(layer % 2 == (n - 1) % 2 for layer in range(n)) if sizes["value_embeddings"] else 0
    matrices = n * (2 * c * c + 2 * c * kv + 8 * c * c)
    ngrams = c + ngram_order(sizes["vocab_size"]) + 1 if sizes["ngram_tokens"] else 0  # gate, bias per known length
    # scales per layer, smear, backout, gates
    other = ngrams + 2 * n + 2 + GATE_CHANNELS * (1 + with_ve * sizes["n_kv_head"])
    embeddings = v * c + with_ve * v * kv
    total = matrices + v * c + embeddings + other
    return {"matrices": matrices, "head": v * c, "embeddings": embeddings, "other": other, "total": total}


def flops_per_token(sizes: dict[str, Any]) -> int:
    """Return FLOPs of forward and backward per token: 6 per matmul weight, plus attention (arXiv 2204.02311)."""
    params = count_params(sizes)
    n, t = sizes["n_layer"], sizes["sequence_len"]
    pattern = sizes["window_pattern"]
    windows = [t if pattern[i % len(pattern)] == "L" or i == n - 1 else max(1, t // 4) for i in range(n)]
    return 6 * (params["matrices"] + params["head"]) + 12 * sizes["n_embd"] * sum(windows)


def _horizon(sizes: dict[str, Any], scaling: int, over: Overrides, budget_tokens: float | None) -> tuple[float, float]:
    """Tokens of the full horizon (for the batch and decay laws) and tokens to train on."""
    full = (over.target_ratio or TARGET_RATIO) * scaling
    if budget_tokens is not None:
        return min(full, budget_tokens), budget_tokens
    if over.target_flops is not None:
        return full, over.target_flops / flops_per_token(sizes)
    return full, full


def _ngram_tokens(depth: int, corpus_tokens: int, train_tokens: float) -> int:
    """Tokens to count n-grams in: text that the run will not read, if that is no less than what it will; else 0.

    Text that was counted is too easy for the counts to show how far they can be trusted, so the network's share must
    be learnt on other text; and a network that has read more knows more than the counts could add.
    """
    unread = min(NGRAM_TOKENS, int(corpus_tokens - 1.1 * train_tokens))
    return unread if depth <= NGRAM_MAX_DEPTH and unread >= train_tokens else 0


def _total_batch(tokens: float, sequence_len: int) -> int:
    """Law of the reference point, but never so large that a run has (before rounding) fewer than MIN_STEPS steps."""
    law = REF_BATCH * (tokens / REF_TOKENS) ** BATCH_EXPONENT
    batch = max(MIN_BATCH, sequence_len, min(law, tokens / MIN_STEPS))
    return 2 ** round(math.log2(batch))


def _device_batch(asked: int | None, total: int, sequence_len: int, world_size: int, micro_tokens: int) -> int:
    """Rows per micro-step: the largest divisor of the step's rows per rank within `micro_tokens`, or as asked."""
    if world_size < 1:
        raise ValueError(f"world_size={world_size} must be at least 1")
    unit = sequence_len * world_size
    rows = total // unit
    if rows * unit != total or rows == 0:
        fit = max(1, round(total / unit)) * unit
        raise ValueError(f"total_batch_size={total} is not a multiple of {unit} = max_seq_len * world size tokens; "
                         f"pass --total-batch-size={fit}")  # fmt: skip
    most = asked or max(1, micro_tokens // sequence_len)
    found = max(size for size in range(1, rows + 1) if rows % size == 0 and size <= most)
    if asked and found != asked:
        raise ValueError(f"total_batch_size={total} is not a multiple of {asked * unit} = device_batch_size * "
                         f"max_seq_len * world size tokens; pass --device-batch-size={found} or "
                         f"--total-batch-size={asked * unit}")  # fmt: skip
    return found


def _rates(total: int, full: float, n_embd: int) -> dict[str, Any]:
    """Learning rates and weight decay for a batch of `total` tokens, a horizon of `full` tokens and a width."""
    exponent = LR_EXPONENT_SMALL if total < REF_BATCH else LR_EXPONENT_LARGE
    lr_scale = (total / REF_BATCH) ** exponent
    adamw_scale = lr_scale * (n_embd / WIDTH_REF) ** -0.5
    return {"embedding_lr": EMBEDDING_LR * adamw_scale, "head_lr": HEAD_LR * adamw_scale,
            "scalar_lr": SCALAR_LR * lr_scale, "matrix_lr": MATRIX_LR * lr_scale,
            "weight_decay": WEIGHT_DECAY * (total / REF_BATCH) * (REF_TOKENS / full) / lr_scale}  # fmt: skip


def resolve(
    depth: int, *, vocab_size: int, world_size: int = 1, overrides: Overrides = Overrides(),
    micro_batch_tokens: int = 4096, budget_s: float | None = None, budget_tokens: float | None = None,
    corpus_tokens: int = 0,
) -> Recipe:  # fmt: skip
    """Derive a run from its depth.

    vocab_size: tokens, special ones included. micro_batch_tokens: what one rank can take at a time.
    budget_s, budget_tokens: wall-clock budget and the tokens this machine is expected to train in it.
    corpus_tokens: tokens of the training data, 0 = unknown.
    Raises ValueError naming the value and a value that works.
    """
    over = overrides
    if budget_s is not None:
        over.refuse_budget()
    sizes = model_sizes(depth, vocab_size, over)
    params = count_params(sizes)
    scaling = params["matrices"] + params["head"]
    sequence_len = sizes["sequence_len"]
    full, tokens = _horizon(sizes, scaling, over, budget_tokens)
    total = over.total_batch_size or _total_batch(full, sequence_len)
    device_batch = _device_batch(over.device_batch_size, total, sequence_len, world_size, micro_batch_tokens)
    num_steps = over.num_steps or max(1, int(tokens // total))
    sizes["ngram_tokens"] = 0 if sizes["plain"] else _ngram_tokens(depth, corpus_tokens, num_steps * total)
    params = count_params(sizes)
    per_flop = flops_per_token(sizes)
    device_tokens = device_batch * sequence_len
    activations = device_tokens * sizes["n_layer"] * sizes["n_embd"] * ACTIVATION_FACTOR * 4
    return Recipe(
        **sizes, num_params=params["total"], scaling_params=scaling, flops_per_token=per_flop,
        train_tokens=num_steps * total, total_batch_size=total, device_batch_size=device_batch, world_size=world_size,
        grad_accum_steps=total // (device_tokens * world_size), num_steps=num_steps,
        train_flops=float(per_flop) * num_steps * total, budget_s=budget_s, **_rates(total, full, sizes["n_embd"]),
        warmup_frac=min(WARMUP_FRAC_MAX, WARMUP_STEPS / num_steps), warmdown_frac=WARMDOWN_FRAC,
        final_lr_frac=FINAL_LR_FRAC, momentum_start=MOMENTUM_START, momentum_peak=MOMENTUM_PEAK,
        momentum_ramp_steps=max(1, min(300, int(num_steps * MOMENTUM_RAMP_FRAC))),
        memory_bytes=int(params["total"] * (8 + 8 / world_size) + activations),
        overridden=tuple(name for name, value in asdict(over).items() if value is not None),
    )  # fmt: skip


OBJECTIVES = {"sft": 0.5, "dpo": 0.05}  # of fine-tuning, and the peak learning rates relative to pretraining


def fine_tuning(
    base: Recipe, *, total_batch_size: int, num_steps: int, budget_s: float | None, lr_frac: float
) -> Recipe:
    """Derive a fine-tuning recipe from the base model's: same network, gentler learning rates, own length."""
    rates = {name: getattr(base, name) * lr_frac for name in ("embedding_lr", "head_lr", "scalar_lr", "matrix_lr")}
    params = count_params({**asdict(base), "ngram_tokens": 0})["total"] if base.ngram_tokens else base.num_params
    return replace(
        base, **rates, ngram_tokens=0, num_params=params, total_batch_size=total_batch_size, num_steps=num_steps,
        train_tokens=num_steps * total_batch_size, weight_decay=0.0, warmup_frac=SFT_WARMUP_FRAC,
        train_flops=float(base.flops_per_token) * num_steps * total_batch_size, budget_s=budget_s,
        warmdown_frac=SFT_WARMDOWN_FRAC, final_lr_frac=0.0, momentum_start=base.momentum_peak,
    )  # fmt: skip


def depth_for_budget(seconds: float, flops_per_s: float, vocab_size: int | None = None) -> int:
    """Choose the deepest model that sees enough tokens in the time, at a measured speed in FLOP/s."""
    best = BUDGET_DEPTHS[0]
    for depth in BUDGET_DEPTHS:
        sizes = model_sizes(depth, vocab_size or advise_vocab_size(depth))
        params = count_params(sizes)
        tokens = seconds * flops_per_s / flops_per_token(sizes)
        if tokens >= BUDGET_RATIO * (params["matrices"] + params["head"]):
            best = depth
    return best


FORMULAS = {
    "n_layer": "depth", "n_embd": f"head_dim * ceil(depth * {ASPECT} / head_dim)", "n_head": "n_embd / head_dim",
    "n_kv_head": "n_head", "head_dim": "64 below depth 12, else 128", "vocab_size": "of the tokenizer",
    "padded_vocab_size": "64 * ceil(vocab_size / 64)", "sequence_len": "512 up to depth 7, 1024 up to 11, then 2048",
    "window_pattern": "all layers full up to 1024 tokens, then SSSL (S = a quarter)",
    "value_embeddings": "from depth 6", "plain": "--arch=plain: only what transformers and llama.cpp know",
    "offset_heads": "n_kv_head / 3, 1 of 2; their keys are those of the token before: copying is learnt early",
    "ngram_tokens": f"unread text to count n-grams in, to depth {NGRAM_MAX_DEPTH}, if as much as is read",
    "num_params": "closed form, equal to the model's", "scaling_params": "block matrices + lm_head",
    "flops_per_token": "6 * scaling_params + sum over layers 12 * n_embd * window",
    "train_tokens": f"num_steps * total_batch_size (full horizon: {TARGET_RATIO:g} * scaling_params)",
    "total_batch_size": f"2^round(log2(min({REF_BATCH} * (D / {REF_TOKENS:.3g})^{BATCH_EXPONENT}, D / {MIN_STEPS})))",
    "device_batch_size": "largest divisor of the step's rows that fits a micro-step", "world_size": "ranks",
    "grad_accum_steps": "total_batch_size / (device_batch_size * sequence_len * world_size)",
    "num_steps": "tokens of the horizon / total_batch_size; with --budget a guess, the clock decides",
    "train_flops": "flops_per_token * train_tokens",
    "budget_s": "asked for with --budget; the schedule then follows the clock",
    "embedding_lr": f"{EMBEDDING_LR} * (n_embd / {WIDTH_REF})^-0.5 * lr_scale",
    "head_lr": f"{HEAD_LR} * (n_embd / {WIDTH_REF})^-0.5 * lr_scale", "scalar_lr": f"{SCALAR_LR} * lr_scale",
    "matrix_lr": f"{MATRIX_LR} * lr_scale; lr_scale = (B / {REF_BATCH})^{LR_EXPONENT_SMALL} below it, ^0.5 above",
    "weight_decay": f"{WEIGHT_DECAY} * (B / {REF_BATCH}) * ({REF_TOKENS:.3g} / D) / lr_scale (arXiv 2405.13698)",
    "warmup_frac": f"{WARMUP_STEPS} / num_steps, at most {WARMUP_FRAC_MAX:g}",
    "warmdown_frac": "share of the run", "final_lr_frac": "of the peak learning rate",
    "momentum_start": "Muon momentum at the first step", "momentum_peak": "Muon momentum after the ramp",
    "momentum_ramp_steps": f"{MOMENTUM_RAMP_FRAC:g} * num_steps, at most 300",
    "memory_bytes": "weights, gradients, optimizer state per rank, activations of a micro-step (estimate)"
}  # fmt: skip


def explain(recipe: Recipe) -> list[tuple[str, str, str]]:
    """Return (field, value, formula) for people; values set by hand are marked `(set)`."""
    rows = []
    by_hand = {"sequence_len" if name == "max_seq_len" else name for name in recipe.overridden}
    for name, formula in FORMULAS.items():
        value = getattr(recipe, name)
        text = f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
        rows.append((name, text + " (set)" * (name in by_hand), formula))
    return rows
