"""The style of the source, kept as levels of amplitudes per channel and put in place of every picture's own.

Nothing here learns by gradients. Where style is was measured first (notebook 02): behind early layers it sits in the
amplitude at zero frequency and in how large the others are, while their shape and all phases hold content.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from setlib import spectral
from setlib.data.corruptions import corrupt

if TYPE_CHECKING:
    from setlib.data.crops import RandomCrops
    from setlib.segmenter import Segmenter

TINY = 1e-6  # an amplitude at or below it is none
CROPS, AGAIN = 64, 3  # that a style is taken from, and how often each is restyled for the gains
RESTYLES = ("dark", "fog", "contrast", "brightness", "noise", "blur")  # of `data.corruptions`
OCTAVES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # edges of bands of frequencies; 1 = Nyquist, corners lie beyond it


class SourceStyle(nn.Module):
    """Brings the amplitudes of features behind some first layers to the level that they have on the source.

    Per channel: the amplitude at zero frequency (the mean over the patches) becomes the source's, and those of each
    band are scaled together until their energy is the source's (with one band, by Parseval: the variance over the
    patches); no phase turns. Every picture is brought there by its own statistics alone, in training as in use. Until
    it is fitted it changes nothing. Source: AdaIN (Huang & Belongie, ICCV 2017), here towards the source's mean style.

    With gains, what content says is kept: a statistic goes only so far to the source's as restyling the source's
    pictures moves it, 1 - (variance by content) / (variance by content + by style), in closed form (Wiener's filter).

    Parameters
    ----------
    layers : numbers, from 1, behind which it stands. channels: C.
    edges : of the bands, radii; without any, all frequencies but zero are one band.
    gains : whether restyled pictures are needed to fit it.
    scrambled : all of it over a random orthonormal basis of the positions in place of the waves, a placebo.
    """

    mean: Tensor
    level: Tensor
    mean_kept: Tensor
    level_kept: Tensor
    fitted: Tensor

    def __init__(
        self,
        layers: Sequence[int],
        channels: int,
        edges: Sequence[float] = (),
        gains: bool = False,
        scrambled: bool = False,
    ) -> None:
        super().__init__()
        self.layers, self.edges, self.gains, self.scrambled = tuple(layers), tuple(edges), gains, scrambled
        bands = len(self.edges) + 1
        for name, shape in (("mean", (channels,)), ("level", (bands, channels))):  # level: logarithm, root mean square
            self.register_buffer(name, torch.zeros(len(self.layers), *shape))
            self.register_buffer(f"{name}_kept", torch.zeros(len(self.layers), *shape))  # of its distance to the source
        self.register_buffer("fitted", torch.zeros(len(self.layers), dtype=torch.bool))

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), behind frozen layer `layer`."""
        index = self.layers.index(layer)
        if not self.fitted[index]:
            return features
        x = features if features.dtype == torch.float64 else features.float()
        x = turned(x) if self.scrambled else x
        mean, level = self.statistics(x)
        away = (self.level[index] - level).where(self.level[index] > math.log(2 * TINY), 0)  # 0 where no bin was seen
        gain = ((1 - self.level_kept[index]) * away).exp()  # (B, bands, C)
        goal = self.mean[index] + self.mean_kept[index] * (mean - self.mean[index])  # (B, C)
        x = x - mean[:, None, None]
        if self.edges:
            waves = spectral.transform(x) * gain[:, self._bands(x)]
            x = spectral.invert(waves, (x.shape[1], x.shape[2]))
        else:
            x = x * gain[:, None]
        x = x + goal[:, None, None]
        return (turned(x, back=True) if self.scrambled else x).to(features.dtype)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over the patches (B, C) and, by band, the logarithm of the root of the energy, (B, bands, C)."""
        mean = x.mean((1, 2))
        if not self.edges:
            return mean, (x - mean[:, None, None]).square().mean((1, 2))[:, None].clamp(min=TINY**2).log() / 2
        width, bands = x.shape[2], self._bands(x)
        stands_for = torch.where(spectral.own_partners(width)[: width // 2 + 1], 1.0, 2.0).to(x.device)  # so many bins
        energy = spectral.transform(x - mean[:, None, None]).abs().square() * stands_for[:, None]
        total = energy.new_zeros(len(x), len(self.edges) + 1, x.shape[3])
        total.index_add_(1, bands.flatten(), energy.flatten(1, 2))
        return mean, (total / math.prod(x.shape[1:3])).clamp(min=TINY**2).log() / 2

    def observe(self, features: Tensor, layer: int, styles: int = 1) -> None:
        """Takes statistics of the source from features of its pictures, (styles * N, H, W, C), behind a layer.

        The first N are the pictures as they are, the others the same ones restyled.
        """
        index, x = self.layers.index(layer), turned(features.float()) if self.scrambled else features.float()
        for name, values in zip(("mean", "level"), self.statistics(x), strict=True):
            values = values.unflatten(0, (styles, -1))  # (S, N, ...)
            getattr(self, name)[index] = values[0].mean(0)
            if self.gains:
                by_style = values.var(0).mean(0)
                by_content = (values.mean(0).var(0) - by_style / styles).clamp(min=0)
                getattr(self, f"{name}_kept")[index] = by_content / (by_content + by_style).clamp(min=TINY**2)
        self.fitted[index] = True

    def _bands(self, x: Tensor) -> Tensor:
        """The band of each bin of x's half spectrum, (H, W // 2 + 1)."""
        radius = spectral.frequency_radius((x.shape[1], x.shape[2]))
        return torch.bucketize(radius, torch.tensor(self.edges)).to(x.device)


def kind(style: SourceStyle | None) -> tuple:
    """What a style is before it is fitted: its layers, bands, and whether it has gains or is a placebo; () for none."""
    return () if style is None else (style.layers, style.edges, style.gains, style.scrambled)


def same(one: SourceStyle | None, other: SourceStyle | None) -> bool:
    """Whether two styles, or none, change features alike."""
    if one is other or one is None or other is None:
        return one is other
    return kind(one) == kind(other) and all(map(torch.equal, one.buffers(), other.buffers()))


def turned(x: Tensor, back: bool = False, seed: int = 0, signed: bool = True) -> Tensor:
    """Features (B, H, W, C) over a random orthonormal basis of the positions, or, with `back`, from there.

    It has no place and no frequency: random signs (not without `signed`) in a random order of the positions.
    """
    order, signs = (part.to(x.device) for part in random_basis(x.shape[1] * x.shape[2], seed))
    signs, flat = (signs if signed else signs.abs()).to(x.dtype), x.flatten(1, 2)
    return (flat[:, order.argsort()] * signs if back else (flat * signs)[:, order]).view_as(x)


@lru_cache(maxsize=32)
def random_basis(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random order of so many positions, (N,) int64, and random signs, (N, 1) float32."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    return order, torch.randint(0, 2, (count, 1), generator=generator) * 2.0 - 1


@torch.no_grad()
def fit_style(model: Segmenter, crops: RandomCrops, known: SourceStyle | None = None) -> None:
    """Gives the model's refiner, if it has a style that is not fitted yet, that of the first crops of its source.

    Layer by layer, so that each sees what it will see: features that the layers before have brought to the style.
    known: the style of these crops that another model has; one of its kind is taken over.
    """
    style = model.refiner.style
    if style is None or style.fitted.all():
        return
    if known is not None and kind(known) == kind(style):
        style.load_state_dict(known.state_dict())
        return
    images = [crops[i].image for i in range(CROPS)]
    again = [restyled(image, place * CROPS + i) for place in range(AGAIN) for i, image in enumerate(images)]
    parts = torch.stack(images + again * style.gains).split(model.experiment.inference.windows)
    with model.autocast():
        for layer in style.layers:
            given = (part.to(model.device).float() / 255 for part in parts)
            maps = [model.backbone.frozen_features(one, layer, (layer,), style=style).maps[layer] for one in given]
            style.observe(torch.cat(maps), layer, 1 + AGAIN * style.gains)


def restyled(image: Tensor, number: int) -> Tensor:
    """A crop (3, h, w) uint8 in other light, weather or focus; which, the number says."""
    picture = corrupt(image.permute(1, 2, 0).numpy(), RESTYLES[number % len(RESTYLES)], 3, str(number))
    return torch.from_numpy(picture).permute(2, 0, 1)
