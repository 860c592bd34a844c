"""Benchmarks read the published layouts; who knows the answers gets them all; who knows nothing scores chance."""

import json
import zipfile
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from nanozhchat.batching import Decoder
from nanozhchat.chat import Chat
from nanozhchat.engine import Engine
from nanozhchat.errors import DamagedError, DiskError
from nanozhchat.task_eval import Likelihood, core, fit, run_task, run_text, summarize, wilson
from nanozhchat.zh_text import LETTERS
from scripts import base_eval, chat_eval
from tasks import registry
from tasks.base import Benchmark
from tests.conftest import CPU, ROOT, make_config, make_model, pack, refused
from tests.fakes import real_chat

SHARED = next((p for up in ROOT.parents if (p := up / "shared/data/eval").is_dir()), ROOT / "absent")
HERE = [n for n in registry.SPECS if n in {*registry.GROUPS["zh"], "gsm8k", "humaneval"} - {"ceval"}]  # in SHARED
ABCD = "题,甲,乙,丙,丁,"
WSC = {"target": {"span2_index": 6, "span1_index": 0, "span1_text": "小马", "span2_text": "他"},
       "text": "小马跑来了，他笑了。"}  # fmt: skip
QUIZ = {"question": {"stem": "Q", "choices": [{"text": t, "label": x} for t, x in [("one", "A"), ("two", "B")]]}}
CODE = {"prompt": "def inc(x):\n", "entry_point": "inc", "canonical_solution": "    return x + 1\n",
        "test": "def check(f):\n    assert f(1) == 2\n"}  # fmt: skip
SPAN = {"context": "小明住在北京。", "qas": [{"question": "住哪？", "answers": [{"text": "北京", "answer_start": 4}]}]}
RIGHT = (["B"], ["A", "D"], ["BC"], ["G"])
EXAM = [{"question": f"{i}．（ ）\nA．甲 B．乙 C．丙", "answer": a} for i, a in enumerate(RIGHT)]
FILES = {  # name -> {file: content}, and right answers in order
    "ceval": ({"ceval/val/law_val.csv": f"id,question,A,B,C,D,answer\n0,{ABCD}C\n1,{ABCD}\n",
               "ceval/dev/law_dev.csv": "id,question,A,B,C,D,answer,explanation\n0,例,一,二,三,四,D,因\n"}, ["丙"]),
    "cmmlu": ({"cmmlu/test/law.csv": f"\ufeff,Question,A,B,C,D,Answer\n0,{ABCD}B\n",
               "cmmlu/dev/law.csv": ",Question,A,B,C,D,Answer\n0,例,一,二,三,四,A\n"}, ["乙"]),
    "gaokao": ({"gaokao_bench/Objective_Questions/x.json": {"keywords": "x", "example": EXAM}},
               ["B", "A", "D", "BC", "G"]),
    "c3": ({"c3/c3-m-dev.json": [[["女：走吧。"], [{"question": "谁？", "choice": ["甲", "乙"], "answer": "乙"}], 1]]},
           ["乙"]),
    "chid": ({"fewclue/chid/dev_few_all.json": [
        {"candidates": ["画龙点睛", "对牛弹琴"], "content": "这是#idiom#。", "answer": 1}]}, ["对牛弹琴"]),
    "cluewsc": ({"fewclue/cluewsc/dev_few_all.json": [WSC | {"label": "false"}],
                 "fewclue/cluewsc/train_few_all.json": [WSC | {"label": "true"}]}, ["不是"]),
    "ocnli": ({"fewclue/ocnli/dev_few_all.json": [{"sentence1": "下雨了。", "sentence2": f"天晴{x}", "label": x}
                                                  for x in ("contradiction", "-", "neutral")]}, ["不对", "也许"]),
    "eprstmt": ({"fewclue/eprstmt/dev_few_all.json": [{"sentence": "真好！", "label": "Positive"}]}, ["满意"]),
    "tnews": ({"fewclue/tnews/dev_few_all.json": [{"sentence": "进球了", "label": 103}]}, ["体育"]),
    "cmrc2018": ({"cmrc2018/cmrc2018_trial.json": {"data": [{"paragraphs": [SPAN, SPAN]}]}}, ["北京"]),
    "cmath": ({"cmath/cmath_dev.jsonl": [{"input": f"{i}+1", "golden": str(i + 1)} for i in range(5)]}, ["5"]),
    "cmath_distractor": ({"cmath/distractor.jsonl": [{"input": "一半", "golden": "1/2"}] * 5}, ["1/2"]),
    "mgsm_zh": ({"mgsm/mgsm_zh.tsv": '“一"共？\t5,600\n' * 5}, ["5,600"]),
    "gsm8k": ({"gsm8k/test.jsonl": [{"question": "Q?", "answer": "1+1=<<1+1=2>>2\n#### 2"}] * 5}, ["2"]),
    "humaneval": ({"humaneval/HumanEval.jsonl.gz": [CODE]}, ["    return x + 1\n"]),
    "mmlu": ({"mmlu/test/law_test.csv": '"Q, ""x""?",a,b,c,d,D\n', "mmlu/dev/law_dev.csv": "E,a,b,c,d,A\n"}, ["d"]),
    "hellaswag": ({"hellaswag/hellaswag_val.jsonl": [{"ctx": "He", "endings": ["ran.", "x."], "label": 0}]}, [" ran."]),
    "piqa": ({"piqa/valid.jsonl": [{"goal": "g", "sol1": "one", "sol2": "two", "label": 1}]}, ["two"]),
    "winogrande": ({"winogrande/dev.jsonl": [{"sentence": "A _ c.", "option1": "x", "option2": "y", "answer": "2"}]},
                   ["y"]),
    "openbookqa": ({"openbookqa/test.jsonl": [QUIZ | {"answerKey": "B"}]}, ["two"]),
    "boolq": ({"boolq/dev.jsonl": [{"question": "q", "passage": "p", "answer": True}]}, ["yes"]),
    "copa": ({"copa/val.jsonl": [
        {"premise": "It rained.", "choice1": "I left.", "choice2": "Wet.", "question": "effect", "label": 1}]},
             [" wet."]),
    "arc_easy": ({"arc/ARC-Easy/ARC-Easy-Test.jsonl": [QUIZ | {"answerKey": "A"}]}, ["one"]),
    "arc_challenge": ({"arc/ARC-Challenge/ARC-Challenge-Test.jsonl": [QUIZ | {"answerKey": "B"}]}, ["two"]),
}  # fmt: skip


