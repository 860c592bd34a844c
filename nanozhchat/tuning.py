"""What fine-tuning on conversations and on preferences share: data, length, optimizer, what is watched."""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from nanozhchat import dataloader, hooks, lora, packing
from nanozhchat.checkpoint import Saved
from nanozhchat.conversation import Conversation
from nanozhchat.conversation_files import load_conversations, preferences
from nanozhchat.engine import Engine
from nanozhchat.gpt import GPT
from nanozhchat.objectives import DPO
from nanozhchat.optim import Optimizer, param_groups
from nanozhchat.plan import Hook, Plan, for_world
from nanozhchat.presets import presets
from nanozhchat.recipe import Recipe, fine_tuning
from nanozhchat.run import Run
from nanozhchat.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MIN_VAL_TOKENS = 8192  # rendered, of which the answers are scored
HALF_LEARNT = 2**-0.5  # a share of tokens to learn that is nearer to a half than to all of them
MIN_HELD_OUT = 20  # conversations from which the held-out loss tells one checkpoint from another
ANSWERS = 20  # held-out questions that are answered before and after


@dataclass(frozen=True)
class Lessons:
    """What to train on and what is held out, rendered. questions: held-out ones, each with its expected answer."""

    train: Any  # `dataloader.Rendered`, or `Pairs`
    val: Any
    questions: list[tuple[Conversation, str]]

    @property
    def learnt(self) -> float:
        """Share of the tokens to train on that are learnt, those of the assistant; 1 for pairs of answers."""
        masks = [mask for ids, mask in self.train if isinstance(ids, np.ndarray)]
        return float(np.concatenate(masks).mean()) if masks else 1.0

    @property
    def digest(self) -> str:
        """Short hash of the token ids to train on."""
        pairs = not isinstance(self.train[0][0], np.ndarray)
        return packing.digest(ids for item in self.train for ids, _ in (item if pairs else [item]))


def read_lessons(
    objective: str, specs: Sequence[str], tokenizer: Tokenizer, sequence_len: int, limit: int, seed: int
) -> Lessons:
    """Read and render both splits of the data; raises ValueError if there is nothing to learn."""
    for preset in filter(None, map(presets().get, specs)):
        log.info("%s: %s, licence: %s", preset.name, preset.hub_id, preset.licence)
    made: dict[str, Any] = {}
    found: list[Any] = []
    render: Any
    for split, most in (("train", limit), ("val", max(64, limit // 50))):
        if objective == "dpo":
            found, render = list(islice(preferences(specs, split), most)), dataloader.prepare_preferences
        else:
            found = load_conversations(specs, split, max_conversations=most, seed=seed)
            render = dataloader.prepare_conversations
        if split == "val":
            random.Random(0).shuffle(found)  # so that a part stands for all files
        made[split] = render(found, tokenizer, sequence_len)
    what, few = "pairs" if objective == "dpo" else "conversations", len(made["val"]) < MIN_HELD_OUT
    log.info("%d %s to train on, %d held out%s", len(made["train"]), what, len(made["val"]),
             ": too few for their loss to say much" if few else "")  # fmt: skip
    talks: list[Any] = [talk[0] if objective == "dpo" else talk for talk in found[:ANSWERS]]
    ends = [max(i for i, m in enumerate(talk) if m.role == "assistant") for talk in talks]
    return Lessons(**made, questions=[(t[:end], t[end].content) for t, end in zip(talks, ends, strict=True)])


def tuning_recipe(
    start: Recipe, lessons: Lessons, *, total_batch_size: int | None, num_steps: int | None, epochs: float | None,
    seconds: float | None, lr_frac: float, world_size: int, pretrained: bool = True,
) -> Recipe:  # fmt: skip
    """Decide length and batch from the flags and the data: where few tokens are learnt, a step has twice as many.

    pretrained: start is of pretraining; a fine-tuned model's batch has been doubled already, if it should be.
    """
    twice = pretrained and lessons.learnt < HALF_LEARNT
    total = total_batch_size or start.total_batch_size * (2 if twice else 1)
    if twice and not total_batch_size:
        text = "%.0f %% of the tokens are to be learnt: %d a step, twice as in pretraining"
        log.info(text, 100 * lessons.learnt, total)
    if total % start.sequence_len:
        raise ValueError(f"--total-batch-size={total} is not a multiple of the context of {start.sequence_len} tokens")
    epoch = dataloader.rows_in_epoch(lessons.train, start.sequence_len) * start.sequence_len / total
    steps = num_steps or max(1, round((epochs or 1.0) * epoch))
    recipe = fine_tuning(start, total_batch_size=total, num_steps=steps, budget_s=seconds, lr_frac=lr_frac)
    return for_world(recipe, world_size)


def make_optimizer(
    model: GPT, recipe: Recipe, start: Saved, run: Run, lora_rank: int, lr_frac: float, seed: int
) -> Optimizer:
    """Return the optimizer, as it was where the run left off, else where the run before it ended; adapters start new.

    With `lora_rank`, the model gets its adapters here.
    """
    if lora_rank:
        adapters = lora.adapt(model, lora_rank, seed)
        optimizer: Optimizer = lora.LoRAOptimizer(adapters, lora.LORA_LR * lr_frac, run.compute)
    else:
        optimizer = Optimizer(param_groups(model, recipe), run.compute)
    if run.saved is not None:
        run.saved.restore(model, optimizer)
    elif not lora_rank:
        state = start.optimizer_tensors()
        if not any(key.startswith(lora.PREFIX) for key in state):  # those are no use to the whole weights
            optimizer.load_state_dict(state, start.state()["optimizer_steps"])
    return optimizer


def loaders(
    objective: str, lessons: Lessons, recipe: Recipe, seed: int, shape: dict[str, Any]
) -> tuple[dataloader.Prefetch, Any]:
    """Return the batches to train on, and what makes the held-out ones: no more than an evaluation should take."""
    few = max(MIN_VAL_TOKENS, recipe.train_tokens // 128)
    sizes = [sum(len(ids) for ids, _ in item) if objective == "dpo" else len(item[0]) for item in lessons.val]
    val = lessons.val[: 1 + int(np.searchsorted(np.cumsum(sizes), few))]
    load: Any = dataloader.preference_loader if objective == "dpo" else dataloader.conversation_loader
    return dataloader.Prefetch(load(lessons.train, seed=seed, **shape)), partial(load, val, endless=False, **shape)


def make_hooks(
    every: int, objective: Any, model: GPT, held_out: Any, lessons: Lessons, tokenizer: Tokenizer, plan: Plan, run: Run,
    *, answers: bool,
) -> list[Hook]:  # fmt: skip
    """Return what is watched: the held-out loss, and the answers to held-out questions before and after."""
    if isinstance(objective, DPO):
        watched = hooks.preference_evaluation(every, model, objective, held_out, run.compute)
    else:
        watched = hooks.evaluation(every, model, held_out, plan.token_bytes, run.compute, plan.stop)
    told = hooks.answering(Engine(model, tokenizer), lessons.questions, run.metrics, run.compute)
    return [watched, told] if answers else [watched]
