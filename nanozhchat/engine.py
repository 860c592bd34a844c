"""Generation: token ids in, text out as it comes, or many prompts at once. All of it runs through `batching.Batch`."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from nanozhchat.batching import TURN_TOKENS, Batch, Decoder, Delta, Request, first_stop, room_for
from nanozhchat.native import NativeDecoder, NativeModel, native_model
from nanozhchat.sampling import SamplingParams
from nanozhchat.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanozhchat.gpt import GPT

KINDS = ("torch", "native", "native-int8")
MAX_BATCH = 32  # sequences decoded together


class Engine:
    """A model and its tokenizer, ready to generate. After its weights have changed, make a new one.

    kind: "torch" runs the model itself, on any device; "native" and "native-int8" run packed copies of its weights
    on the CPU, which may also be all that is given. Raises ValueError for a kind that cannot run this model.
    """

    def __init__(self, model: GPT | NativeModel, tokenizer: Tokenizer, *, kind: str = "torch") -> None:
        if kind not in KINDS:
            raise ValueError(f"engine {kind!r} is unknown; choose from {', '.join(KINDS)}")
        self.model: Any = model
        self.tokenizer, self.config, self.context = tokenizer, model.config, model.config.sequence_len
        self._packed: NativeModel | None = None
        if isinstance(model, NativeModel):
            self._packed, kind = model, "native-int8" if model.int8 else "native"
        elif kind != "torch":
            self._packed = native_model(model, int8=kind == "native-int8")
        self.kind = kind
        self.end_ids = frozenset(map(tokenizer.special, TURN_TOKENS))
        self._shared: Batch | None = None  # of all streams: a later turn of a chat finds the earlier ones
        self._lock = threading.Lock()

    def new_batch(self, max_rows: int = MAX_BATCH, *, drafts: bool = True) -> Batch:
        """Return an empty batch of its own with slots for `max_rows` requests at once. drafts: see `Batch`."""
        return Batch(self.new_decoder(max_rows), self.tokenizer, drafts=drafts)

    def new_decoder(self, n_slots: int) -> Decoder:
        """Return slots for `n_slots` sequences, to be fed token by token."""
        if self._packed is not None:
            return NativeDecoder(self._packed, n_slots)
        from nanozhchat.torch_decoder import TorchDecoder

        return TorchDecoder(self.model, n_slots)

    def scorer(self) -> Any:
        """Return what computes the loss with this engine's numbers: called like the model."""
        from nanozhchat.torch_decoder import Scorer

        return self.model if self._packed is None else Scorer(self.new_decoder(1))

    def _steps(
        self, prompt_ids: Sequence[int], params: SamplingParams, cancel: threading.Event | None
    ) -> Iterator[Request]:
        """Run one request in the shared batch, together with whatever else streams; yields after every step."""
        with self._lock:
            batch = self._shared = self._shared or self.new_batch()
            request = batch.add(prompt_ids, params, cancel=cancel)
        try:
            while request.finish_reason is None:
                with self._lock:
                    if request.finish_reason is None:
                        for other, delta in batch.step():
                            other.inbox.append(delta)
                yield request
            if request.error is not None:
                raise request.error
        finally:
            with self._lock:
                batch.remove(request)

    def tokens(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[int]:
        """Yield the ids of one answer, the ending control token excluded."""
        said = 0
        for request in self._steps(prompt_ids, params, None):
            yield from request.ids[said:]
            said = len(request.ids)

    def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, cancel: threading.Event | None = None
    ) -> Iterator[Delta]:
        """Yield the answer's text as complete characters; the last Delta alone has a finish_reason.

        Stop strings end the answer and are not part of it. Raises ValueError when the prompt is too long,
        FloatingPointError when the model is broken.
        """
        for request in self._steps(prompt_ids, params, cancel):
            while request.inbox:
                delta = request.inbox.popleft()
                if delta.finish_reason != "error":
                    yield delta

    def batch(self, prompts: Sequence[Sequence[int]], params: SamplingParams, bar: str = "") -> list[list[int]]:
        """Generate one answer per prompt, many at a time. Row i draws from seed (params.seed, i).

        bar: title of a progress bar on a terminal; empty = none.
        """
        for prompt in prompts:
            room_for(prompt, self.context)
        batch = self.new_batch(max(1, min(MAX_BATCH, len(prompts))))
        requests = [batch.add(prompt, params, index=i) for i, prompt in enumerate(prompts)]
        with tqdm(total=len(prompts), desc=bar, leave=False, disable=None if bar else True) as shown:
            while batch.n_running or batch.n_waiting:
                for request, delta in batch.step():
                    if request.error is not None:
                        raise request.error
                    shown.update(delta.finish_reason is not None)
        return [request.ids for request in requests]

    def complete(self, prompts: Sequence[Sequence[int]], params: SamplingParams, bar: str = "") -> list[str]:
        """Like `batch`, decoded, and cut at the first stop string."""
        texts = [self.tokenizer.decode(ids) for ids in self.batch(prompts, params, bar)]
        return [text[: first_stop(text, params.stop)] for text in texts]
