"""A segmenter built from an experiment, saved, loaded and shared, and the checkpoint of a training that goes on.

What learns is kept as safetensors, the backbone by name and hash.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub import HfApi, ModelCard, constants, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from setlib._memory import keep_freed_memory
from setlib.backbone import FrozenBackbone
from setlib.data.labels import CITYSCAPES
from setlib.distributed import default_device, state
from setlib.experiment import Experiment
from setlib.files import LOCK, alone, hub_answers, load_json, shown, small, write_atomic
from setlib.heads import PerPixelHead
from setlib.mask2former import HEAD_SIZES, Mask2FormerHead
from setlib.refiners import Options, build_refiner
from setlib.run import Run
from setlib.segmenter import Segmenter
from setlib.weights.convert import under
from setlib.weights.load import load_backbone

FILES = ("config.json", "model.safetensors")
CARD = Path(__file__).with_name("model_card.md")


def build_segmenter(
    experiment: Experiment, backbone: FrozenBackbone | None = None, device: torch.device | None = None
) -> Segmenter:
    """The segmenter that an experiment describes, its refiner and head at their initial values.

    backbone: one that is loaded already, to be shared; default: the experiment's. device: default: this process's GPU,
    else the CPU.
    Raises ValueError for a layer that the backbone has not, or a backbone or refiner that cannot be had here.
    """
    keep_freed_memory()
    config, device = experiment.model, device or default_device()
    backbone = backbone or load_backbone(config.backbone, patch_size=config.patch_size)
    depth = backbone.num_layers
    read = config.feature_layers or even_layers(depth)
    refined = config.refined_layers or tuple(range(1, depth + 1))
    if experiment.train.mix and experiment.train.mix_layer > max(read):
        found = f"({experiment.train.mix_layer}) stands behind all that the head reads"
        raise ValueError(f"Option train.mix_layer {found}: name a layer from 1 to {max(read)}, or 0 for the pixels.")
    is_mask_head = config.head == "mask2former"
    if is_mask_head and len(read) != 4:
        raise ValueError(f"Option model.feature_layers must name 4 layers for mask2former, got {len(read)}.")
    options = {name: value for name, value in vars(config).items() if name in Options._fields}
    sizes = {name: value for name, value in vars(config).items() if name in HEAD_SIZES}
    wanted = experiment.train.precision
    precision = fast_precision(device) if wanted == "auto" else wanted
    head: PerPixelHead | Mask2FormerHead
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(experiment.seed)  # torch.manual_seed would reseed every GPU as well
        if not is_mask_head:
            head = PerPixelHead(len(read), backbone.channels, config.head_channels, len(CITYSCAPES))
        options["query_channels"] = config.head_channels if is_mask_head else 0
        refiner = build_refiner(config.refiner, refined, backbone.channels, **options)
        styled = refiner.style.layers if refiner.style else ()
        for key, layers in (("feature_layers", read), ("refined_layers", refined), ("style_layers", styled)):
            if max(layers, default=0) > depth:
                raise ValueError(f"Option model.{key} names {layers}, but {backbone.name} has the layers 1 to {depth}.")
        if is_mask_head:
            learned = 0 if refiner.queries() is not None else config.num_tokens  # queries
            head = Mask2FormerHead(backbone.channels, config.head_channels, len(CITYSCAPES), learned, **sizes)
        model = Segmenter(experiment, backbone, refiner, head, read, precision)  # lora draws here
    return model.to(device)


def even_layers(depth: int) -> tuple[int, ...]:
    """Four layers of `depth`, evenly spaced: what a head reads unless it is told."""
    return tuple(max(1, depth * k // 4) for k in (1, 2, 3, 4))


def fast_precision(device: torch.device) -> str:
    """What train.precision=auto means there: bfloat16 where the device multiplies matrices in it, else float32."""
    if device.type == "cuda":
        has_units = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if has_units else "float32"


def save_segmenter(model: Segmenter, folder: str | Path) -> None:
    """Writes model.safetensors and config.json (experiment, hash of the backbone), each whole or not at all."""
    write_model(folder, model.trainable_state(), model.experiment, model.backbone.fingerprint)


def write_model(
    folder: str | Path,
    tensors: dict[str, Tensor],
    experiment: Experiment,
    fingerprint: str,
    results: Sequence[dict] = (),
) -> None:
    """A model's two files. fingerprint: of its backbone, "" if it is not known; results: of metrics.json."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    config = {"experiment": experiment.to_dict(), "backbone_fingerprint": fingerprint}
    config |= {"results": list(results)} if results else {}
    write_atomic(Path(folder) / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_atomic(Path(folder) / "config.json", json.dumps(config, indent=1) + "\n")


def load_segmenter(
    name: str | Path, backbone: FrozenBackbone | None = None, device: torch.device | None = None, **options: Any
) -> Segmenter:
    """A saved model, in evaluation mode.

    name: its folder, a run's, or a repository of the hub (options: revision, token, cache_dir ... of the hub's);
    backbone, device: as in `build_segmenter`.
    Raises ValueError if files are missing or damaged, the backbone differs, or the hub does not have it.
    """
    folder = model_folder(name, options)
    experiment, trained_on, _, tensors = read_model(folder)
    model = build_segmenter(experiment, backbone, device)
    found = model.backbone.fingerprint
    if trained_on not in ("", found):  # "": imported, the release does not say
        raise ValueError(
            f"{folder} was trained on a backbone with hash {trained_on}, "
            f"but {model.backbone.name} has {found}: use the same weights."
        )
    if wrong := differences(model.trainable_state(), tensors):
        raise ValueError(f"Weights do not fit this model: {wrong}.")
    model.load_state_dict(tensors, strict=False)
    return model.eval()


def differences(expected: dict[str, Tensor], found: dict[str, Tensor]) -> str:
    """The tensors that are missing, too many or of another shape, the first ten of them; "" if there are none."""
    want, have = ({name: tuple(tensor.shape) for name, tensor in some.items()} for some in (expected, found))
    names = sorted({name for name, _ in want.items() ^ have.items()})
    wrong = [f"{name} is {have.get(name, 'missing')}, expected {want.get(name, 'none')}" for name in names]
    return ", ".join(wrong[:10]) + (f" and {len(wrong) - 10} more" if wrong[10:] else "")


def model_folder(name: str | Path, options: dict[str, Any]) -> Path:
    """The folder of a model's two files."""
    folder = Path(name)
    folder = folder / "model" if (folder / "model").is_dir() else folder
    if all((folder / file).is_file() for file in FILES):
        return folder
    if folder.is_dir() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name)):
        raise ValueError(f"{folder} holds no saved model ({' and '.join(FILES)}): train one first.")
    if not (constants.HF_HUB_OFFLINE or hub_answers(constants.ENDPOINT)):
        raise ValueError(f"{name} is no folder of a saved model, and {constants.ENDPOINT} does not answer.")
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(FILES), **options))
    except (ValueError, OSError) as error:  # every error of the hub is one of these
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"{name} is no folder of a saved model, and the hub does not give it: {why}") from None


