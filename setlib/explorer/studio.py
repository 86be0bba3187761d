"""The four views of the explorer as pure functions: equal arguments give equal boards, in a script or behind a slider.

swap: one part of a picture's spectrum towards another's; layers: how far two pictures lie apart, layer by layer;
tokens: where a token attends and what it changes; browse: a domain with its labels. Widgets are in `widgets.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from setlib import plots, spectral
from setlib.analysis.spectra import PARTS, feature_pictures, log_amplitude_picture, phase_picture
from setlib.analysis.tokens import Attention, Intervened
from setlib.data.augment import to_image
from setlib.data.domains import short_name
from setlib.data.labels import IGNORE, ClassSet
from setlib.explorer.material import Material, Segmented, find_folder
from setlib.plots import Board, Panel
from setlib.run import Run

HIGHEST = 1.5  # of a band; the corner of the spectrum lies at sqrt(2)
ALL = "all classes"


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
            got = f"{weight}, {low} to {high}"
            raise ValueError(f"Expected a weight from 0 to 1 and a band from low to high, got {got}.")
        self.renew(run)
        layer = self.layer_of(space, run)
        (here, there), (x, y), axes = self.pair(run, layer, (content, content_index), (style, style_index))
        mixed = swap(x, y, part, low, high, weight, axes)
        share = f"{100 * weight:.0f} % of the style's {part}"
        band = None if low <= 0 and high >= math.sqrt(2) else (low, high)
        top = [
            Panel(to_image(here), f"content: {short_name(content)} {content_index}"),
            Panel(to_image(there), f"style: {short_name(style)} {style_index}"),
        ]
        rows, names = [top], ("content", "style", "mixture")
        if layer:
            rows.append(_features((x, y, mixed), [f"features after {space}, {name}" for name in names]))
        else:
            top.append(Panel(to_image(mixed), f"mixture: {share}"))
        rows += [_amplitudes((x, y, mixed), axes, names, band), _phases((x, y, mixed), axes, names, band)]
        kept = "phase" if part == "amplitude" else "amplitude"
        where = f"at frequencies from {low:.2f} to {high:.2f}" if band else "at all frequencies"
        words = f"The mixture keeps the content's {kept} and takes {share} {where}."
        if not run:
            return Board(rows, 3, words)
        if layer:  # the mixture has no picture of its own
            refiner = Intervened(self.model(run).refiner, layer, lambda features, _: mixed.to(features))
            mixture, after = here, self.segment(run, content, content_index, refiner=refiner)
        else:
            mixture, after = mixed, self.segment(run, content, content_index, mixed.clamp(0, 1))
        pictures = {" of the content": top[0].picture, " of the mixture": to_image(mixture)}
        compared = self._compared(run, content, content_index, after, pictures)
        if layer:
            top += compared.rows.pop()
        return Board(rows + compared.rows, 3, f"{words} {compared.words}", compared.legend)

    def layers(
        self, first: str, second: str, first_index: int = 0, second_index: int = 0, space: str = "pixels", run: str = ""
    ) -> Board:
        """How far two pictures lie apart in amplitude and in phase, layer by layer, and where, after one of them.

        A rendered street in two styles is one number in two domains. space: "pixels" or "layer 9". run: features as
        its refiner leaves them, in place of the frozen ones.
        """
        self.renew(run)
        layer = self.layer_of(space, run)
        table = self.distances(run, first, first_index, second, second_index)
        images, (x, y), axes = self.pair(run, layer, (first, first_index), (second, second_index))
        titles = [f"{short_name(first)} {first_index}", f"{short_name(second)} {second_index}"]
        top = [Panel(to_image(image), title) for image, title in zip(images, titles, strict=True)]
        if layer:
            top += _features((x, y), [f"features after {space}, {title}" for title in titles])
        chart = plots.distances(table, chosen=space).figure.pixels()
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
        return Board([top, [Panel(chart, about, is_wide=True)], bottom], 4, words)

    def places(self, run: str, domain: str, index: int) -> dict[int, dict[str, Attention]]:
        """The layers with tokens that attend, and what those of each branch attend to."""
        self.renew(run)
        found: dict[int, dict[str, Attention]] = {}
        for one in self.reading(run, domain, index).attention:
            found.setdefault(one.layer, {})[one.branch] = one
        return found

    def ranking(self, run: str, domain: str, index: int, layer: int, branch: str) -> list[tuple[int, float]]:
        """The tokens of a branch after a layer with their influence, the strongest first; token 0 adds nothing."""
        known = self.places(run, domain, index)
        if branch not in known.get(layer, {}):
            there = "; ".join(f"layer {n}: {', '.join(branches)}" for n, branches in known.items())
            raise ValueError(f"There are no tokens{branch and f' of {branch}'} after layer {layer}: {there}.")
        influence = known[layer][branch].influence
        return [(int(m), float(influence[m])) for m in np.argsort(-influence[1:], kind="stable") + 1]

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
            place = _place(classes, only)
            label, title = np.where(label == place, label, np.uint8(IGNORE)), f"label: {only}"
            words += f" {only}: {percent[place]:.1f} % of the labelled pixels."
        return Board([[panel, Panel(plots.coloured(image, label, classes, opacity), title)]], 2, words, legend)

    def find(self, domain: str, index: int, step: int = 1, only: str = ALL) -> int:
        """The next picture (step 1) or the one before (step -1) that holds a class, round the end if need be.

        Raises ValueError if no picture of the domain holds it.
        """
        count, classes = len(self.domain(domain)), self.domain(domain).class_set
        if only == ALL:
            return (index + step) % count
        place, damaged = _place(classes, only), 0
        for away in range(1, count + 1):
            found = (index + step * away) % count
            try:
                label = self.label(domain, found)
            except ValueError:
                damaged += 1
                continue
            if label is not None and (label == place).any():
                return found
        unread = f" ({damaged} cannot be read)" if damaged else ""
        raise ValueError(f"No picture of {domain} holds the class {only}{unread}: choose another, or '{ALL}'.")

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


def swap(content: Tensor, style: Tensor, part: str, low: float, high: float, weight: float, axes: tuple) -> Tensor:
    """Content with one part of its spectrum moved towards the style's, by `weight` within the band low ... high.

    content, style: 4-D of one shape; part: "amplitude" or "phase". Raises ValueError for another part.
    """
    if part not in PARTS:
        raise ValueError(f"Unknown part '{part}': expected one of {', '.join(PARTS)}.")
    mix = spectral.mix_amplitude if part == "amplitude" else spectral.mix_phase
    return mix(content, style, weight, low, high, axes)


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
    moved = (swap(x, y, part, 0.0, HIGHEST, 1.0, axes) - x).norm(dim=channels)[0]
    return (moved / x.norm(dim=channels).mean().clamp(min=1e-12)).numpy()


def _place(classes: ClassSet, name: str) -> int:
    if name not in classes.classes:
        raise ValueError(f"Unknown class '{name}': expected one of {', '.join(classes.classes)}.")
    return classes.classes.index(name)


def _percent(share: float) -> str:
    """Small shares with one digit that says something."""
    return f"{100 * share:.1f} %" if share == 0 or share >= 5e-4 else f"{100 * share:.1g} %"
