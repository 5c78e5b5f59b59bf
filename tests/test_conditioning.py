"""Layer-wise prompts and region control: the identities that hold whatever the weights."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraclr.conditioning import ConditionedAttention, Region, RegionStates, conditioned, map_size
from loraclr.errors import PipelineError, UsageError
from loraclr.pipeline import Pipeline

DIM, LAYERS = 32, 10
WHOLE = (0.0, 0.0, 1.0, 1.0)


@pytest.fixture
def pipeline(tiny_pipe) -> Pipeline:
    return Pipeline(tiny_pipe())


def as_array(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def states_of(pipeline: Pipeline, *prompts: str) -> torch.Tensor:
    return pipeline.encode(list(prompts))


# ---- sizes and cells


@pytest.mark.parametrize(
    ("latent", "cells", "expected"),
    [
        ((64, 64), 4096, (64, 64)),
        ((64, 64), 64, (8, 8)),
        ((64, 128), 512, (16, 32)),
        ((7, 5), 12, (4, 3)),
        ((7, 5), 4, (2, 2)),
        ((7, 5), 6, (3, 2)),
        ((75, 53), 19 * 14, (19, 14)),
        ((3, 1), 1, (1, 1)),
    ],
)
def test_map_size(latent, cells, expected):
    assert map_size(latent, cells) == expected


def test_map_size_says_when_it_cannot():
    with pytest.raises(PipelineError, match="10 cells is no halving of the 7x5 latent"):
        map_size((7, 5), 10)


@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 5))
def test_map_size_finds_every_ceiling_halving(height, width, times):
    for _ in range(times):
        height, width = -(-height // 2), -(-width // 2)
    assert map_size((height, width), height * width) == (height, width)


def cells(box, height, width) -> list[int]:
    return RegionStates(torch.zeros(1, 1, 1), box).cells(height, width).tolist()


def test_cells_lie_wholly_inside_the_box():
    assert cells((0, 0, 0.5, 0.5), 4, 4) == [0, 1, 4, 5]
    assert cells((0.25, 0.3, 1, 1), 4, 4) == [6, 7, 10, 11, 14, 15]
    assert cells(WHOLE, 2, 3) == list(range(6))
    assert cells((0.3, 0.3, 0.45, 0.45), 2, 2) == []


@given(st.integers(1, 64), st.data())
def test_a_box_on_cell_borders_loses_no_cell_to_rounding(size, data):
    first = data.draw(st.integers(0, size - 1))
    last = data.draw(st.integers(first + 1, size))
    assert cells((first / size, 0, last / size, 1), size, 1) == list(range(first, last))


@pytest.mark.parametrize(
    ("prompt", "box", "message"),
    [
        ("a", (0, 0, 1.1, 1), "not inside the picture"),
        ("a", (-0.1, 0, 1, 1), "not inside the picture"),
        ("a", (0, 0, float("nan"), 1), "not inside the picture"),
        ("a", (0.5, 0, 0.5, 1), "reversed or empty"),
        ("a", (0, 1, 1, 0), "reversed or empty"),
        (" ", WHOLE, "has no prompt"),
    ],
)
def test_mistaken_regions(prompt, box, message):
    with pytest.raises(UsageError, match=message):
        Region(prompt, box)


# ---- one attention layer


@pytest.fixture
def attention(pipeline):
    return pipeline._unet.get_submodule(pipeline.cross_attention_layers[3])


def run(attention, hidden, context, *, regions=(), layer=3, latent=(8, 8), mask=None):
    return ConditionedAttention(attention.processor, layer=layer, latent=latent, regions=regions)(attention, hidden, context, mask)


def test_cells_outside_are_untouched_and_cells_inside_replaced(attention):
    hidden, context, region = torch.randn(2, 16, 64), torch.randn(2, 7, DIM), torch.randn(2, 7, DIM)
    ordinary, replaced = attention(hidden, context), attention(hidden, region)
    out = run(attention, hidden, context, regions=[RegionStates(region, (0.5, 0.0, 1.0, 0.5))])
    inside = torch.zeros(4, 4, dtype=torch.bool)
    inside[2:, :2] = True
    assert torch.equal(out[:, ~inside.flatten()], ordinary[:, ~inside.flatten()])
    torch.testing.assert_close(out[:, inside.flatten()], replaced[:, inside.flatten()])


def test_overlaps_are_averaged(attention):
    hidden, context, first, second = torch.randn(1, 16, 64), *(torch.randn(1, 7, DIM) for _ in range(3))
    out = run(attention, hidden, context, regions=[RegionStates(first, WHOLE), RegionStates(second, (0.0, 0.0, 0.5, 1.0))])
    torch.testing.assert_close(out[:, :8], (attention(hidden, first) + attention(hidden, second))[:, :8] / 2)
    torch.testing.assert_close(out[:, 8:], attention(hidden, first)[:, 8:])


def test_identical_overlapping_regions_are_one(attention):
    hidden, context = torch.randn(1, 16, 64), torch.randn(1, 7, DIM)
    region = RegionStates(torch.randn(1, 7, DIM), (0.0, 0.0, 0.5, 0.75))
    assert torch.equal(run(attention, hidden, context, regions=[region, region]), run(attention, hidden, context, regions=[region]))


def test_a_region_too_small_for_a_coarse_map_is_skipped(attention):
    hidden, context = torch.randn(1, 64, 64), torch.randn(1, 7, DIM)
    region = RegionStates(torch.randn(1, 7, DIM), (0.6, 0.6, 0.9, 0.9))
    coarse = hidden[:, :4]
    assert torch.equal(run(attention, coarse, context, regions=[region]), attention(coarse, context))
    changed = (run(attention, hidden, context, regions=[region]) != attention(hidden, context)).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [45, 46, 53, 54]  # cells from 5 to 7 of 8 a side


def test_each_half_uses_its_own_prompt_for_every_picture(attention):
    """Two pictures with guidance: rows are negative, negative, positive, positive."""
    hidden, context, region = torch.randn(4, 16, 64), torch.randn(4, 7, DIM), torch.randn(2, 7, DIM)
    out = run(attention, hidden, context, regions=[RegionStates(region, WHOLE)])
    torch.testing.assert_close(out, attention(hidden, region[[0, 0, 1, 1]]))


@pytest.mark.parametrize("layer", [0, 3, 9])
def test_a_layer_takes_its_own_states_in_context_and_region(attention, layer):
    hidden, context, region = torch.randn(2, 16, 64), torch.randn(2, LAYERS, 7, DIM), torch.randn(1, LAYERS, 7, DIM)
    assert torch.equal(run(attention, hidden, context, layer=layer), attention(hidden, context[:, layer]))
    out = run(attention, hidden, context, layer=layer, regions=[RegionStates(region, WHOLE)])
    torch.testing.assert_close(out, attention(hidden, region[:, layer].expand(2, -1, -1)))


@pytest.mark.parametrize("kind", ["AttnProcessor", "AttnProcessor2_0"])
def test_masks_and_upcasting_are_the_stock_processors(attention, kind):
    from diffusers.models import attention_processor

    attention.set_processor(getattr(attention_processor, kind)())
    attention.upcast_attention = attention.upcast_softmax = True
    hidden, context, mask = torch.randn(2, 16, 64), torch.randn(2, 7, DIM), torch.zeros(2, 1, 7)
    mask[:, :, 4:] = -10000.0
    masked = attention(hidden, context, attention_mask=mask)
    assert torch.equal(run(attention, hidden, context, mask=mask), masked)
    assert not torch.allclose(masked, attention(hidden, context))
    out = run(attention, hidden, context, mask=mask, regions=[RegionStates(context[:1], (0.0, 0.0, 0.5, 1.0))])
    assert torch.equal(out[:, 8:], masked[:, 8:])


def test_processors_come_back_themselves(pipeline):
    attentions = [pipeline._unet.get_submodule(path) for path in pipeline.cross_attention_layers]
    kept = [attention.processor for attention in attentions]
    with pytest.raises(ZeroDivisionError), conditioned(attentions, latent=(8, 8)):  # noqa: PT012
        assert [attention.processor.layer for attention in attentions] == list(range(LAYERS))
        1 / 0  # noqa: B018
    assert all(attention.processor is processor for attention, processor in zip(attentions, kept, strict=True))


@pytest.mark.parametrize(
    "config",
    [
        {"use_linear_projection": True, "attention_head_dim": (2, 4)},
        {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
        | {"transformer_layers_per_block": (1, 2)},
        {"upcast_attention": True, "mid_block_type": None},
        {"encoder_hid_dim": 24, "encoder_hid_dim_type": "text_proj"},
    ],
    ids=["sd2", "sdxl", "no middle", "projected"],
)
def test_a_whole_region_is_its_prompt_in_every_unet(config):
    """Also where the UNet projects the text itself: regions are then given in the projection's width."""
    from diffusers import UNet2DConditionModel

    base = {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": 16, "norm_num_groups": 4}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2, "attention_head_dim": 4}
    unet = UNet2DConditionModel(**(base | blocks | config)).eval()
    layers = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    noise, context, region = torch.randn(2, 4, 8, 8), *(torch.randn(2, 5, config.get("encoder_hid_dim", 16)) for _ in range(2))
    states = unet.encoder_hid_proj(region) if unet.encoder_hid_proj is not None else region
    with torch.inference_mode():
        expected = unet(noise, 500, encoder_hidden_states=region).sample
        with conditioned(layers, latent=(8, 8), regions=[RegionStates(states, WHOLE)]):
            seen = unet(noise, 500, encoder_hidden_states=context).sample
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-5)
    assert len(layers) >= 2


