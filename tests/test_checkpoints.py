"""Single-file checkpoints: read without a network to the very weights, or refused with what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils as converters
from families_twins import clip, twin
from families_twins import vae as tiny_vae
from original_names import checkpoint, open_clip, unet, vae
from original_names import clip as clip_names
from safetensors.torch import load_file, save_file

from loraclr.checkpoints import tokenizer, write_config
from loraclr.checkpoints.configs import ARCHITECTURES
from loraclr.errors import PipelineError
from loraclr.formats import flux, single_file
from loraclr.formats.names import READ
from loraclr.pipeline import Pipeline


def tiny(family: str):
    pipe = twin("sdxl" if family == "sdxl" else "sd2")
    if family == "sd1":  # the text encoder of another house
        pipe.register_modules(text_encoder=clip(16, activation="quick_gelu").eval().requires_grad_(False))
    return pipe


@pytest.fixture
def no_network(monkeypatch):
    """Whoever asks the hub, in whatever way diffusers does, fails the test."""

    def asked(*arguments, **keywords):
        raise AssertionError(f"the network was asked for {arguments}")

    import huggingface_hub

    for place in (converters, diffusers.loaders.single_file, huggingface_hub):
        for name in ("snapshot_download", "hf_hub_download"):
            if hasattr(place, name):
                monkeypatch.setattr(place, name, asked)


def written(family: str, folder: Path, *, without: str = "", **metadata: str) -> tuple[Path, Path, object]:
    """A checkpoint, a folder of its configuration without any weights, and the pipeline they are of."""
    pipe = tiny(family)
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    state = {key: tensor.contiguous().clone() for key, tensor in checkpoint(parts).items() if not without or without not in key}
    save_file(state, folder / "model.safetensors", metadata=metadata or None)
    pipe.save_pretrained(folder / "config")
    for weights in (folder / "config").rglob("*.safetensors"):
        weights.unlink()
    return folder / "model.safetensors", folder / "config", pipe


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_checkpoint_is_the_pipeline_it_was_made_of(family, tmp_path, no_network):
    file, config, pipe = written(family, tmp_path)
    loaded, original = Pipeline.load(file, config=config), Pipeline(pipe)
    assert loaded.modules.keys() == original.modules.keys() and loaded.source == str(file)
    for component, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            state = getattr(loaded.pipe, component).state_dict()
            for key, tensor in part.state_dict().items():
                assert torch.equal(state[key], tensor), (component, key)
    ours, theirs = (np.asarray(one.sample(["a dog"], seeds=[1], steps=2)[0]) for one in (loaded, original))
    assert (ours == theirs).all()
    assert Pipeline.load(file, config=config, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(("family", "width"), [("sd1", 16), ("sdxl", 40)])
def test_a_known_architecture_needs_the_file_alone(family, width, tmp_path, no_network, monkeypatch):
    """As for the real ones, with tiny configurations in the places of the bundled ones."""
    file, _, pipe = written(family, tmp_path)
    known = {}
    for name, part in pipe.components.items():
        if hasattr(part, "config") and "tokenizer" not in name:
            values = dict(part.config) if not hasattr(part.config, "to_dict") else part.config.to_dict()
            known[name] = (type(part).__module__.partition(".")[0], type(part).__name__, values)
    monkeypatch.setitem(READ, width, family)
    monkeypatch.setitem(ARCHITECTURES, family, known)
    loaded = Pipeline.load(file)
    assert type(loaded.pipe) is type(pipe) and len(loaded.pipe.tokenizer) == 49408
    assert family == "sd1" or loaded.pipe.tokenizer_2.pad_token == "!"
    for component in ("unet", "vae", "text_encoder"):
        state = getattr(loaded.pipe, component).state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in getattr(pipe, component).state_dict().items())


@pytest.mark.parametrize("family", list(ARCHITECTURES))
def test_names_of_the_real_checkpoints(family, tmp_path):
    """On the meta device: what diffusers makes of every original name is all that the real models hold, in the right shape."""
    write_config(family, tmp_path, scheduler={})
    config = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in ("unet", "vae")}
    with torch.device("meta"):
        parts = {}
        for name, (library, kind, values) in ARCHITECTURES[family].items():
            made = getattr({"diffusers": diffusers, "transformers": transformers}[library], kind)
            if name != "scheduler":
                parts[name] = made(**values) if library == "diffusers" else made(made.config_class(**values))
    found = {
        "unet": converters.convert_ldm_unet_checkpoint(
            {f"model.diffusion_model.{key}": t for key, t in unet(parts["unet"]).items()}, config["unet"]
        ),
        "vae": converters.convert_ldm_vae_checkpoint(
            {f"first_stage_model.{key}": t for key, t in vae(parts["vae"]).items()}, config["vae"]
        ),
    }
    for name in ("text_encoder", "text_encoder_2"):
        if name in parts and parts[name].config.hidden_act == "gelu":
            prefix = "cond_stage_model.model." if family == "sd2" else "conditioner.embedders.1.model."
            state = {prefix + key: tensor for key, tensor in open_clip(parts[name]).items()}
            found[name] = converters.convert_open_clip_checkpoint(parts[name], state, prefix=prefix)
        elif name in parts:
            prefix = "cond_stage_model.transformer.text_model."
            found[name] = converters.convert_ldm_clip_checkpoint({prefix + key: t for key, t in clip_names(parts[name]).items()})
    for name, part in parts.items():
        wanted = {key.removeprefix("text_model."): tuple(tensor.shape) for key, tensor in part.state_dict().items()}
        got = {key.removeprefix("text_model."): tensor for key, tensor in found[name].items()}
        got = got if "text_projection.weight" in wanted else {key: t for key, t in got.items() if "text_projection" not in key}
        assert got.keys() == wanted.keys(), name
        assert all(got[key].shape[:2] == shape[:2] for key, shape in wanted.items()), name


@pytest.mark.parametrize("family", list(ARCHITECTURES))
def test_the_written_configuration_is_a_folder_that_diffusers_reads(family, tmp_path):
    write_config(family, tmp_path, scheduler={"prediction_type": "epsilon"})
    config = diffusers.DiffusionPipeline.load_config(str(tmp_path))
    kind = getattr(diffusers, config["_class_name"])
    expected, _ = kind._get_signature_keys(kind)
    assert {name for name in config if not name.startswith("_")} - {"requires_safety_checker"} >= set(expected) - set(
        kind._optional_components
    )
    assert getattr(diffusers, config["scheduler"][1]).from_pretrained(tmp_path, subfolder="scheduler").config.prediction_type == "epsilon"


def test_clips_tokenizer_by_hand():
    made = tokenizer("<|endoftext|>")
    assert len(made) == 49408 and made.model_max_length == 77
    assert made("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert made("Hello, World!").input_ids == [49406, 3306, 267, 1002, 256, 49407]
    assert made("a", padding="max_length", max_length=5).input_ids == [49406, 320, 49407, 49407, 49407]
    assert tokenizer("!")("a", padding="max_length", max_length=5).input_ids == [49406, 320, 49407, 0, 0]


# ---- Flux.1


def flux_file(naming: str, folder: Path) -> tuple[Path, Path, object]:
    """A file of the twin's transformer (`whole`: of all of it), a folder of the pipeline without what is in the file, the pipeline."""
    folder.mkdir(exist_ok=True)
    pipe = twin("flux")
    if naming == "whole":
        pipe.register_modules(vae=tiny_vae(shift_factor=0.1, scaling_factor=0.36, use_quant_conv=False, use_post_quant_conv=False).eval())
    state = single_file.checkpoint({"transformer": pipe.transformer.state_dict()}, family="flux")
    if naming == "diffusers":
        state = dict(pipe.transformer.state_dict())
    if naming == "bare":
        state = {key.removeprefix("model.diffusion_model."): tensor for key, tensor in state.items()}
    if naming == "whole":
        state |= {f"text_encoders.clip_l.transformer.text_model.{key}": t for key, t in clip_names(pipe.text_encoder).items()}
        state |= {
            f"text_encoders.t5xxl.transformer.{key}": t for key, t in pipe.text_encoder_2.state_dict().items() if "embed_tokens" not in key
        }
        state |= {f"vae.{key}": tensor for key, tensor in vae(pipe.vae).items()}
        state["text_encoders.clip_l.logit_scale"] = torch.ones(())
    save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, folder / "flux1.safetensors")
    pipe.save_pretrained(folder / "config")
    for weights in (folder / "config").rglob("*.safetensors"):
        if naming == "whole" or weights.parent.name == "transformer":
            weights.unlink()
    return folder / "flux1.safetensors", folder / "config", pipe


