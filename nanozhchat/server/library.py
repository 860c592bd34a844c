"""The checkpoints that can be asked for: listed anew when asked, loaded when first used, few in memory at once."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

from nanozhchat import paths
from nanozhchat.batching import Batch
from nanozhchat.server import schemas
from nanozhchat.server.scheduler import Limits, Scheduler
from nanozhchat.server.schemas import ApiError

if TYPE_CHECKING:
    from nanozhchat.chat import Chat

log = logging.getLogger(__name__)

KEEP = 2  # models in memory; two are compared side by side


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listed:
    """A checkpoint by the name clients use. created: Unix seconds."""

    name: str
    tag: str
    source: str
    step: int
    created: int


class Loaded:
    """A model in memory with its worker."""

    def __init__(self, chat: Chat, new_batch: Callable[[Chat, int], Batch], limits: Limits) -> None:
        """Start the worker."""
        self.chat, self.used, self.pins = chat, time.monotonic(), 0
        self.scheduler = Scheduler(lambda: new_batch(chat, limits.running), limits)


def new_batch(chat: Chat, rows: int) -> Batch:
    """Make the batch that a model's requests join, so many at once."""
    return chat.engine.new_batch(rows)


def list_checkpoints(first: Chat) -> list[Listed]:
    """List `first` under its bare tag, then every other checkpoint on disk as `tag:stage:step`."""
    from nanozhchat import checkpoint  # imports torch, which a server of another kind of model can do without

    found = [Listed(name=first.name, tag=first.name, source=first.source, step=first.step, created=int(time.time()))]
    root = paths.base_dir()
    for stage in reversed(paths.STAGES):
        for folder in sorted((root / stage).glob("*")):
            if not paths.TAG_PATTERN.fullmatch(folder.name) or not folder.resolve().is_relative_to(root.resolve()):
                continue
            for step in reversed(checkpoint.list_steps(folder)):
                if (folder.name, stage, step) != (first.name, first.source, first.step):
                    written = int((folder / f"step_{step:08d}" / "manifest.json").stat().st_mtime)
                    name = f"{folder.name}:{stage}:{step}"
                    found.append(Listed(name=name, tag=folder.name, source=stage, step=step, created=written))
    return found


class Library:
    """Finds models by name. The first one listed is the default, loaded from the start and never unloaded."""

    def __init__(
        self, first: Chat, listed: Callable[[], Sequence[Listed]] | None = None,
        load: Callable[[Listed], Chat] | None = None, *, batch: Callable[[Chat, int], Batch] | None = None,
    ) -> None:  # fmt: skip
        """listed: says what can be asked for, `first` first. load: reads one; called in a thread."""
        self._list = listed or (lambda: list_checkpoints(first)[:1])
        self.listed = self.refresh()
        self.default = next(iter(self.listed))
        self.draining = False
        self.limits = Limits()
        self._first, self._load, self._batch = first, load, batch or new_batch
        self.loaded: dict[str, Loaded] = {}  # models in memory by name
        self._loading = asyncio.Lock()

    def start(self, limits: Limits) -> None:
        """Put the default model to work."""
        self.limits = limits
        self.loaded[self.default] = Loaded(self._first, self._batch, limits)

    @contextlib.asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[Loaded]:
        """Find a model, loading it if need be, and keep it in memory while in use.

        Raises ApiError 404 for a name that is not listed, 503 when it cannot be loaded now.
        """
        item = self.find(name)
        if item.name not in self.loaded:
            async with self._loading:
                if item.name not in self.loaded:
                    await self._bring(item)
        model = self.loaded[item.name]
        model.pins, model.used = model.pins + 1, time.monotonic()
        try:
            yield model
        finally:
            model.pins -= 1

    def refresh(self) -> dict[str, Listed]:
        """List again, since training goes on while a server runs."""
        self.listed = {item.name: item for item in self._list()}
        return self.listed

    def find(self, name: str | None) -> Listed:
        """Look a name up in the list; None = the default. Raises ApiError 404."""
        item = self.listed.get(self.default if name is None else name) or self.refresh().get(str(name))
        # A tag alone means its furthest stage and newest step, which is listed first.
        item = item or next((one for one in self.listed.values() if one.tag == name), None)
        if item is None:
            message = f"that model is not served here; GET /v1/models lists those that are, such as {self.default}"
            raise ApiError(404, message, code="model_not_found", param="model")
        return item

    async def _bring(self, item: Listed) -> None:
        if self.draining or self._load is None:
            raise ApiError(503, "the server is stopping", code="server_stopping", retry_after_s=5)
        if len(self.loaded) >= KEEP:
            idle = [n for n, model in self.loaded.items() if n != self.default
                    and not (model.pins or model.scheduler.running or model.scheduler.queued)]  # fmt: skip
            if not idle:
                raise ApiError(503, "the other models are busy", code="models_busy", retry_after_s=5)
            oldest = self.loaded.pop(min(idle, key=lambda n: self.loaded[n].used))
            await asyncio.to_thread(oldest.scheduler.stop)
        try:
            chat = await asyncio.to_thread(self._load, item)
        except FileNotFoundError:
            raise ApiError(404, "that model is not there any more", code="model_not_found", param="model") from None
        except Exception as error:
            log.exception("model %s cannot be loaded", item.name)
            message = "that model cannot be loaded; the server's log has the reason"
            raise ApiError(503, message, code="model_unavailable", param="model") from error
        self.loaded[item.name] = Loaded(chat, self._batch, self.limits)

    def drain(self) -> None:
        """Refuse new work everywhere."""
        self.draining = True
        for model in self.loaded.values():
            model.scheduler.drain()

    def abort(self) -> None:
        """End all work with an error event."""
        self.draining = True
        for model in self.loaded.values():
            model.scheduler.abort()

    def stop(self) -> None:
        """Abort and wait for the workers."""
        self.abort()
        for model in self.loaded.values():
            model.scheduler.stop()

    def model_object(self, item: Listed) -> dict[str, Any]:
        """Describe a model: the OpenAI fields, then where it comes from; once loaded, its context and sampling."""
        about: dict[str, Any] = {"id": item.name, "object": "model", "created": item.created, "owned_by": "nanozhchat"}
        about |= {"tag": item.tag, "source": item.source, "step": item.step, "loaded": item.name in self.loaded}
        model = self.loaded.get(item.name) or self.loaded[self.default]
        context = model.chat.engine.context
        sampling = schemas.ranges(context)
        return {**about, "context_length": context if about["loaded"] else None, "sampling": sampling}
