"""Every refiner by name: Rein and SET (`tokens.py`, `variants.py`), and the baselines beside them (`baselines.py`).

All are trained with the same data, head, schedule and seeds. A new refiner is a class and its line in REFINERS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from setlib import baselines, variants
from setlib.files import nearest
from setlib.style import OCTAVES, SourceStyle
from setlib.tokens import Refiner, Rein, SpectralTokens


class Options(NamedTuple):
    """What a refiner may be built with, beside its layers and channels; named as the fields of `experiment.Model`."""

    num_tokens: int = 100  # M, per layer
    rank: int = 16
    query_channels: int = 0  # width D of the queries for a mask head; 0 = none
    any_batch: bool = False  # lets set-released be evaluated at another batch size than it was trained with
    num_prompts: int = 150
    adapter_width: int = 64
    lora_rank: int = 8
    style_layers: Sequence[int] = (1, 2, 3)

    @property
    def tokens(self) -> tuple[int, int, int]:
        """Of the refiners with tokens."""
        return self.num_tokens, self.rank, self.query_channels


def _released_set(layers: Sequence[int], channels: int, options: Options) -> Refiner:
    """SET as released: apart, in the room above that knows the releases, so it is imported when it is asked for."""
    from setlib.release.released_set import ReleasedSpectralTokens

    return ReleasedSpectralTokens(layers, channels, *options.tokens, options.any_batch)


Build = Callable[[Sequence[int], int, Options], Refiner]


def _tokens(kind: Callable[..., Refiner], **fixed: Any) -> Build:
    """How a refiner with tokens is built; fixed: what its name says beside its kind."""
    return lambda layers, channels, options: kind(layers, channels, *options.tokens, **fixed)


def _styled(build: Build, **fixed: Any) -> Build:
    """How a refiner is built behind whose first layers features have the style of the source; fixed: of the style."""

    def built(layers: Sequence[int], channels: int, options: Options) -> Refiner:
        refiner = build(layers, channels, options)
        refiner.style = SourceStyle(options.style_layers, channels, **fixed)
        return refiner

    return built


REFINERS: dict[str, Build] = {
    "none": lambda layers, channels, options: Refiner(),
    "full": lambda layers, channels, options: baselines.FullFineTuning(layers),
    "lora": lambda layers, channels, options: baselines.LowRankAdaptation(layers, options.lora_rank),
    "soma": lambda layers, channels, options: variants.MinorAdaptation(layers),
    "vpt": lambda layers, channels, options: baselines.Prompts(layers, channels, options.num_prompts),
    "adaptformer": lambda layers, channels, options: baselines.Adapters(layers, channels, options.adapter_width),
    "rein": _tokens(Rein),
    "rein-eager": _tokens(variants.EagerRein),
    "fada": _tokens(baselines.WaveletTokens),
    "set": _tokens(SpectralTokens),
    "set-amplitude": _tokens(SpectralTokens, phase=False),
    "set-phase": _tokens(SpectralTokens, amplitude=False),
    "set-unnormalised": _tokens(SpectralTokens, normalise=""),
    "set-tokens": _tokens(SpectralTokens, normalise="tokens"),
    "set-low": _tokens(variants.LowTokens, phase=False),
    "set-channels": _tokens(variants.ChannelSpectra),
    "set-space": _tokens(variants.SpaceResidual),
    "set-phasor": _tokens(variants.PhasorTokens),
    "set-cosine": _tokens(variants.CosineTokens),
    "set-dct": _tokens(variants.CosineTransformTokens),
    "set-placebo": _tokens(variants.RandomBasisTokens),
    "set-released": _released_set,
    "style": _styled(lambda layers, channels, options: Refiner()),
    "style-bands": _styled(lambda layers, channels, options: Refiner(), edges=OCTAVES),
    "style-gains": _styled(lambda layers, channels, options: Refiner(), edges=OCTAVES, gains=True),
    "rein-style": _styled(_tokens(Rein)),
    "set-style": _styled(_tokens(SpectralTokens, phase=False)),  # no phase turns: phase is content
    "set-style-placebo": _styled(_tokens(variants.RandomBasisTokens, phase=False), scrambled=True),
}


def build_refiner(name: str, layers: Sequence[int], channels: int, *options: Any, **named: Any) -> Refiner:
    """The refiner called `name` for features of C channels; layers: that it refines, from 1; options: of `Options`.

    Raises ValueError for an unknown name (the nearest are listed) and for lora without peft.
    """
    if name not in REFINERS:
        raise ValueError(f"Unknown refiner '{name}' ({nearest(name, REFINERS)}).")
    return REFINERS[name](layers, channels, Options(*options, **named))
