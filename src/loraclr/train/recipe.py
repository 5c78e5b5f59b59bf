"""What every recipe has: shared hyper-parameters, the words of a concept, and what a recipe may decide."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, ClassVar

from loraclr.errors import UsageError
from loraclr.methods.options import Option, faults, parameters
from loraclr.train.templates import OBJECT

if TYPE_CHECKING:
    from torch import Tensor

    from loraclr.adapter import Layer
    from loraclr.pipeline import Pipeline
    from loraclr.train.student import Student

# Annotations, so that a recipe gives a shared hyper-parameter another default in one line.
Steps = Annotated[int, Option("optimiser steps", 1)]
Batch = Annotated[int, Option("pictures per step", 1)]
Warmup = Annotated[int, Option("steps over which the learning rates rise from 0", 0)]
Hold = Annotated[float, Option("share of the steps before the learning rates fall linearly to 0; 1: they do not", 0)]
WeightDecay = Annotated[float, Option("of AdamW, on what is trained", 0)]
Clip = Annotated[float, Option("the largest gradient norm; 0: any", 0)]
Flip = Annotated[bool, Option("mirror half of the pictures")]
NoiseOffset = Annotated[float, Option("strength of a noise that is constant over a picture's channel", 0)]
FullLength = Annotated[float, Option("share of steps in which prompts are padded to the text encoder's length, as in sampling", 0)]
Bf16 = Annotated[bool, Option("compute in bfloat16 where that is safe (autocast), if the device can; weights stay float32")]
PriorWeight = Annotated[float, Option("weight of the loss on pictures of the class (prior preservation); 0: none are used", 0)]
PriorPictures = Annotated[int, Option("pictures of the class that the base draws where no folder of them is given", 1)]

# What suits the toybox: few steps of many small pictures.
TOYBOX: Mapping[str, object] = MappingProxyType(
    {"steps": 220, "batch": 8, "warmup": 20, "hold": 0.5, "flip": True, "full_length": 0.5, "bf16": True}
)

_STEM = re.compile(r"[^\W_](?:[\w-]*[^\W_])?")


@dataclass(frozen=True)
class Words:
    """What a concept is called: `call` stands in prompts, `tokens` are those words of it that are learned."""

    call: str
    tokens: tuple[str, ...] = ()
    class_word: str | None = None


@dataclass(frozen=True)
class Recipe:
    """Base of the recipes: a frozen dataclass whose fields are the hyper-parameters, as with merge methods.

    A recipe says what is trained in `attach`. Everything else has a default: the shared loop does the rest.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = MappingProxyType({})
    only_tokens: ClassVar[bool] = False  # whether the adapter has no layers
    for_sdxl: ClassVar[bool] = False  # whether it knows two text encoders
    layerwise: ClassVar[bool] = False  # whether a learned token has a row per cross-attention layer
    templates: ClassVar[tuple[str, ...]] = OBJECT  # for pictures without a caption; {} is the call

    steps: Steps = 1000
    batch: Batch = 2
    warmup: Warmup = 0
    hold: Hold = 1.0
    weight_decay: WeightDecay = 0.01
    clip: Clip = 1.0
    flip: Flip = False
    noise_offset: NoiseOffset = 0.0
    full_length: FullLength = 1.0
    bf16: Bf16 = False
    prior_weight: PriorWeight = 0.0
    prior_pictures: PriorPictures = 200

    def __post_init__(self) -> None:
        found = faults(type(self), {row.name: getattr(self, row.name) for row in parameters(type(self))})
        found += [
            f"{key}={getattr(self, key)!r} must be at most 1." for key in ("hold", "full_length") if not found and getattr(self, key) > 1
        ]
        if found:
            raise UsageError(f"recipe {self.name!r}: " + " ".join(found))

    @property
    def whole_layers(self) -> bool:
        """Whether the adapter's layers are whole matrices, which not every format can hold."""
        return False

    def words(self, trigger: str, class_word: str | None) -> Words:
        """The concept's words, or UsageError that names everything wrong with them."""
        raise NotImplementedError

    def problems(self, pipeline: Pipeline, words: Words) -> list[str]:
        """What does not fit the base, one sentence each."""
        return []

    def attach(self, student: Student, words: Words) -> None:
        """Give the student what it is to learn. Random numbers come from `student.generator` alone."""
        raise NotImplementedError

    @property
    def watches(self) -> bool:
        """Whether `penalty` needs the cross-attention maps."""
        return False

    def penalty(self, maps: Sequence[Tensor], places: Tensor, masks: Tensor, *, latent: tuple[int, int]) -> Tensor | None:
        """An addition to the loss of one step; see `attention_penalty`. Only called if `watches`, and there are masks."""
        return None

    def after_step(self, student: Student) -> None:
        """Follows every optimiser step."""

    def layers(self, student: Student) -> tuple[list[Layer], dict[str, float]]:
        """The trained layers, and numbers worth noting in the file."""
        return student.layers(), {}

    def rate(self, step: int) -> float:
        """The factor on every learning rate at `step`, from 0."""
        rising = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        falling = min(1.0, (1 - step / self.steps) / (1 - self.hold)) if self.hold < 1 else 1.0
        return rising * falling


