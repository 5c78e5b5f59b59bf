"""The real models of the families on the meta device, and their layers' original names by walking the original architecture."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from loraclr.formats import names

LINEAR_OR_CONV = (torch.nn.Linear, torch.nn.Conv2d)
Shapes = dict[str, tuple[int, ...]]  # canonical name -> shape of the weight


def _clip(layers: int, width: int, inner: int, *, projected: bool = False, activation: str = "gelu") -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        hidden_act=activation,
        projection_dim=width,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _t5() -> torch.nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(d_model=4096, d_ff=10240, d_kv=64, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu", vocab_size=32128)
    )


def _unet(**config: object) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=64, **config)


def _sdxl_unet() -> torch.nn.Module:
    return _unet(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def _flux() -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True)  # all else as in FLUX.1-dev


BUILD = {
    "sd1": {
        "unet": lambda: _unet(cross_attention_dim=768, attention_head_dim=8),
        "text_encoder": lambda: _clip(12, 768, 3072),
    },
    "sd2": {
        "unet": lambda: _unet(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
        "text_encoder": lambda: _clip(23, 1024, 4096),
    },
    "sdxl": {
        "unet": _sdxl_unet,
        "text_encoder": lambda: _clip(12, 768, 3072),
        "text_encoder_2": lambda: _clip(32, 1280, 5120, projected=True),
    },
    "flux": {"transformer": _flux, "text_encoder": lambda: _clip(12, 768, 3072), "text_encoder_2": _t5},
}


@functools.cache
def shapes(family: str) -> Shapes:
    """Every linear and convolutional layer of the family's real model."""
    found: Shapes = {}
    with torch.device("meta"):
        for component, build in BUILD[family].items():
            for path, module in build().named_modules():
                if isinstance(module, LINEAR_OR_CONV):
                    found[names.canonical(component, path)] = tuple(module.weight.shape)
    return found


@dataclass(frozen=True)
class Original:
    """A UNet as its original code numbers it: per level, how many transformer blocks its attentions have, 0 for none."""

    depths: tuple[int, ...]
    middle: int
    per_block: int = 2

    def layers(self) -> Iterator[tuple[str, str]]:
        """Original path, diffusers path."""
        last = len(self.depths) - 1
        yield from {"input_blocks.0.0": "conv_in", "out.2": "conv_out"}.items()
        yield from {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}.items()
        number = 1
        for level, depth in enumerate(self.depths):
            for layer in range(self.per_block):
                yield from self._block(f"input_blocks.{number}", f"down_blocks.{level}", layer, depth)
                number += 1
            if level < last:
                yield f"input_blocks.{number}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
                number += 1
        number = 0
        for level, depth in enumerate(reversed(self.depths)):
            for layer in range(self.per_block + 1):
                yield from self._block(f"output_blocks.{number}", f"up_blocks.{level}", layer, depth)
                if layer == self.per_block and level < last:
                    yield f"output_blocks.{number}.{2 if depth else 1}.conv", f"up_blocks.{level}.upsamplers.0.conv"
                number += 1
        yield from self._resnet("middle_block.0", "mid_block.resnets.0")
        yield from self._attention("middle_block.1", "mid_block.attentions.0", self.middle)
        yield from self._resnet("middle_block.2", "mid_block.resnets.1")

    def _block(self, old: str, new: str, layer: int, depth: int) -> Iterator[tuple[str, str]]:
        yield from self._resnet(f"{old}.0", f"{new}.resnets.{layer}")
        if depth:
            yield from self._attention(f"{old}.1", f"{new}.attentions.{layer}", depth)

    @staticmethod
    def _resnet(old: str, new: str) -> Iterator[tuple[str, str]]:
        inner = {"in_layers.2": "conv1", "out_layers.3": "conv2", "emb_layers.1": "time_emb_proj", "skip_connection": "conv_shortcut"}
        for a, b in inner.items():
            yield f"{old}.{a}", f"{new}.{b}"

    @staticmethod
    def _attention(old: str, new: str, depth: int) -> Iterator[tuple[str, str]]:
        inner = [f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")] + ["ff.net.0.proj", "ff.net.2"]
        for path in ("proj_in", "proj_out", *(f"transformer_blocks.{block}.{part}" for block in range(depth) for part in inner)):
            yield f"{old}.{path}", f"{new}.{path}"


def original_unet(family: str) -> dict[str, str]:
    """Original path -> diffusers path of the layers that the real model has."""
    original = {"sd1": Original((1, 1, 1, 0), 1), "sd2": Original((1, 1, 1, 0), 1), "sdxl": Original((0, 2, 10), 10)}[family]
    known = shapes(family)
    found = {old: new for old, new in original.layers() if f"unet.{new}" in known}  # not every residual block has a shortcut
    if family == "sdxl":
        found |= {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
    return found


def original_flux(double: int = 19, single: int = 38) -> dict[str, tuple[int, int]]:
    """Original path -> (out, in) of Flux.1's transformer, by its published code."""
    width, inner = 3072, 12288
    found = {"img_in": (width, 64), "txt_in": (width, 4096), "final_layer.linear": (64, width)}
    found["final_layer.adaLN_modulation.1"] = (2 * width, width)
    for embedder, size in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        found |= {f"{embedder}.in_layer": (width, size), f"{embedder}.out_layer": (width, width)}
    for number in range(double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{number}.{stream}"
            found |= {f"{block}_attn.qkv": (3 * width, width), f"{block}_attn.proj": (width, width), f"{block}_mod.lin": (6 * width, width)}
            found |= {f"{block}_mlp.0": (inner, width), f"{block}_mlp.2": (width, inner)}
    for number in range(single):
        block = f"single_blocks.{number}"
        found |= {f"{block}.linear1": (3 * width + inner, width), f"{block}.linear2": (width, width + inner)}
        found[f"{block}.modulation.lin"] = (3 * width, width)
    return found
