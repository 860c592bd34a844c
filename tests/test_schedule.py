"""Schedules are pure functions of progress (`test_trainer` sees a run follow them); durations are read."""

import pytest

from nanozhchat.schedule import decay_multiplier, lr_multiplier, muon_momentum, parse_duration
from tests.conftest import refused


def test_schedules_warm_up_hold_come_down_and_stay():
    places = {0.0: 1e-3, 0.05: 0.5, 0.1: 1.0, 0.3: 1.0, 0.6: 1.0, 0.8: 0.525, 1.0: 0.05, 1.2: 0.05}
    assert [lr_multiplier(p, warmup=0.1, warmdown=0.4, final=0.05) for p in places] == pytest.approx([*places.values()])
    assert [lr_multiplier(p, 0.0, 0.0, 0.0) for p in (0.0, 0.5, 1.0)] == [1.0] * 3
    assert [muon_momentum(s, 0.85, 0.95, 10) for s in (0, 5, 10, 99)] == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert muon_momentum(0, 0.85, 0.95, 0) == pytest.approx(0.95)
    assert [decay_multiplier(p) for p in (0.0, 0.25, 1.0, 1.1)] == [1.0, 0.75, 0.0, 0.0]


def test_durations_are_read_as_seconds_and_what_is_none_is_an_error_with_examples():
    assert [parse_duration(text) for text in ("90s", "10m", "1.5h", "2d")] == [90, 600, 5400, 172800]
    for text in ("", "m", "10", "10 minutes", "0s", "-5m", "nanm", "infh", "1e400s", "十m"):
        refused("is not a duration; write 90s", parse_duration, text)
