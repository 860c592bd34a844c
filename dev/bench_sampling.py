"""How settings of sampling change stories and arithmetic: python -m dev.bench_sampling --model-tag cpu.

Penalties that stop a story from going round in circles also forbid a sum to name its numbers twice: both are shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from nanozhchat import chat, cli
from nanozhchat.compute import Compute
from nanozhchat.sampling import SamplingParams
from nanozhchat.task_eval import run_task
from nanozhchat.text_quality import quality
from tasks import registry

SETTINGS = (
    {"temperature": 0.0}, {"temperature": 0.5}, {}, {"temperature": 1.0}, {"top_p": 0.9}, {"top_p": 1.0},
    {"min_p": 0.05}, {"repetition_penalty": 1.05}, {"repetition_penalty": 1.1}, {"repetition_penalty": 1.2}, 
    {"no_repeat_ngram": 6}, {"no_repeat_ngram": 8}, {"no_repeat_ngram": 12}, {"presence_penalty": 0.5},
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BenchArgs:
    model_tag: str | None = cli.opt(None, "name of the model; none = the latest")
    source: str | None = cli.opt(None, "stage; none = the furthest")
    tasks: str = cli.opt("builtin:arithmetic,builtin:reading", "tasks beside the stories")
    n: int = cli.opt(100, "questions of each")
    only: int | None = cli.opt(None, "number of the one setting to try; none = all")


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse(BenchArgs, argv, __doc__ or "", "python -m dev.bench_sampling")
    model, compute = chat.load(args.model_tag, source=args.source, device="cpu"), Compute(torch.device("cpu"))
    stories, *others = registry.resolve(f"builtin:story,{args.tasks}", args.n)
    for changes in SETTINGS if args.only is None else [SETTINGS[args.only]]:
        params = replace(SamplingParams(max_tokens=300, seed=0), **changes)
        answers = run_task(model, stories, compute, params)
        figures = {"story": sum(a.correct for a in answers) / args.n, **quality([a.given for a in answers])}
        for task in others:
            right = sum(a.correct for a in run_task(model, task, compute, replace(params, max_tokens=128)))
            figures[task.name.partition(":")[2]] = right / args.n
        name = ", ".join(f"{k} {v}" for k, v in changes.items()) or "the defaults"
        print(f"{name:<24} " + "  ".join(f"{k} {v:.3f}" for k, v in figures.items()), flush=True)


if __name__ == "__main__":
    cli.run(main)
