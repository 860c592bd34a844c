"""Time the engines beside transformers' Llama of the same size: python dev/bench_engine.py --json FILE. One thread."""

import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from nanozhchat import cli, compute, engine_speed, recipe
from nanozhchat.engine import Engine
from nanozhchat.gpt import GPT
from nanozhchat.run import gpt_config
from nanozhchat.sampling import SamplingParams

KINDS = {"native": "fp32", "native-int8": "int8", "torch": "fp32 torch"}


@dataclass(frozen=True, kw_only=True)
class BenchArgs:
    depths: tuple[int, ...] = cli.opt((4, 6), "models, random weights")
    batches: tuple[int, ...] = cli.opt((1, 16), "requests decoded together")
    vocab_size: int = cli.opt(8192, "tokens")
    context: int = cli.opt(64, "prompt tokens")
    steps: int = cli.opt(64, "tokens timed per request; medians are printed")
    json: str | None = cli.opt(None, "write the figures to this file")


class NoText:
    def special(self, name: str) -> int:
        return 0

    def _bytes_of(self, i: int) -> bytes:
        return b"."


def arrivals_gain(engine: Engine, steps: int) -> float:
    """16 requests that come at random moments: aggregate speed over one after the other."""
    dice = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, 256, (16, 64), generator=dice).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=steps, logit_bias={0: -100.0})
    spent = []
    for rows, chance in ((1, 1.0), (16, 0.5)):
        batch, waiting, start = engine.new_batch(rows, drafts=False), list(prompts), time.perf_counter()
        while waiting or batch.n_running or batch.n_waiting:
            if waiting and torch.rand(1, generator=dice) <= chance:
                batch.add(waiting.pop(), params)
            batch.step()
        spent.append(time.perf_counter() - start)
    return spent[0] / spent[1]


def drafts_gain(model: GPT, kind: str, period: int, steps: int = 200) -> float:
    """Speed with drafts over speed without, same request, of a model that says 0, 1, ... period - 1 over and over."""
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[(torch.arange(period) + 1) % period] = model.wte.weight[:period]
    engine, prompt = Engine(model, NoText(), kind=kind), list(range(1, 9))  # type: ignore[arg-type]
    params = SamplingParams(temperature=0.0, max_tokens=steps, logit_bias={0: -100.0})
    spent: dict[bool, list[float]] = {True: [], False: []}
    for drafts in [True, False] * 5:
        batch = engine.new_batch(1, drafts=drafts)
        batch.add(prompt, params)
        start = time.perf_counter()
        while batch.n_running or batch.n_waiting:
            batch.step()
        spent[drafts].append(time.perf_counter() - start)
    return statistics.median(spent[False]) / statistics.median(spent[True])


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse(BenchArgs, argv)
    torch.set_num_threads(1)
    bytes_per_s, rows = engine_speed.read_bytes_per_s(), []
    peak = compute.matmul_flops(torch.device("cpu"), torch.float32)
    print(f"memory {bytes_per_s / 1e9:.1f} GB/s, float32 matmul {peak / 1e9:.0f} GFLOP/s")
    for depth in args.depths:
        model = GPT(gpt_config(recipe.resolve(depth, vocab_size=args.vocab_size)))
        model.init_weights(torch.Generator().manual_seed(0))
        same = {"context": args.context, "steps": args.steps}
        llama = {n: engine_speed.transformers_decode_per_s(model.config, batch=n, **same) for n in args.batches}
        for kind, dtype in KINDS.items():
            engine = Engine(model.eval(), NoText(), kind=kind)  # type: ignore[arg-type]
            measure = partial(engine_speed.measure, engine, bytes_per_s=bytes_per_s)
            long, short = (measure(batch=1, context=context, steps=4) for context in (500, 200))
            work = 2 * (engine_speed.read_per_token(engine) - model.lm_head.weight.numel())
            work += 2 * model.config.n_layer * model.config.n_embd * 500  # attention, half of it masked
            frac = long.prefill_tok_per_s * work / peak
            print(f"d{depth} {dtype:10} prefill 500 {long.prefill_tok_per_s:8,.0f} tok/s = {frac:.0%} of matmul peak; "
                  f"first token of 200 {short.ttft_ms:.1f} ms, cached {short.cached_ttft_ms:.1f} ms")  # fmt: skip
            for batch in args.batches:
                speed = measure(batch=batch, **same)
                rows.append({"model": f"d{depth}", "dtype": dtype, **dataclasses.asdict(speed),
                             "transformers_tok_per_s": llama[batch], "prefill_500_frac": frac})  # fmt: skip
                print(f"   batch {batch:2}  {speed.decode_tok_per_s:8,.0f} tok/s, {speed.bandwidth_frac:4.0%} of "
                      f"bandwidth; transformers {llama[batch] or math.nan:6,.0f}")  # fmt: skip
            print(f"   16 arrivals: {arrivals_gain(engine, 200):.1f} x sequential")
        for kind, dtype in KINDS.items():
            loop, line = (drafts_gain(model, kind, period) for period in (20, args.vocab_size))
            print(f"d{depth} {dtype:10} drafts: {loop:.2f} x on text that repeats, {line:.2f} x where it never does")
    cli.write_figures(args.json, {"rows": rows})


if __name__ == "__main__":
    cli.run(main)
