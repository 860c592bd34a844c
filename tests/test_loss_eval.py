"""Held-out loss: sums over everything, divided once."""

import math

import pytest
import torch
import torch.nn.functional as F

from nanozhchat.dataloader import Batch
from nanozhchat.loss_eval import bits_per_byte, compressor_bpb, evaluate
from tests.conftest import CPU, make_model, refused


def batches(scored):
    """Batches of which the given share of the targets is scored."""
    g = torch.Generator().manual_seed(0)
    for share in scored:
        idx = torch.randint(0, 100, (2, 17), generator=g)
        targets = idx[:, 1:].masked_fill(torch.rand(2, 16, generator=g) >= share, -1)
        yield Batch(idx[:, :-1], targets, 0, {})


def test_bits_per_byte_by_hand_and_nothing_scored_is_an_error_with_a_remedy():
    assert bits_per_byte(math.log(2) * 24, 3) == pytest.approx(8.0)
    assert bits_per_byte(100 * math.log(256), 300) == pytest.approx(8 / 3)  # one even guess a three-byte character
    for n in (0, -1):
        refused("no byte was scored", bits_per_byte, 1.0, n)
    for data in ([], batches([0.0])):
        refused("no token was scored: .*--val-data", evaluate, make_model(), data, torch.ones(100), CPU)


def test_the_loss_is_the_mean_over_tokens_not_over_batches():
    model, data = make_model(perturb=True).train(), list(batches([1.0, 0.1, 0.5]))
    got = evaluate(model, data, torch.arange(100), CPU)  # id i stands for i bytes; id 0 is a special token
    inputs, targets = (torch.cat([getattr(b, name) for b in data]) for name in ("inputs", "targets"))
    with torch.no_grad():
        logits = model.logits(model.hidden(inputs)).flatten(0, 1)
        loss = float(F.cross_entropy(logits, targets.flatten(), ignore_index=-1))
    scored = targets[targets >= 0]
    assert (got.tokens, got.bytes) == (len(scored), int(scored.sum()))
    assert got.loss == pytest.approx(loss, rel=1e-5)
    assert got.bpb == pytest.approx(loss * len(scored) / math.log(2) / got.bytes, rel=1e-5)
    assert got.ppl == pytest.approx(math.exp(loss), rel=1e-4)
    assert model.training  # as it was before


def test_an_untrained_model_needs_the_bits_of_an_even_guess():
    got = evaluate(make_model(), batches([1.0]), torch.full((100,), 3), CPU)
    assert got.bpb == pytest.approx(math.log2(100) / 3, abs=0.01)
    assert got.ppl == pytest.approx(100, rel=0.02)


def test_compressors_are_measured_in_the_same_unit():
    random = torch.randint(0, 256, (50_000,), generator=torch.Generator().manual_seed(0)).byte().numpy().tobytes()
    assert compressor_bpb(random)["gzip"] == pytest.approx(8.0, abs=0.1)
    assert compressor_bpb(random)["xz"] == pytest.approx(8.0, abs=0.1)
    assert max(compressor_bpb(b"a" * 50_000).values()) < 0.1
