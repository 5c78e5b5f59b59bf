"""SDXL: two text encoders, original and diffusers block names, in and out; and embeddings bundled into a file."""

from __future__ import annotations

import pytest
import torch
from formats_samples import ATTN, assert_same, lora

from loraclr.adapter import Adapter, LoraLayer
from loraclr.errors import FormatError
from loraclr.formats import describe, files, kohya, load_adapter, save_adapter
from loraclr.formats.base import Content

TE1, TE2 = "text_encoder.encoder.layers.0.mlp.fc1", "text_encoder_2.encoder.layers.1.self_attn.q_proj"
UNET = "unet.up_blocks.0.attentions.2.transformer_blocks.1.attn2.to_out.0"
Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture(scope="module")
def sdxl():
    """The architecture of SDXL, two layers to a block, and nothing but its width is small."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    clip = CLIPTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=16
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=4,
        cross_attention_dim=32,
        use_linear_projection=True,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )
    empty = dict.fromkeys(("vae", "tokenizer", "tokenizer_2"))
    return StableDiffusionXLPipeline(
        text_encoder=CLIPTextModel(clip),
        text_encoder_2=CLIPTextModelWithProjection(clip),
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
        **empty,
    )


def weights(pipe) -> dict[str, torch.Tensor]:
    return {
        f"{component}.{path.removesuffix('.base_layer').removeprefix('text_model.')}": module.weight.detach().clone()
        for component in ("unet", "text_encoder", "text_encoder_2")
        for path, module in getattr(pipe, component).named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and "lora_" not in path
    }


def adapter_for(pipe, *, uniform: bool = False) -> Adapter:
    """A LoRA of every layer of the attentions and of both text encoders."""
    layers, scales = [], (0.5, 1.0, 3.0, -0.25)
    for number, (name, weight) in enumerate(sorted(weights(pipe).items())):
        if ".attentions." in name or ".layers." in name:
            rank = 2 if uniform else 1 + number % 3
            down, up = torch.randn(rank, weight.shape[1]) / 10, torch.randn(weight.shape[0], rank) / 10
            layers.append(LoraLayer(name, down, up, 1.0 if uniform else scales[number % 4]))
    return Adapter.of(layers)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_diffusers_applies_our_files_exactly(format, sdxl, tmp_path):
    base, adapter = weights(sdxl), adapter_for(sdxl)
    assert adapter.components == ("text_encoder", "text_encoder_2", "unet") and len(adapter) > 150
    path = save_adapter(adapter, tmp_path / "a.safetensors", format=format, dtype=torch.float32)
    assert_same(load_adapter(path), adapter)
    sdxl.load_lora_weights(path)
    sdxl.fuse_lora(components=["unet", "text_encoder", "text_encoder_2"])
    now = weights(sdxl)
    sdxl.unfuse_lora(components=["unet", "text_encoder", "text_encoder_2"])
    sdxl.unload_lora_weights()
    for name, weight in base.items():
        expected = weight + adapter.layers[name].delta() if name in adapter.layers else weight
        torch.testing.assert_close(now[name], expected, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def original(name: str) -> str:
    """A diffusers name of this tiny model under its original block name, as kohya's SDXL trainer writes it."""
    parts = name.replace(".", "_").split("_")
    kind, block, layer, rest = parts[1], parts[3], parts[5], "_".join(parts[6:])
    if kind == "mid":
        return f"lora_unet_middle_block_1_{'_'.join(parts[5:])}"
    number = 3 * int(block) + int(layer) + (kind == "down")
    return f"lora_unet_{'input' if kind == 'down' else 'output'}_blocks_{number}_1_{rest}"


