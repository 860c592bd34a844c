"""Checkpoints: bit for bit, whole or absent whatever fails, never trusted unseen."""

import ast
import errno
import pickle
import shutil
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from nanozhchat import checkpoint, files
from nanozhchat.errors import DamagedError, DiskError, DivergedError
from nanozhchat.log import Metrics
from tests.conftest import CPU, ROOT, cut, flip, make_config, make_model, refused
from tests.test_files import Faulty

# Tensor files, written and synced; state, manifest and latest with five operations each; rename and sync.
WRITES = 2 * 2 + 3 * 5 + 2
STATE = {"step": 0, "best_step": None, "finished": False, "loss": 1.25, "loader": {"position": [1, 2]}, "名": "小猫"}
PARTS = ["model.safetensors", "optim.rank0.safetensors", "state.json"]


def begin(folder, step, model=None, keep_last=3, every=0, best=None, identity=None):
    optimizer = Mock(state_dict=lambda: {"muon/a/momentum": torch.full((2, 3), float(step))}, steps_done=step)
    run = (folder, identity or {"data_hash": "abc"}, model or make_model(seed=step), optimizer, CPU)
    made = checkpoint.Checkpoints(*run, Metrics(folder, enabled=False), checkpoint.Keep(keep_last, every))
    made.begin({**STATE, "step": step, "best_step": best})
    return made


def write(folder, step, *args, **options):
    begin(folder, step, *args, **options).commit()
    return step_dir(folder, step) if step_dir(folder, step).exists() else None


def step_dir(folder, step):
    return folder / f"step_{step:08d}"


def weights(saved):
    return saved.load_model(torch.device("cpu"), torch.float32).wte.weight


