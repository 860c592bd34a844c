"""The model: causal, reproducible, complete gradients, the identity at the start."""

import pytest
import torch
import torch.nn.functional as F

from nanozhchat.compute import Compute
from nanozhchat.gpt import GPT, GPTConfig
from nanozhchat.optim import Optimizer, param_groups
from nanozhchat.run import gpt_config
from tests.conftest import make_config, make_model, make_recipe


def tokens(config, rows=2, length=None, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (rows, length or config.sequence_len), generator=g)


@pytest.mark.parametrize("place", [1, 8, 9, 20, 31])
def test_changing_a_token_changes_nothing_before_it_and_something_after(place):
    model = make_model(perturb=True)
    idx = tokens(model.config)
    other = idx.clone()
    other[:, place] = (other[:, place] + 1) % model.config.vocab_size
    with torch.no_grad():
        a, b = model.hidden(idx), model.hidden(other)
    torch.testing.assert_close(a[:, :place], b[:, :place], atol=1e-6, rtol=1e-6)
    assert (a[:, place:] - b[:, place:]).abs().amax(-1).min() > 1e-4  # the last layer sees everything


def test_rows_of_a_batch_do_not_see_each_other():
    model = make_model(perturb=True)
    idx = tokens(model.config, rows=3)
    with torch.no_grad():
        together = model.hidden(idx)
        alone = torch.cat([model.hidden(row[None]) for row in idx])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_a_window_hides_what_lies_before_it_from_all_but_the_last_layer():
    config = make_config(window_pattern="S", n_layer=2, sequence_len=32)
    assert [config.window(i) for i in range(2)] == [8, 32]
    assert [make_config().window(i) for i in range(4)] == [8, 8, 8, 32]
    assert [make_config(window_pattern="SL", n_layer=5).window(i) for i in range(5)] == [8, 32, 8, 32, 32]
    model = make_model(config, perturb=True)
    with torch.no_grad():
        model.h[1].attn.c_proj.weight.zero_()  # only the first layer's attention is left
        idx = tokens(config, rows=1)
        other = idx.clone()
        other[:, 4] = (other[:, 4] + 1) % config.vocab_size
        change = (model.hidden(idx) - model.hidden(other)).abs().amax(-1)[0]
    assert change[5:12].min() > 1e-5  # positions 4..11 see it; the smeared copy at 5 reaches to 12
    assert change[13:].max() == 0


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_grouped_queries_have_fewer_key_heads_and_train(heads):
    model = make_model(make_config(n_kv_head=heads))
    assert model.h[0].attn.c_k.weight.shape == (heads * 8, 32)
    idx = tokens(model.config)
    assert torch.isfinite(model(idx, idx))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 30}, "n_embd=30 must be n_head=4 times an even head size"),
        ({"n_embd": 36}, "n_embd=36"),
        ({"n_kv_head": 3}, "n_head=4 must be a multiple of n_kv_head=3"),
        ({"window_pattern": "SX"}, "window_pattern='SX' may hold the letters S and L only"),
        ({"window_pattern": ""}, "window_pattern=''"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_more_tokens_than_the_context_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match="33 tokens exceed the model's context of 32"):
        model.hidden(torch.zeros(1, 33, dtype=torch.long))


def test_the_seed_decides_all_weights():
    a, b, c = make_model(seed=1), make_model(seed=1), make_model(seed=2)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.wte.weight, c.wte.weight)
    assert not torch.equal(a.h[0].mlp.c_fc.weight, c.h[0].mlp.c_fc.weight)


