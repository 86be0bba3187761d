"""The configuration of an experiment and its four profiles. No data is read and no model is built here.

Every field is checked by its type when an experiment is made; what a field may be stands beside its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, NonNegativeFloat, PositiveFloat, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from setlib.files import nearest

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Count = Annotated[int, Field(ge=0, lt=2**63)]  # 0 says all, none or off
Positive = Annotated[int, Field(gt=0, lt=2**63)]
Width = Annotated[int, Field(gt=0, le=2**16)]  # of a part of the model
Layers = tuple[Positive, ...]
Names = Annotated[tuple[str, ...], Field(min_length=1)]


def _rate(text: str) -> str:
    if not re.fullmatch(r"[a-z-]+=(\d+\.?\d*|\.\d+)(e-?\d+)?", text) or not float(text.partition("=")[2]):
        raise ValueError(f"Option train.refiner_rates expects NAME=RATE (set=0.1), not '{text}'.")
    return text


def _edge(text: str) -> str:
    name, _, edge = text.partition("=")
    if not name or not re.fullmatch(r"\d+|\d*\.\d+", edge) or not float(edge):
        raise ValueError(f"Option data.eval_edges expects NAME=PIXELS (acdc=960) or NAME=SHARE (0.5), not '{text}'.")
    return text


def _transfer(text: str) -> str:
    if not re.fullmatch(r"\s*\S.*->.*\S\s*", text):
        raise ValueError(f"Option ablation.transfers expects SOURCE -> TARGET TARGET, not '{text}'.")
    return text


@dataclass(frozen=True, config=STRICT)
class Data:
    """Which domains, how many pictures of them, and how pictures are cut for training."""

    source: str = "scenes:game"
    targets: tuple[str, ...] = tuple(f"scenes:{style}" for style in ("clear", "dusk", "night", "fog", "rain", "snow"))
    height: Positive = 224  # of the training crop, the inference window and the rendered scenes, pixels
    width: Positive = 448
    long_edge: Positive = 448  # pictures are resized to it before cropping and before inference
    train_images: Count = 240  # at most this many of the source, evenly spaced; 0 = all
    eval_images: Count = 24  # at most this many of each domain, evenly spaced; 0 = all
    content_seed: Count = 0  # layouts of the rendered scenes
    scale_min: PositiveFloat = 0.75  # random resize before the crop, relative to long_edge
    scale_max: float = 1.75
    max_class_share: float = 0.75  # of one class in a training crop
    photometric: NonNegativeFloat = 1.0  # strength of brightness, contrast, saturation and colour distortion; 0 = off
    eval_edges: tuple[Annotated[str, AfterValidator(_edge)], ...] = ()  # long edge by data set: acdc=960; 0.5 = half
    attenuate: Annotated[float, Field(ge=0, le=1)] = 0.0  # share of low image frequencies taken away, in use as well
    attenuate_below: PositiveFloat = 1 / 16  # radius up to which they are low: 1 = Nyquist
    class_set: str = ""  # a smaller convention to score the 19 classes in: synthia-16, synthia-13; empty = all
    exif_labels: Literal["shown", "stored"] = "shown"  # pixels on which labels of turned pictures were drawn
    on_error: Literal["stop", "skip"] = "stop"  # at a picture that is damaged or has no label
    workers: Count = 0  # processes that decode and augment fresh crops (train.views=0); 0 = the training's own

    def __post_init__(self) -> None:
        if self.scale_max < self.scale_min:
            raise ValueError(f"Option data.scale_max ({self.scale_max}) is below data.scale_min ({self.scale_min}).")

    def edge(self, name: str, own: int) -> int:
        """Long edge, pixels, at which pictures of the data set `name` are predicted; own: that of the picture."""
        edge = dict(text.split("=") for text in self.eval_edges).get(name, str(self.long_edge))
        return max(1, round(float(edge) * own)) if "." in edge else int(edge)


@dataclass(frozen=True, config=STRICT)
class Model:
    """Backbone, refiner and head."""

    backbone: str = "dinov2-small-saliency"
    patch_size: Count = 0  # pixels, to resize the backbone's patches to; 0 = as they are
    refiner: str = "set"
    refined_layers: Layers = (11, 12)  # counted from 1; empty = all
    feature_layers: Layers = (6, 9, 11, 12)  # what the head reads; empty = evenly spaced
    num_tokens: Annotated[int, Field(ge=2, le=2**16)] = 100  # of rein, fada and set, per layer; token 0 only absorbs
    rank: Width = 16
    num_prompts: Width = 150  # of vpt, per layer
    adapter_width: Width = 64
    lora_rank: Width = 8
    style_layers: Layers = (1, 2, 3)  # of refiners with style in their name: behind which features get the source's
    any_batch: bool = False  # lets set-released, whose output depends on the batch, be evaluated at any batch size
    head: Literal["per-pixel", "mask2former"] = "per-pixel"  # mask2former: as many queries as there are tokens
    head_channels: Width = 128
    attention_heads: Width = 8  # of mask2former, as all below
    pixel_layers: Width = 6
    pixel_width: Width = 1024  # of the feed-forward parts of the pixel decoder
    decoder_layers: Width = 9
    decoder_width: Width = 2048

    def __post_init__(self) -> None:
        if self.head == "mask2former" and (self.head_channels % 32 or self.head_channels % self.attention_heads):
            wanted = "a multiple of 32 and of model.attention_heads for mask2former"
            raise ValueError(f"Option model.head_channels must be {wanted}, got {self.head_channels}.")


@dataclass(frozen=True, config=STRICT)
class Train:
    """The training loop, its optimiser and schedule."""

    steps: Positive = 400
    batch_size: Positive = 2  # crops per step, over all processes
    accumulate: Positive = 1  # parts that each process takes its crops of a step in
    views: Count = 320  # augmented crops made once, their frozen features kept; 0 = a fresh crop each time
    mix: Annotated[float, Field(ge=0, le=1)] = 0.0  # share of crops whose amplitudes are mixed with their neighbour's
    mix_layer: Count = 0  # behind which frozen layer that is; 0 = in the pixels
    mix_high: PositiveFloat = 1.5  # radius of the highest frequencies that are mixed: 1 = Nyquist
    agree: NonNegativeFloat = 0.0  # weight of a loss: predictions of mixed crops are to be those of the unmixed ones
    learning_rate: PositiveFloat = 1e-3
    refiner_rates: tuple[Annotated[str, AfterValidator(_rate)], ...] = ("set=0.1",)  # in units of the head's rate
    weight_decay: NonNegativeFloat = 0.05  # none on tokens, norms, biases and scales
    warmup: Count = 0  # first steps, in which the learning rate rises evenly
    power: NonNegativeFloat = 0.9  # of the polynomial decay after them
    clip_norm: NonNegativeFloat = 1.0  # largest gradient norm; 0 = off
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0  # decay of the moving average of the weights; 0 = off
    last: Count = 0  # last steps whose weights are averaged evenly, whatever ema says; 0 = off
    checkpoint_every: Positive = 100  # steps
    validate_every: Count = 0  # steps between scores on other source pictures, before ema; 0 = never. Chooses nothing
    validate_on: str = ""  # a domain of the source's data set: gtav:val@folder; empty = what its name gives for scoring
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto = bfloat16 where it is faster
    checkpointing: bool = False  # keeps only the input of each layer for the gradient: less memory, more time

    def __post_init__(self) -> None:
        if self.agree and not (self.mix and self.mix_layer):
            raise ValueError("Option train.agree compares mixed crops: it needs train.mix and train.mix_layer.")
        if self.warmup >= self.steps:
            raise ValueError(f"Option train.warmup ({self.warmup}) must be below train.steps ({self.steps}).")

    def refiner_rate(self, name: str, own: float) -> float:
        """Learning rate of the refiner `name` in units of the head's: its entry, that of its family, or its own."""
        rates = dict(text.split("=") for text in self.refiner_rates)
        return float(rates.get(name, rates.get(name.partition("-")[0], own)))


