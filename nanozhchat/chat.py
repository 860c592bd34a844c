"""A trained model by name, ready to talk: `load("d4")` gives a `Chat`. Where the native engine runs, without torch."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanozhchat import checkpoint, paths
from nanozhchat.conversation import Message
from nanozhchat.engine import Engine
from nanozhchat.gpt_config import GPTConfig
from nanozhchat.hardware import cpu_only
from nanozhchat.native import pack_file
from nanozhchat.sampling import SamplingParams
from nanozhchat.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Prompt = str | Sequence[Message | Mapping[str, Any]]


class Chat:
    """An engine with its tokenizer and where they came from. source: "base", "sft" or "rl"."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, name: str, source: str, step: int) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.name, self.source, self.step = name, source, step

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Turn a question or a conversation that ends with the user's turn into ids; a base model continues text."""
        if isinstance(prompt, str) and self.source == "base":
            return [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
        return self.tokenizer.render_prompt([Message("user", prompt)] if isinstance(prompt, str) else prompt)

    def stream(self, prompt: Prompt, *, cancel: threading.Event | None = None, **sampling: Any) -> Iterator[str]:
        """Yield the answer in pieces of complete characters. sampling: fields of `SamplingParams`."""
        for delta in self.engine.stream(self.prompt_ids(prompt), SamplingParams(**sampling), cancel=cancel):
            if delta.text:
                yield delta.text

    def __call__(self, prompt: Prompt, **sampling: Any) -> str:
        """Return the whole answer."""
        return "".join(self.stream(prompt, **sampling))


def find(tag: str | None, source: str | None, step: int | None = None) -> tuple[str, str, checkpoint.Saved]:
    """Find a checkpoint: the tag, the stage and what was saved. source None = the furthest stage that exists."""
    if step is not None and source is None:
        raise ValueError("--step needs --source: each stage counts its own steps")
    name = paths.check_tag(tag) if tag else paths.latest_tag("latest.json", [source] if source else ("sft", "rl"))
    stages = [source] if source else list(reversed(paths.STAGES))
    for stage in stages:
        saved = checkpoint.find(paths.run_dir(stage, name), step)
        if saved is not None:
            return name, stage, saved
    there = sorted({"/".join(p.parts[-3:-1]) for p in paths.run_files("latest.json")})
    raise FileNotFoundError(f"no {source or 'trained'} checkpoint of model tag {name!r} under {paths.base_dir()}; "
                            f"there are: {', '.join(there) or 'none'}")  # fmt: skip


def load(
    tag: str | None = None, *, source: str | None = None, step: int | None = None, device: str | None = None,
    dtype: str | None = None, engine: str = "auto",
) -> Chat:  # fmt: skip
    """Load a model by tag, stage and step; None = the most recent chat model (base model if there is
    none), its furthest stage, its newest step.

    tag: also a folder that `scripts.export` wrote with --to=hf or --to=int8.

    device: "cpu", "cuda", ... None = detected. dtype: "float32", ... None = float32 on a CPU, else detected; "int8"
    quantizes the weights for decoding. engine: "native", "torch", or "auto": native for float32 and int8 on a CPU.
    Base models with n-gram counts: torch.
    Raises FileNotFoundError, ValueError or DamagedError with the next command to run.
    """
    if tag and Path(tag).joinpath("config.json").is_file():
        return _load_exported(Path(tag), device, dtype, engine)
    if tag and ("/" in tag or tag.endswith(".gguf")):
        raise FileNotFoundError(f"{tag} is no folder that scripts.export wrote with --to=hf or --to=int8")
    name, stage, saved = find(tag, source, step)
    about: dict[str, Any] = {"name": name, "source": stage, "step": saved.step}
    plain_only = saved.manifest["model"].get("ngrams") or saved.manifest["model"].get("gpt2")
    if engine == "auto" and dtype != "int8" and plain_only:
        engine = "torch"
    tokenizer = load_tokenizer(saved)
    if surely_native(device, dtype, engine):
        config = GPTConfig(**saved.manifest["model"])
        ready = Engine(pack_file(config, saved.folder / "model.safetensors", int8=dtype == "int8"), tokenizer)
        log.info("engine: %s", ready.kind)
        return Chat(ready, tokenizer, **about)
    where, weights, kind = choose_engine(device, dtype, engine)
    why = " (n-gram counts or GPT-2's network, which native does not know)" if plain_only else ""
    log.info("engine: %s, %s%s", kind, str(weights).removeprefix("torch."), why)
    return Chat(Engine(saved.load_model(where, weights), tokenizer, kind=kind), tokenizer, **about)


def surely_native(device: str | None, dtype: str | None, engine: str) -> bool:
    """Whether `choose_engine` would choose native, as far as that can be said without torch."""
    asked = dtype if dtype not in (None, "auto", "int8") else os.environ.get("NANOZHCHAT_DTYPE")
    on_cpu = device == "cpu" or (device in (None, "auto") and cpu_only())
    return on_cpu and engine != "torch" and (dtype == "int8" or asked in (None, "", "float32"))


def _load_exported(folder: Path, device: str | None, dtype: str | None, engine: str) -> Chat:
    from nanozhchat import export

    where, weights, kind = choose_engine(device, dtype, engine)
    model, tokenizer = export.load_folder(folder)
    model.dtype = weights
    return Chat(Engine(model.to(where), tokenizer, kind=kind), tokenizer, name=folder.name, source="sft", step=0)


def choose_engine(device: str | None, dtype: str | None, engine: str) -> tuple[torch.device, torch.dtype, str]:
    """Return the device, the dtype of the loaded weights and the kind of `Engine`.

    Raises ValueError when what was asked for does not go together: nothing is replaced silently.
    """
    import torch

    from nanozhchat.compute import detect_device, detect_dtype

    where = torch.device(detect_device(device))
    if dtype == "int8":
        if where.type != "cpu" or engine == "torch":
            raise ValueError("--dtype=int8 runs in the native engine on a CPU; add --device-type=cpu --engine=auto")
        return where, torch.float32, "native-int8"
    weights, _ = detect_dtype(where, dtype, measure=False)
    if engine == "auto":
        engine = "native" if where.type == "cpu" and weights == torch.float32 else "torch"
    return where, weights, engine


def load_tokenizer(saved: checkpoint.Saved) -> Tokenizer:
    """Load the tokenizer that a checkpoint was trained with; raises ValueError if it has changed since."""
    identity = saved.manifest["identity"]
    tokenizer = Tokenizer.load(paths.tokenizer_dir(identity["tokenizer"]))
    if tokenizer.hash != identity["tokenizer_hash"]:
        raise ValueError(f"tokenizer {identity['tokenizer']!r} is not the one that {saved.folder} was trained with; "
                         "train it again with the same data and settings, or train the model again")  # fmt: skip
    return tokenizer
