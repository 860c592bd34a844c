"""GPT-2 weights: the same logits as in transformers, training goes on from them, and what it saves speaks."""

import random
import shutil

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nanozhchat import chat, checkpoint, files, gpt2, paths
from nanozhchat.engine import Engine
from nanozhchat.sampling import SamplingParams
from nanozhchat.tokenizer import Tokenizer
from scripts import base_train, chat_sft
from tests.conftest import refused, write_jsonl


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=301, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    model.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.fixture
def tokenizer(base_dir):
    made = Tokenizer.train(["春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。" * 2], 300)
    made.save(paths.tokenizer_dir("t"))
    return made


def test_logits_are_those_of_transformers_and_cached_steps_those_of_the_whole(folder, tokenizer):
    theirs, ours = GPT2LMHeadModel.from_pretrained(folder).eval(), gpt2.load_folder(folder, tokenizer).eval()
    ids = torch.randint(0, 293, (3, 64), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        want = theirs(ids).logits
        got = ours.logits(ours.hidden(ids))
    assert got.shape[-1] == tokenizer.vocab_size == 300
    torch.testing.assert_close(got[..., :300], want[..., :300], atol=1e-4, rtol=1e-4)
    prompt = ids[0, :20].tolist()
    [made] = Engine(ours, tokenizer).batch([prompt], SamplingParams(temperature=0, max_tokens=30))
    for i in range(len(made)):
        with torch.inference_mode():
            held = torch.tensor([[*prompt, *made[:i]]])
            assert int(ours.logits(ours.hidden(held))[0, -1].argmax()) == made[i]


def test_training_goes_on_from_the_weights_resumes_exactly_and_can_be_tuned_and_asked(folder, tokenizer, tmp_path):
    rng, words = random.Random(0), ["春眠", "不觉晓", "处处", "闻啼鸟"]
    lines = ["，".join(rng.choice(words) for _ in range(20)) + f"{i}" for i in range(200)]
    data = write_jsonl(tmp_path / "a.jsonl", lines)
    machine = ["--model-tag=g", "--device-type=cpu", "--dtype=float32"]
    command = ["--data", str(data), "--tokenizer=t", f"--init-from={folder}", "--num-steps=12", "--save-every=6",
               "--total-batch-size=512", *machine]  # fmt: skip
    base_train.main(command)
    run = paths.run_dir("base", "g")
    rows = files.read_jsonl(run / "metrics.jsonl")
    assert rows[-1]["val/loss"] < rows[0]["val/loss"] - 0.3
    whole = checkpoint.read_tensors(run / "step_00000012" / "model.safetensors")
    shutil.rmtree(run / "step_00000012")
    base_train.main(command)
    again = checkpoint.read_tensors(run / "step_00000012" / "model.safetensors")
    assert all(torch.equal(t, again[name]) for name, t in whole.items())
    talks = write_jsonl(tmp_path / "b.jsonl", [{"prompt": f"春{i}", "completion": "不觉晓"} for i in range(100)])
    for extra in ([], ["--lora-rank=2", "--save-as=l"]):
        chat_sft.main(["--data", str(talks), "--num-steps=2", *machine, *extra])
    model = chat.load("l", source="sft")
    assert (model.engine.kind, isinstance(model("春眠", max_tokens=3), str)) == ("torch", True)
    refused("does not know GPT-2's network", lambda: Engine(model.engine.model, tokenizer, kind="native"))


def test_other_networks_and_tokenizers_are_refused_with_the_remedy(folder, tokenizer):
    refused("scripts.tok_train --from", lambda: gpt2.config_of(str(folder), None))
    larger = Tokenizer.train([chr(0x4E00 + i % 900) * 3 for i in range(3000)], 400)
    refused("--tokenizer has 393 tokens and", gpt2.load_folder, folder, larger)
    about = files.read_json(folder / "config.json")
    files.write_json(folder / "config.json", {**about, "activation_function": "relu"})
    refused("activation_function='relu'", lambda: gpt2.config_of(str(folder), "t"))
