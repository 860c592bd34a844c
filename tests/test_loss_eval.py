"""Held-out loss: sums over everything, divided once."""

import math

import pytest
import torch
import torch.nn.functional as F

from nanozhchat.compute import Compute
from nanozhchat.dataloader import Batch
from nanozhchat.loss_eval import bits_per_byte, compressor_bpb, evaluate
from tests.conftest import make_model

CPU = Compute(torch.device("cpu"))


def batches(scored):
    """Batches of which the given share of the targets is scored."""
    g = torch.Generator().manual_seed(0)
    made = []
    for share in scored:
        idx = torch.randint(0, 100, (2, 17), generator=g)
        targets = idx[:, 1:].masked_fill(torch.rand(2, 16, generator=g) >= share, -1)
        made.append(Batch(idx[:, :-1], targets, 0, {}))
    return made


def test_bits_per_byte_by_hand():
    assert bits_per_byte(math.log(2) * 24, 3) == pytest.approx(8.0)
    assert bits_per_byte(100 * math.log(256), 300) == pytest.approx(8 / 3)  # one even guess a three-byte character


@pytest.mark.parametrize("n", [0, -1])
def test_no_bytes_are_an_error_not_a_number(n):
    with pytest.raises(ValueError, match="no byte was scored"):
        bits_per_byte(1.0, n)


def test_the_loss_is_the_mean_over_tokens_not_over_batches():
    model = make_model(perturb=True).train()
    data = batches([1.0, 0.1, 0.5])
    token_bytes = torch.arange(100)  # id i stands for i bytes; id 0 is a special token
    got = evaluate(model, data, token_bytes, CPU)
    nats, n_tokens, n_bytes = 0.0, 0, 0
    with torch.no_grad():
        for b in data:
            logits = model.logits(model.hidden(b.inputs)).flatten(0, 1)
            nats += float(F.cross_entropy(logits, b.targets.flatten(), ignore_index=-1, reduction="sum"))
            ids = [i for i in b.targets.flatten().tolist() if i >= 0]
            n_tokens += len(ids)
            n_bytes += sum(ids)
    assert (got.tokens, got.bytes) == (n_tokens, n_bytes)
    assert got.loss == pytest.approx(nats / n_tokens, rel=1e-5)
    assert got.bpb == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    assert got.ppl == pytest.approx(math.exp(nats / n_tokens), rel=1e-4)
    assert model.training  # as it was before


def test_an_untrained_model_needs_the_bits_of_an_even_guess():
    got = evaluate(make_model(), batches([1.0]), torch.full((100,), 3), CPU)
    assert got.bpb == pytest.approx(math.log2(100) / 3, abs=0.01)
    assert got.ppl == pytest.approx(100, rel=0.02)


@pytest.mark.parametrize("data", [[], batches([0.0])], ids=["no_batch", "nothing_scored"])
def test_empty_held_out_data_is_an_error_with_a_remedy(data):
    with pytest.raises(ValueError, match="no token was scored: .*--val-data"):
        evaluate(make_model(), data, torch.ones(100), CPU)


def test_compressors_are_measured_in_the_same_unit():
    random = torch.randint(0, 256, (50_000,), generator=torch.Generator().manual_seed(0)).byte().numpy().tobytes()
    assert compressor_bpb(random)["gzip"] == pytest.approx(8.0, abs=0.1)
    assert compressor_bpb(random)["xz"] == pytest.approx(8.0, abs=0.1)
    assert max(compressor_bpb(b"a" * 50_000).values()) < 0.1
