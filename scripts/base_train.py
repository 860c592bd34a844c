"""Pretrain a model on text: the depth dial sets its shape and length, or --budget the clock."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from nanozhchat import cli, hardware
from nanozhchat.recipe import Overrides


@dataclass(frozen=True, kw_only=True)
class BaseTrainArgs(cli.RunFlags):
    depth: str = cli.opt("4", "layers; auto = chosen for --budget", group="dial")
    data: tuple[str, ...] = cli.opt((), "specs; none = $DATA_PATH, else builtin", group="data", neutral=True)
    val_data: tuple[str, ...] = cli.opt((), "held-out data; none = split off --data", group="data", neutral=True)
    text_field: str | None = cli.opt(None, "column or key of the text", group="data")
    tokenizer: str | None = cli.opt(None, "its name; none = trained on the data", group="data", neutral=True)
    vocab_size: int | None = cli.opt(None, "of a new tokenizer; none = advised", group="data", neutral=True)
    compile: bool | None = cli.opt(None, "torch.compile; none = on CUDA only", group="machine", neutral=True)
    fp8: bool = cli.opt(False, "8-bit matmuls, for GPUs from compute capability 8.9", group="machine")
    grad_checkpoint: bool = cli.opt(False, "recompute activations: saves memory", group="machine", neutral=True)
    target_flops: float | None = cli.opt(None, "training FLOPs", group=cli.HORIZON)
    target_ratio: float | None = cli.opt(None, "tokens per scaling parameter", group=cli.HORIZON)
    max_seq_len: int | None = cli.opt(None, "context in tokens", group="overrides")
    init_from: str | None = cli.opt(None, "weights to start from: of scripts.export, or GPT-2", group="overrides")
    arch: str | None = cli.opt(None, "plain = exports to other software", group="overrides", choices=("full", "plain"))
    ngrams: bool = cli.opt(True, "short runs on real text: n-gram counts help", group="overrides")
    window_pattern: str | None = cli.opt(None, "attention per layer: L full, S a quarter", group="overrides")
    device_batch_size: int | None = cli.opt(None, "rows per micro-step and rank", group="overrides", neutral=True)
    total_batch_size: int | None = cli.opt(None, "tokens per step", group="overrides")
    eval_tokens: int | None = cli.opt(None, "scored per evaluation; none = 65536, fewer in short runs", group="hooks",
                                      neutral=True)  # fmt: skip
    prompts: tuple[str, ...] = cli.opt(("从前，", "中国的首都是", "问：3加5等于几？\n答：", "春天来了，"),
                                       "beginnings that samples continue", group="hooks", neutral=True)  # fmt: skip
    sample_every: int | None = cli.opt(None, "steps between samples; none = as eval-every", group="hooks", neutral=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth != "auto" and not (self.depth.isdecimal() and int(self.depth)):
            raise ValueError(f"--depth={self.depth!r} must be a whole number from 1 or auto")
        if self.depth == "auto" and not self.budget:
            raise ValueError("--depth=auto needs --budget, such as --budget=10m")
        self.overrides()

    def overrides(self) -> Overrides:
        """Return what these flags set of the recipe."""
        return Overrides(**{name: getattr(self, name) for name in Overrides.__dataclass_fields__})


cli.check(__name__, BaseTrainArgs)

from nanozhchat import budget, compute, export, gpt2, hooks, paths, sources
from nanozhchat.compute import Compute
from nanozhchat.dataloader import Prefetch, document_loader, eval_batches
from nanozhchat.engine import Engine
from nanozhchat.log import setup_logging
from nanozhchat.objectives import next_token
from nanozhchat.optim import Optimizer, param_groups
from nanozhchat.prepare import adopt_tokenizer, load_or_train_tokenizer, prepare
from nanozhchat.recipe import Recipe, advise_vocab_size, depth_for_budget, explain
from nanozhchat.run import Run, open_run, refuse_busy
from nanozhchat.token_store import TokenStore
from nanozhchat.tokenizer import Tokenizer
from nanozhchat.trainer import fit

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, find the machine, train."""
    started = hardware.command_start(argv)
    args = cli.parse(BaseTrainArgs, argv)
    setup_logging()
    sources.inputs((*sources.resolve_specs(args.data), *args.val_data))  # errors come before the machine is measured
    if args.tokenizer:
        Tokenizer.load(paths.tokenizer_dir(args.tokenizer))
    export.sizes_of(args.init_from, args.tokenizer, args.depth if args.depth != BaseTrainArgs.depth else None)
    refuse_busy("base", args.model_tag)
    with compute.start(args.device_type, args.dtype, measure=args.budget is not None, tf32=args.tf32) as comp:
        train(args, comp, started)


