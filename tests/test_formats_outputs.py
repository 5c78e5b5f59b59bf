"""Full differences, Textual Inversion files in both directions, and PEFT folders of LoHa and LoKr against PEFT itself."""

from __future__ import annotations

import json

import pytest
import torch
from formats_samples import ATTN, KERNEL, assert_same, dense, lora, mixed
from safetensors.torch import load_file, save_file

from loraclr.adapter import Adapter, DenseLayer
from loraclr.errors import FormatError
from loraclr.formats import detect_format, embedding, load_adapter, save_adapter


class TestDiff:
    def test_every_layer_is_its_change(self, tmp_path):
        adapter = mixed().with_(triggers=("rhea",))
        path = save_adapter(adapter, tmp_path / "a.safetensors", format="diff", dtype=torch.float32)
        back, keys = load_adapter(path), load_file(path).keys()
        assert all(key.endswith(".diff") for key in keys) and len(keys) == len(adapter)
        assert all(isinstance(layer, DenseLayer) for layer in back) and back.triggers == ("rhea",)
        assert_same(back, adapter)
        assert detect_format(path) == "kohya"

    def test_twice_is_once(self, tmp_path):
        first = save_adapter(Adapter.of([dense(ATTN), lora(KERNEL)]), tmp_path / "a.safetensors", format="diff")
        again = save_adapter(load_adapter(first), tmp_path / "b.safetensors", format="diff")
        assert first.read_bytes() == again.read_bytes()


