"""Rollouts: a model's own answers to problems that can be judged, weighted by how they compare with each other.

The data source of reinforcement learning. Each step takes some problems, samples a group of answers to each from the
current weights, judges them, and gives every answer the advantage it has over its group (GRPO, arXiv 2402.03300, with
DAPO's token-level sum and its leaving out of groups that are all right or all wrong, arXiv 2503.14476). There is one
optimizer step per rollout, so the answers always come from the weights they change: no clipping, and an exact resume
needs nothing but the number of the step, from which everything random is drawn.
"""

import itertools
import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from nanozhchat.calculator import calculate
from nanozhchat.compute import Compute
from nanozhchat.conversation import ASSISTANT, TOOL_CALL, TOOL_RESULT, Task
from nanozhchat.dataloader import IGNORE, RolloutBatch
from nanozhchat.engine import Engine
from nanozhchat.errors import DivergedError
from nanozhchat.gpt import GPT
from nanozhchat.log import Metrics
from nanozhchat.objectives import chosen_logprobs
from nanozhchat.packing import shuffled
from nanozhchat.plan import Hook, TrainState
from nanozhchat.sampling import SamplingParams
from nanozhchat.tokenizer import Tokenizer

log = logging.getLogger(__name__)

SLOTS = 64  # answers decoded together
MAX_CALLS, MAX_RESULT_CHARS = 8, 2000  # of the calculator, per answer
JUDGES = 2  # threads that check answers: those that run code wait for it
EVAL_SEED = 2**40  # no training step draws from it
SHOWN = 4  # answers written to samples.jsonl at each evaluation


