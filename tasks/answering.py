"""Benchmarks whose answers are written out: numbers, spans of a text, code. A table, as in `choosing.py`."""

import re
from collections.abc import Iterator
from typing import Any

from nanozhchat.zh_text import final_number, numbers, span_f1
from tasks.base import Item, Spec

CODE_TIMEOUT_S = 5.0
CODE_ENDS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\nassert ")


def judge_number(item: Item, answer: str) -> float:
    """1 if the number an answer ends in equals the reference: 5,600 = 5600, 2/6 = 1/3, 12% = 0.12."""
    said = final_number(answer)
    return float(said is not None and said in numbers(item.answers[0]))


def judge_span(item: Item, answer: str) -> float:
    """Best F1 with a reference; 1 = exact match."""
    return max(span_f1(answer, reference) for reference in item.answers)


def judge_code(item: Item, answer: str) -> float:
    """1 if the tests pass, run in the sandbox. answer: the function's body, or a whole program, fenced or not."""
    from nanozhchat.sandbox import run_python

    fenced = re.findall(r"```(?:python)?\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    code = fenced[0] if fenced else answer
    program = code if re.search(r"^def ", code, re.MULTILINE) else item.question + code
    return float(run_python(f"{program}\n{item.test}\n", timeout_s=CODE_TIMEOUT_S).status == "ok")


def worked(question: str, answer: str) -> Iterator[Item]:
    """Yield a sum whose only known answer is a number."""
    yield Item(question.strip(), answers=(answer,), worked=answer)


def gsm8k(row: Any) -> Iterator[Item]:
    """The number follows "####"; marks of the calculator are taken out of the examples."""
    steps = re.sub(r"<<.*?>>", "", row["answer"])
    yield Item(row["question"].strip(), answers=(row["answer"].split("####")[1].strip(),), worked=steps)


def mgsm(row: Any) -> Iterator[Item]:
    """[question, answer], or the hub's row."""
    yield from worked(*row) if isinstance(row, list) else worked(row["question"], str(row["answer_number"]))


def cmath(row: Any) -> Iterator[Item]:
    """Named `input` in the repository, `question` on the hub."""
    yield from worked(row.get("input") or row["question"], str(row["golden"]))


def cmrc(row: Any) -> Iterator[Item]:
    """The published nesting (SQuAD's), or the hub's row."""
    for p in row.get("paragraphs", [row]):
        for q in p.get("qas", [row]):
            given = q["answers"]
            answers = tuple(given["text"] if isinstance(given, dict) else [a["text"] for a in given])
            yield Item(f"{p['context']}\n问题：{q['question']}", answers=answers, worked=answers[0])


def humaneval(row: Any) -> Iterator[Item]:
    """A function to complete, and its tests."""
    test = f"{row['test']}\ncheck({row['entry_point']})"
    solution = row["canonical_solution"]
    yield Item(row["prompt"], answers=(solution,), worked=solution, fill=(row["prompt"], ""), test=test)


STEPS_ZH = {"judge": judge_number, "shots": 4, "ask": "\n请一步步计算，最后一行写“答案：”和得数。"}
STEPS_EN = {**STEPS_ZH, "ask": '\nWork it out step by step; end with "#### " and the number.'}
ANSWERING: dict[str, Spec] = {
    "cmrc2018": Spec(
        cmrc, "CC BY-SA 4.0", "github.com/ymcui/cmrc2018", "cmrc2018/cmrc2018_trial.json",
        "cmrc2018/cmrc2018_train.json", hub="clue/clue cmrc2018 validation train", judge=judge_span, shots=1,
        ask="\n请用原文中的词语简短回答。"),
    "cmath": Spec(cmath, "CC BY 4.0", "github.com/XiaoMi/cmath", "cmath/cmath_dev.jsonl",
                  hub="weitianwen/cmath - test validation", **STEPS_ZH),
    "cmath_distractor": Spec(cmath, "CC BY 4.0", "github.com/XiaoMi/cmath", "cmath/distractor.jsonl", **STEPS_ZH),
    "mgsm_zh": Spec(mgsm, "CC BY 4.0", "github.com/google-research/url-nlp", "mgsm/mgsm_zh.tsv",
                    hub="juletxara/mgsm mgsm_zh.tsv - -", **STEPS_ZH),
    "gsm8k": Spec(gsm8k, "MIT", "github.com/openai/grade-school-math", "gsm8k/test.jsonl", "gsm8k/train.jsonl",
                  lang="en", hub="openai/gsm8k main test train", stop=("\n\n",), max_tokens=256, **STEPS_EN),
    "humaneval": Spec(humaneval, "MIT", "github.com/openai/human-eval", "humaneval/HumanEval.jsonl*", lang="en",
                      hub="openai/openai_humaneval - test -", judge=judge_code, stop=CODE_ENDS, max_tokens=256,
                      ask="\nComplete this function; answer with Python code only."),
}  # fmt: skip
