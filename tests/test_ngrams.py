"""N-gram counts: probabilities by the book, equal one by one and in rows, and inside the model."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanozhchat import checkpoint, ngram_counts
from nanozhchat.engine import Engine
from nanozhchat.sampling import SamplingParams
from tests.conftest import CPU, make_config, make_model, refused
from tests.test_checkpoint import write

V = 12


def text(n=3000):
    """Zipfian tokens in which each depends on the two before it."""
    rng = np.random.default_rng(0)
    out = [0, 1]
    for _ in range(n):
        out.append(int((out[-1] * 5 + out[-2] * 3 + rng.zipf(1.7)) % V))
    return np.array(out)


def by_the_book(tokens, context, w, n, least):
    """p(w | context) with dictionaries: counts of the longest n-grams, continuation counts of shorter ones."""
    grams = {order: Counter(zip(*(tokens[i:] for i in range(order)))) for order in range(1, 5)}  # noqa: B905
    for order in (3, 2, 1):
        grams[order] = Counter(g[1:] for g in grams[order + 1])
    if n == 1:
        total = sum(grams[1].values())
        return (grams[1][w,] - 0.5 * ((w,) in grams[1])) / total + 0.5 * len(grams[1]) / total / V
    discount = ngram_counts._discounts(np.array(list(grams[n].values())))
    short = by_the_book(tokens, context, w, n - 1, least)
    after = {g[-1]: c for g, c in grams[n].items() if g[:-1] == tuple(context[-(n - 1) :])}
    kept = {x: (c - discount[min(c, 3)]) / sum(after.values()) for x, c in after.items() if c >= least[n]}
    return kept.get(w, 0.0) + (1 - sum(kept.values())) * short if kept else short


@pytest.mark.parametrize("least", [{2: 1, 3: 2, 4: 2}, {2: 1, 3: 1, 4: 1}])
def test_probabilities_are_those_of_kneser_ney_and_rows_sum_to_one(least, monkeypatch):
    monkeypatch.setattr(ngram_counts, "MIN_COUNTS", least)
    tokens = text()
    counts = ngram_counts.count(tokens, V)
    idx = torch.tensor([[3, 7, 1, 11, 2, 0, 5, 5]])
    context = counts.contexts(idx)[0]
    assert context.tolist()[:2] == [[-1, -1, 3], [-1, 3, 7]]
    rows = counts.rows(context)
    torch.testing.assert_close(rows.sum(1), torch.ones(8))
    counts.prepare_rows()
    torch.testing.assert_close(counts.rows(context), rows)
    listed = tokens.tolist()
    for i in range(8):
        known = [t for t in context[i].tolist() if t >= 0]
        want = [by_the_book(listed, known, w, min(4, len(known) + 1), least) for w in range(V)]
        torch.testing.assert_close(rows[i], torch.tensor(want, dtype=torch.float32), atol=1e-6, rtol=1e-5)
        p, order = counts.probability(context[i].expand(V, -1), torch.arange(V))
        torch.testing.assert_close(p, rows[i])
        assert set(order.tolist()) == {order[0].item()} <= {min(4, len(known) + 1), min(3, len(known) + 1)}


def model_with_counts(**changes):
    counts = ngram_counts.count(text() * 8, 96)
    model = make_model(make_config(vocab_size=96, ngrams=counts.sizes, **changes), perturb=True)
    model.ngrams.load_state_dict(counts.state_dict())
    return model


@pytest.mark.parametrize("trust", [0.0, 0.7])
def test_loss_and_gate_are_those_of_the_mixture_and_the_network_learns_from_target_and_counts(trust):
    model = model_with_counts()
    model.ngram_trust = trust
    idx = torch.tensor(text()[:64] * 8).view(2, 32)
    targets = idx.roll(-1, 1)
    loss = model(idx, targets)
    loss.backward()
    network, gate = model.lm_head.weight.grad.clone(), model.ngram_bias.grad.clone()
    model.zero_grad()
    context = model.ngrams.contexts(idx)
    logits = model.logits(model.hidden(idx), context)
    torch.testing.assert_close(logits.logsumexp(-1), torch.zeros(2, 32), atol=1e-5, rtol=0)
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    want.backward()
    torch.testing.assert_close(gate, model.ngram_bias.grad, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for got in (loss, model(idx, targets)):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-3)
    model.zero_grad()
    taught = trust * model.ngrams.rows(context.flatten(0, 1)) + (1 - trust) * F.one_hot(targets.flatten(), 96)
    alone = model.config.softcap * torch.tanh(model.lm_head(model.hidden(idx))[..., :96] / model.config.softcap)
    F.cross_entropy(alone.flatten(0, 1), taught, reduction="sum").backward()
    torch.testing.assert_close(network[:96], model.lm_head.weight.grad[:96], rtol=1e-4, atol=1e-4)
    refused("depend on the last tokens", lambda: model.logits(model.hidden(idx)))


def test_a_saved_model_comes_back_with_its_counts_or_without(tmp_path):
    model, idx = model_with_counts(), torch.tensor(text()[:64] * 8).view(2, 32)
    write(tmp_path, 1, model)
    saved = checkpoint.find(tmp_path)
    whole, alone = (saved.load_model(CPU.device, torch.float32, ngrams=with_counts) for with_counts in (True, False))
    with torch.no_grad():
        assert torch.equal(whole(idx, idx), model(idx, idx))
        assert torch.equal(alone.hidden(idx), model.hidden(idx))
    assert (whole.config.ngrams, alone.config.ngrams) == (model.config.ngrams, ())


def test_decoding_with_the_cache_uses_the_counts_of_the_last_tokens(bytes_tokenizer):
    counts = ngram_counts.count(np.concatenate([text() + 60] * 3), 263)
    model = make_model(make_config(vocab_size=263, ngrams=counts.sizes), perturb=True).eval()
    model.ngrams.load_state_dict(counts.state_dict())
    model.ngram_bias.data.fill_(-1)
    prompts = [(text()[:n] + 60).tolist() for n in (1, 2, 9)]
    whole = [list(ids) for ids in prompts]
    for held in whole * 8:
        with torch.inference_mode():
            ids = torch.tensor([held])
            held.append(int(model.logits(model.hidden(ids), model.ngrams.contexts(ids))[0, -1].argmax()))
    made = Engine(model, bytes_tokenizer).batch(prompts, SamplingParams(temperature=0, max_tokens=8))
    assert [ids + answer for ids, answer in zip(prompts, made)] == whole
    for kind in ("native", "native-int8"):
        refused("does not know n-gram counts", Engine, model, bytes_tokenizer, kind=kind)
