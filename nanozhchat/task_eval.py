"""Score a model on tasks, with uncertainty: by its answers (`run_task`) or by what it finds likely (`run_text`).

`run_task` asks a chat model with no examples and judges what it writes. `run_text` gives a model that continues text
some answered examples and the question, and takes the choice that is likeliest to follow; where there are no choices it
generates. Questions that do not fit the context lose examples, then their beginning, and are counted (`Score.cut`).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tqdm import tqdm

from nanozhchat.batching import Part, common_prefix
from nanozhchat.chat import Chat
from nanozhchat.compute import Compute
from nanozhchat.conversation import Task
from nanozhchat.engine import Engine
from nanozhchat.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=256)
Z95 = 1.959964  # two-sided 95 % quantile of the normal distribution
SLOTS = 16  # choices scored together
ROOM = 4  # a question may take all but one part in so many of the context, where the answer is generated


class TextTask(Task, Protocol):
    """What `run_text` needs beyond a `Task`: texts to continue. stop, max_tokens: limits of a generated answer."""

    shots: int  # examples wanted
    per_char: bool  # divide log-likelihoods by the length of the choice without outer blanks
    stop: tuple[str, ...]
    max_tokens: int

    def text(self, index: int, shots: int) -> str:
        """Return `shots` answered examples and the question."""

    def options(self, index: int) -> Sequence[str]:
        """Return the possible continuations; () = the answer is generated."""

    def gold(self, index: int) -> int:
        """Return which option is right."""


@dataclass(frozen=True)
class Answer:
    """One question, what was expected, what came, and whether it passed. credit: 0-1, 1 = correct; cut: did not fit."""

    question: str
    expected: str
    given: str
    correct: bool
    credit: float
    cut: bool = False


@dataclass(frozen=True)
class Score:
    """Mean credit with its 95 % interval (Wilson), beside the score of blind guessing.

    centred: 0 = guessing, 1 = all right. exact: share of fully right answers. cut: questions that did not fit.
    """

    score: float
    chance: float
    low: float
    high: float
    n: int
    centred: float
    exact: float
    cut: int


def wilson(correct: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson 1927), sound for small n and at 0 and 1.

    For sums of credits it is too wide rather than too narrow: what lies between 0 and 1 varies less than a coin.
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = correct / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def summarize(answers: Sequence[Answer], chance: float) -> Score:
    """Return the score of a task's answers."""
    n, total = len(answers), sum(a.credit for a in answers)
    low, high = wilson(total, n)
    mean = total / max(1, n)
    exact = sum(a.correct for a in answers) / max(1, n)
    centred = (mean - chance) / (1 - chance) if chance < 1 else 0.0
    return Score(mean, chance, low, high, n, centred, exact, sum(a.cut for a in answers))


def core(scores: Iterable[Score]) -> float:
    """Mean of the centred scores: 0 = guessing, 1 = all right. What CORE and CORE-zh are of their tasks."""
    centred = [s.centred for s in scores]
    return sum(centred) / len(centred)


