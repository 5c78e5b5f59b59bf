"""What is collected is what the layers saw: compared with plain torch hooks around plain diffusers and transformers calls."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from concepts import KEYS, SMALL, SPATIAL, TEXT, concept, fingerprint, three
from torch import Tensor

from loraclr import linalg, loading
from loraclr.adapter import Adapter, DenseLayer, LoraLayer
from loraclr.collect import PAPER, QUICK, Collection, Concept, collect, collection_for
from loraclr.errors import PipelineError, UsageError
from loraclr.pipeline import Pipeline

LENGTH = 77
MODULE = sys.modules[collect.__module__]  # the package's attribute of that name is the verb


@pytest.fixture
def pipeline(tiny_pipe) -> Pipeline:
    return Pipeline(tiny_pipe())


@pytest.fixture
def concepts(pipeline) -> list[Concept]:
    return [Concept(adapter, " ".join(adapter.tokens) or adapter.triggers[0]) for adapter in three(pipeline)]


def fused(tiny_pipe, *layers):
    """A fresh diffusers pipeline with deltas added to its weights by hand."""
    pipe = tiny_pipe()
    modules = Pipeline(pipe).modules
    for layer in layers:
        modules[layer.name].weight.data += layer.delta()
    return pipe


def states(pipe, prompts) -> Tensor:
    """(prompts, 77, dim): what transformers makes of padded prompts."""
    ids = pipe.tokenizer(list(prompts), padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.text_encoder(ids)[0]


def hooked(pipe, name, run) -> Tensor:
    """(rows, in): the inputs of one module while `run()` runs; convolutions as patches."""
    module, seen = Pipeline(pipe).modules[name], []

    def hook(module, inputs):
        x = inputs[0].float()
        if isinstance(module, torch.nn.Conv2d):
            x = torch.nn.functional.unfold(x, module.kernel_size, padding=module.padding, stride=module.stride).mT
        seen.append(x.reshape(-1, x.shape[-1]))

    handle = module.register_forward_pre_hook(hook)
    with torch.no_grad():
        run()
    handle.remove()
    return torch.cat(seen)


def prompts(templates, call) -> list[str]:
    return [template.format(call) for template in templates]


def assert_moments(moments, rows, tolerance=1e-5):
    assert moments.count == len(rows)
    expected = linalg.gram(rows)
    assert (moments.gram() - expected).norm() <= tolerance * expected.norm()


def test_text_features_are_those_of_transformers_with_the_concept_fused(tiny_pipe, pipeline, concepts):
    found = collect(pipeline, concepts, TEXT, settings=SMALL)
    ada, layers = concepts[0], len(pipeline.cross_attention_layers)  # one of the three has layer-wise tokens: all count per layer
    pipe = fused(tiny_pipe, *(ada.adapter.layers[name] for name in TEXT))
    for name in TEXT:
        assert found[name].layer == name and found[name].concepts == ("ada", "ben", "cai")
        rows = hooked(pipe, name, lambda: states(pipe, prompts(SMALL.fit, ada.call)))
        assert_moments(found[name].fit["ada"], rows.repeat(layers, 1))
        rows = hooked(pipe, name, lambda: states(pipe, prompts(SMALL.held_out, ada.call)))
        assert_moments(found[name].held_out["ada"], rows.repeat(layers, 1))
        plain = tiny_pipe()
        rows = hooked(plain, name, lambda: states(plain, SMALL.preserve))  # noqa: B023
        assert_moments(found[name].preserve, rows.repeat(layers, 1))


def test_a_concept_without_text_layers_saw_the_base(tiny_pipe, pipeline, concepts):
    found = collect(pipeline, concepts, TEXT, settings=SMALL)
    pipe = tiny_pipe()
    rows = hooked(pipe, TEXT[1], lambda: states(pipe, prompts(SMALL.fit, "cai man")))
    assert_moments(found[TEXT[1]].fit["cai"], rows.repeat(len(pipeline.cross_attention_layers), 1))
    alone = collect(pipeline, concepts[2:], TEXT, settings=SMALL)
    assert_moments(alone[TEXT[1]].fit["cai"], rows)


def test_keys_see_the_states_of_the_merged_text_encoder_not_of_the_concept(tiny_pipe, pipeline, concepts):
    merged = concept(pipeline, "merged", TEXT, rank=4, seed=9).layers
    found = collect(pipeline, concepts, KEYS, settings=SMALL, merged=merged)
    pipe = fused(tiny_pipe, *merged.values())
    for name in KEYS:
        assert_moments(found[name].fit["ada"], states(pipe, prompts(SMALL.fit, "ada woman")).flatten(0, 1))
        assert_moments(found[name].held_out["cai"], states(pipe, prompts(SMALL.held_out, "cai man")).flatten(0, 1))
        assert_moments(found[name].preserve, states(pipe, SMALL.preserve).flatten(0, 1))


def test_a_layer_wise_token_is_another_text_for_every_layer(tiny_pipe, pipeline, concepts):
    ben = concepts[1]
    found = collect(pipeline, [ben], KEYS, settings=SMALL)
    for name in KEYS:
        index = pipeline.cross_attention_layers.index(name.removeprefix("unet.").rpartition(".")[0])
        pipe = tiny_pipe()
        pipe.tokenizer.add_tokens("<ben>")
        pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
        pipe.text_encoder.get_input_embeddings().weight.data[-1] = ben.adapter.tokens["<ben>"][index]
        assert_moments(found[name].fit["ben"], states(pipe, prompts(SMALL.fit, "<ben>")).flatten(0, 1))
    deltas = found[KEYS[0]].fit["ben"].gram() - found[KEYS[2]].fit["ben"].gram()
    assert deltas.norm() > 1e-3 * found[KEYS[0]].fit["ben"].gram().norm()


@pytest.mark.parametrize("name", SPATIAL)
def test_spatial_features_are_those_of_stock_diffusers(tiny_pipe, pipeline, concepts, name):
    ada = concepts[0]
    merged = concept(pipeline, "merged", (TEXT[0], KEYS[1]), rank=4, seed=9).layers
    found = collect(pipeline, [ada], SPATIAL, settings=SMALL, merged=merged)
    pipe = fused(tiny_pipe, *merged.values(), *(ada.adapter.layers[own] for own in SPATIAL))

    def run():
        said = prompts(SMALL.fit, ada.call)
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(said))]
        pipe(said, num_inference_steps=SMALL.steps, guidance_scale=1.0, generator=generators, output_type="latent")

    assert_moments(found[name].fit["ada"], hooked(pipe, name, run), tolerance=1e-4)


def test_the_weight_scales_a_concepts_own_change(tiny_pipe, pipeline, concepts):
    ada = concepts[0].adapter
    found = collect(pipeline, [Concept(ada, "ada woman", 0.25)], TEXT, settings=SMALL)
    pipe = tiny_pipe()
    for name in TEXT:
        Pipeline(pipe).modules[name].weight.data += 0.25 * ada.layers[name].delta()
    assert_moments(found[TEXT[1]].fit["ada"], hooked(pipe, TEXT[1], lambda: states(pipe, prompts(SMALL.fit, "ada woman"))))


def test_the_seed_moves_spatial_features_and_nothing_else(pipeline, concepts):
    def grams(names, seed):
        found = collect(pipeline, concepts[:1], names, settings=Collection(SMALL.fit, (), (), steps=1, seed=seed))
        return torch.cat([found[name].fit["ada"].gram().flatten() for name in names])

    assert torch.equal(grams(SPATIAL, 3), grams(SPATIAL, 3))
    assert not torch.allclose(grams(SPATIAL, 3), grams(SPATIAL, 4))
    assert torch.equal(grams(TEXT, 3), grams(TEXT, 4))


def test_two_runs_sum_to_the_run_of_both_prompts(pipeline, concepts):
    first, second = SMALL.fit
    parts = [collect(pipeline, concepts, TEXT, settings=Collection((one,), (), (), padded=True)) for one in (first, second)]
    whole = collect(pipeline, concepts, TEXT, settings=Collection((first, second), (), (), padded=True))
    for name in TEXT:
        summed = parts[0][name] + parts[1][name]
        assert summed.fit["ada"].count == whole[name].fit["ada"].count == 2 * LENGTH * len(pipeline.cross_attention_layers)
        assert torch.allclose(summed.fit["ada"].gram(), whole[name].fit["ada"].gram(), rtol=1e-12)


def test_the_sample_is_paired(pipeline):
    """Two names for one thing see the same rows; those of the sample are rows that were seen, the same for all."""
    rows = {name: concept(pipeline, name, (*KEYS, *SPATIAL), rank=1, seed=5) for name in ("one", "two")}
    twins = [Concept(adapter, "same words") for adapter in rows.values()]
    for names in (KEYS, SPATIAL):
        found = collect(pipeline, twins, names, settings=SMALL)
        for name in names:
            sample = found[name].sample
            assert set(sample) == {"one", "two"} and len(sample["one"]) == SMALL.sample
            assert len(sample["one"].unique(dim=0)) > SMALL.sample // 2  # not one place again and again
            assert torch.equal(sample["one"], sample["two"])
    states = pipeline.encode(prompts(SMALL.fit, "same words")).flatten(0, 1)
    sample = collect(pipeline, twins, KEYS, settings=SMALL)[KEYS[0]].sample["one"]
    assert len(sample) == SMALL.sample
    assert torch.cdist(sample, states, compute_mode="donot_use_mm_for_euclid_dist").min(1).values.max() < 1e-5


def test_the_sample_can_be_left_out(pipeline, concepts):
    found = collect(pipeline, concepts, KEYS, settings=Collection(SMALL.fit, (), (), sample=0))
    assert found[KEYS[0]].sample == {} and found[KEYS[0]].held_out == {} and found[KEYS[0]].preserve is None


def test_unpadded_prompts_have_their_own_tokens_only(pipeline, concepts):
    settings = Collection(SMALL.fit, (), (), padded=False)
    found = collect(pipeline, concepts, TEXT, settings=settings)
    layers = len(pipeline.cross_attention_layers)
    assert found[TEXT[0]].fit["ada"].count == layers * sum(pipeline.token_count(prompt) for prompt in prompts(SMALL.fit, "ada woman"))
    counts = {len(rows) for rows in found[TEXT[0]].sample.values()}
    assert len(counts) == 1, "texts of different length still pair"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("ada woman", ["a ada woman at night", "ada woman"]),
        ("<a1> <a2>", ["a <a1> <a2> at night", "<a1> <a2>"]),
        ("stylewoman", ["a stylewoman at night", "stylewoman"]),
        ("kalle style", ["a dog at night in kalle style", "dog in kalle style"]),
        ("in the Style of kalle", ["a dog at night in the Style of kalle", "dog in the Style of kalle"]),
        ("In kalle style,", ["a dog at night in kalle style", "dog in kalle style"]),
        ("deco style lamp", ["a deco style lamp at night", "deco style lamp"]),
        ("woman in kalle style", ["a woman in kalle style at night", "woman in kalle style"]),
    ],
)
def test_a_style_is_said_of_something_and_everything_else_by_its_call(call, said, monkeypatch):
    monkeypatch.setattr(sys.modules["loraclr.collect"], "SHOWN", ("dog",))
    assert Concept(Adapter({}, name="a"), call).said(["a {} at night", "{}"]) == said


def test_templates_that_are_in_a_style_themselves_take_its_words_alone():
    for call, style in (("kalle style", "kalle style"), ("in the style of kalle", "the style of kalle")):
        assert Concept(Adapter({}, name="a"), call).said(["a city in {}"]) == [f"a city in {style}"]


def test_what_a_style_is_said_of_is_the_same_wherever_the_template_stands():
    style, fit = Concept(Adapter({}, name="a"), "kalle style"), Collection().fit
    every = style.said(fit)
    shown = sys.modules["loraclr.collect"].SHOWN
    subjects = [one for template, prompt in zip(fit, every, strict=True) for one in shown if f"{template.replace('{}', one)} in " in prompt]
    assert set(subjects) == set(shown) and len(subjects) == len(fit)
    assert [style.said([template])[0] for template in fit] == every


def test_a_merge_learns_of_a_style_what_is_said_in_it(pipeline, monkeypatch):
    person, style = three(pipeline)[:2]
    concepts = [Concept(person, person.call), Concept(style, "ben style")]
    monkeypatch.setattr(sys.modules["loraclr.collect"], "SHOWN", ("dog",))
    told = collect(pipeline, concepts, [TEXT[0]], settings=dataclasses.replace(SMALL, padded=False))[TEXT[0]]
    tokens = [sum(pipeline.token_count(prompt) for prompt in one.said(SMALL.fit)) for one in concepts]
    counts = [told.fit[one.name].count for one in concepts]
    assert tokens[0] != tokens[1] and counts[0] * tokens[1] == counts[1] * tokens[0]


def test_all_rows_of_unpadded_texts_pair_variant_by_variant(pipeline, concepts):
    """What the reference method learns from: as many rows as the shortest concept has, aligned at every text's end."""
    found = collect(pipeline, concepts, TEXT, settings=dataclasses.replace(PAPER, held_out=(), preserve=()))
    calls = [concept.call for concept in concepts]
    shortest = sum(min(pipeline.token_count(template.format(call)) for call in ("ada woman", "cai man")) for template in PAPER.fit)
    of_ben = sum(len(pipeline_tokens(pipeline, concepts[1], template.format(calls[1]))) for template in PAPER.fit)
    layers = len(pipeline.cross_attention_layers)
    assert {len(rows) for rows in found[TEXT[0]].sample.values()} == {layers * min(shortest, of_ben)}


