"""Continuous batching: requests join and leave a running batch at every step.

Each step feeds every running request its next tokens in one pass: one token to those that are answering, a piece of
the prompt to those that have just come, so that a long prompt never stops the others. A slot keeps what it held after
its request has gone, and a new request continues from the longest beginning that any slot holds: shared system
prompts and earlier turns of a chat are computed once. Memory is bounded by the decoder's slots.
"""

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from nanozhchat.sampling import Choice, Floats, Sampler, SamplingParams
from nanozhchat.tokenizer import StreamDecoder, Tokenizer

PREFILL_TOKENS = 256  # prompt tokens fed per step, shared among the requests that wait for their first token
MIN_SHARED = 4  # a shorter common beginning is not worth copying
LOOKUP = 3  # tokens that must occur earlier for what followed them to be foretold
MAX_DRAFT = 11  # drafted tokens per step: with the last token, two full blocks of the native kernels
DRAFTING_ROWS = 2  # with more requests in a step, their rows already share the reading of the weights
TURN_TOKENS = ("<|end|>", "<|bos|>", "<|user|>", "<|system|>", "<|assistant|>")  # any of them ends an answer


@dataclass(frozen=True)
class Delta:
    """A piece of an answer: complete characters, tokens so far, and on the last piece why it ended.

    finish_reason: "stop", "length", "cancelled", "error" (then `Request.error` says which). choices: the tokens since
    the piece before, when logprobs were asked for.
    """

    text: str
    n_tokens: int
    finish_reason: str | None = None
    choices: tuple[Choice, ...] = ()

    def __add__(self, later: "Delta") -> "Delta":
        choices = (*self.choices, *later.choices)
        return Delta(self.text + later.text, later.n_tokens, later.finish_reason, choices)


@dataclass(frozen=True)
class Part:
    """Tokens to append to a slot; logits are wanted after the last `wanted` of them."""

    slot: int
    ids: Sequence[int]
    wanted: int


class Decoder:
    """A model with slots for sequences. held: the ids in each slot, in the order they were fed."""

    def __init__(self, n_slots: int, context: int) -> None:
        self.context = context
        self.held: list[list[int]] = [[] for _ in range(n_slots)]

    def forward(self, parts: Sequence[Part]) -> list[Floats]:
        """Append each part to its slot; return (wanted, vocab_size) logits for each part."""
        raise NotImplementedError

    def copy(self, source: int, target: int, n: int) -> None:
        """Make `target` hold the first n tokens of `source`."""
        self.held[target] = self.held[source][:n]

    def truncate(self, slot: int, n: int) -> None:
        """Keep only the first n tokens of a slot."""
        del self.held[slot][n:]

    def clear(self, slot: int) -> None:
        """Empty a slot whose content may not be finite."""
        self.held[slot] = []


