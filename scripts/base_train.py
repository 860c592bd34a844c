"""Pretrain a model on text: the depth dial sets its shape and length, or --budget the clock."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nanozhchat import cli, compute, paths, sources
from nanozhchat.budget import measure_flops, micro_batch_tokens
from nanozhchat.compute import Compute
from nanozhchat.dataloader import DocumentLoader, eval_batches
from nanozhchat.engine import Engine
from nanozhchat.gpt import GPT
from nanozhchat.log import setup_logging
from nanozhchat.loss_eval import evaluate
from nanozhchat.objectives import next_token
from nanozhchat.optim import Optimizer, param_groups
from nanozhchat.prepare import load_or_train_tokenizer, prepare
from nanozhchat.recipe import (
    Overrides, Recipe, advise_vocab_size, depth_for_budget, explain, flops_per_token, model_sizes, resolve,
)  # fmt: skip
from nanozhchat.run import Run, gpt_config, open_run
from nanozhchat.sampling import SamplingParams
from nanozhchat.schedule import parse_duration
from nanozhchat.token_store import TokenStore
from nanozhchat.tokenizer import Tokenizer
from nanozhchat.trainer import Hook, Plan, TrainState, fit

log = logging.getLogger(__name__)
SAMPLE_PROMPTS = ("从前，", "中国的首都是", "问：3加5等于几？\n答：", "春天来了，")


@dataclass(frozen=True, kw_only=True)
class BaseTrainArgs:
    """Flags of this script."""

    depth: str = cli.opt("4", "layers; auto = chosen for --budget", group="dials")
    budget: str | None = cli.opt(None, "wall clock for the whole command, such as 10m or 2h", group="dials")
    data: tuple[str, ...] = cli.opt((), "data specs; none = $DATA_PATH, else builtin", group="data")
    val_data: tuple[str, ...] = cli.opt((), "held-out data from elsewhere; none = split off --data", group="data")
    text_field: str | None = cli.opt(None, "column or key of the text", group="data")
    tokenizer: str | None = cli.opt(None, "name of a tokenizer; none = one for this data, trained if need be", group="data")
    vocab_size: int | None = cli.opt(None, "tokens, if the tokenizer is yet to be trained; none = advised", group="data")
    model_tag: str | None = cli.opt(None, "name of the model; none = d<depth>", group="run")
    run: str = cli.opt("dummy", "wandb run name; dummy = off", group="run")
    resume: bool = cli.opt(True, "continue where an earlier run of the same command left off", group="run")
    seed: int = cli.opt(42, "of weights and data order", group="run")
    device_type: str = cli.opt("auto", "cuda, xpu, mps or cpu", group="machine")
    dtype: str = cli.opt("auto", "float32, bfloat16", group="machine")
    compile: bool | None = cli.opt(None, "torch.compile; none = on CUDA only", group="machine")
    grad_checkpoint: bool = cli.opt(False, "recompute activations: less memory, more time", group="machine")
    num_steps: int | None = cli.opt(None, "optimizer steps", group="horizon (one of them)")
    target_flops: float | None = cli.opt(None, "training FLOPs", group="horizon (one of them)")
    target_ratio: float | None = cli.opt(None, "tokens per scaling parameter", group="horizon (one of them)")
    max_seq_len: int | None = cli.opt(None, "context in tokens", group="overrides")
    window_pattern: str | None = cli.opt(None, "attention per layer: L full, S a quarter", group="overrides")
    device_batch_size: int | None = cli.opt(None, "rows per micro-step and rank", group="overrides")
    total_batch_size: int | None = cli.opt(None, "tokens per step", group="overrides")
    eval_every: int | None = cli.opt(None, "steps between evaluations; none = 10 times a run, 0 = never", group="hooks")
    eval_tokens: int = cli.opt(65536, "tokens scored per evaluation", group="hooks")
    save_every: int | None = cli.opt(None, "steps between checkpoints; none = 10 times a run, 0 = at the end", group="hooks")
    sample_every: int | None = cli.opt(None, "steps between samples; none = as evaluations, 0 = never", group="hooks")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, find the machine, train."""
    started = time.monotonic()
    args = cli.parse(BaseTrainArgs, argv, __doc__ or "", "python -m scripts.base_train")
    setup_logging(int(os.environ.get("RANK", 0)))
    if args.depth != "auto" and not args.depth.isdecimal():
        raise ValueError(f"--depth={args.depth!r} must be a whole number or auto")
    if args.depth == "auto" and not args.budget:
        raise ValueError("--depth=auto needs --budget, such as --budget=10m")
    with compute.start(args.device_type, args.dtype, measure=args.budget is not None) as comp:
        train(args, comp, started)


