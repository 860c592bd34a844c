"""The optimizer: right updates, and the same ones for any number of ranks."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nanozhchat import compute as compute_module
from nanozhchat.compute import Compute
from nanozhchat.optim import POLAR_EXPRESS, POLAR_SAFETY, SHARD_MIN_ELEMENTS, Optimizer, ParamGroup, orthogonalize
from nanozhchat.optim import param_groups as make_groups
from tests.conftest import make_config, make_model, make_recipe, run_ranks
from tests.reference import muon as reference

CPU = Compute(torch.device("cpu"))
STEPS = 4


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64), (128, 128)])
@pytest.mark.parametrize("condition", [1.0, 1e-2])
def test_orthogonalizing_drives_all_singular_values_near_one_and_keeps_the_directions(shape, condition):
    u, _, vt = torch.linalg.svd(random(3, *shape), full_matrices=False)
    s = torch.linspace(1.0, condition, min(shape)) * 5
    g = u * s @ vt
    got = orthogonalize(g, 5)
    values = torch.linalg.svdvals(got)
    assert values.min() > 0.7
    assert values.max() < 1.25
    for one, direction in zip(got, g, strict=True):
        exact = torch.from_numpy(reference.polar_factor(direction.double().numpy()))
        assert (one.double() * exact).sum() / one.norm() / exact.norm() > 0.97


def test_orthogonalizing_nothing_gives_nothing():
    assert orthogonalize(torch.zeros(2, 4, 8), 5).abs().max() == 0


def test_the_matrix_product_form_is_the_polynomial_of_the_singular_values():
    g = random(2, 12, 20)
    for one, direction in zip(orthogonalize(g, 5), g, strict=True):
        want = reference.polynomial_polar(direction.double().numpy(), POLAR_EXPRESS, POLAR_SAFETY)
        np.testing.assert_allclose(one.numpy(), want, atol=1e-4)


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_muon_agrees_with_its_readable_twin(shape):
    names = ("a", "b", "c")
    params = {n: nn.Parameter(random(*shape, seed=i)) for i, n in enumerate(names)}
    group = ParamGroup(kind="muon", params=params, lr=0.05, weight_decay=0.3)
    optimizer = Optimizer([group, adamw_group()], CPU)
    twins = {n: reference.Muon(shape, POLAR_EXPRESS, POLAR_SAFETY) for n in names}
    want = {n: p.detach().double().numpy() for n, p in params.items()}
    for step in range(STEPS):
        mu, multiplier, decay = 0.85 + 0.02 * step, 1.0 - 0.1 * step, 1.0 - 0.2 * step
        for i, n in enumerate(names):
            g = random(*shape, seed=100 * step + i)
            params[n].grad = g * 8  # as summed over 8 tokens
            want[n] = twins[n].step(
                want[n], g.double().numpy(), lr=0.05 * multiplier, mu=mu, beta2=0.95, decay=0.3 * decay
            )
        optimizer.reduce(1 / 8)
        optimizer.apply(1 / 8, lr_multiplier=multiplier, momentum=mu, decay_multiplier=decay)
    for n in names:
        np.testing.assert_allclose(params[n].detach().numpy(), want[n], atol=2e-4)


def adamw_group():
    return ParamGroup(kind="adamw", params={"other": nn.Parameter(torch.zeros(1))}, lr=0.0)


def test_decay_pulls_only_the_weights_that_the_update_shrinks():
    def moved(weight_decay):
        p = nn.Parameter(random(8, 8))
        group = ParamGroup(kind="muon", params={"a": p}, lr=0.1, weight_decay=weight_decay)
        optimizer = Optimizer([group, adamw_group()], CPU)
        p.grad = random(8, 8, seed=1)
        optimizer.reduce(1.0)
        optimizer.apply(1.0, lr_multiplier=1.0, momentum=0.9, decay_multiplier=1.0)
        return p.detach()

    start, free, decayed = random(8, 8), moved(0.0), moved(0.5)
    shrinking = (start - free) * start > 0
    assert 0 < int(shrinking.sum()) < 64
    torch.testing.assert_close(decayed, free - 0.1 * 0.5 * start * shrinking, atol=1e-6, rtol=1e-5)


def test_the_adamw_part_is_pytorchs_adamw():
    shapes = [(40, 8), (3,), (1,), (128, 64)]
    mine = {f"p{i}": nn.Parameter(random(*s, seed=i)) for i, s in enumerate(shapes)}
    theirs = [nn.Parameter(p.detach().clone()) for p in mine.values()]
    groups = [
        ParamGroup(kind="adamw", params={n: mine[n] for n in ("p0", "p1")}, lr=0.01, weight_decay=0.1),
        ParamGroup(kind="adamw", params={n: mine[n] for n in ("p2", "p3")}, lr=0.02, betas=(0.9, 0.99)),
    ]
    optimizer = Optimizer(groups, CPU)
    twin = torch.optim.AdamW(
        [
            {"params": theirs[:2], "lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)},
            {"params": theirs[2:], "lr": 0.02, "weight_decay": 0.0, "betas": (0.9, 0.99)},
        ],
        eps=1e-8,
    )
    for step in range(5):
        multiplier = 1.0 - 0.1 * step
        for i, (p, q) in enumerate(zip(mine.values(), theirs, strict=True)):
            g = random(*shapes[i], seed=10 * step + i)
            p.grad, q.grad = g * 4, g
        for options, lr in zip(twin.param_groups, (0.01, 0.02), strict=True):
            options["lr"] = lr * multiplier
        optimizer.reduce(0.25)
        optimizer.apply(0.25, lr_multiplier=multiplier, momentum=0.0, decay_multiplier=1.0)
        twin.step()
    for p, q in zip(mine.values(), theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), atol=1e-6, rtol=1e-6)


def a_model():
    """Three matrices of a shape do not divide by two ranks; some tensors are above the sharding limit, some below."""
    return make_model(make_config(n_layer=3, n_embd=64), perturb=True)


def set_gradients(model, step, rank, world):
    """Deterministic gradients of which each rank holds another share; together they are the same for any world."""
    for i, p in enumerate(model.parameters()):
        share = 1.0 if world == 1 else (0.25, 0.75)[rank]
        p.grad = random(*p.shape, seed=1000 * step + i) * 16 * share


def advance(model, optimizer, step, compute):
    set_gradients(model, step, compute.rank, compute.world_size)
    norm = optimizer.reduce(1 / 16)
    optimizer.apply(1 / 16, lr_multiplier=1.0 - step / 10, momentum=0.85, decay_multiplier=0.5)
    return norm


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def fresh():
    model = a_model()
    return model, make_groups(model, make_recipe())


def test_the_norm_is_that_of_the_scaled_sum_of_all_gradients():
    model, groups = fresh()
    optimizer = Optimizer(groups, CPU)
    set_gradients(model, 0, 0, 1)
    want = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm() / 16
    assert optimizer.reduce(1 / 16) == pytest.approx(float(want), rel=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_discarding_a_gradient_leaves_weights_and_the_next_step_as_if_it_never_was():
    runs = []
    for bad in (False, True):
        model, groups = fresh()
        optimizer = Optimizer(groups, CPU)
        advance(model, optimizer, 0, CPU)
        if bad:
            before = weights(model)
            for p in model.parameters():
                p.grad = torch.full_like(p, torch.nan)
            assert not np.isfinite(optimizer.reduce(1.0))
            optimizer.discard()
            assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
        advance(model, optimizer, 1, CPU)
        runs.append(weights(model))
    assert all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0])


def test_a_parameter_without_gradient_counts_as_zero():
    model, groups = fresh()
    optimizer = Optimizer(groups, CPU)
    assert optimizer.reduce(1.0) == 0.0
    optimizer.apply(1.0, lr_multiplier=1.0, momentum=0.9, decay_multiplier=0.0)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def work(folder, compute):
    """What each rank of the test below does: train on, save its share of the state, and continue the others' run."""
    model, groups = fresh()
    optimizer = Optimizer(groups, compute)
    norms = torch.tensor([advance(model, optimizer, step, compute) for step in range(STEPS)])
    name = f"world{compute.world_size}"
    save_file(optimizer.state_dict(), folder / f"{name}.rank{compute.rank}.safetensors")
    if compute.is_main:
        save_file({**weights(model), "norms": norms}, folder / f"{name}.safetensors")
    for other in (1, 2):
        compute.barrier()
        if (folder / f"world{other}.safetensors").exists():
            model, groups = fresh()
            given = load_file(folder / f"world{other}.safetensors")
            with torch.no_grad():
                for n, p in model.named_parameters():
                    p.copy_(given[n])
            optimizer = Optimizer(groups, compute)
            merged = {}
            for path in sorted(folder.glob(f"world{other}.rank*.safetensors")):
                merged.update(load_file(path))
            optimizer.load_state_dict(merged, STEPS)
            advance(model, optimizer, STEPS, compute)
            if compute.is_main:
                save_file(weights(model), folder / f"world{other}_continued_on{compute.world_size}.safetensors")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run the same steps on one rank, on two, and on one again, each continuing what it finds."""
    folder = tmp_path_factory.mktemp("optim")
    work(folder, CPU)
    run_ranks("tests.test_optim", str(folder), nproc=2)
    work(folder, CPU)
    return folder


def assert_close(a, b, tolerance):
    left, right = load_file(a), load_file(b)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(
            left[name], right[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_two_ranks_do_the_same_steps_as_one(results):
    assert_close(results / "world1.safetensors", results / "world2.safetensors", 1e-6)


def test_two_ranks_share_the_state_instead_of_repeating_it(results):
    whole = load_file(results / "world1.rank0.safetensors")
    shares = [load_file(results / f"world2.rank{r}.safetensors") for r in (0, 1)]
    for key in whole:
        if key.startswith("muon/"):
            assert sum(key in share for share in shares) == 1, key
    rows = {k: v for share in shares for k, v in share.items() if k.startswith("adamw/wte.weight/exp_avg/")}
    assert sorted(rows) == ["adamw/wte.weight/exp_avg/0", "adamw/wte.weight/exp_avg/64"]
    assert SHARD_MIN_ELEMENTS <= 128 * 64


@pytest.mark.parametrize("saved_by", [1, 2])
@pytest.mark.parametrize("continued_on", [1, 2])
def test_state_saved_by_any_number_of_ranks_continues_on_any(results, saved_by, continued_on):
    without_stop, groups = fresh()
    optimizer = Optimizer(groups, CPU)
    for step in range(STEPS + 1):
        advance(without_stop, optimizer, step, CPU)
    want = results / f"want{saved_by}{continued_on}.safetensors"
    save_file(weights(without_stop), want)
    got = results / f"world{saved_by}_continued_on{continued_on}.safetensors"
    assert_close(got, want, 0.0 if (saved_by, continued_on) == (1, 1) else 1e-6)


def test_loading_the_state_of_no_steps_is_a_fresh_start():
    model, groups = fresh()
    optimizer = Optimizer(groups, CPU)
    optimizer.load_state_dict({}, 0)
    advance(model, optimizer, 0, CPU)
    other, groups = fresh()
    advance(other, Optimizer(groups, CPU), 0, CPU)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with compute_module.start("cpu", "float32") as started:
        work(Path(sys.argv[1]), started)
