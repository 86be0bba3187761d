"""The views of the explorer as pure functions: equal arguments give equal boards, in a script or behind a slider.

swap: one part of a picture's spectrum towards another's; layers: how far two pictures lie apart, layer by layer;
tokens: where a token attends and what it changes; browse: a domain with its labels; lens: what a linear head would say
before and after a swap; atlas: the swaps of a whole study. Widgets are in `widgets.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from setlib import plots, spectral
from setlib.analysis import premise, spectra
from setlib.analysis.premise import Findings
from setlib.analysis.spectra import PARTS, compare
from setlib.analysis.survey import evenly
from setlib.analysis.tokens import Intervened
from setlib.analysis.transplant import SPANS, closed, distance, placebo, swap_spectrum
from setlib.data.augment import to_image
from setlib.data.domains import short_name
from setlib.data.labels import IGNORE
from setlib.explorer.material import ALL, Material, Place, Segmented, find_folder, place_of
from setlib.plots import Board, Cells, Panel, framed
from setlib.run import Run

HIGHEST = 1.5  # of a band; the corner of the spectrum lies at sqrt(2)
ALIKE, LENSES = 0.5, 6  # a cosine from which patches count as alike; layers that are read, at most
MEASURES = {  # of the atlas, with their units
    "closed": "of the way (%)",
    "placebo": "of the way, by the placebo (%)",
    "content kept": "streets whose content is kept (%)",
}
CLICKABLE = ("content", "mixture", "features", "similarity", "segmentation", "ground truth", "pixels that flipped")


class Swapped(NamedTuple):
    """A swap as it was made, in the pixels (layer 0) or after a layer.

    first, style: the content, and the style's domain; run: whose features they are; maps: content, style and mixture,
    (1, H, W, C) each; band: low and high end; change: (x, y) -> mixture; panels: the pictures that there are.
    """

    first: Place
    style: str
    run: str
    layer: int
    maps: tuple[Tensor, Tensor, Tensor]
    band: tuple[float, float]
    change: partial[Tensor]
    panels: list[Panel]
    words: str

    @property
    def picture(self) -> Tensor:
        """The mixture of pixels, (1, 3, h, w) in [0, 1]."""
        return self.maps[2].permute(0, 3, 1, 2).clamp(0, 1)


class Studio(Material):
    """The views of a run's domains, backbone and trained models.

    Every view takes names and numbers and returns a `Board`. A domain is named as everywhere; `run` is the folder of
    a trained run, "" for none: then there is no segmentation, and features are the frozen backbone's.
    """

    @classmethod
    def open(cls, folder: str | Path, *more: str) -> Studio:
        """Of a run folder, here or in the project, with `more` domains. Raises ValueError as `Run.load` does."""
        return cls(Run.load(find_folder(folder)), more)

    @torch.no_grad()
    def swapped(
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
    ) -> Swapped:
        """The content picture with one part of its spectrum moved towards the style's: what `swap` and `lens` show.

        part: "amplitude" or "phase"; space: "pixels", or "layer 9" for the features after a layer (after the refiner,
        where the run has one there); low, high: the frequencies low < r <= high move, from 0 on with the mean, 1 = the
        highest along an axis; weight: how far, 0 to 1. Raises ValueError for what does not exist.
        """
        if not (0 <= weight <= 1 and 0 <= low <= high):
            got = f"{weight}, {low} to {high}"
            raise ValueError(f"Expected a weight from 0 to 1 and a band from low to high, got {got}.")
        self.renew(run)
        layer, places = self.layer_of(space, run), {"content": (content, content_index), "style": (style, style_index)}
        images, (x, y) = self.pair(run, layer, *places.values())
        change = partial(swap_spectrum, part=part, low=low, high=high, weight=weight)
        share = f"{100 * weight:.0f} % of the style's {part}"
        panels = [
            Panel(to_image(image), f"{kind}: {short_name(name)} {index}")
            for image, (kind, (name, index)) in zip(images, places.items(), strict=True)
        ]
        kept = "phase" if part == "amplitude" else "amplitude"
        is_whole = low <= 0 and high >= math.sqrt(2)
        where = "at all frequencies" if is_whole else f"at frequencies from {low:.3f} to {high:.3f}"
        words = f"The mixture keeps the content's {kept} and takes {share} {where}."
        maps = x, y, change(x, y)
        done = Swapped(places["content"], style, run, layer, maps, (low, high), change, panels, words)
        if not layer:
            panels.append(Panel(to_image(done.picture), f"mixture: {share}"))
        return done

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
        patch: int = -1,
    ) -> Board:
        """A swap in pictures; its arguments are those of `swapped`, and patch.

        patch: one of the content's, row by row, whose similarity to all others is shown before and after, -1 for none.
        With a run: what its model says of content and mixture, at the views' size and in one piece, against the label.
        Raises ValueError as `swapped` does, and for a patch that does not exist.
        """
        done = self.swapped(content, style, content_index, style_index, part, space, low, high, weight, run)
        layer, top, names = done.layer, done.panels, ("content", "style", "mixture")
        rows, words, legend = [top], done.words + self._beside(done), {}
        if layer:
            rows.append(_features(done.maps, [f"features after layer {layer}, {name}" for name in names]))
        if patch >= 0:
            similar, said = self._similar(done, patch)
            rows.append(similar)
            words += said
        rows += [_amplitudes(done.maps, layer, names, done.band), _phases(done.maps, layer, names, done.band)]
        if run:
            changed = {"refiner": self._replaced(done)} if layer else {"image": done.picture}
            after = self.segment(run, *done.first, **changed)
            titles = "segmentation of the content", "segmentation of the mixture"
            compared = self._compared(run, done.first, after, titles, top[0 if layer else 2].picture)
            if layer:  # the mixture has no picture of its own
                top += compared.rows.pop()
            rows, words, legend = rows + compared.rows, f"{words} {compared.words}", compared.legend
        side = self.backbone(run).patch_size if run or not self.missing else 0
        return Board([[_clickable(panel, side) for panel in row] for row in rows], 3, words, legend)

    def _replaced(self, done: Swapped) -> Intervened:
        """A refiner that leaves the mixture behind the layer of the swap."""
        return Intervened(self.refiner(done.run), done.layer, lambda features, _: done.maps[2].to(features))

    def _both(self, done: Swapped) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """The features of the content after every layer, before and after the swap."""
        image, run = self.image(*done.first), done.run
        after = self.features(run, image, self._replaced(done)) if done.layer else self.features(run, done.picture)
        return self.maps(run, *done.first, tuple(image.shape[-2:])), after

    def _similar(self, done: Swapped, patch: int) -> tuple[list[Panel], str]:
        """How similar every patch is to one of them, before and after the swap; and in a sentence."""
        backbone, both, panels = self.backbone(done.run), (done.maps[0], done.maps[2]), []
        layer, side = done.layer or max(1, backbone.num_layers - 1), backbone.patch_size
        if not done.layer:
            both = [maps[layer] for maps in self._both(done)]
        found, (row, column) = spectra.similarities(both, patch), divmod(patch, both[0].shape[2])
        for values, when in zip(found, ("before", "after"), strict=True):
            picture = framed(plots.over_grey(done.panels[0].picture, values, 0, 1, side), row, column, side)
            panels.append(Panel(picture, f"similarity to patch {patch} {when}, layer {layer}"))
        alike = [int((values > ALIKE).sum()) for values in found]
        return panels, (
            f" After layer {layer}, {alike[0]} of {found[0].size} patches are more similar to patch {patch} than "
            f"{ALIKE} before the swap, {alike[1]} after it (dark: 0 or less; bright: 1, equal)."
        )

    def _beside(self, done: Swapped) -> str:
        """How far the swap goes towards the same street in the style's style, beside its placebo and other streets."""
        first, layer, (x, y, mixed) = done.first, done.layer, done.maps
        if not self.has_styles(first[0], done.style):
            return ""
        goal = self.pair(done.run, layer, first, (done.style, first[1]))[1][1]
        instead = placebo(done.change, "random basis", x, y, distance(mixed, x))
        own, other = (closed(z, x, goal).item() for z in (mixed, instead))
        words = (
            f" Of the way to this street in {short_name(done.style)} it closes {_whole(own)} where it is made, and the "
            f"same swap in a random basis, which moves as far, {_whole(other)}."
        )
        part, weight = (done.change.keywords[name] for name in ("part", "weight"))
        if weight == 1 and not done.run and (found := premise.read(self.run)):
            band = next((band for band, span in SPANS.items() if span == done.band), "")
            if said := _measured(found, part, layer, band):
                words += f" Notebook 02 {said}."
        return words

    @torch.no_grad()
    def lens(self, content: str, style: str, **more: Any) -> Board:
        """What a linear head would say of the content after the layers from the swap on, before and after it.

        more: what `swapped` takes. The head of each layer is a ridge regression on the features of the run's labelled
        source. Raises ValueError as `swapped` does, and where the run has no source.
        """
        done = self.swapped(content, style, **more)
        both, (h, w), picture = self._both(done), self.image(*done.first).shape[-2:], done.panels[0].picture
        start, side, seen = max(done.layer, 1), self.backbone(done.run).patch_size, {}
        layers = [start + place for place in evenly(len(both[0]) - start + 1, LENSES)]
        lenses = self.lenses(done.run, layers)
        for layer in layers:
            for features, when in zip(both, ("before", "after"), strict=True):
                scores = F.interpolate(lenses[layer](features[layer]), scale_factor=side, mode="bilinear")[0, :, :h, :w]
                seen[f"layer {layer}, {when}"] = picture, self.judge(scores, *done.first)
        panels, legend = self._covered(done.first, seen)
        top, panels = done.panels + panels[: -len(seen)], panels[-len(seen) :]
        words = (
            f"{done.words} In the lower rows: what a linear head, fitted to {short_name(self.experiment.data.source)}, "
            "reads from the features after a layer, before and after the swap."
        )
        return Board([top, *(panels[place : place + 4] for place in range(0, len(panels), 4))], 4, words, legend)

    def atlas(self, measure: str = "closed", part: str = "", layer: int = 0, band: str = "") -> Board:
        """The swaps of the premise's study (notebook 02) as heat maps, layers x bands, for amplitude and for phase.

        measure: one of MEASURES. part, layer (0: the pixels), band (of `transplant.SPANS`): of the cell to frame and
        put into words. Raises ValueError without a study, or without such a measure.
        """
        found = self.study()
        if measure not in MEASURES:
            raise ValueError(f"Unknown measure '{measure}': expected one of {', '.join(MEASURES)}.")
        figure = plots.atlas(found.atlas, measure, label=MEASURES[measure], chosen=(part, layer, band))
        picture, rows, columns = figure.pixels(), *(len({row[key] for row in found.atlas}) for key in ("layer", "band"))
        boxes = [ax.get_position() for ax in figure.axes[: len(PARTS)]]
        cells = tuple(Cells(rows, columns, (box.x0, 1 - box.y1, box.width, box.height)) for box in boxes)
        words = "In brackets: swaps that close nothing, or no more than their placebo, the same swap in a random basis."
        if said := _measured(found, part, layer, band):
            where = f"after layer {layer}" if layer else "in the pixels"
            words += f" The {part} {where}, band '{band}': the study {said}."
        return Board([[Panel(picture, is_wide=True, cells=cells)]], 1, words)

    def layers(
        self, first: str, second: str, first_index: int = 0, second_index: int = 0, space: str = "pixels", run: str = ""
    ) -> Board:
        """How far two pictures lie apart in amplitude and in phase, layer by layer, and where, after one of them.

        A rendered street in two styles is one number in two domains. space: "pixels" or "layer 9". run: features as
        its refiner leaves them, in place of the frozen ones.
        """
        self.renew(run)
        layer, places = self.layer_of(space, run), ((first, first_index), (second, second_index))
        images, (x, y) = self.pair(run, layer, *places)
        titles = [f"{short_name(name)} {index}" for name, index in places]
        top = [Panel(to_image(image), title) for image, title in zip(images, titles, strict=True)]
        if layer:
            top += _features((x, y), [f"features after {space}, {title}" for title in titles])
        added = ""
        if self.has_styles(first, second):
            is_alone = first_index == second_index  # then the next street is the second layout
            layouts = first_index, (second_index + 1) % len(self.domain(second)) if is_alone else second_index
            shares = self.shares(run, (first, second), layouts)
            chart = plots.share_lines(shares, chosen=space)
            second_one = f"{layouts[1]}{', the next one,' if is_alone else ''}"
            added = f" Streets {layouts[0]} and {second_one} in both styles, {space}: {_explained(shares, space)}"
            about = "what style and content explain, by layer (what is left is their interaction)"
        else:
            chart = plots.distances(self.distances(run, *places), chosen=space)
            about = "distance by layer (0: equal; amplitude 0.69: a factor of two; phase 1: unrelated)"
        length = x.norm(dim=-1).mean().clamp(min=1e-12)
        moves = {part: ((swap_spectrum(x, y, part) - x).norm(dim=-1)[0] / length).numpy() for part in PARTS}
        high, patch = max(float(move.max()) for move in moves.values()), self.backbone(run).patch_size if layer else 1
        bottom = [
            Panel(plots.over_grey(top[0].picture, move, 0, high, patch), f"where the other's {part} changes {space}")
            for part, move in moves.items()
        ]
        bottom += _amplitudes((x, y), layer, [f"{title}, {space}" for title in titles])
        apart, what = compare(x, y), "patch" if layer else "pixel"
        words = (
            f"{f'After {space}' if layer else 'In the pixels'} the two lie {apart['amplitude']:.2f} apart in amplitude "
            f"and {apart['phase']:.2f} in phase. Taking the other's amplitude changes a {what}, on average, by "
            f"{100 * moves['amplitude'].mean():.0f} % of a {what}'s mean length, taking its phase by "
            f"{100 * moves['phase'].mean():.0f} % (bright: more)."
        )
        return Board([top, [Panel(chart.figure.pixels(), about, is_wide=True)], bottom], 4, words + added)

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
        branch = branch or next(iter(known.get(layer, {})), "")
        ranking, one = self.ranking(run, domain, index, layer, branch), known[layer][branch]
        token, count = ranking[0][0] if token is None else token, len(one.influence)
        if not 0 <= token < count:
            raise ValueError(f"The tokens of {branch} after layer {layer} are 0 to {count - 1}, not {token}.")
        scene, patch = to_image(self.image(domain, index)), self.backbone(run).patch_size
        change, after = self._without(run, domain, index, layer, branch, token)
        titles = "segmentation, all tokens", "segmentation, without the token"
        compared = self._compared(run, (domain, index), after, titles, scene)
        most, mean = float(change.max()), float(change.mean())
        changed = plots.over_grey(scene, change, 0, most, patch)
        compared.rows[-1].append(Panel(changed, f"what it changes after layer {layer}: up to {_percent(most)}"))
        top = [Panel(scene, f"{short_name(domain)} {index}"), *plots.attention(one, token, scene, patch)]
        chart = plots.influences(ranking, token).figure.pixels()
        bottom = [Panel(chart, "influence of the strongest tokens", is_wide=True)]
        place = [m for m, _ in ranking].index(token) + 1 if token else count
        words = (
            f"Token {token} of {branch} after layer {layer}: number {place} of {count} by influence, the mean of its "
            f"share times what it adds ({one.influence[token]:.3g}). Without it the features after the layer change "
            f"by {_percent(mean)} on average. {compared.words}"
        )
        return Board([top, *compared.rows, bottom], 3, words, compared.legend)

    @torch.no_grad()
    def _without(
        self, run: str, domain: str, index: int, layer: int, branch: str, token: int
    ) -> tuple[np.ndarray, Segmented]:
        """How far a patch's features change behind a layer, (H, W) in units of their length, and what is seen then."""
        refiner, changes = self.model(run).refiner, []
        token_map = refiner.branches()[branch].token_map

        def silence(_: object, __: object, values: Tensor) -> Tensor:
            """Values of the tokens 1 to M - 1 with one at zero; token 0 has none."""
            return values * (torch.arange(1, len(values) + 1, device=values.device) != token)[:, None]

        def without(features: Tensor, at: int) -> Tensor:
            """The refiner's answer without the token."""
            own = refiner(features, at)
            with token_map.register_forward_hook(silence):
                silent = refiner(features, at)
            changes.append((own - silent).norm(dim=-1) / own.norm(dim=-1).clamp(min=1e-12))
            return silent

        seen = self.segment(run, domain, index, refiner=Intervened(refiner, layer, without))
        return changes[0][0].float().cpu().numpy(), seen

    def browse(self, domain: str, index: int = 0, opacity: float = 0.6, only: str = ALL) -> Board:
        """A picture and its label in the colours of the classes. opacity: 0 to 1; only: the one class to colour."""
        if not 0 <= opacity <= 1:
            raise ValueError(f"Expected an opacity from 0 to 1, got {opacity}.")
        image, label = to_image(self.image(domain, index)), self.label(domain, index)
        count, classes = len(self.domain(domain)), self.domain(domain).class_set
        words = f"{domain}: picture {index} of 0 to {count - 1}, '{self.sample(domain, index).name}'."
        panel = Panel(image, f"{short_name(domain)} {index}")
        if label is None:
            return Board([[panel]], 2, f"{words} This domain has no labels.")
        pixels = np.bincount(label.ravel(), minlength=256)[: len(classes)]
        percent = 100 * pixels / max(pixels.sum(), 1)
        present = [place for place in np.argsort(-percent, kind="stable") if pixels[place]]
        legend = {f"{classes.classes[place]} {percent[place]:.1f} %": classes.colours[place] for place in present}
        title = "label"
        if only != ALL:
            place = place_of(classes, only)
            label, title = np.where(label == place, label, np.uint8(IGNORE)), f"label: {only}"
            words += f" {only}: {percent[place]:.1f} % of the labelled pixels."
        return Board([[panel, Panel(plots.coloured(image, label, classes, opacity), title)]], 2, words, legend)

    def _covered(
        self, place: Place, seen: Mapping[str, tuple[np.ndarray, Segmented]]
    ) -> tuple[list[Panel], dict[str, tuple[int, int, int]]]:
        """A picture's label, if it has one, and what is `seen` of it, by titles, over a picture; the legend of all."""
        classes, label = self.domain(place[0]).class_set, self.label(*place)
        if label is not None:
            seen = {"ground truth": (to_image(self.image(*place)), Segmented(label, math.nan)), **seen}
        panels = []
        for title, (picture, one) in seen.items():
            score = "" if math.isnan(one.miou) else f": mIoU {one.miou:.1f} %"
            panels.append(Panel(plots.coloured(picture, one.places, classes, 0.75), f"{title}{score}"))
        return panels, plots.class_colours(classes, np.unique([one.places for _, one in seen.values()]))

    def _compared(
        self, run: str, place: Place, after: Segmented, titles: tuple[str, str], changed: np.ndarray
    ) -> Board:
        """What is seen of a picture, and of the `changed` one, beside the label; below, where the two differ."""
        before, scene = self.segmented(run, *place), to_image(self.image(*place))
        panels, legend = self._covered(place, {titles[0]: (scene, before), titles[1]: (changed, after)})
        flipped = before.places != after.places
        share = _percent(flipped.mean())
        flips = Panel(plots.marked(scene, flipped), f"pixels that flipped (orange): {share}")
        said = f"mIoU of this picture, at the size shown: {before.miou:.1f} % before, {after.miou:.1f} % after."
        if math.isnan(before.miou):
            said = "This picture has no labels, so there is no mIoU."
        return Board([panels, [flips]], 3, f"{said} {share} of the pixels change their class.", legend)


