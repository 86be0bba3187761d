"""Corruptions of pictures at severities 1 to 5, so that robustness can be measured on any domain, without new data.

`DOMAIN~KIND[SEVERITY]` is the domain corrupted, for example `cityscapes@folder~noise3`; the label stays. They are
simulations: `fog` is no real fog. Source: kinds and severities after ImageNet-C and Cityscapes-C (Hendrycks, ICLR 2019;
Kamann, CVPR 2020), with scipy and Pillow. Departure: sizes in pixels are for pictures about 512 high and scale with
the height; fog and frost are drawn from plain noise, not from photographs.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable
from io import BytesIO

import numpy as np
from PIL import Image
from scipy import ndimage

from setlib.files import nearest

Picture = np.ndarray  # (h, w, 3) float32 in [0, 1]
Random = np.random.Generator


def _noise(x: Picture, s: int, random: Random) -> Picture:
    """Gaussian noise of the sensor."""
    return x + random.normal(0, (0.08, 0.12, 0.18, 0.26, 0.38)[s], x.shape)


def _shot(x: Picture, s: int, random: Random) -> Picture:
    """Too few photons."""
    photons = (60, 25, 12, 5, 3)[s]
    return random.poisson(x * photons) / photons


def _impulse(x: Picture, s: int, random: Random) -> Picture:
    """Salt and pepper."""
    share, drawn = (0.03, 0.06, 0.09, 0.17, 0.27)[s], random.random(x.shape)
    return np.where(drawn < share / 2, 0, np.where(drawn < share, 1, x))


def _defocus(x: Picture, s: int, random: Random) -> Picture:
    """A disc of confusion."""
    radius = (3, 4, 6, 8, 10)[s] * len(x) / 512
    across = np.arange(-np.ceil(radius), np.ceil(radius) + 1)
    disc = (np.hypot(*np.meshgrid(across, across)) <= radius).astype(np.float32)
    return _along(x, lambda channel: ndimage.convolve(channel, disc / disc.sum(), mode="nearest"))


def _motion(x: Picture, s: int, random: Random) -> Picture:
    """The camera moves along a line."""
    length, angle = (8, 12, 16, 22, 30)[s] * len(x) / 512, random.uniform(-np.pi / 4, np.pi / 4)
    steps = np.linspace(-length / 2, length / 2, max(3, int(length) + 1))
    moved = [
        ndimage.shift(x, (d * np.sin(angle), d * np.cos(angle), 0), order=1, mode="nearest", prefilter=False)
        for d in steps
    ]
    return np.mean(moved, axis=0)


def _gaussian(x: Picture, s: int, random: Random) -> Picture:
    """A soft lens."""
    sigma = (1, 2, 3, 4, 6)[s] * len(x) / 512
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")


def _clouds(shape: tuple[int, int], random: Random) -> np.ndarray:
    """Noise of all sizes, (h, w) in [0, 1]."""
    total = sum(
        ndimage.zoom(random.random((2**k + 1, 2**k + 1)), [(n + 1) / (2**k + 1) for n in shape], order=1)[
            : shape[0], : shape[1]
        ]
        / 2**k
        for k in range(2, 7)
    )
    low, high = total.min(), total.max()
    return (total - low) / max(high - low, 1e-9)


def _fog(x: Picture, s: int, random: Random) -> Picture:
    """A veil that thickens towards the upper half."""
    amount = (0.35, 0.45, 0.55, 0.65, 0.75)[s]
    height = np.interp(np.linspace(0, 1, len(x)), [0, 0.5, 1], [1, 1, 0.4])[:, None]
    veil = (amount * height * (0.7 + 0.6 * _clouds(x.shape[:2], random))).clip(0, 1)[..., None]
    return x * (1 - veil) + 0.85 * veil


def _frost(x: Picture, s: int, random: Random) -> Picture:
    """Ice crystals in front of the lens."""
    share = (0.2, 0.3, 0.4, 0.5, 0.6)[s]
    ice = _clouds(x.shape[:2], random)
    ice = ndimage.gaussian_filter((ice > np.quantile(ice, 1 - share)).astype(np.float32), len(x) / 256)[..., None]
    crystals = 0.75 + 0.25 * random.random((*x.shape[:2], 1))
    return x * (1 - 0.7 * ice) + 0.7 * ice * crystals


def _brightness(x: Picture, s: int, random: Random) -> Picture:
    """Overexposed."""
    return x + (0.1, 0.2, 0.3, 0.4, 0.5)[s]


def _dark(x: Picture, s: int, random: Random) -> Picture:
    """Underexposed, with the noise that comes with it."""
    return x * (0.6, 0.45, 0.3, 0.2, 0.12)[s] + random.normal(0, 0.01 + 0.005 * s, x.shape)


def _contrast(x: Picture, s: int, random: Random) -> Picture:
    """Everything towards the mean."""
    mean = x.mean((0, 1))
    return (x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[s] + mean


def _jpeg(x: Picture, s: int, random: Random) -> Picture:
    """Compressed too hard."""
    file = BytesIO()
    Image.fromarray((x * 255).round().astype(np.uint8)).save(file, "JPEG", quality=(25, 18, 15, 10, 7)[s])
    return np.asarray(Image.open(file), np.float32) / 255


def _pixelate(x: Picture, s: int, random: Random) -> Picture:
    """Too few pixels."""
    small = tuple(max(1, round(n * (0.6, 0.5, 0.4, 0.3, 0.25)[s])) for n in x.shape[1::-1])
    picture = Image.fromarray((x * 255).round().astype(np.uint8)).resize(small, Image.Resampling.BOX)
    return np.asarray(picture.resize(x.shape[1::-1], Image.Resampling.NEAREST), np.float32) / 255


def _along(x: Picture, call: Callable[[np.ndarray], np.ndarray]) -> Picture:
    return np.stack([call(channel) for channel in np.moveaxis(x, -1, 0)], -1)


CORRUPTIONS: dict[str, Callable[[Picture, int, Random], Picture]] = {
    "noise": _noise,
    "shot": _shot,
    "impulse": _impulse,
    "defocus": _defocus,
    "motion": _motion,
    "blur": _gaussian,
    "fog": _fog,
    "frost": _frost,
    "brightness": _brightness,
    "dark": _dark,
    "contrast": _contrast,
    "jpeg": _jpeg,
    "pixelate": _pixelate,
}


def corrupt(image: np.ndarray, kind: str, severity: int, name: str = "") -> np.ndarray:
    """A picture (h, w, 3) uint8 corrupted; the same for one kind, severity and name. Raises ValueError if unknown."""
    if kind not in CORRUPTIONS or severity not in range(1, 6):
        raise ValueError(
            f"Unknown corruption '{kind}{severity}': expected {', '.join(CORRUPTIONS)} ({nearest(kind, CORRUPTIONS)}) "
            "and a severity of 1 to 5."
        )
    random = np.random.default_rng([zlib.crc32(f"{kind}/{name}".encode()), severity])
    made = CORRUPTIONS[kind](image.astype(np.float32) / 255, severity - 1, random)
    return (np.clip(made, 0, 1) * 255).round().astype(np.uint8)


def take_apart(text: str) -> tuple[str, str, int]:
    """`DOMAIN~KIND[SEVERITY]` -> domain, kind, severity (3 if none is named); kind "" without a corruption.

    A folder of that name that is there is no corruption.
    """
    domain, mark, last = text.rpartition("~")
    found = re.fullmatch(r"([a-z]+)(\d?)", last)
    there = os.path.isdir(os.path.expanduser(text.partition("@")[2] or text.partition(":")[2]))
    if not mark or not domain or domain.endswith(("@", "/")) or not found or there:  # a folder may begin with ~
        return text, "", 0
    kind, severity = found[1], int(found[2] or 3)
    if kind not in CORRUPTIONS or not 1 <= severity <= 5:
        raise ValueError(
            f"Unknown corruption '{last}' in '{text}' ({nearest(kind, CORRUPTIONS)}): write DOMAIN~KIND[1-5]."
        )
    return domain, kind, severity
