"""What happens between training steps: held-out loss, and samples that show the model learning to speak."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F

from nanozhchat.compute import Compute
from nanozhchat.conversation import Conversation
from nanozhchat.dataloader import Batch
from nanozhchat.engine import Engine
from nanozhchat.gpt import GPT
from nanozhchat.log import Metrics
from nanozhchat.loss_eval import evaluate
from nanozhchat.objectives import DPO, preference_margins
from nanozhchat.sampling import SamplingParams
from nanozhchat.trainer import Hook, TrainState

SAMPLE_TOKENS = 48
ANSWER_TOKENS = 128


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


def preference_evaluation(
    every: int, model: GPT, objective: DPO, batches: Callable[[], Iterable[Batch]], compute: Compute
) -> Hook:
    """Score held-out pairs of answers every so many steps: DPO's loss, and how often the better one gained more."""

    @torch.no_grad()
    def action(state: TrainState) -> dict[str, float]:
        sums = [0.0, 0.0, 0.0]
        for batch in batches():
            margins = preference_margins(model, objective.reference, batch)
            found = (F.softplus(-objective.beta * margins).sum(), (margins > 0).sum(), len(margins))
            sums = [a + float(b) for a, b in zip(sums, found, strict=True)]
        loss, right, count = compute.sum(sums)
        if state.best_val is None or loss / count < state.best_val:
            state.best_val, state.best_step = loss / count, state.step
        return {"val/loss": loss / count, "val/accuracy": right / count}

    return Hook(every, action)


def answering(
    engine: Engine, questions: Sequence[tuple[Conversation, str]], metrics: Metrics, compute: Compute
) -> Hook:
    """Let rank 0 answer held-out questions before and after training, into samples.jsonl with the expected answers."""

    def action(state: TrainState) -> dict[str, float]:
        if compute.is_main and (state.step == 0 or state.finished):
            fit = [engine.tokenizer.render_prompt(c, max_tokens=engine.context - ANSWER_TOKENS) for c, _ in questions]
            kept = [(ids, q) for ids, q in zip(fit, questions, strict=True) if len(ids) < engine.context]
            was_training = engine.model.training
            engine.model.eval()
            texts = engine.complete([ids for ids, _ in kept], SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS))
            for (_, (asked, expected)), text in zip(kept, texts, strict=True):
                row = {"step": state.step, "prompt": asked[-1].content, "text": text, "expected": expected}
                metrics.sample(row)
            engine.model.train(was_training)
        return {}

    return Hook(1 << 62, action)


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
