"""Do pictures show what their prompts tell? Shares of attributes that the judge confirms, and the ceilings that it sets.

Prompts tell everything (`whole_caption`). The same judge on true pictures of the same people, and on those through the autoencoder,
says how much of what is missing is the judge's or the autoencoder's. People are of the kind that the base may have seen.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from compose import compose, render, sprite_spec
from PIL import Image
from vae import pixels, reconstruct
from world import OBJECTS, PLAIN, SCENES, Person, Picture, base_person, whole_caption

from loraclr.evaluate import estimate
from loraclr.loading import half
from loraclr.pipeline import Pipeline
from loraclr.toybox.judge import Judge, agreement

Told = Mapping[str, str]
Shares = dict[str, list[float]]  # attribute -> mean and the ends of its 95 % interval


def pictures(pipeline: Pipeline, prompts: Sequence[str], *, seed: int = 0, size: tuple[int, int] | None = None) -> list[Image.Image]:
    """One picture a prompt at seeds seed, seed + 1, ..., in bf16."""
    out = []
    with half("cpu"):
        for start in range(0, len(prompts), 16):
            part = prompts[start : start + 16]
            out += pipeline.sample(part, seeds=range(seed + start, seed + start + len(part)), size=size)
    return out


def one_person(rng: random.Random) -> Picture:
    return Picture((base_person(rng),), None, _place(rng), layout=rng.getrandbits(32))


def two_people(rng: random.Random) -> Picture:
    return Picture((base_person(rng), base_person(rng)), None, _place(rng), wide=True, layout=rng.getrandbits(32))


def one_thing(rng: random.Random) -> Picture:
    return Picture((), rng.choice(list(OBJECTS)), _place(rng), layout=rng.getrandbits(32))


def _place(rng: random.Random) -> tuple[str, str]:
    return ("scene", rng.choice(SCENES)) if rng.random() < 0.5 else ("plain", rng.choice(list(PLAIN)))


def looks(person: Person) -> Told:
    """What a picture of one person is judged by, beside its place."""
    return {**person.identity, "expression": person.expression, "clothes_colour": person.clothes_colour}


def shares(judge: Judge, images: Sequence[Image.Image], told: Sequence[Told], *, parts: int = 1) -> Shares:
    """The share of pictures that show each told attribute; `all` is the mean over a picture's attributes.

    Each run of `parts` images is of one picture, which intervals draw as one.
    """
    read = judge.read(images)
    rows: dict[str, Sequence[Told]] = {"all": told}
    for name in dict.fromkeys(name for one in told for name in one):
        rows[name] = [{name: one[name]} if name in one else {} for one in told]
    return {name: summary(agreement(read, row, judge.heads), parts=parts) for name, row in rows.items()}


def summary(values: torch.Tensor, *, parts: int = 1) -> list[float]:
    """Mean of (n,) values and its 95 % interval, pictures of `parts` values drawn anew."""
    found = estimate(values, factors=[[number // parts for number in range(len(values))]])
    return [round(value, 3) for value in (found.mean, found.low, found.high)]


def three_ways(pipeline: Pipeline, scenes: Sequence[Picture], seed: int) -> dict[str, list[Image.Image]]:
    """The base's pictures of these scenes, and the true ones: as they are, and through the autoencoder."""
    sprites = iter(render([sprite_spec(person) for scene in scenes for person in scene.people]) if any(s.people for s in scenes) else ())
    truth = np.stack([compose(scene, [next(sprites) for _ in scene.people]) for scene in scenes])
    with torch.no_grad():
        back = reconstruct(pipeline.pipe.vae, pixels(truth)).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    drawn = pictures(pipeline, [whole_caption(scene) for scene in scenes], seed=seed, size=truth.shape[1:3])
    return {"base": drawn, "true pictures": _images(truth), "through the autoencoder": _images(back)}


def _images(array: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(one) for one in array]


def halves(images: Iterable[Image.Image]) -> list[Image.Image]:
    """Left and right half of every picture, in turn."""
    return [image.crop((x, 0, x + image.height, image.height)) for image in images for x in (0, image.width - image.height)]


def pairs(judge: Judge, images: Sequence[Image.Image], scenes: Sequence[Picture]) -> dict[str, Shares]:
    """Each half by its own person's attributes; and where the two differ, by the own and by the other's: a base that mixes them has equal
    shares there."""
    parts = halves(images)
    people = [(person, other) for scene in scenes for person, other in (scene.people, scene.people[::-1])]
    own, theirs = [looks(person) for person, _ in people], [looks(other) for _, other in people]
    apart = [[name for name in a if a[name] != b[name]] for a, b in zip(own, theirs, strict=True)]
    only = lambda told: [{name: one[name] for name in names} for one, names in zip(told, apart, strict=True)]  # noqa: E731
    found = {side: shares(judge, parts[k::2], own[k::2]) for k, side in enumerate(("left", "right"))}
    return found | {
        "own, where they differ": shares(judge, parts, only(own), parts=2),
        "the other's, there": shares(judge, parts, only(theirs), parts=2),
    }


def base_report(pipeline: Pipeline, judge: Judge, count: int) -> tuple[dict[str, object], dict[str, list[Image.Image]], list[str]]:
    """Everything about the base; and the pictures of one person three ways with their prompts, for other judges.

    `one person`, `two people`, `one thing` -> `base` and the two ceilings -> shares.
    """
    rng, report = random.Random(5), dict[str, object]()
    single = [one_person(rng) for _ in range(count)]
    seen = three_ways(pipeline, single, 0)
    told = [{**looks(scene.people[0]), "background": scene.background[1]} for scene in single]
    report["one person"] = {kind: shares(judge, images, told) for kind, images in seen.items()}
    both = [two_people(rng) for _ in range(count // 2)]
    report["two people"] = {kind: pairs(judge, images, both) for kind, images in three_ways(pipeline, both, 10_000).items()}
    things = [one_thing(rng) for _ in range(count)]
    shown = [{"thing": scene.thing or "none", "background": scene.background[1]} for scene in things]
    report["one thing"] = {kind: shares(judge, images, shown) for kind, images in three_ways(pipeline, things, 20_000).items()}
    return report, seen, [whole_caption(scene) for scene in single]
