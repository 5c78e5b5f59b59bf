"""Scenes of several people: who is asked for where, who is found there, and what is drawn anew."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from concepts import KEYS, SPATIAL, concept
from PIL import Image

from loraclr.conditioning import Region
from loraclr.errors import UsageError
from loraclr.evaluate import Ensemble, Limit, Subject, evaluate_scenes, read_scenes
from loraclr.evaluate.metrics import centres, presence
from loraclr.generate import generate
from loraclr.pipeline import Pipeline

LEFT, RIGHT, WHOLE = (0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)
SCENES = [
    Ensemble("two people", ("ada", "ben"), (Region("a {} at home", LEFT), Region("{}", RIGHT, "bad"))),
    Ensemble("one", ("ben",), (Region("{} alone", WHOLE),)),
]
SETTINGS = {"seeds": (3, 5), "steps": 1, "guidance": 1.0, "size": (16, 32)}


class Colours:
    """A face is a picture's mean colour; a picture in which red leads has none."""

    name, limit = "colours", Limit(0.2, "cosine")

    def embed_faces(self, images):
        means = [torch.tensor(list(image.get_flattened_data())).double().mean(0) - 127.5 for image in images]
        return [mean[None] if mean.argmax() else torch.empty(0, 3, dtype=torch.float64) for mean in means]


@pytest.fixture
def pipeline(tiny_pipe) -> Pipeline:
    return Pipeline(tiny_pipe())


def subjects() -> list[Subject]:
    pictures = {name: [Image.new("RGB", (4, 4), colour)] for name, colour in (("ada", (90, 200, 100)), ("ben", (100, 110, 240)))}
    return [Subject("ada", "ada woman", "woman", pictures["ada"]), Subject("ben", "ben man", "man", pictures["ben"])]


def run(pipeline, folder, scenes=SCENES, **changes):
    both = concept(pipeline, "both", (*KEYS, *SPATIAL), rank=2, seed=9)
    return evaluate_scenes(pipeline, {"both": both}, subjects(), scenes=scenes, face=Colours(), output=folder, **SETTINGS | changes)


def test_everybody_is_looked_for_in_the_own_box_of_what_generate_draws(pipeline, tmp_path):
    found, face = run(pipeline, tmp_path), Colours()
    assert [row.label for row in found.rows] == ["base", "both"] and (found.drawn, found.kept) == (8, 0)
    regions = [Region("a woman at home", LEFT), Region("man", RIGHT, "bad")]
    drawn = [made.image for made in generate(pipeline, ["two people"], regions=regions, **SETTINGS)]
    base = found.rows[0]
    assert [Image.open(tmp_path / name).tobytes() for name in base.files[:2]] == [image.tobytes() for image in drawn]
    known = centres([face.embed_faces(one.references) for one in subjects()], face.limit)
    for index, image in enumerate(drawn):
        faces = face.embed_faces([image.crop((0, 0, 16, 16)), image.crop((16, 0, 32, 16))])
        table = torch.stack([face.limit.closeness(own, known)[0] if len(own) else torch.full((2,), torch.nan).double() for own in faces])
        wanted = presence([table], face.limit, placed=True)
        assert base.values["present, 2 people"][index] == wanted.share[0]
        assert base.values["all present, 2 people"][index] == wanted.everyone[0]
    assert all(row.values["present, 2 people"].isnan().tolist() == [False, False, True, True] for row in found.rows)
    assert [row.estimates()["all present, 1 person"].count for row in found.rows] == [2, 2]
    ((of, against, estimates),) = found.differences()
    assert (of, against, estimates["present, 2 people"].count) == ("both", "base", 2)
    assert json.loads((tmp_path / "scenes.json").read_text()) == found.report()


def test_only_what_changed_is_drawn_again(pipeline, tmp_path):
    first = run(pipeline, tmp_path).report()
    again = run(pipeline, tmp_path)
    assert (again.drawn, again.kept) == (0, 8) and again.report() == first
    moved = replace(SCENES[1], regions=(Region("{} alone", LEFT),))
    assert run(pipeline, tmp_path, [SCENES[0], moved]).drawn == 4


def test_mistakes_are_said_first(pipeline, tmp_path):
    stranger = Ensemble("one", ("zoe",), (Region("{}", WHOLE),))
    for changes, message in (({"scenes": [stranger]}, "ask for zoe; the references are of ada, ben"), ({"scenes": []}, "at least one")):
        with pytest.raises(UsageError, match=message):
            run(pipeline, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_scenes_from_a_file(tmp_path):
    path = tmp_path / "scenes.txt"
    path.write_text(
        "\ufeff# mine\ntwo people\n\ta {ada} at home|0,0,1,0.5\n\n  {ben}|bad|0,16,16,32\none\n  {ben} alone|0,0,1,1\n", "utf-8"
    )
    assert read_scenes(path, (16, 32)) == SCENES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no scene in it"),
        ("two people\n", "'two people' has nobody in it"),
        ("  {ada}|0,0,1,1\n", "stands before any prompt"),
        ("a\n  ada|0,0,1,1\n", "names 0 concepts; write one"),
        ("a\n  {ada} and {ben}|0,0,1,1\n", "names 2 concepts"),
        ("a\n  {ada}\n", "1 fields"),
        ("a\n  {ada}|0,0,1,2\n  {ben}|0,0,99,2\n", "reaches outside"),
    ],
)
def test_every_mistake_in_a_file_has_its_own_message(tmp_path, text, message):
    (tmp_path / "scenes.txt").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_scenes(tmp_path / "scenes.txt", (16, 32))
