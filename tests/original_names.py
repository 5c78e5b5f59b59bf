"""A diffusers pipeline's weights under the names of Stable Diffusion's original code, as single-file checkpoints have them."""

from __future__ import annotations

import re
from typing import Any

import torch
from formats_families import Original
from torch import Tensor

State = dict[str, Tensor]

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
_VAE = {
    "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut", "downsamplers.0": "downsample", "upsamplers.0": "upsample", "resnets": "block",
}  # fmt: skip
_OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def checkpoint(parts: dict[str, Any]) -> State:
    """`parts` are the components of a pipeline: unet, vae, text_encoder and, of an XL, text_encoder_2."""
    found = {f"model.diffusion_model.{key}": tensor for key, tensor in unet(parts["unet"]).items()}
    found |= {f"first_stage_model.{key}": tensor for key, tensor in vae(parts["vae"]).items()}
    if "text_encoder_2" in parts:
        found |= {f"conditioner.embedders.0.transformer.text_model.{key}": t for key, t in clip(parts["text_encoder"]).items()}
        found |= {f"conditioner.embedders.1.model.{key}": t for key, t in open_clip(parts["text_encoder_2"]).items()}
    elif parts["text_encoder"].config.num_hidden_layers == 23 or parts["text_encoder"].config.hidden_act == "gelu":
        found |= {f"cond_stage_model.model.{key}": tensor for key, tensor in open_clip(parts["text_encoder"]).items()}
    else:
        found |= {f"cond_stage_model.transformer.text_model.{key}": tensor for key, tensor in clip(parts["text_encoder"]).items()}
    return found


def unet(model: Any) -> State:
    config = model.config
    per = config.transformer_layers_per_block
    blocks = (per,) * len(config.down_block_types) if isinstance(per, int) else tuple(per)
    depths = tuple(depth if "Cross" in kind else 0 for depth, kind in zip(blocks, config.down_block_types, strict=True))
    places = {new: old for old, new in Original(depths, blocks[-1], config.layers_per_block).layers()}
    ends = {
        "conv_norm_out": "out.0", "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    }  # fmt: skip
    found = {}
    for key, tensor in model.state_dict().items():
        path, _, leaf = key.rpartition(".")
        if match := re.match(r"(.*resnets\.\d+)\.(\w+)$", path):
            first = places[f"{match[1]}.conv1"].removesuffix(".in_layers.2")
            found[f"{first}.{_RESNET[match[2]]}.{leaf}"] = tensor
        elif match := re.match(r"(.*attentions\.\d+)\.(.+)$", path):
            found[f"{places[match[1] + '.proj_in'].removesuffix('.proj_in')}.{match[2]}.{leaf}"] = tensor
        else:
            found[f"{(places | ends)[path]}.{leaf}"] = tensor
    return found


def vae(model: Any) -> State:
    last, found = len(model.config.block_out_channels) - 1, {}
    for key, tensor in model.state_dict().items():
        name = re.sub(r"decoder\.up_blocks\.(\d+)", lambda match: f"decoder.up.{last - int(match[1])}", key)
        name = name.replace("encoder.down_blocks", "encoder.down")
        for new, old in _VAE.items():
            name = name.replace(new, old)
        linear = ".attn_1." in name and tensor.ndim == 2  # 1x1 convolutions in the original
        found[name] = tensor[:, :, None, None] if linear else tensor
    return found


def clip(model: Any) -> State:
    return {key.removeprefix("text_model."): tensor for key, tensor in model.state_dict().items()}


def open_clip(model: Any) -> State:
    state, found = clip(model), {}
    for key, tensor in state.items():
        name = key.replace("encoder.layers", "transformer.resblocks")
        for new, old in _OPEN_CLIP.items():
            name = name.replace(f".{new}.", f".{old}.")
        if match := re.match(r"(.*)\.self_attn\.q_proj\.(\w+)$", name):
            sides = [state[key.replace("q_proj", side)] for side in ("q_proj", "k_proj", "v_proj")]
            found[f"{match[1]}.attn.in_proj_{match[2]}"] = torch.cat(sides)
        elif ".self_attn." not in name:
            found[name] = tensor
        elif "out_proj" in name:
            found[name.replace("self_attn", "attn")] = tensor
    ends = {
        "embeddings.token_embedding.weight": "token_embedding.weight", "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias",
    }  # fmt: skip
    found = {ends.get(name, name): tensor for name, tensor in found.items()}
    found["text_projection"] = found.pop("text_projection.weight", torch.eye(model.config.hidden_size)).T.contiguous()
    return found
