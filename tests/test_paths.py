"""Places: one base directory, and names that cannot leave it."""

from pathlib import Path

import pytest

from nanozhchat import paths


def test_the_base_directory_is_the_environments_or_the_cache(base_dir, monkeypatch):
    assert paths.base_dir() == base_dir
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("NANOZHCHAT_BASE_DIR")
        else:
            monkeypatch.setenv("NANOZHCHAT_BASE_DIR", unset)
        assert paths.base_dir() == (Path.home() / ".cache" / "nanozhchat").resolve()


def test_a_home_sign_in_the_base_directory_is_expanded(monkeypatch):
    monkeypatch.setenv("NANOZHCHAT_BASE_DIR", "~/somewhere")
    assert paths.base_dir() == (Path.home() / "somewhere").resolve()


def test_every_kind_of_result_has_its_documented_place(base_dir):
    assert paths.corpus_dir("web") == base_dir / "corpus" / "web"
    assert paths.tokens_dir("web", "0123456789abcdef") == base_dir / "tokens" / "web-0123456789ab"
    assert paths.tokenizer_dir("t") == base_dir / "tokenizer" / "t"
    assert paths.run_dir("sft", "d4") == base_dir / "sft" / "d4"
    assert paths.report_dir("d4") == base_dir / "report" / "d4"


def test_asking_for_a_place_creates_nothing(base_dir):
    paths.run_dir("base", "d4")
    assert not base_dir.exists()


@pytest.mark.parametrize("tag", ["d4", "A", "9", "d4_x-1.2", "a" * 64])
def test_ordinary_names_are_accepted(tag):
    assert paths.check_tag(tag) == tag


@pytest.mark.parametrize(
    "tag", ["", ".", "..", "a..b", ".hidden", "-x", "a/b", "../a", "a\\b", "a b", "d4\n", "模型", "a" * 65, "a\0"]
)
def test_names_that_could_leave_the_base_directory_are_refused_by_every_place(tag):
    for place in (paths.corpus_dir, paths.tokenizer_dir, paths.report_dir, lambda t: paths.run_dir("base", t)):
        with pytest.raises(ValueError, match="is not valid"):
            place(tag)


def test_an_unknown_stage_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'pre' is unknown; stages are base, sft, rl"):
        paths.run_dir("pre", "d4")
