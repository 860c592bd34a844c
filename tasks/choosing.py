"""Benchmarks with choices, a table: Chinese first, then English. Nothing of them is part of this repository.

None was fetched from the hub by this project's tests, which run offline on the published files' layouts; hub names and
columns are those of the data sets' own pages, and no revision is pinned for that reason (`Spec.revision`).
"""

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

from tasks.base import Item, Spec

NEWS: dict[str, str] = {
    "100": "故事", "101": "文化", "102": "娱乐", "103": "体育", "104": "财经", "106": "房产", "107": "汽车",
    "108": "教育", "109": "科技", "110": "军事", "112": "旅游", "113": "国际", "114": "股票", "115": "农业",
    "116": "游戏",
}  # fmt: skip
NLI = {"entailment": "对", "contradiction": "不对", "neutral": "也许"}
SUBSETS = tuple("".join(c) for n in range(1, 5) for c in itertools.combinations("ABCD", n))


def few(items: Callable[[Any], Iterator[Item]], name: str, examples: str = "", **options: Any) -> Spec:
    """Return the entry of a task of FewCLUE."""
    page = "github.com/CLUEbenchmark/FewCLUE"
    return Spec(items, "none stated", page, f"fewclue/{name}/dev_few_all.json", examples, **options)


def lettered(question: str, answer: str) -> Callable[[Any], Iterator[Item]]:
    """Return the reader of rows with columns A to D; rows without a published answer are left out."""

    def items(row: Any) -> Iterator[Item]:
        if row[answer]:
            yield Item(row[question].strip(), tuple(row[x] for x in "ABCD"), "ABCD".index(row[answer].strip()))

    return items


def c3(row: Any) -> Iterator[Item]:
    """[passage, questions, id], or the hub's row with `context`, one question each."""
    passage, questions = (row["context"], [row]) if isinstance(row, dict) else row[:2]
    for q in questions:
        yield Item("\n".join([*passage, f"问题：{q['question']}"]), tuple(q["choice"]), q["choice"].index(q["answer"]))


def chid(row: Any) -> Iterator[Item]:
    """FewCLUE: one text, one gap. The hub's CLUE: several texts with several gaps, the same candidates for all."""
    few = isinstance(row["content"], str)
    golds = iter([row["answer"]] if few else row["answers"]["candidate_id"])
    for text in [row["content"]] if few else row["content"]:
        parts = re.split(r"#idiom\d*#", text.strip())
        for i in range(1, len(parts)):
            before, after = "____".join(parts[:i]), "____".join(parts[i:])
            ask = f"选出填入【】的成语。\n{before}【】{after}"
            yield Item(ask, tuple(row["candidates"]), int(next(golds)), fill=(before, after))


def cluewsc(row: Any) -> Iterator[Item]:
    """Does this pronoun mean that noun?"""
    if row["label"]:
        t, text = row["target"], row["text"]
        at = t["span2_index"]
        marked = f"{text[:at]}【{t['span2_text']}】{text[at + len(t['span2_text']) :]}"
        ask = f"{marked}\n句中的【{t['span2_text']}】指的是“{t['span1_text']}”吗？"
        yield Item(ask, ("是", "不是"), ["true", "false"].index(row["label"]))


def ocnli(row: Any) -> Iterator[Item]:
    """Pairs on which the annotators did not agree carry the label "-" and are left out."""
    if row["label"] in NLI:
        first, second = row["sentence1"].rstrip("。"), row["sentence2"]
        ask = f"前提：{first}。\n假设：{second}\n由前提看，假设对吗？"
        yield Item(ask, tuple(NLI.values()), list(NLI).index(row["label"]), fill=(f"{first}？", f"，{second}"))


def eprstmt(row: Any) -> Iterator[Item]:
    """Reviews of goods."""
    ask = f"评论：{row['sentence']}\n这位顾客满意还是失望？"
    gold = ["Positive", "Negative"].index(row["label"])
    yield Item(ask, ("满意", "失望"), gold, fill=(f"{row['sentence']} 我很", "。"))


def tnews(row: Any) -> Iterator[Item]:
    """Headlines in 15 classes; a model that continues text says how likely the headline is in news of each class."""
    if str(row["label"]) in NEWS:
        ask = f"新闻标题：{row['sentence']}\n它属于哪一类？"
        gold = list(NEWS).index(str(row["label"]))
        yield Item(ask, tuple(NEWS.values()), gold, fill=("这是一条关于", f"的新闻：{row['sentence']}"))


def gaokao(row: Any) -> Iterator[Item]:
    """The choices are listed in the question; several questions on one text become one item each.

    A row with an answer of several letters may be answered by any set of letters; the line's end says where it ends.
    """
    many = any(len(a) > 1 for a in row["answer"])
    seven = any(set(a) & set("EFG") for a in row["answer"])
    choices = SUBSETS if many else tuple("ABCDEFG" if seven else "ABCD")
    for i, answer in enumerate(row["answer"], start=1):
        which = f"\n第 {i} 个空或小题" if len(row["answer"]) > 1 else ""
        ask = row["question"].strip() + which
        yield Item(ask, choices, choices.index(answer), fill=(f"{ask}\n答案：", "\n") if many else None)


def arc(row: Any) -> Iterator[Item]:
    """ARC and OpenBookQA, as published and on the hub."""
    q = row.get("question_stem") or row["question"]
    q, choices = (q["stem"], q["choices"]) if isinstance(q, dict) else (q, row["choices"])
    if isinstance(choices, list):
        choices = {k: [c[k] for c in choices] for k in ("text", "label")}
    yield Item(f"Question: {q}", tuple(choices["text"]), choices["label"].index(row["answerKey"]))


