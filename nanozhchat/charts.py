"""Charts of a report: thin lines on white, as PNG bytes. Needs no display and leaves matplotlib's settings alone.

Chinese text is drawn in Noto Sans SC, which comes as a package (SIL Open Font License): no empty boxes anywhere.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

WIDTH_IN, HEIGHT_IN, DPI = 5.4, 3.1, 190
SMOOTH_SHARE, START_SHARE = 0.02, 0.1  # memory of the smoothed line: of all points, and of those so far
INK, FAINT, GRID = "#24292f", "#66707a", "#e6e8eb"
BLUE, ORANGE = "#0072b2", "#d55e00"  # told apart by colour-blind readers (Okabe and Ito 2008)
CJK_FONT = "Noto Sans SC"
STYLE = {
    "font.family": ["DejaVu Sans", CJK_FONT], "font.size": 9, "text.color": INK, "axes.titlelocation": "left",
    "axes.titlesize": 10.5, "axes.titlepad": 10, "axes.labelcolor": FAINT, "xtick.color": FAINT, "ytick.color": FAINT,
    "ytick.major.size": 0, "xtick.major.size": 3,
    "axes.edgecolor": GRID, "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "legend.frameon": False, "legend.fontsize": 9,
}  # fmt: skip
X_SCALES = {
    "tokens": {"billion tokens seen": 1e9, "million tokens seen": 1e6, "tokens seen": 1.0},
    "flops": {"10^18 FLOPs": 1e18, "10^15 FLOPs": 1e15, "10^12 FLOPs": 1e12, "10^9 FLOPs": 1e9, "FLOPs": 1.0},
    "s": {"days of training": 86400.0, "hours of training": 3600.0, "minutes of training": 60.0, "seconds": 1.0},
}
Line = tuple[Sequence[float], Sequence[float]]  # x, y


def smooth(values: Sequence[float]) -> list[float]:
    """Return a running mean whose memory grows with the steps so far, so that it follows a steep start."""
    longest, mean, out = SMOOTH_SHARE * len(values), 0.0, []
    for i, value in enumerate(values):
        mean += (value - mean) / max(1.0, min(longest, START_SHARE * i))
        out.append(mean)
    return out


def draw_curve(title: str, unit: str, lines: Mapping[str, Line], levels: Mapping[str, float] | None = None) -> bytes:
    """Draw lines against "tokens", "flops" or "s": "training" smoothed, "held out" as points. levels: level lines."""
    last = max(max(x) for x, _ in lines.values())
    label, divisor = next((n, size) for n, size in X_SCALES[unit].items() if last >= size or size == 1.0)
    with _axes(title, HEIGHT_IN) as (axes, png):
        for (name, (x, y)), colour in zip(lines.items(), (BLUE, ORANGE), strict=False):
            x = [value / divisor for value in x]
            look = {"color": colour, "label": name, "linewidth": 1.5}
            if name == "training":
                axes.plot(x, y, color=colour, linewidth=0.6, alpha=0.25)
                y = smooth(y)
                look |= {"marker": "o", "markersize": 3.8} if len(y) == 1 else {}  # a line of one point is none
            if name == "held out":
                look |= {"linewidth": 0.7, "marker": "o", "markersize": 3.8}
                _write(axes, f"{y[-1]:.3f}", (x[-1], y[-1]), (0, 8), color=colour)
            axes.plot(x, y, **look)
        for i, (name, level) in enumerate(sorted((levels or {}).items(), key=lambda pair: -pair[1])):
            axes.axhline(level, color=FAINT, linewidth=1, linestyle=(0, (5, 3)))
            at = {"xycoords": ("axes fraction", "data"), "va": "top" if i else "bottom"}  # never on the line above
            _write(axes, f"{name}  {level:.3f}", (1, level), (-2, -3 if i else 3), color=FAINT, **at)
        axes.set_xlabel(label)
        if all(len(set(y)) == 1 for _, y in lines.values()):  # one height: ticks far enough apart to differ
            axes.set_ylim(min(y[0] for _, y in lines.values()) * 0.9, max(y[0] for _, y in lines.values()) * 1.1 or 1)
        axes.margins(0.02, 0.1)  # of a level line at the top the name has room below the legend
        if len(lines) == 1:
            axes.set_ylim(0, max(max(y) for _, y in lines.values()) * 1.12 or 1)
        else:
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1, ncols=2)
    return png.getvalue()


def draw_scores(scores: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw one bar a skill, the interval low-high as a whisker, chance as an upright mark; all are 0-1."""
    rows, names = range(len(scores)), [s["name"] for s in scores]
    with _axes("right answers, 95 % interval", 0.85 + 0.27 * len(scores)) as (axes, png):
        axes.barh(rows, [s["score"] for s in scores], height=0.62, color=BLUE, alpha=0.85)
        axes.hlines(rows, [s["low"] for s in scores], [s["high"] for s in scores], color=INK, linewidth=1.1)
        ends = [r - 0.36 for r in rows], [r + 0.36 for r in rows]
        axes.vlines([s["chance"] for s in scores], *ends, color=ORANGE, linewidth=2, label="blind guessing")
        for row, s in enumerate(scores):
            end = max(s["score"], s["high"], s["chance"])
            # beyond the bar the number would stand by chance's mark, and look like its value
            below = f" (guessing {100 * s['chance']:.0f} %)" if s["chance"] > s["score"] else ""
            _write(axes, f"{100 * s['score']:.3g} %{below}", (end, row), (6, 0), ha="left", va="center")
        axes.set_yticks(list(rows), names, color=INK)
        axes.set_xlim(0, 1.1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
        axes.set_ylim(len(scores) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1)
    return png.getvalue()


def draw_scaling(title: str, sweeps: Mapping[str, Sequence[Sequence[float]]]) -> bytes:
    """Draw runs as points and what was fitted to them as a line: label -> x, y of the runs, x, y of the line."""
    from matplotlib import colormaps

    with _axes(title, HEIGHT_IN) as (axes, png):
        for i, (name, (x, y, line_x, line_y)) in enumerate(sweeps.items()):
            colour = colormaps["viridis"](0.85 * i / max(1, len(sweeps) - 1))
            axes.plot(x, y, "o", color=colour, markersize=4.5, label=name)
            axes.plot(line_x, line_y, color=colour, linewidth=1)
        axes.set_xscale("log")
        axes.legend(loc="best")
    return png.getvalue()


def _write(axes: Any, text: str, at: tuple[float, float], offset: tuple[int, int], **look: Any) -> None:
    axes.annotate(text, at, xytext=offset, textcoords="offset points", **{"ha": "right", **look})


@contextmanager
def _axes(title: str, height_in: float) -> Iterator[tuple[Any, io.BytesIO]]:
    """Give the axes of a new picture, and the file it is drawn to at the end."""
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    font_manager.fontManager.addfont(str(files("pylopdf_fonts_zh_cn") / "NotoSansSC-Regular.otf"))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(title=title)
        for axis in (axes.xaxis, axes.yaxis):  # 12,000 as 12k
            axis.set_major_formatter(lambda v, _: f"{v / 1000:,.4g}k" if abs(v) >= 1000 else f"{v:.4g}")
        png = io.BytesIO()
        yield axes, png
        figure.savefig(png, format="png", metadata={"Software": None})
