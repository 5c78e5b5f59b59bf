"""The wrapped pipeline: changes that leave no trace, features that are the layers' inputs, pictures that are diffusers'."""

from __future__ import annotations

import hashlib
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from loraclr.adapter import Adapter, DenseLayer, LoraLayer, stage_of
from loraclr.errors import PipelineError, UsageError
from loraclr.pipeline import Pipeline, PromptTruncationWarning
from loraclr.sampling import fresh_scheduler

DIM = 32
QUERY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
TEXT = "text_encoder.encoder.layers.0.self_attn.q_proj"
CONV = "unet.mid_block.resnets.0.conv1"
PROJECTION = "unet.mid_block.attentions.0.proj_in"
STRIDED = "unet.down_blocks.0.downsamplers.0.conv"


@pytest.fixture
def pipeline(tiny_pipe) -> Pipeline:
    return Pipeline(tiny_pipe())


def fingerprint(pipeline: Pipeline) -> tuple:
    pipe = pipeline._pipe
    digest = hashlib.sha256()
    for name in ("unet", "text_encoder", "vae"):
        for key, tensor in [*getattr(pipe, name).named_parameters(), *getattr(pipe, name).named_buffers()]:
            digest.update(
                f"{name}.{key}{tuple(tensor.shape)}{tensor.dtype}".encode()
                + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
            )
    processors = tuple(id(processor) for processor in pipe.unet.attn_processors.values())
    hooks = sum(len(module._forward_pre_hooks) for module in pipeline.modules.values())
    embedding = id(pipe.text_encoder.get_input_embeddings())
    return (
        digest.hexdigest(),
        processors,
        hooks,
        id(pipe.tokenizer),
        len(pipe.tokenizer),
        embedding,
        repr(pipe.scheduler),
        pipeline.adapters,
        pipeline.tokens,
    )


def lora(pipeline: Pipeline, name: str, *, rank: int = 2, seed: int = 0) -> LoraLayer:
    generator = torch.Generator().manual_seed(seed)
    shape = pipeline.base_weight(name).shape
    down = torch.randn(rank, *shape[1:], generator=generator) * 0.2
    up = torch.randn(shape[0], rank, *([1, 1] if len(shape) == 4 else []), generator=generator) * 0.2
    return LoraLayer(name, down, up, scale=0.7)


def adapter(pipeline: Pipeline, *, tokens: dict[str, torch.Tensor] | None = None) -> Adapter:
    layers = [lora(pipeline, name, seed=seed) for seed, name in enumerate((QUERY, KEY, TEXT, CONV, PROJECTION))]
    return Adapter({layer.name: layer for layer in layers}, name="rhea", tokens=tokens or {"<Rhea1>": torch.randn(1, DIM)})


