"""List, verify or prune checkpoints; prints JSON, exit code 5 if something is damaged."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanozhchat import checkpoint, cli, paths
from nanozhchat.errors import DamagedError

COMMANDS = ("list", "verify", "prune")


@dataclass(frozen=True, kw_only=True)
class CkptArgs:
    model_tag: str | None = cli.opt(None, "only this model")
    source: str | None = cli.opt(None, "only this stage", choices=paths.STAGES)
    keep_last: int = cli.opt(1, "prune: checkpoints to keep per run", least=1)


def main(argv: Sequence[str] | None = None) -> None:
    """Dispatch the command given as the first argument."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in (*COMMANDS, "-h", "--help"):
        raise ValueError(f"usage: python -m scripts.ckpt {{{'|'.join(COMMANDS)}}} [flags]")
    command = arguments[0] if arguments[0] in COMMANDS else "list"
    rest = arguments[1:] if arguments[0] in COMMANDS else arguments
    args = cli.parse(CkptArgs, rest, "python -m scripts.ckpt {list|verify|prune}")
    rows, damaged = [], []
    for folder in run_folders(args):
        row: dict[str, Any] = {"run": f"{folder.parent.name}/{folder.name}", "steps": checkpoint.list_steps(folder)}
        if command == "verify":
            row["problems"] = [p for step in row["steps"] for p in checkpoint.problems(folder / f"step_{step:08d}")]
            damaged += row["problems"]
        if command == "prune":
            row["deleted"] = checkpoint.prune(folder, args.keep_last)
            row["steps"] = checkpoint.list_steps(folder)
        rows.append(row)
    print(json.dumps(rows, ensure_ascii=False, indent=1))
    if damaged:
        raise DamagedError(f"{len(damaged)} problem(s), the first: {damaged[0]}")
    if command == "verify":
        sys.stderr.write(f"{sum(len(row['steps']) for row in rows)} checkpoint(s), all whole\n")


def run_folders(args: CkptArgs) -> list[Path]:
    """Folders of the runs asked for."""
    stages = [args.source] if args.source else list(paths.STAGES)
    names = paths.check_tag(args.model_tag) if args.model_tag else "*"
    found = sorted(p for stage in stages for p in (paths.base_dir() / stage).glob(names) if p.is_dir())
    if args.model_tag and not found:
        raise FileNotFoundError(f"no run of model tag {args.model_tag!r} under {paths.base_dir()}; see `ckpt list`")
    return found


if __name__ == "__main__":
    cli.run(main)
