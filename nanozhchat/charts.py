"""Charts of a report: thin lines on white or dark, as PNG bytes. Uses matplotlib without its global state.

Texts are English. Names from outside (tasks) may be Chinese: they are drawn when a font for them is installed, and
replaced by a number otherwise, so that no chart shows empty boxes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH_IN, HEIGHT_IN, DPI = 5.4, 3.1, 190
SMOOTH_SHARE, START_SHARE = 0.02, 0.1  # memory of the smoothed line: of all points, and of those so far
CJK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "SimHei",
    "Heiti SC",
    "Droid Sans Fallback",
    "Arial Unicode MS",
)


@dataclass(frozen=True)
class Theme:
    """Colours of one look; the first three are told apart by colour-blind readers (Okabe and Ito 2008)."""

    background: str
    ink: str
    faint: str
    grid: str
    blue: str
    orange: str
    green: str


LIGHT = Theme("#ffffff", "#24292f", "#66707a", "#e6e8eb", "#0072b2", "#d55e00", "#00805e")
DARK = Theme("#161b22", "#e6edf3", "#98a2ad", "#2b323b", "#56b4e9", "#f0a030", "#33c49a")


@dataclass(frozen=True)
class Series:
    """One line. noisy: drawn faintly with a smoothed line on top. points: marked, its last value written out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    noisy: bool = False
    points: bool = False


@dataclass(frozen=True)
class Curve:
    """A line chart. levels: named horizontal lines. unit: of the x axis, "tokens" or "s"."""

    title: str
    unit: str
    series: Sequence[Series]
    levels: dict[str, float] = field(default_factory=dict)
    from_zero: bool = False


@dataclass(frozen=True)
class Bar:
    """One score with its 95 % interval and the score of blind guessing, all 0-1."""

    name: str
    score: float
    low: float
    high: float
    chance: float


def smooth(values: Sequence[float]) -> list[float]:
    """Return a running mean whose memory grows with the steps so far, so that it follows a steep start."""
    longest, mean, out = SMOOTH_SHARE * len(values), 0.0, []
    for i, value in enumerate(values):
        mean += (value - mean) / max(1.0, min(longest, START_SHARE * i))
        out.append(mean)
    return out


def draw_curve(curve: Curve, theme: Theme = LIGHT) -> bytes:
    """Draw a line chart."""
    figure, axes = _canvas(theme, HEIGHT_IN)
    colours = (theme.blue, theme.orange, theme.green)
    divisor, x_label = _x_scale(curve)
    highest = max((max(s.y) for s in curve.series), default=1.0)
    for series, colour in zip(curve.series, colours, strict=False):
        x = [value / divisor for value in series.x]
        if series.noisy:
            axes.plot(x, series.y, color=colour, linewidth=0.6, alpha=0.25)
            axes.plot(x, smooth(series.y), color=colour, linewidth=1.6, label=series.name)
        else:
            width, marker = (0.7, "o") if series.points else (1.4, None)
            axes.plot(x, series.y, color=colour, linewidth=width, marker=marker, markersize=3.8, label=series.name)
        if series.points:
            axes.annotate(
                f"{series.y[-1]:.3f}",
                (x[-1], series.y[-1]),
                xytext=(0, 8),
                textcoords="offset points",
                ha="right",
                color=colour,
                fontsize=9,
                fontweight="bold",
            )
    for name, level in curve.levels.items():
        axes.axhline(level, color=theme.faint, linewidth=1, linestyle=(0, (5, 3)))
        axes.annotate(
            f"{name}  {level:.3f}",
            (1, level),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            color=theme.faint,
            fontsize=9,
        )
    axes.set_title(curve.title, loc="left", fontsize=10.5, color=theme.ink, pad=10)
    axes.set_xlabel(x_label, color=theme.faint, fontsize=9)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.margins(x=0.02)
    if curve.from_zero:
        axes.set_ylim(0, highest * 1.12 or 1)
    if len(curve.series) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=theme.ink, loc="upper right")
    return _png(figure, theme)


def draw_scores(bars: Sequence[Bar], theme: Theme = LIGHT) -> bytes:
    """Draw one horizontal bar a skill, the interval as a whisker, chance as an upright mark."""
    figure, axes = _canvas(theme, 0.85 + 0.27 * len(bars))
    rows = range(len(bars))
    axes.barh(rows, [b.score for b in bars], height=0.62, color=theme.blue, alpha=0.85)
    axes.hlines(rows, [b.low for b in bars], [b.high for b in bars], color=theme.ink, linewidth=1.1)
    axes.vlines(
        [b.chance for b in bars],
        [r - 0.36 for r in rows],
        [r + 0.36 for r in rows],
        color=theme.orange,
        linewidth=2,
        label="blind guessing",
    )
    for row, bar in enumerate(bars):
        axes.annotate(
            f"{100 * bar.score:.0f} %",
            (max(bar.score, bar.high), row),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=theme.ink,
            fontsize=9,
        )
    font = cjk_font()
    labels = [b.name if b.name.isascii() or font else f"task {i}" for i, b in enumerate(bars, start=1)]
    options = {"family": [font, "DejaVu Sans"]} if font and not "".join(labels).isascii() else {}
    axes.set_yticks(list(rows), labels, fontsize=9, color=theme.ink, **options)
    axes.set_xlim(0, 1.1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.grid(axis="x", color=theme.grid, linewidth=0.8)
    axes.tick_params(axis="y", length=0)
    axes.set_title("share of right answers, 95 % interval", loc="left", fontsize=10.5, color=theme.ink, pad=10)
    axes.legend(
        frameon=False, fontsize=9, labelcolor=theme.ink, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1
    )
    return _png(figure, theme)


def cjk_font() -> str | None:
    """Return the name of an installed font with Chinese characters, None if there is none."""
    from matplotlib import font_manager

    installed = {entry.name for entry in font_manager.fontManager.ttflist}
    return next((name for name in CJK_FONTS if name in installed), None)


def _canvas(theme: Theme, height_in: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, facecolor=theme.background, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=theme.background)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.grid)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.faint, labelsize=9, length=3, width=0.8)
    axes.tick_params(axis="y", length=0)
    axes.yaxis.set_major_formatter(_short)
    axes.xaxis.set_major_formatter(_short)
    return figure, axes


def _short(value: float, _position: object = None) -> str:
    """Write an axis number briefly: 12,000 as 12k."""
    if abs(value) >= 1000:
        return f"{value / 1000:,.4g}k"
    return f"{value:.4g}"


def _x_scale(curve: Curve) -> tuple[float, str]:
    last = max((max(s.x) for s in curve.series), default=0.0)
    if curve.unit == "tokens":
        scales = [(1e9, "billion tokens seen"), (1e6, "million tokens seen"), (1.0, "tokens seen")]
        return next(s for s in scales if last >= 2 * s[0] or s[0] == 1.0)
    scales = [
        (86400.0, "days of training"),
        (3600.0, "hours of training"),
        (60.0, "minutes of training"),
        (1.0, "seconds of training"),
    ]
    return next(s for s in scales if last >= 2 * s[0] or s[0] == 1.0)


def _png(figure: Any, theme: Theme) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=theme.background, metadata={"Software": None})
    return buffer.getvalue()
