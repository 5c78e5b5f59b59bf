"""A merged file against its sources: right merges pass, and each way of being wrong is found and named."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from concepts import KEYS, SMALL, TEXT, three
from safetensors.torch import load_file, save_file

from loraclr.adapter import Adapter, DenseLayer, LoraLayer
from loraclr.collect import Collection
from loraclr.errors import FormatError, UsageError
from loraclr.formats import load_adapter, save_adapter
from loraclr.merge import merge
from loraclr.pack import Pack
from loraclr.pipeline import Pipeline
from loraclr.verify import verify

MODULE = sys.modules[verify.__module__]


@pytest.fixture(scope="module")
def shared(_tiny_original) -> Pipeline:
    return Pipeline(_tiny_original)


@pytest.fixture
def files(shared, tmp_path):
    return [save_adapter(one, tmp_path / f"{one.name}.safetensors", dtype=torch.float32) for one in three(shared)]


def saved(files, tmp_path, method="sum", **settings):
    return merge(files, method=method, **settings).save(tmp_path / "merged.safetensors")


def rewritten(path, change, metadata=None):
    """The file with its tensors changed by somebody else's tool."""
    tensors = load_file(path)
    save_file({key: value.contiguous() for key, value in change(tensors).items()}, path, metadata or {})
    return path


def test_a_sum_has_every_concept_at_its_weight(files, tmp_path):
    found = verify(saved(files, tmp_path, weights=[1, 0.5, 2]), files)
    assert found.good and found.space == "weights" and found.missing == found.extra == found.underflow == ()
    assert [one.meant for one in found.concepts] == [1, 0.5, 2]
    assert [one.strength for one in found.concepts] == pytest.approx([1, 0.5, 2], rel=1e-3)
    assert max(one.residual for one in found.concepts) < 1e-2


def test_half_the_strength_is_found_whatever_made_it(files, tmp_path):
    """As of tools that apply a ratio to both factors, or alpha / rank twice."""
    path = rewritten(saved(files, tmp_path), lambda t: {key: v / 2 if key.endswith("lora_up.weight") else v for key, v in t.items()})
    found = verify(path, files)
    assert [one.strength for one in found.concepts] == pytest.approx([0.5] * 3, rel=1e-3)
    assert len(found.wrong) == 3 and "ada has strength 0.50 at 1.0 where 1 was meant" in found.wrong[0]
    assert verify(path, files, weights=[0.5] * 3).good


def test_weights_by_block_are_those_of_the_receipt(files, tmp_path):
    path = saved(files, tmp_path, block_weights={"ada": [0.5, 2.0, 0.0]})
    found = verify(path, files)
    assert found.good, found.wrong
    assert [one.strength for one in found.concepts] == pytest.approx([1] * 3, rel=1e-2)
    assert max(one.residual for one in found.concepts) < 1e-2


def test_missing_and_foreign_layers(files, tmp_path, shared):
    stem = f"lora_te_text_model_{TEXT[0].removeprefix('text_encoder.').replace('.', '_')}"
    path = rewritten(saved(files, tmp_path), lambda t: {key: value for key, value in t.items() if not key.startswith(stem + ".")})
    found = verify(path, files)
    assert found.missing == (TEXT[0],) and any("1 layers are missing" in wrong for wrong in found.wrong)
    found = verify(saved(files, tmp_path), files[2:])
    assert len(found.extra) == 6 and any("of none of the sources" in note for note in found.notes)


def test_lost_and_foreign_tokens(files, tmp_path):
    path = saved(files, tmp_path)
    beside = tmp_path / "merged.tokens.safetensors"
    tokens = load_file(beside)
    save_file({"<ben>": tokens["<ben>"] + 1}, beside, {"loraclr.tokens": "1"})
    assert any("the learned tokens <ben> are missing or others" in wrong for wrong in verify(path, files).wrong)
    beside.unlink()
    assert len(verify(path, files).wrong) == 1


