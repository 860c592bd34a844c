"""The model: causal, reproducible, complete gradients, the identity at the start."""

import dataclasses
from functools import partial

import pytest
import torch
import torch._dynamo.utils
import torch.nn.functional as F

from nanozhchat import gpt
from nanozhchat.compute import must_emulate_fp8
from nanozhchat.gpt import GPT, offset_keys, rms_norm, squared_relu
from nanozhchat.optim import Optimizer, param_groups
from nanozhchat.run import gpt_config
from tests.conftest import CPU, PLAIN, make_config, make_model, make_recipe, refused


def tokens(config, rows=2, length=None, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (rows, length or config.sequence_len), generator=g)


def learn(model):
    """Predict the next tokens of some rows; returns the loss, and the gradient of each parameter by its name."""
    idx = tokens(model.config)
    (loss := model(idx, idx.roll(-1, 1))).backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("place", [1, 8, 9, 20, 31])
def test_changing_a_token_changes_nothing_before_it_or_in_other_rows_and_something_after(place):
    model = make_model(perturb=True)
    idx = tokens(model.config)
    other = idx.clone()
    other[0, place] = (other[0, place] + 1) % model.config.vocab_size
    with torch.no_grad():
        a, b = model.hidden(idx), model.hidden(other)
    torch.testing.assert_close(a[0, :place], b[0, :place], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(a[1], b[1], atol=1e-6, rtol=1e-6)
    assert (a[0, place:] - b[0, place:]).abs().amax(-1).min() > 1e-4  # the last layer sees everything


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize(("fast", "plain"), [
    (rms_norm, lambda x: F.rms_norm(x, (x.size(-1),))), (squared_relu, lambda x: F.relu(x).square()),
])  # fmt: skip
def test_operators_written_for_few_passes_over_memory_have_the_values_and_gradients_of_torchs_own(
    fast, plain, dtype, tolerance
):
    g = torch.Generator().manual_seed(0)
    x, direction = (torch.randn(3, 5, 64, generator=g).to(dtype) for _ in range(2))
    x[0, 0] = 0
    results = []
    for function in (fast, plain):
        given = x.clone().requires_grad_()
        y = function(given)
        y.backward(direction)
        results.append((y.detach(), given.grad))
    torch.testing.assert_close(*results, atol=tolerance, rtol=tolerance)


def test_the_first_heads_get_the_keys_of_the_token_before_and_none_before_the_first_the_others_keep_theirs():
    keys = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    made = offset_keys(keys, 2)
    assert torch.equal(made[:, 1:, :2], keys[:, :-1, :2])
    assert made[:, 0, :2].eq(0).all()
    assert torch.equal(made[:, :, 2], keys[:, :, 2])


def test_with_offset_keys_a_single_layer_copies_what_followed_an_earlier_occurrence_and_without_it_cannot():
    config = make_config(n_layer=1, n_head=2, n_kv_head=2, n_embd=64, vocab_size=64, value_embeddings=False)
    losses = {}
    for offset in (1, 0):
        model, g = make_model(dataclasses.replace(config, offset_heads=offset)), torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(120):
            rows = torch.rand(64, 64, generator=g).argsort()[:, :17]  # no token twice ...
            place = torch.randint(0, 15, (64, 1), generator=g)
            rows[:, -1:] = rows.gather(1, place)  # ... but the last
            targets = torch.full_like(rows, -1)
            targets[:, -1:] = rows.gather(1, place + 1)
            optimizer.zero_grad()
            loss = model(rows, targets) / 64
            loss.backward()
            optimizer.step()
        losses[offset] = float(loss.detach())
    assert losses[1] < 0.2 * losses[0]


def test_compiled_blocks_give_the_losses_and_gradients_of_eager_ones(monkeypatch):
    model = make_model(perturb=True)
    eager = learn(model)
    model.zero_grad()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # traced, but not translated
    model.compile_training()
    compiled = learn(model)
    torch.testing.assert_close(compiled["loss"], eager["loss"])
    torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_impossible_sizes_and_more_tokens_than_the_context_are_refused():
    refused("n_embd=30 must be n_head=4 times an even head size", make_config, n_embd=30)
    refused("n_embd=36", make_config, n_embd=36)
    refused("offset_heads=3 must be from 0 to n_kv_head=2", make_config, offset_heads=3)
    refused("plain models have no value_embeddings, offset_heads or ngrams", make_config, **PLAIN, offset_heads=1)
    refused("n_head=4 must be a multiple of n_kv_head=3", make_config, n_kv_head=3)
    refused("window_pattern=''", make_config, window_pattern="")
    refused("window_pattern='SX' may hold the letters S and L only", make_config, window_pattern="SX")
    refused("33 tokens exceed the model's context of 32", make_model().hidden, torch.zeros(1, 33, dtype=torch.long))


def test_the_seed_decides_every_weight_and_the_global_generator_is_left_alone():
    model, before = GPT(make_config()), torch.get_rng_state()
    for p in model.parameters():
        p.data.fill_(torch.nan)
    model.init_weights(torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, model.parameters(), make_model(seed=1).parameters()))  # and none is NaN
    other = make_model(seed=2)
    assert not torch.equal(model.wte.weight, other.wte.weight)
    assert not torch.equal(model.h[0].mlp.c_fc.weight, other.h[0].mlp.c_fc.weight)


