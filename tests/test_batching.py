"""Requests that share a batch: none notices the others, beginnings are shared, one failure stays one failure."""

import random
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from nanozhchat import batching
from nanozhchat.batching import Batch
from nanozhchat.engine import Engine
from nanozhchat.sampling import SamplingParams
from tests.conftest import make_config, make_model
from tests.test_engine import GREEDY, prompt, random_engine

LONG = SamplingParams(temperature=0.0, max_tokens=200, logit_bias=dict.fromkeys(range(256, 263), -100.0))  # no end
SAMPLED = SamplingParams(temperature=1.5, top_p=0.9, max_tokens=20, seed=4)


class Counting:
    """Wraps a decoder and notes the tokens it was fed; poison: a slot whose logits are NaN."""

    def __init__(self, decoder):
        self.decoder, self.fed, self.poison = decoder, [], None

    def __getattr__(self, name):
        return getattr(self.decoder, name)

    def forward(self, parts):
        self.fed.append(sorted(len(p.ids) for p in parts))
        out = self.decoder.forward(parts)
        return [np.full_like(x, np.nan) if p.slot == self.poison else x for p, x in zip(parts, out, strict=True)]

    @property
    def n_fed(self):
        return sum(map(sum, self.fed))


@pytest.fixture
def engine(bytes_tokenizer):
    return random_engine(bytes_tokenizer, sequence_len=96)


def batch_of(engine, rows, *, drafts=True):
    return Batch(Counting(engine.new_batch(rows).decoder), engine.tokenizer, drafts=drafts)


def looping_engine(tokenizer):
    """An engine whose model looks at the last token only, and so soon goes round in circles."""
    config = make_config(vocab_size=tokenizer.vocab_size, sequence_len=256, n_layer=1)
    model = make_model(config, seed=5, perturb=True).eval()
    with torch.no_grad():
        model.h[0].attn.c_proj.weight.zero_()
        model.smear_lambda.zero_()
    return Engine(model, tokenizer, kind="native")


def step(batch, texts):
    for request, delta in batch.step():
        texts[request] = texts.get(request, "") + delta.text


def drain(batch):
    """Step until all is done; returns the text of each request."""
    texts = {}
    while batch.n_running or batch.n_waiting:
        step(batch, texts)
    return texts


def alone(engine, ids, params, index=0):
    batch = batch_of(engine, 1)
    request = batch.add(ids, params, index=index)
    text = drain(batch)[request]
    return request.ids, text


def test_requests_that_come_and_go_at_random_answer_as_if_alone(engine):
    dice, batch, texts, asked = random.Random(1), batch_of(engine, 4), {}, []
    while len(asked) < 16 or batch.n_running:
        if len(asked) < 16 and dice.random() < 0.4:
            ids, params = prompt(dice.randint(1, 60), dice.randint(0, 5)), dice.choice([GREEDY, SAMPLED])
            asked.append((batch.add(ids, params), ids, params))
        step(batch, texts)
    for request, ids, params in asked:
        assert (request.ids, texts[request]) == alone(engine, ids, params)
    assert max(map(len, batch.decoder.fed)) == 4


def test_a_long_prompt_is_read_in_pieces_while_others_go_on_answering(engine, monkeypatch):
    monkeypatch.setattr(batching, "PREFILL_TOKENS", 8)
    batch = batch_of(engine, 3)
    first = batch.add(prompt(3), GREEDY)
    batch.step()
    batch.add(prompt(60, 1), GREEDY)
    batch.add(prompt(20, 2), GREEDY)
    before = len(first.ids)
    for _ in range(5):
        batch.step()
    assert len(first.ids) == before + 5
    assert batch.decoder.fed[1] == [1, 4, 4]


def test_a_later_turn_a_shared_beginning_and_a_prompt_asked_twice_are_computed_once(engine):
    batch = batch_of(engine, 4)
    requests = [batch.add(prompt(40), SAMPLED, index=i) for i in range(4)]
    drain(batch)
    assert batch.decoder.n_fed <= 40 + 3 + sum(len(r.ids) for r in requests)
    assert [r.ids for r in requests] == [alone(engine, prompt(40), SAMPLED, i)[0] for i in range(4)]
    assert len({tuple(r.ids) for r in requests}) == 4
    for follow_up in ([*requests[0].prompt, *requests[0].ids, 1, 2, 3], [*requests[0].prompt[:30], 9, 9]):
        batch.decoder.fed.clear()
        again = batch.add(follow_up, GREEDY)
        drain(batch)
        assert batch.decoder.n_fed - len(again.ids) <= 4
        assert again.ids == alone(engine, follow_up, GREEDY)[0]


def test_logits_that_are_not_finite_end_that_request_only_and_leave_nothing_behind(engine):
    batch = batch_of(engine, 3)
    requests = [batch.add(prompt(20, i), GREEDY) for i in range(3)]
    batch.step()
    batch.decoder.poison = requests[1].slot
    drain(batch)
    assert [r.finish_reason == "error" for r in requests] == [False, True, False]
    assert isinstance(requests[1].error, FloatingPointError)
    for i in (0, 2):
        assert requests[i].ids == alone(engine, prompt(20, i), GREEDY)[0]
    assert batch.decoder.held[requests[1].slot] == []


def test_cancelled_and_removed_requests_give_their_slot_to_the_next(engine):
    batch, cancel = batch_of(engine, 1), threading.Event()
    first, second, third = (batch.add(prompt(5, i), GREEDY, cancel=cancel if i == 0 else None) for i in range(3))
    batch.step()
    assert (batch.n_running, batch.n_waiting) == (1, 2)
    cancel.set()
    assert [d.finish_reason for r, d in batch.step() if r is first] == ["cancelled"]
    batch.remove(second)
    drain(batch)
    assert third.ids == alone(engine, prompt(5, 2), GREEDY)[0]
    assert (batch.n_running, batch.n_waiting, first.finish_reason) == (0, 0, "cancelled")


@pytest.mark.parametrize("params", [LONG, replace(LONG, temperature=0.1, seed=1)], ids=["greedy", "sampled"])
def test_drafts_change_the_number_of_steps_and_nothing_else(bytes_tokenizer, params):
    saved = []
    for ids in ([1, 2, 3] * 10, prompt(30, 1), prompt(9, 2)):
        engine, answers, steps = looping_engine(bytes_tokenizer), [], []
        for drafts in (True, False):
            batch = batch_of(engine, 1, drafts=drafts)
            request = batch.add(ids, params)
            text = drain(batch)[request]
            answers.append((request.ids, text, request.finish_reason))
            steps.append(len(batch.decoder.fed))
        assert answers[0] == answers[1]
        saved.append(steps[1] - steps[0])
    assert max(saved) > 20
