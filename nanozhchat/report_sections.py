"""The sections of a report: what is missing is left out, with a sentence that names the command that makes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nanozhchat.charts import DARK, LIGHT, Bar, Curve, Series, draw_curve, draw_scores
from nanozhchat.recipe import explain
from nanozhchat.report_data import Model, Stage
from nanozhchat.report_html import Block, Card, Cards, Code, Figure, Figures, Heading, Para, Span, Table
from nanozhchat.report_numbers import compare, is_number, margins, number, percent

STAGE_TITLES = {"base": "Pretraining", "sft": "Fine-tuning", "rl": "Reinforcement learning"}
PROMPTS_SHOWN = 5
WRONG_SHOWN, RIGHT_SHOWN = 6, 6
TEXT_CHARS = 400  # of a question, answer or sample shown


def say(*spans: Span, note: bool = False) -> Para:
    """Make a paragraph."""
    return Para(spans, note=note)


def _short(text: object, limit: int = TEXT_CHARS) -> str:
    shown = str(text)
    return shown if len(shown) <= limit else shown[:limit] + "…"


def task_scores(model: Model) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, score) of every task, without the prefix that all names share."""
    tasks = model.chat_eval.get("tasks") or {}
    keys = ("score", "low", "high", "chance", "n")
    rows = [(n, t) for n, t in tasks.items() if isinstance(t, dict) and all(is_number(t.get(k)) for k in keys)]
    same = all(name.startswith("builtin:") for name, _ in rows)
    return [(name.removeprefix("builtin:") if same else name, task) for name, task in rows]


def data_specs(stage: Stage) -> list[str]:
    """Return what a stage was trained on, as given to --data."""
    given = stage.config.get("data") or ["builtin"]
    return [str(s) for s in given] if isinstance(given, list) else [str(given)]


# --- sections


def held_out(model: Model) -> Iterator[Block]:
    """Bits per byte beside general compressors."""
    yield Heading("Held-out text")
    bpb, found = model.base_eval.get("bpb"), margins(model.base_eval)
    if not is_number(bpb):
        yield say(
            "Not compared with general compressors yet: ",
            Code(f"python -m scripts.base_eval --model-tag={model.tag}"),
            ".",
        )
        return
    for name, _, margin in found:
        yield say(f"{compare(margin, name)} on the same held-out bytes.")
    n_bytes, n_tokens = model.base_eval.get("bytes"), model.base_eval.get("tokens")
    rows = [(model.tag, f"{bpb:.4f}", "", number(model.base_eval.get("ppl"), "{:.2f}"))]
    rows += [(f"{name} -9", f"{value:.4f}", f"{margin:+.4f}", "") for name, value, margin in found]
    yield Table(("", "bits per byte", "model ahead by", "perplexity per token"), rows, frozenset({1, 2, 3}))
    about = f"Step {model.base_eval.get('step', '?')}"
    if is_number(n_bytes) and is_number(n_tokens):
        about += f", {n_bytes:,} bytes, {n_tokens:,} tokens"
    yield say(
        f"{about}. Lower is better; 8 bits per byte is no compression at all. The compressors pack the same "
        "text in one piece, but unlike the model they bring no knowledge from training.",
        note=True,
    )


def skills(model: Model) -> Iterator[Block]:
    """Scores with chance and interval, and refusals."""
    yield Heading("Skills")
    scores = task_scores(model)
    if not scores:
        command = f"python -m scripts.chat_eval --tasks builtin --model-tag={model.tag}"
        yield say("No questions asked yet: ", Code(command), ".")
        return
    scores.sort(key=lambda pair: -pair[1]["score"])
    bars = [Bar(name, t["score"], t["low"], t["high"], t["chance"]) for name, t in scores]
    alt = "Bar chart of right answers by skill: " + ", ".join(f"{b.name} {percent(b.score)}" for b in bars)
    yield Figures([Figure("skills", alt, draw_scores(bars, LIGHT), draw_scores(bars, DARK))])
    rows = [
        (
            Code(name),
            percent(t["score"]),
            f"{percent(t['low'])} – {percent(t['high'])}",
            percent(t["chance"]),
            f"{t['n']:,}",
        )
        for name, t in scores
    ]
    mean = ("mean", percent(model.chat_eval.get("overall")), "", "", "")
    yield Table(("skill", "right", "95 % interval", "chance", "questions"), [*rows, mean], frozenset({1, 2, 3, 4}))
    refusal = model.chat_eval.get("refusal") or {}
    if is_number(refusal.get("unknowable")) and is_number(refusal.get("knowable")):
        yield say(
            f"It says that it does not know to {percent(refusal['unknowable'])} of the questions that cannot be "
            f"answered (higher is better), and to {percent(refusal['knowable'])} of those that can (lower is "
            "better)."
        )
    yield say(
        f"Stage {model.chat_stage}, step {model.chat_eval.get('step', '?')}. Greedy answers to questions whose "
        "content was never trained on.",
        note=True,
    )


