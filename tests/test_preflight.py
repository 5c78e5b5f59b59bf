"""What is said before a merge: every check on adapters made to trip it, the verdict, and that merge warns and refuses alike."""

from __future__ import annotations

import itertools

import pytest
import torch
from concepts import KEYS, TEXT, concept, three

from loraclr.adapter import Adapter, DenseLayer, LoraLayer
from loraclr.errors import MergeError, MergeWarning
from loraclr.merge import merge
from loraclr.pipeline import Pipeline
from loraclr.preflight import prediction, preflight


@pytest.fixture(scope="module")
def shared(_tiny_original) -> Pipeline:
    return Pipeline(_tiny_original)


def named(name: str, call: str = "", **metadata: str) -> Adapter:
    layer = LoraLayer(KEYS[0], torch.ones(1, 32), torch.ones(64, 1))
    return Adapter.of([layer], name=name).with_(triggers=(call,) if call else (), metadata=metadata)


def seen(*adapters: Adapter, **settings) -> list[tuple[str, str]]:
    """Level and check of all findings but the notes."""
    return [(one.level, one.check) for one in preflight(adapters, **settings).findings if one.level != "note"]


def test_ordinary_adapters_merge(shared):
    adapters = three(shared)
    found = preflight(adapters, base=shared)
    assert (found.verdict, found.of("refuse"), found.of("warn"), found.losses) == ("merge", [], [], None)
    assert [(note.check, note.adapters) for note in found.of("note")] == [("layers", ("ada",))]
    assert "ada alone changes 2 of 9 layers (2 text_encoder)" in found.findings[0].message


@pytest.mark.parametrize(
    ("adapters", "check"),
    [
        ([named("a", "a"), named("b", "b").with_(family="sdxl"), named("c", "c").with_(family="sd1")], "family"),
        ([named("a", "a", ss_v_parameterization="True"), named("b", "b", **{"modelspec.prediction_type": "epsilon"})], "prediction"),
        ([named("lcm-lora-sdv1-5")], "distilled"),
        ([named("sdxl_lightning_4step_lora", "x")], "distilled"),
        ([named("Hyper-SDXL-8steps-lora", "x")], "distilled"),
        ([named("a", ss_output_name="turbo_v2")], "distilled"),
        ([named("a", "x", **{"modelspec.title": "Flux Kontext relight"})], "edit"),
        ([Adapter.of([DenseLayer("unet.conv_in", torch.ones(4, 8, 3, 3))], name="ip2p")], "edit"),
    ],
)
def test_what_is_refused_and_what_can_be_allowed(adapters, check):
    before = preflight(adapters)
    assert before.verdict == "do not merge"
    assert {finding.check for finding in before.of("refuse")} == {check}
    with pytest.raises(MergeError) as caught:
        merge(adapters, method="average")
    assert before.of("refuse")[0].message in str(caught.value)
    if check == "family":
        assert preflight(adapters, allow=["family"]).verdict == "do not merge"
    else:
        assert f"--allow {check}" in str(caught.value)
        assert preflight(adapters, allow=[check]).verdict == "merge with care"
        with pytest.warns(MergeWarning):
            merge(adapters, method="average", allow=[check])


@pytest.mark.parametrize("name", ["hyperrealistic", "turbocar", "lightningale", "credit", "flux_portrait", "inpainter_tom"])
def test_innocent_names(name):
    assert seen(named(name, "x")) == []


def test_a_fast_word_in_a_concepts_name_is_only_a_warning():
    assert seen(named("lightning_bolt", "zeus")) == [("warn", "distilled")]


def test_an_unknown_allowance_is_an_error():
    with pytest.raises(MergeError, match="nothing that can be allowed is called 'all'; allow one of distilled"):
        merge([named("a", "x")], method="average", allow=["all"])
    assert seen(named("a", "x"), allow=["all"]) == [("refuse", "allow")]


@pytest.mark.parametrize(
    ("calls", "wanted"),
    [
        (("sks man", "SKS  man"), [("warn", "trigger")]),
        (("sks man", "ohwx man"), []),
        (("sks man", "sks woman"), [("warn", "trigger")]),
        (("rhea", "rhea woman"), [("warn", "trigger")]),
        (("sks", "ohwx"), []),
    ],
)
def test_triggers_that_call_two(calls, wanted):
    assert seen(*(named(f"n{i}", call) for i, call in enumerate(calls))) == wanted


