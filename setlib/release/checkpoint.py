"""The bridge to the public releases of Rein and SET: their parameter names, checkpoints in and out, and parity.

A release's checkpoint holds the tokens (`backbone.reins.*`) and the head (`decode_head.*`), not the frozen backbone;
that of the frozen baseline holds the head alone.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from setlib.checkpoint import even_layers, write_model
from setlib.data.labels import CITYSCAPES
from setlib.experiment import PROFILES, Inference, Model
from setlib.files import write_atomic
from setlib.heads import Mask2FormerHead
from setlib.refiners import build_refiner
from setlib.run import Run
from setlib.tokens import Refiner
from setlib.weights.load import check_name

TOLERANCE = 1e-5
MODULES = {"rein": ("rein", "patches"), "released_set": ("set-released", "phase")}  # refiner, its low-rank branch
BRANCHES = dict(MODULES.values())
NAMES = {
    "scale": "scale",
    "learnable_tokens_a": "{branch}.tokens.a",
    "learnable_tokens_b": "{branch}.tokens.b",
    "mlp_token2feat": "{branch}.token_map",
    "mlp_delta_f": "{branch}.delta_map",
    "learnable_tokens2": "amplitude.tokens.t",
    "mlp_token2feat2": "amplitude.token_map",
    "mlp_delta_f2": "amplitude.delta_map",
    "transform": "query_map.transform",
    "merge": "query_map.merge",
}
PIXEL, DECODER = "pixel_decoder.encoder.layers.#.", "transformer_decoder.layers.#."
HEAD_NAMES = {  # of a release, and ours; # is a number
    "pixel_decoder.input_convs.#.conv": "pixel_decoder.input_projections.#.0",
    "pixel_decoder.input_convs.#.gn": "pixel_decoder.input_projections.#.1",
    **{
        f"{PIXEL}self_attn.{part}": f"{PIXEL}self_attn.{part}"
        for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    },
    f"{PIXEL}norms.0": f"{PIXEL}self_attn_layer_norm",
    f"{PIXEL}norms.1": f"{PIXEL}final_layer_norm",
    f"{PIXEL}ffn.layers.0.0": f"{PIXEL}fc1",
    f"{PIXEL}ffn.layers.1": f"{PIXEL}fc2",
    "pixel_decoder.level_encoding.weight": "pixel_decoder.level_embed",
    "pixel_decoder.lateral_convs.0.conv": "pixel_decoder.adapter_1.0",
    "pixel_decoder.lateral_convs.0.gn": "pixel_decoder.adapter_1.1",
    "pixel_decoder.output_convs.0.conv": "pixel_decoder.layer_1.0",
    "pixel_decoder.output_convs.0.gn": "pixel_decoder.layer_1.1",
    "pixel_decoder.mask_feature": "pixel_decoder.mask_projection",
    f"{DECODER}cross_attn.attn": "decoder.layers.#.cross_attn",
    f"{DECODER}self_attn.attn.out_proj": "decoder.layers.#.self_attn.out_proj",
    **{f"{DECODER}self_attn.attn.{part}_proj": f"decoder.layers.#.self_attn.{part}_proj" for part in "qkv"},
    f"{DECODER}norms.0": "decoder.layers.#.cross_attn_layer_norm",
    f"{DECODER}norms.1": "decoder.layers.#.self_attn_layer_norm",
    f"{DECODER}norms.2": "decoder.layers.#.final_layer_norm",
    f"{DECODER}ffn.layers.0.0": "decoder.layers.#.fc1",
    f"{DECODER}ffn.layers.1": "decoder.layers.#.fc2",
    "transformer_decoder.post_norm": "decoder.layernorm",
    "level_embed": "level_embed",
    "cls_embed": "classify",
    **{f"mask_embed.{2 * i}": f"decoder.mask_predictor.mask_embedder.{i}.0" for i in range(3)},
    "query_embed": "query_embed",
    "query_feat": "query_features",
    "querys2feat": "query_features",
}
THEIR_HEAD_NAMES = {ours: theirs for theirs, ours in HEAD_NAMES.items()}  # of query_features: querys2feat, the last
DINOV2 = {(384, 12): "small", (768, 12): "base", (1024, 24): "large", (1536, 40): "giant"}  # by channels and layers
LAYERS = dict(DINOV2.keys())  # by channels
THREE = re.compile(r"(.*self_attn\.attn\.)in_proj_(weight|bias)")  # query, key and value, one below the other


def our_name(name: str, branch: str) -> str:
    """A release's name of a token parameter as ours; branch: of the low-rank tokens, "patches" (Rein), "phase" (SET).

    Raises ValueError for a name that no release has.
    """
    base, dot, kind = name.partition(".")
    if base not in NAMES:
        raise ValueError(f"Unknown parameter '{name}': expected those of a Rein or SET release ({', '.join(NAMES)}).")
    return NAMES[base].format(branch=branch) + dot + kind


def their_names(refiner: str) -> dict[str, str]:
    """The release's names of a refiner's parameters, by ours."""
    return {ours.format(branch=BRANCHES[refiner]): theirs for theirs, ours in NAMES.items()}


def rename(names: Iterable[str], table: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Names whose start stands in a table (# is a number), as {name: new name}; and those whose start does not."""
    patterns = [(re.compile(re.escape(a).replace(r"\#", r"(\d+)") + r"(?=\.|$)"), b) for a, b in table.items()]
    found, left = {}, []
    for name in names:
        for pattern, new in patterns:
            if match := pattern.match(name):
                found[name] = new.replace("#", match[1] if match.groups() else "") + name[match.end() :]
                break
        else:
            left.append(name)
    return found, left