@pytest.mark.parametrize("config", [make_config(), make_config(n_layer=2, n_kv_head=1)])
def test_everything_saved_comes_back_bit_for_bit_in_the_documented_layout(tmp_path, config):
    model = make_model(config, perturb=True)
    folder, saved = write(tmp_path, 1234, model), checkpoint.find(tmp_path)
    assert (saved.folder, saved.step, folder) == (folder, 1234, tmp_path / "step_00001234")
    assert saved.state() == {**STATE, "step": 1234, "optimizer_steps": 1234}
    assert saved.manifest["identity"] == {"data_hash": "abc"}
    again = saved.load_model(torch.device("cpu"), torch.float32)
    assert (again.config, again.training) == (model.config, False)
    for (n, p), (m, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert (n, torch.equal(p, q)) == (m, True)
    assert torch.equal(saved.optimizer_tensors()["muon/a/momentum"], torch.full((2, 3), 1234.0))
    assert saved.weights_sha256() == files.sha256(folder / "model.safetensors")
    assert {p.name for p in folder.iterdir()} == {"manifest.json", *PARTS}
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1  # whoever may read one may read all
    listed = {f["name"]: f["sha256"] for f in files.read_json(folder / "manifest.json")["files"]}
    assert listed == {name: files.sha256(folder / name) for name in PARTS}
    latest = {"step": 1234, "manifest_sha256": files.sha256(folder / "manifest.json")}
    assert files.read_json(tmp_path / "latest.json") == latest


HARMS = {"cut": lambda path: cut(path, 99), "flip": flip, "remove": Path.unlink,
         "reword": lambda path: path.write_bytes(path.read_bytes().replace(b"data", b"eata")),
         "list": lambda path: path.write_text("[]")}  # fmt: skip
DAMAGE = [(name, harm) for name in (*PARTS, "manifest.json") for harm in list(HARMS)[:3]]


@pytest.mark.parametrize(("name", "harm"), [*DAMAGE, ("manifest.json", "reword"), ("manifest.json", "list")])
def test_a_damaged_file_is_noticed_and_the_checkpoint_before_it_is_used(tmp_path, name, harm, caplog):
    write(tmp_path, 1)
    HARMS[harm](write(tmp_path, 2) / name)
    assert checkpoint.find(tmp_path).step == 1
    if name != "manifest.json":  # without a manifest a folder does not exist for any reader
        assert f"step_00000002/{name}" in caplog.text
    assert [checkpoint.problems(step_dir(tmp_path, step)) == [] for step in (1, 2)] == [True, False]


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_when_all_are_damaged_it_is_an_error_with_exit_code_5_and_a_remedy(tmp_path, name):
    for step in (1, 2):
        flip(write(tmp_path, step) / name)
    error = refused("no usable checkpoint in .*--no-resume", checkpoint.find, tmp_path, error=DamagedError)
    assert error.exit_code == 5


def test_order_is_by_step_not_by_time_other_folders_are_ignored_and_a_step_can_be_chosen(tmp_path):
    assert checkpoint.find(tmp_path / "absent") is None
    for step in (300, 20, 100):
        write(tmp_path, step, keep_last=9)
    for name in ("step_00000400.tmp-1", "step_999"):
        shutil.copytree(step_dir(tmp_path, 300), tmp_path / name)
    step_dir(tmp_path, 500).mkdir()
    assert checkpoint.list_steps(tmp_path) == [20, 100, 300]
    assert [checkpoint.find(tmp_path, *step).step for step in ((), (20,))] == [300, 20]
    refused("has no checkpoint of step 15; there are: 20, 100, 300", checkpoint.find, tmp_path, 15)


class Writes(Faulty):
    """Lets every write of a save pass or makes one of them fail: tensor files and the operations of `files`."""

    def __init__(self, monkeypatch, fail_at):
        super().__init__(fail_at, OSError(errno.ENOSPC, "No space left on device"))
        self.order, self.real_save = [], safetensors.torch.save_file
        monkeypatch.setattr(files, "backend", self)
        monkeypatch.setattr(safetensors.torch, "save_file", self.save_file)

    def replace(self, source, target):
        super().replace(source, target)
        self.order.append(target.name)

    def save_file(self, tensors, path, metadata):
        self.real_save(tensors, path, metadata)
        self.order.append(Path(path).name)


@pytest.mark.parametrize("k", range(WRITES))
def test_a_failure_at_any_write_is_a_disk_error_and_leaves_no_half_checkpoint(tmp_path, k):
    write(tmp_path, 1)
    with pytest.MonkeyPatch.context() as patch:
        Writes(patch, fail_at=k)
        assert refused("No space left.*GiB free", write, tmp_path, 2, error=DiskError).exit_code == 6
    if step_dir(tmp_path, 2).exists():  # failed after the commit
        assert checkpoint.problems(step_dir(tmp_path, 2)) == []
    assert checkpoint.find(tmp_path).step in (1, 2)
    files.remove_temporaries(tmp_path)
    assert write(tmp_path, 2) == step_dir(tmp_path, 2)  # the next try succeeds
    assert checkpoint.find(tmp_path).step == 2


def test_the_manifest_is_the_last_file_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    writes = Writes(monkeypatch, fail_at=-1)
    write(tmp_path, 1)
    assert sorted(writes.order[:3]) == PARTS
    assert writes.order[3:] == ["manifest.json", "step_00000001", "latest.json"]
    assert len(writes.done) == WRITES  # the test above makes each of them fail


def test_a_save_is_not_reported_before_its_files_are_on_the_disk_and_committed(tmp_path, monkeypatch):
    gate, real = threading.Event(), safetensors.torch.save_file
    monkeypatch.setattr(safetensors.torch, "save_file", lambda *args: (gate.wait(30), real(*args)))
    model = make_model(seed=1)
    start = model.wte.weight.detach().clone()
    made = begin(tmp_path, 3, model)
    with torch.no_grad():
        model.wte.weight.zero_()  # training goes on
    assert (made.ready, checkpoint.find(tmp_path)) == (False, None)
    gate.set()
    made.commit()
    assert torch.equal(weights(checkpoint.find(tmp_path)), start)


def test_saving_a_step_again_keeps_a_whole_checkpoint_and_replaces_a_damaged_one(tmp_path):
    first, second = make_model(seed=1), make_model(seed=2)
    write(tmp_path, 5, first)
    write(tmp_path, 5, second)
    assert torch.equal(weights(checkpoint.find(tmp_path)), first.wte.weight)
    flip(step_dir(tmp_path, 5) / "model.safetensors")
    write(tmp_path, 5, second)
    assert torch.equal(weights(checkpoint.find(tmp_path)), second.wte.weight)


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    model = make_model()
    model.h[1].mlp.c_fc.weight.data[0, 0] = torch.nan
    refused("not finite", write, tmp_path, 3, model, error=DivergedError)
    assert checkpoint.list_steps(tmp_path) == []


def test_too_little_space_is_a_warning_and_a_library_that_cannot_write_a_disk_error(tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
        assert write(tmp_path, 1) is None
    assert "step 1 not saved" in caplog.text
    assert checkpoint.list_steps(tmp_path) == []
    full = Mock(side_effect=SafetensorError("I/O error: No space left on device"))
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    refused("No space left", write, tmp_path, 1, error=DiskError)


@pytest.mark.parametrize(("keep", "kept"), [
    ({"keep_last": 2}, [7, 8]), *(({"keep_last": n}, [8]) for n in (1, 0, -3)),
    ({"keep_last": 2, "every": 4, "best": 3}, [3, 4, 7, 8]),
])  # fmt: skip
def test_saving_keeps_the_newest_round_steps_and_the_best_and_never_deletes_the_last(tmp_path, keep, kept):
    for step in range(1, 9):
        write(tmp_path, step, make_model(make_config(n_layer=1)), **keep)
    assert checkpoint.list_steps(tmp_path) == kept


def test_pruning_never_deletes_the_only_whole_checkpoint_and_a_failure_is_a_warning(tmp_path, caplog, monkeypatch):
    for step in (1, 2, 3):
        path = write(tmp_path, step) / "model.safetensors"
        if step > 1:
            flip(path)
    checkpoint.prune(tmp_path, 1)
    assert checkpoint.find(tmp_path).step == 1
    write(tmp_path, 4)
    monkeypatch.setattr(shutil, "rmtree", lambda _: (tmp_path / "absent").unlink())
    checkpoint.prune(tmp_path, 1)
    assert "could not delete the checkpoint of step 1" in caplog.text


@pytest.mark.parametrize(("change", "named"), [
    (lambda t: t.pop("wte.weight"), "wte.weight"), (lambda t: t.update(extra=torch.zeros(1)), "extra"),
    (lambda t: t.update({"lm_head.weight": torch.zeros(3, 3)}), "lm_head.weight"),
], ids=["missing", "unexpected", "wrong_shape"])  # fmt: skip
def test_tensors_that_do_not_fit_the_configuration_are_refused_by_name(tmp_path, change, named):
    folder = write(tmp_path, 1)
    path, manifest = folder / "model.safetensors", files.read_json(folder / "manifest.json")
    change(tensors := checkpoint.read_tensors(path))
    safetensors.torch.save_file(tensors, path)
    [entry] = [entry for entry in manifest["files"] if entry["name"] == path.name]
    entry.update(bytes=path.stat().st_size, sha256=files.sha256(path))  # the manifest vouches for them
    manifest["sha256"] = checkpoint._digest(manifest)
    files.write_json(folder / "manifest.json", manifest)
    message = rf"does not fit the model: tensors differ \({named}"
    refused(message, weights, checkpoint.find(tmp_path), error=DamagedError)


class Bomb:
    """Raises when unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize("save", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))])
def test_a_pickle_in_place_of_tensors_is_refused_unread(tmp_path, save):
    save({"wte.weight": Bomb()}, tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    refused(r"model\.safetensors is damaged", checkpoint.read_tensors, path, error=DamagedError)


def test_nothing_in_the_project_reads_pickles():
    for path in (p for folder in ("nanozhchat", "scripts", "tasks") for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) != "torch.load", path
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {a.name.split(".")[0] for a in node.names} | {getattr(node, "module", "") or ""}
                assert not names & {"pickle", "dill", "joblib", "shelve"}, path
            if isinstance(node, ast.keyword) and node.arg in {"trust_remote_code", "allow_pickle"}:
                assert ast.unparse(node.value) == "False", path
