"""Every family through the same door: what is drawn and what is collected is what stock diffusers draws and its layers see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families_twins import TWINS, twin
from formats_families import BUILD, LINEAR_OR_CONV, shapes

from loraclr import linalg, modules
from loraclr.adapter import Adapter, LoraLayer
from loraclr.checkpoints.configs import ARCHITECTURES
from loraclr.collect import Collection, Concept, collect
from loraclr.conditioning import Region
from loraclr.errors import PipelineError, UsageError
from loraclr.families import FAMILIES, NAMES, family_of, text_limits
from loraclr.formats import load_adapter, save_adapter
from loraclr.merge import merge
from loraclr.pipeline import Pipeline, PromptTruncationWarning
from loraclr.preflight import preflight

SMALL = Collection(fit=("a photo of {}", "{} on beach"), held_out=("{} at night",), preserve=("", "a dog"), steps=2, sample=6, spatial=2)
FORMATS = {
    "sd2": ("kohya", "diffusers", "peft"),
    "sdxl": ("kohya", "diffusers", "peft"),
    "sd3": ("diffusers", "peft"),
    "flux": ("peft",),
    "flux-schnell": ("peft",),
    "pixart": ("peft",),  # the one format that holds layers of a T5
}
TIMED = {"transformer": ("attn.to_k", "attn1.to_k"), "unet": ("attn1.to_q", "attn2.to_out.0", "resnets.0.conv1")}
families = pytest.mark.parametrize("family", list(TWINS))
unguided = ("flux", "flux-schnell")


def stock(pipe, prompts, seeds, **settings):
    """diffusers' own call, as its users write it."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(prompts, generator=generators, num_inference_steps=2, **family_of(pipe).arguments, **settings).images


def of_each_stage(pipeline: Pipeline) -> list[str]:
    """A few layers of every text encoder, of cross-attention and of the rest."""
    chosen = [[name for name in pipeline.modules if name.startswith(part)][::9][:3] for part in ("text_encoder.", "text_encoder_2.")]
    chosen.append([name for name in pipeline.modules if pipeline.cross_attention_index(name) is not None][:3])
    endings = [ending for endings in TIMED.values() for ending in endings]
    chosen.append([next((name for name in pipeline.modules if name.endswith(ending)), None) for ending in endings])
    return sorted({name for part in chosen for name in part if name})


