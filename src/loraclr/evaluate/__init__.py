"""VERB. Adapters x concepts x prompts x seeds -> text, image and identity alignment, with controls and intervals.

`metrics` and `intervals` are pure functions of features and values; `evaluate` draws and judges; encoders are passed in.
"""

from __future__ import annotations

from loraclr.evaluate.evaluation import Evaluation, Row
from loraclr.evaluate.intervals import Estimate, estimate, interval, paired
from loraclr.evaluate.judging import FaceJudge, PictureJudge
from loraclr.evaluate.metrics import (
    Identity,
    Limit,
    Presence,
    acceptance,
    attribute_closeness,
    centres,
    clip_score,
    closest,
    confusion,
    identity,
    image_alignment,
    leakage,
    nearest,
    presence,
    text_cosine,
)
from loraclr.evaluate.scenes import Ensemble, evaluate_scenes, read_scenes
from loraclr.evaluate.subjects import Subject, call_of, noun_of, read_captions, read_prompts, read_references
from loraclr.evaluate.trial import Variant, evaluate

__all__ = [
    "Ensemble",
    "Estimate",
    "Evaluation",
    "FaceJudge",
    "Identity",
    "Limit",
    "PictureJudge",
    "Presence",
    "Row",
    "Subject",
    "Variant",
    "acceptance",
    "attribute_closeness",
    "call_of",
    "centres",
    "clip_score",
    "closest",
    "confusion",
    "estimate",
    "evaluate",
    "evaluate_scenes",
    "identity",
    "image_alignment",
    "interval",
    "leakage",
    "nearest",
    "noun_of",
    "paired",
    "presence",
    "read_captions",
    "read_prompts",
    "read_references",
    "read_scenes",
    "text_cosine",
]