def write(folder, name):
    """Write the made files of a benchmark: text as it is, lists as JSON lines or an array, mappings as JSON."""
    for file, content in FILES[name][0].items():
        if isinstance(content, list) and name != "c3":
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        pack(folder / file, content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=1))
    return folder


class Knowing(Decoder):
    """Chat, engine and decoder in one that knows the answers of a task, as text to continue or as letters."""

    context = 1 << 16

    def __init__(self, task, tokenizer):
        super().__init__(17, self.context)
        self.engine, self.tokenizer, self.texts, self.asked = self, tokenizer, defaultdict(list), {}
        for i in range(len(task)):
            right = tokenizer.encode(task.options(i)[task.gold(i)]) if task.options(i) else task.expected(i)
            self.texts[tuple(fit(self, task, i, 60_000)[0])].append(right)
            question, letter = task.prompt(i)[-1].content, LETTERS[task.gold(i)]
            self.asked[question] = f"我选（{letter}）。" if f"\n{letter}. " in question else task.expected(i)

    def new_decoder(self, n):
        return self

    def prompt_ids(self, messages):
        return [-1, *map(ord, messages[-1].content)]

    def complete(self, prompts, params, bar=""):
        assert params.temperature == 0
        said = [self.asked["".join(map(chr, ids[1:]))] if ids[0] < 0 else self.texts[tuple(ids)][0] for ids in prompts]
        return [text + "\n" for text in said]

    def forward(self, parts):
        out = []
        for p in parts:
            self.held[p.slot] += p.ids
            rows = np.zeros((p.wanted, self.tokenizer.vocab_size), np.float32)
            for k, row in enumerate(rows, start=len(self.held[p.slot]) - p.wanted + 1):
                said, right = self.held[p.slot][len(self.held[0]) : k], self.texts[tuple(self.held[0])]
                row[[r[len(said)] for r in right if r[: len(said)] == said and len(r) > len(said)]] = 60
            out.append(rows)
        return out


