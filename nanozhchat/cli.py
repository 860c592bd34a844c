"""Command lines from dataclasses: a field is a flag, its metadata the help, its annotation the type.

    @dataclass(frozen=True, kw_only=True)
    class Args:
        depth: str = opt("auto", "layers, or auto", group="model")

    args = parse(Args, argv)

A value comes from the flag, else from `--config FILE.yaml`, else from the default. Unknown flags, unknown keys in
the file and values of the wrong type are errors with exit code 2.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import importlib
import json
import logging
import os
import re
import shlex
import signal
import sys
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from nanozhchat.errors import OutOfMemoryError, RunError, StoppedError
from nanozhchat.files import atomic_write, disk_error, write_json
from nanozhchat.paths import STAGES, check_tag
from nanozhchat.schedule import parse_duration

NO_MEMORY = re.compile("can't allocate memory|out of memory")  # in what torch raises on a CPU, and on a GPU
T = TypeVar("T")
HORIZON = "horizon (one of them)"  # the group of flags that set the length of a run


def opt(
    default: Any, help: str, *, group: str = "options", choices: Sequence[Any] | None = None, flag: str = "",
    neutral: bool = False, least: int = 0,
) -> Any:  # fmt: skip
    """Declare a flag as a dataclass field; whole numbers below `least` are refused.

    flag: its name when a Python field can't have it, such as `-p`. neutral: it does not change what is computed, so a
    rerun with another value may continue the same run.
    """
    metadata = {"help": help, "group": group, "choices": choices, "flag": flag, "neutral": neutral, "least": least}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Flags of scripts that run a model."""

    model_tag: str | None = opt(None, "name of the model, or folder of scripts.export; none = latest", group="model")
    source: str | None = opt(None, "stage; none = the furthest there is", group="model", choices=STAGES)
    step: int | None = opt(None, "checkpoint of that stage; none = the newest", group="model")
    device_type: str = opt("auto", "cuda, xpu, mps or cpu", group="machine")
    dtype: str = opt("auto", "float32, bfloat16, float16, or int8 for decoding", group="machine")
    engine: str = opt("auto", "native = for CPUs", group="machine", choices=("auto", "native", "torch"))

    def where(self, **changes: Any) -> dict[str, Any]:
        """Return the options of `chat.load`, some of them changed."""
        return {"tag": self.model_tag, "source": self.source, "step": self.step, "device": self.device_type,
                "dtype": self.dtype, "engine": self.engine, **changes}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFlags:
    """Flags that every training script has."""

    model_tag: str | None = opt(None, "name of the model; none = d<depth>, or latest", group="run", neutral=True)
    run: str = opt("dummy", "wandb run name; dummy = off", group="run", neutral=True)
    tensorboard: bool = opt(False, "also write for TensorBoard, in the run's folder", group="run", neutral=True)
    resume: bool = opt(True, "continue an earlier run of the same command", group="run", neutral=True)
    change_ranks: bool = opt(False, "continue on another number of ranks", group="run", neutral=True)
    seed: int = opt(42, "of weights and data order", group="run")
    budget: str | None = opt(None, "wall clock for the whole command, such as 10m or 2h", group=HORIZON)
    num_steps: int | None = opt(None, "optimizer steps; none = by the recipe, or 200 of RL", group=HORIZON)
    device_type: str = opt("auto", "cuda, xpu, mps or cpu", group="machine", neutral=True)
    dtype: str = opt("auto", "float32, bfloat16 or float16", group="machine", neutral=True)
    tf32: bool = opt(True, "on CUDA: TF32 for what stays float32", group="machine", neutral=True)
    eval_every: int | None = opt(None, "steps between evaluations; none = some in all", group="hooks", neutral=True)
    save_every: int | None = opt(None, "steps between checkpoints; none = some in all", group="hooks", neutral=True)
    keep_last: int = opt(3, "newest checkpoints to keep", group="hooks", neutral=True, least=2)
    keep_every: int = opt(0, "keep those of every so many steps as well; 0 = none", group="hooks", neutral=True)

    def __post_init__(self) -> None:
        lengths = ["--" + f.name.replace("_", "-") for f in dataclasses.fields(self)
                   if f.metadata["group"] == HORIZON and getattr(self, f.name) is not None]  # fmt: skip
        if len(lengths) > 1:
            raise ValueError(f"{' and '.join(lengths)} each set the length of the run; give only one")
        _ = self.seconds  # raises if it is no duration
        if self.model_tag:
            check_tag(self.model_tag)

    @property
    def seconds(self) -> float | None:
        """The budget; None = the length is set otherwise."""
        return parse_duration(self.budget) if self.budget else None


