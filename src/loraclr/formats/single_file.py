"""The one-file checkpoints of SD1.x, SD2.x, SDXL and Flux.1: where each tensor of a diffusers pipeline stands in the original layout.

`model.diffusion_model.` is the UNet, `first_stage_model.` the autoencoder; the text encoders are `cond_stage_model.` or, of SDXL,
`conditioner.embedders.0.` and `.1.`. A CLIP of OpenCLIP's code (the one of SD2.x, the second of SDXL) has queries, keys and values in
one matrix. Of Flux.1 it is the transformer alone. Pure dictionary work; that diffusers reads the outcome as the same model is what the
tests show.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from loraclr.errors import FormatError
from loraclr.formats import flux

State = Mapping[str, Tensor]  # path in the module -> tensor

_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_OUTER = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def checkpoint(parts: Mapping[str, State], *, family: str | None, layers: int = 2) -> dict[str, Tensor]:
    """The tensors of a whole checkpoint. `parts` are `unet`, `vae`, `text_encoder` and, of SDXL, `text_encoder_2`, as diffusers and
    transformers name them, or Flux.1's `transformer`; `family` is `sd1`, `sd2`, `sdxl` or `flux`; `layers` a UNet's layers per block.

    Raises FormatError for other families and for a tensor without a place.
    """
    if family == "flux":
        return {f"model.diffusion_model.{path}": tensor for path, tensor in flux.to_original(parts["transformer"]).items()}
    if family not in ("sd1", "sd2", "sdxl"):
        seen = family or "this pipeline"
        raise FormatError(f"checkpoints of one file are written for SD1.x, SD2.x, SDXL and Flux.1, not for {seen}; write a fused folder")
    attentions = {match[0] for path in parts["unet"] if (match := re.match(r"up_blocks\.\d+\.attentions", path))}
    found = {f"model.diffusion_model.{_unet(path, layers, attentions)}": tensor for path, tensor in parts["unet"].items()}
    places = vae_paths(parts["vae"])
    for path, tensor in parts["vae"].items():
        name = places[path]
        square = name.partition(".attn_1.")[2].endswith("weight") and tensor.ndim == 2
        found[f"first_stage_model.{name}"] = tensor[:, :, None, None] if square else tensor
    first = {"sd1": "cond_stage_model.transformer", "sd2": "cond_stage_model.model", "sdxl": "conditioner.embedders.0.transformer"}[family]
    states = {first: parts["text_encoder"]}
    if family == "sdxl":
        states["conditioner.embedders.1.model"] = parts["text_encoder_2"]
    for prefix, state in states.items():
        plain = {path.removeprefix("text_model."): tensor for path, tensor in state.items() if not path.endswith("position_ids")}
        named = open_clip(plain) if prefix.endswith(".model") else {f"text_model.{path}": tensor for path, tensor in plain.items()}
        found |= {f"{prefix}.{path}": tensor for path, tensor in named.items()}
    return found


def vae_paths(paths: Iterable[str]) -> dict[str, str]:
    """Path of every tensor of diffusers' autoencoder -> the original one."""
    paths = list(paths)
    levels = 1 + max((int(match[1]) for path in paths if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", path))), default=0)
    return {path: _vae(path, levels) for path in paths}


def open_clip(state: State) -> dict[str, Tensor]:
    """A text encoder of transformers (paths without `text_model.`) in OpenCLIP's layout. Its projection is stored transposed there."""
    found: dict[str, Tensor] = {}
    for path, tensor in state.items():
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", path)
        if path in _OPEN_CLIP_OUTER:
            found[_OPEN_CLIP_OUTER[path]] = tensor
        elif path == "text_projection.weight":
            found["text_projection"] = tensor.T.contiguous()
        elif match and match[2] in _OPEN_CLIP:
            found[f"transformer.resblocks.{match[1]}.{_OPEN_CLIP[match[2]]}.{match[3]}"] = tensor
        elif match and match[2] == "self_attn.q_proj":
            three = [state[f"encoder.layers.{match[1]}.self_attn.{which}_proj.{match[3]}"] for which in "qkv"]
            found[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"] = torch.cat(three)
        elif not (match and match[2] in ("self_attn.k_proj", "self_attn.v_proj")):
            raise _homeless(f"text encoder {path}")
    return found


def _unet(path: str, layers: int, attentions: set[str]) -> str:
    """`attentions` are the up blocks that have any: in those an upsampler is the third of its block, else the second."""
    module, _, leaf = path.rpartition(".")
    if module in _UNET:
        return f"{_UNET[module]}.{leaf}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", path):
        number = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{number}.{_inside(match[1], match[3])}"
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", path):
        down, block, layer = match[1] == "down", int(match[2]), int(match[4])
        number = block * (layers + 1) + layer + down  # input block 0 is conv_in; up blocks have a layer more
        return f"{'in' if down else 'out'}put_blocks.{number}.{int(match[3] == 'attentions')}.{_inside(match[3], match[5])}"
    if match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(\w+)", path):
        return f"input_blocks.{(int(match[1]) + 1) * (layers + 1)}.0.op.{match[2]}"
    if match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(\w+)", path):
        place = 2 if f"up_blocks.{match[1]}.attentions" in attentions else 1
        return f"output_blocks.{int(match[1]) * (layers + 1) + layers}.{place}.conv.{match[2]}"
    raise _homeless(f"UNet {path}")


def _inside(kind: str, path: str) -> str:
    if kind == "attentions":
        return path
    module, _, leaf = path.rpartition(".")
    if module not in _RESNET:
        raise _homeless(f"UNet residual block {path}")
    return f"{_RESNET[module]}.{leaf}"


def _vae(path: str, levels: int) -> str:
    path = path.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if match := re.fullmatch(r"(\w+)\.mid_block\.resnets\.(\d)\.(.+)", path):
        return f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"
    if match := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(\w+)", path):
        if match[2] not in _VAE_ATTENTION:
            raise _homeless(f"autoencoder {path}")
        return f"{match[1]}.mid.attn_1.{_VAE_ATTENTION[match[2]]}.{match[3]}"
    if match := re.fullmatch(r"(en|de)coder\.(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)", path):
        number = int(match[3]) if match[2] == "down" else levels - 1 - int(match[3])
        inner = f"block.{match[5]}" if match[4] == "resnets" else f"{match[2]}sample"
        return f"{match[1]}coder.{match[2]}.{number}.{inner}.{match[6]}"
    if re.fullmatch(r"((en|de)coder\.(conv_in|conv_out|norm_out)|quant_conv|post_quant_conv)\.\w+", path):
        return path
    raise _homeless(f"autoencoder {path}")


def _homeless(what: str) -> FormatError:
    return FormatError(f"{what} has no place in a checkpoint of the original layout; write a fused folder")
