"""Corpora: what is written can be read back, is split, reused, rebuilt when inputs change, and checked."""

import contextlib
import hashlib
import itertools
import json
import os

import pytest

from nanozhchat import cleaning, corpus, files, paths, sources
from nanozhchat.errors import DamagedError, DiskError, RunError
from scripts import data_cluster, data_fetch
from tests.conftest import cut, flip, pack, refused, write_jsonl
from tests.test_files import Faulty

TEXTS = [f"第{i}篇文档,讲的是第{i * i}件事。" for i in range(400)]


@pytest.fixture
def source(tmp_path):
    return write_jsonl(tmp_path / "in.jsonl", TEXTS)


def build(*specs, name="c", said=None, **options):
    said = said if said is not None else []
    return corpus.build([str(s) for s in specs], name, progress=said.append, **options)


def everything(built):
    return {split: list(built.documents(split)) for split in sources.SPLITS}


def small_shards(monkeypatch, shard_bytes=1500, group_bytes=300):
    monkeypatch.setattr(corpus, "ROW_GROUP_BYTES", group_bytes)
    monkeypatch.setattr(corpus, "SHARD_BYTES", shard_bytes)


def test_every_document_comes_back_in_exactly_one_split_and_is_counted_in_any_number_of_shards(source, monkeypatch):
    built = build(source)
    found = everything(built)
    for split, texts in found.items():
        assert built.n_bytes(split) == sum(len(t.encode()) for t in texts)
        assert built.manifest["totals"][split]["rows"] == len(texts)
    assert sorted(found["train"] + found["val"]) == sorted(TEXTS)
    assert set(found["val"]) == set(sources.documents([str(source)], "val"))
    small_shards(monkeypatch)
    many = build(source, name="many")
    assert (len(many.manifest["shards"]) > 5, everything(many)) == (True, found)


def test_the_same_inputs_are_reused_and_not_written_again_and_the_same_text_has_the_same_hash(source, tmp_path):
    first, said = build(source), []
    assert build(write_jsonl(tmp_path / "elsewhere.jsonl", TEXTS), name="b").hash == first.hash
    with files.lock(first.directory):  # which reading does not wait for
        before = {p.name: p.stat().st_mtime_ns for p in first.directory.iterdir()}
        assert build(source, said=said).hash == first.hash
        assert {p.name: p.stat().st_mtime_ns for p in first.directory.iterdir()} == before
    assert "reused" in said[0]


def test_changed_inputs_or_settings_or_a_shard_cut_short_are_built_again_and_it_says_so(source):
    first, said = build(source), []
    cut(first.directory / "train-00000.parquet", 5)
    assert build(source, said=said).hash == first.hash
    assert "missing or cut short" in said[0]
    limited = build(source, max_bytes=5000)
    assert limited.hash != first.hash
    assert 4900 < limited.n_bytes("train") + limited.n_bytes("val") <= 5000
    write_jsonl(source, [*TEXTS, "新的一篇"])
    second = build(source, said=said)
    assert any("inputs changed" in line for line in said[2:])
    assert "新的一篇" in sum(everything(second).values(), [])


@pytest.mark.parametrize("k", range(8))
def test_a_build_that_fails_at_any_write_leaves_no_corpus_and_the_next_one_succeeds(source, monkeypatch, k):
    small_shards(monkeypatch, 3000, 1500)
    whole = build(source, name="whole")
    build(source, max_bytes=9000)  # what stands there is another corpus
    with monkeypatch.context() as patch:
        patch.setattr(files, "backend", Faulty(k, OSError(28, "No space left on device"), only="replace"))
        refused("GiB free", build, source, error=DiskError)
    refused("no corpus 'c'", corpus.load, "c")
    assert build(source).hash == whole.hash
    assert not list(corpus.load("c").directory.glob(".*.tmp"))


def test_a_damaged_input_leaves_no_corpus_behind_and_a_wrong_field_the_one_that_stands_there(source, tmp_path):
    with open(source, "a", encoding="utf-8") as handle:
        handle.write('{"text": "torn')
    refused(r"in\.jsonl:401", build, source, error=DamagedError)
    refused("no corpus", corpus.load, "c")
    first = build(source, skip_bad=True)
    assert first.manifest["skipped"] == {"broken line": 1}
    refused("--text-field", lambda: build(write_jsonl(tmp_path / "other.jsonl", [{"story": "x"}])))
    assert corpus.load("c").hash == first.hash


@pytest.mark.parametrize(("texts", "said"), [([], "0 documents"), (["一"], "1 document;"), (["一", "一"], "same")])
def test_too_few_documents_are_a_clear_error_and_two_are_enough(tmp_path, texts, said):
    refused(said, lambda: build(write_jsonl(tmp_path / "in.jsonl", texts)))
    found = everything(build(write_jsonl(tmp_path / "in.jsonl", ["一", "二"])))
    assert sorted(map(len, found.values())) == [1, 1]


def test_builtin_text_is_made_for_both_splits_up_to_the_limit():
    built = build("builtin", max_bytes=300_000)
    found = everything(built)
    assert not set(found["train"]) & set(found["val"])
    assert built.n_bytes("val") / built.n_bytes("train") == pytest.approx(1 / 48, rel=0.3)
    assert build("builtin", name="again", max_bytes=300_000).hash == built.hash
    refused("unknown part 'nonsense' of the built-in data; there are: ", build, "builtin:nonsense")


