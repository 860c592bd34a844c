"""The depth dial: golden numbers, laws, closed forms, and errors that name a remedy that works."""

import itertools
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nanozhchat import budget, gpt, recipe
from nanozhchat.gpt import GPT
from nanozhchat.recipe import Overrides, Recipe, explain, flops_per_token, model_sizes, resolve
from nanozhchat.run import for_world, gpt_config
from tests.conftest import CPU, refused

FIELDS = """n_embd n_head head_dim vocab_size sequence_len window_pattern value_embeddings num_params scaling_params
flops_per_token total_batch_size num_steps matrix_lr weight_decay"""
GOLDEN = {
    2: (128, 2, 64, 4096, 512, "L", False, 1_441_814, 917_504, 7_077_888, 4096, 2688, 0.0123114, 0.426043),
    4: (256, 4, 64, 4096, 512, "L", False, 5_242_906, 4_194_304, 31_457_280, 32768, 1536, 0.0151572, 0.605596),
    12: (768, 6, 128, 16384, 2048, "SSSL", True, 185_598_570, 97_517_568, 684_195_840, 524_288, 2232, 0.02, 0.315841),
    20: (1280, 10, 128, 32768, 2048, "SSSL", True, 896_534_138, 435_159_040, 2_886_205_440, 1_048_576, 4980, 0.0282843,
         0.100096),
}  # fmt: skip


def advised(depth, **options):
    return resolve(depth, vocab_size=recipe.advise_vocab_size(depth), **options)


