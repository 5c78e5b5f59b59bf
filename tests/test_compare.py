"""Many methods on the same adapters: measured on whose features, failures that stay their own, the page and the command."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from concepts import KEYS, SMALL, SPATIAL, TEXT, fingerprint, three
from PIL import Image

from loraclr.adapter import Adapter, DenseLayer
from loraclr.cli import compare as command
from loraclr.cli import main
from loraclr.collect import QUICK, Concept, collect, collection_for
from loraclr.compare import compare, every_method, measure
from loraclr.compare.page import write_page
from loraclr.compare.pictures import Drawing, by_toybox, draw
from loraclr.errors import MergeError, MergeWarning, UsageError, WriteError
from loraclr.evaluate import Subject
from loraclr.formats import load_adapter, save_adapter
from loraclr.merge import merge
from loraclr.methods import make_method, method_names
from loraclr.methods.problem import LayerProblem, residuals
from loraclr.pipeline import Pipeline
from loraclr.toybox import open_toybox
from loraclr.toybox.judge import agreement
from loraclr.toybox.score import SCORE_TEMPLATES

CALLS = ("ada woman", "<ben> man", "cai man")


@pytest.fixture(scope="module")
def shared(_tiny_original) -> Pipeline:
    return Pipeline(_tiny_original)


@pytest.fixture
def adapters(shared) -> list[Adapter]:
    return three(shared)


# The yardstick --------------------------------------------------------------------------------------------------------------------------


def test_residuals_are_those_on_each_concepts_own_features(shared, adapters):
    """Redone by hand: every stage behind the concept's own adapter, at its weight."""
    concepts = [Concept(adapter, call, weight) for adapter, call, weight in zip(adapters, CALLS, (1.0, 0.5, 1.0), strict=True)]
    merged = merge(adapters, method="sum", parameters={"scale": 0.3}).adapter
    before = fingerprint(shared)
    found = measure(shared, concepts, {"sum": merged}, settings=SMALL)["sum"]
    assert fingerprint(shared) == before
    ben = concepts[1]
    half = {name: DenseLayer(name, 0.5 * layer.delta()) for name, layer in ben.adapter.layers.items()}
    for names, earlier in ((KEYS, TEXT), (SPATIAL, TEXT + KEYS)):
        applied = {name: half[name] for name in earlier if name in half}
        stats = collect(shared, [ben], list(names), settings=SMALL, merged=applied)
        for name in names:
            problem = LayerProblem(name, ben.adapter.layers[name].shape, ("ben",), (ben.adapter.layers[name],), (0.5,), None, stats[name])
            expected = residuals(problem, merged.layers[name].delta(torch.float64).flatten(1))
            assert found.fit[name]["ben"] == pytest.approx(expected["fit/ben"], rel=1e-4)
            assert found.held_out[name]["ben"] == pytest.approx(expected["held_out/ben"], rel=1e-4)
    assert set(found.fit[TEXT[0]]) == {"ada"}
    assert found.residual("fit", concept="cai") == pytest.approx(sum(found.fit[name]["cai"] for name in KEYS) / 3)


def test_an_adapter_is_no_way_from_itself_and_the_base_is_at_one(shared, adapters):
    concepts = [Concept(adapter, call) for adapter, call in zip(adapters, CALLS, strict=True)]
    nothing = {name: DenseLayer(name, torch.zeros(shared.base_weight(name).shape)) for name in adapters[0].layers}
    found = measure(shared, concepts, {"ada": adapters[0], "base": Adapter(nothing, name="base")}, settings=SMALL)
    assert found["ada"].residual(concept="ada") < 1e-6 and found["base"].residual() == pytest.approx(1)
    assert torch.allclose(found["ada"].cross_talk.after[0], torch.tensor([1.0, 0, 0], dtype=torch.float64), atol=1e-6)
    assert not found["base"].cross_talk.after.any()
    assert found["ada"].cross_talk.before.isfinite().all()


def test_sums_and_means_have_the_strength_they_say(shared, adapters):
    found = compare(adapters, base=shared, methods={name: make_method(name) for name in ("sum", "average")}, collection=SMALL)
    for entry, share in zip(found.entries, (1, 1 / 3), strict=True):
        assert entry.measure.cross_talk.summary()["strength"] == pytest.approx(share, abs=1e-4)
        assert entry.measure.cross_talk.summary()["after"] == pytest.approx(share * found.before, rel=1e-3)
    assert all(entry.seconds > 0 and entry.size > 1000 and entry.ranks[1] <= 6 for entry in found.entries)


