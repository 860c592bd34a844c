"""Where the work runs: device, number format, ranks. The only module that asks what hardware is there."""

import contextlib
import ctypes
import itertools
import logging
import os
import sys
import threading
import time
import timeit
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nanozhchat.errors import OutOfMemoryError, RankLostError, RunError
from nanozhchat.hardware import find_device

log = logging.getLogger(__name__)
T = TypeVar("T")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COLLECTIVE_TIMEOUT_S = 600
GO_ON = "the same command continues from the last checkpoint"
HEARTBEAT_S = 0.2  # between rank 0's signs of life while the others wait for its work
WORK_ENDED = 2**40  # more than any number of them
PROBE_SHAPE = (2048, 512, 2048)  # rows, inner, columns of the matmul that measures a CPU
GLANCE_SHAPE = (128, 256, 256)  # before it: a CPU without bfloat16 units is a hundred times slower in it, for minutes
GLANCE_GAIN = 0.25  # with less no closer look is needed
BF16_GAIN = 2.0  # bfloat16 must beat float32 by this in the probe: the rest of the step gains less


@dataclass(frozen=True)
class Compute:
    """Device, activation dtype and place among the ranks; made once in `main()` and passed down."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    rank: int = 0
    world_size: int = 1
    peak_flops: float = 0.0  # of this rank, FLOP/s; 0 = not measured
    store: dist.Store | None = None  # what the ranks of this attempt share
    works: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)  # in which they agree

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that prints and writes."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Add up float64 numbers over all ranks."""
        return self._shared(values, dist.all_reduce)

    def broadcast(self, values: list[float]) -> list[float]:
        """Give every rank the numbers of rank 0."""
        return self._shared(values, lambda shared: dist.broadcast(shared, 0))

    def _shared(self, values: list[float], collective: Callable[[Tensor], object]) -> list[float]:
        if self.world_size == 1:
            return values
        kind = torch.float32 if self.device.type in ("mps", "xpu") else torch.float64
        shared = torch.tensor(values, dtype=kind, device=self.device)
        collective(shared)
        return shared.tolist()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def work_of_main(self) -> Iterator[None]:
        """Hold the other ranks at the end of the block until rank 0 gets there, be it hours, as long as it lives.

        No collective has a timeout for that: one of hours would also wait so long for a rank that is lost. Raises
        RankLostError when rank 0 shows no sign of life.
        """
        if self.store is None:
            yield
            return
        key = f"work/{next(self.works)}"
        if not self.is_main:
            yield
            _watch(self.store, key)
            return
        ended, store = threading.Event(), self.store

        def beat() -> None:
            with contextlib.suppress(RuntimeError):  # a store that is gone: the end of the work will say so
                while not ended.wait(HEARTBEAT_S):
                    store.add(key, 1)

        (thread := threading.Thread(target=beat, daemon=True)).start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            store.add(key, WORK_ENDED)

    def gather(self, value: object) -> list[object]:
        """Collect one plain object per rank, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[object] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do what may fail on one rank alone: returns all ranks' results, or raises one rank's error on every rank."""
        done: list[T] = []
        failure: Exception | None = None
        try:
            done.append(work())
        except (RunError, ValueError, OSError) as error:
            failure = error
        everyone: list[Any] = self.gather((done, failure))
        if found := [error for _, error in everyone if error is not None]:
            raise failure or found[0]
        return [value for (value,), _ in everyone]

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it, so that a clock means something."""
        if self.device.type in ("cuda", "xpu", "mps"):
            getattr(torch, self.device.type).synchronize()

    def free_cache(self) -> None:
        """Give freed device memory back, before trying a smaller batch."""
        if self.device.type in ("cuda", "xpu", "mps"):
            getattr(torch, self.device.type).empty_cache()

    def memory_bytes(self) -> int:
        """Peak memory so far: of the device, or resident memory of the process on a CPU."""
        if self.device.type in ("cuda", "xpu"):
            return int(getattr(torch, self.device.type).max_memory_allocated())
        if self.device.type == "mps":
            return int(torch.mps.current_allocated_memory())
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def detect_device(asked: str | None) -> str:
    """Choose cuda, xpu, mps or cpu, in this order, or check that what was asked for is there."""
    there = {"cuda": torch.cuda.is_available, "xpu": lambda: hasattr(torch, "xpu") and torch.xpu.is_available(),
             "mps": torch.backends.mps.is_available, "cpu": lambda: True}  # fmt: skip
    if asked and asked != "auto":
        if asked not in there:
            raise ValueError(f"--device-type={asked!r} is unknown; choose from {', '.join(there)}")
        if not there[asked]():
            raise ValueError(f"--device-type={asked} is not available on this machine; try --device-type=cpu")
        return asked
    return next(name for name, available in there.items() if available())


def require_memory(needed: int, device: torch.device) -> None:
    """Raise OutOfMemoryError if `needed` bytes a rank, an estimate, are far beyond the memory there is for a CPU."""
    needed *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if device.type == "cpu" else needed
    if needed > 1.25 * there:
        raise OutOfMemoryError(f"about {needed / 2**30:,.0f} GiB are needed, this machine has {there / 2**30:,.0f}; "
                               "pass a smaller --depth, --max-seq-len or --device-batch-size")  # fmt: skip


def matmul_flops(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int] | None = None) -> float:
    """Measure FLOP/s of a matmul on a CPU, training-sized unless a shape is given: in about 0.1 s."""
    rows, inner, columns = shape or PROBE_SHAPE
    a, b = torch.randn(rows, inner, device=device).to(dtype), torch.randn(inner, columns, device=device).to(dtype)
    return 2 * rows * inner * columns / min(timeit.repeat(lambda: a @ b, number=1, repeat=4))


def _bfloat16_gain(device: torch.device, shape: tuple[int, int, int]) -> float:
    # Each at its best of several: beside other work one measurement may be off by a hundred.
    kinds = (torch.float32, torch.bfloat16)
    best = {dtype: max(matmul_flops(device, dtype, shape) for _ in range(3)) for dtype in kinds}
    return best[torch.bfloat16] / best[torch.float32]


def detect_dtype(device: torch.device, asked: str | None, *, measure: bool) -> tuple[torch.dtype, str]:
    """Choose the activation dtype and say why.

    asked: --dtype, else $NANOZHCHAT_DTYPE. measure: let a CPU's speed decide; otherwise CPUs use float32, in which
    runs with different numbers of ranks agree closely.
    """
    asked = asked if asked and asked != "auto" else os.environ.get("NANOZHCHAT_DTYPE")
    if asked:
        if asked not in DTYPES:
            raise ValueError(f"--dtype={asked!r} is unknown; choose from {', '.join(DTYPES)}; int8 decodes")
        return DTYPES[asked], "asked for"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device)[0] >= 8:
            return torch.bfloat16, "this GPU has bfloat16 tensor cores"
        return torch.float16, "this GPU has no bfloat16 tensor cores; the loss is scaled"
    if device.type == "xpu":
        return torch.bfloat16, "Intel GPUs have bfloat16 units"
    if device.type == "cpu" and measure:
        gain = _bfloat16_gain(device, GLANCE_SHAPE)
        if gain > GLANCE_GAIN:
            gain = _bfloat16_gain(device, PROBE_SHAPE)
        if gain >= BF16_GAIN:
            return torch.bfloat16, f"measured: bfloat16 matmul {gain:.1f} x as fast as float32"
        return torch.float32, f"measured: bfloat16 matmul only {gain:.2f} x as fast as float32"
    hint = "; with --budget, or --dtype=bfloat16, it may train faster" if device.type == "cpu" else ""
    return torch.float32, f"the default on {device.type}{hint}"


def must_emulate_fp8(device: torch.device) -> bool:
    """Whether --fp8 has to be emulated (a CPU: slow, for tests). Raises ValueError for a GPU without such units."""
    if device.type == "cpu":
        log.warning("--fp8 on a CPU rounds to 8 bits but multiplies in float32: slower, for trying it out")
        return True
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(f"--fp8 needs a CUDA device of compute capability 8.9 or later, not {device}; leave it out")
    return False


def _keep_freed_memory() -> None:
    """Tell glibc to reuse freed blocks instead of returning them: large activations then cost no page faults."""
    m_trim_threshold, m_mmap_threshold, limit = -1, -3, 2**30
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, limit)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


@contextlib.contextmanager
def start(
    device_type: str | None = None, dtype: str | None = None, *, measure: bool = False, tf32: bool = True
) -> Iterator[Compute]:
    """Find the device, join the process group when launched by torchrun, and leave it at the end.

    tf32: let CUDA multiply what stays float32 in TF32. Raises RankLostError when another rank is lost or silent.
    """
    kind = detect_device(device_type)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(kind, local_rank) if kind in ("cuda", "xpu") else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
    if kind == "cpu" and sys.platform == "linux":
        _keep_freed_memory()
    store = None
    try:
        with _rank_errors(world_size):
            if world_size > 1:
                backend = {"cuda": "nccl", "xpu": "xccl"}.get(kind, "gloo")
                place = {"rank": rank, "world_size": world_size}
                store = _fresh_store(**place)
                dist.init_process_group(backend, store=store, timeout=_timeout(), **place)
            chosen, reason = detect_dtype(device, dtype, measure=measure and rank == 0)
            kinds = list(DTYPES.values())  # rank 0's measurement decides for all
            [index] = Compute(device, chosen, rank, world_size).broadcast([float(kinds.index(chosen))])
            chosen = kinds[int(index)]
            log.info("device %s, %d rank(s), %s: %s", device, world_size, str(chosen).removeprefix("torch."), reason)
            yield Compute(device, chosen, rank, world_size, _peak(device, chosen), store)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _fresh_store(rank: int, world_size: int) -> dist.Store:
    """Return a store that the ranks of this attempt share and no others.

    torchrun keeps its store when it starts the ranks again, with the addresses of the dead ones in it, and its count of
    restarts may differ between nodes. So every rank asks under a new name, and rank 0 answers the names it sees, those
    of the dead included, until the living have confirmed.
    """
    store, mine = next(dist.rendezvous("env://", timeout=_timeout()))[0], uuid.uuid4().hex
    if rank:
        store.set(f"ask/{rank}", mine)
        attempt = store.get(f"answer/{mine}").decode()  # waits
        store.set(f"{attempt}/{rank}", "here")
        return dist.PrefixStore(attempt, store)
    missing, end = set(range(1, world_size)), time.monotonic() + _timeout().total_seconds()
    while missing := {r for r in missing if not store.check([f"{mine}/{r}"])}:
        if time.monotonic() > end:
            raise RankLostError(f"rank(s) {sorted(missing)} did not start within {_timeout().total_seconds():g} s")
        for asking in [f"ask/{r}" for r in missing if store.check([f"ask/{r}"])]:
            store.set(f"answer/{store.get(asking).decode()}", mine)
        time.sleep(0.02)
    return dist.PrefixStore(mine, store)


def _watch(store: dist.Store, key: str) -> None:
    """Wait for the end of rank 0's work while its count of heartbeats grows."""
    seen, failure = [(-1, time.monotonic())], list[RuntimeError]()

    def read() -> None:  # in a thread, as it never returns when the process that holds the store is stopped
        try:
            while seen[-1][0] < WORK_ENDED:
                if (count := store.add(key, 0)) != seen[-1][0]:
                    seen[:] = [(count, time.monotonic())]
                time.sleep(HEARTBEAT_S)
        except RuntimeError as error:
            failure.append(error)

    (thread := threading.Thread(target=read, daemon=True)).start()
    while seen[-1][0] < WORK_ENDED:
        thread.join(HEARTBEAT_S)
        if failure:
            raise failure[0]
        if time.monotonic() - seen[-1][1] > _timeout().total_seconds():
            raise RankLostError(f"rank 0 showed no sign of life for {_timeout().total_seconds():g} s; {GO_ON}")
    thread.join()