def test_verify_finds_a_flipped_bit_or_a_missing_shard_and_reading_a_torn_one_is_damage_that_names_it(source, capsys):
    data_fetch.main(["--data", str(source), "--name", "c"])
    shard = corpus.load("c").directory / "train-00000.parquet"
    capsys.readouterr()
    data_fetch.main(["--verify", "--name", "c"])
    assert json.loads(capsys.readouterr().out)["ok"] is True
    for harm, problem in ((flip, "sha256"), (os.unlink, "missing")):
        harm(shard)
        error = refused(None, data_fetch.main, ["--verify", "--name", "c"], error=DamagedError)
        found = json.loads(capsys.readouterr().out)["problems"][0]
        assert (error.exit_code, found["file"], problem in found["problem"]) == (5, str(shard), True)
    built = build(source)
    cut(shard, 30)
    refused(r"train-00000\.parquet", lambda: list(built.documents("train")), error=DamagedError)


@pytest.mark.parametrize(("kind", "every"), [("plain", 150), ("of several kinds, weighted, cleaned, partly bad", 120)])
def test_a_build_killed_anywhere_goes_on_and_ends_with_the_same_manifest(tmp_path, monkeypatch, kind, every):
    small_shards(monkeypatch, 4000, 1500)
    monkeypatch.setattr(cleaning, "BATCH_CHARS", 500)
    monkeypatch.setattr(cleaning, "WORKERS", 1)
    options = {"skip_bad": True}
    specs = [str(write_jsonl(tmp_path / "in.jsonl", TEXTS[140:] + TEXTS[:140]))]
    if kind != "plain":
        texts = [hashlib.sha256(str(i % 150).encode()).hexdigest() for i in range(250)]
        write_jsonl(tmp_path / "two" / "a.jsonl.gz", [{"text": t} for t in [*texts[:70], None, *texts[70:]]])
        rows = '{"content": "乙"}\n{"content": "甲", "text": "不是这个"}\n{"content": "to\n'
        pack(tmp_path / "two" / "b.jsonl", rows * 90)
        specs = [f"{specs[0]}@1", f"{tmp_path / 'two'}@2", "builtin@0.5"]
        options["clean"] = ("unicode", "exact", "near")
    whole, said, real, read = build(*specs, name="whole", **options), [], sources.with_split, itertools.count(1)

    def killed(*args):
        for doc in real(*args):
            if next(read) % every == 0:
                raise KeyboardInterrupt
            yield doc

    monkeypatch.setattr(sources, "with_split", killed)
    for _ in range(50):
        with contextlib.suppress(KeyboardInterrupt):
            built = build(*specs, said=said, **options)
            break
    assert any("going on after" in line for line in said)
    for path in whole.directory.iterdir():
        if path.suffix in (".parquet", ".json"):
            assert (built.directory / path.name).read_bytes() == path.read_bytes()
    assert not (built.directory / corpus.STATE).exists()


def test_two_workers_and_one_command_that_joins_them_make_the_corpus_of_one_worker(tmp_path):
    for i in range(5):
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", TEXTS[i * 80 : i * 80 + 90])
    parts = ((1, 1), (1, 2), (2, 2))
    whole, *shares = [build(tmp_path / "in", name=f"share{k}{n}", part=(k, n)).directory for k, n in parts]
    one = build(whole, name="one", clean=("exact",))
    two = build(*shares, name="two", clean=("exact",))
    assert {k: sorted(v) for k, v in everything(two).items()} == {k: sorted(v) for k, v in everything(one).items()}
    assert sorted(sum(everything(two).values(), [])) == sorted(TEXTS)
    refused("only 5 files", lambda: build(tmp_path / "in", name="x", part=(1, 6)))


def test_the_shares_of_datatrove_give_one_corpus_for_any_number_of_workers_and_go_to_slurm(tmp_path, monkeypatch):
    for i in range(3):
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", TEXTS[i * 80 : i * 80 + 90])
    flags = ["--data", str(tmp_path / "in"), "--clean=unicode,exact", "--tasks=3", "--name=c"]
    found = []
    for workers in (1, 2):
        monkeypatch.setenv("NANOZHCHAT_BASE_DIR", str(tmp_path / f"base{workers}"))
        data_cluster.main([*flags, f"--workers={workers}"])
        found.append({path.name: path.read_bytes() for path in paths.corpus_dir("c").glob("*.parquet")})
    assert found[0] == found[1] != {}
    assert sorted(sum(everything(corpus.load("c")).values(), [])) == sorted(set(TEXTS[:250]))
    refused("a task failed", data_cluster.main, [*flags, "--tasks=4"], error=RunError)
    sbatch = f'#!/bin/sh\nfor f; do cat "$f" 2>/dev/null; done >> {tmp_path}/jobs\necho Submitted batch job 7\n'
    pack(tmp_path / "sbatch", sbatch).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    data_cluster.main([*flags, "--name=d", "--executor=slurm", "--partition=ours"])
    jobs = (tmp_path / "jobs").read_text()
    assert [line in jobs for line in ("--array=0-2%2", "--partition=ours", "--dependency=afterok:7")] == [True] * 3
