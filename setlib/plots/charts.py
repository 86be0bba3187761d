"""Charts with axes, and tables: data in, Axes out (a Figure for several panels). Nothing is computed on models here.

Figures never enter pyplot's state: one appears in a notebook when it is a cell's last expression, exactly once. Series
have colours that colour-blind readers can tell apart.
"""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import matplotlib
import numpy as np
import pandas
from matplotlib import figure
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import PercentFormatter

from setlib.data.domains import short_name
from setlib.data.labels import ClassSet
from setlib.plots.board import WIDTH

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")  # Okabe and Ito
MARKERS = "osD^vP*X"
STYLE = {"font.size": 9, "axes.titlesize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888", "axes.axisbelow": True}
STYLE |= {"legend.frameon": False, "grid.color": "#e4e4e4", "grid.linewidth": 0.6}
quiet = matplotlib.rc_context(STYLE)  # as a decorator: the look holds inside a function and changes nobody else's
ABOVE = {"loc": "lower left", "bbox_to_anchor": (0, 1)}  # of a legend


class Figure(figure.Figure):
    """A matplotlib figure that shows itself in a notebook, whatever backend is set."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png", dpi=100, bbox_inches="tight")
        return content.getvalue()

    def pixels(self) -> np.ndarray:
        """The figure as it is, (h, w, 3) uint8."""
        FigureCanvasAgg(self).draw()
        return np.array(self.canvas.buffer_rgba())[..., :3]


def _axes(ax: Axes | None, height: float) -> Axes:
    """The given Axes, or those of a new figure as wide as the page, of so many inches."""
    return ax if ax is not None else Figure((WIDTH / 100, height), layout="constrained").add_subplot()


def _layer(layer: str | int) -> str:
    """The name of a layer, which may be a number: 0 for the pixels."""
    return layer if isinstance(layer, str) else f"layer {layer}" if layer else "pixels"


@quiet
def class_shares(shares: Mapping[str, np.ndarray], class_set: ClassSet, ax: Axes | None = None) -> Axes:
    """Share of the labelled pixels by class, one marker a domain, on a logarithmic axis; none where a class is absent.

    shares: {domain: (K,) fractions}. Domains with the very same shares (one layout, several styles) are drawn as one.
    """
    groups: dict[tuple, list[str]] = {}
    for domain, share in shares.items():
        groups.setdefault(tuple(np.asarray(share, float)), []).append(short_name(domain))
    ax, places = _axes(ax, 0.22 * len(class_set) + 0.9), np.arange(len(class_set))
    for i, (share, names) in enumerate(groups.items()):
        offset = (i - (len(groups) - 1) / 2) * min(0.25, 0.7 / len(groups))
        percent = np.where(np.array(share) > 0, 100 * np.array(share), np.nan)
        ax.plot(percent, places + offset, MARKERS[i % 8], color=COLOURS[i % 8], markersize=5, label=", ".join(names))
    ax.set(xscale="log", yticks=places, yticklabels=class_set.classes, ylim=(len(class_set) - 0.5, -0.5))
    ax.set_xlabel("share of the labelled pixels (%)")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.grid(True)
    ax.legend(**ABOVE)
    return ax


@quiet
def loss_curves(histories: Mapping[str, Sequence[Mapping]], ax: Axes | None = None) -> Axes:
    """Training loss by step, {name: history}: a running mean over a tenth of the steps on the faint raw values."""
    ax, histories = _axes(ax, 3.2), {name: history for name, history in histories.items() if history}
    for i, (name, history) in enumerate(histories.items()):
        losses = pandas.Series([row["loss"] for row in history], [row["step"] for row in history])
        smooth = losses.rolling(max(1, len(losses) // 10), min_periods=1).mean()
        ax.plot(losses, color=COLOURS[i % 8], alpha=0.25, linewidth=0.8)
        ax.plot(smooth, color=COLOURS[i % 8], linewidth=1.8, label=f"{name}: {smooth.iloc[-1]:.2f} at the end")
    ax.set(xlabel="step", ylabel="loss on the source", ylim=(0, None))
    ax.grid(True, axis="y")
    ax.legend(*ax.get_legend_handles_labels(), title="" if histories else "The history of the training is not there.")
    return ax


@quiet
def distances(table: Sequence[Mapping], ax: Axes | None = None, chosen: str | int | None = None) -> Axes:
    """Distance in amplitude and phase by layer: rows of `spectra.compare` with a layer; chosen: is pointed out."""
    series = {part: [row[part] for row in table] for part in ("amplitude", "phase")}
    layers = [row["layer"] for row in table]
    ax = _bars(series, list(map(_layer, layers)), _axes(ax, 2.2), upright=True, digits=3 if len(layers) < 8 else 2)
    if not table:
        ax.text(0.5, 0.5, "Nothing stands behind a layer here.", ha="center", transform=ax.transAxes)
    if chosen in layers:
        ax.axvspan(layers.index(chosen) - 0.5, layers.index(chosen) + 0.5, color="#e4e4e4", zorder=0)
    ax.set_ylabel("distance (as in notebook 02)")
    return ax


def _bars(series: Mapping[str, Sequence], names: Sequence[str], ax: Axes, upright: bool, digits: int) -> Axes:
    """Grouped bars, one colour a series, with their values where there is room; None and NaN leave a gap."""
    thick = 0.8 / len(series)
    for i, (label, values) in enumerate(series.items()):
        heights, places = np.array(values, float), np.arange(len(names)) + (i - (len(series) - 1) / 2) * thick
        bars = (ax.bar if upright else ax.barh)(places, heights, thick * 0.92, color=COLOURS[i % 8], label=label)
        if len(series) * len(names) <= 60:
            texts = ["" if np.isnan(height) else f"{height:.{digits}f}" for height in heights]
            ax.bar_label(bars, texts, padding=1, fontsize=7)
    (ax.set_xticks if upright else ax.set_yticks)(range(len(names)), names)
    ax.grid(True, axis="y" if upright else "x")
    ax.legend(**ABOVE, ncols=len(series))
    return ax


@quiet
def influences(ranking: Sequence[tuple[int, float]], chosen: int, ax: Axes | None = None) -> Axes:
    """The influence of the 30 strongest tokens, in their order; the chosen one in another colour."""
    ax, shown = _axes(ax, 1.6), {str(token): value for token, value in ranking[:30]}
    colours = [COLOURS[1] if token == str(chosen) else COLOURS[0] for token in shown]
    ax.bar(list(shown), list(shown.values()), color=colours)
    ax.set(xlabel="token", ylabel="influence", xlim=(-0.6, len(shown) - 0.4))
    return ax


@quiet
def domain_bars(scores: Mapping[str, Mapping[str, float]], ax: Axes | None = None, source: str | None = None) -> Axes:
    """mIoU by domain, one colour a model; {model: {domain: percent}}. `source` is named as such under its bars."""
    domains = list(dict.fromkeys(domain for by_domain in scores.values() for domain in by_domain))
    names = [f"{short_name(domain)}\n(source)" if domain == source else short_name(domain) for domain in domains]
    series = {model: [by_domain.get(domain) for domain in domains] for model, by_domain in scores.items()}
    ax = _bars(series, names, _axes(ax, 3.0), upright=True, digits=1)
    ax.set_ylabel("mIoU (%)")
    return ax


@quiet
def class_bars(scores: Mapping[str, np.ndarray], class_set: ClassSet, ax: Axes | None = None) -> Axes:
    """IoU by class, one colour a model; {model: (K,) percent}, NaN where a class does not occur."""
    ax = _axes(ax, (0.12 + 0.12 * len(scores)) * len(class_set) + 0.8)
    ax = _bars(scores, class_set.classes, ax, upright=False, digits=0)
    ax.set(xlabel="IoU (%)", ylim=(len(class_set) - 0.5, -0.5))
    return ax


def _heatmap(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], ax: Axes | None, label: str) -> Axes:
    """Percentages as colours, with the numbers from 1 on; NaN is grey and empty."""
    ax = _axes(ax, 0.27 * len(rows) + 1.3)
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#eeeeee")
    shown = ax.imshow(values, cmap=colours, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    for (i, j), value in np.ndenumerate(values):
        if value >= 0.5:
            look = {"ha": "center", "va": "center", "fontsize": 7, "color": "white" if value < 60 else "black"}
            ax.text(j, i, f"{value:.0f}", **look)
    ax.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(rows)), rows)
    ax.spines[:].set_visible(False)
    ax.figure.colorbar(shown, ax=ax, label=label, pad=0.01)
    return ax


@quiet
def class_heatmap(scores: Mapping[str, np.ndarray], class_set: ClassSet, ax: Axes | None = None) -> Axes:
    """IoU by domain (rows) and class (columns); {domain: (K,) percent}, grey where a class does not occur."""
    values = np.array(list(scores.values()), float)
    return _heatmap(values, [short_name(domain) for domain in scores], class_set.classes, ax, "IoU (%)")


@quiet
def stacked(draw: Callable[..., Axes], groups: Sequence[tuple[ClassSet, Mapping[str, np.ndarray]]]) -> Figure | None:
    """One panel a class set, below each other; draw: `class_heatmap` or `class_bars`; None without groups."""
    if not groups:
        return None
    heights = [draw(values, class_set).figure.get_figheight() for class_set, values in groups]
    made = Figure((WIDTH / 100, sum(heights)), layout="constrained")
    panels = made.subplots(len(groups), squeeze=False, height_ratios=heights)[:, 0]
    for (class_set, values), ax in zip(groups, panels, strict=True):
        draw(values, class_set, ax)
        if len(groups) > 1:
            ax.set_title(class_set.name, loc="right")
    return made


@quiet
def confusion(counts: np.ndarray, class_set: ClassSet, ax: Axes | None = None) -> Axes:
    """Where each class's pixels (rows) went (columns), percent; grey: none. counts: (K, K), label x prediction."""
    total = counts.sum(1, keepdims=True)
    percent = np.where(total > 0, 100 * counts / np.maximum(total, 1), np.nan)
    ax = _heatmap(percent, class_set.classes, class_set.classes, ax, "share of the label's pixels (%)")
    ax.set(xlabel="prediction", ylabel="label")
    return ax