@dataclass(frozen=True, config=STRICT)
class Inference:
    """How a picture is predicted: whole or in windows of data.height x data.width, averaged where they overlap."""

    whole: bool = False
    stride: Annotated[float, Field(gt=0, le=1)] = 2 / 3  # from window to window, as a share of it; 1 = no overlap
    windows: Positive = 8  # at most so many at once
    scales: Annotated[tuple[Annotated[float, Field(gt=0, le=16)], ...], Field(min_length=1)] = (1.0,)  # of long_edge
    flip: bool = False  # averaged with the prediction of the mirrored picture


@dataclass(frozen=True, config=STRICT)
class Ablation:
    """Variants x seeds x (source -> targets); `overrides` make each training smaller than the main one."""

    variants: Names = (  # refiners with any options behind them: "set model.rank=4"
        *("none", "rein", "set", "set-amplitude", "set-phase", "style", "set-style"),
    )
    baseline: str = ""  # the variant that the others are compared with; empty: the first
    seeds: Annotated[tuple[Count, ...], Field(min_length=1)] = (0, 1)
    transfers: tuple[Annotated[str, AfterValidator(_transfer)], ...] = ()  # "SOURCE -> TARGET ..."; empty: the run's
    lengths: Annotated[tuple[Positive, ...], Field(min_length=1)] = (25, 100)  # steps, of the learning curve
    overrides: tuple[str, ...] = ("train.steps=50", "train.views=120", "train.batch_size=2", "data.eval_images=6")

    def __post_init__(self) -> None:
        if self.baseline and self.baseline not in self.variants:
            known = ", ".join(self.variants)
            raise ValueError(f"Option ablation.baseline is '{self.baseline}', which is none of the variants {known}.")


