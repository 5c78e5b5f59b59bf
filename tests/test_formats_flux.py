"""Flux.1 files of every trainer: fused matrices are taken apart exactly, and all namings mean the same deltas."""

from __future__ import annotations

import json

import pytest
import torch
from formats_families import shapes
from formats_samples import assert_same

from loraclr.adapter import Adapter, DenseLayer, LoraLayer, ProductLayer
from loraclr.errors import FormatError
from loraclr.formats import comfy, describe, detect_format, diffusers, files, flux, kohya, load_adapter, save_adapter
from loraclr.formats.base import Content

D, IN = 6, 4  # width of the toy layers: qkv has 18 rows, linear1 42
BLOCK, SINGLE = "transformer.transformer_blocks.0", "transformer.single_transformer_blocks.3"
FUSED = {
    "double_blocks.0.img_attn.qkv": ([f"{BLOCK}.attn.to_{part}" for part in "qkv"], 3 * D),
    "double_blocks.0.txt_attn.qkv": ([f"{BLOCK}.attn.add_{part}_proj" for part in "qkv"], 3 * D),
    "single_blocks.3.linear1": ([*(f"{SINGLE}.attn.to_{part}" for part in "qkv"), f"{SINGLE}.proj_mlp"], 7 * D),
}


class Base:
    def __init__(self):
        self.weights = {name: torch.randn(4 * D if "mlp" in name else D, IN) for names, _ in FUSED.values() for name in names}

    def base_weight(self, name):
        return self.weights[name]

    def fused(self, names):
        return torch.cat([self.weights[name] for name in names])


def flat(path: str) -> str:
    return f"lora_unet_{path.replace('.', '_')}"


def lora(out: int, rank: int = 3, *, in_: int = IN) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rank, in_), torch.randn(out, rank)


