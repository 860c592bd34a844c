"""Train a tokenizer on the training part of the data, or take one over, and say how well it packs the held-out part."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanozhchat import cli, corpus, files, paths, sources, tokenizer_training
from nanozhchat.log import setup_logging
from nanozhchat.tokenizer import KINDS, Tokenizer
from nanozhchat.vocabulary import describe, vocabulary_facts

HELD_OUT_BYTES = 2**22  # enough for three digits of bytes per token
SETTINGS_FILE, INPUTS = "tok_train.json", "inputs"
IN_MEMORY_BYTES = 2**30  # of text: about 6 GB of memory at worst


@dataclass(frozen=True, kw_only=True)
class TokTrainArgs:
    data: tuple[str, ...] = cli.opt((), "data; none = $DATA_PATH, else builtin")
    text_field: str | None = cli.opt(None, "column or key of the text")
    max_bytes: int = cli.opt(2**28, "bytes of text read at most", least=1)
    vocab_size: int = cli.opt(8192, "tokens, the 256 bytes and the special tokens included")
    kind: str = cli.opt("bpe", "bpe; or char, whose tokens never cross a character", choices=KINDS)
    char_coverage: float = cli.opt(0.0, "characters that are this share of the text come first, 0.9999 say, then pairs "
                                        "by frequency: small vocabularies cut the same words alike; 0 = all by "
                                        "frequency")  # fmt: skip
    name: str | None = cli.opt(None, "name; none = after data and size, which base_train finds by itself")
    given: str | None = cli.opt(None, "take over this tokenizer.json, or file of tiktoken's ranks", flag="--from")
    threads: int = cli.opt(0, "threads; 0 = one per core")
    memory_limit: str | None = cli.opt(None, "of tables, e.g. 4g, then disk; none = any up to 1 GB of text, then half")
    chunk_files: int | None = cli.opt(None, "input files after which progress is kept; none = about 1 GB", least=1)
    resume: bool = cli.opt(True, "go on where a run that was cut off had got to")
    force: bool = cli.opt(False, "train again even if it exists")

    def __post_init__(self) -> None:
        if not 0 <= self.char_coverage <= 1:
            raise ValueError(f"--char-coverage={self.char_coverage} is not a share of the text, from 0 to 1")
        if self.memory_limit and cli.parse_size(self.memory_limit) < 2**20:
            raise ValueError(f"--memory-limit={self.memory_limit} is less than 1m; write for example 900m or 4g")
        trained = ("vocab_size", "kind", "char_coverage")
        idle = [f"--{n.replace('_', '-')}" for n in trained if getattr(self, n) != getattr(TokTrainArgs, n)]
        if self.given and idle:
            raise ValueError(f"--from={self.given} brings its own vocabulary: leave out {', '.join(idle)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, train unless done, save, measure, print."""
    args = cli.parse(TokTrainArgs, argv)
    setup_logging()
    specs = sources.resolve_specs(args.data)
    # the name that base_train looks for on this data; a character tokenizer says so in its name
    name = args.name or corpus.tokenizer_name(specs, args.vocab_size) + ("" if args.kind == "bpe" else f"-{args.kind}")
    folder = paths.tokenizer_dir(name)
    if args.given and not args.name:
        raise ValueError(f"--from={args.given} needs a --name")
    names = ("text_field", "max_bytes", "vocab_size", "kind", *["char_coverage"] * bool(args.char_coverage))
    settings = {"data": list(specs), **{n: getattr(args, n) for n in names}} if not args.given else {"from": args.given}
    inputs = [] if args.given else [item for item in sources.inputs(specs) if "file" in item]
    with files.lock(folder):
        if not args.force and is_done(folder, settings):
            shutil.rmtree(folder / "counts", ignore_errors=True)
            changed = files.read_json(folder / SETTINGS_FILE).get(INPUTS, inputs) != inputs
            since = ", but its files have changed since" if changed else ""
            print(f"tokenizer {name} exists with these settings ({folder}){since}; pass --force to train it again")
            return
        started = time.perf_counter()
        try:
            tokenizer = Tokenizer.from_file(Path(args.given)) if args.given else train(specs, args, folder / "counts")
        except ValueError as error:
            source = args.given or " ".join(specs)
            raise ValueError(str(error) if source in str(error) else f"{source}: {error}") from error
        elapsed_s = time.perf_counter() - started
        tokenizer.save(folder)
        held_out = list(sources.documents(specs, "val", text_field=args.text_field, max_bytes=HELD_OUT_BYTES))
        facts = vocabulary_facts(tokenizer, held_out)
        files.write_json(folder / "stats.json", facts)
        cli.write_config(folder / "tok_train.yaml", args)
        files.write_json(folder / SETTINGS_FILE, {**settings, INPUTS: inputs})
        shutil.rmtree(folder / "counts", ignore_errors=True)
    trained_on = tokenizer.trained_on
    source = f"{trained_on['documents']} documents, {trained_on['bytes'] / 1e6:.1f} MB" if trained_on else args.given
    print(f"tokenizer {name}: {tokenizer.vocab_size} tokens from {source}, in {elapsed_s:.1f} s")
    n_bytes = sum(len(text.encode("utf-8", "replace")) for text in held_out)
    if n_tokens := len(tokenizer.encode_batch_flat(held_out)[0]):
        print(f"{n_bytes / n_tokens:.3f} bytes per token on {len(held_out)} held-out documents")
    print(describe(facts))
    print(f"saved in {folder}")


