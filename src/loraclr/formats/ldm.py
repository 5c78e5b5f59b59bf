"""Layer names of the original UNet of SD1.x, SD2.x and SDXL (`input_blocks_4_1_...`), as kohya files have them, in diffusers' numbering.

Blocks are counted through: every resolution has two layers and then one resampler on the way down; three layers on the way up.
"""

from __future__ import annotations

import re

LAYERS = 2  # layers_per_block of SD1.x, SD2.x and SDXL alike

_OUTER = {
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
}
_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_BLOCK = re.compile(r"(input_blocks|output_blocks)_(\d{1,2})_([012])_(\w+)")
_MIDDLE = re.compile(r"middle_block_([012])_(\w+)")


def is_ldm(flat: str) -> bool:
    return flat in _OUTER or flat.startswith(("input_blocks_", "middle_block_", "output_blocks_"))


def to_diffusers(flat: str) -> str | None:
    """`input_blocks_4_1_proj_in` -> `down_blocks_1_attentions_0_proj_in`, still with underscores; None if it is no such name."""
    if flat in _OUTER:
        return _OUTER[flat]
    if match := _MIDDLE.fullmatch(flat):
        index, rest = int(match[1]), match[2]
        return _inside("mid_block", index // 2, index == 1, rest)
    if not (match := _BLOCK.fullmatch(flat)):
        return None
    down, number, sub, rest = match[1] == "input_blocks", int(match[2]), int(match[3]), match[4]
    block, layer = divmod(number - down, LAYERS + 1)  # input block 0 is conv_in
    side = "down_blocks" if down else "up_blocks"
    if rest == ("op" if down else "conv") and layer == LAYERS:
        return f"{side}_{block}_{'downsamplers' if down else 'upsamplers'}_0_conv"
    if block < 0 or (down and layer == LAYERS) or sub == 2:
        return None
    return _inside(f"{side}_{block}", layer, sub == 1, rest)


def _inside(block: str, layer: int, attention: bool, rest: str) -> str | None:
    if attention:
        return f"{block}_attentions_{layer}_{rest}" if rest.startswith(("proj_", "transformer_blocks_")) else None
    return f"{block}_resnets_{layer}_{_RESNET[rest]}" if rest in _RESNET else None
