"""The premise in pictures: shares and transplants by layer and band, parts beside their placebos, guess and result.

Rows are those of `analysis.premise` and `analysis.probe`. Everything is drawn in percent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from setlib.plots.board import WIDTH
from setlib.plots.charts import ABOVE, COLOURS, MARKERS, Figure, _axes, _layer, quiet

PLACEBO = "#777777"


def _frame(rows: Sequence[Mapping], value: str) -> pandas.DataFrame:
    """Layers by bands, both in the order in which they come."""
    frame = pandas.DataFrame(rows)
    wide = frame.pivot(index="layer", columns="band", values=value)
    wide = wide.loc[list(dict.fromkeys(frame["layer"])), list(dict.fromkeys(frame["band"]))]
    return wide.rename(index=_layer)


def _percent(value: float) -> str:
    """A rounded number; nothing is never negative."""
    return f"{round(value) + 0:.0f}"


@quiet
def heat_maps(
    panels: Mapping[str, pandas.DataFrame],
    label: str,
    low: float = 0,
    high: float = 1,
    colours: str = "viridis",
    doubtful: Mapping[str, pandas.DataFrame] | None = None,
) -> Figure:
    """Tables side by side on one scale, in percent; NaN is empty. doubtful: which cells stand in brackets, by panel."""
    first = next(iter(panels.values()))
    made = Figure((WIDTH / 100, 0.25 * len(first) + 1.4), layout="constrained")
    places = made.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (title, frame) in zip(places, panels.items(), strict=True):
        values = frame.to_numpy(float)
        shown = ax.imshow(100 * values, cmap=colours, vmin=100 * low, vmax=100 * high, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                red, green, blue, _ = shown.cmap(shown.norm(100 * value))
                ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
                text = _percent(100 * value)
                is_doubtful = doubtful is not None and bool(doubtful[title].to_numpy()[i, j])
                look = {"color": ink, "fontsize": 7 if len(text) < 3 or len(frame.columns) < 6 else 6}
                ax.text(j, i, f"({text})" if is_doubtful else text, ha="center", va="center", **look)
        ax.set_title(title)
        ax.set_xticks(range(len(frame.columns)), frame.columns, rotation=60, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(len(frame)), frame.index)
        ax.set_facecolor("#eeeeee")
        ax.spines[:].set_visible(False)
    places[0].set_xlabel("radius of the frequency (1 = highest along an axis)", loc="left")
    made.colorbar(shown, ax=list(places), label=label, pad=0.01)
    return made


def share_maps(rows: Sequence[Mapping], factors: Sequence[str] = ("style", "content")) -> Figure:
    """The headline: shares of style and content in amplitude and phase, layers by bands, on one scale."""
    frame = pandas.DataFrame(rows)
    chosen = {f"{part}: {factor}": (part, factor) for part in frame["part"].unique() for factor in factors}
    panels = {
        title: _frame(frame[(frame["part"] == part) & (frame["factor"] == factor)].to_dict("records"), "share")
        for title, (part, factor) in chosen.items()
    }
    return heat_maps(panels, "share of the variance (%)")


def atlas(
    rows: Sequence[Mapping],
    value: str = "closed",
    label: str = "of the way (%)",
    chosen: tuple[str, int, str] | None = None,
) -> Figure:
    """What a transplant does by layer and band, amplitude beside phase.

    In brackets: what carries no style, because its interval, or what it closes beyond its placebo, reaches 0.
    chosen: part, layer and band of a cell that is framed.
    """
    parts = {part: [row for row in rows if row["part"] == part] for part in dict.fromkeys(r["part"] for r in rows)}
    panels = {part: _frame(own, value) for part, own in parts.items()}
    doubtful = {part: (_frame(own, "gain low") <= 0) | (_frame(own, "closed low") <= 0) for part, own in parts.items()}
    reach = max(0.1, *(float(frame.abs().max().max()) for frame in panels.values()))
    made = heat_maps(panels, label, -reach, reach, "PuOr", doubtful)
    made.axes[0].set_xlabel("frequency: zero (mean), up to a quarter of the highest (low), above it (high)", loc="left")
    for ax, (part, frame) in zip(made.axes, panels.items(), strict=False):  # the last axes are the scale's
        for (i, layer), (j, band) in product(enumerate(frame.index), enumerate(frame.columns)):
            if chosen and (part, layer, band) == (chosen[0], _layer(chosen[1]), chosen[2]):
                ax.add_patch(Rectangle((j - 0.47, i - 0.45), 0.94, 0.9, fill=False, linewidth=2))
    return made


def accuracy_maps(rows: Sequence[Mapping], values: Sequence[str] = ("domain", "classes")) -> Figure:
    """How well amplitude alone, and phase alone, tell two domains apart and know the classes (`probe.tell_apart`)."""
    panels = {
        f"{part}: {value}": _frame([{**row, value: row[value] / 100} for row in rows if row["part"] == part], value)
        for value in values
        for part in dict.fromkeys(row["part"] for row in rows)
        if rows[0][value] is not None
    }
    return heat_maps(panels, "balanced (%)", 0, 1, "PuOr")


@quiet
def yardstick(rows: Sequence[Mapping], ax: Axes | None = None) -> Axes:
    """What each part closes of the way from A to A in B's style, with its interval, and what its placebos do.

    rows: of one layer and one donor.
    """
    ax, seen = _axes(ax, 0.3 * len(rows) + 1.0), set()
    others = dict.fromkeys(name for row in rows for name in row if name in PLACEBO_NAMES)
    for place, row in enumerate(rows):
        ends = [100 * row["closed low"], 100 * row["closed high"]]
        ax.plot(ends, [place, place], color=COLOURS[0], linewidth=2)
        ax.plot(100 * row["closed"], place, "o", color=COLOURS[0], markersize=6, label=None if place else "part")
        for mark, name in zip(PLACEBO_MARKS, others, strict=False):
            if row.get(name) is not None and row[name] == row[name]:
                label = None if name in seen else f"placebo: {name}"
                ax.plot(100 * row[name], place, mark, color=PLACEBO, markersize=5, mfc="none", label=label)
                seen.add(name)
    ax.axvline(0, color="#888888", linewidth=0.8)
    ax.set(yticks=range(len(rows)), yticklabels=[row["part"] for row in rows], ylim=(len(rows) - 0.5, -0.5))
    where = f"{_layer(rows[0]['layer'])}; B: {rows[0]['donor']}"
    ax.set_xlabel(f"share of the way from A to A in B's style that is closed (%), {where}")
    ax.grid(True, axis="x")
    ax.legend(**ABOVE, ncols=5)
    return ax


PLACEBO_NAMES, PLACEBO_MARKS = ("random basis", "shuffled patches", "channel axis", "noise"), "sD^x"


@quiet
def transplant_curves(rows: Sequence[Mapping], value: str, label: str, scale: float = 100) -> Figure:
    """One value of the atlas by layer, a panel a band: amplitude and phase (solid) beside their placebos (dashed)."""
    bands = list(dict.fromkeys(row["band"] for row in rows))
    made = Figure((WIDTH / 100, 2.4), layout="constrained")
    for ax, band in zip(made.subplots(1, len(bands), sharey=True), bands, strict=True):
        for i, part in enumerate(dict.fromkeys(row["part"] for row in rows)):
            own = [row for row in rows if (row["part"], row["band"]) == (part, band)]
            layers, look = [_layer(row["layer"]).removeprefix("layer ") for row in own], {"color": COLOURS[i]}
            ax.plot(layers, [scale * row[value] for row in own], marker=MARKERS[i], markersize=4, label=part, **look)
            placebo = [scale * row["placebo" if value == "closed" else f"placebo {value}"] for row in own]
            ax.plot(layers, placebo, "--", linewidth=1, label=f"placebo of {part}", **look)
            if f"{value} low" in own[0]:
                ends = ([scale * row[f"{value} {end}"] for row in own] for end in ("low", "high"))
                ax.fill_between(layers, *ends, alpha=0.15, linewidth=0, **look)
        ax.set(title=band, xlabel="swapped after layer")
        ax.grid(True, axis="y")
    made.axes[0].set_ylabel(label)
    made.axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return made


@quiet
def reveal(
    guess: float,
    claim: float,
    result: float,
    placebo: float,
    ends: tuple[float, float] | None = None,
    label: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Guess, the paper's claim, the result with its interval, and the placebo, on one axis (percent)."""
    ax = _axes(ax, 1.5)
    marks = {"your guess": guess, "the paper's claim": claim, "measured": result, "placebo": placebo}
    for place, (name, value) in enumerate(marks.items()):
        colour = PLACEBO if name == "placebo" else COLOURS[place]
        ax.plot(value, place, MARKERS[place], color=colour, markersize=8)
        right = max(value, ends[1]) if ends and name == "measured" else value
        offset = {"xytext": (8, 0), "textcoords": "offset points"}
        ax.annotate(f"{_percent(value)} %", (right, place), va="center", color=colour, **offset)
    if ends:
        ax.plot(ends, [2, 2], color=COLOURS[2], linewidth=2)
    ax.axvline(0, color="#888888", linewidth=0.8)
    low = min(0, *marks.values(), *(ends or ()))
    ax.set(yticks=range(4), yticklabels=list(marks), ylim=(3.5, -0.7), xlabel=label, xlim=(low - 8, 115))
    ax.grid(True, axis="x")
    return ax
