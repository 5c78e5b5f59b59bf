"""Packs: what is in them depends on nobody else, so that adding and removing are the same as never having done otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from concepts import KEYS, SMALL, SPATIAL, TEXT, concept, fingerprint, lora, three
from safetensors import safe_open
from test_collect import assert_moments, fused, hooked, prompts, states

from loraclr import Pack, linalg, statistics
from loraclr.adapter import Adapter, DenseLayer, LoraLayer, ProductLayer
from loraclr.blocks import attention_places, multipliers
from loraclr.cli import main
from loraclr.errors import FormatError, LoraclrError, MergeError
from loraclr.formats import load_adapter, save_adapter
from loraclr.merge import merge
from loraclr.pack import file
from loraclr.pack.file import PackFile
from loraclr.pipeline import Pipeline
from loraclr.statistics import Moments

TINY = replace(SMALL, steps=1, spatial=1, sample=0)
KEPT = {"margin": 0.0}


@pytest.fixture(scope="module")
def shared(_tiny_original) -> Pipeline:
    return Pipeline(_tiny_original)


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_any_base_is_known_again(family):
    from families_twins import twin

    from loraclr.modules import fingerprint as known_by

    assert known_by(twin(family)) == known_by(twin(family)) != known_by(twin(family), vae=True)


@pytest.fixture(scope="module")
def whole(shared, tmp_path_factory) -> Pack:
    """Of ada, ben and cai; tests copy it before they change it."""
    return Pack.create(tmp_path_factory.mktemp("packs") / "whole", three(shared), base=shared, collection=TINY)


def copied(pack: Pack, path: Path) -> Pack:
    shutil.copytree(pack.path, path)
    return Pack.open(path)


def contents(pack: Pack | Path) -> dict[str, bytes]:
    path = pack.path if isinstance(pack, Pack) else pack
    return {found.name: found.read_bytes() for found in sorted(path.iterdir())}


def deltas(pack: Pack, **settings: object) -> Mapping[str, torch.Tensor]:
    return {layer.name: layer.delta(torch.float64) for layer in pack.build(**settings).adapter}


def assert_equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], tolerance: float = 1e-9) -> None:
    assert a.keys() == b.keys()
    for name, delta in a.items():
        assert (delta - b[name]).norm() <= tolerance * b[name].norm(), name


# --- laws


def test_what_is_kept_is_what_each_concept_sees_alone(tiny_pipe, shared, whole):
    """Keys behind the concept's own text encoder, the rest of the UNet under all of its own layers: plain diffusers says the same."""
    ada, statistics = three(shared)[0], whole.statistics()
    pipe, plain = fused(tiny_pipe, *ada), tiny_pipe()
    for name in KEYS:
        assert_moments(statistics[name].fit["ada"], states(pipe, prompts(TINY.fit, "ada woman")).flatten(0, 1))
        assert_moments(statistics[name].held_out["ada"], states(pipe, prompts(TINY.held_out, "ada woman")).flatten(0, 1))
        assert_moments(statistics[name].preserve, states(plain, TINY.preserve).flatten(0, 1))

    def run():
        generator = torch.Generator().manual_seed(0)
        said = prompts(TINY.fit[:1], "ada woman")
        pipe(said, num_inference_steps=1, guidance_scale=1.0, generator=generator, output_type="latent")

    for name in SPATIAL:
        assert_moments(statistics[name].fit["ada"], hooked(pipe, name, run), tolerance=1e-4)