def run_task(chat: Chat, task: Task, compute: Compute, params: SamplingParams = GREEDY) -> list[Answer]:
    """Answer every question; ranks share the questions, and every rank gets all answers in order."""
    mine = range(compute.rank, len(task), compute.world_size)
    room = chat.engine.context - min(params.max_tokens, chat.engine.context // ROOM)
    prompts = [chat.prompt_ids(task.prompt(i)) for i in mine]
    fitting = [ids if len(ids) <= room else [*ids[:2], *ids[2 - room :]] for ids in prompts]  # ids[:2]: <|bos|><|user|>
    texts = chat.engine.complete(fitting, params, bar=task.name if compute.is_main else "")
    made = {i: Answer(task.prompt(i)[-1].content, task.expected(i), text, *judged(task.check(i, text)), len(ids) > room)
            for i, text, ids in zip(mine, texts, prompts, strict=True)}  # fmt: skip
    return shared(made, compute)


def run_text(chat: Chat, task: TextTask, compute: Compute) -> list[Answer]:
    """Score every question by what the model continues; ranks share the questions, every rank gets all answers."""
    made: dict[int, Answer] = {}
    likelihood = Likelihood(chat.engine)
    writing: dict[int, tuple[list[int], bool]] = {}
    mine = range(compute.rank, len(task), compute.world_size)
    for i in tqdm(mine, task.name, leave=False, disable=None if compute.is_main else True):
        options = task.options(i)
        encoded = [chat.tokenizer.encode(option)[: chat.engine.context - 1] for option in options]
        longest = max(map(len, encoded)) if options else min(task.max_tokens, chat.engine.context // ROOM)
        ids, cut = fit(chat, task, i, chat.engine.context - longest)
        if not options:
            writing[i] = ids, cut
            continue
        sums = [total for total, _ in likelihood(ids, encoded)]
        worth = [s / max(1, len(o.strip())) if task.per_char else s for s, o in zip(sums, options, strict=True)]
        best = max(range(len(worth)), key=lambda k: (worth[k], len(options[k])))
        made[i] = Answer(task.text(i, 0), options[task.gold(i)], options[best], *judged(best == task.gold(i)), cut)
    params = SamplingParams(temperature=0.0, max_tokens=task.max_tokens, stop=task.stop)
    texts = chat.engine.complete([ids for ids, _ in writing.values()], params) if writing else []
    for (i, (_, cut)), text in zip(writing.items(), texts, strict=True):
        made[i] = Answer(task.text(i, 0), task.expected(i), text, *judged(task.check(i, text)), cut)
    return shared(made, compute)


def judged(credit: float) -> tuple[bool, float]:
    """Return (correct, credit)."""
    return credit == 1, float(credit)


def shared(mine: dict[int, Answer], compute: Compute) -> list[Answer]:
    """Return the answers of all ranks, in order."""
    parts: Any = compute.gather(mine)
    merged = {i: answer for part in parts for i, answer in part.items()}
    return [merged[i] for i in sorted(merged)]


def fit(chat: Chat, task: TextTask, index: int, room: int) -> tuple[list[int], bool]:
    """Return a question's ids with as many examples as fit, and whether even without any its beginning had to go."""
    ids: list[int] = []
    for shots in range(task.shots, -1, -1):
        ids = [chat.tokenizer.bos_id, *chat.tokenizer.encode(task.text(index, shots))]
        if len(ids) <= room:
            return ids, False
    return [ids[0], *ids[len(ids) - room + 1 :]], True


class Likelihood:
    """Log-likelihoods of continuations; what consecutive questions begin with in common is computed once."""

    def __init__(self, engine: Engine) -> None:
        self.decoder = engine.new_decoder(1 + SLOTS)  # slot 0 holds the text

    def __call__(self, text: Sequence[int], options: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, whether each token is the likeliest) of every option after `text`.

        text: one id or more, and with the longest option at most the context.
        """
        decoder = self.decoder
        same = min(common_prefix(decoder.held[0], text), len(text) - 1)
        decoder.truncate(0, same)
        first = torch.from_numpy(decoder.forward([Part(0, text[same:], 1)])[0].copy())  # (1, V)
        out: list[tuple[float, bool]] = []
        for start in range(0, len(options), SLOTS):
            some = options[start : start + SLOTS]
            parts = [Part(1 + k, o[:-1], len(o) - 1) for k, o in enumerate(some) if len(o) > 1]
            for part in parts:
                decoder.copy(0, part.slot, len(text))
            made = decoder.forward(parts) if parts else []
            rest = {p.slot: torch.from_numpy(rows.copy()) for p, rows in zip(parts, made, strict=True)}
            for k, option in enumerate(some):
                logits = torch.cat((first, rest[1 + k])) if 1 + k in rest else first[: len(option)]  # (len, V)
                ids = torch.tensor(option, dtype=torch.long)
                nats = logits.log_softmax(-1).gather(1, ids[:, None]).sum()
                out.append((float(nats), bool((logits.argmax(-1) == ids).all())))
        return out
