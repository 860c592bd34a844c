"""Sampling against distributions worked out by hand, with fixed seeds."""

import math

import numpy as np
import pytest

from nanozhchat.sampling import Sampler, SamplingParams, completes_ngram, draw, filtered_probabilities, penalize
from tests.conftest import refused

LOGITS = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -8.0], np.float32)
DRAWS = 100_000


def softmax(logits):
    weights = [math.exp(x - max(logits)) for x in logits]
    return [w / sum(weights) for w in weights]


def keep(p, kept):
    total = sum(p[i] for i in kept)
    return [p[i] / total if i in kept else 0.0 for i in range(len(p))]


def sampler(seen=(), index=0, **changes):
    return Sampler(params(**changes), seen, index)


def params(**changes):
    return SamplingParams(**{"temperature": 1.0, "top_p": 1.0, "seed": 7, **changes})


P = softmax(LOGITS)  # about .38 .23 .14 .085 .05 .03 .02 .00
CASES = {
    "plain": (params(), P), "top_k_beyond": (params(top_k=1000), P), "top_k_1": (params(top_k=1), keep(P, {0})),
    "cold": (params(temperature=0.5), softmax([x / 0.5 for x in LOGITS])),
    "hot": (params(temperature=2.0), softmax([x / 2.0 for x in LOGITS])),
    "top_k": (params(top_k=3), keep(P, {0, 1, 2})), "top_p_tiny": (params(top_p=1e-6), keep(P, {0})),
    "top_p": (params(top_p=0.7), keep(P, {0, 1, 2})),  # .38 + .23 = .61 is not enough
    "min_p": (params(min_p=0.3), keep(P, {0, 1, 2})),  # 0.3 * .38 = .11
    "min_p_1": (params(min_p=1.0), keep(P, {0})),
    "k_then_p": (params(top_k=2, top_p=0.5), keep(P, {0})),  # among the two: .62 .38
    "temperature_first": (params(temperature=2.0, top_p=0.4), keep(softmax([x / 2 for x in LOGITS]), {0, 1})),
}  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), CASES.values(), ids=CASES)
def test_probabilities_are_those_worked_out_by_hand_and_draws_follow_them(given, expected):
    ids, p = filtered_probabilities(LOGITS, given)
    assert np.bincount(ids, p, minlength=8).tolist() == pytest.approx(expected, abs=1e-6)
    drawn, mine = ids[draw(p, np.random.Generator(np.random.PCG64([7, 0])).random(DRAWS))], Sampler(given, [])
    assert [mine.choose(LOGITS).token for _ in range(200)] == drawn[:200].tolist()  # one after the other
    for want, count in zip(expected, np.bincount(drawn, minlength=8).tolist(), strict=True):
        assert abs(count - want * DRAWS) <= 4.5 * math.sqrt(DRAWS * want * (1 - want)), (want, count)


def test_top_p_over_a_large_vocabulary_keeps_what_sorting_it_all_would_keep_and_top_k_no_more_than_k_of_a_tie():
    random = np.random.default_rng(0)
    for scale, top_p in ((0.1, 0.9), (1.0, 0.5), (3.0, 0.9), (8.0, 0.99)):
        logits = (scale * random.standard_normal(1000)).astype(np.float32)
        p = np.sort(softmax(logits.tolist()))[::-1]
        want = int(np.searchsorted(np.cumsum(p), top_p)) + 1
        assert abs(len(filtered_probabilities(logits, params(top_p=top_p))[0]) - want) <= 1
    assert len(filtered_probabilities(np.array([1, 1, 1, 0], np.float32), params(top_k=2))[0]) == 2


@pytest.mark.parametrize(("changes", "seen", "expected"), [
    ({}, [0, 1, 0], [0, 0, 0, 0, 0]), *(({"temperature": t}, [], [0, 0]) for t in (1e-300, 1e-9, 1e-3)),
    ({"repetition_penalty": 2.0}, [0], [1, 0, 0, 0, 0]),  # 2 / 2 < 1.5, then 1 > .75
    ({"presence_penalty": 0.6}, [0], [0, 1, 0, 0, 0]),  # the prompt does not count: 2, 1.5, then 1.4 > .9
    ({"frequency_penalty": 0.3}, [], [0, 0, 1, 0, 1]),  # 2 and 1.5 take turns as each falls by .3 a time
    ({"no_repeat_ngram": 2}, [0, 0], [1, 0, 2, 0, 3]), ({"logit_bias": {4: 5.0, 99: 1.0}}, [], [4] * 5),
    ({"logit_bias": {0: -100.0}}, [], [1] * 5),
])  # fmt: skip
def test_penalties_bans_and_biases_change_the_greedy_choice_as_worked_out_by_hand(changes, seen, expected):
    mine = sampler(seen, **{"temperature": 0.0, **changes})
    assert [mine.choose(LOGITS).token for _ in expected] == expected
    logits = np.array([2.0, 0.0, -1.0, 3.0], np.float32)
    assert penalize(logits, [0, 2, 2, 0], 2.0).tolist() == [1.0, 0.0, -2.0, 3.0]  # once per token
    assert logits.tolist() == [2.0, 0.0, -1.0, 3.0]


def test_a_run_of_tokens_is_banned_only_where_it_would_be_completed():
    assert completes_ngram([1, 2, 3, 1, 2], 3) == [3]
    assert completes_ngram([1, 2, 3, 1, 2, 4, 1, 2], 3) == [3, 4]
    assert completes_ngram([1, 2, 3], 3) == completes_ngram([1, 2], 0) == completes_ngram([], 2) == []


def test_logprobs_are_the_models_own_whatever_is_filtered():
    choice = sampler(temperature=0.5, top_k=1, logprobs=2, logit_bias={5: 100.0}).choose(LOGITS)
    assert choice.token == 5
    assert choice.logprob == pytest.approx(math.log(P[5]), abs=1e-6)
    assert [i for i, _ in choice.top] == [0, 1]
    assert [p for _, p in choice.top] == pytest.approx([math.log(P[0]), math.log(P[1])], abs=1e-6)


def test_the_same_seed_draws_the_same_and_other_seeds_or_rows_do_not():
    def draws(seed, index=0):
        mine = sampler(seed=seed, index=index, temperature=2.0)
        return [mine.choose(LOGITS).token for _ in range(50)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert draws(1, 0) != draws(1, 1)
    assert draws(None) != draws(None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_raise_instead_of_choosing(bad, temperature):
    with pytest.raises(FloatingPointError, match="not finite"):
        sampler(temperature=temperature).choose(np.array([1.0, bad, 0.0], np.float32))


@pytest.mark.parametrize(("name", "value"), [
    ("temperature", -0.1), ("temperature", 2.1), ("temperature", math.nan), ("top_k", -1), ("top_k", 1001),
    ("top_p", 0), ("top_p", 1.01), ("min_p", -0.01), ("min_p", 1.01), ("repetition_penalty", 0.0),
    ("repetition_penalty", math.inf), ("max_tokens", 0), ("presence_penalty", -2.1), ("frequency_penalty", 2.1),
    ("no_repeat_ngram", -1), ("logprobs", 21), ("logit_bias", {-1: 0.0}), ("logit_bias", {1: 101.0}),
    ("logit_bias", {1: math.nan}),
])  # fmt: skip
def test_a_setting_out_of_range_is_refused_by_name_and_value(name, value):
    refused("logit_bias" if name == "logit_bias" else rf"{name}={value}", SamplingParams, **{name: value})
