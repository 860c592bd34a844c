"""The hub: the real client libraries against a stand-in on 127.0.0.1 that limits, cuts, corrupts and disappears."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanozhchat import corpus
from tests.conftest import ROOT

COMMIT = "c" * 40


class StandIn(ThreadingHTTPServer):
    """Serves data set me/tiny as the hub does. faults: what happens to the next requests for a file's bytes."""

    daemon_threads = True

    def __init__(self, files, faults=()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.asked = files, list(faults), []
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def describe(self, path):
        data = self.files[path]
        oid = hashlib.sha256(data).hexdigest()
        entry = {"type": "file", "path": path, "size": len(data), "oid": "0" * 40}
        return {**entry, "lfs": {"oid": oid, "size": len(data), "pointerSize": 130}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", sent=None, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
            self.wfile.flush()

    def do_POST(self):
        hub, asked = self.server, self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.answer(200, [hub.describe(p) for p in hub.files if p in asked or p.split("/")[-1] in asked])

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        if path.startswith(f"/api/datasets/me/tiny/tree/{COMMIT}"):
            inside = path.endswith("/data") or "recursive=true" in self.path.lower()
            folder = {"type": "directory", "path": "data", "size": 0, "oid": "0" * 40}
            self.answer(200, [hub.describe(p) for p in hub.files] if inside else [folder])
        elif path in (f"/api/datasets/me/tiny/revision/{COMMIT}", "/api/datasets/me/tiny/revision/main"):
            siblings = [{"rfilename": p} for p in hub.files]
            self.answer(200, {"id": "me/tiny", "sha": COMMIT, "private": False, "gated": False, "siblings": siblings})
        elif (name := path.partition(f"/datasets/me/tiny/resolve/{COMMIT}/")[2]) in hub.files:
            self.file(name)
        else:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def file(self, name):
        hub, data = self.server, self.server.files[name]
        oid, start = hub.describe(name)["lfs"]["oid"], 0
        facts = {"ETag": f'"{oid}"', "X_Repo_Commit": COMMIT, "X_Linked_Size": len(data), "X_Linked_ETag": f'"{oid}"'}
        facts["Accept_Ranges"] = "bytes"
        if self.command == "HEAD":
            self.answer(200, data, **facts)
            return
        if begin := self.headers.get("Range"):
            start = int(begin.removeprefix("bytes=").rstrip("-"))
            facts["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        fault, rest = hub.faults.pop(0) if hub.faults else "", data[start:]
        hub.asked.append((name, start, fault))
        if fault == "429":
            self.answer(429, Retry_After=0)
            return
        half = len(rest) // 2 if fault in ("cut", "hang") else None
        self.close_connection |= half is not None
        self.answer(206 if start else 200, bytes(len(rest)) if fault == "wrong" else rest, half, **facts)
        time.sleep(30 if fault == "hang" else 0)


def parquet(texts, pad):
    """A file longer than what the client writes at once, 10 MiB: only what is written can be gone on from."""
    sink = pa.BufferOutputStream()
    table = pa.table({"text": texts, "pad": [b"x" * pad] + [b""] * (len(texts) - 1)})
    pq.write_table(table, sink, compression="none", use_dictionary=False, write_statistics=False)
    return sink.getvalue().to_pybytes()


TEXTS = [hashlib.sha256(str(i).encode()).hexdigest() * 20 for i in range(1200)]
FILES = {f"data/train-0000{i}.parquet": parquet(TEXTS[i::2], pad) for i, pad in enumerate((24 << 20, 0))}


@pytest.fixture
def fetch(tmp_path, base_dir):
    """Run data_fetch against a stand-in; returns (what it said, exit code), or the process when told not to wait."""

    def run(url, *flags, wait=True, **env):
        env = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DOWNLOAD_TIMEOUT": "3", **env}
        command = [sys.executable, "-m", "scripts.data_fetch", "--data", "hf:me/tiny", "--name=c", *flags]
        process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
        return (process.communicate(timeout=60)[1], process.returncode) if wait else process

    return run


def fetched():
    return sorted(text for split in ("train", "val") for text in corpus.load("c").documents(split))


def test_limits_and_cut_connections_are_survived_by_going_on_and_offline_needs_no_hub(fetch):
    hub = StandIn(FILES, ["429", "cut"])
    said, code = fetch(hub.url)
    assert code == 0, said
    assert [(start, fault) for _, start, fault in hub.asked] == [(0, "429"), (0, "cut"), (10 << 20, ""), (0, "")]
    assert fetched() == sorted(TEXTS)
    hub.shutdown()
    said, code = fetch(hub.url, "--max-bytes=900000", HF_HUB_OFFLINE="1")
    assert code == 0, said
    assert set(fetched()) < set(TEXTS)


def test_a_download_killed_midway_goes_on_where_it_was(fetch, base_dir):
    hub = StandIn(FILES, ["hang"])
    process = fetch(hub.url, wait=False)
    while not any(p.stat().st_size for p in base_dir.glob("hub/**/.*.part")) and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    held = sum(p.stat().st_size for p in base_dir.glob("hub/**/.*.part"))
    assert fetch(hub.url)[1] == 0
    assert hub.asked[1][1] == held > 0
    assert fetched() == sorted(TEXTS)


@pytest.mark.parametrize(("times", "code"), [(1, 0), (9, 5)])
def test_a_wrong_hash_is_fetched_again_and_stays_an_error_if_it_stays_wrong(fetch, times, code):
    said, found = fetch(StandIn(FILES, ["wrong"] * times).url)
    assert found == code, said
    assert "downloading it again" in said
    if code:
        assert "train-00000.parquet is damaged on its way" in said
    else:
        assert fetched() == sorted(TEXTS)


def test_a_hub_out_of_reach_or_without_the_data_set_fails_fast_in_one_line(fetch, tmp_path):
    hub = StandIn({})
    begin = time.monotonic()
    said, code = fetch(hub.url, "--data", "hf:me/none")
    assert (code, "cannot read me/none" in said) == (6, True)
    hub.server_close()
    hub.shutdown()
    said, code = fetch(f"http://127.0.0.1:{hub.server_port}")
    assert (code, "HF_ENDPOINT" in said) == (6, True)
    said, code = fetch(hub.url, HF_HUB_OFFLINE="1")
    assert (code, "not fetched before" in said) == (2, True)
    assert time.monotonic() - begin < 30
    assert not (tmp_path / "base" / "corpus" / "c" / "manifest.json").exists()
