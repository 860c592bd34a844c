"""Exported models say in other software what they say in ours."""

import sys

import numpy as np
import pytest
import torch

from nanozhchat import builtin, recipe, run
from nanozhchat.chat import load
from nanozhchat.engine import Engine
from nanozhchat.export import arcee_tensors, export, fill_from_folder, load_folder
from nanozhchat.sampling import SamplingParams
from nanozhchat.tokenizer import Tokenizer
from scripts import base_train, chat_sft
from tests.conftest import PLAIN, make_config, make_model, refused, write_jsonl

WIDE = {**PLAIN, "n_embd": 64}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([c[0].content + c[-1].content for c in conversations(300)], 600)


def conversations(n):
    return [c for c, _ in zip(builtin.conversations(seed=1), range(n), strict=False)]


def calls(i):
    """One call of the calculator and its result, or two of two tools."""
    functions = [{"name": "calculator", "arguments": {"expression": f"{i}+5"}}, {"name": "查", "arguments": {"页": i}}]
    some = functions[: 1 + i % 2]
    return [{"role": "assistant", "content": "算" * (i % 4), "tool_calls": [{"function": f} for f in some]},
            *({"role": "tool", "content": f"{i}"} for _ in some)]  # fmt: skip


def some_model(tokenizer, **changes):
    """A random model whose scales are those of a trained one: positive per layer, and nothing where plain has none."""
    config = make_config(**{"vocab_size": tokenizer.vocab_size, "sequence_len": 128, **changes})
    model = make_model(config, seed=2, perturb=True).eval()
    with torch.no_grad():
        model.resid_lambdas.uniform_(0.8, 1.3, generator=torch.Generator().manual_seed(0))
        if config.plain:
            for p in (model.x0_lambdas, model.smear_lambda, model.backout_lambda):
                p.zero_()
    return model


@pytest.mark.parametrize("changes", [{}, WIDE, {"ngrams": ((1, 1), (1, 1))}], ids=["full", "plain", "ngrams"])
def test_a_folder_for_transformers_gives_the_same_logits_tokens_and_prompts(tokenizer, tmp_path, changes, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = some_model(tokenizer, **changes)
    folder = tmp_path / "out"
    export("hf", model, tokenizer, folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=not model.config.plain).eval()
    assert type(theirs).__name__ == ("ArceeForCausalLM" if model.config.plain else "NanozhchatForCausalLM")
    prompts = [tokenizer.render_prompt(c[:1] if c[0].role == "user" else c[:2])[:60] for c in conversations(20)]
    with torch.inference_mode():
        for ids in prompts:
            want = model.logits(model.hidden(torch.tensor([ids])), model.context([ids], len(ids)))
            torch.testing.assert_close(theirs(torch.tensor([ids])).logits, want, atol=1e-4, rtol=1e-4)
    ours = Engine(model, tokenizer).batch(prompts[:3], SamplingParams(temperature=0.0, max_tokens=64))
    for ids, want in zip(prompts[:3], ours, strict=True):
        end_ids = list(Engine(model, tokenizer).end_ids)
        given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}  # as tokenizers give them
        made = theirs.generate(**given, max_new_tokens=64, do_sample=False, eos_token_id=end_ids)
        made = made[0, len(ids) :].tolist()
        assert [i for i in made if i not in end_ids] == want
    hf_tokenizer = AutoTokenizer.from_pretrained(folder)
    for i, c in enumerate(conversations(1000)):
        turns = [{"role": m.role, "content": m.content} for m in c]
        if i % 3 == 0 and turns[-1]["role"] == "assistant":
            turns[-1:] = [*calls(i), *turns[-1:]]
        prompt = turns[:-1] if turns[-1]["role"] == "assistant" else turns
        got = hf_tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        assert got == tokenizer.render_prompt(prompt)
        assert hf_tokenizer.apply_chat_template(turns, return_dict=False) == tokenizer.render(turns)[0]
    sys.modules.pop("transformers_modules", None)


