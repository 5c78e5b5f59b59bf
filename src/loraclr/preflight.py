"""Before a merge: should these adapters be merged? What is seen of it in files and base, with a verdict and advice.

`merge` makes the same checks, warns of the same things and refuses the same; a refusal that is a judgement is given up by naming it
in `allow`.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from loraclr.adapter import Adapter, Layer, LoraLayer
from loraclr.collect import Concept
from loraclr.errors import LoraclrError, MergeError, MergeWarning, UsageError
from loraclr.families import NAMES
from loraclr.formats import header, notes, provenance, reduced
from loraclr.methods import METHODS, Method
from loraclr.methods.describe import needs_base
from loraclr.pipeline import Pipeline

Level = Literal["refuse", "warn", "note"]
JUDGED = ("distilled", "edit", "prediction")  # refusals that `allow` turns into warnings
TOLERABLE = 0.05  # expected loss up to which a rank is called enough

_DISTILLERS = r"lcm|lightning|turbo|hyper|dmd2?|tcd|pcm|schnell|distill(?:ed|ation)?"
_DISTILLED = re.compile(
    rf"(?<![a-z])(?:(?:{_DISTILLERS})(?![a-z]).*\d+[ _-]?steps?|lcm[ _-]?lora|lora[ _-]?lcm|hyper[ _-]?(?:sd|sdxl|flux)"
    r"|(?:sd|sdxl|sd15|sdv1-5|flux)[ _-]?(?:lightning|turbo|lcm|hyper))(?![a-z])"
)
_FAST = re.compile(rf"(?<![a-z])(?:{_DISTILLERS})(?![a-z])")
_EDITING = re.compile(r"(?<![a-z])(?:kontext|instruct[ _-]?pix2pix|ip2p|inpaint(?:ing)?|(?:qwen|image)[ _-]edit|fill[ _-]dev)(?![a-z])")
_ABOUT = ("modelspec.title", "ss_output_name", "modelspec.architecture", "ss_base_model_version")
_IN = {"unet.conv_in": (4,), "transformer.x_embedder": (64,)}  # inputs of a text-to-image model's first layer


@dataclass(frozen=True)
class Finding:
    """One thing seen: of which check, of which adapters, and what to do about it."""

    level: Level
    check: str
    adapters: tuple[str, ...]
    message: str


@dataclass(frozen=True)
class Preflight:
    """All findings, the gravest first. `losses` are expected at `rank`, by adapter: 0 nothing, 1 all of its change."""

    findings: tuple[Finding, ...]
    rank: int | None = None
    losses: Mapping[str, float] | None = None
    enough: int | None = None  # the least rank at which no adapter is expected to lose more than 5 %

    @property
    def verdict(self) -> Literal["merge", "merge with care", "do not merge"]:
        levels = {finding.level for finding in self.findings}
        return "do not merge" if "refuse" in levels else "merge with care" if "warn" in levels else "merge"

    def of(self, level: Level) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == level]


def without_base(method: str, *, measure: bool) -> MergeError:
    """What a merge without a base says that needs one; `measure` where only its measuring does."""
    free = ", ".join(name for name, other in METHODS.items() if not needs_base(other))
    give = "give the model that these adapters were trained on: --base PATH_OR_ID, in Python base=Pipeline.load(PATH_OR_ID)"
    if measure:
        return MergeError(
            f"{method} is measured on the base model's features, so --measure (measure=True) needs it; {give}, or do not measure"
        )
    return MergeError(f"{method} needs the base model's features; {give}. Methods that look at weights alone need none: {free}")


def nothing_left(method: Method, inputs: Sequence[Adapter], merged: Sequence[Layer], *, told: bool) -> str:
    """What is said of a merge that made nothing of adapters that change something; empty of others, or where every layer has `told` it."""
    left = any(layer.up.any() and layer.down.any() if isinstance(layer, LoraLayer) else layer.delta().any() for layer in merged)
    if told or left or not any(layer.delta().any() for adapter in inputs for layer in adapter):
        return ""
    given = " and ".join(["weights", *(name for name in ("density", "scale") if hasattr(method, name))])
    return f"{method.name} left nothing of these adapters: every merged layer is zero and changes nothing; look at the {given}"


def preflight(
    adapters: Sequence[Adapter],
    *,
    base: Pipeline | None = None,
    calls: Mapping[str, str] | None = None,
    rank: int | None = None,
    allow: Collection[str] = (),
) -> Preflight:
    """What speaks against merging `adapters`, on `base` if given, and what `rank` would cost.

    `calls` are the words that call them, by name; without an entry what the files say.
    """
    found = list(checks(adapters, base=base, calls=calls or {}, prompted=base is not None, allow=allow))
    try:
        shapes = union(adapters)
        if base is not None:
            base.stages(list(shapes))
            check_fit(shapes, base)
    except LoraclrError as error:
        found.append(Finding("refuse", "layers", (), str(error)))
        return Preflight(_graded(found))
    found += _alone(adapters, shapes)
    losses = enough = None
    if rank is not None:
        kept = reduced.kept(adapters)
        losses = {name: reduced.lost(curve, rank) for name, curve in kept.items()}
        longest = max((len(curve) for curve in kept.values()), default=1)
        enough = next((r for r in range(1, longest + 1) if all(reduced.lost(curve, r) <= TOLERABLE for curve in kept.values())), longest)
        bad = [name for name, loss in losses.items() if loss > TOLERABLE]
        if bad:
            shown = ", ".join(f"{name} {losses[name]:.0%}" for name in bad)
            text = f"rank {rank} is expected to lose of {shown}, by weights alone; rank {enough} loses at most {TOLERABLE:.0%}"
            found.append(Finding("warn", "rank", tuple(bad), text))
    return Preflight(_graded(found), rank, losses, enough)


def checks(
    adapters: Sequence[Adapter],
    *,
    base: Pipeline | None = None,
    calls: Mapping[str, str] | None = None,
    prompted: bool = False,
    allow: Collection[str] = (),
) -> Iterator[Finding]:
    """What headers, names, tokens and triggers tell; `prompted` when the merge calls its concepts in prompts."""
    called = [adapter.name for adapter in adapters]
    for unknown in sorted((calls or {}).keys() - set(called)):
        yield Finding("refuse", "trigger", (), f"a trigger was given for {unknown!r}, but the adapters are {', '.join(called)}")
    calls = {adapter.name: (calls or {}).get(adapter.name) or adapter.call for adapter in adapters}
    if wrong := sorted(set(allow) - set(JUDGED)):
        yield Finding("refuse", "allow", (), f"nothing that can be allowed is called {wrong[0]!r}; allow one of {', '.join(JUDGED)}")
    yield from _names(adapters)
    yield from _families(adapters, base)
    for finding in (*_predictions(adapters, base), *_kinds(adapters)):
        level: Level = "warn" if finding.level == "refuse" and finding.check in allow else finding.level
        hint = f", or give --allow {finding.check} if you know better" if level == "refuse" else ""
        yield Finding(level, finding.check, finding.adapters, finding.message + hint)
    yield from _tokens(adapters)
    if prompted:
        for name, call in calls.items():
            if not call:
                yield Finding("refuse", "trigger", (name,), f"{name} says no trigger words; give them with --trigger {name}=WORDS")
    yield from _clashes(adapters, calls, base)
    for adapter in adapters:
        if notes.NO_MERGES in adapter.metadata.get(provenance.LICENSE, ""):
            yield Finding(
                "warn", "licence", (adapter.name,), f"{adapter.name}: its page allows no merges; ask its author before you share one"
            )


def union(adapters: Sequence[Adapter]) -> dict[str, tuple[int, ...]]:
    """The union of adapted layers by name, sorted, with the weight's shape. Raises MergeError for adapters of different models."""
    shapes: dict[str, tuple[int, ...]] = {}
    owner: dict[str, str] = {}
    for adapter in adapters:
        for layer in adapter:
            known = shapes.setdefault(layer.name, layer.shape)
            owner.setdefault(layer.name, adapter.name)
            if _flat(known) != _flat(layer.shape):
                raise MergeError(
                    f"{layer.name} is {known} in {owner[layer.name]} and {layer.shape} in {adapter.name}; they are of different models"
                )
            if len(layer.shape) > len(known):
                shapes[layer.name] = layer.shape
    if not shapes and not any(adapter.tokens for adapter in adapters):
        raise MergeError("none of the adapters changes any layer; there is nothing to merge")
    return dict(sorted(shapes.items()))