def _clickable(panel: Panel, side: int) -> Panel:
    """A panel of the content's place, whose patches, of so many pixels, a click chooses; others as they are."""
    if not side or not panel.title.startswith(CLICKABLE) or panel.title.endswith("style"):
        return panel
    unit = 1 if panel.title.startswith("features") else side
    return panel._replace(cells=(Cells(panel.picture.shape[0] / unit, panel.picture.shape[1] / unit),))


def _explained(rows: Sequence[Mapping], space: str) -> str:
    """The shares of one place in a sentence."""
    said = []
    for part in PARTS:
        shares = [_whole(row["share"]) for row in rows if (row["layer"], row["part"]) == (space, part)]
        said.append("of the {} style explains {}, content {}, their interaction {}".format(part, *shares))
    return f"{'; '.join(said)} (of its variance)."


def _measured(found: Findings, part: str, layer: int, band: str) -> str:
    """A cell of the atlas in words; "" where it holds none."""
    for row in found.atlas:
        if (row["part"], row["layer"], row["band"]) == (part, layer, band):
            return (
                f"found, over {row['streets']} streets and read out after layer {found.about['readout']}, "
                f"{_whole(row['closed'])} [{_whole(row['closed low'])}, {_whole(row['closed high'])}] of the way "
                f"closed, {_whole(row['placebo'])} by the placebo, and the content kept in "
                f"{_whole(row['content kept'])}"
            )
    return ""