@pytest.mark.parametrize(("kind", "changes"), [("hf", {}), ("hf", WIDE), ("int8", {})], ids=["full", "plain", "int8"])
def test_our_own_exports_come_back(tokenizer, tmp_path, kind, changes):
    model = some_model(tokenizer, **changes)
    files = export(kind, model, tokenizer, tmp_path / "out")
    again, same_tokenizer = load_folder(tmp_path / "out")
    assert (again.config, same_tokenizer.hash) == (model.config, tokenizer.hash)
    ids = torch.tensor([tokenizer.encode("小猫在河边看鱼，今天天气很好。")])
    with torch.inference_mode():
        got, want = again.logits(again.hidden(ids)), model.logits(model.hidden(ids))
    atol, rtol = (1e-4, 1e-4) if kind == "hf" else (1, 0.1)
    torch.testing.assert_close(got, want, atol=atol, rtol=rtol)
    size = next(p for p in files if p.name == "model.safetensors").stat().st_size
    assert kind == "hf" or size < 0.4 * 4 * sum(p.numel() for p in model.parameters())  # rows of 32 have large scales
    chat = load(str(tmp_path / "out"), dtype="int8")
    assert chat.engine.kind == "native-int8"
    assert chat("你好", max_tokens=3, temperature=0) == chat("你好", max_tokens=3, temperature=0)


def test_a_gguf_file_holds_every_tensor_and_the_vocabulary_and_only_of_plain_models(tokenizer, tmp_path):
    gguf = pytest.importorskip("gguf")
    model = some_model(tokenizer, **WIDE)
    (path,) = export("gguf", model, tokenizer, tmp_path / "out" / "m.gguf")
    reader = gguf.GGUFReader(path)
    held = {t.name: np.asarray(t.data) for t in reader.tensors}
    want, c = arcee_tensors(model), model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.ARCEE, c.n_layer)
    assert len(held) == len(want)
    for name, weight in want.items():
        got = torch.from_numpy(held[names.get_name(name, try_suffixes=(".weight",))].copy())
        if "q_proj" in name or "k_proj" in name:  # neighbours there are a pair of channels, halves in transformers
            got = got.view(-1, c.head_dim // 2, 2, c.n_embd).transpose(1, 2).reshape(weight.shape)
        assert torch.equal(got, weight), name
    assert reader.fields["general.architecture"].contents() == "arcee"
    assert reader.fields["tokenizer.ggml.tokens"].contents()[-1] == "<|tool_result|>"
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == tokenizer.vocab_size
    refused("--arch=plain", lambda: export("gguf", some_model(tokenizer), tokenizer, tmp_path / "other"))


def test_a_folder_that_holds_something_is_left_alone(tokenizer, tmp_path):
    (tmp_path / "mine").write_text("")
    refused("is not empty", lambda: export("hf", some_model(tokenizer), tokenizer, tmp_path))
    refused("not a folder written by scripts.export", load_folder, tmp_path)


@pytest.mark.parametrize("kind", ["hf", "int8"])
def test_training_takes_depth_context_kind_and_tokenizer_from_a_folder(tokenizer, tmp_path, kind):
    plan = recipe.resolve(3, vocab_size=tokenizer.vocab_size, overrides=recipe.Overrides(arch="plain", max_seq_len=64))
    export(kind, make_model(run.gpt_config(plan)), tokenizer, tmp_path / "out")
    text = write_jsonl(tmp_path / "a.jsonl", ["床前明月光，疑是地上霜。" * 3 + str(i) for i in range(50)])
    base_train.main([f"--init-from={tmp_path / 'out'}", f"--data={text}", "--num-steps=2", "--model-tag=m",
                     "--total-batch-size=64", "--device-type=cpu"])  # fmt: skip
    made = load("m", source="base", engine="torch")
    assert made.tokenizer.hash == tokenizer.hash
    assert made.engine.model.config == run.gpt_config(plan)
    refused("is not a folder written by scripts.export", base_train.main, [f"--init-from={tmp_path}"])
    refused("--depth=2, but", base_train.main, [f"--init-from={tmp_path / 'out'}", "--depth=2"])
    refused("--init-from=.*out --data", chat_sft.main, [f"--model-tag={tmp_path / 'out'}"])


def test_training_starts_from_a_folder_of_the_same_shape_and_tokenizer_only(tokenizer, tmp_path):
    model, fresh = some_model(tokenizer), make_model(some_model(tokenizer).config, seed=9)
    export("hf", model, tokenizer, tmp_path / "out")
    fill_from_folder(fresh, tokenizer, str(tmp_path / "out"))
    assert all(torch.equal(p, q) for p, q in zip(fresh.parameters(), model.parameters(), strict=True))
    other, where = Tokenizer.train(["一二三四" * 9], 264), str(tmp_path / "out")
    refused("n_layer 4 there, 3 here", fill_from_folder, some_model(tokenizer, n_layer=3), tokenizer, where)
    refused("another tokenizer", fill_from_folder, fresh, other, where)
