"""Held-out bits per byte and perplexity of a model, beside gzip and xz on the same bytes; benchmarks; samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanozhchat import cli, paths


@dataclass(frozen=True, kw_only=True)
class BaseEvalArgs(cli.ModelFlags):
    source: str | None = cli.opt("base", "stage", group="model", choices=paths.STAGES)
    eval: str = cli.opt("bpb,sample", "what to do, comma-separated: bpb, core, sample")
    data: tuple[str, ...] = cli.opt((), "data whose held-out part is scored; none = $DATA_PATH, else builtin")
    text_field: str | None = cli.opt(None, "column or key of the text")
    eval_tokens: int = cli.opt(1 << 20, "tokens scored at most")
    core_tasks: tuple[str, ...] = cli.opt(("core-zh",), "benchmarks or groups of them; `chat_eval --list` shows them")
    task_data: str | None = cli.opt(None, "folder with the benchmarks' files as published; none = the hub")
    max_items: int = cli.opt(500, "questions per benchmark; 0 = all")
    unsafe_sandbox: bool = cli.opt(False, "run programs of the model however open the sandbox")
    shots: int | None = cli.opt(None, "examples before each question; none = each benchmark's own number")
    max_tokens: int = cli.opt(100, "length of each sample")
    json: str | None = cli.opt(None, "write the figures to this file")


cli.check(__name__, BaseEvalArgs)

import torch

from nanozhchat import chat, compute, files, sources, task_eval
from nanozhchat.compute import Compute
from nanozhchat.dataloader import eval_batches, eval_documents
from nanozhchat.log import setup_logging
from nanozhchat.loss_eval import compressor_bpb, evaluate
from nanozhchat.prepare import prepare
from nanozhchat.token_store import TokenStore
from tasks import registry
from tasks.base import Benchmark

KINDS = ("bpb", "core", "sample")
PROMPTS = ("从前，", "中国的首都是", "春天来了，", "小明对妈妈说：", "人工智能")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, load, score, print."""
    args = cli.parse(BaseEvalArgs, argv)
    setup_logging()
    kinds = args.eval.split(",")
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"--eval={args.eval}: unknown {', '.join(sorted(unknown))}; choose from {', '.join(KINDS)}")
    names, options = ",".join(args.core_tasks), {"folder": args.task_data, "shots": args.shots}
    asked = registry.benchmarks(names, args.max_items or None, **options) if "core" in kinds else []
    registry.guard(asked, args.unsafe_sandbox)
    with compute.start(args.device_type, "float32" if args.dtype == "int8" else args.dtype) as comp:
        model = chat.load(**args.where(device=comp.device.type))
        figures: dict[str, Any] = {"model": model.name, "source": model.source, "step": model.step}
        if "bpb" in kinds:
            store = prepare(sources.resolve_specs(args.data), model.tokenizer, comp, text_field=args.text_field)
            figures |= score(model, store, comp, args)
        if asked:
            figures["core"] = core(model, asked, comp)
        if comp.is_main:
            if "sample" in kinds:
                figures["samples"] = sample(model, args)
            place = paths.run_dir(model.source, model.name) / "base_eval.json"
            before = files.read_json(place) if place.exists() else {}
            kept = before if before.get("step") == model.step else {}
            files.write_json(place, {**kept, **figures})
            cli.write_figures(args.json, figures)


def score(model: chat.Chat, store: TokenStore, comp: Compute, args: BaseEvalArgs) -> dict[str, Any]:
    """Score held-out documents, and compress the same documents for comparison."""
    tokenizer = model.tokenizer
    token_bytes = torch.from_numpy(tokenizer.token_bytes()).to(comp.device)
    shape = {"batch_rows": 8, "sequence_len": model.engine.context, "bos_id": tokenizer.bos_id}
    batches = eval_batches(store, "val", max_tokens=args.eval_tokens, rank=comp.rank, world_size=comp.world_size,
                           device=comp.device, **shape)  # fmt: skip
    result = evaluate(model.engine.scorer(), batches, token_bytes, comp)
    order, counts = eval_documents(store, "val", args.eval_tokens)
    scored = (store.doc("val", int(i))[:n].tolist() for i, n in zip(order, counts, strict=True))
    text = b"".join(map(tokenizer.decode_bytes, scored))
    baselines, chars = compressor_bpb(text), len(text.decode("utf-8", "ignore"))
    bpc = result.bpb * result.bytes / max(1, chars)
    if comp.is_main:
        print(f"held-out: {result.bytes:,} bytes, {chars:,} characters, {result.tokens:,} tokens")
        print(f"  {model.name} ({model.source}, step {model.step}): {result.bpb:.4f} bits per byte, "
              f"{bpc:.4f} per character, perplexity {result.ppl:.2f} per token")  # fmt: skip
        for name, bpb in baselines.items():
            print(f"  {name} -9 on the same bytes: {bpb:.4f} bits per byte ({bpb - result.bpb:+.4f} against the model)")
    return {**vars(result), "bpc": bpc, "chars": chars, "baselines": baselines}


def core(model: chat.Chat, tasks: Sequence[Benchmark], comp: Compute) -> dict[str, Any]:
    """Score benchmarks by likelihood; a group whose tasks are all there gets the mean of their centred scores."""
    scores: dict[str, task_eval.Score] = {}
    for task in tasks:
        s = scores[task.name] = task_eval.summarize(task_eval.run_text(model, task, comp), task.chance)
        if comp.is_main:
            cut = f"  {s.cut} cut to the context" if s.cut else ""
            print(f"{task.name:<20} {s.score:6.1%}  [{s.low:.1%}, {s.high:.1%}]  chance {s.chance:.1%}  "
                  f"centred {s.centred:+.3f}  n={s.n}{cut}", flush=True)  # fmt: skip
    means = {g: task_eval.core(scores[n] for n in registry.GROUPS[g]) for g in ("core-zh", "core")
             if set(registry.GROUPS[g]) <= scores.keys()}  # fmt: skip
    if comp.is_main:
        for group, mean in means.items():
            print(f"{group:<20} {mean:+.4f} (mean of centred scores)")
    return {**means, "tasks": {name: vars(s) for name, s in scores.items()}}


def sample(model: chat.Chat, args: BaseEvalArgs) -> list[dict[str, str]]:
    """Continue a few beginnings and print them."""
    params: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "max_tokens": args.max_tokens, "seed": 1}
    rows = [{"prompt": prompt, "text": model(prompt, **params)} for prompt in PROMPTS]
    print("\n\n".join(f"{row['prompt']}|{row['text']}" for row in rows) + "\n")
    return rows


if __name__ == "__main__":
    cli.run(main)