def test_a_call_that_another_answers_to():
    other = named("b", "ben").with_(triggers=("ben", "blue hat"))
    assert seen(named("a", "blue hat"), other) == [("warn", "trigger")]


def test_prompts_need_triggers(shared):
    silent = three(shared)[2].with_(triggers=())
    assert seen(silent, base=shared) == [("refuse", "trigger")]
    assert seen(silent, base=shared, calls={"cai": "cai man"}) == []
    assert seen(silent) == []
    assert seen(named("a", "x"), calls={"eve": "eve woman"}) == [("refuse", "trigger")]


def test_the_base_counts(shared):
    odd = Adapter.of([LoraLayer(KEYS[0], torch.ones(1, 7), torch.ones(64, 1))], name="odd").with_(triggers=("x",))
    found = preflight([odd], base=shared)
    assert found.verdict == "do not merge" and "(64, 7), the base's (64, 32)" in found.of("refuse")[0].message
    assert seen(odd) == []
    assert seen(odd, named("b", "y")) == [("refuse", "layers")]
    cai = three(shared)[2].with_(metadata={"modelspec.prediction_type": "v"})
    assert seen(cai, base=shared) == [("refuse", "prediction")]
    assert [prediction(named("a", **{"modelspec.architecture": "stable-diffusion-v2-768-v/lora"})), prediction(cai)] == ["v", "v"]


def test_names_and_doubles():
    assert seen(named("a", "x"), named("a", "y")) == [("refuse", "name")]
    assert seen(*(named(name, name, sshs_model_hash="1f") for name in ("ada", "ben"))) == [("warn", "name")]


def test_a_licence_without_merges_is_a_warning():
    assert seen(named("a", "x", **{"modelspec.license": "Civitai: no merges"})) == [("warn", "licence")]


class TestRank:
    def diagonal(self, name: str, values: dict[int, float]) -> Adapter:
        """One layer (8, 8) with these entries on its diagonal."""
        rows = torch.eye(8)[list(values)]
        return Adapter.of([LoraLayer(TEXT[0], rows, rows.T * torch.tensor(list(values.values())))], name=name).with_(triggers=(name,))

    def test_by_hand(self):
        """Side by side the directions are 4, 3 (ada) and 2, 1 (ben): rank 2 keeps all of ada and nothing of ben."""
        adapters = [self.diagonal("ada", {0: 4.0, 1: 3.0}), self.diagonal("ben", {2: 2.0, 3: 1.0})]
        found = preflight(adapters, rank=2)
        assert found.losses == {"ada": pytest.approx(0, abs=1e-6), "ben": pytest.approx(1)}
        assert preflight(adapters, rank=3).losses["ben"] == pytest.approx((1 / 5) ** 0.5)
        assert preflight(adapters, rank=1).losses["ada"] == pytest.approx((9 / 25) ** 0.5)
        assert found.enough == 4 and preflight(adapters, rank=4).verdict == "merge"
        assert found.verdict == "merge with care" and "rank 4 loses at most 5%" in found.of("warn")[0].message

    def test_shared_directions_cost_nothing(self):
        adapters = [self.diagonal("ada", {0: 4.0}), self.diagonal("ben", {0: -1.0})]
        assert preflight(adapters, rank=1).losses == {"ada": pytest.approx(0, abs=1e-6), "ben": pytest.approx(0, abs=1e-6)}

    def test_one_adapter_loses_what_its_own_svd_loses(self):
        layer = LoraLayer(TEXT[0], torch.randn(5, 9), torch.randn(7, 5), 0.3)
        values = torch.linalg.svdvals(layer.delta(torch.float64))
        expected = float(values[2:].norm() / values.norm())
        for one in (layer, DenseLayer(TEXT[0], layer.delta())):
            assert preflight([Adapter.of([one], name="x")], rank=2).losses["x"] == pytest.approx(expected, rel=1e-5)

    def test_of_mixed_ranks_and_layers(self, shared):
        adapters = [concept(shared, name, KEYS, rank=rank, seed=rank, triggers=(name,)) for name, rank in (("ada", 1), ("ben", 3))]
        losses = [preflight(adapters, rank=rank).losses for rank in (1, 2, 3, 4)]
        assert all(a[name] >= b[name] for a, b in itertools.pairwise(losses) for name in a)
        assert max(losses[-1].values()) < 1e-6
