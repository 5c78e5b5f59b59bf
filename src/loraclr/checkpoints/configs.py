"""The architectures of single-file checkpoints as data: such a file holds weights alone.

As the models' own repositories state them: Stable Diffusion 1.5, 2.1 and XL base 1.0. What the classes' defaults already say is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
_TEXT = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407}
_CLIP_L = {
    **_TEXT,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "pad_token_id": 49407,
}
_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}

Component = tuple[str, str, Mapping[str, Any]]
"""Library, class, configuration."""

# By family. Tokenizers are `checkpoints.tokenizer`, told apart by what they pad with.
ARCHITECTURES: Mapping[str, Mapping[str, Component]] = {
    "sd1": {
        "unet": ("diffusers", "UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}),
        "text_encoder": ("transformers", "CLIPTextModel", _CLIP_L),
        "vae": ("diffusers", "AutoencoderKL", {**_VAE, "sample_size": 512, "scaling_factor": 0.18215}),
        "scheduler": ("diffusers", "PNDMScheduler", {**_NOISE, "skip_prk_steps": True, "set_alpha_to_one": False}),
    },
    "sd2": {
        "unet": (
            "diffusers",
            "UNet2DConditionModel",
            {"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
        ),
        "text_encoder": (
            "transformers",
            "CLIPTextModel",
            {
                **_TEXT,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 23,
                "num_attention_heads": 16,
                "hidden_act": "gelu",
                "projection_dim": 1024,
                "pad_token_id": 0,
            },
        ),
        "vae": ("diffusers", "AutoencoderKL", {**_VAE, "sample_size": 768, "scaling_factor": 0.18215}),
        "scheduler": (
            "diffusers",
            "DDIMScheduler",
            {**_NOISE, "clip_sample": False, "set_alpha_to_one": False, "prediction_type": "v_prediction"},
        ),
    },
    "sdxl": {
        "unet": (
            "diffusers",
            "UNet2DConditionModel",
            {
                "sample_size": 128,
                "block_out_channels": [320, 640, 1280],
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                "transformer_layers_per_block": [1, 2, 10],
                "attention_head_dim": [5, 10, 20],
                "cross_attention_dim": 2048,
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
        ),
        "text_encoder": ("transformers", "CLIPTextModel", _CLIP_L),
        "text_encoder_2": (
            "transformers",
            "CLIPTextModelWithProjection",
            {
                **_TEXT,
                "hidden_size": 1280,
                "intermediate_size": 5120,
                "num_hidden_layers": 32,
                "num_attention_heads": 20,
                "hidden_act": "gelu",
                "projection_dim": 1280,
                "pad_token_id": 0,
            },
        ),
        "vae": ("diffusers", "AutoencoderKL", {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025}),
        "scheduler": ("diffusers", "EulerDiscreteScheduler", {**_NOISE, "timestep_spacing": "leading"}),
    },
}
PIPELINES = {"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
PADDING = {"sd1": ("<|endoftext|>",), "sd2": ("!",), "sdxl": ("<|endoftext|>", "!")}