def test_every_method_is_there_once():
    found = every_method()
    assert set(found) == set(method_names()) - {"loraclr-reference:paper"}
    assert len(set(found.values())) == len(found)


# What fails -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken:
    name: ClassVar[str] = "broken"
    summary: ClassVar[str] = "breaks"
    reference: ClassVar[str] = "none"
    needs: ClassVar[frozenset[str]] = frozenset()
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {}

    def solve(self, problem):
        raise RuntimeError("the library below\nbroke")


def test_one_failing_method_leaves_the_others_alone(shared, adapters, tmp_path):
    chosen = {"broken": Broken(), "loraclr": make_method("loraclr"), "average": make_method("average"), "linear": make_method("linear")}
    found = compare(adapters, methods=chosen, keep=tmp_path / "kept")
    assert found.entries[0].why == "the library below broke"
    assert "needs the base" in found.entries[1].why and "of one rank" in found.entries[3].why
    assert [entry.label for entry in found.merged] == ["average"] and found.entries[2].measure is None
    kept = load_adapter(tmp_path / "kept" / "average.safetensors")
    assert set(kept.layers) == set(found.merged[0].result.adapter.layers)
    said = json.loads(json.dumps(found.report(), allow_nan=False))
    assert [row.get("why", "") for row in said["methods"]] == [entry.why for entry in found.entries]
    with pytest.raises(MergeError, match="no method could merge: broken: the library below broke; linear: "):
        compare(adapters, methods={"broken": Broken(), "linear": make_method("linear")})


def test_what_would_fail_for_all_is_said_at_once(shared, adapters, tmp_path):
    with pytest.raises(MergeError, match=r"cai: no trigger words.*--trigger"):
        compare([*adapters[:2], adapters[2].with_(triggers=())], base=shared, methods={"average": make_method("average")})
    with pytest.raises(UsageError, match="no methods"):
        compare(adapters, methods={})
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="file"):
        compare(adapters, methods={"average": make_method("average")}, keep=tmp_path / "file")


def test_blocks_weigh_what_is_merged_and_what_it_is_measured_by(shared, adapters):
    blocks = {"ada": [0.0, *(0.5 + 0.1 * number for number in range(10))]}
    found = compare(adapters[:1], base=shared, methods={"sum": make_method("sum")}, block_weights=blocks, collection=SMALL).entries[0]
    assert found.result.adapter == merge(adapters[:1], base=shared, method="sum", block_weights=blocks).adapter
    assert found.measure.residual("fit") < 1e-6 and TEXT[0] not in {name for name, row in found.measure.fit.items() if row}
    with pytest.raises(UsageError, match="ada has 1 block weights; 11 are needed"):
        compare(adapters, base=shared, methods={"sum": make_method("sum")}, block_weights={"ada": [1.0]})


def test_what_is_allowed_is_merged(adapters):
    fast = [adapters[0].with_(name="lcm-lora 4 steps"), adapters[1]]
    with pytest.raises(MergeError, match="--allow distilled"):
        compare(fast, methods={"sum": make_method("sum")})
    with pytest.warns(MergeWarning):
        assert compare(fast, methods={"sum": make_method("sum")}, allow=["distilled"]).merged


def test_the_seed_is_the_collections_unless_it_is_given(adapters):
    chosen, seeded = {"average": make_method("average")}, replace(SMALL, seed=5)
    assert compare(adapters, methods=chosen, collection=seeded).settings["seed"] == 5
    assert compare(adapters, methods=chosen, collection=seeded, seed=7).settings["seed"] == 7


# The page and the command ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(shared):
    methods = {"average": make_method("average"), "sum:scale=0.3": make_method("sum", scale=0.3), "linear": make_method("linear")}
    return compare(three(shared), base=shared, methods=methods, collection=SMALL)


def test_the_page_is_one_file_with_a_map_for_every_method(found, tmp_path):
    loud = replace(found, settings={**found.settings, "base": "<b>&"})
    text = write_page(loud, tmp_path / "page.html").read_text()
    assert text.count("<svg") == 3 and text.count("<rect") == 3 * 9, "the adapters themselves, average, sum"
    assert "ada: strength 0.33" in text and "ada: strength 0.30" in text and "on ada, ben is heard at" in text
    assert "<b>linear</b>: " in text and "&lt;b&gt;&amp;" in text and "<b>&" not in text
    assert not re.search(r"https?://|src=\"(?!data:)|@import|<script|<link", text)
    assert re.search(r"<td>sum:scale=0.3</td><td>(<b>)?0\.\d\d", text)
    assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]


