"""The lm-evaluation-harness, fed with the same published files through its own loaders and prompts, agrees with us."""

import json

import pytest

from nanozhchat.task_eval import run_text, summarize
from tasks import registry
from tasks.base import Benchmark
from tests.conftest import CPU, pack
from tests.fakes import real_chat

LETTERS = ["A", "B", "C", "D"]
METRICS = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]


def cmmlu(folder):
    """Five examples, then letters."""
    for split, n in (("dev", 5), ("test", 60)):
        rows = (f"{i},第{i}题的数{'大' * (i % 7)}是,{i},{i + 1},{i * 2},{i * 3},{LETTERS[i % 4]}" for i in range(n))
        pack(folder / f"cmmlu/{split}/law.csv", ",Question,A,B,C,D,Answer\n" + "\n".join(rows) + "\n")
    return {
        "dataset_path": "csv", "output_type": "multiple_choice", "test_split": "test", "fewshot_split": "dev",
        "dataset_kwargs": {"data_files": {s: str(folder / f"cmmlu/{s}/law.csv") for s in ("dev", "test")}},
        "fewshot_config": {"sampler": "first_n"}, "num_fewshot": 5, "target_delimiter": "",
        "doc_to_text": "{{Question.strip()}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\n答案：",
        "doc_to_choice": LETTERS, "doc_to_target": "{{['A', 'B', 'C', 'D'].index(Answer)}}",
    }  # fmt: skip


def piqa(folder):
    """Log-likelihoods divided by length."""
    rows = [{"goal": f"make {i} cups", "sol1": "boil " * (i % 3 + 1) + "it", "sol2": f"eat {i} now", "label": i % 2}
            for i in range(60)]  # fmt: skip
    path = pack(folder / "piqa/valid.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return {
        "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test", "num_fewshot": 0,
        "dataset_kwargs": {"data_files": {"test": str(path)}}, "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_choice": "{{[sol1, sol2]}}", "doc_to_target": "label",
    }  # fmt: skip


@pytest.mark.parametrize(("make", "metric"), [(cmmlu, "acc"), (piqa, "acc_norm")])
def test_the_harness_agrees(make, metric, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    evaluator = pytest.importorskip("lm_eval.evaluator")
    from lm_eval.tasks import TaskManager

    from dev.harness import HarnessLM

    config = make(tmp_path) | {"task": f"ours_{make.__name__}", "metric_list": METRICS}
    model = real_chat(sequence_len=768, n_layer=2)
    options = {"task_manager": TaskManager(include_defaults=False), "bootstrap_iters": 0}
    found = evaluator.simple_evaluate(HarnessLM(model), tasks=[config], **options)["results"][config["task"]]
    task = Benchmark(make.__name__, registry.SPECS[make.__name__], folder=tmp_path)
    score = summarize(run_text(model, task, CPU), task.chance)
    assert (score.n, score.score) == (60, pytest.approx(found[f"{metric},none"], abs=1e-9))
    assert 0 < score.score < 1


def test_rolling_and_generation_follow_the_protocol():
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from dev.harness import HarnessLM

    model = real_chat(sequence_len=32)
    lm = HarnessLM(model)
    ask = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("短", "很长" * 20)]
    short, long = lm.loglikelihood_rolling(ask)
    assert short == pytest.approx(lm.likelihood([model.tokenizer.bos_id], [model.tokenizer.encode("短")])[0][0])
    assert long < short < 0
    made = lm.generate_until([Instance("generate_until", {}, ("问" * 30, {"until": ["。"], "max_gen_toks": 8}), 0)])
    assert isinstance(made[0], str)
    assert "。" not in made[0]
