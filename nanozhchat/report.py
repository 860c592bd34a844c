"""Run folders -> a report for people: what was trained on what, how it went, what the model can do.

What does not exist yet is left out, with a sentence that names its command. Text from outside goes through `text()`.
"""

import contextlib
import itertools
import math
import os
import platform
import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from nanozhchat import files, paths
from nanozhchat.charts import draw_curve, draw_scores
from nanozhchat.errors import DamagedError
from nanozhchat.hardware import find_device
from nanozhchat.recipe import FEW_DOCUMENTS, FEW_STEPS, explain
from nanozhchat.report_data import ZH, ZH_UNITS, Model, Stage, both, duration, is_number, read_object, show, table, text
from nanozhchat.report_page import page

TITLES = {"base": "Pretraining", "sft": "Fine-tuning", "rl": "Reinforcement learning"}
PROMPTS_SHOWN, ANSWERS_SHOWN = 5, 6  # answers: right ones, and as many wrong ones
BPB, LOSS = ({"training": f"train/{key}", "held out": f"val/{key}"} for key in ("bpb", "loss"))
CURVES = (  # name, title, against, lines
    ("bpb", "bits per byte", "tokens", BPB), ("bpb-flops", "bits per byte", "flops", BPB),
    ("loss-tokens", "loss, nats per token", "tokens", LOSS), ("loss-time", "loss, nats per token", "s", LOSS),
    ("reward", "share of right answers", "s", {"training": "train/reward", "held out": "val/pass@1"}),
    ("speed", "tokens per second", "s", {"speed": "tok_per_sec"}),
    ("mfu", "share of the machine's peak", "s", {"share": "mfu"}),
    ("memory", "memory in GiB", "s", {"memory": "mem_gib"}),
    ("lr", "learning rate of the matrices", "tokens", {"rate": "lr"}),
)  # fmt: skip
FIRST_STAGE_ONLY = ("bpb-flops", "mfu")
ELECTRICITY_USD, CPU_WATTS = 0.15, 10  # per kWh; per core, assumed: server processors are rated at 5 to 12
MODELS_SHOWN, TOKENS_SHOWN = 8, 90
TOKEN_FACTS = (("common_3500_frac", "of the 3,500 common characters are one token"),
               ("word_tokens_frac", "of the tokens are words of several characters"),
               ("unused_frac", "of the tokens never occur in held-out text"))  # fmt: skip
COURSE = (("steps", "step", "{:,.0f}"), ("tokens", "tokens", "{:,.0f}"), ("bytes of text", "bytes", "{:,.0f}"),
          ("seconds", "time_s", "{:,.0f}"), ("FLOPs", "flops", "{:.3g}"), ("training loss", "train/loss", "{:.4f}"),
          ("held-out loss", "val/loss", "{:.4f}"), ("held-out bits per byte", "val/bpb", "{:.4f}"),
          ("held-out perplexity", "val/ppl", "{:.2f}"), ("tokens per second", "tok_per_sec", "{:,.0f}"),
          ("share of the machine's peak", "mfu", "{:.1%}"), ("memory in GiB", "mem_gib", "{:.2f}"))  # fmt: skip


