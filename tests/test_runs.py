"""Dry runs of runs/*.sh: every command they would run exists and takes its flags; and the fits of their sweeps."""

import importlib
import json
import os
import re
import shlex
import shutil

import numpy as np
import pytest

from nanozhchat import recipe, scaling
from scripts import fit_scaling
from tests.conftest import ROOT, pack, program, refused, write_jsonl

CHAINS = sorted(p.name for p in (ROOT / "runs").glob("*.sh") if p.name not in ("lib.sh", "setup.sh", "test.sh"))


def dry_run(chain, folder, cwd=ROOT, **knobs):
    """Run a chain with DRY_RUN=1 and a `python` that only writes its arguments down; returns these, and stderr."""
    stub = folder / "bin" / "python"
    stub.parent.mkdir(exist_ok=True)
    stub.write_text(f'#!/bin/sh\n{{ for a; do printf "%s\\037" "$a"; done; echo; }} >> {folder}/said\n')
    stub.chmod(0o755)
    env = {**os.environ, "PATH": f"{stub.parent}:{os.environ['PATH']}", "SETUP": "0", "DRY_RUN": "1", **knobs}
    done = program(["bash", f"{ROOT}/runs/{chain}"], cwd, env=env)
    assert done.returncode == 0, done.stderr
    return [line.split("\037")[:-1] for line in (folder / "said").read_text().splitlines()], done.stderr


def take_flags(commands, monkeypatch):
    """Let each script parse its flags, as NANOZHCHAT_CHECK_FLAGS does in a dry run."""
    with monkeypatch.context() as patch:
        patch.setenv("NANOZHCHAT_CHECK_FLAGS", "1")
        for dash, module, *flags in commands:
            assert dash == "-m"
            stop = refused(None, importlib.import_module(module).main, flags, error=SystemExit)
            assert stop.code == 0, shlex.join([module, *flags])


@pytest.mark.parametrize("chain", CHAINS)
def test_a_dry_run_prints_every_command_and_all_their_flags_are_taken(chain, tmp_path, base_dir, monkeypatch, capsys):
    commands, said = dry_run(chain, tmp_path)
    modules = [module for _, module, *_ in commands]
    assert "scripts.base_train" in modules
    assert [module for module in modules if module not in said] == []
    take_flags(commands, monkeypatch)
    for _, module, *flags in commands:
        if module == "scripts.recipe":  # the estimate is not only checked but made
            importlib.import_module(module).main(flags)
    if "scripts.recipe" in modules:
        assert re.search(r"estimate\): [\d.]+ h, about \d+ USD; memory per device about", capsys.readouterr().out)


@pytest.mark.parametrize(("chain", "knob", "given", "read"), [
    ("runcpu.sh", "DATA", "my book.txt", ["my book.txt"]), ("novel.sh", "BOOK", "my book.txt", ["my book.txt"]),
    ("runcpu.sh", "DATA", "texts my*.txt", ["texts", "my*.txt"]), ("runcpu.sh", "DATA", "my *.txt", ["my *.txt"]),
    ("speedrun.sh", "DATA", "my book.txt@2\ntexts", ["my book.txt@2", "texts"]),
])  # fmt: skip
def test_relative_data_is_looked_for_where_the_command_is_given(chain, knob, given, read, tmp_path, base_dir):
    (tmp_path / "my book.txt").write_text("天")
    (tmp_path / "texts").mkdir()
    commands, _ = dry_run(chain, tmp_path, cwd=tmp_path, **{knob: given})
    reader = next(command for command in commands if {"scripts.tok_train", "scripts.data_fetch"} & {*command})
    assert reader[reader.index("--data") + 1 :][: len(read)] == [f"{tmp_path}/{name}" for name in read]


def test_knobs_reach_the_commands_and_globs_are_left_to_the_program(tmp_path, base_dir):
    knobs = {"DATA": "a/*.txt b.jsonl@2", "BUDGETS": "1e12 2e12", "DEPTHS": "1 2 3", "NAME": "x"}
    commands, said = dry_run("scaling_laws.sh", tmp_path, **knobs)
    fetched = next(c for c in commands if "scripts.data_fetch" in c)
    assert fetched[fetched.index("--data") + 1 :][:2] == ["a/*.txt", "b.jsonl@2"]
    tags = [f for c in commands for f in c if f.startswith("--model-tag=")]
    assert tags == [f"--model-tag=x-{b}-d{d}" for b in ("1e12", "2e12") for d in (1, 2, 3)]
    assert "+ python -m scripts.fit_scaling --name=x" in said
    said = dry_run("slurm.sh", tmp_path, NPROC="4")[1]
    assert "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 torchrun --nnodes=2 --nproc_per_node=4 --rdzv_id=0 " in said
    assert "--rdzv_endpoint=first-node:29500 -m scripts.base_train -- --depth=26" in said