def make(name, folder, **options):
    return Benchmark(name, registry.SPECS[name], folder=folder, **options)


def assert_knows_all(task, tokenizer):
    knowing = Knowing(task, tokenizer)
    for run in (run_task, run_text):
        assert [a.given for a in run(knowing, task, CPU) if not a.correct] == []


@pytest.mark.parametrize("name", list(registry.SPECS))
def test_published_layouts_are_read_and_who_knows_the_answers_gets_them_all(name, tmp_path, bytes_tokenizer):
    task = make(name, write(tmp_path, name))
    assert [task.expected(i) for i in range(len(task))] == FILES[name][1]
    assert_knows_all(task, bytes_tokenizer)
    assert task.text(0, 4).endswith(task.text(0, 0))


@pytest.mark.skipif(not SHARED.is_dir(), reason="sample files are not there")
@pytest.mark.parametrize("name", HERE)
def test_samples_of_the_published_files(name, bytes_tokenizer):
    task = make(name, SHARED, n=60 if name != "humaneval" else 8)
    assert len(task) >= 8
    assert_knows_all(task, bytes_tokenizer)
    model = make_model(make_config(vocab_size=263, sequence_len=512, n_layer=2)).eval()  # as before the first step
    chat = Chat(Engine(model, bytes_tokenizer, kind="native"), bytes_tokenizer, name="random", source="base", step=0)
    task = task if task.options(0) else make(name, SHARED, n=6)
    total = summarize(run_text(chat, task, CPU), task.chance)
    commonest = max(Counter(map(task.expected, range(len(task)))).values()) / len(task)  # what "8" for every sum scores
    assert total.low <= (task.chance or commonest)
    assert task.chance <= total.high


def test_likelihoods_are_those_of_the_model_whatever_was_asked_before():
    chat = real_chat(sequence_len=64)
    likelihood = Likelihood(chat.engine)
    for text in ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 9], [1, 2, 3], [8] * 40):
        options = [[5], [6, 7, 8], [6, 7], [9] * 20]
        for option, (got, greedy) in zip(options, likelihood(text, options), strict=True):
            ids = torch.tensor([text + option])
            targets = torch.cat((torch.full((len(text) - 1,), -1), ids[0, len(text) :]))[None]
            assert got == pytest.approx(-float(chat.engine.model(ids[:, :-1], targets).detach()), abs=1e-3)
            logits = chat.engine.model.logits(chat.engine.model.hidden(ids[:, :-1]))[0, len(text) - 1 :]
            assert greedy == (logits.argmax(-1).tolist() == option)


def test_what_does_not_fit_loses_examples_then_its_beginning_and_is_counted(tmp_path):
    task, chat = make("c3", write(tmp_path, "c3")), real_chat(sequence_len=40)
    tokenizer = chat.tokenizer
    ids, cut = fit(chat, task, 0, 36)
    assert (len(ids), ids[0], cut) == (36, tokenizer.bos_id, True)
    assert tokenizer.decode(ids[1:], show_special=True).endswith("谁？\n答案：")
    assert summarize(run_text(chat, task, CPU), task.chance).cut == 1
    assert run_task(chat, task, CPU)[0].cut
    task = make("cmmlu", write(tmp_path, "cmmlu"))
    assert [fit(real_chat(), task, 0, room)[1] for room in (200, 60)] == [False, False]
    assert len(fit(real_chat(), task, 0, 60)[0]) < len(fit(real_chat(), task, 0, 200)[0])


def test_partial_credit_counts_and_core_is_the_mean_of_centred_scores(tmp_path, bytes_tokenizer):
    task = make("cmrc2018", write(tmp_path, "cmrc2018"))
    assert [task.check(0, text) for text in ("北京", "在北京", "上海")] == [1.0, pytest.approx(0.8), 0.0]
    assert task.prompt(0)[0].content.startswith("小明住在北京。\n问题：住哪？")
    half = summarize(run_task(Knowing(task, bytes_tokenizer), task, CPU), 0.5)
    assert (half.score, half.centred, half.exact) == (1.0, 1.0, 1.0)
    assert (half.low, half.high) == wilson(1, 1)
    assert core([half, half.__class__(**{**vars(half), "centred": 0.0})]) == 0.5


