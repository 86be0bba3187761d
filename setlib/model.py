"""The segmenter: frozen backbone + refiner + head; whole-picture prediction, saving and loading."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from setlib.backbone import FrozenBackbone, Prefix
from setlib.experiment import Experiment, write_atomic
from setlib.features import FeatureCache
from setlib.heads import PerPixelHead
from setlib.labels import CITYSCAPES
from setlib.pictures import read_picture
from setlib.refiners import build_refiner
from setlib.transforms import fit, resize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STRIP_PIXELS = 2**21  # rows of the output are scored in strips of at most so many pixels, to bound memory
OPTIONS = ("any_batch", "num_prompts", "adapter_width", "lora_rank")  # of a refiner, as model.* names them
OVERLAP = 1 / 3  # of neighbouring windows; the released configurations slide 512-pixel windows by 341


class Windows(NamedTuple):
    """A picture at inference size cut into windows: (n, 3, h, w), their corners, and the picture's (h, w)."""

    images: Tensor
    corners: list[tuple[int, int]]
    size: tuple[int, int]


class Segmenter(nn.Module):
    """A segmentation model with the 19 Cityscapes train classes; only refiner and head learn.

    (The refiners full and lora, too, change a copy of the backbone.) With train.precision below float32 the matrix
    products run in it; spectra, norms and the loss do not.
    Source: SET, Sec. 3; the per-pixel head is a departure (the paper: Mask2Former).
    """

    def __init__(self, experiment: Experiment, backbone: FrozenBackbone | None = None) -> None:
        super().__init__()
        config = experiment.model
        self.experiment = experiment
        backbone = backbone or FrozenBackbone.load(config.backbone, patch_size=config.patch_size)
        depth, channels = backbone.num_layers, backbone.channels
        self.feature_layers = tuple(config.feature_layers) or tuple(max(1, depth * k // 4) for k in (1, 2, 3, 4))
        refined = tuple(config.refined_layers) or tuple(range(1, depth + 1))
        for key, layers in (("feature_layers", self.feature_layers), ("refined_layers", refined)):
            if not all(1 <= layer <= depth for layer in layers):
                raise ValueError(f"Option model.{key} names {layers}, but {backbone.name} has the layers 1 to {depth}.")
        sizes = {key: getattr(config, key) for key in ("num_tokens", "rank", *OPTIONS)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(experiment.seed)
            self.head = PerPixelHead(len(self.feature_layers), channels, config.head_channels, len(CITYSCAPES))
            self.refiner = build_refiner(config.refiner, refined, channels, **sizes)
            self.backbone = backbone.adapted(self.refiner.adapt)
        train = experiment.train
        self.cache = FeatureCache(train.cache_gb * 1e9)
        dtype, lower = getattr(torch, train.precision), train.precision != "float32"
        self.autocast = partial(torch.autocast, DEVICE.type, dtype if lower else None, enabled=lower)
        self.to(DEVICE)

    @property
    def frozen_until(self) -> int:
        """Number of first layers whose own answer nothing trainable can change: it can be computed once."""
        return min(self.refiner.frozen_until(self.backbone.num_layers), max(self.feature_layers))

    def prefix(self, images: Tensor, layers: Sequence[int] = ()) -> Prefix | None:
        """What the frozen first layers make of images, for `forward`; from the cache on disk where one is kept.

        layers: whose maps are kept, by default those that the head reads. None if no layer is frozen.
        """
        if not self.frozen_until:
            return None
        wanted, precision = layers or self.feature_layers, self.experiment.train.precision
        with self.autocast():
            return self.cache.prefix(self.backbone, images.to(DEVICE), self.frozen_until, wanted, precision)

    def forward(self, images: Tensor, prefix: Prefix | None = None) -> Tensor:
        """Logits on the patch grid, (B, 19, H, W); images: (B, 3, h, w) in [0, 1] of any size, see `to_pixels`.

        prefix: of the same images, to skip layers that nothing trainable touches; left aside if it goes further.
        """
        prefix = prefix if prefix and prefix.stop <= self.frozen_until else None
        checkpointing = self.training and self.experiment.train.checkpointing
        with self.autocast():
            maps = self.backbone(images, self.refiner, self.feature_layers, prefix, checkpointing)
            return self.head([maps[layer] for layer in self.feature_layers]).float()

    def to_pixels(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        """Scores on the patch grid (B, K, H, W) at the pixels of their images, (B, K, h, w), bilinear.

        Where images of `size` did not divide into patches, what they were padded with is cut off.
        """
        whole = [side * self.backbone.patch_size for side in scores.shape[2:]]
        return F.interpolate(scores, whole, mode="bilinear", align_corners=False)[:, :, : size[0], : size[1]]

    def trainable_state(self) -> dict[str, Tensor]:
        """Everything that learns, by name: refiner.*, head.* and what learns of backbone.*."""
        learns = {name for name, p in self.named_parameters() if p.requires_grad}
        state = self.state_dict().items()
        return {name: tensor for name, tensor in state if name in learns or not name.startswith("backbone.")}

    def num_trainable(self) -> dict[str, int]:
        """Trainable parameters by part."""
        parts = {"backbone": self.backbone, "refiner": self.refiner, "head": self.head}
        return {name: sum(p.numel() for p in part.parameters() if p.requires_grad) for name, part in parts.items()}

    def windows(self, image: np.ndarray | Tensor) -> Windows:
        """A picture, (h, w, 3) uint8, resized to the experiment's long edge and cut into overlapping windows."""
        data, patch = self.experiment.data, self.backbone.patch_size
        pixels = torch.as_tensor(np.array(image)).permute(2, 0, 1)[None].float() / 255
        size = fit(pixels, data.long_edge)
        pixels = resize(pixels, size)
        window = [
            min(limit, -(-side // patch) * patch) for limit, side in zip((data.height, data.width), size, strict=True)
        ]
        below, right = (max(0, w - s) for w, s in zip(window, size, strict=True))
        pixels = F.pad(pixels, (0, right, 0, below), mode="replicate")
        corners = [(y, x) for y in _starts(pixels.shape[2], window[0]) for x in _starts(pixels.shape[3], window[1])]
        cut = [pixels[0, :, y : y + window[0], x : x + window[1]] for y, x in corners]
        return Windows(torch.stack(cut), corners, size)

    @torch.no_grad()
    def probabilities(self, windows: Windows, prefix: Prefix | None = None) -> Tensor:
        """Class probabilities at inference size, (19, h, w); windows are averaged where they overlap."""
        h, w = windows.images.shape[-2:]
        scores = self.to_pixels(self(windows.images.to(DEVICE), prefix).softmax(1), (h, w)).cpu()
        extent = [max(corner[i] for corner in windows.corners) + side for i, side in enumerate((h, w))]
        total, count = torch.zeros(scores.shape[1], *extent), torch.zeros(extent)
        for score, (y, x) in zip(scores, windows.corners, strict=True):
            total[:, y : y + h, x : x + w] += score
            count[y : y + h, x : x + w] += 1
        return (total / count)[:, : windows.size[0], : windows.size[1]]

    def predict(self, image: Any) -> np.ndarray:
        """Train ids (h, w) uint8 of one picture, at the picture's own size.

        image: a path, a PIL picture of any mode, or an (h, w, 3) uint8 array. EXIF rotation is applied.
        Raises ValueError if it is no picture.
        """
        pixels = read_picture(image)
        return label_map(self.probabilities(self.windows(pixels)), pixels.shape[:2])

    def save(self, folder: Path) -> None:
        """Writes model.safetensors and config.json (experiment, hash of the backbone), each whole or not at all."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.trainable_state().items()}
        config = {"experiment": self.experiment.to_dict(), "backbone_fingerprint": self.backbone.fingerprint}
        write_atomic(Path(folder) / "model.safetensors", save(tensors, metadata={"format": "pt"}))
        write_atomic(Path(folder) / "config.json", json.dumps(config, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path, backbone: FrozenBackbone | None = None) -> Segmenter:
        """A saved model, in evaluation mode. Raises ValueError if files are missing or the backbone differs."""
        folder = Path(folder)
        if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
            raise ValueError(f"{folder} holds no saved model (config.json and model.safetensors): train one first.")
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            experiment, trained_on = Experiment.from_dict(config["experiment"]), config["backbone_fingerprint"]
            tensors = load_file(folder / "model.safetensors")
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"The model in {folder} cannot be read ({error}): train it again.") from None
        model = cls(experiment, backbone)
        found = model.backbone.fingerprint
        if found != trained_on:
            raise ValueError(
                f"{folder} was trained on a backbone with hash {trained_on}, "
                f"but {model.backbone.name} has {found}: use the same weights."
            )
        model.load_state(tensors)
        return model.eval()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Loads what `trainable_state` gave. Raises ValueError naming what does not fit."""
        expected = {name: tuple(t.shape) for name, t in self.trainable_state().items()}
        got = {name: tuple(t.shape) for name, t in tensors.items()}
        if expected != got:
            wrong = sorted(set(expected.items()) ^ set(got.items()))
            raise ValueError(
                f"Saved weights do not fit this model: {wrong[0][0]} differs or is missing ({len(wrong)} differences)."
            )
        self.load_state_dict(tensors, strict=False)


def label_map(scores: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Class of the highest score at every pixel of `size`, (h, w) uint8; scores: (K, h', w'), bilinearly resized.

    Rows are done in strips, so that a picture of 100 megapixels needs no K x 100 megapixels of memory.
    """
    h, w = size
    rows = ((torch.arange(h) + 0.5) * scores.shape[1] / h - 0.5).clamp(0, scores.shape[1] - 1)
    above = rows.long()
    below = (above + 1).clamp(max=scores.shape[1] - 1)
    share = (rows - above)[None, :, None]
    labels = np.empty(size, np.uint8)
    for strip in torch.arange(h).split(max(1, STRIP_PIXELS // w)):
        mixed = torch.lerp(scores[:, above[strip]], scores[:, below[strip]], share[:, strip])
        wide = F.interpolate(mixed[None], size=(len(strip), w), mode="bilinear", align_corners=False)[0]
        labels[strip.numpy()] = wide.argmax(0).numpy()
    return labels


def _starts(length: int, window: int) -> Sequence[int]:
    """First pixels of evenly spread windows that cover `length` and overlap by at least OVERLAP."""
    count = 1 + max(0, int(np.ceil((length - window) / (window * (1 - OVERLAP)))))
    return np.linspace(0, length - window, count).round().astype(int).tolist()
