"""Data sources: every kind of file, the spec grammar, mixing, the split, and what happens to bad input."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanozhchat import records, sources
from nanozhchat.errors import DamagedError, DiskError
from nanozhchat.records import ReadStats
from tests.conftest import cut, pack, refused, write_jsonl

TEXTS = [f"第{i}篇:今天天气很好。" for i in range(5)]


def write_parquet(path, columns):
    pq.write_table(pa.table(columns), path)
    return path


def read(*specs, **options):
    return [doc.item for doc in sources.tagged([str(spec) for spec in specs], **options)]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_json_lines_arrays_and_parquet_give_their_documents_however_packed(tmp_path, ending, monkeypatch):
    monkeypatch.setattr(records, "READ_BYTES", 7)  # less than a document
    rows = [{"text": text} for text in TEXTS]
    twice = write_jsonl(tmp_path / f"d.jsonl{ending}", rows[:2])  # two archives end to end
    twice.write_bytes(twice.read_bytes() + write_jsonl(tmp_path / f"e.jsonl{ending}", rows[2:]).read_bytes())
    for path in (
        write_jsonl(tmp_path / f"a.jsonl{ending}", rows), write_jsonl(tmp_path / f"b.json{ending}", rows), twice,
        pack(tmp_path / f"c.json{ending}", json.dumps(rows, indent=2)),
        write_parquet(tmp_path / "a.parquet", {"id": list(range(5)), "text": TEXTS}),
    ):  # fmt: skip
        assert sorted(read(path)) == TEXTS


@pytest.mark.parametrize(("pattern", "want"), [
    ("", ["c.jsonl", "x/b.json.gz", "x/y/a.jsonl"]), ("**/*.jsonl", ["c.jsonl", "x/y/a.jsonl"]),
])  # fmt: skip
def test_a_folder_or_glob_gives_all_its_supported_files_sorted_and_only_those(tmp_path, pattern, want):
    for name in ("c.jsonl", "x/b.json.gz", "x/y/a.jsonl", "x/y/a.csv", "README.md", ".hidden/3.jsonl"):
        write_jsonl(tmp_path / name, [name])
    assert [p.relative_to(tmp_path).as_posix() for p in records.expand(str(tmp_path / pattern))] == want


@pytest.mark.parametrize("name", ["none.jsonl", "none/*.jsonl", "."])
def test_a_path_without_data_is_an_error_that_names_it_or_lists_the_kinds(tmp_path, name):
    refused(str(tmp_path), lambda: read(tmp_path / name))
    refused("parquet", lambda: read(pack(tmp_path / "a.pdf", "%PDF")))


def test_plain_text_is_cut_at_blank_lines_or_else_by_size_and_short_paragraphs_are_joined(tmp_path):
    chapters = [f"第{i}回\n" + "话说天下大势。" * 200 for i in range(3)]
    short = "\n\n".join("短句。" * 10 for _ in range(3))
    text = ("\n\n".join([*chapters, short]) + "\n").replace("\n", "\r\n")
    assert blocks(pack(tmp_path / "a.txt", text.encode("utf-8-sig"))) == [*chapters, short]
    text = "\n".join(f"{i}:一行没有空行的文字" for i in range(20_000))
    found = blocks(pack(tmp_path / "a.txt", text))
    assert (max(map(len, found)) < 5000, "\n".join(found)) == (True, text)


def blocks(path):
    return [row.value for row in records.read_file(path, stats=ReadStats())]


@pytest.mark.parametrize("text_field", [None, "body"])
def test_the_field_is_text_content_or_the_one_asked_for_and_a_missing_one_lists_those_found(tmp_path, text_field):
    with pytest.raises(ValueError, match=r"a\.jsonl:1 .*story, url.*--text-field"):
        read(write_jsonl(tmp_path / "a.jsonl", [{"story": "一", "url": "x"}]), text_field=text_field)
    with pytest.raises(ValueError, match="fields found: story"):
        read(write_parquet(tmp_path / "a.parquet", {"story": ["一"]}), text_field=text_field)
    assert read(write_jsonl(tmp_path / "b.jsonl", [{"story": "二", "content": "一"}])) == ["一"]
    assert read(tmp_path / "b.jsonl", text_field="story") == ["二"]


def test_bad_documents_and_lines_are_skipped_and_counted_by_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_DOCUMENT_BYTES", 100)
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 500)
    rows = [{"text": t} for t in (None, "", " \n", 3, "\ud800", "长" * 50, "长" * 200, "好")] + [{"id": 1}]
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows) + b'{"text": "\xff\xfe"}\n'
    stats = ReadStats()
    assert sorted(read(pack(tmp_path / "a.jsonl", b'{"text": "first"}\n' + data), stats=stats)) == ["first", "好"]
    assert stats.skipped == {"null": 2, "empty": 2, "not a string": 1, "not UTF-8": 2, "too long": 2}


def test_specs_name_path_or_data_set_configuration_and_split_and_a_weight_after_a_number(tmp_path):
    (folder := tmp_path / "v@2").mkdir()
    for spec, *want in (
        ("a/b@2.5", "files", "a/b", None, "train", 2.5), ("me@home", "files", "me@home", None, "train", None),
        (str(folder), "files", str(folder), None, "train", None), ("hf:a/b", "hub", "a/b", None, "train", None),
        ("hf:a/b:zh:test@3", "hub", "a/b", "zh", "test", 3.0),
    ):  # fmt: skip
        source = sources.parse(spec)
        assert [source.kind, source.name, source.config, source.split, source.weight] == want
    for spec in ("a@0", "a@-1", "a@1e999", "hf:a:b:c:d"):
        refused("hf:<dataset>" if "hf:" in spec else "above 0", sources.parse, spec)


def test_weights_hold_by_bytes_until_one_source_ends_and_without_them_all_is_read(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", [f"a{i:03}" + "x" * (i % 50) for i in range(900)])
    b = write_jsonl(tmp_path / "b.jsonl", [f"b{i:04}" for i in range(9000)])
    texts = read(f"{a}@3", f"{b}@1")
    size = {name: sum(len(t) for t in texts if t[0] == name) for name in "ab"}
    assert size["a"] / size["b"] == pytest.approx(3, rel=0.02)
    assert sum(t[0] == "a" for t in texts) == 900
    assert len(read(a, b)) == 9900
    assert read(a, b) == read(a, b)


def test_each_document_is_in_one_split_by_nothing_but_its_content(tmp_path):
    texts = [f"文档{i}" for i in range(3000)]
    path = str(write_jsonl(tmp_path / "a.jsonl", texts))
    train, val = (list(sources.documents([path], split)) for split in sources.SPLITS)
    assert sorted(train + val) == sorted(texts)
    elsewhere = write_jsonl(tmp_path / "other.json.gz", texts[::-1])
    smallest = {text for text in texts if sources.content_key(text.encode()) < 0.01 * 2**64}
    assert set(sources.documents([str(elsewhere)], "val")) == set(val) == smallest
    assert 10 <= len(val) <= 60  # 1 % of 3,000, give or take four deviations


@given(st.lists(st.text(min_size=1, max_size=8).filter(str.strip), max_size=12))
def test_two_different_documents_give_two_splits_without_a_shared_one_val_that_of_the_smallest_hashes(texts):
    texts = [t for t in texts if t.isprintable()]
    docs = list(sources.balance(sources.with_split(records.documents(iter(texts), ReadStats())), {}))
    splits = {s: {d.item for d in docs if d.split == s} for s in sources.SPLITS}
    assert sorted(d.item for d in docs) == sorted(texts)
    assert not splits["train"] & splits["val"]
    if len(set(texts)) > 1:
        keys = {split: [sources.content_key(text.encode()) for text in found] for split, found in splits.items()}
        assert max(keys["val"]) < min(keys["train"])


def test_a_limit_in_bytes_is_kept_but_one_document_always_comes(tmp_path):
    path = str(write_jsonl(tmp_path / "a.jsonl", [f"{i:010}" for i in range(1000)]))
    assert len(list(sources.documents([path], "train", max_bytes=95))) == 9
    assert len(list(sources.documents([path], "train", max_bytes=1))) == 1


def test_without_specs_the_environment_decides_and_then_the_builtin(monkeypatch):
    assert sources.resolve_specs(()) == ("builtin",)
    monkeypatch.setenv("DATA_PATH", "a/*.txt builtin@2")
    assert sources.resolve_specs(()) == ("a/*.txt", "builtin@2")
    assert sources.resolve_specs(("given",)) == ("given",)


def test_a_data_set_of_other_files_is_streamed_by_its_presets_column_and_says_how_far_it_came(monkeypatch):
    def rows(*_, **__):
        yield {"story": "从前有座山"}
        raise TimeoutError("read\ntimed out")

    monkeypatch.setattr("nanozhchat.hub.DataSet.listing", lambda _: {"revision": "c", "files": ["chinese/a.arrow"]})
    monkeypatch.setattr("datasets.load_dataset", rows)
    docs = sources._texts(sources.parse("tinystories-zh-multilingual"), None, ReadStats(), False, {}, None)
    assert next(docs) == "从前有座山"
    refused("after 1 rows", next, docs, error=DiskError)


def test_a_file_in_another_encoding_is_named_with_the_command_for_it_and_a_stray_line_is_not(tmp_path, caplog):
    pack(tmp_path / "stray.txt", "好\n\n好\n".encode() + "坏\n".encode("gbk"))
    assert read(tmp_path) == ["好\n\n好"]
    assert caplog.text == ""
    pack(tmp_path / "gbk.txt", "第一章\n\n1\n".encode("gbk") + "从前\n".encode("gbk") * 20)
    read(tmp_path)
    assert re.findall(r"(\w+)\.txt: (\d+) lines left out.*iconv -f GB18030 -t UTF-8", caplog.text) == [("gbk", "21")]


NUMBERS = [f"{i * 7919}" for i in range(100_000)]
BAD = {  # kind -> (file, content, what is counted with --skip-bad, the error without it)
    "truncated gz": ("b.jsonl.gz", NUMBERS, {"broken line": 1, "damaged file": 1}, DamagedError),
    "truncated zst": ("b.jsonl.zst", NUMBERS, {"broken line": 1, "damaged file": 1}, DamagedError),
    "truncated array": ("b.json", json.dumps([{"text": t} for t in TEXTS])[:-20], {"damaged file": 1}, DamagedError),
    "broken JSON line": ("b.jsonl", b'{"text": "x"}\n\n{"text": "to\n', {"broken line": 1}, DamagedError),
    "wrong encoding": ("b.jsonl", '{"text": "中文"}\n'.encode("gbk"), {"not UTF-8": 1}, None),
    "wrong encoding of plain text": ("b.txt", "中文\n".encode("gb18030"), {"not UTF-8": 1}, None),
    "null text": ("b.jsonl", b'{"text": null}\n', {"null": 1}, None),
    "missing column": ("b.parquet", {"story": ["x"]}, {"file without the field": 1}, ValueError),
    "missing key": ("b.jsonl", b'{"story": "x"}\n', {"file without the field": 1}, ValueError),
    "zero rows": ("b.parquet", {"text": pa.array([], pa.string())}, {"empty file": 1}, None),
    "empty file": ("b.json.gz", b"", {"empty file": 1}, None),
    "no parquet at all": ("b.parquet", b"<html>", {"damaged file": 1}, DamagedError),
    "50 MB document": ("b.jsonl", b'{"text": "' + b"x" * 50_000_000 + b'"}\n', {"too long": 1}, None),
    "50 MB row": ("b.parquet", {"text": ["x" * 50_000_000]}, {"too long": 1}, None),
}


@pytest.mark.parametrize("kind", BAD)
def test_every_kind_of_bad_shard_has_its_treatment_and_is_counted(tmp_path, kind):
    name, content, counted, error = BAD[kind]
    path, good = tmp_path / "in" / name, write_jsonl(tmp_path / "in" / "a.jsonl", TEXTS)
    if isinstance(content, list):
        cut(write_jsonl(path, content), 20_000)
    else:
        write_parquet(path, content) if isinstance(content, dict) else pack(path, content)
    if error:
        line = ":3 " if kind == "broken JSON line" else ""
        with pytest.raises(error, match=rf"b\..*{line}.*({'--text-field' if error is ValueError else '--skip-bad'})"):
            read(good.parent)
    stats = ReadStats()
    found = read(good.parent, stats=stats, skip_bad=error is not None)
    assert set(found) >= set(TEXTS)
    if isinstance(content, list):  # what came before the cut is kept
        assert (len(found) > 1000, sum(stats.skipped.values()) >= 1) == (True, True)
    else:
        assert stats.skipped == counted
