"""The four views of the explorer as pure functions: equal arguments give equal boards, in a script or behind a slider.

swap: one part of a picture's spectrum towards another's; layers: how far two pictures lie apart, layer by layer;
tokens: where a token attends and what it changes; browse: a domain with its labels. Widgets are in `explore.py`.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

from setlib import plots, spectral
from setlib.analysis import PARTS, as_picture, compare, feature_pictures
from setlib.attention import Attention
from setlib.boards import Board, Panel, in_colour, marked, over_grey
from setlib.labels import IGNORE, ClassSet
from setlib.material import Material, Segmented
from setlib.plots import short_name
from setlib.refiners import Intervened

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

        part: "amplitude" or "phase"; space: "pixels", or "layer 9" for the features after a layer; low, high: the band
        of frequencies that moves, 1 = the highest along an axis; weight: how far, 0 to 1. With a run: what its model
        says of content and mixture, against the label. Raises ValueError for what does not exist.
        """
        self.renew(run)
        layer = self.layer_of(space, run)
        here = self.image(content, content_index)
        size = tuple(here.shape[-2:])
        there = self.image(style, style_index, size)
        names = ("content", "style", "mixture")
        titles = [f"content: {short_name(content)} {content_index}", f"style: {short_name(style)} {style_index}"]
        titles.append(f"mixture: {100 * weight:.0f} % of the style's {part}")
        if layer:
            pair = [self.maps(run, *chosen, size)[layer] for chosen in ((content, content_index), (style, style_index))]
            maps = [*pair, swap(*pair, part, low, high, weight, spectral.GRID)]
            colours = [np.uint8(255 * picture) for picture in feature_pictures(maps)]
            rows = [[*(Panel(as_picture(i), t) for i, t in zip((here, there), titles, strict=False)), None]]
            rows.append([Panel(p, f"features after {space}, {n}") for p, n in zip(colours, names, strict=True)])
            amplitudes = [spectral.log_amplitude_picture(m, spectral.GRID)[0] for m in maps]
            phases = [_phase(torch.from_numpy(picture[..., 0]).float()) for picture in colours]
        else:
            shown = [here, there, swap(here, there, part, low, high, weight, spectral.PIXELS)]
            rows = [[Panel(as_picture(i), t) for i, t in zip(shown, titles, strict=True)]]
            amplitudes = [spectral.log_amplitude_picture(255 * x)[0] for x in shown]
            phases = [_phase(x[0].mean(0)) for x in shown]
        limits = float(min(a.min() for a in amplitudes)), float(max(a.max() for a in amplitudes))
        band = None if low <= 0 and high >= math.sqrt(2) else (low, high)
        pictures = [in_colour(a.numpy(), "magma", *limits) for a in amplitudes]
        rows.append([Panel(p, f"log amplitude, {n}", band) for p, n in zip(pictures, names, strict=True)])
        pictures = [in_colour(p.numpy(), "twilight", -math.pi, math.pi) for p in phases]
        rows.append([Panel(p, f"phase, {n}", band) for p, n in zip(pictures, names, strict=True)])
        words = (
            f"The mixture keeps the content's {PARTS[part == PARTS[0]]} and takes {100 * weight:.0f} % of the style's "
        )
        words += f"{part} " + (f"at frequencies from {low:.2f} to {high:.2f}." if band else "at all frequencies.")
        if not run:
            return Board(rows, words)
        refiner = Intervened(self.model(run).refiner, layer, lambda f, n: f) if layer else None
        if layer:
            refiner.change = lambda f, n: swap(
                refiner.own(f, n), pair[1].to(f), part, low, high, weight, spectral.GRID
            ).to(f.dtype)
        scores = self.scores(run, here if layer else shown[2].clamp(0, 1), refiner)
        before, after = self.segmented(run, content, content_index), self.judge(scores, content, content_index)
        pictures = [as_picture(here), rows[0][0 if layer else 2].picture]
        more, said, legend = self._compared(
            content, content_index, (before, after), pictures, (" of the content", " of the mixture")
        )
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

        A rendered street in two styles is one number in two domains. space: "pixels" or "layer 9".
        """
        self.renew(run)
        layer = self.layer_of(space, run)
        table = self.distances(run, first, first_index, second, second_index)
        one = self.image(first, first_index)
        size = tuple(one.shape[-2:])
        other = self.image(second, second_index, size)
        axes = spectral.GRID if layer else spectral.PIXELS
        x, y = one, other
        if layer:
            x, y = (self.maps(run, *c, size)[layer] for c in ((first, first_index), (second, second_index)))
        titles = [f"{short_name(first)} {first_index}", f"{short_name(second)} {second_index}"]
        rows = [[Panel(as_picture(one), titles[0]), Panel(as_picture(other), titles[1]), None, None]]
        if layer:
            colours = [np.uint8(255 * picture) for picture in feature_pictures([x, y])]
            rows[0][2:] = [Panel(p, f"features after {space}, {t}") for p, t in zip(colours, titles, strict=True)]
        chart = plots.distances(table, chosen=space).figure
        rows.append(
            [
                Panel(
                    chart.pixels(),
                    "distance by layer (0 = equal; amplitude: 0.69 = a factor of two; phase: 1 = unrelated)",
                )
            ]
        )
        moves = [_moved(x, y, part, axes) for part in PARTS]
        high = max(float(m.max()) for m in moves)
        grey = as_picture(one)
        where = [
            Panel(over_grey(grey, m, 0, high), f"where the other's {p} changes {space}")
            for p, m in zip(PARTS, moves, strict=True)
        ]
        scale = 1 if layer else 255
        amplitudes = [spectral.log_amplitude_picture(scale * z, axes)[0].numpy() for z in (x, y)]
        limits = min(a.min() for a in amplitudes), max(a.max() for a in amplitudes)
        spectra = [
            Panel(in_colour(a, "magma", *limits), f"log amplitude of {space}, {t}")
            for a, t in zip(amplitudes, titles, strict=True)
        ]
        rows.append([*where, *spectra])
        row = next(row for row in table if row["layer"] == space)
        words = f"After {space}" if layer else "In the pixels"
        words += f" the two lie {row['amplitude']:.2f} apart in amplitude and {row['phase']:.2f} in phase. "
        shares = [f"{100 * float(m.mean()):.0f} %" for m in moves]
        what = "a patch" if layer else "a pixel"
        words += f"Taking the other's amplitude changes {what} by {shares[0]} of the mean length, taking its phase by "
        words += f"{shares[1]} (bright: more)."
        return Board(rows, words)

    def distances(self, run: str, first: str, first_index: int, second: str, second_index: int) -> list[dict]:
        """Rows of `analysis.compare` for the pixels and every layer."""
        one = self.image(first, first_index)
        size = tuple(one.shape[-2:])
        x, y = (self.maps(run, *c, size) for c in ((first, first_index), (second, second_index)))
        table = [{"layer": "pixels", **compare(one, self.image(second, second_index, size), spectral.PIXELS)}]
        return table + [{"layer": f"layer {k}", **compare(x[k], y[k])} for k in x]

    def places(self, run: str, domain: str, index: int) -> dict[int, list[str]]:
        """The layers with tokens that attend, and the branches of each."""
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
            raise ValueError(f"There are no tokens of {branch} after layer {layer}: {there}.")
        reading = self.reading(run, domain, index)
        return next(one for one in reading.attention if (one.layer, one.branch) == (layer, branch))

    @torch.no_grad()
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
        token's value is set to zero after that layer, and everything behind runs again.
        """
        self.renew(run)
        known = self.places(run, domain, index)
        layer = layer or max(known)
        branch = branch or known.get(layer, [""])[0]
        one, ranking = (
            self._attention(run, domain, index, layer, branch),
            self.ranking(run, domain, index, layer, branch),
        )
        token = ranking[0][0] if token is None else token
        if not 0 <= token < len(one.influence):
            raise ValueError(
                f"The tokens of {branch} after layer {layer} are 0 to {len(one.influence) - 1}, not {token}."
            )
        image, model = self.image(domain, index), self.model(run)
        grey, share = as_picture(image), one.picture[..., token]
        kind = "share of the attention" if one.spectrum is None else "part of the feature at its frequencies"
        rows = [[Panel(grey, f"{short_name(domain)} {index}")]]
        rows[0].append(
            Panel(
                over_grey(grey, share, share.min(), share.max()),
                f"over the picture: {kind}, {100 * share.min():.2f} to {100 * share.max():.2f} %",
            )
        )
        if one.spectrum is not None:
            half = torch.from_numpy(one.spectrum[None, ..., token : token + 1])
            full = torch.fft.fftshift(spectral.full_spectrum(half, share.shape[1])[0, ..., 0], dim=(0, 1)).numpy()
            title = f"over the spectrum: share of the attention, {100 * full.min():.2f} to {100 * full.max():.2f} %"
            rows[0].append(Panel(in_colour(full, "viridis", full.min(), full.max()), title))
        change = torch.zeros(share.shape)
        tokens = model.refiner.branches()[branch]

        def without(features: Tensor, at: int) -> Tensor:
            """The refiner's answer without the token."""
            own = model.refiner(features, at)
            hook = tokens.token_map.register_forward_hook(partial(_silence, token))
            try:
                silent = model.refiner(features, at)
            finally:
                hook.remove()
            change.copy_(((own - silent).norm(dim=-1) / own.norm(dim=-1).clamp(min=1e-12))[0].float().cpu())
            return silent

        after = self.judge(self.scores(run, image, Intervened(model.refiner, layer, without)), domain, index)
        before = self.segmented(run, domain, index)
        most = float(change.max())
        wide = Panel(
            over_grey(grey, change.numpy(), 0, most), f"what it changes after layer {layer}: up to {_percent(most)}"
        )
        more, said, legend = self._compared(
            domain, index, (before, after), [grey, grey], (", all tokens", ", without the token")
        )
        more[1][1:] = [wide, None]
        place = [m for m, _ in ranking].index(token) + 1 if token else len(one.influence)
        words = f"Token {token} of {branch} after layer {layer}: number {place} of {len(one.influence)} by influence, "
        words += f"the mean of its share times what it adds ({one.influence[token]:.3g}). "
        words += (
            f"Without it the features after the layer change by {_percent(float(change.mean()))} on average. {said}"
        )
        chart = plots.influences(ranking, token).figure
        return Board([*rows, *more, [Panel(chart.pixels(), "influence of the strongest tokens")]], words, legend)

    def browse(self, domain: str, index: int = 0, opacity: float = 0.6, only: str = ALL) -> Board:
        """A picture and its label in the colours of the classes. opacity: 0 to 1; only: the one class to colour."""
        image, label = as_picture(self.image(domain, index)), self.label(domain, index)
        one = self.domain(domain)
        words = f"{domain}: picture {index} of 0 to {len(one) - 1}, '{self.sample(domain, index).name}'."
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
        for away in range(1, count + 1):
            found = (index + step * away) % count
            label = None if place is None else self.label(domain, found)
            if place is None or (label is not None and (label == place).any()):
                return found
        raise ValueError(f"No picture of {domain} holds the class {only}: choose another, or '{ALL}'.")

    def _compared(
        self, name: str, index: int, pair: tuple[Segmented, Segmented], pictures: list[np.ndarray], titles: tuple
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
            said = f"mIoU of this picture: {pair[0].miou:.1f} % before, {pair[1].miou:.1f} % after."
        said += f" {share} of the pixels change their class."
        seen = sorted(
            {*np.unique(pair[0].places), *np.unique(pair[1].places), *(() if label is None else np.unique(label))}
        )
        return [row, flips], said, (classes, {int(i): "" for i in seen if i != IGNORE})


def _phase(x: Tensor) -> Tensor:
    """Phase (h, w) of a picture's full spectrum, zero frequency in the middle."""
    return torch.fft.fftshift(torch.fft.fft2(x - x.mean())).angle()


def _moved(x: Tensor, y: Tensor, part: str, axes: tuple[int, int]) -> np.ndarray:
    """How far each place of x moves when it takes y's amplitude or phase, in units of the mean length of x."""
    channel = 6 - sum(axes)
    moved = (swap(x, y, part, 0.0, HIGHEST, 1.0, axes) - x).norm(dim=channel)[0]
    return (moved / x.norm(dim=channel).mean().clamp(min=1e-12)).numpy()


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
