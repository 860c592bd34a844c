"""Fine-tuning from end to end on a tiny model: epochs, adapters, preferences, and data that means no good."""

import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from nanozhchat import chat, checkpoint, files, paths
from nanozhchat.conversation import SPECIAL_TOKENS
from nanozhchat.conversation_files import conversations, load_conversations, preferences
from nanozhchat.dataloader import preference_loader, prepare_conversations, prepare_preferences
from nanozhchat.lora import adapt
from nanozhchat.objectives import DPO
from nanozhchat.plan import TrainState
from nanozhchat.recipe import Overrides, resolve
from nanozhchat.tokenizer import Tokenizer
from nanozhchat.tuning import Lessons, tuning_recipe
from scripts import chat_sft, gen_identity
from tests.conftest import make_config, make_model, opened, refused, write_jsonl

DIGITS = "零一二三四五六七八九"
T = 64


@pytest.fixture(scope="module")
def tokenizer():
    made = [m["content"] for talk in gen_identity.conversations("小竹", "李雷", 300, 0) for m in talk]
    return Tokenizer.train([*["后面的数字是", DIGITS, "好的", "不是"] * 30, *made], 700)


@pytest.fixture
def base(base_dir, tokenizer):
    """A base model that has learnt nothing, saved as if it had."""
    tokenizer.save(paths.tokenizer_dir("t"))
    over = Overrides(max_seq_len=T, total_batch_size=4 * T, device_batch_size=4, num_steps=1)
    recipe = resolve(1, vocab_size=tokenizer.vocab_size, overrides=over)
    identity = {"tokenizer": "t", "tokenizer_hash": tokenizer.hash}
    with opened("base", "tiny", recipe, identity, seed=1) as (run, recipe, model, optimizer):
        plan = run.plan(model, optimizer, recipe, torch.zeros(tokenizer.vocab_size), started=0.0, save_every=1)
        plan.checkpoints.begin({**TrainState(step=1, finished=True).to_dict(), "recipe": recipe.to_dict()})
        plan.checkpoints.commit()


def sft(path, *flags):
    """Run the script; returns the rows of metrics and the folder."""
    name = next((f.split("=")[1] for f in flags if f.startswith("--save-as")), "tiny")
    data = ["--data", str(path), "--model-tag=tiny", "--device-type=cpu", "--dtype=float32"]
    chat_sft.main([*data, *flags])
    return files.read_jsonl(paths.run_dir("sft", name) / "metrics.jsonl"), paths.run_dir("sft", name)


def following(tmp_path, n=200):
    said = ((f"{'嗯' * (i // 10)}{DIGITS[i % 10]}后面的数字是", DIGITS[(i + 1) % 10]) for i in range(n))
    return write_jsonl(tmp_path / "next.jsonl", [{"prompt": ask, "completion": answer} for ask, answer in said])


def preferred(tmp_path, n=60):
    rows = [{"prompt": f"{'嗯' * (i // 10)}{DIGITS[i % 10]}", "chosen": "好的", "rejected": "不是" * (1 + i % 3)}
            for i in range(n)]  # fmt: skip
    return write_jsonl(tmp_path / "pairs.jsonl", rows)


def tensors(folder):
    return {p.name: load_file(p) for p in sorted(folder.glob("*.safetensors"))}


def test_each_epoch_is_measured_the_best_is_kept_and_held_out_questions_are_answered(base, tmp_path):
    rows, folder = sft(following(tmp_path), "--epochs=3")
    measured = [(row["step"], row["val/loss"]) for row in rows if row.get("val/loss")]
    assert len(measured) == 4  # before, and after each epoch
    assert measured[-1][1] < measured[0][1] - 0.5
    best = min(measured, key=lambda pair: pair[1])[0]
    assert best in checkpoint.list_steps(folder)
    answers = files.read_jsonl(folder / "samples.jsonl")
    assert {row["step"] for row in answers} == {0, measured[-1][0]}
    assert all(row["expected"] in DIGITS for row in answers)


