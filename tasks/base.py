"""Combining tasks: a slice of one, a shuffled mixture of several. Both are tasks themselves."""

from __future__ import annotations

import random
from collections.abc import Sequence

from nanozhchat.conversation import Message, Task


class _Selection:
    """Rows (task, index) picked out of tasks; the common half of slices and mixtures."""

    def __init__(self, name: str, rows: Sequence[tuple[Task, int]]) -> None:
        """Keep the rows; raises ValueError if there are none."""
        if not rows:
            raise ValueError(f"task {name!r} would hold no questions; pass tasks and ranges that hold some")
        self.name = name
        self.rows = tuple(rows)
        self.chance = sum(task.chance for task, _ in self.rows) / len(self.rows)

    def __len__(self) -> int:
        """Count the questions."""
        return len(self.rows)

    def prompt(self, index: int) -> Sequence[Message]:
        """Return the conversation that ends with the user's question."""
        task, i = self.rows[index]
        return task.prompt(i)

    def expected(self, index: int) -> str:
        """Return a reference answer, for display."""
        task, i = self.rows[index]
        return task.expected(i)

    def check(self, index: int, answer: str) -> bool:
        """Judge the model's answer."""
        task, i = self.rows[index]
        return task.check(i, answer)


class TaskSlice(_Selection):
    """Questions [start:stop:step] of a task."""

    def __init__(self, task: Task, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        """Pick the rows; raises ValueError if none is left."""
        rows = [(task, i) for i in range(*slice(start, stop, step).indices(len(task)))]
        super().__init__(task.name, rows)


class TaskMixture(_Selection):
    """All questions of several tasks, shuffled by seed; a task given twice counts twice."""

    def __init__(self, tasks: Sequence[Task], seed: int = 0) -> None:
        """Shuffle the rows of all tasks."""
        rows = [(task, i) for task in tasks for i in range(len(task))]
        random.Random(seed).shuffle(rows)
        super().__init__("+".join(dict.fromkeys(task.name for task in tasks)), rows)
