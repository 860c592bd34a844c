"""What happens between training steps: held-out loss, and samples that show the model learning to speak."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from nanozhchat.compute import Compute
from nanozhchat.dataloader import Batch
from nanozhchat.engine import Engine
from nanozhchat.gpt import GPT
from nanozhchat.log import Metrics
from nanozhchat.loss_eval import evaluate
from nanozhchat.sampling import SamplingParams
from nanozhchat.trainer import Hook, TrainState

SAMPLE_TOKENS = 48


def evaluation(
    every: int, model: GPT, batches: Callable[[], Iterable[Batch]], token_bytes: torch.Tensor, compute: Compute,
    stop: Sequence[int] = (),
) -> Hook:  # fmt: skip
    """Score the held-out batches every so many steps. stop: signals received."""

    def action(state: TrainState) -> dict[str, float]:
        result = evaluate(model, batches(), token_bytes, compute, stop)
        if state.best_val is None or result.loss < state.best_val:
            state.best_val, state.best_step = result.loss, state.step
        return {"val/loss": result.loss, "val/bpb": result.bpb, "val/ppl": result.ppl}

    return Hook(every, action)


def sampling(every: int, engine: Engine, prompts: Sequence[str], metrics: Metrics, compute: Compute) -> Hook:
    """Let rank 0 continue a few beginnings every so many steps, into samples.jsonl."""
    tokenizer, model = engine.tokenizer, engine.model

    def action(state: TrainState) -> dict[str, float]:
        if compute.is_main and state.step > 0:
            ids = [[tokenizer.bos_id, *tokenizer.encode(p)] for p in prompts]
            params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=SAMPLE_TOKENS, seed=state.step)
            was_training = model.training
            model.eval()
            for prompt, text in zip(prompts, engine.complete(ids, params), strict=True):
                metrics.sample({"step": state.step, "prompt": prompt, "text": text})
            model.train(was_training)
        return {}

    return Hook(every, action)
