"""Our files in other people's loaders: diffusers and PEFT must arrive at W + our delta; where diffusers does not, it is written down."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loraclr.adapter import Adapter, LoraLayer
from loraclr.formats import edlora, files, load_adapter, save_adapter

WANTED = re.compile(
    r"unet\.(down_blocks\.0|mid_block)\..*(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out)"
    r"|unet\.(down_blocks\.0\.downsamplers\.0\.conv|down_blocks\.0\.resnets\.0\.(conv1|time_emb_proj)|up_blocks\.1\.resnets\.0\.conv_shortcut)"
    r"|text_encoder\..*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
)


def weights(pipe) -> dict[str, torch.Tensor]:
    """Canonical name -> weight, also from below the wrappers that PEFT leaves in place."""
    return {
        f"{component}.{path.removesuffix('.base_layer')}": module.weight.detach().clone()
        for component in ("unet", "text_encoder")
        for path, module in getattr(pipe, component).named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and "lora_" not in path
    }


def adapter_for(pipe, *, uniform: bool = False) -> Adapter:
    layers = []
    for number, (name, weight) in enumerate(sorted(weights(pipe).items())):
        if WANTED.fullmatch(name):
            rank, kernel = (2, 1, 3)[0 if uniform else number % 3], weight.shape[2:]
            up = torch.randn(weight.shape[0], rank, *[1] * len(kernel)) * 0.1
            layers.append(
                LoraLayer(name, torch.randn(rank, *weight.shape[1:]) * 0.1, up, 1.0 if uniform else (0.5, 1.0, 3.0, -0.25)[number % 4])
            )
    return Adapter.of(layers)


def assert_fused(pipe, base: dict[str, torch.Tensor], adapter: Adapter, *, tolerance: float = 1e-6) -> None:
    now = weights(pipe)
    assert len(adapter) > 25 and set(adapter.layers) < set(base)
    for name, weight in base.items():
        expected = weight + adapter.layers[name].delta() if name in adapter.layers else weight
        torch.testing.assert_close(now[name], expected, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_diffusers_applies_our_files_exactly(format, tiny_pipe, tmp_path):
    """Ranks and scales differ from layer to layer: alpha does not, so nothing is left to mis-scale."""
    pipe = tiny_pipe()
    base, adapter = weights(pipe), adapter_for(pipe)
    pipe.load_lora_weights(save_adapter(adapter, tmp_path / "a.safetensors", format=format, dtype=torch.float32))
    pipe.fuse_lora()
    assert_fused(pipe, base, adapter)


def test_peft_applies_our_folders_exactly(tiny_pipe, tmp_path):
    from peft import PeftModel

    pipe = tiny_pipe()
    base, adapter = weights(pipe), adapter_for(pipe)
    folder = save_adapter(adapter, tmp_path / "a", format="peft", dtype=torch.float32)
    for component in ("unet", "text_encoder"):
        setattr(pipe, component, PeftModel.from_pretrained(getattr(pipe, component), folder / component).merge_and_unload())
    assert_fused(pipe, base, adapter)


def test_peft_folder_of_one_component(tiny_pipe, tmp_path):
    from peft import PeftModel

    pipe = tiny_pipe()
    whole = adapter_for(pipe)
    unet = Adapter.of(layer for layer in whole if layer.name.startswith("unet."))
    base = weights(pipe)
    folder = save_adapter(unet, tmp_path / "a", format="peft", dtype=torch.float32)
    pipe.unet = PeftModel.from_pretrained(pipe.unet, folder).merge_and_unload()
    assert_fused(pipe, base, unet)


def test_we_read_what_diffusers_and_peft_save(tiny_pipe, tmp_path):
    """Random LoRAs of PEFT with pattern settings, saved by both libraries, against the weights PEFT itself fuses."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    pipe = tiny_pipe()
    base = weights(pipe)
    settings = {
        "unet": LoraConfig(
            r=3,
            lora_alpha=5,
            target_modules=["to_q", "to_k", "to_out.0", "conv1"],
            rank_pattern={"attn1.to_q": 2},
            alpha_pattern={"attn2.to_k": 7},
        ),
        "text_encoder": LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "fc1"], use_rslora=True),
    }
    models, packed = {}, {}
    for component, config in settings.items():
        models[component] = get_peft_model(getattr(pipe, component), config)
        for name, parameter in models[component].named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        models[component].save_pretrained(tmp_path / "peft" / component)
        packed[component] = convert_state_dict_to_diffusers(get_peft_model_state_dict(models[component]))
        packed[component] = {key.removeprefix("base_model.model."): tensor for key, tensor in packed[component].items()}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=packed["unet"],
        text_encoder_lora_layers=packed["text_encoder"],
        unet_lora_adapter_metadata=models["unet"].peft_config["default"].to_dict() | {"target_modules": None},
        text_encoder_lora_adapter_metadata=models["text_encoder"].peft_config["default"].to_dict() | {"target_modules": None},
    )
    for component, model in models.items():
        setattr(pipe, component, model.merge_and_unload())
    for path in (tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "peft"):
        assert_fused(pipe, base, load_adapter(path), tolerance=1e-5)