def test_initialising_fills_every_parameter_and_leaves_the_global_generator_alone():
    model = GPT(make_config())
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    before = torch.get_rng_state()
    model.init_weights(torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_every_block_starts_as_the_identity():
    model = make_model()
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    rope = model.rope(torch.arange(5)[None])
    for i, block in enumerate(model.h):
        ve = model.value_embeds[str(i)](torch.zeros(2, 5, dtype=torch.long)) if str(i) in model.value_embeds else None
        assert torch.equal(block(x, ve, rope, None), x)


def test_an_untrained_model_guesses_evenly():
    model = make_model()
    idx = tokens(model.config)
    loss = model(idx, idx) / idx.numel()
    assert float(loss.detach()) == pytest.approx(float(torch.tensor(100.0).log()), abs=0.01)


def test_padding_of_the_vocabulary_is_never_predicted_and_never_trained():
    model = make_model(perturb=True)
    assert model.config.padded_vocab_size == 128
    with torch.no_grad():
        model.lm_head.weight[100:] = 1e3
    idx = tokens(model.config)
    hidden = model.hidden(idx)
    assert model.logits(hidden).shape == (2, 32, 100)
    loss = model(idx, idx)
    want = F.cross_entropy(model.logits(hidden).flatten(0, 1), idx.flatten(), reduction="sum")
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-3)
    loss.backward()
    assert model.lm_head.weight.grad is not None
    assert model.lm_head.weight.grad[100:].abs().max() == 0


def test_the_loss_per_token_adds_up_to_the_loss():
    model = make_model(perturb=True)
    idx = tokens(model.config)
    targets = idx.roll(-1, 1)
    targets[:, -3:] = -1
    each = model(idx, targets, per_token=True)
    assert each.shape == (2, 32)
    assert each[:, -3:].abs().max() == 0
    torch.testing.assert_close(each.sum(), model(idx, targets).detach(), rtol=1e-5, atol=1e-3)


def test_logits_stay_within_the_softcap():
    model = make_model(perturb=True)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e3)
        assert model.logits(model.hidden(tokens(model.config))).abs().max() <= model.config.softcap


def test_recomputing_activations_gives_the_same_gradients():
    grads = []
    for again in (False, True):
        model = make_model(perturb=True, grad_checkpoint=again).train()
        idx = tokens(model.config)
        model(idx, idx.roll(-1, 1)).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_bfloat16_activations_keep_float32_weights_and_stay_close():
    full, low = make_model(perturb=True), make_model(perturb=True, dtype=torch.bfloat16)
    idx = tokens(full.config)
    assert low.hidden(idx).dtype == torch.bfloat16
    loss = low(idx, idx)
    loss.backward()
    assert {p.dtype for p in low.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in low.parameters() if p.grad is not None} == {torch.float32}
    assert float(loss.detach()) == pytest.approx(float(full(idx, idx).detach()), rel=0.02)


def test_every_parameter_is_trained_by_exactly_one_group_and_gets_a_gradient_after_one_step():
    recipe = make_recipe()
    model = make_model(gpt_config(recipe))
    compute = Compute(torch.device("cpu"))
    groups = param_groups(model, recipe)
    names = [n for g in groups for n in g.params]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    optimizer = Optimizer(groups, compute)
    idx = tokens(model.config, rows=4)
    for _ in range(2):  # what is zero at the start (projections, gates) opens the way in the first step
        model(idx, idx.roll(-1, 1)).backward()
        optimizer.reduce(1 / idx.numel())
        optimizer.apply(1 / idx.numel(), lr_multiplier=1.0, momentum=0.85, decay_multiplier=1.0)
    model(idx, idx.roll(-1, 1)).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert without == []


def test_training_on_one_batch_drives_its_loss_down():
    recipe = make_recipe()
    model = make_model(gpt_config(recipe))
    optimizer = Optimizer(param_groups(model, recipe), Compute(torch.device("cpu")))
    idx = tokens(model.config, rows=4)
    losses = []
    for _ in range(30):
        loss = model(idx, idx.roll(-1, 1)) / idx.numel()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.reduce(1.0)
        optimizer.apply(1.0, lr_multiplier=1.0, momentum=0.9, decay_multiplier=0.0)
    assert losses[-1] < 0.2 * losses[0]


def test_a_config_survives_its_dictionary():
    config = make_config(rope_base=5000.0)
    assert GPTConfig(**config.to_dict()) == config
