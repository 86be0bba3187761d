"""The configuration of an experiment, its four profiles, and the run folder that holds what it makes.

No data is read and no model is built here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
import types
import typing
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path

from setlib.files import PROJECT, load_json, nearest, peak_bytes, plain, write_atomic


@dataclass(frozen=True)
class Data:
    """Which domains, how many pictures of them, and how pictures are cut for training."""

    source: str = "scenes:game"
    targets: tuple[str, ...] = tuple(f"scenes:{style}" for style in ("clear", "dusk", "night", "fog", "rain", "snow"))
    height: int = 224  # of the training crop, the inference window and the rendered scenes, pixels
    width: int = 448
    long_edge: int = 448  # pictures are resized to it before cropping and before inference
    train_images: int = 240  # at most this many of the source, evenly spaced; 0 = all
    eval_images: int = 24  # at most this many of each domain, evenly spaced; 0 = all
    content_seed: int = 0  # layouts of the rendered scenes
    scale_min: float = 0.75  # random resize before the crop, relative to long_edge
    scale_max: float = 1.75
    max_class_share: float = 0.75  # of one class in a training crop
    photometric: float = 1.0  # strength of brightness, contrast, saturation and colour distortion; 0 = off
    eval_edges: tuple[str, ...] = ()  # long edge by data set where it is another: acdc=960; mapillary=0.5 is half
    class_set: str = ""  # a smaller convention to score the 19 classes in: synthia-16, synthia-13; empty = all
    exif_labels: str = "shown"  # labels of turned pictures, if sizes do not tell: drawn on them as shown, or as stored
    on_error: str = "stop"  # at a picture that is damaged or has no label: stop, or skip it and say so
    workers: int = 0  # processes that decode and augment fresh crops (train.views=0); 0 = the training's own

    def edge(self, name: str, own: int) -> int:
        """Long edge, pixels, at which pictures of the data set `name` are predicted; own: that of the picture."""
        edge = dict(text.split("=") for text in self.eval_edges).get(name, str(self.long_edge))
        return max(1, round(float(edge) * own)) if "." in edge else int(edge)


@dataclass(frozen=True)
class Model:
    """Backbone, refiner and head."""

    backbone: str = "dinov2-small-saliency"
    patch_size: int = 0  # pixels, to resize the backbone's patches to; 0 = as they are
    refiner: str = "set"
    refined_layers: tuple[int, ...] = (11, 12)  # counted from 1; empty = all
    feature_layers: tuple[int, ...] = (6, 9, 11, 12)  # what the head reads; empty = evenly spaced
    num_tokens: int = 100  # of rein, fada and set, per layer
    rank: int = 16
    num_prompts: int = 150  # of vpt, per layer
    adapter_width: int = 64
    lora_rank: int = 8
    any_batch: bool = False  # lets set-released, whose output depends on the batch, be evaluated at any batch size
    head: str = "per-pixel"  # or mask2former, with as many queries as there are tokens
    head_channels: int = 128
    attention_heads: int = 8  # of mask2former, as all below
    pixel_layers: int = 6
    pixel_width: int = 1024  # of the feed-forward parts of the pixel decoder
    decoder_layers: int = 9
    decoder_width: int = 2048


@dataclass(frozen=True)
class Train:
    """The loop."""

    steps: int = 400
    batch_size: int = 2  # views per step, over all processes
    accumulate: int = 1  # parts that each process takes its views of a step in
    views: int = 320  # augmented crops made once, their frozen features kept; 0 = a fresh crop each time
    learning_rate: float = 1e-3
    refiner_rates: tuple[str, ...] = ("set=0.1",)  # in units of the head's rate; a refiner not named has its own
    weight_decay: float = 0.05  # none on tokens, norms, biases and scales
    warmup: int = 0  # first steps, in which the learning rate rises evenly
    power: float = 0.9  # of the polynomial decay after them
    clip_norm: float = 1.0  # largest gradient norm; 0 = off
    ema: float = 0.0  # decay of the moving average of the weights; 0 = off
    checkpoint_every: int = 100  # steps
    validate_every: int = 0  # steps between scores on other pictures of the source; 0 = never. Nothing is chosen by it
    validate_on: str = ""  # a domain of the source's data set: gtav:val@folder; empty = what its name gives for scoring
    precision: str = "auto"  # of matrix products: float32, bfloat16; auto = bfloat16 where it is faster
    checkpointing: bool = False  # keeps only the input of each layer for the gradient: less memory, more time

    def refiner_rate(self, name: str, own: float) -> float:
        """Learning rate of the refiner `name` in units of the head's: its entry, that of its family, or its own."""
        rates = dict(text.split("=") for text in self.refiner_rates)
        return float(rates.get(name, rates.get(name.partition("-")[0], own)))


