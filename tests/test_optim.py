"""The optimizer: right updates, and the same ones for any number of ranks."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nanozhchat import compute as compute_module
from nanozhchat.optim import POLAR_EXPRESS, POLAR_SAFETY, SHARD_MIN_ELEMENTS, Optimizer, ParamGroup, orthogonalize
from nanozhchat.optim import param_groups as make_groups
from tests.conftest import CPU, end_ranks, make_config, make_model, make_recipe, start_ranks
from tests.reference import muon as reference

STEPS = 4


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64), (128, 128)])
@pytest.mark.parametrize("condition", [1.0, 1e-2])
def test_orthogonalizing_is_the_polynomial_that_brings_all_singular_values_near_one(shape, condition):
    u, _, vt = torch.linalg.svd(random(3, *shape), full_matrices=False)
    g = u * torch.linspace(1.0, condition, min(shape)) * 5 @ vt
    for one, direction in zip(orthogonalize(g), g.double().numpy(), strict=True):
        want = reference.polynomial_polar(direction, POLAR_EXPRESS, POLAR_SAFETY)
        np.testing.assert_allclose(one.numpy(), want, atol=1e-4)
        u, s, vt = np.linalg.svd(direction, full_matrices=False)
        values = np.diag(u.T @ one.double().numpy() @ vt.T)  # in the directions of g
        assert 0.7 < values.min() <= values.max() < 1.25
    assert orthogonalize(torch.zeros(2, 4, 8)).abs().max() == 0


def take_step(optimizer, scale=1.0, multiplier=1.0, momentum=0.9, decay=1.0):
    norm = optimizer.reduce(scale)
    optimizer.apply(scale, lr_multiplier=multiplier, momentum=momentum, decay_multiplier=decay)
    return norm


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_muon_agrees_with_its_readable_twin(shape):
    params = {n: nn.Parameter(random(*shape, seed=i)) for i, n in enumerate("abc")}
    group = ParamGroup(kind="muon", params=params, lr=0.05, weight_decay=0.3)
    other = ParamGroup(kind="adamw", params={"other": nn.Parameter(torch.zeros(1))}, lr=0.0)
    optimizer = Optimizer([group, other], CPU)
    twins = {n: reference.Muon(shape, POLAR_EXPRESS, POLAR_SAFETY) for n in params}
    want = {n: p.detach().double().numpy() for n, p in params.items()}
    for step in range(STEPS):
        mu, multiplier, decay = 0.85 + 0.02 * step, 1.0 - 0.1 * step, 1.0 - 0.2 * step
        for i, n in enumerate(params):
            g = random(*shape, seed=100 * step + i)
            params[n].grad = g * 8  # as summed over 8 tokens
            rates = {"lr": 0.05 * multiplier, "mu": mu, "beta2": 0.95, "decay": 0.3 * decay}
            want[n] = twins[n].step(want[n], g.double().numpy(), **rates)
        take_step(optimizer, 1 / 8, multiplier, mu, decay)
    for n in params:
        np.testing.assert_allclose(params[n].detach().numpy(), want[n], atol=2e-4)


def test_the_adamw_part_is_pytorchs_adamw():
    mine = [nn.Parameter(random(*s, seed=i)) for i, s in enumerate([(40, 8), (3,), (1,), (128, 64)])]
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    some = ((0.01, 0.1, (0.8, 0.95)), (0.02, 0.0, (0.9, 0.99)))
    options = [{"lr": lr, "weight_decay": decay, "betas": betas} for lr, decay, betas in some]
    groups = [ParamGroup(kind="adamw", params={f"p{i}": mine[i] for i in pair}, **given)
              for pair, given in zip(((0, 1), (2, 3)), options, strict=True)]  # fmt: skip
    optimizer = Optimizer(groups, CPU)
    twin = torch.optim.AdamW([{"params": theirs[:2], **options[0]}, {"params": theirs[2:], **options[1]}], eps=1e-8)
    for step in range(5):
        multiplier = 1.0 - 0.1 * step
        for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
            g = random(*p.shape, seed=10 * step + i)
            p.grad, q.grad = g * 4, g
        for given, lr in zip(twin.param_groups, (0.01, 0.02), strict=True):
            given["lr"] = lr * multiplier
        take_step(optimizer, 0.25, multiplier)
        twin.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), atol=1e-6, rtol=1e-6)


def fresh(compute=CPU):
    """Three matrices of a shape do not divide by two ranks; some tensors are above the sharding limit, some below."""
    model = make_model(make_config(n_layer=3, n_embd=64), perturb=True)
    return model, Optimizer(make_groups(model, make_recipe()), compute)


def set_gradients(model, step, rank=0, world=1):
    """Deterministic gradients of which each rank holds another share; together they are the same for any world."""
    for i, p in enumerate(model.parameters()):
        share = 1.0 if world == 1 else (0.25, 0.75)[rank]
        p.grad = random(*p.shape, seed=1000 * step + i) * 16 * share


def advance(model, optimizer, step, compute=CPU):
    set_gradients(model, step, compute.rank, compute.world_size)
    return take_step(optimizer, 1 / 16, 1.0 - step / 10, 0.85, 0.5)


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def test_the_norm_is_that_of_the_scaled_sum_of_all_gradients_and_none_count_as_zero():
    model, optimizer = fresh()
    set_gradients(model, 0)
    want = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm() / 16
    assert optimizer.reduce(1 / 16) == pytest.approx(float(want), rel=1e-5)
    assert all(p.grad is None for p in model.parameters())
    model, optimizer = fresh()
    assert take_step(optimizer) == 0.0
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_discarding_a_gradient_leaves_weights_and_the_next_step_as_if_it_never_was():
    (calm, one), (disturbed, other) = fresh(), fresh()
    other.load_state_dict({}, 0)  # the state of no steps is a fresh start
    advance(calm, one, 0)
    advance(disturbed, other, 0)
    for p in disturbed.parameters():
        p.grad = torch.full_like(p, torch.nan)
    assert not np.isfinite(other.reduce(1.0))
    other.discard()
    assert all(map(torch.equal, calm.parameters(), disturbed.parameters()))
    advance(calm, one, 1)
    advance(disturbed, other, 1)
    assert all(map(torch.equal, calm.parameters(), disturbed.parameters()))


def work(folder, compute):
    """What each rank of the test below does: a few steps of its own, then one on top of every run that it finds."""
    for given in ("", "1", "2"):
        compute.barrier()
        model, optimizer = fresh(compute)
        if given and not (folder / f"{given}.weights").exists():
            continue
        if given:
            model.load_state_dict(load_file(folder / f"{given}.weights"), strict=False)
            shares = [load_file(path) for path in sorted(folder.glob(f"{given}.rank*"))]
            optimizer.load_state_dict({name: t for share in shares for name, t in share.items()}, STEPS)
        norms = [advance(model, optimizer, step, compute) for step in (range(STEPS) if not given else [STEPS])]
        save_file(optimizer.state_dict(), folder / f"{given}{compute.world_size}.rank{compute.rank}")
        if compute.is_main:
            save_file({**weights(model), "norms": torch.tensor(norms)}, folder / f"{given}{compute.world_size}.weights")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run the same steps on one rank, on two, and on one again, each continuing what it finds."""
    folder = tmp_path_factory.mktemp("optim")

    def as_rank(_rank):
        with compute_module.start("cpu", "float32") as started:
            work(folder, started)

    work(folder, CPU)
    assert end_ranks(start_ranks(as_rank, 2)) == [0, 0]
    work(folder, CPU)
    return folder


@pytest.mark.parametrize("run", ["2", "11", "12", "21", "22"])
def test_any_number_of_ranks_does_the_same_steps_and_continues_the_state_of_any(results, run):
    got, (whole, optimizer) = load_file(results / f"{run}.weights"), fresh()
    norms = [advance(whole, optimizer, step) for step in range(STEPS + len(run) - 1)]
    tolerance = 0.0 if run == "11" else 1e-6
    for name, want in {**weights(whole), "norms": torch.tensor(norms[-len(got["norms"]) :])}.items():
        torch.testing.assert_close(got[name], want, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_two_ranks_share_the_state_instead_of_repeating_it(results):
    whole = load_file(results / "1.rank0")
    shares = [load_file(results / f"2.rank{r}") for r in (0, 1)]
    assert [key for key in whole if key.startswith("muon/") and sum(key in share for share in shares) != 1] == []
    rows = {k for share in shares for k in share if k.startswith("adamw/wte.weight/exp_avg/")}
    assert rows == {"adamw/wte.weight/exp_avg/0", "adamw/wte.weight/exp_avg/64"}
    assert SHARD_MIN_ELEMENTS <= 128 * 64
