"""A trained model shared: what learns, the backbone by name and hash, and a card with the run's table."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from torch import Tensor

from setlib.checkpoint import model_folder, read_model, write_model
from setlib.experiment import Experiment
from setlib.files import load_json, write_atomic

CARD = Path(__file__).with_name("model_card.md")


def share(run: str | Path, folder: str | Path, repository: str = "", **options: Any) -> None:
    """Writes a run's model with its results and a card into a folder, without the folders of this machine.

    Parameters
    ----------
    run : a run folder, or that of a model.
    repository : owner/name; the folder is then uploaded to it on the hub (options of `HfApi.create_repo`: private ...).
    """
    source, folder = model_folder(run, {}), Path(folder)
    experiment, fingerprint, results, tensors = read_model(source)
    if all((source.parent / file).is_file() for file in ("experiment.json", "metrics.json")):  # of a run
        results = load_json(source.parent / "metrics.json")["results"]
    own, *targets = (_public(text) for text in (experiment.data.source, *experiment.data.targets))
    experiment = replace(experiment, data=replace(experiment.data, source=own, targets=tuple(targets)))
    results = [result | {"domain": _public(result["domain"])} for result in results]
    write_model(folder, tensors, experiment, fingerprint, results)
    write_atomic(folder / "README.md", str(model_card(experiment, tensors, fingerprint, results)))
    if repository:
        hub = HfApi(token=options.pop("token", None))
        hub.create_repo(repository, **{"exist_ok": True, **options})
        hub.upload_folder(repo_id=repository, folder_path=folder)


def model_card(experiment: Experiment, tensors: dict[str, Tensor], fingerprint: str, results: list[dict]) -> ModelCard:
    """README.md of a shared model: what it is, how to load it, and the run's table."""
    rows = [
        f"| {r['domain']} | {r['class_set']} | {r['images']} | {r.get('inference', '')} | {r['miou']} |"
        for r in results
    ]
    table = "\n".join(["| domain | classes | pictures | predicted in | mIoU, % |", "|---|---|---|---|---|", *rows])
    sizes = {
        part: sum(t.numel() for name, t in tensors.items() if name.startswith(part) and t.is_floating_point())
        for part in ("backbone", "refiner", "head")
    }
    return ModelCard(
        CARD.read_text(encoding="utf-8").format(
            refiner=experiment.model.refiner,
            head=experiment.model.head,
            backbone=experiment.model.backbone,
            fingerprint=fingerprint,
            source=experiment.data.source or "a source that is not known",
            known=f"Steps: {experiment.train.steps}, seed {experiment.seed}." if experiment.data.source else "",
            counts=" + ".join(f"{number:,} ({part})" for part, number in sizes.items() if number),
            table=table if rows else "Not scored yet.",
        )
    )


def _public(text: str) -> str:
    """A domain's name without the folder it lies in on this machine."""
    return re.sub(r"@[^~]*", "", text)
