"""The only list of tasks: name -> factory."""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from nanozhchat import sandbox
from nanozhchat.builtin import SKILLS
from nanozhchat.conversation import Task
from tasks.answering import ANSWERING
from tasks.base import Benchmark
from tasks.builtin import BuiltinTask
from tasks.choosing import CHOOSING

SANDBOX_LEVEL = 2  # wanted for tasks whose answers are programs
SPECS = CHOOSING | ANSWERING
OWN: dict[str, Callable[..., Task]] = {f"builtin:{skill}": partial(BuiltinTask, skill) for skill in SKILLS}
CORE_ZH = ("c3", "chid", "cluewsc", "ocnli", "eprstmt", "tnews", "cmrc2018")
CORE = ("hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande", "openbookqa", "boolq", "copa")
GROUPS: dict[str, tuple[str, ...]] = {
    "builtin": tuple(OWN),
    "core-zh": CORE_ZH,
    "core": CORE,
    "zh": tuple(name for name, spec in SPECS.items() if spec.lang == "zh"),
    "en": tuple(name for name, spec in SPECS.items() if spec.lang == "en"),
}


def expand(names: str) -> list[str]:
    """Return the tasks of comma-separated names and groups, each once. Raises ValueError for an unknown one."""
    known = GROUPS | {name: (name,) for name in (*OWN, *SPECS)}
    wanted = list(map(str.strip, names.split(",")))
    if unknown := [name for name in wanted if name not in known]:
        slip = unknown[0]
        near = [name for name in known if name.endswith(f":{slip}")] or get_close_matches(slip, known, 1, 0.8)
        meant = f", did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown task {slip!r}{meant}; there are: {', '.join(known)}")
    return list(dict.fromkeys(task for name in wanted for task in known[name]))


def benchmarks(names: str, n: int | None = None, **options: Any) -> list[Benchmark]:
    """Load benchmarks. n: questions each, None = all. options: of `Benchmark`; folder may be a string."""
    if (folder := options.get("folder")) and not Path(folder).is_dir():
        remedy = "`python -m scripts.chat_eval --list` says what it holds"
        raise ValueError(f"--task-data={folder} is not a folder; {remedy}")
    if own := [name for name in expand(names) if name in OWN]:
        raise ValueError(f"{own[0]} is for chat models: ask it with `python -m scripts.chat_eval`")
    options["folder"] = Path(folder) if folder else None
    return [Benchmark(name, SPECS[name], n=n, **options) for name in expand(names)]


def resolve(names: str, n: int | None = None, *, folder: str | None = None, split: str = "val") -> list[Task]:
    """Load tasks to ask a chat model. n: questions each, None = as many as a task has by itself.

    folder: where the files of benchmarks are, None = the hub. split: "val", or "train" and "held_out" to learn.
    """
    own = {} if n is None else {"n": n}
    tasks: list[Task] = []
    for name in expand(names):
        if name in OWN:
            tasks.append(OWN[name](split="train" if split == "train" else "val", **own))
        else:
            tasks += benchmarks(name, n, folder=folder, split=split)
    return tasks


def guard(tasks: Sequence[Any], unsafe: bool) -> None:
    """Refuse tasks that run programs of the model where the sandbox is too open, unless `unsafe`."""
    if not unsafe and any(getattr(task, "runs_code", False) for task in tasks):
        sandbox.require(SANDBOX_LEVEL)


def table() -> str:
    """Describe all benchmarks, one a line: name, language, licence, files below --task-data, hub, page."""
    rows = [(n, s.lang, s.licence, s.files, f"hf:{s.hub.split()[0]}" if s.hub else "not on the hub", f"https://{s.page}")
            for n, s in SPECS.items()]  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[5]]) for row in rows]
    return "\n".join([*lines, *(f"{group} = {', '.join(names)}" for group, names in GROUPS.items())])