@pytest.mark.parametrize("preset", ["loraclr", "loraclr:exact", "regmean"])
@pytest.mark.parametrize("layers", [TEXT, KEYS, SPATIAL], ids=["text", "keys", "spatial"])
def test_within_one_stage_a_build_is_the_staged_merge(shared, tmp_path, layers, preset):
    """Where no earlier stage was merged, own features are the staged ones; a layer-wise token among them counts texts alike for all."""
    ada, ben, cai = three(shared)
    some = [
        concept(shared, "ada", layers, rank=2, seed=1, triggers=ada.triggers),
        concept(shared, "ben", layers[:2], rank=3, seed=2, tokens=ben.tokens, triggers=ben.triggers),
        concept(shared, "cai", layers, rank=1, seed=3, triggers=cai.triggers),
    ]
    parameters = {} if preset == "regmean" else KEPT
    staged = merge(some, base=shared, method=preset, parameters=parameters, collection=TINY)
    built = Pack.create(tmp_path / "pack", some, base=shared, collection=TINY).build(method=preset, parameters=parameters)
    # A text that goes through alone and ten times at once differs in the last bits of float32, which `exact` has no ridge against.
    tolerance = 1e-3 if preset == "loraclr:exact" else 1e-6
    assert_equal(
        {x.name: x.delta(torch.float64) for x in built.adapter}, {x.name: x.delta(torch.float64) for x in staged.adapter}, tolerance
    )
    for kind in ("fit", "held_out"):
        assert built.mean_residual(kind) == pytest.approx(staged.mean_residual(kind), rel=1e-4)


def test_adding_is_as_if_it_had_been_there_from_the_start(shared, whole, tmp_path):
    ada, ben, cai = three(shared)
    pack = Pack.create(tmp_path / "pack", [cai, ada], base=shared, collection=TINY)
    before = contents(pack)
    pack = pack.add([ben], base=shared)
    assert before.items() <= contents(pack).items(), "the others' files are the same to the last byte"
    assert contents(pack) == contents(whole)
    assert_equal(deltas(pack), deltas(whole), 0.0)


def test_removing_is_as_if_it_had_never_been_there(shared, whole, tmp_path):
    for gone in ("ben", "ada"):  # ada is the only one with text encoder layers
        pack = copied(whole, tmp_path / gone).remove([gone])
        rest = [adapter for adapter in three(shared) if adapter.name != gone]
        scratch = Pack.create(tmp_path / f"without {gone}", rest, base=shared, collection=TINY)
        assert pack.concepts == scratch.concepts == tuple(sorted(adapter.name for adapter in rest))
        assert contents(pack).items() <= contents(whole).items()
        assert_equal(deltas(pack), deltas(scratch))
        again = pack.add([adapter for adapter in three(shared) if adapter.name == gone], base=shared)
        assert contents(again) == contents(whole)


def test_a_layer_that_nobody_had_is_collected_for_all_and_files_stay(shared, whole, tmp_path):
    ada, ben, cai = three(shared)
    pack = Pack.create(tmp_path / "pack", [cai], base=shared, collection=TINY)  # keys and values alone
    before = contents(pack)
    pack = pack.add([ben], base=shared).add([ada], base=shared)
    assert before.items() <= contents(pack).items()
    assert len([held for held in pack.files if held.concept == "cai"]) == 3
    assert_equal(deltas(pack), deltas(whole), 0.0)
    pack = pack.remove(["cai"])
    assert {held.concept for held in pack.files} == {None, "ada", "ben"}
    assert_equal(deltas(pack), deltas(copied(whole, tmp_path / "other").remove(["cai"])), 0.0)


def test_the_order_of_inputs_is_irrelevant(shared, whole, tmp_path):
    pack = Pack.create(tmp_path / "pack", three(shared)[::-1], base=shared, collection=TINY)
    assert contents(pack) == contents(whole)


def test_weights_by_block_scale_layers(shared, whole):
    """Each layer is that of a build with its number as the adapter's weight, and the whole that of a merge of scaled layers."""
    places = attention_places(layer.name for adapter in three(shared) for layer in adapter)
    numbers = [0.25, *(0.5 + index for index in range(len(places)))]
    factors = multipliers(whole.statistics(), numbers, places)
    assert len(set(factors.values())) > 2
    found = deltas(whole, block_weights={"ada": numbers})
    alike = {factor: deltas(whole, weights={"ada": factor}) for factor in set(factors.values())}
    assert_equal(found, {name: alike[factor][name] for name, factor in factors.items()}, 1e-6)
    ada, *others = (whole.concept(name).adapter for name in whole.concepts)
    scaled = ada.with_(layers={name: replace(layer, scale=layer.scale * factors[name]) for name, layer in ada.layers.items()})
    by_hand = merge([scaled, *others], method="loraclr", parameters=KEPT, statistics=whole.statistics())
    assert_equal(found, {layer.name: layer.delta(torch.float64) for layer in by_hand.adapter}, 1e-6)
    assert whole.build(block_weights={"ada": numbers}).inputs[0]["block_weights"] == numbers