def test_a_page_without_a_base_has_no_measures(adapters, tmp_path):
    bare = compare(adapters, methods={"average": make_method("average")})
    text = write_page(bare, tmp_path / "page.html").read_text()
    assert "<svg" not in text and "residual" not in text and "merged from the files alone" in text


def test_pictures_are_at_equal_seeds_and_on_the_page(shared, adapters, found, tmp_path):
    before = fingerprint(shared)
    own = {adapter.name: adapter for adapter in adapters[:2]}
    drawing = Drawing(
        [Subject(name, call, "", ()) for name, call in zip(own, CALLS, strict=False)], ["a {} at night"], seeds=(0, 1), **FAST
    )
    drawn = draw(shared, found, own, tmp_path, drawing)
    assert fingerprint(shared) == before
    assert [row.label for row in drawn.pictures.rows] == ["alone", "average", "sum-scale=0.3"]
    for row in drawn.pictures.rows:
        assert (
            row.seeds == (0, 1, 0, 1)
            and row.concepts == ("ada", "ada", "ben", "ben")
            and all((tmp_path / file).exists() for file in row.files)
        )
    alone, average = (tmp_path / "pictures" / label / "ada" / "01-1.png" for label in ("alone", "average"))
    assert alone.read_bytes() != average.read_bytes()
    assert not drawn.scores() and write_page(drawn, tmp_path / "page.html").read_text().count("data:image/webp") == 6
    assert (drawn.pictures.drawn, draw(shared, found, own, tmp_path, drawing).pictures.kept) == (12, 12), "the same are found again"
    drawing.check(shared, own, ["average"], tmp_path)
    for other in (replace(drawing, steps=2), replace(drawing, prompts=["a {} at home"])):
        with pytest.raises(UsageError, match=r"01-0.png is there already and is not of these prompts and settings.*--force"):
            other.check(shared, own, ["average"], tmp_path)
        other.check(shared, own, ["average"], tmp_path, replace=True)


def test_pictures_are_judged_with_controls(shared, adapters, found, tmp_path):
    own = {adapter.name: adapter for adapter in adapters}
    colours = [Image.new("RGB", (16, 16), (k, 90, 200 - k)) for k in (10, 60, 160)]
    subjects = [Subject(name, call, "man", colours) for name, call in zip(own, CALLS, strict=True)]
    judged = draw(shared, found, own, tmp_path, Drawing(subjects, ["a {}"], Eyes(), **FAST))
    assert list(judged.scores()) == ["references", "base", "alone", "average", "sum-scale=0.3"]
    assert set(judged.scores()["average"]) == {"text", "image"}
    against = [(of, to) for of, to, _ in judged.pictures.differences() if to != "base"]
    assert against == [("average", "alone"), ("sum-scale=0.3", "alone")]
    text = write_page(judged, tmp_path / "page.html").read_text()
    assert "Scores of pictures" in text and text.count("data:image/webp") == 3 * 4, "base, alone and two merges"
    assert write_page(found, tmp_path / "bare.html").read_text().count("Scores") == 0 == len(found.scores())


def toybox(*names: str):
    """The toybox, adapters of its concepts and their files' comparison."""
    box = open_toybox()
    paths = [box.adapter_paths(box.concepts[name].split)[name] for name in names]
    return box, {path.stem: load_adapter(path) for path in paths}, compare(paths, methods={"average": make_method("average")})


