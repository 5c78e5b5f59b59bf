"""`loraclr evaluate` from files to a table: a diffusers folder, adapters, pictures, prompts and a CLIP that lie on disk."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from concepts import three
from PIL import Image

import loraclr
from loraclr.cli import evaluate as command
from loraclr.cli import main, show
from loraclr.evaluate import Limit, trial
from loraclr.formats import load_adapter, save_adapter
from loraclr.merge import merge
from loraclr.pipeline import Pipeline


@pytest.fixture(scope="module")
def world(_tiny_original, tmp_path_factory) -> Path:
    """base/, loras/ (ada, ben), merged.safetensors, references/ (ada, ben), strangers/ (zoe), prompts.txt"""
    root = tmp_path_factory.mktemp("world")
    _tiny_original.save_pretrained(root / "base")
    (root / "loras").mkdir()
    pipeline = Pipeline(_tiny_original)
    files = [
        save_adapter(adapter, root / "loras" / f"{adapter.name}.safetensors", format=format)
        for adapter, format in zip(three(pipeline)[:2], ("kohya", "diffusers"), strict=True)
    ]
    merge(files, method="sum").save(root / "merged.safetensors")
    for folder, colour in (("references/ada", "teal"), ("references/ben", "orange"), ("strangers/zoe", "gray")):
        (root / folder).mkdir(parents=True)
        for size in (16, 20):
            Image.new("RGB", (size, 24), colour).save(root / folder / f"{size}.png")
    (root / "prompts.txt").write_text("# two\n[looks]\na photo of a <TOK>\n[place]\n{} at night\n")
    return root


@pytest.fixture
def call(capsys, monkeypatch, world, tiny_clip):
    """`call(option, value, ..., lora=[...])` -> exit code, standard output, standard error."""

    monkeypatch.setattr(show.out, "width", 200)  # wide enough for lines to stay whole

    def run(*words: object, lora=("loras",), references="references", judge=f"clip:{tiny_clip}") -> tuple[int, str, str]:
        pairs = [name.rpartition("=") for name in lora]
        given = [word for label, equals, file in pairs for word in ("--lora", f"{label}{equals}{world / file}")]
        fixed = ["--base", world / "base", "--prompts", world / "prompts.txt", "--references", world / references, "--judge", judge]
        code = main([str(word) for word in ["evaluate", *fixed, *given, "--steps", 1, "--guidance", 1, *words]])
        said = capsys.readouterr()
        return code, said.out if "--json" in words else " ".join(said.out.split()), said.err

    return run


def test_singles_and_their_merge_side_by_side(call, world, tmp_path):
    words = ["--class", "ben=man", "--seeds", 2, "--output", tmp_path]
    code, out, err = call(*words, "--json", lora=("single=loras", "merged.safetensors"))
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report == json.loads((tmp_path / "evaluation.json").read_text())
    assert [row["label"] for row in report["rows"]] == ["references", "base", "single", "merged"]
    assert [(one["of"], one["against"]) for one in report["differences"]] == [("single", "base"), ("merged", "base"), ("merged", "single")]
    # Calls come from the files: the receipt of the merge says the same as the adapters themselves.
    described = {one["name"]: (one["call"], one["class"]) for one in report["settings"]["concepts"]}
    assert described == {"ada": ("ada woman", "woman"), "ben": ("<ben>", "man")}
    pictures = report["rows"][3]["pictures"]
    assert len(pictures) == 8 and all((tmp_path / one["file"]).is_file() for one in pictures)
    value = report["rows"][3]["estimates"]["image"]
    assert value["mean"] == pytest.approx(sum(one["image"] for one in pictures) / 8) and value["low"] <= value["mean"] <= value["high"]

    code, out, err = call(*words, lora=("single=loras", "merged.safetensors"))
    assert (code, err) == (0, "") and "drawn: 0 pictures, 24 were there" in out
    image = report["rows"][3]["estimates"]["image"]
    assert f"{image['mean']:.3f} [{image['low']:.3f}, {image['high']:.3f}]" in out
    less = report["differences"][2]["estimates"]["image"]
    assert f"{less['mean']:+.3f} [{less['low']:+.3f}, {less['high']:+.3f}]" in out
    assert all(word in out for word in ("2 concept(s), 8 pictures a row", "references", "minus single", "evaluation.json"))
    groups = report["rows"][3]["by_group"]
    assert groups.keys() == {"looks", "place"}
    assert groups["place"]["image"] == pytest.approx(sum(one["image"] for one in pictures if "night" in one["prompt"]) / 4)
    assert "means by group looks place" in out and f"merged {groups['looks']['image']:.3f} {groups['place']['image']:.3f}" in out
    assert "identity" not in out  # no face judge was given


def test_one_concept_by_a_plain_folder_of_pictures(call, tmp_path):
    code, out, _ = call("--output", tmp_path, "--seeds", 1, lora=("loras/ada.safetensors",), references="references/ada")
    assert code == 0 and "1 concept(s), 2 pictures a row" in out and "minus base" in out and "minus ada" not in out
    assert sorted(path.name for path in (tmp_path / "pictures" / "ada" / "ada").iterdir()) == ["01-0.png", "02-0.png"]


def test_previews_and_notes_beside_the_adapters_are_none_and_the_output_has_a_name(call, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save(world / "loras" / "ada.png")
    (world / "loras" / "ada.txt").write_text("mine")
    try:
        code, out, err = call("--class", "man", "--seeds", 1)
    finally:
        for ending in ("png", "txt"):
            (world / "loras" / f"ada.{ending}").unlink()
    assert (code, err) == (0, "") and "written: evaluation/evaluation.json" in out
    assert (tmp_path / "evaluation" / "pictures" / "loras" / "ada" / "01-0.png").exists()


def test_folders_of_the_peft_kind(call, world, tmp_path):
    """Both are folders: one that is an adapter, and one that holds an adapter for each concept."""
    ada, ben = (load_adapter(world / "loras" / f"{name}.safetensors") for name in ("ada", "ben"))
    (world / "folders").mkdir()
    for adapter, place in ((ben, "folders/ben"), (ada, "folders/ada"), (ada, "both")):
        save_adapter(adapter, world / place, format="peft")
    code, out, err = call(
        *("--trigger", "ada=ada woman", "--trigger", "ben=some man", "--output", tmp_path, "--seeds", 1, "--json"), lora=("folders", "both")
    )
    assert (code, err) == (0, "")
    used = json.loads(out)["settings"]["variants"]
    assert [used["folders"]["adapters"][name]["name"] for name in ("ada", "ben")] == ["ada", "ben"]
    assert [used["both"]["adapters"][name]["name"] for name in ("ada", "ben")] == ["both", "both"]


class Colours:
    """A face judge for pictures without faces: a picture's first pixel is its face."""

    name, limit = "colours", Limit(0.65, "cosine")

    def embed_faces(self, images):
        return [torch.tensor([image.getpixel((0, 0))], dtype=torch.float32) - 127.5 for image in images]