def plain_words(trigger: str, class_word: str | None, *, suffix: str | None = None) -> Words:
    """`TRIGGER CLASS`, or `TRIGGER SUFFIX` with a suffix: words the text encoder knows already, none learned."""
    problems = []
    trigger, noun = trigger.strip(), (class_word or "").strip()
    if not trigger:
        problems.append("the trigger is empty; give a rare word such as 'rhea'")
    if "<" in trigger or ">" in trigger:
        problems.append(f"the trigger {trigger!r} looks like a learned token, and this recipe learns none; leave the angle brackets off")
    ordinary = set(noun.casefold().split()) | ({suffix} if suffix else set())
    if shared := sorted(set(trigger.casefold().split()) & ordinary):
        problems.append(f"the trigger {trigger!r} is an ordinary word of the class ({', '.join(shared)}); give a rare word instead")
    if suffix is None and not noun:
        problems.append(f"no class word; say what {trigger!r} is, such as --class woman")
    if suffix is not None and noun:
        problems.append(f"the class word {noun!r} has no place in this recipe; leave it out")
    if problems:
        raise UsageError("; ".join(problems))
    return Words(f"{trigger} {suffix or noun}", (), noun or None)


def learned_words(trigger: str, class_word: str | None, *, count: int, followed: bool = False) -> Words:
    """`<rhea>`, or `<rhea1> <rhea2>` with `count` 2, from the trigger `rhea` or `<rhea>`; the class word after it if `followed`."""
    problems = []
    stem = trigger.strip().removeprefix("<").removesuffix(">")
    noun = (class_word or "").strip()
    if not _STEM.fullmatch(stem):
        problems.append(f"the trigger {trigger!r} makes no token; give one word of letters, digits and dashes such as 'rhea'")
    if not noun:
        problems.append(f"no class word; say what {trigger!r} is, such as --class woman: learned tokens start there")
    elif stem.casefold() in noun.casefold().split():
        problems.append(f"the trigger {trigger!r} is an ordinary word of the class; give a rare word instead")
    if problems:
        raise UsageError("; ".join(problems))
    tokens = tuple(f"<{stem}{number}>" for number in range(1, count + 1)) if count > 1 else (f"<{stem}>",)
    return Words(" ".join([*tokens, *([noun] if followed else [])]), tokens, noun)


def too_high(pipeline: Pipeline, names: Sequence[str], rank: int) -> list[str]:
    """A sentence if `rank` is more than some of these layers can hold."""
    held = {name: min(pipeline.base_weight(name).flatten(1).shape) for name in names}
    small = [name for name in names if held[name] < rank]
    if not small:
        return []
    least = min(small, key=lambda name: held[name])
    return [f"rank {rank} is larger than {len(small)} layers, such as {least} of rank {held[least]}; give {held[least]} or less"]
