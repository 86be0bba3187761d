"""The four views of the explorer as pure functions: equal arguments give equal boards, in a script or behind a slider.

swap: one part of a picture's spectrum towards another's; layers: how far two pictures lie apart, layer by layer;
tokens: where a token attends and what it changes; browse: a domain with its labels. Widgets are in `explore.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from setlib import spectral
from setlib.analysis.spectra import (
    PARTS,
    as_picture,
    compare,
    feature_pictures,
    log_amplitude_picture,
    phase_picture,
)
from setlib.analysis.tokens import Attention, Intervened
from setlib.data.labels import IGNORE, ClassSet
from setlib.explorer.board import Board, Panel, in_colour, marked, over_grey
from setlib.explorer.material import Material, Segmented, find_folder
from setlib.plots import charts as plots
from setlib.plots.charts import short_name
from setlib.run import Run

HIGHEST = 1.5  # of a band; the corner of the spectrum lies at sqrt(2)
ALL = "all classes"


def swap(content: Tensor, style: Tensor, part: str, low: float, high: float, weight: float, axes: tuple) -> Tensor:
    """Content with one part of its spectrum moved towards the style's, by `weight` within the band low ... high.

    content, style: 4-D of one shape; part: "amplitude" or "phase". Raises ValueError for another part.
    """
    if part not in PARTS:
        raise ValueError(f"Unknown part '{part}': expected one of {', '.join(PARTS)}.")
    mix = spectral.mix_amplitude if part == "amplitude" else spectral.mix_phase
    return mix(content, style, weight, low, high, axes)


class Studio(Material):
    """The four views of a run's domains, backbone and trained models.

    Every view takes names and numbers and returns a `Board`. A domain is named as everywhere; `run` is the folder of
    a trained run, "" for none: then there is no segmentation, and features are the frozen backbone's.
    """

    @classmethod
    def open(cls, folder: str | Path, *more: str) -> Studio:
        """Of a run folder, here or in the project. more: names of domains beside those of the run.

        Raises ValueError as `Run.load` does.
        """
        return cls(Run.load(find_folder(folder)), more)

    @torch.no_grad()
    def swap(
        self,
        content: str,
        style: str,
        content_index: int = 0,
        style_index: int = 0,
        part: str = "amplitude",
        space: str = "pixels",
        low: float = 0.0,
        high: float = HIGHEST,
        weight: float = 1.0,
        run: str = "",
    ) -> Board:
        """The content picture with one part of its spectrum moved towards the style's.

        part: "amplitude" or "phase"; space: "pixels", or "layer 9" for the features after a layer (after the refiner,
        where the run has one there); low, high: the band of frequencies that moves, 1 = the highest along an axis;
        weight: how far, 0 to 1. With a run: what its model says of content and mixture, at the views' size and in one
        piece, against the label. Raises ValueError for what does not exist.
        """
        if not (0 <= weight <= 1 and 0 <= low <= high):
            raise ValueError(
                f"Expected a weight from 0 to 1 and a band from low to high, got {weight}, {low} to {high}."
            )
        self.renew(run)
        layer = self.layer_of(space, run)
        (here, there), (x, y), axes = self.pair(run, layer, (content, content_index), (style, style_index))
        mixed = swap(x, y, part, low, high, weight, axes)
        names, share = ("content", "style", "mixture"), f"{100 * weight:.0f} % of the style's {part}"
        titles = [f"content: {short_name(content)} {content_index}", f"style: {short_name(style)} {style_index}"]
        rows: list[list[Panel | None]] = [[Panel(as_picture(here), titles[0]), Panel(as_picture(there), titles[1])]]
        rows[0].append(None if layer else Panel(as_picture(mixed), f"mixture: {share}"))
        if layer:
            rows.append(_features((x, y, mixed), [f"features after {space}, {name}" for name in names]))
        band = None if low <= 0 and high >= math.sqrt(2) else (low, high)
        rows += _spectra((x, y, mixed), axes, names, band)
        words = f"The mixture keeps the content's {PARTS[part == PARTS[0]]} and takes {share} "
        words += f"at frequencies from {low:.2f} to {high:.2f}." if band else "at all frequencies."
        if not run:
            return Board(rows, words)
        refiner = Intervened(self.model(run).refiner, layer, lambda features, _: mixed.to(features)) if layer else None
        scores = self.scores(run, here if layer else mixed.clamp(0, 1), refiner)
        pair = self.segmented(run, content, content_index), self.judge(scores, content, content_index)
        pictures = as_picture(here), as_picture(here if layer else mixed)
        answers = (" of the content", " of the mixture")
        more, said, legend = self._compared(content, content_index, pair, pictures, answers)
        if layer:
            rows[0][-1] = more.pop()[0]  # where the features' mixture has no picture of its own
        return Board([*rows, *more], f"{words} {said}", legend)

    def layers(
        self,
        first: str,
        second: str,
        first_index: int = 0,
        second_index: int = 0,
        space: str = "pixels",
        run: str = "",
    ) -> Board:
        """How far two pictures lie apart in amplitude and in phase, layer by layer, and where, after one of them.

        A rendered street in two styles is one number in two domains. space: "pixels" or "layer 9". run: features as
        its refiner leaves them, in place of the frozen ones.
        """
        self.renew(run)
        layer = self.layer_of(space, run)
        table = self.distances(run, first, first_index, second, second_index)
        (one, other), (x, y), axes = self.pair(run, layer, (first, first_index), (second, second_index))
        what = "patch" if layer else "pixel"
        titles = [f"{short_name(first)} {first_index}", f"{short_name(second)} {second_index}"]
        rows: list[list[Panel | None]] = [[Panel(as_picture(z), t) for z, t in zip((one, other), titles, strict=True)]]
        rows[0] += _features((x, y), [f"features after {space}, {t}" for t in titles]) if layer else [None, None]
        chart = plots.distances(table, chosen=space).figure.pixels()
        rows.append([Panel(chart, "distance by layer (0: equal; amplitude 0.69: a factor of two; phase 1: unrelated)")])
        moves = [_moved(x, y, part, axes) for part in PARTS]
        high, grey = max(float(m.max()) for m in moves), as_picture(one)
        patch = self.patch_size(run) if layer else 1
        rows.append(
            [
                Panel(over_grey(grey, m, 0, high, patch), f"where the other's {part} changes {space}")
                for part, m in zip(PARTS, moves, strict=True)
            ]
        )
        rows[-1] += _spectra((x, y), axes, [f"{t}, {space}" for t in titles])[0]
        row = next(row for row in table if row["layer"] == space)
        words = f"After {space}" if layer else "In the pixels"
        words += f" the two lie {row['amplitude']:.2f} apart in amplitude and {row['phase']:.2f} in phase. "
        shares = [f"{100 * float(m.mean()):.0f} %" for m in moves]
        words += (
            f"Taking the other's amplitude changes a {what}, on average, by {shares[0]} of a {what}'s mean length, "
        )
        return Board(rows, f"{words}taking its phase by {shares[1]} (bright: more).")

    def distances(self, run: str, first: str, first_index: int, second: str, second_index: int) -> list[dict]:
        """Rows of `analysis.compare` for the pixels and every layer; for the pixels alone where no backbone is."""
        one = self.image(first, first_index)
        size = tuple(one.shape[-2:])
        table = [{"layer": "pixels", **compare(one, self.image(second, second_index, size), spectral.PIXELS)}]
        try:
            x, y = (self.maps(run, *c, size) for c in ((first, first_index), (second, second_index)))
        except ValueError:
            if run:
                raise
            return table
        return table + [{"layer": f"layer {k}", **compare(x[k], y[k])} for k in x]

    def places(self, run: str, domain: str, index: int) -> dict[int, list[str]]:
        """The layers with tokens that attend, and the branches of each."""
        self.renew(run)
        found: dict[int, list[str]] = {}
        for one in self.reading(run, domain, index).attention:
            found.setdefault(one.layer, []).append(one.branch)
        return found

    def ranking(self, run: str, domain: str, index: int, layer: int, branch: str) -> list[tuple[int, float]]:
        """The tokens of a branch after a layer with their influence, the strongest first; token 0 adds nothing."""
        influence = self._attention(run, domain, index, layer, branch).influence
        return [(int(m), float(influence[m])) for m in np.argsort(-influence[1:], kind="stable") + 1]

    def _attention(self, run: str, domain: str, index: int, layer: int, branch: str) -> Attention:
        known = self.places(run, domain, index)
        if branch not in known.get(layer, []):
            there = "; ".join(f"layer {n}: {', '.join(names)}" for n, names in known.items())
            raise ValueError(f"There are no tokens{branch and f' of {branch}'} after layer {layer}: {there}.")
        reading = self.reading(run, domain, index)
        return next(one for one in reading.attention if (one.layer, one.branch) == (layer, branch))

    def tokens(
        self,
        domain: str,
        run: str,
        index: int = 0,
        layer: int | None = None,
        branch: str = "",
        token: int | None = None,
    ) -> Board:
        """Where a token attends, over the spectrum and over the picture, and what changes without it.

        layer, branch, token: by default the last layer, its first branch, its most influential token. Without: the
        token's value is set to zero after that layer, and everything behind runs again; a query that a mask head makes
        of it stays.
        """
        known = self.places(run, domain, index)
        layer = max(known) if layer is None else layer
        branch = branch or known.get(layer, [""])[0]
        one = self._attention(run, domain, index, layer, branch)
        ranking = self.ranking(run, domain, index, layer, branch)
        token, count = ranking[0][0] if token is None else token, len(one.influence)
        if not 0 <= token < count:
            raise ValueError(f"The tokens of {branch} after layer {layer} are 0 to {count - 1}, not {token}.")
        grey, patch = as_picture(self.image(domain, index)), self.patch_size(run)
        change, after = self._without(run, domain, index, layer, branch, token)
        pair, titles = (self.segmented(run, domain, index), after), (", all tokens", ", without the token")
        more, said, legend = self._compared(domain, index, pair, (grey, grey), titles)
        most, mean = float(change.max()), _percent(float(change.mean()))
        title = f"what it changes after layer {layer}: up to {_percent(most)}"
        more[1][1:] = [Panel(over_grey(grey, change, 0, most, patch), title), None]
        chart = plots.influences(ranking, token).figure.pixels()
        rows = [[Panel(grey, f"{short_name(domain)} {index}"), *_attended(one, token, grey, patch)], *more]
        place = [m for m, _ in ranking].index(token) + 1 if token else count
        words = (
            f"Token {token} of {branch} after layer {layer}: number {place} of {count} by influence, the mean of its "
        )
        words += (
            f"share times what it adds ({one.influence[token]:.3g}). Without it the features after the layer change "
        )
        words += f"by {mean} on average. {said}"
        return Board([*rows, [Panel(chart, "influence of the strongest tokens")]], words, legend)

    @torch.no_grad()
    def _without(
        self, run: str, domain: str, index: int, layer: int, branch: str, token: int
    ) -> tuple[np.ndarray, Segmented]:
        """How far a patch's features change behind a layer, (H, W) in units of their length, and what is seen then."""
        refiner, changes = self.model(run).refiner, []

        def without(features: Tensor, at: int) -> Tensor:
            """The refiner's answer without the token."""
            own = refiner(features, at)
            hook = refiner.branches()[branch].token_map.register_forward_hook(partial(_silence, token))
            try:
                silent = refiner(features, at)
            finally:
                hook.remove()
            changes.append(((own - silent).norm(dim=-1) / own.norm(dim=-1).clamp(min=1e-12))[0].float().cpu().numpy())
            return silent

        scores = self.scores(run, self.image(domain, index), Intervened(refiner, layer, without))
        return changes[0], self.judge(scores, domain, index)

    def browse(self, domain: str, index: int = 0, opacity: float = 0.6, only: str = ALL) -> Board:
        """A picture and its label in the colours of the classes. opacity: 0 to 1; only: the one class to colour."""
        if not 0 <= opacity <= 1:
            raise ValueError(f"Expected an opacity from 0 to 1, got {opacity}.")
        image, label = as_picture(self.image(domain, index)), self.label(domain, index)
        one = self.domain(domain)
        words = (
            f"{domain}: picture {index} of 0 to {len(one) - 1}, '{one.dataset.select_columns('name')[index]['name']}'."
        )
        if label is None:
            return Board([[Panel(image, f"{short_name(domain)} {index}"), None]], f"{words} This domain has no labels.")
        classes = one.class_set
        shares = _shares(label, classes)
        legend = {i: f"{100 * s:.1f} %" for i, s in sorted(shares.items(), key=lambda item: -item[1])}
        if only != ALL:
            place = _place(classes, only)
            label = np.where(label == place, label, np.uint8(IGNORE))
            words += f" {only}: {100 * shares.get(place, 0.0):.1f} % of the labelled pixels."
        overlay = plots.coloured(image, label, classes, opacity)
        panels = [
            Panel(image, f"{short_name(domain)} {index}"),
            Panel(overlay, "label" if only == ALL else f"label: {only}"),
        ]
        return Board([panels], words, (classes, legend))

    def find(self, domain: str, index: int, step: int = 1, only: str = ALL) -> int:
        """The next picture (step 1) or the one before (step -1) that holds a class, round the end if need be.

        Raises ValueError if no picture of the domain holds it.
        """
        one = self.domain(domain)
        count, place = len(one), None if only == ALL else _place(one.class_set, only)
        damaged = 0
        for away in range(1, count + 1):
            found = (index + step * away) % count
            if place is None:
                return found
            try:
                label = self.label(domain, found)
            except ValueError:
                damaged += 1
                continue
            if label is not None and (label == place).any():
                return found
        unread = f" ({damaged} cannot be read)" * bool(damaged)
        raise ValueError(f"No picture of {domain} holds the class {only}{unread}: choose another, or '{ALL}'.")

    def _compared(
        self, name: str, index: int, pair: tuple[Segmented, Segmented], pictures: Sequence[np.ndarray], titles: tuple
    ) -> tuple[list[list[Panel | None]], str, tuple[ClassSet, dict[int, str]]]:
        """Rows, words and legend of two segmentations of one scene against its label."""
        classes, label = self.domain(name).class_set, self.label(name, index)
        flipped = pair[0].places != pair[1].places
        row: list[Panel | None] = []
        if label is not None:
            row.append(Panel(plots.coloured(pictures[0], label, classes, 0.75), "ground truth"))
        for one, picture, title in zip(pair, pictures, titles, strict=True):
            score = "" if math.isnan(one.miou) else f": mIoU {one.miou:.1f} %"
            row.append(Panel(plots.coloured(picture, one.places, classes, 0.75), f"segmentation{title}{score}"))
        share = _percent(flipped.mean())
        row = [*row, None, None][:3]
        flips = [Panel(marked(pictures[0], flipped), f"pixels that flipped (orange): {share}"), None, None]
        if label is None:
            said = "This domain has no labels, so there is no mIoU."
        elif math.isnan(pair[0].miou):
            said = "No pixel of this picture has a label, so there is no mIoU."
        else:
            said = f"mIoU of this picture, at the size shown: {pair[0].miou:.1f} % before, {pair[1].miou:.1f} % after."
        said += f" {share} of the pixels change their class."
        seen = sorted(
            {*np.unique(pair[0].places), *np.unique(pair[1].places), *(() if label is None else np.unique(label))}
        )
        return [row, flips], said, (classes, {int(i): "" for i in seen if i != IGNORE})


