"""The transformer: every trick is one visible line or one small function.

Rotary positions, normalised queries and keys, heads whose keys are the token's before, RMSNorm without parameters,
ReLU², untied head, softcapped logits, grouped-query attention, sliding windows, gated value embeddings on alternate
layers, learned residual and first-embedding scales per layer, a gate that mixes in the previous token ("smear"), a
learned subtraction of the middle of the network before the head ("backout"), and in short runs n-gram counts that share
the prediction.

Weights are float32; activations have the dtype of `GPT.dtype`, and each layer casts its weight where it uses it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanozhchat.attention import cached_attention, causal_attention
from nanozhchat.cross_entropy import Counts, linear_cross_entropy
from nanozhchat.gpt_config import GATE_CHANNELS, QK_SCALE, GPTConfig
from nanozhchat.kv_cache import CacheRows
from nanozhchat.ngrams import NO_TOKEN, NGrams

EMBEDDING_STD = 0.8
HEAD_STD = 0.001
MLP_IN_SCALE = 0.5  # initial c_fc relative to the other matrices
NGRAM_GATE = -2.0  # logit of the network's share next to n-gram counts at the start


class _RMSNorm(torch.autograd.Function):
    """F.rms_norm in half the passes over memory that its parts make on a CPU, where nothing fuses them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).square_().div_(x.size(-1))
        scale = mean_square.add_(torch.finfo(dtype).eps).rsqrt_()
        y = (x * scale).to(x.dtype)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        y, scale = ctx.saved_tensors
        return torch.addcmul(grad, y, (grad * y).mean(dim=-1, keepdim=True), value=-1).mul_(scale.to(grad.dtype))


def rms_norm(x: Tensor) -> Tensor:
    """Scale the last dimension to unit root mean square; no parameters."""
    if x.device.type == "cpu":
        return _RMSNorm.apply(x)
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """Linear without bias whose float32 weight is cast to the activations' dtype where it is used."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(input, self.weight.to(input.dtype))


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of channels by position (arXiv 2104.09864). x: (B, T, H, D); cos, sin: (B or 1, T, 1, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def offset_keys(k: Tensor, heads: int) -> Tensor:
    """Give the first heads the keys of the token before each; nothing before the first. k: (B, T, H, D).

    One layer then finds what followed an earlier occurrence of a token, and copies it: what small models learn last
    otherwise (after the "partial key offset" of modded-nanogpt, 2025).
    """
    return torch.cat((F.pad(k[:, :-1, :heads], (0, 0, 0, 0, 1, 0)), k[:, :, heads:]), dim=2)


class Attention(nn.Module):
    """Causal self-attention with normalised queries and keys."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.window = layer, config.window(layer)
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.norm_qk, self.offset_heads = not config.plain, config.offset_heads
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, config.kv_dim)
        self.c_v = Linear(config.n_embd, config.kv_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.ve_gate = Linear(GATE_CHANNELS, config.n_kv_head) if config.has_value_embedding(layer) else None

    def forward(self, x: Tensor, ve: Tensor | None, rope: tuple[Tensor, Tensor], cache: CacheRows | None) -> Tensor:
        """x: (B, T, C); ve: (B, T, Hkv * D) value embeddings of the tokens. Returns (B, T, C)."""
        B, T, C = x.shape
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        if ve is not None and self.ve_gate is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., :GATE_CHANNELS]))  # (B, T, Hkv), 1 at the start
            v = v + gate.unsqueeze(-1) * ve.view_as(v)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if self.norm_qk:
            q, k = rms_norm(q) * QK_SCALE**2, rms_norm(k)  # of both, in one pass over memory less
        if self.offset_heads and cache is None:
            k = offset_keys(k, self.offset_heads)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, T, H, D) -> (B, H, T, D)
        if cache is None:
            y = causal_attention(q, k, v, self.window)
        else:
            positions = cache.positions(T)
            keys, values = cache.write(self.layer, positions, k, v, self.offset_heads)
            y = cached_attention(q, keys, values, positions, self.window)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class _SquaredReLU(torch.autograd.Function):
    """relu(x)^2, whose gradient 2 * relu(x) needs no mask: half the passes over memory of the two operators' own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (positive,) = ctx.saved_tensors
        return (grad * positive).mul_(2)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (arXiv 2109.08668)."""
    return _SquaredReLU.apply(x)


class MLP(nn.Module):
    """Two layers with squared ReLU between."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.c_proj(squared_relu(self.c_fc(x)))


class Block(nn.Module):
    """Attention and MLP, each read from the normalised stream and added to it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, ve: Tensor | None, rope: tuple[Tensor, Tensor], cache: CacheRows | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(rms_norm(x), ve, rope, cache)
        return x + self.mlp(rms_norm(x))