def adapter(pipeline: Pipeline, name: str, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for layer in of_each_stage(pipeline):
        weight = pipeline.base_weight(layer)
        down = torch.randn(2, *weight.shape[1:], generator=generator)
        up = torch.randn(weight.shape[0], 2, *[1] * (weight.ndim - 2), generator=generator)
        layers.append(LoraLayer(layer, down, up * (0.5 * weight.norm() / (up.flatten(1) @ down.flatten(1)).norm())))
    return Adapter.of(layers, name=name).with_(triggers=(name,))


def weights(pipeline: Pipeline) -> dict[str, torch.Tensor]:
    return {name: pipeline.base_weight(name).clone() for name in pipeline.modules}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


# ---- drawing


@families
def test_what_is_drawn_is_diffusers_own(family):
    pipeline, prompts, seeds = Pipeline(twin(family)), ["a photo of ada", "dog"], [3, 4]
    negative = {} if family in unguided else {"negative_prompt": ["a house"] * 2}
    ours = pipeline.sample(prompts, seeds=seeds, steps=2, guidance=3.0, negative="" if family in unguided else "a house")
    theirs = stock(twin(family), prompts, seeds, guidance_scale=3.0, height=16, width=16, **negative)
    for one, other in zip(ours, theirs, strict=True):
        assert one.size == (16, 16) and np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1
    alone = pipeline.sample(prompts[1:], seeds=seeds[1:], steps=2, guidance=3.0, negative="" if family in unguided else "a house")
    assert np.abs(np.asarray(alone[0]).astype(int) - np.asarray(ours[1])).max() <= 1, "a seed is the same picture in any batch"


@families
def test_a_run_without_guidance_is_diffusers_own(family):
    pipe, pipeline, own = twin(family), Pipeline(twin(family)), {} if family in unguided else {"guidance_scale": 1.0}
    latents = pipeline.run(["a photo of ada", "dog"], seeds=[3, 4], steps=2)
    theirs = stock(pipe, ["a photo of ada", "dog"], [3, 4], height=16, width=16, output_type="latent", **own)
    torch.testing.assert_close(latents, theirs, rtol=1e-4, atol=1e-5)
    assert not latents.is_inference()


def test_embedded_guidance_is_an_input_and_only_where_the_model_has_one():
    pictures = {}
    for family in unguided:
        pipeline = Pipeline(twin(family))
        pictures[family] = [np.asarray(pipeline.sample(["dog"], seeds=[0], steps=2, guidance=guidance)[0]) for guidance in (1.0, 9.0)]
    assert (pictures["flux"][0] != pictures["flux"][1]).any()
    assert (pictures["flux-schnell"][0] == pictures["flux-schnell"][1]).all()


def test_drawing_leaves_no_trace_and_counts_its_steps():
    pipeline, seen = Pipeline(twin("sdxl")), []
    before, scheduler, bar = weights(pipeline), pipeline.pipe.scheduler, getattr(pipeline.pipe, "_progress_bar_config", None)
    pipeline.sample(["dog"], seeds=[0], steps=3, scheduler="DDIMScheduler", callback=lambda *progress: seen.append(progress))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert pipeline.pipe.scheduler is scheduler and getattr(pipeline.pipe, "_progress_bar_config", None) == bar
    assert same(before, weights(pipeline))


def test_regions_steer_any_unet():
    pipeline = Pipeline(twin("sdxl"))
    everywhere = (0.0, 0.0, 1.0, 1.0)

    def drawn(negative, *regions):
        return np.asarray(pipeline.sample(["dog"], seeds=[0], steps=2, negative=negative, regions=regions)[0]).astype(int)

    for negative in ("", "a house"):
        whole = drawn(negative)
        assert np.abs(drawn(negative, Region("dog", everywhere, negative)) - whole).max() <= 1, "a region of all, of the same words"
        assert (drawn(negative, Region("a beach", everywhere, negative)) != whole).any()
    with pytest.raises(PipelineError, match="has no cross-attention that regions could steer"):
        Pipeline(twin("flux")).sample(["dog"], seeds=[0], steps=1, regions=[Region("house", (0.0, 0.0, 1.0, 0.5), "")])


# ---- collecting and merging


@families
def test_what_is_collected_is_what_the_layers_of_stock_diffusers_saw(family):
    pipe = twin(family)
    pipeline, prompts = Pipeline(twin(family)), ["a photo of ada", "ada on beach"]
    change = adapter(pipeline, "ada", 1)
    rest = pipeline.stages(of_each_stage(pipeline))[-1]
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in rest}
    found = modules.Layers(modules.components(pipe))
    for name in rest:
        found[name].weight.data += change.layers[name].delta().view(found[name].weight.shape)
        found[name].register_forward_pre_hook(lambda module, inputs, name=name: seen[name].append(modules.rows(module, inputs[0])))
    own = {} if family in unguided else {"guidance_scale": 1.0}
    stock(pipe, prompts, [0, 1], height=16, width=16, output_type="latent", **own)
    stats = collect(pipeline, [Concept(change, "ada")], rest, settings=SMALL)
    for name in rest:
        rows = torch.cat(seen[name])
        assert stats[name].fit["ada"].count == len(rows) > 0
        expected = linalg.gram(rows)
        assert (stats[name].fit["ada"].gram() - expected).norm() <= 1e-4 * expected.norm(), name


