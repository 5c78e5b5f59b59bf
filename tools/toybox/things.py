"""Four particular things that the base has never seen: a cat, a chair, a vase and a monument, drawn by hand at three times the size."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from compose import SIDE, compose
from PIL import Image, ImageDraw, ImageOps
from world import Picture

SIZE = 168  # the coordinates of the drawings

INK = (45, 35, 50)


def cat(d: ImageDraw.ImageDraw) -> None:
    """Grey, one orange ear and an orange eye patch, white muzzle, green eyes, a red collar with a bell."""
    for left, fill in ((True, (232, 138, 46)), (False, (120, 126, 140))):
        x = [28, 40, 78] if left else [140, 128, 90]
        d.polygon([(x[0], 8), (x[1], 84), (x[2], 46)], fill, INK, 3)
    d.ellipse((22, 34, 146, 142), (120, 126, 140), INK, 3)
    d.ellipse((32, 54, 82, 104), (232, 138, 46))
    d.ellipse((56, 92, 112, 138), (250, 248, 244))
    for x in (46, 96):
        d.ellipse((x, 66, x + 26, 92), (110, 210, 90), INK, 3)
        d.ellipse((x + 9, 68, x + 17, 90), INK)
    d.polygon([(77, 100), (91, 100), (84, 109)], (236, 120, 140))
    for y in (104, 114):
        d.line((8, y - 4, 54, y + 2), INK, 2)
        d.line((160, y - 4, 114, y + 2), INK, 2)
    d.rounded_rectangle((46, 138, 122, 154), 8, (214, 40, 48), INK, 2)
    d.ellipse((76, 144, 92, 160), (250, 210, 60), INK, 2)


def chair(d: ImageDraw.ImageDraw) -> None:
    """A purple armchair with a heart in its back, a yellow seat and turquoise legs."""
    for x in (36, 118):
        d.polygon([(x, 128), (x + 14, 128), (x + (16 if x > 84 else 6), 164), (x + (8 if x > 84 else -2), 164)], (40, 180, 178), INK, 2)
    d.rounded_rectangle((34, 8, 134, 112), 26, (122, 58, 160), INK, 3)
    for x in (62, 84):
        d.ellipse((x, 32, x + 22, 54), (250, 214, 70))
    d.polygon([(63, 48), (105, 48), (84, 74)], (250, 214, 70))
    d.rounded_rectangle((30, 92, 138, 130), 10, (250, 214, 70), INK, 3)
    for x in (14, 128):
        d.rounded_rectangle((x, 66, x + 26, 132), 12, (122, 58, 160), INK, 3)


def vase(d: ImageDraw.ImageDraw) -> None:
    """Turquoise with a white band and a red zigzag in it, two golden handles."""
    for x in (14, 104):
        d.ellipse((x, 40, x + 50, 100), None, (226, 176, 50), 9)
    d.polygon(
        [(62, 10), (106, 10), (98, 44), (136, 88), (128, 130), (104, 160), (64, 160), (40, 130), (32, 88), (70, 44)], (32, 160, 170), INK, 3
    )
    d.polygon([(34, 84), (134, 84), (134, 112), (34, 112)], (250, 246, 236))
    points = [(36 + 12 * k, 108 if k % 2 else 88) for k in range(9)]
    d.line(points, (214, 40, 48), 7, "curve")
    d.rounded_rectangle((56, 4, 112, 18), 6, (226, 176, 50), INK, 2)


def monument(d: ImageDraw.ImageDraw) -> None:
    """A pink obelisk with two blue bands and a golden ball, on three grey steps."""
    for k, fill in enumerate(((96, 100, 112), (126, 130, 142), (158, 162, 172))):
        d.rectangle((14 + 16 * k, 148 - 14 * k, 154 - 16 * k, 164 - 14 * k), fill, INK, 2)
    d.polygon([(60, 120), (108, 120), (96, 40), (72, 40)], (238, 150, 160), INK, 3)
    for y, half in ((98, 20), (66, 15)):
        d.polygon([(84 - half, y), (84 + half, y), (84 + half - 2, y - 14), (84 - half + 2, y - 14)], (50, 80, 190))
    d.ellipse((62, 4, 106, 48), (250, 200, 50), INK, 3)


DRAWN: dict[str, Callable[[ImageDraw.ImageDraw], None]] = {"cat": cat, "chair": chair, "vase": vase, "monument": monument}


def picture(noun: str, background: tuple[str, str], rng: random.Random) -> np.ndarray:
    """(64, 64, 3) uint8: the thing somewhere on that background, larger or smaller, turned a little, now and then mirrored."""
    sprite = Image.new("RGBA", (SIZE, SIZE))
    DRAWN[noun](ImageDraw.Draw(sprite))
    if rng.random() < 0.5:
        sprite = ImageOps.mirror(sprite)
    size = rng.randint(40, 56)
    sprite = sprite.rotate(rng.uniform(-9, 9), Image.Resampling.BICUBIC).resize((size, size), Image.Resampling.LANCZOS)
    canvas = Image.fromarray(compose(Picture((), None, background, layout=rng.getrandbits(32)), []))
    canvas.paste(sprite, (rng.randint(1, SIDE - size - 1), rng.randint(SIDE - size - 8, SIDE - size)), sprite)
    return np.asarray(canvas)