def check_fit(shapes: Mapping[str, tuple[int, ...]], base: Pipeline) -> None:
    """MergeError where layers are of another shape than the base's."""
    weights = {name: tuple(base.base_weight(name).shape) for name in shapes}
    wrong = [f"{name} is {shape}, the base's {weights[name]}" for name, shape in shapes.items() if _flat(shape) != _flat(weights[name])]
    if wrong:
        raise MergeError(
            f"{len(wrong)} layers do not fit the base model: {'; '.join(wrong[:3])}; give the base these adapters were made for"
        )


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], int(torch.Size(shape[1:]).numel())


def _graded(found: Sequence[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(found, key=lambda finding: ("refuse", "warn", "note").index(finding.level)))


def _names(adapters: Sequence[Adapter]) -> Iterator[Finding]:
    called = [adapter.name for adapter in adapters]
    for repeated in sorted({one for one in called if called.count(one) > 1}):
        yield Finding("refuse", "name", (repeated,), f"two adapters are called {repeated!r}; rename one file")
    hashes: dict[str, str] = {}
    for adapter in adapters:
        stated = adapter.metadata.get("sshs_model_hash", "")
        if stated and (first := hashes.setdefault(stated, adapter.name)) != adapter.name:
            text = f"{first} and {adapter.name} hold the very same tensors; give one of them, with the weight of both"
            yield Finding("warn", "name", (first, adapter.name), text)


def _families(adapters: Sequence[Adapter], base: Pipeline | None) -> Iterator[Finding]:
    families = sorted({adapter.family for adapter in adapters if adapter.family})
    stated = tuple(adapter.name for adapter in adapters if adapter.family)
    if len(families) > 1:
        text = f"the adapters belong to different model families ({', '.join(families)}); merge those of one family"
        yield Finding("refuse", "family", stated, text)
    elif base is not None and base.family and families and families[0] != base.family and families[0] in NAMES:
        text = f"the adapters are for {families[0]} models and the base is one of {base.family}; give the base they were made for"
        yield Finding("refuse", "family", stated, text)


def prediction(adapter: Adapter) -> str | None:
    """`epsilon` or `v`, where the header says what the model predicts that the adapter was trained on."""
    if stated := adapter.metadata.get(header.PREDICTION):
        return "v" if stated.startswith("v") else stated
    noted = adapter.metadata.get("ss_v_parameterization", "").casefold()
    if noted in ("true", "1") or "768-v" in adapter.metadata.get("modelspec.architecture", ""):
        return "v"
    return "epsilon" if noted in ("false", "0") else None


def _predictions(adapters: Sequence[Adapter], base: Pipeline | None) -> Iterator[Finding]:
    stated = {adapter.name: kind for adapter in adapters if (kind := prediction(adapter))}
    config = getattr(getattr(base.pipe, "scheduler", None), "config", {}) if base is not None else {}
    seen = {"v_prediction": "v", "epsilon": "epsilon"}.get(dict(config).get("prediction_type", ""))
    kinds = {**stated, **({"the base": seen} if seen and stated else {})}
    if len(set(kinds.values())) > 1:
        text = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        text = f"trained on models that predict different things ({text}); merge those of one kind"
        yield Finding("refuse", "prediction", tuple(stated), text)


def _kinds(adapters: Sequence[Adapter]) -> Iterator[Finding]:
    for adapter in adapters:
        about = " ".join((adapter.name, *(adapter.metadata.get(key, "") for key in _ABOUT))).casefold()
        first = next((name for name, widths in _IN.items() if name in adapter.layers and adapter.layers[name].shape[1] not in widths), None)
        called = bool(adapter.call)
        if (match := _DISTILLED.search(about)) or ((match := _FAST.search(about)) and not called):
            text = f"{adapter.name} ({match[0]!r}) makes sampling faster and is no concept; load it beside the merged file"
            yield Finding("refuse", "distilled", (adapter.name,), text)
        elif match:
            text = f"{adapter.name} has {match[0]!r} in its name; if it makes sampling faster, load it beside the merged file instead"
            yield Finding("warn", "distilled", (adapter.name,), text)
        elif match := _FAST.search(adapter.metadata.get("ss_sd_model_name", "").casefold()):
            text = f"{adapter.name} was trained on a distilled base ({adapter.metadata['ss_sd_model_name']}); it may look worse on others"
            yield Finding("note", "distilled", (adapter.name,), text)
        if first is not None:
            width = adapter.layers[first].shape[1]
            text = f"{adapter.name} is for an editing or control model: its {first} has {width} inputs; use it on that model by itself"
            yield Finding("refuse", "edit", (adapter.name,), text)
        elif match := _EDITING.search(about):
            text = f"{adapter.name} ({match[0]!r}) is for an editing model and is no concept; use it on that model by itself"
            yield Finding("refuse", "edit", (adapter.name,), text)


def _tokens(adapters: Sequence[Adapter]) -> Iterator[Finding]:
    tokens: dict[str, Adapter] = {}
    for adapter in adapters:
        for token, rows in adapter.tokens.items():
            if token in tokens and not torch.equal(tokens[token].tokens[token], rows):
                first = tokens[token].name
                text = f"{first} and {adapter.name} both bring a learned token {token!r}; train or rename one of them"
                yield Finding("refuse", "tokens", (first, adapter.name), text)
            tokens[token] = adapter


def _clashes(adapters: Sequence[Adapter], calls: Mapping[str, str], base: Pipeline | None) -> Iterator[Finding]:
    words = {name: call.casefold().split() for name, call in calls.items() if call}
    for call in sorted({" ".join(said) for said in words.values()}):
        same = tuple(name for name, said in words.items() if " ".join(said) == call)
        if len(same) > 1:
            text = f"{', '.join(same)} are called by the same words {call!r}: no merge can tell them apart; give each its own trigger"
            yield Finding("warn", "trigger", same, text)
    pairs = [(a, b) for index, a in enumerate(words) for b in list(words)[index + 1 :] if words[a] != words[b]]
    for a, b in pairs:
        shared = set(words[a]) & set(words[b])
        if shared and (shared >= set(words[a]) or shared >= set(words[b]) or words[a][0] == words[b][0]):
            text = f"{a} ({calls[a]!r}) and {b} ({calls[b]!r}) share the word {min(shared)!r}; use other triggers"
            yield Finding("warn", "trigger", (a, b), text)
        elif not shared and base is not None and (piece := _piece(base, words[a][0], words[b][0])):
            text = f"the text encoder reads {words[a][0]!r} of {a} and {words[b][0]!r} of {b} as beginning alike, with {piece!r}"
            yield Finding("note", "trigger", (a, b), text)
    for adapter in adapters:
        others = {phrase.casefold() for phrase in adapter.triggers}
        for name, call in calls.items():
            if name != adapter.name and call and call.casefold() in others and calls[adapter.name].casefold() != call.casefold():
                text = f"{name} is called {call!r}, which {adapter.name} answers to as well; give it another trigger"
                yield Finding("warn", "trigger", (name, adapter.name), text)


def _piece(base: Pipeline, a: str, b: str) -> str:
    """The first piece of both words, if it is the same and more than a letter, and neither is a learned token."""
    first, second = (base.pipe.tokenizer.tokenize(word)[:1] for word in (a, b))
    piece = first[0] if first and first == second else ""
    return piece if len(piece) > 1 and not piece.endswith("</w>") and not piece.startswith("<") else ""


def _alone(adapters: Sequence[Adapter], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Finding]:
    if len(adapters) < 2:
        return
    held = Counter(name for adapter in adapters for name in adapter.layers)
    for adapter in adapters:
        mine = [name for name in adapter.layers if held[name] == 1]
        if mine:
            by = ", ".join(f"{count} {component}" for component, count in sorted(Counter(name.split(".", 1)[0] for name in mine).items()))
            text = f"{adapter.name} alone changes {len(mine)} of {len(shapes)} layers ({by}); there the others ask for no change"
            yield Finding("note", "layers", (adapter.name,), text)


def concepts_of(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None,
    calls: Mapping[str, str],
    *,
    needed: bool,
    base: Pipeline | None,
    allow: Sequence[str] = (),
) -> list[Concept]:
    """Adapters with their weights and calls; all that is wrong with them in one message."""
    if not adapters:
        raise UsageError("nothing to merge; give at least one adapter")
    if weights is not None and len(weights) != len(adapters):
        raise UsageError(f"{len(adapters)} adapters and {len(weights)} weights; give one weight per adapter")
    found = list(checks(adapters, base=base, calls=calls, prompted=needed, allow=allow))
    if problems := [finding.message for finding in found if finding.level == "refuse"]:
        raise MergeError("; ".join(problems))
    for finding in found:
        if finding.level == "warn":
            warnings.warn(finding.message, MergeWarning, stacklevel=3)
    return [
        Concept(adapter, calls.get(adapter.name) or adapter.call, 1.0 if weights is None else weights[index])
        for index, adapter in enumerate(adapters)
    ]
