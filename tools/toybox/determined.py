"""What an over-determined text stage does to each method: `python determined.py ADAPTERS OUT.json`, ADAPTERS with twelve files.

Only the text encoder's layers are merged, from more and more prompts: `rows` of all concepts together (the least of all
layers) beside the layers' `in_features` (their mean). Below one row per input all targets could be met on what was seen; above it they
cannot. `fit` and `held_out` are mean relative residuals, 0 the adapter's own outputs, 1
the base's; held-out prompts are the default collection's and share no template with any that is fitted to.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch

from loraclr.adapter import Adapter, stage_of
from loraclr.collect import Collection
from loraclr.formats import load_adapter
from loraclr.merge import merge
from loraclr.toybox import open_toybox

PROMPTS = (1, 2, 6, 24)  # a concept
METHODS = ("average", "regmean", "gradient-fusion", "loraclr-reference:paper", "loraclr:exact", "loraclr")


def texts(adapter: Adapter) -> Adapter:
    """Its text encoder's layers, and its tokens."""
    return adapter.with_(layers={name: layer for name, layer in adapter.layers.items() if stage_of(name) == "text"})


def run(folder: Path, method: str, prompts: int) -> dict[str, object]:
    torch.set_num_threads(1)
    base = open_toybox().load()
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".pth"))
    adapters = [texts(load_adapter(path, base=base)) for path in files]
    usual = Collection()
    found = merge(adapters, base=base, method=method, collection=replace(usual, fit=usual.fit[:prompts]), measure=True)
    return {
        "method": method,
        "prompts": prompts,
        "rows": min(layer.rows for layer in found.layers),
        "in_features": round(mean(layer.width for layer in found.layers)),
        "fit": round(found.mean_residual("fit"), 4),
        "held_out": round(found.mean_residual("held_out"), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapters", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    with ProcessPoolExecutor(arguments.workers) as pool:
        jobs = [pool.submit(run, arguments.adapters, method, prompts) for method in METHODS for prompts in PROMPTS]
        rows = [job.result() for job in jobs]
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    print("| merge of the text encoder | " + " | ".join(f"{count} prompt{'s' * (count > 1)}: fit, held out" for count in PROMPTS) + " |")
    print(f"|---|{'---|' * len(PROMPTS)}")
    print("| rows beside inputs | " + " | ".join(f"{row['rows']} beside {row['in_features']}" for row in rows[: len(PROMPTS)]) + " |")
    for start in range(0, len(rows), len(PROMPTS)):
        few = rows[start : start + len(PROMPTS)]
        print(f"| `{few[0]['method']}` | " + " | ".join(f"{row['fit']:.3f}, {row['held_out']:.3f}" for row in few) + " |")


if __name__ == "__main__":
    main()
