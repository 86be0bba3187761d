"""The segmenter: frozen backbone + refiner + head; whole-picture prediction, saving, loading and sharing."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from setlib.backbone import FrozenBackbone, Prefix
from setlib.data.augment import fit, resize
from setlib.data.decode import read_picture
from setlib.data.labels import CITYSCAPES, IGNORE
from setlib.experiment import Experiment, Model
from setlib.files import load_json, write_atomic
from setlib.heads import Mask2FormerHead, Masks, PerPixelHead
from setlib.refiners import Refiner, build_refiner
from setlib.windows import Windows, blend, cut, label_map

DEVICE = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
REFINER_SIZES = ("num_tokens", "rank", "any_batch", "num_prompts", "adapter_width", "lora_rank")
HEAD_SIZES = ("attention_heads", "pixel_layers", "pixel_width", "decoder_layers", "decoder_width")  # of mask2former
FILES = ("config.json", "model.safetensors")


def fast_precision() -> str:
    """What train.precision=auto means here: bfloat16 where the device multiplies matrices in it, else float32."""
    if DEVICE.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if has_units else "float32"


class Segmenter(nn.Module, ModelHubMixin):
    """A segmentation model with the 19 Cityscapes train classes; only refiner and head learn.

    (The refiners full and lora, too, change a copy of the backbone.) With train.precision below float32 the matrix
    products run in it; spectra, norms and the loss do not. `save_pretrained`, `from_pretrained` and `push_to_hub` share
    it: what learns, and the backbone by name and hash.
    Source: SET, Sec. 3; the per-pixel head is a departure (the paper: Mask2Former).
    """

    def __init__(self, experiment: Experiment, backbone: FrozenBackbone | None = None) -> None:
        super().__init__()
        config = experiment.model
        self.experiment = experiment
        self.results: list[dict] = []  # of metrics.json, for the model card
        backbone = backbone or FrozenBackbone.load(config.backbone, patch_size=config.patch_size)
        depth = backbone.num_layers
        self.feature_layers = tuple(config.feature_layers) or even_layers(depth)
        refined = tuple(config.refined_layers) or tuple(range(1, depth + 1))
        for key, layers in (("feature_layers", self.feature_layers), ("refined_layers", refined)):
            if not all(1 <= layer <= depth for layer in layers):
                raise ValueError(f"Option model.{key} names {layers}, but {backbone.name} has the layers 1 to {depth}.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(experiment.seed)
            self.head, self.refiner = build_parts(config, backbone.channels, self.feature_layers, refined)
            self.backbone = backbone.adapted(self.refiner.adapt)
        train = experiment.train
        self.precision = fast_precision() if train.precision == "auto" else train.precision
        dtype, lower = getattr(torch, self.precision), self.precision != "float32"
        self.autocast = partial(torch.autocast, DEVICE.type, dtype if lower else None, enabled=lower)
        self.to(DEVICE)

    @property
    def frozen_until(self) -> int:
        """Number of first layers whose own answer nothing trainable can change: it can be computed once."""
        return min(self.refiner.frozen_until(self.backbone.num_layers), max(self.feature_layers))

    def prefix(self, images: Tensor, stop: int = 0, layers: Sequence[int] = ()) -> Prefix | None:
        """What the frozen first layers make of images, for `forward`. None if no layer is frozen.

        stop: where other models go on from, by default behind the last frozen one. layers: whose maps are kept where
        they are frozen, by default those that the head reads.
        """
        if not self.frozen_until:
            return None
        wanted = [layer for layer in layers or self.feature_layers if layer <= self.frozen_until]
        stop = stop or self.frozen_until
        parts = images.split(self.experiment.inference.windows)
        with self.autocast():
            kept = [self.backbone.prefix(part.to(DEVICE), stop, wanted) for part in parts]
        return Prefix.cat(kept)

    def forward(self, images: Tensor, prefix: Prefix | None = None, refiner: Refiner | None = None) -> Tensor | Masks:
        """What the head says of images (B, 3, h, w) in [0, 1], of any size: logits (B, 19, H, W), or masks.

        prefix: of the same images, to skip layers that nothing trainable touches; left aside if it goes further.
        refiner: in place of the model's own, where something is done to the features on their way.
        """
        prefix = prefix if prefix and prefix.stop <= self.frozen_until else None
        checkpointing = self.training and self.experiment.train.checkpointing
        with self.autocast():
            maps = self.backbone(images, refiner or self.refiner, self.feature_layers, prefix, checkpointing)
            return self.head([maps[layer] for layer in self.feature_layers], self.refiner.queries())

    def loss(
        self, output: Tensor | Masks, labels: Tensor, counts: Tensor | None = None, seeds: Sequence[int] = ()
    ) -> Tensor:
        """The head's loss of its output, a scalar; labels: (B, h, w) int64 train ids, 255 ignored.

        counts: `head.counts` of all labels of the step where these are a part of them. seeds: of what a mask head
        draws, one per image.
        """
        counts = self.head.counts(labels) if counts is None else counts
        h, w = self._padded(labels.shape[1:])
        labels = F.pad(labels, (0, w - labels.shape[2], 0, h - labels.shape[1]), value=IGNORE)
        return self.head.loss(output, labels, counts, seeds or range(len(labels)))

    def pixel_probabilities(self, output: Tensor | Masks, size: tuple[int, int]) -> Tensor:
        """Class probabilities at the pixels of images of `size`, (B, 19, h, w).

        Where these did not divide into patches, what they were padded with is cut off.
        """
        return self.head.probabilities(output, self._padded(size))[..., : size[0], : size[1]]

    def _padded(self, size: Sequence[int]) -> tuple[int, int]:
        """Image size (h, w) in pixels, rounded up to whole patches."""
        patch = self.backbone.patch_size
        return tuple(-(-side // patch) * patch for side in size)

    def trainable_state(self) -> dict[str, Tensor]:
        """Everything that learns, by name: refiner.*, head.* and what learns of backbone.*."""
        parts = {"refiner": self.refiner.state_dict(), "head": self.head.state_dict()}
        parts["backbone"] = {name: p.detach() for name, p in self.backbone.named_parameters() if p.requires_grad}
        return {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}

    def num_trainable(self) -> dict[str, int]:
        """Trainable parameters by part."""
        parts = {"backbone": self.backbone, "refiner": self.refiner, "head": self.head}
        return {name: sum(p.numel() for p in part.parameters() if p.requires_grad) for name, part in parts.items()}

    def windows(self, image: np.ndarray | Tensor, long_edge: int = 0) -> list[Windows]:
        """A picture, (h, w, 3) uint8, at every scale of the experiment, and mirrored if it says so, cut into windows.

        long_edge: of the picture at scale 1, pixels; 0 = data.long_edge.
        """
        data, settings = self.experiment.data, self.experiment.inference
        pixels = torch.as_tensor(np.array(image)).permute(2, 0, 1)[None].float().div_(255)
        found = []
        for scale in settings.scales:
            size = fit(pixels, long_edge or data.long_edge, scale)
            resized, patches = resize(pixels, size)[0], self._padded(size)
            window = patches if settings.whole else tuple(map(min, (data.height, data.width), patches))
            stride = tuple(max(1, round(side * settings.stride)) for side in window)
            found.append(cut(resized, window, stride))
            if settings.flip:
                found.append(cut(resized.flip(-1), window, stride)._replace(flipped=True))
        return found

    @torch.no_grad()
    def probabilities(self, views: Sequence[Windows], prefixes: Sequence[Prefix | None] = ()) -> Tensor:
        """Class probabilities of a picture at its first view's size, (19, h, w): the mean over windows and views.

        views: of `windows`. prefixes: of each view's images.
        """
        total: Tensor | float = 0.0
        for view, prefix in zip(views, prefixes or [None] * len(views), strict=True):
            scores = []
            for part in torch.arange(len(view.images)).split(self.experiment.inference.windows):
                own = prefix and prefix.map(lambda kept, part=part: kept[part])
                output = self(view.images[part].to(DEVICE), own)
                scores.append(self.pixel_probabilities(output, view.images.shape[-2:]).cpu())
            blended = blend(torch.cat(scores), view)
            if blended.shape[1:] != views[0].size:
                blended = F.interpolate(blended[None], views[0].size, mode="bilinear", align_corners=False)[0]
            total = total + blended
        return total / len(views)

    def use(self, experiment: Experiment) -> None:
        """Takes over how a trained model is used: data.eval_edges, model.any_batch, inference.*"""
        self.experiment = experiment
        self.refiner.any_batch = experiment.model.any_batch

    def predict(self, image: Any) -> np.ndarray:
        """Train ids (h, w) uint8 of one picture, at the picture's own size.

        image: a path, a PIL picture of any mode, or an (h, w, 3) uint8 array. EXIF rotation is applied.
        Raises ValueError if it is no picture.
        """
        pixels = read_picture(image)
        return label_map(self.probabilities(self.windows(pixels)), pixels.shape[:2])

    def save(self, folder: Path) -> None:
        """Writes model.safetensors and config.json (experiment, hash of the backbone), each whole or not at all."""
        write_model(folder, self.trainable_state(), self.experiment, self.backbone.fingerprint)

    @classmethod
    def load(cls, folder: Path, backbone: FrozenBackbone | None = None) -> Segmenter:
        """A saved model, in evaluation mode, from its folder or a run's.

        Raises ValueError if files are missing or the backbone differs.
        """
        folder = Path(folder)
        folder = folder / "model" if (folder / "model").is_dir() else folder
        if not all((folder / name).is_file() for name in FILES):
            raise ValueError(f"{folder} holds no saved model ({' and '.join(FILES)}): train one first.")
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            experiment, trained_on = Experiment.from_dict(config["experiment"]), config["backbone_fingerprint"]
            tensors = load_file(folder / "model.safetensors")
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"The model in {folder} cannot be read ({error}): delete it and train again.") from None
        model = cls(experiment, backbone)
        found = model.backbone.fingerprint
        if trained_on not in ("", found):  # "": imported, the release does not say
            raise ValueError(
                f"{folder} was trained on a backbone with hash {trained_on}, "
                f"but {model.backbone.name} has {found}: use the same weights."
            )
        model.load_state(tensors)
        model.results = config.get("results", [])
        if (folder.parent / "experiment.json").is_file():
            with contextlib.suppress(ValueError, KeyError, TypeError, OSError):  # not scored yet
                model.results = load_json(folder.parent / "metrics.json")["results"]
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

    def _save_pretrained(self, save_directory: Path) -> None:
        """`save` with the results and the card, without the folders of this machine."""
        data = self.experiment.data
        source, *targets = (_public(text) for text in (data.source, *data.targets))
        experiment = replace(self.experiment, data=replace(data, source=source, targets=tuple(targets)))
        results = [result | {"domain": _public(result["domain"])} for result in self.results]
        write_model(save_directory, self.trainable_state(), experiment, self.backbone.fingerprint, results)
        write_atomic(save_directory / "README.md", str(self.generate_model_card()))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, backbone: FrozenBackbone | None = None, **options: Any
    ) -> Segmenter:
        """`load` of a folder, or of a repository of the hub; options: revision, token, cache_dir ... of the hub's.

        Raises ValueError as `load` does, and if the hub does not have it.
        """
        folder = pretrained_model_name_or_path
        if not Path(folder).is_dir():
            try:
                folder = snapshot_download(str(folder), allow_patterns=list(FILES), **options)
            except (ValueError, OSError) as error:  # every error of the hub is one of these
                why = str(error).strip().splitlines()[0]
                raise ValueError(f"{folder} is no folder, and the hub does not give it: {why}") from None
        return cls.load(Path(folder), backbone)

    def generate_model_card(self, **_: Any) -> ModelCard:
        """README.md of a shared model: what it is, how to load it, and the run's table."""
        experiment = self.experiment
        results = [r | {"domain": _public(r["domain"]), "inference": r.get("inference", "")} for r in self.results]
        rows = ["| {domain} | {class_set} | {images} | {inference} | {miou} |".format(**r) for r in results]
        table = "\n".join(["| domain | classes | pictures | predicted in | mIoU, % |", "|---|---|---|---|---|", *rows])
        known = f"Steps: {experiment.train.steps}, seed {experiment.seed}." if experiment.data.source else ""
        counts = " + ".join(f"{number:,} ({part})" for part, number in self.num_trainable().items() if number)
        return ModelCard(
            CARD.format(
                refiner=experiment.model.refiner,
                head=experiment.model.head,
                backbone=experiment.model.backbone,
                fingerprint=self.backbone.fingerprint,
                source=_public(experiment.data.source) or "a source that is not known",
                known=known,
                counts=counts,
                table=table if rows else "Not scored yet.",
            )
        )