def head_from_release(parameters: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A release's head, without `decode_head.`, under our names, and the names that are not known."""
    parts: dict[str, Tensor] = {}
    for name, value in parameters.items():
        if match := THREE.fullmatch(name):
            parts |= {
                f"{match[1]}{part}_proj.{match[2]}": rows for part, rows in zip("qkv", value.chunk(3), strict=True)
            }
        else:
            parts[name] = value
    names, left = rename(parts, HEAD_NAMES)
    taken: dict[str, str] = {}
    for name, new in names.items():
        if taken.setdefault(new, name) != name:  # query_feat beside querys2feat
            left.append(name)
    return {new: parts[name].contiguous() for new, name in taken.items()}, left


def head_to_release(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our head under a release's names."""
    learned = {"query_features": "query_feat"} if "query_embed.weight" in parameters else {}  # else made from tokens
    names, left = rename(parameters, THEIR_HEAD_NAMES | learned)
    if left:
        raise ValueError(f"A release has no place for {', '.join(left)}.")
    parts = {new: parameters[name] for name, new in names.items()}
    for name in [name for name in parts if ".self_attn.attn.q_proj." in name]:
        rows = [parts.pop(name.replace(".q_proj.", f".{part}_proj."), None) for part in "qkv"]
        if all(row is not None for row in rows):
            parts[name.replace(".q_proj.", ".in_proj_")] = torch.cat(rows)
    return parts


def load_head(parameters: dict[str, Tensor]) -> Mask2FormerHead:
    """The head that a release's parameters (without `decode_head.`) make; all sizes are read off them.

    Raises ValueError if parameters are missing, left over or of other sizes.
    """
    ours, left = head_from_release(parameters)
    try:
        head = Mask2FormerHead(
            ours["pixel_decoder.adapter_1.0.weight"].shape[1],
            ours["level_embed.weight"].shape[1],
            len(ours["classify.weight"]) - 1,
            len(ours["query_embed.weight"]) if "query_embed.weight" in ours else 0,
            **head_sizes(ours),
        )
    except KeyError as error:
        (name,) = rename(error.args, THEIR_HEAD_NAMES)[0].values()
        raise ValueError(f"These are not all parameters of a Mask2Former head: {name} is missing.") from None
    except (IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"These parameters have the sizes of no Mask2Former head ({error}).") from None
    load_strictly(head, ours, "a Mask2Former head", THEIR_HEAD_NAMES, left)
    return head.eval()


def head_sizes(parameters: dict[str, Tensor]) -> dict[str, int]:
    """Sizes of a head, read off its parameters."""
    layers = {
        part: 1 + max((int(m[1]) for name in parameters if (m := re.match(part + r"(\d+)\.", name))), default=-1)
        for part in ("pixel_decoder.encoder.layers.", "decoder.layers.")
    }
    return {
        "attention_heads": len(parameters["pixel_decoder.encoder.layers.0.self_attn.attention_weights.bias"]) // 12,
        "pixel_layers": layers["pixel_decoder.encoder.layers."],
        "pixel_width": len(parameters["pixel_decoder.encoder.layers.0.fc1.bias"]),
        "decoder_layers": layers["decoder.layers."],
        "decoder_width": len(parameters["decoder.layers.0.fc1.bias"]),
    }


def load_strictly(
    module: nn.Module, parameters: dict[str, Tensor], what: str, table: dict[str, str], left: Iterable[str] = ()
) -> None:
    """Loads parameters into a module. Raises ValueError with the names that are missing, left over or of other size."""
    try:
        missing, unknown = module.load_state_dict(parameters, strict=False)
    except RuntimeError as error:
        raise ValueError(f"These parameters do not fit {what}: {str(error).splitlines()[-1].strip()}") from None
    missing = [rename([name], table)[0].get(name, name) for name in missing if name != "trained_batch"]
    missing = list(dict.fromkeys(re.sub(r"(self_attn\.attn\.)[qkv]_proj\.(\w+)", r"\1in_proj_\2", n) for n in missing))
    own = module.state_dict()
    shapes = {name: p.shape for name, p in parameters.items() if name in own and own[name].shape != p.shape}
    left = [*left, *unknown, *(f"{name} of shape {tuple(shape)}" for name, shape in shapes.items())]
    if wrong := [*(f"{name} is missing" for name in missing), *(f"{name} is left over" for name in left)]:
        raise ValueError(f"These are not the parameters of {what}: {', '.join(wrong)}.")


def load_release(refiner: str, parameters: dict[str, Tensor]) -> Refiner:
    """The refiner that a release's parameters make, under the release's names; all sizes are read off them.

    refiner: "rein" or "set-released". Raises ValueError if parameters are missing, left over or of other sizes.
    """
    needed = ("learnable_tokens_a", "learnable_tokens_b")
    if missing := [name for name in needed if name not in parameters]:
        raise ValueError(f"These are not all parameters of {refiner}: {', '.join(missing)} missing.")
    a, b = (parameters[name] for name in needed)
    if a.dim() != 3 or b.dim() != 3:
        raise ValueError(f"Tokens of {refiner} have three axes each, not {tuple(a.shape)} and {tuple(b.shape)}.")
    (num_layers, num_tokens, rank), channels = a.shape, b.shape[-1]
    query_channels = len(parameters.get("transform.weight", ()))
    sizes = {"query_channels": query_channels, "any_batch": True}
    made = build_refiner(refiner, range(1, num_layers + 1), channels, num_tokens, rank, **sizes).eval()
    ours = {our_name(name, BRANCHES[refiner]): value for name, value in parameters.items()}
    load_strictly(made, ours, refiner, their_names(refiner))
    return made


class Inert:
    """What stands for every object of a checkpoint that is no tensor: nothing in it is run or kept."""

    def __new__(cls, *_: object, **__: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a release's `.pth`; nothing in it is executed. Raises ValueError if it cannot be read."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Inert, name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        state = content.get("state_dict", content) if isinstance(content, dict) else None
        if not isinstance(state, dict):
            raise TypeError(f"expected a dict with the parameters in 'state_dict', got a {type(content).__name__}")
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        why = next((line for line in lines if line.startswith("Trying to load")), lines[0])[:200]
        raise ValueError(f"{path} cannot be read as a checkpoint ({why}).") from None


def layers_read(num_layers: int) -> tuple[int, ...]:
    """Layers whose features the releases' head reads: 8, 12, 16, 24 of ViT-L's, else evenly spaced; () if not known."""
    return (8, 12, 16, 24) if num_layers == 24 else even_layers(num_layers) if num_layers else ()


def import_checkpoint(path: Path, out: Path, backbone: str = "") -> Run:
    """A release's checkpoint as a run folder, for evaluate and predict. The backbone itself is not needed.

    A head alone becomes a run with the refiner none, its learned queries with it.
    backbone: that the release was trained on, if it is not the DINOv2 of its size.
    Raises ValueError if the folder is not empty, or with the names that are missing or left over.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder: name another with --out.")
    state = read_checkpoint(path)
    tokens, head = (_under(state, prefix) for prefix in ("backbone.reins.", "decode_head."))
    left = [name for name in state if not name.startswith(("backbone.reins.", "decode_head."))]
    left += [f"backbone.reins.{name}" for name in tokens if name.partition(".")[0] not in NAMES]
    left += [f"decode_head.{name}" for name in head_from_release(head)[1]]
    if left:
        raise ValueError(f"{path} holds more than tokens and a head: {', '.join(left)} left over.")
    if bad := [name for name, value in state.items() if not (value.is_floating_point() and value.isfinite().all())]:
        raise ValueError(f"{path} holds values that are no finite numbers: {', '.join(bad)}.")
    if backbone:
        check_name(backbone)
    if not tokens and not {"query_embed.weight", "query_feat.weight"} <= head.keys():
        raise ValueError(f"{path} holds no tokens (backbone.reins.*), nor learned queries (query_embed, query_feat).")
    refiner = "set-released" if "learnable_tokens2" in tokens else "rein" if tokens else "none"
    made, mask_head = load_release(refiner, tokens) if tokens else None, load_head(head)
    channels = mask_head.channels
    num_layers, num_tokens, rank = LAYERS.get(channels, 0), len(mask_head.query_features.weight), Model.rank
    if made:
        num_layers, num_tokens, rank = tokens["learnable_tokens_a"].shape
        channels = tokens["learnable_tokens_b"].shape[-1]
    sizes = head_sizes(mask_head.state_dict())
    hidden, num_classes = mask_head.classify.in_features, mask_head.classify.out_features - 1
    if num_classes != len(CITYSCAPES):
        raise ValueError(
            f"{path} knows {num_classes} classes: expected the {len(CITYSCAPES)} train classes of Cityscapes."
        )
    if not backbone and (channels, num_layers) not in DINOV2:
        raise ValueError(
            f"No DINOv2 has {num_layers or 'any'} layers of {channels} channels: name the backbone with --backbone."
        )
    if made and (made.query_map is None or mask_head.query_embed is not None or mask_head.channels != channels):
        raise ValueError(f"The head of {path} does not read its tokens: expected a release with linked queries.")
    paper = PROFILES["paper"]
    model = Model(
        backbone=backbone or f"facebook/dinov2-{DINOV2[channels, num_layers]}",
        patch_size=paper.model.patch_size,
        refiner=refiner,
        refined_layers=(),
        feature_layers=layers_read(num_layers),
        num_tokens=num_tokens,
        rank=rank,
        any_batch=True,
        head="mask2former",
        head_channels=hidden,
        **sizes,
    )
    experiment = replace(paper, model=model, inference=Inference(windows=1))  # as released: one window at a time
    experiment.override()
    run = Run(out, experiment)
    tensors = {f"refiner.{n}": t for n, t in made.state_dict().items()} if made else {}
    tensors |= {f"head.{n}": t for n, t in mask_head.state_dict().items()}
    run.write_json("experiment.json", experiment.to_dict())
    write_model(out / "model", tensors, experiment, fingerprint="")
    return run


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
    folder = run.path / "model"
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"{folder} holds no saved model: train one first.")
    try:
        tensors = load_file(folder / "model.safetensors")
    except SafetensorError as error:
        raise ValueError(
            f"{folder}/model.safetensors cannot be read ({error}): delete {folder} and train again."
        ) from None
    head, branch = head_to_release(_under(tensors, "head.")), BRANCHES.get(config.refiner)
    num_layers = LAYERS.get(load_head(head).channels, 0)
    if branch:
        num_layers = len(tensors.get(f"refiner.{branch}.tokens.a", ()))
    read = config.feature_layers or even_layers(num_layers)
    everywhere = config.refined_layers in ((), tuple(range(1, num_layers + 1))) or not branch
    if not everywhere or num_layers and read != layers_read(num_layers):
        raise ValueError(
            f"A release refines every layer and reads {layers_read(num_layers)} of {num_layers}: {run.path} refines "
            f"{config.refined_layers or 'all'} and reads {read}."
        )
    tokens = {name: value for name, value in _under(tensors, "refiner.").items() if name != "trained_batch"}
    names, left = rename(tokens, their_names(config.refiner) if branch else {})
    if left:
        raise ValueError(f"A release has no place for {', '.join(left)}.")
    state = {f"backbone.reins.{new}": tokens[name] for name, new in names.items()}
    state |= {f"decode_head.{name}": value for name, value in head.items()}
    if branch:
        load_release(config.refiner, _under(state, "backbone.reins."))  # whole?
    buffer = io.BytesIO()
    torch.save({"meta": {}, "state_dict": state}, buffer)
    write_atomic(path, buffer.getvalue())


def verify(path: Path) -> list[dict]:
    """Compares our modules with the golden numbers of a file, item by item: {"item", "difference"}, the largest one.

    A difference is absolute, or relative to a number that is larger than 1.

    The file is an npz with input/B<b> (B, 1 + N, C), class token first, and for each module ("rein", "released_set")
    param/<name>, output/B<b>/layer<l>, queries, and the gradients of the sum of squares of one layer's output at one
    batch: grad_input/B<b>/layer<l> and grad/<name>. Or it holds a mask head: param/decode_head.<name>, queries, and for
    sizes input/<size>/<0 to 3>, mask_features/<size>, and class_logits and mask_logits/<size>/stage<s>.
    Raises ValueError if the file cannot be read or holds none of it.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            golden = {key: torch.from_numpy(np.array(file[key])) for key in file.files}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as an npz of golden numbers ({error}).") from None
    try:
        rows = _compare_head(golden)
        for module, (refiner, branch) in MODULES.items():
            part = {key[len(module) + 1 :]: value for key, value in golden.items() if key.startswith(f"{module}/")}
            if part:
                made = load_release(refiner, _under(part, "param/"))
                compared = _compare(made, branch, part, golden)
                rows += [{"item": f"{module}/{row}", "difference": value} for row, value in compared]
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{path} is not laid out as golden numbers are ({type(error).__name__}: {first}).") from None
    if not rows:
        raise ValueError(f"{path} holds no golden numbers of {', '.join(MODULES)} or a decode_head.")
    return rows


@torch.no_grad()
def _compare_head(golden: dict[str, Tensor]) -> list[dict]:
    """The rows of a mask head; none if the file holds none."""
    parameters = _under(golden, "param/decode_head.")
    if not parameters:
        return []
    head, rows = load_head(parameters), []
    sizes = sorted({key.split("/")[1] for key in golden if key.startswith("input/")})
    for size in sizes:
        maps = [golden[f"input/{size}/{i}"] for i in range(4)]
        finest = head.pixel_decoder(maps, [tuple(one.shape[-2:]) for one in maps]).finest
        found = {f"mask_features/{size}": head.pixel_decoder.mask_projection(finest)}
        output = head.decode(maps, golden.get("queries"))
        for stage, (classes, masks) in enumerate(zip(*output, strict=True)):
            found |= {f"class_logits/{size}/stage{stage}": classes, f"mask_logits/{size}/stage{stage}": masks}
        expected = [
            key for key in golden if re.fullmatch(rf"(mask_features|(class|mask)_logits)/{size}(/stage\d+)?", key)
        ]
        rows += [{"item": key, "difference": _distance(found[key], golden[key])} for key in expected]
    return rows


def _under(values: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in values.items() if key.startswith(prefix)}


def _apply(refiner: Refiner, tokens: Tensor, layer: int) -> Tensor:
    """A refiner on tokens (B, 1 + N, C), class token first, after layer `layer`, counted from 0 as the releases do."""
    patches = refiner(tokens[:, None, 1:], layer + 1)  # (B, 1, N, C)
    return torch.cat([tokens[:, :1], patches[:, 0]], dim=1)


def _compare(refiner: Refiner, branch: str, part: dict[str, Tensor], golden: dict[str, Tensor]) -> list[tuple]:
    """(item, largest difference) of a module's golden numbers."""
    rows = []
    for key, expected in part.items():
        place = re.fullmatch(r"(output|grad_input)/B(\d+)/layer(\d+)", key)
        if not place and key != "queries":
            continue
        if key == "queries":
            rows.append((key, _distance(refiner.queries(), expected)))
            continue
        tokens, layer = golden[f"input/B{place[2]}"].clone().requires_grad_(), int(place[3])
        output = _apply(refiner, tokens, layer)
        if place[1] == "output":
            rows.append((key, _distance(output, expected)))
            continue
        refiner.zero_grad()
        output.square().sum().backward()
        rows.append((key, _distance(tokens.grad, expected)))
        found = dict(refiner.named_parameters())
        gradients = _under(part, "grad/").items()
        rows += [(f"grad/{name}", _distance(found[our_name(name, branch)].grad, value)) for name, value in gradients]
    return rows


def _distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as `verify` defines it; infinite where the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    return ((found - expected).abs() / expected.abs().clamp(min=1)).max().item()
