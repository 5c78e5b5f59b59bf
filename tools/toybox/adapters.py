"""Trains the toybox's adapters: `python adapters.py BASE OUT [SET ...]`, two at a time, finished ones skipped, killed ones resumed.

A set is one recipe for every concept, or `wild`: files as different trainers leave them, see `WILD`. Pictures and captions are
those of `people.py`, written to OUT/pictures; captions tell expression, clothes and place, never the identity. Adapters go to
OUT/SPLIT (wild) or OUT/SET/SPLIT, what each took and weighs to `report.json` there. `--steps-factor 0.25` under-trains all of them;
`--bulk 100` trains that many further identities by a short recipe, for studies of scale.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from people import SPLITS, Concept, bulk, concepts
from PIL import Image
from safetensors.torch import save_file
from shown import pictures as draw

from loraclr.adapter import Adapter, LoraLayer
from loraclr.formats import save_adapter
from loraclr.formats.names import split, with_text_model
from loraclr.pipeline import Pipeline
from loraclr.train import make_recipe, train

TARGETS = {"unet": ["to_q", "to_k", "to_v", "to_out.0"], "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"]}
CAPTIONS = 12  # a picture, one of which is drawn at each use
CLASS_PICTURES = 32


@dataclass(frozen=True)
class Kind:
    """A recipe's `toybox` preset with changes, and whose file the result is."""

    recipe: str
    file: str = "edlora"  # or "kohya", "diffusers": as kohya's and diffusers' trainers leave it
    changes: Mapping[str, Any] = field(default_factory=dict)


def _lora(file: str, rank: int, alpha: float, text_rank: int, text_alpha: float) -> Kind:
    """Learning rates that make up for alpha / rank, so that all kinds learn alike."""
    rates = {"lr": 1.2e-3 * rank / alpha, "text_lr": 3e-4 * text_rank / text_alpha if text_rank else 0.0}
    return Kind("lora", file, {"rank": rank, "alpha": alpha, "text_rank": text_rank, "text_alpha": text_alpha, **rates})


KINDS = {
    "kohya": _lora("kohya", 8, 4.0, 0, 4.0),
    "kohya-text": _lora("kohya", 4, 4.0, 4, 2.0),
    "kohya-mixed": _lora("kohya", 8, 8.0, 8, 1.0),
    "diffusers": _lora("diffusers", 4, 4.0, 0, 4.0),
    "diffusers-text": _lora("diffusers", 8, 16.0, 8, 16.0),
    "edlora": Kind("edlora"),
}
WILD = (
    "kohya-text", "edlora", "kohya", "diffusers-text", "kohya-mixed", "edlora", "diffusers", "kohya-text", "edlora", "diffusers-text",
    "kohya-mixed", "edlora",
)  # fmt: skip  # the kinds of a split's concepts in order
SETS = {
    "lora": _lora("kohya", 4, 4.0, 4, 4.0),
    "edlora": Kind("edlora"),
    "orthogonal": Kind("orthogonal"),
    "textual-inversion": Kind("textual-inversion"),
    "pplus": Kind("pplus"),
    "custom-diffusion": Kind("custom-diffusion"),
}
STYLE = Kind("style", "kohya", {"rank": 4, "alpha": 4.0, "text_rank": 4, "text_alpha": 4.0})
_FAST = {"steps": 40, "batch": 4, "warmup": 5, "lr": 2.4e-3, "text_lr": 6e-4, "token_lr": 1e-2}
BULK = Kind("edlora", changes={**_FAST, "rank": 2, "alpha": 2.0, "text_rank": 2, "text_alpha": 2.0})


@dataclass(frozen=True)
class Job:
    """One adapter to be trained. `index` is the concept's number in its split."""

    concept: Concept
    kind: Kind
    folder: Path
    index: int

    @property
    def path(self) -> Path:
        return self.folder / f"{self.concept.name}{'.pth' if self.kind.file == 'edlora' else '.safetensors'}"


def jobs(out: Path, sets: list[str], names: list[str], bulk_count: int, factor: float, splits: Collection[str] = SPLITS) -> list[Job]:
    found = []
    for chosen in sets:
        counts: dict[str, int] = {}
        for concept in concepts():
            index = counts[concept.split] = counts.get(concept.split, -1) + 1
            kind = kind_of(chosen, concept, index)
            if kind and concept.split in splits and (not names or concept.name in names):
                found.append(Job(concept, kind, (out if chosen == "wild" else out / chosen) / concept.split, index))
    found += [Job(concept, BULK, out / "bulk", index) for index, concept in enumerate(bulk(bulk_count))]
    return [replace(job, kind=shortened(job.kind, factor)) for job in found]


def kind_of(chosen: str, concept: Concept, index: int) -> Kind | None:
    """A style has one recipe only, and is wild at that."""
    if concept.noun == "style":
        return STYLE if chosen == "wild" else None
    return KINDS[WILD[index % len(WILD)]] if chosen == "wild" else SETS[chosen]


def shortened(kind: Kind, factor: float) -> Kind:
    steps = make_recipe(f"{kind.recipe}:toybox", **kind.changes).steps
    return kind if factor == 1 else replace(kind, changes={**kind.changes, "steps": max(1, round(steps * factor))})


