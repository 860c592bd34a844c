"""Places: one base directory, and names that cannot leave it."""

import os
from pathlib import Path

import pytest

from nanozhchat import paths
from scripts import ckpt
from tests.conftest import pack, refused


@pytest.mark.parametrize(
    ("value", "want"), [("", "~/.cache/nanozhchat"), (None, "~/.cache/nanozhchat"), ("~/else", "~/else")]
)
def test_the_base_directory_is_the_environments_or_the_cache(value, want, base_dir, monkeypatch):
    assert paths.base_dir() == base_dir
    monkeypatch.delenv("NANOZHCHAT_BASE_DIR")
    if value is not None:
        monkeypatch.setenv("NANOZHCHAT_BASE_DIR", value)
    assert paths.base_dir() == Path(want).expanduser().resolve()


def test_every_kind_of_result_has_its_documented_place_which_asking_does_not_create(base_dir):
    assert paths.corpus_dir("web") == base_dir / "corpus" / "web"
    assert paths.tokens_dir("web", "0123456789abcdef") == base_dir / "tokens" / "web-0123456789ab"
    assert paths.tokenizer_dir("t") == base_dir / "tokenizer" / "t"
    assert paths.run_dir("sft", "d4") == base_dir / "sft" / "d4"
    assert paths.report_dir("d4") == base_dir / "report" / "d4"
    assert not base_dir.exists()
    refused("'pre' is unknown; stages are base, sft, rl", paths.run_dir, "pre", "d4")
    assert all(paths.check_tag(tag) == tag for tag in ("d4", "A", "9", "d4_x-1.2", "a" * 64))


@pytest.mark.parametrize(
    "tag", ["", ".", "..", "a..b", ".hidden", "-x", "a/b", "../a", "a\\b", "a b", "d4\n", "模型", "a" * 65, "a\0"]
)
def test_names_that_could_leave_the_base_directory_are_refused_by_every_place(tag):
    for place in (paths.corpus_dir, paths.tokenizer_dir, paths.report_dir, lambda t: paths.run_dir("base", t)):
        refused("is not valid", place, tag)


def test_the_model_meant_without_a_tag_is_the_last_of_the_wanted_stages_if_they_have_any(base_dir):
    for age, folder in enumerate(("sft/talks", "base/grows")):
        os.utime(pack(base_dir / folder / "latest.json", ""), (age, age))
    found = [paths.latest_tag("latest.json", stages) for stages in (paths.STAGES, ("sft", "rl"), ("rl",))]
    assert found == ["grows", "talks", "grows"]


def test_a_model_tag_that_no_run_has_is_not_verified(base_dir):
    refused("no run of model tag 'typo'", ckpt.main, ["verify", "--model-tag=typo"], error=FileNotFoundError)