@dataclass(frozen=True)
class Inference:
    """How a picture is predicted: whole or in windows of data.height x data.width, averaged where they overlap."""

    whole: bool = False
    stride: float = 2 / 3  # from window to window, as a share of the window; 1 = no overlap
    windows: int = 8  # at most so many at once
    scales: tuple[float, ...] = (1.0,)  # of data.long_edge; the probabilities of several are averaged
    flip: bool = False  # averaged with the prediction of the mirrored picture

    def __str__(self) -> str:
        """In words, for tables."""
        words = ["whole pictures" if self.whole else f"windows by {self.stride:.2f}"]
        words += [f"scales {', '.join(f'{scale:g}' for scale in self.scales)}"] if self.scales != (1.0,) else []
        return " + ".join(words + ["flip"] * self.flip)


@dataclass(frozen=True)
class Ablation:
    """Variants x seeds of notebook 05; `overrides` make each training smaller than the main one."""

    variants: tuple[str, ...] = ("none", "rein", "set", "set-amplitude", "set-phase", "set-unnormalised")
    seeds: tuple[int, ...] = (0, 1)
    overrides: tuple[str, ...] = ("train.steps=50", "train.views=120", "train.batch_size=2", "data.eval_images=6")


@dataclass(frozen=True)
class Experiment:
    """Everything that decides a run's numbers. `build` makes one from a profile and overrides."""

    profile: str = "quick"
    seed: int = 0
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    inference: Inference = field(default_factory=Inference)
    ablation: Ablation = field(default_factory=Ablation)

    @classmethod
    def build(
        cls,
        profile: str = "quick",
        source: str | None = None,
        targets: typing.Sequence[str] | str | None = None,
        seed: int | None = None,
        overrides: typing.Sequence[str] | str = (),
    ) -> Experiment:
        """A profile with domains, seed and dotted `key=value` overrides put in; one text is a list of one.

        Raises ValueError for an unknown profile or key (the nearest are named) and for a value of the wrong type.
        """
        if profile not in PROFILES:
            raise ValueError(f"Unknown profile '{profile}': expected one of {', '.join(PROFILES)}.")
        experiment = PROFILES[profile]
        targets, overrides = ([text] if isinstance(text, str) and text else text for text in (targets, overrides))
        data = experiment.data
        data = replace(data, source=source or data.source, targets=tuple(targets or ()) or data.targets)
        if not data.source or not data.targets:
            raise ValueError(f"Profile {profile} has no domains of its own: name yours with --source and --target.")
        experiment = replace(experiment, data=data, seed=experiment.seed if seed is None else int(seed))
        return experiment.override(*overrides)

    def override(self, *options: str) -> Experiment:
        """This experiment with dotted `key=value` options put in. Raises ValueError as `build` does."""
        experiment = reduce(_override, options, self)
        _validate(experiment)
        _validate(reduce(_override, experiment.ablation.overrides, experiment))
        return experiment

    def flat(self) -> dict[str, typing.Any]:
        """Every field by its dotted name, as plain JSON types."""
        values: dict[str, typing.Any] = {}
        for key, value in self.to_dict().items():
            values |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        return values

    def to_dict(self) -> dict:
        """As plain JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict) -> Experiment:
        """The inverse of `to_dict`; what is missing has its default value. Raises ValueError if a field is unknown."""
        groups = {"data": Data, "model": Model, "train": Train, "inference": Inference, "ablation": Ablation}
        try:
            read = {k: {f: v for f, v in values.get(k, {}).items() if f"{k}.{f}" not in RETIRED} for k in groups}
            read["train"] = {"refiner_rates": []} | read["train"]  # an older file: one rate for all
            parts = {
                k: groups[k](**{f: tuple(v) if isinstance(v, list) else v for f, v in fields.items()})
                for k, fields in read.items()
            }
            made = cls(**(values | parts))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"This configuration is not one of this version of setlib ({error}).") from None
        defaults = cls().flat()
        for key, value in made.flat().items():
            kinds = (int, float) if type(defaults[key]) is float else type(defaults[key])
            if not isinstance(value, kinds):
                raise ValueError(f"This configuration is damaged: {key} is {value!r}, like {defaults[key]!r} expected.")
        _validate(made)
        return made


def _smoke() -> Experiment:
    data = Data(
        targets=("scenes:night", "scenes:fog"), height=64, width=128, long_edge=128, train_images=12, eval_images=4
    )
    layers = {"refined_layers": (3, 4), "feature_layers": (1, 2, 3, 4)}
    model = Model(backbone="tiny-random", num_tokens=8, rank=4, head_channels=16, **layers)
    train = Train(steps=12, batch_size=2, views=8, checkpoint_every=6, precision="float32")
    variants = ("none", "full", "vpt", "adaptformer", "rein", "fada", "set")
    ablation = Ablation(variants=variants, overrides=("train.steps=6", "data.eval_images=2"))
    return Experiment(profile="smoke", data=data, model=model, train=train, ablation=ablation)


def _paper(crop: int = 512) -> Experiment:
    """One GPU. Source: the released configurations; what differs from them is listed in the README."""
    edges = {"cityscapes": 1024, "bdd100k": 1280, "acdc": 960, "mapillary": 0.5, "mapillary-v2": 0.5}  # at crops of 512
    data = Data(
        source="",
        targets=(),
        height=crop,
        width=crop,
        long_edge=2 * crop,
        eval_edges=tuple(f"{name}={edge * (crop // 512)}" for name, edge in edges.items()),
        train_images=0,
        eval_images=0,
        scale_min=0.5,
        scale_max=2.0,
        workers=4,
    )
    model = Model(
        backbone="facebook/dinov2-large",
        patch_size=16,
        refined_layers=(),
        feature_layers=(8, 12, 16, 24),
        head="mask2former",
        head_channels=256,
    )
    train = Train(steps=40_000, batch_size=4, views=0, learning_rate=1e-4, clip_norm=0.0, checkpoint_every=1000)
    train = replace(train, precision="float32", refiner_rates=())  # one rate for all, as released
    if crop > 512:
        train = replace(train, batch_size=8, learning_rate=6e-5, warmup=10_000)
    profile = "paper" if crop == 512 else f"paper-{crop}"
    return Experiment(profile=profile, data=data, model=model, train=train, ablation=Ablation(overrides=()))


PROFILES = {made.profile: made for made in (_smoke(), Experiment(), _paper(), _paper(crop=1024))}


def _override(experiment: Experiment, text: str) -> Experiment:
    """`experiment` with one dotted `key=value` put in."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"Option '{text}' is not KEY=VALUE: write for example model.refiner=rein.")
    known = _dotted_fields()
    if key not in known:
        raise ValueError(f"Unknown option '{key}' ({nearest(key, known)}).")
    parsed = _parse(key, value, known[key])
    if "." not in key:
        return replace(experiment, **{key: parsed})
    group, name = key.split(".")
    return replace(experiment, **{group: replace(getattr(experiment, group), **{name: parsed})})


