"""Module names: from the underscores of kohya files back to real dotted paths, and which component a path belongs to.

A kohya name replaces every dot by an underscore, and attribute names have underscores of their own. The words below are all the
attribute names on the way to a linear or convolutional layer of a diffusers UNet, a CLIP or T5 text encoder, or a Flux transformer;
reading the longest word first leads back to the one path that exists, which tests prove on the real configurations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
READ = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # what the cross-attention of a UNet reads -> family

# The first attribute of a path tells what kind of component it is in, for files that do not say.
ROOTS = {
    "unet": {"conv_in", "conv_out", "time_embedding", "add_embedding", "down_blocks", "mid_block", "up_blocks"},
    "text_encoder": {"text_model", "encoder", "text_projection"},
    "transformer": {
        *("transformer_blocks", "single_transformer_blocks", "x_embedder", "context_embedder", "time_text_embed"),
        *("norm_out", "proj_out"),
    },
}
# fmt: off
_ATTENTION = {"to_q", "to_k", "to_v", "to_out", "ff", "net", "proj"}
WORDS = {
    "unet": ROOTS["unet"] | _ATTENTION | {
        "linear_1", "linear_2",
        "resnets", "conv1", "conv2", "time_emb_proj", "conv_shortcut", "downsamplers", "upsamplers", "conv",
        "attentions", "proj_in", "proj_out", "transformer_blocks", "attn1", "attn2",
    },
    "text_encoder": ROOTS["text_encoder"] | {
        "layers", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "mlp", "fc1", "fc2",
        "block", "layer", "SelfAttention", "q", "k", "v", "o", "DenseReluDense", "wi_0", "wi_1", "wo",
    },
    "transformer": ROOTS["transformer"] | _ATTENTION | {
        "attn", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context", "norm", "norm1", "norm1_context", "linear",
        "proj_mlp", "timestep_embedder", "guidance_embedder", "text_embedder", "linear_1", "linear_2",
    },
}
# fmt: on
_LONGEST = max(word.count("_") + 1 for words in WORDS.values() for word in words)
_THREE_BY_THREE = {"conv", "conv1", "conv2", "conv_in", "conv_out"}


def kind(component: str) -> str:
    """`text_encoder_2` -> `text_encoder`: which words its paths are made of."""
    return component.removesuffix("_2")


def dotted(component: str, flat: str) -> str | None:
    """`mid_block_attentions_0_proj_in` -> `mid_block.attentions.0.proj_in`; None when some part is no word of that component."""
    words = WORDS[kind(component)]
    pieces = flat.split("_")
    path: list[str] = []
    while pieces:
        for length in range(min(_LONGEST, len(pieces)), 0, -1):
            word = "_".join(pieces[:length])
            if word in words or (length == 1 and word.isdecimal()):
                path.append(word)
                pieces = pieces[length:]
                break
        else:
            return None
    return ".".join(path)


def canonical(component: str, path: str) -> str:
    """Component + path as `Adapter` names it. transformers 5 has no `text_model` level in most models, older files all have."""
    return f"{component}.{path.removeprefix('text_model.') if kind(component) == 'text_encoder' else path}"


def split(name: str) -> tuple[str, str]:
    """Canonical name -> component and path."""
    component, _, path = name.partition(".")
    return component, path


def with_text_model(component: str, path: str) -> str:
    """The path as every other tool knows it: layers of a CLIP text encoder below `text_model`."""
    return f"text_model.{path}" if kind(component) == "text_encoder" and path.startswith("encoder.layers.") else path


def component_of(path: str) -> str | None:
    """`unet`, `transformer` or (the first) `text_encoder` by the first attribute of the path."""
    root = path.split(".", 1)[0]
    return next((component for component, roots in ROOTS.items() if root in roots), None)


def fits(component: str, path: str) -> bool:
    """Whether the path begins as those of this component do."""
    return component in COMPONENTS and component_of(path) == kind(component)


def is_t5(name: str) -> bool:
    return name.startswith("text_encoder") and ".block." in name


def kernel(name: str) -> tuple[int, ...]:
    """The kernel of a UNet's convolution, which its name tells for all 3x3 ones; () for linear layers and what may be 1x1."""
    component, path = split(name)
    return (3, 3) if component == "unet" and path.rpartition(".")[2] in _THREE_BY_THREE else ()


def guess_family(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """`sd1`, `sd2`, `sdxl` or `flux` from the shapes of layers by name: what cross-attention reads, or Flux.1's own kind of block."""
    single = [name for name in shapes if name.startswith("transformer.single_transformer_blocks.")]
    if single and not any("qkv" in name for name in single):
        return "flux"
    for name, shape in shapes.items():
        if name.startswith("unet.") and name.endswith((".attn2.to_k", ".attn2.to_v")) and math.prod(shape[1:]) in READ:
            return READ[math.prod(shape[1:])]
    second = any(name.startswith("text_encoder_2.") and not is_t5(name) for name in shapes)  # SD3 has one, too
    return "sdxl" if second and not any(name.startswith(("transformer.", "text_encoder_3.")) for name in shapes) else None
