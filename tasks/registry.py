"""The only list of tasks: name -> factory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from nanozhchat.builtin import SKILLS
from nanozhchat.conversation import Task
from tasks.builtin import BuiltinTask

TASKS: dict[str, Callable[..., Task]] = {f"builtin:{skill}": partial(BuiltinTask, skill) for skill in SKILLS}
GROUPS: dict[str, tuple[str, ...]] = {"builtin": tuple(name for name in TASKS if name.startswith("builtin:"))}


def resolve(names: str, n: int | None = None, **options: Any) -> list[Task]:
    """Return the tasks of comma-separated names; a group name stands for all of its tasks.

    n: questions per task (None: each task's default). options: what else the tasks take, such as split.
    Raises ValueError that lists the names for an unknown one.
    """
    found: dict[str, None] = {}
    for name in map(str.strip, names.split(",")):
        if name not in TASKS and name not in GROUPS:
            raise ValueError(f"unknown task {name!r}; there are: {', '.join([*GROUPS, *TASKS])}")
        found.update(dict.fromkeys(GROUPS.get(name, (name,))))
    options |= {} if n is None else {"n": n}
    return [TASKS[name](**options) for name in found]
