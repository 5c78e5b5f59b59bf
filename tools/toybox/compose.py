"""Pictures of the toybox world: sprites rendered once, then pasted onto drawn scenes. Deterministic per `Picture`."""

from __future__ import annotations

import functools
import itertools
import json
import random
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps
from world import (
    CLOTHES,
    CLOTHES_COLOUR,
    EXPRESSION,
    FACIAL,
    GLASSES,
    HAIR,
    HAIR_COLOUR,
    NEW_STYLES,
    OBJECTS,
    PLAIN,
    SCENES,
    SKIN,
    STYLES,
    Person,
    Picture,
)  # fmt: skip

SIDE = 64
SPRITE = 112
HERE = Path(__file__).parent


def sprite_spec(person: Person) -> dict[str, object]:
    mouth, eyes, brows = EXPRESSION[person.expression]
    glasses, facial = GLASSES[person.glasses], FACIAL[person.facial]
    return {
        "kind": "character",
        "options": {
            "top": [HAIR[person.hair][0]], "topProbability": 100,
            "hairColor": [HAIR_COLOUR[person.hair_colour]], "skinColor": [SKIN[person.skin]],
            "accessories": [glasses or "round"], "accessoriesProbability": 100 if glasses else 0, "accessoriesColor": ["262e33"],
            "facialHair": [facial or "beardLight"], "facialHairProbability": 100 if facial else 0,
            "facialHairColor": [HAIR_COLOUR[person.hair_colour]],
            "mouth": [mouth], "eyes": [eyes], "eyebrows": [brows],
            "clothing": [CLOTHES[person.clothes]], "clothesColor": [CLOTHES_COLOUR[person.clothes_colour]],
        },
    }  # fmt: skip


def _render_part(lines: str) -> bytes:
    command = ["node", str(HERE / "render.mjs"), str(SPRITE)]
    return subprocess.run(command, input=lines.encode(), stdout=subprocess.PIPE, cwd=HERE, check=True).stdout


def render(specs: Sequence[dict[str, object]], processes: int = 2) -> np.ndarray:
    """(len(specs), SPRITE, SPRITE, 4) uint8, straight alpha, through `render.mjs`."""
    bounds = np.linspace(0, len(specs), processes + 1).astype(int)
    parts = ["\n".join(json.dumps(spec) for spec in specs[a:b]) for a, b in itertools.pairwise(bounds)]
    with ThreadPoolExecutor(processes) as pool:
        data = b"".join(pool.map(_render_part, parts))
    return np.frombuffer(data, np.uint8).reshape(len(specs), SPRITE, SPRITE, 4)


@functools.cache
def objects() -> dict[str, np.ndarray]:
    return dict(zip(OBJECTS, render([{"kind": "object", "icon": icon} for icon in OBJECTS.values()], 1), strict=True))


def rgb(hexadecimal: str) -> tuple[int, int, int]:
    return tuple(int(hexadecimal[i : i + 2], 16) for i in (0, 2, 4))  # type: ignore[return-value]


def _jitter(rng: random.Random, colour: tuple[int, int, int], amount: int = 12) -> tuple[int, int, int]:
    return tuple(max(0, min(255, c + rng.randint(-amount, amount))) for c in colour)  # type: ignore[return-value]


