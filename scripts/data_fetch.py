"""Fetch or generate text: any data source -> a corpus of checked shards with a validation split."""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from nanozhchat import cli, contamination, corpus
from nanozhchat.cleaning import MEMORIES, STEPS, parse_steps
from nanozhchat.cli import opt
from nanozhchat.errors import DamagedError
from nanozhchat.presets import presets


@dataclass(frozen=True, kw_only=True)
class Args:
    data: tuple[str, ...] = opt((), "sources, mixed by bytes with SPEC@WEIGHT: builtin, builtin:PART, a path or quoted "
                                    "glob, hf:DATASET, a preset; without it $DATA_PATH, else builtin")  # fmt: skip
    name: str = opt("default", "name of the corpus")
    max_bytes: int | None = opt(None, "stop after this many bytes of text (builtin alone has a limit of its own)")
    text_field: str | None = opt(None, "column that holds the text; by default text, else content")
    seed: int = opt(0, "seed of generated text")
    clean: str | None = opt(None, f"steps of cleaning, in this order: {','.join(STEPS)}; default = all but simplify")
    shard_of: str | None = opt(None, "K/N: only the K-th of N shares of the input files, for N machines side by side")
    skip_bad: bool = opt(False, "count damaged lines and files instead of stopping")
    contamination: tuple[str, ...] = opt((), "benchmark files: find their n-grams in corpus NAME, print JSON",
                                         group="instead of fetching")  # fmt: skip
    list: bool = opt(False, "show the presets and exit", group="instead of fetching")
    verify: bool = opt(False, "check the corpus NAME against its manifest and print JSON", group="instead of fetching")

    def __post_init__(self) -> None:
        """Refuse flags that exclude each other."""
        if self.list + self.verify + bool(self.contamination) > 1:
            raise ValueError("--list, --verify and --contamination exclude each other; give one of them")
        if self.shard_of and not re.fullmatch(r"[1-9]\d*/[1-9]\d*", self.shard_of):
            raise ValueError(f"--shard-of={self.shard_of}: expected K/N, such as 1/2")
        if self.shard_of and MEMORIES.keys() & set(parse_steps(self.clean)):
            raise ValueError("--shard-of sees only its share, so exact and near duplicates are for the command that "
                             "joins the shares: --data corpus/A corpus/B --clean=exact,near")  # fmt: skip


def print_presets() -> None:
    """Print one block a preset: name, hub id, columns, size, licence."""
    print("Presets (hub id @revision, columns, size, licence). None is fetched by the tests: names may have changed.")
    for preset in presets().values():
        where = ":".join(part for part in (preset.hub_id, preset.config, preset.files) if part) + f" @{preset.revision}"
        use = "pretraining" if preset.kind == "text" else "fine-tuning"
        print(f"\n{preset.name}  [{use}]\n  hub      {where}\n  columns  {', '.join(preset.columns)}")
        print(f"  size     {preset.size}\n  licence  {preset.licence}")
        if preset.note:
            print(f"  note     {preset.note}")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and do the one thing asked for."""
    args = cli.parse(Args, argv)
    if args.list:
        print_presets()
    elif args.verify or args.contamination:
        name = args.name
        found = corpus.verify(name) if args.verify else contamination.check(corpus.load(name), args.contamination)
        print(json.dumps(found, ensure_ascii=False, indent=1))
        if problems := found.get("problems"):
            raise DamagedError("{file}: {problem}; run scripts.data_fetch for this corpus again".format(**problems[0]))
    else:
        k, n = map(int, (args.shard_of or "0/0").split("/"))
        built = corpus.build(args.data, args.name, max_bytes=args.max_bytes, text_field=args.text_field, seed=args.seed,
                             skip_bad=args.skip_bad, clean=parse_steps(args.clean), part=(k, n) if n else None,
                             progress=lambda line: print(line, flush=True))  # fmt: skip
        cli.write_config(built.directory / "config.yaml", args)
        sys.stdout.write(f"{built.directory}\n")


if __name__ == "__main__":
    cli.run(main)
