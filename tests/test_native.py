"""The native decoder equals the model it was made from, for every switch of its configuration."""

import dataclasses
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import rustinfer
from nanozhchat import load, paths
from nanozhchat.batching import Part
from nanozhchat.engine import Engine
from nanozhchat.errors import DamagedError
from nanozhchat.gpt_config import GPTConfig
from nanozhchat.native import NativeDecoder, native_model, pack_file
from nanozhchat.quantize import dequantize, is_quantized, quantize, quantize_rows
from nanozhchat.torch_decoder import Scorer, TorchDecoder
from tests.conftest import PLAIN, ROOT, make_config, make_model, refused
from tests.test_checkpoint import write

SWITCHES = {  # field -> other values than make_config's
    "sequence_len": [80, 150], "vocab_size": [64, 131], "n_layer": [1, 3], "n_head": [2], "n_kv_head": [1, 4],
    "n_embd": [16, 128, 512], "window_pattern": ["L", "S"], "value_embeddings": [False], "softcap": [3.0],
    "rope_base": [1000.0], "plain": [True], "offset_heads": [0, 2],
}  # fmt: skip
CHANGES = [{}] + [PLAIN if name == "plain" else {name: v} for name, values in SWITCHES.items() for v in values]


def decoders(changes, *, int8=False, isa=None):
    """A native decoder and the plain one of the same random model, with three slots each."""
    model = make_model(make_config(**changes), seed=3, perturb=True).eval()
    return NativeDecoder(native_model(model, int8=int8, isa=isa), 3), TorchDecoder(model, 3)


def some_ids(decoder, seed=0):
    return np.random.default_rng(seed).integers(0, 64, decoder.context).tolist()


def test_the_table_of_switches_knows_every_field_of_the_configuration():
    refused = {"ngrams", "gpt2"}  # by `Engine`
    assert {*SWITCHES} | refused == {f.name for f in dataclasses.fields(GPTConfig)}


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_native_logits_are_the_models(changes):
    native, plain = decoders(changes)
    parts = [Part(1, some_ids(native), native.context)]
    torch.testing.assert_close(native.forward(parts)[0], plain.forward(parts)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("isa", rustinfer.instruction_sets())
def test_how_a_sequence_is_fed_and_what_runs_beside_it_changes_no_bit(isa, int8):
    native, _ = decoders({"sequence_len": 150}, int8=int8, isa=isa)
    ids, other = some_ids(native), some_ids(native, 1)
    whole = native.forward([Part(0, ids, len(ids))])[0]
    native.forward([Part(2, other[:70], 0)])
    at, pieces = 0, []
    for size in (1, 66, 1, 7, 75):
        beside = Part(2, other[70 + len(pieces) :][:1], 1)
        pieces.append(native.forward([beside, Part(1, ids[at : at + size], size)])[1])
        at += size
    assert np.array_equal(np.concatenate(pieces), whole)
    native.copy(1, 2, 100)
    assert np.array_equal(native.forward([Part(2, ids[100:], 50)])[0], whole[100:])
    native.truncate(2, 30)
    assert np.array_equal(native.forward([Part(2, ids[30:], 1)])[0], whole[-1:])


@pytest.mark.parametrize("isa", rustinfer.instruction_sets())
def test_int8_is_near_the_model_and_the_same_on_every_instruction_set(isa):
    native, plain = decoders({"n_embd": 128}, int8=True, isa=isa)
    parts = [Part(0, some_ids(native), native.context)]
    got, want = native.forward(parts)[0], plain.forward(parts)[0]
    assert np.abs(got - want).mean() < 0.05 * want.std()
    best, _ = decoders({"n_embd": 128}, int8=True)
    assert np.abs(got - best.forward(parts)[0]).mean() < 0.01 * want.std()  # a rounded byte may differ by one


def test_quantizing_loses_at_most_half_a_step_per_weight_and_repeats_exactly():
    parameters = {name: p.detach().numpy() for name, p in make_model(perturb=True).named_parameters()}
    stored = quantize(parameters)
    restored = dequantize(stored)
    for name, p in parameters.items():
        step = np.abs(p).max(1, keepdims=True) / 127 if is_quantized(name, p) else 0.0
        assert (np.abs(restored[name] - p) <= 0.501 * step).all()
    assert quantize_rows(np.zeros((1, 2), np.float32))[1].tolist() == [1.0]  # not subnormal, which would be slow
    again = quantize(restored)
    assert all(np.array_equal(again[name], a) for name, a in stored.items() if a.dtype == np.int8)


def test_the_loss_of_the_native_engine_is_the_models():
    model = make_model(make_config(), seed=3, perturb=True).eval()
    idx = torch.randint(0, 100, (2, 32), generator=torch.Generator().manual_seed(0))
    targets = idx.roll(-1, 1).masked_fill(idx < 20, -1)
    score = Scorer(NativeDecoder(native_model(model), 1))
    assert float(score(idx, targets)) == pytest.approx(float(model(idx, targets)), rel=1e-5)


@pytest.mark.parametrize("int8", [False, True])
def test_a_broken_row_stays_broken_and_its_neighbour_whole(int8):
    model = make_model(make_config(), seed=3, perturb=True).eval()
    model.wte.weight.data[7] = torch.nan
    bad = NativeDecoder(native_model(model, int8=int8), 2)
    one, two = bad.forward([Part(0, [1, 7, 2], 1), Part(1, [1, 2, 3], 1)])
    assert (np.isfinite(one).any(), np.isfinite(two).all()) == (False, True)


def test_a_chat_model_is_found_loaded_and_says_without_torch_what_it_says_in_torch(bytes_tokenizer):
    bytes_tokenizer.save(paths.tokenizer_dir("t"))
    model = make_model(make_config(vocab_size=bytes_tokenizer.vocab_size), perturb=True).eval()
    identity = {"tokenizer": "t", "tokenizer_hash": bytes_tokenizer.hash}
    write(paths.run_dir("sft", "m"), 7, model, identity=identity)
    code = "import sys; from nanozhchat import load; said = load('m', device='cpu')('你', temperature=0, max_tokens=9)"
    code += "; sys.stdout.buffer.write(said.encode()); sys.exit(3 * ('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    want = load("m", device="cpu", engine="torch")("你", temperature=0, max_tokens=9)
    assert (done.returncode, done.stdout.decode()) == (0, want), done.stderr


def test_weights_that_do_not_fit_the_configuration_are_damage_and_name_the_file(tmp_path):
    model = make_model()
    weights = {name: p.detach() for name, p in model.named_parameters() if name != "h.1.mlp.c_fc.weight"}
    save_file(weights, tmp_path / "model.safetensors")
    refused(r"model\.safetensors is damaged.*c_fc", pack_file, model.config, tmp_path / "model.safetensors",
            error=DamagedError)  # fmt: skip


def test_what_cannot_be_fed_or_run_is_refused_by_name():
    for ids, message in (([100], "token 100"), ([1] * 33, "33 tokens do not fit")):
        refused(message, decoders({})[0].forward, [Part(0, ids, 1)])
    tokenizer = Mock(special=lambda name: 0)
    refused("float32 weights", lambda: Engine(make_model(dtype=torch.bfloat16), tokenizer, kind="native"))
    refused("choose from torch, native", lambda: Engine(make_model(), tokenizer, kind="fast"))