def test_underflow_by_hand(tmp_path):
    """Numbers of 1e-6 are 17 of the smallest steps of half precision: about a sixtieth is lost. Those of 1e-4 keep their three digits."""
    for size, lost in ((1e-4, ()), (1e-6, (KEYS[0],))):
        layer = LoraLayer(KEYS[0], size * torch.randn(2, 32), torch.randn(64, 2))
        source = save_adapter(Adapter.of([layer], name="a"), tmp_path / "a.safetensors", dtype=torch.float32)
        stem = f"lora_unet_{KEYS[0].removeprefix('unet.').replace('.', '_')}"
        tensors = {f"{stem}.lora_down.weight": layer.down.half(), f"{stem}.lora_up.weight": layer.up.half()}
        save_file(tensors, tmp_path / "m.safetensors")
        found = verify(tmp_path / "m.safetensors", [source])
        assert found.underflow == lost and found.good == (not lost)


@pytest.mark.parametrize(("size", "lost"), [(1e-4, ()), (1e-6, (KEYS[0],))])
def test_underflow_of_a_full_difference(size, lost, tmp_path):
    """Entries of 1e-4 are more than ordinary steps; that most are exactly zero loses nothing."""
    change = size * torch.randn(64, 32)
    change[4:] = 0
    source = save_adapter(Adapter.of([DenseLayer(KEYS[0], change)], name="a"), tmp_path / "a.safetensors", dtype=torch.float32)
    save_file({f"lora_unet_{KEYS[0].removeprefix('unet.').replace('.', '_')}.diff": change.half()}, tmp_path / "m.safetensors")
    found = verify(tmp_path / "m.safetensors", [source])
    assert found.underflow == lost and found.good == (not lost)


def test_not_a_number_is_an_error_of_the_reader(files, tmp_path):
    path = rewritten(saved(files, tmp_path), lambda t: {key: value * float("nan") for key, value in t.items()})
    with pytest.raises(FormatError, match="NaN"):
        verify(path, files)


def test_a_header_of_other_tensors(files, tmp_path):
    path = saved(files, tmp_path)
    stale = {"modelspec.hash_sha256": load_adapter(path).metadata["modelspec.hash_sha256"]}
    assert verify(rewritten(path, lambda t: t, stale), files).good
    changed = rewritten(path, lambda t: {key: value * 1.01 if "lora_up" in key else value for key, value in t.items()}, stale)
    assert any("other tensors" in wrong for wrong in verify(changed, files).wrong)


def test_by_features_one_adapter_is_itself(files, tmp_path, shared):
    found = verify(saved(files[:1], tmp_path), files[:1], base=shared, collection=SMALL)
    assert found.good and found.space == "features"
    assert found.concepts[0].strength == pytest.approx(1, rel=1e-3) and found.concepts[0].residual < 1e-2


def test_by_features_strengths_are_those_that_the_merge_measured(files, tmp_path, shared):
    result = merge(files, base=shared, collection=SMALL)
    found = verify(result.save(tmp_path / "merged.safetensors", dtype=torch.float32), files, base=shared, collection=SMALL)
    assert [one.strength for one in found.concepts] == pytest.approx(result.cross_talk.after.diagonal().tolist(), rel=1e-2)


def test_a_file_that_names_no_sources_is_judged_by_the_receipt_beside_it(files, tmp_path, shared):
    merged = merge(files, base=shared, collection=SMALL, parameters={"ridge": 1e-3}).save(tmp_path / "m.safetensors", sources=False)
    assert "loraclr.receipt" not in load_adapter(merged).metadata
    assert verify(merged, files, base=shared, collection=SMALL).good
    merged.with_name("m.safetensors.json").unlink()  # then it can only be taken for a sum
    assert not verify(merged, files, base=shared, collection=SMALL).good


