"""Print every number that the depth dial derives, with its formula; with --hardware, time and cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanozhchat import cli
from nanozhchat.hardware import Device, parse_hardware
from nanozhchat.recipe import Overrides, Recipe, advise_vocab_size, depth_for_budget, explain, resolve
from nanozhchat.schedule import parse_duration

MFU = 0.45  # of the datasheet peak, assumed for estimates (nanochat reports 0.4-0.5 on H100)

TABLE_DEPTHS = (4, 6, 8, 10, 12, 16, 20, 24, 28, 34)
MEMORY_FRAC = 0.8  # of a device that a run may fill by estimate


@dataclass(frozen=True, kw_only=True)
class RecipeArgs:
    depth: str = cli.opt("12", "layers, or auto with --budget")
    vocab_size: int | None = cli.opt(None, "tokens; none = advised for the depth")
    budget: str | None = cli.opt(None, "wall clock, such as 10m or 2h, on the hardware given")
    hardware: str | None = cli.opt(None, "estimate time and cost on COUNTxNAME, such as 8xH100")
    measure: bool = cli.opt(False, "time training on this machine and take that speed; under torchrun: of all ranks")
    world_size: int | None = cli.opt(None, "ranks; none = the hardware's count, else 1")
    max_seq_len: int | None = cli.opt(None, "context in tokens", group="overrides")
    device_batch_size: int | None = cli.opt(None, "rows per micro-step and rank", group="overrides")
    total_batch_size: int | None = cli.opt(None, "tokens per step", group="overrides")
    num_steps: int | None = cli.opt(None, "optimizer steps", group="overrides")
    target_flops: float | None = cli.opt(None, "training FLOPs", group="overrides")
    target_ratio: float | None = cli.opt(None, "tokens per scaling parameter", group="overrides")
    table: bool = cli.opt(False, "a Markdown table of all depths instead, for --hardware or --measure")
    json: str | None = cli.opt(None, "write the fields to this file")


def main(argv: Sequence[str] | None = None) -> None:
    """Resolve and print."""
    args = cli.parse(RecipeArgs, argv)
    count, device = parse_hardware(args.hardware) if args.hardware else (1, None)
    seconds = parse_duration(args.budget) if args.budget else None
    if seconds is not None and device is None and not args.measure:
        raise ValueError("--budget needs --hardware=COUNTxNAME, or --measure for the machine this runs on")
    speed = count * device.flops * MFU if device else 0.0
    if args.measure:
        from nanozhchat import budget, compute  # torch only when asked to measure

        with compute.start(measure=True) as comp:  # in the format that a budgeted run would choose; all ranks together
            speed, count = budget.measure_flops(comp), comp.world_size
        if comp.rank:
            return
    if args.table:
        print_depths(speed, count, device)
        return
    if args.depth == "auto":
        if seconds is None:
            raise ValueError("--depth=auto needs --budget, such as --budget=2h")
        depth = depth_for_budget(seconds, speed, args.vocab_size)
    elif args.depth.isdecimal():
        depth = int(args.depth)
    else:
        raise ValueError(f"--depth={args.depth!r} must be a whole number or auto")
    vocab = args.vocab_size or advise_vocab_size(depth)
    names = Overrides.__dataclass_fields__
    overrides = Overrides(**{name: getattr(args, name) for name in names if hasattr(args, name)})
    world = args.world_size or count
    plain = resolve(depth, vocab_size=vocab, world_size=world, overrides=overrides)
    tokens = seconds * speed / plain.flops_per_token if seconds is not None else None
    recipe = fit_memory(depth, vocab, world, overrides, device, budget_s=seconds, budget_tokens=tokens)
    rows = explain(recipe)
    widest, long = (max(len(row[i]) for row in rows) for i in (0, 1))
    for name, value, formula in rows:
        print(f"{name:<{widest}}  {value:>{long}}  {formula}")
    if args.measure:
        print(f"\nmeasured {speed / 1e9:.1f} GFLOP/s in training with {count} rank(s)")
    if device is not None:
        hours = recipe.train_flops / speed / 3600
        print(f"\nOn {count} x {device.name} at {MFU:.0%} of peak (estimate): {hours:.2f} h, "
              f"about {hours * count * device.usd_per_hour:.0f} USD; memory per device about "
              f"{recipe.memory_bytes / 2**30:.1f} of {device.memory_bytes / 2**30:.0f} GiB")  # fmt: skip
    cli.write_figures(args.json, recipe.to_dict() | ({"measured_flops": speed} if args.measure else {}))


def print_depths(speed: float, count: int, device: Device | None) -> None:
    """Print what every depth would take by its full horizon, as a Markdown table."""
    if not speed:
        raise ValueError("--table needs --hardware=COUNTxNAME, or --measure for the machine this runs on")
    print("| depth | parameters | tokens | FLOPs | hours |" + (" USD | GiB per device |" if device else ""))
    print("|---|---|---|---|---|" + ("---|---|" if device else ""))
    for depth in TABLE_DEPTHS:
        made = fit_memory(depth, advise_vocab_size(depth), count, Overrides(), device)
        hours = made.train_flops / speed / 3600
        cells = [f"{depth}", f"{made.num_params / 1e6:,.1f} M", f"{made.train_tokens / 1e6:,.0f} M",
                 f"{made.train_flops:.2g}", f"{hours:,.2f}" if hours < 10 else f"{hours:,.0f}"]  # fmt: skip
        if device:
            cells += [f"{hours * count * device.usd_per_hour:,.0f}", f"{made.memory_bytes / 2**30:.1f}"]
        print(f"| {' | '.join(cells)} |")


def fit_memory(depth: int, vocab: int, world: int, overrides: Overrides, device: Device | None, **pace: Any) -> Recipe:
    """Resolve; on a device with micro-steps small enough for its memory: the same run, in more of them."""
    micro = 32768 if device else 4096
    while True:
        pace["micro_batch_tokens"] = micro
        recipe = resolve(depth, vocab_size=vocab, world_size=world, overrides=overrides, **pace)
        if device is None or recipe.memory_bytes <= MEMORY_FRAC * device.memory_bytes or micro <= 1024:
            return recipe
        micro //= 2


if __name__ == "__main__":
    cli.run(main)
