"""The report's plots as PNG: size and accuracy against fp32, times, bytes by component, a search's trials."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemini.benchmarks.metrics import NAMES, format_number, format_value, loss_percent, metric_label
from gemini.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours; the accent marks the bundle, everything it is compared with is neutral."""

    surface: str
    text: str
    muted: str
    grid: str
    neutral: str
    accent: str


_COLOURS = 64  # five, and the shades between them at the edges of letters

LIGHT = Theme("#ffffff", "#1c2128", "#59636e", "#e6e9ed", "#b3bdc9", "#2563eb")
DARK = Theme("#161b22", "#e6edf3", "#9aa4b0", "#2b323c", "#56616f", "#6ea8fe")


def draw_plots(report: Mapping[str, Any], theme: Theme = LIGHT) -> dict[str, bytes]:
    """{file name: PNG}. A plot whose figures are absent from the report is left out.

    Raises UsageError when matplotlib is not installed.
    """
    drawn = {
        "size_accuracy.png": _size_accuracy(report, theme),
        "latency.png": _latency(report.get("latency") or {}, theme),
        "bytes.png": _bytes(report.get("bytes") or {}, theme),
        "pareto.png": _pareto(report.get("search") or {}, theme),
    }
    return {name: to_png(figure) for name, figure in drawn.items() if figure is not None}


