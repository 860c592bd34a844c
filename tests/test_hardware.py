"""Known accelerators: specs a user types and names a driver reports."""

import pytest

from nanozhchat.hardware import DEVICES, find_device, parse_hardware


@pytest.mark.parametrize(
    ("spec", "count", "name"),
    [("8xH100", 8, "H100"), ("h100", 1, "H100"), (" 2 x 4090 ", 2, "4090"), ("4090", 1, "4090"),
     ("16×a100", 16, "A100")],
)  # fmt: skip
def test_a_hardware_spec_gives_count_and_device(spec, count, name):
    assert parse_hardware(spec) == (count, DEVICES[name])


@pytest.mark.parametrize("spec", ["", "8x", "xH100", "0xH100", "00xH100", "-1xH100", "8xH101", "H100x8"])
def test_an_unknown_spec_is_an_error_that_lists_the_known_names(spec):
    with pytest.raises(ValueError, match="is unknown; use COUNTxNAME with one of: .*H100"):
        parse_hardware(spec)


@pytest.mark.parametrize(
    ("marketing", "device"),
    [("NVIDIA H100 80GB HBM3", DEVICES["H100"]), ("NVIDIA A100-SXM4-80GB", DEVICES["A100"]), ("", None),
     ("NVIDIA GeForce RTX 4090", DEVICES["4090"]), ("Tesla T4", DEVICES["T4"]), ("NVIDIA H200", DEVICES["H200"]),
     *((unknown, None) for unknown in ("NVIDIA L40", "Quadro T400", "AMD Instinct MI300X"))],
)  # fmt: skip
def test_a_drivers_name_is_matched_with_the_table_and_an_unknown_one_is_not_guessed(marketing, device):
    assert find_device(marketing) == device
