"""Generation with a key/value cache: token ids in, text out as it comes, or many prompts at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from nanozhchat.gpt import GPT
from nanozhchat.kv_cache import KVCache
from nanozhchat.sampling import SamplingParams, choose
from nanozhchat.tokenizer import StreamDecoder, Tokenizer

MAX_BATCH = 32  # sequences decoded together


@dataclass(frozen=True)
class Delta:
    """A piece of an answer: complete characters, tokens so far, and on the last piece why it ended."""

    text: str
    n_tokens: int
    finish_reason: str | None = None  # "stop", "length", "cancelled"


class Engine:
    """A model and its tokenizer, ready to generate."""

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.context = model.config.sequence_len
        self.device = model.wte.weight.device
        self.end_ids = frozenset(
            tokenizer.special(name) for name in ("<|end|>", "<|bos|>", "<|user|>", "<|system|>", "<|assistant|>")
        )

    def new_cache(self, batch_size: int, max_len: int) -> KVCache:
        """Allocate a cache for this model."""
        c = self.model.config
        return KVCache(
            c.n_layer,
            c.n_kv_head,
            c.head_dim,
            batch_size=batch_size,
            max_len=max_len,
            device=self.device,
            dtype=self.model.dtype,
        )

    def _room(self, prompt_ids: Sequence[int], params: SamplingParams) -> int:
        """Tokens that may be generated; raises ValueError when the prompt leaves no room."""
        if not prompt_ids:
            raise ValueError("the prompt is empty")
        room = self.context - len(prompt_ids)
        if room < 1:
            raise ValueError(
                f"the prompt has {len(prompt_ids)} tokens, but the model's context is {self.context} and the answer "
                "needs room; shorten the prompt or start a new chat"
            )
        return min(room, params.max_tokens)

    @torch.inference_mode()
    def tokens(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, cancel: threading.Event | None = None
    ) -> Iterator[int]:
        """Yield the ids of one answer, the ending control token excluded."""
        room = self._room(prompt_ids, params)
        cache = self.new_cache(1, len(prompt_ids) + room)
        generator, seen = params.generator(), list(prompt_ids)
        step = torch.tensor([list(prompt_ids)], device=self.device)
        for _ in range(room):
            if cancel is not None and cancel.is_set():
                return
            logits = self.model.logits(self.model.hidden(step, cache)[:, -1])[0]
            token = choose(logits, params, generator, seen)
            if token in self.end_ids:
                return
            yield token
            seen.append(token)
            step = torch.tensor([[token]], device=self.device)

    def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, cancel: threading.Event | None = None
    ) -> Iterator[Delta]:
        """Yield the answer's text as complete characters; the last Delta alone has a finish_reason.

        Stop strings end the answer and are not part of it. Raises ValueError when the prompt is too long.
        """
        room = self._room(prompt_ids, params)
        decoder, held, count = StreamDecoder(self.tokenizer), "", 0
        longest = max((len(s) for s in params.stop), default=0)
        for token in self.tokens(prompt_ids, params, cancel=cancel):
            count += 1
            held += decoder.push(token)
            found = _first_stop(held, params.stop)
            if found is not None:
                yield Delta(held[:found], count, "stop")
                return
            keep = _held_back(held, params.stop, longest)
            if ready := held[: len(held) - keep]:
                yield Delta(ready, count)
                held = held[len(held) - keep :]
        held += decoder.flush()
        found = _first_stop(held, params.stop)
        reason = "length" if count >= room else "stop"
        if cancel is not None and cancel.is_set():
            reason = "cancelled"
        yield Delta(held if found is None else held[:found], count, reason if found is None else "stop")

    @torch.inference_mode()
    def batch(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[int]]:
        """Generate one answer per prompt, many at a time. Row i draws from seed (params.seed, i)."""
        answers: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths waste little padding
        for start in range(0, len(order), MAX_BATCH):
            self._decode_batch(order[start : start + MAX_BATCH], prompts, params, answers)
        return answers

    def _decode_batch(
        self, rows: list[int], prompts: Sequence[Sequence[int]], params: SamplingParams, answers: list[list[int]]
    ) -> None:
        rooms = {i: self._room(prompts[i], params) for i in rows}
        counts = torch.tensor([len(prompts[i]) for i in rows], device=self.device)
        width = max(len(prompts[i]) for i in rows)
        padded = [[*prompts[i], *[0] * (width - len(prompts[i]))] for i in rows]
        cache = self.new_cache(len(rows), width + max(rooms.values()))
        generators = {i: params.generator(i) for i in rows}
        hidden = self.model.hidden(torch.tensor(padded, device=self.device), cache, counts)
        last = hidden[torch.arange(len(rows), device=self.device), counts - 1]
        while rows:
            logits = self.model.logits(last)
            alive, tokens = [], []
            for row, i in enumerate(rows):
                token = choose(logits[row], params, generators[i], [*prompts[i], *answers[i]])
                if token in self.end_ids:
                    continue
                answers[i].append(token)
                if len(answers[i]) < rooms[i]:
                    alive.append(row)
                    tokens.append(token)
            if len(alive) < len(rows):
                rows = [rows[row] for row in alive]
                cache.keep(torch.tensor(alive, dtype=torch.long, device=self.device))
            if rows:
                last = self.model.hidden(torch.tensor(tokens, device=self.device)[:, None], cache)[:, -1]

    def complete(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[str]:
        """Like `batch`, decoded, and cut at the first stop string."""
        texts = [self.tokenizer.decode(ids) for ids in self.batch(prompts, replace(params, stop=()))]
        return [text[:found] if (found := _first_stop(text, params.stop)) is not None else text for text in texts]


def _first_stop(text: str, stops: tuple[str, ...]) -> int | None:
    places = [place for s in stops if (place := text.find(s)) >= 0]
    return min(places) if places else None


def _held_back(text: str, stops: tuple[str, ...], longest: int) -> int:
    """Length of the longest end of `text` that could still grow into a stop string."""
    for size in range(min(longest - 1, len(text)), 0, -1):
        if any(s.startswith(text[-size:]) for s in stops):
            return size
    return 0
