"""A base with an adapter in it, as a diffusers folder and as one checkpoint: diffusers loads the very weights back."""

from __future__ import annotations

import warnings

import pytest
import torch
from concepts import KEYS, concept, fingerprint, three
from conftest import tiny_tokenizer
from families_twins import twin
from safetensors import safe_open

from loraclr.errors import FormatError, LoraclrError
from loraclr.formats import sidecar, single_file
from loraclr.fuse import fuse
from loraclr.pipeline import Pipeline


@pytest.fixture
def base(tiny_pipe) -> Pipeline:
    return Pipeline(tiny_pipe())


def states(pipe) -> dict[str, dict[str, torch.Tensor]]:
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    return {name: dict(part.state_dict()) for name, part in pipe.components.items() if name in parts and part is not None}


def assert_equal(pipe, other) -> None:
    a, b = states(pipe), states(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].keys() - b[name].keys() <= {"text_model.embeddings.position_ids", "embeddings.position_ids"}, name
        assert all(torch.equal(a[name][key].float(), tensor.float()) for key, tensor in b[name].items()), name


def single(kind, path, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind.from_single_file(str(path), config=str(config), local_files_only=True, dtype=torch.float32)


def test_a_folder_is_the_base_plus_the_change(base, tmp_path):
    ada, before = three(base)[0], fingerprint(base)
    path = fuse(ada, base, tmp_path / "fused", dtype=torch.float32)
    assert fingerprint(base) == before
    fused = Pipeline.load(path)
    for name in base.modules:
        change = ada.layers[name].delta().view(base.base_weight(name).shape) if name in ada.layers else 0
        assert torch.allclose(fused.base_weight(name), base.base_weight(name) + change, atol=1e-6), name
    with pytest.raises(FormatError, match="never replaced"):
        fuse(ada, base, path)
    half = Pipeline.load(fuse(ada, base, tmp_path / "half", strength=0.5))
    expected = base.base_weight(KEYS[0]) + 0.5 * ada.layers[KEYS[0]].delta()
    assert torch.equal(half.base_weight(KEYS[0]), expected.half().float())
    assert sorted(child.name for child in tmp_path.iterdir()) == ["fused", "half"]


def test_whole_numbers_of_a_model_stay_whole(base, tmp_path):
    """Half precision has no 2049."""
    places = torch.arange(3000)
    base.pipe.text_encoder.register_buffer("places", places)
    path = fuse(three(base)[0], base, tmp_path / "fused")
    with safe_open(path / "text_encoder" / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("places"), places)


def test_diffusers_reads_the_checkpoint_as_the_same_model(base, tmp_path):
    ada = three(base)[0].with_(family="sd1", metadata={"modelspec.license": "MIT"})
    folder = tmp_path / "config"
    base.pipe.save_pretrained(folder)
    path = fuse(ada, base, tmp_path / "one.safetensors", layout="checkpoint", dtype=torch.float32)
    loaded = single(type(base.pipe), path, folder)
    with base.applied(dict(ada.layers)):
        assert_equal(loaded, base.pipe)
    with safe_open(path, "pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1" and metadata["modelspec.license"] == "MIT"
    assert {
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        "first_stage_model.decoder.up.0.block.0.norm1.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    } <= keys
    assert all(key.startswith(("model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.")) for key in keys)


def test_equal_models_make_equal_bytes_and_tokens_lie_beside(base, tmp_path):
    ben = three(base)[1]
    one, two = (fuse(ben, base, tmp_path / f"{name}.safetensors", layout="checkpoint") for name in "ab")
    assert one.read_bytes() == two.read_bytes()
    assert sidecar.read(one).keys() == {"<ben>"}


@pytest.mark.parametrize(
    ("changes", "stated", "marks"),
    [
        ({"prediction_type": "epsilon"}, "epsilon", set()),
        ({"prediction_type": "v_prediction"}, "v", {"v_pred"}),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, "v", {"v_pred", "ztsnr"}),
    ],
)
def test_a_checkpoint_says_what_its_model_predicts(base, changes, stated, marks, tmp_path):
    """Of the base, whatever the adapter was trained on: read as another, it draws noise."""
    from diffusers import DDIMScheduler

    base.pipe.save_pretrained(tmp_path / "config")
    base.pipe.scheduler = DDIMScheduler.from_config(base.pipe.scheduler.config, **changes)
    ada = three(base)[0].with_(metadata={"modelspec.prediction_type": "other"})
    path = fuse(ada, base, tmp_path / "one.safetensors", layout="checkpoint", dtype=torch.float32)
    with safe_open(path, "pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == stated
        assert {key for key in file.keys() if "." not in key} == marks  # noqa: SIM118
    with base.applied(dict(ada.layers)):
        assert_equal(single(type(base.pipe), path, tmp_path / "config"), base.pipe)


def test_what_is_refused_leaves_nothing(base, tmp_path):
    ada = three(base)[0]
    with pytest.raises(FormatError, match="end its name in .safetensors"):
        fuse(ada, base, tmp_path / "x", layout="checkpoint")
    with pytest.raises(FormatError, match="leave .safetensors off"):
        fuse(ada, base, tmp_path / "x.safetensors")
    before = fingerprint(base)
    with pytest.raises(LoraclrError, match="do not fit torch.float16"):
        fuse(ada, base, tmp_path / "x", strength=1e7)
    assert fingerprint(base) == before and not list(tmp_path.iterdir())
    with pytest.raises(FormatError, match="not for sd3; write a fused folder"):
        single_file.checkpoint({}, family="sd3")
    with pytest.raises(FormatError, match="odd.weight has no place"):
        single_file.checkpoint({"unet": {"odd.weight": torch.ones(1)}, "vae": {}, "text_encoder": {}}, family="sd1", layers=2)


def test_flux_comes_back_as_its_transformer(tmp_path):
    pipe = twin("flux")
    pipe.save_pretrained(tmp_path / "config")
    base = Pipeline(pipe)
    ada = concept(base, "ada", ("transformer.norm_out.linear", "transformer.single_transformer_blocks.0.proj_mlp"), rank=2, seed=1)
    path = fuse(ada, base, tmp_path / "flux.safetensors", layout="checkpoint", dtype=torch.float32)
    with base.applied(dict(ada.layers)):
        assert_equal(Pipeline.load(path, config=tmp_path / "config").pipe, pipe)
    ada = concept(base, "ada", ("text_encoder.encoder.layers.0.mlp.fc1",), rank=2, seed=1)
    with pytest.raises(FormatError, match="1 layers of text encoders .* have no place in a file of Flux.1; use layout 'fused'"):
        fuse(ada, base, tmp_path / "x.safetensors", layout="checkpoint")
    assert not (tmp_path / "x.safetensors").exists()


def tiny_xl():
    """SDXL's architecture: two layers per block, no attention in the first, two text encoders, the second projected."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=80,
        attention_head_dim=4,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=96,
    )
    shared = {"vocab_size": 514, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 512, "eos_token_id": 513}
    first = {**shared, "hidden_size": 32, "intermediate_size": 64}
    second = {**shared, "hidden_size": 48, "intermediate_size": 96, "projection_dim": 48, "hidden_act": "gelu"}  # told apart by width
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=4,
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**first)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**second)),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def test_sdxl_comes_back_whole(tmp_path):
    pipe = tiny_xl()
    pipe.save_pretrained(tmp_path / "config")
    base = Pipeline(pipe)
    assert base.family == "sdxl"
    encoder = next(name for name in base.modules if name.startswith("text_encoder_2.") and name.endswith("q_proj"))
    ada = concept(base, "ada", (encoder, "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_v"), rank=2, seed=1)
    path = fuse(ada, base, tmp_path / "xl.safetensors", layout="checkpoint", dtype=torch.float32)
    loaded = single(type(pipe), path, tmp_path / "config")
    with base.applied(dict(ada.layers)):
        assert_equal(loaded, pipe)


def test_the_real_names_of_sd2_have_no_double_and_no_gap():
    """In the original, queries, keys and values of SD2's text encoder are one matrix; all else is one to one."""
    from formats_families import BUILD, original_unet

    with torch.device("meta"):
        parts = {name: dict(build().state_dict()) for name, build in BUILD["sd2"].items()}
    found = single_file.checkpoint({**parts, "vae": {}}, family="sd2", layers=2)
    wanted = {f"model.diffusion_model.{path}.weight" for path in original_unet("sd2")}
    assert wanted <= found.keys()
    attentions = sum(path.endswith("q_proj.weight") for path in parts["text_encoder"])
    assert attentions == 23 and found["cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"].shape == (3 * 1024, 1024)
    skipped = sum(path.endswith("position_ids") for path in parts["text_encoder"])
    assert len(found) == sum(map(len, parts.values())) - 4 * attentions - skipped