@quiet
def forest(rows: Sequence[Mapping]) -> Figure | None:
    """Differences from a baseline, a panel per domain: every seed a hollow point, mean and interval; None without rows.

    rows: those of `analysis.ablation.differences`, in points.
    """
    if not rows:
        return None
    variants, domains = (list(dict.fromkeys(row[key] for row in rows)) for key in ("variant", "domain"))
    high, wide = -(-len(domains) // 4), min(4, len(domains))
    made = Figure((WIDTH / 100, (0.24 * len(variants) + 0.7) * high + 0.3), layout="constrained")
    for number, domain in enumerate(domains):
        ax = made.add_subplot(high, wide, number + 1)
        ax.axvline(0, color="#888888", linewidth=1)
        for row in (row for row in rows if row["domain"] == domain):
            place, known = variants.index(row["variant"]), row["low"] is not None
            colour = COLOURS[0] if known and row["low"] > 0 else COLOURS[1] if known and row["high"] < 0 else "#777777"
            ax.plot(
                row["values"], [place] * len(row["values"]), "o", color=colour, markersize=3.5, mfc="white", mew=0.8
            )
            if known:
                ax.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2)
            ax.plot(row["mean"], place, "D", color=colour, markersize=5)
        ax.set_yticks(range(len(variants)), variants if number % wide == 0 else [""] * len(variants))
        ax.set_ylim(len(variants) - 0.5, -0.5)
        ax.set_title(short_name(domain).replace(" -> ", "\n-> ").replace(", ", ",\n"), loc="left")
        ax.grid(True, axis="x")
    made.supxlabel(f"mIoU above {rows[0]['baseline']} (points)", fontsize=9)
    return made


