"""Images as tensors and, from an explicit generator, their augmentation: scale, crop, flip, photometric distortion."""

from __future__ import annotations

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from setlib.data.labels import IGNORE
from setlib.experiment import Data
from setlib.spectral import PIXELS, band_mask, invert, transform

CROP_TRIES = 10  # as in the released configurations of the field


def to_tensor(image: np.ndarray) -> Tensor:
    """(h, w, 3) uint8 -> (1, 3, h, w) float in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def to_image(images: Tensor) -> np.ndarray:
    """The first of (B, 3, h, w) float in [0, 1] -> (h, w, 3) uint8, clipped and rounded."""
    return (images[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def uniform(generator: Generator, low: float, high: float) -> float:
    """One random number in [low, high)."""
    return low + (high - low) * torch.rand((), generator=generator).item()


def fit(image: Tensor, long_edge: int, scale: float = 1.0) -> tuple[int, int]:
    """(h, w) of a picture (..., h, w) resized so that its long edge is scale * long_edge, at least 1 pixel each."""
    h, w = image.shape[-2:]
    factor = scale * long_edge / max(h, w)
    return max(1, round(h * factor)), max(1, round(w * factor))


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 3, h, w) float in [0, 1] -> (B, 3, *size), bilinear, antialiased."""
    if image.shape[-2:] == size:
        return image
    return F.interpolate(image, size=size, mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)


def attenuate(images: Tensor, data: Data) -> Tensor:
    """Images (B, 3, h, w) in [0, 1], their low frequencies, all but the mean, weakened by data.attenuate; clipped.

    Source: ADSI (arXiv 2504.06781). Departure: the band ends sharply (there: a Butterworth filter); the mean stays.
    """
    if not data.attenuate:
        return images
    size = (images.shape[2], images.shape[3])
    low = band_mask(size, 1e-9, data.attenuate_below)  # all but the mean
    return invert(transform(images, PIXELS) * (1 - data.attenuate * low), size, PIXELS).clamp(0, 1)


def augment(image: Tensor, label: Tensor, data: Data, generator: Generator) -> tuple[Tensor, Tensor]:
    """One random training crop of a picture and its label.

    image: (3, h, w) float in [0, 1]; label: (h, w) int64 train ids, 255 ignored.
    Returns (3, data.height, data.width) and (data.height, data.width); outside the picture all is grey and ignored.
    Source: Rein, Sec. 4 (scale, crop with at most 75 % of one class, flip, photometric distortion).
    """
    size = fit(image, data.long_edge, uniform(generator, data.scale_min, data.scale_max))
    image = attenuate(resize(image[None], size), data)[0]
    label = F.interpolate(label[None, None].float(), size=size, mode="nearest-exact")[0, 0].long()
    below, right = max(0, data.height - size[0]), max(0, data.width - size[1])
    image = F.pad(image, (0, right, 0, below), value=0.5)
    label = F.pad(label, (0, right, 0, below), value=IGNORE)
    top, left = choose_crop(label, data, generator)
    image = image[:, top : top + data.height, left : left + data.width]
    label = label[top : top + data.height, left : left + data.width]
    if torch.rand((), generator=generator) < 0.5:
        image, label = image.flip(-1), label.flip(-1)
    return distort(image, data.photometric, generator), label.contiguous()


def choose_crop(label: Tensor, data: Data, generator: Generator) -> tuple[int, int]:
    """Top left corner of a crop in which no class fills more than data.max_class_share, or of the last of ten tries."""
    for _ in range(CROP_TRIES):
        top = int(torch.randint(label.shape[0] - data.height + 1, (), generator=generator))
        left = int(torch.randint(label.shape[1] - data.width + 1, (), generator=generator))
        window = label[top : top + data.height, left : left + data.width]
        counts = torch.bincount(window[window != IGNORE], minlength=1)
        if (counts > 0).sum() > 1 and counts.max() <= data.max_class_share * counts.sum():
            break
    return top, left


def distort(image: Tensor, strength: float, generator: Generator) -> Tensor:
    """Random brightness, contrast, saturation and colour balance of a picture (3, h, w) in [0, 1], each by chance.

    Departure: the balance of the three channels is changed instead of the hue angle, which needs no HSV round trip.
    """
    chosen = torch.rand(4, generator=generator) < 0.5
    brightness = uniform(generator, -0.125, 0.125) * strength
    contrast, saturation = (1 + uniform(generator, -0.5, 0.5) * strength for _ in range(2))
    balance = 1 + (torch.rand(3, 1, 1, generator=generator) - 0.5) * 0.14 * strength
    if chosen[0]:
        image = image + brightness
    if chosen[1]:
        image = image * contrast
    if chosen[2]:
        image = torch.lerp(image.mean(0, keepdim=True), image, saturation)
    if chosen[3]:
        image = image * balance
    return image.clamp(0, 1)
