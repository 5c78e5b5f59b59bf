"""ToyFace: who is it? An identity embedding of toybox pictures, and the threshold at which two count as the same person.

Trained with an additive angular margin (ArcFace, Deng et al. 2019, arXiv 1801.07698) over identities of which none is shipped; the
threshold is fixed at 1 % false accepts on further identities that it never saw (tools/toybox/face.py). It has no notion of
attributes: what it measures is not what `Judge` measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import normalize

from loraclr.evaluate import Limit
from loraclr.toybox.judge import convolutions, tensor


class ToyFace(nn.Module):
    """(n, 3, 64, 64) pictures in [-1, 1] -> (n, SIZE) embeddings of length 1."""

    name = "toyface"

    def __init__(self, width: int = 24, size: int = 64, threshold: float = 0.0) -> None:
        super().__init__()
        self.body, features = convolutions(width)
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(features, size), nn.BatchNorm1d(size))
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        return normalize(self.head(self.body(x)), dim=-1)

    @torch.inference_mode()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """(n, size) unit vectors. Two pictures show the same person if their product reaches `threshold`."""
        out: Tensor = self.eval()(tensor(images))
        return out

    @property
    def limit(self) -> Limit:
        return Limit(self.threshold, "cosine")

    def embed_faces(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Per picture (1, size): it takes every picture for one face, and so never says that there is none."""
        return [row[None] for row in self.embed(images)]

    @staticmethod
    def load(path: str | Path) -> ToyFace:
        with safe_open(str(path), "pt") as file:
            face = ToyFace(threshold=float(file.metadata()["threshold"]))
            face.load_state_dict({key: _float(file.get_tensor(key)) for key in file.keys()})  # noqa: SIM118
        return face.eval()


def _float(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
