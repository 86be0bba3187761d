"""What the explorer works on: the domains, the backbone and the trained models of a run, kept in memory; uploads.

The views of it are in `views.py`.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import warnings
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from setlib import spectral
from setlib.analysis.spectra import as_tensor
from setlib.analysis.tokens import Intervened, Reading, read_tokens
from setlib.backbone import FrozenBackbone
from setlib.checkpoint import FILES, load_segmenter
from setlib.data import domains
from setlib.data.augment import fit, resize
from setlib.data.decode import read_picture
from setlib.data.labels import IGNORE
from setlib.distributed import default_device
from setlib.evaluation import iou_per_class, mean_iou, pixel_counts
from setlib.files import PROJECT, write_atomic
from setlib.refiners import build_refiner
from setlib.run import Run
from setlib.segmenter import Segmenter
from setlib.weights.load import load_backbone

LONG_EDGE, KEPT_EDGE = 448, 1024  # pixels, at most: of a picture in the views, and of an uploaded file
MOST_PIXELS, NARROWEST = 60_000_000, 16  # of a picture: decoded whole it needs 10 bytes a pixel; long by short side
UNNAMED = ("scenes:game", "scenes:night")  # where a run names no domains
KEPT = {"domain": 64, "model": 3, "sample": 4, "image": 64, "label": 64}  # how many answers of a method are kept
KEPT |= {"maps": 6, "segmented": 16, "reading": 4, "distances": 16}


class Segmented(NamedTuple):
    """What a model says of a picture, and how that compares with the label: places in a class set, (h, w); percent."""

    places: np.ndarray
    miou: float


class Material:
    """The domains, the backbone and the trained models of a run, by name; what was computed last is kept.

    `run` is the folder of a trained run, "" for none: features are then the frozen backbone's.
    """

    def __init__(self, run: Run, more: Sequence[str] = ()) -> None:
        self.run, self.experiment = run, run.experiment
        data = run.experiment.data
        self.long_edge = min(data.long_edge, LONG_EDGE)
        self.names = [n for n in dict.fromkeys([data.source, *data.targets, *more]) if n] or list(UNNAMED)
        self.choices = {name: name for name in self.names}  # of every view: as shown -> name
        self._trained: dict[str, int] = {}  # when a run's model was written
        for name, size in KEPT.items():
            setattr(self, name, lru_cache(size)(getattr(self, name)))

    def domain(self, name: str) -> domains.Domain:
        """A domain by its name; rendered streets are the targets', so that one number is one street in every style."""
        return domains.load(name, self.experiment.data, role="target")

    def model(self, run: str) -> Segmenter | FrozenBackbone:
        """The trained model of a run folder; the frozen backbone for ""."""
        if not run:
            config = self.experiment.model
            return load_backbone(config.backbone, patch_size=config.patch_size)
        return load_segmenter(find_folder(run))

    def renew(self, run: str) -> None:
        """Lets go of what was computed with a run's model if it has been trained anew."""
        folder = find_folder(run)
        weights = (folder / "model" if os.path.isdir(folder / "model") else folder) / FILES[-1]
        written = os.stat(weights).st_mtime_ns if run and os.path.isfile(weights) else 0
        if self._trained.setdefault(run, written) != written:
            self._trained[run] = written
            for name in ("model", "maps", "segmented", "reading", "distances"):
                getattr(self, name).cache_clear()

    def runs(self) -> list[str]:
        """The trained runs in this run's folder and beside it, its own first."""
        paths = [self.run.path, *sorted(self.run.path.glob("*/")), *sorted(self.run.path.parent.glob("*/"))]
        return [shown(p) for p in dict.fromkeys(paths) if all(os.path.isfile(p / "model" / name) for name in FILES)]

    def own(self) -> str:
        """This run itself, if it is trained and has tokens that attend; else ""."""
        refiner = build_refiner(self.experiment.model.refiner, (1,), 1, 2, 1)
        return shown(self.run.path) if refiner.branches() and shown(self.run.path) in self.runs() else ""

    def image(self, name: str, index: int, size: tuple[int, int] | None = None) -> Tensor:
        """Picture `index` of a domain, (1, 3, h, w) in [0, 1], at the views' size; cut to cover `size` if it is given.

        Raises ValueError if there is no such picture.
        """
        image = as_tensor(self.sample(name, index).image)
        h, w = image.shape[-2:]
        if max(h, w) > NARROWEST * min(h, w):
            raise ValueError(f"Picture {index} of {name} is {w} x {h}: it is too narrow to be compared.")
        return resize(image, fit(image, self.long_edge)) if size is None else _cover(image, size)

    def label(self, name: str, index: int) -> np.ndarray | None:
        """The label of a picture at the views' size, places in the domain's class set; None without labels."""
        label = self.domain(name).to_score(self.sample(name, index).label)
        return None if label is None else _nearest(label, tuple(self.image(name, index).shape[-2:]))

    def spaces(self, run: str = "") -> list[str]:
        """What can be compared: "pixels", and every layer as "layer 9"."""
        model = self.model(run)
        return ["pixels", *(f"layer {n}" for n in range(1, getattr(model, "backbone", model).num_layers + 1))]

    def add_domain(self, name: str, label: str = "") -> None:
        """Adds a domain to the choices of every view. Raises ValueError if it cannot be used."""
        self.domain(name)
        if name not in self.choices.values():
            label = label or name
            labels = chain([label], (f"{label} ({n})" for n in count(2)))
            self.choices[next(free for free in labels if free not in self.choices)] = name

    def add_upload(self, content: bytes, name: str) -> tuple[str, str]:
        """Keeps an uploaded picture in the run folder; returns the domain that it is and what was done to it.

        Raises ValueError if it is no picture, or is too large or too narrow.
        """
        try:
            with warnings.catch_warnings(), Image.open(io.BytesIO(content)) as opened:
                warnings.simplefilter("ignore")  # of many pixels: they are counted below
                frames, bands = getattr(opened, "n_frames", 1), opened.getbands()
                clear, (width, height) = "A" in bands or "transparency" in opened.info, opened.size
                pixels = None
                if width * height <= MOST_PIXELS:
                    pixels = read_picture(opened, KEPT_EDGE)
        except Exception:  # a damaged file may raise anything
            raise ValueError(f"'{name}' is no picture that can be read: choose a PNG, JPEG, WebP or TIFF.") from None
        if pixels is None or min(width, height) < 8 or max(width, height) > NARROWEST * min(width, height):
            raise ValueError(
                f"'{name}' is {width} x {height} pixels: choose a picture of at most {MOST_PIXELS / 1e6:.0f} million "
                f"pixels, both sides at least 8 and neither more than {NARROWEST} times the other."
            )
        height, width = pixels.shape[:2]
        picture, kept = Image.fromarray(pixels), io.BytesIO()
        picture.thumbnail((KEPT_EDGE, KEPT_EDGE), reducing_gap=2.0)
        picture.save(kept, "PNG")
        stem = "".join(c if c.isalnum() or c in "-_ " else "-" for c in Path(name).stem)[:40].strip() or "picture"
        if not self.run.path.is_dir():
            raise ValueError(f"The run folder {self.run.path} is gone: open the explorer anew.")
        folder = self.run.path / "uploads" / f"{stem}-{sha256(kept.getvalue()).hexdigest()[:8]}"
        try:
            write_atomic(folder / "images" / f"{stem}.png", kept.getvalue())
        except ValueError:
            for empty in (folder / "images", folder, folder.parent):
                with contextlib.suppress(OSError):
                    empty.rmdir()
            raise
        notes = [f"kept at {picture.width} x {picture.height}"] * (max(height, width) > KEPT_EDGE)
        notes += [f"the first of its {frames} frames"] * (frames > 1)
        notes += ["grey"] * (bands[0] in "L1IF" and bands[-1] in "L1IFA") + ["transparent parts are white"] * clear
        domain = f"folder@{folder.absolute()}"
        self.add_domain(domain, f"uploaded: {name}")
        return domain, ", ".join(notes)

    def sample(self, name: str, index: int) -> domains.Sample:
        """Picture `index` of a domain as it is. Raises ValueError if there is none."""
        domain = self.domain(name)
        if not isinstance(index, int) or not 0 <= index < len(domain):
            raise ValueError(f"{name} has the pictures 0 to {len(domain) - 1}, not {index}.")
        return domain.sample(index)

    def patch_size(self, run: str = "") -> int:
        """Pixels of a patch's side."""
        model = self.model(run)
        return getattr(model, "backbone", model).patch_size

    def layer_of(self, space: str, run: str) -> int:
        """The number of a layer; 0 for the pixels."""
        if space == "pixels":
            return 0
        known = self.spaces(run)
        if space not in known:
            raise ValueError(f"Unknown space '{space}': expected pixels or {known[1]} to {known[-1]}.")
        return int(space.removeprefix("layer "))

    @torch.no_grad()
    def maps(self, run: str, name: str, index: int, size: tuple[int, int]) -> dict[int, Tensor]:
        """Features (1, H, W, C) of a picture after every layer; of a run: as its refiner leaves them."""
        model, image = self.model(run), self.image(name, index, size).to(default_device())
        backbone = getattr(model, "backbone", model).to(image.device)
        every = range(1, backbone.num_layers + 1)
        return {k: v.cpu().float() for k, v in backbone(image, getattr(model, "refiner", None), layers=every).items()}

    def pair(
        self, run: str, layer: int, first: tuple[str, int], second: tuple[str, int]
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[int, int]]:
        """Two pictures, each a domain and an index, at the first one's size; what is compared of them; over which axes.

        Compared are the pictures themselves (layer 0), or their features after a layer.
        """
        here = self.image(*first)
        size = tuple(here.shape[-2:])
        images = here, self.image(*second, size)
        if not layer:
            return images, images, spectral.PIXELS
        return images, tuple(self.maps(run, *place, size)[layer] for place in (first, second)), spectral.GRID

    @torch.no_grad()
    def scores(self, run: str, image: Tensor, refiner: Intervened | None = None) -> Tensor:
        """Probabilities (19, h, w) of the classes at the pixels of an image (1, 3, h, w), in one piece."""
        model = self.model(run)
        output = model(image.to(model.device), refiner=refiner)
        return model.pixel_probabilities(output, tuple(image.shape[-2:]))[0].float().cpu()

    def segmented(self, run: str, name: str, index: int) -> Segmented:
        """A picture as it is."""
        return self.judge(self.scores(run, self.image(name, index)), name, index)

    def judge(self, scores: Tensor, name: str, index: int) -> Segmented:
        """Scores of a picture in its domain's classes, against its label; NaN without one."""
        classes = self.domain(name).class_set
        places = classes.merge(scores).argmax(0).byte().numpy()
        label = self.label(name, index)
        known = label is not None and (label != IGNORE).any()
        miou = mean_iou(iou_per_class(pixel_counts(places, label, len(classes)))) if known else math.nan
        return Segmented(places, miou)

    def reading(self, run: str, name: str, index: int) -> Reading:
        """What the tokens of a run do on a picture. Raises ValueError if there are none."""
        if not run:
            raise ValueError("Tokens learn: choose a trained run (notebook 03 or `python -m setlib train` makes one).")
        model = self.model(run)
        if not model.refiner.branches():
            raise ValueError(f"The refiner '{model.experiment.model.refiner}' of {run} has no tokens that attend.")
        return read_tokens(model, self.image(name, index))


def find_folder(folder: str | Path) -> Path:
    """A folder as given or, if there is none, below the project's. Raises ValueError for what names no folder."""
    try:
        path = Path(str(folder).strip()).expanduser()
        return path if path.is_dir() else PROJECT / path
    except (RuntimeError, OSError):
        raise ValueError(f"There is no folder {str(folder)[:80]}.") from None


def shown(path: Path) -> str:
    """A folder as a line of code names it: from the project's folder where it lies below it."""
    path = Path(path).absolute()
    return path.relative_to(PROJECT).as_posix() if path.is_relative_to(PROJECT) else str(path)


def _nearest(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    values = torch.from_numpy(label)[None, None].float()
    return F.interpolate(values, size=size, mode="nearest-exact")[0, 0].byte().numpy()


def _cover(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(1, 3, h, w) resized to cover `size` and cut to it around the middle."""
    h, w = image.shape[-2:]
    factor = max(size[0] / h, size[1] / w)
    image = resize(image, (max(size[0], round(h * factor)), max(size[1], round(w * factor))))
    top, left = (math.floor((side - kept) / 2) for side, kept in zip(image.shape[-2:], size, strict=True))
    return image[..., top : top + size[0], left : left + size[1]]
