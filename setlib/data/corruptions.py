"""Corruptions of pictures at severities 1 to 5, so that robustness can be measured on any domain, without new data.

`DOMAIN~KIND[SEVERITY]` is the domain corrupted, for example `cityscapes@folder~noise3`; the label stays. They are
simulations: `fog` is no real fog. Source: kinds and severities after ImageNet-C and Cityscapes-C (Hendrycks, ICLR 2019;
Kamann, CVPR 2020), with scipy and Pillow. Departure: sizes in pixels are for pictures about 512 high and scale with
the height; fog and frost are drawn from plain noise, not from photographs.

Each kind is a function of an image (h, w, 3) float32 in [0, 1], its strength and a random generator.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image
from scipy import ndimage

from setlib.files import nearest


def _impulse(x: np.ndarray, share: float, random: Generator) -> np.ndarray:
    drawn = random.random(x.shape)
    return np.where(drawn < share / 2, 0, np.where(drawn < share, 1, x))


def _defocus(x: np.ndarray, radius: float, random: Generator) -> np.ndarray:
    radius *= len(x) / 512
    across = np.arange(-np.ceil(radius), np.ceil(radius) + 1)
    disc = (np.hypot(*np.meshgrid(across, across)) <= radius).astype(np.float32)
    return ndimage.convolve(x, (disc / disc.sum())[..., None], mode="nearest")


def _motion(x: np.ndarray, length: float, random: Generator) -> np.ndarray:
    length, angle = length * len(x) / 512, random.uniform(-np.pi / 4, np.pi / 4)
    moved = []
    for step in np.linspace(-length / 2, length / 2, max(3, int(length) + 1)):
        shift = (step * np.sin(angle), step * np.cos(angle), 0)
        moved.append(ndimage.shift(x, shift, order=1, mode="nearest", prefilter=False))
    return np.mean(moved, axis=0)


def _blur(x: np.ndarray, sigma: float, random: Generator) -> np.ndarray:
    return ndimage.gaussian_filter(x, sigma * len(x) / 512, mode="nearest", axes=(0, 1))


def _clouds(size: tuple[int, int], random: Generator) -> np.ndarray:
    """Noise of all sizes, (h, w) in [0, 1]."""
    total = np.zeros(size)
    for cells in (4, 8, 16, 32, 64):
        coarse = random.random((cells + 1, cells + 1))
        fine = ndimage.zoom(coarse, [(side + 1) / (cells + 1) for side in size], order=1)
        total += fine[: size[0], : size[1]] / cells
    return (total - total.min()) / max(total.max() - total.min(), 1e-9)


def _fog(x: np.ndarray, amount: float, random: Generator) -> np.ndarray:
    height = np.interp(np.linspace(0, 1, len(x)), [0, 0.5, 1], [1, 1, 0.4])[:, None]
    veil = (amount * height * (0.7 + 0.6 * _clouds(x.shape[:2], random))).clip(0, 1)[..., None]
    return x * (1 - veil) + 0.85 * veil


def _frost(x: np.ndarray, share: float, random: Generator) -> np.ndarray:
    ice = _clouds(x.shape[:2], random)
    ice = ndimage.gaussian_filter((ice > np.quantile(ice, 1 - share)).astype(np.float32), len(x) / 256)[..., None]
    crystals = 0.75 + 0.25 * random.random((*x.shape[:2], 1))
    return x * (1 - 0.7 * ice) + 0.7 * ice * crystals


def _dark(x: np.ndarray, strength: tuple[float, float], random: Generator) -> np.ndarray:
    kept, sigma = strength
    return x * kept + random.normal(0, sigma, x.shape)


def _jpeg(x: np.ndarray, quality: int, random: Generator) -> np.ndarray:
    Image.fromarray(_to_bytes(x)).save(file := BytesIO(), "JPEG", quality=quality)
    return np.asarray(Image.open(file), np.float32) / 255


def _pixelate(x: np.ndarray, share: float, random: Generator) -> np.ndarray:
    h, w, _ = x.shape
    small = max(1, round(w * share)), max(1, round(h * share))
    image = Image.fromarray(_to_bytes(x)).resize(small, Image.Resampling.BOX)
    return np.asarray(image.resize((w, h), Image.Resampling.NEAREST), np.float32) / 255


def _to_bytes(x: np.ndarray) -> np.ndarray:
    return (np.clip(x, 0, 1) * 255).round().astype(np.uint8)


Corruption = Callable[[np.ndarray, Any, Generator], np.ndarray]
CORRUPTIONS: dict[str, tuple[Corruption, tuple]] = {  # and its strengths by severity
    # of the sensor: Gaussian noise, too few photons, salt and pepper
    "noise": (lambda x, sigma, random: x + random.normal(0, sigma, x.shape), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot": (lambda x, photons, random: random.poisson(x * photons) / photons, (60, 25, 12, 5, 3)),
    "impulse": (_impulse, (0.03, 0.06, 0.09, 0.17, 0.27)),
    # of the lens, in pixels: a disc of confusion, the camera moves along a line, soft all over
    "defocus": (_defocus, (3, 4, 6, 8, 10)),
    "motion": (_motion, (8, 12, 16, 22, 30)),
    "blur": (_blur, (1, 2, 3, 4, 6)),
    # of the weather: a veil that thickens towards the upper half, ice crystals in front of the lens
    "fog": (_fog, (0.35, 0.45, 0.55, 0.65, 0.75)),
    "frost": (_frost, (0.2, 0.3, 0.4, 0.5, 0.6)),
    # of the light: overexposed, underexposed with the noise that comes with it, everything towards the mean
    "brightness": (lambda x, added, random: x + added, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "dark": (_dark, ((0.6, 0.01), (0.45, 0.015), (0.3, 0.02), (0.2, 0.025), (0.12, 0.03))),
    "contrast": (lambda x, kept, random: (x - x.mean((0, 1))) * kept + x.mean((0, 1)), (0.4, 0.3, 0.2, 0.1, 0.05)),
    # of the file: compressed too hard, too few pixels
    "jpeg": (_jpeg, (25, 18, 15, 10, 7)),
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
}


def corrupt(image: np.ndarray, kind: str, severity: int, name: str = "") -> np.ndarray:
    """An image (h, w, 3) uint8 corrupted; the same for one kind, severity (1 to 5) and name."""
    function, strengths = CORRUPTIONS[kind]
    random = np.random.default_rng([zlib.crc32(f"{kind}/{name}".encode()), severity])
    return _to_bytes(function(image.astype(np.float32) / 255, strengths[severity - 1], random))


def take_apart(text: str) -> tuple[str, str, int]:
    """`DOMAIN~KIND[SEVERITY]` -> domain, kind, severity (3 if none is named); kind "" without a corruption.

    A folder of that name that is there is no corruption. Raises ValueError for an unknown kind or severity.
    """
    domain, _, last = text.rpartition("~")
    found = re.fullmatch(r"([a-z]+)(\d?)", last)
    folder = text.partition("@")[2] or text.partition(":")[2]
    is_folder = domain.endswith(("@", "/")) or os.path.isdir(os.path.expanduser(folder))  # it may begin with ~
    if not domain or not found or is_folder:
        return text, "", 0
    kind, severity = found[1], int(found[2] or 3)
    if kind not in CORRUPTIONS or not 1 <= severity <= 5:
        raise ValueError(
            f"Unknown corruption '{last}' in '{text}' ({nearest(kind, CORRUPTIONS)}): write DOMAIN~KIND[1-5]."
        )
    return domain, kind, severity