class GPT(nn.Module):
    """Token ids in, hidden states, logits or loss out."""

    def __init__(self, config: GPTConfig, *, dtype: torch.dtype = torch.float32, grad_checkpoint: bool = False) -> None:
        super().__init__()
        self.config, self.dtype, self.grad_checkpoint = config, dtype, grad_checkpoint
        vocab, n_layer = config.padded_vocab_size, config.n_layer
        self.wte = nn.Embedding(vocab, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(n_layer))
        layers = [layer for layer in range(n_layer) if config.has_value_embedding(layer)]
        self.value_embeds = nn.ModuleDict({str(layer): nn.Embedding(vocab, config.kv_dim) for layer in layers})
        self.resid_lambdas = nn.Parameter(torch.ones(n_layer))
        self.x0_lambdas = nn.Parameter(torch.zeros(n_layer))
        self.smear_gate = Linear(GATE_CHANNELS, 1)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.lm_head = Linear(config.n_embd, vocab)
        if config.plain:  # these stay as `init_weights` makes them: without effect
            for p in (self.x0_lambdas, self.smear_gate.weight, self.smear_lambda, self.backout_lambda):
                p.requires_grad_(False)
        if config.ngrams:
            self.ngrams = NGrams(config.vocab_size, config.ngrams)
            self.ngram_gate = Linear(config.n_embd, 1)  # logit of the network's share of the prediction ...
            self.ngram_bias = nn.Parameter(torch.zeros(self.ngrams.order + 1))  # ... by the longest context counted
        self.ngram_trust = 0.0  # how much of what the network is taught is what the counts say; the trainer's business
        self._compiled: list[Any] = []

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Fill every parameter from `generator` (on the CPU, so that a seed means the same weights anywhere)."""

        def fill(p: Tensor, kind: str, scale: float) -> None:
            values = torch.empty(p.shape)
            if kind == "normal":
                values.normal_(0, scale, generator=generator)
            else:
                values.uniform_(-scale, scale, generator=generator)
            p.copy_(values)

        bound = 3**0.5 * self.config.n_embd**-0.5  # uniform with standard deviation 1/sqrt(C)
        fill(self.wte.weight, "normal", EMBEDDING_STD)
        fill(self.lm_head.weight, "normal", HEAD_STD)
        for block in self.blocks():
            attn, mlp = block.attn, block.mlp
            for matrix in (attn.c_q, attn.c_k, attn.c_v):
                fill(matrix.weight, "uniform", bound)
            fill(mlp.c_fc.weight, "uniform", bound * MLP_IN_SCALE)
            for zero in (attn.c_proj, mlp.c_proj, *([attn.ve_gate] if attn.ve_gate is not None else [])):
                zero.weight.zero_()  # each block starts as the identity
        for p in self.value_embeds.parameters():
            fill(p, "uniform", bound)
        n_layer = self.config.n_layer
        self.resid_lambdas.fill_(1.0)
        self.x0_lambdas.copy_(torch.linspace(0.2, 0.05, n_layer))
        self.smear_gate.weight.zero_()
        self.smear_lambda.zero_()
        self.backout_lambda.fill_(0.2)
        if self.config.plain:
            self.x0_lambdas.zero_()
            self.backout_lambda.zero_()
        if self.config.ngrams:
            self.ngram_gate.weight.zero_()
            self.ngram_bias.fill_(NGRAM_GATE)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin of every position and frequency, (B or 1, T, 1, D/2), in the activations' dtype."""
        half = self.config.head_dim // 2
        frequency = self.config.rope_base ** -(torch.arange(half, device=positions.device, dtype=torch.float32) / half)
        angle = positions.float()[..., None, None] * frequency
        return angle.cos().to(self.dtype), angle.sin().to(self.dtype)

    def _embed(self, idx: Tensor, cache: CacheRows | None) -> Tensor:
        """Embed tokens, norm, and let each mix in a learned share of the one before it. (B, T) -> (B, T, C)."""
        x = rms_norm(self.wte(idx).to(self.dtype))
        before = x.new_zeros(x.size(0), 1, x.size(2)) if cache is None or cache.previous is None else cache.previous
        if cache is not None:
            cache.previous = x[:, -1:]
        shifted = torch.cat((before, x[:, :-1]), dim=1)
        gate = 2 * torch.sigmoid(self.smear_gate(x[..., :GATE_CHANNELS]))
        return x + self.smear_lambda.to(x.dtype) * gate * shifted

    def hidden(self, idx: Tensor, cache: CacheRows | None = None) -> Tensor:
        """Run the network up to the head: (B, T) ids -> (B, T, C), normalised.

        cache: continue the sequences it holds and add these tokens.
        """
        B, T = idx.shape
        if cache is None and self.config.sequence_len < T:
            raise ValueError(f"{T} tokens exceed the model's context of {self.config.sequence_len}")
        positions = torch.arange(T, device=idx.device)[None] if cache is None else cache.positions(T)
        rope = self.rope(positions)
        x = x0 = self._embed(idx, cache)
        middle = x
        resid, first = self.resid_lambdas.to(x.dtype), self.x0_lambdas.to(x.dtype)
        blocks = self._compiled if self._compiled and self.training and cache is None else self.blocks()
        for i, block in enumerate(blocks):
            ve = self.value_embeds[str(i)](idx).to(x.dtype) if str(i) in self.value_embeds else None
            x = resid[i] * x + first[i] * x0
            if self.grad_checkpoint and self.training:
                x = checkpoint(block, x, ve, rope, cache, use_reentrant=False)
            else:
                x = block(x, ve, rope, cache)
            if i == (len(self.h) - 1) // 2:
                middle = x
        if cache is not None:
            cache.advance(T)
        return rms_norm(x - self.backout_lambda.to(x.dtype) * middle)

    def logits(self, hidden: Tensor, context: Tensor | None = None) -> Tensor:
        """(..., C) -> (..., vocab_size) float32 logits, softcapped.

        context: (..., order - 1) last ids, -1 = none, for models with n-gram counts: these give log-probabilities.
        """
        raw = self.lm_head(hidden)[..., : self.config.vocab_size].float()
        cap = self.config.logit_cap
        logits = cap * torch.tanh(raw / cap) if cap else raw
        if not self.config.ngrams:
            return logits
        if context is None:
            raise ValueError("this model has n-gram counts: its logits depend on the last tokens as well")
        flat = context.flatten(0, -2)
        matched = self.ngrams.probability(flat, flat[:, -1])[1].view(hidden.shape[:-1])
        share = torch.sigmoid(self._share(hidden, matched))[..., None]
        return (share * logits.softmax(-1) + (1 - share) * self.ngrams.rows(flat).view_as(logits)).log()

    def context(self, held: Sequence[Sequence[int]], wanted: int = 1) -> Tensor | None:
        """Return what `logits` must know of the last `wanted` places of each sequence; None without n-gram counts."""
        if not self.config.ngrams:
            return None
        size = self.ngrams.order + wanted - 2
        ends = [[*[NO_TOKEN] * (size - len(ids)), *ids[-size:]] for ids in held]
        return self.ngrams.contexts(torch.tensor(ends, device=self.wte.weight.device))[:, -wanted:]

    def _share(self, hidden: Tensor, matched: Tensor) -> Tensor:
        """Logit of the network's share of the prediction. (..., C), (...) order of the context counted -> (...)."""
        return self.ngram_gate(hidden).squeeze(-1).float() + self.ngram_bias[matched]

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Summed cross-entropy of `targets` (B, T), -1 = not scored, in nats."""
        x, flat = self.hidden(idx).flatten(0, 1), targets.flatten()
        head, counts = self.lm_head.weight[: self.config.vocab_size], None
        if self.config.ngrams:
            if self.ngram_trust:
                self.ngrams.prepare_rows()
            context = self.ngrams.contexts(idx).flatten(0, 1)
            p, matched = self.ngrams.probability(context, flat.clamp(min=0))
            counts = Counts(p, self._share(x, matched), lambda a, b: self.ngrams.rows(context[a:b]), self.ngram_trust)
        else:  # half of what fine-tuning reads is not scored; its logits are never made
            scored = flat >= 0
            x, flat = x[scored], flat[scored]
        return linear_cross_entropy(x, head, flat, self.config.logit_cap, counts)

    def blocks(self) -> list[Block]:
        """Return the layers, first to last."""
        return [cast(Block, block) for block in self.h]

    def compile_training(self) -> None:
        """Compile the blocks for training shapes; generation, whose shapes change, stays eager."""
        self._compiled = [torch.compile(block, dynamic=False) for block in self.h]

    def multiply_in_fp8(self, *, emulate: bool) -> int:
        """Let the blocks' matrices multiply in scaled 8-bit floats (torchao, arXiv 2209.05433); weights stay float32.

        emulate: round to the format but multiply in float32, for devices without such units. Returns how many matrices
        do; those with a side that is no multiple of 16 cannot. Raises ValueError when torchao is missing.
        """
        try:
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        except ImportError as error:
            raise ValueError("--fp8 needs torchao; run: uv sync --extra gpu") from error
        fits: list[str] = []

        def chosen(module: nn.Module, name: str) -> bool:
            if fit := isinstance(module, Linear) and not (module.in_features % 16 or module.out_features % 16):
                fits.append(name)
            return fit

        convert_to_float8_training(self.h, config=Float8LinearConfig(emulate=emulate), module_filter_fn=chosen)
        return len(fits)

    def named_matrices(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the weights that Muon trains: the matrices of the blocks, gates excepted."""
        for name, p in self.h.named_parameters():
            if not name.endswith("ve_gate.weight"):
                yield "h." + name, p
