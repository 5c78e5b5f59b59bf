"""A tiny random twin of each family: the real classes and wiring, a few thousand weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from conftest import tiny_tokenizer

WORDS = "a photo of ada ben woman man dog house at night on beach".split()


def t5_tokenizer() -> Any:
    """Whole words and letters, no more."""
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "▁", *("▁" + word for word in WORDS), *"abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=[(piece, -float(len(pieces) - number)) for number, piece in enumerate(pieces)], extra_ids=0)


def t5(width: int = 24) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=64, d_model=width, d_ff=32, d_kv=8, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    )


def clip(width: int, *, projected: bool = False, activation: str = "gelu") -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=514, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=width, bos_token_id=512, eos_token_id=513, pad_token_id=513, hidden_act=activation,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def vae(channels: int = 4, **config: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1, latent_channels=channels, norm_num_groups=4, **config,
    )  # fmt: skip


def unet(**config: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, **config)


def sd2() -> Any:
    """v-prediction, linear projections around the attentions."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        unet=unet(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16, attention_head_dim=(1, 2), use_linear_projection=True,
        ),
        vae=vae(), text_encoder=clip(16), tokenizer=tiny_tokenizer(),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, prediction_type="v_prediction"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        unet=unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2), attention_head_dim=(1, 2), cross_attention_dim=16 + 24, use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=24 + 6 * 8,
        ),
        vae=vae(), text_encoder=clip(16), tokenizer=tiny_tokenizer(),
        text_encoder_2=clip(24, projected=True), tokenizer_2=tiny_tokenizer(), scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )  # fmt: skip


def flux(*, guidance_embeds: bool = True) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    pipe = FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=24,
            pooled_projection_dim=16, axes_dims_rope=(2, 2, 4), guidance_embeds=guidance_embeds,
        ),
        vae=vae(shift_factor=0.1, scaling_factor=0.36), text_encoder=clip(16), tokenizer=tiny_tokenizer(),
        text_encoder_2=t5(), tokenizer_2=t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance_embeds),
    )  # fmt: skip
    pipe.default_sample_size = 8  # a constant of the class, whatever the transformer
    return pipe


def sd3() -> Any:
    """Three text encoders."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=40, caption_projection_dim=16, pooled_projection_dim=40, out_channels=4, pos_embed_max_size=8,
        ),
        vae=vae(shift_factor=0.1), text_encoder=clip(16, projected=True), tokenizer=tiny_tokenizer(),
        text_encoder_2=clip(24, projected=True), tokenizer_2=tiny_tokenizer(), text_encoder_3=t5(40), tokenizer_3=t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def pixart() -> Any:
    """One text encoder, a T5, and a transformer: no CLIP at all."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    return PixArtSigmaPipeline(
        transformer=PixArtTransformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=1, attention_head_dim=8, num_attention_heads=2,
            cross_attention_dim=16, caption_channels=24, use_additional_conditions=False, num_embeds_ada_norm=1000,
        ),
        vae=vae(), text_encoder=t5(), tokenizer=t5_tokenizer(), scheduler=DPMSolverMultistepScheduler(),
    )  # fmt: skip


TWINS: dict[str, Callable[[], Any]] = {
    "sd2": sd2,
    "sdxl": sdxl,
    "flux": flux,
    "flux-schnell": lambda: flux(guidance_embeds=False),
    "sd3": sd3,
    "pixart": pixart,
}


def twin(family: str) -> Any:
    """The same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = TWINS[family]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipe
