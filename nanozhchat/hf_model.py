"""The model as transformers sees it. `export --to=hf` puts this file beside the modules it needs into the folder."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from nanozhchat.gpt import GPT, GPTConfig


class NanozhchatConfig(PretrainedConfig):
    """gpt: the fields of `GPTConfig`."""

    model_type = "nanozhchat"

    def __init__(self, gpt: dict[str, Any] | None = None, **rest: Any) -> None:
        self.gpt = gpt or {}
        super().__init__(**rest)


class NanozhchatForCausalLM(PreTrainedModel, GenerationMixin):
    """Logits of every place; generation computes the whole text again for each token."""

    config_class = NanozhchatConfig

    def __init__(self, config: NanozhchatConfig) -> None:
        super().__init__(config)
        self.gpt = GPT(GPTConfig(**config.gpt))
        self.post_init()

    def get_input_embeddings(self) -> Any:
        """Return the table of token embeddings."""
        return self.gpt.wte

    def prepare_inputs_for_generation(self, input_ids: Tensor, **rest: Any) -> dict[str, Any]:
        """Feed the whole text."""
        return {"input_ids": input_ids, "attention_mask": rest.get("attention_mask")}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        """input_ids: (B, T), padded on the right if at all. labels: (B, T), -100 = not scored."""
        if attention_mask is not None and not bool(attention_mask[:, 0].all()):
            raise ValueError("padding on the left is not supported; set tokenizer.padding_side = 'right'")
        logits = self.gpt.logits(self.gpt.hidden(input_ids))
        if labels is None:
            return CausalLMOutput(logits=logits)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