@pytest.mark.parametrize("path", FUSED)
class TestTakingApart:
    """The deltas of the pieces, put together again, are the delta of the whole."""

    def check(self, path, parts, kind, *, base=None, delta=None):
        names, out = FUSED[path]
        found = kohya.read(Content({f"{flat(path)}.{part}": tensor for part, tensor in parts.items()}), base)
        assert sorted(found.layers) == sorted(names)
        assert all(type(layer) is kind for layer in found)
        whole = torch.cat([found.layers[name].delta(torch.float64) for name in names])
        assert [len(found.layers[name].delta()) for name in names] == [D, D, D, 4 * D][: len(names)] and len(whole) == out
        torch.testing.assert_close(whole, delta, rtol=0, atol=2e-6)

    def test_lora(self, path):
        down, up = lora(FUSED[path][1])
        parts = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.5)}
        self.check(path, parts, LoraLayer, delta=up.double() @ down.double() / 2)

    def test_full_difference(self, path):
        change = torch.randn(FUSED[path][1], IN)
        self.check(path, {"diff": change}, DenseLayer, delta=change.double())

    def test_lokr(self, path):
        w1, w2 = torch.randn(FUSED[path][1] // 6, 2), torch.randn(6, 2)
        self.check(path, {"lokr_w1": w1, "lokr_w2": w2}, ProductLayer, delta=torch.kron(w1.double(), w2.double()))

    @pytest.mark.parametrize("axis", [0, 1])
    def test_dora_has_the_norms_of_the_whole(self, path, axis):
        base = Base()
        (down, up), weight = lora(FUSED[path][1]), base.fused(FUSED[path][0]).double()
        moved = weight + up.double() @ down.double()
        magnitude = torch.randn(1, IN) if axis == 0 else torch.randn(len(weight), 1)
        delta = magnitude * moved / moved.norm(dim=axis, keepdim=True) - weight
        parts = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": magnitude}
        self.check(path, parts, DenseLayer, base=base, delta=delta)

    def test_rotations_of_the_whole(self, path):
        base, out = Base(), FUSED[path][1]
        swap = torch.zeros(out // 2, 2, 2)
        swap[:, 0, 1] = 1.0  # a quarter turn of every two rows: (a, b) -> (-b, a)
        weight = base.fused(FUSED[path][0]).double()
        turned = torch.stack([-weight[1::2], weight[::2]], dim=1).view_as(weight)
        self.check(path, {"oft_blocks": swap}, DenseLayer, base=base, delta=turned - weight)


def test_the_last_modulation_has_its_halves_exchanged():
    """Shift before scale in the original, scale before shift in diffusers."""
    change = torch.arange(8.0)[:, None].expand(8, 2)
    [layer] = kohya.read(Content({"lora_unet_final_layer_adaLN_modulation_1.diff": change}))
    assert layer.name == "transformer.norm_out.linear" and layer.delta()[:, 0].tolist() == [4, 5, 6, 7, 0, 1, 2, 3]


class TestSplitQkv:
    """Trainers that keep queries, keys and values apart store them side by side: rank 3 r, and up is block-diagonal."""

    def content(self, **metadata):
        pairs = [lora(D, 2) for _ in range(3)]
        tensors = {
            f"{flat('double_blocks.0.img_attn.qkv')}.lora_down.weight": torch.cat([down for down, _ in pairs]),
            f"{flat('double_blocks.0.img_attn.qkv')}.lora_up.weight": torch.block_diag(*(up for _, up in pairs)),
            f"{flat('double_blocks.0.img_attn.qkv')}.alpha": torch.tensor(2.0),
        }
        return pairs, Content(tensors, metadata)

    def test_every_piece_gets_its_own_rank_back(self):
        pairs, content = self.content()
        found = kohya.read(content)
        for (down, up), name in zip(pairs, FUSED["double_blocks.0.img_attn.qkv"][0], strict=True):
            layer = found.layers[name]
            assert layer.rank == 2 and layer.scale == pytest.approx(1 / 3)  # alpha over the stored rank, as every tool reads it
            torch.testing.assert_close(layer.delta(), up @ down / 3)

    def test_a_piece_without_any_change_keeps_one_column(self):
        _, content = self.content()
        content.tensors[f"{flat('double_blocks.0.img_attn.qkv')}.lora_up.weight"][D : 2 * D] = 0
        layer = kohya.read(content).layers[f"{BLOCK}.attn.to_k"]
        assert layer.rank == 1 and not layer.delta().any()

    @pytest.mark.parametrize(("args", "warned"), [({"split_qkv": "True"}, True), ({"split_qkv": "False"}, False), ({}, False)])
    def test_the_trap_is_named(self, args, warned, tmp_path):
        _, content = self.content(ss_network_args=json.dumps(args))
        (tmp_path / "a.safetensors").write_bytes(files.safetensors_bytes(content.tensors, content.metadata))
        assert any("split_qkv" in note for note in describe(tmp_path / "a.safetensors").warnings) == warned


def spellings():
    """One file as kohya, ComfyUI and XLabs write it: name, reader, tensors."""
    torch.manual_seed(1)
    layers = {path: lora(out) for path, (_, out) in FUSED.items() if path.startswith("double")}
    layers |= {"double_blocks.0.img_attn.proj": lora(D), "double_blocks.0.txt_attn.proj": lora(D), "single_blocks.3.linear2": lora(D)}
    xlabs = {
        "double_blocks.0.img_attn.qkv": "double_blocks.0.processor.qkv_lora1",
        "double_blocks.0.txt_attn.qkv": "double_blocks.0.processor.qkv_lora2",
        "double_blocks.0.img_attn.proj": "double_blocks.0.processor.proj_lora1",
        "double_blocks.0.txt_attn.proj": "double_blocks.0.processor.proj_lora2",
        "single_blocks.3.linear2": "single_blocks.3.processor.proj_lora",
    }

    def named(stem, down, up):
        return {f"{stem(path)}.{part}": pair[n] for path, pair in layers.items() for n, part in enumerate((down, up))}

    return {
        "kohya": (kohya, named(flat, "lora_down.weight", "lora_up.weight")),
        "comfy": (comfy, named(lambda path: f"diffusion_model.{path}", "lora_down.weight", "lora_up.weight")),
        "comfy, PEFT factors": (comfy, named(lambda path: f"diffusion_model.{path}", "lora_A.weight", "lora_B.weight")),
        "xlabs": (comfy, named(xlabs.get, "down.weight", "up.weight")),
        "without a prefix": (comfy, named(str, "lora_A.weight", "lora_B.weight")),
        "xlabs, prefixed": (comfy, named(lambda path: f"diffusion_model.{xlabs[path]}", "down.weight", "up.weight")),
    }


@pytest.mark.parametrize("spelling", spellings())
def test_all_spellings_mean_the_same(spelling, tmp_path):
    reader, tensors = spellings()[spelling]
    (tmp_path / "a.safetensors").write_bytes(files.safetensors_bytes(tensors, {}))
    found = load_adapter(tmp_path / "a.safetensors")
    assert detect_format(tmp_path / "a.safetensors") == reader.id and found.family == "flux"
    assert len(found) == 9 and found == kohya.read(Content(spellings()["kohya"][1]))


@pytest.mark.parametrize("spelling", ["kohya", "comfy", "xlabs"])
def test_diffusers_converts_these_alike(spelling):
    """Its converter for Flux files is right for these three: the same deltas from its factors as from ours."""
    from diffusers import FluxPipeline

    reader, tensors = spellings()[spelling]
    ours = reader.read(Content(tensors))
    theirs, metadata = FluxPipeline.lora_state_dict({key: tensor.clone() for key, tensor in tensors.items()}), {}
    assert_same(diffusers.read(Content(theirs, metadata)), ours)


def test_original_and_diffusers_names_of_one_layer():
    down, up = lora(3 * D)
    both = {
        f"{flat('double_blocks.0.img_attn.qkv')}.{part}": tensor for part, tensor in (("lora_down.weight", down), ("lora_up.weight", up))
    }
    down, up = lora(D)
    other = "lora_transformer_transformer_blocks_0_attn_to_q"
    both |= {f"{other}.lora_down.weight": down, f"{other}.lora_up.weight": up}
    with pytest.raises(FormatError, match=r"attn.to_q: two modules of the file give it"):
        kohya.read(Content(both))


def test_ai_toolkit_and_what_we_write(tmp_path):
    """`transformer.` names with lora_A and lora_B, no alpha: diffusers' own, and what our writer makes."""
    adapter = kohya.read(Content(spellings()["kohya"][1]))
    path = save_adapter(adapter.with_(family="flux"), tmp_path / "a.safetensors", format="diffusers", dtype=torch.float32)
    assert_same(load_adapter(path), adapter)
    plain = files.read(path).tensors
    assert f"{BLOCK}.attn.to_q.lora_A.weight" in plain
    assert_same(diffusers.read(Content(plain)), adapter)
    wrapped = {key.replace("transformer.", "transformer.base_model.model.", 1): tensor for key, tensor in plain.items()}
    assert diffusers.detect(wrapped, {})
    assert_same(diffusers.read(Content(wrapped)), adapter)
    folder = save_adapter(adapter, tmp_path / "a", format="peft", dtype=torch.float32)
    assert_same(load_adapter(folder), adapter)


def test_comfy_is_not_written(tmp_path):
    with pytest.raises(FormatError, match="'comfy' is read, not written"):
        save_adapter(kohya.read(Content(spellings()["kohya"][1])), tmp_path / "a.safetensors", format="comfy")


def test_t5(tmp_path):
    """Kohya's third text encoder is diffusers' second; diffusers loads no LoRA of it, so none is written for it."""
    down, up = lora(D)
    tensors = {"lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight": down}
    tensors |= {"lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight": up}
    adapter = kohya.read(Content(tensors))
    assert list(adapter.layers) == ["text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"]
    for format in ("kohya", "diffusers"):
        with pytest.raises(FormatError, match="T5|no kohya name"):
            save_adapter(adapter, tmp_path / "a.safetensors", format=format)
    assert load_adapter(save_adapter(adapter, tmp_path / "a", format="peft", dtype=torch.float32)) == adapter
    with pytest.raises(FormatError, match="three text encoders"):
        kohya.read(Content(tensors | {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": up}))


@pytest.fixture
def tiny_flux():
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel

    transformer = FluxTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    clip = CLIPTextModel(CLIPTextConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
    empty = dict.fromkeys(("vae", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), text_encoder=clip, transformer=transformer, **empty)


def test_diffusers_applies_our_flux_files_exactly(tiny_flux, tmp_path):
    """Ranks and scales differ from layer to layer; every linear layer of the transformer and the first text encoder."""
    weights = {
        f"{component}.{path}": module.weight.detach().clone()
        for component in ("transformer", "text_encoder")
        for path, module in getattr(tiny_flux, component).named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    scales = (0.5, 1.0, 3.0, -0.25)
    adapter = Adapter.of(
        LoraLayer(name, torch.randn(1 + n % 3, weight.shape[1]) / 10, torch.randn(weight.shape[0], 1 + n % 3) / 10, scales[n % 4])
        for n, (name, weight) in enumerate(sorted(weights.items()))
    )
    assert len(adapter) > 25
    path = save_adapter(adapter, tmp_path / "a.safetensors", format="diffusers", dtype=torch.float32)
    assert_same(load_adapter(path), adapter)
    tiny_flux.load_lora_weights(path)
    tiny_flux.fuse_lora(components=["transformer", "text_encoder"])
    for name, weight in weights.items():
        component, path = name.split(".", 1)
        module = getattr(tiny_flux, component).get_submodule(path)
        torch.testing.assert_close(getattr(module, "base_layer", module).weight, weight + adapter.layers[name].delta(), rtol=0, atol=1e-6)


def test_unknown_parts_of_flux_files_are_named():
    assert flux.place("double_blocks.0.processor.qkv_lora3") is None
    with pytest.raises(FormatError, match="Flux layers that Flux.1 does not have"):
        comfy.read(Content({"diffusion_model.double_blocks.0.img_attn.qkvz.lora_A.weight": torch.ones(1, 1)}))
    with pytest.raises(FormatError, match="layers of another family"):
        comfy.read(Content({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(1, 1)}))
    with pytest.raises(FormatError, match="Flux control LoRA"):
        comfy.read(Content({"diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(1)}))


class TestPuttingTogether:
    """kohya's files have the original's matrices: pieces become one layer, and come back as they were."""

    NAMES, _ = FUSED["single_blocks.3.linear1"]

    def back(self, adapter, tmp_path):
        path = save_adapter(adapter, tmp_path / "a.safetensors", dtype=torch.float32)
        return files.read(path).tensors, load_adapter(path)

    def test_one_down_is_shared(self, tmp_path):
        """What came out of one matrix of rank 3 goes back into one of rank 3."""
        adapter = kohya.read(Content(spellings()["kohya"][1]))
        tensors, back = self.back(adapter, tmp_path)
        assert {key for key in tensors if not key.endswith("alpha")} == set(spellings()["kohya"][1])
        assert {len(tensor) for key, tensor in tensors.items() if key.endswith("lora_down.weight")} == {3}
        assert_same(back, adapter)

    def test_different_pieces_keep_their_ranks_and_scales(self, tmp_path):
        adapter = Adapter.of(
            LoraLayer(name, *lora(4 * D if "mlp" in name else D, rank), scale)
            for name, rank, scale in zip(self.NAMES, (1, 2, 3, 2), (0.5, 2.0, -1.0, 1.0), strict=True)
        )
        tensors, back = self.back(adapter, tmp_path)
        assert tensors["lora_unet_single_blocks_3_linear1.lora_down.weight"].shape == (8, IN)
        assert [back.layers[name].rank for name in self.NAMES] == [1, 2, 3, 2]
        assert_same(back, adapter)

    def test_a_piece_alone_leaves_the_other_rows_as_they_are(self, tmp_path):
        adapter = Adapter.of([LoraLayer(self.NAMES[1], *lora(D, 2))])
        tensors, back = self.back(adapter, tmp_path)
        assert tensors["lora_unet_single_blocks_3_linear1.lora_up.weight"].shape == (7 * D, 2)
        torch.testing.assert_close(back.layers[self.NAMES[1]].delta(), adapter.layers[self.NAMES[1]].delta())
        assert not any(back.layers[name].delta().any() for name in self.NAMES if name != self.NAMES[1])

    def test_one_dense_piece_makes_a_full_difference(self, tmp_path):
        layers = [DenseLayer(self.NAMES[0], torch.randn(D, IN)), LoraLayer(self.NAMES[3], *lora(4 * D, 2))]
        tensors, back = self.back(Adapter.of(layers), tmp_path)
        assert list(tensors) == ["lora_unet_single_blocks_3_linear1.diff"]
        for layer in layers:
            torch.testing.assert_close(back.layers[layer.name].delta(), layer.delta())

    def test_the_last_modulation(self, tmp_path):
        layer = LoraLayer("transformer.norm_out.linear", *lora(2 * D, 2))
        tensors, back = self.back(Adapter.of([layer]).with_(family="flux"), tmp_path)
        assert "lora_unet_final_layer_adaLN_modulation_1.alpha" in tensors
        torch.testing.assert_close(back.layers[layer.name].delta(), layer.delta())

    def test_pieces_of_unequal_parts(self, tmp_path):
        with pytest.raises(FormatError, match="are no pieces of one matrix"):
            self.back(Adapter.of([LoraLayer(self.NAMES[0], *lora(D)), LoraLayer(self.NAMES[3], *lora(D))]), tmp_path)


@pytest.mark.parametrize("family", [None, "sd3"])
@pytest.mark.parametrize("format", ["kohya", "diff"])
def test_another_transformer_with_names_of_flux_is_not_written_as_one(family, format, tmp_path):
    """SD3, Qwen-Image and others have double blocks of the very names."""
    adapter = Adapter.of([LoraLayer(f"{BLOCK}.attn.to_q", *lora(D))]).with_(family=family)
    with pytest.raises(FormatError, match="nothing says that this adapter is for it; write format .diffusers."):
        save_adapter(adapter, tmp_path / "a.safetensors", format=format)
    assert load_adapter(save_adapter(adapter, tmp_path / "b.safetensors", format="diffusers")).family == family


def test_the_names_of_the_original_say_that_it_is_flux(tmp_path):
    """Also of double blocks alone."""
    for stem in ("lora_unet_double_blocks_0_img_attn_proj", "double_blocks.0.img_attn.proj"):
        down, up = lora(D)
        tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        (tmp_path / "a.safetensors").write_bytes(files.safetensors_bytes(tensors, {}))
        adapter = load_adapter(tmp_path / "a.safetensors")
        assert adapter.family == "flux"
        assert_same(load_adapter(save_adapter(adapter, tmp_path / "b.safetensors", dtype=torch.float32)), adapter)


def test_diffusers_reads_our_kohya_files_of_flux_alike(tmp_path):
    """Through its converter, which has the output widths of the real model built in; one block of each kind, ranks and scales all over.

    It drops the alpha of the last two layers (diffusers 0.42.1), which is why a layer's alpha is its rank in our files of Flux.1.
    """
    from diffusers import FluxPipeline

    blocks = ("transformer.transformer_blocks.0.", "transformer.single_transformer_blocks.0.")
    adapter = Adapter.of(
        LoraLayer(name, *lora(shape[0], 1 + n % 3), (0.5, 1.0, 3.0, -0.25)[n % 4])
        for n, (name, shape) in enumerate(shapes("flux").items())
        if name.startswith(blocks) or (not name.startswith("text_encoder") and "blocks" not in name)
    )
    path = save_adapter(adapter, tmp_path / "a.safetensors", dtype=torch.float32)
    assert_same(load_adapter(path), adapter)
    theirs = FluxPipeline.lora_state_dict(path)
    assert_same(diffusers.read(Content(theirs)), adapter)
    tensors = {key: tensor * (2 if key.endswith("alpha") else 1) for key, tensor in files.read(path).tensors.items()}
    doubled = diffusers.read(Content(FluxPipeline.lora_state_dict(tensors)))
    twice = {name: float(doubled.layers[name].delta().norm() / layer.delta().norm()) for name, layer in adapter.layers.items()}
    dropped = {"transformer.proj_out", "transformer.norm_out.linear"}
    assert {name for name, ratio in twice.items() if ratio == pytest.approx(1)} == dropped
    assert {name for name, ratio in twice.items() if ratio == pytest.approx(2)} == twice.keys() - dropped


def test_diffusers_crashes_on_onetrainer_files_with_more_than_attention(tiny_flux, tmp_path):
    """Its converter of `lora_transformer_` names loses what follows the block's number unless it is attention (diffusers 0.42.1)."""
    stem = "lora_transformer_single_transformer_blocks_0_proj_mlp"
    down, up = lora(128, in_=32)
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(3.0)}
    (tmp_path / "a.safetensors").write_bytes(files.safetensors_bytes(tensors, {}))
    assert list(load_adapter(tmp_path / "a.safetensors").layers) == ["transformer.single_transformer_blocks.0.proj_mlp"]
    with pytest.raises(KeyError):
        tiny_flux.load_lora_weights(tmp_path / "a.safetensors")