@families
def test_of_unpadded_texts_every_encoders_own_tokens_count(family):
    """Rows of the padded run, up to where the text ends in that encoder's own tokens."""
    pipeline, rows = Pipeline(twin(family)), {}
    encoders = text_limits(pipeline.pipe)
    names = [next(name for name in pipeline.modules if name.startswith(f"{encoder}.")) for encoder in encoders]
    for pad in (True, False):
        with pipeline.captured(names, lambda name, got, pad=pad: rows.__setitem__((name, pad), got)):
            pipeline.encode(["a dog"], pad=pad)
    for name, (encoder, limit) in zip(names, encoders.items(), strict=True):
        tokenizer = getattr(pipeline.pipe, encoder.replace("text_encoder", "tokenizer"))
        count = len(tokenizer("a dog").input_ids)
        assert len(rows[name, False]) == count < limit == len(rows[name, True])
        torch.testing.assert_close(rows[name, False], rows[name, True][:count], rtol=1e-4, atol=1e-5)


@families
def test_merged_from_files_and_drawn(family, tmp_path):
    pipeline = Pipeline(twin(family))
    before, concepts = weights(pipeline), [adapter(pipeline, name, seed) for seed, name in enumerate(("ada", "ben"))]
    formats = FORMATS[family]
    files = []
    for number, concept in enumerate(concepts):
        form = formats[number % len(formats)]
        target = tmp_path / (concept.name if form == "peft" else f"{concept.name}.safetensors")
        files.append(save_adapter(concept, target, format=form, dtype=torch.float32))
    result = merge(files, base=pipeline, calls={"ada": "ada", "ben": "ben"}, collection=SMALL)
    assert set(result.adapter.layers) == set(of_each_stage(pipeline))
    stages = {layer.layer: layer.stage for layer in result.layers}
    for number, part in enumerate(pipeline.stages(list(stages))):
        assert {stages[name] for name in part} == {number}
    assert result.mean_residual("fit") < 0.7, "a mean of two has about .7 of each left undone"
    assert same(before, weights(pipeline)), "the base comes back to the last bit"
    plain = np.asarray(pipeline.sample(["ada"], seeds=[0], steps=2)[0])
    written = result.save(tmp_path / "merged", format="peft", dtype=torch.float32)
    with pipeline.applied(load_adapter(written)):
        assert (np.asarray(pipeline.sample(["ada"], seeds=[0], steps=2)[0]) != plain).any()
    alone = merge([concepts[0]], base=pipeline, collection=SMALL, parameters={"preservation": 0.0})
    assert max(layer.residuals["fit/ada"] for layer in alone.layers) < 0.05, "one adapter behaves as it did"


