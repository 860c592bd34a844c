"""Generation: token ids in, text out as it comes, or many prompts at once. All of it runs through `batching.Batch`."""

import threading
from collections.abc import Iterator, Sequence

import torch

from nanozhchat.batching import TURN_TOKENS, Batch, Decoder, Delta, Part, Request, first_stop, room_for
from nanozhchat.gpt import GPT, rms_norm
from nanozhchat.kv_cache import CacheRows, KVCache
from nanozhchat.native import NativeDecoder, Scorer, native_model
from nanozhchat.sampling import Floats, SamplingParams
from nanozhchat.tokenizer import Tokenizer

KINDS = ("torch", "native", "native-int8")
MAX_BATCH = 32  # sequences decoded together


class TorchDecoder(Decoder):
    """The plain PyTorch path: any device, any dtype, and the reference for every faster one."""

    def __init__(self, model: GPT, n_slots: int) -> None:
        c = model.config
        super().__init__(n_slots, c.sequence_len)
        self.model, self.device = model, model.wte.weight.device
        sizes = {"n_slots": n_slots, "max_len": self.context, "device": self.device, "dtype": model.dtype}
        self.cache = KVCache(c.n_layer, c.n_kv_head, c.head_dim, **sizes)

    def rows(self, slots: Sequence[int]) -> CacheRows:
        """Return slots as rows of a batch, ready to be continued."""
        empty = torch.tensor([not self.held[s] for s in slots], device=self.device)
        last = torch.tensor([[self.held[s][-1] if self.held[s] else 0] for s in slots], device=self.device)
        previous = rms_norm(self.model.wte(last).to(self.model.dtype))
        return CacheRows(self.cache, slots, previous.masked_fill(empty[:, None, None], 0))

    @torch.inference_mode()
    def forward(self, parts: Sequence[Part]) -> list[Floats]:
        """Append each part to its slot; return (wanted, vocab_size) logits for each. Equal lengths run together."""
        out: dict[int, Floats] = {}
        for length in {len(p.ids) for p in parts}:
            group = sorted((p for p in parts if len(p.ids) == length), key=lambda p: p.slot)
            ids = torch.tensor([list(p.ids) for p in group], device=self.device)
            hidden = self.model.hidden(ids, self.rows([p.slot for p in group]))  # (B, T, C)
            for part in group:
                self.held[part.slot] += part.ids
            if wanted := max(p.wanted for p in group):
                context = self.model.context([self.held[p.slot] for p in group], wanted)
                logits = self.model.logits(hidden[:, -wanted:], context).cpu().numpy()  # (B, wanted, V)
                out |= {p.slot: logits[row, wanted - p.wanted :] for row, p in enumerate(group)}
        return [out.get(p.slot, NO_LOGITS) for p in parts]

    def copy(self, source: int, target: int, n: int) -> None:
        """Make `target` hold the first n tokens of `source`."""
        self.cache.copy(source, target, n)
        super().copy(source, target, n)

    def truncate(self, slot: int, n: int) -> None:
        """Keep only the first n tokens of a slot."""
        self.cache.lengths[slot] = n
        super().truncate(slot, n)

    def clear(self, slot: int) -> None:
        """Empty a slot whose content may not be finite."""
        self.cache.clear(slot)
        super().clear(slot)


NO_LOGITS: Floats = torch.empty(0, 0).numpy()


class Engine:
    """A model and its tokenizer, ready to generate. After its weights have changed, make a new one.

    kind: "torch" runs the model itself, on any device; "native" and "native-int8" run packed copies of its weights
    on the CPU. Raises ValueError for a kind that cannot run this model.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, *, kind: str = "torch") -> None:
        self.model, self.tokenizer, self.kind = model, tokenizer, kind
        if kind not in KINDS:
            raise ValueError(f"engine {kind!r} is unknown; choose from {', '.join(KINDS)}")
        if kind != "torch" and (model.wte.weight.device.type != "cpu" or model.dtype != torch.float32):
            raise ValueError(f"engine {kind!r} runs on a CPU from float32 weights; choose --engine=torch")
        if kind != "torch" and model.config.gpt2:
            raise ValueError(f"engine {kind!r} does not know GPT-2's network; choose --engine=torch")
        if kind != "torch" and model.config.ngrams:
            raise ValueError(f"engine {kind!r} does not know n-gram counts, which only base models have; choose "
                             "--engine=torch, or the chat model")  # fmt: skip
        self._packed = None if kind == "torch" else native_model(model, int8=kind == "native-int8")
        self.context = model.config.sequence_len
        self.end_ids = frozenset(map(tokenizer.special, TURN_TOKENS))
        self._shared: Batch | None = None  # of all streams: a later turn of a chat finds the earlier ones
        self._lock = threading.Lock()

    def new_batch(self, max_rows: int = MAX_BATCH, *, drafts: bool = True) -> Batch:
        """Return an empty batch of its own with slots for `max_rows` requests at once. drafts: see `Batch`."""
        return Batch(self.new_decoder(max_rows), self.tokenizer, drafts=drafts)

    def new_decoder(self, n_slots: int) -> Decoder:
        """Return slots for `n_slots` sequences, to be fed token by token."""
        if self._packed is None:
            return TorchDecoder(self.model, n_slots)
        sizes = {"context": self.context, "vocab_size": self.model.config.vocab_size}
        return NativeDecoder(self._packed, n_slots=n_slots, **sizes)

    def scorer(self) -> torch.nn.Module:
        """Return what computes the loss with this engine's numbers: called like the model."""
        decoder = self.new_decoder(1)
        return Scorer(decoder) if isinstance(decoder, NativeDecoder) else self.model

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

    def tokens(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, cancel: threading.Event | None = None
    ) -> Iterator[int]:
        """Yield the ids of one answer, the ending control token excluded."""
        said = 0
        for request in self._steps(prompt_ids, params, cancel):
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

    def batch(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[int]]:
        """Generate one answer per prompt, many at a time. Row i draws from seed (params.seed, i)."""
        for prompt in prompts:
            room_for(prompt, self.context)
        batch = self.new_batch(max(1, min(MAX_BATCH, len(prompts))))
        requests = [batch.add(prompt, params, index=i) for i, prompt in enumerate(prompts)]
        while batch.n_running or batch.n_waiting:
            for request, _ in batch.step():
                if request.error is not None:
                    raise request.error
        return [request.ids for request in requests]

    def complete(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[str]:
        """Like `batch`, decoded, and cut at the first stop string."""
        texts = [self.tokenizer.decode(ids) for ids in self.batch(prompts, params)]
        return [text[: first_stop(text, params.stop)] for text in texts]
