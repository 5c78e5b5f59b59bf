"""Every row that `results.py` draws: what is merged by what, beside what was published."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SPLIT = "test"
BULK = "bulk"  # people whom `adapters.py --bulk` trains, none of them shipped
CONTROLLED = ("lora", "edlora")  # recipes whose adapters are also drawn with somebody else's words
# Chosen on the development identities, by the figure `tuning`.
TUNED: Mapping[str, Mapping[str, Any]] = {
    "sum": {"scale": 0.15},
    "svd": {"scale": 0.15},
    "gradient-fusion": {"steps": 20, "spatial_steps": 5},
}


@dataclass(frozen=True)
class Entry:
    """One merge: the recipe's adapters of `names` (all twelve when empty), by `method`."""

    recipe: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    prompts: int = 20  # of the twenty, evenly spaced
    paper: tuple[float, ...] = ()  # text, image, identity: single and merged each, as published
    split: str = SPLIT

    @property
    def needs_statistics(self) -> bool:
        return self.method.startswith("loraclr") and not self.method.startswith("loraclr-reference")


TABLE = {
    "P+": Entry("pplus", "pplus", paper=(0.643, 0.643, 0.683, 0.683, 0.515, 0.515)),
    "Custom Diffusion": Entry("custom-diffusion", "custom-diffusion", paper=(0.668, 0.673, 0.648, 0.623, 0.504, 0.408)),
    "DB-LoRA (FedAvg)": Entry("lora", "average", paper=(0.613, 0.682, 0.744, 0.531, 0.683, 0.098)),
    "MoS (FedAvg)": Entry("edlora", "average", paper=(0.625, 0.621, 0.745, 0.735, 0.728, 0.706)),
    "MoS (gradient fusion)": Entry("edlora", "gradient-fusion", paper=(0.625, 0.631, 0.745, 0.729, 0.728, 0.717)),
    "Orthogonal Adaptation": Entry("orthogonal", "orthogonal", paper=(0.624, 0.644, 0.748, 0.741, 0.740, 0.745)),
    "LoRACLR, paper": Entry("edlora", "loraclr-reference:paper", paper=(0.668, 0.665, 0.766, 0.776, 0.799, 0.828)),
    "LoRACLR, released code": Entry("edlora", "loraclr-reference:official"),
    "LoRACLR, exact optimum": Entry("edlora", "loraclr:exact"),
    "loraclr (ours)": Entry("edlora", "loraclr"),
    "loraclr (ours), DB-LoRA inputs": Entry("lora", "loraclr"),
    "loraclr (ours), mixed inputs": Entry("wild", "loraclr"),
    "loraclr (ours), 1 round": Entry("edlora", "loraclr", {"rounds": 1}),
    "loraclr (ours), 1 round, DB-LoRA inputs": Entry("lora", "loraclr", {"rounds": 1}),
    "loraclr (ours), 1 round, mixed inputs": Entry("wild", "loraclr", {"rounds": 1}),
    "LoRACLR, paper, mixed inputs": Entry("wild", "loraclr-reference:paper"),
    "average, mixed inputs": Entry("wild", "average"),
    "sum, tuned": Entry("edlora", "sum", TUNED["sum"]),
    "svd, tuned": Entry("edlora", "svd", TUNED["svd"]),
    "gradient fusion, tuned": Entry("edlora", "gradient-fusion", TUNED["gradient-fusion"]),
}

CORE = (
    "DB-LoRA (FedAvg)",
    "MoS (FedAvg)",
    "MoS (gradient fusion)",
    "LoRACLR, paper",
    "loraclr (ours)",
    "loraclr (ours), DB-LoRA inputs",
    "loraclr (ours), mixed inputs",
)

# Methods that are merged with fewer concepts, too, and the row of all twelve.
WHOLE: Mapping[str, str] = {"average": "MoS (FedAvg)", "loraclr-reference:paper": "LoRACLR, paper", "loraclr": "loraclr (ours)"}


def orders(names: Sequence[str]) -> list[list[str]]:
    """Three orders in which concepts are added; the first two of each are a probe that stays in all of its subsets."""
    return [random.Random(f"order {order}").sample(list(names), len(names)) for order in range(3)]


def counts(names: Sequence[str]) -> dict[str, Entry]:
    """Nested random subsets. All twelve are rows of the table."""
    found = {}
    for number, order in enumerate(orders(names)):
        for count in (2, 5, 8):
            for method in WHOLE:
                found[f"{count} concepts, order {number}, {method}"] = Entry("edlora", method, names=tuple(order[:count]))
    return found


def margins(names: Sequence[str]) -> dict[str, Entry]:
    """Without contrast, and by margin and lambda; a margin or a lambda of 0 is no contrast."""
    found = {}
    for count in (5, 12):
        chosen = tuple(names[:count])
        found[f"{count} concepts, no contrast"] = Entry("edlora", "loraclr", {"penalty": 0.0, "rounds": 1}, chosen)
        for mode, margin in (("absolute", 0.25), ("absolute", 0.5), ("absolute", 1.0), ("relative", 0.5), ("relative", 1.0)):
            for penalty in (0.001, 0.1):
                settings = {"margin": margin, "margin_mode": mode, "penalty": penalty, "distance": "rms"}
                found[f"{count} concepts, {mode} margin {margin:g}, lambda {penalty:g}"] = Entry("edlora", "loraclr", settings, chosen)
    return found