CARD = """---
library_name: setlib
pipeline_tag: image-segmentation
tags: [semantic-segmentation, domain-generalization, {refiner}]
---
# {refiner} on {backbone}, trained on {source}

A segmentation model with the 19 Cityscapes train classes for pictures of domains it was not trained on: the frozen
backbone `{backbone}` (hash {fingerprint}, not stored here), the refiner `{refiner}` and the head `{head}`.
Trained values: {counts}. {known}

```python
from setlib.model import Segmenter

labels = Segmenter.from_pretrained("THIS_REPOSITORY").predict("street.jpg")  # (h, w) train ids
```

{table}
"""


def _public(text: str) -> str:
    """A domain's name without the folder it lies in on this machine."""
    return re.sub(r"@[^~]*", "", text)


def even_layers(depth: int) -> tuple[int, ...]:
    """Four layers of `depth`, evenly spaced: what a head reads unless it is told."""
    return tuple(max(1, depth * k // 4) for k in (1, 2, 3, 4))


def build_parts(
    config: Model, channels: int, feature_layers: Sequence[int], refined_layers: Sequence[int]
) -> tuple[nn.Module, Refiner]:
    """Head and refiner as a configuration names them, for a backbone of so many channels."""
    masks = config.head == "mask2former"
    if masks and len(feature_layers) != 4:
        raise ValueError(f"Option model.feature_layers must name 4 layers for mask2former, got {len(feature_layers)}.")
    sizes = {key: getattr(config, key) for key in REFINER_SIZES} | {"query_channels": masks and config.head_channels}
    if not masks:
        head = PerPixelHead(len(feature_layers), channels, config.head_channels, len(CITYSCAPES))
        return head, build_refiner(config.refiner, refined_layers, channels, **sizes)
    refiner = build_refiner(config.refiner, refined_layers, channels, **sizes)
    learned = 0 if refiner.queries() is not None else config.num_tokens
    widths = {key: getattr(config, key) for key in HEAD_SIZES}
    return Mask2FormerHead(channels, config.head_channels, len(CITYSCAPES), learned, **widths), refiner


def write_model(
    folder: Path, tensors: dict[str, Tensor], experiment: Experiment, fingerprint: str, results: Sequence[dict] = ()
) -> None:
    """A model's two files, each whole or not at all. fingerprint: of its backbone, "" if it is not known."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    config = {"experiment": experiment.to_dict(), "backbone_fingerprint": fingerprint}
    config |= {"results": list(results)} if results else {}
    write_atomic(Path(folder) / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_atomic(Path(folder) / "config.json", json.dumps(config, indent=1) + "\n")