def test_a_build_is_linear_in_the_weights(whole):
    """What the concepts saw is kept at weight 1, so D = (sum_i w_i a_i D_i G_i)(...)^-1."""
    both = deltas(whole, weights={"ada": 0.5, "ben": -2.0, "cai": 0.0})
    ada = deltas(whole, weights={"ada": 1.0, "ben": 0.0, "cai": 0.0})
    ben = deltas(whole, weights={"ada": 0.0, "ben": 1.0, "cai": 0.0})
    assert_equal(both, {name: 0.5 * ada[name] - 2.0 * ben[name] for name in both}, 1e-6)  # merged layers are float32


def test_one_concept_comes_back(shared, whole, tmp_path):
    ada = three(shared)[0]
    alone = copied(whole, tmp_path / "pack").remove(["ben", "cai"])
    built = alone.build(parameters={"ridge": 1e-9, "preservation": 0.0})
    assert built.mean_residual("fit") < 1e-3 and [layer.layer for layer in built.layers if layer.stage == 0] == sorted(TEXT)
    assert {layer.name for layer in built.adapter} == set(ada.layers)


def test_building_needs_no_base_and_repeats_to_the_last_bit(whole, tmp_path):
    one, two = (replace(whole.build(), seconds={}).save(tmp_path / f"{name}.safetensors") for name in "ab")
    assert one.read_bytes() == two.read_bytes()


def test_a_build_looks_at_one_layer_at_a_time(whole, monkeypatch):
    seen: list[str] = []
    read = PackFile.moments
    monkeypatch.setattr(PackFile, "moments", lambda self, kind, layer: seen.append(layer) or read(self, kind, layer))
    whole.build()
    runs = [layer for layer, before in zip(seen, [None, *seen], strict=False) if layer != before]
    assert sorted(runs) == sorted({*TEXT, *KEYS, *SPATIAL}), "each layer's statistics are read once, together"


# --- one file


def test_an_adapter_is_kept_to_the_last_bit(shared, tmp_path):
    block, deep = SPATIAL[0], SPATIAL[3]
    low = lora(shared, KEYS[0], rank=2, seed=1)
    layers = [
        *(LoraLayer(name, low.down.to(kind), low.up.to(kind), 1 / 3) for name, kind in zip(KEYS, KINDS_OF_FLOAT, strict=True)),
        lora(shared, deep, rank=2, seed=2),
        DenseLayer(block, lora(shared, block, rank=2, seed=3).delta().half()),
        ProductLayer(SPATIAL[1], (64, 64), lambda kind: torch.full((64, 64), 1 / 3, dtype=kind)),
    ]
    tokens = {"<x>": torch.randn(10, 32)}
    mine = Adapter.of(layers, name="x").with_(tokens=tokens, triggers=("x man", "y"), family="toy", metadata={"a": "b"})
    pack = Pack.create(tmp_path / "pack", [mine], base=shared, collection=TINY)
    kept = pack.concept("x")
    assert kept.call == "<x>" and kept.adapter == mine
    assert (kept.adapter.triggers, kept.adapter.family, kept.adapter.metadata) == (mine.triggers, "toy", {"a": "b"})
    for name in KEYS:
        ours, theirs = kept.adapter.layers[name], mine.layers[name]
        assert (ours.scale, ours.down.dtype) == (theirs.scale, theirs.down.dtype)
        assert torch.equal(ours.down, theirs.down) and torch.equal(ours.up, theirs.up)


KINDS_OF_FLOAT = (torch.float16, torch.bfloat16, torch.float64)
# What a file that only has statistics says of itself.
ABOUT = dict.fromkeys(file.HELD) | {
    "base": {"source": "base", "sha256": "0"}, "collection": {}, "versions": {}, "texts": 1, "layers": {},
}  # fmt: skip