@dataclass(frozen=True, config=STRICT)
class Experiment:
    """Everything that decides a run's numbers. `build` makes one from a profile and options.

    Source: the fields' defaults are the profile `quick`; those of `paper` are the released configurations'.
    """

    profile: str = "quick"
    seed: Count = 0
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    inference: Inference = field(default_factory=Inference)
    ablation: Ablation = field(default_factory=Ablation)

    def __post_init__(self) -> None:
        if self.train.validate_every and self.model.refiner == "set-released" and not self.model.any_batch:
            raise ValueError("Validation predicts one picture at a time: set-released needs model.any_batch=true here.")

    @classmethod
    def build(
        cls,
        profile: str = "quick",
        source: str | None = None,
        targets: Sequence[str] | str | None = None,
        seed: int | None = None,
        overrides: Sequence[str] | str = (),
    ) -> Experiment:
        """A profile with domains, a seed and options put in.

        Parameters
        ----------
        source, targets : domains, name[:split][@folder][~corruption]; None or empty: the profile's.
        overrides : dotted `key=value` options such as "model.refiner=rein"; one text is a list of one.

        Raises
        ------
        ValueError : an unknown profile or option (the nearest are named), or a value that cannot be.
        """
        if profile not in PROFILES:
            raise ValueError(f"Unknown profile '{profile}': expected one of {', '.join(PROFILES)}.")
        targets = [targets] if isinstance(targets, str) and targets else targets
        overrides = [overrides] if isinstance(overrides, str) and overrides else overrides
        values = PROFILES[profile].to_dict()
        data = values["data"]
        data |= {"source": source or data["source"], "targets": [*(targets or data["targets"])]}
        if not data["source"] or not data["targets"]:
            raise ValueError(f"Profile {profile} has no domains of its own: name yours with --source and --target.")
        experiment = _checked(values | ({} if seed is None else {"seed": seed}), strict=False)
        return experiment.override(*overrides)

    def override(self, *options: str) -> Experiment:
        """This experiment with dotted `key=value` options put in. Raises ValueError as `build` does."""
        made = self._with(options)
        for variant in made.ablation.variants:
            made._with([*made.ablation.overrides, *variant.split()[1:]])  # must be possible too
        return made

    def _with(self, options: Sequence[str]) -> Experiment:
        values, known = self.to_dict(), [key for key in self.flat() if key != "profile"]
        for text in options:
            key, equals, value = text.partition("=")
            if not equals:
                raise ValueError(f"Option '{text}' is not KEY=VALUE: write for example model.refiner=rein.")
            if key not in known:
                raise ValueError(f"Unknown option '{key}' ({nearest(key, known)}).")
            group, _, name = key.rpartition(".")
            place = values[group] if group else values
            parts = [part.strip() for part in re.split(COMMAS.get(key, ","), value) if part.strip()]
            place[name] = parts if isinstance(place[name], list) else value
        return _checked(values, strict=False)

    @property
    def transfers(self) -> list[tuple[str, tuple[str, ...]]]:
        """Source and targets of every part of the ablation."""
        pairs = [text.partition("->") for text in self.ablation.transfers]
        own = [(self.data.source, self.data.targets)]
        return [(source.strip(), tuple(targets.split())) for source, _, targets in pairs] or own

    def flat(self) -> dict[str, Any]:
        """Every field by its dotted name, as plain JSON types."""
        values: dict[str, Any] = {}
        for key, value in self.to_dict().items():
            values |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        return values

    def to_dict(self) -> dict:
        """As plain JSON types."""
        return TypeAdapter(Experiment).dump_python(self, mode="json")

    @classmethod
    def from_dict(cls, values: dict) -> Experiment:
        """The inverse of `to_dict`; what is missing has its default value. Raises ValueError if a field is unknown."""
        train = values.get("train", {})
        if isinstance(train, dict):
            train = {"refiner_rates": []} | {k: v for k, v in train.items() if k not in RETIRED}  # older: one rate
        return _checked(values | {"train": train}, strict=True)


COMMAS = {  # between items that may be lists themselves: before an option, before a refiner's name
    "ablation.overrides": r",(?=\s*(?:seed|\w+\.\w+)=)",
    "ablation.variants": r",(?=\s*[a-z][a-z-]*\s*(?:$|,|\s\w+\.\w+=))",
}
RETIRED = ("shard", "compile", "cache_gb")  # options of older trainings; they changed no result


def _checked(values: dict, strict: bool) -> Experiment:
    """An experiment of these values, or the first of its problems as one sentence."""
    try:
        return TypeAdapter(Experiment).validate_json(json.dumps(values), strict=strict)
    except ValidationError as error:
        first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "value_error":
        raise ValueError(str(first["ctx"]["error"])) from None
    if first["type"] == "unexpected_keyword_argument":
        raise ValueError(f"This configuration is not one of this version of setlib (unknown: {key}).") from None
    should = re.sub(r"^\w+ (?=should)| after validation.*|, unable.*", "", first["msg"])
    raise ValueError(f"Option {key} {should}, got {first['input']!r}.") from None


_stored = json.loads(Path(__file__).with_name("profiles.json").read_text(encoding="utf-8"))
# What is not named in a profile has the default of its field, which is that of quick
PROFILES = {name: _checked({"profile": name, **groups}, strict=True) for name, groups in _stored.items()}
