"""Low-rank adapters (arXiv 2106.09685): fine-tuning that leaves the weights alone and learns a small sum beside them.

The model's `state_dict` holds plain weights with the adapters added, so that whatever is saved, exported or loaded
knows nothing of them; the adapters themselves are kept with the optimizer's state, from which training goes on exactly.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanozhchat.compute import Compute
from nanozhchat.gpt import GPT, Linear
from nanozhchat.optim import Optimizer, ParamGroup

LORA_LR = 0.002  # of Adam at --lr-frac=1; a common choice, not swept
PREFIX = "lora/"


class LoRALinear(Linear):
    """A frozen linear layer plus up @ down: (in -> rank -> out), nothing at the start."""

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__(base.in_features, base.out_features)
        self.weight = nn.Parameter(base.weight.detach(), requires_grad=False)
        if base.bias is not None:
            self.bias = nn.Parameter(base.bias.detach(), requires_grad=False)
        bound = (3 / base.in_features) ** 0.5
        down = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(down.to(self.weight.device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=self.weight.device))

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        low = F.linear(input, self.down.to(input.dtype))
        whole = super().forward(input) if self.bias is None else super().forward(input) + self.bias.to(input.dtype)
        return whole + F.linear(low, self.up.to(input.dtype))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = torch.addmm(self.weight, self.up, self.down).detach()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias.detach()


def adapt(model: GPT, rank: int, seed: int) -> dict[str, nn.Parameter]:
    """Freeze a model, put adapters on every matrix of its blocks, and return their parameters by name."""
    widest = model.config.n_embd
    if not 0 < rank <= widest:
        raise ValueError(f"--lora-rank={rank} must be between 1 and the model's width, {widest}")
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for block in model.blocks():
        for part, names in ((block.attn, ("c_q", "c_k", "c_v", "c_proj")), (block.mlp, ("c_fc", "c_proj"))):
            for name in names:
                setattr(part, name, LoRALinear(getattr(part, name), rank, generator))
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class LoRAOptimizer(Optimizer):
    """Adam over adapters alone; its state holds them too."""

    def __init__(self, adapters: dict[str, nn.Parameter], lr: float, compute: Compute) -> None:
        self.adapters = adapters
        super().__init__([ParamGroup(kind="adamw", params=adapters, lr=lr, betas=(0.9, 0.99))], compute)

    def state_dict(self) -> dict[str, Tensor]:
        """Return this rank's share of the optimizer state, and from rank 0 the adapters."""
        own = {PREFIX + name: p.detach() for name, p in self.adapters.items()} if self.compute.is_main else {}
        return super().state_dict() | own

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], steps_done: int) -> None:
        """Restore adapters and moments from the merged state of all ranks."""
        for name, p in self.adapters.items():
            p.copy_(state[PREFIX + name])
        super().load_state_dict(state, steps_done)