def test_the_toyboxs_judges_read_its_own_prompts(tmp_path):
    box, own, found = toybox("rhea", "duna", "ines")
    drawing = by_toybox({name: adapter.call for name, adapter in own.items()}, **FAST, batch_size=16)
    judged = draw(box.load(), found, own, tmp_path, drawing)
    assert list(judged.scores()) == ["references", "base", "alone", "average"]
    assert set(judged.scores()["alone"]) == {"text", "image", "identity", "right person", "prompt"}
    row = judged.pictures.row("average")
    assert len(row.files) == 3 * len(SCORE_TEMPLATES) and row.concepts[-1] == "ines"
    assert row.values["identity"].isnan().tolist() == [name == "duna" for name in row.concepts]
    people = [place for place, name in enumerate(row.concepts) if name != "duna"]
    images = [Image.open(tmp_path / row.files[place]).convert("RGB") for place in people]
    by_hand = agreement(box.judge.read(images), [box.concepts[row.concepts[place]].attributes for place in people], box.judge.heads)
    assert torch.allclose(row.values["identity"][people], by_hand)
    assert "right person" in json.loads((tmp_path / "evaluation.json").read_text())["rows"][3]["estimates"]
    with pytest.raises(UsageError, match="the toybox does not know ada"):
        by_toybox({"ada": "ada woman", "rhea": "rhea woman"})


def test_the_toyboxs_objects_and_styles_are_judged_by_its_clip(tmp_path):
    box, own, found = toybox("duna", "kalle")
    drawing = by_toybox({name: adapter.call for name, adapter in own.items()}, **FAST, batch_size=16)
    judged = draw(box.load(), found, own, tmp_path, drawing)
    assert set(judged.scores()["average"]) == {"text", "image"}
    assert judged.pictures.row("alone").prompts[0] == "a photo of a {} at the beach", "nothing that things do not do"


FAST = {"steps": 1, "guidance": 1.0}


class Eyes:
    """Embeds a picture by its mean colour, a text by its letters."""

    name = "eyes"

    def embed_images(self, images):
        return torch.stack([torch.tensor(image.resize((1, 1)).getpixel((0, 0)), dtype=torch.float32) - 127.5 for image in images])

    def embed_texts(self, texts):
        return torch.tensor([[text.count(letter) + 0.1 for letter in "aen"] for text in texts])


def test_method_words():
    found = command._methods(["loraclr:exact:ridge=0.1, sum:scale=0.15", "ties:density=0.5:scale=2", "loraclr:importance=1,2,3"])
    assert list(found) == ["loraclr:exact:ridge=0.1", "sum:scale=0.15", "ties:density=0.5:scale=2", "loraclr:importance=1,2,3"]
    assert found["loraclr:exact:ridge=0.1"] == make_method("loraclr:exact", ridge=0.1)
    assert found["loraclr:importance=1,2,3"] == make_method("loraclr", importance=(1, 2, 3))
    assert set(every_method()) < set(command._methods(["all,sum:scale=0.15"]))
    for wrong, said in (("lora", "no method 'lora'"), ("sum:scal=1", "no parameter 'scal'"), ("sum:scale=", "not of the form NAME=VALUE")):
        with pytest.raises(UsageError, match=said):
            command._methods([wrong])


def call(capsys, *words):
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, " ".join(said.err.split())


def test_the_command_writes_a_page_and_json_and_says_what_was_left_out(adapters, tmp_path, capsys):
    files = [save_adapter(adapter, tmp_path / f"{adapter.name}.safetensors") for adapter in adapters]
    page, report = tmp_path / "page.html", tmp_path / "report.json"
    words = ("compare", *files, "--methods", "average,sum:scale=0.5,linear", "--output", page, "--json", report)
    code, out, _ = call(capsys, *words)
    assert code == 0 and page.exists() and "not merged by linear: " in out and "sum:scale=0.5" in out
    assert [row["label"] for row in json.loads(report.read_text())["methods"]] == ["average", "sum:scale=0.5", "linear"]
    assert call(capsys, *words)[2].endswith("page.html exists already; give another name, or --force to replace")
    code, out, _ = call(capsys, *words[:-1], "-", "--force")
    assert code == 0 and json.loads(out)["methods"][0]["rank"] is not None


def test_the_command_passes_on_what_merge_takes(adapters, tmp_path, capsys, monkeypatch):
    files = [save_adapter(adapter, tmp_path / f"{adapter.name}.safetensors") for adapter in adapters]
    given = {}

    def seen(*_, **settings):
        given.update(settings)
        raise MergeError("enough")

    monkeypatch.setattr(sys.modules["loraclr.compare"], "compare", seen)
    monkeypatch.setattr(command, "open_base", lambda *_, **__: None)
    call(
        capsys,
        "compare",
        *files,
        "--base",
        "x",
        "--output",
        tmp_path / "p.html",
        "--block-weights",
        "ada=0,0.5,2",
        "--allow",
        "edit",
        "--quick",
    )
    assert (given["block_weights"], given["allow"], given["collection"](set())) == ({"ada": [0, 0.5, 2]}, ["edit"], QUICK)