def mmlu(row: Any) -> Iterator[Item]:
    """[question, A, B, C, D, answer], or the hub's row."""
    question, *choices, answer = row if isinstance(row, list) else [row["question"], *row["choices"], row["answer"]]
    yield Item(question.strip(), tuple(choices), "ABCD".index(answer))


def hellaswag(row: Any) -> Iterator[Item]:
    """Endings of a text."""
    endings = tuple(" " + e for e in row["endings"])
    yield Item(f"{row['ctx']}\nWhich ending fits?", endings, int(row["label"]), fill=(row["ctx"], ""))


def piqa(row: Any) -> Iterator[Item]:
    """Ways to a goal; rows with their label, as on the hub."""
    yield Item(f"Question: {row['goal']}", (row["sol1"], row["sol2"]), int(row["label"]))


def winogrande(row: Any) -> Iterator[Item]:
    """A gap in a sentence."""
    ask = f"Fill the gap: {row['sentence']}"
    before, after = row["sentence"].split("_", 1)
    yield Item(ask, (row["option1"], row["option2"]), int(row["answer"]) - 1, fill=(before, after))


def boolq(row: Any) -> Iterator[Item]:
    """Yes or no, by a passage."""
    yield Item(f"{row['passage']}\nQuestion: {row['question']}?", ("no", "yes"), int(row["answer"]))


def copa(row: Any) -> Iterator[Item]:
    """Cause or effect of an event."""
    word = "because" if row["question"] == "cause" else "so"
    choices = tuple(f" {c[0].lower()}{c[1:]}" for c in (row["choice1"], row["choice2"]))
    gold = int(str(row["label"]).replace("choice1", "0").replace("choice2", "1"))
    lead = f"{row['premise'].rstrip('.')} {word}"
    yield Item(f"{lead} …", choices, gold, fill=(lead, ""))


NC = "CC BY-NC-SA 4.0"
CHOOSING: dict[str, Spec] = {
    "ceval": Spec(
        lettered("question", "answer"), NC, "github.com/hkust-nlp/ceval", "ceval/val/*.csv", "ceval/dev/*.csv",
        hub="ceval/ceval-exam ceval-exam.zip val/*.csv dev/*.csv", letters=True, shots=5),
    "cmmlu": Spec(
        lettered("Question", "Answer"), NC, "github.com/haonan-li/CMMLU", "cmmlu/test/*.csv", "cmmlu/dev/*.csv",
        hub="haonan-li/cmmlu cmmlu_v1_0_1.zip test/*.csv dev/*.csv", letters=True, shots=5),
    "gaokao": Spec(
        gaokao, "Apache-2.0", "github.com/OpenLMLab/GAOKAO-Bench", "gaokao_bench/Objective_Questions/*.json"),
    "c3": Spec(c3, "non-commercial research only", "github.com/nlpdata/c3", "c3/c3-?-dev.json", "c3/c3-?-train.json",
               hub="clue/clue c3 validation train", per_char=True),
    "chid": few(chid, "chid", hub="clue/clue chid validation -"),
    "cluewsc": few(cluewsc, "cluewsc", "fewclue/cluewsc/train_few_all.json", shots=4,
                   hub="clue/clue cluewsc2020 validation train"),
    "ocnli": few(ocnli, "ocnli", hub="clue/clue ocnli validation -"),
    "eprstmt": few(eprstmt, "eprstmt"),
    "tnews": few(tnews, "tnews", hub="clue/clue tnews validation -"),
    "mmlu": Spec(mmlu, "MIT", "github.com/hendrycks/test", "mmlu/test/*.csv", "mmlu/dev/*.csv", lang="en", letters=True,
                 hub="cais/mmlu all test dev", shots=5),
    "arc_easy": Spec(arc, "CC BY-SA 4.0", "allenai.org/data/arc", "arc/ARC-Easy/ARC-Easy-Test.jsonl", lang="en",
                     hub="allenai/ai2_arc ARC-Easy test -", per_char=True),
    "arc_challenge": Spec(arc, "CC BY-SA 4.0", "allenai.org/data/arc", "arc/ARC-Challenge/ARC-Challenge-Test.jsonl",
                          lang="en", hub="allenai/ai2_arc ARC-Challenge test -", per_char=True),
    "openbookqa": Spec(arc, "Apache-2.0", "allenai.org/data/open-book-qa", "openbookqa/test.jsonl", lang="en",
                       hub="allenai/openbookqa main test -", per_char=True),
    "hellaswag": Spec(hellaswag, "MIT", "github.com/rowanz/hellaswag", "hellaswag/hellaswag_val.jsonl", lang="en",
                      hub="Rowan/hellaswag - validation -", per_char=True),
    "piqa": Spec(piqa, "AFL-3.0", "yonatanbisk.com/piqa", "piqa/valid.jsonl", lang="en",
                 hub="baber/piqa - validation -", per_char=True),
    "winogrande": Spec(winogrande, "CC BY", "github.com/allenai/winogrande", "winogrande/dev.jsonl", lang="en",
                       hub="allenai/winogrande winogrande_xl validation -"),
    "boolq": Spec(boolq, "CC BY-SA 3.0", "github.com/google-research-datasets/boolean-questions", "boolq/dev.jsonl",
                  lang="en", hub="google/boolq - validation -"),
    "copa": Spec(copa, "BSD 2-Clause", "super.gluebenchmark.com/tasks", "copa/val.jsonl", lang="en",
                 hub="aps/super_glue copa validation -"),
}  # fmt: skip
