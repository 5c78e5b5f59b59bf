"""Names of the original Flux.1 transformer (`double_blocks.0.img_attn.qkv`) and where they lie in diffusers' one: layers and checkpoints.

The original keeps queries, keys and values (and, in single blocks, the first half of the feed-forward) in one matrix, four of seven
parts of which are the feed-forward; and its last modulation has shift before scale, diffusers' has scale first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from loraclr.adapter import Layer
from loraclr.errors import FormatError
from loraclr.formats.parts import Place, fused

T = TypeVar("T")

# By path in a block. Three targets are equal parts of one matrix.
_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    # XLabs: what its attention processors add to the same matrices
    "processor.qkv_lora1": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "processor.qkv_lora2": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "processor.proj_lora1": ("attn.to_out.0",),
    "processor.proj_lora2": ("attn.to_add_out",),
}
_SINGLE = {
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
    "processor.qkv_lora": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "processor.proj_lora": ("proj_out",),
}
_OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_NORMS = {
    "": {"attn.norm_q": "img_attn.norm.query_norm", "attn.norm_k": "img_attn.norm.key_norm"}
    | {"attn.norm_added_q": "txt_attn.norm.query_norm", "attn.norm_added_k": "txt_attn.norm.key_norm"},
    "single_": {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"},
}
_BLOCK = re.compile(r"(double|single)_blocks_(\d{1,3})_(\w+)")
_LAST = "final_layer.adaLN_modulation.1"
_OURS = re.compile(r"transformer\.(single_|)transformer_blocks\.(\d{1,3})\.([\w.]+)")


def place(path: str) -> str | Place | None:
    """Canonical name or `Place` of an original path, its dots kept or replaced by underscores; None if it is no such path."""
    flat = path.replace(".", "_")
    if (outer := _flat(tuple(_OUTER.items())).get(flat)) is not None:
        return f"transformer.{outer}"
    if flat == _LAST.replace(".", "_"):
        name = "transformer.norm_out.linear"
        return Place(((name, 1, 2), (name, 0, 1)), 2)
    if not (match := _BLOCK.fullmatch(flat)):
        return None
    double, number, rest = match[1] == "double", int(match[2]), match[3]
    block = f"transformer.{'transformer_blocks' if double else 'single_transformer_blocks'}.{number}"
    if not double and rest == "linear1":
        names = (f"{block}.attn.to_q", f"{block}.attn.to_k", f"{block}.attn.to_v")
        return Place((*((name, part, part + 1) for part, name in enumerate(names)), (f"{block}.proj_mlp", 3, 7)), 7)
    targets = _flat(tuple((_DOUBLE if double else _SINGLE).items())).get(rest, ())
    if len(targets) == 1:
        return f"{block}.{targets[0]}"
    return Place(tuple((f"{block}.{target}", part, part + 1) for part, target in enumerate(targets)), 3) if targets else None


@cache
def _flat(table: tuple[tuple[str, T], ...]) -> dict[str, T]:
    """As kohya's files have no dots."""
    return {path.replace(".", "_"): target for path, target in table}


def original(layers: Iterable[Layer]) -> dict[str, Layer]:
    """Layers under the flat original names of their modules, pieces put together; those that Flux.1 does not have keep their names."""
    found: dict[str, Layer] = {}
    pieces: dict[str, dict[str, Layer]] = {}
    for layer in layers:
        flat = (path_of(layer.name) or "").replace(".", "_")
        target = place(flat)
        if target is None:
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


def path_of(name: str) -> str | None:
    """The original path of the module that a layer is, or is a piece of."""
    if match := _OURS.fullmatch(name):
        known = _inside()[match[1]].get(match[3])
        return f"{'single' if match[1] else 'double'}_blocks.{match[2]}.{known}" if known else None
    if name == "transformer.norm_out.linear":
        return _LAST
    return next((path for path, ours in _OUTER.items() if name == f"transformer.{ours}"), None)


@cache
def _inside() -> dict[str, dict[str, str]]:
    """`""` for double and `single_` for single blocks -> diffusers' path in a block -> the original one."""
    double = {target: path for path, targets in _DOUBLE.items() if not path.startswith("processor") for target in targets}
    single = {target: path for path, targets in _SINGLE.items() if not path.startswith("processor") for target in targets}
    return {"": double, "single_": single | dict.fromkeys(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear1")}


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of diffusers' transformer, by their paths in it, as the original code names and arranges them."""
    found: dict[str, Tensor] = {}
    pieces: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        module, _, leaf = key.rpartition(".")
        name = f"transformer.{module}"
        match, path = _OURS.fullmatch(name), path_of(name)
        target = place(path) if path else None
        if match and (norm := _NORMS[match[1]].get(match[3])):
            found[f"{'single' if match[1] else 'double'}_blocks.{match[2]}.{norm}.scale"] = tensor
        elif isinstance(target, Place):
            pieces.setdefault(f"{path}.{leaf}", {})[name] = tensor
        elif target is not None:
            found[f"{path}.{leaf}"] = tensor
        else:
            raise FormatError(f"{name} has no place in a checkpoint of Flux.1; write a fused folder")
    for key, mine in pieces.items():
        target = place(key.rpartition(".")[0])
        assert isinstance(target, Place)
        whole = torch.cat(list(mine.values()))  # of the right size, in whatever order
        for name, rows in target.order(len(whole)).items():
            whole[rows] = mine[name]
        found[key] = whole
    return found


def to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `to_original`. Raises FormatError with the keys that Flux.1 does not have."""
    found: dict[str, Tensor] = {}
    unknown = []
    norms = {(kind, old): new for kind, table in _NORMS.items() for new, old in table.items()}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        target = place(module)
        match = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", module)
        kind = "single_" if match and match[1] == "single" else ""
        if isinstance(target, Place):
            for name, rows in target.order(len(tensor)).items():
                found[f"{name}.{leaf}"] = tensor[rows]
        elif target is not None:
            found[f"{target}.{leaf}"] = tensor
        elif match and leaf == "scale" and (kind, match[3]) in norms:
            found[f"transformer.{kind}transformer_blocks.{match[2]}.{norms[kind, match[3]]}.weight"] = tensor
        else:
            unknown.append(key)
    if unknown:
        raise FormatError(f"{len(unknown)} weights that Flux.1 does not have, such as {min(unknown)}")
    return {name.removeprefix("transformer."): tensor for name, tensor in found.items()}
