"""Run a plain d4 in llama.cpp and compare with our own engine: python dev/check_llama_cpp.py --python VENV/bin/python.

Needs a Python with `llama-cpp-python` (pip install llama-cpp-python); weights are random, so every logit is a test.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from nanozhchat import builtin, cli, recipe
from nanozhchat.export import export
from nanozhchat.gpt import GPT
from nanozhchat.run import gpt_config
from nanozhchat.tokenizer import Tokenizer

THERE = """
import json, sys, numpy as np
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=512, logits_all=True, type_k=0, type_v=0, verbose=False)
ids, said = json.loads(sys.argv[2]), []
model.eval(ids)
print(json.dumps(np.array(model.scores[: len(ids)]).tolist()))
for _ in range(64):
    said.append(int(np.argmax(model.scores[model.n_tokens - 1])))
    model.eval(said[-1:])
print(json.dumps(said))
"""


@dataclass(frozen=True, kw_only=True)
class CheckArgs:
    python: str = cli.opt(sys.executable, "interpreter that has llama-cpp-python")


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse(CheckArgs, argv)
    texts = list(islice(builtin.documents(0), 3000))
    tokenizer = Tokenizer.train(texts, vocab_size=1024)
    shape = recipe.resolve(4, vocab_size=tokenizer.vocab_size, overrides=recipe.Overrides(arch="plain"))
    model = GPT(gpt_config(shape))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, model.parameters()):  # the start has zeros, which test nothing
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05)
    ids = tokenizer.encode(texts[0])[:64]
    with tempfile.TemporaryDirectory() as folder:
        (path,) = export("gguf", model, tokenizer, Path(folder) / "gguf")
        there = subprocess.run([args.python, "-c", THERE, path, str(ids)], capture_output=True, text=True, check=False)
    if there.returncode:
        raise ValueError(f"{args.python} could not run it: {there.stderr.strip().splitlines()[-1]}")
    scores, said = map(json.loads, there.stdout.strip().splitlines()[-2:])
    with torch.inference_mode():
        ours = model.logits(model.hidden(torch.tensor([ids])))[0].float()
        far = (torch.tensor(scores)[:, : ours.shape[1]] - ours).abs().max().item()
        mine = list(ids)
        for _ in said:
            mine.append(int(model.logits(model.hidden(torch.tensor([mine])))[0, -1].argmax()))
    same = mine[len(ids) :] == said
    print(f"llama.cpp: logits of {len(ids)} tokens at most {far:.1e} away, {len(said)} greedy tokens equal: {same}")
    if far > 1e-2 or not same:
        raise SystemExit(1)


if __name__ == "__main__":
    cli.run(main)
