"""What the study of the premise found, as tables and sentences made from its rows alone (`premise.py` measures)."""

from __future__ import annotations

from collections.abc import Sequence

from setlib.analysis import factorial
from setlib.analysis.premise import DONORS, Findings

HALVES = (("phase", "content", "style"), ("amplitude", "style", "content"))  # of the premise: part, what it is, not
_BANDS = {"all": "all of it", "mean": "zero frequency", "low": "low frequencies", "high": "high frequencies"}


def place(layer: int) -> str:
    """The name of a place: "the pixels" or "layer 3"."""
    return f"layer {layer}" if layer else "the pixels"


def percent(row: dict, name: str = "share", ends: str = "") -> str:
    """A share with its interval: "26 % [22, 30]"; ends: what the names of its ends begin with."""
    low, high = (100 * row[f"{ends}{end}"] for end in ("low", "high"))
    return f"{100 * row[name]:.0f} % [{low:.0f}, {high:.0f}]"


def carries(row: dict) -> bool:
    """Whether a part carries style: it closes some of the way, and more than the best of its placebos."""
    return row["closed low"] > 0 and row["gain low"] > 0


def share_table(rows: Sequence[dict], band: str = factorial.ALL) -> list[dict]:
    """One row a layer: the shares of style, content and interaction in amplitude and phase, with their intervals."""
    table: dict[int, dict] = {}
    for row in rows:
        if row["band"] == band:
            column = f"{row['part']}: {row['factor']}"
            table.setdefault(row["layer"], {"after": place(row["layer"])})[column] = percent(row)
    return list(table.values())


def tally(rows: Sequence[dict]) -> dict[str, dict[str, int]]:
    """In how many cells (layer and band, without zero frequency) each half of the premise holds: {part: {verdict: n}}.

    amplitude is style where its style share lies above its content share, phase is content where its content share lies
    above its style share; where the intervals of the two overlap nothing is shown.
    """
    cells: dict[tuple, dict] = {}
    for row in rows:
        if row["band"] not in (factorial.BANDS[0], factorial.ALL):
            cells.setdefault((row["part"], row["layer"], row["band"]), {})[row["factor"]] = row
    counts = {part: {"style": 0, "content": 0, "open": 0} for part in factorial.PARTS}
    for (part, _, _), cell in cells.items():
        style, content = cell["style"], cell["content"]
        larger = "style" if style["low"] > content["high"] else "content" if content["low"] > style["high"] else "open"
        counts[part][larger] += 1
    return counts


def _leads(counts: dict[str, int], half: str, other: str) -> str:
    """The counts of one part as a sentence."""
    return (
        f"Of {sum(counts.values())} cells (layer and band, without zero frequency) {half} leads in {counts[half]}, "
        f"{other} in {counts[other]}; in {counts['open']} the intervals overlap."
    )


def say_shares(rows: Sequence[dict]) -> str:
    """What the crossed design found, as Markdown sentences."""
    own = {(r["layer"], r["part"], r["band"], r["factor"]): r for r in rows}
    layers, lines = list(dict.fromkeys(row["layer"] for row in rows)), []
    for layer in (0, layers[1], layers[-1]):
        amplitude, phase = (
            [percent(own[layer, part, factorial.ALL, factor]) for factor in ("style", "content")]
            for part in factorial.PARTS
        )
        lines.append(
            f"- In **{place(layer)}** style explains {amplitude[0]} of the variance of the log amplitudes and content "
            f"{amplitude[1]}; of the phases style explains {phase[0]} and content {phase[1]}."
        )
    mean = [own[layer, "amplitude", factorial.BANDS[0], "style"] for layer in (0, layers[1], layers[-1])]
    lines.append(
        f"- At **zero frequency**, the mean of each channel, style explains {percent(mean[0])} in the pixels, "
        f"{percent(mean[1])} after layer {layers[1]} and {percent(mean[2])} after layer {layers[-1]}."
    )
    counts = tally(rows)
    for part, half, other in HALVES:
        lines.append(f"- **{part.capitalize()}**. {_leads(counts[part], half, other)}")
    nulls = [abs(row["null"]) for row in rows if row["factor"] != "interaction"]
    lines.append(f"- With shuffled labels no share of either is further from 0 than {100 * max(nulls):.1f} %.")
    return "\n".join(lines)


def say_yardstick(rows: Sequence[dict], donor: str = DONORS[0]) -> str:
    """Which parts carry style beyond their placebos, place by place, as Markdown sentences."""
    lines = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        own = [row for row in rows if row["layer"] == layer and row["donor"] == donor]
        best = max(own, key=lambda row: row["closed"])
        named = ", ".join(f"{r['part']} ({100 * r['gain']:+.1f} points)" for r in own if carries(r)) or "none"
        amplitude = next(row for row in own if row["part"] == "amplitude")
        lines.append(
            f"- In **{place(layer)}** the amplitudes of {donor} close {percent(amplitude, 'closed', 'closed ')} of the "
            f"way to A in B's style, their best placebo ({amplitude['best placebo']}) "
            f"{100 * (amplitude['closed'] - amplitude['gain']):.0f} %; most closes **{best['part']}**, "
            f"{percent(best, 'closed', 'closed ')}. Closer to it than A was, and beyond their placebos: {named}."
        )
    return "\n".join(lines)


