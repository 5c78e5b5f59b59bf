"""Which merge settings keep identities? `python study.py BASE JUDGE LORAS OUT.json [NAME ...]`, on *development* identities only.

Every row merges the twelve development adapters from their files with other settings, samples the scoring prompts (which share no
template with the merge's) and prints identity, right person of 12 and prompt agreement. Finished rows are kept in OUT.json and skipped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import concept_scores, row
from world import identities

from loraclr.collect import Collection
from loraclr.formats import load_adapter
from loraclr.merge import merge
from loraclr.pipeline import Pipeline
from loraclr.toybox.judge import Judge

Setting = tuple[str, Mapping[str, Any], Collection]
DEFAULT = Collection()


def settings() -> dict[str, Setting]:
    """Row name -> method, its parameters, what it collects."""
    rows: dict[str, Setting] = {"average": ("average", {}, DEFAULT)}
    for scale in (0.1, 0.15, 0.2, 0.3, 0.4, 0.6):
        rows[f"sum {scale}"] = ("sum", {"scale": scale}, DEFAULT)
    for preservation in (0.0, 0.1, 0.3, 1.0):
        held_out = {"choose": "held_out", "preservation": preservation}
        rows[f"held-out ridge, preservation {preservation:g}"] = ("loraclr", held_out, DEFAULT)
        for ridge in (1e-3, 1e-2, 1e-1):
            fixed = {"choose": "fixed", "ridge": ridge, "preservation": preservation}
            rows[f"ridge {ridge:g}, preservation {preservation:g}"] = ("loraclr", fixed, DEFAULT)
    best = {"choose": "held_out"}
    rows["held-out, mean prior"] = ("loraclr", {**best, "prior": "mean"}, DEFAULT)
    rows["held-out, unpadded text"] = ("loraclr", best, replace(DEFAULT, padded=False))
    rows["held-out, 5 timesteps"] = ("loraclr", best, replace(DEFAULT, steps=5))
    rows["held-out, 10 timesteps"] = ("loraclr", best, replace(DEFAULT, steps=10))
    rows["held-out, 2 prompts"] = ("loraclr", best, replace(DEFAULT, fit=DEFAULT.fit[:2]))
    rows["exact"] = ("loraclr:exact", {}, DEFAULT)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("judge", type=Path)
    parser.add_argument("loras", type=Path, help="the folder with development/")
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", help="rows whose name begins so; all without")
    parser.add_argument("--rounds", type=int, default=1, help="seeds per prompt")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    people = identities()
    files = {name: file for name in people for file in (arguments.loras / "development").iterdir() if file.stem == name}
    adapters = {name: load_adapter(file) for name, file in files.items()}
    calls = {name: " ".join(adapter.tokens) or adapter.triggers[0] for name, adapter in adapters.items()}
    pipeline, judge = Pipeline.load(arguments.base), Judge.load(arguments.judge)
    done = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}

    def keep(name: str, result: dict[str, object]) -> None:
        done[name] = result
        arguments.out.write_text(json.dumps(done, indent=1) + "\n")
        print(f"{name:45} {json.dumps(result)}", flush=True)

    if "single" not in done:
        keep("single", row(concept_scores(pipeline, judge, calls, people, adapters, rounds=arguments.rounds)))
    for name, (method, parameters, collection) in settings().items():
        if name in done or (arguments.names and not any(name.startswith(one) for one in arguments.names)):
            continue
        began = time.perf_counter()
        merged = merge(
            list(files.values()), base=pipeline, method=method, parameters=parameters, collection=collection, measure=method == "loraclr"
        )
        seconds = time.perf_counter() - began
        scores = concept_scores(pipeline, judge, calls, people, dict.fromkeys(adapters, merged.adapter), rounds=arguments.rounds)
        residual = {kind: round(merged.mean_residual(kind), 3) for kind in ("fit", "held_out")} if merged.collection else {}
        keep(name, {**row(scores), **residual, "merge_seconds": round(seconds, 1)})


if __name__ == "__main__":
    main()