@pytest.mark.parametrize("depth", GOLDEN)
def test_the_dial_gives_the_golden_numbers(depth):
    got = advised(depth).to_dict()
    for name, value in zip(FIELDS.split(), GOLDEN[depth], strict=True):
        assert got[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name


def test_deeper_is_never_smaller_shorter_or_cheaper_and_every_recipe_is_consistent():
    recipes = [advised(d) for d in range(1, 33)]
    for name in ("n_embd", "vocab_size", "sequence_len", "num_params", "scaling_params", "flops_per_token",
                 "train_tokens", "total_batch_size", "train_flops"):  # fmt: skip
        values = [getattr(r, name) for r in recipes]
        assert values == sorted(values), name
    for r in recipes:
        assert r.n_head * r.head_dim == r.n_embd
        assert r.train_tokens == r.num_steps * r.total_batch_size
        assert r.train_flops == pytest.approx(r.train_tokens * r.flops_per_token)
        assert r.total_batch_size & (r.total_batch_size - 1) == 0
        assert r.total_batch_size >= recipe.MIN_BATCH
        assert (r.padded_vocab_size % 64, (r.padded_vocab_size - r.vocab_size) // 64) == (0, 0)


@pytest.mark.parametrize("depth", [2, 4, 12, 20])
def test_ranks_and_memory_change_how_a_batch_is_cut_and_nothing_else(depth):
    def whole(r):
        assert r.device_batch_size * r.sequence_len * r.world_size * r.grad_accum_steps == r.total_batch_size
        return replace(r, device_batch_size=1, grad_accum_steps=1, memory_bytes=0, world_size=1)

    one = advised(depth)
    changed = [advised(depth, world_size=world) for world in (2, 4, 8)] + [for_world(one, world) for world in (1, 2, 8)]
    changed += [advised(depth, micro_batch_tokens=n) for n in (512, 65536)]
    assert {whole(r) for r in changed} == {whole(one)}
    assert len({r.device_batch_size for r in changed}) > 1
    refused(r"\d+ rows, which 3 ranks cannot share evenly", for_world, one, 3)


@pytest.mark.parametrize("depth", [1, 2, 5, 6, 7, 12, 20])
@pytest.mark.parametrize("vocab_size", [4096, 5001])
def test_the_closed_form_counts_the_parameters_of_the_real_model(depth, vocab_size):
    r = resolve(depth, vocab_size=vocab_size)
    with torch.device("meta"):
        model = GPT(gpt_config(r))
    assert r.num_params == sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for _, p in model.named_matrices())
    assert r.scaling_params == matrices + model.lm_head.weight.numel()
    assert r.padded_vocab_size == model.config.padded_vocab_size


def test_constants_written_in_two_files_agree():
    assert recipe.GATE_CHANNELS == gpt.GATE_CHANNELS
    probe = model_sizes(budget.PROBE.n_layer, budget.PROBE.vocab_size)
    assert all(probe[k] == getattr(budget.PROBE, k) for k in ("n_embd", "n_head", "sequence_len", "n_layer"))
    assert flops_per_token(probe) == budget.PROBE_FLOPS_PER_TOKEN


def test_flops_per_token_agree_with_a_count_by_hand_over_the_windows_that_the_model_has():
    sizes = model_sizes(3, 4096, Overrides(max_seq_len=2048, window_pattern="SSL"))
    c, windows = 192, [gpt_config(SimpleNamespace(**sizes)).window(layer) for layer in range(3)]
    assert windows == [512, 512, 2048]
    matmul = 3 * (4 * c * c + 2 * c * 4 * c) + 4096 * c  # queries, keys, values, output; up and down; head
    attention = sum(2 * c * window for window in windows)  # scores, and their sum of values
    assert flops_per_token(sizes) == 3 * 2 * (matmul + attention)  # backward costs twice forward, 2 a multiply-add


@pytest.mark.parametrize(("field", "value"), [
    ("max_seq_len", 256), ("total_batch_size", 32768), ("device_batch_size", 4), ("num_steps", 77),
    ("window_pattern", "SL"),
])  # fmt: skip
def test_an_override_is_used_as_given_and_marked(field, value):
    r = resolve(4, vocab_size=4096, overrides=Overrides(**{field: value}))
    shown = "sequence_len" if field == "max_seq_len" else field
    assert (getattr(r, shown), r.overridden) == (value, (field,))
    assert [name for name, text, _ in explain(r) if text.endswith("(set)")] == [shown]


def test_the_horizon_can_be_set_in_flops_tokens_per_parameter_or_time():
    lengths = (Overrides(target_ratio=3.0), Overrides(target_flops=1e14), Overrides(target_flops=1.0))
    by_ratio, by_flops, least = (resolve(4, vocab_size=4096, overrides=length) for length in lengths)
    assert by_ratio.train_tokens == pytest.approx(3.0 * by_ratio.scaling_params, rel=0.01)
    assert by_flops.train_flops == pytest.approx(1e14, rel=0.03)
    assert by_flops.total_batch_size == resolve(4, vocab_size=4096).total_batch_size  # a cut run keeps its batch
    assert least.num_steps == 1
    by_time = resolve(4, vocab_size=4096, budget_s=600.0, budget_tokens=10_000_000)
    assert by_time.train_tokens == pytest.approx(10_000_000, rel=0.01)


@pytest.mark.parametrize(("one", "other"), itertools.combinations(("num_steps", "target_flops", "target_ratio"), 2))
def test_two_horizons_conflict(one, other):
    refused("both set the length of the run; give only one", Overrides, **{one: 5, other: 5})
    for name in (one, other):
        options = {"vocab_size": 4096, "budget_s": 60.0, "overrides": Overrides(**{name: 5})}
        refused("--budget sets the length of the run; drop", resolve, 4, **options)


def test_what_is_not_positive_and_finite_is_refused_by_name_and_value():
    for name in ("max_seq_len", "device_batch_size", "total_batch_size", "num_steps", "target_flops", "target_ratio"):
        for value in (0, -1, *([math.nan, math.inf] if name.startswith("target") else [])):
            refused(f"{name}={value} must be positive", Overrides, **{name: value})
    for name, value in (("depth", 0), ("vocab_size", 0), ("world_size", 0), ("world_size", -2)):
        refused(f"{name}={value} must be ", resolve, **{"depth": 4, "vocab_size": 4096, name: value})


@pytest.mark.parametrize(("over", "world"), [
    ({"total_batch_size": 1000}, 1), ({"total_batch_size": 100}, 1), ({"total_batch_size": 1024}, 4), ({}, 3),
    ({"max_seq_len": 384}, 1), ({"device_batch_size": 3}, 1), ({"device_batch_size": 3, "total_batch_size": 8192}, 2),
])  # fmt: skip
def test_a_batch_that_does_not_divide_is_refused_with_flags_that_work(over, world):
    options, message = {"vocab_size": 4096, "world_size": world}, r"total_batch_size=\d+ is not a multiple of \d+ = "
    error = refused(message, resolve, 4, **options, overrides=Overrides(**over))
    remedies = re.findall(r"--([a-z-]+)=(\d+)", str(error))
    assert remedies
    for flag, value in remedies:
        fixed = Overrides(**{**over, flag.replace("-", "_"): int(value)})
        assert resolve(4, vocab_size=4096, world_size=world, overrides=fixed).grad_accum_steps >= 1


def test_a_budget_for_a_few_steps_only_is_warned_of_before_it_is_spent(caplog):
    for seconds, warned in ((180, True), (36_000, False)):
        caplog.clear()
        budget.plan(6, 8192, Overrides(), CPU, seconds=seconds, speed=5e10, corpus_tokens=0)
        assert bool(re.search(rf"{seconds} s are about \d+ steps of depth 6.*--depth", caplog.text)) is warned


def test_a_longer_budget_never_chooses_a_shallower_model():
    depths = [recipe.depth_for_budget(seconds, 1e11) for seconds in (1, 60, 600, 3600, 86400, 1e7, 1e9)]
    assert (depths, depths[0], depths[-1] > depths[0]) == (sorted(depths), recipe.BUDGET_DEPTHS[0], True)


def test_a_recipe_survives_json_is_explained_whole_and_other_fields_are_refused_by_name():
    r = advised(12, overrides=Overrides(num_steps=10), world_size=8)
    values = json.loads(json.dumps(r.to_dict()))
    assert Recipe.from_dict(values) == r
    assert {name for name, _, formula in explain(r) if formula} == {*values} - {"depth", "overridden"}
    refused("bogus", Recipe.from_dict, {**values, "bogus": 1})
    refused("n_layer", Recipe.from_dict, {k: v for k, v in values.items() if k != "n_layer"})


def test_fine_tuning_keeps_the_shape_and_lowers_every_learning_rate():
    base = advised(4)
    r = recipe.fine_tuning(base, total_batch_size=8192, num_steps=10, budget_s=None, lr_frac=0.5)
    assert gpt_config(r) == gpt_config(base)
    for name in ("embedding_lr", "head_lr", "scalar_lr", "matrix_lr"):
        assert getattr(r, name) == getattr(base, name) / 2
    assert (r.num_steps, r.train_tokens) == (10, 81920)


@pytest.mark.parametrize(("depth", "corpus", "tokens", "counted"), [
    (4, 2.2e6, 1e6, 1_100_000), (4, 1e9, 1e6, 12_000_000), (4, 2e6, 1e6, 0), (9, 1e9, 1e6, 0), (4, 0, 1e6, 0),
])  # fmt: skip
def test_short_runs_count_n_grams_in_text_they_do_not_read(depth, corpus, tokens, counted):
    r = resolve(depth, vocab_size=4096, budget_tokens=tokens, corpus_tokens=int(corpus))
    assert r.ngram_tokens == pytest.approx(counted, rel=0.01)
    gate = r.n_embd + 5 if counted else 0
    assert r.num_params == resolve(depth, vocab_size=4096, budget_tokens=tokens).num_params + gate