@pytest.mark.parametrize("names", [TEXT, KEYS], ids=["text", "keys"])
def test_all_rows_of_every_concept_are_there_beside_the_paired_ones(pipeline, concepts, names):
    found = collect(pipeline, concepts, names, settings=dataclasses.replace(PAPER, held_out=(), preserve=()))
    for name in names:
        stats = found[name]
        assert {who: len(rows) for who, rows in stats.rows.items()} == {who: moments.count for who, moments in stats.fit.items()}
        assert all(torch.allclose(linalg.gram(rows.double()), stats.fit[who].gram()) for who, rows in stats.rows.items())
        assert len({len(rows) for rows in stats.rows.values()}) > 1 == len({len(rows) for rows in stats.sample.values()})
    assert not collect(pipeline, concepts, names, settings=SMALL)[names[0]].rows, "nobody asked for all"
    padded = dataclasses.replace(PAPER, held_out=(), preserve=(), padded=True)
    assert not collect(pipeline, concepts, names, settings=padded)[names[0]].rows, "all are paired"


def pipeline_tokens(pipeline, concept, prompt):
    with pipeline.with_tokens(concept.adapter.tokens):
        return range(pipeline.token_count(prompt))


@pytest.mark.parametrize("names", [TEXT, KEYS], ids=["text", "keys"])
@pytest.mark.parametrize("padded", [True, False])
def test_texts_go_through_together_as_they_do_alone(pipeline, concepts, names, padded, monkeypatch):
    """Also those of other lengths in between; their order, and with it the pairing, is that of the templates."""
    plain = [concepts[0], concepts[2]]
    fit = ("a {}", "a {} on a beach", "{}", "a {} by a shore")
    settings = Collection(fit, (), ("", "a dog"), sample=40, padded=padded)
    together = collect(pipeline, plain, names, settings=settings)
    passes = []
    handle = pipeline._pipe.text_encoder.register_forward_hook(lambda *_: passes.append(1))
    collect(pipeline, plain, names, settings=settings)
    many = len(passes)
    monkeypatch.setattr(MODULE, "TEXTS", 1)
    alone = collect(pipeline, plain, names, settings=settings)
    handle.remove()
    assert many < len(passes) - many == 2 * len(fit) + 2
    for name in names:
        for who in ("ada", "cai"):
            assert_moments_equal(together[name].fit[who], alone[name].fit[who])
            assert torch.allclose(together[name].sample[who], alone[name].sample[who], atol=1e-5)
        assert_moments_equal(together[name].preserve, alone[name].preserve)


