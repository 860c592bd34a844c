"""Numbers for Prometheus, in its text format."""

import contextlib
import resource
from collections.abc import Iterable, Mapping
from pathlib import Path

from nanozhchat.server.library import Library

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def render(library: Library, statuses: Mapping[int, int]) -> str:
    """Return all figures. statuses: responses so far by HTTP status."""
    models = {name: model.scheduler for name, model in library.loaded.items()}
    lines = _family("requests_total", "counter", ((f'status="{code}"', n) for code, n in sorted(statuses.items())))
    for key in ("jobs", "prompt_tokens", "completion_tokens"):
        lines += _family(f"{key}_total", "counter", ((f'model="{n}"', s.totals[key]) for n, s in models.items()))
    lines += _family("running", "gauge", ((f'model="{n}"', s.running) for n, s in models.items()))
    lines += _family("queued", "gauge", ((f'model="{n}"', s.queued) for n, s in models.items()))
    times = {name: sorted(s.first_token_s) for name, s in models.items()}
    quantiles = ((f'model="{name}",quantile="{q}"', round(some[int(q * len(some))], 6))
                 for name, some in times.items() if some for q in (0.5, 0.9, 0.99))  # fmt: skip
    lines += _family("first_token_seconds", "summary", quantiles)
    lines += ["# TYPE process_resident_memory_bytes gauge", f"process_resident_memory_bytes {resident_bytes()}"]
    return "\n".join(lines) + "\n"


def _family(name: str, kind: str, rows: Iterable[tuple[str, float]]) -> list[str]:
    name = f"nanozhchat_{name}"
    return [f"# TYPE {name} {kind}", *(f"{name}{{{labels}}} {n}" for labels, n in rows)]


def resident_bytes() -> int:
    """Memory of this process now; where the system does not tell, its peak."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