def test_regions_without_cross_attention_are_refused():
    with (
        pytest.raises(PipelineError, match="no cross-attention modules"),
        conditioned([], latent=(8, 8), regions=[RegionStates(None, WHOLE)]),
    ):
        pass


def test_a_missing_prompt_is_said(attention):
    with pytest.raises(PipelineError, match="without a prompt"):
        run(attention, torch.randn(1, 16, 64), None)


# ---- whole pictures


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_identical_layers_are_ordinary_states(pipeline, guidance):
    states = states_of(pipeline, "a man", "b")
    options = {"seeds": [1, 2], "steps": 3, "guidance": guidance, "negative": states_of(pipeline, "bad") if guidance > 1 else None}
    layered = pipeline.denoise(states[:, None].expand(-1, LAYERS, -1, -1), **options)
    torch.testing.assert_close(layered, pipeline.denoise(states, **options), rtol=0, atol=1e-5)


def test_the_unet_reads_each_layers_states(pipeline):
    keys = [f"unet.{path}.to_k" for path in pipeline.cross_attention_layers]
    states, seen = torch.randn(2, LAYERS, 5, DIM), {}
    with pipeline.captured(keys, seen.__setitem__):
        pipeline.denoise(states, seeds=[0, 1], steps=1)
    for layer, key in enumerate(keys):
        assert torch.equal(seen[key], states[:, layer].flatten(0, 1))


