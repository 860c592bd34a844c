"""The depth dial: golden numbers, laws, closed forms, and errors that name a remedy that works."""

import itertools
import json
import math
import re
from dataclasses import replace

import pytest
import torch

from nanozhchat import budget
from nanozhchat.gpt import GATE_CHANNELS, GPT, GPTConfig
from nanozhchat.recipe import (
    BUDGET_DEPTHS,
    MIN_BATCH,
    Overrides,
    Recipe,
    advise_vocab_size,
    count_params,
    depth_for_budget,
    explain,
    fine_tuning,
    flops_per_token,
    model_sizes,
    resolve,
)
from nanozhchat.recipe import GATE_CHANNELS as RECIPE_GATE_CHANNELS
from nanozhchat.run import MODEL_FIELDS, for_world

GOLDEN = {
    2: {
        "n_embd": 128, "n_head": 2, "head_dim": 64, "vocab_size": 4096, "sequence_len": 512, "window_pattern": "L",
        "value_embeddings": False, "num_params": 1_441_814, "scaling_params": 917_504, "flops_per_token": 7_077_888,
        "total_batch_size": 4096, "num_steps": 2688, "matrix_lr": 0.0123114, "weight_decay": 0.426043,
    },
    4: {
        "n_embd": 256, "n_head": 4, "head_dim": 64, "vocab_size": 4096, "sequence_len": 512, "window_pattern": "L",
        "value_embeddings": False, "num_params": 5_242_906, "scaling_params": 4_194_304, "flops_per_token": 31_457_280,
        "total_batch_size": 32768, "num_steps": 1536, "matrix_lr": 0.0151572, "weight_decay": 0.605596,
    },
    12: {
        "n_embd": 768, "n_head": 6, "head_dim": 128, "vocab_size": 16384, "sequence_len": 2048,
        "window_pattern": "SSSL", "value_embeddings": True, "num_params": 185_598_570, "scaling_params": 97_517_568,
        "flops_per_token": 684_195_840, "total_batch_size": 524_288, "num_steps": 2232, "matrix_lr": 0.02,
        "weight_decay": 0.315841,
    },
    20: {
        "n_embd": 1280, "n_head": 10, "head_dim": 128, "vocab_size": 32768, "sequence_len": 2048,
        "window_pattern": "SSSL", "value_embeddings": True, "num_params": 896_534_138, "scaling_params": 435_159_040,
        "flops_per_token": 2_886_205_440, "total_batch_size": 1_048_576, "num_steps": 4980, "matrix_lr": 0.0282843,
        "weight_decay": 0.100096,
    },
}  # fmt: skip


def advised(depth, **options):
    return resolve(depth, vocab_size=advise_vocab_size(depth), **options)


@pytest.mark.parametrize("depth", GOLDEN)
def test_the_dial_gives_the_golden_numbers(depth):
    got = advised(depth).to_dict()
    for name, value in GOLDEN[depth].items():
        assert got[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name


def test_deeper_is_never_smaller_shorter_or_cheaper():
    recipes = [advised(d) for d in range(1, 33)]
    for name in ("n_embd", "vocab_size", "sequence_len", "num_params", "scaling_params", "flops_per_token",
                 "train_tokens", "total_batch_size", "train_flops"):  # fmt: skip
        values = [getattr(r, name) for r in recipes]
        assert values == sorted(values), name


@pytest.mark.parametrize("depth", [2, 4, 12, 20])
def test_the_total_batch_does_not_depend_on_the_number_of_ranks(depth):
    one = advised(depth)
    for world in (2, 4, 8):
        many = advised(depth, world_size=world)
        same = ("total_batch_size", "num_steps", "train_tokens", "matrix_lr", "embedding_lr", "weight_decay")
        assert {n: getattr(many, n) for n in same} == {n: getattr(one, n) for n in same}
        assert many.device_batch_size * many.sequence_len * world * many.grad_accum_steps == many.total_batch_size


@pytest.mark.parametrize("depth", range(1, 25))
def test_a_recipe_is_consistent_with_itself(depth):
    r = advised(depth)
    assert r.n_head * r.head_dim == r.n_embd
    assert r.device_batch_size * r.sequence_len * r.world_size * r.grad_accum_steps == r.total_batch_size
    assert r.train_tokens == r.num_steps * r.total_batch_size
    assert r.train_flops == pytest.approx(r.train_tokens * r.flops_per_token)
    assert r.total_batch_size & (r.total_batch_size - 1) == 0
    assert r.total_batch_size >= MIN_BATCH
    assert r.padded_vocab_size % 64 == 0
    assert 0 <= r.padded_vocab_size - r.vocab_size < 64


@pytest.mark.parametrize("depth", [1, 2, 5, 6, 7, 12, 20])
@pytest.mark.parametrize("vocab_size", [4096, 5001])
def test_the_closed_form_counts_the_parameters_of_the_real_model(depth, vocab_size):
    r = resolve(depth, vocab_size=vocab_size)
    with torch.device("meta"):
        model = GPT(GPTConfig(**{name: getattr(r, name) for name in MODEL_FIELDS}))
    assert r.num_params == sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for _, p in model.named_matrices())
    assert r.scaling_params == matrices + model.lm_head.weight.numel()
    assert r.padded_vocab_size == model.config.padded_vocab_size


