"""Checkpoints: bit for bit, whole or absent whatever fails, never trusted unseen."""

from __future__ import annotations

import ast
import errno
import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from nanozhchat import checkpoint, files
from nanozhchat.compute import Compute
from nanozhchat.errors import DamagedError, DiskError
from nanozhchat.gpt import GPT
from tests.conftest import ROOT, make_config, make_model
from tests.test_files import Faulty

CPU = Compute(torch.device("cpu"))
WRITES = 2 + 3 * 5 + 2  # tensor files; state, manifest and latest with five operations each; rename and sync
STATE = {"step": 0, "loss": 1.25, "loader": {"position": [1, 2]}, "名": "小猫"}


def write(folder: Path, step: int, model: GPT | None = None, **options: Any) -> Path | None:
    model = model or make_model(seed=step)
    return checkpoint.save(
        folder,
        step=step,
        model=model,
        optimizer_state={"muon/a/momentum": torch.full((2, 3), float(step))},
        state={**STATE, "step": step},
        identity={"data_hash": "abc"},
        compute=CPU,
        **{"keep_last": 3, **options},
    )


def step_dir(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def found(folder: Path, step: int | None = None) -> checkpoint.Saved:
    saved = checkpoint.find(folder, step)
    assert saved is not None
    return saved


def test_everything_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = make_model(perturb=True)
    path = write(tmp_path, 7, model)
    saved = found(tmp_path)
    assert (saved.folder, saved.step) == (path, 7)
    assert saved.state() == {**STATE, "step": 7}
    assert saved.manifest["identity"] == {"data_hash": "abc"}
    again = saved.load_model(torch.device("cpu"), torch.float32)
    assert again.config == model.config
    assert not again.training
    for (n, p), (m, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert n == m
        assert torch.equal(p, q)
    assert torch.equal(saved.optimizer_tensors()["muon/a/momentum"], torch.full((2, 3), 7.0))
    assert saved.weights_sha256() == files.sha256(saved.folder / "model.safetensors")


def test_the_layout_on_disk_is_the_documented_one(tmp_path: Path) -> None:
    folder = write(tmp_path, 1234)
    assert folder == tmp_path / "step_00001234"
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["manifest.json", "model.safetensors", "optim.rank0.safetensors", "state.json"]
    manifest = json.loads((folder / "manifest.json").read_text())
    listed = {f["name"]: (f["bytes"], f["sha256"]) for f in manifest["files"]}
    assert sorted(listed) == names[1:]
    assert all((folder / n).stat().st_size == size for n, (size, _) in listed.items())
    latest = json.loads((tmp_path / "latest.json").read_text())
    assert latest == {"step": 1234, "manifest_sha256": files.sha256(folder / "manifest.json")}


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("name", ["model.safetensors", "optim.rank0.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", [tear, flip, remove])
def test_a_damaged_file_is_noticed_and_the_checkpoint_before_it_is_used(
    tmp_path: Path, name: str, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    harm(step_dir(tmp_path, 2) / name)
    if (name, harm) == ("manifest.json", flip):
        (step_dir(tmp_path, 2) / name).write_text("[]")  # a flipped newline at its end would be harmless
    with caplog.at_level(logging.WARNING):
        assert found(tmp_path).step == 1
    if name != "manifest.json":  # without a manifest a folder does not exist for any reader
        assert f"step_00000002/{name}" in caplog.text
    assert checkpoint.problems(step_dir(tmp_path, 2)) != []
    assert checkpoint.problems(step_dir(tmp_path, 1)) == []


def test_when_all_are_damaged_it_is_an_error_with_exit_code_5_and_a_remedy(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path, step)
        flip(step_dir(tmp_path, step) / "model.safetensors")
    with pytest.raises(DamagedError, match="no usable checkpoint in .*--no-resume") as error:
        checkpoint.find(tmp_path)
    assert error.value.exit_code == 5


def test_no_checkpoint_at_all_is_not_an_error(tmp_path: Path) -> None:
    assert checkpoint.find(tmp_path) is None
    assert checkpoint.find(tmp_path / "absent") is None
    assert checkpoint.list_steps(tmp_path / "absent") == []


def test_a_step_can_be_chosen_and_an_unknown_one_lists_what_there_is(tmp_path: Path) -> None:
    for step in (10, 20):
        write(tmp_path, step)
    assert found(tmp_path, 10).step == 10
    with pytest.raises(ValueError, match="has no checkpoint of step 15; there are: 10, 20"):
        checkpoint.find(tmp_path, 15)
    with pytest.raises(ValueError, match="there are: none"):
        checkpoint.find(tmp_path / "absent", 1)


def test_order_is_by_step_not_by_time_and_other_folders_are_ignored(tmp_path: Path) -> None:
    for step in (300, 20, 100):
        write(tmp_path, step, keep_last=9)
    shutil.copytree(step_dir(tmp_path, 300), tmp_path / "step_00000400.tmp-1")
    shutil.copytree(step_dir(tmp_path, 300), tmp_path / "step_999")
    step_dir(tmp_path, 500).mkdir()
    assert checkpoint.list_steps(tmp_path) == [20, 100, 300]
    assert found(tmp_path).step == 300


class Writes:
    """Lets every write of a save pass or makes one of them fail: tensor files and the operations of `files`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int) -> None:
        self.order: list[str] = []
        error = OSError(errno.ENOSPC, "No space left on device")
        self.backend = Faulty(-1, error)
        self.fail_at = fail_at
        self.backend._tick = self.tick  # type: ignore[method-assign]
        self.error = error
        real_replace, real_save = self.backend.replace, checkpoint.save_file

        def replace(source: Path, target: Path) -> None:
            real_replace(source, target)
            self.order.append(target.name)

        def save_file(tensors: dict[str, Tensor], path: Path) -> None:
            try:
                self.tick("save_file")
            except OSError as failure:
                Path(path).write_bytes(b"half")
                raise SafetensorError(f"I/O error: {failure}") from failure
            real_save(tensors, path)
            self.order.append(Path(path).name)

        self.backend.replace = replace  # type: ignore[method-assign]
        monkeypatch.setattr(files, "backend", self.backend)
        monkeypatch.setattr(checkpoint, "save_file", save_file)

    def tick(self, name: str) -> None:
        self.backend.done.append(name)
        if len(self.backend.done) - 1 == self.fail_at:
            raise self.error


def test_a_failure_at_any_write_is_a_disk_error_and_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    for k in range(WRITES + 1):
        folder = tmp_path / str(k)
        write(folder, 1)
        with pytest.MonkeyPatch.context() as patch:
            writes = Writes(patch, fail_at=k)
            if k == WRITES:
                write(folder, 2)
                assert len(writes.backend.done) == WRITES  # there was nothing left to fail
                break
            with pytest.raises(DiskError, match="No space left.*GiB free") as error:
                write(folder, 2)
            assert error.value.exit_code == 6
        if step_dir(folder, 2).exists():  # failed after the commit
            assert checkpoint.problems(step_dir(folder, 2)) == []
        assert found(folder).step in (1, 2)
        files.remove_temporaries(folder)
        assert write(folder, 2) == step_dir(folder, 2)  # the next try succeeds
        assert found(folder).step == 2


def test_the_manifest_is_the_last_file_before_the_folder_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = Writes(monkeypatch, fail_at=-1)
    write(tmp_path, 1)
    assert sorted(writes.order[:3]) == ["model.safetensors", "optim.rank0.safetensors", "state.json"]
    assert writes.order[3:] == ["manifest.json", "step_00000001", "latest.json"]


def test_saving_a_step_again_keeps_a_whole_checkpoint_and_replaces_a_damaged_one(tmp_path: Path) -> None:
    first, second = make_model(seed=1), make_model(seed=2)
    write(tmp_path, 5, first)
    write(tmp_path, 5, second)
    whole = found(tmp_path).load_model(torch.device("cpu"), torch.float32)
    assert torch.equal(whole.wte.weight, first.wte.weight)
    flip(step_dir(tmp_path, 5) / "model.safetensors")
    write(tmp_path, 5, second)
    repaired = found(tmp_path).load_model(torch.device("cpu"), torch.float32)
    assert torch.equal(repaired.wte.weight, second.wte.weight)


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(DiskError, match="not finite"):
        write(tmp_path, 3, model)
    assert checkpoint.list_steps(tmp_path) == []


def test_too_little_space_is_a_warning_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with caplog.at_level(logging.WARNING):
        assert write(tmp_path, 1) is None
    assert "step 1 not saved" in caplog.text
    assert checkpoint.list_steps(tmp_path) == []


def test_saving_keeps_the_newest_and_deletes_the_rest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step, keep_last=2)
    assert checkpoint.list_steps(tmp_path) == [3, 4]


@pytest.mark.parametrize("keep_last", [0, 1, -3])
def test_pruning_never_deletes_the_last_checkpoint(tmp_path: Path, keep_last: int) -> None:
    for step in (1, 2):
        write(tmp_path, step)
    assert checkpoint.prune(tmp_path, keep_last) == [1]
    assert checkpoint.list_steps(tmp_path) == [2]


def test_pruning_never_deletes_the_only_whole_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    for step in (2, 3):
        flip(step_dir(tmp_path, step) / "model.safetensors")
    checkpoint.prune(tmp_path, 1)
    assert found(tmp_path).step == 1


def test_a_folder_that_cannot_be_deleted_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError("no")

    for step in (1, 2):
        write(tmp_path, step)
    with caplog.at_level(logging.WARNING):
        checkpoint.prune(tmp_path, 1, remove=refuse)
    assert "could not delete the checkpoint of step 1" in caplog.text


def replace_weights(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Put other tensors into a checkpoint and make its manifest vouch for them."""
    path = folder / "model.safetensors"
    checkpoint.save_file(tensors, path)
    manifest = files.read_json(folder / "manifest.json")
    for entry in manifest["files"]:
        if entry["name"] == path.name:
            entry.update(bytes=path.stat().st_size, sha256=files.sha256(path))
    files.write_json(folder / "manifest.json", manifest)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("wte.weight"), "wte.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(3, 3)}), "lm_head.weight"),
    ],
    ids=["missing", "unexpected", "wrong_shape"],
)
def test_tensors_that_do_not_fit_the_configuration_are_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], named: str
) -> None:
    folder = write(tmp_path, 1)
    assert folder is not None
    tensors = checkpoint.read_tensors(folder / "model.safetensors")
    change(tensors)
    replace_weights(folder, tensors)
    with pytest.raises(DamagedError, match=rf"does not fit the model: tensors differ \({named}"):
        found(tmp_path).load_model(torch.device("cpu"), torch.float32)


