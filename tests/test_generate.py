"""Pictures with their settings, and regions from text."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from loraclr.adapter import Adapter
from loraclr.control import Control
from loraclr.errors import UsageError
from loraclr.generate import Region, generate, parse_region
from loraclr.pipeline import GUIDANCE, Pipeline
from loraclr.settings import parameters, read_settings, warn_of_versions


@pytest.fixture
def pipeline(tiny_pipe) -> Pipeline:
    return Pipeline(tiny_pipe())


def test_every_prompt_with_every_seed_in_order_whatever_the_batch(pipeline):
    runs = [list(generate(pipeline, ["a man", "b"], seeds=[1, 2, 3], steps=2, batch_size=size)) for size in (1, 4, 100)]
    for run in runs:
        assert [(made.prompt, made.seed) for made in run] == [(prompt, seed) for prompt in ("a man", "b") for seed in (1, 2, 3)]
        for made, first in zip(run, runs[0], strict=True):
            assert np.abs(np.asarray(made.image).astype(int) - np.asarray(first.image)).max() <= 1
            assert made.settings == first.settings


def test_a_saved_picture_explains_itself_and_can_be_made_again(pipeline, tmp_path):
    tokens = {"<Rhea1>": torch.randn(1, 32)}
    region = Region("a <Rhea1>", (0.0, 0.0, 1.0, 0.5), "b")
    with pipeline.applied(Adapter({}, name="rhea", tokens=tokens), scale=0.5):
        (made,) = generate(pipeline, ["ein Mädchen ☀"], seeds=[7], steps=2, negative="bad", size=(16, 24), regions=[region])
        path = made.save(tmp_path / "new" / "picture.png")
        with Image.open(path) as picture:
            assert picture.format == "PNG" and (np.asarray(picture) == np.asarray(made.image)).all()
            saved = json.loads(picture.text["loraclr"])
        again = pipeline.sample(
            [saved["prompt"]],
            seeds=[saved["seed"]],
            steps=saved["steps"],
            guidance=saved["guidance"],
            negative=saved["negative"],
            size=tuple(saved["size"]),
            regions=[Region(part["prompt"], tuple(part["box"]), part["negative"]) for part in saved["regions"]],
            scheduler=saved["scheduler"],
        )
    assert (np.asarray(again[0]) == np.asarray(made.image)).all()
    assert saved["adapters"] == [{"name": "rhea", "scale": 0.5}] and saved["tokens"] == ["<Rhea1>"]
    assert saved["prompt"] == "ein Mädchen ☀" and saved["size"] == [16, 24] and saved["dtype"] == "float32"
    assert saved["versions"].keys() == {"loraclr", "torch", "diffusers", "transformers"}


def test_regions_do_not_depend_on_the_batch_either(pipeline):
    regions = [Region("a dog", (0.0, 0.0, 1.0, 0.5)), Region("a cat", (0.0, 0.25, 0.5, 1.0), "bad")]
    runs = [list(generate(pipeline, ["a man"], seeds=[1, 2, 3], steps=3, regions=regions, batch_size=size)) for size in (1, 3)]
    for one, other in zip(*runs, strict=True):
        assert np.abs(np.asarray(one.image).astype(int) - np.asarray(other.image)).max() <= 1


def test_other_tools_see_the_settings_as_they_write_them(pipeline, tmp_path):
    with pipeline.applied(Adapter({}, name="rhea"), scale=0.5):
        (made,) = generate(pipeline, ["ein Mädchen"], seeds=[7], steps=2, negative="bad", size=(16, 24))
    with Image.open(made.save(tmp_path / "picture.png")) as picture:
        said = picture.text["parameters"]
    assert said == parameters(made.settings)
    prompt, negative, facts = said.split("\n")
    assert prompt == "ein Mädchen <lora:rhea:0.5>" and negative == "Negative prompt: bad"
    assert facts.startswith("Steps: 2, Sampler: DDIM, CFG scale: 4, Seed: 7, Size: 24x16, Model: ") and "Version: loraclr" in facts


def test_parameters_tell_regions_and_strategies():
    settings = {
        "prompt": "two", "negative": "", "seed": 1, "steps": 2, "guidance": 7.5, "size": [64, 128], "base": "a/sd15", "adapters": [],
        "scheduler": "Other", "regions": [{"prompt": "a, b", "negative": "", "box": [0, 0, 1, 0.5]}], "strategy": {"name": "omg"},
        "versions": {"loraclr": "1"},
    }  # fmt: skip
    assert parameters(settings).split("\n") == [
        "two",
        "Steps: 2, Sampler: Other, CFG scale: 7.5, Seed: 1, Size: 128x64, Model: sd15, Strategy: omg, "
        'Region 1: "a, b||0,0,1,0.5", Version: loraclr 1',
    ]


def test_settings_are_read_back_and_what_is_wrong_is_said(pipeline, tmp_path):
    (made,) = generate(pipeline, ["a"], seeds=[0], steps=1)
    path = made.save(tmp_path / "a.png")
    assert read_settings(path) == json.loads(json.dumps(made.settings))
    with pytest.raises(UsageError, match="no picture"):
        read_settings(tmp_path / "none.png")
    made.image.save(tmp_path / "bare.png")
    with pytest.raises(UsageError, match="holds no settings"):
        read_settings(tmp_path / "bare.png")
    (tmp_path / "text.png").write_text("no")
    with pytest.raises(UsageError, match="not a picture"):
        read_settings(tmp_path / "text.png")
    for text, message in (("{", "are damaged"), ("[1]", "lack prompt, seed"), ('{"prompt": "a"}', "lack seed, steps")):
        info = PngInfo()
        info.add_text("loraclr", text)
        made.image.save(tmp_path / "other.png", pnginfo=info)
        with pytest.raises(UsageError, match=message):
            read_settings(tmp_path / "other.png")
    with pytest.warns(UserWarning, match=r"a.png was drawn with torch 1.0 \(here"):
        warn_of_versions({"versions": {"torch": "1.0", "loraclr": "0"}}, path)


def test_a_control_is_followed_and_named(pipeline):
    from diffusers import T2IAdapter

    model = T2IAdapter(in_channels=3, channels=(32, 64, 64), num_res_blocks=1, downscale_factor=2).eval()
    control = Control(model, Image.new("RGB", (8, 8), "red"), 50.0, boxes=(((0.0, 0.0, 1.0, 0.5), 1.0),), name="pose")
    followed, plain = (next(generate(pipeline, ["a"], seeds=[0], steps=1, controls=controls)) for controls in ([control], []))
    assert np.abs(np.asarray(followed.image).astype(int) - np.asarray(plain.image)).max() > 1
    assert followed.settings["controls"] == [{"kind": "adapter", "name": "pose", "weight": 50.0, "boxes": [[[0.0, 0.0, 1.0, 0.5], 1.0]]}]


def test_defaults_are_the_models_size_and_are_written_down(pipeline):
    (made,) = generate(pipeline, ["a"], seeds=[0], steps=1)
    assert made.image.size == (16, 16) and made.settings["size"] == [16, 16]
    assert made.settings["guidance"] == GUIDANCE == 4.0 and made.settings["scheduler"] == "DDIMScheduler"


def test_only_png_keeps_settings(pipeline, tmp_path):
    (made,) = generate(pipeline, ["a"], seeds=[0], steps=1)
    with pytest.raises(UsageError, match=r"'a.jpg' is not a PNG name"):
        made.save(tmp_path / "a.jpg")


def test_progress_runs_over_all_batches(pipeline):
    seen = []
    list(generate(pipeline, ["a"], seeds=[0, 1, 2], steps=2, batch_size=2, callback=lambda *progress: seen.append(progress)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "a"}, "list of at least one prompt"),
        ({"prompts": []}, "list of at least one prompt"),
        ({"seeds": []}, "at least one seed"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"steps": 0}, "0 steps"),
        ({"size": (3, 4)}, "size 3x4"),
    ],
)
def test_mistakes_are_said_at_the_call(pipeline, changes, message):
    arguments = {"prompts": ["a"], "seeds": [0], **changes}
    with pytest.raises(UsageError, match=message):
        generate(pipeline, arguments.pop("prompts"), **arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a man|0,0,1,0.5", Region("a man", (0, 0, 1, 0.5))),
        (" a man | bad, ugly | 0, .25, 1, .5 ", Region("a man", (0, 0.25, 1, 0.5), "bad, ugly")),
        ("a man||0,0,1,1", Region("a man", (0, 0, 1, 1))),
        ("a, b|[0,0,512,320]", Region("a, b", (0, 0, 1, 0.3125))),
        ("a|0,650,512,910", Region("a", (0, 650 / 1024, 1, 910 / 1024))),
        ("a|0,0,1,2", Region("a", (0, 0, 1 / 512, 2 / 1024))),
    ],
)
def test_regions_from_text(text, expected):
    assert parse_region(text, (512, 1024)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a man", "has 1 fields"),
        ("a|b|c|0,0,1,1", "has 4 fields"),
        ("a|0,0,1", "has 3 numbers"),
        ("a|0,0,1,1,1", "has 5 numbers"),
        ("a|", "has 1 numbers"),
        ("a|0,0,one,1", "'one' is not a number"),
        ("a|0,0,nan,1", "'nan' is not a number"),
        ("a|0,0,inf,1", "'inf' is not a number"),
        ("a|0,,1,1", "'' is not a number"),
        ("a|0.5,0,0.2,1", "reversed, y1 0.5 is beyond y2 0.2"),
        ("a|0,60,64,10", "reversed, x1 60 is beyond x2 10"),
        ("a|0,0.5,1,0.5", "empty, x1 equals x2"),
        ("a|0,0,65,64", "reaches outside the picture of 64x128"),
        ("a|0,0,64,129", "reaches outside the picture of 64x128"),
        ("a|-1,0,64,64", "starts outside the picture"),
        ("a|0,0.5,64,64", "mixes pixels and fractions"),
        (" |0,0,1,1", "has no prompt"),
    ],
)
def test_every_mistake_in_a_region_has_its_own_message(text, message):
    with pytest.raises(UsageError, match=message):
        parse_region(text, (64, 128))


@given(st.integers(2, 2000), st.integers(2, 2000), st.data())
def test_pixels_are_fractions_of_the_picture(height, width, data):
    y1, x1 = data.draw(st.integers(0, height - 2)), data.draw(st.integers(0, width - 2))
    y2, x2 = data.draw(st.integers(y1 + 2, height)), data.draw(st.integers(x1 + 2, width))
    assert parse_region(f"a|{y1},{x1},{y2},{x2}", (height, width)).box == (y1 / height, x1 / width, y2 / height, x2 / width)
