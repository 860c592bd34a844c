"""Command lines from dataclasses: flags, configuration files, errors and exit codes."""

import os
import sys
from dataclasses import dataclass
from unittest.mock import Mock

import pytest

from nanozhchat import cli, errors
from tests.conftest import pack, program, refused


@dataclass(frozen=True, kw_only=True)
class Args:
    depth: int = cli.opt(4, "layers", group="model")
    rate: float | None = cli.opt(None, "learning rate, 100% yours", group="model")
    model_tag: str | None = cli.opt(None, "name")
    data: tuple[str, ...] = cli.opt((), "specs")
    sizes: tuple[int, ...] = cli.opt((1,), "several numbers", least=1)
    resume: bool = cli.opt(True, "continue", neutral=True)
    stage: str = cli.opt("base", "stage", choices=("base", "sft"))
    prompt: str = cli.opt("", "question", flag="-p")


def parse(*argv):
    return cli.parse(Args, argv, "prog")


def stopped(*argv):
    return refused(None, parse, *argv, error=SystemExit).code


def config_file(tmp_path, text):
    return f"--config={pack(tmp_path / 'config.yaml', text)}"


def test_every_field_is_a_flag_of_its_type():
    given = "--depth=8 --rate=1e-3 --model-tag=d8 --data a b@2 --sizes 3 4 --no-resume --stage=sft -p 你好"
    want = {"depth": 8, "rate": 1e-3, "model_tag": "d8", "data": ("a", "b@2"), "sizes": (3, 4), "resume": False}
    assert parse(*given.split()) == Args(**want, stage="sft", prompt="你好")
    assert parse() == Args()
    assert parse("--", "--depth=8") == Args(depth=8)  # torchrun leaves the separator in place
    assert cli.result_flags(Args(depth=8, resume=False, stage="base")) == {"depth": 8}  # those that change the result


def test_help_shows_every_flag_with_its_default_and_group(capsys):
    assert stopped("--help") == 0
    pieces = ("model:", "--depth", "(default: 4)", "100% yours (default: none)", "--no-resume", "{base,sft}", "-p")
    text = capsys.readouterr().out
    assert [piece for piece in pieces if piece not in text] == []


@pytest.mark.parametrize("flags", [
    ["--bogus=1"], ["--dept=3"], ["--depth=x"], ["--rate=fast"], ["--stage=rl"], ["--data"], ["--sizes", "a"], ["x"],
])  # fmt: skip
def test_a_bad_flag_exits_with_2_and_one_line_also_in_a_dry_run_which_stops_after_good_ones(flags, capsys, monkeypatch):
    for check in ("", "1"):
        monkeypatch.setenv("NANOZHCHAT_CHECK_FLAGS", check)
        assert stopped(*flags) == 2
        message = capsys.readouterr().err
        assert (message[:7], message.count("\n")) == ("error: ", 1)
    assert stopped("--depth=8") == 0


@pytest.mark.parametrize(("flag", "want"), [("--dept=3", "--depth"), ("--model_tag=x", "--model-tag"), ("--zzz", None)])
def test_a_slip_in_a_flag_is_answered_with_the_flag_that_was_meant(flag, want, capsys):
    assert stopped(flag) == 2
    hint = f"; did you mean {want}?" if want else ""
    assert capsys.readouterr().err == f"error: unrecognized arguments: {flag}{hint}; see `prog --help`\n"


def test_a_whole_number_below_its_least_is_refused_by_name():
    refused("--depth=-1 must be at least 0", parse, "--depth=-1")
    refused(r"--sizes=\(3, 0\) must be at least 1", parse, "--sizes", "3", "0")


@pytest.mark.parametrize(("text", "want"), [
    ("# nothing\n", {}), ("model_tag: 12\n", {"model_tag": "12"}), ("depth: 8\nresume: false\n", {}),
    ("model-tag: x\ndata: [a, b]\nsizes: 5\n", {"model_tag": "x", "data": ("a", "b"), "sizes": (5,)}),
    *((f"rate: {value}\n", {"rate": 1e18}) for value in ("1e18", "1.0e+18", "1e+18", 10**18)),
])  # fmt: skip
def test_a_config_file_sets_values_in_any_common_notation_and_the_command_line_wins(tmp_path, text, want):
    args = parse(config_file(tmp_path, text), "--depth=9", "--resume")
    assert repr(args) == repr(Args(depth=9, resume=True, **want))  # types too: a rate is a float


