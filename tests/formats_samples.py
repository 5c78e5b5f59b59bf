"""Small adapters over real SD1.x layer names, for the tests of the formats."""

from __future__ import annotations

import torch

from loraclr.adapter import Adapter, DenseLayer, LoraLayer
from loraclr.errors import FormatError

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


class Base:
    """Weights of a model, as a Pipeline gives them."""

    def __init__(self, **weights: torch.Tensor) -> None:
        self.weights = weights

    def base_weight(self, name: str) -> torch.Tensor:
        if name not in self.weights:
            raise FormatError(f"the base has no {name}")
        return self.weights[name]


BASE = Base(**{ATTN: torch.linspace(-1, 1, 96).view(12, 8), KERNEL: torch.linspace(-1, 1, 432).view(12, 4, 3, 3)})


def exotic() -> dict[str, dict[str, torch.Tensor]]:
    """Files that are read and not written: `lycoris` and `boft`, which need BASE, `flux`, `comfy`, `xlabs` and `sdxl`."""
    q, k, conv = (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k",
        "lora_unet_down_blocks_0_downsamplers_0_conv",
    )
    ff, mid = "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2", "lora_unet_mid_block_resnets_0_conv1"
    rand = torch.randn
    lycoris = {
        f"{q}.lora_down.weight": rand(2, 8), f"{q}.lora_up.weight": rand(12, 2), f"{q}.dora_scale": rand(12, 1),
        f"{k}.hada_w1_a": rand(12, 2), f"{k}.hada_w1_b": rand(2, 8), f"{k}.hada_w2_a": rand(12, 2), f"{k}.hada_w2_b": rand(2, 8),
        f"{k}.alpha": torch.tensor(1.0),
        f"{conv}.oft_blocks": rand(3, 4, 4), f"{conv}.rescale": rand(12, 1, 1, 1), f"{conv}.alpha": torch.tensor(0.1),
        f"{ff}.lokr_w1": rand(4, 2), f"{ff}.lokr_w2_a": rand(8, 1), f"{ff}.lokr_w2_b": rand(1, 8),
        f"{mid}.lokr_w1": rand(2, 2), f"{mid}.lokr_t2": rand(2, 2, 3, 3), f"{mid}.lokr_w2_a": rand(2, 3), f"{mid}.lokr_w2_b": rand(2, 3),
        "bundle_emb.rhea.clip_l": rand(2, 32),
    }  # fmt: skip
    flux, comfy = {}, {}
    for path, out in {"double_blocks.0.img_attn.qkv": 18, "single_blocks.3.linear1": 42, "final_layer.adaLN_modulation.1": 12}.items():
        stem = f"lora_unet_{path.replace('.', '_')}"
        flux |= {f"{stem}.lora_down.weight": rand(2, 6), f"{stem}.lora_up.weight": rand(out, 2), f"{stem}.alpha": torch.tensor(1.0)}
        comfy |= {f"diffusion_model.{path}.lora_A.weight": rand(2, 6), f"diffusion_model.{path}.lora_B.weight": rand(out, 2)}
    xlabs = {}
    for path, out in {"double_blocks.0.processor.qkv_lora1": 18, "single_blocks.3.processor.proj_lora": 6}.items():
        xlabs |= {f"{path}.down.weight": rand(2, 6), f"{path}.up.weight": rand(out, 2)}
    sdxl = {}
    for stem in ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "lora_te2_text_model_encoder_layers_0_mlp_fc1"):
        sdxl |= {f"{stem}.lora_down.weight": rand(2, 6), f"{stem}.lora_up.weight": rand(8, 2), f"{stem}.alpha": torch.tensor(1.0)}
    boft = {f"{q}.oft_blocks": rand(2, 6, 2, 2), f"{q}.rescale": rand(12, 1), f"{q}.alpha": torch.tensor(0.1)}
    return {"lycoris": lycoris, "flux": flux, "comfy": comfy, "xlabs": xlabs, "sdxl": sdxl, "boft": boft}