class Bomb:
    """Leaves a mark when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pickle_mark, ())


MARKS: list[int] = []


def pickle_mark() -> None:
    MARKS.append(1)


@pytest.mark.parametrize("torch_format", [False, True])
def test_a_pickle_in_place_of_tensors_is_refused_unread(tmp_path: Path, torch_format: bool) -> None:
    path = tmp_path / "model.safetensors"
    if torch_format:
        torch.save({"wte.weight": Bomb()}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DamagedError, match=r"model\.safetensors is damaged"):
        checkpoint.read_tensors(path)
    assert MARKS == []


def test_nothing_in_the_project_reads_pickles() -> None:
    for folder in ("nanozhchat", "scripts", "tasks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    assert (node.value.id, node.attr) != ("torch", "load"), path
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    names = {a.name.split(".")[0] for a in node.names} | {getattr(node, "module", "") or ""}
                    assert not names & {"pickle", "dill", "joblib", "shelve"}, path
                if isinstance(node, ast.keyword):
                    forbids = isinstance(node.value, ast.Constant) and node.value.value is False
                    assert node.arg not in {"trust_remote_code", "allow_pickle"} or forbids, path


def test_a_model_of_other_sizes_is_described_by_its_own_manifest(tmp_path: Path) -> None:
    model = make_model(make_config(n_layer=2, n_kv_head=1))
    write(tmp_path, 1, model)
    assert found(tmp_path).load_model(torch.device("cpu"), torch.bfloat16).config == model.config
