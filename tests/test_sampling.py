"""Sampling against distributions worked out by hand, with fixed seeds."""

import math

import pytest
import torch

from nanozhchat.sampling import SamplingParams, choose, filtered_probabilities, penalize

LOGITS = [2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -8.0]
DRAWS = 10_000


def softmax(logits):
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


def keep(p, kept):
    total = sum(p[i] for i in kept)
    return [p[i] / total if i in kept else 0.0 for i in range(len(p))]


def params(**changes):
    return SamplingParams(**{"temperature": 1.0, "top_p": 1.0, "seed": 7, **changes})


P = softmax(LOGITS)  # about .38 .23 .14 .085 .05 .03 .02 .00
CASES = [
    ("plain", params(), P),
    ("cold", params(temperature=0.5), softmax([x / 0.5 for x in LOGITS])),
    ("hot", params(temperature=2.0), softmax([x / 2.0 for x in LOGITS])),
    ("top_k", params(top_k=3), keep(P, {0, 1, 2})),
    ("top_k_1", params(top_k=1), keep(P, {0})),
    ("top_k_beyond", params(top_k=1000), P),
    ("top_p", params(top_p=0.7), keep(P, {0, 1, 2})),  # .38 + .23 = .61 is not enough
    ("top_p_tiny", params(top_p=1e-6), keep(P, {0})),
    ("min_p", params(min_p=0.3), keep(P, {0, 1, 2})),  # 0.3 * .38 = .11
    ("min_p_1", params(min_p=1.0), keep(P, {0})),
    ("k_then_p", params(top_k=2, top_p=0.5), keep(P, {0})),  # among the two: .62 .38
    ("temperature_first", params(temperature=2.0, top_p=0.4), keep(softmax([x / 2 for x in LOGITS]), {0, 1})),
]


@pytest.mark.parametrize(("given", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_probabilities_are_those_worked_out_by_hand(given, expected):
    got = filtered_probabilities(torch.tensor(LOGITS), given)
    assert got.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["plain", "hot", "top_k", "top_p", "min_p"])
def test_draws_follow_the_distribution_and_never_leave_it(name):
    given, expected = next((c[1], c[2]) for c in CASES if c[0] == name)
    generator, logits = given.generator(), torch.tensor(LOGITS)
    counts = torch.bincount(torch.tensor([choose(logits, given, generator, []) for _ in range(DRAWS)]), minlength=8)
    for p, count in zip(expected, counts.tolist(), strict=True):
        assert abs(count - p * DRAWS) <= 4.5 * math.sqrt(DRAWS * p * (1 - p)), (p, count)


def test_top_k_keeps_no_more_than_k_tokens_when_logits_tie():
    got = filtered_probabilities(torch.tensor([1.0, 1.0, 1.0, 0.0]), params(top_k=2))
    assert int((got > 0).sum()) == 2


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-9, 1e-3])
def test_a_temperature_of_nearly_zero_takes_the_likeliest(temperature):
    given = params(temperature=temperature)
    assert choose(torch.tensor(LOGITS), given, given.generator(), []) == 0


def test_the_penalty_shrinks_positive_and_grows_negative_logits_once_per_token():
    logits = torch.tensor([2.0, 0.0, -1.0, 3.0])
    assert penalize(logits, [0, 2, 2, 0], 2.0).tolist() == [1.0, 0.0, -2.0, 3.0]
    assert logits.tolist() == [2.0, 0.0, -1.0, 3.0]


def test_the_penalty_can_change_the_greedy_choice():
    logits = torch.tensor([2.0, 1.5])
    assert choose(logits, params(temperature=0.0, repetition_penalty=2.0), torch.Generator(), [0]) == 1
    assert choose(logits, params(temperature=0.0, repetition_penalty=1.0), torch.Generator(), [0]) == 0


def test_the_same_seed_draws_the_same_and_other_seeds_or_rows_do_not():
    def draws(seed, index=0):
        given = params(seed=seed, temperature=2.0)
        generator = given.generator(index)
        return [choose(torch.tensor(LOGITS), given, generator, []) for _ in range(50)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert draws(1, 0) != draws(1, 1)
    assert draws(None) != draws(None)


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    given = params(seed=None)
    choose(torch.tensor(LOGITS), given, given.generator(), [])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_raise_instead_of_choosing(bad, temperature):
    given = params(temperature=temperature)
    with pytest.raises(FloatingPointError, match="not finite"):
        choose(torch.tensor([1.0, bad, 0.0]), given, given.generator(), [])


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -0.1), ("temperature", 2.1), ("temperature", math.nan), ("top_k", -1), ("top_k", 1001),
     ("top_p", 0), ("top_p", 1.01), ("min_p", -0.01), ("min_p", 1.01), ("repetition_penalty", 0.0),
     ("repetition_penalty", math.inf), ("max_tokens", 0)],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=rf"{name}={value}"):
        SamplingParams(**{name: value})
