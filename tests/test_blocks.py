"""Weights by block: which layer takes which of the numbers."""

from __future__ import annotations

import pytest
import torch

from loraclr.adapter import Adapter, DenseLayer, LoraLayer
from loraclr.blocks import SD1, attention_places, multipliers, place, weighted
from loraclr.errors import UsageError

NAMES = "BASE IN01 IN02 IN04 IN05 IN07 IN08 MID OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11".split()
BY_HAND = {  # kohya's input_blocks, middle_block and output_blocks of Stable Diffusion 1, as diffusers calls them
    "text_encoder.encoder.layers.3.mlp.fc1": "BASE",
    "unet.conv_in": "BASE",
    "unet.time_embedding.linear_1": "BASE",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": "IN01",
    "unet.down_blocks.0.attentions.1.proj_in": "IN02",
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": "IN04",
    "unet.down_blocks.1.attentions.1.proj_out": "IN05",
    "unet.down_blocks.2.attentions.0.proj_out": "IN07",
    "unet.down_blocks.2.attentions.1.transformer_blocks.0.ff.net.2": "IN08",
    "unet.mid_block.attentions.0.proj_in": "MID",
    "unet.up_blocks.1.attentions.0.proj_in": "OUT03",
    "unet.up_blocks.1.attentions.2.proj_in": "OUT05",
    "unet.up_blocks.2.attentions.1.proj_in": "OUT07",
    "unet.up_blocks.3.attentions.0.proj_in": "OUT09",
    "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0": "OUT11",
    # no attention of their own: the last before them
    "unet.down_blocks.0.resnets.0.conv1": "IN01",
    "unet.down_blocks.0.resnets.1.conv1": "IN02",
    "unet.down_blocks.0.downsamplers.0.conv": "IN02",
    "unet.down_blocks.3.resnets.0.conv1": "IN08",
    "unet.mid_block.resnets.1.conv2": "MID",
    "unet.up_blocks.0.resnets.2.conv1": "MID",
    "unet.up_blocks.0.upsamplers.0.conv": "MID",
    "unet.up_blocks.1.upsamplers.0.conv": "OUT05",
}


def test_the_seventeen_numbers_of_stable_diffusion_1():
    found = multipliers(BY_HAND, range(17), SD1)
    assert {name: NAMES[int(number)] for name, number in found.items()} == BY_HAND


def test_stable_diffusion_1_has_these_sixteen_blocks():
    """Of the real architecture, but narrow."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, attention_head_dim=2, cross_attention_dim=8)
    assert attention_places(name for name, _ in unet.named_modules() if name.endswith("attn2")) == SD1
    assert len(SD1) == 16


def test_before_the_first_attention_counts_the_first():
    blocks = ((0, 1, 0), (1, 0, 0))
    assert multipliers(["unet.down_blocks.0.resnets.0.conv1", "unet.conv_out"], [5, 6, 7], blocks) == {
        "unet.down_blocks.0.resnets.0.conv1": 6, "unet.conv_out": 5
    }  # fmt: skip
    assert multipliers(["unet.down_blocks.10.attentions.0.x", "unet.down_blocks.2.attentions.0.x"], [0, 1, 2], ((0, 2, 0), (0, 10, 0))) == {
        "unet.down_blocks.10.attentions.0.x": 2, "unet.down_blocks.2.attentions.0.x": 1
    }  # fmt: skip
    assert place("unet.down_blocks.10.attentions.0.x") == (0, 10, 0), "by number, not by letter"


def test_a_layer_is_multiplied_once_whatever_it_is():
    low = LoraLayer("unet.mid_block.attentions.0.proj_in", torch.randn(2, 3), torch.randn(4, 2), 0.5)
    dense = DenseLayer("text_encoder.encoder.layers.0.mlp.fc1", torch.randn(4, 3))
    one, other = Adapter.of([low, dense], name="one"), Adapter.of([low], name="other")
    changed, same = weighted([one, other], {"one": [3.0, 0.25]})
    assert same is other
    assert torch.allclose(changed.layers[low.name].delta(), 0.25 * low.delta())
    assert torch.allclose(changed.layers[dense.name].delta(), 3 * dense.change)


def test_without_a_base_seventeen_numbers_are_stable_diffusion_1s():
    layer = LoraLayer("unet.up_blocks.1.attentions.0.proj_in", torch.randn(2, 3), torch.randn(4, 2))
    adapter = Adapter.of([layer], name="one")
    (changed,) = weighted([adapter], {"one": list(range(17))})
    assert torch.allclose(changed.layers[layer.name].delta(), 8 * layer.delta())
    (changed,) = weighted([adapter], {"one": [1, 5]})
    assert torch.allclose(changed.layers[layer.name].delta(), 5 * layer.delta())
    for wrong, seen in ({"one": [1] * 16}, "16 block weights; 2 are needed"), ({"two": [1, 1]}, "'two', but the adapters are one"):
        with pytest.raises(UsageError, match=seen):
            weighted([adapter], wrong)


def test_a_change_that_is_worked_out_when_asked_for_is_multiplied_too():
    """As LoHa and LoKr of full rank are."""
    from loraclr.adapter import ProductLayer
    from loraclr.blocks import weighted

    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    one = Adapter.of([ProductLayer(name, (2, 2), lambda dtype: torch.eye(2, dtype=dtype))], name="one")
    [changed] = weighted([one], {"one": (1.0, 0.5)})
    assert torch.equal(changed.layers[name].delta(), torch.eye(2) / 2)
