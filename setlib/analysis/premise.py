"""The premise, measured: how far amplitude is style and phase content, in the pixels and after every layer.

One pass over rendered streets that exist in several styles: shares of a crossed design (`factorial.py`), a yardstick
for parts of several transforms beside placebos, and an atlas of what the rest of the network makes of a transplant
(`transplant.py`). Rows are kept in the run folder, layer by layer, so that a killed study goes on and a second one is
at once there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from setlib.analysis import factorial, transplant
from setlib.analysis.factorial import interval, resampled
from setlib.analysis.probe import Lens, at_patches, fit_lenses
from setlib.analysis.survey import styled_scenes
from setlib.analysis.transplant import distance
from setlib.backbone import FrozenBackbone
from setlib.data import domains
from setlib.data.labels import CITYSCAPES
from setlib.features import FrozenFeatures
from setlib.files import LOCK, VERSION, alone, load_json
from setlib.metric import iou_per_class, mean_iou, pixel_counts
from setlib.run import Run
from setlib.scenes import STYLES
from setlib.weights.load import load_backbone

DONORS = ("another street", "the same street")
CONTROL = "control"  # the backbone's twin with random weights
BATCH = 8  # pictures that run at once


class Findings(NamedTuple):
    """What was measured: tidy rows of `factorial.share_rows`, `yardstick` and `atlas`, each with its layer.

    layer: 0 for the pixels. about: backbone, layouts, styles, the layer that is read out, and what is believed there
    of A and of A* as they are ("A ...", "A* ...", as in `Beliefs`).
    """

    shares: list[dict]
    yardstick: list[dict]
    atlas: list[dict]
    about: dict


class Streets:
    """Rendered streets in every style, after one layer at a time, so that only one layer's features are held.

    Cell l * S + s is layout l in style s. A, the content, is a layout in the first style; each has one other style in
    turn, in which A* is the same layout, and B, the donor, the next one.
    """

    def __init__(self, backbone: FrozenBackbone, pictures: dict[str, Tensor]) -> None:
        self.backbone, self.styles = backbone, tuple(pictures)
        self.images = torch.stack(list(pictures.values()), 1).flatten(0, 1)  # (n S, 3, h, w)
        self.layouts, count = len(self.images) // len(pictures), len(pictures)
        layout = np.arange(self.layouts)
        self.style, self.donor = 1 + layout % (count - 1), (layout + 1) % self.layouts  # of A* and B; layout of B
        self.a, self.goal, self.b = layout * count, layout * count + self.style, self.donor * count + self.style
        self._frozen: list[FrozenFeatures | None] = [None] * -(-len(self.images) // BATCH)

    def after(self, layer: int) -> Tensor:
        """Features (n S, H, W, C) after a layer, not before the one asked for last; the pixels after 0."""
        if not layer:
            return self.images.permute(0, 2, 3, 1)
        for i, images in enumerate(self.images.split(BATCH)):
            self._frozen[i] = self.backbone.frozen_features(images, layer, frozen=self._frozen[i])
        parts = zip(self.images.split(BATCH), self._frozen, strict=True)
        return torch.cat([self.backbone(images, layers=(layer,), frozen=own)[layer] for images, own in parts])

    def go_on(self, features: Tensor, layer: int, readout: int) -> Tensor:
        """What the rest of the network makes of A's features (n, H, W, C) after a layer: those after `readout`.

        Class and register tokens are A's; pixels are cut to [0, 1].
        """
        if not layer:
            parts = features.permute(0, 3, 1, 2).clamp(0, 1).split(BATCH)
            return torch.cat([self.backbone(part, layers=(readout,))[readout] for part in parts])
        hidden = torch.stack([self._frozen[cell // BATCH].hidden[cell % BATCH] for cell in self.a])
        patches = features.flatten(1, 2)
        hidden = torch.cat([hidden[:, : hidden.shape[1] - patches.shape[1]], patches], 1)
        parts = zip(self.images[self.a].split(BATCH), hidden.split(BATCH), strict=True)
        run = partial(self.backbone, layers=(readout,))
        return torch.cat([run(images, frozen=FrozenFeatures(own, {}, layer))[readout] for images, own in parts])


class Beliefs:
    """What the features after one layer, the readout, say of a transplant: how far it went, its style, its content.

    features: of all cells at the readout; lens: fitted there; labels: (n, H, W) train ids at the patches.
    """

    def __init__(self, streets: Streets, layer: int, features: Tensor, lens: Lens, labels: Tensor) -> None:
        self.streets, self.layer, self.features, self.lens, self.labels = streets, layer, features, lens, labels
        self.start, self.goal, self.donor = (features[i] for i in (streets.a, streets.goal, streets.b))
        moments = self._moments(features)
        self.scale = moments.std(0).clamp(min=1e-6)
        self.moments = moments.unflatten(0, (streets.layouts, -1))  # (n, S, 2 C)
        flat = features.flatten(1)
        self.products = (flat @ flat.T).unflatten(0, (streets.layouts, -1)).unflatten(2, (streets.layouts, -1))

    def __call__(self, x: Tensor) -> dict[str, np.ndarray]:
        """Of features (n, H, W, C) in A's place, one value a street.

        closed: of the way from A to A*; to A, to B: distances in units of that way; style of B: whether the nearest
        style (by mean and deviation of every channel, over the other layouts) is B's; content kept: whether the nearest
        layout (its mean over the styles that are neither A's nor B's) is A's; counts: (n, K, K) pixels of A's labels by
        what the lens says.
        """
        way = distance(self.start, self.goal)
        said = self.lens(x).argmax(1).byte().numpy()
        counts = [
            pixel_counts(one, label, len(CITYSCAPES)) for one, label in zip(said, self.labels.numpy(), strict=True)
        ]
        found = {"closed": transplant.closed(x, self.start, self.goal), "to A": distance(x, self.start) / way}
        found |= {"to B": distance(x, self.donor) / way, "style of B": self._style(x), "content kept": self._content(x)}
        return {name: value.double().numpy() for name, value in found.items()} | {"counts": np.stack(counts)}

    @staticmethod
    def _moments(x: Tensor) -> Tensor:
        """Mean and standard deviation of every channel over the positions, (B, 2 C)."""
        return torch.cat([x.mean((1, 2)), x.std((1, 2))], 1)

    def _style(self, x: Tensor) -> Tensor:
        own, streets, found = self._moments(x), self.streets, []
        for i in range(streets.layouts):
            others = [m for m in range(streets.layouts) if m not in (i, streets.donor[i])]
            away = ((self.moments[others].mean(0) - own[i]) / self.scale).norm(dim=1)
            found.append(int(away.argmin()) == streets.style[i])
        return torch.tensor(found)

    def _content(self, x: Tensor) -> Tensor:
        products = (x.flatten(1) @ self.features.flatten(1).T).unflatten(1, (self.streets.layouts, -1))  # (n, n, S)
        found = []
        for i in range(self.streets.layouts):
            others = [s for s in range(len(self.streets.styles)) if s not in (0, self.streets.style[i])]
            lengths = self.products[:, others][:, :, :, others].mean((1, 3)).diagonal()
            found.append(int((lengths - 2 * products[i][:, others].mean(1)).argmin()) == i)
        return torch.tensor(found)


def yardstick(features: Tensor, streets: Streets, count: Callable[[], Any] = lambda: None) -> list[dict]:
    """How much of the way from A to A* each part closes at the place of the swap, beside its placebos.

    features: of all cells, (n S, H, W, C). Rows with donor (B, or A* itself: the same street), part, closed and its
    ends (1 = all of the way), the mean of each placebo by its name, and gain and its ends: what the part closes beyond
    the best of its placebos; 95 % intervals over the streets.
    """
    a, goal, rows = features[streets.a], features[streets.goal], []
    for donor, y in zip(DONORS, (features[streets.b], goal), strict=True):
        for name, part in transplant.PARTS.items():
            moved, others = part(a, y), {}
            own, reach = transplant.closed(moved, a, goal).numpy(), distance(moved, a)
            for placebo in transplant.PLACEBOS:
                found = transplant.closed(transplant.placebo(part, placebo, a, y, reach), a, goal).numpy()
                if not np.allclose(found, own, atol=1e-3):  # a mean does not know the order: it is the part itself
                    others[placebo] = found
            best = max(others, key=lambda placebo: others[placebo].mean())
            row = {"donor": donor, "part": name} | _summary("closed", own) | _summary("gain", own - others[best])
            rows.append(row | {"best placebo": best} | {placebo: v.mean() for placebo, v in others.items()})
            count()
    return rows


def atlas(
    features: Tensor, streets: Streets, layer: int, beliefs: Beliefs, count: Callable[[], Any] = lambda: None
) -> list[dict]:
    """What the rest of the network believes when A's amplitude or phase, whole or in a band, is B's after a layer.

    features: of all cells after it, (n S, H, W, C). Rows with part, band, streets, and each of `Beliefs` as its mean
    over the streets ("closed", "placebo closed", ...; miou for the counts, percent), with 95 % intervals for closed and
    for gain, what the swap closes beyond the same swap in a random basis, the placebo.
    """
    a, b, rows = features[streets.a], features[streets.b], []
    for part in factorial.PARTS:
        for band, (low, high) in transplant.SPANS.items():
            swap = partial(transplant.swap_spectrum, part=part, low=low, high=high)
            moved = swap(a, b)
            both = moved, transplant.placebo(swap, "random basis", a, b, distance(moved, a))
            own, other = (beliefs(streets.go_on(x, layer, beliefs.layer)) for x in both)
            row = {"part": part, "band": band, "streets": len(a)} | _means(own)
            row |= _summary("closed", own["closed"]) | _summary("placebo", other["closed"])
            row |= _summary("gain", own["closed"] - other["closed"])
            rows.append(row | {f"placebo {name}": value for name, value in _means(other).items()})
            count()
    return rows


def _means(found: dict[str, np.ndarray]) -> dict[str, float]:
    """Means over the streets; mIoU (percent) of all of them together in place of the counts."""
    means = {name: float(value.mean()) for name, value in found.items() if name != "counts"}
    return means | {"miou": mean_iou(iou_per_class(found["counts"].sum(0)))}


def _summary(name: str, values: np.ndarray) -> dict[str, float]:
    """A mean over the streets with its 95 % interval: name, name low, name high."""
    weights = resampled(len(values))
    low, high = interval(weights @ values / weights.sum(1), len(values))
    return {name: float(values.mean()), f"{name} low": float(low), f"{name} high": float(high)}


@torch.no_grad()
def measure(
    run: Run, layouts: int = 6, places: int = 3, is_control: bool = False, styles: Sequence[str] = STYLES
) -> Findings:
    """The whole study on `layouts` rendered streets, in RUN/premise; what is there already is not measured again.

    A study of more streets or places that is there, finished or not, is taken in its place.

    Shares are measured in the pixels and after every layer, swaps in `places` places evenly from the pixels to the
    readout, the layer at three quarters of the depth. is_control: a backbone of the same shape with random weights in
    the place of the run's, kept in RUN/premise-control. Raises ValueError for fewer than 3 layouts or styles, or no
    place.
    """
    if min(layouts, len(styles)) < 3 or places < 1:
        got = f"{layouts} layouts, {len(styles)} styles, {places} places"
        raise ValueError(f"The premise needs at least 3 layouts, 3 styles and 1 place of a swap, got {got}.")
    config, data = run.experiment.model, run.experiment.data
    backbone = load_backbone(config.backbone, patch_size=config.patch_size)
    if is_control:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(run.experiment.seed + 1)
            backbone = FrozenBackbone(type(backbone.model)(backbone.model.config), CONTROL)
    readout, folder = max(1, 3 * backbone.num_layers // 4), f"premise{'-control' * is_control}"
    swapped = sorted({round(place) for place in np.linspace(0, readout, places)})
    asked = {"setlib": VERSION, "backbone": backbone.fingerprint, "size": [data.height, data.width], "swapped": swapped}
    asked |= {"layouts": layouts, "styles": list(styles), "content_seed": data.content_seed}
    asked |= {"spans": {name: list(span) for name, span in transplant.SPANS.items()}, "bands": list(factorial.EDGES)}
    kept = read(run, folder)
    if kept is None or not _covers(kept.about["asked"], asked):
        kept = Findings([], [], [], {"asked": asked, "done": [], "readout": readout, "backbone": config.backbone})
    asked, swapped = kept.about["asked"], kept.about["asked"]["swapped"]
    left = [layer for layer in range(backbone.num_layers + 1) if layer not in kept.about["done"]]
    if not left:
        return kept
    streets = Streets(backbone, styled_scenes(data, asked["layouts"], styles))
    works = len(left) + 2 * len({*left} & {*swapped}) * (len(transplant.PARTS) + len(transplant.SPANS))
    with alone(run.path / f".{folder}{LOCK}"), tqdm(total=works, desc="premise", unit="measurement") as bar:
        beliefs = _beliefs(run, streets, readout)
        for name, index in {"A": streets.a, "A*": streets.goal}.items():
            kept.about[name] = _means(beliefs(beliefs.features[index]))
        for layer in left:
            bar.set_postfix(layer=layer or "pixels")
            features = streets.after(layer)
            found = [factorial.share_rows(features, streets.layouts), [], []]
            bar.update()
            if layer in swapped:
                found[1] = yardstick(features, streets, bar.update)
                found[2] = atlas(features, streets, layer, beliefs, bar.update)
            for rows, new in zip(kept[:3], found, strict=True):
                rows += [{"layer": layer} | row for row in new]
            kept.about["done"].append(layer)
            for name, content in kept._asdict().items():  # the last, about, says what is done
                run.write_json(f"{folder}/{name}.json", content)
    return read(run, folder)


def _covers(kept: dict, asked: dict) -> bool:
    """Whether a study answers a question: of the same streets, but maybe of more of them and in more places."""
    more = {"layouts": kept["layouts"], "swapped": kept["swapped"]}
    is_larger = kept["layouts"] >= asked["layouts"] and {*asked["swapped"]} <= {*kept["swapped"]}
    return is_larger and kept == asked | more


def _beliefs(run: Run, streets: Streets, readout: int) -> Beliefs:
    """Features of all cells at the readout, and a lens fitted there to pictures of the source that no cell holds."""
    data, backbone = run.experiment.data, streets.backbone
    first = replace(data, eval_images=streets.layouts)
    same = domains.load(f"scenes:{streets.styles[0]}", first)
    other = domains.load(f"scenes:{streets.styles[0]}", data, role="source")
    labels = [at_patches(same.ids.to_train[same.sample(i).label], backbone.patch_size) for i in range(streets.layouts)]
    features = torch.cat([backbone(part, layers=(readout,))[readout] for part in streets.images.split(BATCH)])
    return Beliefs(streets, readout, features, fit_lenses(backbone, other, (readout,))[readout], torch.stack(labels))


def read(run: Run, folder: str = "premise") -> Findings | None:
    """What is kept in a run folder; None if nothing is, or not all of it."""
    path = run.path / folder
    if not all((path / f"{name}.json").is_file() for name in Findings._fields):
        return None
    *tables, about = (load_json(path / f"{name}.json") for name in Findings._fields)
    return Findings(*([row for row in rows if row["layer"] in about["done"]] for rows in tables), about)