def _features(maps: Sequence[Tensor], titles: Sequence[str]) -> list[Panel]:
    """Feature maps (1, H, W, C) in common colours, those of the first two."""
    pictures = spectra.feature_pictures(maps, 2)
    return [Panel(np.uint8(255 * picture), title) for picture, title in zip(pictures, titles, strict=True)]


def _amplitudes(
    maps: Sequence[Tensor], layer: int, names: Sequence[str], band: tuple[float, float] | None = None
) -> list[Panel]:
    """Log amplitudes, mean over the channels, on one scale; those of pixels are of values from 0 to 255."""
    scale = 1 if layer else 255
    values = [spectra.log_amplitude_picture(scale * one, spectral.GRID)[0].numpy() for one in maps]
    return plots.spectrum_row(values, [f"log amplitude, {name}" for name in names], band=band)


def _phases(maps: Sequence[Tensor], layer: int, names: Sequence[str], band: tuple[float, float] | None) -> list[Panel]:
    """Phases of the channel in which the first map varies most: a mean over channels would have a phase of its own."""
    channel = int(maps[0].var((0, 1, 2)).argmax())
    called = f"channel {channel}" if layer else ("red", "green", "blue")[channel]
    values = [spectra.phase_picture(one - one.mean())[0].numpy() for one in (m[..., channel] for m in maps)]
    return plots.spectrum_row(values, [f"phase ({called}), {name}" for name in names], is_phase=True, band=band)


def _whole(share: float) -> str:
    return f"{round(100 * share)} %"


def _percent(share: float) -> str:
    """Small shares with one digit that says something."""
    return f"{100 * share:.1f} %" if share == 0 or share >= 5e-4 else f"{100 * share:.1g} %"