def draw_scene(name: str, width: int, rng: random.Random) -> Image.Image:
    """A SIDE x width background, drawn at twice the size."""
    w, h = width * 2, SIDE * 2
    image = Image.new("RGB", (w, h))
    d = ImageDraw.Draw(image)
    horizon = rng.randint(int(h * 0.5), int(h * 0.68))
    sky = {"night": (18, 22, 60), "desert": (250, 205, 140), "snow": (200, 220, 240), "city": (170, 200, 225)}.get(name, (135, 200, 245))
    d.rectangle((0, 0, w, h), fill=_jitter(rng, sky))
    if name == "beach":
        d.rectangle((0, horizon - 22, w, horizon), fill=_jitter(rng, (40, 130, 200)))
        d.rectangle((0, horizon, w, h), fill=_jitter(rng, (238, 214, 160)))
        x, y, r = rng.randint(10, w - 10), rng.randint(8, 30), rng.randint(9, 14)
        d.ellipse((x - r, y - r, x + r, y + r), fill=(255, 240, 120))
    elif name == "forest":
        d.rectangle((0, horizon - 30, w, h), fill=_jitter(rng, (60, 120, 60)))
        for _ in range(w // 12):
            x, y, s = rng.randint(-5, w + 5), rng.randint(horizon - 30, h - 20), rng.randint(16, 32)
            d.rectangle((x - 2, y, x + 2, y + 14), fill=(95, 65, 40))
            d.polygon([(x - s // 2, y + 2), (x + s // 2, y + 2), (x, y - s - 12)], fill=_jitter(rng, (30, 90, 45)))
    elif name == "night":
        for _ in range(w // 6):
            x, y = rng.randint(0, w), rng.randint(0, h)
            d.ellipse((x, y, x + 2, y + 2), fill=(255, 255, 220))
        x, y, r = rng.randint(12, w - 12), rng.randint(14, 34), rng.randint(9, 13)
        d.ellipse((x - r, y - r, x + r, y + r), fill=(245, 240, 200))
        d.rectangle((0, h - 18, w, h), fill=_jitter(rng, (25, 40, 50)))
    elif name == "city":
        x = -rng.randint(0, 12)
        while x < w:
            bw, top = rng.randint(16, 30), rng.randint(8, h // 2)
            grey = rng.randint(85, 140)
            d.rectangle((x, top, x + bw, h), fill=(grey, grey, grey + 10))
            for wy in range(top + 5, h, 11):
                for wx in range(x + 4, x + bw - 5, 9):
                    if rng.random() < 0.7:
                        d.rectangle((wx, wy, wx + 4, wy + 5), fill=(250, 235, 150))
            x += bw + rng.randint(0, 5)
        d.rectangle((0, h - 14, w, h), fill=(70, 70, 75))
    elif name == "snow":
        d.rectangle((0, horizon, w, h), fill=(245, 248, 252))
        d.polygon(
            [(rng.randint(-20, w // 2), horizon), (rng.randint(w // 2, w + 20), horizon), (rng.randint(w // 4, w), horizon - 40)],
            fill=(225, 232, 242),
        )
        for _ in range(w // 4):
            x, y = rng.randint(0, w), rng.randint(0, h)
            d.ellipse((x, y, x + 4, y + 4), fill=(255, 255, 255))
    elif name == "room":
        wall = _jitter(rng, rng.choice([(235, 215, 185), (205, 190, 215), (200, 220, 205)]))
        d.rectangle((0, 0, w, h), fill=wall)
        d.rectangle((0, h - 30, w, h), fill=_jitter(rng, (150, 100, 60)))
        x = rng.randint(4, w - 44)
        d.rectangle((x, 10, x + 40, 52), fill=(255, 255, 255))
        d.rectangle((x + 4, 14, x + 36, 48), fill=(150, 210, 245))
        d.line((x + 20, 14, x + 20, 48), fill=(255, 255, 255), width=3)
    elif name == "desert":
        d.rectangle((0, horizon, w, h), fill=_jitter(rng, (225, 165, 90)))
        for _ in range(3):
            x = rng.randint(0, w)
            d.ellipse((x - 60, horizon - rng.randint(6, 16), x + 60, horizon + 60), fill=_jitter(rng, (232, 175, 100)))
        x, y, r = rng.randint(10, w - 10), rng.randint(10, 30), rng.randint(9, 14)
        d.ellipse((x - r, y - r, x + r, y + r), fill=(255, 120, 60))
    elif name == "field":
        d.rectangle((0, horizon, w, h), fill=_jitter(rng, (110, 190, 80)))
        for _ in range(3):
            x, y = rng.randint(0, w), rng.randint(6, 34)
            d.ellipse((x - 14, y - 6, x + 14, y + 6), fill=(250, 250, 250))
        for _ in range(w // 6):
            x, y = rng.randint(0, w), rng.randint(horizon + 2, h)
            d.ellipse((x - 2, y - 2, x + 3, y + 3), fill=rng.choice([(240, 80, 90), (250, 220, 70), (245, 245, 250)]))
    else:
        raise ValueError(f"no scene called {name!r}; scenes are {', '.join(SCENES)}")
    return image.resize((width, SIDE), Image.Resampling.BOX)


@functools.cache
def _scene_pool(name: str, width: int, variant: int) -> Image.Image:
    return draw_scene(name, width, random.Random(f"{name}/{width}/{variant}"))


def _paste(canvas: Image.Image, sprite: np.ndarray, size: int, x: int, y: int, mirror: bool) -> None:
    image = Image.fromarray(sprite, "RGBA").resize((size, size), Image.Resampling.BOX)
    if mirror:
        image = ImageOps.mirror(image)
    canvas.paste(image, (x, y), image)


def _background(picture: Picture, width: int, rng: random.Random) -> Image.Image:
    kind, name = picture.background
    if kind == "scene":
        return _scene_pool(name, width, rng.randrange(150)).copy()
    return Image.new("RGB", (width, SIDE), _jitter(rng, rgb(PLAIN[name]), 8))


def _places(picture: Picture, rng: random.Random, on_left: bool) -> Iterator[tuple[int, int, int, bool]]:
    """Size, left, top and mirroring of each person's sprite."""
    for index in range(len(picture.people)):
        size = rng.randint(70, 84)
        centre = SIDE * index + SIDE // 2 + rng.randint(-4, 4)
        if picture.thing is not None and len(picture.people) == 1:
            centre += 11 if on_left else -11
        # the head begins about 5 % below the sprite's upper edge
        yield size, centre - size // 2, rng.randint(-1, 6), rng.random() < 0.5


def compose(picture: Picture, sprites: Sequence[np.ndarray]) -> np.ndarray:
    """The picture as (64, 64 or 128, 3) uint8. `sprites` are those of `picture.people`, in order."""
    rng = random.Random(picture.layout)
    width = SIDE * (2 if picture.wide else 1)
    canvas = _background(picture, width, rng)
    if picture.thing and not picture.people:
        size = rng.randint(34, 50)
        _paste(canvas, objects()[picture.thing], size, rng.randint(2, SIDE - size - 2), rng.randint(6, SIDE - size - 2), False)
    side_thing = picture.thing is not None and len(picture.people) == 1
    on_left = rng.random() < 0.5
    for sprite, (size, x, y, mirror) in zip(sprites, _places(picture, rng, on_left), strict=True):
        _paste(canvas, sprite, size, x, y, mirror)
    if side_thing:
        assert picture.thing
        size = rng.randint(22, 27)
        _paste(
            canvas,
            objects()[picture.thing],
            size,
            rng.randint(0, 3) if on_left else SIDE - size - rng.randint(0, 3),
            SIDE - size - rng.randint(0, 3),
            False,
        )
    return np.asarray(styled(canvas, picture.style) if picture.style else canvas)


def styled(image: Image.Image, style: str) -> Image.Image:
    """In one of the base's STYLES, or in one of NEW_STYLES that it never saw."""
    grey = ImageOps.grayscale(image)
    if style == "monochrome":
        return grey.convert("RGB")
    if style == "sepia":
        return ImageOps.colorize(grey, (45, 25, 10), (250, 225, 180), (165, 120, 75))
    if style == "pixel":
        width, height = image.size
        return image.resize((width // 4, height // 4), Image.Resampling.BOX).resize((width, height), Image.Resampling.NEAREST)
    if style == "poster":
        return ImageEnhance.Color(ImageOps.posterize(image, 2)).enhance(1.4)
    if style == "dusk":  # violet shadows, orange lights
        return ImageOps.colorize(grey, (40, 8, 70), (255, 236, 170), (235, 110, 60))
    if style == "sketch":  # dark lines where brightness changes, on cream paper
        values = np.asarray(grey.filter(ImageFilter.GaussianBlur(0.6)), np.float32)
        steep = np.hypot(*np.gradient(values))
        lines = Image.fromarray((255 - np.clip(steep * 4.5, 0, 255)).astype(np.uint8))
        return ImageOps.colorize(lines, (40, 35, 60), (250, 243, 225))
    raise ValueError(f"no style called {style!r}; styles are {', '.join([*STYLES, *NEW_STYLES.values()])}")
