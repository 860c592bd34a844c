"""Where things live: one base directory, one function per kind of result (layout: README, "Files")."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

STAGES = ("base", "sft", "rl")
ASIDE = ".old-"  # in the name of a run that was moved aside, before the time
TAG_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def base_dir() -> Path:
    """Return $NANOZHCHAT_BASE_DIR, or ~/.cache/nanozhchat when it is unset or empty."""
    return Path(os.environ.get("NANOZHCHAT_BASE_DIR") or "~/.cache/nanozhchat").expanduser().resolve()


def check_tag(tag: str, what: str = "model tag") -> str:
    """Return `tag` unchanged if it is safe as a folder name; raise ValueError otherwise."""
    if not TAG_PATTERN.fullmatch(tag) or ".." in tag:
        if what == "model tag" and (Path(tag) / "config.json").is_file():
            raise ValueError(f"{tag} is an exported model, not the tag of a run here; make it one with python -m "
                             f"scripts.base_train --init-from={tag} --data TEXTS --num-steps=100 --model-tag=NAME, and "
                             "go on from --model-tag=NAME")  # fmt: skip
        raise ValueError(f"{what} {tag!r} is not valid: use 1-64 letters, digits, dots, dashes or underscores, "
                         "starting with a letter or digit")  # fmt: skip
    return tag


def corpus_dir(name: str) -> Path:
    """Folder of a corpus: text shards and their manifest."""
    return base_dir() / "corpus" / check_tag(name, "corpus name")


def tokens_dir(name: str, tokenizer_hash: str) -> Path:
    """Folder of a corpus tokenized with one tokenizer."""
    return base_dir() / "tokens" / f"{check_tag(name, 'corpus name')}-{tokenizer_hash[:12]}"


def tokenizer_dir(name: str) -> Path:
    """Folder of a tokenizer."""
    return base_dir() / "tokenizer" / check_tag(name, "tokenizer name")


def run_dir(stage: str, tag: str) -> Path:
    """Folder of a training run: checkpoints, events.jsonl, metrics.jsonl, samples.jsonl."""
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r} is unknown; stages are {', '.join(STAGES)}")
    return base_dir() / stage / check_tag(tag)


def run_files(name: str) -> list[Path]:
    """Return the files of this name in the folders of all training runs but those moved aside."""
    every = (path for stage in STAGES for path in (base_dir() / stage).glob(f"*/{name}"))
    return [path for path in every if ASIDE not in path.parent.name]


def latest_tag(name: str, stages: Sequence[str] = STAGES) -> str:
    """Return the model whose file of this name was written last, in these stages if any has it.

    Raises FileNotFoundError if there is none.
    """
    found = run_files(name)
    found = [path for path in found if path.parent.parent.name in stages] or found
    if not found:
        remedy = "run `bash runs/runcpu.sh` or set NANOZHCHAT_BASE_DIR"
        raise FileNotFoundError(f"no trained model under {base_dir()}; {remedy}")
    return max(found, key=lambda p: p.stat().st_mtime).parent.name


def report_dir(tag: str) -> Path:
    """Folder of a model's report."""
    return base_dir() / "report" / check_tag(tag)