def summary(m: Model) -> list[str]:
    """What was trained on what, how long, the best numbers: in English, in Chinese, as figures; what is unfinished."""
    first, right, bpb = m.stages[0], show(m.chat_eval.get("overall")), m.bpb
    en, zh, figures = [f"`{m.tag}` is a Chinese language model"], [f"`{m.tag}` 是一个中文模型"], []
    if first.recipe:
        params, vocabulary = first.recipe.num_params, first.recipe.vocab_size
        en, zh = [*en, f" of {params / 1e6:,.1f} million parameters"], [*zh, f"，共 {params / 1e4:,.0f} 万个参数"]
        figures = [(f"{params / 1e6:,.1f} M", f"parameters, {vocabulary:,} tokens in the vocabulary")]
    if first.name == "base" and first.points("tokens")[0]:
        seen, mb, source = first.last("tokens"), first.last("bytes") / 1e6, ", ".join(map(text, first.data))
        en.append(f", trained from nothing on {source}: {seen / 1e6:,.2f} million tokens ({mb:,.1f} MB of text)")
        zh.append(f"，从零开始训练。预训练数据为 {source}，共 {seen / 1e4:,.1f} 万个词元（{mb:,.1f} MB 文本）")
        en, zh = [*en, f" in {duration(first.seconds)}"], [*zh, f"，用时 {duration(first.seconds, ZH_UNITS)}"]
    for s in m.stages[first.name == "base" :]:
        en.append(f", then {duration(s.seconds)} of {TITLES[s.name].lower()}")
        zh.append(f"；{ZH[TITLES[s.name]]}用时 {duration(s.seconds, ZH_UNITS)}")
    if is_number(bpb):
        said = [words for *_, words in m.margins]
        en.append(f". On held-out text it needs {', '.join([f'{bpb:.3f} bits per byte', *said])}")
        zh.append(f"。在留出文本上，每字节需要 {bpb:.3f} 比特")
        zh += [f"，比 {name} {'少' if ahead >= 0 else '多'} {abs(ahead):.2f} 比特" for name, _, ahead, _ in m.margins]
        figures.insert(0, (f"{bpb:.3f}", "; ".join(["bits per byte of held-out text", *said[-1:]])))
    if m.scores:
        n, chance = len(m.scores), show(sum(s["chance"] for s in m.scores) / len(m.scores))
        after = TITLES[m.asked.name]
        it, then = ("It", "") if m.asked is m.stages[-1] else (f"After {after.lower()} it", f"{ZH[after]}之后，")
        en.append(f". {it} answers {right} of held-out questions right (mean of {n} skills; blind guessing: {chance})")
        zh.append(f"。{then}对训练中从未出现过的问题，平均答对 {right}（{n} 项能力；随机猜测为 {chance}）")
        figures.insert(1, (right, f"of held-out questions right; blind guessing {chance}"))
    figures.append((duration(m.seconds), "of training"))
    blocks = ["".join(en) + ".", "".join(zh) + "。", "\n".join(f"- **{value}** {what}" for value, what in figures)]
    for s in m.stages:
        times = [text(e["time"])[:16].replace("T", " ") for e in s.events if e.get("time")]
        blocks += [f"*{TITLES[s.name]}: from {times[0]} to {times[-1]} UTC.*"] if times else []
        if s.last("step") < FEW_STEPS:
            steps = f"{s.last('step'):,.0f} step(s)"
            blocks.append(f"**{TITLES[s.name]} took {steps} only: little may be learnt.**")
        if not any(event.get("event") == "done" for event in s.events):
            at = f"step {s.last('step'):,.0f}"
            blocks.append(f"{TITLES[s.name]} has not run to its end ({at}): its command continues it.")
    if all(s.name != "sft" for s in m.stages):
        blocks.append(f"It was not taught to chat yet: `python -m scripts.chat_sft --model-tag={m.tag}`.")
    return blocks


def held_out(m: Model) -> list[str]:
    """Bits per byte beside general compressors."""
    e, bpb = m.base_eval, m.base_eval.get("bpb")
    if not is_number(bpb):
        return ["## Held-out text", f"Not scored yet: `python -m scripts.base_eval --model-tag={m.tag}`."]
    per_char = e["bpc"] / bpb if is_number(e.get("bpc")) and bpb else math.nan  # bytes a character takes
    rows = [(m.tag, f"{bpb:.4f}", show(bpb * per_char, "{:.4f}"), "", show(e.get("ppl"), "{:.2f}"))]
    rows += [(name, f"{value:.4f}", show(value * per_char, "{:.4f}"), f"{ahead:+.4f}", "")
             for name, value, ahead, _ in m.margins]  # fmt: skip
    size = ", ".join(f"{show(e.get(k), '{:,}')} {k}" for k in ("bytes", "chars", "tokens"))
    note = f"*Step {text(e.get('step', '?'))}, {size}. Lower is better; 8 bits per byte is no compression at all. The "
    note += "compressors pack the same text in one piece, but unlike the model they bring no knowledge from training.*"
    said = [f"{words} on the same held-out bytes." for *_, words in m.margins]
    header = ("", "bits per byte", "per character", "ahead by", "perplexity")
    return ["## Held-out text", *said, table(header, rows, {1, 2, 3, 4}), note]


