"""Fetch and clean in many tasks at once, here or on a Slurm cluster, through datatrove's executors; then join them.

Each task runs `scripts.data_fetch --shard-of=K/N` as a process of its own. Duplicates are looked for where all shares
meet. The same command goes on after a stop: whole shares are kept, as everywhere.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from nanozhchat import cli, paths
from nanozhchat.cleaning import MEMORIES, parse_steps
from nanozhchat.cli import opt
from nanozhchat.errors import RunError

WHOLE = MEMORIES.keys()  # steps that must see every share


@dataclass(frozen=True, kw_only=True)
class Args:
    data: tuple[str, ...] = opt((), "sources made of files, as in scripts.data_fetch")
    name: str = opt("default", "name of the corpus; that of a share has its number behind it")
    clean: str | None = opt(None, "steps of cleaning, as in scripts.data_fetch")
    skip_bad: bool = opt(False, "count damaged lines and files instead of stopping")
    tasks: int = opt(8, "shares; at most as many as there are input files", least=1)
    workers: int = opt(2, "tasks that run at the same time", least=1)
    executor: str = opt("local", "where they run; for slurm, base directory and environment are on a shared disk",
                        choices=("local", "slurm"))  # fmt: skip
    partition: str = opt("cpu", "of Slurm", group="slurm")
    time: str = opt("24:00:00", "limit of a task in Slurm", group="slurm")
    cpus: int = opt(8, "cores of a task in Slurm", group="slurm")

    def __post_init__(self) -> None:
        """Refuse what data_fetch would refuse in every task."""
        parse_steps(self.clean)
        if not self.data:
            raise ValueError("--data is needed: files to share out, such as --data 'c4/*.json.gz'")


def fetch(place: tuple[str, str], name: str, data: Sequence[str], clean: Sequence[str], *flags: str) -> None:
    """Run scripts.data_fetch; raises CalledProcessError when it fails. place: working and base directory."""
    steps = [f"--clean={','.join(clean)}"] if clean else []
    command = [sys.executable, "-m", "scripts.data_fetch", "--data", *data, f"--name={name}", *steps, *flags]
    env = {**os.environ, "NANOZHCHAT_BASE_DIR": place[1]}  # a worker may have begun elsewhere, with another one
    subprocess.run(command, check=True, cwd=place[0], env=env)


def share(args: Args, place: tuple[str, str], _: object, rank: int, world_size: int) -> None:
    """Do one task, as datatrove calls it."""
    steps = [step for step in parse_steps(args.clean) if step not in WHOLE]
    flags = [f"--shard-of={rank + 1}/{world_size}", *["--skip-bad"] * args.skip_bad]
    fetch(place, f"{args.name}-{rank + 1}", args.data, steps, *flags)


def join(args: Args, place: tuple[str, str], *_: object) -> None:
    """Put the shares together and drop what they have twice."""
    shares = [f"{place[1]}/corpus/{args.name}-{k + 1}" for k in range(args.tasks)]
    fetch(place, args.name, shares, [step for step in parse_steps(args.clean) if step in WHOLE])


def main(argv: Sequence[str] | None = None) -> None:
    """Run or submit all shares, then what joins them."""
    args = cli.parse(Args, argv)
    try:
        from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
    except ImportError as error:
        raise ValueError("scripts.data_cluster needs datatrove; run `uv sync --extra cluster`") from error
    logs = str(paths.base_dir() / "logs" / f"data-{args.name}")
    place = os.getcwd(), str(paths.base_dir())
    how: dict[str, Any] = {"skip_completed": False}  # data_fetch itself knows what is done, and with which settings
    if args.executor == "local":
        tasks = LocalPipelineExecutor([partial(share, args, place)], tasks=args.tasks, workers=args.workers,
                                      logging_dir=f"{logs}/shares", **how)  # fmt: skip
        try:
            LocalPipelineExecutor([partial(join, args, place)], logging_dir=f"{logs}/join", depends=tasks, **how).run()
        except subprocess.CalledProcessError as error:
            raise RunError(f"a task failed: {error}; its reason stands above and in {logs}") from error
        return
    how |= {"time": args.time, "partition": args.partition, "cpus_per_task": args.cpus}
    tasks = SlurmPipelineExecutor([partial(share, args, place)], tasks=args.tasks, workers=args.workers,
                                  job_name=f"fetch-{args.name}", logging_dir=f"{logs}/shares", **how)  # fmt: skip
    SlurmPipelineExecutor([partial(join, args, place)], tasks=1, job_name=f"join-{args.name}", depends=tasks,
                          logging_dir=f"{logs}/join", **how).run()  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