def train(args: BaseTrainArgs, comp: Compute, started: float) -> None:
    """Decide the recipe, prepare data, train, save."""
    seconds = parse_duration(args.budget) if args.budget else None
    speed = measure_flops(comp) if seconds else 0.0
    depth = int(args.depth) if args.depth != "auto" else depth_for_budget(seconds or 0.0, speed, args.vocab_size)
    if seconds:
        log.info("measured %.0f GFLOP/s in training; depth %d%s", speed / 1e9, depth,
                 " chosen for the budget" if args.depth == "auto" else "")  # fmt: skip
    specs = sources.resolve_specs(args.data)
    vocab = args.vocab_size or advise_vocab_size(depth)
    name, tokenizer = load_or_train_tokenizer(args.tokenizer, vocab, specs, comp, text_field=args.text_field)
    store = prepare(specs, tokenizer, comp, text_field=args.text_field)
    held_out = prepare(args.val_data, tokenizer, comp, text_field=args.text_field) if args.val_data else store

    def make_recipe() -> Recipe:
        names = Overrides.__dataclass_fields__
        overrides = Overrides(**{n: getattr(args, n) for n in names})
        sizes = model_sizes(depth, tokenizer.vocab_size, overrides)
        tokens = seconds * speed / flops_per_token(sizes) if seconds else None
        micro = micro_batch_tokens(comp, depth, sizes["n_embd"])
        return resolve(depth, vocab_size=tokenizer.vocab_size, world_size=comp.world_size, overrides=overrides,
                       micro_batch_tokens=micro, budget_s=seconds, budget_tokens=tokens)  # fmt: skip

    ignored = {"run", "resume", "device_type", "dtype", "compile", "grad_checkpoint", "eval_every", "eval_tokens",
               "save_every", "sample_every", "device_batch_size", "data", "val_data", "tokenizer", "vocab_size"}  # fmt: skip
    flags = {k: v for k, v in cli.set_flags(args).items() if k not in ignored}
    identity = {**flags, "tokenizer": name, "tokenizer_hash": tokenizer.hash, "data_hash": store.hash}
    tag = args.model_tag or f"d{depth}"
    with open_run("base", tag, identity, comp, resume=args.resume, wandb_run=args.run, config=flags) as run:
        if run.state.finished:
            log.info("%s is already trained (%d steps); --no-resume trains it again", run.folder, run.state.step)
            return
        recipe = run.recipe(make_recipe)
        for field, value, formula in explain(recipe):
            log.info("  %-20s %14s  %s", field, value, formula)
        if comp.is_main:
            cli.write_config(run.folder / "config.yaml", args)
        state = train_run(args, run, recipe, tokenizer, store, held_out, started)
    log.info("done: %d steps, %.1f M tokens in %.0f s, saved in %s", state.step, state.tokens / 1e6, state.time_s, run.folder)


def train_run(
    args: BaseTrainArgs, run: Run, recipe: Recipe, tokenizer: Tokenizer, store: TokenStore, held_out: TokenStore,
    started: float,
) -> TrainState:  # fmt: skip
    """Build model, optimizer, loader and hooks, and fit."""
    comp = run.compute
    model = GPT(gpt_config(recipe), dtype=comp.dtype, grad_checkpoint=args.grad_checkpoint)
    model.init_weights(torch.Generator().manual_seed(args.seed))
    model.to(comp.device)
    optimizer = Optimizer(param_groups(model, recipe), comp)
    if run.saved is not None:
        run.restore(model, optimizer)
    loader = DocumentLoader(store, "train", batch_rows=recipe.device_batch_size, sequence_len=recipe.sequence_len,
                            bos_id=tokenizer.bos_id, rank=comp.rank, world_size=comp.world_size, seed=args.seed,
                            device=comp.device)  # fmt: skip
    if run.state.loader:
        loader.load_state_dict(run.state.loader)
    token_bytes = torch.from_numpy(tokenizer.token_bytes()).to(comp.device)
    engine = Engine(model, tokenizer)  # before compiling: generation has its own shapes
    if args.compile or (args.compile is None and comp.device.type == "cuda"):
        model.compile_training()

    def evaluation(state: TrainState) -> dict[str, float]:
        batches = eval_batches(held_out, "val", batch_rows=recipe.device_batch_size, sequence_len=recipe.sequence_len,
                               bos_id=tokenizer.bos_id, max_tokens=args.eval_tokens, rank=comp.rank,
                               world_size=comp.world_size, device=comp.device)  # fmt: skip
        result = evaluate(model, batches, token_bytes, comp)
        state.best_val = result.bpb if state.best_val is None else min(state.best_val, result.bpb)
        return {"val/loss": result.loss, "val/bpb": result.bpb, "val/ppl": result.ppl}

    def sampling(state: TrainState) -> dict[str, float]:
        if comp.is_main and state.step > 0:
            prompts = [[tokenizer.bos_id, *tokenizer.encode(p)] for p in SAMPLE_PROMPTS]
            params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=48, seed=state.step)
            model.eval()
            for prompt, text in zip(SAMPLE_PROMPTS, engine.complete(prompts, params), strict=True):
                run.metrics.sample({"step": state.step, "prompt": prompt, "text": text})
            model.train()
        return {}

    tenth = max(1, recipe.num_steps // 10)
    eval_every = tenth if args.eval_every is None else args.eval_every
    hooks = [Hook(eval_every, evaluation), Hook(eval_every if args.sample_every is None else args.sample_every, sampling)]
    plan = Plan(recipe=recipe, token_bytes=token_bytes, save=run.saver(model, optimizer, recipe), started=started,
                save_every=tenth if args.save_every is None else args.save_every)  # fmt: skip
    return fit(model, optimizer, loader, next_token, plan, hooks, run.state, comp, run.metrics)


if __name__ == "__main__":
    cli.run(main)
