"""Plots of a comparison: quality against speed with its frontier, share of the bandwidth, and the sweeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemini.benchmarks.peers.field import OURS
from gemini.benchmarks.peers.sweeps import SWEEPS
from gemini.benchmarks.plots import LIGHT, draw_bars, new_figure, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_AXES = {"prompt": "tokens of the prompt", "batch": "rows of the batch", "threads": "threads"}
# Told apart by mark and dashes; bundles have the accent and whole lines.
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES = ((4, 2), (1, 1), (5, 1, 1, 1), (2, 2), (6, 2), (3, 1))


@dataclass(frozen=True)
class _Style:
    """How a peer looks in every plot."""

    mark: str
    colour: str
    width: float
    dashes: tuple[int, ...] | None


def draw_comparison(result: Mapping[str, Any]) -> dict[str, bytes]:
    """{file name: PNG}; a plot without figures is left out. UsageError without matplotlib."""
    peers = [peer for peer in result["peers"] if peer["error"] is None]
    styles = {peer["name"]: _style(row, peer["adapter"] == OURS) for row, peer in enumerate(peers)}
    drawn = {
        "peers_frontier.png": _frontier(peers, styles),
        "peers_bandwidth.png": _bandwidth(peers),
    }
    for kind in SWEEPS:
        series = (result.get("sweeps") or {}).get(kind) or []
        drawn[f"peers_{kind}.png"] = _sweep(kind, [one for one in series if one["points"]], styles)
    return {name: to_png(figure) for name, figure in drawn.items() if figure is not None}


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (speed, loss), those that no other is both faster and better than, from slow to fast."""
    kept: list[tuple[float, float]] = []
    for speed, loss in sorted(set(points), key=lambda point: (-point[0], point[1])):
        if not kept or loss < kept[-1][1]:
            kept.append((speed, loss))
    return kept[::-1]


def _frontier(peers: Sequence[Mapping[str, Any]], styles: Mapping[str, _Style]) -> "Figure | None":
    points = {
        peer["name"]: (peer["latency"]["decode_tokens_per_second"], peer["perplexity"])
        for peer in peers
        if peer["perplexity"] is not None
    }
    if len(points) < 2:
        return None
    figure, (axis,) = new_figure(LIGHT, 4.2)
    axis.plot(
        *zip(*frontier(list(points.values())), strict=True), color=LIGHT.neutral, linewidth=1.5, zorder=1
    )
    sizes = {peer["name"]: peer["size_mb"] for peer in peers}
    for name, point in points.items():
        label = f"{_plain(name)}, {sizes[name]:.0f} MB"
        style = styles[name]
        axis.plot(*point, linestyle="", marker=style.mark, markersize=8, color=style.colour, label=label)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, labelcolor=LIGHT.text)
    axis.margins(0.12)
    axis.grid(color=LIGHT.grid, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set_xlabel("decode, tokens a second (more is better)", color=LIGHT.muted, fontsize=9)
    axis.set_title("Perplexity (less is better) against speed", loc="left", color=LIGHT.muted, fontsize=10)
    return figure


def _bandwidth(peers: Sequence[Mapping[str, Any]]) -> "Figure | None":
    shown = [peer for peer in peers if peer["latency"]["bandwidth_percent"] is not None]
    if not shown:
        return None
    figure, (axis,) = new_figure(LIGHT, 0.7 + 0.42 * len(shown))
    shares = [float(peer["latency"]["bandwidth_percent"]) for peer in shown]
    ours = next((row for row, peer in enumerate(shown) if peer["adapter"] == OURS), -2)
    names = [_plain(peer["name"]) for peer in shown]
    title = "Share of the measured read bandwidth that decoding reaches, %"
    draw_bars(axis, LIGHT, title, names, shares, [f"{share:.0f} %" for share in shares], ours)
    return figure


def _sweep(kind: str, series: Sequence[Mapping[str, Any]], styles: Mapping[str, _Style]) -> "Figure | None":
    if not series:
        return None
    figure, axes = new_figure(LIGHT, 3.9, panels=2)
    values = sorted({point[kind] for one in series for point in one["points"]})
    for axis, rate in zip(axes, ("prefill", "decode"), strict=True):
        for one in series:
            style = styles[one["name"]]
            (line,) = axis.plot(
                [values.index(point[kind]) for point in one["points"]],  # even steps: the values double
                [point[f"{rate}_tokens_per_second"] for point in one["points"]],
                color=style.colour, linewidth=style.width, marker=style.mark, markersize=5,
                label=_plain(one["name"]),
            )  # fmt: skip
            if style.dashes:
                line.set_dashes(style.dashes)
        _label_axis(axis, f"{rate.capitalize()}, tokens a second", kind, values)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(
        *handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False, labelcolor=LIGHT.text
    )
    return figure


def _label_axis(axis: "Axes", title: str, kind: str, values: Sequence[int]) -> None:
    axis.set_xticks(range(len(values)), [str(value) for value in values])
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", color=LIGHT.grid, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set_xlabel(_AXES[kind], color=LIGHT.muted, fontsize=9)
    axis.set_title(title, loc="left", color=LIGHT.muted, fontsize=10)


def _style(row: int, ours: bool) -> _Style:
    mark = _MARKS[row % len(_MARKS)]
    if ours:
        return _Style(mark, LIGHT.accent, 2, None)
    return _Style(mark, LIGHT.muted, 1.3, _DASHES[row % len(_DASHES)])


def _plain(name: str) -> str:
    """A name of others must not be read as mathematics."""
    return str(name).replace("$", r"\$")