class Request:
    """One answer on its way. ids: tokens so far, the ending control token excluded."""

    def __init__(
        self, prompt: Sequence[int], params: SamplingParams, room: int, tokenizer: Tokenizer, index: int,
        cancel: threading.Event | None,
    ) -> None:  # fmt: skip
        self.prompt, self.params, self.room, self.cancel = list(prompt), params, room, cancel
        self.ids: list[int] = []
        self.slot: int | None = None
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.inbox: deque[Delta] = deque()  # for callers that share a batch: deltas not yet read
        self._sampler = Sampler(params, prompt, index)
        self._decoder, self._held = StreamDecoder(tokenizer), ""
        self._choices: list[Choice] = []
        self._followers: dict[tuple[int, ...], int] = {}  # LOOKUP tokens -> index of what followed them last
        self._hits = 0  # tokens in a row that were foretold
        self._noted = 0

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer so far."""
        return self._sampler.seen

    def draft(self) -> list[int]:
        """Tokens that the past foretells, as many as it has earned trust for: none until it has been right."""
        tokens = self.tokens
        for end in range(max(self._noted, LOOKUP), len(tokens)):
            place = self._followers.get(tuple(tokens[end - LOOKUP : end]))
            foretold = place is not None and tokens[place] == tokens[end]
            self._hits = self._hits + 1 if foretold else 0
            self._followers[tuple(tokens[end - LOOKUP : end])] = end
        self._noted = len(tokens)
        place = self._followers.get(tuple(tokens[-LOOKUP:]))
        size = min(self._hits, MAX_DRAFT, self.room - len(self.ids) - 1)
        if place is None or self._hits < LOOKUP or size < 1:
            return []
        return (tokens[place:] * size)[:size]  # a loop shorter than the draft goes round

    def take(self, logits: Floats, end_ids: frozenset[int]) -> int | None:
        """Choose the next token from (V,) logits; returns it, or None if the answer has ended."""
        choice = self._sampler.choose(logits)
        if choice.token in end_ids:
            self._end("stop")
            return None
        self.ids.append(choice.token)
        if choice.logprob is not None:
            self._choices.append(choice)
        self._held += self._decoder.push(choice.token)
        if len(self.ids) >= self.room or first_stop(self._held, self.params.stop) is not None:
            self._end("length")
        return choice.token if self.finish_reason is None else None

    def _end(self, reason: str) -> None:
        """End for this reason, or by a stop string if there is one."""
        self._held += self._decoder.flush()
        found = first_stop(self._held, self.params.stop)
        self.finish_reason = reason if found is None else "stop"
        self._held = self._held[:found]

    def fail(self, reason: str, error: Exception | None = None) -> None:
        """End early: "cancelled" or "error"."""
        self._end(reason)
        self.finish_reason, self.error = reason, error

    def delta(self) -> Delta | None:
        """Return what is ready to be shown, None if nothing is."""
        keep = 0 if self.finish_reason else held_back(self._held, self.params.stop)
        ready = self._held[: len(self._held) - keep]
        if not ready and not self.finish_reason:
            return None
        self._held = self._held[len(ready) :]
        choices, self._choices = tuple(self._choices), []
        return Delta(ready, len(self.ids), self.finish_reason, choices)


class Batch:
    """Requests that share a decoder, as many at once as it has slots; the others wait in line. Not thread-safe.

    drafts: whether text that repeats itself may be decoded several tokens a step.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, *, drafts: bool = True) -> None:
        self.decoder, self.tokenizer, self.drafts = decoder, tokenizer, drafts
        self.end_ids = frozenset(map(tokenizer.special, TURN_TOKENS))
        self._waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._free = list(range(len(decoder.held)))  # longest unused first

    @property
    def n_running(self) -> int:
        """Requests that have a slot."""
        return len(self.running)

    @property
    def n_waiting(self) -> int:
        """Requests in line for a slot."""
        return len(self._waiting)

    def add(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, cancel: threading.Event | None = None,
        index: int = 0,
    ) -> Request:  # fmt: skip
        """Put a request in line. index: which of several answers to one prompt, each with its own random numbers.

        The same prompt added several times is computed once. Raises ValueError when the prompt leaves no room.
        """
        room = min(room_for(prompt_ids, self.decoder.context), params.max_tokens)
        request = Request(prompt_ids, params, room, self.tokenizer, index, cancel)
        self._waiting.append(request)
        return request

    def remove(self, request: Request) -> None:
        """Forget a request, whatever its state."""
        if request in self._waiting:
            self._waiting.remove(request)
        if request in self.running:
            self.running.remove(request)
            assert request.slot is not None
            self._free.append(request.slot)

    def step(self) -> list[tuple[Request, Delta]]:
        """Move every running request on by a token or a piece of its prompt; return what became ready."""
        stopped = [r for r in (*self.running, *self._waiting) if r.cancel is not None and r.cancel.is_set()]
        for request in stopped:
            request.fail("cancelled")
            self.remove(request)
        self._admit()
        fed = list(self.running)
        parts = self._parts(fed)
        if parts:
            for request, part, logits in zip(fed, parts, self.decoder.forward(parts), strict=True):
                if part.wanted:
                    self._consume(request, part, logits)
        ready = [(r, delta) for r in (*stopped, *fed) if (delta := r.delta()) is not None]
        for request, delta in ready:
            if delta.finish_reason is not None:
                self.remove(request)
        return ready

    def _parts(self, requests: Sequence[Request]) -> list[Part]:
        """What to feed each: the token chosen last, or a share of the prompt."""
        assert all(r.slot is not None for r in requests)
        pending = {r: r.tokens[len(self.decoder.held[r.slot]) :] for r in requests}  # type: ignore[index]
        unread = sum(len(ids) > 1 for ids in pending.values())
        drafting = self.drafts and len(requests) <= DRAFTING_ROWS
        share = max(1, PREFILL_TOKENS // max(1, unread))
        parts = []
        for request, ids in pending.items():
            drafted = request.draft() if drafting and len(ids) == 1 else []
            wanted = 1 + len(drafted) if len(ids) <= share else 0
            parts.append(Part(request.slot, [*ids[:share], *drafted], wanted))  # type: ignore[arg-type]
        return parts

    def _consume(self, request: Request, part: Part, logits: Floats) -> None:
        """Choose tokens as long as they agree with what was fed, and take back the rest of what was fed."""
        try:
            for row, drafted in zip(logits, [*part.ids[len(part.ids) - part.wanted + 1 :], None], strict=True):
                if request.take(row, self.end_ids) != drafted or drafted is None:
                    break
        except FloatingPointError as error:
            request.fail("error", error)
            self.decoder.clear(part.slot)
        else:
            if part.wanted > 1:
                self.decoder.truncate(part.slot, len(request.prompt) + len(request.ids) - 1)

    def _admit(self) -> None:
        """Give free slots to those who wait, first come first served.

        One whose prompt begins like one that is still being read waits for it, to copy it instead of reading it again.
        """
        while self._waiting and self._free:
            request = self._waiting[0]
            useful = request.prompt[:-1]  # the last token is always run: its logits are needed
            shared = [common_prefix(ids, useful) for ids in self.decoder.held]
            source = max(range(len(shared)), key=shared.__getitem__)
            n = shared[source] if shared[source] >= MIN_SHARED else 0
            if any(common_prefix(r.prompt, useful) > max(n, MIN_SHARED) for r in self.running if not r.ids):
                return
            self._waiting.popleft()
            request.slot = self._take_slot(source, n)
            self.running.append(request)

    def _take_slot(self, source: int, n: int) -> int:
        """Take a free slot that holds the first n tokens of `source`: itself if free and mostly wanted, else a copy."""
        own = source in self._free and n > 0 and 2 * n >= len(self.decoder.held[source])
        empty = next((s for s in self._free if not self.decoder.held[s]), self._free[0])
        slot = source if own else empty
        self._free.remove(slot)
        if slot != source and n:
            self.decoder.copy(source, slot, n)
        else:
            self.decoder.truncate(slot, n)
        return slot


def room_for(prompt_ids: Sequence[int], context: int) -> int:
    """Tokens that an answer may have; raises ValueError when the prompt leaves no room."""
    if not prompt_ids:
        raise ValueError("the prompt is empty")
    if (room := context - len(prompt_ids)) < 1:
        raise ValueError(f"the prompt has {len(prompt_ids)} tokens, but the model's context is {context} and the "
                         "answer needs room; shorten the prompt or start a new chat")  # fmt: skip
    return room


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    short = min(len(a), len(b))
    if a[:short] == b[:short]:
        return short
    return next(i for i in range(short) if a[i] != b[i])


def first_stop(text: str, stops: tuple[str, ...]) -> int | None:
    """Where the first stop string begins, None if there is none."""
    return min((place for s in stops if (place := text.find(s)) >= 0), default=None)


def held_back(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that could still grow into a stop string."""
    longest = max((len(s) for s in stops), default=0)
    sizes = range(min(longest - 1, len(text)), 0, -1)
    return next((size for size in sizes if any(s.startswith(text[-size:]) for s in stops)), 0)
