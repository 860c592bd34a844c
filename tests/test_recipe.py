"""The depth dial: golden numbers, laws, closed forms, and errors that name a remedy that works."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

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
from tests.conftest import ROOT

GOLDEN: dict[int, dict[str, Any]] = {
    2: {
        "n_embd": 128, "n_head": 2, "head_dim": 64, "vocab_size": 4096, "sequence_len": 512, "window_pattern": "L",
        "value_embeddings": False, "num_params": 1_441_814, "scaling_params": 917_504, "flops_per_token": 7_077_888,
        "total_batch_size": 8192, "num_steps": 1344, "matrix_lr": 0.0131951, "weight_decay": 0.795025,
    },
    4: {
        "n_embd": 256, "n_head": 4, "head_dim": 64, "vocab_size": 4096, "sequence_len": 512, "window_pattern": "L",
        "value_embeddings": False, "num_params": 5_242_906, "scaling_params": 4_194_304, "flops_per_token": 31_457_280,
        "total_batch_size": 65536, "num_steps": 768, "matrix_lr": 0.0162450, "weight_decay": 1.130082,
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


def advised(depth: int, **options: Any) -> Recipe:
    return resolve(depth, vocab_size=advise_vocab_size(depth), **options)


@pytest.mark.parametrize("depth", GOLDEN)
def test_the_dial_gives_the_golden_numbers(depth: int) -> None:
    got = advised(depth).to_dict()
    for name, value in GOLDEN[depth].items():
        assert got[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name


def test_deeper_is_never_smaller_shorter_or_cheaper() -> None:
    recipes = [advised(d) for d in range(1, 33)]
    for name in ("n_embd", "vocab_size", "sequence_len", "num_params", "scaling_params", "flops_per_token",
                 "train_tokens", "total_batch_size", "train_flops"):  # fmt: skip
        values = [getattr(r, name) for r in recipes]
        assert values == sorted(values), name


@pytest.mark.parametrize("depth", [2, 4, 12, 20])
def test_the_total_batch_does_not_depend_on_the_number_of_ranks(depth: int) -> None:
    one = advised(depth)
    for world in (2, 4, 8):
        many = advised(depth, world_size=world)
        same = ("total_batch_size", "num_steps", "train_tokens", "matrix_lr", "embedding_lr", "weight_decay")
        assert {n: getattr(many, n) for n in same} == {n: getattr(one, n) for n in same}
        assert many.device_batch_size * many.sequence_len * world * many.grad_accum_steps == many.total_batch_size


@pytest.mark.parametrize("depth", range(1, 25))
def test_a_recipe_is_consistent_with_itself(depth: int) -> None:
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
def test_the_closed_form_counts_the_parameters_of_the_real_model(depth: int, vocab_size: int) -> None:
    r = resolve(depth, vocab_size=vocab_size)
    with torch.device("meta"):
        model = GPT(GPTConfig(**{name: getattr(r, name) for name in MODEL_FIELDS}))
    assert r.num_params == sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for _, p in model.named_matrices())
    assert r.scaling_params == matrices + model.lm_head.weight.numel()
    assert r.padded_vocab_size == model.config.padded_vocab_size


def test_constants_written_in_two_files_agree() -> None:
    assert RECIPE_GATE_CHANNELS == GATE_CHANNELS
    probe = model_sizes(budget.PROBE.n_layer, budget.PROBE.vocab_size)
    assert {k: probe[k] for k in ("n_embd", "n_head", "sequence_len", "n_layer")} == {
        k: getattr(budget.PROBE, k) for k in ("n_embd", "n_head", "sequence_len", "n_layer")
    }
    assert flops_per_token(probe) == budget.PROBE_FLOPS_PER_TOKEN


def test_flops_per_token_agree_with_a_count_by_hand() -> None:
    # three layers of 192 channels, 4096 tokens, context 2048 with windows S, S, L
    sizes = model_sizes(3, 4096, Overrides(max_seq_len=2048, window_pattern="SSL"))
    c, matmul = 192, 0
    for _ in range(3):
        matmul += 4 * c * c  # queries, keys, values, output
        matmul += 2 * c * 4 * c  # up and down
    matmul += 4096 * c  # head
    attention = sum(2 * c * window for window in (512, 512, 2048))  # scores, and their sum of values
    assert flops_per_token(sizes) == 3 * 2 * (
        matmul + attention
    )  # backward costs twice forward, 2 FLOPs a multiply-add


def test_flops_count_the_windows_that_the_model_has() -> None:
    sizes = model_sizes(7, 4096, Overrides(max_seq_len=64, window_pattern="SL"))
    config = GPTConfig(**{name: sizes[name] for name in MODEL_FIELDS})
    windows = sum(config.window(layer) for layer in range(7))
    params = count_params(sizes)
    assert flops_per_token(sizes) == 6 * (params["matrices"] + params["head"]) + 12 * sizes["n_embd"] * windows


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ({"max_seq_len": 256}, "sequence_len"),
        ({"total_batch_size": 32768}, "total_batch_size"),
        ({"device_batch_size": 4}, "device_batch_size"),
        ({"num_steps": 77}, "num_steps"),
        ({"window_pattern": "SL"}, "window_pattern"),
    ],
)
def test_an_override_is_used_as_given_and_marked(override: dict[str, Any], field: str) -> None:
    r = resolve(4, vocab_size=4096, overrides=Overrides(**override))
    assert getattr(r, field) == next(iter(override.values()))
    assert r.overridden == tuple(override)
    assert [name for name, value, _ in explain(r) if value.endswith("(set)")] == [field]


def test_the_horizon_can_be_set_in_flops_or_in_tokens_per_parameter() -> None:
    by_ratio = resolve(4, vocab_size=4096, overrides=Overrides(target_ratio=3.0))
    assert by_ratio.train_tokens == pytest.approx(3.0 * by_ratio.scaling_params, rel=0.01)
    by_flops = resolve(4, vocab_size=4096, overrides=Overrides(target_flops=1e14))
    assert by_flops.train_flops == pytest.approx(1e14, rel=0.03)
    assert by_flops.total_batch_size == resolve(4, vocab_size=4096).total_batch_size  # a cut run keeps its batch


def test_a_tiny_horizon_still_takes_a_step() -> None:
    assert resolve(4, vocab_size=4096, overrides=Overrides(target_flops=1.0)).num_steps == 1


def test_a_budget_trains_on_the_tokens_the_machine_can_do() -> None:
    r = resolve(4, vocab_size=4096, budget_s=600.0, budget_tokens=10_000_000)
    assert r.budget_s == 600.0
    assert r.train_tokens == pytest.approx(10_000_000, rel=0.01)


@pytest.mark.parametrize(
    ("pair", "named"),
    [
        ({"num_steps": 5, "target_ratio": 1.0}, "num_steps and target_ratio"),
        ({"num_steps": 5, "target_flops": 1.0}, "num_steps and target_flops"),
        ({"target_flops": 5, "target_ratio": 1.0}, "target_flops and target_ratio"),
    ],
)
def test_two_horizons_conflict(pair: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named} both set the length of the run; give only one"):
        Overrides(**pair)


@pytest.mark.parametrize("name", ["num_steps", "target_flops", "target_ratio"])
def test_a_budget_conflicts_with_every_other_horizon(name: str) -> None:
    with pytest.raises(ValueError, match="--budget sets the length of the run; drop"):
        resolve(4, vocab_size=4096, budget_s=60.0, overrides=Overrides(**{name: 5}))


@pytest.mark.parametrize(
    "name", ["max_seq_len", "device_batch_size", "total_batch_size", "num_steps", "target_flops", "target_ratio"]
)
@pytest.mark.parametrize("value", [0, -1])
def test_an_override_that_is_not_positive_is_refused_by_name_and_value(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}={value} must be positive"):
        Overrides(**{name: value})


@pytest.mark.parametrize("name", ["target_flops", "target_ratio"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_override_that_is_not_finite_is_refused_by_name_and_value(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value} must be positive"):
        Overrides(**{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"vocab_size": 0}, "vocab_size=0 must be positive"),
        ({"world_size": 0}, "world_size=0 must be at least 1"),
        ({"world_size": -2}, "world_size=-2 must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused_by_name_and_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(**{"depth": 4, "vocab_size": 4096, **options})


@pytest.mark.parametrize(
    ("over", "world"),
    [
        ({"total_batch_size": 1000}, 1),
        ({"total_batch_size": 100}, 1),
        ({"total_batch_size": 1024}, 4),
        ({}, 3),
        ({"max_seq_len": 384}, 1),
        ({"device_batch_size": 3}, 1),
        ({"device_batch_size": 3, "total_batch_size": 8192}, 2),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_flags_that_work(over: dict[str, Any], world: int) -> None:
    with pytest.raises(ValueError, match=r"total_batch_size=\d+ is not a multiple of \d+ = ") as error:
        resolve(4, vocab_size=4096, world_size=world, overrides=Overrides(**over))
    remedies = re.findall(r"--([a-z-]+)=(\d+)", str(error.value))
    assert remedies
    for flag, value in remedies:
        fixed = Overrides(**{**over, flag.replace("-", "_"): int(value)})
        assert resolve(4, vocab_size=4096, world_size=world, overrides=fixed).grad_accum_steps >= 1


def test_a_longer_budget_never_chooses_a_shallower_model() -> None:
    depths = [depth_for_budget(seconds, 1e11) for seconds in (1, 60, 600, 3600, 86400, 1e7, 1e9)]
    assert depths == sorted(depths)
    assert depths[0] == BUDGET_DEPTHS[0]
    assert depths[-1] > depths[0]


def test_a_recipe_survives_json() -> None:
    r = advised(12, overrides=Overrides(num_steps=10), world_size=8)
    assert Recipe.from_dict(json.loads(json.dumps(r.to_dict()))) == r


def test_a_recipe_with_unknown_or_missing_fields_is_refused_by_their_names() -> None:
    values = advised(2).to_dict()
    with pytest.raises(ValueError, match="n_layer"):
        Recipe.from_dict({k: v for k, v in values.items() if k != "n_layer"})
    with pytest.raises(ValueError, match="bogus"):
        Recipe.from_dict({**values, "bogus": 1})


def test_every_field_of_a_recipe_is_explained_with_a_formula() -> None:
    r = advised(4)
    assert {name for name, _, _ in explain(r)} == set(r.to_dict()) - {"depth", "overridden"}
    assert all(formula for _, _, formula in explain(r))


def test_fine_tuning_keeps_the_shape_and_lowers_every_learning_rate() -> None:
    base = advised(4)
    r = fine_tuning(base, total_batch_size=8192, num_steps=10, budget_s=None, lr_frac=0.5)
    assert all(getattr(r, name) == getattr(base, name) for name in MODEL_FIELDS)
    for name in ("embedding_lr", "head_lr", "scalar_lr", "matrix_lr"):
        assert getattr(r, name) == getattr(base, name) / 2
    assert (r.num_steps, r.train_tokens) == (10, 81920)


def test_another_number_of_ranks_shares_the_same_total_batch() -> None:
    r = advised(4)
    for world in (1, 2, 4, 8, 16):
        shared = for_world(r, world)
        assert shared.total_batch_size == r.total_batch_size
        product = shared.device_batch_size * shared.sequence_len * world * shared.grad_accum_steps
        assert product == r.total_batch_size
    with pytest.raises(ValueError, match="128 rows, which 3 ranks cannot share evenly"):
        for_world(r, 3)


def test_device_batch_follows_memory_without_changing_the_result() -> None:
    small, large = (resolve(4, vocab_size=4096, micro_batch_tokens=n) for n in (512, 65536))
    assert (small.device_batch_size, large.device_batch_size) == (1, 128)
    for r in (small, large):
        assert replace(r, device_batch_size=1, grad_accum_steps=1, memory_bytes=0) == replace(
            small, device_batch_size=1, grad_accum_steps=1, memory_bytes=0
        )


def test_the_recipe_needs_no_torch() -> None:
    code = "import sys, nanozhchat.recipe; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0
