"""Fine-tune a model on conversations, of which only the assistant's tokens are learnt, or on preferred answers."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanozhchat import cli, hardware
from nanozhchat.recipe import OBJECTIVES


@dataclass(frozen=True, kw_only=True)
class ChatSFTArgs(cli.RunFlags):
    data: tuple[str, ...] = cli.opt(("builtin",), "builtin, builtin:<skill>, presets or files", group="data",
                                    neutral=True)  # fmt: skip
    max_conversations: int = cli.opt(20000, "how many to use at most (built-in ones are endless)", group="data")
    epochs: float | None = cli.opt(None, "passes over the data; none = 1", group=cli.HORIZON)
    objective: str = cli.opt("sft", "sft, or dpo on chosen and rejected answers", group="training",
                             choices=tuple(OBJECTIVES))  # fmt: skip
    dpo_beta: float = cli.opt(0.1, "dpo: how closely to stay with the model at the start", group="training")
    lora_rank: int = cli.opt(0, "train adapters of this rank, not the weights; 0 = the weights", group="training")
    source: str | None = cli.opt(None, "stage to start from; none = base, for dpo sft", group="training",
                                 choices=("base", "sft"))  # fmt: skip
    save_as: str | None = cli.opt(None, "its tag; none = the same, from sft TAG-<objective>", group="run", neutral=True)
    lr_frac: float | None = cli.opt(None, f"peak learning rates relative to the start's; none = by objective, "
                                          f"{OBJECTIVES}", group="training")  # fmt: skip
    total_batch_size: int | None = cli.opt(None, "tokens per step; none = pretraining's, or twice", group="training")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dpo_beta <= 0 or (self.epochs is not None and self.epochs <= 0):
            raise ValueError(f"--dpo-beta={self.dpo_beta} and --epochs={self.epochs} must be above 0")


cli.check(__name__, ChatSFTArgs)

from nanozhchat import chat, checkpoint, compute, sources, tuning
from nanozhchat.compute import Compute
from nanozhchat.log import setup_logging
from nanozhchat.objectives import DPO, next_token
from nanozhchat.recipe import Recipe
from nanozhchat.run import Run, open_run
from nanozhchat.tokenizer import Tokenizer
from nanozhchat.trainer import fit
from nanozhchat.tuning import MIN_HELD_OUT, Lessons

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, find the machine, train."""
    started = hardware.command_start(argv)
    args = cli.parse(ChatSFTArgs, argv)
    setup_logging()
    with compute.start(args.device_type, args.dtype, measure=args.budget is not None, tf32=args.tf32) as comp:
        train(args, comp, started)


def train(args: ChatSFTArgs, comp: Compute, started: float) -> None:
    """Load the model to start from, render the data, train, save."""
    tag, stage, start = chat.find(args.model_tag, args.source or ("sft" if args.objective == "dpo" else "base"))
    name = args.save_as or (tag if stage == "base" else f"{tag}-{args.objective}")
    if (stage, name) == ("sft", tag):
        raise ValueError(f"--save-as={name} is the model to start from; give another name")
    state = start.state()
    if not state["finished"]:
        log.warning("%s/%s stopped at step %d before its end; fine-tuning it as it is", stage, tag, start.step)
    tokenizer, recipe = chat.load_tokenizer(start), Recipe.from_dict(state["recipe"])
    specs = sources.resolve_specs(args.data)
    lessons = tuning.read_lessons(args.objective, specs, tokenizer, recipe.sequence_len, args.max_conversations,
                                  args.seed)  # fmt: skip
    identity = {"base_weights": start.weights_sha256(), "data_hash": lessons.digest,
                "tokenizer": start.manifest["identity"]["tokenizer"], "tokenizer_hash": tokenizer.hash}  # fmt: skip
    with open_run("sft", name, identity, comp, flags=args) as run:
        if run.state.finished:
            return
        train_run(args, run, recipe, start, tokenizer, lessons, started)
    best, step = run.state.best_step, run.state.step
    if best != step and best in checkpoint.list_steps(run.folder) and len(lessons.val) >= MIN_HELD_OUT:
        log.info("lowest held-out loss at step %d, %.4f; the last step is what is used, unless chat_cli, chat_eval or "
                 "export are given --source=sft --step=%d", best, run.state.best_val, best)  # fmt: skip


def train_run(
    args: ChatSFTArgs, run: Run, before: Recipe, start: checkpoint.Saved, tokenizer: Tokenizer, lessons: Lessons,
    started: float,
) -> None:  # fmt: skip
    """Build model, optimizer (both go on from the start's), loader and hooks, and fit."""
    comp, lr_frac = run.compute, args.lr_frac if args.lr_frac is not None else OBJECTIVES[args.objective]
    recipe = run.recipe(lambda: tuning.tuning_recipe(
        before, lessons, total_batch_size=args.total_batch_size, num_steps=args.num_steps, epochs=args.epochs,
        seconds=args.seconds, lr_frac=lr_frac, world_size=comp.world_size,
        pretrained=start.stage == "base",
    ))  # fmt: skip
    model = start.load_model(comp.device, comp.dtype, ngrams=False)  # the counts are those of another kind of text
    if start.manifest["model"].get("ngrams"):
        log.info("the n-gram counts of pretraining stay behind: the network goes on alone, from a higher loss")
    objective: Any = next_token
    if args.objective == "dpo":
        reference = start.load_model(comp.device, comp.dtype, ngrams=False)
        objective = DPO(reference.requires_grad_(False), args.dpo_beta)
    optimizer = tuning.make_optimizer(model, recipe, start, run, args.lora_rank, lr_frac, args.seed)
    shape: dict[str, Any] = {**run.loader_shape(recipe), "pad_id": tokenizer.end_id}
    loader, held_out = tuning.loaders(args.objective, lessons, recipe, args.seed, shape)
    if run.state.loader:
        loader.seek(run.state.loader, recipe.device_batch_size)
    part = max(1, recipe.num_steps // 5)
    if args.epochs and args.epochs >= 2:
        part = math.ceil(recipe.num_steps / args.epochs)  # an epoch
    every, save_every = (part if x is None else x for x in (args.eval_every, args.save_every))
    token_bytes = tokenizer.token_bytes() * (args.objective == "sft")  # DPO's loss is not about bytes
    plan = run.plan(model, optimizer, recipe, token_bytes, started=started, save_every=save_every)
    real = not all(sources.parse(spec).endless for spec in sources.resolve_specs(args.data))  # chat_eval asks the rest
    actions = tuning.make_hooks(every, objective, model, held_out, lessons, tokenizer, plan, run, answers=real)
    fit(model, optimizer, loader, objective, plan, actions, run.state, comp, run.metrics)


if __name__ == "__main__":
    cli.run(main)
