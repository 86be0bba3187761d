"""What the explorer's views (`studio.py`) work on, kept in memory: a run's domains, backbone and models; uploads."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from hashlib import sha256
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from setlib.analysis import factorial, premise
from setlib.analysis.premise import Findings
from setlib.analysis.probe import Lens, fit_lenses
from setlib.analysis.spectra import PARTS, compare
from setlib.analysis.tokens import Attention, Intervened, Reading, read_tokens
from setlib.backbone import FrozenBackbone
from setlib.checkpoint import FILES, is_finished, load_segmenter
from setlib.data import domains
from setlib.data.augment import fit, resize, to_tensor
from setlib.data.decode import read_picture
from setlib.data.labels import IGNORE, ClassSet
from setlib.distributed import default_device
from setlib.files import PROJECT, shown, write_atomic
from setlib.metric import iou_per_class, mean_iou, pixel_counts
from setlib.refiners import build_refiner
from setlib.run import Run
from setlib.tokens import Refiner
from setlib.weights.load import load_backbone

LONG_EDGE, KEPT_EDGE = 448, 1024  # pixels, at most: of a picture in the views, and of an uploaded file
MOST_PIXELS, NARROWEST = 60_000_000, 16  # of a picture: decoded whole it needs 10 bytes a pixel; long by short side
ALL = "all classes"  # no class alone
FITTED = 24  # pictures of the source that a lens is fitted to
UNNAMED = ("scenes:game", "scenes:night")  # where a run names no domains
GREYS = {"1", "L", "I", "F", "A"}  # the bands of pictures without colour
Place = tuple[str, int]  # of a picture: a domain and its number


class Segmented(NamedTuple):
    """What a model says: places in a class set, (h, w), and their mIoU against the label in percent, NaN without."""

    places: np.ndarray
    miou: float


class Material:
    """The domains, the backbone and the trained models of a run, by name.

    `run` is the folder of a trained run, "" for none: features are then the frozen backbone's.
    """

    def __init__(self, run: Run, more: Sequence[str] = ()) -> None:
        self.run, self.experiment = run, run.experiment
        data, config = run.experiment.data, run.experiment.model
        self.long_edge = min(data.long_edge, LONG_EDGE)
        named = [name for name in (data.source, *data.targets, *more) if name]
        self.names = list(dict.fromkeys(named)) or list(UNNAMED)
        self.choices = {name: name for name in self.names}  # of every view: as shown -> name
        self._written: dict[str, int] = {}  # when a run's model was
        self._lenses: dict[str, dict[int, Lens]] = {}  # by run and layer
        # the answers that were asked for last are kept, so many of each
        self.domain = lru_cache(64)(lambda name: domains.load(name, data, role="target"))  # one number, one street
        self.sample = lru_cache(4)(self._sample)
        self.image = lru_cache(64)(self._image)
        self.frozen = lru_cache(1)(lambda: load_backbone(config.backbone, patch_size=config.patch_size))
        self.model = lru_cache(3)(lambda run: load_segmenter(find_folder(run)))
        self.maps = lru_cache(6)(lambda run, name, index, size: self.features(run, self.image(name, index, size)))
        self.distances = lru_cache(16)(self._distances)
        self.shares = lru_cache(16)(self._shares)
        self.segmented = lru_cache(16)(self.segment)  # of pictures as they are
        self.reading = lru_cache(4)(self._reading)

    # Domains

    def _sample(self, name: str, index: int) -> domains.Sample:
        """Picture `index` of a domain as it is. Raises ValueError if there is none."""
        domain = self.domain(name)
        if not isinstance(index, int) or not 0 <= index < len(domain):
            raise ValueError(f"{name} has the pictures 0 to {len(domain) - 1}, not {index}.")
        return domain.sample(index)

    def _image(self, name: str, index: int, size: tuple[int, int] | None = None) -> Tensor:
        """Picture `index` of a domain, (1, 3, h, w) in [0, 1], at the views' size, or its middle at `size`."""
        image = to_tensor(self.sample(name, index).image)
        h, w = image.shape[-2:]
        if max(h, w) > NARROWEST * min(h, w):
            raise ValueError(f"Picture {index} of {name} is {w} x {h}: it is too narrow to be compared.")
        if size is None:
            return resize(image, fit(image, self.long_edge))
        factor = max(size[0] / h, size[1] / w)  # at which it covers the size
        image = resize(image, (max(size[0], round(h * factor)), max(size[1], round(w * factor))))
        top, left = (image.shape[-2] - size[0]) // 2, (image.shape[-1] - size[1]) // 2
        return image[..., top : top + size[0], left : left + size[1]]

    def label(self, name: str, index: int) -> np.ndarray | None:
        """The label of a picture at the views' size, places in the domain's class set; None without labels."""
        label = self.domain(name).to_score(self.sample(name, index).label)
        if label is None:
            return None
        values, size = torch.from_numpy(label)[None, None].float(), self.image(name, index).shape[-2:]
        return F.interpolate(values, size=size, mode="nearest-exact")[0, 0].byte().numpy()

    def add_domain(self, name: str, label: str = "") -> None:
        """Adds a domain to the choices of every view. Raises ValueError if it cannot be used."""
        self.domain(name)
        if name not in self.choices.values():
            labels = chain([label or name], (f"{label or name} ({number})" for number in count(2)))
            self.choices[next(free for free in labels if free not in self.choices)] = name

    def add_upload(self, content: bytes, name: str) -> tuple[str, str]:
        """Keeps an uploaded picture in the run folder; returns the domain that it is and what was done to it.

        Raises ValueError if it is no picture, or is too large or too narrow.
        """
        try:
            with Image.open(io.BytesIO(content)) as opened:
                width, height = opened.size
                has_many = width * height > MOST_PIXELS
                is_usable = min(width, height) >= 8 and max(width, height) <= NARROWEST * min(width, height)
                frames, bands = getattr(opened, "n_frames", 1), set(opened.getbands())
                is_clear = "A" in bands or "transparency" in opened.info
                pixels = None if has_many else read_picture(opened, KEPT_EDGE)
        except Exception:  # a damaged file may raise anything
            raise ValueError(f"'{name}' is no picture that can be read: choose a PNG, JPEG, WebP or TIFF.") from None
        if has_many or not is_usable:
            raise ValueError(
                f"'{name}' is {width} x {height} pixels: choose a picture of at most {MOST_PIXELS / 1e6:.0f} million "
                f"pixels, both sides at least 8 and neither more than {NARROWEST} times the other."
            )
        picture, kept = Image.fromarray(pixels), io.BytesIO()
        picture.thumbnail((KEPT_EDGE, KEPT_EDGE), reducing_gap=2.0)
        picture.save(kept, "PNG")
        stem = "".join(c if c.isalnum() or c in "-_ " else "-" for c in Path(name).stem)[:40].strip() or "picture"
        folder = f"uploads/{stem}-{sha256(kept.getvalue()).hexdigest()[:8]}"
        self.keep(f"{folder}/images/{stem}.png", kept.getvalue())
        domain = f"folder@{(self.run.path / folder).absolute()}"
        self.add_domain(domain, f"uploaded: {name}")
        done = {
            f"kept at {picture.width} x {picture.height}": max(pixels.shape) > KEPT_EDGE,
            f"the first of its {frames} frames": frames > 1,
            "grey": bands <= GREYS,
            "transparent parts are white": is_clear,
        }
        return domain, ", ".join(note for note, is_true in done.items() if is_true)

    def keep(self, name: str, content: str | bytes) -> Path:
        """Writes a file into the run folder. Raises ValueError if that is gone."""
        if not self.run.path.is_dir():
            raise ValueError(f"The run folder {self.run.path} is gone: open the explorer anew.")
        return write_atomic(self.run.path / name, content)

    # Models

    @cached_property
    def missing(self) -> str:
        """Why there is no frozen backbone; "" where it is."""
        try:
            self.frozen()
        except (ValueError, OSError) as problem:
            return str(problem)
        return ""

    def backbone(self, run: str = "") -> FrozenBackbone:
        """That of a run's model, or the frozen one."""
        return self.model(run).backbone if run else self.frozen()

    def renew(self, run: str) -> None:
        """Lets go of what was computed with a run's model if it has been trained anew."""
        files = [find_folder(run) / name for name in (f"model/{FILES[-1]}", FILES[-1])]
        written = max((file.stat().st_mtime_ns for file in files if run and file.is_file()), default=0)
        if self._written.setdefault(run, written) != written:
            self._written[run] = written
            self._lenses.pop(run, None)
            for kept in (self.model, self.maps, self.distances, self.shares, self.segmented, self.reading):
                kept.cache_clear()

    def runs(self) -> list[str]:
        """The trained runs in this run's folder and beside it, its own first."""
        paths = [self.run.path, *sorted(self.run.path.glob("*/")), *sorted(self.run.path.parent.glob("*/"))]
        return [shown(path, PROJECT) for path in dict.fromkeys(paths) if is_finished(path)]

    def own(self) -> str:
        """This run itself, if it is trained and has tokens that attend; else ""."""
        refiner = build_refiner(self.experiment.model.refiner, (1,), 1, 2, 1)
        return shown(self.run.path, PROJECT) if refiner.branches() and is_finished(self.run.path) else ""

    def spaces(self, run: str = "") -> list[str]:
        """What can be compared: "pixels", and every layer as "layer 9" where there is a backbone."""
        if not run and self.missing:
            return ["pixels"]
        return ["pixels", *(f"layer {n}" for n in range(1, self.backbone(run).num_layers + 1))]

    def layer_of(self, space: str, run: str) -> int:
        """The number of a layer; 0 for the pixels."""
        if space == "pixels":
            return 0
        last = self.backbone(run).num_layers
        if space not in self.spaces(run):
            raise ValueError(f"Unknown space '{space}': expected pixels or layer 1 to layer {last}.")
        return int(space.removeprefix("layer "))

    def refiner(self, run: str) -> Refiner:
        """That of a run's model; without a run one that refines nothing."""
        return self.model(run).refiner if run else Refiner()

    @torch.no_grad()
    def features(self, run: str, image: Tensor, refiner: Refiner | None = None) -> dict[int, Tensor]:
        """Features (1, H, W, C) of (1, 3, h, w) after every layer, as the run's refiner or another one leaves them."""
        backbone = self.backbone(run).to(default_device())
        layers = range(1, backbone.num_layers + 1)
        maps = backbone(image.to(default_device()), refiner or self.refiner(run), layers=layers)
        return {layer: features.cpu().float() for layer, features in maps.items()}

    def grid(self, run: str, name: str, index: int) -> tuple[int, int]:
        """Rows and columns of a picture's patches; (0, 0) where no backbone is."""
        has_patches = run or not self.missing
        return self.backbone(run).grid(self.image(name, index).shape[-2:]) if has_patches else (0, 0)

    def lenses(self, run: str, layers: Sequence[int]) -> dict[int, Lens]:
        """A linear head for each layer, fitted to pictures of the run's labelled source when it is first asked for."""
        data, known = self.experiment.data, self._lenses.setdefault(run, {})
        if not data.source:
            raise ValueError("A lens is fitted to the run's labelled source, and this run names none.")
        if missing := [layer for layer in layers if layer not in known]:
            few = replace(data, train_images=min(data.train_images or FITTED, FITTED))
            source, backbone = domains.load(data.source, few, role="source"), self.backbone(run).to(default_device())
            known.update(fit_lenses(backbone, source, missing, FITTED, self.refiner(run)))
        return known

    def pair(
        self, run: str, layer: int, first: Place, second: Place
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Two pictures at the first one's size, (1, 3, h, w), and what is compared of them, (1, H, W, C).

        Compared are the pixels (layer 0), or the features after a layer.
        """
        here = self.image(*first)
        size = tuple(here.shape[-2:])
        images = here, self.image(*second, size)
        if not layer:
            return images, tuple(image.permute(0, 2, 3, 1) for image in images)
        return images, tuple(self.maps(run, *place, size)[layer] for place in (first, second))

    def _distances(self, run: str, first: Place, second: Place) -> list[dict]:
        """Rows of `compare` for the pixels and every layer; for the pixels alone where no backbone is."""
        spaces = enumerate(self.spaces(run))
        return [{"layer": space, **compare(*self.pair(run, layer, first, second)[1])} for layer, space in spaces]

    def has_styles(self, first: str, second: str) -> bool:
        """Whether two domains are the same rendered streets in two styles."""
        one, other = (domains.parse(name)._replace(text="", folder="") for name in (first, second))
        return one.name == other.name == "scenes" and one != other

    def _shares(self, run: str, styles: tuple[str, str], layouts: tuple[int, int]) -> list[dict]:
        """Shares of style, content and interaction in two layouts x two styles, as `plots.share_lines` draws them."""
        rows = []
        for layer, space in enumerate(self.spaces(run)):
            pairs = (self.pair(run, layer, *((style, layout) for style in styles))[1] for layout in layouts)
            x = torch.cat(list(chain.from_iterable(pairs)))
            for part in PARTS:
                found = factorial.shares(factorial.band_products(x, part)[factorial.ALL], len(layouts))
                for factor, share in zip(factorial.FACTORS, found.tolist(), strict=True):
                    rows.append({"layer": space, "part": part, "factor": factor, "share": share})
        return rows

    def study(self) -> Findings:
        """What the study of the premise found in this run. Raises ValueError where it has not been made."""
        if not (found := premise.read(self.run)) or not found.atlas:
            raise ValueError("There is no atlas yet: notebook 02 or `python -m setlib premise` makes it.")
        return found

    @torch.no_grad()
    def segment(
        self, run: str, name: str, index: int, image: Tensor | None = None, refiner: Intervened | None = None
    ) -> Segmented:
        """What a run's model says of a picture in one piece, in the domain's classes.

        image: (1, 3, h, w) in the picture's place; refiner: in place of the model's own.
        """
        model, image = self.model(run), self.image(name, index) if image is None else image
        output = model(image.to(model.device), refiner=refiner)
        return self.judge(model.pixel_probabilities(output, tuple(image.shape[-2:]))[0].float().cpu(), name, index)

    def judge(self, scores: Tensor, name: str, index: int) -> Segmented:
        """Scores of the 19 classes, (19, h, w), in the domain's classes, against the label of a picture."""
        classes, label = self.domain(name).class_set, self.label(name, index)
        places = classes.merge(scores).argmax(0).byte().numpy()
        if label is None or (label == IGNORE).all():
            return Segmented(places, math.nan)
        return Segmented(places, mean_iou(iou_per_class(pixel_counts(places, label, len(classes)))))

    def _reading(self, run: str, name: str, index: int) -> Reading:
        """What the tokens of a run do on a picture. Raises ValueError if there are none."""
        if not run:
            raise ValueError("Tokens learn: choose a trained run (notebook 03 or `python -m setlib train` makes one).")
        model = self.model(run)
        if not model.refiner.branches():
            raise ValueError(f"The refiner '{model.experiment.model.refiner}' of {run} has no tokens that attend.")
        return read_tokens(model, self.image(name, index))

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

    def find(self, domain: str, index: int, step: int = 1, only: str = ALL) -> int:
        """The next picture (step 1) or the one before (step -1) that holds a class, round the end if need be.

        Raises ValueError if no picture of the domain holds it.
        """
        count, classes = len(self.domain(domain)), self.domain(domain).class_set
        if only == ALL:
            return (index + step) % count
        place, damaged = place_of(classes, only), 0
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


def place_of(classes: ClassSet, name: str) -> int:
    """Where a class is in a set. Raises ValueError for an unknown one."""
    if name not in classes.classes:
        raise ValueError(f"Unknown class '{name}': expected one of {', '.join(classes.classes)}.")
    return classes.classes.index(name)


def find_folder(folder: str | Path) -> Path:
    """A folder as given or, if there is none, below the project's. Raises ValueError for what names no folder."""
    try:
        path = Path(str(folder).strip()).expanduser()
        return path if path.is_dir() else PROJECT / path
    except (RuntimeError, OSError):
        raise ValueError(f"There is no folder {str(folder)[:80]}.") from None