class TestEmbedding:
    VECTORS = torch.arange(12.0).view(3, 4)
    CALLED = ("rhea", "rhea_1", "rhea_2")

    def expect(self, path, tokens):
        found = load_adapter(path)
        assert detect_format(path) == "embedding" and not len(found)
        assert found.tokens.keys() == tokens.keys() and all(torch.equal(found.tokens[token], tokens[token]) for token in tokens)
        return found

    def vectors(self):
        return {token: row[None] for token, row in zip(self.CALLED, self.VECTORS, strict=True)}

    @pytest.mark.parametrize("key", ["emb_params", "clip_l"])
    def test_it_is_called_as_its_file(self, key, tmp_path):
        save_file({key: self.VECTORS}, tmp_path / "rhea.safetensors")
        found = self.expect(tmp_path / "rhea.safetensors", self.vectors())
        assert found.call == "rhea rhea_1 rhea_2"

    @pytest.mark.parametrize("ending", ["pt", "bin"])
    def test_the_older_file_of_a1111(self, ending, tmp_path):
        path = tmp_path / f"rhea.{ending}"
        old = {
            "string_to_token": {"*": 265},
            "string_to_param": {"*": self.VECTORS},
            "name": "old name",
            "step": 500,
            "sd_checkpoint": None,
        }
        torch.save(old, path)
        self.expect(path, self.vectors())

    def test_learned_embeds_of_diffusers(self, tmp_path):
        torch.save({"<rhea>": torch.ones(4)}, tmp_path / "learned_embeds.bin")
        self.expect(tmp_path / "learned_embeds.bin", {"<rhea>": torch.ones(1, 4)})
        save_file({"<rhea>": torch.ones(4)}, tmp_path / "learned_embeds.safetensors")
        self.expect(tmp_path / "learned_embeds.safetensors", {"<rhea>": torch.ones(1, 4)})

    def test_the_layers_of_xti_go_down_mid_up(self, tmp_path):
        rows = {key: torch.full((1, 4), float(index)) for index, key in enumerate(embedding.XTI)}
        save_file(rows, tmp_path / "rhea.safetensors")
        self.expect(tmp_path / "rhea.safetensors", {"rhea": torch.arange(16.0)[:, None].expand(16, 4)})
        assert (embedding.XTI[0], embedding.XTI[6], embedding.XTI[7], embedding.XTI[15]) == ("IN01", "MID", "OUT03", "OUT11")

    @pytest.mark.parametrize("tokens", [{"<rhea>": torch.ones(1, 4)}, {"<r>": torch.ones(1, 4), "<r>_1": torch.zeros(1, 4)}])
    def test_what_is_written_is_what_a1111_and_diffusers_read(self, tokens, tmp_path):
        path = save_adapter(Adapter({}, tokens=tokens), tmp_path / "other.safetensors", format="embedding", dtype=torch.float32)
        assert torch.equal(load_file(path)["emb_params"], torch.cat(list(tokens.values())))
        self.expect(path, tokens)

    def test_layer_wise_tokens_are_xti(self, tmp_path):
        tokens = {"<rhea>": torch.randn(16, 4)}
        path = save_adapter(Adapter({}, tokens=tokens), tmp_path / "a.safetensors", format="embedding", dtype=torch.float32)
        assert tuple(sorted(load_file(path))) == tuple(sorted(embedding.XTI))
        self.expect(path, tokens)

    @pytest.mark.parametrize(
        ("adapter", "said"),
        [
            (mixed(), "changes 8 layers, and format 'embedding' holds a learned token alone"),
            (
                Adapter({}, tokens={"<a>": torch.ones(1, 4), "<b>": torch.ones(1, 4)}),
                "holds the tokens <a>, <b>, and an embedding file has one",
            ),
            (Adapter({}, tokens={"<a>": torch.ones(10, 4)}), "<a> has embeddings for 10 layers"),
        ],
    )
    def test_what_it_cannot_hold(self, adapter, said, tmp_path):
        with pytest.raises(FormatError, match=said):
            save_adapter(adapter.with_(tokens=adapter.tokens or {"<a>": torch.ones(1, 4)}), tmp_path / "a.safetensors", format="embedding")

    @pytest.mark.parametrize("parts", [("clip_l", "clip_g"), ("clip_g",)])
    def test_of_both_text_encoders(self, parts, tmp_path):
        tensors = {key: torch.randn(2, {"clip_l": 768, "clip_g": 1280}[key]) for key in parts}
        save_file(tensors, tmp_path / "rhea.safetensors")
        found = load_adapter(tmp_path / "rhea.safetensors")
        assert list(found.tokens) == ["rhea", "rhea_1"]
        assert torch.equal(found.tokens["rhea_1"], torch.cat([tensors[key][1:] for key in parts], dim=1))
        back = load_file(save_adapter(found, tmp_path / "b.safetensors", format="embedding", dtype=torch.float32))
        assert back.keys() == tensors.keys() and all(torch.equal(back[key], tensors[key]) for key in parts)

    def test_what_is_refused(self, tmp_path):
        for refused, said in (
            (
                {"clip_l": torch.ones(1, 4), "clip_g": torch.ones(1, 8)},
                "clip_l has shape .1, 4.; beside SDXL's clip_g of 1 vectors .1, 768. fits",
            ),
            ({"clip_l": torch.ones(1, 768), "t5xxl": torch.ones(1, 4096)}, "embeddings of t5xxl; learned tokens are kept for CLIP"),
        ):
            save_file(refused, tmp_path / "a.safetensors")
            with pytest.raises(FormatError, match=said):
                load_adapter(tmp_path / "a.safetensors")
        save_file({"emb_params": torch.ones(1, 2, 3)}, tmp_path / "b.safetensors")
        with pytest.raises(FormatError, match=r"shape \(1, 2, 3\)"):
            load_adapter(tmp_path / "b.safetensors")
        rows = {key: torch.ones(1 + (key == "MID"), 4) for key in embedding.XTI}
        save_file(rows, tmp_path / "c.safetensors")
        with pytest.raises(FormatError, match="different numbers of vectors"):
            load_adapter(tmp_path / "c.safetensors")

    def test_other_files_are_not_taken_for_one(self, tmp_path):
        torch.save({f"lora_unet_mid_block.{part}": torch.ones(1, 4) for part in ("lora_down.weight", "lora_up.weight")}, tmp_path / "a.pt")
        with pytest.raises(FormatError, match="no 'params' dictionary as ED-LoRA files do, and no embedding"):
            load_adapter(tmp_path / "a.pt")
        save_adapter(mixed().with_(tokens={"<rhea>": torch.ones(1, 4)}), tmp_path / "a.safetensors")
        with pytest.raises(FormatError, match="load the file it lies beside"):
            load_adapter(tmp_path / "a.tokens.safetensors")
        save_file({"emb_params": torch.ones(1025, 2)}, tmp_path / "b.safetensors")
        with pytest.raises(FormatError, match=r"shape \(1025, 2\)"):
            load_adapter(tmp_path / "b.safetensors")

    def test_diffusers_loads_it(self, tiny_pipe, tmp_path):
        row = torch.randn(1, 32)
        path = save_adapter(Adapter({}, tokens={"<rhea>": row}), tmp_path / "a.safetensors", format="embedding", dtype=torch.float32)
        pipe = tiny_pipe()
        pipe.load_textual_inversion(str(path), token="<rhea>")
        index = pipe.tokenizer.convert_tokens_to_ids("<rhea>")
        assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[index], row[0])