@pytest.mark.parametrize("chain", CHAINS)
def test_a_misspelt_knob_is_refused_with_the_right_name(chain):
    source = (ROOT / "runs" / chain).read_text()
    for knob in re.findall(r"^#   ([A-Z_]+)=", source, re.M):
        done = program(["bash", f"runs/{chain}"], env={**os.environ, "SETUP": "0", knob[:-1]: "9"})
        assert done.returncode == 2
        assert f"is not a knob of runs/{chain}, {knob} is" in done.stderr


def test_what_a_cluster_sets_by_itself_is_no_misspelt_knob(tmp_path):
    own = {f"SLURM_{name}": "1" for name in ("JOBID", "NODELIST", "NNODES", "NTASKS", "JOB_NAME")}
    assert "scripts.base_train" in dry_run("slurm.sh", tmp_path, **own)[1]


@pytest.mark.parametrize("chain", CHAINS)
def test_arguments_are_refused_since_knobs_are_no_arguments_and_help_prints_the_knobs(chain):
    done = program(["bash", f"runs/{chain}", "MINUTES=5"])
    assert done.returncode == 2
    assert f"runs/{chain} takes no arguments (MINUTES=5); knobs stand before the command" in done.stderr
    done = program(["bash", f"runs/{chain}", "--help"])
    knobs = re.findall(r"^# (  .*)", (ROOT / "runs" / chain).read_text(), re.M)
    assert (done.returncode, re.findall(r"^  .*", done.stdout, re.M)) == (0, knobs)


@pytest.mark.parametrize("knob", ["MINUTES=0", "MINUTES=3m", "MINUTES=", "DEPTH=three", "DEPTH=0"])
def test_a_bad_knob_of_the_laptop_chain_is_refused_before_anything_is_set_up(knob, tmp_path):
    name, _, value = knob.partition("=")
    env = {**os.environ, name: value or " ", "NANOZHCHAT_BASE_DIR": str(tmp_path / "none")}
    done = program(["bash", "runs/runcpu.sh"], env=env)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: {name}={value or ' '} is ")
    assert not (tmp_path / "none").exists()


def make_sweep(base, noise):
    """Finished runs of four budgets, whose best size is 0.3 * C^0.5 by construction."""
    rng = np.random.default_rng(0)
    for budget in (1e12, 1e13, 1e14, 1e16):
        for depth in range(1, 7):
            made = recipe.resolve(depth, vocab_size=512, overrides=recipe.Overrides(target_flops=budget))
            off = np.log(made.scaling_params) - np.log(0.3 * budget**0.5)
            bpb = 1 + 1e2 * budget**-0.2 + 0.05 * off**2 + noise * rng.normal()
            row = {"step": 9, "val/bpb": bpb, "tokens": budget / made.flops_per_token, "flops": budget, "time_s": 1.0}
            folder = base / "base" / f"laws-{budget:.0f}-d{depth}"
            write_jsonl(folder / "metrics.jsonl", [row])
            write_jsonl(folder / "events.jsonl", [{"event": "done"}])
            write_jsonl(folder / "recipe.json", [made.to_dict()])
            pack(folder / "config.yaml", f"target_flops: {budget}\n")


@pytest.mark.parametrize("noise", [0.0, 0.002])
def test_the_laws_of_a_sweep_are_found_again_within_their_interval(noise, base_dir, capsys, monkeypatch):
    monkeypatch.setattr(scaling, "DRAWS", 200)
    refused(r"no finished run laws-\* .*runs/scaling_laws\.sh", fit_scaling.main, [], error=FileNotFoundError)
    make_sweep(base_dir, noise)
    aside = base_dir / "base" / "laws-1.old-20260101-000000"
    shutil.copytree(base_dir / "base" / "laws-1000000000000-d1", aside)
    fit_scaling.main([])
    found = json.loads((base_dir / "report" / "laws" / "laws.json").read_text())
    assert sum(o["params"] is not None for o in found["optima"]) == 3  # at 1e16 it is 30 million, more than any run has
    assert found["params"]["exponent"] == pytest.approx(0.5, abs=1e-6 if not noise else 0.03)
    low, high = found["params"]["exponent_95"]
    assert low - 1e-6 <= 0.5 <= high + 1e-6
    assert len((base_dir / "report" / "laws" / "runs.csv").read_text().splitlines()) == 25
    assert (base_dir / "report" / "laws" / "laws.png").read_bytes().startswith(b"\x89PNG")
    assert "best parameters" in capsys.readouterr().out
