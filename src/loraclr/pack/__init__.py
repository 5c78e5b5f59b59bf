"""Adapters one at a time -> a folder from which any of them are merged later, without the base and without the others.

A pack holds, per concept, the adapter and what every layer saw with that adapter *alone*; and what the layers see on prompts without any
concept. Nothing in it depends on who else is in it: a concept is added or removed without a look at the others, and a build sums the
statistics of those that are there, in the order of their names. The staged merge (merge.py) collects keys, values and the rest of the
UNet behind the merged text encoder instead, which no pack can know beforehand (docs/packs.md).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraclr import disk
from loraclr.adapter import STAGES, Adapter
from loraclr.collect import Collection, Concept, check_held_out
from loraclr.errors import FormatError, MergeError, UsageError
from loraclr.merge import MergeResult, merge
from loraclr.methods import NEEDS, Method, make_method
from loraclr.pack.file import KINDS, PackFile
from loraclr.pack.gather import PRESERVATION, Gather, additions, read, settings_of
from loraclr.pipeline import Pipeline
from loraclr.statistics import LayerStats, Moments

__all__ = ["Pack", "PackFile"]

HOLDS = frozenset({"statistics", "held_out", "preserve", "generator"})  # what of a method's needs a pack can give

Tell = Callable[[str, float], None]


@dataclass(frozen=True, eq=False)
class Pack:
    """A pack on disk, as it was when it was opened."""

    path: Path
    files: tuple[PackFile, ...]

    @staticmethod
    def open(path: str | Path) -> Pack:
        """The pack in a folder. Raises FormatError where there is none or its files do not belong together."""
        path = Path(path)
        files = read(path) if path.is_dir() else ()
        if not any(file.concept is None for file in files):
            raise FormatError(f"{path} is no pack; make one with `loraclr pack create`, under a free name")
        return Pack(path, files)

    @staticmethod
    def create(
        path: str | Path,
        adapters: Sequence[Adapter | str | Path],
        *,
        base: Pipeline,
        calls: Mapping[str, str] | None = None,
        collection: Collection | None = None,
        progress: Tell | None = None,
        scratch: str | Path | None = None,
    ) -> Pack:
        """A new pack of adapters (or their files) of one base, whole or not at all.

        It is made under a hidden name beside `path`; killed, the same call goes on with what is missing. `calls` gives the words that
        call an adapter, by its name. `progress` is told a phase and its share done, 0..1. `scratch` is a folder for statistics that do not
        fit into memory, the pack's own without it. Raises UsageError where `path` exists and is
        not this very pack, MergeError for adapters that do not fit each other or the base.
        """
        path, settings = Path(path), dataclasses.replace(collection or Collection(), sample=0)
        with disk.reserved(path):
            gather, new = Gather(base, settings, progress, scratch), additions(adapters, base, calls or {})
            mine = {one.name: one.fingerprint for one in new}
            if path.exists():
                made = Pack.open(path)
                gather.check(path, made.files)
                if {name: made.held(name).about["fingerprint"] for name in made.concepts} != mine:
                    raise UsageError(f"{path} exists already, with {', '.join(made.concepts) or 'no concept'}; use `loraclr pack add`")
                return made
            with disk.folder(path.with_name(f".{path.name}.making")) as work:
                left_over = read(work)
                gather.check(work, left_over)
                for left in left_over:
                    if left.concept is not None and left.about["fingerprint"] != mine.get(left.concept):
                        left.path.unlink()  # of an earlier try with other adapters
                gather.fill(work, new)
            os.rename(work, path)
        return Pack.open(path)

    @property
    def concepts(self) -> tuple[str, ...]:
        """The names of its concepts, sorted."""
        return tuple(sorted(str(file.concept) for file in self.files if file.about["adapter"] is not None))

    @property
    def base(self) -> str:
        """Where the base was loaded from when the pack was made."""
        return str(self.files[0].about["base"]["source"])

    @property
    def collection(self) -> Collection:
        """What was collected."""
        return settings_of(self.files[0])

    def held(self, name: str) -> PackFile:
        """The file with a concept's adapter. Raises UsageError where there is none of that name."""
        for held in self.files:
            if held.concept == name and held.about["adapter"] is not None:
                return held
        raise UsageError(f"{self.path} holds no {name!r}; it has {', '.join(self.concepts) or 'no concept'}")

    def concept(self, name: str) -> Concept:
        """A concept's adapter and call. Raises UsageError where there is none of that name."""
        return self.held(name).restored()

    def add(
        self,
        adapters: Sequence[Adapter | str | Path],
        *,
        base: Pipeline,
        calls: Mapping[str, str] | None = None,
        progress: Tell | None = None,
        scratch: str | Path | None = None,
    ) -> Pack:
        """The pack with these adapters, too, each appearing whole. Files that are there stay as they are to the last byte.

        Where a new adapter changes a layer that no other did, the others are run once more for that layer, into a file of its own. Killed,
        the same call goes on. Raises MergeError on another base.
        """
        gather, new = Gather(base, self.collection, progress, scratch), additions(adapters, base, calls or {})
        with disk.folder(self.path):
            now = Pack.open(self.path)
            held = {name: now.held(name).about["fingerprint"] for name in now.concepts}
            if changed := [one.name for one in new if held.get(one.name, one.fingerprint) != one.fingerprint]:
                raise UsageError(f"{self.path} holds another {', '.join(changed)}; remove that first, or rename the file")
            gather.fill(self.path, new)
        return Pack.open(self.path)

    def remove(self, names: Sequence[str]) -> Pack:
        """The pack without these concepts; the others' files are not looked at. Raises UsageError for names that it does not hold."""
        if unknown := sorted(set(names) - set(self.concepts)):
            raise UsageError(f"{self.path} holds no {', '.join(unknown)}; it has {', '.join(self.concepts) or 'no concept'}")
        with disk.folder(self.path):
            for held in sorted(self.files, key=lambda one: one.about["adapter"] is None):  # without its adapter, the rest is nobody's
                if held.concept in names:
                    disk.remove(held.path)
        return Pack.open(self.path)

    def statistics(self) -> Mapping[str, LayerStats]:
        """Of every layer that one of its concepts changes, read when it is asked for. Raises MergeError if any are missing."""
        return _Statistics(self)

    def build(
        self,
        *,
        method: str | Method = "loraclr",
        parameters: Mapping[str, Any] | None = None,
        weights: Mapping[str, float] | None = None,
        block_weights: Mapping[str, Sequence[float]] | None = None,
        rank: int | None = None,
        name: str = "merged",
        progress: Tell | None = None,
    ) -> MergeResult:
        """Merges the concepts, one layer's statistics in memory at a time, with the receipt of `merge`. Needs no base.

        `weights` and `block_weights` scale the concepts' changes by name, as in `merge` without a base; what they saw is that at weight 1.
        A pack has no paired rows, so `loraclr` runs without its hinge (margin 0). Raises UsageError for methods that need more than
        statistics, MergeError.
        """
        if not self.concepts:
            raise MergeError(f"{self.path} holds no concept; add some with `loraclr pack add`")
        if method == "loraclr":
            parameters = {"margin": 0.0, **(parameters or {})}
        solver = make_method(method, **(parameters or {})) if isinstance(method, str) else method
        if lacking := solver.needs - HOLDS:
            asked = " and ".join(words for need, words in NEEDS.items() if need in lacking)
            hint = "leave rounds at 1, or " if "gaps" in lacking else "set margin=0, or " if hasattr(solver, "margin") else ""
            raise UsageError(f"{solver.name} needs {asked}, which a pack does not hold; {hint}use `loraclr merge`")
        if "held_out" in solver.needs:
            check_held_out(self.collection, [stage for held in self.files for stage in held.layers.values()])
        if unknown := sorted(set(weights or {}) - set(self.concepts)):
            raise UsageError(f"weights were given for {', '.join(unknown)}; {self.path} holds {', '.join(self.concepts)}")
        concepts, statistics = [self.concept(held) for held in self.concepts], self.statistics()
        result = merge(
            [concept.adapter for concept in concepts],
            method=solver,
            weights=[(weights or {}).get(concept.name, 1.0) for concept in concepts],
            block_weights=block_weights,
            calls={concept.name: concept.call for concept in concepts},
            rank=rank,
            seed=self.collection.seed,
            name=name,
            progress=progress,
            statistics=statistics,
        )
        stages = {layer: stage for held in self.files for layer, stage in held.layers.items()}
        present = [stage for stage in STAGES if any(stages[layer.layer] == stage for layer in result.layers)]
        layers = [dataclasses.replace(layer, stage=present.index(stages[layer.layer])) for layer in result.layers]
        return dataclasses.replace(
            result,
            base=self.base,
            inputs=tuple({**entry, **self.held(str(entry["name"])).about["input"]} for entry in result.inputs),
            layers=tuple(sorted(layers, key=lambda layer: (layer.stage, layer.layer))),
            versions={**self.files[0].about["versions"], **result.versions},
            collection={**dataclasses.asdict(self.collection), "under": "each concept's own adapter"},
        )