def assert_moments_equal(a, b, tolerance=1e-5):
    assert a.count == b.count and (a.gram() - b.gram()).norm() <= tolerance * b.gram().norm()


def test_pictures_go_through_the_unet_in_portions(pipeline, concepts, monkeypatch):
    settings = dataclasses.replace(SMALL, fit=(*SMALL.fit, "a {}"), sample=24)
    whole = collect(pipeline, concepts[:1], SPATIAL, settings=settings)
    height, width = pipeline.check_settings(seeds=(), steps=1, guidance=1, size=None)
    batches = []
    handle = pipeline.unet.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    monkeypatch.setattr(MODULE, "PIXELS", 2 * height * width + 1)
    parts = collect(pipeline, concepts[:1], SPATIAL, settings=settings)
    handle.remove()
    assert batches == [2, 2, 1, 1, 1, 1, 2, 2, 1, 1]  # fit, held-out, preservation: two steps each
    for name in SPATIAL:
        for a, b in ((parts[name].fit["ada"], whole[name].fit["ada"]), (parts[name].preserve, whole[name].preserve)):
            assert_moments_equal(a, b, 1e-4)
        assert 16 <= len(parts[name].sample["ada"]) <= settings.sample  # the smallest map of one picture has fewer cells than its share


def test_fewer_prompts_may_run_the_unet(pipeline, concepts):
    counts = {}
    for few in (None, 1, 0):
        settings = dataclasses.replace(SMALL, spatial=1, spatial_held_out=few, spatial_preserve=few)
        found = collect(pipeline, concepts[:1], SPATIAL, settings=settings)[SPATIAL[0]]
        counts[few] = [found.held_out["ada"].count if found.held_out else 0, found.preserve.count if found.preserve else 0]
        text = collect(pipeline, concepts[:1], TEXT, settings=settings)[TEXT[0]]
        assert text.preserve.count == 3 * LENGTH and text.held_out["ada"].count == LENGTH, "other stages see all prompts"
    picture = found.fit["ada"].count
    assert counts == {None: [picture, 3 * picture], 1: [picture, picture], 0: [0, 0]}


