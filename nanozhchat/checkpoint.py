"""Checkpoints: safetensors and JSON, committed as a whole, verified before they are trusted.

    <stage>/<tag>/step_00001234/  model.safetensors  optim.rank<k>.safetensors  state.json  manifest.json
    <stage>/<tag>/latest.json     {"step", "manifest_sha256"}

Every rank writes into `step_N.tmp-<run>/`; rank 0 writes the manifest last and renames the folder. A folder without
a valid manifest does not exist for any reader.

Finding and verifying needs no torch, so that a chat starts fast; what handles tensors imports it.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from nanozhchat import __version__, files
from nanozhchat.errors import DamagedError, DiskError, DivergedError
from nanozhchat.gpt_config import GPTConfig
from nanozhchat.log import Metrics

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nanozhchat.compute import Compute
    from nanozhchat.gpt import GPT
    from nanozhchat.optim import Optimizer

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST, LATEST = "manifest.json", "latest.json"
STEP_FOLDER = re.compile(r"step_(\d{8})")
ROLLBACKS = "rollbacks.json"
SPACE_MARGIN = 1.2  # free space wanted, relative to the expected size


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk: its folder, step and manifest."""

    folder: Path
    step: int
    manifest: dict[str, Any]

    @property
    def stage(self) -> str:
        """Of the run that saved it: base, sft or rl."""
        return self.folder.parent.parent.name

    def state(self) -> dict[str, Any]:
        """Counters, loader state, recipe and all else that is not a tensor."""
        return files.read_json(self.folder / "state.json")

    def weights_sha256(self) -> str:
        """Identity of the weights: the hash of their file."""
        return next(f["sha256"] for f in self.manifest["files"] if f["name"] == "model.safetensors")

    def load_model(self, device: torch.device, dtype: torch.dtype, *, ngrams: bool = True) -> GPT:
        """Build the model and fill it; raises DamagedError if the tensors don't fit the configuration.

        ngrams: with the n-gram counts that share its predictions, if it has any; otherwise the network alone.
        """
        from nanozhchat.gpt2 import build

        config = GPTConfig(**self.manifest["model"])
        tensors = read_tensors(self.folder / "model.safetensors")
        if not ngrams:
            config = replace(config, ngrams=())
            tensors = {name: t for name, t in tensors.items() if not name.startswith("ngram")}
        model = build(config, dtype=dtype).to(device)
        fill_model(model, tensors, self.folder)
        return model.eval()

    def restore(self, model: GPT, optimizer: Optimizer) -> None:
        """Fill a model and its optimizer; raises DamagedError if the tensors don't fit."""
        fill_model(model, read_tensors(self.folder / "model.safetensors"), self.folder)
        optimizer.load_state_dict(self.optimizer_tensors(), self.state()["optimizer_steps"])

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Optimizer state of all ranks, merged."""
        merged: dict[str, Tensor] = {}
        for path in sorted(self.folder.glob("optim.rank*.safetensors")):
            merged.update(read_tensors(path))
        return merged


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; raises DamagedError if it cannot be read."""
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"{path} is damaged: {error}") from error


def fill_model(model: GPT, tensors: dict[str, Tensor], source: Path) -> None:
    """Copy tensors into a model after comparing names and shapes."""
    import torch

    own = model.state_dict()
    expected = {name: p.shape for name, p in own.items()}
    found = {name: t.shape for name, t in tensors.items()}
    if expected != found:
        odd = sorted({n for n in expected | found if expected.get(n) != found.get(n)})
        raise DamagedError(f"{source} does not fit the model: tensors differ ({', '.join(odd[:4])})")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(tensors[name])


@dataclass(frozen=True)
class Keep:
    """Which checkpoints outlive the next save: the newest `last`, every `every` steps (0 = none), and the best."""

    last: int = 3
    every: int = 0


def _write(work: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any] | None) -> dict[str, str]:
    """Write the tensor files, and on rank 0 the state; returns the SHA-256 of each."""
    written = {name: files.write_with(work / name, partial(save_tensors, part)) for name, part in tensors.items()}
    if state is not None:
        files.write_json(work / "state.json", state)
        written["state.json"] = files.sha256(work / "state.json")
    return written


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that whoever may read the files beside it may read too; the library's is private."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, {"format": "pt"})
        path.chmod(mode)
    except SafetensorError as error:
        raise OSError(errno.ENOSPC if "No space left" in str(error) else errno.EIO, str(error)) from error