def test_no_regions_are_an_ordinary_picture(pipeline):
    prompts, options = ["a man", "b"], {"seeds": [1, 2], "steps": 3}
    assert (as_array(pipeline.sample(prompts, regions=[], **options)) == as_array(pipeline.sample(prompts, **options))).all()


@pytest.mark.parametrize("tokens", [{}, {"<x>": 1}, {"<x>": LAYERS}])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_one_whole_region_with_the_pictures_prompt_is_ordinary(pipeline, tokens, guidance):
    with pipeline.with_tokens({token: torch.randn(rows, DIM) for token, rows in tokens.items()}):
        options = {"seeds": [1, 2], "steps": 3, "guidance": guidance, "negative": "bad"}
        ordinary = pipeline.sample(["a <x>"] * 2, **options)
        regional = pipeline.sample(["a <x>"] * 2, regions=[Region("a <x>", WHOLE, "bad")], **options)
        replaced = pipeline.sample(["a man"] * 2, regions=[Region("a <x>", WHOLE, "bad")], **options)
    assert np.abs(as_array(ordinary) - as_array(regional)).max() <= 1
    assert np.abs(as_array(ordinary) - as_array(replaced)).max() <= 1


def test_the_unconditional_half_uses_the_regions_negative(pipeline):
    options = {"seeds": [1], "steps": 3, "guidance": 8.0}
    ordinary = as_array(pipeline.sample(["a man"], negative="zzz", **options))
    regional = as_array(pipeline.sample(["a man"], negative="bad", regions=[Region("a man", WHOLE, "zzz")], **options))
    assert np.abs(ordinary - regional).max() <= 1
    assert np.abs(as_array(pipeline.sample(["a man"], negative="bad", **options)) - ordinary).max() > 1


@pytest.mark.parametrize("size", [(14, 10), (32, 16), (16, 16)])
def test_regions_in_odd_and_oblong_pictures(pipeline, size):
    """A layer-wise region in an ordinary context, two pictures at once as each alone."""
    with pipeline.with_tokens({"<x>": torch.randn(LAYERS, DIM)}):
        regions = [Region("a <x>", (0.0, 0.0, 1.0, 0.5)), Region("b", (0.0, 0.25, 0.5, 1.0), "c")]
        together = as_array(pipeline.sample(["two men", "a dog"], seeds=[1, 2], steps=2, size=size, regions=regions))
        alone = as_array(pipeline.sample(["a dog"], seeds=[2], steps=2, size=size, regions=regions))
        plain = as_array(pipeline.sample(["a dog"], seeds=[2], steps=2, size=size))
    assert together.shape == (2, *size, 3)
    assert np.abs(together[1:] - alone).max() <= 1 < np.abs(plain - alone).max()


def test_regions_need_as_many_halves_as_guidance(pipeline):
    region = RegionStates(states_of(pipeline, "a", "b"), WHOLE)
    with pytest.raises(UsageError, match="guidance 1 needs regions with 1 states"):
        pipeline.denoise(states_of(pipeline, "a"), seeds=[0], regions=[region])


def test_importing_is_cheap():
    code = "import sys, loraclr.generate; print(sorted({'diffusers', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
