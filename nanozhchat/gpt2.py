"""GPT-2's network, to continue from its weights: learned positions, LayerNorm and biases, GELU, the head tied.

It has the face of `GPT`, so that training, checkpoints and the PyTorch engine need not know; Adam trains all of it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanozhchat.files import read_json
from nanozhchat.gpt import GPT, Block, GPTConfig, Linear
from nanozhchat.kv_cache import CacheRows
from nanozhchat.recipe import Recipe
from nanozhchat.tokenizer import Tokenizer

EPSILON = 1e-5
ADAM_LR = 3e-4  # peak; a choice between forgetting and crawling, not measured on published weights
EXPECTED = {  # what config.json must say, or leave unsaid
    "activation_function": ("gelu_new", None), "layer_norm_epsilon": (EPSILON, None), "n_inner": (None,),
    "scale_attn_by_inverse_layer_idx": (False, None), "tie_word_embeddings": (True, None),
}  # fmt: skip


class BiasLinear(nn.Linear):
    """Linear whose float32 weight and bias are cast to the activations' dtype where they are used."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


class Norm(nn.LayerNorm):
    """LayerNorm whose float32 parameters are cast to the activations' dtype where they are used."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class GPT2Block(Block):
    """Attention without rotation and MLP with GELU, each read through its own norm and added to the stream."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__(config, layer)
        for part, names in ((self.attn, ("c_q", "c_k", "c_v", "c_proj")), (self.mlp, ("c_fc", "c_proj"))):
            for name in names:
                old = getattr(part, name)
                setattr(part, name, BiasLinear(old.in_features, old.out_features))
        self.ln_1, self.ln_2 = Norm(config.n_embd, EPSILON), Norm(config.n_embd, EPSILON)

    def forward(self, x: Tensor, ve: Tensor | None, rope: tuple[Tensor, Tensor], cache: CacheRows | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), ve, rope, cache)
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT2(GPT):
    """Token ids in, hidden states, logits or loss out."""

    def __init__(self, config: GPTConfig, *, dtype: torch.dtype = torch.float32, grad_checkpoint: bool = False) -> None:
        nn.Module.__init__(self)
        self.config, self.dtype, self.grad_checkpoint = config, dtype, grad_checkpoint
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.sequence_len, config.n_embd)
        self.h = nn.ModuleList(GPT2Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = Norm(config.n_embd, EPSILON)
        self.lm_head = Linear(config.n_embd, config.padded_vocab_size)
        self.lm_head.weight = self.wte.weight
        self.ngram_trust = 0.0
        self._compiled: list[Any] = []

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin that turn nothing, (1, 1, 1, D/2)."""
        still = torch.zeros(1, 1, 1, self.config.head_dim // 2, device=positions.device, dtype=self.dtype)
        return still + 1, still

    def hidden(self, idx: Tensor, cache: CacheRows | None = None) -> Tensor:
        """Run the network up to the head; as `GPT.hidden`."""
        B, T = idx.shape
        if cache is None and self.config.sequence_len < T:
            raise ValueError(f"{T} tokens exceed the model's context of {self.config.sequence_len}")
        positions = torch.arange(T, device=idx.device)[None] if cache is None else cache.positions(T)
        x, rope = (self.wte(idx) + self.wpe(positions)).to(self.dtype), self.rope(positions)
        for block in self._compiled if self._compiled and self.training and cache is None else self.blocks():
            if self.grad_checkpoint and self.training:
                x = checkpoint(block, x, None, rope, cache, use_reentrant=False)
            else:
                x = block(x, None, rope, cache)
        if cache is not None:
            cache.advance(T)
        return self.ln_f(x)


def build(config: GPTConfig, **options: Any) -> GPT:
    """Make the network that a configuration describes. options: of `GPT`."""
    return GPT2(config, **options) if config.gpt2 else GPT(config, **options)


def is_gpt2(folder: str | None) -> bool:
    """Whether a folder holds GPT-2 weights in Hugging Face's layout."""
    path = Path(folder or "") / "config.json"
    return bool(folder) and path.is_file() and read_json(path).get("model_type") == "gpt2"


def config_of(folder: str | None, tokenizer: str | None) -> GPTConfig | None:
    """Read the sizes of a folder of GPT-2 weights (but its vocabulary); None if it is no such folder.

    Raises ValueError if the network differs from GPT-2's, or no tokenizer was named.
    """
    if folder is None or not is_gpt2(folder):
        return None
    if tokenizer is None:
        raise ValueError(f"--init-from={folder} needs the tokenizer of these weights: python -m scripts.tok_train "
                         f"--from {folder}/tokenizer.json --name=gpt2, then --tokenizer=gpt2")  # fmt: skip
    about = read_json(Path(folder) / "config.json")
    if odd := [f"{name}={about[name]!r}" for name, known in EXPECTED.items() if about.get(name) not in known]:
        raise ValueError(f"--init-from={folder} is a GPT-2 of another kind ({', '.join(odd)}), which is not known here")
    return GPTConfig(
        gpt2=True, plain=True, value_embeddings=False, n_embd=about["n_embd"],
        n_layer=about["n_layer"], n_head=about["n_head"], n_kv_head=about["n_head"], sequence_len=about["n_positions"],
    )  # fmt: skip


def load_folder(folder: Path, tokenizer: Tokenizer, **options: Any) -> GPT2:
    """Read GPT-2 weights. Our special tokens take rows after the tokenizer's own: those the folder has, then new ones.

    Raises ValueError as `config_of`, and if the tokenizer has more tokens than the folder.
    """
    sizes = config_of(str(folder), "its own")
    assert sizes is not None
    config = replace(sizes, vocab_size=tokenizer.vocab_size)
    if not (found := sorted(folder.glob("*.safetensors"))):
        raise ValueError(f"--init-from={folder} has no .safetensors file; save the model with safe serialization")
    held = {n.removeprefix("transformer."): t.float() for path in found for n, t in load_file(path).items()}
    rows = held["wte.weight"]
    if (own := len(tokenizer.token_bytes().nonzero()[0])) > len(rows):
        raise ValueError(f"--tokenizer has {own} tokens and --init-from={folder} only {len(rows)}; "
                         f"take theirs: python -m scripts.tok_train --from {folder}/tokenizer.json "
                         "--name=gpt2")  # fmt: skip
    model = GPT2(config, **options)
    table = rows.mean(0).repeat(config.padded_vocab_size, 1)  # of new rows
    known = min(len(rows), len(table))
    table[:known] = rows[:known]
    tensors = {"wte.weight": table, "lm_head.weight": table, "wpe.weight": held["wpe.weight"]}
    tensors |= {name: t for name, t in held.items() if ".ln_" in name or name.startswith("ln_f")}
    for i in range(config.n_layer):
        for kind in ("weight", "bias"):
            for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
                tensors[f"h.{i}.{name}.{kind}"] = held[f"h.{i}.{name}.{kind}"].t()  # stored the other way round
            parts = held[f"h.{i}.attn.c_attn.{kind}"].t().chunk(3)
            tensors |= {f"h.{i}.attn.{n}.{kind}": t for n, t in zip(("c_q", "c_k", "c_v"), parts, strict=True)}
    model.load_state_dict(tensors)
    return model


def reshape(recipe: Recipe, sizes: GPTConfig | None) -> Recipe:
    """Return the recipe with the shape, counts and learning rate of GPT-2 weights; as it is for other sizes or None."""
    if sizes is None or not sizes.gpt2:
        return recipe
    c = replace(sizes, vocab_size=recipe.vocab_size)
    with torch.device("meta"):
        n = sum(p.numel() for p in GPT2(c).parameters())
    matmul = n - c.sequence_len * c.n_embd
    per_token = 6 * matmul + 12 * c.n_layer * c.n_embd * c.sequence_len
    return replace(
        recipe, depth=c.n_layer, n_layer=c.n_layer, n_embd=c.n_embd, n_head=c.n_head, n_kv_head=c.n_head,
        head_dim=c.head_dim, window_pattern="L", value_embeddings=False, plain=True, offset_heads=0, ngram_tokens=0,
        num_params=n, scaling_params=matmul, flops_per_token=per_token, matrix_lr=ADAM_LR,
        train_flops=float(per_token) * recipe.train_tokens,
    )  # fmt: skip