def train(args: BaseTrainArgs, comp: Compute, started: float) -> None:
    """Decide the depth, prepare data, open the run, train."""
    speed = budget.measure_flops(comp) if args.seconds else 0.0
    depth = int(args.depth) if args.depth != "auto" else depth_for_budget(args.seconds or 0.0, speed, args.vocab_size)
    overrides, tokenizer_name = args.overrides(), args.tokenizer
    if theirs := export.sizes_of(args.init_from, tokenizer_name):
        depth, context = theirs.n_layer, args.max_seq_len or theirs.sequence_len
        overrides = replace(overrides, max_seq_len=context, arch="plain" if theirs.plain else args.arch)
        log.info("depth %d, context %d: those of --init-from=%s", depth, context, args.init_from)
        tokenizer_name = tokenizer_name or adopt_tokenizer(Path(str(args.init_from)), comp)
    if args.seconds:
        log.info("measured %.0f GFLOP/s in training: depth %d for --depth=%s", speed / 1e9, depth, args.depth)
    specs = sources.resolve_specs(args.data)
    vocab = args.vocab_size or advise_vocab_size(depth)
    name, tokenizer = load_or_train_tokenizer(tokenizer_name, vocab, specs, comp, text_field=args.text_field)
    store = prepare(specs, tokenizer, comp, text_field=args.text_field)
    held_out = prepare(args.val_data, tokenizer, comp, text_field=args.text_field) if args.val_data else store
    identity = {"tokenizer": name, "tokenizer_hash": tokenizer.hash, "data_hash": store.hash}
    with open_run("base", args.model_tag or f"d{depth}", identity, comp, flags=args) as run:
        if run.state.finished:
            return
        easy = all(sources.parse(spec).endless for spec in specs)  # generated: a network soon beats any counts
        corpus = 0 if easy or args.init_from or not args.ngrams else store.n_tokens("train")
        plan = partial(budget.plan, depth, tokenizer.vocab_size, overrides, comp, seconds=args.seconds, speed=speed)
        recipe = run.recipe(lambda: gpt2.reshape(plan(corpus_tokens=corpus), theirs))
        for field, value, formula in explain(recipe):
            log.info("  %-20s %14s  %s", field, value, formula)
        compute.require_memory(recipe.memory_bytes, comp.device)
        train_run(args, run, recipe, tokenizer, (store, held_out), started)


def train_run(
    args: BaseTrainArgs, run: Run, recipe: Recipe, tokenizer: Tokenizer, stores: Sequence[TokenStore], started: float
) -> None:
    """Build model, optimizer, loader and hooks, and fit. stores: to train on, and to validate on."""
    comp, (store, held_out) = run.compute, stores
    model = run.new_model(recipe, store, tokenizer, args.seed, args.init_from, grad_checkpoint=args.grad_checkpoint)
    if args.init_from and run.saved is None and not model.config.gpt2:
        export.fill_from_folder(model, tokenizer, args.init_from)
    if args.fp8:
        log.info("fp8: %d matrices of the blocks", model.multiply_in_fp8(emulate=compute.must_emulate_fp8(comp.device)))
    optimizer = Optimizer(param_groups(model, recipe), comp)
    if run.saved is not None:
        run.saved.restore(model, optimizer)
    shape: dict[str, Any] = {**run.loader_shape(recipe), "bos_id": tokenizer.bos_id}
    loader = Prefetch(document_loader(store, "train", seed=args.seed, **shape))
    if run.state.loader:
        loader.seek(run.state.loader, recipe.device_batch_size)
    if args.compile or (args.compile is None and comp.device.type == "cuda"):
        model.compile_training()
    tenth = max(1, recipe.num_steps // 10)
    eval_every, save_every = (tenth if x is None else x for x in (args.eval_every, args.save_every))
    sample_every = eval_every if args.sample_every is None else args.sample_every
    few = min(65536, max(8192, recipe.train_tokens // 128))  # eleven of these take about a thirtieth of the run
    batches = partial(eval_batches, held_out, "val", max_tokens=args.eval_tokens or few, **shape)
    plan = run.plan(model, optimizer, recipe, tokenizer.token_bytes(), started=started, save_every=save_every)
    actions = [hooks.evaluation(eval_every, model, batches, plan.token_bytes, comp, plan.stop),
               hooks.sampling(sample_every, Engine(model, tokenizer), args.prompts, run.metrics, comp)]  # fmt: skip
    fit(model, optimizer, loader, next_token, plan, actions, run.state, comp, run.metrics)


if __name__ == "__main__":
    cli.run(main)