def samples(model: Model) -> Iterator[Block]:
    """The same beginnings, continued early, midway and at the end."""
    stage = next((s for s in model.stages if s.samples), None)
    yield Heading("Learning to speak")
    if stage is None:
        yield say(
            "No samples were taken during training: ",
            Code("python -m scripts.base_train --sample-every=100"),
            " takes some.",
        )
        return
    steps = sorted({row["step"] for row in stage.samples})
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    texts = {(row.get("prompt"), row["step"]): row.get("text", "") for row in stage.samples}
    prompts = list(dict.fromkeys(str(row.get("prompt")) for row in stage.samples))[:PROMPTS_SHOWN]
    yield say("The same beginnings, continued by the model as training went on.")
    cards = [Card(p, [_short(texts.get((p, step), "")) for step in chosen]) for p in prompts]
    yield Cards("beginning", [f"step {step:,}" for step in chosen], cards)


def examples(model: Model) -> Iterator[Block]:
    """Questions with expected and given answers."""
    examples = model.chat_eval.get("examples") or {}
    cards: dict[bool, list[Card]] = {True: [], False: []}
    for turn in range(max(map(len, examples.values()), default=0)):  # the first of every skill, then the second, ...
        for name, answers in examples.items():
            if turn < len(answers):
                a, tag = answers[turn], name.removeprefix("builtin:")
                texts = [_short(a.get("expected", "")), _short(a.get("given", ""))]
                cards[bool(a.get("correct"))].append(
                    Card(_short(a.get("question", "")), texts, bool(a["correct"]), tag)
                )
    if cards[True] or cards[False]:
        yield Heading("Questions and answers")
        yield say("Some right and some wrong, not in proportion.", note=True)
        yield Cards("question", ("expected", "given"), cards[True][:RIGHT_SHOWN] + cards[False][:WRONG_SHOWN])


def curves(model: Model, stage: Stage) -> Iterator[Block]:
    """Loss, bits per byte, speed and learning rate of a stage."""
    title = STAGE_TITLES[stage.name]

    def both(kind: str, against: str) -> list[Series]:
        found = [
            Series("training", *stage.points(f"train/{kind}", against), noisy=True),
            Series("held out", *stage.points(f"val/{kind}", against), points=True),
        ]
        return [s for s in found if s.x]

    levels = {f"{name} -9": bpb for name, bpb, _ in margins(model.base_eval)} if stage.name == "base" else {}
    speed, rate = (
        Series(name, *stage.points(k, a))
        for name, k, a in (("speed", "tok_per_sec", "time_s"), ("rate", "lr", "tokens"))
    )
    wanted = {
        "bpb": Curve("bits per byte", "tokens", both("bpb", "tokens"), levels),
        "loss-tokens": Curve("loss, nats per token", "tokens", both("loss", "tokens")),
        "loss-time": Curve("loss, nats per token", "s", both("loss", "time_s")),
        "speed": Curve("tokens per second", "s", [speed] if speed.x else [], from_zero=True),
        "lr": Curve("learning rate of the matrices", "tokens", [rate] if rate.x else [], from_zero=True),
    }
    figures = []
    for name, curve in wanted.items():
        if curve.series:
            last = ", ".join(f"{s.name} ends at {s.y[-1]:.4g}" for s in curve.series)
            marks = "".join(f", {n} at {level:.3f}" for n, level in curve.levels.items())
            axis = "time" if curve.unit == "s" else "tokens"
            alt = f"{title}: {curve.title} against {axis}; {last}{marks}"
            figures.append(Figure(f"{stage.name}-{name}", alt, draw_curve(curve, LIGHT), draw_curve(curve, DARK)))
    if figures:
        yield Heading(title)
        yield Figures(figures)