def skills(m: Model, pictures: dict[str, bytes]) -> list[str]:
    """Scores with chance and interval, and refusals."""
    e, header = m.chat_eval, ("skill", "right", "95 % interval", "chance", "questions")
    if not m.scores:
        return ["## Skills", f"Not asked yet: `python -m scripts.chat_eval --tasks builtin --model-tag={m.tag}`."]
    pictures["skills.png"] = draw_scores(m.scores)
    rows = [(s["name"], f"{s['score']:.1%}", f"{s['low']:.1%} – {s['high']:.1%}", f"{s['chance']:.1%}", s["n"])
            for s in m.scores]  # fmt: skip
    rows.append(("mean", show(e.get("overall")), "", "", ""))
    alt = "Right answers by skill: " + ", ".join(f"{text(name)} {right}" for name, right, *_ in rows)
    blocks = [f"![{alt}](skills.png)", table(header, rows, range(1, 5))]
    for key, what in (("unknowable", "cannot be answered (higher"), ("knowable", "can be answered (lower")):
        if is_number(share := (e.get("refusal") or {}).get(key)):
            blocks.append(f"It says that it does not know to {share:.1%} of the questions that {what} is better).")
    note = f"*Step {text(e.get('step', '?'))}. Greedy answers to questions whose content was never trained on.*"
    if m.asked is not (last := m.stages[-1]):
        blocks.append(f"Before {TITLES[last.name].lower()}; again: `python -m scripts.chat_eval --model-tag={m.tag}`.")
    return ["## Skills", *blocks, note]


def samples(m: Model) -> list[str]:
    """The same beginnings, continued early, midway and at the end."""
    kept = ([r for r in files.read_jsonl(s.folder / "samples.jsonl") if "expected" not in r] for s in m.stages)
    rows = next(filter(None, kept), [])
    texts = {(str(r.get("prompt")), r["step"]): r.get("text", "") for r in rows if is_number(r.get("step"))}
    if not texts:
        return ["## Learning to speak", "No samples: `python -m scripts.base_train --sample-every=100` takes some."]
    steps = sorted({step for _, step in texts})
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    prompts = list(dict.fromkeys(prompt for prompt, _ in texts))[:PROMPTS_SHOWN]
    blocks = [table(("beginning", p), [(f"step {s:,}", texts.get((p, s), "")) for s in chosen]) for p in prompts]
    return ["## Learning to speak", "The same beginnings, continued by the model as training went on.", *blocks]


def answers(m: Model) -> list[str]:
    """Questions with expected and given answers: the first of every skill, then the second, ..."""
    tasks = (m.chat_eval.get("examples") or {}).items()
    turns = itertools.zip_longest(*([(both(name.removeprefix("builtin:")), a) for a in given] for name, given in tasks))
    cards: dict[str, list[str]] = {"✓": [], "✗": []}
    for name, a in (pair for turn in turns for pair in turn if pair):
        mark, rows = "✓" if a.get("correct") else "✗", [(k, a.get(k, "")) for k in ("expected", "given")]
        cards[mark].append(table((f"{mark} {name}", a.get("question", "")), rows))
    shown = [card for kind in cards.values() for card in kind[:ANSWERS_SHOWN]]
    return ["## Questions and answers", "*Some right and some wrong, not in proportion.*", *shown] if shown else []


def held_out_answers(m: Model) -> list[str]:
    """Held-out questions of real conversations, answered before and after fine-tuning, the closest answers first."""
    asked: dict[tuple[str, str], dict[str, str]] = {}
    for r in (r for s in m.stages for r in files.read_jsonl(s.folder / "samples.jsonl") if "expected" in r):
        asked.setdefault((r["prompt"], r["expected"]), {"before": r["text"]})["after"] = r["text"]  # in order of steps
    cards = []
    for (prompt, expected), given in asked.items():
        shared = sum((Counter(expected) & Counter(given["after"])).values())
        score = 2 * shared / max(1, len(expected) + len(given["after"]))
        cards.append((score, table((f"{score:.0%}", prompt), [("expected", expected), *given.items()])))
    note = "*All of them, good and bad; the figure is how many characters an answer shares with the expected one (F1).*"
    return ["## Held-out conversations", note, *(c for _, c in sorted(cards, reverse=True))] if cards else []


def curves(m: Model, stage: Stage, pictures: dict[str, bytes]) -> list[str]:
    """Loss, bits per byte, speed and learning rate of a stage."""
    levels, images = {name: bpb for name, bpb, *_ in m.margins}, []
    for name, title, unit, keys in CURVES:
        axis, file = "time_s" if unit == "s" else unit, f"{stage.name}-{name}.png"
        lines = {label: line for label, key in keys.items() if (line := stage.points(key, axis))[0]}
        if lines and (stage is m.stages[0] or name not in FIRST_STAGE_ONLY):
            pictures[file] = draw_curve(title, unit, lines, levels if file == "base-bpb.png" else {})
            ends = ", ".join(f"{label} ends at {y[-1]:.4g}" for label, (_, y) in lines.items())
            images.append(f"![{TITLES[stage.name]}: {title} against {axis.removesuffix('_s')}; {ends}]({file})")
    return [f"## {TITLES[stage.name]}", "\n".join(images)] if images else []


