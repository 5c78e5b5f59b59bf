"""ToyClip: does the picture show what the words say? An image tower and a text tower with one space.

Trained by contrast of pictures and captions (Radford et al. 2021, arXiv 2103.00020) of people none of whom is shipped; its words are
looked up whole and its text tower shares nothing with the pipeline's text encoder (tools/toybox/clip.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import normalize

from loraclr.toybox.judge import convolutions, tensor

LENGTH = 48  # words of a caption that are read


class ToyClip(nn.Module):
    """`vocabulary` are the words it knows; others are read as one unknown word."""

    name = "toyclip"

    def __init__(self, vocabulary: Sequence[str], width: int = 24, size: int = 128) -> None:
        super().__init__()
        self.vocabulary = tuple(vocabulary)
        self.index = {word: number + 2 for number, word in enumerate(self.vocabulary)}  # 0 pads, 1 is an unknown word
        self.body, features = convolutions(width)
        self.picture = nn.Sequential(nn.Flatten(), nn.Linear(features, size))
        self.words = nn.Embedding(len(self.vocabulary) + 2, size, padding_idx=0)
        self.places = nn.Parameter(torch.randn(LENGTH, size) * 0.02)
        layer = nn.TransformerEncoderLayer(size, 4, 2 * size, 0.0, "gelu", batch_first=True, norm_first=True)
        self.reader = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.meaning = nn.Linear(size, size)
        self.temperature = nn.Parameter(torch.tensor(2.7))  # log of the inverse temperature

    def ids(self, texts: Sequence[str]) -> Tensor:
        """(n, LENGTH) word numbers."""
        rows = torch.zeros(len(texts), LENGTH, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            numbers = [self.index.get(word, 1) for word in text.lower().split()][:LENGTH]
            row[: len(numbers)] = torch.tensor(numbers, dtype=torch.long)
        return rows

    def see(self, x: Tensor) -> Tensor:
        """(n, 3, 64, 64) in [-1, 1] -> (n, size) unit vectors."""
        return normalize(self.picture(self.body(x)), dim=-1)

    def read(self, ids: Tensor) -> Tensor:
        """(n, LENGTH) -> (n, size) unit vectors."""
        known = (ids > 0).unsqueeze(-1).float()
        states = self.reader(self.words(ids) + self.places, src_key_padding_mask=(ids == 0) & (ids.cumsum(1) > 0))
        return normalize(self.meaning((states * known).sum(1) / known.sum(1).clamp(min=1)), dim=-1)

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """(n, size) unit vectors."""
        return self.eval().see(tensor(images))

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(n, size) unit vectors."""
        return self.eval().read(self.ids(texts))

    @staticmethod
    def load(path: str | Path) -> ToyClip:
        with safe_open(str(path), "pt") as file:
            clip = ToyClip(json.loads(file.metadata()["vocabulary"]))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            clip.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in tensors.items()})
        return clip.eval()
