"""Names: every layer of the real SD1.5 UNet and CLIP-L text encoder is found again from its flattened form, and in one way only."""

from __future__ import annotations

import pytest
import torch

from loraclr.formats import kohya, ldm, names


@pytest.fixture(scope="module")
def sd15() -> dict[str, torch.nn.Module]:
    """Canonical name -> layer, on the meta device: the real configuration without its weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {
        names.canonical(component, path): module
        for component, model in (("unet", unet), ("text_encoder", text))
        for path, module in model.named_modules()
        if isinstance(module, kinds)
    }


def segmentations(component: str, flat: str) -> int:
    """In how many ways the pieces between underscores can be grouped into known words."""
    pieces = flat.split("_")
    ways = [1] + [0] * len(pieces)
    for end in range(1, len(pieces) + 1):
        for start in range(end):
            word = "_".join(pieces[start:end])
            if word in names.WORDS[component] or (end - start == 1 and word.isdecimal()):
                ways[end] += ways[start]
    return ways[-1]


def test_the_configuration_is_sd15(sd15):
    assert sum(name.startswith("text_encoder.") for name in sd15) == 72
    assert sum(".attn" in name for name in sd15 if name.startswith("unet.")) == 128
    assert {"unet.conv_in", "unet.down_blocks.0.downsamplers.0.conv", "unet.up_blocks.3.resnets.2.conv_shortcut"} <= sd15.keys()


def test_every_layer_maps_back_uniquely(sd15):
    flats = set()
    for name in sd15:
        component, path = names.split(name)
        assert names.component_of(path) == component
        flat = names.with_text_model(component, path).replace(".", "_")
        assert names.dotted(component, flat) == names.with_text_model(component, path)
        assert segmentations(component, flat) == 1, flat
        flats.add((component, flat))
        assert kohya._place(kohya._flat(name, two=False)) == name
    assert len(flats) == len(sd15)


@pytest.mark.parametrize(
    ("component", "flat", "path"),
    [
        ("unet", "mid_block_attentions_0_proj_in", "mid_block.attentions.0.proj_in"),
        ("unet", "up_blocks_1_resnets_2_time_emb_proj", "up_blocks.1.resnets.2.time_emb_proj"),
        ("text_encoder", "encoder_layers_11_self_attn_out_proj", "encoder.layers.11.self_attn.out_proj"),
        ("text_encoder_2", "encoder_block_3_layer_1_DenseReluDense_wi_0", "encoder.block.3.layer.1.DenseReluDense.wi_0"),
        ("transformer", "single_transformer_blocks_7_proj_mlp", "single_transformer_blocks.7.proj_mlp"),
        ("transformer", "mid_block_attentions_0_proj_in", None),
        ("unet", "down_blocks_0_attentions_0_to_x", None),
        ("unet", "down_blocks__attentions", None),
        ("unet", "", None),
    ],
)
def test_by_hand(component, flat, path):
    assert names.dotted(component, flat) == path


def ldm_layers() -> dict[str, str]:
    """Original name -> diffusers name by walking the original architecture: channel multipliers 1 2 4 4, attention in the first three."""
    found: dict[str, str] = {"input_blocks_0_0": "conv_in", "out_2": "conv_out"}
    found |= {"time_embed_0": "time_embedding.linear_1", "time_embed_2": "time_embedding.linear_2"}
    inner = {"in_layers_2": "conv1", "out_layers_3": "conv2", "emb_layers_1": "time_emb_proj", "skip_connection": "conv_shortcut"}
    transformer = (
        "proj_in",
        "transformer_blocks_0_attn1_to_q",
        "transformer_blocks_0_attn2_to_out_0",
        "transformer_blocks_0_ff_net_0_proj",
        "proj_out",
    )

    def block(old: str, new: str, *, attention: bool) -> None:
        for a, b in inner.items():
            found[f"{old}_0_{a}"] = f"{new.format('resnets')}.{b}"
        for path in transformer if attention else ():
            found[f"{old}_1_{path}"] = f"{new.format('attentions')}.{names.dotted('unet', path)}"

    number = 1
    for level in range(4):
        for layer in range(2):
            block(f"input_blocks_{number}", f"down_blocks.{level}.{{}}.{layer}", attention=level < 3)
            number += 1
        if level < 3:
            found[f"input_blocks_{number}_0_op"] = f"down_blocks.{level}.downsamplers.0.conv"
            number += 1
    number = 0
    for level in range(4):
        for layer in range(3):
            block(f"output_blocks_{number}", f"up_blocks.{level}.{{}}.{layer}", attention=level > 0)
            if layer == 2 and level < 3:
                found[f"output_blocks_{number}_{2 if level else 1}_conv"] = f"up_blocks.{level}.upsamplers.0.conv"
            number += 1
    for a, b in inner.items():
        found |= {f"middle_block_0_{a}": f"mid_block.resnets.0.{b}", f"middle_block_2_{a}": f"mid_block.resnets.1.{b}"}
    for path in transformer:
        found[f"middle_block_1_{path}"] = f"mid_block.attentions.0.{names.dotted('unet', path)}"
    return found


def test_original_block_names(sd15):
    layers = ldm_layers()
    for old, new in layers.items():
        assert kohya._place(f"lora_unet_{old}") == f"unet.{new}", old
    reached = {f"unet.{new}" for new in layers.values()}
    assert {name for name in sd15 if name.startswith("unet.") and "transformer_blocks" not in name} <= reached | {
        name.replace("_shortcut", "") for name in reached
    }


@pytest.mark.parametrize(
    "old", ["input_blocks_3_0_in_layers_2", "input_blocks_4_2_proj_in", "output_blocks_1_1_conv", "middle_block_3_x", "input_blocks_0_1_op"]
)
def test_no_such_original_layer(old):
    assert ldm.is_ldm(old) and kohya._place(f"lora_unet_{old}") is None