def read_model(folder: Path) -> tuple[Experiment, str, list[dict], dict[str, Tensor]]:
    """A model's two files: its experiment, its backbone's hash, its results and what it learnt."""
    try:
        config = json.loads(small(folder / "config.json"))
        experiment, fingerprint = Experiment.from_dict(config["experiment"]), config["backbone_fingerprint"]
        return experiment, fingerprint, config.get("results", []), load_file(folder / "model.safetensors")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise ValueError(f"The model in {folder} cannot be read ({error}): delete it and train again.") from None


def use(model: Segmenter, experiment: Experiment) -> None:
    """Takes over how a trained model is used: data.eval_edges, model.any_batch and inference."""
    model.experiment = experiment
    model.refiner.any_batch = experiment.model.any_batch


def share(run: str | Path, folder: str | Path, repository: str = "", **options: Any) -> None:
    """Writes a run's model with its results and a card into a folder, without the folders of this machine.

    run: a run folder, or that of a model; repository: owner/name, to which the folder is then uploaded on the hub
    (options of `HfApi.create_repo`: private ...).
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


# Of a training


class Training:
    """What changes from step to step, and its checkpoint: weights, optimiser, moving average, history."""

    def __init__(self, run: Run, model: Segmenter, optimiser: torch.optim.Optimizer) -> None:
        self.run, self.model, self.optimiser, self.settings = run, model, optimiser, model.experiment.train
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        averaged = self.parameters if self.settings.ema or self.settings.last else {}
        self.average = {name: p.detach().clone() for name, p in averaged.items()}
        self.history: list[dict] = []
        self.step = self.saved = 0  # steps that are done, and of the checkpoint

    def check(self, loss: float, norm: float) -> None:
        """Raises ValueError if a step's loss or gradient norm is not finite, or its loss 100 times the first one."""
        first = self.history[0]["loss"] if self.history else loss
        if not (loss < 100 * max(first, 1) and norm < math.inf):
            self.give_up(self.step + 1, f"the loss is {loss:.4g} (at first {first:.4g}), its gradient norm {norm:.4g}")

    def give_up(self, step: int, what: str) -> NoReturn:
        """Raises ValueError: what is wrong, its likely cause, and what is kept."""
        kept = f"the checkpoint of step {self.saved} is kept" if self.saved else "there is no checkpoint yet"
        cure = f"lower train.learning_rate ({self.settings.learning_rate}) or train.clip_norm, in another folder"
        raise ValueError(f"Training stopped at step {step}: {what}; most likely too fast: {cure}; {kept}.")

    def update_average(self) -> None:
        """Moves the average, if one is kept, towards the weights."""
        place = self.step + 1 - max(self.settings.steps - self.settings.last, 0)  # among the last steps, from 1
        share = 1 / max(place, 1) if self.settings.last else 1 - self.settings.ema
        for name, value in self.average.items():
            value.lerp_(self.parameters[name].detach(), share)

    def latest(self) -> dict[str, str]:
        """For a progress bar."""
        scores = [entry["source_miou"] for entry in self.history if "source_miou" in entry]
        return {"loss": f"{self.history[-1]['loss']:.3f}"} | ({"source mIoU": f"{scores[-1]:.1f}"} if scores else {})

    def save(self) -> None:
        """Writes history.jsonl and checkpoint.safetensors (weights, optimiser, average, step), whole or not at all."""
        if not all(p.isfinite().all() for p in self.parameters.values()):
            self.give_up(self.step, "its weights are not finite")
        if not state().is_main_process:
            return
        tensors = {f"model.{name}": value.detach() for name, value in self.model.trainable_state().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        for name, p in self.parameters.items():
            tensors |= {f"optimiser.{name}.{key}": value for key, value in self.optimiser.state.get(p, {}).items()}
        about = {"step": str(self.step), "backbone": self.model.backbone.fingerprint}
        content = save({k: v.cpu().contiguous() for k, v in tensors.items()}, metadata=about)
        write_atomic(self.run.path / "history.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.history))
        write_atomic(self.run.path / "checkpoint.safetensors", content)
        self.saved = self.step

    @torch.no_grad()
    def finish(self) -> None:
        """Puts the average, if one is kept, in place of the weights, writes the model and removes the checkpoint."""
        for name, value in self.average.items():
            self.parameters[name].copy_(value)
        if state().is_main_process:
            save_segmenter(self.model, self.run.path / "model")
            (self.run.path / "checkpoint.safetensors").unlink(missing_ok=True)

    def resume(self) -> None:
        """Goes on from the run's checkpoint, if there is one. Raises ValueError if it does not fit."""
        path = self.run.path / "checkpoint.safetensors"
        if not path.is_file():
            return
        try:
            with safe_open(path, "pt") as saved:
                about = saved.metadata()
                tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
            self.step = self.saved = int(about["step"])
            if about.get("backbone", self.model.backbone.fingerprint) != self.model.backbone.fingerprint:
                raise ValueError(f"it was made with other weights of the backbone {self.model.backbone.name}")
            wrong = differences(self.model.trainable_state(), under(tensors, "model."))
            if wrong := wrong or differences(self.average, under(tensors, "average.")):
                raise ValueError(wrong)
            with torch.no_grad():
                for name, value in self.model.trainable_state().items():  # buffers too
                    value.copy_(tensors[f"model.{name}"])
                for name, p in self.parameters.items():
                    if kept := under(tensors, f"optimiser.{name}."):  # else it had no gradient yet
                        if any(value.shape not in ((), p.shape) for value in kept.values()):
                            raise ValueError(f"of the optimiser, {name} is of another shape")
                        self.optimiser.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in kept.items()}
                for name, value in self.average.items():
                    value.copy_(tensors[f"average.{name}"])
            self.history = [entry for entry in read_history(self.run) if entry["step"] <= self.step]
        except Exception as error:
            raise ValueError(f"{path} cannot be resumed ({error}): delete it to train from the start.") from None
        if state().is_main_process:
            tqdm.write(f"{shown(self.run.path)} goes on after step {self.step} of {self.settings.steps}")


@contextlib.contextmanager
def held(run: Run) -> Iterator[bool]:
    """Keeps other processes out of a run's folder while it is trained, and says whether it was finished before.

    What a process that was killed left behind is removed. Raises ValueError if another process trains in the folder.
    """
    main = state().is_main_process
    with contextlib.ExitStack() as stack:
        if main and not is_finished(run.path):
            stack.enter_context(alone(run.path / LOCK))
            Run.open(run.path, run.experiment)  # it is still this run's
        state().wait_for_everyone()
        finished = is_finished(run.path)  # by the process, maybe, that this one has waited for
        left = ["checkpoint.safetensors"] * finished + [".*.safetensors.[0-9]*", "model/.*.safetensors.[0-9]*"]
        for path in (path for pattern in left for path in run.path.glob(pattern) if main):
            with contextlib.suppress(OSError):  # a folder that others share read-only
                path.unlink()
        yield finished


def is_finished(folder: Path) -> bool:
    """Whether a run's folder holds a trained model."""
    return all((folder / "model" / name).is_file() for name in FILES)


def read_history(run: Run) -> list[dict]:
    """Entries of the run's history.jsonl: step, loss, lr, grad_norm, seconds; none if it is missing or damaged."""
    path = run.path / "history.jsonl"
    try:
        entries = [json.loads(line) for line in path.read_bytes().splitlines()] if path.is_file() else []
        return [entry for entry in entries if {"step", "loss", "seconds"} <= entry.keys()]
    except (ValueError, AttributeError):
        tqdm.write(f"{path} is damaged: its curve is left out; the model does not need it")
        return []
