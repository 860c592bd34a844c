"""Durable files: whole or absent whatever fails, one process at a time, torn lines dropped."""

import errno
import json
import os
import subprocess
import sys

import pytest

from nanozhchat import files
from nanozhchat.errors import DamagedError, DiskError, LockedError
from tests.conftest import ROOT

OPERATIONS = ("open", "write", "fsync", "replace", "fsync_dir")  # in the order of the protocol


class Faulty(files.Backend):
    """Fails operation number `fail_at` (0-based), after tearing what it was about to do."""

    def __init__(self, fail_at, error):
        self.fail_at, self.error = fail_at, error
        self.done = []

    def tick(self, operation):
        self.done.append(operation)
        if len(self.done) - 1 == self.fail_at:
            raise self.error


def full_disk():
    return OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("k", range(len(OPERATIONS)), ids=OPERATIONS)
@pytest.mark.parametrize("make_error", [full_disk, KeyboardInterrupt], ids=["full_disk", "interrupt"])
def test_a_failure_at_any_operation_leaves_the_old_or_the_new_content_and_no_temporary(
    tmp_path, monkeypatch, k, make_error
):
    target = tmp_path / "state.json"
    files.atomic_write(target, b"old content")
    monkeypatch.setattr(files, "backend", Faulty(k, make_error()))
    with pytest.raises((DiskError, KeyboardInterrupt)) as error:
        files.atomic_write(target, b"new content")
    renamed = k > OPERATIONS.index("replace")
    assert target.read_bytes() == (b"new content" if renamed else b"old content")
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["state.json"]
    if make_error is full_disk:
        assert str(target) in str(error.value)
        assert "GiB free" in str(error.value)
        assert "NANOZHCHAT_BASE_DIR" in str(error.value)


def test_a_write_syncs_the_file_before_the_rename_and_the_directory_after(tmp_path, monkeypatch):
    backend = Faulty(-1, full_disk())
    monkeypatch.setattr(files, "backend", backend)
    files.atomic_write(tmp_path / "deep" / "er" / "f", b"x")
    assert tuple(backend.done) == OPERATIONS
    assert (tmp_path / "deep" / "er" / "f").read_bytes() == b"x"


def test_a_writing_function_that_fails_leaves_nothing(tmp_path):
    def writer(handle):
        handle.write(b"half")
        raise RuntimeError("cut")

    with pytest.raises(RuntimeError):
        files.atomic_write(tmp_path / "f", writer)
    assert not (tmp_path / "f").exists()
    assert list(tmp_path.glob(".*")) == []


def test_json_round_trips_as_readable_utf8(tmp_path):
    value = {"名": "小猫", "n": [1, 2.5, None, True]}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == value
    assert "小猫" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_json_that_other_programs_cannot_read_is_refused(tmp_path):
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe", b"no"])
def test_a_torn_json_file_is_reported_as_damaged_by_name(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DamagedError, match="a.json"):
        files.read_json(tmp_path / "a.json")


def test_json_lines_round_trip_with_any_text(tmp_path):
    rows = [{"text": "两\u2028行\u2029与\x85和\x0c\x1e\n"}, {"text": "第二行"}]
    for row in rows:
        files.append_jsonl(tmp_path / "a.jsonl", row)
    assert files.read_jsonl(tmp_path / "a.jsonl") == rows


def test_a_torn_last_line_is_dropped_and_costs_no_later_row(tmp_path):
    path = tmp_path / "a.jsonl"
    files.append_jsonl(path, {"step": 1})
    with open(path, "ab") as handle:
        handle.write('{"step": 2, "text": "小'.encode()[:-1])  # killed in the middle of a character
    assert files.read_jsonl(path) == [{"step": 1}]
    files.append_jsonl(path, {"step": 2})
    assert files.read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_a_missing_json_lines_file_is_empty(tmp_path):
    assert files.read_jsonl(tmp_path / "none.jsonl") == []


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert files.sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_leftovers_of_dead_processes_are_removed_and_results_kept(tmp_path):
    (tmp_path / "step_00000001").mkdir()
    (tmp_path / "step_00000001" / "model.safetensors").write_bytes(b"x")
    (tmp_path / "step_00000002.tmp-17").mkdir()
    (tmp_path / "step_00000002.tmp-17" / "part").write_bytes(b"x")
    (tmp_path / ".state.json.17.tmp").write_bytes(b"x")
    files.remove_temporaries(tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.name != "base"] == ["step_00000001"]
    assert (tmp_path / "step_00000001" / "model.safetensors").exists()


HOLD = """
import sys, time
from pathlib import Path
from nanozhchat import files
with files.lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_the_lock_excludes_another_process_names_it_and_dies_with_it(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"process {holder.pid} on "), files.lock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait(30)
        for pipe in (holder.stdin, holder.stdout):
            if pipe is not None:
                pipe.close()
    with files.lock(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_the_lock_is_free_again_after_an_error_inside(tmp_path):
    with pytest.raises(RuntimeError), files.lock(tmp_path):
        raise RuntimeError
    with files.lock(tmp_path):
        pass


def test_written_json_ends_with_one_newline(tmp_path):
    files.write_json(tmp_path / "a.json", [1])
    text = (tmp_path / "a.json").read_text()
    assert text == json.dumps([1], indent=1) + "\n"
