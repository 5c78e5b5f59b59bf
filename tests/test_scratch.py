"""Statistics on disk: equal to those in memory to the last bit, gone afterwards, and one clear error where the disk is not enough."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
import torch
from concepts import KEYS, SMALL, SPATIAL, TEXT, concept, three
from hypothesis import given
from hypothesis import strategies as st
from problems import make_problem

from loraclr import linalg, scratch
from loraclr.cli import main
from loraclr.collect import QUICK, Concept, collect
from loraclr.errors import LoraclrError, WriteError
from loraclr.formats import save_adapter
from loraclr.merge import merge
from loraclr.methods import make_method, method_names, residuals
from loraclr.pipeline import Pipeline
from loraclr.scratch import Lent, Scratch
from loraclr.statistics import LayerStats, Moments, load_statistics, save_statistics


@pytest.fixture(scope="module")
def pipeline(_tiny_original) -> Pipeline:
    return Pipeline(_tiny_original)


@pytest.fixture
def concepts(pipeline) -> list[Concept]:
    return [Concept(adapter, adapter.call) for adapter in three(pipeline)]


def on_disk(stats: LayerStats, room: Scratch) -> LayerStats:
    def put(moments):
        return room.moments({"": moments})[""]

    return LayerStats(
        stats.layer,
        {name: put(moments) for name, moments in stats.fit.items()},
        {name: put(moments) for name, moments in stats.held_out.items()},
        stats.preserve and put(stats.preserve),
        stats.sample,
    )


@pytest.mark.parametrize("width", [1, 5, linalg.BLOCK, linalg.BLOCK + 1, 2 * linalg.BLOCK + 60])
@pytest.mark.parametrize("count", [3, 700])
def test_what_comes_back_is_what_went_in(tmp_path, width, count):
    rows = torch.randn(count, width)
    moments = Moments.of(rows)
    with Scratch(tmp_path, memory=0) as room:
        stored = room.moments({"layer": moments})["layer"]
        assert type(stored) is not Moments and (stored.width, stored.count, stored.few) == (width, count, moments.few)
        for a, b in ((stored.rows, moments.rows), (stored.square, moments.square), (stored.gram(), moments.gram())):
            assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b))
        delta, other = torch.randn(2, width, dtype=torch.float64), Moments.of(torch.randn(2, width))
        assert stored.energy(delta) == moments.energy(delta) and torch.equal(stored.inner(delta), moments.inner(delta))
        assert torch.equal(stored.scaled(0.3).gram(), moments.scaled(0.3).gram())
        for one, same in ((stored + other, moments + other), (other + stored, other + moments)):
            assert one.count == same.count and torch.equal(one.gram(), same.gram())


def test_half_of_a_gram_is_enough_and_features_take_four_bytes(tmp_path):
    width = 8 * linalg.BLOCK
    with Scratch(tmp_path, memory=0) as room:
        room.moments({"gram": Moments(width, 9999, None, torch.ones(width, width, dtype=torch.float64))})
        assert room.written == 8 * width * width * 9 / 16  # blocks up to and with the diagonal
    with Scratch(tmp_path, memory=0) as room:
        room.moments({"rows": Moments.of(torch.randn(3, 50))})
        assert room.written == 4 * 3 * 50
        exact = Moments.of(torch.randn(3, 50, dtype=torch.float64))  # float32 would round these
        assert torch.equal(room.moments({"": exact})[""].rows, exact.rows) and room.written == 4 * 150 + 8 * 150


def test_memory_comes_first_and_siblings_share(tmp_path):
    moments = Moments.of(torch.randn(99, 10))
    with Scratch(tmp_path, memory=2 * 800) as room:
        first = room.moments({"to_q": moments, "to_k": moments})
        assert first["to_q"] is first["to_k"] is moments and room.left == 800
        room.moments({"to_out": Moments.of(torch.randn(99, 10))})
        assert room.left == room.written == 0
        third = room.moments({"to_q": moments, "to_k": moments})
        assert third["to_q"] is third["to_k"] is not moments and room.written == 800


@pytest.mark.parametrize("method", [name for name in method_names() if "statistics" in make_method(name).needs])
def test_every_method_solves_from_the_disk_what_it_solves_from_memory(tmp_path, method):
    problem = make_problem(rows=20 if "loraclr" in method else 40)
    few = make_problem(width=90, rows=12)
    for one in (problem, few):
        parameters = {"steps": 3} if "reference" in method else {}
        with Scratch(tmp_path, memory=0) as room:
            spilled = dataclasses.replace(one, statistics=on_disk(one.statistics, room))
            expected, found = (make_method(method, **parameters).solve(dataclasses.replace(p)) for p in (one, spilled))
            assert torch.equal(found.delta(), expected.delta())
            assert residuals(spilled, found.delta()) == residuals(one, expected.delta())


@pytest.mark.parametrize("names", [TEXT, KEYS, SPATIAL], ids=["text", "keys", "spatial"])
def test_a_collection_on_disk_is_the_one_in_memory(pipeline, concepts, names, tmp_path):
    expected = collect(pipeline, concepts, names, settings=SMALL)
    with Scratch(tmp_path, memory=0) as room:
        found = collect(pipeline, concepts, names, settings=SMALL, scratch=room)
        assert room.written > 0
        for name in names:
            for kind in ("fit", "held_out"):
                for concept, moments in getattr(expected[name], kind).items():
                    assert torch.equal(getattr(found[name], kind)[concept].gram(), moments.gram())
            assert torch.equal(found[name].preserve.gram(), expected[name].preserve.gram())
            assert {key: rows.tolist() for key, rows in found[name].sample.items()} == {
                key: rows.tolist() for key, rows in expected[name].sample.items()
            }
        save_statistics(found, tmp_path / "s.safetensors")
    again = load_statistics(tmp_path / "s.safetensors")
    assert torch.equal(again[names[0]].fit["ada"].gram(), expected[names[0]].fit["ada"].gram())


def test_a_merge_through_the_disk_is_the_same_merge_and_leaves_nothing(pipeline, monkeypatch, tmp_path):
    adapters = three(pipeline)
    expected = merge(adapters, base=pipeline, collection=SMALL)
    assert expected.memory["disk"] == 0, "what fits into memory stays there"
    monkeypatch.setattr(scratch.Scratch.__init__, "__kwdefaults__", {"memory": 0})
    found = merge(adapters, base=pipeline, collection=SMALL, scratch=tmp_path)
    assert found.memory["disk"] > 0 and found.memory["peak"] > found.memory["disk"]
    assert all(torch.equal(a.up, b.up) and torch.equal(a.down, b.down) for a, b in zip(found.adapter, expected.adapter, strict=True))
    assert [dataclasses.asdict(layer) for layer in found.layers] == [dataclasses.asdict(layer) for layer in expected.layers]
    assert list(tmp_path.iterdir()) == []


def test_the_command_puts_it_beside_the_output_or_where_it_is_told(pipeline, monkeypatch, tmp_path, capsys):
    pipeline.pipe.save_pretrained(tmp_path / "base")
    files = [save_adapter(concept, tmp_path / f"{concept.name}.safetensors") for concept in three(pipeline)[::2]]
    places, passes, make = [], [], scratch.tempfile.TemporaryFile
    monkeypatch.setattr(scratch.tempfile, "TemporaryFile", lambda **where: places.append(where["dir"]) or make(**where))
    (tmp_path / "room").mkdir()
    shared = ["merge", *files, "--base", tmp_path / "base", "--quick"]
    for name, words in (("a", []), ("b", ["--scratch", tmp_path / "room"])):
        output = tmp_path / f"{name}.safetensors"
        assert main([str(word) for word in (*shared, "--output", output, *words)]) == 0
        passes.append(json.loads((tmp_path / f"{output.name}.json").read_text())["collection"]["steps"])
    assert set(places) == {tmp_path, tmp_path / "room"} and passes == [QUICK.steps] * 2
    assert "peak memory" in capsys.readouterr().out
    assert main([str(word) for word in (*shared, "--output", tmp_path / "c.safetensors", "--scratch", "no")]) != 0
    assert "no scratch file in no" in capsys.readouterr().err


def test_every_command_that_collects_takes_a_folder_for_it(pipeline, monkeypatch, tmp_path, capsys):
    """On layers of the text encoder, which take no passes through the UNet."""
    pipeline.pipe.save_pretrained(tmp_path / "base")
    ada, ben = (concept(pipeline, name, TEXT, rank=2, seed=seed, triggers=(f"{name} woman",)) for seed, name in enumerate(("ada", "ben")))
    files = [save_adapter(one, tmp_path / f"{one.name}.safetensors") for one in (ada, ben)]
    merged = save_adapter(merge([ada, ben], method="average").adapter, tmp_path / "merged.safetensors")
    places, make = [], scratch.tempfile.TemporaryFile
    monkeypatch.setattr(scratch.tempfile, "TemporaryFile", lambda **where: places.append(where["dir"]) or make(**where))
    monkeypatch.setattr(scratch.Scratch.__init__, "__kwdefaults__", {"memory": 0})
    (tmp_path / "room").mkdir()
    base, room, wrong = ["--base", tmp_path / "base"], ["--scratch", tmp_path / "room"], ["--scratch", tmp_path / "none"]
    verify = ["verify", merged, *files, *base, "--weight", "0.5", "--weight", "0.5"]
    compare = ["compare", *files, *base, "--methods", "regmean", "--output", tmp_path / "page.html", "--force"]
    create, add = ["pack", "create", files[0], *base, "--output"], ["pack", "add"]
    for words, place in (
        (verify, None),
        ([*verify, *room], tmp_path / "room"),
        (compare, tmp_path),
        ([*compare, *room], tmp_path / "room"),
        ([*create, tmp_path / "one"], tmp_path / ".one.making"),
        ([*create, tmp_path / "two", *room], tmp_path / "room"),
        ([*add, tmp_path / "one", files[1]], tmp_path / "one"),
        ([*add, tmp_path / "two", files[1], *room], tmp_path / "room"),
    ):
        main([str(word) for word in words])
        assert "error" not in capsys.readouterr().err and set(places) == {place}, words
        places.clear()
    for words in ([*verify, *wrong], [*compare, *wrong], [*create, tmp_path / "three", *wrong]):
        assert main([str(word) for word in words]) == 1
        assert "no scratch file in" in (said := capsys.readouterr().err) and len(said.splitlines()) == 1
    assert not list((tmp_path / "room").iterdir())


def test_an_interrupted_merge_leaves_nothing(pipeline, monkeypatch, tmp_path):
    monkeypatch.setattr(scratch.Scratch.__init__, "__kwdefaults__", {"memory": 0})
    seen = []

    def stop(phase, share):
        seen.append(list(tmp_path.iterdir()))
        if phase.startswith("solving stage 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(three(pipeline), base=pipeline, collection=SMALL, scratch=tmp_path, progress=stop)
    assert len(seen) > 4 and list(tmp_path.iterdir()) == []
    if os.name == "posix":
        assert not any(seen), "the file has no name, so that a killed process leaves nothing either"


def test_a_full_disk_is_one_error(mounted):
    folder = mounted("size=8k")
    with Scratch(folder, memory=0) as room:
        room.moments({"layer": Moments.of(torch.randn(3, 50))})
        with pytest.raises(WriteError, match=rf"{folder} \(No space left.*after 0.0 GB; free some"):
            room.moments({"another": Moments.of(torch.randn(99, 50))})
    assert list(folder.iterdir()) == []


def test_a_folder_that_is_none_is_said_before_any_work(pipeline, tmp_path):
    told = []
    for wrong in (tmp_path / "nowhere", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(LoraclrError, match=f"no scratch file in {wrong} .*give a folder with space"):
            merge(three(pipeline), base=pipeline, collection=SMALL, scratch=wrong, progress=lambda *_: told.append(1))
    assert not told


def test_a_disk_that_fails_on_reading(tmp_path):
    with Scratch(tmp_path, memory=0) as room:
        stored = room.moments({"layer": Moments.of(torch.randn(3, 50))})["layer"]
        room._file.truncate(8)
        with pytest.raises(WriteError, match="came back short"):
            stored.gram()


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=40))
def test_what_is_given_back_is_room_for_others(steps):
    lent: list[tuple[torch.Tensor, Lent]] = []
    with Scratch(memory=0) as room:
        kept = torch.arange(3.0)
        read = room.tensor(kept)
        for number, (size, away) in enumerate(steps):
            if away and lent:
                lent.pop(number % len(lent))[1].give_back()
                continue
            tensor = torch.full((size,), float(number))
            lent.append((tensor, room.lend(tensor)))
        assert all(torch.equal(place.read(), tensor) for tensor, place in lent) and torch.equal(read(), kept)
        most = room.written
        for _, place in lent:
            place.give_back()
        room.lend(torch.zeros((most - 12) // 4))
        assert room.written == most, "one gap again"