def _features(maps: Sequence[Tensor], titles: Sequence[str]) -> list[Panel]:
    """Feature maps (1, H, W, C) in common colours, those of the first two."""
    pictures = feature_pictures(maps, 2)
    return [Panel(np.uint8(255 * picture), title) for picture, title in zip(pictures, titles, strict=True)]


def _spectra(
    maps: Sequence[Tensor], axes: tuple[int, int], titles: Sequence[str], band: tuple[float, float] | None = None
) -> list[list[Panel]]:
    """A row of log amplitudes (mean over the channels, one scale), and one of phases.

    A mean over channels has a phase of its own: shown is that of the channel in which the first map varies most, grey
    where it has no amplitude.
    """
    scale = 255 if axes == spectral.PIXELS else 1
    amplitudes = [log_amplitude_picture(scale * z, axes)[0].numpy() for z in maps]
    limits = min(float(a.min()) for a in amplitudes), max(float(a.max()) for a in amplitudes)
    strongest = int(maps[0].var(axes).argmax())
    channels = [z.select(spectral.CHANNEL_AXIS[axes], strongest) for z in maps]
    phases = [phase_picture(c - c.mean())[0].numpy() for c in channels]
    name = ("red", "green", "blue")[strongest] if axes == spectral.PIXELS else f"channel {strongest}"
    return [
        [
            Panel(in_colour(a, "magma", *limits), f"log amplitude, {t}", band)
            for a, t in zip(amplitudes, titles, strict=True)
        ],
        [
            Panel(in_colour(p, "twilight", -math.pi, math.pi), f"phase ({name}), {t}", band)
            for p, t in zip(phases, titles, strict=True)
        ],
    ]