@pytest.mark.parametrize("count", [3, 140])
def test_moments_come_back_and_equal_ones_are_stored_once(tmp_path, count):
    moments, other = (Moments.of(torch.randn(count, 100)) for _ in "ab")
    table, entries = file.moments_entries({"fit": {"a": moments, "b": moments, "c": other}, "held_out": {"a": other}})
    assert len(entries) == 2
    file.write(tmp_path / "x.safetensors", ABOUT | {"moments": table}, entries)
    held = PackFile(tmp_path / "x.safetensors")
    for kind, layer, expected in (("fit", "b", moments), ("fit", "c", other), ("held_out", "a", other)):
        found = held.moments(kind, layer)
        assert (found.width, found.count) == (100, count) and (found.rows is None) == (count > 100)
        assert torch.equal(found.gram().tril(), expected.gram().tril()) and torch.equal(found.gram(), found.gram().T)
    assert held.moments("fit", "d") is None and held.moments("preserve", "a") is None
    if count > 100:
        with safe_open(tmp_path / "x.safetensors", "pt") as opened:
            assert opened.get_tensor("moments/0").numel() == linalg.half_size(100) < 8000


def test_sketches_come_back(tmp_path, monkeypatch):
    for module in (statistics, file):
        monkeypatch.setattr(module, "WIDEST", 5)
        monkeypatch.setattr(module, "SKETCH", 4)
    moments = Moments.of(torch.randn(30, 6))
    table, entries = file.moments_entries({"fit": {"a": moments}})
    file.write(tmp_path / "x.safetensors", ABOUT | {"moments": table}, entries)
    again = PackFile(tmp_path / "x.safetensors").moments("fit", "a")
    assert again.sketched and again.count == 30 and torch.equal(again.rows, moments.rows)


