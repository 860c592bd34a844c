"""Command lines from dataclasses: flags, configuration files, errors and exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nanozhchat import cli, errors
from tests.conftest import ROOT


@dataclass(frozen=True, kw_only=True)
class Args:
    """One field of every kind."""

    depth: int = cli.opt(4, "layers", group="model")
    rate: float | None = cli.opt(None, "learning rate, 100% yours", group="model")
    model_tag: str | None = cli.opt(None, "name")
    data: tuple[str, ...] = cli.opt((), "specs")
    sizes: tuple[int, ...] = cli.opt((1,), "several numbers")
    resume: bool = cli.opt(True, "continue", neutral=True)
    stage: str = cli.opt("base", "stage", choices=("base", "sft"))
    prompt: str = cli.opt("", "question", flag="-p")


def parse(*argv: str) -> Args:
    return cli.parse(Args, argv, "A test.", "prog")


def config_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return f"--config={path}"


def test_every_field_is_a_flag_of_its_type() -> None:
    args = parse("--depth=8", "--rate=1e-3", "--model-tag=d8", "--data", "a", "b@2", "--sizes", "3", "4",
                 "--no-resume", "--stage=sft", "-p", "你好")  # fmt: skip
    want = Args(depth=8, rate=1e-3, model_tag="d8", data=("a", "b@2"), sizes=(3, 4), resume=False, stage="sft",
                prompt="你好")  # fmt: skip
    assert args == want


def test_no_flags_give_the_defaults() -> None:
    assert parse() == Args()


def test_help_shows_every_flag_with_its_default_and_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for piece in ("model:", "--depth", "(default: 4)", "100% yours (default: none)", "--no-resume", "{base,sft}", "-p"):
        assert piece in text


@pytest.mark.parametrize(
    "flags",
    [["--bogus=1"], ["--dept=3"], ["--depth=x"], ["--rate=fast"], ["--stage=rl"], ["--data"], ["--sizes", "a"], ["x"]],
)
def test_a_bad_flag_exits_with_2_and_one_line_besides_the_usage(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(*flags)
    assert stop.value.code == 2
    usage, _, message = capsys.readouterr().err.partition("prog: error: ")
    assert usage.startswith("usage: prog")
    assert len(message.strip().splitlines()) == 1


def test_separator_left_by_torchrun_is_ignored() -> None:
    assert parse("--", "--depth=8") == Args(depth=8)


def test_config_file_sets_values_and_the_command_line_wins(tmp_path: Path) -> None:
    config = config_file(tmp_path, "depth: 8\nmodel-tag: from_file\nresume: false\ndata: [a, b]\nsizes: 5\nrate: 1\n")
    args = parse(config, "--depth=9", "--resume")
    assert args == Args(depth=9, model_tag="from_file", resume=True, data=("a", "b"), sizes=(5,), rate=1.0)
    assert isinstance(args.rate, float)


def test_an_empty_config_file_changes_nothing(tmp_path: Path) -> None:
    assert parse(config_file(tmp_path, "# nothing\n")) == Args()


def test_a_number_serves_where_text_is_wanted(tmp_path: Path) -> None:
    assert parse(config_file(tmp_path, "model_tag: 12\n")).model_tag == "12"


@pytest.mark.parametrize("value", ["1e18", "1.0e+18", "1e+18", "1000000000000000000"])
def test_a_float_in_any_common_notation_is_read_from_a_config_file(tmp_path: Path, value: str) -> None:
    assert parse(config_file(tmp_path, f"rate: {value}\n")).rate == 1e18


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("bogus: 1\n", "bogus"),
        ("depth: eight\n", "depth"),
        ("depth: 4.5\n", "depth"),
        ("depth: true\n", "depth"),
        ("depth: null\n", "depth"),
        ("rate: fast\n", "rate"),
        ("rate: false\n", "rate"),
        ("resume: 1\n", "resume"),
        ("sizes: [1, x]\n", "sizes"),
        ("model_tag: [a, b]\n", "model_tag"),
        ("model_tag: {a: b}\n", "model_tag"),
        ("stage: rl\n", "stage"),
        ("- a list\n", "flag: value"),
        ("depth: [1\n", "config"),
    ],
)
def test_a_bad_config_file_is_an_error_that_names_the_key(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ValueError, match="--config=") as error:
        parse(config_file(tmp_path, text))
    assert named in str(error.value)


def test_a_missing_config_file_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="absent.yaml"):
        parse("--config=absent.yaml")


def test_a_written_config_reads_back_as_the_same_arguments(tmp_path: Path) -> None:
    tag = '引号"与: #冒号'
    args = Args(depth=7, rate=3e20, model_tag=tag, data=("a", "中文@2"), sizes=(), resume=False, prompt="\n")
    cli.write_config(tmp_path / "out.yaml", args)
    text = (tmp_path / "out.yaml").read_text(encoding="utf-8")
    assert "# layers\ndepth: 7\n" in text
    assert parse(f"--config={tmp_path / 'out.yaml'}") == args


def test_result_flags_are_those_given_that_change_the_result() -> None:
    assert cli.result_flags(Args(depth=8, resume=False, stage="base")) == {"depth": 8}


def test_a_dry_run_stops_after_good_flags_and_still_refuses_bad_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOZHCHAT_CHECK_FLAGS", "1")
    with pytest.raises(SystemExit) as good:
        parse("--depth=8")
    with pytest.raises(SystemExit) as bad:
        parse("--depth=x")
    assert (good.value.code, bad.value.code) == (0, 2)


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch, *flags: str) -> Any:
    def main() -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["prog", *flags])
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    return stop.value.code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("bad"), 2),
        (FileNotFoundError("no model"), 2),
        (errors.DivergedError("diverged"), 3),
        (errors.OutOfMemoryError("memory"), 4),
        (errors.DamagedError("torn"), 5),
        (errors.DiskError("full"), 6),
        (OSError(28, "No space left on device", "some/file"), 6),
        (errors.LockedError("locked"), 7),
        (errors.StoppedError("stopped"), 143),
        (KeyboardInterrupt(), 130),
    ],
)
def test_a_user_error_is_one_line_on_stderr_and_its_exit_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail_with(error, monkeypatch) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err


def test_an_error_of_several_lines_is_still_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(ValueError("the file is odd:\n  line 3\n  line 4"), monkeypatch)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert fail_with(ValueError("bad"), monkeypatch, "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_fault_of_ours_is_not_dressed_up_as_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(sys, "argv", ["prog"])
    with pytest.raises(TypeError):
        cli.run(main)


def test_dotenv_is_read_but_does_not_override_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("NZ_TEST_NEW=file\nNZ_TEST_SET=file\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NZ_TEST_NEW", "")
    monkeypatch.delenv("NZ_TEST_NEW")
    monkeypatch.setenv("NZ_TEST_SET", "shell")
    cli.load_dotenv()
    assert (os.environ["NZ_TEST_NEW"], os.environ["NZ_TEST_SET"]) == ("file", "shell")


def test_a_closed_pipe_ends_quietly() -> None:
    code = "from nanozhchat import cli\ncli.run(lambda: [print('x' * 1000) for _ in range(10000)] and None)"
    shell = f'"{sys.executable}" -c "$CODE" | head -n 1 >/dev/null'
    done = subprocess.run(
        ["bash", "-c", shell], cwd=ROOT, env={**os.environ, "CODE": code}, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
