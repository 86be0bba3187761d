"""Parameter names of the public releases of Rein and SET, and ours."""

from __future__ import annotations

import torch
from torch import Tensor

from setlib.weights.convert import rename, split_three

BRANCHES = {"rein": "patches", "set-released": "phase"}  # refiner -> its branch of low-rank tokens
TOKENS = {  # of a release, and ours
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
PIXEL, DECODER = "pixel_decoder.encoder.layers.#", "transformer_decoder.layers.#"
HEAD = {  # of a release, and ours; # is a number
    "pixel_decoder.input_convs.#.conv": "pixel_decoder.input_projections.#.0",
    "pixel_decoder.input_convs.#.gn": "pixel_decoder.input_projections.#.1",
    f"{PIXEL}.self_attn": f"{PIXEL}.self_attn",
    f"{PIXEL}.norms.0": f"{PIXEL}.self_attn_layer_norm",
    f"{PIXEL}.norms.1": f"{PIXEL}.final_layer_norm",
    f"{PIXEL}.ffn.layers.0.0": f"{PIXEL}.fc1",
    f"{PIXEL}.ffn.layers.1": f"{PIXEL}.fc2",
    "pixel_decoder.level_encoding.weight": "pixel_decoder.level_embed",
    "pixel_decoder.lateral_convs.0.conv": "pixel_decoder.adapter_1.0",
    "pixel_decoder.lateral_convs.0.gn": "pixel_decoder.adapter_1.1",
    "pixel_decoder.output_convs.0.conv": "pixel_decoder.layer_1.0",
    "pixel_decoder.output_convs.0.gn": "pixel_decoder.layer_1.1",
    "pixel_decoder.mask_feature": "pixel_decoder.mask_projection",
    f"{DECODER}.cross_attn.attn": "decoder.layers.#.cross_attn",
    f"{DECODER}.self_attn.attn": "decoder.layers.#.self_attn",
    f"{DECODER}.norms.0": "decoder.layers.#.cross_attn_layer_norm",
    f"{DECODER}.norms.1": "decoder.layers.#.self_attn_layer_norm",
    f"{DECODER}.norms.2": "decoder.layers.#.final_layer_norm",
    f"{DECODER}.ffn.layers.0.0": "decoder.layers.#.fc1",
    f"{DECODER}.ffn.layers.1": "decoder.layers.#.fc2",
    "transformer_decoder.post_norm": "decoder.layernorm",
    "cls_embed": "classify",
    "mask_embed.0": "decoder.mask_predictor.mask_embedder.0.0",
    "mask_embed.2": "decoder.mask_predictor.mask_embedder.1.0",
    "mask_embed.4": "decoder.mask_predictor.mask_embedder.2.0",
    "query_feat": "query_features",  # learned
    "querys2feat": "query_features",  # made from tokens
}
PACKED = "self_attn.attn.in_proj_"  # query, key and value, one below the other
PARTS = tuple(f"self_attn.attn.{part}_proj." for part in "qkv")


def tokens_from_release(tokens: dict[str, Tensor], refiner: str) -> dict[str, Tensor]:
    """The parameters of a release's tokens under our names; refiner: "rein" or "set-released"."""
    return rename(tokens, {theirs: ours.format(branch=BRANCHES[refiner]) for theirs, ours in TOKENS.items()})


def tokens_to_release(tokens: dict[str, Tensor], refiner: str) -> dict[str, Tensor]:
    """The parameters of our refiner under a release's names, without its note of the batch size."""
    tokens = {name: value for name, value in tokens.items() if name != "trained_batch"}
    return rename(tokens, {ours.format(branch=BRANCHES[refiner]): theirs for theirs, ours in TOKENS.items()})


def head_from_release(head: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a release's head under our names."""
    return rename(split_three(head, PACKED, PARTS), HEAD)


def head_to_release(head: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of our head under a release's names."""
    table = {ours: theirs for theirs, ours in HEAD.items()}
    if "query_embed.weight" in head:
        table["query_features"] = "query_feat"
    named = rename(head, table)
    for name in [name for name in named if PARTS[0] in name]:
        rows = [named.pop(name.replace(PARTS[0], part), None) for part in PARTS]
        if all(row is not None for row in rows):
            named[name.replace(PARTS[0], PACKED)] = torch.cat(rows)
    return named
