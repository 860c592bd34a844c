"""Fine-tune a base model on conversations; only the assistant's tokens are learnt."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from nanozhchat import chat, checkpoint, cli, compute, hooks, sources
from nanozhchat.compute import Compute
from nanozhchat.conversation_files import load_conversations
from nanozhchat.dataloader import (
    Prefetch,
    Rendered,
    conversation_eval_batches,
    conversation_loader,
    prepare_conversations,
)
from nanozhchat.log import setup_logging
from nanozhchat.objectives import next_token
from nanozhchat.optim import Optimizer, param_groups
from nanozhchat.recipe import Recipe, fine_tuning
from nanozhchat.run import Run, RunFlags, for_world, open_run
from nanozhchat.schedule import parse_duration
from nanozhchat.tokenizer import Tokenizer
from nanozhchat.trainer import TrainState, fit

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ChatSFTArgs(RunFlags):
    """Flags of this script."""

    data: tuple[str, ...] = cli.opt(("builtin",), "builtin, builtin:<skill>, or files", group="data", neutral=True)
    max_conversations: int = cli.opt(20000, "how many to use at most (built-in ones are endless)", group="data")
    budget: str | None = cli.opt(None, "wall clock for the whole command, such as 2m", group="horizon (one of them)")
    num_steps: int | None = cli.opt(None, "optimizer steps", group="horizon (one of them)")
    epochs: float | None = cli.opt(None, "passes over the data; none = 1", group="horizon (one of them)")
    lr_frac: float = cli.opt(0.5, "peak learning rates relative to pretraining", group="training")
    total_batch_size: int | None = cli.opt(None, "tokens per step; none = as in pretraining", group="training")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, find the machine, train."""
    started = time.monotonic()
    args = cli.parse(ChatSFTArgs, argv, __doc__ or "", "python -m scripts.chat_sft")
    setup_logging(int(os.environ.get("RANK", 0)))
    if sum(x is not None for x in (args.budget, args.num_steps, args.epochs)) > 1:
        raise ValueError("--budget, --num-steps and --epochs all set the length of the run; give only one")
    with compute.start(args.device_type, args.dtype, measure=args.budget is not None) as comp:
        train(args, comp, started)


def train(args: ChatSFTArgs, comp: Compute, started: float) -> None:
    """Load the base model, render the conversations, train, save."""
    tag, _, base = chat.find(args.model_tag, "base")
    if not base.state()["finished"]:
        log.warning("the base model %s stopped at step %d before its end; fine-tuning it as it is", tag, base.step)
    tokenizer = chat.load_tokenizer(base)
    recipe_of_base = Recipe.from_dict(base.state()["recipe"])
    specs = sources.resolve_specs(args.data)
    sets: dict[str, Rendered] = {}
    for split in ("train", "val"):
        limit = args.max_conversations if split == "train" else max(64, args.max_conversations // 50)
        found = load_conversations(specs, split, max_conversations=limit, seed=args.seed)
        sets[split] = prepare_conversations(found, tokenizer, recipe_of_base.sequence_len)
    log.info("%d conversations to train on, %d held out", len(sets["train"]), len(sets["val"]))
    flags = cli.result_flags(args)
    identity = {
        **flags, "base_weights": base.weights_sha256(), "data_hash": digest(sets["train"]),
        "tokenizer": base.manifest["identity"]["tokenizer"], "tokenizer_hash": tokenizer.hash,
    }  # fmt: skip
    with open_run("sft", tag, identity, comp, flags=args, config=flags) as run:
        if run.state.finished:
            log.info("%s is trained already (%d steps); --no-resume trains it again", run.folder, run.state.step)
            return
        recipe = run.recipe(lambda: sft_recipe(recipe_of_base, args, sets["train"], comp))
        if comp.is_main:
            cli.write_config(run.folder / "config.yaml", args)
        state = train_run(args, run, recipe, base, tokenizer, sets, started)
    log.info("done: %d steps in %.0f s, saved in %s", state.step, state.time_s, run.folder)


def digest(rendered: Rendered) -> str:
    """Short hash of the token ids to train on."""
    hasher = hashlib.blake2b(digest_size=8)
    for ids, _ in rendered:
        hasher.update(np.asarray(ids, dtype=np.uint32).tobytes())
    return hasher.hexdigest()


def sft_recipe(base: Recipe, args: ChatSFTArgs, rendered: Rendered, comp: Compute) -> Recipe:
    """Decide length and batch from the flags and the data."""
    total = args.total_batch_size or base.total_batch_size
    if total % base.sequence_len:
        raise ValueError(f"--total-batch-size={total} is not a multiple of the context of {base.sequence_len} tokens")
    tokens = sum(len(ids) for ids, _ in rendered)
    steps = args.num_steps or max(1, round((args.epochs or 1.0) * tokens / total))
    seconds = parse_duration(args.budget) if args.budget else None
    recipe = fine_tuning(base, total_batch_size=total, num_steps=steps, budget_s=seconds, lr_frac=args.lr_frac)
    return for_world(recipe, comp.world_size)


def train_run(
    args: ChatSFTArgs, run: Run, recipe: Recipe, base: checkpoint.Saved, tokenizer: Tokenizer,
    sets: dict[str, Rendered], started: float,
) -> TrainState:  # fmt: skip
    """Build model, optimizer (both start from the base's state), loader and hooks, and fit."""
    comp = run.compute
    model = base.load_model(comp.device, comp.dtype, ngrams=False)  # the counts are those of another kind of text
    optimizer = Optimizer(param_groups(model, recipe), comp)
    if run.saved is None:
        optimizer.load_state_dict(base.optimizer_tensors(), base.state()["optimizer_steps"])
    else:
        run.saved.restore(model, optimizer)
    shape: dict[str, Any] = {**run.loader_shape(recipe), "pad_id": tokenizer.end_id}
    loader = Prefetch(conversation_loader(sets["train"], seed=args.seed, **shape))
    if run.state.loader:
        loader.seek(run.state.loader, recipe.device_batch_size)

    fifth = max(1, recipe.num_steps // 5)
    every = fifth if args.eval_every is None else args.eval_every
    held_out = partial(conversation_eval_batches, sets["val"], **shape)
    save_every = fifth if args.save_every is None else args.save_every
    token_bytes = torch.from_numpy(tokenizer.token_bytes())
    plan = run.plan(model, optimizer, recipe, token_bytes, started=started, save_every=save_every)
    actions = [hooks.evaluation(every, model, held_out, plan.token_bytes, comp, plan.stop)]
    return fit(model, optimizer, loader, next_token, plan, actions, run.state, comp, run.metrics)


if __name__ == "__main__":
    cli.run(main)