def test_original_block_names_as_diffusers_reads_them(sdxl, tmp_path):
    """The same file in both hands: our deltas are what diffusers fuses."""
    base, plain = weights(sdxl), adapter_for(sdxl, uniform=True)
    tensors = {}
    for name, layer in plain.layers.items():
        prefix = {"text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_text_model_"}.get(name.split(".")[0])
        stem = f"{prefix}{name.split('.', 1)[1].replace('.', '_')}" if prefix else original(name)
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = layer.down, layer.up
        tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    (tmp_path / "a.safetensors").write_bytes(files.safetensors_bytes(tensors, {}))
    ours = load_adapter(tmp_path / "a.safetensors")
    assert list(ours.layers) == list(plain.layers) and ours.family == "sdxl"
    sdxl.load_lora_weights(tmp_path / "a.safetensors")
    sdxl.fuse_lora(components=["unet", "text_encoder", "text_encoder_2"])
    now = weights(sdxl)
    sdxl.unfuse_lora(components=["unet", "text_encoder", "text_encoder_2"])
    sdxl.unload_lora_weights()
    for name, layer in ours.layers.items():
        torch.testing.assert_close(layer.delta(), plain.layers[name].delta() / 2)
        torch.testing.assert_close(now[name] - base[name], layer.delta(), rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("format", "target"), [("kohya", "a.safetensors"), ("diffusers", "a.safetensors"), ("peft", "a")])
def test_read_after_write_with_two_text_encoders(format, target, tmp_path):
    adapter = Adapter.of([lora(TE1), lora(TE2, scale=0.5), lora("text_encoder_2.text_projection"), lora(UNET, rank=3)])
    path = save_adapter(adapter.with_(family="sdxl"), tmp_path / target, format=format, dtype=torch.float32)
    assert_same(load_adapter(path), adapter)
    assert load_adapter(path).family == "sdxl"


def test_peft_folder_of_the_second_text_encoder_alone(tmp_path):
    adapter = Adapter.of([lora(TE2)])
    path = save_adapter(adapter, tmp_path / "a", format="peft", dtype=torch.float32)
    assert [child.name for child in path.iterdir()] == ["text_encoder_2"]
    assert load_adapter(path) == adapter
    assert save_adapter(adapter, path, format="peft") == path  # its own output may be replaced


def test_edlora_has_no_second_text_encoder(tmp_path):
    with pytest.raises(FormatError, match="edlora files hold unet and text_encoder; leave 'text_encoder_2' out"):
        save_adapter(Adapter.of([lora(TE2)]), tmp_path / "a.pth", format="edlora")


def test_the_first_text_encoder_is_numbered_where_there_are_two():
    def stems(adapter):
        return {key.partition("_text_model")[0] for key in kohya.write(adapter, torch.float32).tensors}

    assert stems(Adapter.of([lora(TE1)])) == {"lora_te"}
    assert stems(Adapter.of([lora(TE1)]).with_(family="sdxl")) == {"lora_te1"}
    assert stems(Adapter.of([lora(TE1), lora(TE2)])) == {"lora_te1", "lora_te2"}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("diffusion_model.output_blocks.2.1.transformer_blocks.1.attn2.to_out.0", UNET),
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1", TE1),
        ("text_encoders.clip_h.transformer.text_model.encoder.layers.0.mlp.fc1", TE1),
        ("text_encoders.clip_g.transformer.text_model.encoder.layers.1.self_attn.q_proj", TE2),
        (
            "text_encoders.t5xxl.transformer.encoder.block.0.layer.1.DenseReluDense.wo",
            "text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wo",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["lora_A", "lora_down", "diff", "lokr"])
def test_names_of_comfyui(path, name, kind, tmp_path):
    down, up = torch.randn(2, 5), torch.randn(6, 2)
    tensors = {
        "lora_A": {"lora_A.weight": down, "lora_B.weight": up},
        "lora_down": {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)},
        "diff": {"diff": up @ down},
        "lokr": {"lokr_w1": torch.ones(1, 1), "lokr_w2": up @ down},
    }[kind]
    (tmp_path / "a.safetensors").write_bytes(files.safetensors_bytes({f"{path}.{part}": tensor for part, tensor in tensors.items()}, {}))
    [layer] = load_adapter(tmp_path / "a.safetensors")
    assert layer.name == name
    torch.testing.assert_close(layer.delta(), up @ down)