class _Statistics(Mapping[str, LayerStats]):
    """What a pack's concepts and its concept-free prompts saw, layer by layer, from disk."""

    def __init__(self, pack: Pack) -> None:
        self._path = pack.path
        self._layers = sorted({layer for name in pack.concepts for layer in pack.held(name).adapted})
        self._files: dict[str | None, list[PackFile]] = {
            name: [held for held in pack.files if held.concept == name] for name in (*pack.concepts, None)
        }
        for name, files in self._files.items():
            missing = set(self._layers) - {layer for held in files for layer in held.layers}
            if missing:
                raise MergeError(
                    f"{pack.path}: {name or PRESERVATION} lacks statistics of {len(missing)} layers, the first is {min(missing)}; "
                    "a file is gone: make the pack anew"
                )
        # Layer-wise tokens make a text as many texts as they have rows. Where one concept has such, those of all others count as often.
        self._texts = max(held.about["texts"] for files in self._files.values() for held in files)

    def __getitem__(self, layer: str) -> LayerStats:
        if layer not in self._layers:
            raise KeyError(layer)
        found: dict[str, dict[str | None, Moments]] = {kind: {} for kind in KINDS}
        for name, files in self._files.items():
            held = next(one for one in files if layer in one.layers)
            times = self._texts // held.about["texts"] if held.layers[layer] == "text" else 1
            for kind in KINDS:
                if (moments := held.moments(kind, layer)) is not None:
                    found[kind][name] = dataclasses.replace(moments.scaled(times), count=moments.count * times) if times > 1 else moments
        widths = {moments.width for kind in KINDS for moments in found[kind].values()}
        if len(widths) > 1 or not found["fit"].keys() >= {name for name in self._files if name is not None}:
            raise FormatError(f"{self._path}: the statistics of {layer} do not belong together; a file is damaged: make the pack anew")
        fit, held_out = ({str(name): moments for name, moments in found[kind].items()} for kind in ("fit", "held_out"))
        return LayerStats(layer, fit, held_out, found["preserve"].get(None))

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)
