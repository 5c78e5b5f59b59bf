"""Small adapters over real SD1.x layer names, for the tests of the formats."""

from __future__ import annotations

import torch

from loraclr.adapter import Adapter, DenseLayer, LoraLayer

ATTN = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
FF = "unet.up_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj"
PROJ = "unet.down_blocks.1.attentions.0.proj_in"
CONV = "unet.up_blocks.2.resnets.0.conv_shortcut"
KERNEL = "unet.down_blocks.0.downsamplers.0.conv"
TEXT = "text_encoder.encoder.layers.0.self_attn.q_proj"
MLP = "text_encoder.encoder.layers.1.mlp.fc2"
NAMES = (ATTN, OUT, FF, PROJ, CONV, KERNEL, TEXT, MLP)

# name -> kernel of the module, () for a linear layer
KERNELS = {PROJ: (1, 1), CONV: (1, 1), KERNEL: (3, 3)}


def lora(name: str, *, rank: int = 2, scale: float = 1.0, out: int = 6, in_: int = 5, dtype: torch.dtype = torch.float32) -> LoraLayer:
    kernel = KERNELS.get(name, ())
    up = torch.randn(out, rank, *[1] * len(kernel)).to(dtype)
    return LoraLayer(name, torch.randn(rank, in_, *kernel).to(dtype), up, scale)


def mixed(names: tuple[str, ...] = NAMES) -> Adapter:
    """Every kind of layer, with ranks 1..4 and scales 0.25..4 all over."""
    return Adapter.of(lora(name, rank=1 + i % 4, scale=(1.0, 0.25, 4.0, -0.7)[i % 4]) for i, name in enumerate(names))


def dense(name: str, *, out: int = 6, in_: int = 5) -> DenseLayer:
    return DenseLayer(name, torch.randn(out, in_, *KERNELS.get(name, ())))


def assert_same(ours: Adapter, other: Adapter, *, tolerance: float = 1e-6) -> None:
    """Equal layer names, and deltas equal within `tolerance` of the norm of what was rounded: the factors, whose product may cancel."""
    assert list(ours.layers) == list(other.layers)
    for a, b in zip(ours, other, strict=True):
        assert a.shape == b.shape, a.name
        norm = b.change.norm() if isinstance(b, DenseLayer) else b.down.double().norm() * b.up.double().norm() * abs(b.scale)
        error = (a.delta(torch.float64) - b.delta(torch.float64)).norm() / norm
        assert error <= tolerance, (a.name, float(error))