def test_the_command_refuses_before_any_work(tmp_path, capsys):
    file, page = tmp_path / "ada.safetensors", tmp_path / "page.html"
    for words, said in (
        (("--output", tmp_path / "page.txt"), "end its name in .html"),
        (("--output", tmp_path / "nowhere" / "page.html"), "there is no folder"),
        (("--output", page, "--judge", "toyclip"), "give --pictures DIR, too"),
        (("--output", page, "--pictures", tmp_path), "give --base"),
        (("--output", page, "--pictures", tmp_path, "--base", "x", "--judge", "toyclip"), "give --judge and --references DIR together"),
        (("--output", page, "--pictures", tmp_path, "--base", "x", "--judge", "toybox", "--prompts", file), "brings its own prompts"),
    ):
        code, out, err = call(capsys, "compare", file, *words)
        assert code == 1 and out == "" and said in err, err
    assert not list(Path(tmp_path).iterdir())


def test_the_command_checks_pictures_before_it_merges(shared, adapters, tiny_clip, tmp_path, capsys, monkeypatch):
    shared._pipe.save_pretrained(tmp_path / "base")
    files = [save_adapter(adapter, tmp_path / f"{adapter.name}.safetensors") for adapter in adapters[:2]]
    for name in ("ada", "ben"):
        (tmp_path / "both" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), "teal").save(tmp_path / "both" / name / "1.png")
    (tmp_path / "one" / "ada").mkdir(parents=True)
    Image.new("RGB", (16, 16), "teal").save(tmp_path / "one" / "ada" / "1.png")
    (tmp_path / "prompts.txt").write_text("a photo\n")

    def never(*_, **__):
        raise AssertionError("merged before pictures were checked")

    monkeypatch.setattr(sys.modules["loraclr.compare"], "compare", never)
    words = ("compare", *files, "--base", tmp_path / "base", "--output", tmp_path / "page.html", "--methods", "average")
    seen = ("--references", tmp_path / "both", "--judge")
    for more, said in (
        (("--prompts", tmp_path / "nowhere.txt"), "nowhere.txt"),
        (("--prompts", tmp_path / "prompts.txt"), "needs exactly one {}"),
        (("--size", "7x7"), "7x7"),
        (("--steps", 0), "0 steps"),
        (("--judge", "toybox"), "the toybox does not know ada, ben"),
        ((*seen, f"clip:{tmp_path / 'clip'}", "--class", "man"), "clip"),
        ((*seen, f"clip:{tiny_clip}"), "what kind of thing is ben"),
        (("--references", tmp_path / "one", "--judge", f"clip:{tiny_clip}", "--class", "man"), "has no pictures of ben"),
    ):
        code, out, err = call(capsys, *words, "--pictures", tmp_path / "drawn", *more)
        assert code == 1 and out == "" and said in err, err
    assert not (tmp_path / "drawn").exists() and not (tmp_path / "page.html").exists()
    monkeypatch.undo()
    words = (*words, "--pictures", tmp_path / "drawn", "--guidance", 1, "--force", *seen, f"clip:{tiny_clip}", "--class", "man")
    assert call(capsys, *words, "--steps", 1)[0] == 0
    report = json.loads((tmp_path / "drawn" / "evaluation.json").read_text())
    assert [row["label"] for row in report["rows"]] == ["references", "base", "alone", "average"] and len(
        report["rows"][3]["pictures"]
    ) == 4
    (tmp_path / "page.html").unlink()
    code, _, err = call(capsys, *(word for word in words if word != "--force"), "--steps", 2)
    assert code == 1 and "01-0.png is there already" in err and not (tmp_path / "page.html").exists()


# What a cut lost, and one's own prompts -------------------------------------------------------------------------------------------------