def write_pictures(folder: Path, concept: Concept) -> Path:
    """NN.png and NN.txt of a concept, as `loraclr train` takes them."""
    if not folder.exists():
        part, rng = folder.with_name(f".{folder.name}-{os.getpid()}"), random.Random(f"captions/{concept.name}")
        part.mkdir(parents=True)
        for number, shot in enumerate(concept.shots()):
            Image.fromarray(shot.pixels).save(part / f"{number:02d}.png")
            (part / f"{number:02d}.txt").write_text("".join(f"{shot.caption('<TOK>', rng)}\n" for _ in range(CAPTIONS)))
        part.rename(folder)
    return folder


def write_class_pictures(folder: Path, noun: str, base: Path) -> None:
    """What the base draws for the class word, once for all concepts of the class."""
    if not folder.exists():
        part, pipeline = folder.with_name(f".{folder.name}"), Pipeline.load(base)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for number, image in enumerate(draw(pipeline, [f"a photo of a {noun}"] * CLASS_PICTURES)):
            image.save(part / f"{number:02d}.png")
        part.rename(folder)


def run(base: Path, pictures: Path, job: Job) -> dict[str, object]:
    torch.set_num_threads(1)
    concept, kind = job.concept, job.kind
    settings = dict(kind.changes)
    if kind.recipe == "orthogonal":
        settings["index"] = job.index
    recipe = make_recipe(f"{kind.recipe}:toybox", **settings)
    job.folder.mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    adapter = train(
        write_pictures(pictures / concept.name, concept),
        base=Pipeline.load(base),
        recipe=recipe,
        trigger=concept.name,
        class_word=None if kind.recipe == "style" else concept.noun,
        class_pictures=pictures / f"class-{concept.noun}" if recipe.prior_weight else None,
        seed=job.index,
        work=job.folder / f".{concept.name}.train",
        sample_every=0,
    )
    seconds = time.process_time() - began
    if kind.file == "edlora":
        save_adapter(adapter, job.path, format="edlora")
    else:
        as_trained(adapter, job.path, kind.file)
    shutil.rmtree(job.folder / f".{concept.name}.train")
    told = json.loads(adapter.metadata["loraclr.training"])
    notes = {key: round(told[key], 4) for key in ("loss", "lost") if key in told}
    return {"recipe": recipe.name, "steps": recipe.steps, "seconds": round(seconds, 1), "bytes": job.path.stat().st_size, **notes}


def as_trained(adapter: Adapter, path: Path, file: str) -> None:
    """fp16 factors with the training's own alphas, under the keys and with the metadata of kohya's or diffusers' trainer."""
    tensors: dict[str, torch.Tensor] = {}
    config: dict[str, object] = {}
    metadata = {"modelspec.trigger_phrase": adapter.call}
    for layer in adapter:
        assert isinstance(layer, LoraLayer)
        component, module = split(layer.name)
        down, up, alpha = layer.down.half().contiguous(), layer.up.half().contiguous(), layer.scale * layer.rank
        module = with_text_model(component, module)
        if file == "kohya":
            stem = f"{'lora_te' if component == 'text_encoder' else 'lora_unet'}_{module.replace('.', '_')}"
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(alpha)}
            if component == "unet":
                metadata |= {"ss_network_dim": str(layer.rank), "ss_network_alpha": str(alpha)}
        else:
            tensors |= {f"{component}.{module}.lora_A.weight": down, f"{component}.{module}.lora_B.weight": up}
            config |= {f"{component}.r": layer.rank, f"{component}.lora_alpha": alpha, f"{component}.target_modules": TARGETS[component]}
    if file == "kohya":
        metadata |= {
            "ss_network_module": "networks.lora", "ss_base_model_version": "sd_v1", "ss_output_name": adapter.name,
            "modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.sai_model_spec": "1.0.0", "modelspec.title": adapter.name,
        }  # fmt: skip
    else:
        metadata |= {"format": "pt", "lora_adapter_metadata": json.dumps(config, sort_keys=True)}
    save_file(tensors, path, metadata=metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"wild, {', '.join(SETS)}; wild if none is given")
    parser.add_argument("--names", nargs="*", default=[], help="only these concepts")
    parser.add_argument("--splits", nargs="*", default=SPLITS, choices=SPLITS, help="only these")
    parser.add_argument("--steps-factor", type=float, default=1.0, help="of every recipe's steps")
    parser.add_argument("--bulk", type=int, default=0, metavar="N", help="further identities, by a short recipe")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.sets if name not in ("wild", *SETS)]:
        parser.error(f"no set {unknown[0]!r}; there are wild, {', '.join(SETS)}")
    sets = arguments.sets or ([] if arguments.bulk else ["wild"])
    every = jobs(arguments.out, sets, arguments.names, arguments.bulk, arguments.steps_factor, arguments.splits)
    wanted = [job for job in every if not job.path.exists()]
    pictures = arguments.out / "pictures"
    for noun in sorted({job.concept.noun for job in wanted if make_recipe(f"{job.kind.recipe}:toybox").prior_weight}):
        write_class_pictures(pictures / f"class-{noun}", noun, arguments.base)
    with ProcessPoolExecutor(arguments.workers) as pool:
        running = {pool.submit(run, arguments.base, pictures, job): job for job in wanted}
        for done in as_completed(running):
            job = running[done]
            note(job.folder / "report.json", job.concept.name, done.result())
            print(job.path, json.dumps(done.result()), flush=True)


def note(file: Path, name: str, told: Mapping[str, object]) -> None:
    known = json.loads(file.read_text()) if file.exists() else {}
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted({**known, name: told}.items()))
    file.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
