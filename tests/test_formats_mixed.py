"""Twelve adapters in twelve kinds of files, merged on a base of Stable Diffusion 1.5's layout as if none had ever been a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from concepts import concept
from families_twins import clip, vae
from formats_families import Original
from safetensors.torch import save_file
from torch import Tensor

from loraclr.adapter import Adapter, LoraLayer
from loraclr.collect import Collection
from loraclr.formats import load_adapter, names, save_adapter
from loraclr.merge import merge
from loraclr.pipeline import Pipeline

KEYS = tuple(
    f"unet.{block}.transformer_blocks.0.attn2.to_{which}"
    for block in ("mid_block.attentions.0", "up_blocks.3.attentions.2")
    for which in "kv"
)
TEXT = ("text_encoder.encoder.layers.1.self_attn.q_proj",)
LAYERS = (*TEXT, *KEYS, "unet.down_blocks.2.attentions.1.transformer_blocks.0.attn1.to_q")
TINY = Collection(fit=("a {}",), held_out=("{} at night",), preserve=("",), steps=1, sample=4, spatial=1)
SINGLE = {"dtype": torch.float32}


@pytest.fixture(scope="module")
def base() -> Pipeline:
    """Its blocks, layers and attentions one for one, at a fortieth of their width."""
    from conftest import tiny_tokenizer
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16, 32, 32), norm_num_groups=4, cross_attention_dim=16, attention_head_dim=2
        )
        text = clip(16, activation="quick_gelu")
        pipe = StableDiffusionPipeline(
            unet=model.eval(), vae=vae().eval(), text_encoder=text.eval(), tokenizer=tiny_tokenizer(),
            scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    return Pipeline(pipe)


def original(name: str) -> str:
    """`input_blocks.….transformer_blocks.…`, or the text encoder's path."""
    component, path = names.split(name)
    return (
        {new: old for old, new in Original((1, 1, 1, 0), 1).layers()}[path]
        if component == "unet"
        else names.with_text_model(component, path)
    )


def flat(name: str) -> str:
    component, path = names.split(name)
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[component]
    return prefix + names.with_text_model(component, path).replace(".", "_")


def factors(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    return layer.down, layer.up * layer.scale


def kohya_original(layer: LoraLayer, base: Pipeline) -> dict[str, Tensor]:
    down, up = factors(layer)
    stem = ("lora_unet_" if layer.name.startswith("unet.") else "lora_te_") + original(layer.name).replace(".", "_")
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up / 2, f"{stem}.alpha": torch.tensor(2.0 * layer.rank)}


def comfy(layer: LoraLayer, base: Pipeline) -> dict[str, Tensor]:
    down, up = factors(layer)
    stem = ("diffusion_model." if layer.name.startswith("unet.") else "text_encoders.clip_l.transformer.") + original(layer.name)
    return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}


def processors(layer: LoraLayer, base: Pipeline) -> dict[str, Tensor]:
    """diffusers' of 2023."""
    down, up = factors(layer)
    component, path = names.split(layer.name)
    parent, _, leaf = names.with_text_model(component, path).rpartition(".")
    stem = f"unet.{parent}.processor.{leaf}_lora" if component == "unet" else f"text_encoder.{parent}.to_q_lora"
    return {f"{stem}.down.weight": down, f"{stem}.up.weight": up}


def loha(layer: LoraLayer, base: Pipeline) -> dict[str, Tensor]:
    """Times a matrix of ones."""
    down, up = factors(layer)
    ones_a, ones_b = torch.zeros_like(up), torch.zeros_like(down)
    ones_a[:, 0], ones_b[0] = 1.0, 1.0
    parts = {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": ones_a, "hada_w2_b": ones_b, "alpha": torch.tensor(float(layer.rank))}
    return {f"{flat(layer.name)}.{part}": tensor for part, tensor in parts.items()}


def lokr(layer: LoraLayer, base: Pipeline) -> dict[str, Tensor]:
    down, up = factors(layer)
    parts = {"lokr_w1": torch.full((1, 1), 0.5), "lokr_w2_a": up, "lokr_w2_b": down, "alpha": torch.tensor(2.0 * layer.rank)}
    return {f"{flat(layer.name)}.{part}": tensor for part, tensor in parts.items()}


def dora(layer: LoraLayer, base: Pipeline) -> dict[str, Tensor]:
    """Whose magnitudes are those that W + D has anyway."""
    down, up = factors(layer)
    whole = base.base_weight(layer.name) + layer.delta()
    parts = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": whole.norm(dim=1, keepdim=True)}
    return {f"{flat(layer.name)}.{part}": tensor for part, tensor in parts.items()}


Own = Callable[[LoraLayer, Pipeline], dict[str, Tensor]]
KINDS: tuple[str | Own, ...] = (
    *("kohya", "diffusers", "peft", "edlora", "diff", "bundle"),
    *(kohya_original, comfy, processors, loha, lokr, dora),
)


def written(adapter: Adapter, kind: str | Own, base: Pipeline, folder: Path) -> Path:
    if isinstance(kind, str):
        path = folder / (adapter.name + {"peft": "", "edlora": ".pth"}.get(kind, ".safetensors"))
        return save_adapter(adapter, path, format=kind, **SINGLE)
    tensors = {key: tensor.contiguous() for layer in adapter for key, tensor in kind(layer, base).items()}
    save_file(tensors, folder / f"{adapter.name}.safetensors", metadata={"modelspec.trigger_phrase": adapter.call})
    return folder / f"{adapter.name}.safetensors"


def test_twelve_kinds_of_files_merge_as_what_is_in_them(base, tmp_path):
    assert sum(name.startswith("unet.") for name in base.modules) == 282, "as many layers as Stable Diffusion 1.5"
    adapters = [concept(base, f"c{n}", LAYERS, rank=1 + n % 3, seed=n, triggers=(f"c{n} woman",)) for n in range(len(KINDS))]
    adapters[5] = adapters[5].with_(tokens={"<five>": torch.randn(1, 16)}, triggers=("<five> woman",))
    calls = {adapter.name: adapter.call for adapter in adapters}
    files = [written(adapter, kind, base, tmp_path) for adapter, kind in zip(adapters, KINDS, strict=True)]
    for file, adapter in zip(files, adapters, strict=True):
        read = load_adapter(file, base=base)
        assert read.layers.keys() == adapter.layers.keys() and read.tokens.keys() == adapter.tokens.keys(), file
        for name, layer in adapter.layers.items():
            torch.testing.assert_close(read.layers[name].delta(), layer.delta(), rtol=1e-5, atol=1e-6, msg=f"{file} {name}")
    found, expected = (merge(given, base=base, calls=calls, collection=TINY, rank=8) for given in (files, adapters))
    back = load_adapter(found.save(tmp_path / "all.safetensors", **SINGLE))
    assert len(found.inputs) == 12 and set(back.layers) == set(LAYERS) and "<five>" in back.tokens
    for name in LAYERS:
        whole = expected.adapter.layers[name].delta(torch.float64)
        assert float((back.layers[name].delta(torch.float64) - whole).norm()) <= 1e-3 * float(whole.norm()), name