def as_array(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


# ---- what is in it


def test_modules_are_every_linear_and_convolution_under_canonical_names(pipeline):
    assert {QUERY, KEY, TEXT, CONV, PROJECTION, STRIDED} <= pipeline.modules.keys()
    assert {type(module) for module in pipeline.modules.values()} <= {nn.Linear, nn.Conv2d} | {type(pipeline.modules[QUERY])}
    assert not any("text_model" in name or name.startswith("vae") for name in pipeline.modules)
    assert pipeline.base_weight(KEY).shape == (64, DIM)


def test_cross_attention_layers_go_down_mid_up(pipeline):
    parts = [path.split(".")[0] for path in pipeline.cross_attention_layers]
    assert parts == ["down_blocks"] * 3 + ["mid_block"] + ["up_blocks"] * 6
    assert pipeline.cross_attention_index(KEY) == pipeline.cross_attention_index(KEY.replace("to_k", "to_v")) == 3
    assert pipeline.cross_attention_index(QUERY) is pipeline.cross_attention_index(TEXT) is None
    assert pipeline.cross_attention_index(KEY.replace("to_k", "to_q")) is None


def test_stages_are_text_then_keys_and_values_then_the_rest(pipeline):
    assert pipeline.stages([QUERY, KEY, TEXT, CONV]) == [[TEXT], [KEY], [QUERY, CONV]]
    assert pipeline.stages([CONV]) == [[CONV]]
    assert pipeline.stages([]) == []


def test_a_layers_name_alone_says_its_stage(pipeline):
    assert [stage_of(name) for name in (TEXT, KEY, QUERY, CONV)] == ["text", "keys", "spatial", "spatial"]
    assert all(stage_of(name) == pipeline.stage_of(name) for name in pipeline.modules)


def test_unknown_names_are_answered_with_the_nearest(pipeline):
    wrong = KEY.replace("to_k", "to_kk")
    for ask in (pipeline.base_weight, lambda name: pipeline.stages([name]), lambda name: pipeline.captured([name], print).__enter__()):
        with pytest.raises(PipelineError, match=f"no layer '{wrong}' .nearest: '{KEY}'"):
            ask(wrong)


def test_a_text_encoder_with_a_text_model_level_has_the_same_names(tiny_pipe):
    from transformers import CLIPTextModelWithProjection

    pipe = tiny_pipe()
    plain = Pipeline(pipe)
    older = CLIPTextModelWithProjection(pipe.text_encoder.config).eval()
    older.text_model.load_state_dict(pipe.text_encoder.state_dict())
    expected = plain.encode(["a man"])
    pipe.text_encoder = older
    pipe.register_modules(text_encoder=older)
    pipeline = Pipeline(pipe)
    assert TEXT in pipeline.modules and hasattr(older, "text_model")
    assert torch.equal(pipeline.encode(["a man"]), expected)
    with pipeline.applied({TEXT: lora(pipeline, TEXT)}):
        assert not torch.equal(pipeline.encode(["a man"]), expected)


# ---- loading


def test_load_reads_a_folder_quietly_and_gives_the_same_pictures(tiny_pipe, tmp_path, capfd):
    original = Pipeline(tiny_pipe())
    original._pipe.save_pretrained(tmp_path / "base")
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = Pipeline.load(tmp_path / "base")
    assert capfd.readouterr() == ("", "")
    assert loaded.source == str(tmp_path / "base") and loaded.dtype == torch.float32 and loaded.device.type == "cpu"
    assert (as_array(loaded.sample(["a man"], seeds=[1], steps=2)) == as_array(original.sample(["a man"], seeds=[1], steps=2))).all()
    assert Pipeline.load(str(tmp_path / "base"), dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/model", "model.safetensors", "a/b/c"])
def test_an_absent_local_path_is_never_looked_for_elsewhere(source):
    with pytest.raises(PipelineError, match=r"there is no folder .*hub id"):
        Pipeline.load(source)


def test_an_absent_path_below_an_existing_folder_is_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(PipelineError, match="there is no folder models/sd"):
        Pipeline.load("models/sd")


def test_loading_something_else_says_what_is_missing(tmp_path):
    with pytest.raises(PipelineError, match=r"model_index\.json"):
        Pipeline.load(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(PipelineError, match=r"no readable \.safetensors"):
        Pipeline.load(tmp_path / "x.safetensors")
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(PipelineError, match="no diffusers pipeline that loads .* check the name"):
        Pipeline.load(tmp_path)


def test_a_hub_model_that_cannot_be_had_is_one_clear_error():
    with pytest.raises(PipelineError, match=r"^nobody/nothing is no diffusers pipeline that loads .*the network$"):
        Pipeline.load("nobody/nothing")


def test_without_diffusers_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(PipelineError, match=r"pip install 'loraclr\[diffusion\]'"):
        Pipeline.load(tmp_path)


def test_an_incomplete_pipeline_is_refused(tiny_pipe):
    pipe = tiny_pipe()
    pipe.register_modules(vae=None)
    with pytest.raises(PipelineError, match="has no vae"):
        Pipeline(pipe)


# ---- applied


def test_applied_adds_the_scaled_delta_and_leaves_no_trace(pipeline):
    before, base = fingerprint(pipeline), {name: pipeline.base_weight(name).clone() for name in (QUERY, KEY, TEXT, CONV, PROJECTION)}
    change = adapter(pipeline)
    with pipeline.applied(change, scale=0.5):
        for name, weight in base.items():
            torch.testing.assert_close(pipeline.base_weight(name), weight + 0.5 * change.layers[name].delta(), rtol=0, atol=0)
        assert pipeline.adapters == (("rhea", 0.5),) and pipeline.tokens == ("<Rhea1>",)
        pipeline.sample(["a <Rhea1>"], seeds=[0], steps=1)
    assert fingerprint(pipeline) == before


def test_applied_nests_and_restores_after_exceptions(pipeline):
    before = fingerprint(pipeline)
    base, layer = pipeline.base_weight(KEY).clone(), lora(pipeline, KEY)
    with pytest.raises(ZeroDivisionError), pipeline.applied(adapter(pipeline)), pipeline.applied({KEY: layer}):
        1 / 0  # noqa: B018
    assert fingerprint(pipeline) == before
    with pipeline.applied({KEY: layer}):
        with pipeline.applied({KEY: layer}, scale=-1):
            torch.testing.assert_close(pipeline.base_weight(KEY), base)
        torch.testing.assert_close(pipeline.base_weight(KEY), base + layer.delta(), rtol=0, atol=0)
    assert fingerprint(pipeline) == before


def test_half_precision_weights_come_back_to_the_last_bit(tiny_pipe):
    pipeline = Pipeline(tiny_pipe().to(torch.bfloat16))
    before, base, layer = fingerprint(pipeline), pipeline.base_weight(KEY).clone(), lora(pipeline, KEY)
    with pipeline.applied({KEY: layer}):
        assert torch.equal(pipeline.base_weight(KEY), (base.float() + layer.delta()).to(torch.bfloat16))
    assert fingerprint(pipeline) == before


def test_everything_that_does_not_fit_is_said_before_anything_changes(pipeline):
    before = fingerprint(pipeline)
    layers = {
        KEY: lora(pipeline, KEY),
        QUERY: DenseLayer(QUERY, torch.zeros(3, 4)),
        "unet.nonsense": DenseLayer("unet.nonsense", torch.zeros(1, 1)),
    }
    with pytest.raises(PipelineError) as caught, pipeline.applied(layers):
        pytest.fail("entered")
    message = str(caught.value)
    assert (
        "2 layer(s)" in message and f"'{QUERY}' is (3, 4), the model's weight (64, 64)" in message and "no layer 'unet.nonsense'" in message
    )
    assert KEY not in message and message.endswith("use the base model they were made for")
    assert fingerprint(pipeline) == before


def test_a_linear_change_fits_a_1x1_convolution(pipeline):
    change = torch.randn(64, 64)
    base = pipeline.base_weight(PROJECTION).clone()
    with pipeline.applied({PROJECTION: DenseLayer(PROJECTION, change)}):
        assert torch.equal(pipeline.base_weight(PROJECTION), base + change[:, :, None, None])


def test_apply_is_fuse(tiny_pipe):
    pytest.importorskip("peft")
    pipeline, fused = Pipeline(tiny_pipe()), tiny_pipe()
    layers = [LoraLayer(name, (layer := lora(pipeline, name)).down, layer.up) for name in (QUERY, KEY, TEXT, CONV, PROJECTION)]
    fused.load_lora_weights(
        {f"{layer.name}.lora_{side}.weight": factor for layer in layers for side, factor in (("A", layer.down), ("B", layer.up))}
    )
    fused.fuse_lora()
    fused.unload_lora_weights()
    plain = pipeline.denoise(pipeline.encode(["a man"]), seeds=[1], steps=2)
    with pipeline.applied(Adapter.of(layers)):
        applied = pipeline.denoise(pipeline.encode(["a man"]), seeds=[1], steps=2)
    other = Pipeline(fused)
    torch.testing.assert_close(applied, other.denoise(other.encode(["a man"]), seeds=[1], steps=2), rtol=0, atol=1e-5)
    assert (applied - plain).abs().max() > 1e-3


def test_a_pipeline_with_loras_inside_is_refused(tiny_pipe):
    pytest.importorskip("peft")
    pipe = tiny_pipe()
    layer = lora(Pipeline(pipe), KEY)
    pipe.load_lora_weights({f"{KEY}.lora_A.weight": layer.down, f"{KEY}.lora_B.weight": layer.up})
    with pytest.raises(PipelineError, match=r"unload_lora_weights\(\) first"):
        Pipeline(pipe)


# ---- learned tokens


@pytest.mark.parametrize("rows", [1, 10])
def test_tokens_come_and_go(pipeline, rows):
    before, plain = fingerprint(pipeline), pipeline.encode(["a man"])
    with pipeline.with_tokens({"<Rhea1>": torch.randn(rows, DIM)}):
        assert pipeline.token_count("a <Rhea1>") == pipeline.token_count("a <rhea1>") == 4
        states = pipeline.encode(["a <Rhea1>", "a man"])
        assert states.shape == ((2, 77, DIM) if rows == 1 else (2, 10, 77, DIM))
        torch.testing.assert_close(states[1:], plain if rows == 1 else plain[:, None].expand(-1, 10, -1, -1))
        assert pipeline.encode(["a man"]).shape == (1, 77, DIM)
        with pytest.raises(ZeroDivisionError), pipeline.with_tokens({"<b>": torch.randn(1, DIM)}):  # noqa: PT012
            assert pipeline.token_count("<b> <Rhea1>") == 4
            1 / 0  # noqa: B018
        assert pipeline.token_count("<b>") == 5
    assert fingerprint(pipeline) == before


def test_a_token_is_its_embedding(pipeline):
    """An embedding copied from a word gives that word's states; for a layer-wise token, layer by layer."""
    table = pipeline._pipe.text_encoder.get_input_embeddings().weight.detach()
    ids = [pipeline._pipe.tokenizer(letter, add_special_tokens=False).input_ids[0] for letter in "abcdefghij"]
    with pipeline.with_tokens({"<one>": table[ids[:1]], "<all>": table[ids]}):
        torch.testing.assert_close(pipeline.encode(["x <one>"]), pipeline.encode(["x a"]))
        layered = pipeline.encode(["x <all> <one>"])
        for layer, letter in enumerate("abcdefghij"):
            torch.testing.assert_close(layered[:, layer], pipeline.encode([f"x {letter} a"]))


def test_mistaken_tokens(pipeline):
    before, row = fingerprint(pipeline), torch.zeros(1, DIM)
    for tokens, error, message in (
        ({"a": row}, UsageError, "'a' is a word the tokenizer already has"),
        ({"<x>": torch.zeros(16, DIM)}, UsageError, "16 layer-wise embeddings, but the UNet has 10 cross-attention layers"),
        ({"<x>": torch.zeros(1, 8)}, PipelineError, "width is 32"),
        ({" ": row}, UsageError, "is empty"),
        ({"<x>": row, "<X>": row}, UsageError, "differ in more than case"),
    ):
        with pytest.raises(error, match=message), pipeline.with_tokens(tokens):
            pytest.fail("entered")
    with pipeline.with_tokens({"<x>": row}):
        with pytest.raises(UsageError, match="already has"), pipeline.with_tokens({"<x>": row}):
            pytest.fail("entered")
        with pipeline.applied(Adapter({}, tokens={"<x>": row})):
            assert pipeline.tokens == ("<x>",)
        with pytest.raises(UsageError, match="already has"), pipeline.applied(Adapter({}, tokens={"<x>": row + 1})):
            pytest.fail("entered")
    assert fingerprint(pipeline) == before


def test_contexts_inside_inference_mode_leave_ordinary_tensors(pipeline):
    before = fingerprint(pipeline)
    change = adapter(pipeline, tokens={"<x>": torch.randn(10, DIM)})
    with torch.inference_mode(), pipeline.applied(change):
        states = pipeline.encode(["a <x>"])
    assert fingerprint(pipeline) == before
    assert not states.is_inference() and not any(parameter.is_inference() for parameter in pipeline._unet.parameters())


# ---- encode


def test_encode_is_diffusers_encoding(pipeline):
    expected, _ = pipeline._pipe.encode_prompt(["a man", "b"], "cpu", 1, False)
    torch.testing.assert_close(pipeline.encode(["a man", "b"]), expected, rtol=0, atol=0)


def test_unpadded_is_the_beginning_of_padded(pipeline):
    short = pipeline.encode(["a man"], pad=False)
    assert short.shape == (1, pipeline.token_count("a man"), DIM) == (1, 6, DIM)
    torch.testing.assert_close(short, pipeline.encode(["a man"])[:, :6])
    assert pipeline.encode(["a man", "a dog"], pad=False).shape == (2, 6, DIM)
    with pytest.raises(UsageError, match=r"\[3, 6\] tokens cannot be stacked"):
        pipeline.encode(["a man", "a"], pad=False)


def test_encode_wants_a_list(pipeline):
    for prompts in ("a man", []):
        with pytest.raises(UsageError, match="needs a list"):
            pipeline.encode(prompts)


def test_a_long_prompt_warns_of_what_is_cut(pipeline):
    prompt = "x" * 75 + " zebra"
    with pytest.warns(PromptTruncationWarning, match=r"has 82 tokens but the text encoder reads 77: the last 5 are cut \('zebra'\)"):
        states = pipeline.encode([prompt])
    assert pipeline.token_count(prompt) == 82
    torch.testing.assert_close(states, pipeline.encode(["x" * 75]))


# ---- captured


@pytest.mark.parametrize("name", [QUERY, KEY, TEXT, CONV, PROJECTION, STRIDED])
def test_captured_rows_are_the_layers_inputs(pipeline, name):
    outputs, rows, module = [], [], pipeline.modules[name]
    handle = module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with pipeline.captured([name], lambda got, tensor: rows.append((got, tensor))):
        pipeline.denoise(pipeline.encode(["a man", "b"]), seeds=[1, 2], steps=2)
    handle.remove()
    assert len(rows) == len(outputs) == (1 if name == TEXT else 2)
    for (got, tensor), output in zip(rows, outputs, strict=True):
        assert got == name and tensor.dtype == torch.float32 and not tensor.is_inference()
        flat = output.movedim(1, -1) if output.ndim == 4 and isinstance(module, nn.Conv2d) else output
        bias = 0 if module.bias is None else module.bias
        expected = tensor @ module.weight.flatten(1).T + bias
        torch.testing.assert_close(expected, flat.flatten(0, -2), rtol=1e-4, atol=1e-5)


def test_captured_leaves_no_hooks(pipeline):
    before = fingerprint(pipeline)
    with pytest.raises(ZeroDivisionError), pipeline.captured([TEXT], lambda name, rows: 1 / 0):
        pipeline.encode(["a"])
    assert fingerprint(pipeline) == before


# ---- sampling


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("DDIMScheduler", {}),
        ("DDIMScheduler", {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
    ]
    + [(kind, {}) for kind in ("DDPMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler")],
)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sampling_is_diffusers_own(tiny_pipe, kind, options, guidance):
    import diffusers

    pipe = tiny_pipe()
    pipe.scheduler = getattr(diffusers, kind).from_config({**pipe.scheduler.config, **options})
    pipeline, prompts, seeds = Pipeline(pipe), ["a man", "b"], [3, 4]
    negative = pipeline.encode(["bad"]) if guidance > 1 else None
    ours = pipeline.denoise(pipeline.encode(prompts), seeds=seeds, steps=4, guidance=guidance, negative=negative)
    theirs = pipe(
        prompts,
        negative_prompt=["bad"] * 2,
        num_inference_steps=4,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_pictures_are_diffusers_own(pipeline):
    ours = pipeline.sample(["a man"], seeds=[3], steps=3, negative="bad", size=(24, 16))
    generator = torch.Generator().manual_seed(3)
    theirs = pipeline._pipe(
        "a man", negative_prompt="bad", num_inference_steps=3, guidance_scale=4.0, generator=generator, height=24, width=16
    )
    assert ours[0].size == (16, 24)
    assert np.abs(as_array(ours) - as_array(theirs.images)).max() <= 1


def test_a_changed_default_of_the_scheduler_is_kept(pipeline):
    """Older models' steps_offset is corrected on loading, and diffusers' from_config would undo it."""
    assert pipeline._pipe.scheduler.config.steps_offset == 1 and "steps_offset" in pipeline._pipe.scheduler.config._use_default_values
    for name in (None, "DDPMScheduler", "EulerDiscreteScheduler"):
        assert fresh_scheduler(pipeline.pipe, name).config.steps_offset == 1


def test_another_scheduler_is_built_from_the_models_configuration(pipeline):
    before = fingerprint(pipeline)
    default = as_array(pipeline.sample(["a man"], seeds=[3], steps=3))
    assert (default == as_array(pipeline.sample(["a man"], seeds=[3], steps=3, scheduler="DDIMScheduler"))).all()
    assert (default != as_array(pipeline.sample(["a man"], seeds=[3], steps=3, scheduler="DPMSolverMultistepScheduler"))).any()
    assert fingerprint(pipeline) == before


@pytest.mark.parametrize("scheduler", [None, "DDPMScheduler"])
def test_a_seed_is_the_same_picture_in_any_batch(pipeline, scheduler):
    prompts, seeds = ["a man", "a <x> dog", "c"], [5, 6, 5]
    with pipeline.with_tokens({"<x>": torch.randn(10, DIM)}):
        together = as_array(pipeline.sample(prompts, seeds=seeds, steps=3, scheduler=scheduler))
        alone = [
            as_array(pipeline.sample([prompt], seeds=[seed], steps=3, scheduler=scheduler))[0]
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
    assert np.abs(together - np.stack(alone)).max() <= 1
    assert np.abs(together[0] - together[1]).max() > 1


def test_sampling_leaves_no_trace(pipeline):
    before = fingerprint(pipeline)
    with pipeline.with_tokens({"<x>": torch.randn(10, DIM)}):
        pipeline.sample(["a <x>"], seeds=[0], steps=2)

        def stop(step: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pipeline.sample(["a <x>"], seeds=[0], steps=2, callback=stop)
    assert fingerprint(pipeline) == before


def test_callback_counts_steps(pipeline):
    seen = []
    latents = pipeline.denoise(pipeline.encode(["a"]), seeds=[0], steps=3, callback=lambda *progress: seen.append(progress))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert latents.shape == (1, 4, 8, 8) and latents.dtype == torch.float32 and not latents.is_inference()


def test_half_precision_draws_the_same_noise(tiny_pipe):
    full, half = Pipeline(tiny_pipe()), Pipeline(tiny_pipe().to(torch.bfloat16))
    pair = [as_array(pipeline.sample(["a man"], seeds=[3], steps=3)) for pipeline in (full, half)]
    assert half.dtype == torch.bfloat16 and np.abs(pair[0] - pair[1]).mean() < 8


def test_all_mistaken_settings_are_in_one_message(pipeline):
    with pytest.raises(UsageError) as caught:
        pipeline.sample(["a"], seeds=[-1], steps=0, guidance=0.5, size=(15, 16), scheduler="Eular")
    for part in ("size 15x16", "multiples of 2", "0 steps", "guidance 0.5", "seeds [-1]", "'Eular' is not one of", "DDIMScheduler"):
        assert part in str(caught.value)
    with pytest.raises(UsageError, match="1 prompts and 2 seeds"):
        pipeline.sample(["a"], seeds=[1, 2])
    with pytest.raises(UsageError, match="one string"):
        pipeline.sample("a", seeds=[1])


def test_mistaken_conditioning(pipeline):
    states = pipeline.encode(["a"])
    with pytest.raises(UsageError, match="guidance 4 needs a negative"):
        pipeline.denoise(states, seeds=[0], guidance=4.0)
    with pytest.raises(UsageError, match="guidance 1 takes no negative"):
        pipeline.denoise(states, seeds=[0], negative=states)
    with pytest.raises(UsageError, match="1 prompts and 2 seeds"):
        pipeline.denoise(states, seeds=[0, 1])
    with pytest.raises(UsageError, match=r"\(1, 16, 77, 32\); expected .* \(B, 10, T, dim\)"):
        pipeline.denoise(states[:, None].expand(-1, 16, -1, -1), seeds=[0])
