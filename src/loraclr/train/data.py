"""From folders of pictures to latents and prompts: `NAME.png`, captions `NAME.txt` beside it, a mask `masks/NAME.png`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from loraclr.errors import UsageError
from loraclr.pictures import SUFFIXES, pictures_in, read_picture
from loraclr.pipeline import Pipeline

if TYPE_CHECKING:
    from PIL.Image import Image

PLACEHOLDER = "<TOK>"
_AT_ONCE = 4  # pictures through the autoencoder


@dataclass(frozen=True, eq=False)
class Shot:
    """One picture (RGB) with its captions, of which one is drawn each time, and its mask (L, white where the concept is)."""

    image: Image
    captions: tuple[str, ...] = ()
    mask: Image | None = None


def read_folder(folder: Path, *, call: str | None = None, latent: tuple[int, int] | None = None) -> tuple[list[Shot], list[str]]:
    """The pictures of a folder in the order of their names, and what is wrong with it, one sentence each.

    A caption file has one caption a line. With `call` every caption must hold it, or `<TOK>`, which becomes it. With the height and width
    `latent` that pictures are brought to, every mask must have some white there.
    """
    if not folder.is_dir():
        return [], [f"there is no folder {folder}; give the folder that holds the pictures"]
    paths = pictures_in(folder)
    if not paths:
        return [], [f"{folder} has no pictures; put some there, ending in {', '.join(SUFFIXES)}"]
    shots: list[Shot] = []
    problems: list[str] = []
    masked = (folder / "masks").is_dir()
    for path in paths:
        image = _read(path, "RGB", problems)
        captions = _captions(path, call, problems)
        mask = None
        if masked:
            beside = next((one for one in pictures_in(folder / "masks") if one.stem == path.stem), None)
            if beside is None:
                problems.append(f"{path.name} has no mask in {folder / 'masks'}; draw one, white where the concept is")
            else:
                mask = _read(beside, "L", problems)
        if image and mask and image.size != mask.size:
            problems.append(f"{path.name} is {image.width}x{image.height} and its mask {mask.width}x{mask.height}; make them equal")
        elif mask and latent and not _cells(mask, latent).any():
            problems.append(
                f"the mask of {path.name} is black all over the part that is trained, the middle at {latent[0]}x{latent[1]} cells; "
                "make it white where the concept is"
            )
        if image:
            shots.append(Shot(image, captions, mask))
    if doubled := sorted({path.stem for path in paths if [one.stem for one in paths].count(path.stem) > 1}):
        problems.append(f"two pictures are called {doubled[0]}, so that they would share a caption; rename one")
    return shots, problems


def digest(folder: Path) -> str:
    """SHA-256 over names and contents of pictures, captions and masks."""
    captions = [path.with_suffix(".txt") for path in pictures_in(folder) if path.with_suffix(".txt").exists()]
    found = [*pictures_in(folder), *captions, *(pictures_in(folder / "masks") if (folder / "masks").is_dir() else [])]
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}\n" for path in sorted(found)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _read(path: Path, mode: str, problems: list[str]) -> Image | None:
    try:
        return read_picture(path, mode)
    except UsageError as error:
        problems.append(str(error))
        return None


def _captions(path: Path, call: str | None, problems: list[str]) -> tuple[str, ...]:
    beside = path.with_suffix(".txt")
    if not beside.exists():
        return ()
    try:
        lines = [" ".join(line.split()) for line in beside.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{beside} cannot be read ({error}); save it as UTF-8 text")
        return ()
    texts = [line for line in lines if line]
    if not texts:
        problems.append(f"{beside} is empty; write a caption into it, or remove it")
    if call is not None:
        texts = [text.replace(PLACEHOLDER, call) for text in texts]
        if any(call.casefold() not in text.casefold() for text in texts):
            problems.append(f"the caption {beside.name} does not name the concept; write {PLACEHOLDER} where {call!r} is to stand")
    return tuple(texts)


def _cells(mask: Image, latent: tuple[int, int]) -> Tensor:
    """(1, *latent) of 0 and 1: the mask as the loss sees it."""
    from PIL import Image, ImageOps

    small = ImageOps.fit(mask, (latent[1], latent[0]), Image.Resampling.NEAREST)
    return torch.from_numpy(np.asarray(small).copy())[None].ge(128).float()


class Examples:
    """Pictures as latents, ready to be drawn from. All of them are encoded once.

    `latents` (n, C, h, w), or (2n, ...) with the mirrored ones behind; `masks` alike (., 1, h, w) of 0 and 1, or None.
    """

    def __init__(self, pipeline: Pipeline, shots: Sequence[Shot], *, templates: Sequence[str], call: str, flip: bool) -> None:
        from PIL import Image, ImageOps

        self.size = height, width = pipeline.check_settings(seeds=[], steps=1, guidance=1, size=None)
        filled = tuple(template.replace("{}", call) for template in templates)
        self.prompts = [shot.captions or filled for shot in shots]  # of each picture
        fitted = [ImageOps.fit(shot.image, (width, height), Image.Resampling.LANCZOS) for shot in shots]
        pixels = torch.stack([torch.from_numpy(np.asarray(image).copy()) for image in fitted]).permute(0, 3, 1, 2).float() / 127.5 - 1
        self.latents = _encode(pipeline, torch.cat([pixels, pixels.flip(-1)]) if flip else pixels)
        self.masks: Tensor | None = None
        if all(shot.mask is not None for shot in shots):
            masks = torch.stack([_cells(shot.mask, self.latent) for shot in shots if shot.mask is not None])
            self.masks = torch.cat([masks, masks.flip(-1)]) if flip else masks

    @property
    def latent(self) -> tuple[int, int]:
        height, width = self.latents.shape[-2:]
        return height, width

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, list[str], Tensor]:
        """`count` latents with prompts, and masks of the same height and width: 1 everywhere where there are none."""
        rows = torch.randint(len(self.latents), (count,), generator=generator)
        choices = [self.prompts[row % len(self.prompts)] for row in rows.tolist()]
        picks = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
        prompts = [texts[int(pick * len(texts))] for texts, pick in zip(choices, picks, strict=True)]
        masks = torch.ones(count, 1, *self.latent) if self.masks is None else self.masks[rows]
        return self.latents[rows], prompts, masks


def _encode(pipeline: Pipeline, pixels: Tensor) -> Tensor:
    """(n, 3, H, W) from -1 to 1 -> (n, C, h, w) on the CPU: the mean of the autoencoder's distribution, scaled as the UNet expects."""
    vae = pipeline.pipe.vae
    with torch.no_grad():
        means = [vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mean.float().cpu() for part in torch.split(pixels, _AT_ONCE)]
    return (torch.cat(means) - (getattr(vae.config, "shift_factor", None) or 0.0)) * float(vae.config.scaling_factor)
