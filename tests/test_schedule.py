"""Schedules are pure functions of progress: warm up, hold, come down."""

import pytest

from nanozhchat.schedule import decay_multiplier, lr_multiplier, muon_momentum, parse_duration


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0.0, 1e-3), (0.05, 0.5), (0.1, 1.0), (0.3, 1.0), (0.6, 1.0), (0.8, 0.525), (1.0, 0.05), (1.2, 0.05)],
)
def test_the_learning_rate_is_a_trapezoid(progress, expected):
    assert lr_multiplier(progress, warmup=0.1, warmdown=0.4, final=0.05) == pytest.approx(expected)


def test_without_ramps_the_learning_rate_is_flat():
    assert [lr_multiplier(p, 0.0, 0.0, 0.0) for p in (0.0, 0.5, 1.0)] == [1.0] * 3


def test_the_learning_rate_never_jumps_within_a_step():
    values = [lr_multiplier(i / 1000, 0.01, 0.65, 0.05) for i in range(1001)]
    assert max(abs(a - b) for a, b in zip(values, values[1:], strict=False)) <= 0.1 + 1e-9
    assert all(0 < v <= 1 for v in values)


def test_momentum_rises_linearly_to_its_peak_and_stays():
    assert [muon_momentum(s, 0.85, 0.95, 10) for s in (0, 5, 10, 99)] == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert muon_momentum(0, 0.85, 0.95, 0) == pytest.approx(0.95)


def test_weight_decay_falls_linearly_to_zero_and_not_below():
    assert [decay_multiplier(p) for p in (0.0, 0.25, 1.0, 1.1)] == [1.0, 0.75, 0.0, 0.0]


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("2d", 172800)])
def test_durations_are_read_as_seconds(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "10", "10 minutes", "0s", "-5m", "nanm", "infh", "1e400s", "十m"])
def test_what_is_not_a_duration_is_an_error_with_examples(text):
    with pytest.raises(ValueError, match="is not a duration; write 90s"):
        parse_duration(text)