def course(m: Model) -> list[str]:
    """The last numbers of every stage."""
    rows = [[what, *(show(s.last(key), form) for s in m.stages)] for what, key, form in COURSE]
    for kind in ("resume", "skip"):
        rows.append([f"{kind}s", *(str(sum(e.get("event") == kind for e in s.events)) for s in m.stages)])
    header = ("", *(TITLES[s.name] for s in m.stages))
    note = "*The last value of each; held-out loss of fine-tuning counts the answers only.*"
    return ["## The runs in numbers", table(header, rows, range(1, len(header))), note]


def costs(m: Model) -> list[str]:
    """Time, energy and money of the training, the last two by stated assumptions."""
    began = next((e for e in reversed(m.stages[0].events) if e.get("world_size")), {})
    device, n = find_device(str(began.get("device"))), os.cpu_count() or 1
    watts, name, usd = CPU_WATTS, "processor cores", CPU_WATTS / 1000 * ELECTRICITY_USD
    if device:
        watts, name, usd, n = device.watts, device.name, device.usd_per_hour, int(began["world_size"])
    of = f"rented at {usd:g} USD an hour each" if device else f"electricity at {ELECTRICITY_USD} USD per kWh"
    hours, note = n * m.seconds / 3600, "*Energy and cost are estimates by the assumptions beside them.*"
    rows = [("time", duration(m.seconds)), ("energy", f"{watts * hours:,.1f} Wh: {n} {name} at {watts:g} W each")]
    return ["## Time, energy, cost", table(("", ""), [*rows, ("cost", f"{usd * hours:,.4f} USD: {of}")]), note]


def others(m: Model) -> list[str]:
    """The models trained last under the same base directory, beside this one."""
    newest, rows = sorted(paths.run_files("metrics.jsonl"), key=lambda p: -p.stat().st_mtime), []
    tags = [tag for tag in dict.fromkeys(p.parent.name for p in newest) if paths.TAG_PATTERN.fullmatch(tag)]
    for other in (m, *(Model(tag) for tag in tags[:MODELS_SHOWN] if tag != m.tag)):
        made, right = other.stages[0].recipe, show(other.chat_eval.get("overall"))
        size, name = f"{made.num_params / 1e6:,.1f} M" if made else "-", other.tag + " (this one)" * (other is m)
        bpb, took = show(other.bpb, "{:.3f}"), duration(other.seconds)
        rows.append((name, size, bpb, right, took, " ".join(other.stages[0].data)))
    header = ("", "parameters", "bits per byte", "right answers", "time", "data")
    note = "*Bits per byte and answers can be compared where data and questions are the same.*"
    return ["## Other models here", table(header, rows, range(1, 5)), note] if len(rows) > 1 else []


def token_facts(name: str, sample: str) -> list[str]:
    """What the vocabulary holds, and a text cut into its tokens, which the page colours."""
    from nanozhchat.tokenizer import Tokenizer

    facts = read_object(paths.tokenizer_dir(name) / "stats.json")
    blocks = [table(("", ""), [(show(facts.get(key)), said) for key, said in TOKEN_FACTS])]
    with contextlib.suppress(OSError, ValueError, DamagedError):
        tokenizer, marks = Tokenizer.load(paths.tokenizer_dir(name)), str.maketrans(" \n\t\r`", "␣⏎⇥␍ˋ")
        parts = [tokenizer.decode_bytes([i]).decode("utf-8", "backslashreplace") for i in tokenizer.encode(sample)]
        cut = " ".join(f"`{part.translate(marks)}`" for part in parts[:TOKENS_SHOWN])
        blocks += [f"The model's own words, the first {TOKENS_SHOWN} tokens at most:", cut] if cut else []
    return blocks


