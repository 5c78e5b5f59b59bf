"""The toybox: a small but real Stable-Diffusion-architecture world that needs no download and no GPU.

A trained base pipeline, 12 development and 12 test identities, four objects and two styles, none of which the base ever saw; for each
one adapter file in the formats of the wild and 16 reference pictures; and judges. Choices are made on the development split, reports on
the test split.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image

from loraclr import disk
from loraclr.errors import UsageError
from loraclr.pipeline import Pipeline
from loraclr.toybox.clip import ToyClip
from loraclr.toybox.face import ToyFace
from loraclr.toybox.judge import Judge

DATA = Path(__file__).parent / "data"
SPLITS = ("development", "test", "objects", "styles")
SIDE = 64


@dataclass(frozen=True)
class ToyConcept:
    """An identity, an object or a style: what it is called, and the ground truth that only judges may see."""

    name: str
    noun: str  # "woman", "cat", ...; "style" for a style
    split: str
    attributes: Mapping[str, str]  # of an identity: hair, hair_colour, skin, glasses, facial


class Toybox:
    """The bundled world. Nothing is loaded before it is asked for."""

    def __init__(self, data: Path = DATA) -> None:
        self.data = data
        self.base_path = data / "base"
        if not (self.base_path / "model_index.json").exists():
            raise UsageError(f"the toybox is not in {data}: install the package with its data")
        described = json.loads((data / "concepts.json").read_text())
        self.concepts = {name: ToyConcept(name, **fields) for name, fields in described.items()}

    def load(self) -> Pipeline:
        """A new base pipeline in float32."""
        return Pipeline.load(self.base_path)

    @cached_property
    def judge(self) -> Judge:
        return Judge.load(self.data / "judge.safetensors")

    @cached_property
    def clip(self) -> ToyClip:
        return ToyClip.load(self._weights("clip"))

    @cached_property
    def face(self) -> ToyFace:
        return ToyFace.load(self._weights("face"))

    def names(self, split: str = "development") -> list[str]:
        if split not in SPLITS:
            raise UsageError(f"no split called {split!r}; the splits are {', '.join(SPLITS)}")
        return [name for name, concept in self.concepts.items() if concept.split == split]

    def _weights(self, name: str) -> Path:
        path = self.data / f"{name}.safetensors"
        if not path.is_file():
            raise UsageError(f"this toybox has no {path.name}; train one with tools/toybox/{name}.py and give its path: toy{name}:FILE")
        return path

    def adapter_paths(self, split: str = "development") -> dict[str, Path]:
        """One adapter file per concept of the split."""
        return {name: next((self.data / "loras" / split).glob(f"{name}.*")) for name in self.names(split)}

    @property
    def prompts_path(self) -> Path:
        """The twenty prompts of the evaluation protocol, in four groups, as `loraclr evaluate --prompts` reads them."""
        return self.data / "prompts.txt"

    def references(self, name: str) -> list[Image.Image]:
        """The 16 pictures (64x64) that the concept's adapter was trained on."""
        strip = Image.open(self.data / "references" / f"{name}.png").convert("RGB")
        return [strip.crop((x, 0, x + SIDE, SIDE)) for x in range(0, strip.width, SIDE)]

    def export(self, folder: Path, split: str = "development") -> Path:
        """Write `base/`, `loras/`, `references/NAME/` and `prompts.txt` into a new or empty folder, all of them or nothing."""
        paths = self.adapter_paths(split)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder} exists and is not an empty folder; give another one")
        disk.make_folder(folder.parent)
        with disk.reserved(folder), disk.whole(folder) as part:
            for file in filter(Path.is_file, sorted(self.base_path.rglob("*"))):  # copytree hides what the system said
                target = part / "base" / file.relative_to(self.base_path)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
            shutil.copy(self.prompts_path, part)
            (part / "loras").mkdir()
            for name, path in paths.items():
                shutil.copy(path, part / "loras" / path.name)
                (part / "references" / name).mkdir(parents=True)
                for index, image in enumerate(self.references(name)):
                    image.save(part / "references" / name / f"{index:02d}.png")
        return folder


def open_toybox() -> Toybox:
    """The toybox that ships with the package."""
    return Toybox()
