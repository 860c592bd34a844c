"""Sinks of a run's numbers."""

import sys

from nanozhchat.log import Metrics
from tests.conftest import refused


def test_tensorboard_gets_the_numbers_and_a_missing_package_is_named(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(tmp_path, tensorboard=True)
    metrics.write({"step": 1, "train/loss": 3.0, "note": "text"})
    metrics.close()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tensors("train/loss")
    assert [(e.step, e.tensor_proto.float_val[0]) for e in found] == [(1, 3.0)]
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    refused(r"--tensorboard needs a package; run `uv sync --extra tracking`", Metrics, tmp_path, tensorboard=True)
