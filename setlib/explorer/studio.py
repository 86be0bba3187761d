"""The views of the explorer as pure functions: equal arguments give equal boards, in a script or behind a slider.

swap: one part of a picture's spectrum towards another's; layers: how far two pictures lie apart, layer by layer;
tokens: where a token attends and what it changes; browse: a domain with its labels; lens: what a linear head would say
before and after a swap; atlas: the swaps of a whole study. Widgets are in `widgets.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from setlib import plots, spectral
from setlib.analysis import premise
from setlib.analysis.premise import Findings
from setlib.analysis.spectra import PARTS, feature_pictures, log_amplitude_picture, phase_picture, similarities
from setlib.analysis.survey import evenly
from setlib.analysis.tokens import Intervened
from setlib.analysis.transplant import SPANS, closed, placebo, swap_spectrum
from setlib.data.augment import to_image
from setlib.data.domains import short_name
from setlib.data.labels import IGNORE
from setlib.explorer.material import ALL, Material, Segmented, find_folder, place_of
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
Place = tuple[str, int]  # of a picture: a domain and its number


class Swapped(NamedTuple):
    """A swap as it was made: after a layer (0: in the pixels), on the content `here` (1, 3, h, w).

    maps: content, style and mixture, transformed over axes; band: None for all; change: (x, y) -> mixture.
    """

    layer: int
    here: Tensor
    maps: tuple[Tensor, Tensor, Tensor]
    axes: spectral.Axes
    band: tuple[float, float] | None
    change: Callable[[Tensor, Tensor], Tensor]
    words: str


class Studio(Material):
    """The views of a run's domains, backbone and trained models.

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
        patch: int = -1,
    ) -> Board:
        """The content picture with one part of its spectrum moved towards the style's.

        part: "amplitude" or "phase"; space: "pixels", or "layer 9" for the features after a layer (after the refiner,
        where the run has one there); low, high: the frequencies low < r <= high move, from 0 on with the mean, 1 = the
        highest along an axis; weight: how far, 0 to 1; patch: one of the content's, row by row, whose similarity to all
        others is shown before and after, -1 for none. With a run: what its model says of content and mixture, at the
        views' size and in one piece, against the label. Raises ValueError for what does not exist.
        """
        first, second = (content, content_index), (style, style_index)
        done, top = self._swapped(first, second, part, space, low, high, weight, run)
        layer, (x, y, mixed), axes, names = done.layer, done.maps, done.axes, ("content", "style", "mixture")
        rows = [top]
        if layer:
            rows.append(_features((x, y, mixed), [f"features after {space}, {name}" for name in names]))
        rows += [_amplitudes(done.maps, axes, names, done.band), _phases(done.maps, axes, names, done.band)]
        words, legend = done.words + self._beside(done, first, style, run), {}
        if patch >= 0:
            similar, said = self._similar(done, first, patch, run)
            rows.insert(2 if layer else 1, similar)
            words += said
        if run:
            if layer:  # the mixture has no picture of its own
                mixture, after = done.here, self.segment(run, *first, refiner=self._replaced(done, run))
            else:
                mixture, after = mixed, self.segment(run, *first, mixed.clamp(0, 1))
            pictures = {" of the content": top[0].picture, " of the mixture": to_image(mixture)}
            compared = self._compared(run, *first, after, pictures)
            if layer:
                top += compared.rows.pop()
            rows, words, legend = rows + compared.rows, f"{words} {compared.words}", compared.legend
        side = self.backbone(run).patch_size if run or not self.missing else 0
        return Board([[_clickable(panel, side) for panel in row] for row in rows], 3, words, legend)

    def _swapped(
        self, first: Place, second: Place, part: str, space: str, low: float, high: float, weight: float, run: str
    ) -> tuple[Swapped, list[Panel]]:
        """A swap between two pictures, each a domain and an index, and the pictures that it has."""
        if not (0 <= weight <= 1 and 0 <= low <= high):
            got = f"{weight}, {low} to {high}"
            raise ValueError(f"Expected a weight from 0 to 1 and a band from low to high, got {got}.")
        self.renew(run)
        layer = self.layer_of(space, run)
        (here, there), (x, y), axes = self.pair(run, layer, first, second)
        change = partial(swap_spectrum, part=part, low=low, high=high, weight=weight)
        mixed = change(x, y, axes=axes)
        share = f"{100 * weight:.0f} % of the style's {part}"
        band = None if low <= 0 and high >= math.sqrt(2) else (low, high)
        shown = {"content": (here, *first), "style": (there, *second)}
        top = [Panel(to_image(z), f"{kind}: {short_name(name)} {index}") for kind, (z, name, index) in shown.items()]
        if not layer:
            top.append(Panel(to_image(mixed), f"mixture: {share}"))
        kept = "phase" if part == "amplitude" else "amplitude"
        where = f"at frequencies from {low:.3f} to {high:.3f}" if band else "at all frequencies"
        words = f"The mixture keeps the content's {kept} and takes {share} {where}."
        return Swapped(layer, here, (x, y, mixed), axes, band, change, words), top

    def _replaced(self, done: Swapped, run: str) -> Intervened:
        """A refiner that leaves the mixture behind the layer of the swap."""
        return Intervened(self.refiner(run), done.layer, lambda features, _: done.maps[2].to(features))

    def _both(self, done: Swapped, first: Place, run: str) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """The features of the content after every layer, before and after the swap."""
        before = self.maps(run, *first, tuple(done.here.shape[-2:]))
        if done.layer:
            return before, self.features(run, done.here, self._replaced(done, run))
        return before, self.features(run, done.maps[2].clamp(0, 1))

    def _similar(self, done: Swapped, first: Place, patch: int, run: str) -> tuple[list[Panel], str]:
        """How similar every patch is to one of them, before and after the swap; and in a sentence."""
        backbone, both, panels = self.backbone(run), (done.maps[0], done.maps[2]), []
        layer, side = done.layer or max(1, backbone.num_layers - 1), backbone.patch_size
        if not done.layer:
            both = [maps[layer] for maps in self._both(done, first, run)]
        found, (row, column) = similarities(both, patch), divmod(patch, both[0].shape[2])
        for values, when in zip(found, ("before", "after"), strict=True):
            picture = framed(plots.over_grey(to_image(done.here), values, 0, 1, side), row, column, side)
            panels.append(Panel(picture, f"similarity to patch {patch} {when}, layer {layer}"))
        alike = [int((values > ALIKE).sum()) for values in found]
        return panels, (
            f" After layer {layer}, {alike[0]} of {found[0].size} patches are more similar to patch {patch} than "
            f"{ALIKE} before the swap, {alike[1]} after it (dark: 0 or less; bright: 1, equal)."
        )

    def _beside(self, done: Swapped, first: Place, style: str, run: str) -> str:
        """How far the swap goes towards the same street in the style's style, beside its placebo and other streets."""
        if not self.has_styles(first[0], style):
            return ""
        goal = self.pair(run, done.layer, first, (style, first[1]))[1][1]
        x, y, mixed, goal = (z if done.layer else z.permute(0, 2, 3, 1) for z in (*done.maps, goal))
        own, other = (closed(z, x, goal).item() for z in (mixed, placebo(done.change, "random basis", x, y)))
        words = (
            f" Of the way to this street in {short_name(style)} it closes {_whole(own)} where it is made, and the same "
            f"swap in a random basis, which moves as far, {_whole(other)}."
        )
        part, low, high, weight = (done.change.keywords[name] for name in ("part", "low", "high", "weight"))
        if weight == 1 and not run and (found := premise.read(self.run)):
            for row in found.atlas:
                if (row["part"], row["layer"], *SPANS.get(row["band"], ())) == (part, done.layer, low, high):
                    words += f" Notebook 02 {_measured(row, found)}."
        return words

    @torch.no_grad()
    def lens(
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
        """What a linear head would say of the content after the layers from the swap on, before and after it.

        The arguments are those of `swap`. The head of each layer is a ridge regression on the features of the run's
        labelled source. Raises ValueError as `swap` does, and where the run has no source.
        """
        first = (content, content_index)
        done, top = self._swapped(first, (style, style_index), part, space, low, high, weight, run)
        both, classes, label = self._both(done, first, run), self.domain(content).class_set, self.label(*first)
        start, side = max(done.layer, 1), self.backbone(run).patch_size
        layers = [start + place for place in evenly(len(both[0]) - start + 1, LENSES)]
        lenses, (h, w), panels, places = self.lenses(run, layers), done.here.shape[-2:], [], set()
        for layer in layers:
            for features, when in zip(both, ("before", "after"), strict=True):
                scores = F.interpolate(lenses[layer](features[layer]), scale_factor=side, mode="bilinear")[0, :, :h, :w]
                seen = self.judge(scores, *first)
                score = "" if math.isnan(seen.miou) else f": mIoU {seen.miou:.1f} %"
                picture = plots.coloured(top[0].picture, seen.places, classes, 0.75)
                panels.append(Panel(picture, f"layer {layer}, {when}{score}"))
                places |= {*np.unique(seen.places).tolist()}
        if label is not None:
            top.append(Panel(plots.coloured(top[0].picture, label, classes, 0.75), "ground truth"))
            places |= {*np.unique(label).tolist()}
        words = (
            f"{done.words} Below: what a linear head, fitted to {short_name(self.experiment.data.source)}, reads from "
            f"the features after a layer, before and after the swap."
        )
        rows = [top, *(panels[place : place + 4] for place in range(0, len(panels), 4))]
        return Board(rows, 4, words, plots.class_colours(classes, sorted(places)))

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
        for row in found.atlas:
            if (row["part"], row["layer"], row["band"]) == (part, layer, band):
                where = f"after layer {layer}" if layer else "in the pixels"
                words += f" The {part} {where}, band '{band}': the study {_measured(row, found)}."
        return Board([[Panel(picture, is_wide=True, cells=cells)]], 1, words)

    def layers(
        self, first: str, second: str, first_index: int = 0, second_index: int = 0, space: str = "pixels", run: str = ""
    ) -> Board:
        """How far two pictures lie apart in amplitude and in phase, layer by layer, and where, after one of them.

        A rendered street in two styles is one number in two domains. space: "pixels" or "layer 9". run: features as
        its refiner leaves them, in place of the frozen ones.
        """
        self.renew(run)
        layer, crossed, added = self.layer_of(space, run), self.has_styles(first, second), ""
        table = self.distances(run, first, first_index, second, second_index)
        images, (x, y), axes = self.pair(run, layer, (first, first_index), (second, second_index))
        titles = [f"{short_name(first)} {first_index}", f"{short_name(second)} {second_index}"]
        top = [Panel(to_image(image), title) for image, title in zip(images, titles, strict=True)]
        if layer:
            top += _features((x, y), [f"features after {space}, {title}" for title in titles])
        if crossed:
            is_alone = first_index == second_index  # then the next street is the second layout
            layouts = first_index, (second_index + 1) % len(self.domain(second)) if is_alone else second_index
            shares = self.shares(run, (first, second), layouts)
            chart = plots.share_lines(shares, chosen=space)
            second_one = f"{layouts[1]}{', the next one,' if is_alone else ''}"
            added = f" Streets {layouts[0]} and {second_one} in both styles, {space}: {_explained(shares, space)}"
            about = "what style and content explain, by layer (what is left is their interaction)"
        else:
            chart = plots.distances(table, chosen=space)
            about = "distance by layer (0: equal; amplitude 0.69: a factor of two; phase 1: unrelated)"
        moves = {part: _moved(x, y, part, axes) for part in PARTS}
        high, patch = max(float(move.max()) for move in moves.values()), self.backbone(run).patch_size if layer else 1
        bottom = [
            Panel(plots.over_grey(top[0].picture, move, 0, high, patch), f"where the other's {part} changes {space}")
            for part, move in moves.items()
        ]
        bottom += _amplitudes((x, y), axes, [f"{title}, {space}" for title in titles])
        row = next(row for row in table if row["layer"] == space)
        what = "patch" if layer else "pixel"
        words = (
            f"{f'After {space}' if layer else 'In the pixels'} the two lie {row['amplitude']:.2f} apart in amplitude "
            f"and {row['phase']:.2f} in phase. Taking the other's amplitude changes a {what}, on average, by "
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
        pictures = {", all tokens": scene, ", without the token": scene}
        compared = self._compared(run, domain, index, after, pictures)
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

        def silence(_: object, __: object, values: Tensor) -> Tensor:
            """Values of the tokens 1 to M - 1 with one at zero; token 0 has none."""
            return values * (torch.arange(1, len(values) + 1, device=values.device) != token)[:, None]

        def without(features: Tensor, at: int) -> Tensor:
            """The refiner's answer without the token."""
            own = refiner(features, at)
            hook = refiner.branches()[branch].token_map.register_forward_hook(silence)
            try:
                silent = refiner(features, at)
            finally:
                hook.remove()
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

    def _compared(self, run: str, domain: str, index: int, after: Segmented, pictures: dict[str, np.ndarray]) -> Board:
        """What is seen of a picture as it is and after a change, beside its label; below, where the two differ.

        pictures: the two, by their titles.
        """
        classes, label = self.domain(domain).class_set, self.label(domain, index)
        before, scene = self.segmented(run, domain, index), next(iter(pictures.values()))
        maps, panels = [before.places, after.places], []
        if label is not None:
            maps.append(label)
            panels.append(Panel(plots.coloured(scene, label, classes, 0.75), "ground truth"))
        for one, (title, picture) in zip((before, after), pictures.items(), strict=True):
            score = "" if math.isnan(one.miou) else f": mIoU {one.miou:.1f} %"
            panels.append(Panel(plots.coloured(picture, one.places, classes, 0.75), f"segmentation{title}{score}"))
        flipped = before.places != after.places
        share = _percent(flipped.mean())
        flips = Panel(plots.marked(scene, flipped), f"pixels that flipped (orange): {share}")
        if label is None:
            said = "This domain has no labels, so there is no mIoU."
        elif math.isnan(before.miou):
            said = "No pixel of this picture has a label, so there is no mIoU."
        else:
            said = f"mIoU of this picture, at the size shown: {before.miou:.1f} % before, {after.miou:.1f} % after."
        legend = plots.class_colours(classes, np.unique(np.stack(maps)))
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


def _measured(row: Mapping, found: Findings) -> str:
    """A row of the atlas in words."""
    return (
        f"found, over {row['streets']} streets and read out after layer {found.about['readout']}, "
        f"{_whole(row['closed'])} [{_whole(row['closed low'])}, {_whole(row['closed high'])}] of the way closed, "
        f"{_whole(row['placebo'])} by the placebo, and the content kept in {_whole(row['content kept'])}"
    )


def _features(maps: Sequence[Tensor], titles: Sequence[str]) -> list[Panel]:
    """Feature maps (1, H, W, C) in common colours, those of the first two."""
    pictures = feature_pictures(maps, 2)
    return [Panel(np.uint8(255 * picture), title) for picture, title in zip(pictures, titles, strict=True)]


def _amplitudes(
    maps: Sequence[Tensor], axes: tuple[int, int], names: Sequence[str], band: tuple[float, float] | None = None
) -> list[Panel]:
    """Log amplitudes, mean over the channels, on one scale; those of pixels are of values from 0 to 255."""
    scale = 255 if axes == spectral.PIXELS else 1
    values = [log_amplitude_picture(scale * one, axes)[0].numpy() for one in maps]
    return plots.spectrum_row(values, [f"log amplitude, {name}" for name in names], band=band)


def _phases(
    maps: Sequence[Tensor], axes: tuple[int, int], names: Sequence[str], band: tuple[float, float] | None
) -> list[Panel]:
    """Phases of the channel in which the first map varies most: a mean over channels would have a phase of its own."""
    channel = int(maps[0].var(axes).argmax())
    called = ("red", "green", "blue")[channel] if axes == spectral.PIXELS else f"channel {channel}"
    chosen = [one.select(spectral.CHANNEL_AXIS[axes], channel) for one in maps]
    values = [phase_picture(one - one.mean())[0].numpy() for one in chosen]
    return plots.spectrum_row(values, [f"phase ({called}), {name}" for name in names], is_phase=True, band=band)


def _moved(x: Tensor, y: Tensor, part: str, axes: tuple[int, int]) -> np.ndarray:
    """How far each place of x moves when it takes y's amplitude or phase, in units of the mean length of x."""
    channels = spectral.CHANNEL_AXIS[axes]
    moved = (swap_spectrum(x, y, part, axes=axes) - x).norm(dim=channels)[0]
    return (moved / x.norm(dim=channels).mean().clamp(min=1e-12)).numpy()


def _whole(share: float) -> str:
    return f"{round(100 * share)} %"


def _percent(share: float) -> str:
    """Small shares with one digit that says something."""
    return f"{100 * share:.1f} %" if share == 0 or share >= 5e-4 else f"{100 * share:.1g} %"