def inputs(names: Sequence[str]) -> dict[str, Entry]:
    """In one round, whose losses tell more."""
    del names
    recipes = [(part, recipe) for part in ("quarter", "half") for recipe in ("lora", "edlora")]
    return {f"{part} of the steps, {recipe}": Entry(f"{part}/{recipe}", "loraclr", {"rounds": 1}) for part, recipe in recipes}


def beyond(names: Sequence[str]) -> dict[str, Entry]:
    """More people than the toybox ships, by adapters of a short recipe; every fourth prompt."""
    del names
    found = {}
    for count in (12, 24, 50, 100):
        for method in WHOLE if count < 100 else ("loraclr",):
            chosen = tuple(f"p{number:03d}" for number in range(count))
            found[f"{count} identities, {method}"] = Entry(BULK, method, names=chosen, prompts=5)
    return found


def tuning(names: Sequence[str]) -> dict[str, Entry]:
    """What `TUNED` is chosen from, on the *development* identities, by every second prompt."""
    del names
    tried: dict[str, tuple[str, Mapping[str, Any]]] = {
        "average": ("average", {}),
        **{f"sum, scale {scale:g}": ("sum", {"scale": scale}) for scale in (0.05, 0.15, 0.2, 0.3, 0.5)},
        "LoRACLR, paper": ("loraclr-reference:paper", {}),
        **{f"LoRACLR, paper, learning rate {rate:g}": ("loraclr-reference:paper", {"learning_rate": rate}) for rate in (0.001, 0.003)},
        "gradient fusion": ("gradient-fusion", {}),
        "gradient fusion, 100 and 10 steps": ("gradient-fusion", {"steps": 100, "spatial_steps": 10}),
        "gradient fusion, 20 and 5 steps": ("gradient-fusion", {"steps": 20, "spatial_steps": 5}),
        "loraclr (ours)": ("loraclr", {}),
    }
    return {name: Entry("edlora", method, settings, prompts=10, split="development") for name, (method, settings) in tried.items()}


FIGURES = {"counts": counts, "margins": margins, "inputs": inputs, "beyond": beyond, "tuning": tuning}

# Who keeps people apart in one picture: a merge and regions, each one's own adapter and a strategy, or words alone (`free`).
SCENES: Mapping[str, tuple[str, Entry | None]] = {
    "loraclr (ours), regions": ("merged", TABLE["loraclr (ours)"]),
    "loraclr (ours), DB-LoRA inputs, regions": ("merged", TABLE["loraclr (ours), DB-LoRA inputs"]),
    "LoRACLR, paper, regions": ("merged", TABLE["LoRACLR, paper"]),
    "Orthogonal Adaptation, regions": ("merged", TABLE["Orthogonal Adaptation"]),
    "MoS (gradient fusion), regions": ("merged", TABLE["MoS (gradient fusion)"]),
    "P+, regions": ("merged", TABLE["P+"]),
    "MoS (FedAvg), regions": ("merged", TABLE["MoS (FedAvg)"]),
    "DB-LoRA (FedAvg), regions": ("merged", TABLE["DB-LoRA (FedAvg)"]),
    "OMG, own adapters": ("omg", Entry("edlora", "none")),
    "CLoRA, own adapters": ("clora", Entry("edlora", "none")),
    "the base, told what they look like": ("words", None),
    "loraclr (ours), no regions": ("free", TABLE["loraclr (ours)"]),
    "LoRACLR, paper, no regions": ("free", TABLE["LoRACLR, paper"]),
    "MoS (FedAvg), no regions": ("free", TABLE["MoS (FedAvg)"]),
    "loraclr (ours), DB-LoRA inputs, no regions": ("free", TABLE["loraclr (ours), DB-LoRA inputs"]),
    "DB-LoRA (FedAvg), no regions": ("free", TABLE["DB-LoRA (FedAvg)"]),
    "the base, told what they look like, no regions": ("free", None),
}
SCENE_COUNTS = (2, 3, 4, 5, 6)

# People, things and styles in one model.
MIXED = (SPLIT, "objects", "styles")
MIXTURES: Mapping[str, tuple[str, Entry]] = {
    "the base, class words": ("base", Entry("wild", "none")),
    "own adapters, a style's added": ("alone", Entry("wild", "none")),
    "loraclr (ours)": ("merged", Entry("wild", "loraclr")),
    "loraclr (ours), 1 round": ("merged", Entry("wild", "loraclr", {"rounds": 1})),
    "LoRACLR, paper": ("merged", Entry("wild", "loraclr-reference:paper")),
    "average": ("merged", Entry("wild", "average")),
}
THING_PROMPTS = (
    "a photo of a {} in the city",
    "a {} on a beach",
    "a photo of a {} in a forest",
    "a {} in the snow",
    "a {} on a blue background",
)
STYLE_PROMPTS = (
    "a smiling woman with long red hair in {}", "a dog in the snow in {}", "a man with a black afro in a city in {}",
    "a car in a desert in {}", "a woman on a beach in {}", "an angry man in a forest in {}", "a chair in a room in {}",
    "a house at night in {}",
)  # fmt: skip