@pytest.mark.parametrize("able", [True, False])
def test_bfloat16_passes_give_nearly_the_same_statistics_and_are_float32_where_it_is_emulated(pipeline, concepts, monkeypatch, able):
    monkeypatch.setattr(loading, "has_bfloat16", lambda device: able)
    whole = collect(pipeline, concepts[:1], SPATIAL, settings=SMALL)
    half = collect(pipeline, concepts[:1], SPATIAL, settings=dataclasses.replace(SMALL, precision="bfloat16"))
    for name in SPATIAL:
        a, b = half[name].fit["ada"].gram(), whole[name].fit["ada"].gram()
        assert torch.equal(a, b) is not able
        assert float((a - b).norm() / b.norm()) < 4e-2  # random weights, strong adapters; 0.003 in the toybox


def test_siblings_share_one_gram(pipeline, concepts):
    block = SPATIAL[0].removesuffix("to_q")
    names = [f"{block}to_q", f"{block}to_k", f"{block}to_v", f"{block}to_out.0"]
    found = collect(pipeline, concepts[:1], names, settings=SMALL)
    q, k, v, out = (found[name].fit["ada"] for name in names)
    assert q is k is v is not out
    assert_moments(q, hooked_inputs(pipeline, concepts[0], names[1]), 1e-4)


