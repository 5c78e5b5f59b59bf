"""What each format's files look like in the wild, and which deltas they mean, worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from formats_samples import ATTN, CONV, KERNEL, OUT, PROJ, TEXT
from torch.nn.functional import conv2d

from loraclr.adapter import DenseLayer
from loraclr.errors import FormatError
from loraclr.formats import diffusers, edlora, files, kohya, load_adapter, peft
from loraclr.formats.base import Content

Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
DOWN, UP = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
PRODUCT = torch.tensor([[1.0, 2.0], [3.0, 4.0], [4.0, 6.0]])


def pair(stem: str, down: str = "lora_down.weight", up: str = "lora_up.weight") -> dict[str, torch.Tensor]:
    return {f"{stem}.{down}": DOWN, f"{stem}.{up}": UP}


def only(adapter):
    [layer] = adapter
    return layer


class TestKohya:
    @pytest.mark.parametrize(
        ("alpha", "scale"),
        [
            (torch.tensor(1.0), 0.5),
            (torch.tensor(2.0), 1.0),
            (torch.tensor(4.0), 2.0),
            (torch.tensor(1), 0.5),
            (torch.tensor([8.0]), 4.0),
            (torch.tensor(0.0), 1.0),
            (None, 1.0),
        ],
    )
    def test_scale_is_alpha_over_rank(self, alpha, scale):
        layer = only(kohya.read(Content(pair(Q) | ({} if alpha is None else {f"{Q}.alpha": alpha}))))
        assert layer.name == ATTN and layer.scale == scale
        assert torch.equal(layer.delta(), scale * PRODUCT)

    def test_every_module_has_its_own_alpha_and_rank(self):
        k = Q.replace("to_q", "to_k")
        one = {f"{k}.lora_down.weight": DOWN[:1], f"{k}.lora_up.weight": UP[:, :1], f"{k}.alpha": torch.tensor(3.0)}
        found = kohya.read(Content(pair(Q) | {f"{Q}.alpha": torch.tensor(1.0)} | one))
        assert {name.rsplit("_", 1)[1]: (layer.rank, layer.scale) for name, layer in found.layers.items()} == {"q": (2, 0.5), "k": (1, 3.0)}

    @pytest.mark.parametrize(
        "flat",
        [
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
            "lora_te_encoder_layers_0_self_attn_q_proj",
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        ],
    )
    def test_text_encoder_names(self, flat):
        assert only(kohya.read(Content(pair(flat)))).name == TEXT

    def test_two_names_of_one_layer(self):
        both = pair("lora_te_text_model_encoder_layers_0_self_attn_q_proj") | pair("lora_te_encoder_layers_0_self_attn_q_proj")
        with pytest.raises(FormatError, match="two keys give its 'lora_down'"):
            kohya.read(Content(both))

    @pytest.mark.parametrize("squeezed", ["none", "down", "up"])
    def test_one_by_one_convolutions(self, squeezed):
        down, up = DOWN if squeezed == "down" else DOWN[:, :, None, None], UP if squeezed == "up" else UP[:, :, None, None]
        stem = "lora_unet_down_blocks_1_attentions_0_proj_in"
        layer = only(kohya.read(Content({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up})))
        assert layer.name == PROJ and torch.equal(layer.delta(), PRODUCT[:, :, None, None])

    def test_locon_is_one_convolution_after_the_other(self):
        down, up, x = torch.randn(3, 4, 3, 3), torch.randn(5, 3, 1, 1), torch.randn(1, 4, 6, 6)
        stem = "lora_unet_down_blocks_0_downsamplers_0_conv"
        layer = only(kohya.read(Content({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up})))
        assert layer.name == KERNEL
        torch.testing.assert_close(conv2d(x, layer.delta()), conv2d(conv2d(x, down), up), rtol=1e-5, atol=1e-5)

    def test_tucker_is_three_convolutions_in_a_row(self):
        down, mid, up = torch.randn(3, 4, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(5, 3, 1, 1)
        stem = "lora_unet_down_blocks_0_downsamplers_0_conv"
        parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(1.5)}
        layer = only(kohya.read(Content({f"{stem}.{part}": tensor for part, tensor in parts.items()})))
        x = torch.randn(1, 4, 6, 6)
        expected = conv2d(conv2d(conv2d(x, down), mid), up) * 0.5
        torch.testing.assert_close(conv2d(x, layer.delta()), expected, rtol=1e-5, atol=1e-5)
        loops = torch.zeros(5, 4, 3, 3)
        for m in range(3):
            for n in range(3):
                loops += 0.5 * up[:, m, 0, 0].view(5, 1, 1, 1) * mid[m, n] * down[n, :, 0, 0].view(1, 4, 1, 1)
        torch.testing.assert_close(layer.delta(), loops)

    def test_full_difference(self):
        layer = only(kohya.read(Content({f"{Q}.diff": PRODUCT})))
        assert isinstance(layer, DenseLayer) and torch.equal(layer.delta(), PRODUCT)

    def test_original_block_names(self):
        layer = only(kohya.read(Content(pair("lora_unet_output_blocks_6_0_skip_connection"))))
        assert layer.name == CONV

    @pytest.mark.parametrize(
        ("key", "kind"),
        [
            (f"{Q}.oft_diag", "OFT rotations of an older layout"),
            (f"{Q}.diff_b", "bias differences"),
            ("lora_unet_down_blocks_0_resnets_0_norm1.w_norm", "normalisation-layer differences"),
            ("lora_unet_down_blocks_0_resnets_0_norm1.b_norm", "normalisation-layer differences"),
            (f"{Q}.lora_up.bias", "bias differences"),
            ("bundle_emb.rhea.t5", "learned tokens are kept for CLIP text encoders alone"),
            ("bundle_emb.rhea.clip_l_out", "learned tokens are kept for CLIP text encoders alone"),
            ("lora_te2_encoder_layers_0_wrong.lora_up.weight", "1 keys that kohya does not have"),
            ("lora_unet_double_blocks_0_img_attn_other.lora_up.weight", "Flux layers that Flux.1 does not have"),
            ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight", "SD3"),
            (f"{Q}.something", "1 keys that kohya does not have"),
            ("lora_unet_mid_block_wrong_name.lora_up.weight", "1 keys that kohya does not have"),
        ],
    )
    def test_what_is_refused_is_named(self, key, kind):
        with pytest.raises(FormatError, match=kind) as caught:
            kohya.read(Content(pair(Q) | {key: torch.ones(1)}))
        assert key in str(caught.value)

    @pytest.mark.parametrize(
        "tensors",
        [
            {f"{Q}.lora_down.weight": DOWN},
            {f"{Q}.alpha": torch.tensor(1.0)},
            pair(Q) | {f"{Q}.diff": PRODUCT},
            pair(Q) | {f"{Q}.hada_w1_a": DOWN},
            pair(Q) | {f"{Q}.lokr_w1": DOWN},
            pair(Q) | {f"{Q}.oft_blocks": torch.ones(1, 3, 3)},
            {f"{Q}.diff": PRODUCT, f"{Q}.dora_scale": torch.ones(3, 1)},
            {f"{Q}.lora_down.weight": DOWN, f"{Q}.lora_up.weight": torch.ones(3, 5)},
            {f"{Q}.lora_down.weight": DOWN[0], f"{Q}.lora_up.weight": UP},
            {f"{Q}.lora_down.weight": DOWN[:0], f"{Q}.lora_up.weight": UP[:, :0]},
            {f"{Q}.lora_down.weight": torch.tensor(1.0), f"{Q}.lora_up.weight": torch.tensor(1.0)},
            {f"{Q}.lora_down.weight": DOWN[:, :, None, None], f"{Q}.lora_up.weight": torch.ones(3, 2, 3, 3)},
            pair(Q) | {f"{Q}.lora_mid.weight": torch.ones(2, 2, 3, 3)},
            pair(Q) | {f"{Q}.alpha": torch.ones(2)},
            {f"{Q}.diff": torch.ones(3)},
        ],
    )
    def test_halves_and_misfits(self, tensors):
        with pytest.raises(FormatError, match=ATTN):
            kohya.read(Content(tensors))


class TestDiffusers:
    PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    CLIP = "encoder.layers.0.self_attn"

    @pytest.mark.parametrize("prefix", ["unet.", ""])
    @pytest.mark.parametrize(
        ("middle", "down", "up"),
        [
            (".processor.to_q_lora", "down.weight", "up.weight"),
            (".to_q.lora", "down.weight", "up.weight"),
            (".to_q", "lora_A.weight", "lora_B.weight"),
            (".to_q", "lora_A.default.weight", "lora_B.default.weight"),
        ],
    )
    def test_unet_names(self, prefix, middle, down, up):
        content = pair(f"{prefix}{self.PATH}{middle}", down, up)
        assert diffusers.detect(content, {})
        layer = only(diffusers.read(Content(content)))
        assert layer.name == ATTN and torch.equal(layer.delta(), PRODUCT)

    def test_the_output_projection_of_old(self):
        stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora"
        assert only(diffusers.read(Content(pair(stem, "down.weight", "up.weight")))).name == OUT

    @pytest.mark.parametrize("prefix", ["text_encoder.text_model.", "text_encoder.", "text_model.", ""])
    @pytest.mark.parametrize(
        ("middle", "down", "up"),
        [
            (".to_q_lora", "down.weight", "up.weight"),
            (".q_proj.lora_linear_layer", "down.weight", "up.weight"),
            (".q_proj", "lora_A.weight", "lora_B.weight"),
        ],
    )
    def test_text_encoder_names(self, prefix, middle, down, up):
        content = pair(f"{prefix}{self.CLIP}{middle}", down, up)
        assert diffusers.detect(content, {})
        assert only(diffusers.read(Content(content))).name == TEXT

    def test_text_output_projection_of_old(self):
        content = pair("text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora", "down.weight", "up.weight")
        assert only(diffusers.read(Content(content))).name == "text_encoder.encoder.layers.0.self_attn.out_proj"

    @pytest.mark.parametrize(
        "key", [f"unet.{PATH}.to_q.alpha", f"unet.{PATH}.to_q.lora.alpha", f"unet.{PATH}.processor.to_q_lora.down.weight.alpha"]
    )
    def test_network_alphas(self, key):
        content = pair(f"unet.{self.PATH}.to_q", "lora_A.weight", "lora_B.weight") | {key: torch.tensor(4.0)}
        assert only(diffusers.read(Content(content))).scale == 2.0

    def read(self, **config):
        content = pair(f"unet.{self.PATH}.to_q", "lora_A.weight", "lora_B.weight")
        text = {f"text_encoder.text_model.{self.CLIP}.q_proj.{k}": v for k, v in (("lora_A.weight", DOWN), ("lora_B.weight", UP))}
        return diffusers.read(Content(content | text, {"lora_adapter_metadata": json.dumps(config)}))

    def test_header_of_each_component(self):
        found = self.read(
            **{
                "unet.r": 2,
                "unet.lora_alpha": 8,
                "text_encoder.r": 4,
                "text_encoder.rank_pattern": {"q_proj": 2},
                "text_encoder.lora_alpha": 1,
            }
        )
        assert {name: layer.scale for name, layer in found.layers.items()} == {ATTN: 4.0, TEXT: 0.5}

    def test_header_patterns_as_peft_reads_them(self):
        alphas = {f"^text_model.{self.CLIP}.q_proj": 6, "encoder.layers.0.self_attn.q_proj": 10}
        found = self.read(**{"unet.r": 2, "unet.lora_alpha": 2, "unet.alpha_pattern": {"^to_q": 20, r"attn\d\.to_q": 6, "to_q": 10},
                             "text_encoder.r": 2, "text_encoder.alpha_pattern": alphas})  # fmt: skip
        assert {name: layer.scale for name, layer in found.layers.items()} == {ATTN: 3.0, TEXT: 3.0}

    def test_rank_stabilised(self):
        found = self.read(**{"unet.r": 2, "unet.lora_alpha": 8, "unet.use_rslora": True, "text_encoder.r": 2})
        assert found.layers[ATTN].scale == pytest.approx(8 / math.sqrt(2))

    def test_a_component_the_header_does_not_mention(self):
        assert self.read(**{"unet.r": 2, "unet.lora_alpha": 8}).layers[TEXT].scale == 1.0

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"unet.r": 3, "unet.lora_alpha": 8}, "rank 3, its tensors have 2"),
            ({"unet.r": 2, "unet.lora_alpha": "8"}, "lora_alpha is '8'"),
            ({"unet.r": 2, "unet.use_dora": True}, "use_dora, but there are no magnitudes"),
            ({"unet.r": 2, "unet.init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
            ({"unet.r": 2, "unet.lora_alpha": 1e300}, "expected a number up to 1e"),  # finite, and no change of it is
            ({"unet.r": 2, "unet.lora_alpha": float("nan")}, "expected a number up to 1e"),
            ({"unet.r": 2, "unet.alpha_pattern": {"(a+)+b": 2}}, "too involved"),
            ({"unet.r": 2, "unet.alpha_pattern": {"(a": 2}}, "no regular expression"),
            ({"unet.r": 2, "unet.alpha_pattern": [1]}, "alpha_pattern is a list"),
            ({"r": 2}, "does not say which component"),
        ],
    )
    def test_headers_that_cannot_be_followed(self, config, message):
        with pytest.raises(FormatError, match=message):
            self.read(**config)

    def test_two_answers_to_one_question(self):
        content = pair(f"unet.{self.PATH}.to_q", "lora_A.weight", "lora_B.weight") | {f"unet.{self.PATH}.to_q.alpha": torch.tensor(1.0)}
        with pytest.raises(FormatError, match="two answers"):
            diffusers.read(Content(content, {"lora_adapter_metadata": '{"unet.r": 2}'}))

    @pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
    def test_broken_header(self, text):
        with pytest.raises(FormatError, match="lora_adapter_metadata"):
            diffusers.read(Content(pair(f"unet.{self.PATH}.to_q", "lora_A.weight", "lora_B.weight"), {"lora_adapter_metadata": text}))

    @pytest.mark.parametrize(
        ("key", "kind"),
        [
            ("transformer.blocks.0.attn1.to_q.lora_A.weight", "layers of another transformer"),
            (f"unet.{PATH}.to_q.lora_B.bias", "bias differences"),
        ],
    )
    def test_what_is_refused_is_named(self, key, kind):
        with pytest.raises(FormatError, match=kind):
            diffusers.read(Content(pair(f"unet.{self.PATH}.to_q", "lora_A.weight", "lora_B.weight") | {key: torch.ones(2)}))


class TestPeft:
    KEY = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    CLIP = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj"

    def read(self, key=KEY, **config):
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2} | config
        return peft.read(Content(pair(key, "lora_A.weight", "lora_B.weight"), {"adapter_config.json": json.dumps(config)}))

    @pytest.mark.parametrize(("key", "name"), [(KEY, ATTN), (CLIP, TEXT), (CLIP.replace("text_model.", ""), TEXT)])
    def test_the_names_tell_the_component(self, key, name):
        assert only(self.read(key)).name == name

    @pytest.mark.parametrize(
        ("config", "scale"),
        [
            ({}, 1.0),
            ({"lora_alpha": 6}, 3.0),
            ({"lora_alpha": 6, "use_rslora": True}, 6 / math.sqrt(2)),
            ({"alpha_pattern": {"attn1.to_q": 4}}, 2.0),
            ({"alpha_pattern": {"attn2.to_q": 4}}, 1.0),
            ({"alpha_pattern": {"n1.to_q": 4}}, 1.0),
            ({"r": 64, "rank_pattern": {".*attn1.*": 2}, "lora_alpha": 1}, 0.5),
        ],
    )
    def test_scale(self, config, scale):
        assert only(self.read(**config)).scale == pytest.approx(scale)

    @pytest.mark.parametrize("kind", ["OFT", "BOFT", None])
    def test_other_kinds(self, kind):
        with pytest.raises(FormatError, match=f"peft_type is {kind!r}"):
            self.read(peft_type=kind)

    def test_weights_without_their_configuration(self, tmp_path):
        (tmp_path / "adapter_model.safetensors").write_bytes(files.safetensors_bytes(pair(self.KEY, "lora_A.weight", "lora_B.weight"), {}))
        with pytest.raises(FormatError, match="pass the folder"):
            load_adapter(tmp_path / "adapter_model.safetensors")
        with pytest.raises(FormatError, match="lacks adapter_config.json"):
            load_adapter(tmp_path)

    def test_unknown_modules(self):
        with pytest.raises(FormatError, match="keys that peft does not have: base_model.model.lm_head.lora_A.weight"):
            self.read("base_model.model.lm_head")


class TestEdLora:
    def save(self, path, **params):
        torch.save({"params": params}, path)
        return path

    def test_the_layout_of_mix_of_show(self, tmp_path):
        tokens = {"<rhea1>": torch.randn(16, 768), "<rhea2>": torch.randn(16, 768)}
        unet = pair("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
        text = pair("text_model.encoder.layers.0.self_attn.q_proj")
        found = load_adapter(self.save(tmp_path / "rhea.pth", new_concept_embedding=tokens, text_encoder=text, unet=unet))
        assert found.name == "rhea" and sorted(found.layers) == [TEXT, ATTN]
        assert all(layer.scale == 1.0 and torch.equal(layer.delta(), PRODUCT) for layer in found)  # never divided by the rank
        assert all(torch.equal(found.tokens[token], tokens[token]) for token in tokens)

    def test_sections_may_be_missing(self, tmp_path):
        unet = pair("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
        assert list(load_adapter(self.save(tmp_path / "a.pt", text_encoder=None, unet=unet)).layers) == [ATTN]

    def test_one_embedding_for_all_layers(self, tmp_path):
        found = load_adapter(self.save(tmp_path / "a.pt", new_concept_embedding={"<a>": torch.ones(768)}))
        assert found.tokens["<a>"].shape == (1, 768)

    @pytest.mark.parametrize("section", ["text_encoder", "unet", "lora"])
    def test_unknown_keys(self, section, tmp_path):
        with pytest.raises(FormatError, match=f"keys that edlora does not have: params/{section}/odd.lora_up.weight"):
            load_adapter(self.save(tmp_path / "a.pt", **{section: {"odd.lora_up.weight": torch.ones(2, 2)}}))

    def test_written_as_it_is_read(self):
        content = pair("params/text_encoder/text_model.encoder.layers.0.self_attn.q_proj")
        assert edlora.write(edlora.read(Content(content)), torch.float32).tensors.keys() == content.keys()