def test_faces_and_who_passes_for_whom(call, monkeypatch, tmp_path):
    monkeypatch.setattr("loraclr.judges.open_face_judge", {"colours": Colours()}.__getitem__)
    code, out, err = call("--class", "man", "--output", tmp_path, "--seeds", 1, "--face-judge", "colours", lora=("loras",))
    assert (code, err) == (0, "")
    assert all(word in out for word in ("identity", "no face", "leakage", "loras: asked ada ben", "colours: one person at cosine >= 0.65"))
    row = json.loads((tmp_path / "evaluation.json").read_text())["rows"][2]
    assert f"ada {row['confusion'][0][0]:.2f} {row['confusion'][0][1]:.2f} ben" in out


def test_scenes_of_several_people(capsys, monkeypatch, world, tmp_path):
    monkeypatch.setattr("loraclr.judges.open_face_judge", {"colours": Colours()}.__getitem__)
    monkeypatch.setattr(show.out, "width", 200)
    (tmp_path / "scenes.txt").write_text(
        "# two\ntwo people\n  {ada} at home|0,0,1,0.5\n  a {ben}|0,16,16,32\nnobody else\n  {ben}|0,0,1,1\n"
    )
    fixed = ["evaluate", "--base", world / "base", "--references", world / "references", "--steps", 1, "--guidance", 1, "--size", "16x32"]
    fixed += ["--lora", world / "merged.safetensors", "--class", "man", "--seeds", 2, "--output", tmp_path / "out"]

    def call(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in (*fixed, *words)])
        said = capsys.readouterr()
        return code, " ".join(said.out.split()), said.err

    code, out, err = call("--scenes", tmp_path / "scenes.txt", "--face-judge", "colours")
    assert (code, err) == (0, "") and "present, 2 people" in out and "all present, 1 person" in out and "merged" in out
    assert "2 concept(s), 4 pictures a row" in out and f"written: {tmp_path / 'out' / 'scenes.json'}" in out
    found = json.loads((tmp_path / "out" / "scenes.json").read_text())
    assert [row["label"] for row in found["rows"]] == ["base", "merged"] and found["differences"][0]["against"] == "base"
    assert "give either --prompts" in call()[2]
    assert "--scenes by --face-judge alone" in call("--scenes", tmp_path / "scenes.txt")[2]
    assert (
        "an adapter for each concept" in call("--scenes", tmp_path / "scenes.txt", "--face-judge", "colours", "--lora", world / "loras")[2]
    )


def test_what_is_missing_is_said_at_once_with_its_option(call, tiny_clip, tmp_path):
    def error(*words, **settings) -> str:
        code, out, err = call(*words, "--output", tmp_path / "out", **settings)
        assert code == 1 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
        return err

    assert "what kind of thing is ben, called by '<ben>'? --class ben=WORDS" in error()
    assert "no file says which words call ada: --trigger ada=WORDS" in error("--class", "man", lora=("loras/ben.safetensors",))
    assert "the concepts are ada, ben; did you mean 'ben'?" in error("--class", "benn=man")
    assert "--trigger ben is given twice" in error("--trigger", "ben=x y", "--trigger", "ben=z")
    assert "--class without a name is given 2 times" in error("--class", "man", "--class", "woman")
    assert "two adapters are called 'x'; write LABEL=FILE" in error(lora=("x=loras/ada.safetensors", "x=loras/ben.safetensors"))
    assert "no file for concept zoe; a folder needs one adapter named after each" in error(lora=("loras",), references="strangers")
    assert "no judge 'clipp:x'" in error("--class", "man", judge="clipp:x")
    assert "does not tell people apart" in error("--class", "man", "--face-judge", f"clip:{tiny_clip}")
    assert "--download" in error("--class", "man", judge="clip:nobody/never-cached")
    assert not (tmp_path / "out").exists()


def test_defaults_are_those_of_the_library():
    def defaults(function):
        return {name: p.default for name, p in inspect.signature(function).parameters.items() if p.default is not p.empty}

    ours, theirs = defaults(command.evaluate), defaults(loraclr.evaluate)
    same = ("steps", "guidance", "negative", "size")
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same} and ours["batch"] == theirs["batch_size"]
    assert tuple(range(ours["seeds"])) == theirs["seeds"] == trial.SEEDS


def test_help_names_every_option(capsys):
    assert main(["evaluate", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"--{name.rstrip('_').replace('_', '-')}" in said for name in inspect.signature(command.evaluate).parameters)