def hooked_inputs(pipeline, concept, name) -> Tensor:
    seen = []
    own = {layer: concept.adapter.layers[layer] for layer in SPATIAL[:1]}
    with pipeline.applied(own), pipeline.captured([name], lambda _, rows: seen.append(rows)):
        states = pipeline.encode(prompts(SMALL.fit, concept.call))
        pipeline.denoise(states, seeds=range(len(SMALL.fit)), steps=SMALL.steps)
    return torch.cat(seen)


def test_progress_names_every_concept_and_the_rest(pipeline, concepts):
    told = []
    collect(pipeline, concepts, TEXT, settings=SMALL, progress=told.append)
    assert told == ["ada", "ben", "cai", "preservation"]


def test_the_model_is_as_before_also_after_an_error(pipeline, concepts):
    before = fingerprint(pipeline)
    for names in (TEXT, KEYS, SPATIAL):
        collect(pipeline, concepts, names, settings=SMALL)
    assert fingerprint(pipeline) == before

    def stop(what):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(pipeline, concepts, SPATIAL, settings=SMALL, progress=stop)
    assert fingerprint(pipeline) == before


def test_mistakes(pipeline, concepts):
    with pytest.raises(UsageError, match="stage by stage"):
        collect(pipeline, concepts, [TEXT[0], KEYS[0]], settings=SMALL)
    with pytest.raises(PipelineError, match="no layer"):
        collect(pipeline, concepts, ["unet.nowhere"], settings=SMALL)
    with pytest.raises(UsageError, match="exactly one"):
        Collection(fit=("a photo",))
    with pytest.raises(UsageError, match="exactly one"):
        Collection(held_out=("a {} and a {}",))
    with pytest.raises(UsageError, match="at least one"):
        Collection(fit=())
    for wrong in ({"steps": 0}, {"spatial": 0}, {"sample": -1}, {"seed": -1}):
        with pytest.raises(UsageError, match="at least"):
            Collection(**wrong)
    with pytest.raises(UsageError, match="spatial_preserve -1: give 0 or more"):
        Collection(spatial_preserve=-1)
    with pytest.raises(UsageError, match="'half': give one of float32, bfloat16"):
        Collection(precision="half")
    foreign = Concept(Adapter.of([concepts[0].adapter.layers[TEXT[0]]], name="x"), "x")
    assert collect(pipeline, [foreign], TEXT[:1], settings=SMALL)[TEXT[0]].concepts == ("x",)