def _dotted_fields() -> dict[str, typing.Any]:
    """Type of every field that an override can set, by dotted name."""
    fields: dict[str, typing.Any] = {}
    for name, kind in typing.get_type_hints(Experiment).items():
        if dataclasses.is_dataclass(kind):
            fields |= {f"{name}.{inner}": hint for inner, hint in typing.get_type_hints(kind).items()}
        elif name != "profile":
            fields[name] = kind
    return fields


def _parse(key: str, value: str, kind: typing.Any) -> typing.Any:
    try:
        if isinstance(kind, types.GenericAlias) or typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            is_options = key == "ablation.overrides"  # one may be a list itself
            comma = r",(?=\s*(?:seed|\w+\.\w+)=)" if is_options else ","
            return tuple(item(part.strip()) for part in re.split(comma, value) if part.strip())
        if kind is bool and value.lower() not in ("true", "false"):
            raise ValueError
        return value.lower() == "true" if kind is bool else kind(value)
    except ValueError:
        name = getattr(kind, "__name__", str(kind)).replace("tuple", "a list of tuple")
        raise ValueError(f"Option {key} expects {name}, not '{value}'.") from None


ABOVE_ZERO = (
    *("data.height", "data.width", "data.long_edge", "data.scale_min", "model.rank", "model.head_channels"),
    *("model.num_tokens", "model.num_prompts", "model.adapter_width", "model.lora_rank"),
    *("model.attention_heads", "model.pixel_layers", "model.decoder_layers"),
    *("model.pixel_width", "model.decoder_width"),
    *("train.steps", "train.batch_size", "train.accumulate", "train.learning_rate", "train.checkpoint_every"),
    *("inference.scales", "inference.windows"),
)
NOT_NEGATIVE = (
    *("seed", "data.train_images", "data.eval_images", "data.content_seed", "data.photometric"),
    *("data.workers", "train.views", "train.weight_decay", "train.clip_norm", "train.power", "ablation.seeds"),
    *("model.patch_size", "train.validate_every", "train.warmup"),
)
SAME_NUMBERS = (  # cost time, memory or what a damaged file costs; change no number that is already made
    *("train.checkpointing", "train.accumulate", "data.workers"),
    *("train.validate_every", "train.validate_on", "inference.windows", "data.on_error", "train.checkpoint_every"),
)
RETIRED = ("train.shard", "train.compile", "train.cache_gb")  # of older versions; they changed no result
CHOICES = {
    "data.on_error": ("stop", "skip"),
    "data.exif_labels": ("shown", "stored"),
    "model.head": ("per-pixel", "mask2former"),
    "train.precision": ("auto", "float32", "bfloat16"),
}
LARGEST_SIZE = 2**16  # of a part of the model
LARGEST_SCALE = 16
LARGEST = 2**63 - 1  # what a seed or a count can hold


