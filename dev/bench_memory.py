"""Time and peak memory of the loss and of windowed attention, forward and backward, against the plain versions.

    OMP_NUM_THREADS=1 python -m dev.bench_memory

Each case runs in a process of its own; its peak is what resident memory grew by.
"""

import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from dev.bench_tokenizer import memory_kb
from nanozhchat.attention import causal_attention
from nanozhchat.cross_entropy import linear_cross_entropy

ROWS, VOCAB, WIDTH, SOFTCAP = 8192, 65_536, 512, 15.0
T, WINDOW, HEADS, HEAD_DIM = 4096, 512, 4, 64


def run(case: str) -> None:
    """Print seconds of CPU time and MiB of one case."""
    torch.set_num_threads(1)
    if case.startswith("loss"):
        x, weight = torch.randn(ROWS, WIDTH).requires_grad_(), (torch.randn(VOCAB, WIDTH) * 0.02).requires_grad_()
        targets = torch.randint(0, VOCAB, (ROWS,))
    else:
        q, k, v = (torch.randn(1, HEADS, T, HEAD_DIM).requires_grad_() for _ in range(3))
        mask = torch.ones(T, T, dtype=torch.bool).tril_().triu_(1 - WINDOW) if case == "attention_masked" else None
    tiny = torch.randn(1, 1, 4, 8).requires_grad_()
    causal_attention(tiny, tiny, tiny, 2).sum().backward()  # what torch imports late is not measured
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of imports and inputs: forget it
    before, start = memory_kb("VmHWM"), time.process_time()
    if case == "loss_plain":
        F.cross_entropy(SOFTCAP * torch.tanh(x @ weight.T / SOFTCAP), targets, reduction="sum").backward()
    elif case == "loss_chunked":
        linear_cross_entropy(x, weight, targets, SOFTCAP).backward()
    elif case == "attention_masked":
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()
    else:
        causal_attention(q, k, v, T if case == "attention_full" else WINDOW).sum().backward()
    seconds = time.process_time() - start
    print(f"{case:20s} {seconds:7.3f} s {(memory_kb('VmHWM') - before) / 1024:9.1f} MiB", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(sys.argv[1])
    else:
        for name in ["loss_plain", "loss_chunked", "attention_full", "attention_masked", "attention_windowed"]:
            subprocess.run([sys.executable, "-m", "dev.bench_memory", name], check=True)
