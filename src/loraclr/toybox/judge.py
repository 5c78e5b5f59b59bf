"""The attribute judge: a small classifier that reads hair, colours, glasses and the like off a 64x64 toybox picture.

Trained on real renders of people who are none of the shipped identities (tools/toybox/judge.py, where its held-out accuracy is
printed). It says what a picture shows, never who it should be.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn


def convolutions(width: int) -> tuple[nn.Sequential, int]:
    """Four halvings of a 64x64 picture, and how many features come out."""
    channels = (3, width, 2 * width, 4 * width, 4 * width)
    blocks: list[nn.Module] = []
    for a, b in itertools.pairwise(channels):
        blocks += [nn.Conv2d(a, b, 3, padding=1, stride=2), nn.BatchNorm2d(b), nn.ReLU()]
        blocks += [nn.Conv2d(b, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*blocks), 4 * width * 16


def tensor(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of any size as (n, 3, 64, 64) in [-1, 1]."""
    array = np.stack([np.asarray(image.convert("RGB").resize((64, 64))) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().div(127.5).sub(1)


class Judge(nn.Module):
    """(n, 3, 64, 64) pictures in [-1, 1] -> per attribute (n, values) logits. `heads` maps an attribute to its values."""

    def __init__(self, heads: Mapping[str, Sequence[str]], width: int = 32) -> None:
        super().__init__()
        self.heads = {name: tuple(values) for name, values in heads.items()}
        self.body, features = convolutions(width)
        self.mix = nn.Sequential(nn.Flatten(), nn.Linear(features, 192), nn.ReLU(), nn.Dropout(0.2))
        self.out = nn.ModuleDict({name: nn.Linear(192, len(values)) for name, values in self.heads.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.mix(self.body(x))
        return {name: head(features) for name, head in self.out.items()}

    @torch.inference_mode()
    def read(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Per attribute (n, values) probabilities for 64x64 pictures."""
        return {name: logits.softmax(-1) for name, logits in self.eval()(tensor(images)).items()}

    @staticmethod
    def load(path: str | Path) -> Judge:
        with safe_open(str(path), "pt") as file:
            judge = Judge(json.loads(file.metadata()["heads"]))
            judge.load_state_dict({key: file.get_tensor(key).float() for key in file.keys()})  # noqa: SIM118
        return judge.eval()


def agreement(read: Mapping[str, Tensor], truth: Sequence[Mapping[str, str]], heads: Mapping[str, Sequence[str]]) -> Tensor:
    """(n,) share of the told attributes that the judge's first choice confirms; NaN where nothing was told."""
    shares = []
    for index, told in enumerate(truth):
        hits = [heads[name][int(read[name][index].argmax())] == value for name, value in told.items()]
        shares.append(sum(hits) / len(hits) if hits else float("nan"))
    return torch.tensor(shares)


def nearest_identity(read: Mapping[str, Tensor], people: Sequence[Mapping[str, str]], heads: Mapping[str, Sequence[str]]) -> Tensor:
    """(n,) index of the person among `people` whose attributes are jointly the most probable."""
    scores = []
    for person in people:
        terms = [read[name][:, list(heads[name]).index(value)].clamp_min(1e-4).log() for name, value in person.items()]
        scores.append(torch.stack(terms).sum(0))
    return torch.stack(scores).argmax(0)