def _validate(experiment: Experiment) -> None:
    """Raises ValueError for values that cannot work."""
    values = experiment.flat()
    for key, value in values.items():
        numbers = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int | float)]
        if not all(-LARGEST <= number <= LARGEST for number in numbers):  # NaN neither
            raise ValueError(f"Option {key} must be a number below 2^63, got {value}.")
        if key in ABOVE_ZERO and not min(numbers, default=1) > 0:
            raise ValueError(f"Option {key} must be above 0, got {value}.")
        if key in NOT_NEGATIVE and numbers and min(numbers) < 0:
            raise ValueError(f"Option {key} must not be negative, got {value}.")
    for key in ("ablation.variants", "ablation.seeds"):
        if not values[key]:
            raise ValueError(f"Option {key} is empty: name at least one.")
    data, train, model = experiment.data, experiment.train, experiment.model
    for key in (key for key in ABOVE_ZERO + NOT_NEGATIVE if key.startswith("model.")):
        if values[key] > LARGEST_SIZE:
            raise ValueError(f"Option {key} must be at most {LARGEST_SIZE}, got {values[key]}.")
    if experiment.model.num_tokens < 2:
        raise ValueError("Option model.num_tokens must be at least 2: token 0 only absorbs attention.")
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            raise ValueError(f"Option {key} must be {', '.join(choices[:-1])} or {choices[-1]}, got '{values[key]}'.")
    if data.scale_max < data.scale_min:
        raise ValueError(f"Option data.scale_max ({data.scale_max}) is below data.scale_min ({data.scale_min}).")
    if not 0 <= train.ema < 1:
        raise ValueError(f"Option train.ema must lie in [0, 1), got {train.ema}.")
    if model.head == "mask2former" and (model.head_channels % 32 or model.head_channels % model.attention_heads):
        wanted = "a multiple of 32 and of model.attention_heads for mask2former"
        raise ValueError(f"Option model.head_channels must be {wanted}, got {model.head_channels}.")
    if train.warmup >= train.steps:
        raise ValueError(f"Option train.warmup ({train.warmup}) must be below train.steps ({train.steps}).")
    if train.validate_every and model.refiner == "set-released" and not model.any_batch:
        raise ValueError("Validation predicts one picture at a time: set-released needs model.any_batch=true for it.")
    scales, stride = experiment.inference.scales, experiment.inference.stride
    if not 0 < max(scales, default=0) <= LARGEST_SCALE or not 0 < stride <= 1:
        limits = f"one of inference.scales, none above {LARGEST_SCALE}, an inference.stride above 0 and at most 1"
        raise ValueError(f"Name at least {limits}; got {scales} and {stride}.")
    for text in train.refiner_rates:
        if not re.fullmatch(r"[a-z-]+=(\d+\.?\d*|\.\d+)(e-?\d+)?", text) or not float(text.partition("=")[2]):
            raise ValueError(f"Option train.refiner_rates expects NAME=RATE (set=0.1), not '{text}'.")
    for text in data.eval_edges:
        name, _, edge = text.partition("=")
        if not name or not re.fullmatch(r"\d+|\d*\.\d+", edge) or not float(edge):
            raise ValueError(
                f"Option data.eval_edges expects NAME=PIXELS (acdc=960) or NAME=SHARE (0.5), not '{text}'."
            )


