"""A training run's folder: its lock, what identifies it, where it left off, and how it is saved."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nanozhchat import checkpoint, files, paths
from nanozhchat.compute import Compute
from nanozhchat.gpt import GPT, GPTConfig
from nanozhchat.log import NO_RUN, Metrics
from nanozhchat.optim import Optimizer
from nanozhchat.recipe import Recipe
from nanozhchat.tokenizer import Tokenizer
from nanozhchat.trainer import Plan, TrainState

log = logging.getLogger(__name__)

MODEL_FIELDS = (
    "sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern", "value_embeddings",
    "plain",
)  # fmt: skip


def gpt_config(recipe: Recipe) -> GPTConfig:
    """Return the model configuration of a recipe."""
    return GPTConfig(**{name: getattr(recipe, name) for name in MODEL_FIELDS})


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

    def recipe(self, make: Callable[[], Recipe]) -> Recipe:
        """Return the recipe that the run started with, or make it; kept in recipe.json."""
        path = self.folder / "recipe.json"
        world = self.compute.world_size
        if self.saved is None:
            recipe = make()
        else:
            recipe = Recipe.from_dict(self.saved.state()["recipe"])
            if recipe.world_size != world:
                recipe = for_world(recipe, world)
                log.info("resumed on %d rank(s): same batch of %d tokens a step", world, recipe.total_batch_size)
        if self.compute.is_main:
            files.write_json(path, recipe.to_dict())
        return recipe

    def restore(self, model: GPT, optimizer: Optimizer) -> None:
        """Fill model and optimizer from the checkpoint that the run resumes from."""
        assert self.saved is not None
        tensors = checkpoint.read_tensors(self.saved.folder / "model.safetensors")
        checkpoint.fill_model(model, tensors, self.saved.folder)
        optimizer.load_state_dict(self.saved.optimizer_tensors(), self.saved.state()["optimizer_steps"])

    def loader_shape(self, recipe: Recipe) -> dict[str, Any]:
        """Return what every loader of this run is made with."""
        return {
            "batch_rows": recipe.device_batch_size,
            "sequence_len": recipe.sequence_len,
            "rank": self.compute.rank,
            "world_size": self.compute.world_size,
            "device": self.compute.device,
        }

    def plan(
        self,
        model: GPT,
        optimizer: Optimizer,
        recipe: Recipe,
        tokenizer: Tokenizer,
        *,
        started: float,
        save_every: int,
    ) -> Plan:
        """Return the training plan. started: `time.monotonic()` when the command began."""
        token_bytes = torch.from_numpy(tokenizer.token_bytes()).to(self.compute.device)
        save = self.saver(model, optimizer, recipe)
        return Plan(recipe=recipe, token_bytes=token_bytes, save=save, save_every=save_every, started=started)

    def saver(self, model: GPT, optimizer: Optimizer, recipe: Recipe) -> Callable[[TrainState], None]:
        """Return the function that commits a checkpoint."""

        def save(state: TrainState) -> None:
            extra = {"recipe": recipe.to_dict(), "optimizer_steps": optimizer.steps_done}
            checkpoint.save(
                self.folder,
                step=state.step,
                model=model,
                optimizer_state=optimizer.state_dict(),
                state={**state.to_dict(), **extra},
                identity=self.identity,
                compute=self.compute,
            )

        return save


def for_world(recipe: Recipe, world_size: int) -> Recipe:
    """Spread the same total batch over another number of ranks; raises ValueError if it does not divide."""
    rows = recipe.total_batch_size // recipe.sequence_len
    if rows % world_size:
        raise ValueError(
            f"total_batch_size={recipe.total_batch_size} is {rows} rows, which {world_size} ranks cannot share evenly; "
            "resume with a number of ranks that divides it"
        )
    each = rows // world_size
    device = max(size for size in range(1, each + 1) if each % size == 0 and size <= recipe.device_batch_size)
    return replace(recipe, world_size=world_size, device_batch_size=device, grad_accum_steps=each // device)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Describe what differs between two identities."""
    keys = sorted(old.keys() | new.keys())
    return [f"{k}: saved {old.get(k)!r}, now {new.get(k)!r}" for k in keys if old.get(k) != new.get(k)]


@contextlib.contextmanager
def open_run(
    stage: str,
    tag: str,
    identity: dict[str, Any],
    compute: Compute,
    *,
    resume: bool,
    wandb_run: str = NO_RUN,
    config: dict[str, Any] | None = None,
) -> Iterator[Run]:
    """Lock a run's folder and find where it left off.

    With `resume`, a checkpoint of the same identity is continued and one of another identity is refused with the
    differences. Without, an earlier run is moved aside, never deleted.
    """
    folder = paths.run_dir(stage, tag)
    with files.lock(folder) if compute.is_main else contextlib.nullcontext():
        if compute.is_main:
            files.remove_temporaries(folder)
            if not resume and any(p.name != ".lock" for p in folder.iterdir()):
                _move_aside(folder)
        compute.barrier()
        saved = checkpoint.find(folder)
        state = TrainState()
        if saved is not None:
            changed = differences(saved.manifest["identity"], identity)
            if changed:
                raise ValueError(
                    f"{folder} holds a run that differs ({'; '.join(changed)}); use the same settings, another "
                    "--model-tag, or --no-resume to start over (the old run is kept aside)"
                )
            names = TrainState.__dataclass_fields__
            state = TrainState(**{k: v for k, v in saved.state().items() if k in names})
        metrics = Metrics(folder, run=wandb_run, config=config, enabled=compute.is_main)
        metrics.forget_after(state.step if saved else -1)
        metrics.event("resume" if saved else "start", step=state.step)
        if saved is not None and not state.finished:
            log.info("continuing %s at step %d", folder, state.step)
        try:
            yield Run(stage, tag, folder, identity, compute, metrics, saved, state)
        finally:
            metrics.close()


def _move_aside(folder: Path) -> None:
    aside = folder.with_name(f"{folder.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
    aside.mkdir()
    for path in folder.iterdir():
        if path.name != ".lock":
            path.rename(aside / path.name)
    log.info("the earlier run is kept in %s", aside)
