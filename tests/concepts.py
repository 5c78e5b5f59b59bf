"""Three synthetic adapters for the tiny pipeline of conftest.py, as unlike each other as files in the wild."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from loraclr.adapter import Adapter, LoraLayer
from loraclr.collect import Collection
from loraclr.pipeline import Pipeline

TEXT = ("text_encoder.encoder.layers.0.self_attn.out_proj", "text_encoder.encoder.layers.1.mlp.fc1")
BLOCK = "unet.mid_block.attentions.0.transformer_blocks.0"
DEEP = "unet.up_blocks.0.attentions.0.transformer_blocks.0"
KEYS = (f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn2.to_v", f"{DEEP}.attn2.to_k")
SPATIAL = (f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_out.0", f"{DEEP}.ff.net.2", "unet.mid_block.resnets.0.conv1")
SMALL = Collection(
    fit=("a photo of a {}", "a {} on a beach"),
    held_out=("a {} at night",),
    preserve=("", "a dog", "a house"),
    steps=2,
    padded=True,
    sample=12,
)


def lora(pipeline: Pipeline, name: str, *, rank: int, seed: int, strength: float = 0.5) -> LoraLayer:
    """A random change of a layer, `strength` times as large as its weight."""
    generator = torch.Generator().manual_seed(seed)
    weight = pipeline.base_weight(name)
    down = torch.randn(rank, *weight.shape[1:], generator=generator)
    up = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2), generator=generator)
    size = (up.flatten(1) @ down.flatten(1)).norm()
    return LoraLayer(name, down, up * (strength * weight.norm() / size), 1.0)


def concept(pipeline: Pipeline, name: str, layers: Sequence[str], *, rank: int, seed: int, **fields: object) -> Adapter:
    made = [lora(pipeline, layer, rank=rank, seed=100 * seed + index) for index, layer in enumerate(layers)]
    return Adapter.of(made, name=name).with_(family="toy", **fields)


def three(pipeline: Pipeline) -> list[Adapter]:
    """`ada` has text encoder layers, `ben` layer-wise tokens, `cai` no layer but keys and values; ranks 2, 3 and 1."""
    rows = len(pipeline.cross_attention_layers), pipeline.base_weight(TEXT[0]).shape[1]
    embeddings = torch.randn(*rows, generator=torch.Generator().manual_seed(7)) * 0.1
    return [
        concept(pipeline, "ada", (*TEXT, *KEYS, *SPATIAL), rank=2, seed=1, triggers=("ada woman",)),
        concept(pipeline, "ben", (*KEYS, *SPATIAL), rank=3, seed=2, tokens={"<ben>": embeddings}, triggers=("ben man",)),
        concept(pipeline, "cai", KEYS, rank=1, seed=3, triggers=("cai man",)),
    ]


def fingerprint(pipeline: Pipeline) -> str:
    """Of every parameter and buffer, to the last bit, and of whatever else a context might leave behind."""
    pipe, digest = pipeline._pipe, hashlib.sha256()
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        for key, tensor in [*part.named_parameters(), *part.named_buffers()]:
            digest.update(key.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    hooks = sum(len(module._forward_pre_hooks) for module in pipeline.modules.values())
    processors = [type(processor).__name__ for processor in pipe.unet.attn_processors.values()]
    digest.update(repr((hooks, processors, len(pipe.tokenizer), pipeline.tokens, pipeline.adapters)).encode())
    return digest.hexdigest()
