"""The whole way from adapters to one file: stages, receipts, reproducibility, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from concepts import KEYS, SMALL, SPATIAL, TEXT, concept, fingerprint, lora, three
from safetensors import safe_open

from loraclr.adapter import Adapter, DenseLayer, LoraLayer
from loraclr.collect import PAPER, Concept, collect
from loraclr.errors import FormatError, MergeError, MergeWarning, PipelineError, UsageError
from loraclr.formats import describe, load_adapter, save_adapter
from loraclr.merge import merge
from loraclr.methods import METHODS, LayerSolution, make_method, method_names
from loraclr.methods.loraclr_reference import LoraclrReference
from loraclr.pipeline import Pipeline

UNION = tuple(sorted((*TEXT, *KEYS, *SPATIAL)))
BRIEF = {"loraclr-reference": {"steps": 3}, "ziplora": {"steps": 2}, "lorahub": {"budget": 8}}  # enough to run through
FAITHFUL = {"ridge": 1e-9, "preservation": 0.0, "margin": 0.0}
KNOWING = ("loraclr", "loraclr-reference")


@pytest.fixture(scope="module")
def shared(_tiny_original) -> Pipeline:
    """One pipeline for all: a merge leaves no trace, which is tested."""
    return Pipeline(_tiny_original)


@pytest.fixture
def adapters(shared) -> list[Adapter]:
    return three(shared)


def run(adapters, base, method="loraclr", **settings):
    parameters = {**BRIEF.get(method.partition(":")[0], {}), **settings.pop("parameters", {})} if isinstance(method, str) else None
    return merge(adapters, base=base, method=method, parameters=parameters, collection=SMALL, **settings)


def distance(a: Adapter, b: Adapter) -> float:
    """The largest relative difference of two adapters' deltas."""
    assert a.layers.keys() == b.layers.keys()
    return max(float((x.delta() - y.delta()).norm() / y.delta().norm().clamp(min=1e-12)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("method", method_names())
def test_every_method_makes_one_adapter_of_three(shared, adapters, method):
    before = fingerprint(shared)
    if method == "linear":
        refused("factors needs LoRAs of one rank, these are of ranks", adapters, method=method)
        adapters = [adapter.with_(layers=of_rank_two(adapter)) for adapter in adapters]
    result = run(adapters, shared, method)
    assert fingerprint(shared) == before
    assert tuple(result.adapter.layers) == UNION == tuple(sorted(layer.layer for layer in result.layers))
    assert all(result.adapter.layers[name].shape == tuple(shared.base_weight(name).shape) for name in UNION)
    assert all(torch.isfinite(layer.delta()).all() for layer in result.adapter)
    assert list(result.adapter.tokens) == ["<ben>"] and result.adapter.family == "toy"
    assert result.adapter.triggers == ("ada woman", "<ben>", "ben man", "cai man")
    needs = make_method(method).needs
    knowing = "statistics" in needs
    assert result.method == method.partition(":")[0]
    assert math.isfinite(result.mean_residual("fit")) == math.isfinite(result.mean_residual("held_out")) == knowing
    assert (result.collection is not None) == bool(needs - {"generator"})
    by_layer = {layer.layer: layer for layer in result.layers}
    assert by_layer[TEXT[0]].adapted_by == ("ada",) and by_layer[KEYS[0]].adapted_by == ("ada", "ben", "cai")
    assert all(layer.rank <= 6 for layer in result.layers), "the sum of the input ranks is enough"
    strict_json(json.dumps(result.receipt(), allow_nan=False))


def of_rank_two(adapter: Adapter) -> dict[str, LoraLayer]:
    return {
        layer.name: replace(layer, down=layer.down[[0, -1]], up=layer.up[:, [0, -1]] if layer.rank > 1 else layer.up[:, [0, 0]] / 2)
        for layer in adapter
    }


def strict_json(text: str) -> dict:
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


STOPPED = (
    "loraclr-reference",
    "gradient-fusion",
    "lorahub",
)  # after a number of steps: far from an optimum, rounding decides where they are
ORDERED = [method for method in METHODS if method not in (*STOPPED, "pplus", "linear")]


@pytest.mark.parametrize("method", ORDERED)
def test_the_order_of_the_inputs_does_not_matter(shared, adapters, method):
    expected = run(adapters, shared, method).adapter
    for order in [(2, 0, 1), (1, 0, 2)]:
        shuffled = run([adapters[index] for index in order], shared, method).adapter
        assert distance(shuffled, expected) < (1e-5 if make_method(method).needs <= {"generator"} else 1e-4)


def test_a_descent_stopped_early_is_as_good_in_any_order(shared, adapters):
    fits = [run([adapters[index] for index in order], shared, "gradient-fusion").mean_residual("fit") for order in [(0, 1, 2), (2, 0, 1)]]
    assert fits[1] == pytest.approx(fits[0], rel=0.03)


def test_block_weights_fold_into_the_adapters(shared, adapters):
    """Ten attention blocks in the tiny UNet, of which the mid block is the fourth and the first up block's the fifth."""
    numbers = [0.5, 9, 9, 9, 0.25, 2, 9, 9, 9, 9, 9]
    by_hand = {TEXT[0]: 0.5, KEYS[0]: 0.25, KEYS[2]: 2, SPATIAL[2]: 2, SPATIAL[3]: 0.25}
    for base in (None, shared):
        given = numbers if base else [0.5, 0.25, 2]  # without a base the blocks are those that the adapters change
        result = merge(adapters, base=base, method="sum", block_weights={"ada": given})
        for name, factor in by_hand.items():
            own, others = adapters[0].layers[name].delta(), [a.layers[name].delta() for a in adapters[1:] if name in a.layers]
            assert torch.allclose(result.adapter.layers[name].delta(), factor * own + sum(others), atol=1e-5), name
        assert [entry["block_weights"] for entry in result.inputs] == [given, None, None]
    assert strict_json(result.header()["loraclr.receipt"])["inputs"][0]["block_weights"] == numbers
    ones = run(adapters, shared, block_weights={"ben": [1] * 11})
    assert distance(ones.adapter, run(adapters, shared).adapter) == 0
    halved = run(adapters[:1], shared, parameters=FAITHFUL, block_weights={"ada": [0.5] * 11})
    assert distance(halved.adapter, run(adapters[:1], shared, parameters=FAITHFUL, weights=[0.5]).adapter) < 1e-4


def test_block_weights_that_do_not_fit(shared, adapters):
    said = refused("eve", adapters, UsageError, block_weights={"eve": [1], "ada": [1, 2]})
    assert "ada has 2 block weights; 3 are needed, BASE and one for each of the 2 attention blocks of the adapters" in said
    refused("11 are needed.*10 attention blocks of the base", adapters, UsageError, base=shared, block_weights={"ada": [1] * 17})


def test_tokens_alone_merge_into_their_union(shared, tmp_path):
    rows = len(shared.cross_attention_layers), 32
    pair = [Adapter({}, name=name, tokens={f"<{name}>": torch.randn(*rows)}) for name in ("dee", "eli")]
    result = merge(pair, method="pplus")
    assert list(result.adapter.tokens) == ["<dee>", "<eli>"] and not len(result.adapter) and result.layers == ()
    assert torch.equal(result.adapter.tokens["<eli>"], pair[1].tokens["<eli>"])
    assert result.adapter.triggers == ("<dee>", "<eli>")
    back = load_adapter(result.save(tmp_path / "both.pth", format="edlora", dtype=torch.float32))
    assert not len(back) and torch.equal(back.tokens["<dee>"], pair[0].tokens["<dee>"])


def test_tokens_alone_without_any_token_are_refused(adapters):
    silent = [adapter for adapter in adapters if not adapter.tokens]
    assert silent and len(silent) < len(adapters)
    refused("pplus merges learned tokens alone, and none of the adapters brings one; use another method", silent, method="pplus")
    assert merge(adapters, method="pplus").adapter.tokens


def test_merged_tokens_say_what_each_says_alone(shared):
    """No weight is touched, so that every prompt about one of them reads as with its own tokens alone, and draws the same picture."""
    rows = len(shared.cross_attention_layers), 32
    pair = [Adapter({}, name=name, tokens={f"<{name}>": torch.randn(*rows)}) for name in ("dee", "eli")]
    merged = merge(pair, method="pplus").adapter
    for own, foreign, prompts in (
        (*pair, ["a <dee>", "a photo of a <dee> on a beach", "a dog"]),
        (*reversed(pair), ["<eli>", "an old <eli>, <eli>"]),
    ):
        states, pictures = [], []
        for adapter in (own, merged):
            with shared.applied(adapter):
                states.append([shared.encode([prompt]) for prompt in prompts])
                pictures.append(shared.sample(prompts[:1], seeds=[0], steps=2)[0].tobytes())
        assert all(torch.equal(alone, among) for alone, among in zip(*states, strict=True))
        assert pictures[0] == pictures[1]
        with shared.applied(Adapter({}, tokens={next(iter(own.tokens)): next(iter(foreign.tokens.values()))})):
            assert not torch.allclose(shared.encode(prompts[:1]), states[0][0], atol=1e-3)


def test_custom_diffusion_keeps_keys_and_averages_or_leaves_the_rest(shared, adapters):
    mean = merge(adapters, method="average").adapter
    result = run(adapters, shared, "custom-diffusion")
    none = run(adapters, shared, "custom-diffusion", parameters={"others": "none"})
    for name in UNION:
        same = torch.allclose(result.adapter.layers[name].delta(), mean.layers[name].delta(), atol=1e-6)
        assert same == (name not in KEYS)
        assert bool(none.adapter.layers[name].delta().any()) == (name in KEYS)
    assert result.collection["padded"] is True  # SMALL was given; on its own it asks for the released code's prompts
    assert merge(adapters[2:], base=shared, method="custom-diffusion").collection["padded"] is False


@pytest.mark.parametrize("adapter", [0, 1, 2])
def test_one_adapter_comes_back_on_what_was_collected(shared, adapters, adapter):
    result = run([adapters[adapter]], shared, parameters=FAITHFUL)
    assert result.mean_residual("fit") < 1e-3 and result.mean_residual("held_out") < 0.5
    assert all(value < 1e-2 for layer in result.layers for key, value in layer.residuals.items() if key.startswith("fit/"))
    assert set(result.adapter.layers) == set(adapters[adapter].layers)


def test_least_squares_fits_better_than_the_mean_and_the_sum(shared, adapters):
    fit = {method: run(adapters, shared, method, parameters=parameters, measure=True).mean_residual("fit")
           for method, parameters in {"loraclr": FAITHFUL, "average": {}, "sum": {}}.items()}  # fmt: skip
    assert fit["loraclr"] < 0.8 * min(fit["average"], fit["sum"])


def test_every_stage_is_collected_on_the_merged_layers_before_it(shared, adapters):
    """Redone by hand: statistics of the keys with the merged text encoder applied, solved by the same method."""
    result = run(adapters, shared, parameters=FAITHFUL)
    assert {layer.layer: layer.stage for layer in result.layers} == (
        dict.fromkeys(TEXT, 0) | dict.fromkeys(KEYS, 1) | dict.fromkeys(SPATIAL, 2)
    )
    concepts = [Concept(adapter, call) for adapter, call in zip(adapters, ("ada woman", "<ben>", "cai man"), strict=True)]
    own = adapters[0].layers
    for names, earlier in ((KEYS, TEXT), (SPATIAL, TEXT + KEYS)):
        merged = {name: result.adapter.layers[name] for name in earlier}
        for applied, agrees in ((merged, True), ({name: own[name] for name in earlier}, False)):
            stats = collect(shared, concepts, list(names), settings=SMALL, merged=applied)[names[0]]
            receipt = next(layer for layer in result.layers if layer.layer == names[0])
            change = result.adapter.layers[names[0]].delta(torch.float64).flatten(1)
            target = own[names[0]].delta(torch.float64).flatten(1)
            residual = (stats.fit["ada"].energy(change - target) / stats.fit["ada"].energy(target)) ** 0.5
            assert (residual == pytest.approx(receipt.residuals["fit/ada"], rel=1e-4)) == agrees
        assert receipt.rows == sum(moments.count for moments in stats.fit.values()) and receipt.width == stats.width


def test_average_and_sum_are_what_they_say_with_weights_and_without_a_base(adapters):
    weights = [1.0, 0.5, -2.0]
    plain = {method: merge(adapters, method=method, weights=weights).adapter for method in ("average", "sum")}
    for name in UNION:
        parts = [w * adapter.layers[name].delta() for w, adapter in zip(weights, adapters, strict=True) if name in adapter.layers]
        assert torch.allclose(plain["sum"].layers[name].delta(), sum(parts), atol=1e-5)
        assert torch.allclose(plain["average"].layers[name].delta(), sum(parts) / 3, atol=1e-5)


def test_a_base_changes_nothing_for_a_method_that_needs_none(shared, adapters):
    assert distance(run(adapters, shared, "average").adapter, merge(adapters, method="average").adapter) == 0
    assert distance(run(adapters, shared, "average", measure=True).adapter, merge(adapters, method="average").adapter) == 0


def test_weights_scale_the_targets_of_least_squares(shared, adapters):
    halved = run(adapters[:1], shared, parameters=FAITHFUL, weights=[0.5])
    assert halved.mean_residual("fit") < 1e-3
    assert halved.inputs[0]["weight"] == 0.5
    with shared.applied({name: halved.adapter.layers[name] for name in TEXT}):
        states = shared.encode([template.format("ada woman") for template in SMALL.fit]).flatten(0, 1)
    merged, own = (states @ adapter.layers[KEYS[0]].delta().T for adapter in (halved.adapter, adapters[0]))
    assert (merged - 0.5 * own).norm() < 1e-2 * own.norm()


def test_rank_is_a_limit_and_says_what_it_cost(shared, adapters):
    full, cut = (run(adapters, shared, rank=rank) for rank in (None, 2))
    assert max(layer.rank for layer in cut.layers) == 2 < max(layer.rank for layer in full.layers)
    assert all(layer.lost == 0 for layer in full.layers if layer.status != "refitted") and 0 < max(layer.lost for layer in cut.layers) < 1
    assert cut.rank == 2 and full.rank is None
    plain = merge(adapters, method="sum", rank=1)
    for name in KEYS:
        exact = sum(adapter.layers[name].delta(torch.float64) for adapter in adapters)
        s = torch.linalg.svdvals(exact)
        receipt = next(layer for layer in plain.layers if layer.layer == name)
        assert receipt.lost == pytest.approx(float(s[1:].norm() / s.norm()), rel=1e-4)


@pytest.mark.parametrize("method", KNOWING)
def test_the_same_seed_makes_the_same_file_and_another_does_not(shared, adapters, tmp_path, method):
    files = []
    for number, seed in enumerate((0, 0, 1)):
        path = run(adapters, shared, method, seed=seed).save(tmp_path / f"{number}.safetensors")
        files.append(path.read_bytes())
        assert path.with_name(path.name.removesuffix(".safetensors") + ".tokens.safetensors").exists()
    assert files[0] == files[1] != files[2]
    first, other = (load_adapter(tmp_path / f"{number}.safetensors") for number in (0, 2))
    for name in (*TEXT, *KEYS):
        assert torch.equal(first.layers[name].delta(), other.layers[name].delta()), "text does not depend on latents"
    assert any(not torch.equal(first.layers[name].delta(), other.layers[name].delta()) for name in SPATIAL)


@pytest.mark.parametrize("method", ["dare-linear", "dare-ties"])
def test_masks_are_the_seeds(adapters, tmp_path, method):
    files = [merge(adapters, method=method, seed=seed).save(tmp_path / f"{n}.safetensors").read_bytes() for n, seed in enumerate((0, 0, 1))]
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_diffusers_loads_the_file_as_base_plus_delta(tiny_pipe, shared, adapters, tmp_path, format):
    result = run(adapters, shared)
    path = result.save(tmp_path / "merged.safetensors", format=format, dtype=torch.float32)
    pipe = tiny_pipe()
    pipe.load_lora_weights(str(path))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    modules = Pipeline(pipe).modules
    for name, module in modules.items():
        expected = shared.base_weight(name)
        if name in result.adapter.layers:
            expected = expected + result.adapter.layers[name].delta()
        assert torch.allclose(module.weight, expected, atol=1e-5), name


def texts(shared) -> list[Adapter]:
    """Two adapters of the text encoder alone: what the layers see does not depend on what comes after them."""
    return [concept(shared, name, TEXT, rank=2, seed=seed, triggers=(f"{name} man",)) for seed, name in ((5, "dov"), (6, "eve"))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["loraclr-reference:paper", "loraclr-reference:official", "loraclr:exact"])
def test_the_saved_file_has_the_loss_that_was_logged(shared, tmp_path, method, dtype):
    """The loss of what is read back from the file, redone from features; never above the base's. Ranks are no limit here."""
    adapters, every = texts(shared), replace(SMALL, sample=10**6)
    result = merge(adapters, base=shared, method=method, collection=every, rank=32)
    saved = load_adapter(result.save(tmp_path / "merged.safetensors", dtype=dtype))
    stats = collect(shared, [Concept(adapter, adapter.call) for adapter in adapters], list(TEXT), settings=every)
    solver = make_method(method)
    reference = LoraclrReference(penalty=solver.penalty, margin=solver.margin, anchor=solver.anchor, mse=getattr(solver, "mse", 0.0))
    for receipt in result.layers:
        rows = torch.stack([stats[receipt.layer].sample[adapter.name] for adapter in adapters]).double()
        weight = shared.base_weight(receipt.layer).double()
        deltas = torch.stack([adapter.layers[receipt.layer].delta(torch.float64) for adapter in adapters])
        found, base = (
            float(reference.loss(delta, rows, weight, rows @ (weight + deltas).mT).total)
            for delta in (saved.layers[receipt.layer].delta(torch.float64), torch.zeros_like(weight))
        )
        logged = receipt.diagnostics["objective" if method == "loraclr:exact" else "best_loss"]
        assert found == pytest.approx(logged, rel=1e-4 if dtype == torch.float32 else 1e-2) and found < base
        if method != "loraclr:exact":
            assert base == pytest.approx(receipt.diagnostics["first_loss"], rel=1e-4)


@pytest.mark.parametrize("method", ["loraclr", "loraclr:contrastive", "loraclr-reference:paper"])
def test_a_layers_bias_is_in_nothing(shared, tiny_pipe, method):
    """Neither in what it learns from nor in what is made of it; one of a layer before it is in its inputs."""
    last, before = TEXT[1], "text_encoder.encoder.layers.0.mlp.fc1"
    adapters = [adapter.with_(layers={last: adapter.layers[last]}) for adapter in texts(shared)]
    found = {}
    for moved in (None, last, before):
        pipe = tiny_pipe()
        if moved is not None:
            layers = getattr(pipe.text_encoder, "text_model", pipe.text_encoder).encoder.layers
            with torch.no_grad():
                layers[1 if moved == last else 0].mlp.fc1.bias += torch.linspace(-3, 3, layers[0].mlp.fc1.bias.numel())
        result = run(adapters, Pipeline(pipe), method)
        found[moved] = result.adapter.layers[last].delta(), result.layers[0].diagnostics, result.layers[0].residuals
    assert torch.equal(found[None][0], found[last][0]) and found[None][1:] == found[last][1:]
    assert not torch.allclose(found[None][0], found[before][0], rtol=1e-3)


def test_the_file_says_how_it_was_made(shared, adapters, tmp_path):
    files = [save_adapter(adapter, tmp_path / f"{adapter.name}.safetensors") for adapter in adapters]
    result = run(files, shared, weights=[1, 0.5, 1], parameters={"ridge": 0.01}, seed=4)
    path = result.save(tmp_path / "merged.safetensors")
    with safe_open(path, "pt") as file:
        header = file.metadata()
    receipt = strict_json(header["loraclr.receipt"])
    assert result.receipt()["base"] == shared.source
    assert receipt["method"] == "loraclr" and receipt["parameters"]["ridge"] == 0.01 and receipt["seed"] == 4
    assert [entry["sha256"] for entry in receipt["inputs"]] == [describe(file).sha256 for file in files]
    assert [entry["weight"] for entry in receipt["inputs"]] == [1, 0.5, 1]
    assert header["modelspec.trigger_phrase"] == "ada woman, <ben>, ben man, cai man"
    assert str(tmp_path) not in header["loraclr.receipt"]
    whole = strict_json(path.with_name("merged.safetensors.json").read_text())
    assert whole == strict_json(json.dumps(result.receipt()))
    assert len(whole["layers"]) == len(UNION) and whole["collection"]["seed"] == 4 and whole["inputs"][0]["file"] == "ada.safetensors"
    back = load_adapter(path)
    assert back.triggers == result.adapter.triggers and back.family == "toy"
    assert torch.equal(back.tokens["<ben>"], adapters[1].tokens["<ben>"])
    assert distance(back, result.adapter) < 1e-3


def test_what_was_not_measured_is_null_and_not_a_made_up_word(adapters, tmp_path):
    path = merge(adapters, method="sum").save(tmp_path / "sum.safetensors")
    assert strict_json(path.with_name("sum.safetensors.json").read_text())["residual"] == {"fit": None, "held_out": None}


def test_merged_files_can_be_merged_again(shared, adapters, tmp_path):
    path = run(adapters, shared).save(tmp_path / "merged.safetensors")
    again = run([path, concept(shared, "dee", KEYS, rank=1, seed=8, triggers=("dee woman",))], shared)
    assert [entry["name"] for entry in again.inputs] == ["merged", "dee"] and again.inputs[0]["call"] == "<ben>"


def test_progress_runs_from_the_first_stage_to_the_last(shared, adapters):
    told: list[tuple[str, float]] = []
    run(adapters, shared, progress=lambda what, share: told.append((what, share)))
    phases = [phase for phase, _ in itertools.groupby(what.partition(":")[0] for what, _ in told)]
    again = ["every adapter's own run once more", "catching up with the adapters, block after block"]
    stages = [f"{verb} stage {stage} of 3" for stage in (1, 2, 3) for verb in ("collecting", "solving")]
    assert phases == [*stages, *again]
    for phase in phases:
        shares = [share for what, share in told if what.partition(":")[0] == phase]
        assert shares == sorted(shares) and shares[-1] == 1.0 and shares[0] > 0


def test_an_adapter_says_how_it_is_called():
    rows = torch.zeros(1, 4)
    for tokens, triggers, call in (
        ((), (), ""),
        ((), ("ada woman", "ada"), "ada woman"),
        (("<ada>",), (), "<ada>"),
        (("<a>", "<b>"), ("ada woman",), "<a> <b>"),
        (("<ada>",), ("ada", "<ada> woman"), "<ada> woman"),  # a modifier word in front of its class
    ):
        assert Adapter({}, tokens=dict.fromkeys(tokens, rows), triggers=triggers).call == call


def test_calls_are_given_words_then_tokens_then_triggers(shared, adapters):
    result = merge(adapters, method="average", calls={"ada": "somebody else"})
    assert [entry["call"] for entry in result.inputs] == ["somebody else", "<ben>", "cai man"]


def test_concepts_with_the_same_words_are_warned_about(adapters):
    with pytest.warns(MergeWarning, match="ada, cai are called by the same words 'a man'"):
        merge(adapters, method="average", calls={"ada": "a man", "cai": "a man"})


def test_dense_layers_and_one_by_one_kernels_merge_with_low_rank_ones(shared, adapters):
    name = "unet.mid_block.attentions.0.proj_in"
    weight = shared.base_weight(name)
    assert weight.ndim == 4 and weight.shape[2:] == (1, 1)
    flat = LoraLayer(name, torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2))
    dense = DenseLayer(name, torch.randn(weight.shape))
    result = run([Adapter.of([flat], name="flat"), Adapter.of([dense], name="dense")], shared, "average")
    merged = result.adapter.layers[name]
    assert merged.shape == tuple(weight.shape)
    assert torch.allclose(merged.delta(), (flat.delta().view(weight.shape) + dense.delta()) / 2, atol=1e-4)
    with shared.applied(result.adapter):
        pass


# --- what is refused


def refused(message: str, adapters, error: type[Exception] = MergeError, **settings) -> str:
    with pytest.raises(error, match=message) as caught:
        merge(adapters, **{"method": "average", **settings})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_parameters_that_do_not_fit_the_merge_are_refused_before_anything_runs(shared, adapters, monkeypatch):
    def work(*_, **__):
        raise AssertionError("work was done")

    for name in ("run", "encode", "captured"):
        monkeypatch.setattr(Pipeline, name, work)
    known = {"base": shared, "method": "loraclr", "error": UsageError}
    chosen, said = {"choose": "held_out"}, "held-out prompts, but none {}; leave --quick out, which has none, or choose=fixed"
    refused(said.format("runs the UNet"), adapters, **known, parameters=chosen, collection=replace(SMALL, spatial_held_out=0))
    refused(said.format("is collected"), adapters, **known, parameters=chosen, collection=replace(SMALL, held_out=()))
    refused("importance has 2 numbers for 3 concepts; give one for each", adapters, **known, parameters={"importance": (1.0, 2.0)})
    small = {"parameters": {"budget": 7}, "score": lambda adapter: 0.0}
    refused("budget 7 is too small to search over 3 adapters; give at least 8", adapters, **{**known, "method": "lorahub"}, **small)


def test_a_stage_without_the_unet_can_be_chosen_by_held_out_prompts_of_a_quick_collection(shared, adapters):
    settings = {"parameters": {"choose": "held_out"}, "collection": replace(SMALL, spatial_held_out=0)}
    (layer, *_) = merge([adapters[2], adapters[2].with_(name="dan", triggers=("dan",))], base=shared, **settings).layers
    assert layer.diagnostics["chosen_on"] == "held_out", "the receipt says that its held-out residuals are not of unseen prompts"
    assert "chosen_on" not in run(adapters, shared).layers[0].diagnostics


def test_inputs_that_do_not_fit_together(shared, adapters):
    ada, ben, cai = adapters
    refused("nothing to merge", [], UsageError)
    refused("3 adapters and 2 weights", adapters, UsageError, weights=[1, 2])
    refused("two adapters are called 'ada'", [ada, ada])
    refused("different model families .sdxl, toy.", [ada, ben.with_(family="sdxl")])
    refused("trigger was given for 'eve', but the adapters are ada, ben", [ada, ben], calls={"eve": "eve woman"})
    twin = cai.with_(tokens={"<ben>": ben.tokens["<ben>"] + 1})
    refused("ben and cai both bring a learned token '<ben>'", [ben, twin])
    refused("there is nothing to merge", [Adapter({}, name="a"), Adapter({}, name="b")])
    wrong = Adapter.of([LoraLayer(KEYS[0], torch.randn(1, 7), torch.randn(64, 1))], name="wrong")
    refused(rf"{KEYS[0]} is \(64, 32\) in ada and \(64, 7\) in wrong", [ada, wrong])
    refused("give at least 1", adapters, UsageError, rank=0)


def test_what_the_output_cannot_hold_is_said_before_any_work(adapters):
    second = Adapter.of([LoraLayer("text_encoder_2.encoder.layers.0.mlp.fc1", torch.randn(1, 8), torch.randn(8, 1))], name="second")
    idle = {"progress": lambda *_: pytest.fail("was merged first")}
    refused("edlora files hold unet and text_encoder; leave .text_encoder_2. out", [second], FormatError, format="edlora", **idle)
    refused("no format .kohia.; .*did you mean .kohya.", adapters, FormatError, format="kohia", **idle)
    for format in ("kohya", "diff", "edlora"):
        assert merge(adapters[1:], method="average", format=format).adapter == merge(adapters[1:], method="average").adapter


def test_everything_wrong_is_in_one_message(adapters):
    ada, ben, _ = adapters
    said = refused("two adapters", [ada, ada, ben.with_(family="sdxl")], calls={"eve": "x"})
    assert "families" in said and "eve" in said


def test_the_same_token_twice_is_no_clash(adapters):
    _, ben, cai = adapters
    assert list(merge([ben, cai.with_(tokens=ben.tokens)], method="average", calls={"cai": "cai"}).adapter.tokens) == ["<ben>"]


def test_triggers_are_needed_only_where_prompts_are_made(shared, adapters):
    silent = adapters[2].with_(triggers=())
    assert merge([silent], method="average").adapter.triggers == ()
    assert "--trigger cai=WORDS" in refused("cai says no trigger words", [silent], method="loraclr", base=shared)
    assert "--trigger cai=WORDS" in refused("cai says no trigger words", [silent], base=shared, measure=True)
    assert run([silent], shared, calls={"cai": "cai man"}).adapter.triggers == ("cai man",)


def test_a_method_that_looks_at_features_needs_a_base(adapters):
    for method in ("loraclr", "gradient-fusion", "ziplora"):
        said = refused(f"{method} needs the base", adapters, method=method)
        assert "--base PATH_OR_ID, in Python base=" in said and re.search(
            "weights alone need none: average, .*sum, svd, ties,.* knots", said
        )
        assert "regmean" not in said
    assert "--base PATH_OR_ID, in Python base=" in refused("sum is measured on .* so --measure", adapters, method="sum", measure=True)


@pytest.mark.parametrize(
    ("method", "parameters", "asked", "look"),
    [
        *[(method, {"density": 0.0}, {}, "weights and density and scale") for method in ("ties", "knots", "dare-linear")],
        ("sum", {"scale": 0.0}, {}, "weights and scale"),
        ("average", {}, {"weights": [0.0, 0.0, 0.0]}, "weights"),
    ],
)
def test_a_merge_that_changes_nothing_says_so(adapters, method, parameters, asked, look):
    with pytest.warns(MergeWarning, match=rf"^{method} left nothing of these adapters.*look at the {look}$"):
        merged = merge(adapters, method=method, parameters=parameters, **asked).adapter
    assert not any(layer.delta().any() for layer in merged)


def test_what_is_nothing_from_the_start_is_no_news(adapters):
    zeros = [Adapter({name: replace(layer, up=layer.up * 0) for name, layer in adapters[0].layers.items()}, name="ada")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(zeros, method="sum")
        merge(adapters, method="sum", weights=[0.0, 0.0, 1e-3])


def test_layers_that_the_base_does_not_have(shared, adapters):
    alien = Adapter.of([LoraLayer("unet.nowhere.to_k", torch.randn(1, 4), torch.randn(4, 1))], name="alien").with_(triggers=("x",))
    refused("no layer 'unet.nowhere.to_k'", [alien], PipelineError, base=shared)
    refused("no layer 'unet.nowhere.to_k'", [adapters[0], alien], PipelineError, base=shared, method="loraclr")
    narrow = Adapter.of([LoraLayer(KEYS[0], torch.randn(1, 7), torch.randn(64, 1))], name="narrow").with_(triggers=("x",))
    for method in ("average", "loraclr"):
        refused(r"to_k is \(64, 7\), the base's \(64, 32\)", [narrow], base=shared, method=method)


def test_method_mistakes_come_before_any_work(adapters):
    refused("no method 'lora'", adapters, UsageError, method="lora")
    refused("no parameter 'rige'", adapters, UsageError, method="loraclr", parameters={"rige": 1})
    refused("already made", adapters, UsageError, method=make_method("sum"), parameters={"scale": 2})
    with pytest.raises(FormatError, match="no such file"):
        merge(["nowhere.safetensors"], method="average")


@dataclass(frozen=True)
class Broken:
    name: ClassVar[str] = "broken"
    summary: ClassVar[str] = "gives NaN"
    reference: ClassVar[str] = "none"
    needs: ClassVar[frozenset[str]] = frozenset()
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {}

    def solve(self, problem):
        return LayerSolution(change=torch.full((problem.out, problem.width), torch.nan))


def test_a_solution_of_nan_is_an_error_and_not_a_file(shared, adapters):
    before = fingerprint(shared)
    refused("broken gave NaN", adapters, method=Broken(), base=shared)
    assert fingerprint(shared) == before


@dataclass(frozen=True)
class Nothing(Broken):
    def solve(self, problem):
        return LayerSolution(change=torch.zeros(problem.out, problem.width))


def test_a_solution_of_zero_is_a_layer_of_rank_one(adapters, tmp_path):
    result = merge(adapters, method=replace(Nothing()))
    assert all(layer.rank == 1 and layer.lost == 0 for layer in result.layers)
    assert all(not layer.delta().any() for layer in load_adapter(result.save(tmp_path / "zero.safetensors")))


@dataclass(frozen=True)
class Homemade(Nothing):
    name: ClassVar[str] = "homemade"
    needs: ClassVar[frozenset[str]] = frozenset({"statistics"})


def test_a_method_that_nobody_knows_names_the_released_code_s_prompts(shared, adapters, tmp_path):
    told = []
    for method in (Homemade(), "gradient-fusion"):
        settings = replace(SMALL, fit=PAPER.fit)
        result = merge(adapters, base=shared, method=method, collection=settings)
        path = result.save(tmp_path / "merged.safetensors")
        told.append(json.loads(load_adapter(path).metadata["loraclr.receipt"])["collection"].get("fit"))
    assert told == [list(PAPER.fit), None]


def test_lora_helper_has_the_strength_it_says(shared):
    made = lora(shared, KEYS[0], rank=2, seed=0, strength=0.3)
    assert float(made.delta().norm() / shared.base_weight(KEYS[0]).norm()) == pytest.approx(0.3, rel=1e-4)


def test_the_receipt_says_how_strong_concepts_are_and_how_they_cross(shared, adapters):
    """In a sum every coefficient is 1, on whatever features; a faithful merge of one has strength 1 and nobody to cross."""
    result = run(adapters, shared, "sum", measure=True)
    talk = result.receipt()["cross_talk"]
    assert talk["concepts"] == ["ada", "ben", "cai"] and talk["strength"] == pytest.approx(1, abs=1e-4)
    assert all(value == pytest.approx(1, abs=1e-3) for row in talk["tables"]["after"] for value in row)
    assert [talk["tables"]["before"][k][k] for k in range(3)] == pytest.approx([1, 1, 1])
    assert all(set(layer.cross_talk) == {"strength", "before", "after"} for layer in result.layers)
    alone = run(adapters[:1], shared, parameters=FAITHFUL).receipt()["cross_talk"]
    assert alone["strength"] == pytest.approx(1, abs=1e-2) and alone["after"] is None
    assert merge(adapters, method="sum").receipt()["cross_talk"] is None
    ours = run(adapters, shared).receipt()["cross_talk"]
    assert ours["after"] < talk["after"] == pytest.approx(talk["before"], rel=1e-3)


def test_of_many_adapters_the_receipt_leaves_the_crossing_out(shared, adapters, monkeypatch):
    monkeypatch.setattr(sys.modules["loraclr.merge"], "FEW", 2)
    result = run(adapters, shared)
    assert result.cross_talk is None and result.receipt()["cross_talk"] is None
    assert all(not layer.cross_talk and layer.residuals for layer in result.layers)
