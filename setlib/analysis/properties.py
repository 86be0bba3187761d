"""What every refiner keeps and what it breaks, by name: measured with random features, in double precision."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from setlib.refiners import REFINERS, build_refiner
from setlib.spectral import GRID, PIXELS, frequency_radius, invert, transform
from setlib.tokens import Refiner, SpectralTokens
from setlib.variants import ChannelSpectra
from setlib.weights.load import load_backbone

LAYER, SIZE, PATCH = 2, (8, 12), 8  # the grid; patch size of the tiny backbone, pixels
CHANNELS = 3 * PATCH**2  # so that the same numbers are the pixels of a picture too
MOVED = 0.05  # deviation of the noise on all that learns: about the size of fresh tokens and maps
COLUMNS = ("batch mates", "order", "patches of others", "inverse", "real signal", "identity at the start")
LIMIT, EVEN = 0.01, 0.999  # above these a property does not hold, and an attention's entropy is that of even shares


class Subject(nn.Module):
    """A refiner behind layer LAYER; one that works inside it comes with the tiny backbone, which reads x as pixels."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.refiner = build_refiner(name, (LAYER,), CHANNELS, any_batch=True, style_layers=(LAYER,))
        if self.refiner.style is not None:
            source = draw_features(3)
            self.refiner.style.observe(torch.cat([source, 2 * source, source + 1]), LAYER, styles=3)
        if self.refiner.inside:
            self.plain = load_backbone("tiny-random")
            self.refiner = build_refiner(name, (LAYER,), self.plain.channels)
            self.backbone = self.plain.adapted(self.refiner.adapt)
        self.double().eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features and what is added to them, (B, H, W, C); x: (B, H, W, CHANNELS), the features or their pixels."""
        if not self.refiner.inside:
            styled = x if self.refiner.style is None else self.refiner.style(x, LAYER)
            return x, self.refiner(styled, LAYER) - x
        images = nn.PixelShuffle(PATCH)(x.permute(0, 3, 1, 2)).sigmoid()  # (B, 3, h, w)
        features = self.plain(images, layers=[LAYER])[LAYER]
        return features, self.backbone(images, self.refiner, [LAYER])[LAYER] - features


@torch.no_grad()
def properties(name: str, seed: int = 0) -> dict[str, Any]:
    """One refiner's row, its learnt values moved by noise; nan where a property has no meaning for it.

    "batch mates", "order", "patches of others": how far what is added to an image changes, in units of its length, when
    the other image of the batch is another, stands before it, or has its patches shuffled. "identity at the start":
    before any move, the length of what is added in units of the features'. The others: the `measure_` functions.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        x, subject = draw_features(3), Subject(name)
        pair, order = x[:2], torch.randperm(math.prod(SIZE))
        features, added = subject(pair)
        start = float(added.norm() / features.norm())
        attention = measure_attention(subject.refiner, pair)
        for p in subject.parameters():
            p.add_(MOVED * torch.randn_like(p) if p.requires_grad else 0)
    alone = subject(pair)[1][0]
    shuffled = torch.stack([x[0], x[1].flatten(0, 1)[order].view_as(x[1])])
    company = (x[[0, 2]], 0), (pair.flip(0), 1), (shuffled, 0)  # and the place of the image in it
    differences = torch.stack([(subject(batch)[1][place] - alone).norm() for batch, place in company])
    shares = (differences / alone.norm().clamp(min=1e-12)).tolist()
    shares += [measure_inverse(subject.refiner, x[:1]), measure_spectrum(subject.refiner, pair), start]
    return {"refiner": name, **dict(zip(COLUMNS, shares, strict=True)), "attention": attention}


def table(names: Iterable[str] = REFINERS) -> list[dict[str, Any]]:
    """A row of `properties` for each name."""
    return [properties(name) for name in names]


def readable(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `properties` with the attention in words: by branch its entropy and, in brackets, the deviation."""
    return [
        row | {"attention": ", ".join(f"{b} {mean:.5f} ({std:.5f})" for b, (mean, std) in row["attention"].items())}
        for row in rows
    ]


def draw_features(count: int) -> Tensor:
    """Random features (count, H, W, CHANNELS) that fall with frequency, as a picture's do."""
    noise = transform(torch.randn(count, *SIZE, CHANNELS, dtype=torch.float64))
    return invert(noise / (0.1 + frequency_radius(SIZE)[..., None]), SIZE)


def measure_attention(refiner: Refiner, x: Tensor) -> dict[str, tuple[float, float]]:
    """By branch: entropy of the shares of the tokens, 1 = even; its mean and its deviation over the positions of x."""
    refiner, inputs = copy.deepcopy(refiner), dict[nn.Module, Any]()
    for branch in refiner.branches().values():
        branch.register_forward_pre_hook(inputs.__setitem__)
    refiner(x, LAYER)
    shares = {name: branch.attention(*inputs[branch]) for name, branch in refiner.branches().items()}  # (B, P, M)
    entropies = {name: torch.special.entr(s).sum(-1) / math.log(s.shape[-1]) for name, s in shares.items()}
    return {name: (entropy.mean().item(), entropy.std().item()) for name, entropy in entropies.items()}


def measure_inverse(refiner: Refiner, x: Tensor) -> float:
    """Relative error of what comes back of x if the tokens change nothing; nan for a refiner without a transform."""
    if set(refiner.branches()) <= {"patches"}:
        return math.nan
    refiner, scale = copy.deepcopy(refiner), getattr(refiner, "scale", None)
    for branch in refiner.branches().values():
        for p in branch.parameters():
            p.zero_()  # beta(x) = 0
        if scale is not None:  # f + s * inverse(beta)
            nn.init.eye_(branch.delta_map.weight)  # beta(x) = x
    again = refiner(x, LAYER) if scale is None else (refiner(x, LAYER) - x) / scale
    return ((again - x).norm() / x.norm()).item()


def measure_spectrum(refiner: Any, x: Tensor) -> float:
    """Relative error of refined amplitudes after a way to space and back: 0 for a real signal's, none negative."""
    if not hasattr(refiner, "refine_spectrum"):
        return math.nan
    amplitude, phase = refiner.refine_spectrum(x, LAYER)
    waves = torch.polar(amplitude, phase)
    if isinstance(refiner, SpectralTokens):
        size, axes = ((1, CHANNELS), PIXELS) if isinstance(refiner, ChannelSpectra) else (SIZE, GRID)
        again = transform(invert(waves, size, axes), axes).abs()
    else:  # as released: over batch and channel
        again = torch.fft.fft2(torch.fft.irfft2(waves, s=(len(x), CHANNELS), dim=(1, 2)), dim=(1, 2)).abs()
    return ((again - amplitude).norm() / amplitude.norm()).item()


def say(rows: list[dict[str, Any]]) -> str:
    """Two sentences: which refiners break which property, and whose attention is even."""
    broken = [f"{key} ({row['refiner']}: {row[key]:.2g})" for key in COLUMNS for row in rows if row[key] > LIMIT]
    even = [f"{row['refiner']}'s {b}" for row in rows for b, (mean, _) in row["attention"].items() if mean > EVEN]
    return (
        f"Of {len(rows)} refiners all keep every property but these: {', '.join(broken) or 'none'}. "
        f"Before training, attention is all but even over the tokens in: {', '.join(even) or 'none'}."
    )