class Run:
    """A run folder: configuration, history, weights, metrics, figures, executed notebooks, report."""

    def __init__(self, path: Path, experiment: Experiment) -> None:
        self.path = Path(path)
        self.experiment = experiment

    @classmethod
    def open(cls, path: str | Path | None, experiment: Experiment) -> Run:
        """The folder for this experiment, made when missing; `path` None or "" names it after the experiment.

        Raises ValueError if the folder holds what another configuration made, or cannot be written.
        """
        path = Path(path) if path else default_run_folder(experiment)
        stored = path / "experiment.json"
        if stored.is_file():
            other = cls.load(path).experiment
            differing = _differences(experiment, other)
            if differing and any(file.name != stored.name for file in path.iterdir()):  # something was made with it
                raise ValueError(
                    f"Run folder {path} holds another configuration ({'; '.join(differing[:3])}): "
                    "choose another with --run, or the same options."
                )
        run = cls(path, experiment)
        run.write_json("experiment.json", experiment.to_dict())
        return run

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """An existing run folder. Raises ValueError if there is none or its configuration cannot be read."""
        stored = Path(path) / "experiment.json"
        if not stored.is_file():
            raise ValueError(
                f"{path} is no run folder (no experiment.json): make one with python -m setlib run --run {path}."
            )
        return cls(Path(path), Experiment.from_dict(load_json(stored)))

    def nested(self, name: str, *overrides: str) -> Run:
        """A run of its own inside this one, with some options changed: the baseline, an ablation's variant."""
        return Run.open(self.path / name, self.experiment.override(*overrides))

    def file(self, name: str) -> Path:
        """A path inside the folder; its parent is made."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_json(self, name: str, values: typing.Any) -> Path:
        """Writes JSON into the folder, whole or not at all; NaN as null, numpy's numbers as plain ones."""
        return write_atomic(self.path / name, json.dumps(plain(values), indent=1, allow_nan=False) + "\n")

    def read_json(self, name: str) -> typing.Any:
        """Reads JSON of the folder. Raises ValueError naming the step that writes it when it is missing."""
        path = self.path / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: run the notebook or command that writes it first.")
        return load_json(path)

    def finish(self, name: str, values: dict) -> dict:
        """Writes a notebook's numbers to results/<name>.json, with profile, seed and peak memory; returns them."""
        experiment = self.experiment
        values = values | {"profile": experiment.profile, "seed": experiment.seed, "peak_bytes": peak_bytes()}
        self.write_json(f"results/{name}.json", values)
        return values

    def save_figure(self, figure: typing.Any, name: str) -> typing.Any:
        """Saves a matplotlib figure as figures/name.png and returns it, for showing; None is left out."""
        if figure is None:
            return (self.path / "figures" / f"{name}.png").unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir=self.file("figures/x").parent) as folder:
            made = Path(folder) / "figure.png"
            figure.savefig(made, dpi=100, bbox_inches="tight")
            os.replace(made, self.path / "figures" / f"{name}.png")
        return figure


def _differences(one: Experiment, other: Experiment) -> list[str]:
    a, b = one.flat(), other.flat()
    changed = (key for key in a if a[key] != b[key] and key not in SAME_NUMBERS)
    return [f"{key} is {b[key]}, not {a[key]}" for key in changed if _one_folder(a[key]) != _one_folder(b[key])]


def _one_folder(value: typing.Any) -> str:
    """A value as text in which the folders of domains are absolute and end without a slash."""
    folder = r"(?:(?<=@)|(?<=hub:))[^']+?(?=(~[a-z]+\d?)?('|$))"  # a corruption may follow
    return re.sub(folder, lambda found: os.path.realpath(os.path.expanduser(found[0])), str(value))


def default_run_folder(experiment: Experiment) -> Path:
    """runs/<profile>, with what differs from the profile's model, source and seed in the name."""
    parts = [experiment.profile]
    base = PROFILES[experiment.profile]
    if experiment.data.source != base.data.source:
        parts.append(experiment.data.source.partition("@")[0].replace(":", "-"))
    if experiment.model.refiner != base.model.refiner:
        parts.append(experiment.model.refiner)
    if experiment.seed != base.seed:
        parts.append(f"seed{experiment.seed}")
    return PROJECT / "runs" / "-".join(parts)