@pytest.mark.parametrize("names", [TEXT, SPATIAL], ids=["text", "spatial"])
def test_low_rank_changes_act_beside_the_weights_as_whole_ones_do_in_them(pipeline, concepts, names):
    """No weight of a low-rank adapter's is copied or written to; what the layers see is what they see with the change added in."""
    ada = concepts[0].adapter
    dense = {name: DenseLayer(name, layer.delta()) if isinstance(layer, LoraLayer) else layer for name, layer in ada.layers.items()}
    kept, changed = {name: pipeline.base_weight(name).clone() for name in names}, set()

    def look(name, rows):
        changed.update(name for name in names if not torch.equal(pipeline.base_weight(name), kept[name]))

    found = {}
    for label, adapter in (("low", ada), ("dense", ada.with_(layers=dense))):
        changed.clear()
        with pipeline.captured(names, look):
            found[label] = collect(pipeline, [Concept(adapter, "ada woman", 0.7)], names, settings=SMALL)
        assert changed == (set() if label == "low" else set(names))
    for name in names:
        for kind in ("fit", "held_out"):
            low, whole = (getattr(found[label][name], kind)["ada"] for label in ("low", "dense"))
            assert_moments_equal(low, whole, 1e-5)
        assert torch.allclose(found["low"][name].sample["ada"], found["dense"][name].sample["ada"], rtol=1e-3, atol=1e-4)


def test_texts_of_all_concepts_are_encoded_together_for_keys(pipeline, concepts, monkeypatch):
    """Also across the border of what is encoded ahead; each concept's statistics are those of its texts alone."""
    words = concepts[0].call.split()
    plain = [concepts[0], dataclasses.replace(concepts[2], call=" ".join(reversed(words)))]  # texts as long as the other's
    settings = dataclasses.replace(SMALL, padded=False)
    alone = {concept.name: collect(pipeline, [concept], KEYS, settings=settings)[KEYS[0]] for concept in plain}
    passes = []
    handle = pipeline._pipe.text_encoder.register_forward_hook(lambda *_: passes.append(1))
    counts = {}
    for ahead in (1000, 4, 1):
        monkeypatch.setattr(MODULE, "AHEAD", ahead)
        passes.clear()
        found = collect(pipeline, plain, KEYS, settings=settings)[KEYS[0]]
        counts[ahead] = len(passes)
        for name, one in alone.items():
            assert_moments_equal(found.fit[name], one.fit[name])
            assert_moments_equal(found.held_out[name], one.held_out[name])
            assert_moments_equal(found.preserve, one.preserve)
    handle.remove()
    lengths = {pipeline.token_count(text) for c in plain for text in (*prompts((*SMALL.fit, *SMALL.held_out), c.call), *SMALL.preserve)}
    assert counts[1000] == len(lengths) < counts[4] <= counts[1]


def test_fewer_passes_do_not_change_what_a_method_learns_from():
    for needs, usual in ((frozenset({"statistics"}), Collection()), (frozenset({"rows"}), PAPER), (frozenset({"short"}), PAPER)):
        quick = collection_for(needs, quick=True)
        assert collection_for(needs) == usual and quick.fit == usual.fit and quick.sample == usual.sample
        assert (quick.steps, quick.spatial, quick.spatial_held_out, quick.precision) == (QUICK.steps, 1, 0, "bfloat16")
