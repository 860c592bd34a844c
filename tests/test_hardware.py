"""Known accelerators: specs a user types and names a driver reports."""

from __future__ import annotations

import pytest

from nanozhchat.hardware import DEVICES, find_device, parse_hardware


@pytest.mark.parametrize(
    ("spec", "count", "name"),
    [
        ("8xH100", 8, "H100"),
        ("h100", 1, "H100"),
        (" 2 x 4090 ", 2, "4090"),
        ("4090", 1, "4090"),
        ("16×a100", 16, "A100"),
    ],
)
def test_a_hardware_spec_gives_count_and_device(spec: str, count: int, name: str) -> None:
    assert parse_hardware(spec) == (count, DEVICES[name])


@pytest.mark.parametrize("spec", ["", "8x", "xH100", "0xH100", "00xH100", "-1xH100", "8xH101", "H100x8"])
def test_an_unknown_spec_is_an_error_that_lists_the_known_names(spec: str) -> None:
    with pytest.raises(ValueError, match="is unknown; use COUNTxNAME with one of: .*H100"):
        parse_hardware(spec)


@pytest.mark.parametrize(
    ("marketing", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("Tesla T4", "T4"),
        ("NVIDIA H200", "H200"),
    ],
)
def test_a_drivers_name_is_matched_with_the_table(marketing: str, name: str) -> None:
    device = find_device(marketing)
    assert device is not None
    assert device.name == name


@pytest.mark.parametrize("marketing", ["", "NVIDIA L40", "Quadro T400", "AMD Instinct MI300X"])
def test_an_unknown_device_is_not_guessed(marketing: str) -> None:
    assert find_device(marketing) is None


def test_every_device_has_plausible_numbers() -> None:
    for name, d in DEVICES.items():
        assert name == d.name
        assert 1e13 < d.flops < 1e16
        assert 1e11 < d.bytes_per_s < 1e13
        assert 2**33 <= d.memory_bytes < 2**39
        assert 0 < d.usd_per_hour < 100