def _moved(x: Tensor, y: Tensor, part: str, axes: tuple[int, int]) -> np.ndarray:
    """How far each place of x moves when it takes y's amplitude or phase, in units of the mean length of x."""
    channel = spectral.CHANNEL_AXIS[axes]
    moved = (swap(x, y, part, 0.0, HIGHEST, 1.0, axes) - x).norm(dim=channel)[0]
    return (moved / x.norm(dim=channel).mean().clamp(min=1e-12)).numpy()


def _attended(one: Attention, token: int, grey: np.ndarray, patch: int) -> list[Panel]:
    """Where a token attends: over the picture, and over the spectrum for a branch that reads one."""
    share = one.picture[..., token]
    kind = "share of the attention" if one.spectrum is None else "part of the feature at its frequencies"
    title = f"over the picture: {kind}, {100 * share.min():.2f} to {100 * share.max():.2f} %"
    panels = [Panel(over_grey(grey, share, share.min(), share.max(), patch), title)]
    if one.spectrum is not None:
        half = torch.from_numpy(one.spectrum[None, ..., token : token + 1])
        full = torch.fft.fftshift(spectral.full_spectrum(half, share.shape[1])[0, ..., 0], dim=(0, 1)).numpy()
        title = f"over the spectrum: share of the attention, {100 * full.min():.2f} to {100 * full.max():.2f} %"
        panels.append(Panel(in_colour(full, "viridis", full.min(), full.max()), title))
    return panels


def _silence(token: int, _: object, __: object, values: Tensor) -> Tensor:
    """Values of the tokens 1 to M - 1 with one at zero; token 0 has none."""
    silent = values.clone()
    if token:
        silent[token - 1] = 0
    return silent


def _place(classes: ClassSet, name: str) -> int:
    if name not in classes.classes:
        raise ValueError(f"Unknown class '{name}': expected one of {', '.join(classes.classes)}.")
    return classes.classes.index(name)


def _shares(label: np.ndarray, classes: ClassSet) -> dict[int, float]:
    counts = np.bincount(label.ravel(), minlength=256)[: len(classes)]
    return {int(i): counts[i] / counts.sum() for i in np.flatnonzero(counts)}


def _percent(share: float) -> str:
    """Small shares with one digit that says something."""
    return f"{100 * share:.1f} %" if share == 0 or share >= 5e-4 else f"{100 * share:.1g} %"
