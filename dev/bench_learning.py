"""Bits per byte after a number of seconds, beside counting and other recipes: python -m dev.bench_learning --data DIR.

DIR holds at least eight shards of web text (*.jsonl.gz). All but the last train; 240 KB of the last are scored: the
first 10 KB of every twelfth document. Each run is `scripts.base_train --budget` in an empty folder and a process of its
own: starting Python, training the tokenizer, tokenizing, counting and initialising are in its seconds, scoring is not.
"""

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanozhchat import chat, cli, compute, files, loss_eval, ngram_counts, optim, packing, paths, recipe, records
from nanozhchat.compute import Compute
from nanozhchat.dataloader import eval_batches
from nanozhchat.gpt import GPT
from nanozhchat.prepare import prepare
from scripts import base_train

OUR_ROW = packing.Packer.next_row
VAL_BYTES, DOC_BYTES, EVERY_DOC = 240_000, 10_000, 12


@dataclass(frozen=True, kw_only=True)
class BenchArgs:
    data: str = cli.opt("", "folder of the shards")
    seconds: int = cli.opt(200, "wall clock of each run")
    seeds: tuple[int, ...] = cli.opt((1, 2, 3), "one run each; medians are printed")
    threads: int = cli.opt(1, "threads of each run")
    depth: str = cli.opt("4", "layers, or auto")
    preset: str = cli.opt("ours", "whose recipe", choices=("ours", "network", "nanochat", "adamw"))
    json: str | None = cli.opt(None, "write the figures to this file")


def nanochat() -> list[str]:
    """Its published rules for a CPU: rates by the square root of the batch, 16,384 tokens a step, cropping packer."""
    recipe.LR_EXPONENT_SMALL, recipe.SCALAR_LR, recipe.MOMENTUM_PEAK = 0.5, 0.5, 0.97
    packing.Packer.next_row = _cropped_row  # type: ignore[method-assign]
    return ["--no-ngrams", "--total-batch-size=16384"]


def _cropped_row(self: packing.Packer) -> list[packing.Piece]:
    """Best fit; when nothing fits, the shortest document of the buffer is cropped and its rest thrown away."""
    if not self.endless:
        return OUR_ROW(self)  # what is scored stays whole
    space, row = self.capacity, []
    self.rows += 1
    while space > 0:
        self.refill()
        fits = [i for i, piece in enumerate(self.buffer) if piece[0] + 1 <= space]
        length, doc, start = self.buffer.pop(fits[-1] if fits else 0)
        row.append((min(length, space - 1), doc, start))
        space -= row[-1][0] + 1
    return row


def adamw() -> list[str]:
    """GPT-2's: AdamW with 6e-4 for all weights, 0.1 weight decay, a plain network, 8,192 tokens a step."""
    groups = optim.param_groups

    def all_adamw(model: Any, plan: recipe.Recipe) -> list[optim.ParamGroup]:
        same: dict[str, Any] = {"kind": "adamw", "lr": 6e-4, "betas": (0.9, 0.95)}
        return [replace(g, **same, weight_decay=0.1 if g.kind == "muon" else 0.0) for g in groups(model, plan)]

    base_train.param_groups = all_adamw
    return ["--no-ngrams", "--arch=plain", "--total-batch-size=8192"]


PRESETS: dict[str, Callable[[], list[str]]] = {
    "ours": lambda: [], "network": lambda: ["--no-ngrams"], "nanochat": nanochat, "adamw": adamw
}  # fmt: skip


def shards_of(data: str) -> list[str]:
    """The files of --data, of which the last is held out."""
    shards = [str(path) for path in sorted(Path(data).glob("*.jsonl.gz"))]
    if len(shards) < 2:
        raise ValueError(f"--data={data!r} must be a folder with at least two *.jsonl.gz shards")
    return shards


def sample(shard: Path) -> list[str]:
    left, texts = VAL_BYTES, []
    for i, record in enumerate(records.read_file(shard, stats=records.ReadStats())):
        if i % EVERY_DOC == 0:
            texts.append(record.value["text"].encode()[: min(left, DOC_BYTES)].decode(errors="ignore"))
            left -= len(texts[-1].encode())
    return [text for text in texts if text]


def train(preset: str, argv: list[str]) -> None:
    sys.argv[1:] = [*argv, *PRESETS[preset]()]
    base_train.main()


