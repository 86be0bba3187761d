"""Run folders: opened, read and written, whole files or none."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from setlib.experiment import PROFILES, Experiment
from setlib.files import LOCK, PROJECT, VERSION, alone, load_json, peak_bytes, write_atomic

SAME_NUMBERS = (  # cost time, memory or what a damaged file costs; change no number that is already made
    *("train.checkpointing", "train.accumulate", "data.workers"),
    "ablation.",  # each of its trainings has a folder, which knows its own options
    *("train.validate_every", "train.validate_on", "inference.windows", "data.on_error", "train.checkpoint_every"),
)


class Run:
    """A run folder: configuration, history, weights, metrics, figures, executed notebooks, report."""

    def __init__(self, path: Path, experiment: Experiment) -> None:
        self.path, self.experiment = Path(path), experiment

    @classmethod
    def open(cls, path: str | Path | None, experiment: Experiment) -> Run:
        """The folder for this experiment, made when missing; `path` None or "" names it after the experiment.

        Raises ValueError if the folder holds what another configuration made, or cannot be written.
        """
        run = cls(Path(path) if path else default_run_folder(experiment), experiment)
        stored, content = run.path / "experiment.json", {"setlib": VERSION} | experiment.to_dict()
        if os.environ.get("RANK", "0") != "0" or (stored.is_file() and load_json(stored) == content):
            return run  # of several processes the first one writes
        with alone(run.path / LOCK):
            run.check_same()
            run.write_json(stored.name, content)
        return run

    def check_same(self) -> None:
        """Raises ValueError if the folder holds what another configuration made."""
        if not (self.path / "experiment.json").is_file():
            return
        new, old = self.experiment.flat(), self.load(self.path).experiment.flat()
        other = [key for key in new if _one_folder(new[key]) != _one_folder(old[key])]
        other = [key for key in other if not key.startswith(SAME_NUMBERS)]
        differing = [f"{key} is {old[key]}, not {new[key]}" for key in other[:3]]
        if differing and any(file.name != "experiment.json" for file in self.path.glob("[!.]*")):  # made with it
            raise ValueError(
                f"Run folder {self.path} holds another configuration ({'; '.join(differing)}): "
                "choose another with --run, or the same options."
            )

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """An existing run folder. Raises ValueError if there is none or its configuration cannot be read."""
        stored = Path(path) / "experiment.json"
        if not stored.is_file():
            raise ValueError(f"{path} is no run folder (no {stored.name}): python -m setlib run --run {path} makes it.")
        content = load_json(stored)
        if not isinstance(content, dict):
            raise ValueError(f"{stored} is not the configuration of a run: delete the folder or restore the file.")
        made_by = content.pop("setlib", "0.1.0")  # the first versions did not say
        try:
            return cls(Path(path), Experiment.from_dict(content))
        except ValueError as error:
            raise ValueError(f"{path} was made by setlib {made_by}, this is {VERSION}: {error}") from None

    def nested(self, name: str, *overrides: str) -> Run:
        """A run of its own inside this one, with some options changed: the baseline, an ablation's variant."""
        return Run.open(self.path / name, self.experiment.override(*overrides))

    def write_json(self, name: str, values: Any) -> Path:
        """Writes JSON into the folder, whole or not at all; NaN as null, numpy's numbers as plain ones."""
        content = to_json(values, indent=1, inf_nan_mode="null", fallback=lambda value: value.tolist())
        return write_atomic(self.path / name, content + b"\n")

    def read_json(self, name: str, missing: Any = None) -> Any:
        """Reads JSON of the folder, `missing` where it is not there. Raises ValueError, naming its maker, without."""
        path = self.path / name
        if missing is None and not path.is_file():
            raise ValueError(f"{path} is missing: run the notebook or command that writes it first.")
        return load_json(path) if path.is_file() else missing

    def finish(self, name: str, values: dict) -> dict:
        """Writes a notebook's numbers to results/<name>.json, with profile, seed and peak memory; returns them."""
        experiment = self.experiment
        values = values | {"profile": experiment.profile, "seed": experiment.seed, "peak_bytes": peak_bytes()}
        self.write_json(f"results/{name}.json", values)
        return values

    def save_figure(self, figure: Any, name: str) -> Any:
        """Saves a figure or a board as figures/name.png and returns it, for showing; None is left out."""
        path = self.path / "figures" / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
        else:
            figure.savefig(drawn := io.BytesIO(), dpi=100, bbox_inches="tight")
            write_atomic(path, drawn.getvalue())
        return figure


def _one_folder(value: Any) -> str:
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
