"""Checkpoints of the public releases of Rein and SET as runs, and runs as such checkpoints.

A release's checkpoint holds the tokens (`backbone.reins.*`) and the head (`decode_head.*`), not the frozen backbone;
that of the frozen baseline holds the head alone.
"""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from setlib.checkpoint import differences, even_layers, model_folder, write_model
from setlib.data.labels import CITYSCAPES
from setlib.experiment import PROFILES
from setlib.files import write_atomic
from setlib.mask2former import Mask2FormerHead
from setlib.refiners import build_refiner
from setlib.run import Run
from setlib.tokens import Refiner
from setlib.weights.convert import count_layers, read_tensors, rename, split_three, under
from setlib.weights.presets import PRESETS, Preset, check_name

REINS, HEAD = "backbone.reins.", "decode_head."
BRANCHES = {"rein": "patches", "set-released": "phase"}  # refiner -> its branch of low-rank tokens
with Path(__file__).with_name("names.csv").open(encoding="utf-8", newline="") as file:
    NAMES = {row["release"]: row["ours"] for row in csv.DictReader(file)}  # # a number, {branch} of BRANCHES
PACKED = "self_attn.attn.in_proj_"  # query, key and value, one below the other
PARTS = tuple(f"self_attn.attn.{part}_proj." for part in "qkv")


def import_checkpoint(path: Path, out: Path, backbone: str = "") -> Run:
    """A release's checkpoint as a run folder, for evaluate and predict. The backbone itself is not needed.

    A head alone becomes a run with the refiner none, its learned queries with it.
    backbone: that the release was trained on, if it is not the DINOv2 of its size.
    Raises ValueError if the folder is not empty, or with the names that are missing or left over.
    """
    is_cut = out.is_dir() and {one.name for one in out.glob("[!.]*")} <= {"experiment.json", "model"}  # short, earlier
    if out.exists() and (not is_cut or (out / "model" / "config.json").is_file()):
        raise ValueError(f"{out} is not an empty folder: name another with --out.")
    if backbone:
        check_name(backbone)
    tokens, parameters = _read_release(path)
    head = load_head(parameters)
    num_classes = head.classify.out_features - 1
    if num_classes != len(CITYSCAPES):
        raise ValueError(f"{path} knows {num_classes} classes: expected the {len(CITYSCAPES)} of Cityscapes.")
    num_layers = 0  # not known
    options = {"refiner": "none", "num_tokens": len(head.query_features.weight)}
    tensors = {f"head.{name}": value for name, value in head.state_dict().items()}
    if tokens:
        refiner = "set-released" if "learnable_tokens2" in tokens else "rein"
        made = load_tokens(refiner, tokens)
        num_layers, num_tokens, rank = tokens["learnable_tokens_a"].shape
        channels = tokens["learnable_tokens_b"].shape[-1]
        if made.query_map is None or head.query_embed is not None or head.channels != channels:
            raise ValueError(f"The head of {path} does not read its tokens: expected a release with linked queries.")
        options = {"refiner": refiner, "num_tokens": num_tokens, "rank": rank}
        tensors |= {f"refiner.{name}": value for name, value in made.state_dict().items()}
    dinov2 = _dinov2(head.channels, num_layers)
    if not (backbone or dinov2):
        raise ValueError(f"No DINOv2 has {num_layers or 'any'} layers of {head.channels} channels: give --backbone.")
    options |= {
        "backbone": backbone or dinov2.source,
        "feature_layers": ",".join(map(str, layers_read(dinov2.layers if dinov2 else num_layers))),
        "any_batch": "true",
        "head_channels": head.classify.in_features,
        **head_sizes(parameters),
    }
    options = [f"model.{key}={value}" for key, value in options.items()]
    experiment = PROFILES["paper"].override(*options, "inference.windows=1")  # as released: one window at a time
    run = Run.open(out, experiment)
    write_model(out / "model", tensors, experiment, fingerprint="")
    return run


