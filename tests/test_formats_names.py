"""Names: every layer of the real models is found again from its flattened and from its original name, and in one way only."""

from __future__ import annotations

import math

import pytest
import torch
from formats_families import original_flux, original_unet, shapes

from loraclr.formats import comfy, flux, kohya, ldm, names
from loraclr.formats.parts import Place

UNETS = ("sd1", "sd2", "sdxl")


def segmentations(component: str, flat: str) -> int:
    """In how many ways the pieces between underscores can be grouped into known words."""
    pieces = flat.split("_")
    ways = [1] + [0] * len(pieces)
    for end in range(1, len(pieces) + 1):
        for start in range(end):
            word = "_".join(pieces[start:end])
            if word in names.WORDS[names.kind(component)] or (end - start == 1 and word.isdecimal()):
                ways[end] += ways[start]
    return ways[-1]


@pytest.mark.parametrize(
    ("family", "counts"),
    [
        # 16 transformers of 12 layers, 22 residual blocks of 3, 14 shortcuts, 6 samplers, 2 + 2 at the ends
        ("sd1", {"unet": 282, "text_encoder": 72}),
        ("sd2", {"unet": 282, "text_encoder": 138}),
        # the 722 of kohya's plain LoRA (70 blocks of 10, 11 transformers of 2), 17 residual blocks of 3, 11 shortcuts, 4 samplers, 6
        ("sdxl", {"unet": 794, "text_encoder": 72, "text_encoder_2": 193}),
        ("flux", {"transformer": 504, "text_encoder": 72, "text_encoder_2": 168}),
    ],
)
def test_the_configurations_are_the_real_ones(family, counts):
    found = shapes(family)
    assert {component: sum(name.startswith(f"{component}.") for name in found) for component in counts} == counts
    assert sum(counts.values()) == len(found)
    assert names.guess_family(found) == family


def test_sizes_by_hand():
    assert shapes("sdxl")["unet.mid_block.attentions.0.transformer_blocks.9.attn2.to_k"] == (1280, 2048)
    assert shapes("sdxl")["unet.down_blocks.1.attentions.0.proj_in"] == (640, 640)
    assert shapes("sd1")["unet.down_blocks.1.attentions.0.proj_in"] == (640, 640, 1, 1)
    assert shapes("sd2")["text_encoder.encoder.layers.22.mlp.fc1"] == (4096, 1024)
    assert shapes("flux")["transformer.single_transformer_blocks.37.proj_out"] == (3072, 15360)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "flux"])
def test_every_layer_maps_back_uniquely(family):
    flats = set()
    for name in shapes(family):
        component, path = names.split(name)
        assert names.fits(component, path)
        whole = names.with_text_model(component, path)
        flat = whole.replace(".", "_")
        assert names.dotted(component, flat) == whole
        assert component == "transformer" or segmentations(component, flat) == 1, flat
        flats.add((component, flat))
    assert len(flats) == len(shapes(family))


@pytest.mark.parametrize("family", UNETS)
def test_kohya_names_are_read_back(family):
    for name in shapes(family):
        assert kohya._place(kohya._flat(name, two=family == "sdxl")) == name


def test_kohya_prefixes():
    te = "encoder.layers.0.mlp.fc1"
    assert kohya._flat(f"text_encoder.{te}", two=False) == "lora_te_text_model_encoder_layers_0_mlp_fc1"
    assert kohya._flat(f"text_encoder.{te}", two=True) == "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    assert kohya._flat(f"text_encoder_2.{te}", two=True) == "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    assert kohya._flat("text_encoder_2.text_projection", two=True) == "lora_te2_text_projection"


def test_onetrainer_and_t5_names_of_flux():
    prefixes = {"transformer": "lora_transformer_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te3_"}
    for name in shapes("flux"):
        component, path = names.split(name)
        assert kohya._place(prefixes[component] + names.with_text_model(component, path).replace(".", "_")) == name


@pytest.mark.parametrize(
    ("component", "flat", "path"),
    [
        ("unet", "mid_block_attentions_0_proj_in", "mid_block.attentions.0.proj_in"),
        ("unet", "up_blocks_1_resnets_2_time_emb_proj", "up_blocks.1.resnets.2.time_emb_proj"),
        ("text_encoder", "encoder_layers_11_self_attn_out_proj", "encoder.layers.11.self_attn.out_proj"),
        ("text_encoder_2", "encoder_block_3_layer_1_DenseReluDense_wi_0", "encoder.block.3.layer.1.DenseReluDense.wi_0"),
        ("transformer", "single_transformer_blocks_7_proj_mlp", "single_transformer_blocks.7.proj_mlp"),
        ("transformer", "mid_block_attentions_0_proj_in", None),
        ("unet", "down_blocks_0_attentions_0_to_x", None),
        ("unet", "down_blocks__attentions", None),
        ("unet", "", None),
    ],
)
def test_by_hand(component, flat, path):
    assert names.dotted(component, flat) == path