def new_figure(theme: Theme, height: float, panels: int = 1) -> tuple["Figure", list["Axes"]]:
    """An empty figure with panels side by side. UsageError when matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            "Plots need matplotlib.", "Install it with: pip install 'gemini-edge[report]'."
        ) from None
    figure = Figure(figsize=(8.4, height), facecolor=theme.surface, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: no global state, no display
    axes = [figure.add_subplot(1, panels, index + 1) for index in range(panels)]
    for axis in axes:
        axis.set_facecolor(theme.surface)
        axis.tick_params(colors=theme.muted, length=0, labelsize=9)
        for name, spine in axis.spines.items():
            spine.set_visible(name == "bottom")
            spine.set_color(theme.grid)
    return figure, axes


def to_png(figure: "Figure") -> bytes:
    """The picture's bytes, the same for the same figure.

    A palette makes them a third of what true colours take: a report has six, and bundles may be small.
    """
    from PIL import Image

    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=160, metadata={"Software": None})
    with Image.open(drawn) as picture:
        palette = picture.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
    palette.save(packed, "png", optimize=True)
    return packed.getvalue()


def draw_bars(
    axis: "Axes",
    theme: Theme,
    title: str,
    labels: list[str],
    values: list[float],
    texts: list[str],
    marked: int,
) -> None:
    """Horizontal bars, the first on top, values at their ends; ``marked`` is the accented row (-1: all)."""
    colours = [theme.accent if marked in (-1, row) else theme.neutral for row in range(len(values))]
    rows = list(range(len(values)))
    axis.barh(rows, values, height=0.58, color=colours)
    axis.set_yticks(rows, labels, color=theme.text, fontsize=10)
    axis.invert_yaxis()
    axis.set_xticks([])
    axis.spines["bottom"].set_visible(False)
    low, high = min(0.0, *values), max(0.0, *values)
    reach = (high - low) or 1.0
    axis.set_xlim(low - (0.22 * reach if low < 0 else 0), high + 0.24 * reach)
    axis.axvline(0, color=theme.grid, linewidth=1)
    for row, (value, text) in enumerate(zip(values, texts, strict=True)):
        side = -1 if value < 0 else 1
        axis.annotate(
            text, (value, row), xytext=(5 * side, 0), textcoords="offset points", va="center",
            ha="left" if side > 0 else "right", color=theme.text, fontsize=10,
        )  # fmt: skip
    axis.set_title(title, loc="left", color=theme.muted, fontsize=10, pad=8)


def _size_accuracy(report: Mapping[str, Any], theme: Theme) -> "Figure | None":
    table = list(report.get("table") or [])
    rows = [row for row in table if row.get("size_mb") is not None]
    if not rows:
        return None
    key = str(report.get("metric") or "")
    reference = next((row.get(key) for row in table if row["name"] == "fp32"), None)
    losses = [(row, loss_percent(key, row.get(key), reference)) for row in table]
    measured = [(row, loss) for row, loss in losses if loss is not None]
    figure, axes = new_figure(theme, 0.55 + 0.5 * max(len(rows), len(measured)), panels=2 if measured else 1)
    labels, marked = _labels(rows)
    sizes = [float(row["size_mb"]) for row in rows]
    draw_bars(
        axes[0], theme, "Size, MB", labels, sizes, [format_value("size_mb", size) for size in sizes], marked
    )
    if measured:
        labels, marked = _labels([row for row, _ in measured])
        texts = [f"{format_value(key, row[key])}  ({loss:+.1f} %)" for row, loss in measured]
        if measured[0][0]["name"] == "fp32":
            texts[0] = format_value(key, measured[0][0][key])
        title = f"{metric_label(key)}: loss against fp32, %"
        draw_bars(axes[1], theme, title, labels, [loss for _, loss in measured], texts, marked)
    return figure


def _labels(rows: list[Mapping[str, Any]]) -> tuple[list[str], int]:
    names = [str(row["name"]) for row in rows]
    return [NAMES.get(name, name) for name in names], names.index("bundle") if "bundle" in names else -2


def _latency(latency: Mapping[str, Any], theme: Theme) -> "Figure | None":
    samples = list(latency.get("samples_ms") or [])
    if len(samples) < 2:
        return None
    import numpy as np

    p50, p90, p99 = (float(value) for value in np.percentile(samples, (50, 90, 99)))
    last = max(p99 * 1.15, p50 * 1.3)  # a single stall must not flatten the rest
    shown = [sample for sample in samples if sample <= last]
    figure, (axis,) = new_figure(theme, 2.9)
    counts, _, _ = axis.hist(shown, bins=min(60, max(10, len(shown) // 5)), color=theme.accent, alpha=0.85)
    top = float(max(np.atleast_1d(counts)))
    axis.set_ylim(0, top * 1.38)
    for level, (name, value) in enumerate((("median", p50), ("90 %", p90), ("99 %", p99))):
        axis.axvline(value, ymax=(1.28 - 0.1 * level) / 1.38, color=theme.text, linewidth=1, dashes=(3, 2))
        axis.annotate(
            f"{name} {value:.2f} ms", (value, top * (1.28 - 0.1 * level)), xytext=(4, -3),
            textcoords="offset points", color=theme.text, fontsize=9, va="top",
        )  # fmt: skip
    axis.set_yticks([])
    axis.set_xlim(right=max(last, p99 + 0.16 * (last - min(shown))))
    what = (
        "a token after the first" if latency.get("kind") == "generator" else "a call, last shape of the table"
    )
    beyond = len(samples) - len(shown)
    title = f"Time for {what}, ms ({len(samples)} measured" + (
        f", {beyond} beyond the axis)" if beyond else ")"
    )
    axis.set_title(title, loc="left", color=theme.muted, fontsize=10, pad=8)
    return figure


def _bytes(components: Mapping[str, Any], theme: Theme) -> "Figure | None":
    items = [
        (name, float(size)) for name, size in components.items() if isinstance(size, int | float) and size > 0
    ]
    if not items:
        return None
    items.sort(key=lambda item: -item[1])
    if len(items) > 10:  # the tail is one row
        items = [*items[:9], (f"{len(items) - 9} others", sum(size for _, size in items[9:]))]
    total = sum(size for _, size in items)
    figure, (axis,) = new_figure(theme, 0.6 + 0.36 * len(items))
    texts = [f"{format_number(round(size / 1e6, 2))} MB  ({100 * size / total:.1f} %)" for _, size in items]
    labels = [name.replace("_", " ") for name, _ in items]
    draw_bars(axis, theme, "Bytes by component", labels, [size / 1e6 for _, size in items], texts, -1)
    return figure


def _pareto(search: Mapping[str, Any], theme: Theme) -> "Figure | None":
    """Loss over time, a marker a trial with its size as the area; the front, the winner and the limits.

    The line joins what nothing beats in time and loss; a filled marker off it is on the front for its size.
    """
    rows = [row for row in search.get("rows") or [] if row["latency_ms"] is not None]
    if not rows:
        return None
    from matplotlib.ticker import FuncFormatter

    figure, (axis,) = new_figure(theme, 4.6)
    largest = max(row["size_mb"] for row in rows)
    for row in rows:
        face = theme.accent if row["winner"] else theme.neutral if row["front"] else "none"
        edge = theme.accent if row["winner"] else theme.muted if row["front"] else theme.neutral
        axis.scatter(
            row["latency_ms"], row["loss_percent"], s=40 + 460 * row["size_mb"] / largest,
            facecolors=face, edgecolors=edge, linewidths=1.2, zorder=3,
        )  # fmt: skip
        if row["front"] or row["winner"]:
            axis.annotate(
                f"{row['trial']}\n{format_value('size_mb', row['size_mb'])} MB",
                (row["latency_ms"], row["loss_percent"]), xytext=(11, 4), textcoords="offset points",
                color=theme.text, fontsize=8.5, zorder=4,
            )  # fmt: skip
    line: list[tuple[float, float]] = []
    for time, loss in sorted((row["latency_ms"], row["loss_percent"]) for row in rows if row["front"]):
        if not line or loss < line[-1][1]:
            line.append((time, loss))
    axis.plot(*zip(*line, strict=True), color=theme.muted, linewidth=1.2, zorder=2)
    limits = search.get("limits") or {}
    if limits.get("latency_ms") is not None:
        axis.axvline(limits["latency_ms"], color=theme.accent, linewidth=1, dashes=(4, 3), zorder=2)
    if limits.get("loss_percent") is not None:
        axis.axhline(limits["loss_percent"], color=theme.accent, linewidth=1, dashes=(4, 3), zorder=2)
    axis.set_yscale("symlog", linthresh=10)  # pruning can cost hundreds of percent
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axis.margins(x=0.2, y=0.18)
    axis.grid(color=theme.grid, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_xlabel(f"ms for {search['time_of']}", color=theme.muted, fontsize=9)
    title = f"{metric_label(search['metric'])}: loss against fp32 over time; area: size; dashed: limits"
    axis.set_title(title, loc="left", color=theme.muted, fontsize=10, pad=8)
    return figure
