"""A training run's folder: its lock, what identifies it, where it left off, and how it is saved."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import ArrayLike

from nanozhchat import checkpoint, cli, faults, files, gpt2, paths
from nanozhchat.checkpoint import Checkpoints, Keep
from nanozhchat.cli import RunFlags
from nanozhchat.compute import Compute
from nanozhchat.gpt import GPT, GPTConfig
from nanozhchat.log import Metrics
from nanozhchat.ngram_counts import count, unread
from nanozhchat.optim import Optimizer
from nanozhchat.plan import Plan, TrainState, for_world, stop_signals
from nanozhchat.recipe import Recipe
from nanozhchat.token_store import TokenStore
from nanozhchat.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def gpt_config(recipe: Recipe) -> GPTConfig:
    """Return the model configuration of a recipe."""
    return GPTConfig(**{f.name: getattr(recipe, f.name) for f in fields(GPTConfig) if hasattr(recipe, f.name)})


@dataclass
class Run:
    """One stage of one model. identity: what must stay equal for a rerun to continue."""

    stage: str
    tag: str
    folder: Path
    identity: dict[str, Any]
    compute: Compute
    metrics: Metrics
    saved: checkpoint.Saved | None
    state: TrainState
    stop: list[int]
    flags: RunFlags
    checkpoints: Checkpoints | None = None

    def recipe(self, make: Callable[[], Recipe]) -> Recipe:
        """Return the recipe that the run started with, or make it; kept in recipe.json, the flags in config.yaml."""
        world = self.compute.world_size
        if self.saved is None:
            recipe = make()
        else:
            recipe = Recipe.from_dict(self.saved.state()["recipe"])
            if recipe.world_size != world:
                recipe = for_world(recipe, world)
                log.info("resumed on %d rank(s): same batch of %d tokens a step", world, recipe.total_batch_size)
        if self.compute.is_main:
            files.write_json(self.folder / "recipe.json", recipe.to_dict())
            cli.write_config(self.folder / "config.yaml", self.flags)
        return recipe

    def new_model(
        self, recipe: Recipe, store: TokenStore, tokenizer: Tokenizer, seed: int, init_from: str | None = None,
        **options: bool,
    ) -> GPT:  # fmt: skip
        """Build the model on this run's device: initialised, n-grams counted, or shaped for what is restored.

        init_from: a folder of GPT-2 weights gives that model.
        """
        compute = self.compute
        if self.saved is not None:
            config = GPTConfig(**self.saved.manifest["model"])
            return gpt2.build(config, dtype=compute.dtype, **options).to(compute.device)
        if gpt2.is_gpt2(init_from):
            return gpt2.load_folder(Path(str(init_from)), tokenizer, dtype=compute.dtype, **options).to(compute.device)
        config, counts = gpt_config(recipe), None
        if recipe.ngram_tokens:
            counts = count(unread(store, recipe.ngram_tokens, seed, tokenizer.bos_id), tokenizer.vocab_size)
            config = replace(config, ngrams=counts.sizes)
        model = GPT(config, dtype=compute.dtype, **options)
        model.init_weights(torch.Generator().manual_seed(seed))
        if counts is not None:
            model.ngrams.load_state_dict(counts.state_dict())
        return model.to(compute.device)

    def loader_shape(self, recipe: Recipe) -> dict[str, Any]:
        """Return what every loader of this run is made with."""
        return {"batch_rows": recipe.device_batch_size, "sequence_len": recipe.sequence_len, "rank": self.compute.rank,
                "world_size": self.compute.world_size, "device": self.compute.device}  # fmt: skip

    def plan(
        self, model: GPT, optimizer: Optimizer, recipe: Recipe, token_bytes: ArrayLike, *, started: float,
        save_every: int,
    ) -> Plan:  # fmt: skip
        """Return the training plan. started: `time.monotonic()` when the command began; token_bytes: (V,)."""
        keep = Keep(self.flags.keep_last, self.flags.keep_every)
        self.checkpoints = Checkpoints(self.folder, self.identity, model, optimizer, self.compute, self.metrics, keep)
        sizes = torch.as_tensor(token_bytes, device=self.compute.device)
        return Plan(recipe=recipe, token_bytes=sizes, checkpoints=self.checkpoints, save_every=save_every,
                    started=started, stop=self.stop)  # fmt: skip


def refuse_busy(stage: str, tag: str | None) -> None:
    """Raise LockedError if another process works on this run; for the main process, before it prepares for minutes."""
    if tag and not int(os.environ.get("RANK", 0)) and paths.run_dir(stage, tag).exists():
        with files.lock(paths.run_dir(stage, tag)):
            pass


@contextlib.contextmanager
def open_run(stage: str, tag: str, identity: dict[str, Any], compute: Compute, *, flags: RunFlags) -> Iterator[Run]:
    """Lock a run's folder, find where it left off, and from then on collect signals instead of dying of them.

    identity: what must be equal besides the flags that change the result. With `flags.resume`, a checkpoint of the
    same identity is continued and one of another identity is refused with the differences; so is another number of
    ranks, unless `flags.change_ranks`. Without, an earlier run is moved aside, never deleted.
    """
    folder, config = paths.run_dir(stage, tag), cli.result_flags(flags)
    identity = {**config, **identity}
    if os.environ.get(faults.VARIABLE):
        log.warning("%s=%s: this run is meant to fail", faults.VARIABLE, os.environ[faults.VARIABLE])
    with contextlib.ExitStack() as held, stop_signals() as stop:

        def claim() -> None:
            if compute.is_main:
                held.enter_context(files.lock(folder))
                files.remove_temporaries(folder)
                if not flags.resume and any(p.name != ".lock" for p in folder.iterdir()):
                    _move_aside(folder)

        compute.together(claim)
        saved = compute.together(lambda: checkpoint.find(folder))[compute.rank]
        state = TrainState()
        if saved is not None:
            _check_same(saved, identity, compute, flags)
            state = TrainState.from_dict(saved.state())
        state.__dict__.update(checkpoint.remembered(folder))
        metrics = Metrics(folder, run=flags.run, config=config, enabled=compute.is_main, tensorboard=flags.tensorboard)
        metrics.forget_after(state.step if saved else -1)
        cuda = compute.device.type == "cuda"
        where = torch.cuda.get_device_name(compute.device) if cuda else compute.device.type
        if finished := state.finished:
            log.info("%s is trained already (%d steps); --no-resume trains it again", folder, state.step)
        else:
            metrics.event("resume" if saved else "start", step=state.step, world_size=compute.world_size, device=where)
            if saved is not None:
                log.info("continuing %s at step %d", folder, state.step)
        run = Run(stage, tag, folder, identity, compute, metrics, saved, state, stop, flags)
        try:
            yield run
            if state.finished and not finished:
                tokens = state.tokens / 1e6
                log.info("done: %d steps, %.1f M tokens, %.0f s; %s", state.step, tokens, state.time_s, folder)
        finally:
            if run.checkpoints is not None:
                run.checkpoints.close()
            metrics.close()


def _check_same(saved: checkpoint.Saved, identity: dict[str, Any], compute: Compute, flags: RunFlags) -> None:
    """Raise ValueError with the differences between a saved run and this one."""
    old, new = saved.manifest["identity"], json.loads(json.dumps(identity))  # as it is saved: lists, no tuples
    keys = sorted(old.keys() | new.keys())
    usual = {f.name: f.default for f in fields(flags)}  # flags left at these are not in an identity
    if changed := [f"{k}: saved {old.get(k, usual.get(k))!r}, now {new.get(k, usual.get(k))!r}"
                   for k in keys if old.get(k) != new.get(k)]:  # fmt: skip
        ways = {"base": "another --model-tag, ", "sft": "another --save-as, "}
        raise ValueError(
            f"{saved.folder.parent} holds a run that differs ({'; '.join(changed)}); use the same settings, "
            f"{ways.get(saved.stage, '')}or --no-resume to start over (the old run is kept aside)"
        )
    ranks = saved.manifest.get("world_size", compute.world_size)
    if ranks != compute.world_size and not flags.change_ranks and not saved.state()["finished"]:
        raise ValueError(
            f"{saved.folder.parent} was saved by {ranks} rank(s), now there are {compute.world_size}; use as many, or "
            "--change-ranks to go on with the same batches in the same order, spread anew"
        )


def _move_aside(folder: Path) -> None:
    aside = folder.with_name(f"{folder.name}{paths.ASIDE}{time.strftime('%Y%m%d-%H%M%S')}")
    aside.mkdir()
    for path in folder.iterdir():
        if path.name != ".lock":
            path.rename(aside / path.name)
    log.info("the earlier run is kept in %s", aside)
