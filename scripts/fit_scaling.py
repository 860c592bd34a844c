"""Fit scaling laws to the finished runs of a sweep: table, picture, best sizes and power laws with 95 % intervals."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanozhchat import cli, files, paths
from nanozhchat.charts import draw_scaling
from nanozhchat.report_data import Stage, read_object, show, table
from nanozhchat.scaling import Sweep, laws

COLUMNS = ("tag", "depth", "params", "scaling_params", "tokens", "flops", "bpb", "time_s", "budget")


@dataclass(frozen=True, kw_only=True)
class FitArgs:
    name: str = cli.opt("laws", "beginning of the runs' tags; results go to report/NAME")
    seed: int = cli.opt(0, "of the bootstrap")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the runs, fit, write runs.csv, laws.json, laws.md and laws.png."""
    args = cli.parse(FitArgs, argv)
    rows, folder, text = read_runs(args.name), paths.report_dir(args.name), io.StringIO()
    sweeps = {b: Sweep.of([r for r in rows if r["budget"] == b]) for b in dict.fromkeys(r["budget"] for r in rows)}
    found = laws([s for b, s in sweeps.items() if b], np.random.default_rng(args.seed)) if any(sweeps) else {}
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    against = "parameters in matrices and head"
    lines = {f"{b:.2g} FLOPs" if b else "runs": s.drawn() for b, s in sweeps.items()}
    png = draw_scaling(f"held-out bits per byte against {against}", lines)
    report = "\n\n".join([f"# {args.name}", *describe(rows, found), f"![Bits per byte against {against}](laws.png)\n"])
    files.write_json(folder / "laws.json", found)
    for name, content in (("runs.csv", text.getvalue().encode()), ("laws.md", report.encode()), ("laws.png", png)):
        files.atomic_write(folder / name, content)
    print(f"{report}\n{folder}")


def read_runs(name: str) -> list[dict[str, Any]]:
    """Return the finished runs whose tag begins with `name-`; raises FileNotFoundError if there are none."""
    rows, base = [], paths.base_dir() / "base"
    paths.check_tag(name)
    for tag in sorted(path.parent.name for path in paths.run_files("recipe.json") if path.match(f"base/{name}-*/*")):
        stage = Stage("base", tag)
        if (made := stage.recipe) is None or not any(e.get("event") == "done" for e in stage.events):
            continue
        row = {k: stage.last(v) for k, v in (("flops", "flops"), ("bpb", "val/bpb"), ("time_s", "time_s"))}
        row |= {"tag": tag, "depth": made.depth, "params": made.num_params, "tokens": int(stage.last("tokens"))}
        budget = read_object(base / tag / "config.yaml").get("target_flops")  # YAML takes 1e+18 for text
        spent = bool(budget) and abs(stage.last("flops") / float(budget) - 1) < 0.1  # else too few steps
        rows.append({**row, "scaling_params": made.scaling_params, "budget": float(budget) if spent else None})
    if not rows:
        raise FileNotFoundError(f"no finished run {name}-* under {base}; `bash runs/scaling_laws.sh` makes some")
    return sorted(rows, key=lambda r: (r["budget"] or 0, r["depth"]))


def describe(rows: Sequence[dict[str, Any]], found: dict[str, Any]) -> list[str]:
    """Return the paragraphs of the report."""
    form = {"flops": "{:.3g}", "bpb": "{:.4f}", "time_s": "{:.0f}", "budget": "{:.3g}", "tag": "{}"}
    cells = [[form.get(c, "{:,}").format(r[c]) if r[c] is not None else "" for c in COLUMNS] for r in rows]
    blocks = [table(COLUMNS, cells, range(1, len(COLUMNS)))]
    best = []
    for o in found.get("optima", ()):
        span = " – ".join(f"{n:,.0f}" for n in o["params_95"] or ()) or "-"
        size = [show(o[k], "{:,.0f}") for k in ("params", "tokens")]
        best.append((f"{o['flops']:.3g}", size[0], span, size[1], show(o["bpb"], "{:.4f}")))
    if best:
        blocks.append(table(("FLOPs", "best parameters", "95 %", "tokens", "bits per byte"), best, range(5)))
        blocks.append("*No best size: the lowest point of that budget's parabola does not lie between its runs.*")
    for name in ("params", "tokens"):
        if law := found.get(name):
            span = " to ".join(f"{n:.3f}" for n in law["exponent_95"] or ()) or "no interval: too few runs"
            blocks.append(f"{name} = {law['factor']:.4g} × FLOPs^{law['exponent']:.3f} ({span})")
    return blocks


if __name__ == "__main__":
    cli.run(main)
