"""Prompts for pictures that come without a caption. `{}` is where the concept's call goes."""

from __future__ import annotations

OBJECT = (
    "a photo of a {}",
    "a picture of a {}",
    "a close photo of a {}",
    "a bright photo of a {}",
    "a dark photo of a {}",
    "a photo of one {}",
    "a photo of the {}",
    "a good picture of the {}",
)

PERSON = (
    "a photo of a {}",
    "a picture of a {}",
    "a portrait of a {}",
    "a close photo of a {}",
    "a photo of a {} looking at the camera",
    "a photo of the {}",
    "a bright photo of a {}",
    "a good portrait of the {}",
)

STYLE = (
    "a picture in {}",
    "a drawing in {}",
    "a scene in {}",
    "a detail in {}",
    "a large picture in {}",
    "a small picture in {}",
)
