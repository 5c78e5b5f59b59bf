"""Layer names of the original Flux.1 transformer (`double_blocks.0.img_attn.qkv`) and where they lie in diffusers' one.

The original keeps queries, keys and values (and, in single blocks, the first half of the feed-forward) in one matrix, four of seven
parts of which are the feed-forward; and its last modulation has shift before scale, diffusers' has scale first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from loraclr.adapter import Layer
from loraclr.formats.parts import Place, fused

# Without dots, because kohya files have none. Three targets are equal parts of one matrix.
_DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_mod_lin": ("norm1_context.linear",),
    # XLabs: what its attention processors add to the same matrices
    "processor_qkv_lora1": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "processor_qkv_lora2": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "processor_proj_lora1": ("attn.to_out.0",),
    "processor_proj_lora2": ("attn.to_add_out",),
}
_SINGLE = {
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
    "processor_qkv_lora": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "processor_proj_lora": ("proj_out",),
}
_OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer_linear": "proj_out",
}
_BLOCK = re.compile(r"(double|single)_blocks_(\d{1,3})_(\w+)")
_OURS = re.compile(r"transformer\.(single_|)transformer_blocks\.(\d{1,3})\.([\w.]+)")


def place(path: str) -> str | Place | None:
    """Canonical name or `Place` of an original path, its dots kept or replaced by underscores; None if it is no such path."""
    flat = path.replace(".", "_")
    if flat in _OUTER:
        return f"transformer.{_OUTER[flat]}"
    if flat == "final_layer_adaLN_modulation_1":
        name = "transformer.norm_out.linear"
        return Place(((name, 1, 2), (name, 0, 1)), 2)
    if not (match := _BLOCK.fullmatch(flat)):
        return None
    double, number, rest = match[1] == "double", int(match[2]), match[3]
    block = f"transformer.{'transformer_blocks' if double else 'single_transformer_blocks'}.{number}"
    if not double and rest == "linear1":
        names = (f"{block}.attn.to_q", f"{block}.attn.to_k", f"{block}.attn.to_v")
        return Place((*((name, part, part + 1) for part, name in enumerate(names)), (f"{block}.proj_mlp", 3, 7)), 7)
    targets = (_DOUBLE if double else _SINGLE).get(rest, ())
    if len(targets) == 1:
        return f"{block}.{targets[0]}"
    return Place(tuple((f"{block}.{target}", part, part + 1) for part, target in enumerate(targets)), 3) if targets else None


def original(layers: Iterable[Layer]) -> dict[str, Layer]:
    """Layers under the flat original names of their modules, pieces put together; those that Flux.1 does not have keep their names."""
    found: dict[str, Layer] = {}
    pieces: dict[str, dict[str, Layer]] = {}
    for layer in layers:
        flat = _flat(layer.name)
        target = place(flat) if flat else None
        if flat is None or target is None:
            found[layer.name] = layer
        elif isinstance(target, str):
            found[flat] = layer
        else:
            pieces.setdefault(flat, {})[layer.name] = layer
    for flat, mine in pieces.items():
        target = place(flat)
        assert isinstance(target, Place)
        found[flat] = fused(target, mine)
    return found


def _flat(name: str) -> str | None:
    """The flat original name of the module that a layer is, or is a piece of."""
    if match := _OURS.fullmatch(name):
        known = _inside()[match[1]].get(match[3])
        return f"{'single' if match[1] else 'double'}_blocks_{match[2]}_{known}" if known else None
    if name == "transformer.norm_out.linear":
        return "final_layer_adaLN_modulation_1"
    return next((flat for flat, path in _OUTER.items() if name == f"transformer.{path}"), None)


@cache
def _inside() -> dict[str, dict[str, str]]:
    """`""` for double and `single_` for single blocks -> diffusers' path in a block -> the original one, flat."""
    double = {target: flat for flat, targets in _DOUBLE.items() if not flat.startswith("processor") for target in targets}
    single = {target: flat for flat, targets in _SINGLE.items() if not flat.startswith("processor") for target in targets}
    return {"": double, "single_": single | dict.fromkeys(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear1")}