@pytest.mark.parametrize("naming", ["comfy", "bare", "diffusers", "whole"])
def test_a_flux_file_takes_what_it_lacks_from_a_folder(naming, tmp_path, no_network):
    file, config, pipe = flux_file(naming, tmp_path)
    loaded = Pipeline.load(file, config=config)
    assert loaded.family == "flux" and loaded.source == str(file)
    for component in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        state, expected = getattr(loaded.pipe, component).state_dict(), getattr(pipe, component).state_dict()
        assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected), component
    pictures = [np.asarray(one.sample(["a dog"], seeds=[1], steps=2, size=(16, 16))[0]) for one in (loaded, Pipeline(pipe))]
    assert (pictures[0] == pictures[1]).all()
    assert Pipeline.load(file, config=config, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_eight_bit_floats_are_numbers(family, tmp_path, no_network):
    file, config, pipe = flux_file("comfy", tmp_path) if family == "flux" else written("sd1", tmp_path)
    save_file({key: tensor.to(torch.float8_e4m3fn) for key, tensor in load_file(file).items()}, file)
    loaded = Pipeline.load(file, config=config)
    assert loaded.dtype == torch.float32
    expected = getattr(pipe, "unet", None) or pipe.transformer
    for key, tensor in loaded.unet.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[key].to(torch.float8_e4m3fn).float()), key


