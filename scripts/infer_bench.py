"""Measure prefill and decode speed of a model against the limits of the machine, and transformers if installed."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from nanozhchat import cli


@dataclass(frozen=True, kw_only=True)
class InferBenchArgs(cli.ModelFlags):
    batch: tuple[int, ...] = cli.opt((1, 4, 16), "requests decoded together", least=1)
    context: int = cli.opt(200, "tokens of each prompt")
    steps: int = cli.opt(64, "tokens decoded per request", least=1)
    json: str | None = cli.opt(None, "write the figures to this file")


cli.check(__name__, InferBenchArgs)

import torch

from nanozhchat import chat, engine_speed
from nanozhchat.compute import Compute


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, load, measure, print."""
    args = cli.parse(InferBenchArgs, argv)
    engine = chat.load(**args.where()).engine
    if not 0 < args.context < engine.context - args.steps - engine_speed.WARM_STEPS:
        raise ValueError(f"--context={args.context} and --steps={args.steps} do not fit {engine.context} tokens")
    process = Compute(torch.device("cpu"))
    bytes_per_s, rows = engine_speed.read_bytes_per_s(), []
    print(f"engine {engine.kind}, memory {bytes_per_s / 1e9:.1f} GB/s\nbatch  context  prefill tok/s  decode tok/s"
          "  first token ms  cached ms  of bandwidth  transformers tok/s")  # fmt: skip
    for batch in args.batch:
        sizes = {"batch": batch, "context": args.context, "steps": args.steps}
        speed = engine_speed.measure(engine, **sizes, bytes_per_s=bytes_per_s)
        rows.append({**dataclasses.asdict(speed), "engine": engine.kind, "mem_bytes": process.memory_bytes()})
        other = engine_speed.transformers_decode_per_s(engine.config, **sizes)
        rows[-1]["transformers_tok_per_s"] = other
        print(f"{speed.batch:5}  {speed.context:7}  {speed.prefill_tok_per_s:13,.0f}  {speed.decode_tok_per_s:12,.0f}"
              f"  {speed.ttft_ms:14.1f}  {speed.cached_ttft_ms:9.1f}  {speed.bandwidth_frac:12.0%}"
              f"  {'not installed' if other is None else f'{other:,.0f}':>18}")  # fmt: skip
    cli.write_figures(args.json, {"rows": rows})


if __name__ == "__main__":
    cli.run(main)