@contextlib.contextmanager
def _rank_errors(world_size: int) -> Iterator[None]:
    """Say in one line that a collective failed: the other end is dead, or silent for longer than the timeout."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if world_size == 1 or not (isinstance(error, dist.DistError) or "gloo" in text or "onnection" in text):
            raise
        reason = f"did not answer for {_timeout().total_seconds():g} s ({text.splitlines()[0][:120]})"
        raise RankLostError(f"another rank died or {reason}; {GO_ON}") from error


def _timeout() -> timedelta:
    """How long a rank waits for the others."""
    return timedelta(seconds=float(os.environ.get("NANOZHCHAT_TIMEOUT_S") or COLLECTIVE_TIMEOUT_S))


def _peak(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s of one rank: the datasheet's for a known GPU, measured on a CPU, 0 if unknown."""
    if device.type == "cpu":
        return matmul_flops(device, dtype)
    known = find_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return known.flops if known else 0.0


def reduce_scatter(full: Tensor, compute: Compute) -> Tensor:
    """Sum `full` (W * n, ...) over ranks and return this rank's n rows."""
    if compute.world_size == 1:
        return full
    rows = full.size(0) // compute.world_size
    shard = full.new_empty(rows, *full.shape[1:])
    dist.reduce_scatter_tensor(shard, full.contiguous())
    return shard


def all_gather(full: Tensor, shard: Tensor, compute: Compute) -> None:
    """Fill `full` (W * n, ...) in place with the n rows of every rank."""
    if compute.world_size > 1:
        dist.all_gather_into_tensor(full, shard.contiguous())


def all_reduce(values: Tensor, compute: Compute) -> Tensor:
    """Sum a tensor over ranks in place."""
    if compute.world_size > 1:
        dist.all_reduce(values)
    return values