def test_headers_say_what_was_collected_from_what(shared, tmp_path):
    path = save_adapter(three(shared)[2], tmp_path / "cai.safetensors", dtype=torch.float32)
    pack = Pack.create(tmp_path / "pack", [path], base=shared, calls={"cai": "my cai"}, collection=replace(TINY, seed=3))
    with safe_open(pack.path / "cai.safetensors", "pt") as opened:
        said = json.loads(opened.metadata()["loraclr.pack"])
    import hashlib

    assert said["input"] == {"file": "cai.safetensors", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert said["call"] == "my cai" and said["layers"] == dict.fromkeys(KEYS, "keys")
    assert (said["collection"]["seed"], said["collection"]["steps"], said["collection"]["fit"]) == (3, 1, list(TINY.fit))
    assert len(said["base"]["sha256"]) == 64 and said["base"]["source"] == shared.source
    result = pack.build()
    assert [(entry["file"], entry["sha256"], entry["call"]) for entry in result.inputs] == [(*said["input"].values(), "my cai")]
    assert result.base == shared.source and result.seed == 3 and "diffusers" in result.versions
    assert result.receipt()["collection"]["under"] == "each concept's own adapter"
    assert result.parameters["margin"] == 0.0


# --- killed


def stopping_at(name: str):
    """A `progress` that is like Ctrl-C when that concept's turn comes."""

    def progress(what: str, share: float) -> None:
        if name in what:
            raise KeyboardInterrupt

    return progress


def test_a_broken_creation_leaves_nothing_there_and_goes_on(shared, whole, tmp_path):
    before = fingerprint(shared)
    with pytest.raises(KeyboardInterrupt):
        Pack.create(tmp_path / "pack", three(shared), base=shared, collection=TINY, progress=stopping_at("ben"))
    assert not (tmp_path / "pack").exists() and fingerprint(shared) == before
    done: list[str] = []
    pack = Pack.create(tmp_path / "pack", three(shared), base=shared, collection=TINY, progress=lambda what, share: done.append(what))
    assert done == ["collecting: ben", "collecting: cai", "collecting"], "ada was ready"
    assert contents(pack) == contents(whole) and [found.name for found in tmp_path.iterdir()] == ["pack"]
    again = Pack.create(tmp_path / "pack", three(shared), base=shared, collection=TINY, progress=lambda *_: pytest.fail("it was ready"))
    assert contents(again) == contents(whole)


def test_what_an_earlier_try_left_of_other_adapters_is_not_used(shared, whole, tmp_path):
    ada, ben, cai = three(shared)
    changed = ada.with_(layers={name: replace(layer, scale=2.0) for name, layer in ada.layers.items()})
    with pytest.raises(KeyboardInterrupt):
        Pack.create(tmp_path / "pack", [changed, ben, cai], base=shared, collection=TINY, progress=stopping_at("cai"))
    pack = Pack.create(tmp_path / "pack", [ada, cai], base=shared, collection=TINY)
    assert pack.concepts == ("ada", "cai")
    assert contents(pack) == {name: data for name, data in contents(whole).items() if name != "ben.safetensors"}


def test_what_an_earlier_try_left_of_another_base_stays(shared, tiny_pipe, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Pack.create(tmp_path / "pack", three(shared), base=shared, collection=TINY, progress=stopping_at("ben"))
    left = contents(tmp_path / ".pack.making")
    pipe = tiny_pipe()
    pipe.text_encoder.get_input_embeddings().weight.data[0] += 1
    refused(r"\.pack\.making is another pack", Pack.create, tmp_path / "pack", three(shared)[1:], base=Pipeline(pipe), collection=TINY)
    assert contents(tmp_path / ".pack.making") == left and set(left) == {"ada.safetensors", "preservation.safetensors"}


def test_a_broken_addition_leaves_a_pack_that_builds(shared, tmp_path):
    _, ben, cai = three(shared)
    pack = Pack.create(tmp_path / "pack", [cai], base=shared, collection=TINY)
    before = deltas(pack)

    with pytest.raises(KeyboardInterrupt):
        pack.add([ben], base=shared, progress=stopping_at("ben"))  # when cai was run once more
    assert_equal(deltas(Pack.open(pack.path)), before, 0.0)
    assert Pack.open(pack.path).add([ben], base=shared).concepts == ("ben", "cai")


# --- what is refused


def refused(match: str, call, *arguments: object, **settings: object) -> None:
    with pytest.raises(LoraclrError, match=match):
        call(*arguments, **settings)


def test_another_base_is_refused(shared, whole, tiny_pipe, tmp_path):
    pipe = tiny_pipe()
    pipe.unet.conv_in.weight.data[0, 0, 0, 0] += 1e-3
    other, pack = Pipeline(pipe), copied(whole, tmp_path / "pack")
    before = contents(pack)
    extra = concept(shared, "dan", KEYS, rank=1, seed=4, triggers=("dan man",))
    refused("made on the base .*, not on", pack.add, [extra], base=other)
    refused("made on the base .*, not on", Pack.create, pack.path, three(shared), base=other, collection=TINY)
    assert contents(pack) == before
    foreign = Pack.create(tmp_path / "foreign", [extra], base=other, collection=TINY)
    shutil.copy(foreign.path / "dan.safetensors", pack.path)
    refused("dan.safetensors does not belong to .* made on the base", Pack.open, pack.path)


def test_other_settings_are_refused(shared, whole, tmp_path):
    pack = copied(whole, tmp_path / "pack")
    refused("other settings, seed 0", Pack.create, pack.path, three(shared), base=shared, collection=replace(TINY, seed=1))
    extra = concept(shared, "dan", KEYS, rank=1, seed=4, triggers=("dan man",))
    foreign = Pack.create(tmp_path / "foreign", [extra], base=shared, collection=replace(TINY, steps=2))
    shutil.copy(foreign.path / "dan.safetensors", pack.path)
    refused("dan.safetensors does not belong to .* steps 2", Pack.open, pack.path)


def test_concepts_that_do_not_go_together_are_refused(shared, whole, tmp_path):
    pack = copied(whole, tmp_path / "pack")
    before = contents(pack)
    other = concept(shared, "ada", KEYS, rank=1, seed=9, triggers=("ada woman",))
    refused("holds another ada; remove that first", pack.add, [other], base=shared)
    refused("no trigger words", pack.add, [concept(shared, "dan", KEYS, rank=1, seed=4)], base=shared)
    family = concept(shared, "dan", KEYS, rank=1, seed=4, triggers=("dan man",)).with_(family="sd1")
    refused("different model families", pack.add, [family], base=shared)
    refused(
        "exists already, with ada, ben, cai; use `loraclr pack add`",
        Pack.create,
        pack.path,
        three(shared)[:2],
        base=shared,
        collection=TINY,
    )
    refused("holds no eve; it has ada, ben, cai", pack.remove, ["ada", "eve"])
    assert contents(pack) == before


def test_a_method_that_needs_more_is_refused(whole):
    refused("loraclr needs the base's weights and paired rows.*set margin=0", whole.build, method="loraclr:contrastive")
    refused("loraclr needs .*paired rows", whole.build, parameters={"margin": 0.5})
    refused("custom-diffusion needs the released code's few unpadded prompts", whole.build, method="custom-diffusion")
    refused("weights were given for eve", whole.build, weights={"eve": 1.0})
    refused("block weights were given for 'eve', but the adapters are ada, ben, cai", whole.build, block_weights={"eve": [1.0]})
    refused("ada has 1 block weights; .* are needed, BASE and one for each", whole.build, block_weights={"ada": [1.0]})
    refused("importance has 2 numbers for 3 concepts", whole.build, parameters={"importance": (1.0, 2.0)})
    assert whole.build(method="sum", parameters={"scale": 0.5}).mean_residual() > 0, "weights alone will do, and are measured"


def test_a_ridge_is_chosen_by_held_out_prompts_only_where_the_pack_has_them(whole, shared, tmp_path):
    assert whole.build(parameters={"choose": "held_out"}).layers[0].diagnostics["chosen_on"] == "held_out"
    without = replace(TINY, spatial_held_out=0)
    quick = Pack.create(tmp_path / "quick", three(shared)[:1], base=shared, collection=without)
    refused("held-out prompts, but none runs the UNet", quick.build, parameters={"choose": "held_out"})


def test_damage_is_told(whole, tmp_path):
    pack = copied(whole, tmp_path / "pack")
    data = (pack.path / "ben.safetensors").read_bytes()
    (pack.path / "ben.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError, match=r"ben\.safetensors"):
        Pack.open(pack.path)
    (pack.path / "ben.safetensors").unlink()
    assert Pack.open(pack.path).concepts == ("ada", "cai")
    (pack.path / "preservation.safetensors").unlink()
    refused("is no pack; make one", Pack.open, pack.path)
    save_adapter(whole.concept("ada").adapter, pack.path / "ada.safetensors")
    refused("is no file of a pack", Pack.open, pack.path)
    refused("is no pack; make one", Pack.open, tmp_path / "nowhere")
    refused("there is no folder", Pack.create, tmp_path / "a" / "b", [], base=None)


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said["adapter"].update(scalse=said["adapter"].pop("scales")),
        lambda said: said["adapter"].update(scales=[]),
        lambda said: said["adapter"]["scales"].popitem(),
        lambda said: said["adapter"]["scales"].update(nothing=1.0),
        lambda said: said["adapter"].update(tokens={"a": 1}),
        lambda said: said["layers"].update(dict.fromkeys(said["layers"], "somewhere")),
        lambda said: said["moments"]["fit"].update({layer: [0] for layer in said["moments"]["fit"]}),
        lambda said: said["moments"]["fit"].clear(),
        lambda said: said["collection"].update(fit=3),
        lambda said: said.update(concept=None),
        lambda said: said.update(texts="many"),
    ],
)
def test_a_damaged_header_is_told(whole, tmp_path, capsys, change):
    pack = copied(whole, tmp_path / "pack")
    path = pack.path / "ben.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    said = json.loads(header["__metadata__"][file.MARK])
    change(said)
    text = json.dumps(header | {"__metadata__": {file.MARK: json.dumps(said)}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    assert main(["pack", "build", str(pack.path), "--output", str(tmp_path / "out.safetensors")]) == 1
    assert "ben" in (told := capsys.readouterr().err) or "statistics" in told
    assert "Traceback" not in told and not (tmp_path / "out.safetensors").exists()


def test_a_pack_without_concepts_or_with_a_file_gone_does_not_build(shared, whole, tmp_path):
    pack = copied(whole, tmp_path / "pack").remove(["ada", "ben", "cai"])
    with pytest.raises(MergeError, match="holds no concept"):
        pack.build()
    cai, ben = three(shared)[2], three(shared)[1]
    pack = Pack.create(tmp_path / "other", [cai], base=shared, collection=TINY).add([ben], base=shared)
    (pack.path / "cai (2).safetensors").unlink()
    with pytest.raises(MergeError, match="cai lacks statistics of 4 layers"):
        Pack.open(pack.path).build()


# --- the command line


def test_the_commands(shared, tmp_path, capsys):
    shared.pipe.save_pretrained(tmp_path / "base")
    ada, ben, cai = (save_adapter(adapter, tmp_path / f"{adapter.name}.safetensors") for adapter in three(shared))

    def call(*words: object, code: int = 0) -> str:
        assert main([str(word) for word in ("pack", *words)]) == code
        said = capsys.readouterr()
        return said.out if code == 0 else said.err

    (tmp_path / "with.txt").write_text("a {} on a table\n")
    (tmp_path / "without.txt").write_text("a vase\n")
    words = ("create", cai, "--base", tmp_path / "base", "--output", tmp_path / "things")
    call(*words, "--prompts", tmp_path / "with.txt", "--preserve", tmp_path / "without.txt")
    said = json.loads(call("show", tmp_path / "things", "--json"))["collection"]
    assert (said["fit"], said["preserve"]) == (["a {} on a table"], ["", "a vase"])
    assert "other settings, fit prompts, preserve prompts; give what it was made with" in call(*words, code=1)
    pack, out = tmp_path / "people", tmp_path / "out.safetensors"
    shown = call("create", cai, ben, "--base", tmp_path / "base", "--output", pack, "--trigger", "cai=cai man")
    assert "ben" in shown and "cai man" in shown and "2 concepts" in shown and f"on {tmp_path / 'base'}" in shown
    assert "another ben" in call("add", pack, ben, "--trigger", "ben=somebody", code=1)
    call("add", pack, ada)
    call("remove", pack, "cai")
    listed = json.loads(call("show", pack, "--json"))
    assert [row["name"] for row in listed["concepts"]] == ["ada", "ben"] and listed["collection"]["seed"] == 0
    assert listed["bytes"] == sum(path.stat().st_size for path in pack.iterdir())
    said = call("build", pack, "--output", out, "--set", "ridge=0.01", "--weight", "ben=0.5", "--rank", "2")
    assert "written" in said and "text encoder" in said and "cross-attention keys" in said
    receipt = json.loads((tmp_path / "out.safetensors.json").read_text())
    assert [entry["weight"] for entry in receipt["inputs"]] == [1.0, 0.5] and receipt["parameters"]["ridge"] == 0.01
    assert load_adapter(out).ranks[-1] <= 2
    blocks = ",".join(["0"] * (1 + len(attention_places(layer.name for layer in three(shared)[0]))))
    assert "block_weights" in call("build", pack, "--output", out, "--force", "--json", "--block-weights", f"ada={blocks}")
    inputs = json.loads((tmp_path / "out.safetensors.json").read_text())["inputs"]
    assert [entry["block_weights"] and set(entry["block_weights"]) for entry in inputs] == [{0.0}, None]
    assert "exists already" in call("build", pack, "--output", out, code=1)
    assert json.loads(call("build", pack, "--output", out, "--force", "--json"))["method"] == "loraclr"
    assert "no parameter 'rigde'" in call("build", pack, "--output", tmp_path / "x.safetensors", "--set", "rigde=1", code=1)