@quiet
def lines(
    series: Mapping[str, tuple[Sequence, Sequence]],
    xlabel: str,
    ylabel: str,
    ax: Axes | None = None,
    dots: bool = False,
) -> Axes:
    """Any curves, {name: (x, y)}, the first ones thicker, so that they show below others; x: numbers or names.

    dots: points without lines, for what jumps, as a phase does from pi to -pi.
    """
    ax = _axes(ax, 3.2)
    for i, (name, (x, y)) in enumerate(series.items()):
        size, marker = 1 + 0.5 * (len(series) - i), MARKERS[i % 8] if dots or isinstance(x[0], str) else ""
        look = {"linestyle": "" if dots else "-", "linewidth": size, "marker": marker, "markersize": size + 2}
        ax.plot(x, y, color=COLOURS[i % 8], label=name, **look)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(True)
    ax.legend(**ABOVE, ncols=3)
    return ax


@quiet
def share_lines(rows: Sequence[Mapping], ax: Axes | None = None, chosen: str | int | None = None) -> Axes:
    """Shares of style (solid) and content (dashed) in the variance of amplitude and of phase, layer by layer.

    rows: layer ("pixels" or 0, 9 or "layer 9"), part, factor, share (1 = all), and low and high, a band, where they are
    known; `analysis.factorial` makes them. Estimates below 0 or above 1 are drawn at the border. chosen: pointed out.
    """
    ax, (layers, parts) = _axes(ax, 2.6), (list(dict.fromkeys(row[key] for row in rows)) for key in ("layer", "part"))
    for (i, part), (factor, line) in product(enumerate(parts), (("style", "-"), ("content", "--"))):
        own = [row for row in rows if (row["part"], row["factor"]) == (part, factor)]
        look, places = {"color": COLOURS[i], "clip_on": False}, [layers.index(row["layer"]) for row in own]
        heights = np.clip([row["share"] for row in own], 0, 1)
        ax.plot(places, heights, line, marker=MARKERS[i], markersize=4, label=f"{part}, {factor}", **look)
        if all(row.get("low") is not None for row in own):
            ends = (np.clip([row[end] for row in own], 0, 1) for end in ("low", "high"))
            ax.fill_between(places, *ends, alpha=0.15, linewidth=0, **look)
    if chosen in layers:
        ax.axvspan(layers.index(chosen) - 0.5, layers.index(chosen) + 0.5, color="#e4e4e4", zorder=0)
    ax.set_xticks(range(len(layers)), list(map(_layer, layers)))
    ax.set(ylim=(0, 1), ylabel="share of the variance")
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.grid(True, axis="y")
    ax.legend(**ABOVE, ncols=4, handlelength=3)
    return ax


class Table:
    """Rows as HTML in notebooks, as aligned text elsewhere: floats with `decimals` decimals, None and NaN a dash."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], caption: str = "", decimals: int = 1) -> None:
        frame = pandas.DataFrame(rows or [{"": "nothing to show"}], dtype=object)
        self.caption, self.frame = caption, frame.map(lambda value: _text(value, decimals))

    def _repr_html_(self) -> str:
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        return self.frame.to_html(index=False, border=0).replace("<thead>", f"{caption}<thead>", 1)

    def __repr__(self) -> str:
        return f"{self.caption}\n".lstrip("\n") + self.frame.to_string(index=False)


def _text(value: Any, decimals: int) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_text(item, decimals) for item in value) or "–"
    if value is None or value != value:
        return "–"
    if not isinstance(value, float | np.floating):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 0.01 * 0.1**decimals else f"{value:.{decimals}f}"


table = Table  # as notebooks call it
