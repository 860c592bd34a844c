"""Known accelerators: specs a user types and names a driver reports."""

import subprocess
import sys
import time

import pytest
import torch

from nanozhchat import compute
from nanozhchat.errors import RunError
from nanozhchat.hardware import DEVICES, find_device, parse_hardware
from tests.conftest import refused


def test_a_hardware_spec_gives_count_and_device_and_an_unknown_one_lists_the_known_names():
    for spec, count, name in (("8xH100", 8, "H100"), (" 2 x 4090 ", 2, "4090"), ("16×a100", 16, "A100")):
        assert parse_hardware(spec) == (count, DEVICES[name])
    for spec in ("", "8x", "xH100", "0xH100", "00xH100", "-1xH100", "8xH101", "H100x8"):
        refused("is unknown; use COUNTxNAME with one of: .*H100", parse_hardware, spec)


def test_a_drivers_name_is_matched_with_the_table_and_an_unknown_one_is_not_guessed():
    known = {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA A100-SXM4-80GB": "A100", "NVIDIA GeForce RTX 4090": "4090",
             "Tesla T4": "T4", "NVIDIA H200": "H200"}  # fmt: skip
    assert {name: find_device(name) for name in known} == {name: DEVICES[known[name]] for name in known}
    assert {find_device(name) for name in ("", "NVIDIA L40", "Quadro T400", "AMD Instinct MI300X")} == {None}


def test_a_process_knows_when_it_began_so_that_a_budget_counts_its_imports():
    code = """import time; time.sleep(1.5)
from nanozhchat import hardware
print(time.monotonic(), hardware.command_start(None), hardware.command_start([]))"""
    before = time.monotonic()
    now, began, called = map(float, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert called == pytest.approx(now, abs=0.1)
    if sys.platform == "linux":
        assert before - 0.1 < began < now - 1.5
    else:
        assert began == pytest.approx(now, abs=0.1)


@pytest.mark.parametrize(("gain", "chosen", "shape"), [
    (0.01, torch.float32, compute.GLANCE_SHAPE), (1.5, torch.float32, compute.PROBE_SHAPE),
    (2.5, torch.bfloat16, compute.PROBE_SHAPE),
])  # fmt: skip
def test_bfloat16_is_chosen_where_it_is_fast_and_costs_but_a_glance_where_it_is_slow(gain, chosen, shape, monkeypatch):
    asked = []

    def flops(device, dtype, shape):
        asked.append(shape)
        return gain if dtype == torch.bfloat16 else 1.0

    monkeypatch.setattr(compute, "matmul_flops", flops)
    assert compute.detect_dtype(torch.device("cpu"), None, measure=True)[0] == chosen
    assert asked[-1] == shape


def test_a_model_far_beyond_the_memory_of_a_cpu_is_refused_before_anything_is_allocated():
    compute.require_memory(2**20, torch.device("cpu"))
    compute.require_memory(2**60, torch.device("cuda"))
    assert refused("GiB are needed", compute.require_memory, 2**60, torch.device("cpu"), error=RunError).exit_code == 4
