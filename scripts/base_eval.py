"""Held-out bits per byte and perplexity of a model, beside gzip and xz on the same bytes, and samples."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanozhchat import chat, cli, compute, files, paths, sources
from nanozhchat.compute import Compute
from nanozhchat.dataloader import eval_batches, eval_documents
from nanozhchat.log import setup_logging
from nanozhchat.loss_eval import compressor_bpb, evaluate
from nanozhchat.prepare import prepare
from nanozhchat.token_store import TokenStore

KINDS = ("bpb", "sample")
PROMPTS = ("从前，", "中国的首都是", "春天来了，", "小明对妈妈说：", "人工智能")


@dataclass(frozen=True, kw_only=True)
class BaseEvalArgs:
    """Flags of this script."""

    model_tag: str | None = cli.opt(None, "name of the model; none = the latest")
    source: str = cli.opt("base", "stage", choices=paths.STAGES)
    step: int | None = cli.opt(None, "checkpoint; none = the newest")
    eval: str = cli.opt("bpb,sample", "what to do, comma-separated: bpb, sample")
    data: tuple[str, ...] = cli.opt((), "data whose held-out part is scored; none = $DATA_PATH, else builtin")
    text_field: str | None = cli.opt(None, "column or key of the text")
    eval_tokens: int = cli.opt(1 << 20, "tokens scored at most")
    max_tokens: int = cli.opt(100, "length of each sample")
    device_type: str = cli.opt("auto", "cuda, xpu, mps or cpu")
    dtype: str = cli.opt("auto", "float32, bfloat16, or int8 for native decoding")
    json: str | None = cli.opt(None, "write the figures to this file")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, load, score, print."""
    args = cli.parse(BaseEvalArgs, argv, __doc__ or "", "python -m scripts.base_eval")
    setup_logging(int(os.environ.get("RANK", 0)))
    kinds = args.eval.split(",")
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"--eval={args.eval}: unknown {', '.join(sorted(unknown))}; choose from {', '.join(KINDS)}")
    with compute.start(args.device_type, "float32" if args.dtype == "int8" else args.dtype) as comp:
        model = chat.load(args.model_tag, source=args.source, step=args.step, device=comp.device.type, dtype=args.dtype)
        figures: dict[str, Any] = {"model": model.name, "source": model.source, "step": model.step}
        if "bpb" in kinds:
            store = prepare(sources.resolve_specs(args.data), model.tokenizer, comp, text_field=args.text_field)
            figures |= score(model, store, comp, args)
        if comp.is_main:
            if "sample" in kinds:
                figures["samples"] = sample(model, args)
            files.write_json(paths.run_dir(model.source, model.name) / "base_eval.json", figures)
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
    baselines = compressor_bpb(b"".join(map(tokenizer.decode_bytes, scored)))
    if comp.is_main:
        print(f"held-out: {result.bytes:,} bytes, {result.tokens:,} tokens")
        print(f"  {model.name} ({model.source}, step {model.step}): {result.bpb:.4f} bits per byte, "
              f"perplexity {result.ppl:.2f} per token")  # fmt: skip
        for name, bpb in baselines.items():
            print(f"  {name} -9 on the same bytes: {bpb:.4f} bits per byte ({bpb - result.bpb:+.4f} against the model)")
    return {**vars(result), "baselines": baselines}


def sample(model: chat.Chat, args: BaseEvalArgs) -> list[dict[str, str]]:
    """Continue a few beginnings and print them."""
    rows = []
    for prompt in PROMPTS:
        text = model(prompt, temperature=0.8, top_p=0.95, max_tokens=args.max_tokens, seed=1)
        print(f"{prompt}|{text}\n")
        rows.append({"prompt": prompt, "text": text})
    return rows


if __name__ == "__main__":
    cli.run(main)