def test_constants_written_in_two_files_agree():
    assert RECIPE_GATE_CHANNELS == GATE_CHANNELS
    probe = model_sizes(budget.PROBE.n_layer, budget.PROBE.vocab_size)
    assert {k: probe[k] for k in ("n_embd", "n_head", "sequence_len", "n_layer")} == {
        k: getattr(budget.PROBE, k) for k in ("n_embd", "n_head", "sequence_len", "n_layer")
    }
    assert flops_per_token(probe) == budget.PROBE_FLOPS_PER_TOKEN


def test_flops_per_token_agree_with_a_count_by_hand():
    sizes = model_sizes(3, 4096, Overrides(max_seq_len=2048, window_pattern="SSL"))
    c = 192
    matmul = 3 * (4 * c * c + 2 * c * 4 * c) + 4096 * c  # queries, keys, values, output; up and down; head
    attention = sum(2 * c * window for window in (512, 512, 2048))  # scores, and their sum of values
    assert flops_per_token(sizes) == 3 * 2 * (matmul + attention)  # backward costs twice forward, 2 a multiply-add


def test_flops_count_the_windows_that_the_model_has():
    sizes = model_sizes(7, 4096, Overrides(max_seq_len=64, window_pattern="SL"))
    config = GPTConfig(**{name: sizes[name] for name in MODEL_FIELDS})
    windows = sum(config.window(layer) for layer in range(7))
    params = count_params(sizes)
    assert flops_per_token(sizes) == 6 * (params["matrices"] + params["head"]) + 12 * sizes["n_embd"] * windows


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_seq_len", 256), ("total_batch_size", 32768), ("device_batch_size", 4), ("num_steps", 77),
     ("window_pattern", "SL")],
)  # fmt: skip
def test_an_override_is_used_as_given_and_marked(field, value):
    r = resolve(4, vocab_size=4096, overrides=Overrides(**{field: value}))
    shown = "sequence_len" if field == "max_seq_len" else field
    assert (getattr(r, shown), r.overridden) == (value, (field,))
    assert [name for name, text, _ in explain(r) if text.endswith("(set)")] == [shown]


def test_the_horizon_can_be_set_in_flops_tokens_per_parameter_or_time():
    by_ratio, by_flops, least = (
        resolve(4, vocab_size=4096, overrides=Overrides(**over))
        for over in ({"target_ratio": 3.0}, {"target_flops": 1e14}, {"target_flops": 1.0})
    )
    assert by_ratio.train_tokens == pytest.approx(3.0 * by_ratio.scaling_params, rel=0.01)
    assert by_flops.train_flops == pytest.approx(1e14, rel=0.03)
    assert by_flops.total_batch_size == resolve(4, vocab_size=4096).total_batch_size  # a cut run keeps its batch
    assert least.num_steps == 1
    by_time = resolve(4, vocab_size=4096, budget_s=600.0, budget_tokens=10_000_000)
    assert by_time.train_tokens == pytest.approx(10_000_000, rel=0.01)


@pytest.mark.parametrize(("one", "other"), itertools.combinations(("num_steps", "target_flops", "target_ratio"), 2))
def test_two_horizons_conflict(one, other):
    with pytest.raises(ValueError, match="both set the length of the run; give only one"):
        Overrides(**{one: 5, other: 5})
    for name in (one, other):
        with pytest.raises(ValueError, match="--budget sets the length of the run; drop"):
            resolve(4, vocab_size=4096, budget_s=60.0, overrides=Overrides(**{name: 5}))


@pytest.mark.parametrize(
    "name", ["max_seq_len", "device_batch_size", "total_batch_size", "num_steps", "target_flops", "target_ratio"]
)
def test_an_override_that_is_not_positive_and_finite_is_refused_by_name_and_value(name):
    for value in (0, -1, *([math.nan, math.inf] if name.startswith("target") else [])):
        with pytest.raises(ValueError, match=f"{name}={value} must be positive"):
            Overrides(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("depth", 0), ("vocab_size", 0), ("world_size", 0), ("world_size", -2)])