@pytest.mark.parametrize("name", ["cluewsc", "cmmlu"])
def test_the_hub_gives_the_same_questions(name, tmp_path, monkeypatch):
    import datasets

    write(tmp_path, name)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *a, **k: None)
    packed = tmp_path / "cmmlu.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for path in tmp_path.glob("cmmlu/*/*.csv"):
            archive.write(path, path.relative_to(tmp_path / "cmmlu"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: str(packed))

    def load_dataset(hub_id, config, *, split, revision):
        rows = [WSC | {"label": int(split == "validation"), "idx": 0}, WSC | {"label": -1, "idx": 1}]
        label = datasets.ClassLabel(names=["true", "false"])
        return datasets.Dataset.from_list(rows).cast_column("label", label)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    ours, hubs = make(name, tmp_path), make(name, None)
    assert [hubs.text(i, 4) for i in range(len(hubs))] == [ours.text(i, 4) for i in range(len(ours))]
    assert [hubs.gold(i) for i in range(len(hubs))] == [ours.gold(i) for i in range(len(ours))]


def test_what_is_missing_or_damaged_is_said_in_one_line(tmp_path, monkeypatch):
    refused(r"ceval: no ceval/val/\*\.csv in .*github.com/hkust-nlp/ceval", make, "ceval", tmp_path)
    refused("gaokao is not on the hub; get the files from https://github.com/OpenLMLab", make, "gaokao", None)
    refused("unknown task 'gpqa'; there are: builtin", registry.resolve, "gpqa")
    refused("unknown task 'story', did you mean builtin:story\\?; there are: builtin", registry.resolve, "story")
    refused("unknown task 'cmnlu', did you mean cmmlu\\?; there are: builtin", registry.resolve, "cmnlu")
    refused("--task-data=/nowhere is not a folder", registry.benchmarks, "c3", folder="/nowhere")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *a, **k: 1 / 0)
    refused("c3: cannot read clue/clue .*ZeroDivisionError.*--task-data FOLDER", make, "c3", None, error=DiskError)
    pack(tmp_path / "ceval/val/law_val.csv", "id,question,A,B,C,D,answer\n0,题,甲\n")
    pack(tmp_path / "fewclue/chid/dev_few_all.json", '{"content": "a#idiom#"}\n{"content": 1}\n')
    for name, problem in (("ceval", "law_val.csv is damaged"), ("chid", "not in the published layout .*answer")):
        refused(problem, make, name, tmp_path, error=DamagedError)


def test_both_scripts_score_benchmarks_of_a_folder(tmp_path, monkeypatch, capsys):
    for name in registry.CORE_ZH:
        write(tmp_path, name)
    monkeypatch.setattr("nanozhchat.chat.load", lambda *a, **k: real_chat(sequence_len=512))
    flags = [f"--task-data={tmp_path}", f"--json={tmp_path / 'figures.json'}"]
    base_eval.main(["--eval=core", "--max-items=1", *flags])
    figures = json.loads((tmp_path / "figures.json").read_text())["core"]
    assert {*figures["tasks"]} == {*registry.CORE_ZH}
    centred = [t["centred"] for t in figures["tasks"].values()]
    assert figures["core-zh"] == pytest.approx(sum(centred) / len(centred))
    chat_eval.main(["--tasks=c3,chid", "--num-questions=0", "--max-tokens=8", *flags])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {"score", "chance", "low", "high", "n"} <= figures["tasks"]["c3"].keys()
    assert {"overall", "tasks", "refusal"} <= set(figures)
    chat_eval.main(["--list"])
    listed = capsys.readouterr().out
    assert all(f"\n{name} " in "\n" + listed for name in registry.SPECS)
    assert "CC BY-NC-SA 4.0" in listed
    write(tmp_path, "humaneval")
    monkeypatch.setattr("nanozhchat.sandbox.probe", lambda: (1, ["read files"]))
    for script, asked in ((base_eval, ["--eval=core", "--core-tasks=humaneval"]), (chat_eval, ["--tasks=humaneval"])):
        refused("sandbox is at level 1.*--unsafe-sandbox", script.main, [*asked, *flags])