@pytest.mark.parametrize(
    ("width", "metadata", "family"),
    [
        (768, {}, "sd1"),
        (1024, {}, "sd2"),
        (2048, {}, "sdxl"),
        (2048, {"modelspec.architecture": "my-own-merge/lora"}, "sdxl"),
        (768, {"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
        (77, {"modelspec.architecture": "my-own-merge/lora"}, "my-own-merge"),
        (77, {}, None),
    ],
)
def test_the_family_shows_in_what_cross_attention_reads(width, metadata, family, tmp_path):
    """A statement we know counts most, then the shapes, then a statement we do not know."""
    adapter = Adapter.of([lora(ATTN.replace("attn1.to_q", "attn2.to_k"), in_=width)])
    path = save_adapter(adapter, tmp_path / "a.safetensors", metadata=metadata)
    assert load_adapter(path).family == family
    assert any("its layers are those of sd1 models" in note for note in describe(path).warnings) == ((width, family) == (768, "sdxl"))


class TestBundledEmbeddings:
    def read(self, **bundled: torch.Tensor) -> Adapter:
        tensors = {f"{Q}.lora_down.weight": torch.ones(1, 2), f"{Q}.lora_up.weight": torch.ones(2, 1)}
        return kohya.read(Content(tensors | {f"bundle_emb.{key}": tensor for key, tensor in bundled.items()}))

    @pytest.mark.parametrize("key", ["rhea.string_to_param.*", "rhea.clip_l"])
    def test_one_token_for_every_vector(self, key):
        rows = torch.arange(6.0).view(2, 3)
        found = self.read(**{key: rows})
        assert list(found.layers) == [ATTN] and list(found.tokens) == ["rhea", "rhea_1"]
        assert torch.equal(found.tokens["rhea"], rows[:1]) and torch.equal(found.tokens["rhea_1"], rows[1:])
        assert list(self.read(**{key: rows[0]}).tokens) == ["rhea"]

    def test_a_placeholder_with_dots(self):
        assert list(self.read(**{"v1.2.clip_l.clip_l": torch.ones(1, 3)}).tokens) == ["v1.2.clip_l"]

    @pytest.mark.parametrize("encoder", ["t5", "clip_l_out", "clip_g_out", "string_to_param.265"])
    def test_other_encoders_are_refused_by_name(self, encoder):
        with pytest.raises(FormatError, match=rf"bundle_emb.rhea.{encoder}: learned tokens are kept for CLIP text encoders alone"):
            self.read(**{f"rhea.{encoder}": torch.ones(1, 3)})

    @pytest.mark.parametrize("bundled", [{".clip_l": torch.ones(1, 3)}, {"a.clip_l": torch.ones(1, 1, 3)}, {"a.clip_l": torch.ones(0, 3)}])
    def test_what_is_none(self, bundled):
        with pytest.raises(FormatError, match="bundle_emb"):
            self.read(**bundled)

    def test_both_text_encoders_one_after_the_other(self):
        first, second = torch.randn(2, 768), torch.randn(2, 1280)
        found = self.read(**{"rhea.clip_l": first, "rhea.clip_g": second, "one.clip_g": second[:1], "other.clip_l": first[:1]})
        assert {token: tuple(rows.shape) for token, rows in found.tokens.items()} == {
            "rhea": (1, 2048), "rhea_1": (1, 2048), "one": (1, 1280), "other": (1, 768),
        }  # fmt: skip
        assert torch.equal(torch.cat([found.tokens["rhea"], found.tokens["rhea_1"]]), torch.cat([first, second], dim=1))

    @pytest.mark.parametrize(
        "stem", ["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "diffusion_model.middle_block.1.proj_in"]
    )
    def test_in_files_of_other_names(self, stem, tmp_path):
        """As OneTrainer writes those of diffusers and ComfyUI."""
        tensors = {f"{stem}.lora_A.weight": torch.ones(1, 2), f"{stem}.lora_B.weight": torch.ones(2, 1)}
        tensors |= {"bundle_emb.rhea.clip_l": torch.ones(1, 768), "bundle_emb.rhea.clip_g": torch.ones(1, 1280)}
        (tmp_path / "a.safetensors").write_bytes(files.safetensors_bytes(tensors, {}))
        found = load_adapter(tmp_path / "a.safetensors")
        assert len(found) == 1 and torch.equal(found.tokens["rhea"], torch.ones(1, 2048))

    @pytest.mark.parametrize("shapes", [((2, 768), (1, 1280)), ((1, 768), (1, 768)), ((1, 1280), (1, 1280)), ((1, 2, 768), (1, 1280))])
    def test_what_is_no_pair(self, shapes):
        with pytest.raises(FormatError, match=r"bundle_emb.rhea.clip_[lg] has shape"):
            self.read(**{"rhea.clip_l": torch.ones(shapes[0]), "rhea.clip_g": torch.ones(shapes[1])})

    @pytest.mark.parametrize("format", ["kohya", "bundle", "diffusers"])
    def test_they_come_back(self, tmp_path, format):
        bundle = {"a.clip_l": torch.randn(3, 768), "a.clip_g": torch.randn(3, 1280), "a_2x.clip_g": torch.randn(1, 1280)}
        bundle |= {"b.clip_l": torch.randn(1, 768)}
        found = self.read(**bundle)
        path = save_adapter(found, tmp_path / "a.safetensors", format=format)
        back, stored = load_adapter(path), files.read(path).tensors
        assert back == found and set(back.tokens) == {"a", "a_1", "a_2", "a_2x", "b"}
        inside = {key.removeprefix("bundle_emb."): tensor for key, tensor in stored.items() if key.startswith("bundle_emb.")}
        assert inside.keys() == (bundle.keys() if format == "bundle" else set())
        assert all(torch.equal(tensor, bundle[key]) for key, tensor in inside.items())
        assert (tmp_path / "a.tokens.safetensors").exists() == (format != "bundle")

    def test_tokens_inside_take_the_place_of_those_beside(self, tmp_path):
        found = self.read(**{"rhea.clip_l": torch.ones(1, 3)})
        save_adapter(found, tmp_path / "a.safetensors")
        assert load_adapter(save_adapter(found, tmp_path / "a.safetensors", format="bundle")) == found
        assert not (tmp_path / "a.tokens.safetensors").exists()

    def test_what_no_file_can_hold_inside(self, tmp_path):
        found = self.read(**{"rhea.clip_l": torch.ones(1, 3)})
        with pytest.raises(FormatError, match="rhea has embeddings for 16 layers"):
            save_adapter(found.with_(tokens={"rhea": torch.ones(16, 768)}), tmp_path / "a.safetensors", format="bundle")
        with pytest.raises(FormatError, match="write format 'embedding'"):
            save_adapter(found.with_(layers={}), tmp_path / "a.safetensors", format="bundle")

    def test_two_of_one_name(self):
        with pytest.raises(FormatError, match="a second embedding called 'a'"):
            self.read(**{"a.clip_l": torch.ones(1, 3), "a.string_to_param.*": torch.ones(1, 3)})

    def test_they_become_the_sidecar_of_what_is_written(self, tmp_path):
        found = self.read(**{"rhea.clip_l": torch.ones(1, 3)})
        back = load_adapter(save_adapter(found, tmp_path / "a.safetensors"))
        assert torch.equal(back.tokens["rhea"], torch.ones(1, 3))

    def test_in_the_file_and_beside_it(self, tmp_path):
        save_adapter(self.read(**{"rhea.clip_l": torch.ones(1, 3)}), tmp_path / "a.safetensors")
        tensors = files.read(tmp_path / "a.safetensors").tensors
        data = files.safetensors_bytes({**tensors, "bundle_emb.rhea.clip_l": torch.ones(1, 3)}, {})
        (tmp_path / "a.safetensors").write_bytes(data)
        with pytest.raises(FormatError, match="the token 'rhea' is in the file and in a.tokens.safetensors"):
            load_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("sdxl", (TE1, TE2, UNET)),
        ("flux", [f"transformer.single_transformer_blocks.0.attn.to_{part}" for part in "qkv"]),
    ],
)
def test_merging_from_the_weights_alone_needs_no_pipeline(family, names, tmp_path):
    from loraclr.merge import merge

    one, two = (Adapter.of([lora(name) for name in names], name=name).with_(family=family) for name in ("one", "two"))
    paths = [
        save_adapter(one, tmp_path / "one.safetensors", dtype=torch.float32),
        save_adapter(two, tmp_path / "two.safetensors", format="diffusers", dtype=torch.float32),
    ]
    merged = load_adapter(merge(paths, method="sum").save(tmp_path / "both.safetensors", dtype=torch.float32))
    assert merged.family == family
    for name in names:
        expected = one.layers[name].delta() + two.layers[name].delta()
        torch.testing.assert_close(merged.layers[name].delta(), expected, rtol=1e-5, atol=1e-5)
