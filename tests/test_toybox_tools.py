"""The recipe of the toybox, tools/toybox: what can be said of it without drawing or training anything large."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from loraclr.adapter import Adapter, LoraLayer
from loraclr.formats import describe, load_adapter

TOOLS = Path(__file__).parents[1] / "tools" / "toybox"


@pytest.fixture(autouse=True)
def _tools(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(TOOLS)):
            del sys.modules[name]


def test_a_whole_caption_tells_everything_and_a_caption_does_not():
    import world

    rng = random.Random(0)
    left, right = world.base_person(rng), world.base_person(rng)
    picture = world.Picture((left, right), None, ("scene", "beach"), wide=True)
    text = world.whole_caption(picture)
    for person, side in ((left, "left"), (right, "right")):
        part = text.partition(" on the left and ")[0 if side == "left" else 2]
        assert person.expression in part and person.hair_colour in part and f"{person.skin} skin" in part and person.clothes in part
    assert text.endswith(" on the right on a beach") and len(text.split()) < 75
    alone = world.Picture((left,), "cat", ("plain", "orange"))
    assert world.whole_caption(alone).endswith(" next to a cat on an orange background")
    told = [left.hair_colour in world.caption(alone, random.Random(seed), keep_probability=1.0) for seed in range(400)]
    assert 0.75 < sum(told) / len(told) < 0.95  # so it is no measure of a base that is asked for everything


def test_captions_are_those_that_the_base_was_trained_with():
    """Values of the first version: the order of the random numbers is part of the recipe."""
    import world

    rng = random.Random(1)
    picture = world.random_picture(rng, lambda: world.base_person(rng))
    said = [world.caption(picture, random.Random(seed)) for seed in range(3)]
    assert said == CAPTIONS


CAPTIONS = [
    "a man with dark skin and a moustache wearing a yellow shirt next to a fox in the desert",
    "a photo of a serious man with a moustache wearing a yellow shirt next to a fox in a desert",
    "a portrait of a man with dark skin and a moustache wearing a yellow shirt next to a fox in the desert",
]


def test_a_judge_that_was_killed_ends_as_one_that_was_not(tmp_path, monkeypatch):
    import solo

    monkeypatch.setattr(solo, "SAVE_EVERY", 0.0)

    def train(file: Path, dies_at: int | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        calls = 0

        def loss(rng: random.Random, progress: float) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == dies_at:
                raise KeyboardInterrupt
            return (model(torch.randn(8, 3)) - rng.random() - progress).square().mean()

        solo.fit(model, loss, file=file, steps=7, lr=1e-2, warmup=2)
        return model.state_dict()

    whole = train(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", 5)
    resumed = train(tmp_path / "killed", None)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize("file", ["kohya", "diffusers"])
def test_wild_files_keep_the_alpha_of_their_training(file, tmp_path):
    from adapters import as_trained

    names = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "text_encoder.encoder.layers.0.self_attn.q_proj"
    layers = [LoraLayer(name, torch.randn(4, 8).half().float(), torch.randn(8, 4).half().float(), 0.25) for name in names]
    adapter = Adapter.of(layers).with_(name="rhea", triggers=("rhea woman",))
    as_trained(adapter, tmp_path / "rhea.safetensors", file)
    back = load_adapter(tmp_path / "rhea.safetensors")
    assert back == adapter and describe(tmp_path / "rhea.safetensors").format == file and back.call == "rhea woman"
    assert {layer.scale for layer in back} == {0.25}  # alpha 1, rank 4


def test_every_adapter_of_the_toybox_has_a_file_of_its_own(tmp_path):
    import adapters

    sets = ["wild", *adapters.SETS]
    found = adapters.jobs(tmp_path, sets, [], 60, 0.5)
    assert len({job.path for job in found}) == len(found) > 24 * len(sets)
    shortened = {job.kind.changes["steps"] for job in found}
    assert shortened == {110, 20}  # half of the toybox's 220, and of the short recipe's
    assert {job.path.suffix for job in found} == {".pth", ".safetensors"}


def test_further_identities_are_nobody_who_is_shipped():
    import people
    import world

    shipped = {person.key for person in world.identities().values()}
    some = people.bulk(60)
    assert len({tuple(one.person.identity.values()) for one in some}) == 60 and len({one.name for one in some}) == 60
    assert all(one.person.key in world.held_out_keys() and one.person.key not in shipped for one in some)


def test_people_are_of_held_out_combinations_and_close_pairs_differ_in_one_thing():
    import world

    people = world.identities()
    assert all(person.key in world.held_out_keys()[:24] for person in people.values())
    assert all(name in world.TRIGGERS[person.noun] for name, person in people.items())
    for one, other in world.CLOSE:
        a, b = people[one].identity, people[other].identity
        assert sum(a[key] != b[key] for key in a) == 1 and (list(people).index(one) < 12) == (list(people).index(other) < 12)
    reserved = {*world.TRIGGERS["woman"], *world.TRIGGERS["man"]}
    assert {*world.THINGS, *world.NEW_STYLES} < reserved - set(people) and not {*world.NEW_STYLES.values()} & {*world.STYLES}


def test_things_are_drawn_and_told_without_their_looks():
    import people
    import world

    for name, noun in world.THINGS.items():
        shots = people.thing_shots(name, noun)
        assert len({shot.pixels.tobytes() for shot in shots}) == people.PICTURES and shots[0].pixels.shape == (64, 64, 3)
        said = shots[0].caption(f"{name} {noun}", random.Random(0))
        assert said.count(f"{name} {noun}") == 1 and "beach" in said


def test_styles_are_unlike_each_other_and_told_last():
    import compose
    import numpy as np
    import people
    import world
    from PIL import Image

    plain = Image.fromarray(compose.compose(world.Picture((), None, ("scene", "city"), layout=3), []))
    drawn = [np.asarray(compose.styled(plain, style), np.float32) for style in (*world.STYLES, *world.NEW_STYLES.values())]
    assert all(np.abs(a - b).mean() > 5 for k, a in enumerate(drawn) for b in drawn[:k])
    with pytest.raises(ValueError, match="no style called 'cubist'; styles are monochrome"):
        compose.styled(plain, "cubist")
    picture = world.Picture((), "cat", ("scene", "city"))
    assert people.tell_style(picture, "kalle style", random.Random(0)).endswith(" in kalle style")