def test_original_names_of_flux_are_those_of_diffusers_own_converter():
    """The real architecture with one block of each kind: numbers that tell output rows apart, as only these are rearranged."""
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    state = {key: torch.arange(len(tensor))[:, None] + 100_000 * n for n, (key, tensor) in enumerate(model.state_dict().items())}
    made = flux.to_original(state)
    assert converters.convert_flux_transformer_checkpoint_to_diffusers(dict(made)).keys() == state.keys()
    for found in (flux.to_diffusers(made), converters.convert_flux_transformer_checkpoint_to_diffusers(dict(made))):
        assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)


def test_what_is_wrong_with_a_flux_file_is_said(tmp_path, no_network):
    file, config, _ = flux_file("comfy", tmp_path)
    refused(file, r"holds the transformer of Flux.1 without CLIP, T5, autoencoder; give a diffusers folder .*--base-config")
    refused(file, "does not load with the folder .*it is one of StableDiffusionPipeline", config=saved(tmp_path / "sd2", "sd2"))
    refused(file, "does not load with the folder", config=tmp_path)
    state = load_file(file)
    save_file(state | {"model.diffusion_model.double_blocks.0.img_attn.qkv.scale_weight": torch.ones(1)}, tmp_path / "q.safetensors")
    refused(tmp_path / "q.safetensors", "is quantised .*scale_weight", config=config)
    del state["model.diffusion_model.img_in.bias"]
    save_file(state, tmp_path / "less.safetensors")
    refused(tmp_path / "less.safetensors", "1 weights of its transformer .* such as x_embedder.bias: nothing", config=config)
    save_file(load_file(file) | {"model.diffusion_model.odd.weight": torch.ones(1)}, tmp_path / "more.safetensors")
    refused(tmp_path / "more.safetensors", "1 weights that Flux.1 does not have, such as odd.weight", config=config)
    fill = load_file(file) | {"model.diffusion_model.img_in.weight": torch.ones(16, 384)}
    save_file(fill, tmp_path / "fill.safetensors")
    refused(tmp_path / "fill.safetensors", r"x_embedder.weight: \(16, 384\), not \(16, 16\)", config=config)
    whole, config, _ = flux_file("whole", tmp_path / "whole")
    refused(whole, "without T5's vocabulary; give")
    state = load_file(whole)
    del state["text_encoders.t5xxl.transformer.encoder.final_layer_norm.weight"]
    save_file(state, tmp_path / "t5.safetensors")
    refused(tmp_path / "t5.safetensors", "1 weights of its text_encoder_2 .* such as encoder.final_layer_norm.weight", config=config)