def run_apart(tag: str, work: Callable[..., None], *args: Any) -> list[dict[str, Any]]:
    """Train in a process of its own; returns the rows of its metrics.jsonl."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"training {tag} ended with exit code {process.exitcode}")
    return files.read_jsonl(paths.run_dir("base", tag) / "metrics.jsonl")


def one_run(args: BenchArgs, shards: list[str], texts: list[str], seed: int) -> dict[str, Any]:
    """Train in an empty $NANOZHCHAT_BASE_DIR and score."""
    flags = {"budget": f"{args.seconds}s", "depth": args.depth, "seed": seed, "model-tag": "bench",
             "device-type": "cpu", "eval-tokens": 8192, "sample-every": 0, "save-every": 0}  # fmt: skip
    argv = [*(f"--{name}={value}" for name, value in flags.items()), "--data", *shards]
    began = time.monotonic()
    rows = run_apart("bench", train, args.preset, argv)
    seconds = time.monotonic() - began
    model = chat.load("bench", source="base", device="cpu", engine="torch")
    steps = [row for row in rows if row.get("tok_per_sec")]
    median = {name: statistics.median(row[name] for row in steps) for name in ("tok_per_sec", "mfu")}
    return {
        "seed": seed, "bpb": score(model, texts), "seconds": seconds, **median, "steps": steps[-1]["step"],
        "bytes_per_sec": median["tok_per_sec"] * steps[-1]["bytes"] / steps[-1]["tokens"],
        "peak_rss_bytes": max(row["mem_bytes"] for row in steps), **step_times(model.engine.model),
        "curve": [(round(row["time_s"]), round(row["val/bpb"], 4)) for row in rows if row.get("val/bpb")],
    }  # fmt: skip


def score(model: chat.Chat, texts: list[str]) -> float:
    tokenizer = model.tokenizer
    documents = [tokenizer.encode(text) for text in texts]
    batches = eval_batches(documents, batch_rows=4, sequence_len=model.engine.context, bos_id=tokenizer.bos_id)
    token_bytes = torch.from_numpy(tokenizer.token_bytes())
    return loss_eval.evaluate(model.engine.model, batches, token_bytes, Compute(torch.device("cpu"))).bpb


def step_times(model: GPT, repeats: int = 5) -> dict[str, float]:
    """Where a step's time goes: milliseconds of forward and backward, of the update, and FLOP/s of a matmul."""
    c, dtype = model.config, compute.detect_dtype(torch.device("cpu"), None, measure=True)[0]
    plan = recipe.resolve(c.n_layer, vocab_size=c.vocab_size, budget_tokens=1e6)
    model.dtype, model.ngram_trust = dtype, 0.5 * bool(c.ngrams)
    optimizer = optim.Optimizer(optim.param_groups(model.train(), plan), Compute(torch.device("cpu"), dtype=dtype))
    idx = torch.arange(plan.total_batch_size).view(-1, c.sequence_len) % c.vocab_size
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        model(idx, idx).backward()
        middle = time.perf_counter()
        optimizer.reduce(1 / idx.numel())
        optimizer.apply(1 / idx.numel(), lr_multiplier=1e-6, momentum=0.9, decay_multiplier=0.0)
        times.append((1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)))
    passes, update = (statistics.median(column) for column in zip(*times, strict=True))
    peaks = {name: compute.matmul_flops(torch.device("cpu"), getattr(torch, name)) for name in ("float32", "bfloat16")}
    achieved = plan.flops_per_token * idx.numel() / (passes + update) * 1e3
    return {"passes_ms": passes, "update_ms": update, "model_flops": achieved,
            **{f"matmul_{name}": peak for name, peak in peaks.items()}}  # fmt: skip


def yardsticks(shards: list[str], texts: list[str]) -> dict[str, float]:
    """Bits per byte of Kneser-Ney counts over all training tokens of the run before, by order."""
    tokenizer = chat.load("bench", source="base", device="cpu", engine="torch").tokenizer
    store = prepare(shards, tokenizer, Compute(torch.device("cpu")))
    tokens = ngram_counts.unread(store, store.n_tokens("train") * 2, 0, tokenizer.bos_id)
    found, token_bytes = {}, tokenizer.token_bytes()
    ngram_counts.MIN_COUNTS = dict.fromkeys(range(2, 5), 1)
    for order, name in ((2, "bigram"), (3, "trigram"), (4, "fourgram")):
        ngram_counts.ngram_order = lambda _, order=order: order  # type: ignore[misc]
        counts = ngram_counts.count(tokens, tokenizer.vocab_size)
        bits, n_bytes = 0.0, 0
        for text in texts:
            ids = torch.tensor([tokenizer.bos_id, *tokenizer.encode(text)])
            p, _ = counts.probability(counts.contexts(ids[None, :-1])[0], ids[1:])
            bits, n_bytes = bits - float(p.log2().sum()), n_bytes + int(token_bytes[ids[1:].numpy()].sum())
        found[f"{name}_bpb"] = bits / n_bytes
    ids = np.concatenate([tokenizer.encode(text) for text in texts])
    share = (np.bincount(tokens, minlength=tokenizer.vocab_size) + 1) / (len(tokens) + tokenizer.vocab_size)
    return {"unigram_bpb": float(-np.log2(share[ids]).sum() / token_bytes[ids].sum()), **found}


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse(BenchArgs, argv)
    shards = shards_of(args.data)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    texts, runs, counted = sample(Path(shards.pop())), [], {}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["NANOZHCHAT_BASE_DIR"] = folder
            runs.append(one_run(args, shards, texts, seed))
            counted = counted or yardsticks(shards, texts)
        print(json.dumps(runs[-1]), flush=True)
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0] if name not in ("seed", "curve")}
    figures = {"preset": args.preset, **medians, **counted, "runs": runs}
    for name, value in figures.items():
        if isinstance(value, float):
            print(f"{name:16} {value:,.4g}")
    cli.write_figures(args.json, figures)


if __name__ == "__main__":
    cli.run(main)
