"""Run folders -> a report for people: what was trained on what, how it went, what the model can do.

`write_report("d4")` makes `report/d4/report.md`, `report.html` and the PNG curves. What does not exist yet is left
out, with a sentence that names the command that makes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from nanozhchat import paths, report_sections
from nanozhchat.files import atomic_write
from nanozhchat.report_data import Model, finished_at, machine, read_model
from nanozhchat.report_html import Block, Code, Commands, Figures, Heading, Para, Table, Tiles, markdown, page
from nanozhchat.report_numbers import compare, count, duration, is_number, margins, number, percent
from nanozhchat.report_sections import STAGE_TITLES, data_specs, say, task_scores

ZH_UNITS = ("小时", "分", "秒", "")
ZH_STAGES = {"base": "预训练", "sft": "对话微调", "rl": "强化学习"}


def write_report(tag: str) -> Path:
    """Write the report of a model and return its folder; raises FileNotFoundError if nothing was trained."""
    model = read_model(tag)
    folder = paths.report_dir(tag)
    title = f"{tag}: a Chinese chat model, trained from nothing"
    blocks = list(contents(model))
    pictures = {f.name: f.png for b in blocks if isinstance(b, Figures) for f in b.items}
    for name, png in pictures.items():
        atomic_write(folder / f"{name}.png", png)
    for path in folder.glob("*.png"):  # of an earlier report
        if path.stem not in pictures:
            path.unlink()
    atomic_write(folder / "report.md", markdown(title, blocks).encode("utf-8", "replace"))
    atomic_write(folder / "report.html", page(title, blocks).encode("utf-8", "replace"))
    return folder


def contents(model: Model) -> Iterator[Block]:
    """Yield the whole report."""
    yield from summary(model)
    yield from report_sections.held_out(model)
    yield from report_sections.skills(model)
    yield from report_sections.samples(model)
    yield from report_sections.examples(model)
    for stage in model.stages:
        yield from report_sections.curves(model, stage)
    yield from report_sections.course(model)
    yield from report_sections.data(model)
    yield from report_sections.recipe_table(model)
    yield Heading("Machine")
    yield Table(("", ""), machine())
    yield say("The machine that wrote this report; the model may have been trained on another.", note=True)
    yield Heading("Talk to it")
    chat, web = (f"python -m scripts.{name} --model-tag={model.tag}" for name in ("chat_cli", "chat_web"))
    yield Commands([chat, f"{web}   # then open http://localhost:8000"])


def summary(model: Model) -> Iterator[Block]:
    """What was trained on what, how long, the best numbers: in English, in Chinese, as figures; what is unfinished."""
    yield Para(_english(model))
    yield Para(_chinese(model), lang="zh")
    yield Tiles(_figures(model))
    dates = "; ".join(f"{STAGE_TITLES[s.name].lower()} ended {finished_at(s)}" for s in model.stages)
    yield say(f"{dates[:1].upper()}{dates[1:]}.", note=True)
    for stage in model.stages:
        if not stage.finished:
            step = number(stage.last("step"), "{:,.0f}")
            yield say(f"{STAGE_TITLES[stage.name]} has not run to its end (step {step}): its command continues it.")
    if model.stage("sft") is None:
        command = Code(f"python -m scripts.chat_sft --model-tag={model.tag}")
        yield say("It continues text but was not taught to chat yet: ", command, ".")


def _params(model: Model) -> int | None:
    return next((stage.recipe.num_params for stage in model.stages if stage.recipe), None)


def _bpb(model: Model) -> float | None:
    own = model.base_eval.get("bpb")
    base = model.stage("base")
    return own if is_number(own) else base.last("val/bpb") if base else None


def _chance(scores: Sequence[tuple[str, dict[str, float]]]) -> str:
    return percent(sum(task["chance"] for _, task in scores) / len(scores))


def _listed(names: Sequence[str], between: str) -> list[str]:
    return [part for name in names for part in (between, Code(name))][1:]


def _english(model: Model) -> list[str]:
    params, bpb, scores, base = _params(model), _bpb(model), task_scores(model), model.stage("base")
    text = [Code(model.tag), " is a Chinese language model", f" of {count(params)} parameters" if params else ""]
    if base:
        seen = f"{count(base.last('tokens') or 0)} tokens ({(base.last('bytes') or 0) / 1e6:,.1f} MB of text)"
        text += [", trained from nothing on ", *_listed(data_specs(base), ", "), f": {seen} in {base.took()}"]
    text += [f", then {s.took()} of {STAGE_TITLES[s.name].lower()}" for s in model.stages if s.name != "base"]
    text.append(".")
    if bpb is not None:
        better = ", ".join(compare(margin, name) for name, _, margin in margins(model.base_eval))
        text.append(f" On held-out text it needs {bpb:.3f} bits per byte")
        text.append(f": {better}, on the same bytes." if better else ".")
    if scores:
        text.append(
            f" It answers {percent(model.chat_eval.get('overall'))} of held-out questions right (mean of "
            f"{len(scores)} skill{'s' * (len(scores) > 1)}; blind guessing: {_chance(scores)})."
        )
    return text


def _chinese(model: Model) -> list[str]:
    params, bpb, scores, base = _params(model), _bpb(model), task_scores(model), model.stage("base")
    text = [Code(model.tag), " 是一个中文模型", f"，共 {params / 1e4:,.0f} 万个参数" if params else ""]
    if base:
        seen = f"{(base.last('tokens') or 0) / 1e4:,.0f} 万个词元（{(base.last('bytes') or 0) / 1e6:,.1f} MB 文本）"
        text += [
            "，从零开始训练。预训练数据为 ",
            *_listed(data_specs(base), "、"),
            f"，共 {seen}，用时 {base.took(ZH_UNITS)}",
        ]
    text += [f"；{ZH_STAGES[s.name]}用时 {s.took(ZH_UNITS)}" for s in model.stages if s.name != "base"]
    text.append("。")
    if bpb is not None:
        text.append(f"在留出文本上，每字节需要 {bpb:.3f} 比特")
        text += [
            f"，比 {name} -9 {'少' if margin >= 0 else '多'} {abs(margin):.2f} 比特"
            for name, _, margin in margins(model.base_eval)
        ]
        text.append("。")
    if scores:
        text.append(f"对训练中从未出现过的问题，平均答对 {percent(model.chat_eval.get('overall'))}")
        text.append(f"（{len(scores)} 项能力；随机猜测为 {_chance(scores)}）。")
    return text


def _figures(model: Model) -> list[tuple[str, str]]:
    params, bpb, scores, first = _params(model), _bpb(model), task_scores(model), model.stages[0]
    vocabulary = model.tokenizer.get("vocab_size") or (first.recipe.vocab_size if first.recipe else None)
    figures = [(f"{bpb:.3f}", "bits per byte of held-out text")] if bpb is not None else []
    figures += [
        (f"{abs(margin):.2f}", f"bits per byte {'better' if margin >= 0 else 'worse'} than {name} -9")
        for name, _, margin in margins(model.base_eval)
        if name == "xz"
    ]
    if scores:
        what = f"of held-out questions right; blind guessing {_chance(scores)}"
        figures.append((percent(model.chat_eval.get("overall")), what))
    figures.append((duration(sum(s.last("time_s") or 0.0 for s in model.stages)), "of training"))
    figures += [(count(params), "parameters")] if params else []
    figures += [(f"{vocabulary:,}", "tokens in the vocabulary")] if is_number(vocabulary) else []
    return figures
