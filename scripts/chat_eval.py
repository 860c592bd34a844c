"""Score a chat model on tasks, with chance level and 95 % interval for each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanozhchat import cli


@dataclass(frozen=True, kw_only=True)
class ChatEvalArgs(cli.ModelFlags):
    tasks: tuple[str, ...] = cli.opt(("builtin",), "tasks or groups of tasks; --list shows them")
    list: bool = cli.opt(False, "list the benchmarks with licence, files and source, and the groups")
    task_data: str | None = cli.opt(None, "folder with the benchmarks' files as published; none = the hub")
    num_questions: int = cli.opt(100, "questions per task; 0 = all of a benchmark")
    max_tokens: int = cli.opt(256, "longest answer")
    unsafe_sandbox: bool = cli.opt(False, "run programs of the model however open the sandbox")
    show: int = cli.opt(0, "print this many questions per task with expected and given answers")
    json: str | None = cli.opt(None, "write the scores to this file")


cli.check(__name__, ChatEvalArgs)

from nanozhchat import chat, compute, files, paths
from nanozhchat.builtin import is_refusal
from nanozhchat.compute import Compute
from nanozhchat.log import setup_logging
from nanozhchat.sampling import SamplingParams
from nanozhchat.task_eval import run_task, summarize
from nanozhchat.text_quality import quality
from tasks import registry

CLOSE = 0.1  # to blind guessing
STORIES = "builtin:story"  # the task whose answers are long enough to repeat themselves


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, load, ask, print."""
    args = cli.parse(ChatEvalArgs, argv)
    setup_logging()
    if args.list:
        print(registry.table())
        return
    tasks = registry.resolve(",".join(args.tasks), args.num_questions or None, folder=args.task_data)
    registry.guard(tasks, args.unsafe_sandbox)
    with compute.start(args.device_type, "float32" if args.dtype == "int8" else args.dtype) as comp:
        model = chat.load(**args.where(device=comp.device.type))
        if comp.is_main and args.model_tag is None:
            print(f"the latest model: {model.name}, {model.source}, step {model.step}", flush=True)
        figures = evaluate(model, tasks, comp, args)
        if comp.is_main:
            folder = paths.run_dir(model.source, model.name)
            whole = registry.OWN.keys() <= figures["tasks"].keys()  # what the report shows; a part never replaces it
            files.write_json(folder / ("chat_eval.json" if whole else "benchmarks.json"), figures)
            cli.write_figures(args.json, {k: figures[k] for k in ("overall", "tasks", "refusal", "stories")})


def evaluate(model: chat.Chat, tasks: Sequence[Any], comp: Compute, args: ChatEvalArgs) -> dict[str, Any]:
    """Score every task; refusals are counted where a task says which questions can be answered."""
    scores: dict[str, dict[str, float]] = {}
    examples: dict[str, list[dict[str, Any]]] = {}
    refused: dict[bool, list[bool]] = {True: [], False: []}
    stories: dict[str, float] | None = None
    for task in tasks:
        answers = run_task(model, task, comp, SamplingParams(temperature=0.0, max_tokens=args.max_tokens))
        scores[task.name] = vars(summarize(answers, task.chance))
        examples[task.name] = [vars(a) for a in answers[:10]]
        if hasattr(task, "answerable"):
            for i, answer in enumerate(answers):
                refused[task.answerable(i)].append(is_refusal(answer.given))
        if comp.is_main:
            s = scores[task.name]
            print(f"{task.name:<24} {s['score']:6.1%}  [{s['low']:.1%}, {s['high']:.1%}]  chance {s['chance']:.1%}  "
                  f"n={s['n']}", flush=True)  # fmt: skip
            for a in answers[: args.show]:
                mark = "ok" if a.correct else "NO"
                print(f"  [{mark}] {a.question}\n       expected: {a.expected}\n       given:    {a.given}")
        if task.name == STORIES:
            as_people_get_them = SamplingParams(max_tokens=args.max_tokens, seed=0)
            stories = quality([a.given for a in run_task(model, task, comp, as_people_get_them)])
    overall = sum(s["score"] for s in scores.values()) / len(scores)
    rate = {k: sum(v) / len(v) if v else None for k, v in refused.items()}
    if comp.is_main:
        print(f"{'overall (mean of tasks)':<24} {overall:6.1%}")
        chance = sum(s["chance"] for s in scores.values()) / len(scores)
        if overall < chance + CLOSE:
            print(f"close to blind guessing ({chance:.1%}): this model has not learnt enough; train longer")
        if rate[False] is not None and rate[True] is not None:
            print(f"refused: {rate[False]:.1%} of unknowable, {rate[True]:.1%} of knowable questions")
    if comp.is_main and stories:
        print("sampled stories: " + ", ".join(f"{name} {value:.1%}" for name, value in stories.items()))
    return {"overall": overall, "tasks": scores, "refusal": {"unknowable": rate[False], "knowable": rate[True]},
            "stories": stories, "step": model.step, "examples": examples}  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