@pytest.mark.parametrize("method", ["ziplora", "lorahub"])
def test_methods_that_run_the_unet_by_themselves_refuse_other_families_at_once(method, monkeypatch):
    pipeline = Pipeline(twin("sdxl"))
    pair = [adapter(pipeline, name, seed) for seed, name in enumerate(("ada", "ben"))]
    for name in ("encode", "denoise"):
        monkeypatch.setattr(Pipeline, name, lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(PipelineError, match=f"method '{method}' with .*: not supported; use a Stable Diffusion 1 or 2"):
        merge(pair, base=pipeline, method=method, collection=SMALL)
    if method == "lorahub":
        assert merge(pair, base=pipeline, method=method, score=lambda made: 0.0, parameters={"budget": 6}, collection=SMALL).layers


@pytest.mark.parametrize(("family", "able"), [("sd2", True), ("sdxl", True), ("sd3", False), ("flux", False), ("pixart", False)])
def test_a_further_round_is_for_unets_and_refused_elsewhere_before_any_work(family, able, monkeypatch):
    pipeline = Pipeline(twin(family))
    given = {"base": pipeline, "method": "loraclr", "parameters": {"rounds": 2}, "calls": {"ada": "ada", "ben": "ben"}, "collection": SMALL}
    pair = [adapter(pipeline, name, seed) for seed, name in enumerate(("ada", "ben"))]
    if able:
        found = [layer for layer in merge(pair, **given).layers if layer.status == "refitted"]
        assert [layer.layer.rpartition("transformer_blocks.0.")[2] for layer in found] == ["attn2.to_out.0"]
        assert 0 < found[0].diagnostics["left"] < 1
        return
    monkeypatch.setattr(Pipeline, "run", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(UsageError, match="leave rounds at 1"):
        merge(pair, **given)


# ---- what a family is


@pytest.mark.parametrize("family", list(BUILD))
def test_layers_of_the_real_configurations(family):
    """On the meta device: the names that every format is tested with are those the pipeline looks for."""
    with torch.device("meta"):
        parts = {component: build() for component, build in BUILD[family].items()}
    assert {name: tuple(module.weight.shape) for name, module in modules.Layers(parts).items()} == shapes(family)
    unet = parts.get("unet")
    assert len(modules.cross_attention(unet) if unet else ()) == {"sd1": 16, "sd2": 16, "sdxl": 70, "flux": 0}[family]


@pytest.mark.parametrize("family", list(ARCHITECTURES))
def test_bundled_configurations_are_the_real_ones(family):
    import diffusers
    import transformers

    with torch.device("meta"):
        found = {}
        for component, (library, kind, values) in ARCHITECTURES[family].items():
            if component in ("scheduler", "vae"):
                continue
            if library == "diffusers":
                found[component] = getattr(diffusers, kind)(**values)
            else:
                made = getattr(transformers, kind)
                found[component] = made(made.config_class(**values))
    assert {name: tuple(module.weight.shape) for name, module in modules.Layers(found).items()} == shapes(family)
    assert all(isinstance(module, LINEAR_OR_CONV) for module in modules.Layers(found).values())


def test_families_name_real_classes():
    import diffusers

    assert all(hasattr(diffusers, name) for name in FAMILIES)


def test_a_base_says_its_family_whatever_its_sizes(tiny_pipe):
    found = {name: Pipeline(twin(name)).family for name in TWINS}
    assert found == {"sd2": "sd2", "sdxl": "sdxl", "flux": "flux", "flux-schnell": "flux", "sd3": "sd3", "pixart": None}
    assert Pipeline(tiny_pipe()).family == "sd1" and set(found.values()) - {None} | {"sd1"} == NAMES


@pytest.mark.parametrize("base", ["sd1", *TWINS])
def test_adapters_of_another_family_are_refused(base, tiny_pipe):
    pipeline = Pipeline(tiny_pipe() if base == "sd1" else twin(base))
    one = adapter(pipeline, "ada", 0)
    for family in (*sorted(NAMES), "toybox-1"):
        levels = {(found.level, found.check) for found in preflight([one.with_(family=family)], base=pipeline).findings}
        assert (("refuse", "family") in levels) == (pipeline.family not in (None, family) and family != "toybox-1"), family


def test_learned_tokens_of_two_text_encoders():
    """A token with the embeddings of a word draws and encodes as that word does; one of a single encoder is plain text to the other."""
    pipe = twin("sdxl")
    pipeline, prompt = Pipeline(pipe), "a d at night"
    tables = [pipe.text_encoder.get_input_embeddings(), pipe.text_encoder_2.get_input_embeddings()]
    tokenizers = [pipe.tokenizer, pipe.tokenizer_2]
    (id,) = pipe.tokenizer("d", add_special_tokens=False).input_ids
    rows = [table.weight[id][None].clone() for table in tables]
    before = pipeline.encode([prompt])
    with pipeline.with_tokens({"<x>": torch.cat(rows, dim=1)}):
        assert pipeline.tokens == ("<x>",) and torch.equal(pipeline.encode(["a <x> at night"]), before)
        drawn = [np.asarray(pipeline.sample([text], seeds=[3], steps=2)[0]) for text in (prompt, "a <x> at night")]
        assert (drawn[0] == drawn[1]).all()
    for number, (row, width) in enumerate(zip(rows, (16, 24), strict=True)):
        with pipeline.with_tokens({"<x>": row}):
            found, own = pipeline.encode(["a <x> at night"]), slice(0, 16) if number == 0 else slice(16, 40)
            assert torch.equal(found[..., own], before[..., own]) and not torch.equal(found, before) and width == row.shape[1]
    for wrong, kind, message in (
        (torch.zeros(1, 17), PipelineError, r"widths are \[16, 24\], or all together"),
        (torch.zeros(2, 40), UsageError, "<x> have an embedding per layer"),
    ):
        with pytest.raises(kind, match=message), pipeline.with_tokens({"<x>": wrong}):
            pytest.fail("entered")
    assert [pipe.text_encoder.get_input_embeddings(), pipe.text_encoder_2.get_input_embeddings()] == tables
    assert [pipe.tokenizer, pipe.tokenizer_2] == tokenizers and pipeline.tokens == ()


def test_old_configurations_pool_at_the_end_of_the_text():
    """A 2 for the end mark means the token of the highest number, which a learned one would be."""
    pipe = twin("sdxl")
    pipeline, pooling = Pipeline(pipe), [module for module in pipe.text_encoder_2.modules() if hasattr(module, "eos_token_id")]
    (id,) = pipe.tokenizer_2("d", add_special_tokens=False).input_ids
    rows = [encoder.get_input_embeddings().weight[id][None] for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    assert pooling
    for module in pooling:
        module.eos_token_id = 2
    with pipeline.with_tokens({"<x>": torch.cat(rows, dim=1).clone()}):
        states = [pipe.encode_prompt(text, device="cpu", do_classifier_free_guidance=False)[2] for text in ("a d", "a <x>")]
    assert torch.equal(*states) and all(module.eos_token_id == 2 for module in pooling)


def test_files_with_tokens_of_two_text_encoders_merge(tmp_path):
    pipeline = Pipeline(twin("sdxl"))
    one, two = (adapter(pipeline, name, seed).with_(tokens={f"<{name}>": torch.randn(1, 40)}) for seed, name in enumerate(("ada", "ben")))
    one, two = (part.with_(triggers=(f"<{part.name}>",)) for part in (one, two))
    found = merge([one, two], base=pipeline, collection=SMALL)
    back = load_adapter(found.save(tmp_path / "both.safetensors"))
    assert set(back.tokens) == {"<ada>", "<ben>"} and back.tokens["<ada>"].shape == (1, 40)
    with pipeline.applied(back):
        assert len(pipeline.sample(["<ada> and <ben>"], seeds=[0], steps=1)) == 1


def test_texts_are_as_long_as_the_longest_reader():
    pipeline = Pipeline(twin("flux"))
    assert text_limits(pipeline.pipe) == {"text_encoder": 77, "text_encoder_2": 512} and pipeline.text_length == 512
    with pytest.warns(PromptTruncationWarning, match="but the text encoder reads 77"):
        Pipeline(twin("sdxl")).sample(["x" * 90], seeds=[0], steps=1)


# ---- what cannot be


def test_what_a_family_does_not_have():
    flux, sdxl = Pipeline(twin("flux")), Pipeline(twin("sdxl"))
    with pytest.raises(UsageError, match="FluxPipeline has its guidance built in and takes no negative prompt"):
        flux.sample(["dog"], seeds=[0], steps=1, negative="cat")
    with pytest.raises(UsageError, match="size 18x16 is not made of multiples of 4 pixels"):
        flux.sample(["dog"], seeds=[0], steps=1, size=(18, 16))
    with pytest.raises(PipelineError, match="learned tokens with .*: not supported"), flux.with_tokens({"<x>": torch.zeros(1, 16)}):
        pytest.fail("entered")
    with pytest.raises(PipelineError, match=r"denoising of encoded prompts with StableDiffusionXLPipeline \(text_encoder_2"):
        sdxl.denoise(sdxl.encode(["dog"]), seeds=[0])


def test_pipelines_that_need_a_picture_are_refused():
    from diffusers import StableDiffusionXLImg2ImgPipeline

    pipeline = Pipeline(StableDiffusionXLImg2ImgPipeline(**twin("sdxl").components))
    with pytest.raises(PipelineError, match="does not draw from a text alone"):
        pipeline.run(["dog"], seeds=[0], steps=1)
