"""Reinforcement learning on problems that can be checked: what a chat model gets right more often than its average."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from nanozhchat import cli, hardware

DEFAULT_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class ChatRLArgs(cli.RunFlags):
    tasks: tuple[str, ...] = cli.opt(("builtin:arithmetic",), "what to learn: names of tasks", group="data")
    task_data: str | None = cli.opt(None, "folder with benchmarks' files as published; none = the hub", group="data")
    num_problems: int = cli.opt(4000, "training problems per task", group="data")
    held_out: int = cli.opt(200, "held-out problems per task", group="data", neutral=True)
    source: str = cli.opt("sft", "stage to start from", group="data", choices=("base", "sft"))
    unsafe_sandbox: bool = cli.opt(False, "run code of the model in any sandbox", group="data", neutral=True)
    prompts: int = cli.opt(16, "problems per step", group="training", least=1)
    group: int = cli.opt(8, "answers sampled for each", group="training", least=2)
    max_tokens: int = cli.opt(96, "longest answer", group="training")
    temperature: float = cli.opt(1.0, "of sampling", group="training")
    lr_frac: float = cli.opt(0.2, "peak learning rates relative to those it was trained with", group="training")
    kl: float = cli.opt(0.0, "weight of staying close to the model it starts from; 0 = none", group="training")
    eval_samples: int = cli.opt(4, "answers per held-out problem, for pass@k", group="hooks", neutral=True, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0 or self.kl < 0:
            raise ValueError(f"--temperature={self.temperature} must be above 0, --kl={self.kl} not below 0")


cli.check(__name__, ChatRLArgs)

import torch

from nanozhchat import chat, compute, files
from nanozhchat.compute import Compute
from nanozhchat.log import setup_logging
from nanozhchat.objectives import policy_gradient
from nanozhchat.optim import Optimizer, param_groups
from nanozhchat.packing import digest
from nanozhchat.recipe import Recipe, fine_tuning
from nanozhchat.rollout import Problems, RolloutSource, Settings, evaluation, reward_hook
from nanozhchat.run import for_world, open_run
from nanozhchat.trainer import fit
from tasks import registry

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, find the machine, train."""
    started = hardware.command_start(argv)
    args = cli.parse(ChatRLArgs, argv)
    setup_logging()
    with compute.start(args.device_type, args.dtype, tf32=args.tf32) as comp:
        train(args, comp, started)


def train(args: ChatRLArgs, comp: Compute, started: float) -> None:
    """Load the model and the problems, build optimizer, rollouts and hooks, and fit."""
    tag, _, start = chat.find(args.model_tag, args.source)
    tokenizer = chat.load_tokenizer(start)
    base = Recipe.from_dict(start.state()["recipe"])
    names, problems = ",".join(args.tasks), {}
    for split, n in (("train", args.num_problems), ("held_out", args.held_out)):
        found = registry.resolve(names, n, folder=args.task_data, split=split)
        registry.guard(found, args.unsafe_sandbox)
        problems[split] = Problems(found, tokenizer, base.sequence_len - args.max_tokens)
    log.info("%d problems to learn from, %d held out", *(len(p.items) for p in problems.values()))
    prompts = [ids for _, _, ids in problems["train"].items]
    identity = {"start_weights": start.weights_sha256(), "problems_hash": digest(prompts),
                "tokenizer": start.manifest["identity"]["tokenizer"], "tokenizer_hash": tokenizer.hash}  # fmt: skip
    with open_run("rl", tag, identity, comp, flags=args) as run:
        if run.state.finished:
            return
        recipe = run.recipe(lambda: rl_recipe(base, args, comp, max(map(len, prompts))))
        model = start.load_model(comp.device, comp.dtype, ngrams=False)
        reference = start.load_model(comp.device, comp.dtype, ngrams=False) if args.kl else None
        optimizer = Optimizer(param_groups(model, recipe), comp)
        if run.saved is not None:
            run.saved.restore(model, optimizer)
        settings = Settings(prompts=args.prompts, group=args.group, max_tokens=args.max_tokens,
                            temperature=args.temperature, seed=args.seed)  # fmt: skip
        kind = "native" if comp.device.type == "cpu" and comp.dtype == torch.float32 else "torch"
        source = RolloutSource(model, tokenizer, problems["train"], settings, comp, kind=kind, stop=run.stop,
                               batch_rows=recipe.device_batch_size, reference=reference)  # fmt: skip
        if run.state.loader:
            source.seek(run.state.loader, recipe.device_batch_size)
        fifth = max(1, recipe.num_steps // 5)
        every, save_every = (fifth if x is None else x for x in (args.eval_every, args.save_every))
        no_bytes = 0 * tokenizer.token_bytes()  # the policy's loss is not about bytes
        plan = run.plan(model, optimizer, recipe, no_bytes, started=started, save_every=save_every)
        watched = evaluation(every, source, problems["held_out"], args.eval_samples, comp, run.metrics)
        objective = partial(policy_gradient, temperature=args.temperature, kl=args.kl)
        fit(model, optimizer, source, objective, plan, [watched, reward_hook(source)], run.state, comp, run.metrics)
    every_row = files.read_jsonl(run.folder / "metrics.jsonl") if comp.is_main else []
    rows = [row for row in every_row if "val/pass@1" in row]
    for name in (n for n in (rows or [{}])[-1] if n.startswith(("val/pass", "val/greedy"))):
        log.info("held-out %s: %.1f %% before, %.1f %% after", name[4:], 100 * rows[0][name], 100 * rows[-1][name])
    log.info("the model before it is still there: --source=%s", start.stage)


def rl_recipe(base: Recipe, args: ChatRLArgs, comp: Compute, longest: int) -> Recipe:
    """Decide length and batch. longest: tokens of a prompt; rows hold no more than a prompt and its answer."""
    row = min(base.sequence_len, longest + args.max_tokens)
    total, steps = args.prompts * args.group * row, args.num_steps or DEFAULT_STEPS
    recipe = fine_tuning(base, total_batch_size=total, num_steps=steps, budget_s=args.seconds, lr_frac=args.lr_frac)
    rows = max(1, 4 * base.device_batch_size * base.sequence_len // row)  # most are a quarter of the longest possible
    return for_world(replace(recipe, sequence_len=row), comp.world_size, device_batch_size=rows)


if __name__ == "__main__":
    cli.run(main)