def course(model: Model) -> Iterator[Block]:
    """The last numbers of every stage."""
    yield Heading("The runs in numbers")
    header = ("", *(STAGE_TITLES[s.name] for s in model.stages))
    wanted = (
        ("steps", "step", "{:,.0f}"),
        ("tokens", "tokens", "{:,.0f}"),
        ("bytes of text", "bytes", "{:,.0f}"),
        ("seconds", "time_s", "{:,.0f}"),
        ("FLOPs", "flops", "{:.3g}"),
        ("training loss", "train/loss", "{:.4f}"),
        ("held-out loss", "val/loss", "{:.4f}"),
        ("held-out bits per byte", "val/bpb", "{:.4f}"),
        ("held-out perplexity", "val/ppl", "{:.2f}"),
        ("tokens per second", "tok_per_sec", "{:,.0f}"),
    )
    rows = [[what, *(number(s.last(key), form) for s in model.stages)] for what, key, form in wanted]
    rows.append(["share of the machine's peak", *(percent(s.last("mfu") or None) for s in model.stages)])
    memory = [max(s.points("mem_bytes", "step")[1], default=0.0) for s in model.stages]
    rows.append(["peak memory", *(f"{m / 2**30:.2f} GiB" if m else "-" for m in memory)])
    for kind in ("resume", "skip"):
        rows.append([f"{kind}s", *(str(sum(e.get("event") == kind for e in s.events)) for s in model.stages)])
    yield Table(header, rows, frozenset(range(1, len(header))))
    yield say("The last value of each; held-out loss of fine-tuning counts the answers only.", note=True)


def data(model: Model) -> Iterator[Block]:
    """What it was trained on, and its tokenizer."""
    yield Heading("Data and tokenizer")
    rows: list[tuple[str, str]] = []
    for stage in model.stages:
        rows.append((f"{STAGE_TITLES[stage.name].lower()} data", Code(" ".join(data_specs(stage)))))
    for split, what in (("train", "to train on"), ("val", "held out")):
        texts, packed = (m.get("totals", {}).get(split, {}) for m in (model.corpus, model.tokens))
        if is_number(texts.get("bytes")) and is_number(texts.get("rows")):
            line = f"{texts['rows']:,} documents, {texts['bytes'] / 1e6:,.1f} MB"
            rows.append((what, line + (f", {packed['tokens']:,} tokens" if is_number(packed.get("tokens")) else "")))
    for key in ("source", "licence", "hash"):
        if model.corpus.get(key):
            rows.append((f"corpus {key}", Code(_short(model.corpus[key], 16 if key == "hash" else TEXT_CHARS))))
    if model.tokenizer:
        facts, learnt = model.tokenizer, model.tokenizer.get("trained_on") or {}
        rows.append(("tokenizer", Code(facts["name"])))
        size = facts.get("vocab_size")
        rows.append(("vocabulary", f"{size:,} tokens ({facts.get('kind', 'bpe')})")) if is_number(size) else None
        if is_number(learnt.get("bytes")):
            rows.append(("trained on", f"{learnt['bytes'] / 1e6:,.1f} MB"))
    n_bytes, n_tokens = model.base_eval.get("bytes"), model.base_eval.get("tokens")
    if n_tokens and is_number(n_bytes) and is_number(n_tokens):
        rows.append(("held-out bytes per token", f"{n_bytes / n_tokens:.3f}"))
    yield Table(("", ""), rows)
    if not model.corpus:
        yield say(
            "The corpus it was trained on is not under this base directory any more; ",
            Code("python -m scripts.base_train"),
            " makes it again from the same data.",
            note=True,
        )


def recipe_table(model: Model) -> Iterator[Block]:
    """Every number of the recipe with its formula."""
    stage = model.stages[0]
    yield Heading("Recipe")
    if stage.recipe is None:
        yield say(
            "The recipe of this run is missing or of another version; ",
            Code("python -m scripts.recipe"),
            " prints one.",
        )
        return
    yield say(f"Everything follows from depth {stage.recipe.depth}; what was set by hand is marked (set).")
    rows = [(Code(name), value, formula) for name, value, formula in explain(stage.recipe)]
    yield Table(("field", "value", "formula"), rows, frozenset({1}), fold=f"{len(rows)} numbers and their formulas")