def _value_type(annotation: Any) -> tuple[Any, bool]:
    """Split an annotation into (element type, is a list); `X | None` counts as X."""
    options = [a for a in typing.get_args(annotation) if a is not type(None)]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = options[0]
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], True
    return annotation, False


class _Parser(argparse.ArgumentParser):
    """Answers bad flags in one line instead of repeating the whole usage."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized"):
            words = [word.partition("=")[0] for word in message.split()[2:]]
            near = [flag for w in words for flag in difflib.get_close_matches(w, self._option_string_actions, 1, 0.7)]
            if words[0][:1] != "-" and "-p" in self._option_string_actions:
                near = [f"-p {shlex.quote(' '.join(words))}"]
            message += f"; did you mean {' '.join(near)}?" if near else ""
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")


def build_parser(cls: type, prog: str | None = None) -> argparse.ArgumentParser:
    """Make the argument parser of a configuration dataclass, named and described after its module."""
    module = sys.modules[cls.__module__]
    prog = prog or (f"python -m {module.__spec__.name}" if module.__spec__ else None)
    parser = _Parser(prog=prog, description=module.__doc__, allow_abbrev=False, add_help=False)
    groups: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        meta = field.metadata
        group = groups.setdefault(meta["group"], parser.add_argument_group(meta["group"]))
        kind, many = _value_type(hints[field.name])
        shown = "none" if field.default in (None, (), "") else field.default
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        options["help"] = f"{meta['help']} (default: {shown})".replace("%", "%%")
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            metavar = None if meta["choices"] else kind.__name__.upper()
            options |= {"type": kind, "choices": meta["choices"], "metavar": metavar, "nargs": "+" if many else None}
        group.add_argument(meta["flag"] or "--" + field.name.replace("_", "-"), **options)
    common = parser.add_argument_group("common")
    common.add_argument("-h", "--help", action="help", help="show this help and exit")
    common.add_argument("--config", metavar="FILE.yaml", help="read flags from a file; flags on the command line win")
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _read_config(path: str, cls: type) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config={path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config={path} must hold `flag: value` lines")
    hints = typing.get_type_hints(cls)
    clean: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in hints:
            raise ValueError(f"--config={path}: unknown key {key!r}; keys are the flags of --help without dashes")
        kind, many = _value_type(hints[name])
        choices = cls.__dataclass_fields__[name].metadata["choices"]
        if value is None and type(None) in typing.get_args(hints[name]):
            clean[name] = None
            continue
        items = [_convert(v, kind) for v in (value if many and isinstance(value, list) else [value])]
        if not all(type(v) is kind for v in items):
            raise ValueError(f"--config={path}: {key}: {value!r} is not of type {kind.__name__}")
        if choices and not set(items) <= set(choices):
            raise ValueError(
                f"--config={path}: {key}: {value!r} is unknown; choose from {', '.join(map(str, choices))}"
            )
        clean[name] = tuple(items) if many else items[0]
    return clean


def _convert(value: Any, kind: type) -> Any:
    """Read what YAML takes for another type: 4 where text is wanted, 1 or 1e18 (text to YAML) for a float."""
    if kind is str and type(value) in (int, float):
        return str(value)
    if kind is float and type(value) in (int, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def parse(cls: type[T], argv: Sequence[str] | None, prog: str | None = None) -> T:
    """Parse a command line into `cls`; raises SystemExit(2) with one line on bad flags, ValueError on bad values."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--"]:  # torchrun leaves the separator in place
        arguments = arguments[1:]
    given = vars(build_parser(cls, prog).parse_args(arguments))
    del given["debug"]
    config = given.pop("config")
    values = _read_config(config, cls) if config else {}
    args = cls(**values | {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    for name, field in cls.__dataclass_fields__.items():  # type: ignore[attr-defined]
        low, value = field.metadata["least"], getattr(args, name)
        if any(type(v) is int and v < low for v in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"--{name.replace('_', '-')}={value} must be at least {low}")
    if os.environ.get("NANOZHCHAT_CHECK_FLAGS"):  # dry runs of runs/*.sh: the flags are good, go no further
        sys.exit(0)
    return args


def check(module: str, cls: type) -> None:
    """If `module` is what was started: answer slips of its flags and --help before it loads torch (seconds)."""
    if module == "__main__":
        run(lambda: parse(cls, None))
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is not ignored, as in the background
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `run`: Ctrl-C amid imports ends without a traceback


def parse_size(text: str) -> int:
    """Return a number of bytes from text such as 900m, 4g or 1.5GB (powers of 1024)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", text.strip().lower())
    if not match or not float(match[1]):
        raise ValueError(f"{text!r} is not a size; write for example 900m or 4g")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))


def result_flags(args: Any) -> dict[str, Any]:
    """Return the flags given (other than by their default) that change what is computed."""
    chosen = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if not f.metadata["neutral"]}
    return {f.name: chosen[f.name] for f in dataclasses.fields(args) if chosen.get(f.name, f.default) != f.default}


def write_config(path: Path, args: Any) -> None:
    """Write the resolved configuration as YAML, each value above its one-line explanation as a comment."""
    found = ((f, json.dumps(getattr(args, f.name), ensure_ascii=False)) for f in dataclasses.fields(args))
    atomic_write(path, "".join(f"# {f.metadata['help']}\n{f.name}: {value}\n" for f, value in found).encode())


def write_figures(path: str | None, figures: Any) -> None:
    """Write an evaluation's figures where `--json FILE` asks; nothing if it was not given."""
    if path:
        write_json(Path(path), figures)


def load_dotenv() -> None:
    """Read `.env` in the working directory into the environment; what is already set wins."""
    if os.path.exists(".env"):
        from dotenv import load_dotenv as read

        read(".env")


def prepare_terminal() -> None:
    """Let bytes that are not UTF-8 through, and lines be edited and recalled where somebody types them."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # from then on `input` uses it


def run(main: Callable[[], None]) -> None:
    """Run a script's main: user errors become one line on stderr and the exit code of `errors.py`."""
    debug = "--debug" in sys.argv
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    load_dotenv()
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (RunError, ValueError, OSError, MemoryError, RuntimeError) as error:
        failure: Exception = error
        if not isinstance(error, (RunError, ValueError, OSError)):
            if not isinstance(error, MemoryError) and not NO_MEMORY.search(str(error)):
                raise
            failure = OutOfMemoryError("out of memory; pass a smaller --depth, --max-seq-len or --device-batch-size")
        if debug:
            traceback.print_exc()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            failure = disk_error(Path(error.filename or "."), error)
        elif isinstance(error, OSError) and error.strerror and isinstance(error.filename, str):
            failure = OSError(f"{error.filename}: {error.strerror.lower()}; check the path")
        logging.getLogger(__name__).debug("failed", exc_info=error)
        kind = "" if isinstance(failure, StoppedError) else "error: "  # what was asked for is none
        sys.stderr.write(f"{kind}{' '.join(str(failure).split())}\n")
        sys.exit(getattr(failure, "exit_code", 2))