def test_padding_of_the_vocabulary_is_never_predicted_and_never_trained_and_logits_stay_within_the_softcap():
    model = make_model(perturb=True)
    assert model.config.padded_vocab_size == 128
    model.lm_head.weight.data[100:] = 1e3
    idx = tokens(model.config)
    targets = idx.roll(-1, 1)
    targets[:, -3:] = -1
    logits = model.logits(model.hidden(idx))
    assert logits.shape == (2, 32, 100)
    loss = model(idx, targets)
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-1)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-3)
    loss.backward()
    assert model.lm_head.weight.grad[100:].abs().max() == 0
    model.lm_head.weight.data.mul_(1e3)
    assert model.logits(model.hidden(idx)).abs().max() <= model.config.softcap


def test_logits_are_made_of_scored_tokens_only_and_nothing_scored_is_no_loss_and_no_gradient(monkeypatch):
    model, seen, real = make_model(perturb=True), [], gpt.linear_cross_entropy
    monkeypatch.setattr(gpt, "linear_cross_entropy", lambda x, *rest: seen.append(len(x)) or real(x, *rest))
    idx = tokens(model.config)
    targets = idx.roll(-1, 1)
    targets[:, ::2] = -1
    model(idx, targets)
    (loss := model(idx, torch.full_like(targets, -1))).backward()
    assert (seen, float(loss.detach())) == ([idx.numel() // 2, 0], 0.0)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_recomputing_activations_gives_the_same_gradients():
    kept, again = (learn(make_model(perturb=True, grad_checkpoint=on).train()) for on in (False, True))
    torch.testing.assert_close(again, kept, atol=1e-6, rtol=1e-5)


def test_bfloat16_activations_keep_float32_weights_and_stay_close():
    full, low = make_model(perturb=True), make_model(perturb=True, dtype=torch.bfloat16)
    assert low.hidden(tokens(low.config)).dtype == torch.bfloat16
    found = learn(low)
    assert {t.dtype for t in (*low.parameters(), *found.values())} == {torch.float32}
    torch.testing.assert_close(found["loss"], learn(full)["loss"], rtol=0.02, atol=0)


def test_fp8_multiplies_the_same_weights_and_its_loss_and_gradients_stay_close_to_those_without():
    plain, model = (make_model(make_config(n_embd=64, n_kv_head=4), perturb=True) for _ in range(2))
    assert model.multiply_in_fp8(emulate=True) == 6 * model.config.n_layer  # all but the narrow gates
    want, got = learn(plain), learn(model)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert got.keys() == want.keys()
    for name, t in want.items():
        assert F.cosine_similarity(t.flatten(), got[name].flatten(), dim=0) > 0.8, name  # two bits of mantissa
        assert not torch.equal(t, got[name]), name
    torch.testing.assert_close(got["loss"], want["loss"], rtol=0.03, atol=0)


def test_fp8_is_emulated_on_a_cpu_and_refused_by_a_gpu_without_such_units(monkeypatch):
    assert must_emulate_fp8(torch.device("cpu"))
    for capability in ((8, 9), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert not must_emulate_fp8(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    for device in ("cuda", "mps", "xpu"):
        refused("--fp8 needs a CUDA device of compute capability 8.9", must_emulate_fp8, torch.device(device))


def test_every_parameter_is_trained_by_exactly_one_group_and_one_batch_can_be_learnt():
    recipe = make_recipe()
    model = make_model(gpt_config(recipe))
    groups, idx, losses = param_groups(model, recipe), tokens(model.config, rows=4), []
    assert sorted(n for g in groups for n in g.params) == sorted(n for n, _ in model.named_parameters())
    optimizer = Optimizer(groups, CPU)
    for step in range(30):
        loss = model(idx, idx.roll(-1, 1)) / idx.numel()
        loss.backward()
        losses.append(float(loss.detach()))
        if step == 2:  # what is zero at the start (projections, gates) opens the way in the first steps
            assert [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []
        optimizer.reduce(1.0)
        optimizer.apply(1.0, lr_multiplier=1.0, momentum=0.9, decay_multiplier=0.0)
    assert losses[-1] < 0.2 * losses[0]
