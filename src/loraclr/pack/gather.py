"""From adapters and a base to the files of a pack: what is missing is collected, one concept at a time, and written at once."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loraclr.adapter import Adapter
from loraclr.collect import Collection, Concept, collect
from loraclr.errors import FormatError, MergeError
from loraclr.formats import load_adapter
from loraclr.formats.files import Stored, digest
from loraclr.modules import fingerprint
from loraclr.pack import file
from loraclr.pack.file import KINDS, PackFile
from loraclr.pipeline import Pipeline
from loraclr.preflight import check_fit, concepts_of, union
from loraclr.scratch import Scratch
from loraclr.statistics import Moments

PRESERVATION = "preservation"


@dataclass(frozen=True, eq=False)
class Addition:
    """A concept that is to be in a pack."""

    concept: Concept
    input: Mapping[str, str | None]  # file and sha256
    adapter: Mapping[str, Any]  # of `file.adapter_entries`
    entries: Mapping[str, Stored]
    fingerprint: str  # of the adapter and its call

    @property
    def name(self) -> str:
        return self.concept.name


def additions(adapters: Sequence[Adapter | str | Path], base: Pipeline, calls: Mapping[str, str]) -> list[Addition]:
    """Adapters or their files with their calls. Raises MergeError with all that is wrong with them."""
    loaded = [adapter if isinstance(adapter, Adapter) else load_adapter(adapter, base=base) for adapter in adapters]
    found = []
    for concept, source in zip(concepts_of(loaded, None, calls, needed=True, base=base), adapters, strict=True):
        path = None if isinstance(source, Adapter) else Path(source)
        said, entries = file.adapter_entries(concept.adapter)
        given = {"file": None if path is None else path.name, "sha256": None if path is None else digest(path)}
        found.append(Addition(concept, given, said, entries, file.fingerprint([said, concept.call], entries)))
    return found


def read(folder: Path) -> tuple[PackFile, ...]:
    """The files of a pack, without those of an adapter that is gone. Raises FormatError if they do not belong together."""
    files = [PackFile(path) for path in sorted(folder.glob("[!.]*.safetensors"))]
    held = [one for one in files if one.about["adapter"] is not None]
    names = [str(one.concept) for one in held]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise FormatError(f"{folder}: {', '.join(twice)} is there twice; take one of the files out")
    prints = {one.about["fingerprint"] for one in held}
    files = [one for one in files if one.concept is None or one.about["fingerprint"] in prints]
    for one in files[1:]:
        if difference := _difference(one, files[0].about["base"], settings_of(files[0])):
            raise FormatError(f"{one.path} does not belong to {files[0].path.name}: {difference}; take one of them out")
    return tuple(files)


def settings_of(held: PackFile) -> Collection:
    """What was collected."""
    said: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in held.about["collection"].items()}
    try:
        return Collection(**said)
    except (TypeError, AttributeError) as error:
        raise FormatError(f"{held.path}: its statistics are of a later version; update loraclr") from error


class Gather:
    """One base and one choice of what is collected, for any number of concepts."""

    def __init__(
        self,
        base: Pipeline,
        settings: Collection,
        progress: Callable[[str, float], None] | None = None,
        scratch: str | Path | None = None,
    ) -> None:
        """What does not fit into memory waits in the folder `scratch`, or without it in the pack's."""
        self.base, self.settings, self.progress, self.scratch = base, settings, progress, scratch
        self.ground = {"source": base.source, "sha256": fingerprint(base.pipe)}

    def check(self, folder: Path, files: Sequence[PackFile]) -> None:
        """Raises MergeError where a pack's files are of another base or of other settings."""
        if files and (difference := _difference(files[0], self.ground, self.settings)):
            raise MergeError(f"{folder} is another pack: {difference}; give what it was made with, or delete it")

    def fill(self, folder: Path, new: Sequence[Addition]) -> None:
        """Writes what `folder` lacks of a pack of what it holds and `new`. Raises MergeError where these do not go together."""
        files = read(folder)
        self.check(folder, files)
        for left in set(folder.glob("[!.]*.safetensors")) - {one.path for one in files}:
            left.unlink()  # more layers of an adapter that was removed
        held = {str(one.concept): one for one in files if one.about["adapter"] is not None}
        extra = {one.name: one for one in new if one.name not in held}
        concepts = {name: one.restored() for name, one in held.items()} | {name: one.concept for name, one in extra.items()}
        if held:  # among themselves the new ones were looked at before
            calls = {name: concept.call for name, concept in concepts.items()}
            concepts_of([concept.adapter for concept in concepts.values()], None, calls, needed=True, base=self.base)
        shapes = union([concept.adapter for concept in concepts.values()])
        check_fit(shapes, self.base)
        # Those that are there come first: whenever this is killed, every concept has statistics of every layer.
        jobs: list[tuple[str | None, list[str]]] = []
        for name in (None, *sorted(held), *sorted(extra)):
            there = [] if name in extra else [one for one in files if one.concept == name]
            has = {layer for one in there for layer in one.layers}
            if set(shapes) - has or not there:
                jobs.append((name, [layer for layer in shapes if layer not in has]))
        for done, (name, layers) in enumerate(jobs):
            self._tell(f"collecting: {name or PRESERVATION}", done / len(jobs))
            concept = None if name is None else concepts[name]
            with Scratch(folder if self.scratch is None else self.scratch) as room:
                about, entries = self._collected(concept, layers, room)
                if name in extra:
                    about |= {"call": extra[name].concept.call, "input": extra[name].input, "adapter": extra[name].adapter}
                    entries |= extra[name].entries
                about["concept"] = name
                if name is not None:
                    about["fingerprint"] = extra[name].fingerprint if name in extra else held[name].about["fingerprint"]
                file.write(_free(folder, name or PRESERVATION), about, entries)
        self._tell("collecting", 1.0)

    def _collected(self, concept: Concept | None, layers: Sequence[str], room: Scratch) -> tuple[dict[str, Any], dict[str, Stored]]:
        """The statistics of these layers under the concept's own adapter, or without any; to be written before `room` is closed."""
        found: dict[str, dict[str, Moments]] = {kind: {} for kind in KINDS}
        for names in self.base.stages(layers):
            if concept is None:
                statistics = collect(self.base, [], names, settings=self.settings, scratch=room)
            else:
                settings = dataclasses.replace(self.settings, preserve=())
                rest = {name: layer for name, layer in concept.adapter.layers.items() if name not in names}
                statistics = collect(self.base, [concept], names, settings=settings, merged=rest, scratch=room)
            for layer, seen in statistics.items():
                own = "" if concept is None else concept.name
                kinds = {"fit": seen.fit.get(own), "held_out": seen.held_out.get(own), "preserve": seen.preserve}
                for kind, moments in kinds.items():
                    if moments is not None:
                        found[kind][layer] = moments
        table, entries = file.moments_entries(found)
        rows = [1] if concept is None else [1, *(len(rows) for rows in concept.adapter.tokens.values())]
        about = {
            "base": self.ground,
            "collection": dataclasses.asdict(self.settings),
            "versions": {"diffusers": version("diffusers"), "transformers": version("transformers")},
            "fingerprint": None,
            "call": None,
            "input": None,
            "adapter": None,
            "texts": max(rows),
            "layers": {layer: self.base.stage_of(layer) for layer in layers},
            "moments": table,
        }
        return about, entries

    def _tell(self, what: str, share: float) -> None:
        if self.progress:
            self.progress(what, share)


def _difference(held: PackFile, ground: Mapping[str, Any], settings: Collection) -> str:
    """How a file's base and settings differ from these; empty where they do not."""
    base, mine = held.about["base"], settings_of(held)
    if base["sha256"] != ground["sha256"]:
        return f"it was made on the base {base['source']} ({base['sha256'][:8]}), not on {ground['source']} ({ground['sha256'][:8]})"
    other = [field.name for field in dataclasses.fields(Collection) if getattr(mine, field.name) != getattr(settings, field.name)]
    if not other:
        return ""
    return "it was collected with other settings, " + ", ".join(
        f"{name} prompts" if isinstance(value := getattr(mine, name), tuple) else f"{name} {value!r}" for name in other
    )


def _free(folder: Path, name: str) -> Path:
    """A path for a file of this concept that is not taken."""
    stem = re.sub(r"[^\w.+ -]", "_", name).lstrip(".") or "concept"
    number = 1
    while (path := folder / (f"{stem}.safetensors" if number == 1 else f"{stem} ({number}).safetensors")).exists():
        number += 1
    return path