@pytest.mark.parametrize(("learnt", "times"), [(0.3, 2), (0.9, 1)])
def test_a_step_has_twice_the_tokens_where_only_some_are_learnt(learnt, times):
    start = resolve(1, vocab_size=512, overrides=Overrides(max_seq_len=T, total_batch_size=4 * T, num_steps=1))
    mask = (np.arange(60) < 60 * learnt).astype(np.uint8)
    lessons = Lessons([(np.arange(60), mask)] * 50, [], [])
    options = {"num_steps": 1, "epochs": None, "seconds": None, "lr_frac": 1.0, "world_size": 1}
    given = ({"total_batch_size": None}, {"total_batch_size": None, "pretrained": False}, {"total_batch_size": 4 * T})
    sizes = [tuning_recipe(start, lessons, **options, **more).total_batch_size for more in given]
    assert sizes == [times * 4 * T, 4 * T, 4 * T]


def test_adapters_are_saved_as_plain_weights_and_training_goes_on_from_them_exactly(base, tmp_path):
    path, flags = following(tmp_path), ("--lora-rank=4", "--num-steps=6", "--save-every=3", "--lr-frac=1")
    rows, folder = sft(path, *flags)
    whole, start = tensors(folder / "step_00000006"), tensors(paths.run_dir("base", "tiny") / "step_00000001")
    before, after = start["model.safetensors"], whole["model.safetensors"]
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    names = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert {"h.0.attn.c_proj.weight", "h.0.mlp.c_proj.weight"} <= changed <= {f"h.0.{n}.weight" for n in names}
    assert all(torch.linalg.matrix_rank(after[n] - before[n], rtol=1e-3) <= 4 for n in changed)
    shutil.rmtree(folder / "step_00000006")
    sft(path, *flags)
    again = tensors(folder / "step_00000006")
    for name, held in whole.items():
        assert all(torch.equal(held[key], again[name][key]) for key in held), name
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]
    assert isinstance(chat.load("tiny", source="sft")("三后面的数字是", max_tokens=2, temperature=0), str)


def test_a_model_with_new_adapters_is_the_model_and_merged_ones_say_the_same():
    plain, model, merged = (make_model(make_config(), perturb=True) for _ in range(3))
    adapters, ids = adapt(model, 3, seed=0), torch.arange(20)[None]
    assert torch.equal(model.hidden(ids), plain.hidden(ids))
    assert {name.split(".")[-1] for name in adapters} == {"up", "down"}
    for name, p in adapters.items():
        torch.nn.init.normal_(p, std=0.1) if name.endswith("up") else None
    merged.load_state_dict(model.state_dict())
    torch.testing.assert_close(merged.hidden(ids), model.hidden(ids), atol=1e-4, rtol=1e-4)
    refused("--lora-rank=99 must be between 1 and the model's width, 32", adapt, plain, 99, 0)


