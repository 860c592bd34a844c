"""Durable files: whole or absent whatever fails, one process at a time, torn lines dropped."""

import errno
import os
import subprocess
import sys

import pytest

from nanozhchat import files, paths
from nanozhchat.errors import DamagedError, DiskError, LockedError
from nanozhchat.run import refuse_busy
from tests.conftest import ROOT, pack, refused

OPERATIONS = ("open", "write", "fsync", "replace", "fsync_dir")  # in the order of the protocol


class Faulty(files.Backend):
    """Fails operation number `fail_at` (0-based, of the kind `only`), after tearing what it was about to do."""

    def __init__(self, fail_at, error, only=None):
        self.fail_at, self.error, self.only = fail_at, error, only
        self.done = []

    def tick(self, operation):
        if self.only not in (None, operation):
            return
        self.done.append(operation)
        if len(self.done) - 1 == self.fail_at:
            raise self.error


@pytest.mark.parametrize("k", range(len(OPERATIONS)), ids=OPERATIONS)
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_failure_at_any_operation_leaves_the_old_or_the_new_content_and_no_temporary(tmp_path, monkeypatch, k, error):
    target = tmp_path / "state.json"
    files.atomic_write(target, b"old content")
    monkeypatch.setattr(files, "backend", Faulty(k, error))
    with pytest.raises((DiskError, KeyboardInterrupt)) as caught:
        files.atomic_write(target, b"new content")
    renamed = k > OPERATIONS.index("replace")
    assert target.read_bytes() == (b"new content" if renamed else b"old content")
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["state.json"]
    if isinstance(error, OSError):
        assert [s for s in (str(target), "GiB free", "NANOZHCHAT_BASE_DIR") if s not in str(caught.value)] == []


def test_a_write_syncs_the_file_renames_it_and_syncs_the_directory_and_half_a_file_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "backend", backend := Faulty(-1, None))
    files.atomic_write(tmp_path / "deep" / "er" / "f", b"x")
    assert (tuple(backend.done), (tmp_path / "deep" / "er" / "f").read_bytes()) == (OPERATIONS, b"x")
    refused(None, files.atomic_write, tmp_path / "g", lambda handle: handle.write(b"half") / 0, error=ZeroDivisionError)
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]


def test_json_round_trips_as_readable_utf8_and_what_other_programs_cannot_read_is_refused(tmp_path):
    value = {"名": "小猫", "n": [1, 2.5, None, True]}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == value
    assert "小猫" in (tmp_path / "a.json").read_text(encoding="utf-8")
    refused(None, lambda: files.write_json(tmp_path / "b.json", {"loss": float("nan")}))
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe", b"no"])
def test_a_torn_json_file_is_reported_as_damaged_by_name(tmp_path, content):
    refused("a.json", files.read_json, pack(tmp_path / "a.json", content), error=DamagedError)


def test_json_lines_round_trip_with_any_text_and_a_torn_last_one_is_dropped_and_costs_no_later_row(tmp_path):
    path, rows = tmp_path / "a.jsonl", [{"text": "两\u2028行\u2029与\x85和\x0c\x1e\n"}, {"step": 2}]
    assert files.read_jsonl(path) == []
    for n, row in enumerate(rows):
        files.append_jsonl(path, row)
        with open(path, "ab") as handle:
            handle.write('{"step": 2, "text": "小'.encode()[:-1])  # killed in the middle of a character
        assert files.read_jsonl(path) == rows[: n + 1]


def test_leftovers_of_dead_processes_are_removed_and_results_kept(tmp_path):
    for name in ("step_00000001/model.safetensors", "step_00000002.tmp-17/part", ".state.json.17.tmp"):
        pack(tmp_path / name, "x")
    files.remove_temporaries(tmp_path)
    assert [p.name for p in tmp_path.rglob("*")] == ["step_00000001", "model.safetensors"]


HOLD = "import sys; from nanozhchat import files\nwith files.lock(files.Path('{}')): print('held', flush=True); input()"


def test_a_run_that_another_process_works_on_is_refused_before_anything_is_prepared_for_it(base_dir):
    refuse_busy("base", "mine")
    assert not base_dir.exists()
    folder = paths.run_dir("base", "mine")
    with files.lock(folder):
        refused("mine is in use by process", refuse_busy, "base", "mine", error=LockedError)
    refuse_busy("base", "mine")


def test_the_lock_excludes_another_process_names_it_and_ends_with_it_or_with_an_error(tmp_path):
    command = [sys.executable, "-c", HOLD.format(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"process {holder.pid} on "), files.lock(tmp_path):
            pass
        holder.kill()
    with pytest.raises(ZeroDivisionError), files.lock(tmp_path):
        raise ZeroDivisionError
    with files.lock(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
