"""Module names: from the underscores of kohya files back to real dotted paths, and which component a path belongs to.

A kohya name replaces every dot by an underscore, and attribute names have underscores of their own. The words below are all the
attribute names on the way to a linear or convolutional layer of a diffusers UNet or a CLIP text encoder; reading the longest word
first is then unambiguous, which a test proves on the real SD1.5 configuration.
"""

from __future__ import annotations

# The first attribute of a path tells its component, for files that do not say.
ROOTS = {
    "unet": {"conv_in", "conv_out", "time_embedding", "add_embedding", "down_blocks", "mid_block", "up_blocks"},
    "text_encoder": {"text_model", "encoder"},
}
# fmt: off
WORDS = ROOTS["unet"] | ROOTS["text_encoder"] | {
    "linear_1", "linear_2",
    "resnets", "conv1", "conv2", "time_emb_proj", "conv_shortcut", "downsamplers", "upsamplers", "conv",
    "attentions", "proj_in", "proj_out", "transformer_blocks", "attn1", "attn2", "to_q", "to_k", "to_v", "to_out", "ff", "net", "proj",
    "layers", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "mlp", "fc1", "fc2",
}
# fmt: on
_LONGEST = max(word.count("_") + 1 for word in WORDS)


def dotted(flat: str) -> str | None:
    """`mid_block_attentions_0_proj_in` -> `mid_block.attentions.0.proj_in`; None when some part is no known word."""
    pieces = flat.split("_")
    path: list[str] = []
    while pieces:
        for length in range(min(_LONGEST, len(pieces)), 0, -1):
            word = "_".join(pieces[:length])
            if word in WORDS or (length == 1 and word.isdecimal()):
                path.append(word)
                pieces = pieces[length:]
                break
        else:
            return None
    return ".".join(path)


def canonical(component: str, path: str) -> str:
    """Component + path as `Adapter` names it. transformers 5 has no `text_model` level any more, older files all have."""
    return f"{component}.{path.removeprefix('text_model.') if component == 'text_encoder' else path}"


def split(name: str) -> tuple[str, str]:
    """Canonical name -> component and path."""
    component, _, path = name.partition(".")
    return component, path


def with_text_model(component: str, path: str) -> str:
    """The path as every other tool knows it: text encoder layers below `text_model`."""
    return f"text_model.{path}" if component == "text_encoder" else path


def component_of(path: str) -> str | None:
    """`unet` or `text_encoder` by the first attribute of the path."""
    root = path.split(".", 1)[0]
    return next((component for component, roots in ROOTS.items() if root in roots), None)