def saved(folder: Path, family: str) -> Path:
    twin(family).save_pretrained(folder)
    return folder


# ---- what cannot be read


def refused(file: Path, message: str, **options) -> None:
    with pytest.raises(PipelineError, match=message):
        Pipeline.load(file, **options)


def test_what_is_missing_is_said(tmp_path, no_network):
    for part, message in (
        ("first_stage_model.", "holds no autoencoder, as one file of a base model would"),
        ("cond_stage_model.", "holds no text encoder"),
        ("model.diffusion_model.", "holds no UNet"),
        ("input_blocks.1.0.in_layers.2.bias", "does not load as a checkpoint|lacks 1 weights, such as unet.down_blocks.0.resnets.0"),
    ):
        folder = tmp_path / part.replace(".", "")
        folder.mkdir()
        file, config, _ = written("sd2", folder, without=part)
        refused(file, message, config=config)


def test_another_architecture_needs_its_configuration(tmp_path, no_network):
    file, config, _ = written("sd1", tmp_path)
    refused(file, "cross-attention that reads 16 numbers, not 768, 1024 or 2048; .* give a diffusers folder of it")
    refused(config, "a config goes with a single-file checkpoint", config=config)
    refused(file, "does not load as a checkpoint", config=tmp_path)


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    refused(tmp_path / "model.ckpt", "others may run code when read; save it as .safetensors first")
    (tmp_path / "broken.safetensors").write_bytes(b"12345678901234567890")
    refused(tmp_path / "broken.safetensors", "is no readable .safetensors")
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1, 1)}, tmp_path / "lora.safetensors")
    refused(tmp_path / "lora.safetensors", "holds no UNet, no autoencoder, no text encoder")
    keys = {"first_stage_model.x": 4, "cond_stage_model.x": 4, "model.diffusion_model.input_blocks.0.0.weight": 9}
    save_file({key: torch.zeros(1, width) for key, width in keys.items()}, tmp_path / "inpaint.safetensors")
    refused(tmp_path / "inpaint.safetensors", "for inpainting or editing")


@pytest.mark.parametrize(
    ("metadata", "extra", "expected"),
    [
        ({}, (), {}),
        ({"modelspec.prediction_type": "v"}, (), {"prediction_type": "v_prediction"}),
        ({"modelspec.prediction_type": "epsilon"}, (), {"prediction_type": "epsilon"}),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, (), {"prediction_type": "epsilon"}),
        ({}, ("v_pred", "ztsnr"), {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    ],
)
def test_the_prediction_type_is_what_the_file_states(tmp_path, metadata, extra, expected):
    from loraclr.checkpoints import _header, _recognised

    keys = {"model.diffusion_model.x.attn2.to_k.weight": 1024, "first_stage_model.x": 1, "cond_stage_model.x": 1}
    keys = {key: torch.zeros(1, width) for key, width in keys.items()}
    save_file(keys | {key: torch.zeros(1) for key in extra}, tmp_path / "x.safetensors", metadata=metadata or None)
    assert _recognised(tmp_path / "x.safetensors", _header(tmp_path / "x.safetensors"), known=True) == ("sd2", expected)