def test_by_features_a_merge_by_features_keeps_what_an_average_loses(files, tmp_path, shared):
    merged = saved(files, tmp_path, "loraclr", base=shared, collection=SMALL, parameters={"ridge": 1e-3, "preservation": 0.0})
    with pytest.raises(UsageError, match="merged by features .loraclr., which only a base can show; pass --base"):
        verify(merged, files)
    kept = verify(merged, files, base=shared, collection=SMALL)
    halved = rewritten(
        merged,
        lambda t: {key: v / 2 if key.endswith("lora_up.weight") else v for key, v in t.items()},
        {"loraclr.receipt": load_adapter(merged).metadata["loraclr.receipt"]},
    )
    assert any("where its receipt says" in wrong for wrong in verify(halved, files, base=shared, collection=SMALL).wrong)
    average = verify(saved(files, tmp_path, "average"), files, base=shared, collection=SMALL)
    assert all(one.residual < other.residual for one, other in zip(kept.concepts, average.concepts, strict=True))
    assert not average.good and all(one.strength < 0.5 for one in average.concepts)
    assert kept.good, kept.wrong
    assert all(0.5 < one.strength < 1.25 for one in kept.concepts)


def test_what_a_pack_built_is_measured_as_the_pack_collected_it(files, tmp_path, shared):
    """Each concept behind its own text encoder: the very residuals of the receipt. Behind the merged one they are others."""
    settings = replace(SMALL, steps=1, spatial=1, sample=0)
    pack = Pack.create(tmp_path / "pack", files, base=shared, collection=settings)
    built = pack.build(parameters={"ridge": 1e-3, "preservation": 0.0}, weights={"ben": 0.5})
    found = verify(built.save(tmp_path / "merged.safetensors", dtype=torch.float32), files, base=shared, collection=settings)
    assert found.good, found.wrong
    for one in found.concepts:
        assert one.residual == pytest.approx(built.mean_residual("fit", concept=one.name), rel=1e-3)


@pytest.mark.parametrize(
    ("said", "steps"),
    [
        *[({}, 3), ({"precision": "bfloat16", "steps": 5}, 5), ({"steps": 10**9}, None), ({"steps": 0}, None)],
        *[({"spatial": wrong}, None) for wrong in ("x", 2.5, math.nan)],
        *[({"fit": wrong}, None) for wrong in (["no place"], [3])],
    ],
)
def test_what_a_merge_collected_is_collected_again(files, tmp_path, shared, said, steps):
    """As its header says, but not whatever its header says: with None, what is usual."""
    settings = replace(SMALL, steps=3, padded=False, spatial=1)
    header = load_adapter(saved(files, tmp_path, "loraclr", base=shared, collection=settings)).metadata
    receipt = json.loads(header["loraclr.receipt"])
    assert receipt["collection"] == {"steps": 3, "spatial": 1, "padded": False, "precision": "float32", "fit": list(SMALL.fit)}
    found = MODULE._collected({**receipt, "collection": receipt["collection"] | said})
    usual = Collection()
    expected = (usual.steps, usual.spatial, usual.fit) if steps is None else (steps, 1, SMALL.fit)
    assert (found.steps, found.spatial, found.fit) == expected
    assert MODULE._collected({**receipt, "collection": None}).steps == usual.steps, "files of before"


def test_what_is_asked_of_the_caller(files, tmp_path, shared):
    path = saved(files, tmp_path)
    with pytest.raises(UsageError, match="under a name of its own"):
        verify(path, [files[0], files[0]])
    with pytest.raises(UsageError, match="3 sources and 1 weights"):
        verify(path, files, weights=[1])
    with pytest.raises(UsageError, match="trigger was given for .eve., but the sources are ada, ben, cai"):
        verify(path, files, calls={"eve": "eve woman"})
    silent = save_adapter(load_adapter(files[2]).with_(triggers=(), metadata={}), tmp_path / "silent.safetensors")
    with pytest.raises(UsageError, match="--trigger silent=WORDS"):
        verify(path, [silent], base=shared, collection=SMALL)
    assert json.dumps([vars(one) for one in verify(path, files).concepts])