@pytest.mark.parametrize(
    ("text", "named"),
    [*((f"{key}: {value}\n", key) for key, values in {
        "bogus": ["1"], "depth": ["eight", "4.5", "true", "null"], "rate": ["fast", "false"], "resume": ["1"],
        "sizes": ["[1, x]"], "model_tag": ["[a, b]", "{a: b}"], "stage": ["rl"],
    }.items() for value in values), ("- a list\n", "flag: value"), ("depth: [1\n", "config")],
)  # fmt: skip
def test_a_bad_config_file_is_an_error_that_names_the_key(tmp_path, text, named):
    assert named in str(refused("--config=", parse, config_file(tmp_path, text)))
    refused("absent.yaml", parse, "--config=absent.yaml")


def test_a_written_config_reads_back_as_the_same_arguments(tmp_path):
    args = Args(
        depth=7, rate=3e20, model_tag='引号"与: #冒号', data=("a", "中文@2"), sizes=(), resume=False, prompt="\n"
    )
    cli.write_config(tmp_path / "out.yaml", args)
    assert "# layers\ndepth: 7\n" in (tmp_path / "out.yaml").read_text(encoding="utf-8")
    assert parse(f"--config={tmp_path / 'out.yaml'}") == args


def fail_with(error, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["prog", *flags])
    return refused(None, cli.run, Mock(side_effect=error), error=SystemExit).code


@pytest.mark.parametrize(("error", "code"), [
    (ValueError("the file is odd:\n  line 3\n  line 4"), 2), (FileNotFoundError("no model"), 2),
    (errors.DivergedError("diverged"), 3), (errors.OutOfMemoryError("memory"), 4), (MemoryError(), 4),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 4), (errors.DamagedError("torn"), 5),
    (errors.DiskError("full"), 6), (OSError(28, "No space left on device", "some/file"), 6),
    (errors.LockedError("locked"), 7), (errors.StoppedError("stopped"), 143), (KeyboardInterrupt(), 130),
])  # fmt: skip
def test_a_user_error_is_one_line_on_stderr_and_its_exit_code(error, code, monkeypatch, capsys):
    assert fail_with(error, monkeypatch) == code
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines()), "Traceback" in err) == ("", 1, False)
    assert err.startswith("error: ") == (code not in (130, 143))


def test_what_the_system_says_of_a_path_is_said_of_the_path(monkeypatch, capsys):
    assert fail_with(FileNotFoundError(2, "No such file or directory", "nix.json"), monkeypatch) == 2
    assert capsys.readouterr().err == "error: nix.json: no such file or directory; check the path\n"


def test_debug_shows_the_traceback_and_a_fault_of_ours_is_not_dressed_up_as_a_user_error(monkeypatch, capsys):
    assert fail_with(ValueError("bad"), monkeypatch, "--debug") == 2
    assert "Traceback" in capsys.readouterr().err
    refused(None, lambda: fail_with(TypeError("a bug"), monkeypatch), error=TypeError)


def test_dotenv_is_read_but_does_not_override_the_environment(tmp_path, monkeypatch):
    pack(tmp_path / ".env", "NZ_TEST_NEW=file\nNZ_TEST_SET=file\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {**os.environ, "NZ_TEST_SET": "shell"})
    cli.load_dotenv()
    assert (os.environ["NZ_TEST_NEW"], os.environ["NZ_TEST_SET"]) == ("file", "shell")


def test_a_closed_pipe_ends_quietly():
    code = "from nanozhchat import cli\ncli.run(lambda: [print('x' * 1000) for _ in range(10000)] and None)"
    shell = ["bash", "-c", f'"{sys.executable}" -c "$CODE" | head -n 1 >/dev/null']
    assert program(shell, env={**os.environ, "CODE": code}).stderr == ""