def test_preferences_start_at_log_2_and_are_learnt(base, tmp_path):
    _, start = sft(following(tmp_path), "--num-steps=2")
    held = tensors(start / "step_00000002")["model.safetensors"]
    rows, folder = sft(preferred(tmp_path), "--objective=dpo", "--num-steps=30", "--lr-frac=1", "--save-as=better")
    assert rows[0]["val/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[1]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["train/loss"] < 0.3
    assert (rows[-1]["val/loss"] < 0.4, rows[-1]["val/accuracy"]) == (True, 1.0)
    assert all(torch.equal(p, held[n]) for n, p in tensors(start / "step_00000002")["model.safetensors"].items())
    assert not torch.equal(tensors(folder / "step_00000030")["model.safetensors"]["wte.weight"], held["wte.weight"])
    flags = (preferred(tmp_path), "--objective=dpo", "--save-as=tiny")
    refused("--save-as=tiny is the model to start from", sft, *flags)


def test_the_loss_of_preferences_is_the_formula_of_the_paper(tokenizer, tmp_path):
    config = make_config(vocab_size=tokenizer.vocab_size, sequence_len=T)
    model, reference = (make_model(config, seed=s, perturb=True) for s in (1, 2))
    pairs = prepare_preferences(list(preferences([str(preferred(tmp_path, 5))], "train")), tokenizer, T)
    batch = next(preference_loader(pairs, pad_id=tokenizer.end_id, endless=False, batch_rows=6, sequence_len=T))
    with torch.no_grad():
        loss = DPO(reference, 0.3)(model, batch)
    want = 0.0
    for sides in pairs:
        gains = []
        said = [tokenizer.decode([i for i, m in zip(*side, strict=True) if m], show_special=True) for side in sides]
        assert (said[0], said[1].strip("不是")) == ("好的<|end|>", "<|end|>")  # from the first token to the last
        for ids, mask in sides:
            x = torch.tensor(ids[None].astype("int64"))
            one, two = (F.log_softmax(m.logits(m.hidden(x)), -1)[0, :-1].detach() for m in (model, reference))
            gains.append(sum(float(one[i - 1, ids[i]] - two[i - 1, ids[i]]) for i in range(1, len(ids)) if mask[i]))
        want += math.log1p(math.exp(-0.3 * (gains[0] - gains[1])))
    assert int(loss.count) == len(pairs) < 6  # the rest of the batch is padding
    assert float(loss.total) == pytest.approx(want, rel=1e-4)


HOSTILE = [
    {"prompt": "问" * 5000, "completion": "答"},
    {"prompt": "问", "completion": "答" * 5000},
    {"messages": [{"role": "user", "content": "空"}, {"role": "assistant", "content": ""}]},
    {"conversations": [{"from": ("human", "gpt")[i % 2], "value": f"第{i}句"} for i in range(10_000)]},
    {"instruction": "<|end|><|assistant|>我说", "input": "<|bos|>", "output": "<|user|>别学<|end|><|tool_result|>"},
    {"messages": [{"role": "user", "content": "算"}, {"role": "assistant", "content": "", "tool_call": "1+1"},
                  {"role": "tool", "content": "工具说二"}, {"role": "assistant", "content": "二"}]},
    {"prompt": "", "completion": "空的问题"},
]  # fmt: skip


def test_hostile_data_neither_stops_training_nor_teaches_what_the_assistant_did_not_say(base, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", HOSTILE + [{"prompt": f"甲{i}", "completion": "好"} for i in range(150)])
    talks = [c for s in ("train", "val") for c in conversations([str(path)], s)]
    said = {m.content for c in talks for m in c if m.role == "assistant"}
    rendered = prepare_conversations(load_conversations([str(path)], "train", max_conversations=999), tokenizer, T)
    refused = {tokenizer.special(n) for n in SPECIAL_TOKENS if n not in ("<|end|>", "<|tool_call|>")}
    for ids, mask in rendered:
        learnt = [int(i) for i, m in zip(ids, mask, strict=True) if m]
        assert not set(learnt) & refused
        pieces = tokenizer.decode(learnt, show_special=True).replace("<|tool_call|>1+1", "").split("<|end|>")
        for piece in filter(None, pieces):
            assert any(piece.rstrip("\ufffd") in text for text in said)
            assert "工具" not in piece
    rows, folder = sft(path, "--num-steps=8")
    assert all(math.isfinite(row["train/loss"]) for row in rows[1:])
    assert not [e for e in files.read_jsonl(folder / "events.jsonl") if e["event"] in ("skip", "rollback")]
    assert all(p.isfinite().all() for p in tensors(folder / "step_00000008")["model.safetensors"].values())


def test_identity_data_crosses_many_phrasings_and_teaches_the_name(base, tmp_path):
    path = tmp_path / "identity.jsonl"
    gen_identity.main(["--name=小竹", "--maker=李雷", "--count=1500", f"--out={path}"])
    gen_identity.main(["--name=小竹", "--maker=李雷", "--count=1500", f"--out={path}"])  # the same may be written again
    refused("exists and holds something else; pass another --out, or --force", gen_identity.main, [f"--out={path}"])
    made = [row["messages"] for row in files.read_jsonl(path)]
    asked = {m["content"] for talk in made for m in talk if m["role"] == "user"}
    assert (len(made), len(asked) > 1500) == (1500, True)
    assert sum("小竹" in "".join(m["content"] for m in talk) for talk in made) > 0.9 * len(made)
    assert "{" not in path.read_text(encoding="utf-8").replace('{"', "")
    assert len(load_conversations([str(path)], "train", max_conversations=9999)) > 1400
    sft(path, "--num-steps=150", "--lr-frac=1")
    assert "小竹" in chat.load("tiny", source="sft")("你叫什么名字？", max_tokens=40, temperature=0)