def data(m: Model) -> list[str]:
    """What it was trained on, and its tokenizer."""
    base, checkpoints = paths.base_dir(), sorted(m.stages[0].folder.glob("step_[0-9]*[0-9]/manifest.json"))
    identity = read_object(checkpoints[-1]).get("identity", {}) if checkpoints else {}
    found = [(p.parent.name, read_object(p)) for p in sorted(base.glob("corpus/*/manifest.json"))]
    name, corpus = next(((n, c) for n, c in found if c.get("hash") == identity.get("data_hash", "")), ("", {}))
    tokens = read_object(base / "tokens" / f"{name}-{str(identity.get('tokenizer_hash'))[:12]}" / "manifest.json")
    rows = [(f"{TITLES[s.name].lower()} data", " ".join(s.data)) for s in m.stages]
    for split, what in (("train", "to train on"), ("val", "held out")):
        texts, packed = (part.get("totals", {}).get(split, {}) for part in (corpus, tokens))
        sizes = ((texts, "rows", "documents"), (texts, "bytes", "bytes"), (packed, "tokens", "tokens"))
        known = [f"{part[key]:,} {unit}" for part, key, unit in sizes if is_number(part.get(key))]
        few = split == "val" and is_number(n := texts.get("rows")) and n < FEW_DOCUMENTS
        rows += [(what, ", ".join(known) + ": figures measured on so little say little" * few)] if known else []
    rows += [(f"corpus {k}", str(corpus[k])) for k in ("source", "licence", "hash") if corpus.get(k)]
    if tokenizer := identity.get("tokenizer"):
        meta = read_object(base / "tokenizer" / str(tokenizer) / "meta.json")
        learnt = show((meta.get("trained_on") or {}).get("bytes"), "{:,} bytes")
        rows.append(("tokenizer", f"{tokenizer}: {show(meta.get('vocab_size'), '{:,}')} tokens, learnt from {learnt}"))
    size, n_tokens = m.base_eval.get("bytes"), m.base_eval.get("tokens")
    rows += [("held-out bytes per token", f"{size / n_tokens:.3f}")] if is_number(size) and n_tokens else []
    gone = "*The corpus is not under this base directory any more; `python -m scripts.base_train` makes it again.*"
    said = [r.get("text", "") for s in m.stages for r in files.read_jsonl(s.folder / "samples.jsonl")]
    whole = str(said[-1]).replace("\ufffd", "") if said else ""  # a character that was cut off is none of its tokens
    shown = token_facts(str(tokenizer), whole) if tokenizer and said else []
    return ["## Data and tokenizer", table(("", ""), rows), *([] if corpus else [gone]), *shown]


def recipe_table(m: Model) -> list[str]:
    """Every number of the recipe with its formula."""
    if (made := m.stages[0].recipe) is None:
        return ["## Recipe", "None of this version is beside the run; `python -m scripts.recipe` prints one."]
    said = f"Everything follows from depth {made.depth}; what was set by hand is marked (set)."
    return ["## Recipe", said, table(("field", "value", "formula"), explain(made), {1})]


def machine() -> list[str]:
    """The machine that writes the report, described without importing torch."""
    rows = [("system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} processor cores")]
    places = [("processor", "/proc/cpuinfo", "model name"), ("memory", "/proc/meminfo", "MemTotal")]
    places += [("GPU", str(p), "Model") for p in Path("/proc/driver/nvidia/gpus").glob("*/information")]
    for what, place, key in places:
        with contextlib.suppress(OSError):
            rows += [(what, v) for v in re.findall(rf"{key}\s*:\s*(.+)", Path(place).read_text(errors="replace"))[:1]]
    rows = [(what, f"{int(v.split()[0]) / 2**20:.1f} GiB" if v.endswith(" kB") else v) for what, v in rows]
    rows.append(("software", f"Python {platform.python_version()}, torch {version('torch')}"))
    note = "*The machine that wrote this report; the model may have been trained on another.*"
    return ["## Machine", table(("", ""), rows), note]


def write_report(tag: str) -> Path:
    """Write the report of a model and return its folder; raises FileNotFoundError if nothing was trained."""
    m, pictures, title = Model(tag), dict[str, bytes](), f"{tag}: a Chinese chat model, trained from nothing"
    blocks = [f"# {text(title)}", *summary(m), *held_out(m), *skills(m, pictures), *samples(m), *answers(m)]
    blocks += [*held_out_answers(m), *(block for stage in m.stages for block in curves(m, stage, pictures))]
    chat, web = (f"python -m scripts.{name} --model-tag={tag}" for name in ("chat_cli", "chat_web"))
    commands = f"```bash\n{chat}\n{web}   # then open http://localhost:8000\n```"
    blocks += [*course(m), *costs(m), *others(m), *data(m), *recipe_table(m), *machine(), "## Talk to it", commands]
    blocks = [f"## {both(b[3:])}" if b.startswith("## ") else b for b in blocks]
    folder, markdown = paths.report_dir(tag), "\n\n".join(blocks) + "\n"
    for path in folder.glob("*.png"):  # of an earlier report
        path.unlink()
    pages = {"report.md": markdown, "report.html": page(title, markdown, pictures)}
    for name, content in {**pictures, **{k: v.encode("utf-8", "replace") for k, v in pages.items()}}.items():
        files.atomic_write(folder / name, content)
    return folder