class Net(torch.nn.Module):
    """As much of a UNet as LoHa and LoKr have cases for: linear, a 3x3 and a 1x1 convolution, under real names."""

    def __init__(self) -> None:
        super().__init__()
        self.mid_block = torch.nn.Module()
        self.mid_block.resnets = torch.nn.ModuleList([torch.nn.Module()])
        self.mid_block.resnets[0].conv1 = torch.nn.Conv2d(8, 12, 3)
        self.mid_block.resnets[0].conv_shortcut = torch.nn.Conv2d(8, 12, 1)
        self.mid_block.attentions = torch.nn.ModuleList([torch.nn.Module()])
        self.mid_block.attentions[0].proj_in = torch.nn.Linear(8, 12)

    def forward(self, x):
        return x


PATHS = ("mid_block.resnets.0.conv1", "mid_block.resnets.0.conv_shortcut", "mid_block.attentions.0.proj_in")


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
@pytest.mark.parametrize(
    "settings",
    [
        {"r": 2, "alpha": 3},
        {"r": 2, "alpha": 3, "use_effective_conv2d": True},
        {"r": 2, "alpha": 4, "rank_pattern": {"conv1": 3}, "alpha_pattern": {"proj_in": 1}},
        {"r": 64, "alpha": 16},
        {"r": 1, "alpha": 2, "decompose_both": True, "decompose_factor": 2},
    ],
)
def test_peft_folders_are_read_as_peft_applies_them(kind, settings, tmp_path):
    """A LoKr whose rank is too large to be decomposed is scaled by alpha / r all the same, unlike in kohya's files."""
    import peft

    if kind == "LoHa" and "decompose_both" in settings:
        settings = {"r": 1, "alpha": 2}
    torch.manual_seed(3)
    model = peft.get_peft_model(
        Net(), getattr(peft, f"{kind}Config")(target_modules=[path.rpartition(".")[2] for path in PATHS], **settings)
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    model.save_pretrained(tmp_path / "a")
    found = load_adapter(tmp_path / "a")
    assert sorted(found.layers) == sorted(f"unet.{path}" for path in PATHS)
    for path in PATHS:
        expected = model.base_model.model.get_submodule(path).get_delta_weight("default")
        got = found.layers[f"unet.{path}"].delta()
        assert got.flatten(1).shape == expected.flatten(1).shape
        assert (got.flatten() - expected.flatten()).norm() < 1e-5 * expected.norm(), path


def test_other_peft_kinds_are_named(tmp_path):
    import peft

    model = peft.get_peft_model(Net(), peft.OFTConfig(target_modules=["proj_in"], oft_block_size=4))
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(FormatError, match="peft_type is 'OFT', whose change is not known here; LORA, LOHA and LOKR are read"):
        load_adapter(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == "OFT"