def say_atlas(found: Findings) -> str:
    """What the rest of the network makes of the transplants, as Markdown sentences."""
    about, lines = found.about, []
    lines.append(
        f"- Read after layer {about['readout']}: A itself has {about['A']['miou']:.0f} % mIoU, A in B's style "
        f"{about['A*']['miou']:.0f} %, which is taken for B's style in {100 * about['A*']['style of B']:.0f} % of "
        f"{found.atlas[0]['streets']} streets, and for A's layout in {100 * about['A*']['content kept']:.0f} %."
    )
    for part in factorial.PARTS:
        own = [row for row in found.atlas if row["part"] == part]
        whole = [row for row in own if row["band"] == "all"]
        best, ahead = max(own, key=lambda row: row["closed"]), sum(map(carries, own))
        names = ("closed", "style of B", "placebo style of B", "content kept")
        span, taken, by_placebo, kept = (_span([100 * row[name] for row in whole]) for name in names)
        lines.append(
            f"- All of B's **{part}** closes {span} % of the way, by where it is put; {ahead} of {len(own)} cells lie "
            f"above 0 and above their placebo. The largest: {_BANDS[best['band']]} in {place(best['layer'])}, "
            f"{percent(best, 'closed', 'closed ')}. With all of it {taken} % of the streets are taken for B's style "
            f"(placebo: {by_placebo} %), and A's layout is still found in {kept} %."
        )
    return "\n".join(lines)


def say_verdict(found: Findings) -> str:
    """The answer, place by place where swaps were made, as Markdown sentences."""
    counts, cells = tally(found.shares), [row for row in found.atlas if row["band"] != "mean"]
    ahead = {part: sum(carries(row) for row in cells if row["part"] == part) for part in factorial.PARTS}
    mean = [row for row in found.shares if _is(row, row["layer"], "amplitude", factorial.BANDS[0])]
    mean = [row for row in mean if row["factor"] == "style"]
    parts = [row for row in found.yardstick if row["donor"] == DONORS[0]]
    best = max([row for row in parts if carries(row)] or parts, key=lambda row: row["gain"])
    lines = []
    for part, half, other in HALVES:
        here, there = (
            {row["factor"]: percent(row) for row in found.shares if _is(row, layer, part, factorial.ALL)}
            for layer in (0, max(row["layer"] for row in found.shares))
        )
        lines.append(
            f"- *Is {part} {half}?* In the pixels {half} explains {here[half]} of it, {other} {here[other]}, their "
            f"interaction {here['interaction']}; after the last layer {there[half]}, {there[other]} and "
            f"{there['interaction']}. {_leads(counts[part], half, other)}"
        )
    lines.append(
        f"- At zero frequency style explains {100 * mean[0]['share']:.0f} % of the variance of the channels' means in "
        f"the pixels and {100 * mean[-1]['share']:.0f} % after the last layer."
    )
    lines.append(
        f"- Swapped, amplitude brings A closer to A in B's style, and closer than its placebo does, in "
        f"{ahead['amplitude']} of {len(cells) // 2} cells (without the mean alone), phase in {ahead['phase']}. Of all "
        f"parts, where they are put, {best['part']} in {place(best['layer'])} goes furthest beyond its placebos "
        f"({100 * best['gain']:+.0f} points)."
    )
    return "\n".join(lines)


def _is(row: dict, layer: int, part: str, band: str) -> bool:
    return (row["layer"], row["part"], row["band"]) == (layer, part, band)


def reveal_share(rows: Sequence[dict]) -> dict:
    """What `plots.reveal` shows of style's share in the log amplitudes of the pixels; the placebo: shuffled labels."""
    own = next(row for row in rows if _is(row, 0, "amplitude", factorial.ALL) and row["factor"] == "style")
    ends = 100 * own["low"], 100 * own["high"]
    label = "share of style in the log amplitudes of the pixels (%)"
    return {"claim": 100, "result": 100 * own["share"], "placebo": 100 * own["null"], "ends": ends, "label": label}


def reveal_swap(found: Findings) -> dict:
    """What `plots.reveal` shows of all amplitudes swapped in the pixels; the placebo: a random basis."""
    own = next(row for row in found.atlas if _is(row, 0, "amplitude", "all"))
    ends = 100 * own["closed low"], 100 * own["closed high"]
    label = f"share of the way from A to A in B's style that is closed, read after layer {found.about['readout']} (%)"
    return {"claim": 100, "result": 100 * own["closed"], "placebo": 100 * own["placebo"], "ends": ends, "label": label}


def _span(values: Sequence[float]) -> str:
    """The least and the most: "3 to 5"; one number where they are equal."""
    return " to ".join(dict.fromkeys(f"{end(values):.0f}" for end in (min, max)))
