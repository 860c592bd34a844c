"""Write a trained model for other software: a transformers folder, a GGUF file, or int8 weights."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanozhchat import cli, paths

KINDS = ("hf", "gguf", "int8")


@dataclass(frozen=True, kw_only=True)
class ExportArgs:
    to: str = cli.opt("hf", "hf = transformers, gguf = llama.cpp (plain models), int8 = our engine", choices=KINDS)
    out: str | None = cli.opt(None, "folder to write, or file.gguf; none = <tag>-<format> here")
    model_tag: str | None = cli.opt(None, "name of the model; none = the one trained last")
    source: str | None = cli.opt(None, "stage; none = the furthest that exists", choices=paths.STAGES)
    step: int | None = cli.opt(None, "checkpoint; none = the newest")


cli.check(__name__, ExportArgs)

from nanozhchat import chat
from nanozhchat.export import export


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, load, write."""
    args = cli.parse(ExportArgs, argv)
    model = chat.load(args.model_tag, source=args.source, step=args.step, device="cpu", dtype="float32", engine="torch")
    out = Path(args.out or f"{model.name}-{args.to}")
    print(f"{model.name}, {model.source}, step {model.step}:")
    for path in export(args.to, model.engine.model, model.tokenizer, out):
        print(f"{path}  {path.stat().st_size:,} bytes")
    if args.to != "gguf":
        print(f"talk to it: python -m scripts.chat_cli --model-tag={shlex.quote(str(out))}")


if __name__ == "__main__":
    cli.run(main)
