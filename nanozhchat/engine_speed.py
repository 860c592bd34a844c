"""How fast an engine reads prompts and decodes, beside what the machine could do at best."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from nanozhchat.batching import Batch
from nanozhchat.engine import Engine
from nanozhchat.gpt_config import GPTConfig
from nanozhchat.sampling import SamplingParams

WARM_STEPS = 3
PROBE_FLOATS = 1 << 26  # 256 MiB: beyond every cache


@dataclass(frozen=True)
class Speed:
    """Figures of one batch size. context: tokens of each prompt. bandwidth_frac: of what reading weights allows."""

    batch: int
    context: int
    prefill_tok_per_s: float
    decode_tok_per_s: float
    ttft_ms: float
    cached_ttft_ms: float
    bandwidth_frac: float


def measure(engine: Engine, *, batch: int, context: int, steps: int, bytes_per_s: float) -> Speed:
    """Time `batch` greedy requests of `context` prompt tokens over `steps` tokens each, medians, without drafts.

    ttft_ms: from a request to its first token; cached_ttft_ms: the same for a prompt whose beginning is held already.
    """
    never_ends = dict.fromkeys(engine.end_ids, -100.0)
    params = SamplingParams(temperature=0.0, max_tokens=steps + WARM_STEPS + 1, logit_bias=never_ends)
    prompts = torch.randint(0, 256, (batch + 3, context), generator=torch.Generator().manual_seed(0)).tolist()
    run = engine.new_batch(batch, drafts=False)
    first = [_first_token_s(run, prompt, params) for prompt in prompts[batch:]]
    cached = [_first_token_s(run, [*prompts[-1][:-4], i, i, i, i], params) for i in range(3)]
    for prompt in prompts[:batch]:
        run.add(prompt, params)
    while run.n_waiting or any(not r.ids for r in run.running):
        run.step()
    step_s = [_timed(run.step) for _ in range(steps)]
    decode = batch / statistics.median(step_s[WARM_STEPS:])
    weights = (1 if engine.kind == "native-int8" else 4) * read_per_token(engine)
    return Speed(batch, context, context / statistics.median(first), decode, 1e3 * statistics.median(first),
                 1e3 * statistics.median(cached), decode / batch * weights / bytes_per_s)  # fmt: skip


def transformers_decode_per_s(config: GPTConfig, *, batch: int, context: int, steps: int) -> float | None:
    """Decode tokens/s of transformers' Llama of the same width, depth, heads and number of weights, random ones, on a
    CPU; None where transformers is not installed."""
    if find_spec("transformers") is None:
        return None
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": config.n_embd, "intermediate_size": 8 * config.n_embd // 3,
             "vocab_size": config.vocab_size, "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
             "num_key_value_heads": config.n_kv_head, "max_position_embeddings": config.sequence_len}  # fmt: skip
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    cache = DynamicCache()
    with torch.inference_mode():
        out = model(torch.randint(0, 256, (batch, context)), past_key_values=cache, use_cache=True)

        def step() -> None:
            nonlocal out
            out = model(out.logits[:, -1:].argmax(-1), past_key_values=cache, use_cache=True)

        return batch / statistics.median(_timed(step) for _ in range(steps))


def read_per_token(engine: Engine) -> int:
    """Weights that every step reads: the matrices and the head, not the tables that are looked up."""
    c = engine.config
    return c.n_layer * c.n_embd * (10 * c.n_embd + 2 * c.kv_dim) + c.n_embd * c.padded_vocab_size


def read_bytes_per_s() -> float:
    """Measure how fast one pass over memory beyond the caches goes."""
    block = torch.ones(PROBE_FLOATS)
    return 4 * PROBE_FLOATS / min(_timed(block.sum) for _ in range(3))


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _first_token_s(run: Batch, prompt: list[int], params: SamplingParams) -> float:
    start = time.perf_counter()
    request = run.add(prompt, params)
    while not request.ids:
        run.step()
    elapsed = time.perf_counter() - start
    run.remove(request)
    return elapsed