@pytest.mark.parametrize("family", UNETS)
def test_original_names_of_unets(family):
    """Every layer has exactly one original name, in kohya's and in ComfyUI's spelling."""
    layers = original_unet(family)
    for old, new in layers.items():
        assert kohya._place(f"lora_unet_{old.replace('.', '_')}") == f"unet.{new}", old
        assert comfy._place(f"diffusion_model.{old}") == f"unet.{new}", old
    assert sorted(f"unet.{new}" for new in layers.values()) == sorted(name for name in shapes(family) if name.startswith("unet."))


@pytest.mark.parametrize("family", UNETS)
def test_original_names_as_diffusers_converts_checkpoints(family):
    """Its converter of whole checkpoints, fed with numbered tensors, must send every original name where we do."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    from formats_families import BUILD

    with torch.device("meta"):
        config = dict(BUILD[family]["unet"]().config)
    layers = original_unet(family)
    checkpoint, number = {}, {}
    for index, old in enumerate(layers):
        for part in ("weight", "bias"):
            checkpoint[f"model.diffusion_model.{old}.{part}"] = torch.tensor(float(index))
        number[old] = index
    for norm in ("out.0.weight", "out.0.bias"):
        checkpoint[f"model.diffusion_model.{norm}"] = torch.tensor(-1.0)
    converted = convert_ldm_unet_checkpoint(checkpoint, config)
    for old, new in layers.items():
        assert int(converted[f"{new}.weight"]) == number[old], (old, new)


@pytest.mark.parametrize(
    "old", ["input_blocks_3_0_in_layers_2", "input_blocks_4_2_proj_in", "output_blocks_1_1_conv", "middle_block_3_x", "input_blocks_0_1_op"]
)
def test_no_such_original_layer(old):
    assert ldm.is_ldm(old) and kohya._place(f"lora_unet_{old}") is None


class TestFlux:
    def test_original_names_cover_every_layer_once(self):
        """Rows of the original layers are dealt out to diffusers' layers, all of them and no more."""
        left = {name: math.prod(shape[:1]) for name, shape in shapes("flux").items() if name.startswith("transformer.")}
        for old, (out, width) in original_flux().items():
            place = flux.place(old)
            assert place == flux.place(old.replace(".", "_")) and kohya._place(f"lora_unet_{old.replace('.', '_')}") == place
            assert comfy._place(f"diffusion_model.{old}") == place
            given = {place: out} if isinstance(place, str) else {name: len(rows) for name, rows in place.order(out).items()}
            for name, rows in given.items():
                assert shapes("flux")[name] == (rows, width), old
                left[name] -= rows
        assert not any(left.values())

    def test_rows_go_where_diffusers_sends_them(self):
        """Its converter of whole checkpoints, fed with numbered rows."""
        from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

        layers = original_flux(double=1, single=1)
        checkpoint, start = {}, 0.0
        for old, (out, _) in layers.items():
            checkpoint[f"{old}.weight"] = torch.arange(out)[:, None] + start
            checkpoint[f"{old}.bias"] = torch.zeros(out)
            start += out
        originals = dict(checkpoint)
        for block in ("double_blocks.0.img_attn", "double_blocks.0.txt_attn", "single_blocks.0"):
            checkpoint |= {f"{block}.norm.{norm}.scale": torch.ones(1) for norm in ("query_norm", "key_norm")}
        converted = convert_flux_transformer_checkpoint_to_diffusers(checkpoint)
        seen = set()
        for old, (out, _) in layers.items():
            place, weight = flux.place(old), originals[f"{old}.weight"]
            pieces = {place: weight} if isinstance(place, str) else {name: weight[rows] for name, rows in place.order(out).items()}
            for name, piece in pieces.items():
                assert torch.equal(converted[f"{name.removeprefix('transformer.')}.weight"], piece), (old, name)
                seen.add(name)
        assert len(seen) == len([key for key in converted if key.endswith("weight") and "norm_" not in key.replace("norm_out", "")])

    @pytest.mark.parametrize(
        "path",
        ["double_blocks.0.img_attn.norm", "single_blocks.0.linear3", "double_blocks.1000.img_mlp.0", "final_layer.x", "img_in.0", ""],
    )
    def test_no_such_layer(self, path):
        assert flux.place(path) is None

    def test_rows_that_cannot_be_cut(self):
        with pytest.raises(Exception, match=r"attn.to_q \+ .*attn.to_v: 10 output rows cannot be cut into 3 equal parts"):
            flux.place("double_blocks.0.img_attn.qkv").order(10)

    def test_a_place_by_hand(self):
        place = Place((("a", 1, 2), ("a", 0, 1), ("b", 2, 3)), 3)
        assert {name: rows.tolist() for name, rows in place.order(6).items()} == {"a": [2, 3, 0, 1], "b": [4, 5]}
        assert place.name == "a + b"