def _manifest(folder: Path) -> dict[str, Any] | None:
    """Read a manifest; None if there is none, or it is not as it was written."""
    with contextlib.suppress(OSError, DamagedError):
        found = files.read_json(folder / MANIFEST)
        if isinstance(found, dict) and found.get("format_version") == FORMAT_VERSION and "files" in found:
            own = _digest(found)
            return found if found.get("sha256", own) == own else None  # older ones have none
    return None


def _digest(manifest: dict[str, Any]) -> str:
    """Hash a manifest without its hash, so that a flipped bit in it is not taken for other settings."""
    kept = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def list_steps(folder: Path) -> list[int]:
    """Steps with a manifest, ascending."""
    found = [(int(m[1]), p) for p in folder.glob("step_*") if (m := STEP_FOLDER.fullmatch(p.name))]
    return sorted(step for step, path in found if _manifest(path) is not None)


def problems(folder: Path) -> list[str]:
    """Compare every file with the manifest; an empty list means that the checkpoint is whole."""
    manifest = _manifest(folder)
    if manifest is None:
        return [f"{folder}: no valid manifest.json"]
    found = []
    for entry in manifest["files"]:
        path = folder / entry["name"]
        if not path.is_file():
            found.append(f"{path}: missing")
        elif path.stat().st_size != entry["bytes"] or files.sha256(path) != entry["sha256"]:
            found.append(f"{path}: content differs from the manifest")
    return found


def find(folder: Path, step: int | None = None, *, newest: int | None = None) -> Saved | None:
    """Return the newest whole checkpoint (up to step `newest`, or the one of `step`), None if there is none at all.

    A damaged one is skipped with a warning; if all are damaged, raises DamagedError.
    """
    steps = [s for s in list_steps(folder) if newest is None or s <= newest]
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise ValueError(f"{folder} has no checkpoint of step {step}; there are: {there}")
    bad: list[str] = []
    for candidate in [step] if step is not None else reversed(steps):
        path = folder / f"step_{candidate:08d}"
        bad = problems(path)
        if not bad:
            manifest = _manifest(path)
            assert manifest is not None
            return Saved(path, candidate, manifest)
        log.warning("checkpoint skipped: %s", bad[0])
    if not list_steps(folder) and (folder / LATEST).exists():
        bad = [f"{folder / LATEST} names a checkpoint, but none has a valid manifest.json"]
    if bad:
        raise DamagedError(f"no usable checkpoint in {folder}: {bad[0]}; train again with --no-resume")
    return None


def prune(folder: Path, keep_last: int, *, every: int = 0, best: int | None = None, verify: bool = True) -> list[int]:
    """Delete checkpoints, but not the newest `keep_last` (at least one), multiples of `every`, or step `best`.

    With `verify`, the newest whole one stays even if newer ones are damaged. Returns the deleted steps.
    """
    steps = list_steps(folder)
    doomed = [s for s in steps[: -max(1, keep_last)] if s != best and not (every and s % every == 0)]
    if verify and doomed:
        whole = next((step for step in reversed(steps) if not problems(folder / f"step_{step:08d}")), None)
        doomed = [step for step in doomed if step != whole]
    for step in doomed:
        try:
            shutil.rmtree(folder / f"step_{step:08d}")
        except OSError as error:
            log.warning("could not delete the checkpoint of step %d: %s", step, error)
    return doomed


def remembered(folder: Path) -> dict[str, Any]:
    """Return what `Checkpoints.remember` kept of a run: rollbacks and detours."""
    path = folder / ROLLBACKS
    return files.read_json(path) if path.exists() else {}


@dataclass
class Pending:
    """A checkpoint that a thread of each rank is writing. written: SHA-256 of this rank's files by name."""

    work: Path
    final: Path
    step: int
    best: int | None
    written: Future[dict[str, str]]


