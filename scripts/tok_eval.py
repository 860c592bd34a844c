"""Score a tokenizer on held-out documents: bytes and characters per token, speed; beside others if asked."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanozhchat import cli, corpus, paths, sources
from nanozhchat.log import setup_logging
from nanozhchat.tokenizer import Tokenizer
from nanozhchat.vocabulary import describe, vocabulary_facts

Encode = Callable[[list[str]], int]  # texts -> number of tokens


@dataclass(frozen=True, kw_only=True)
class TokEvalArgs:
    name: str | None = cli.opt(None, "tokenizer; none = the default one for the data and --vocab-size")
    vocab_size: int = cli.opt(8192, "tokens, where the name is left out")
    data: tuple[str, ...] = cli.opt((), "data whose held-out part is scored; none = $DATA_PATH, else builtin")
    text_field: str | None = cli.opt(None, "column or key of the text")
    max_bytes: int = cli.opt(2**23, "bytes of text scored at most")
    against: tuple[str, ...] = cli.opt((), "others to compare: names of ours, tokenizer.json files, tiktoken names")
    json: str | None = cli.opt(None, "write the figures to this file")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, load, score, print."""
    args = cli.parse(TokEvalArgs, argv)
    setup_logging()
    specs = sources.resolve_specs(args.data)
    name = args.name or corpus.tokenizer_name(specs, args.vocab_size)
    tokenizer = Tokenizer.load(paths.tokenizer_dir(name))
    texts = list(sources.documents(specs, "val", text_field=args.text_field, max_bytes=args.max_bytes))
    if not texts:
        raise ValueError(f"{' '.join(specs)} has no held-out documents; pass more --data")
    encoders = {name: encode_with(tokenizer), **{other: reference(other) for other in args.against}}
    rows = {row: score(encode, texts) for row, encode in encoders.items()}
    chars = Counter(char for text in texts for char in text)
    split = sum(n for char, n in chars.items() if len(tokenizer.encode(char)) > 1)  # more than one token when alone
    split_chars, facts = split / max(1, chars.total()), vocabulary_facts(tokenizer, texts)
    print(f"{'tokenizer':<24}{'bytes/token':>12}{'chars/token':>12}{'MB/s, 1 core':>14}")
    for row, figures in rows.items():
        print(f"{row[-23:]:<24}{figures['bytes_per_token']:>12.3f}{figures['chars_per_token']:>12.3f}"
              f"{figures['encode_mb_per_s']:>14.1f}")  # fmt: skip
    print(f"{split_chars:.2%} of characters need more than one token")
    print(describe(facts))
    figures = {"tokenizer": name, "hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size, **rows[name], **facts}
    others = {other: rows[other] for other in args.against}
    cli.write_figures(args.json, {**figures, "split_characters_frac": split_chars, "against": others})


def score(encode: Encode, texts: list[str]) -> dict[str, float]:
    """Encode all texts once, timed."""
    n_bytes, n_chars = sum(len(text.encode("utf-8", "replace")) for text in texts), sum(map(len, texts))
    encode(texts[:1])
    started = time.perf_counter()
    n_tokens = encode(texts)
    elapsed_s = time.perf_counter() - started
    return {"bytes_per_token": n_bytes / n_tokens, "chars_per_token": n_chars / n_tokens,
            "encode_mb_per_s": n_bytes / 1e6 / elapsed_s}  # fmt: skip


def encode_with(tokenizer: Tokenizer) -> Encode:
    """Return the encoder of one of our tokenizers, on one core."""
    return lambda texts: len(tokenizer.encode_batch_flat(texts, 1)[0])


def reference(name: str) -> Encode:
    """Return the encoder of a reference tokenizer; raises ValueError if the name is none of the three kinds."""
    if name.endswith(".json"):
        try:
            from tokenizers import Tokenizer as HuggingFace
        except ImportError as error:
            raise ValueError(f"--against={name} needs the tokenizers library; run: uv sync --group dev") from error
        hugging_face = HuggingFace.from_file(name)
        return lambda texts: sum(len(hugging_face.encode(text, add_special_tokens=False).ids) for text in texts)
    if (Path(paths.tokenizer_dir(name)) / "meta.json").exists():
        return encode_with(Tokenizer.load(paths.tokenizer_dir(name)))
    import tiktoken

    if name not in tiktoken.list_encoding_names():
        raise ValueError(f"--against={name} is not a tokenizer of ours, a tokenizer.json, or one of tiktoken's: "
                         f"{', '.join(tiktoken.list_encoding_names())}")  # fmt: skip
    encoding = tiktoken.get_encoding(name)
    return lambda texts: sum(len(encoding.encode_ordinary(text)) for text in texts)


if __name__ == "__main__":
    cli.run(main)
