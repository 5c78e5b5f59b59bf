"""ControlNet and T2I-Adapter as hooks: nothing at weight 0, what diffusers' own pipelines give at weight 1, and parts of the picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from loraclr.control import Control, check_fit, controlled, load_control
from loraclr.errors import PipelineError
from loraclr.generate import generate
from loraclr.pipeline import Pipeline

SIZE = (16, 16)
LEFT, WHOLE = (0.0, 0.0, 1.0, 0.5), (0.0, 0.0, 1.0, 1.0)


@pytest.fixture
def pipe(tiny_pipe):
    return tiny_pipe()


@pytest.fixture
def pipeline(pipe) -> Pipeline:
    return Pipeline(pipe)


def picture() -> Image.Image:
    return Image.fromarray((torch.rand(16, 16, 3) * 255).byte().numpy())


def adapter_model():
    from diffusers import T2IAdapter

    return T2IAdapter(in_channels=3, channels=(32, 64, 64), num_res_blocks=1, downscale_factor=2).eval()


def control_model(pipe):
    from diffusers import ControlNetModel

    model = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8)).eval()
    for name, weight in model.named_parameters():  # as a fresh one adds nothing
        if name.startswith("controlnet_") and weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model


@pytest.fixture(params=["adapter", "control"])
def model(request, pipe):
    return adapter_model() if request.param == "adapter" else control_model(pipe)


def draw(pipeline, controls, *, prompt="a man", **changes):
    settings = {"seeds": [1], "steps": 2, "guidance": 4.0, "negative": pipeline.encode([""]), **changes}
    with controlled(pipeline.unet, controls, size=SIZE):
        return pipeline.denoise(pipeline.encode([prompt]), **settings)


def test_weight_0_is_nothing_and_nothing_stays(pipeline, model):
    plain = draw(pipeline, [])
    image = picture()
    assert torch.equal(draw(pipeline, [Control(model, image, 0.0)]), plain)
    assert torch.equal(draw(pipeline, [Control(model, image, 0.0, boxes=((LEFT, 0.0),))]), plain)
    assert not torch.allclose(draw(pipeline, [Control(model, image)]), plain, atol=1e-3)
    assert torch.equal(draw(pipeline, []), plain)


def test_a_box_with_the_weight_of_the_picture_is_no_box(pipeline, model):
    image = picture()
    everywhere = draw(pipeline, [Control(model, image, 0.7)])
    assert torch.equal(draw(pipeline, [Control(model, image, 0.7, boxes=((LEFT, 0.7),))]), everywhere)
    assert torch.equal(draw(pipeline, [Control(model, image, 0.0, boxes=((WHOLE, 0.7),))]), everywhere)
    assert not torch.equal(draw(pipeline, [Control(model, image, 0.0, boxes=((LEFT, 0.7),))]), everywhere)


def test_weights_of_cells_by_hand():
    control = Control(None, None, 0.5, boxes=((LEFT, 1.0), ((0.0, 0.0, 0.5, 1.0), 2.0)))
    assert control.cells(2, 4).tolist() == [[2, 2, 2, 2], [1, 1, 0.5, 0.5]]


def test_two_of_half_weight_are_one_and_batches_do_not_mix(pipeline, model):
    image = picture()
    once = draw(pipeline, [Control(model, image)])
    twice = draw(pipeline, [Control(model, image, 0.5), Control(model, image, 0.5)])
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-5)
    with controlled(pipeline.unet, [Control(model, image)], size=SIZE):
        both = pipeline.denoise(pipeline.encode(["b", "a man"]), seeds=[5, 1], steps=2, guidance=4.0, negative=pipeline.encode([""]))
    torch.testing.assert_close(both[1:], once, rtol=0, atol=1e-5)


def test_it_is_what_diffusers_does(pipe, pipeline, model):
    from diffusers import StableDiffusionAdapterPipeline, StableDiffusionControlNetPipeline

    image, kind = picture(), "adapter" if hasattr(model, "total_downscale_factor") else "controlnet"
    maker = StableDiffusionAdapterPipeline if kind == "adapter" else StableDiffusionControlNetPipeline
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    theirs = maker(**parts, **{kind: model}, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    scale = "adapter_conditioning_scale" if kind == "adapter" else "controlnet_conditioning_scale"
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    options = {"latents": noise, "num_inference_steps": 2, "guidance_scale": 4.0, "height": 16, "width": 16, "output_type": "latent"}
    expected = theirs("a man", image=image, negative_prompt="", **options, **{scale: 0.6}).images
    torch.testing.assert_close(draw(pipeline, [Control(model, image, 0.6)]), expected, rtol=0, atol=1e-4)


def test_layer_wise_prompts_reach_the_controlnets_own_layers(pipe, pipeline):
    """Ten identical layers are an ordinary prompt."""
    control, states, negative = Control(control_model(pipe), picture()), pipeline.encode(["a man"]), pipeline.encode([""])
    with controlled(pipeline.unet, [control], size=SIZE):
        ordinary = pipeline.denoise(states, seeds=[1], steps=2, guidance=4.0, negative=negative)
        layered = pipeline.denoise(states[:, None].expand(-1, 10, -1, -1), seeds=[1], steps=2, guidance=4.0, negative=negative)
    torch.testing.assert_close(layered, ordinary, rtol=0, atol=1e-5)


def test_saved_models_load_and_others_are_named(pipe, tmp_path):
    from diffusers import ControlNetModel, T2IAdapter

    adapter_model().save_pretrained(tmp_path / "adapter")
    control_model(pipe).save_pretrained(tmp_path / "control")
    assert isinstance(load_control("adapter", tmp_path / "adapter"), T2IAdapter)
    assert isinstance(load_control("control", tmp_path / "control"), ControlNetModel)
    with pytest.raises(PipelineError, match="holds T2IAdapter; --control takes a ControlNetModel"):
        load_control("control", tmp_path / "adapter")
    with pytest.raises(PipelineError, match="holds no model"):
        load_control("control", tmp_path)
    with pytest.raises(PipelineError, match="there is no folder"):
        load_control("control", tmp_path / "none")
    with pytest.raises(PipelineError, match="nothing is downloaded here"):
        load_control("control", "owner/name")
    (tmp_path / "control" / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    with pytest.raises(PipelineError, match="no ControlNetModel that loads"):
        load_control("control", tmp_path / "control")


def test_a_model_for_another_unet_is_refused(pipe, pipeline):
    from diffusers import ControlNetModel, T2IAdapter

    wide = T2IAdapter(in_channels=1, channels=(32, 64), num_res_blocks=1, downscale_factor=2)
    with pytest.raises(PipelineError, match=r"sketch has blocks of \[32, 64\] channels, the UNet of \[32, 64, 64\]"):
        check_fit(pipeline.unet, [Control(wide, picture(), name="sketch")])
    other = ControlNetModel(
        block_out_channels=(32, 64, 64),
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        conditioning_embedding_out_channels=(4, 8),
    )
    with pytest.raises(PipelineError, match="prompts of another width"):
        check_fit(pipeline.unet, [Control(other, picture())])
    check_fit(pipeline.unet, [Control(adapter_model(), picture()), Control(control_model(pipe), picture())])


@pytest.mark.parametrize("family", ["flux", "sd3", "pixart"])
def test_a_base_without_a_unet_is_said(family):
    from families_twins import twin

    with pytest.raises(PipelineError, match="pose is for a UNet, and the base has a .*Transformer2DModel"):
        generate(Pipeline(twin(family)), ["a"], seeds=[0], controls=[Control(adapter_model(), picture(), name="pose")])


def test_gray_models_read_gray_pictures():
    from diffusers import T2IAdapter

    control = Control(T2IAdapter(in_channels=1, channels=(32,), num_res_blocks=1, downscale_factor=2), Image.new("RGB", (3, 3), "white"))
    assert np.allclose(control.pixels((4, 6)), 1) and control.pixels((4, 6)).shape == (1, 1, 4, 6)