@dataclass
class Rollout:
    """One sampled answer. ids: prompt and all that followed; chosen: whether the model chose each of them.

    text: what is judged, after the last call of a tool; finished: it ended by itself.
    """

    ids: list[int]
    chosen: list[bool]
    text: str = ""
    finished: bool = False
    calls: int = 0
    reward: float = 0.0
    advantage: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to roll out. prompts: problems per step over all ranks; group: answers to each; max_tokens: of an answer."""

    prompts: int
    group: int
    max_tokens: int
    temperature: float = 1.0
    seed: int = 0


def use_tool(call: str) -> str:
    """Return what the calculator answers, errors included: the model has to live with them."""
    try:
        return calculate(call)[:MAX_RESULT_CHARS]
    except ValueError as error:
        return f"错误：{error}"[:MAX_RESULT_CHARS]


def roll_out(
    engine: Engine, asked: Sequence[tuple[Sequence[int], int, int]], params: SamplingParams, stop: Sequence[int] = ()
) -> list[Rollout]:  # fmt: skip
    """Answer prompts, with the calculator's help where the model asks for it. asked: (prompt ids, seed, index) each.

    stop: signals received; after one, what is not finished stays so. Raises DivergedError when nothing can be drawn.
    """
    tokenizer = engine.tokenizer
    call_id, result_id, assistant_id = map(tokenizer.special, (TOOL_CALL, TOOL_RESULT, ASSISTANT))
    rollouts = [Rollout(list(ids), [False] * len(ids)) for ids, _, _ in asked]
    batch = engine.new_batch(max(1, min(SLOTS, len(asked))), drafts=False)
    live = {}

    def go_on(number: int) -> None:
        rollout, (prompt, seed, index) = rollouts[number], asked[number]
        left = params.max_tokens - (len(rollout.ids) - len(prompt))
        if left > 0:
            own = replace(params, seed=seed + rollout.calls, max_tokens=left)
            live[batch.add(rollout.ids, own, index=index)] = number

    for number in range(len(asked)):
        go_on(number)
    while live and not stop:
        for request, delta in batch.step():
            if delta.finish_reason is None:
                continue
            if request.error is not None:
                raise DivergedError(f"answers cannot be sampled any more: {request.error}") from request.error
            number = live.pop(request)
            rollout, said = rollouts[number], request.tokens[len(request.prompt) :]
            rollout.ids += said
            rollout.chosen += [True] * len(said)
            rollout.text, rollout.finished = tokenizer.decode(request.ids), delta.finish_reason == "stop"
            if rollout.finished and call_id in said:
                rollout.finished, call = False, said[said.index(call_id) + 1 : -1]
                answer = tokenizer.encode(use_tool(tokenizer.decode(call)))
                result = [result_id, *answer, tokenizer.end_id, assistant_id]
                if rollout.calls < MAX_CALLS and len(rollout.ids) + len(result) < engine.context:
                    rollout.calls += 1
                    rollout.ids += result
                    rollout.chosen += [False] * len(result)
                    go_on(number)
    return rollouts


class Problems:
    """Questions of several tasks in one list, rendered."""

    def __init__(self, tasks: Sequence[Task], tokenizer: Tokenizer, room: int) -> None:
        """Leave out what is longer than `room` tokens; ValueError if nothing is left."""
        every = [(task, i, tokenizer.render_prompt(task.prompt(i))) for task in tasks for i in range(len(task))]
        self.items = [item for item in every if len(item[2]) <= room]
        if len(self.items) < len(every):
            log.warning("%d of %d problems are longer than %d tokens and are left out",
                        len(every) - len(self.items), len(every), room)  # fmt: skip
        if not self.items:
            raise ValueError(f"none of {len(every)} problems fits {room} tokens; choose other --tasks")

    def judge(self, numbers: Sequence[int], rollouts: Sequence[Rollout]) -> None:
        """Set the rewards: what the task gives a finished answer, 0 to 1, and 0 for others."""

        def reward(number: int, rollout: Rollout) -> float:
            task, i, _ = self.items[number]
            return float(rollout.finished and task.check(i, rollout.text))

        with ThreadPoolExecutor(JUDGES) as pool:
            for rollout, value in zip(rollouts, pool.map(reward, numbers, rollouts), strict=True):
                rollout.reward = value


class RolloutSource:
    """Endless micro-batches of rollouts. The state is how many steps were begun; stands where a `Prefetch` does."""

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, problems: Problems, settings: Settings, compute: Compute, *,
        kind: str, batch_rows: int, stop: Sequence[int] = (), reference: GPT | None = None,
    ) -> None:  # fmt: skip
        """kind: of `Engine`; batch_rows: of a micro-batch of one rank; reference: frozen, for the KL term."""
        if settings.prompts % compute.world_size:
            fit = -(-settings.prompts // compute.world_size) * compute.world_size
            raise ValueError(f"--prompts={settings.prompts} cannot be shared evenly by {compute.world_size} ranks; "
                             f"pass --prompts={fit}")  # fmt: skip
        self.model, self.tokenizer, self.problems, self.settings = model, tokenizer, problems, settings
        self.compute, self.kind, self.stop, self.reference = compute, kind, stop, reference
        self.batch_rows, self.step = batch_rows, 0
        self.ready: deque[RolloutBatch] = deque()
        self.sums = [0.0] * 5  # of this rank's last step: rewards, tokens, unfinished, rollouts, those that teach

    def __next__(self) -> RolloutBatch:
        if not self.ready:
            self.ready.extend(self._batches(self._rollouts()))
            self.step += 1
            self.ready = deque(replace(batch, state=self.state_dict()) for batch in self.ready)
        return self.ready.popleft()

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last batch given out, if it was the last of its step."""
        return {"step": self.step, "rows": self.step * self.settings.prompts * self.settings.group}

    def seek(self, state: dict[str, Any], batch_rows: int) -> None:
        """Continue with the step after `state`, in micro-batches of so many rows."""
        self.step, self.batch_rows = int(state["step"]), batch_rows
        self.ready.clear()

    def numbers(self) -> list[int]:
        """Problems of this step on this rank: each problem once in an epoch, in a seeded order."""
        s, total = self.settings, len(self.problems.items)
        first, end = self.step * s.prompts + self.compute.rank, (self.step + 1) * s.prompts
        places = [divmod(at, total) for at in range(first, end, self.compute.world_size)]
        return [int(shuffled(total, s.seed, epoch, np.array([at]))[0]) for epoch, at in places]

    def answer(self, asked: Sequence[tuple[Sequence[int], int, int]], temperature: float) -> list[Rollout]:
        """Answer with the weights at hand; asked as in `roll_out`."""
        params = SamplingParams(temperature=temperature, top_p=1.0, max_tokens=self.settings.max_tokens)
        self.model.eval()
        rollouts = roll_out(Engine(self.model, self.tokenizer, kind=self.kind), asked, params, self.stop)
        self.model.train()
        return rollouts

    def _rollouts(self) -> list[Rollout]:
        s, numbers = self.settings, [n for n in self.numbers() for _ in range(self.settings.group)]
        first = (s.seed * 1_000_003 + self.step) * MAX_CALLS * 2
        asked = [(self.problems.items[n][2], first, n * s.group + i % s.group) for i, n in enumerate(numbers)]
        rollouts = self.answer(asked, s.temperature)
        self.problems.judge(numbers, rollouts)
        for start in range(0, len(rollouts), s.group):
            group = rollouts[start : start + s.group]
            rewards = np.array([r.reward for r in group])
            for rollout, advantage in zip(group, (rewards - rewards.mean()) / (rewards.std() + 1e-6), strict=True):
                rollout.advantage = float(advantage)
        teaching = [r for r in rollouts if abs(r.advantage) > 1e-3]
        rows = [(r.reward, sum(r.chosen), not r.finished, 1) for r in rollouts]
        self.sums = [*map(float, np.sum(rows, axis=0)), float(len(teaching))]
        return teaching

    def _batches(self, rollouts: list[Rollout]) -> list[RolloutBatch]:
        """Cut a step's rollouts into as many micro-batches as the loop will ask for, of similar lengths each."""
        s, ordered = self.settings, sorted(rollouts, key=lambda r: len(r.ids))
        parts = s.prompts * s.group // self.compute.world_size // self.batch_rows
        cuts = [len(ordered) * i // parts for i in range(parts + 1)]
        return [self._batch(ordered[start:end]) for start, end in itertools.pairwise(cuts)]

    def _batch(self, rollouts: list[Rollout]) -> RolloutBatch:
        """Rows padded to the longest; without any rollout, one row that teaches nothing."""
        width = max((len(r.ids) for r in rollouts), default=2)
        ids = torch.full((max(1, len(rollouts)), width), self.tokenizer.end_id)
        targets, advantages = torch.full_like(ids, IGNORE), torch.zeros(ids.shape)
        for row, r in enumerate(rollouts):
            ids[row, : len(r.ids)] = torch.tensor(r.ids)
            chosen = torch.tensor(r.chosen).nonzero().squeeze(1)
            targets[row, chosen] = ids[row, chosen]
            advantages[row, chosen] = r.advantage
        device = self.compute.device
        batch = RolloutBatch(ids[:, :-1].to(device), targets[:, 1:].to(device), 0, {},
                             advantages=advantages[:, 1:].to(device))  # fmt: skip
        if self.reference is None:
            return batch
        with torch.no_grad():
            known = torch.zeros_like(batch.advantages)
            known[batch.targets >= 0] = chosen_logprobs(self.reference, batch, self.settings.temperature)
        return replace(batch, reference=known)


def reward_hook(source: RolloutSource) -> Hook:
    """Record with every step how its rollouts did."""

    def action(state: TrainState) -> dict[str, float]:
        rewards, tokens, unfinished, count, teaching = source.compute.sum(source.sums)
        if not count:
            return {}
        return {"train/reward": rewards / count, "train/answer_tokens": tokens / count,
                "train/unfinished_frac": unfinished / count, "train/teaching_frac": teaching / count}  # fmt: skip

    return Hook(1, action)


def evaluation(
    every: int, source: RolloutSource, held_out: Problems, samples: int, compute: Compute, metrics: Metrics
) -> Hook:  # fmt: skip
    """Answer held-out problems every so many steps: pass@1 and pass@samples by sampling, and greedily.

    The random numbers are the same every time. best_val becomes 1 - pass@1.
    """
    numbers = range(compute.rank, len(held_out.items), compute.world_size)
    names = sorted({task.name for task, _, _ in held_out.items})

    def action(state: TrainState) -> dict[str, float]:
        began = time.monotonic()
        asked = [(held_out.items[n][2], EVAL_SEED, n * samples + i) for n in numbers for i in range(samples)]
        drawn = source.answer(asked, source.settings.temperature)
        greedy = source.answer([(held_out.items[n][2], 0, 0) for n in numbers], 0.0)
        held_out.judge([n for n in numbers for _ in range(samples)], drawn)
        held_out.judge(numbers, greedy)
        sums = np.zeros((len(names), 4))  # problems, pass@1, pass@samples, greedy
        for at, n in enumerate(numbers):
            rewards = [r.reward for r in drawn[at * samples : (at + 1) * samples]]
            row = [1.0, sum(rewards) / samples, max(rewards), greedy[at].reward]
            sums[names.index(held_out.items[n][0].name)] += row
        *flat, stopped = compute.sum([*sums.flatten().tolist(), float(bool(source.stop))])
        if stopped:
            return {}
        sums = np.array(flat).reshape(sums.shape)
        for n, r in list(zip(numbers, greedy, strict=True))[:SHOWN]:
            task, i, _ = held_out.items[n]
            row = {"step": state.step, "prompt": task.prompt(i)[-1].content, "text": r.text, "reward": r.reward}
            metrics.sample(row)
        total = sums.sum(0)
        values = {"val/pass@1": total[1] / total[0], f"val/pass@{samples}": total[2] / total[0],
                  "val/greedy": total[3] / total[0], "val/time_s": time.monotonic() - began}  # fmt: skip
        if len(names) > 1:
            values |= {f"val/pass@1/{name}": one[1] / one[0] for name, one in zip(names, sums, strict=True)}
        if state.best_val is None or 1 - values["val/pass@1"] < state.best_val:
            state.best_val, state.best_step = 1 - values["val/pass@1"], state.step
        return {name: float(value) for name, value in values.items()}

    return Hook(every, action)