def test_what_a_cut_lost_is_in_table_page_and_json(adapters, tmp_path, capsys):
    files = [save_adapter(adapter, tmp_path / f"{adapter.name}.safetensors") for adapter in adapters]
    page, report = tmp_path / "page.html", tmp_path / "report.json"
    words = ("compare", *files, "--methods", "sum,svd", "--rank", 1, "--output", page, "--json", report)
    code, out, _ = call(capsys, *words)
    lost = {row["label"]: row["lost"] for row in json.loads(report.read_text())["methods"]}
    expected = max(layer.lost for layer in merge(files, method="sum", rank=1).layers)
    assert code == 0 and expected > 0.05 and lost["sum"] == pytest.approx(expected, abs=1e-4)
    assert re.search(rf"sum +1 +{expected:.1%} ", out) and "lost: the most" in out
    assert f"<td>{expected:.1%}</td>" in page.read_text() and "<th>lost</th>" in page.read_text()
    whole = compare(adapters, methods={"sum": make_method("sum")})
    assert whole.report()["methods"][0]["lost"] == 0 == whole.entries[0].lost
    assert "<td>0</td>" in write_page(whole, page).read_text()


@pytest.mark.parametrize(("width", "tables"), [(80, 2), (140, 1)])
def test_labels_are_whole_on_any_screen(found, tmp_path, capsys, monkeypatch, width, tables):
    monkeypatch.setattr(command.show.out, "_width", width)
    long = replace(found.entries[0], label="loraclr-reference:paper:lr=0.005")
    command._show(replace(found, entries=(*found.entries, long)), tmp_path / "page.html")
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith(("sum:scale=0.3 ", "loraclr-reference:paper:lr=0.005 "))]
    assert len(rows) == 2 * tables and out.count("method ") == tables and all(len(row) <= width for row in rows)


@pytest.fixture
def prompts(tmp_path):
    """Files of prompts with and without a concept."""
    (tmp_path / "with.txt").write_text("a <TOK> on a table\n[held out]\na {} outside\n")
    (tmp_path / "without.txt").write_text("a vase\n")
    return tmp_path / "with.txt", tmp_path / "without.txt"


def test_the_command_learns_from_prompts_of_files(shared, adapters, prompts, tmp_path, capsys):
    shared._pipe.save_pretrained(tmp_path / "base")
    files = [save_adapter(adapter, tmp_path / f"{adapter.name}.safetensors") for adapter in adapters[:2]]
    words = ("compare", *files, "--base", tmp_path / "base", "--output", tmp_path / "page.html", "--keep", tmp_path / "kept")
    words = (*words, "--methods", "loraclr:rounds=1,custom-diffusion,average", "--json", tmp_path / "report.json")
    assert call(capsys, *words, "--fit-prompts", prompts[0], "--preserve", prompts[1])[0] == 0
    measured = json.loads((tmp_path / "report.json").read_text())["settings"]["collection"]
    assert (measured["fit"], measured["held_out"]) == (["a {} on a table"], ["a {} outside"])
    for label, method, parameters in (("loraclr-rounds=1", "loraclr", {"rounds": 1}), ("custom-diffusion", "custom-diffusion", {})):
        with_them = command.parse.collection(collection_for(make_method(method, **parameters).needs), *prompts)
        assert with_them.preserve == ("", "a vase")
        same = merge(files, base=shared, method=method, parameters=parameters, collection=with_them).adapter
        kept = load_adapter(tmp_path / "kept" / f"{label}.safetensors")
        assert all((kept.layers[name].delta() - layer.delta()).norm() <= 5e-3 * layer.delta().norm() for name, layer in same.layers.items())
        said = json.loads(kept.metadata["loraclr.receipt"])["collection"]
        assert (said["fit"], said["steps"]) == (["a {} on a table"], with_them.steps)


def test_prompts_that_no_method_reads_are_refused(tmp_path, prompts, capsys, monkeypatch):
    monkeypatch.setattr(command, "open_base", lambda *_, **__: pytest.fail("work was done"))
    words = ("compare", tmp_path / "ada.safetensors", "--output", tmp_path / "page.html")
    for more, said in (
        (("--fit-prompts", prompts[0]), "with.txt: without a base nothing is learned from prompts or measured; give --base"),
        (("--preserve", prompts[1]), "without.txt: without a base"),
        (("--quick",), "--quick: without a base"),
        (("--base", "x", "--methods", "sum,regmean", "--preserve", prompts[1]), "none of sum, regmean preserves prompts"),
        (("--base", "x", "--fit-prompts", prompts[1]), "needs exactly one {}"),
        (("--base", "x", "--preserve", prompts[0]), "to be without any concept"),
        (("--prompts", prompts[0]), "to learn from: --fit-prompts"),
    ):
        code, out, err = call(capsys, *words, *more)
        assert code == 1 and out == "" and said in err, err
