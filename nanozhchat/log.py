"""What a run says: messages for people on rank 0, numbers to metrics.jsonl and, when asked, wandb."""

import json
import logging
import math
import os
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nanozhchat.files import append_jsonl, atomic_write, read_jsonl

NO_RUN = "dummy"  # the --run name that switches wandb off
Sink = tuple[Callable[[dict[str, Any]], None], Callable[[], Any]]  # takes a flat row, `step` among its keys; flushes


def setup_logging() -> None:
    """Send messages of rank 0 to stderr, warnings of the others too."""
    rank = int(os.environ.get("RANK", 0))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("nanozhchat", "scripts", "tasks", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO if rank == 0 else logging.WARNING)


def clock(seconds: float) -> str:
    """Format seconds as 03:12 or 1:03:12."""
    minutes, s = divmod(max(0, round(seconds)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m:02d}:{s:02d}"


class Metrics:
    """One sink for numbers: metrics.jsonl in the run's folder; wandb when a run name is given, TensorBoard if asked."""

    def __init__(self, folder: Path, *, run: str = NO_RUN, config: dict[str, Any] | None = None, enabled: bool = True,
                 tensorboard: bool = False):  # fmt: skip
        self.folder, self.enabled, self.sinks = folder, enabled, list[Sink]()
        if enabled and run != NO_RUN:
            self.sinks.append(_wandb(folder, run, config or {}))
        if enabled and tensorboard:
            self.sinks.append(_tensorboard(folder))

    def forget_after(self, step: int) -> None:
        """Drop numbers of steps that a resumed run will do again."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.folder / name
            rows = read_jsonl(path)
            kept = [row for row in rows if row.get("step", 0) <= step]
            if self.enabled and len(kept) < len(rows):
                atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept).encode())

    def write(self, values: dict[str, Any]) -> None:
        """Record one flat row; `step` is among the keys. JSON knows no nan: such numbers become null."""
        if self.enabled:
            odd = {k: None for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
            append_jsonl(self.folder / "metrics.jsonl", {**values, **odd})
            for write, _ in self.sinks:
                write(values)

    def sample(self, row: dict[str, Any]) -> None:
        """Record a text that the model produced."""
        if self.enabled:
            append_jsonl(self.folder / "samples.jsonl", row)

    def event(self, kind: str, **values: Any) -> None:
        """Record something that happened: start, save, resume, skip, stop, done."""
        if self.enabled:
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            append_jsonl(self.folder / "events.jsonl", {"time": now, "event": kind, **values})

    def close(self) -> None:
        """Flush what is buffered."""
        for _, close in self.sinks:
            close()


def _wandb(folder: Path, run: str, config: dict[str, Any]) -> Sink:
    import wandb

    if os.environ.get("WANDB_MODE") is None and not os.environ.get("WANDB_API_KEY") and not wandb.api.api_key:
        remedy = "run `wandb login` or set WANDB_MODE=offline"
        raise ValueError(f"--run={run} logs to wandb, but nobody is logged in; {remedy}")
    folder.mkdir(parents=True, exist_ok=True)
    begun = wandb.init(project="nanozhchat", name=run, config=config, dir=str(folder), resume="allow")
    return lambda values: begun.log(values, step=values["step"]), begun.finish


def _tensorboard(folder: Path) -> Sink:
    try:
        from tensorboard.summary import Writer
    except ImportError as error:
        raise ValueError("--tensorboard needs a package; run `uv sync --extra tracking`") from error
    writer = Writer(str(folder / "tensorboard"))

    def write(values: dict[str, Any]) -> None:
        for name in (k for k, v in values.items() if k != "step" and isinstance(v, (int, float))):
            writer.add_scalar(name, values[name], values["step"])

    return write, writer.close
