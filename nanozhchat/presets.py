"""Public data sets by short name: facts only (hub id, columns, size, licence), for `--data=NAME` and `--list`.

None of them has been fetched by this project's tests, which run offline. Columns and sizes
were read on the data sets' own pages; a hub may rename files, then `hf:<dataset>` with `--text-field` still works.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Preset:
    """One public data set. kind: "text" for pretraining, "sft" for conversations; columns: what is read of a row."""

    name: str
    hub_id: str
    columns: tuple[str, ...]
    size: str
    licence: str
    kind: str = "text"
    config: str | None = None
    split: str = "train"
    files: str | None = None  # path or glob inside the data set's repository, when only some files are wanted
    revision: str = "main"  # branch, tag or commit; the commit found at the first fetch is kept (`hub.py`)
    note: str = ""


@cache
def presets() -> dict[str, Preset]:
    """Read `presets.json`: the data sets by name."""
    rows: list[dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    found = (Preset(**row | {"columns": tuple(row["columns"])}) for row in rows)
    return {preset.name: preset for preset in found}
