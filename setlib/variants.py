"""SET's design questions one by one, what a name's refiner does otherwise than SET and nothing more; and a rival.

Those that differ in one argument alone (`set-tokens`, `set-amplitude` ...) are a line in `refiners.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from setlib import spectral
from setlib._kernels import join_spectrum, split_spectrum
from setlib.spectral import PIXELS, Spectrum, change_phase, is_empty, mirror_rows, own_partners
from setlib.style import turned
from setlib.tokens import LowRankTokens, Refiner, Rein, SpectralTokens, TokenBranch, TokenQueries

TEMPERATURE = 10.0  # at the start, of cosine similarities: at C = 384 these spread by 1 / sqrt(C) = 0.05
SOMA_RANK = 16  # of each linear map. Source: SoMA
LOW = 1 / 8  # radius: 1 = Nyquist
SHORTEST = 0.1  # length below which a sum of phasors has no direction; a gradient grows tenfold at most


class ChannelSpectra(SpectralTokens):
    """SET over the channels of each patch instead of over the grid.

    Is it the spatial frequency that helps? This has none: it is what the released code would take if it did not mix the
    images of a batch. A patch is a position, its C // 2 + 1 bins are the tokens' channels. Bins that are their own
    partners, 0 and C / 2, stay real: their phase is kept.
    """

    def __init__(self, layers: Sequence[int], channels: int, num_tokens: int, rank: int, query_channels: int) -> None:
        super().__init__(layers, channels // 2 + 1, num_tokens, rank, query_channels)

    def refine_spectrum(self, features: Tensor, layer: int) -> Spectrum:
        """The refined half spectrum of every patch of features (B, H, W, C): both parts (B, H * W, 1, C // 2 + 1)."""
        amplitude, phase = spectral.split_spectrum(features.flatten(1, 2)[:, :, None], PIXELS)
        index, branches, channels = self.layers.index(layer), self.branches(), features.shape[-1]
        real = own_partners(channels)[: channels // 2 + 1].to(phase.device)
        phase = phase + _beta(branches["phase"], phase, index).masked_fill(real, 0)
        return Spectrum((amplitude + _beta(branches["amplitude"], amplitude, index)).relu(), phase)

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        refined = spectral.join_spectrum(self.refine_spectrum(features, layer), (1, features.shape[-1]), PIXELS)
        return refined.view_as(features).to(features.dtype)


class SpaceResidual(SpectralTokens):
    """f + s * inverse(beta(alpha), beta(rho)): the residual is in space, as in the released code and in Rein.

    The paper adds beta to the parts of the spectrum; there a step of the amplitude is tied to the phase that it has.
    Here the change is a signal of its own. s is a learnable scalar from 1e-3, the maps start as Rein's. Departure from
    the release: the spectrum is that of a real signal over the grid; a bin that is its own partner keeps its sign.
    """

    def __init__(self, layers: Sequence[int], channels: int, num_tokens: int, rank: int, query_channels: int) -> None:
        super().__init__(layers, channels, num_tokens, rank, query_channels)
        for branch in self.branches().values():
            branch.delta_map.reset_parameters()
        self.scale = nn.Parameter(torch.tensor(1e-3))

    def refine_spectrum(self, features: Tensor, layer: int) -> Spectrum:
        """The half spectrum of what is added to features (B, H, W, C), without the scale."""
        amplitude, phase = split_spectrum(features)
        index, branches = self.layers.index(layer), self.branches()
        change = _beta(branches["phase"], phase, index) - phase
        phase = change_phase(phase, change, features.shape[2])
        return Spectrum(_beta(branches["amplitude"], amplitude, index).relu(), phase)

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        delta = join_spectrum(self.refine_spectrum(features, layer), (features.shape[1], features.shape[2]))
        return features + (self.scale * delta).to(features.dtype)


class PhasorTokens(SpectralTokens):
    """Phase tokens read and move points of the unit circle in place of angles: p becomes normalise(p + beta(p)).

    A wrapped angle jumps from pi to -pi, where the phase does not: two neighbours look far apart to SET's tokens. A
    phasor (cos, sin) has no jump; its tokens have 2 C channels. Columns that hold both partners are made Hermitian.
    Where the sum is shorter than SHORTEST it has no direction: the phase stays, and passes on no gradient of beta.
    """

    def __init__(self, layers: Sequence[int], channels: int, num_tokens: int, rank: int, query_channels: int) -> None:
        super().__init__(layers, channels, num_tokens, rank, query_channels)
        self.phase = TokenBranch(LowRankTokens(len(layers), num_tokens, 2 * channels, rank), 2 * channels, zero=True)
        self.query_map = TokenQueries(2 * channels, query_channels) if query_channels else None

    def refine_spectrum(self, features: Tensor, layer: int) -> Spectrum:
        """The refined half spectrum of features (B, H, W, C): amplitude >= 0, and phase in radians."""
        amplitude, phase = split_spectrum(features)  # (B, H, W // 2 + 1, C) each
        index, branches, width = self.layers.index(layer), self.branches(), features.shape[2]
        phasor = torch.complex(phase.cos(), phase.sin())
        change = _beta(branches["phase"], torch.cat([phasor.real, phasor.imag], -1), index)  # (B, H, W // 2 + 1, 2 C)
        change = torch.complex(*change.to(phase.dtype).chunk(2, -1))
        both = own_partners(width)[: width // 2 + 1, None].to(phase.device)
        moved = phasor + torch.where(both, (change + mirror_rows(change).conj()) / 2, change)
        moved = torch.where(moved.detach().abs() < SHORTEST, phasor, moved)
        return Spectrum((amplitude + _beta(branches["amplitude"], amplitude, index)).relu(), moved.angle())


class CosineAttention(TokenBranch):
    """A branch that attends by cosine similarity times a learnable temperature, in place of x T^t / sqrt(C).

    Fresh tokens are short, 0.01 in a channel, so that SET's plain attention over phases is all but even and every place
    is given the same mix. A cosine knows no length, and the temperature says how far places may differ.
    """

    def __init__(self, tokens: LowRankTokens, channels: int, zero: bool = False) -> None:
        super().__init__(tokens, channels, zero=zero)
        self.temperature = nn.Parameter(torch.tensor(TEMPERATURE))

    def _attend(self, x: Tensor, tokens: Tensor) -> Tensor:
        similarity = F.normalize(x, dim=-1, eps=1e-3) @ F.normalize(tokens, dim=-1, eps=1e-3).T  # (B, P, M)
        return (self.temperature * similarity).softmax(-1)


class CosineTokens(SpectralTokens):
    """SET whose phase branch attends by cosine (`CosineAttention`), so that places can be given different things."""

    def __init__(self, layers: Sequence[int], channels: int, num_tokens: int, rank: int, query_channels: int) -> None:
        super().__init__(layers, channels, num_tokens, rank, query_channels)
        self.phase = CosineAttention(LowRankTokens(len(layers), num_tokens, channels, rank), channels, zero=True)


class CosineTransformTokens(Refiner):
    """SET's amplitude branch on the magnitudes of the cosine transform over the grid; their signs are kept.

    A cosine transform is real: all of what the Fourier transform keeps in the phase is a sign here, which tokens cannot
    turn. Its waves end with the picture instead of going round it. Where there is nothing but rounding (`is_empty`)
    the sign would be chance: there stays 0. Source: Causal-Tune (AAAI 2026), for the transform alone.
    """

    linked = "magnitude"

    def __init__(self, layers: Sequence[int], channels: int, num_tokens: int, rank: int, query_channels: int) -> None:
        super().__init__(layers, channels, query_channels)
        tokens = LowRankTokens(len(layers), num_tokens, channels, rank)
        self.magnitude = TokenBranch(tokens, channels, normalise="positions", zero=True)

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        waves = to_cosines(features)
        magnitude, sign = waves.abs(), waves.sign().masked_fill(is_empty(waves.detach().abs()), 0)
        refined = (magnitude + _beta(self.magnitude, magnitude, self.layers.index(layer))).relu()
        return to_cosines(sign * refined, back=True).to(features.dtype)


class LowTokens(SpectralTokens):
    """SET's amplitude branch at frequencies up to radius LOW alone: all that tokens of style need, if style is there.

    Behind layers 1 to 3 that is where style leads in amplitudes (notebook 02); later it leads nowhere.
    """

    def refine_spectrum(self, features: Tensor, layer: int) -> Spectrum:
        """The refined half spectrum of features (B, H, W, C): amplitude >= 0, and phase in radians."""
        refined, (amplitude, phase) = super().refine_spectrum(features, layer), split_spectrum(features)
        low = spectral.frequency_radius((features.shape[1], features.shape[2])) <= LOW  # (H, W // 2 + 1)
        return Spectrum(torch.where(low[..., None].to(features.device), refined.amplitude, amplitude), phase)


class RandomBasisTokens(SpectralTokens):
    """SET's placebo: the same refiner over a random orthonormal basis of the positions in place of the Fourier basis.

    Random signs and a random order of the positions, one for each number of them, then SET, then back: as many
    parameters, as much work, real spectra, but no bin is a place or a frequency. What it gains, frequency did not.
    """

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return turned(super().forward(turned(features), layer), back=True)


class EagerRein(Rein):
    """Rein whose scale starts a hundred times larger: what starts small hardly moves in a short training."""

    start = 0.1


class MinorComponents(nn.Module):
    """The smallest singular components of a weight (O, I) as factors B A that learn, added to what is left of it."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        u, values, v = torch.linalg.svd(weight.double(), full_matrices=False)  # largest values first
        root = values[-rank:].sqrt()
        self.b = nn.Parameter((u[:, -rank:] * root).to(weight.dtype))  # (O, r)
        self.a = nn.Parameter((root[:, None] * v[-rank:]).to(weight.dtype))  # (r, I)

    def forward(self, rest: Tensor) -> Tensor:
        """The weight (O, I)."""
        return rest + self.b @ self.a


class MinorAdaptation(Refiner):
    """SoMA: of every linear map of the refined layers the SOMA_RANK smallest singular components learn, W = W' + B A.

    What a backbone generalises with lies in its large components, which stay; LoRA's change may fall on any. Biases are
    frozen, and so are the blocks that are not refined. Source: SoMA (CVPR 2025). Departure: no decay of the factors.
    """

    inside = True

    def adapt(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        """Splits the weights of all linear maps of the refined layers; the function stays what it was."""
        for number in self.layers:
            for linear in [m for m in layers[number - 1].modules() if isinstance(m, nn.Linear)]:
                minor = MinorComponents(linear.weight.detach(), SOMA_RANK)
                linear.weight.data -= (minor.b @ minor.a).detach()
                parametrize.register_parametrization(linear, "weight", minor)


def _beta(branch: TokenBranch, part: Tensor, index: int) -> Tensor:
    """beta of a part of a spectrum, of its shape; axes 1 and 2 are the positions."""
    return branch(part.flatten(1, 2), index).view(part.shape)


def to_cosines(x: Tensor, back: bool = False) -> Tensor:
    """The orthonormal cosine transform (DCT-II) over the patch grid, (B, H, W, C) -> (B, H, W, C), or its inverse."""
    x = x if x.dtype == torch.float64 else x.float()
    rows, columns = (cosine_basis(length).to(x) for length in x.shape[1:3])
    rows, columns = (rows.T, columns.T) if back else (rows, columns)
    with torch.autocast(x.device.type, enabled=False):
        return torch.matmul(columns, torch.matmul(rows, x.flatten(2)).view_as(x))


@lru_cache(maxsize=32)
def cosine_basis(length: int) -> Tensor:
    """The DCT-II as an orthogonal matrix (u, place), float64."""
    frequency = torch.arange(length, dtype=torch.float64)
    basis = math.sqrt(2 / length) * torch.cos(math.pi / length * frequency[:, None] * (frequency + 0.5))
    basis[0] /= math.sqrt(2)
    return basis