@dataclass
class Checkpoints:
    """The checkpoints of a training run: one in flight at most, reported once committed. All but `ready` collective.

    identity: what must be equal to resume (kept in the manifest).
    """

    folder: Path
    identity: dict[str, Any]
    model: GPT
    optimizer: Optimizer
    compute: Compute
    metrics: Metrics
    keep: Keep = Keep()
    pending: Pending | None = None

    def begin(self, state: dict[str, Any]) -> None:
        """Copy the tensors and start writing them, after committing the one in flight. state: plain JSON types.

        Nothing is done where the checkpoint is already, or (with a warning) when space is short; for the last one of
        a run that raises DiskError. Raises DivergedError rather than save weights that are not finite.
        """
        self.commit()
        step, main, rank = state["step"], self.compute.is_main, self.compute.rank
        final = self.folder / f"step_{step:08d}"
        work = self.compute.together(lambda: self._prepare(step, final))[0]
        if work is None and state["finished"]:
            raise DiskError(f"no space in {self.folder} for the last checkpoint; free some and run this again")
        if work is None or work == final:
            return
        tensors = {f"optim.rank{rank}.safetensors": self.optimizer.state_dict()}
        tensors |= {"model.safetensors": self.model.state_dict()} if main else {}
        copies = {name: {k: t.detach().to("cpu", copy=True).contiguous() for k, t in content.items()}
                  for name, content in tensors.items()}  # fmt: skip
        kept = copy.deepcopy({**state, "optimizer_steps": self.optimizer.steps_done}) if main else None
        thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending = Pending(work, final, step, state["best_step"], thread.submit(_write, work, copies, kept))
        thread.shutdown(wait=False)

    def _prepare(self, step: int, final: Path) -> Path | None:
        """Return a new folder to write into, on rank 0; `final` if it is there already, None when space is short."""
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise DivergedError(f"step {step}: weights are not finite; nothing was saved")
        if not self.compute.is_main or not problems(final):
            return final
        weights = sum(p.numel() * 4 for p in self.model.parameters())
        needed = SPACE_MARGIN * (3 * weights + sum(b.nbytes for b in self.model.buffers()))
        with files.disk_errors(final):
            free = shutil.disk_usage(next(p for p in final.parents if p.exists())).free
            if free <= needed:
                log.warning("checkpoint of step %d not saved: %.1f GiB free, about %.1f needed", step, free / 2**30,
                            needed / 2**30)  # fmt: skip
                return None
            work = final.with_name(f"{final.name}.tmp-{os.getpid()}")
            shutil.rmtree(work, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)  # damaged, or without a manifest
            work.mkdir(parents=True)
        return work

    @property
    def ready(self) -> bool:
        """Whether this rank has written its part of the one in flight."""
        return self.pending is not None and self.pending.written.done()

    def commit(self) -> None:
        """Wait for all ranks' files of the one in flight, if any, make it exist and report it.

        Raises DiskError on every rank if one failed.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return
        parts = self.compute.together(pending.written.result)

        def finish() -> None:
            if self.compute.is_main:
                with files.disk_errors(pending.final):
                    self._name(pending, {name: digest for part in parts for name, digest in part.items()})
                prune(self.folder, self.keep.last, every=self.keep.every, best=pending.best, verify=False)

        self.compute.together(finish)
        self.metrics.event("save", step=pending.step)

    def _name(self, pending: Pending, entries: dict[str, str]) -> None:
        """Write the manifest and give the folder its name. entries: SHA-256 of each file."""
        listed = [{"name": name, "bytes": (pending.work / name).stat().st_size, "sha256": digest}
                  for name, digest in sorted(entries.items())]  # fmt: skip
        manifest = {
            "format_version": FORMAT_VERSION, "code_version": __version__, "step": pending.step,
            "model": self.model.config.to_dict(), "identity": self.identity, "world_size": self.compute.world_size,
            "files": listed,
        }  # fmt: skip
        files.write_json(pending.work / MANIFEST, {**manifest, "sha256": _digest(manifest)})
        files.backend.replace(pending.work, pending.final)
        files.backend.fsync_dir(self.folder)
        latest = {"step": pending.step, "manifest_sha256": files.sha256(pending.final / MANIFEST)}
        files.write_json(self.folder / LATEST, latest)

    def go_back(self, step: int) -> dict[str, Any] | None:
        """Load the newest whole one of at most `step`, delete later ones, return its state; None if there is none."""
        saved = self.compute.together(lambda: find(self.folder, newest=step))[self.compute.rank]
        if saved is None:
            return None

        def forget() -> None:
            for later in list_steps(self.folder) if self.compute.is_main else []:
                if later > saved.step:
                    shutil.rmtree(self.folder / f"step_{later:08d}")

        self.compute.together(forget)
        saved.restore(self.model, self.optimizer)
        self.metrics.forget_after(saved.step)
        return saved.state()

    def remember(self, **values: Any) -> None:
        """Keep rollbacks and detours whatever happens before the next checkpoint."""
        write = partial(files.write_json, self.folder / ROLLBACKS, values)
        self.compute.together(write if self.compute.is_main else bool)

    def close(self) -> None:
        """Wait for the thread of one that will not be committed."""
        if self.pending is not None:
            self.pending.written.exception()
