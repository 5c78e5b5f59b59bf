"""Trials: equal prompts and seeds for all rows, values that are those of the pure functions, and nothing drawn twice."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from concepts import KEYS, SPATIAL, concept, fingerprint, three
from PIL import Image

from loraclr.errors import UsageError
from loraclr.evaluate import (
    Evaluation,
    FaceJudge,
    Limit,
    PictureJudge,
    Row,
    Subject,
    Variant,
    call_of,
    clip_score,
    evaluate,
    identity,
    image_alignment,
    interval,
    noun_of,
    read_captions,
    read_prompts,
    read_references,
)
from loraclr.evaluate.subjects import fill, template
from loraclr.generate import generate
from loraclr.pipeline import Pipeline

PROMPTS = ("a photo of a {}, near water", "<TOK> at night")
SETTINGS = {"prompts": PROMPTS, "seeds": (3, 5), "steps": 1, "guidance": 1.0}


class Eyes:
    """Embeds a picture by its 3x3 colours, a text by the letters it has."""

    name = "eyes"

    def embed_images(self, images):
        return torch.stack([torch.from_numpy(np.asarray(image.resize((3, 3)), np.float32)).flatten() - 127.5 for image in images])

    def embed_texts(self, texts):
        return torch.tensor([[text.count(chr(97 + k)) + 0.1 for k in range(26)] + [len(text)] for text in texts], dtype=torch.float32)


class Faces:
    """The upper half is a face, the lower another; a picture whose left upper pixel is not green enough has none."""

    name = "faces"
    limit = Limit(0.65, "cosine")

    def embed_faces(self, images):
        found = []
        for image in images:
            pixels = torch.from_numpy(np.asarray(image, np.float32)) - 127.5
            halves = torch.stack([part.mean((0, 1)) for part in pixels.chunk(2)])
            found.append(halves if pixels[0, 0, 1] > 10 else torch.empty(0, 3))
        return found


def colours(*values: tuple[int, int, int]) -> list[Image.Image]:
    return [Image.new("RGB", (16, 16), value) for value in values]


@pytest.fixture
def pipeline(tiny_pipe) -> Pipeline:
    return Pipeline(tiny_pipe())


@pytest.fixture
def subjects() -> list[Subject]:
    return [
        Subject("ada", "ada woman", "woman", colours((200, 140, 90), (190, 150, 110), (100, 150, 250))),
        Subject("ben", "<ben>", "man", colours((90, 160, 130), (60, 200, 120))),
    ]


def run(pipeline: Pipeline, subjects, folder: Path, **changes):
    ada, ben, _ = three(pipeline)
    both = concept(pipeline, "both", (*KEYS, *SPATIAL), rank=2, seed=9, tokens=ben.tokens)
    variants = {"single": Variant({"ada": ada, "ben": ben}), "merged": Variant(both, 0.5)}
    settings = {"judge": Eyes(), "face": Faces(), "output": folder, **SETTINGS, **changes}
    return evaluate(pipeline, settings.pop("variants", variants), subjects, **settings)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_fakes_are_judges():
    assert isinstance(Eyes(), PictureJudge) and isinstance(Faces(), FaceJudge)
    assert not isinstance(Eyes(), FaceJudge) and not isinstance(Faces(), PictureJudge)


def test_rows_are_two_controls_and_the_variants_on_equal_prompts_and_seeds(pipeline, subjects, tmp_path):
    before = fingerprint(pipeline)
    found = run(pipeline, subjects, tmp_path)
    assert fingerprint(pipeline) == before
    assert [row.label for row in found.rows] == ["references", "base", "single", "merged"]
    assert found.drawn == 3 * 2 * 2 * 2 and found.kept == 0
    base, single, merged = found.rows[1:]
    assert base.factors == single.factors == merged.factors
    assert base.factors == (
        ("ada",) * 4 + ("ben",) * 4,
        ("a photo of a {}, near water",) * 2 + ("{} at night",) * 2 + base.prompts[:4],
        (3, 5) * 4,
    )
    assert sorted(files(tmp_path)) == sorted(file for row in found.rows[1:] for file in row.files)
    assert merged.files[3] == "pictures/merged/ada/02-5.png"


def test_pictures_are_those_of_generate_and_say_how_they_were_made(pipeline, subjects, tmp_path):
    found = run(pipeline, subjects, tmp_path)
    assert found.settings["base"] == pipeline.source
    single = found.settings["variants"]["single"]["adapters"]
    assert single["ben"]["name"] == "ben" and single["ada"]["sha256"] != single["ben"]["sha256"]
    settings = {"seeds": [3, 5], "steps": 1, "guidance": 1.0}
    ben, folder = three(pipeline)[1], tmp_path / "pictures"
    wanted = {"base": list(generate(pipeline, ["a photo of a man, near water", "man at night"], **settings))}
    with pipeline.applied(ben):
        wanted["single"] = list(generate(pipeline, ["a photo of a <ben>, near water", "<ben> at night"], **settings))
    for label, pictures in wanted.items():
        for made, name in zip(pictures, ("01-3", "01-5", "02-3", "02-5"), strict=True):
            with Image.open(folder / label / "ben" / f"{name}.png") as kept:
                assert (np.asarray(kept) == np.asarray(made.image)).all()
                stated = json.loads(kept.text["loraclr"])
            assert {key: stated[key] for key in made.settings} == made.settings and len(stated["evaluation"]) == 64
    assert (np.asarray(wanted["base"][0].image) != np.asarray(wanted["single"][0].image)).any()
    with Image.open(folder / "merged" / "ada" / "01-3.png") as kept:
        assert json.loads(kept.text["loraclr"])["adapters"] == [{"name": "both", "scale": 0.5}]
    assert found.settings["concepts"][0] == {"name": "ada", "call": "ada woman", "class": "woman", "references": 3}


def test_values_are_those_of_the_pure_functions(pipeline, subjects, tmp_path):
    row = run(pipeline, subjects, tmp_path).row("single")
    images = [Image.open(tmp_path / file).convert("RGB") for file in row.files]
    eyes, faces = Eyes(), Faces()
    nouns = ["a photo of a woman, near water"] * 2 + ["woman at night"] * 2 + ["a photo of a man, near water"] * 2 + ["man at night"] * 2
    dropped = (["a photo of a, near water"] * 2 + ["at night"] * 2) * 2
    seen = eyes.embed_images(images)
    assert torch.allclose(row.values["text"], clip_score(seen, eyes.embed_texts(nouns)))
    assert torch.allclose(row.values["text_dropped"], clip_score(seen, eyes.embed_texts(dropped)))
    for index, subject in enumerate(subjects):
        part = slice(4 * index, 4 * index + 4)
        assert torch.allclose(row.values["image"][part], image_alignment(seen[part], eyes.embed_images(subject.references)))
        own = identity(faces.embed_faces(images[part]), faces.embed_faces(subject.references), faces.limit)
        assert torch.equal(row.values["identity"][part], own.accepted) and torch.equal(row.values["no_face"][part], own.no_face)
        assert torch.equal(row.values["identity_any"][part], own.any_reference)
        assert torch.allclose(row.values["face_cosine"][part], own.closeness, equal_nan=True)
        assert row.confusion[index][index] == pytest.approx(float(own.accepted.mean()))
    assert {0.0, 1.0} == set(row.values["no_face"].tolist()) == set(row.values["identity"].tolist())  # the fake judge has some work
    rates = np.array(row.confusion)
    assert rates[1, 0] > 0
    assert float(row.values["leakage"].mean()) == pytest.approx((rates[0, 1] + rates[1, 0]) / 2)
    assert dict(row.curve)[0.65] == pytest.approx(float(row.values["identity"].mean()))


def test_the_references_row_leaves_each_picture_out_of_its_own_comparison(pipeline, subjects, tmp_path):
    row = run(pipeline, subjects, tmp_path).row("references")
    first, second, third = Eyes().embed_images(subjects[0].references)
    assert row.concepts == ("ada",) * 3 + ("ben",) * 2 and "text" not in row.values
    assert float(row.values["image"][0]) == pytest.approx(float(image_alignment(first[None], torch.stack([second, third]))))
    # ada's third reference has another colour: its cosine to the mean of the first two is -.79
    assert row.values["identity"].tolist() == [0, 0, 0, 1, 1] and float(row.values["face_cosine"][2]) < 0


def test_a_reference_that_has_nothing_to_be_compared_with_is_no_value(pipeline, tmp_path):
    one_face = Subject("ada", "ada woman", "woman", colours((200, 140, 90), (200, 100, 90)))
    alone = Subject("ben", "ben man", "man", colours((90, 160, 130)))
    row = run(pipeline, [one_face, alone], tmp_path, variants={"ada": three(pipeline)[0]}).row("references")
    assert row.concepts == ("ada", "ada") and len(row.values["image"]) == 2
    # Without the first there is no face to compare with; the second has none itself.
    assert row.values["identity"].tolist() == pytest.approx([math.nan, 0], nan_ok=True)
    assert row.values["no_face"].tolist() == pytest.approx([math.nan, 1], nan_ok=True)
    none = run(pipeline, [alone], tmp_path, variants={"ada": three(pipeline)[0]}).row("references")
    assert none.concepts == () and none.values == {} and none.estimates() == {}


def test_estimates_and_differences_draw_concepts_prompts_and_seeds(pipeline, subjects, tmp_path):
    found = run(pipeline, subjects, tmp_path)
    single, base = found.row("single"), found.row("base")
    value = single.estimates()["image"]
    assert value.mean == pytest.approx(float(single.values["image"].mean())) and value.count == 8
    assert (value.low, value.high) == interval(single.values["image"], factors=single.factors)
    difference = found.difference("single", "base")["image"]
    assert (difference.low, difference.high) == interval(single.values["image"] - base.values["image"], factors=base.factors)
    assert [(of, against) for of, against, _ in found.differences()] == [("single", "base"), ("merged", "base"), ("merged", "single")]
    with pytest.raises(UsageError, match="cannot be paired"):
        found.difference("single", "references")
    with pytest.raises(UsageError, match="no row 'mergd'; the rows are references, base, single, merged"):
        found.row("mergd")


def test_rows_without_controls_are_compared_with_the_first():
    rows = [Row(label, ("ada",), ("a {}",), (0,), {"image": torch.tensor([value])}) for label, value in (("alone", 1.0), ("one", 3.0))]
    found = Evaluation((*rows, replace(rows[1], label="other")), {}).differences()
    assert [(of, against, estimates["image"].mean) for of, against, estimates in found] == [("one", "alone", 2.0), ("other", "alone", 2.0)]


def test_the_report_is_strict_json_that_holds_every_value(pipeline, subjects, tmp_path):
    found = run(pipeline, subjects, tmp_path)
    text = (tmp_path / "evaluation.json").read_text()
    report = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert report == json.loads(json.dumps(found.report()))
    assert str(tmp_path) not in text  # it can be moved with its pictures
    single = report["rows"][2]
    cosines = [math.nan if picture["face_cosine"] is None else picture["face_cosine"] for picture in single["pictures"]]
    assert cosines == pytest.approx(found.row("single").values["face_cosine"].tolist(), nan_ok=True)
    assert single["by_concept"]["ben"]["image"] == pytest.approx(float(found.row("single").values["image"][4:].mean()))


# --- nothing is drawn twice


def test_what_is_there_is_kept_and_what_is_damaged_is_drawn_again(pipeline, subjects, tmp_path):
    run(pipeline, subjects, tmp_path)
    first = files(tmp_path)
    lost, broken, foreign = (tmp_path / name for name in list(first)[::9])
    lost.unlink()
    broken.write_bytes(broken.read_bytes()[:-40])
    Image.new("RGB", (16, 16)).save(foreign)
    again = run(pipeline, subjects, tmp_path)
    assert (again.drawn, again.kept) == (3, 21) and files(tmp_path) == first


def test_only_what_a_setting_changes_is_drawn_again(pipeline, subjects, tmp_path):
    run(pipeline, subjects, tmp_path)
    assert run(pipeline, subjects, tmp_path).drawn == 0
    ada, ben, _ = three(pipeline)
    other = concept(pipeline, "ada", KEYS, rank=1, seed=77)  # the same name, another content
    assert run(pipeline, subjects, tmp_path, variants={"single": Variant({"ada": other, "ben": ben})}).drawn == 4
    assert run(pipeline, subjects, tmp_path, variants={"single": Variant({"ada": ada, "ben": ben}, 0.9)}).drawn == 8
    assert run(pipeline, subjects, tmp_path, seeds=(3, 5, 6), variants={"new": ada.with_(tokens=ben.tokens)}).drawn == 4 + 12
    with torch.no_grad():
        pipeline.base_weight(KEYS[0]).mul_(1.5)
    assert run(pipeline, subjects, tmp_path, variants={"new": ada.with_(tokens=ben.tokens)}).drawn == 16


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.unet.conv_norm_out.weight.mul_(1.5),  # what no adapter reaches
        lambda pipe: pipe.text_encoder.get_input_embeddings().weight.mul_(1.5),
        lambda pipe: pipe.vae.decoder.conv_in.weight.mul_(1.5),
        lambda pipe: pipe.vae.register_to_config(scaling_factor=0.5),
        lambda pipe: pipe.scheduler.register_to_config(beta_end=0.02),
    ],
    ids=["norm", "embedding", "vae", "scale", "betas"],
)
def test_pictures_of_another_base_are_drawn_again(pipeline, subjects, tmp_path, change):
    small = {"variants": {"one": three(pipeline)[0]}, "control": False, "seeds": (1,)}
    drawn = run(pipeline, subjects, tmp_path, **small).drawn
    with torch.no_grad():
        change(pipeline.pipe)
    assert run(pipeline, subjects, tmp_path, **small).drawn == drawn > 0


def test_a_killed_trial_goes_on_to_the_result_of_an_unbroken_one(pipeline, subjects, tmp_path):
    def kill(what: str, share: float) -> None:
        if what == "drawing single" and share > 0.3:
            raise KeyboardInterrupt

    before = fingerprint(pipeline)
    with pytest.raises(KeyboardInterrupt):
        run(pipeline, subjects, tmp_path / "killed", progress=kill)
    assert fingerprint(pipeline) == before and not (tmp_path / "killed" / "evaluation.json").exists()
    there = len(files(tmp_path / "killed"))
    resumed, unbroken = run(pipeline, subjects, tmp_path / "killed"), run(pipeline, subjects, tmp_path / "whole")
    assert 8 < there < 24 and resumed.kept == there and resumed.report() == unbroken.report()
    for name, image in files(tmp_path / "whole").items():
        assert (tmp_path / "killed" / name).read_bytes() == image


# --- mistakes, before anything is drawn


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ["no place"]}, "exactly one {} or <TOK>"),
        ({"prompts": ["a {} and a <TOK>"]}, "exactly one {} or <TOK>"),
        ({"prompts": ["a {}", "a  <TOK>"]}, "given twice"),
        ({"prompts": []}, "at least one adapter, one concept, one prompt"),
        ({"seeds": [1, 1]}, "given twice"),
        ({"variants": {}}, "at least one adapter"),
        ({"variants": {"base": Variant({})}}, "'base' is what a control is called; .*; base has no adapter of ada, ben"),
        ({"variants": {"a/b": Variant({})}}, "row 'a/b' cannot be a folder's name"),
        ({"steps": 0}, "0 steps"),
    ],
)
def test_mistakes_are_said_first(pipeline, subjects, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        run(pipeline, subjects, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_references_without_faces_are_said_first(pipeline, subjects, tmp_path):
    dark = Subject("cai", "cai man", "man", colours((0, 0, 0)))
    with pytest.raises(UsageError, match="faces finds no face in any reference of cai"):
        run(pipeline, [*subjects, dark], tmp_path / "out", variants={"one": three(pipeline)[1]})
    with pytest.raises(UsageError, match="concept cai has no reference pictures"):
        run(pipeline, [Subject("cai", "cai man", "man", [])], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_a_face_judge_there_is_no_identity(pipeline, subjects, tmp_path):
    found = run(pipeline, subjects[:1], tmp_path, face=None, variants={"ada": three(pipeline)[0]})
    assert set(found.row("ada").values) == {"text", "text_cosine", "text_dropped", "image"} and found.row("ada").confusion is None


# --- words and pictures from files


def test_templates_close_up_where_words_are_dropped():
    assert template("a <TOK>, smiling") == template(" a  <TOK> , smiling ") == "a {}, smiling"
    assert fill("a photo of a {}, near {braces}", "man") == "a photo of a man, near {braces}"
    assert fill("a photo of a {} , at night", "") == "a photo of a, at night" and fill("a smiling {}", "") == "a smiling"


def test_calls_come_from_the_receipt_or_from_an_adapter_alone(pipeline):
    ada, ben, _ = three(pipeline)
    assert call_of(ada, "ada", alone=True) == "ada woman" and call_of(ben, "ben", alone=True) == "<ben>"
    assert call_of(ada, "ada", alone=False) is None
    receipt = json.dumps({"inputs": [{"name": "ada", "call": "ada woman"}, {"name": "ben", "call": None}]})
    merged = ada.with_(metadata={"loraclr.receipt": receipt})
    assert [call_of(merged, name, alone=False) for name in ("ada", "ben", "cai")] == ["ada woman", None, None]
    assert call_of(merged, "cai", alone=True) is None  # a merge is nobody's own adapter
    assert call_of(ada.with_(metadata={"loraclr.receipt": "[1]"}), "ada", alone=True) == "ada woman"
    assert [noun_of(call) for call in ("rhea woman", "rhea", "<a> <b>", "<a> old man")] == ["woman", None, None, "man"]


def test_prompts_from_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# for people\na <TOK> ☀\n\n  a {}, smiling\na {} ☀\n", encoding="utf-8")
    assert read_prompts(path) == {"a {} ☀": "", "a {}, smiling": ""}
    path.write_text("a {}\n[mood]\na <TOK>, smiling\n[place]\n# here\na {} at home\na {}\n")
    assert read_prompts(path) == {"a {}": "", "a {}, smiling": "mood", "a {} at home": "place"}
    path.write_text("a {}\n", encoding="utf-8-sig")
    assert read_prompts(path) == {"a {}": ""}
    path.write_text("# nothing\n")
    with pytest.raises(UsageError, match="holds no prompt"):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="no UTF-8 text"):
        read_prompts(path)


def test_captions_from_a_file(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("# ours\na vase\n\n a  cup\na vase\n")
    assert read_captions(path) == ["a vase", "a cup"]
    for text, said in (("a vase\na {}\n", "'a {}' has a place for a concept's words"), ("# none\n", "holds no prompt")):
        path.write_text(text)
        with pytest.raises(UsageError, match=said):
            read_captions(path)


def test_references_from_one_folder_or_one_for_each_concept(tmp_path):
    (tmp_path / "ada").mkdir()
    (picture,) = colours((1, 2, 3))
    picture.save(tmp_path / "ada" / "1.PNG")
    assert list(read_references(tmp_path)) == list(read_references(tmp_path / "ada")) == ["ada"]
    (tmp_path / "empty").mkdir()
    picture.save(tmp_path / "2.jpg")
    for folder, message in (
        (tmp_path, "both pictures and folders"),
        (tmp_path / "empty", "no pictures .*; give either"),
        (tmp_path / "x", "not a folder"),
    ):
        with pytest.raises(UsageError, match=message):
            read_references(folder)
    (tmp_path / "ada" / "2.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match="2.png is not a picture that can be read"):
        read_references(tmp_path / "ada")