def _read_release(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters of the tokens (none for a frozen baseline) and of the head in a release's checkpoint."""
    state = read_tensors(path)
    if left := [name for name in state if not name.startswith((REINS, HEAD))]:
        raise ValueError(f"{path} holds more than tokens and a head: {', '.join(left)} left over.")
    if bad := [name for name, value in state.items() if not (value.is_floating_point() and value.isfinite().all())]:
        raise ValueError(f"{path} holds values that are no finite numbers: {', '.join(bad)}.")
    tokens, head = under(state, REINS), under(state, HEAD)
    if not tokens and not {"query_embed.weight", "query_feat.weight"} <= head.keys():
        raise ValueError(f"{path} holds no tokens (backbone.reins.*), nor learned queries (query_embed, query_feat).")
    return tokens, head


def export_checkpoint(run: Run, path: Path) -> None:
    """The tokens and the head of a run's model as a release's checkpoint, {"state_dict": ...} in a `.pth`.

    Raises ValueError if the release has no place for the model.
    """
    config = run.experiment.model
    if config.refiner not in (*BRANCHES, "none") or config.head != "mask2former":
        raise ValueError(
            f"{run.path} has the refiner {config.refiner} and the head {config.head}: releases hold "
            f"{' or '.join(BRANCHES)} with mask2former, or none with it."
        )
    tensors = read_tensors(model_folder(run.path, {}) / "model.safetensors")
    head, state = head_to_release(under(tensors, "head.")), {}
    dinov2 = _dinov2(load_head(head).channels)
    num_layers, refined = dinov2.layers if dinov2 else 0, ()
    if config.refiner != "none":
        tokens = tokens_to_release(under(tensors, "refiner."), config.refiner)
        num_layers, refined = len(load_tokens(config.refiner, tokens).layers), config.refined_layers
        state = {f"{REINS}{name}": value for name, value in tokens.items()}
    state |= {f"{HEAD}{name}": value for name, value in head.items()}
    read = config.feature_layers or even_layers(num_layers)
    everywhere = refined in ((), tuple(range(1, num_layers + 1)))
    if not everywhere or num_layers and read != layers_read(num_layers):
        raise ValueError(
            f"A release refines every layer and reads {layers_read(num_layers)} of {num_layers}: {run.path} refines "
            f"{config.refined_layers or 'all'} and reads {read}."
        )
    buffer = io.BytesIO()
    torch.save({"meta": {}, "state_dict": state}, buffer)
    write_atomic(path, buffer.getvalue())


def layers_read(num_layers: int) -> tuple[int, ...]:
    """Layers whose features the releases' head reads: 8, 12, 16, 24 of ViT-L's, else evenly spaced; () if not known."""
    if num_layers == 24:
        return (8, 12, 16, 24)
    return even_layers(num_layers) if num_layers else ()


def _dinov2(channels: int, num_layers: int = 0) -> Preset | None:
    """The DINOv2 of that width, and of so many layers if that is known: what releases are trained on."""
    presets = [PRESETS[f"dinov2-{size}"] for size in ("small", "base", "large", "giant")]
    return next((p for p in presets if p.channels == channels and num_layers in (0, p.layers)), None)


# Parameters under our names and a release's


def tokens_to_release(tokens: dict[str, Tensor], refiner: str) -> dict[str, Tensor]:
    """The parameters of our refiner under a release's names, without its note of the batch size."""
    tokens = {name: value for name, value in tokens.items() if name != "trained_batch"}
    return rename(tokens, {ours.format(branch=BRANCHES[refiner]): theirs for theirs, ours in NAMES.items()})


def head_to_release(head: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of our head under a release's names."""
    table = {ours: theirs for theirs, ours in NAMES.items()}
    if "query_embed.weight" in head:
        table["query_features"] = "query_feat"
    named = rename(head, table)
    for name in [name for name in named if PARTS[0] in name]:
        rows = [named.pop(name.replace(PARTS[0], part), None) for part in PARTS]
        if all(row is not None for row in rows):
            named[name.replace(PARTS[0], PACKED)] = torch.cat(rows)
    return named


# Modules of a release's parameters


def load_tokens(refiner: str, parameters: dict[str, Tensor]) -> Refiner:
    """The refiner that a release's parameters make, under the release's names; all sizes are read off them.

    refiner: "rein" or "set-released". Raises ValueError if parameters are missing, left over or of other sizes.
    """
    with _sizes_of(refiner):
        num_layers, num_tokens, rank = parameters["learnable_tokens_a"].shape
        channels = parameters["learnable_tokens_b"].shape[-1]
        sizes = {"query_channels": len(parameters.get("transform.weight", ())), "any_batch": True}
        made = build_refiner(refiner, range(1, num_layers + 1), channels, num_tokens, rank, **sizes)
    if wrong := differences(tokens_to_release(dict(made.named_parameters()), refiner), parameters):
        raise ValueError(f"These are not the parameters of {refiner}: {wrong}.")
    ours = {theirs: name.format(branch=BRANCHES[refiner]) for theirs, name in NAMES.items()}
    made.load_state_dict(rename(parameters, ours), strict=False)
    return made.eval()


def load_head(parameters: dict[str, Tensor]) -> Mask2FormerHead:
    """The head that a release's parameters (without `decode_head.`) make; all sizes are read off them.

    Raises ValueError if parameters are missing, left over or of other sizes.
    """
    with _sizes_of("a Mask2Former head"):
        made = Mask2FormerHead(
            parameters["pixel_decoder.lateral_convs.0.conv.weight"].shape[1],
            parameters["level_embed.weight"].shape[1],
            len(parameters["cls_embed.weight"]) - 1,
            len(parameters.get("query_embed.weight", ())),
            **head_sizes(parameters),
        )
    if wrong := differences(head_to_release(dict(made.named_parameters())), parameters):
        raise ValueError(f"These are not the parameters of a Mask2Former head: {wrong}.")
    made.load_state_dict(rename(split_three(parameters, PACKED, PARTS), NAMES))
    return made.eval()


def head_sizes(parameters: dict[str, Tensor]) -> dict[str, int]:
    """Sizes of a head, read off a release's parameters."""
    pixel, decoder = "pixel_decoder.encoder.layers.", "transformer_decoder.layers."
    return {
        "attention_heads": len(parameters[f"{pixel}0.self_attn.attention_weights.bias"]) // 12,
        "pixel_layers": count_layers(parameters, pixel),
        "pixel_width": len(parameters[f"{pixel}0.ffn.layers.0.0.bias"]),
        "decoder_layers": count_layers(parameters, decoder),
        "decoder_width": len(parameters[f"{decoder}0.ffn.layers.0.0.bias"]),
    }


@contextlib.contextmanager
def _sizes_of(what: str) -> Iterator[None]:
    """Sizes are read off parameters here, which may be anything."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"These are not all parameters of {what}: {error.args[0]} is missing.") from None
    except (IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"These parameters have the sizes of no {what.removeprefix('a ')} ({error}).") from None