def test_impossible_sizes_are_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be "):
        resolve(**{"depth": 4, "vocab_size": 4096, name: value})


@pytest.mark.parametrize(
    ("over", "world"),
    [({"total_batch_size": 1000}, 1), ({"total_batch_size": 100}, 1), ({"total_batch_size": 1024}, 4), ({}, 3),
     ({"max_seq_len": 384}, 1), ({"device_batch_size": 3}, 1), ({"device_batch_size": 3, "total_batch_size": 8192}, 2)],
)  # fmt: skip
def test_a_batch_that_does_not_divide_is_refused_with_flags_that_work(over, world):
    with pytest.raises(ValueError, match=r"total_batch_size=\d+ is not a multiple of \d+ = ") as error:
        resolve(4, vocab_size=4096, world_size=world, overrides=Overrides(**over))
    remedies = re.findall(r"--([a-z-]+)=(\d+)", str(error.value))
    assert remedies
    for flag, value in remedies:
        fixed = Overrides(**{**over, flag.replace("-", "_"): int(value)})
        assert resolve(4, vocab_size=4096, world_size=world, overrides=fixed).grad_accum_steps >= 1


def test_a_longer_budget_never_chooses_a_shallower_model():
    depths = [depth_for_budget(seconds, 1e11) for seconds in (1, 60, 600, 3600, 86400, 1e7, 1e9)]
    assert depths == sorted(depths)
    assert depths[0] == BUDGET_DEPTHS[0]
    assert depths[-1] > depths[0]


def test_a_recipe_survives_json_and_unknown_or_missing_fields_are_refused_by_name():
    r = advised(12, overrides=Overrides(num_steps=10), world_size=8)
    values = json.loads(json.dumps(r.to_dict()))
    assert Recipe.from_dict(values) == r
    with pytest.raises(ValueError, match="bogus"):
        Recipe.from_dict({**values, "bogus": 1})
    del values["n_layer"]
    with pytest.raises(ValueError, match="n_layer"):
        Recipe.from_dict(values)


def test_every_field_of_a_recipe_is_explained_with_a_formula():
    r = advised(4)
    assert {name for name, _, _ in explain(r)} == set(r.to_dict()) - {"depth", "overridden"}
    assert all(formula for _, _, formula in explain(r))


def test_fine_tuning_keeps_the_shape_and_lowers_every_learning_rate():
    base = advised(4)
    r = fine_tuning(base, total_batch_size=8192, num_steps=10, budget_s=None, lr_frac=0.5)
    assert all(getattr(r, name) == getattr(base, name) for name in MODEL_FIELDS)
    for name in ("embedding_lr", "head_lr", "scalar_lr", "matrix_lr"):
        assert getattr(r, name) == getattr(base, name) / 2
    assert (r.num_steps, r.train_tokens) == (10, 81920)


def test_another_number_of_ranks_shares_the_same_total_batch():
    r = advised(4)
    for world in (1, 2, 4, 8, 16):
        shared = for_world(r, world)
        assert shared.total_batch_size == r.total_batch_size
        product = shared.device_batch_size * shared.sequence_len * world * shared.grad_accum_steps
        assert product == r.total_batch_size
    with pytest.raises(ValueError, match="64 rows, which 3 ranks cannot share evenly"):
        for_world(r, 3)


def test_device_batch_follows_memory_without_changing_the_result():
    small, large = (resolve(4, vocab_size=4096, micro_batch_tokens=n) for n in (512, 65536))
    assert (small.device_batch_size, large.device_batch_size) == (1, 64)
    for r in (small, large):
        assert replace(r, device_batch_size=1, grad_accum_steps=1, memory_bytes=0) == replace(
            small, device_batch_size=1, grad_accum_steps=1, memory_bytes=0
        )


@pytest.mark.parametrize(
    ("depth", "corpus", "tokens", "counted"),
    [(4, 11e6, 1e6, 9_900_000), (4, 1e9, 1e6, 12_000_000), (4, 4e6, 1e6, 0), (9, 1e9, 1e6, 0), (4, 0, 1e6, 0)],
)
def test_short_runs_count_n_grams_in_text_they_do_not_read(depth, corpus, tokens, counted):
    recipe = resolve(depth, vocab_size=4096, budget_tokens=tokens, corpus_tokens=int(corpus))
    assert recipe.ngram_tokens == pytest.approx(counted, rel=0.01)
    gate = recipe.n_embd + 5 if counted else 0
    assert recipe.num_params == resolve(depth, vocab_size=4096, budget_tokens=tokens).num_params + gate
