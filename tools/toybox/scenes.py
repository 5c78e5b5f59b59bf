"""How many people fit into one picture: scenes of 64 pixels a person side by side, each in a box, read by the attribute judge.

    python scenes.py BASE JUDGE CONCEPTS                                 the base alone, told what everybody looks like
    python scenes.py BASE JUDGE CONCEPTS --lora merged.safetensors       one adapter that holds all, by regions
    python scenes.py BASE JUDGE CONCEPTS --loras FOLDER --strategy omg   one file for each, kept apart at sampling time
    ... --counts 2 --free                                                by the prompt alone, no boxes: masks come from attention

CONCEPTS is the toybox's concepts.json. A person counts as present where at least four of five attributes are right inside
the own box. The judge always sees somebody: what it says of a box in which nobody is, is guessed. Look at the pictures, too (--pictures).
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path

import torch
from PIL import Image
from world import Person, person_words

from loraclr.conditioning import Region
from loraclr.evaluate import Limit, attribute_closeness, presence
from loraclr.evaluate.subjects import call_of
from loraclr.formats import load_adapter
from loraclr.generate import generate
from loraclr.pipeline import Pipeline
from loraclr.strategies import Part, make_strategy
from loraclr.toybox.judge import Judge

SIDE = 64
CONTEXT = "people standing together in a forest"
PRESENT = Limit(0.8, "cosine")


def looks(fields: dict) -> str:
    """What somebody looks like, in the words of the base's captions."""
    return person_words(Person(**fields["attributes"], noun=fields["noun"]), None, {"expression": False, "clothes": False})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("judge", type=Path)
    parser.add_argument("concepts", type=Path)
    parser.add_argument("--lora", type=Path, help="one adapter that holds all")
    parser.add_argument("--loras", type=Path, help="a folder with one adapter for each, for --strategy")
    parser.add_argument("--strategy", choices=("omg", "clora"))
    parser.add_argument("--split", default="development")
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 3, 4, 6])
    parser.add_argument("--scenes", type=int, default=6, help="different groups of people for each count, one seed each")
    parser.add_argument("--free", action="store_true", help="no boxes; for two people, told to be left and right")
    parser.add_argument("--pictures", type=Path, help="folder for the pictures")
    arguments = parser.parse_args()
    if (arguments.strategy is None) != (arguments.loras is None):
        parser.error("--strategy and --loras go together")
    if arguments.free and arguments.counts != [2]:
        parser.error("--free knows words for two people only: --counts 2")

    people = {name: one for name, one in json.loads(arguments.concepts.read_text()).items() if one["split"] == arguments.split}
    judge, pipeline = Judge.load(arguments.judge), Pipeline.load(arguments.base)
    merged = load_adapter(arguments.lora, base=pipeline) if arguments.lora else None
    singles = {} if arguments.loras is None else {path.stem: load_adapter(path, base=pipeline) for path in arguments.loras.iterdir()}
    for count in arguments.counts:
        tables, shares = [], []
        for scene in range(arguments.scenes):
            generator = torch.Generator().manual_seed(scene)
            chosen = [list(people)[k] for k in torch.randperm(len(people), generator=generator)[:count].tolist()]
            if merged is not None:
                calls = [f"a {call_of(merged, name, alone=False)}" for name in chosen]
            else:
                calls = [f"a {singles[name].call}" if singles else looks(people[name]) for name in chosen]
            regions = [Region(f"{call} in a forest", (0.0, k / count, 1.0, (k + 1) / count)) for k, call in enumerate(calls)]
            prompt = " and ".join(calls) + " in a forest" if arguments.strategy == "clora" else CONTEXT
            if arguments.free:
                prompt = f"{calls[0]} on the left and {calls[1]} on the right in a forest"
            with ExitStack() as stack:
                if merged is not None:
                    stack.enter_context(pipeline.applied(merged))
                (made,) = generate(
                    pipeline,
                    [prompt],
                    seeds=[scene],
                    size=(SIDE, SIDE * count),
                    regions=() if arguments.free else regions,
                    strategy=make_strategy(arguments.strategy) if arguments.strategy else None,
                    parts=[Part(singles[name], noun=people[name]["noun"]) for name in chosen] if singles else [],
                )
            if arguments.pictures:
                made.save(arguments.pictures / f"{count}-{scene}.png")
            crops: list[Image.Image] = [made.image.crop((SIDE * k, 0, SIDE * (k + 1), SIDE)) for k in range(count)]
            truth = [{key: judge.heads[key].index(value) for key, value in people[name]["attributes"].items()} for name in chosen]
            tables.append(attribute_closeness(judge.read(crops), truth))
            shares.append(tables[-1].diagonal().mean())
        placed, free = (presence(tables, PRESENT, placed=placed) for placed in (True, False))
        others = torch.cat([table[~torch.eye(count, dtype=torch.bool)] for table in tables])
        row = {
            "people": count, "scenes": arguments.scenes, "attributes": float(torch.stack(shares).mean()),
            "attributes of the others": float(others.mean()) if count > 1 else None, "present": float(placed.share.mean()),
            "all present": float(placed.everyone.mean()), "present anywhere": float(free.share.mean()),
        }  # fmt: skip
        print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}), flush=True)


if __name__ == "__main__":
    main()