def train(specs: Sequence[str], args: TokTrainArgs, counts: Path) -> Tokenizer:
    """Train in memory if that is safe, else with counts on disk."""
    if args.memory_limit is None and args.chunk_files is None and args.max_bytes <= IN_MEMORY_BYTES:
        if len(specs) == 1 and sources.parse(specs[0]).endless and args.max_bytes >= corpus.BUILTIN_BYTES:
            documents = corpus.build(specs, corpus.name_of(specs)).documents("train")  # once: base_train reads it too
        else:
            documents = sources.documents(specs, "train", text_field=args.text_field, max_bytes=args.max_bytes)
        return Tokenizer.train(documents, args.vocab_size, args.kind, threads=args.threads, progress=progress(),
                               char_coverage=args.char_coverage)  # fmt: skip
    if args.char_coverage:
        raise ValueError(f"--char-coverage={args.char_coverage} needs all text in memory: leave it out, or else "
                         f"--memory-limit and --chunk-files, and --max-bytes at {IN_MEMORY_BYTES} or less")  # fmt: skip
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = cli.parse_size(args.memory_limit) if args.memory_limit else machine // 2
    print(f"counts go to {counts}, tables take at most {memory / 2**20:,.0f} MiB of memory")
    return tokenizer_training.train(
        specs, args.vocab_size, args.kind, counts, memory_bytes=memory, max_bytes=args.max_bytes,
        chunk_files=args.chunk_files, resume=args.resume, text_field=args.text_field, threads=args.threads,
        progress=progress(),
    )  # fmt: skip


def is_done(folder: Path, settings: dict[str, object]) -> bool:
    """Whether the folder holds a tokenizer trained with these settings; raises ValueError if with others."""
    if not (folder / "meta.json").exists():
        return False
    path = folder / SETTINGS_FILE
    found = files.read_json(path) if path.exists() else {}
    differ = [key for key in {**settings, **found} if key != INPUTS and found.get(key) != settings.get(key)]
    if differ and found:
        changes = ", ".join(f"{key} {json.dumps(found.get(key))} not {json.dumps(settings.get(key))}" for key in differ)
        raise ValueError(f"tokenizer {folder.name} exists with {changes}; pass another --name or --force")
    return not differ


def progress() -> Callable[[str, int, int], None] | None:
    """Return a callback that keeps one line of the terminal up to date; None where nobody watches."""
    if not sys.stderr.isatty():
        return None

    def show(stage: str, done: int, total: int) -> None:
        text = f"read {done / 1e6:.0f} MB" if stage == "count" else f"merges {done}/{total}"
        sys.stderr.write(f"\r{text:<40}" + ("\n" if done == total else ""))
        sys.stderr.flush()

    return show


if __name__ == "__main__":
    cli.run(main)
