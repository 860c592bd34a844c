"""Load on the server, over loopback, with a random model: `python dev/bench_server.py [--depth=4] [--json FILE]`.

Prints: time to first token and tokens/s at 1, 8 and 64 clients, what continuous batching gives over one at a time,
whether greedy texts equal those asked for alone, memory before and after, disconnects, slow connections.
"""

import argparse
import asyncio
import contextlib
import json
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Prompt, most tokens, temperature: greedy and sampled ones, each with its seed.
REQUESTS = [(f"第{i}个问题：{'讲个故事' * (i % 5 + 1)}", 8 + 7 * (i % 8), 0.8 * (i % 2)) for i in range(20)]
TRAINED_ON = 30_000  # made-up sentences behind the tokenizer of 4,096 tokens that a d4 comes with


def serve(port, engine, depth):
    from nanozhchat.server.app import create_app
    from nanozhchat.server.library import Library
    from nanozhchat.server.serve import bind
    from nanozhchat.server.serve import serve as run
    from nanozhchat.tokenizer import Tokenizer
    from tests.fakes import real_chat

    rng = random.Random(0)
    sentences = ("".join(chr(rng.randrange(0x4E00, 0x5800)) for _ in range(20)) for _ in range(TRAINED_ON))
    shape = {"sequence_len": 512, "n_layer": depth, "n_head": depth, "n_kv_head": depth, "n_embd": 64 * depth}
    chat = real_chat(Tokenizer.train(sentences, 4096), engine, **shape)
    run(create_app(Library(chat)), bind("127.0.0.1", port))


def get(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
        return response.read().decode()


def resident_mb(port):
    return int(get(port, "/metrics").split("\nprocess_resident_memory_bytes ")[1].split()[0]) / 2**20


def request(prompt, most, temperature):
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": most, "temperature": temperature}
    stream = {"seed": most, "stream": True, "stream_options": {"include_usage": True}}
    data = json.dumps({**body, **stream}).encode()
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json",
             "Connection: close", f"Content-Length: {len(data)}"]  # fmt: skip
    return "\r\n".join([*lines, "", ""]).encode() + data


async def ask(port, prompt, most, temperature, *, leave_after_s=None):
    """Return (status, text, tokens, seconds to first token)."""
    start, first, lines = time.perf_counter(), None, []
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request(prompt, most, temperature))
        async with asyncio.timeout(leave_after_s):
            status = int((await reader.readline()).split()[1])
            async for line in reader:
                if line.startswith(b"data: {"):
                    lines.append(json.loads(line[6:]))
                    if first is None and lines[-1]["choices"] and lines[-1]["choices"][0]["delta"].get("content"):
                        first = time.perf_counter() - start
    except TimeoutError:
        return 0, "", 0, None
    finally:
        writer.close()
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in lines if c.get("choices"))
    return status, text, lines[-1].get("usage", {}).get("completion_tokens", 0) if lines else 0, first


async def crowd(port, clients, each, reference):
    """Let so many clients ask one after another; returns figures."""

    async def client(number):
        order = random.Random(number).sample(REQUESTS, each)
        return [(r, *await ask(port, *r)) for r in order]

    start = time.perf_counter()
    rows = [row for rows in await asyncio.gather(*map(client, range(clients))) for row in rows]
    took = time.perf_counter() - start
    good = [row for row in rows if row[1] == 200]
    waits = sorted(row[4] for row in good if row[4] is not None)
    statuses = {status: sum(row[1] == status for row in rows) for status in sorted({row[1] for row in rows})}
    return {"clients": clients, "requests": len(rows), "statuses": statuses,
            "different_texts": sum(text != reference[r] for r, _, text, _, _ in good),
            "ttft_p50_ms": round(1000 * statistics.median(waits)),
            "ttft_p99_ms": round(1000 * waits[int(0.99 * len(waits))]),
            "tokens_per_s": round(sum(row[3] for row in good) / took)}  # fmt: skip


async def disconnects(port, reference):
    """200 clients leave at random moments; then the slots must be free and the next answer right."""
    rng = random.Random(0)
    for _ in range(10):
        await asyncio.gather(*(ask(port, *rng.choice(REQUESTS), leave_after_s=rng.uniform(0, 0.5)) for _ in range(20)))
    start = time.perf_counter()
    while (load := json.loads(await asyncio.to_thread(get, port, "/health")))["running"] + load["queued"]:
        await asyncio.sleep(0.02)
    freed_s = time.perf_counter() - start
    return {"slots_free_after_s": round(freed_s, 2),
            "next_is_right": (await ask(port, *REQUESTS[3]))[1] == reference[REQUESTS[3]]}  # fmt: skip


async def slow_connections(port):
    """300 connections that send a byte a second, or read nothing; health and a normal chat beside them."""
    alone = statistics.median([await timed(ask(port, *REQUESTS[7])) for _ in range(5)])
    writers = []
    for i in range(300):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request("慢", 8, 0) if i % 10 == 0 else b"POST /v1/chat/completions HTTP/1.1\r\nHost: lo")
        writers.append(writer)
    beside, health = [], []
    for _ in range(5):
        for writer in writers:
            with contextlib.suppress(OSError):
                writer.write(b"c")
        health.append(await timed(asyncio.to_thread(get, port, "/health")))
        beside.append(await timed(ask(port, *REQUESTS[7])))
    for writer in writers:
        writer.close()
    return {"alone_s": round(alone, 3), "beside_s": round(statistics.median(beside), 3),
            "health_max_s": round(max(health), 3)}  # fmt: skip


async def timed(work):
    start = time.perf_counter()
    await work
    return time.perf_counter() - start


async def run(port):
    reference = {r: (await ask(port, *r))[1] for r in REQUESTS}
    start, made = time.perf_counter(), 0
    for r in REQUESTS:
        made += (await ask(port, *r))[2]
    alone = made / (time.perf_counter() - start)
    rows = {"one_at_a_time_tokens_per_s": round(alone), "memory_mb_start": round(resident_mb(port))}
    rows["crowds"] = [await crowd(port, clients, 20, reference) for clients in (1, 8, 16, 64)]
    rows["ratio_at_16"] = round(rows["crowds"][2]["tokens_per_s"] / alone, 2)
    rows["disconnects"] = await disconnects(port, reference)
    rows["slow_connections"] = await slow_connections(port)
    rows["memory_mb_end"] = round(resident_mb(port))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", type=int, help="serve on this port instead of measuring")
    parser.add_argument("--engine", default="native", help="torch or native")
    parser.add_argument("--depth", type=int, default=4, help="of the random model")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.engine, args.depth)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = [f"--serve={port}", f"--engine={args.engine}", f"--depth={args.depth}"]
    server = subprocess.Popen([sys.executable, __file__, *given])
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                get(port, "/health")
                break
            time.sleep(0.1)
        rows = asyncio.run(run(port))
    finally:
        server.terminate()
        server.wait(40)
    print(json.dumps(rows, indent=1))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