class TestMixedAlphas:
    """diffusers 0.42.1 gives every attention layer the most common alpha of the file. Ours follows each layer's own."""

    def write(self, adapter, path) -> Path:
        """Scale 1 for every layer but the to_k, which have alpha = 4 * rank: the way of a file with mixed alphas."""
        tensors = load_file(save_adapter(adapter, path, dtype=torch.float32))
        for key in tensors:
            if key.endswith("to_k.alpha"):
                tensors[key] *= 4
        path.write_bytes(files.safetensors_bytes(tensors, {}))
        return path

    def test_ours_is_right_and_diffusers_deviates(self, tiny_pipe, tmp_path):
        pipe = tiny_pipe()
        base, plain = weights(pipe), adapter_for(pipe, uniform=True)
        path = self.write(plain, tmp_path / "a.safetensors")
        ours = load_adapter(path)
        for name, layer in plain.layers.items():
            torch.testing.assert_close(ours.layers[name].delta(), layer.delta() * (4 if name.endswith("to_k") else 1))
        pipe.load_lora_weights(path)
        pipe.fuse_lora()
        now = weights(pipe)
        ratios = {name: float((now[name] - base[name]).norm() / ours.layers[name].delta().norm()) for name in ours.layers}
        assert all(ratio == pytest.approx(1, abs=1e-4) for name, ratio in ratios.items() if not name.endswith("to_k"))
        assert all(ratio == pytest.approx(0.25, abs=1e-4) for name, ratio in ratios.items() if name.endswith("to_k"))

    def test_written_again_it_is_right_everywhere(self, tiny_pipe, tmp_path):
        pipe = tiny_pipe()
        base = weights(pipe)
        adapter = load_adapter(self.write(adapter_for(pipe, uniform=True), tmp_path / "a.safetensors"))
        pipe.load_lora_weights(save_adapter(adapter, tmp_path / "b.safetensors", dtype=torch.float32))
        pipe.fuse_lora()
        assert_fused(pipe, base, adapter)


def test_edlora_to_kohya_and_back(tiny_pipe, tmp_path):
    """Scale 1 in one, alpha = rank in the other: the same delta."""
    adapter = adapter_for(tiny_pipe(), uniform=True)
    one = load_adapter(save_adapter(adapter, tmp_path / "a.pth", format=edlora.id, dtype=torch.float32))
    two = load_adapter(save_adapter(one, tmp_path / "a.safetensors", dtype=torch.float32))
    assert one == two and all(layer.scale == 1.0 for layer in two)


def test_the_token_recipe_of_the_documentation(tiny_pipe, tmp_path):
    """The lines of docs/formats.md, run as they stand."""
    text = (Path(__file__).parents[1] / "docs" / "formats.md").read_text()
    recipe = re.search(r"```python\n(.*?load_textual_inversion.*?)```", text, re.DOTALL)[1]
    assert len(recipe.splitlines()) == 5
    pipe = tiny_pipe()
    tokens = {"<rhea>": torch.randn(10, 32), "<man>": torch.randn(1, 32)}
    save_adapter(adapter_for(pipe).with_(tokens=tokens), tmp_path / "merged.safetensors")
    exec(recipe.replace('"merged', f'"{tmp_path}/merged'), {"pipe": pipe})
    embedding = pipe.text_encoder.get_input_embeddings().weight
    for token, rows in tokens.items():
        torch.testing.assert_close(embedding[pipe.tokenizer.convert_tokens_to_ids(token)], rows.mean(0))
    assert any(type(module).__module__.startswith("peft.") for module in pipe.unet.modules())
