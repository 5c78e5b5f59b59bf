"""The comparison itself: every method on the same adapters, one after the other; what fails is said and the rest goes on."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, replace
from pathlib import Path

from loraclr import disk
from loraclr.adapter import Adapter
from loraclr.blocks import weighted
from loraclr.collect import Collection, Concept, collection_for
from loraclr.compare.comparison import Comparison, Entry
from loraclr.compare.measures import measure
from loraclr.errors import MergeError, UsageError
from loraclr.formats import load_adapter
from loraclr.memory import PeakMemory
from loraclr.merge import merge
from loraclr.methods import Method, make_method, method_names
from loraclr.pipeline import Pipeline


def every_method() -> dict[str, Method]:
    """All methods and presets by name, but for presets that are the method's defaults."""
    found: dict[str, Method] = {}
    for name in method_names():
        made = make_method(name)
        if made not in found.values():
            found[name] = made
    return found


def compare(
    adapters: Sequence[Adapter | str | Path],
    *,
    base: Pipeline | None = None,
    methods: Mapping[str, Method] | None = None,
    weights: Sequence[float] | None = None,
    block_weights: Mapping[str, Sequence[float]] | None = None,
    calls: Mapping[str, str] | None = None,
    rank: int | None = None,
    seed: int | None = None,
    collection: Collection | Callable[[Set[str]], Collection] = collection_for,
    allow: Sequence[str] = (),
    keep: str | Path | None = None,
    scratch: str | Path | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Comparison:
    """Merge the adapters (or their files) with every one of `methods`, by label; all of `every_method` without. What is not said of an
    argument here is as in `merge`.

    Every method collects for itself what it learns from, as in `merge`. Residuals, strength and cross-talk are measured afterwards, for all
    methods on the same features: those of each concept's own adapter, on the prompts of `collection`, which is one for all or says what a
    method with these needs collects (for what is common it is asked without needs). A method that these inputs do not suit, or that
    fails, is an entry that says why. `keep` is a folder that the merged files are written to, by label, `scratch` one for what does not
    fit into memory. Without `seed` it is that of `collection`. Raises UsageError, WriteError where `keep` cannot be made, and
    MergeError if no method could merge.
    """
    if methods is not None and not methods:
        raise UsageError("no methods to compare; name at least one, or leave them out for all")
    chosen = every_method() if methods is None else dict(methods)
    loaded = [adapter if isinstance(adapter, Adapter) else load_adapter(adapter, base=base) for adapter in adapters]
    silent = [one.name for one in loaded if base is not None and not ((calls or {}).get(one.name) or one.call)]
    if silent:
        raise MergeError(f"{', '.join(silent)}: no trigger words; give them with --trigger NAME=WORDS")
    meant = weighted(loaded, block_weights or {}, None if base is None else base.cross_attention_layers)
    if keep is not None:
        disk.make_folder(Path(keep))
    common = collection if isinstance(collection, Collection) else collection(frozenset())
    usual = common if seed is None else replace(common, seed=seed)
    entries = []
    for index, (label, method) in enumerate(chosen.items()):

        def tell(what: str, share: float, label: str = label, index: int = index) -> None:
            if progress:
                progress(f"merging: {label}, {what}", index / len(chosen))

        tell("starting", 0.0)
        try:
            with PeakMemory() as peak:
                began = time.perf_counter()
                result = merge(
                    adapters,
                    base=base,
                    method=method,
                    weights=weights,
                    block_weights=block_weights,
                    calls=calls,
                    rank=rank,
                    seed=usual.seed,
                    collection=collection if isinstance(collection, Collection) else collection(method.needs),
                    allow=allow,
                    progress=tell,
                    scratch=scratch,
                )
                seconds = time.perf_counter() - began
            with tempfile.TemporaryDirectory() as passing:
                folder = Path(passing if keep is None else keep)
                size = result.save(folder / f"{file_name(label)}.safetensors").stat().st_size
            entries.append(Entry(label, "", result, size, seconds, peak.megabytes))
        except Exception as error:  # also of the libraries below: the other methods' results must not be lost
            entries.append(Entry(label, " ".join(str(error).split()) or type(error).__name__))
    if progress:
        progress("merging", 1.0)
    done = [entry for entry in entries if entry.result is not None]
    if not done:
        reasons = {entry.why: entry.label for entry in reversed(entries)}  # of those that are the same, the first method's
        raise MergeError(f"no method could merge: {'; '.join(f'{label}: {why}' for why, label in reversed(reasons.items()))}")
    first = done[0].result
    assert first is not None
    settings = {
        "base": first.base,
        "seed": usual.seed,
        "rank": rank,
        "inputs": first.inputs,
        "versions": first.versions,
        "collection": asdict(usual) if base is not None else None,
    }
    if base is None:
        return Comparison(tuple(entries), settings)
    concepts = [Concept(adapter, str(entry["call"]), float(entry["weight"])) for adapter, entry in zip(meant, first.inputs, strict=True)]
    if not any(len(adapter) for adapter in loaded):
        return Comparison(tuple(entries), settings)
    merges = {entry.label: entry.result.adapter for entry in done if entry.result is not None}
    found = measure(base, concepts, merges, settings=usual, progress=progress, scratch=scratch)
    return Comparison(tuple(replace(entry, measure=found.get(entry.label)) for entry in entries), settings)


def file_name(label: str) -> str:
    """A label as the name of a file or folder."""
    return label.replace(":", "-").replace("/", "-")
