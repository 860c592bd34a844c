"""Data sources: every kind of file, the spec grammar, mixing, the split, and what happens to bad input."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from nanozhchat import records, sources
from nanozhchat.errors import DamagedError, DiskError
from nanozhchat.presets import PRESETS
from nanozhchat.records import ReadStats

TEXTS = [f"第{i}篇:今天天气很好。" for i in range(5)]


def pack(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


def lines(rows: list[object]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    return pack(path, lines([{field: text, "url": "x"} for text in texts]))


def write_parquet(path: Path, columns: dict[str, list[object]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


def read(*specs: object, **options: object) -> list[str]:
    return list(sources.read([str(spec) for spec in specs], **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_json_lines_give_their_documents_in_order_however_packed(tmp_path: Path, ending: str) -> None:
    assert sorted(read(write_jsonl(tmp_path / f"a.jsonl{ending}", TEXTS))) == TEXTS


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("array", [True, False])
def test_json_files_hold_lines_or_one_array(tmp_path: Path, ending: str, array: bool) -> None:
    rows: list[object] = [{"text": text} for text in TEXTS]
    data = json.dumps(rows, indent=2).encode() if array else lines(rows)
    assert sorted(read(pack(tmp_path / f"a.json{ending}", data))) == TEXTS


def test_an_array_larger_than_the_read_buffer_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "READ_BYTES", 7)
    texts = [f"长{i}" * 40 for i in range(30)]
    path = pack(tmp_path / "a.json", json.dumps([{"text": t} for t in texts]).encode())
    assert sorted(read(path)) == sorted(texts)


def test_a_parquet_file_gives_its_text_column(tmp_path: Path) -> None:
    assert sorted(read(write_parquet(tmp_path / "a.parquet", {"id": list(range(5)), "text": [*TEXTS]}))) == TEXTS


def test_several_zstandard_frames_in_one_file_are_read_as_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(lines([{"text": "一"}])) + zstandard.compress(lines([{"text": "二"}])))
    assert sorted(read(path)) == ["一", "二"]


def test_a_directory_gives_all_its_supported_files_and_only_those(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b" / "2.jsonl", ["二"])
    write_jsonl(tmp_path / "a" / "1.jsonl.gz", ["一"])
    (tmp_path / "README.md").write_text("not data", encoding="utf-8")
    write_jsonl(tmp_path / ".hidden" / "3.jsonl", ["三"])
    assert [p.name for p in records.expand(str(tmp_path))] == ["1.jsonl.gz", "2.jsonl"]


def test_a_glob_reaches_into_folders_and_is_sorted(tmp_path: Path) -> None:
    for name in ("c.jsonl", "x/b.jsonl", "x/y/a.jsonl", "x/y/a.csv"):
        write_jsonl(tmp_path / name, [name])
    found = [p.relative_to(tmp_path).as_posix() for p in records.expand(str(tmp_path / "**" / "*.jsonl"))]
    assert found == ["c.jsonl", "x/b.jsonl", "x/y/a.jsonl"]


@pytest.mark.parametrize("name", ["none.jsonl", "none/*.jsonl", "."])
def test_a_path_that_matches_nothing_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=str(tmp_path)):
        read(tmp_path / name)


def test_a_file_of_another_kind_is_an_error_that_lists_the_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(ValueError, match="parquet"):
        read(tmp_path / "a.pdf")


def test_short_paragraphs_of_plain_text_are_joined_and_chapters_kept_apart(tmp_path: Path) -> None:
    chapters = [f"第{i}回\n" + "话说天下大势。" * 200 for i in range(3)]
    short = "\n\n".join("短句。" * 10 for _ in range(3))
    path = tmp_path / "a.txt"
    path.write_bytes(("\n\n".join([*chapters, short]) + "\n").replace("\n", "\r\n").encode("utf-8-sig"))
    assert [row.value for row in records.read_file(path, stats=ReadStats())] == [*chapters, short]


def test_plain_text_without_blank_lines_is_cut_into_several_documents(tmp_path: Path) -> None:
    text = "\n".join(f"{i}:一行没有空行的文字" for i in range(20_000))
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    blocks = [row.value for row in records.read_file(path, stats=ReadStats())]
    assert len(blocks) > 1
    assert "\n".join(blocks) == text


def test_the_field_is_text_else_content_else_the_one_asked_for(tmp_path: Path) -> None:
    assert read(write_jsonl(tmp_path / "a.jsonl", ["一"], "content")) == ["一"]
    assert read(write_jsonl(tmp_path / "b.jsonl", ["二"], "story"), text_field="story") == ["二"]


@pytest.mark.parametrize("text_field", [None, "body"])
def test_a_missing_field_is_an_error_that_lists_the_fields_found(tmp_path: Path, text_field: str | None) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl:1 .*story, url.*--text-field"):
        read(write_jsonl(tmp_path / "a.jsonl", ["一"], "story"), text_field=text_field)
    with pytest.raises(ValueError, match="fields found: story"):
        read(write_parquet(tmp_path / "a.parquet", {"story": ["一"]}), text_field=text_field)


def test_bad_documents_are_skipped_and_counted_by_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 100)
    rows: list[object] = [{"text": t} for t in (None, "", " \n", 3, "\ud800", "长" * 50, "好")] + [{"id": 1}]
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows) + b'{"text": "\xff\xfe"}\n'
    stats = ReadStats()
    path = pack(tmp_path / "a.jsonl", b'{"text": "first"}\n' + data)
    assert sorted(read(path, stats=stats)) == ["first", "好"]
    assert stats.skipped == {"null": 2, "empty": 2, "not a string": 1, "not UTF-8": 2, "too long": 1}


def test_a_line_beyond_the_limit_is_skipped_without_reading_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 64)
    stats = ReadStats()
    path = write_jsonl(tmp_path / "a.jsonl", ["前", "长" * 100, "后"])
    assert sorted(read(path, stats=stats)) == sorted(["前", "后"])
    assert stats.skipped == {"too long": 1}


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_truncated_archive_is_damage_that_names_the_file(tmp_path: Path, ending: str) -> None:
    path = write_jsonl(tmp_path / f"a.jsonl{ending}", [f"{i * i}" * 50 for i in range(500)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DamagedError, match=rf"a\.jsonl{ending} is damaged \(not a whole"):
        read(path)


def test_a_truncated_archive_gives_what_came_before_when_told_to_skip(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl.gz", [f"{i * 7919}" for i in range(100_000)])
    path.write_bytes(path.read_bytes()[:-20_000])
    stats = ReadStats()
    assert len(read(path, stats=stats, skip_bad=True)) > 1000
    assert stats.skipped["damaged file"] + stats.skipped["broken line"] >= 1


def test_a_broken_line_is_damage_with_its_number_unless_told_to_skip(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.jsonl", lines([{"text": "一"}]) + b'\n{"text": "tor\n' + lines([{"text": "二"}]))
    with pytest.raises(DamagedError, match=r"a\.jsonl:3 "):
        read(path)
    assert sorted(read(path, skip_bad=True)) == ["一", "二"]


def test_a_torn_array_is_damage(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match=r"a\.json"):
        read(pack(tmp_path / "a.json", b'[{"text": "x"}, {"text": "y"'))


def test_a_torn_parquet_file_is_damage(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": TEXTS})
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DamagedError, match=r"a\.parquet"):
        read(path)


def test_weights_are_read_only_after_a_number_and_must_be_positive(tmp_path: Path) -> None:
    assert (sources.parse("a/b@2.5").name, sources.parse("a/b@2.5").weight) == ("a/b", 2.5)
    assert (sources.parse("me@home").name, sources.parse("me@home").weight) == ("me@home", None)
    for spec in ("a@0", "a@-1", "a@1e999"):
        with pytest.raises(ValueError, match="above 0"):
            sources.parse(spec)
    folder = tmp_path / "v@2"
    folder.mkdir()
    assert sources.parse(str(folder)).weight is None


def test_hub_specs_name_data_set_configuration_and_split() -> None:
    source = sources.parse("hf:a/b:zh:test@3")
    assert (source.kind, source.name, source.config, source.split, source.weight) == ("hub", "a/b", "zh", "test", 3.0)
    assert sources.parse("hf:a/b").split == "train"
    with pytest.raises(ValueError, match="hf:<dataset>"):
        sources.parse("hf:a:b:c:d")


def test_every_preset_is_a_spec_and_states_its_facts() -> None:
    for name, preset in PRESETS.items():
        assert sources.parse(name).name == preset.hub_id
        assert preset.columns
        assert preset.size
        assert preset.licence
        assert not preset.verified


def test_weights_hold_by_bytes_until_one_source_ends(tmp_path: Path) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", [f"a{i:03}" + "x" * (i % 50) for i in range(900)])
    b = write_jsonl(tmp_path / "b.jsonl", [f"b{i:04}" for i in range(9000)])
    texts = read(f"{a}@3", f"{b}@1")
    size = {name: sum(len(t) for t in texts if t[0] == name) for name in "ab"}
    assert size["a"] / size["b"] == pytest.approx(3, rel=0.02)
    assert sum(t[0] == "a" for t in texts) == 900


def test_without_weights_every_document_of_every_source_is_read(tmp_path: Path) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", [f"a{i}" for i in range(10)])
    b = write_jsonl(tmp_path / "b.jsonl", [f"b{i}" for i in range(300)])
    assert len(read(a, b)) == 310


def test_mixing_is_deterministic(tmp_path: Path) -> None:
    specs = [write_jsonl(tmp_path / f"{n}.jsonl", [f"{n}{i}" * (i % 5 + 1) for i in range(50)]) for n in "abc"]
    assert read(*specs) == read(*specs)


def test_train_and_val_are_disjoint_and_together_everything(tmp_path: Path) -> None:
    texts = [f"文档{i}" for i in range(3000)]
    path = str(write_jsonl(tmp_path / "a.jsonl", texts))
    train, val = (list(sources.documents([path], split)) for split in sources.SPLITS)
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(texts)
    assert 10 <= len(val) <= 60  # 1 % of 3,000, give or take four deviations


def test_the_split_depends_on_nothing_but_the_content(tmp_path: Path) -> None:
    texts = [f"文档{i}" for i in range(2000)]
    path = str(write_jsonl(tmp_path / "other_name.json.gz", texts[::-1]))
    assert set(sources.documents([path], "val")) == {text for text in texts if sources.is_validation(text)}


@given(st.lists(st.text(min_size=1, max_size=8).filter(str.strip), max_size=12))
@settings(deadline=None)
def test_two_different_documents_give_two_splits_without_a_shared_document(texts: list[str]) -> None:
    texts = [t for t in texts if t.isprintable()]
    stats = ReadStats()
    docs = list(sources.balance(sources._checked(iter(texts), stats)))
    splits = {s: {d.text for d in docs if d.split == s} for s in sources.SPLITS}
    assert sorted(d.text for d in docs) == sorted(texts)
    assert not splits["train"] & splits["val"]
    assert (len(set(texts)) < 2) or (splits["train"] and splits["val"])


def test_if_no_document_would_be_val_the_one_with_the_smallest_hash_is() -> None:
    texts = [t for t in (f"篇{i}" for i in range(40)) if not sources.is_validation(t)]
    docs = list(sources.balance(sources._checked(iter(texts), ReadStats())))
    smallest = min(texts, key=lambda t: sources.content_key(t.encode()))
    assert [d.text for d in docs if d.split == "val"] == [smallest]


def test_a_limit_in_bytes_is_kept_but_one_document_always_comes(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", [f"{i:010}" for i in range(1000)]))
    assert len(list(sources.documents([path], "train", max_bytes=95))) == 9
    assert len(list(sources.documents([path], "train", max_bytes=1))) == 1


def test_without_specs_the_environment_decides_and_then_the_builtin(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sources.resolve_specs(()) == ("builtin",)
    monkeypatch.setenv("DATA_PATH", "a/*.txt builtin@2")
    assert sources.resolve_specs(()) == ("a/*.txt", "builtin@2")
    assert sources.resolve_specs(("given",)) == ("given",)


def test_builtin_text_differs_between_the_splits() -> None:
    train, val = (set(itertools.islice(sources.documents(["builtin"], s), 300)) for s in sources.SPLITS)
    assert len(train) > 100
    assert not train & val


def test_an_unknown_part_of_the_builtin_data_is_an_error_that_lists_the_parts() -> None:
    with pytest.raises(ValueError, match="there are: "):
        next(sources.read(["builtin:nonsense"]))


def test_an_offline_hub_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.load_dataset", fail_with(ConnectionError("first\nsecond")))
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set") as caught:
        read("hf:a/b")
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_is_an_input_output_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fail_with(OSError("no route\nto host")))
    with pytest.raises(DiskError, match="HF_ENDPOINT") as caught:
        read("hf:a/b")
    assert "\n" not in str(caught.value)


def test_a_connection_lost_while_reading_tells_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(*_: object, **__: object) -> object:
        yield {"text": "一"}
        raise TimeoutError("read timed out")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    monkeypatch.setattr("datasets.load_dataset", rows)
    with pytest.raises(DiskError, match="after 1 rows"):
        read("hf:a/b")


def test_a_preset_reads_its_own_column_and_file(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def load(*args: object, **options: object) -> list[dict[str, str]]:
        asked.update(options, args=args)
        return [{"story": "从前有座山"}]

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    monkeypatch.setattr("datasets.load_dataset", load)
    assert read("tinystories-zh-multilingual") == ["从前有座山"]
    assert asked["args"] == ("Gabrui/multilingual_TinyStories", "chinese")
    assert asked["streaming"] is True


def fail_with(error: Exception) -> object:
    def call(*_: object, **__: object) -> None:
        raise error

    return call
