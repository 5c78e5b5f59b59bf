"""The demonstration: twelve adapter files in, one merged file and a page of evidence out, offline, in about two minutes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from PIL.Image import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from loraclr import disk
from loraclr.adapter import Adapter
from loraclr.conditioning import Region
from loraclr.formats import load_adapter
from loraclr.loading import half
from loraclr.merge import MergeResult, merge
from loraclr.pipeline import Pipeline
from loraclr.toybox import Toybox, open_toybox
from loraclr.toybox.report import Report, write_report
from loraclr.toybox.score import SCORE_TEMPLATES, Scores, score

SUM_SCALE = 0.15  # the best of a sweep on the development identities: tools/toybox/study.py
TEMPLATES = SCORE_TEMPLATES[::4]  # two prompts a concept keep the demonstration within two minutes
SEED = 2026
BATCH = 16
PLACES = ("on a beach", "in a forest", "in a city", "in the snow")

METHODS: Mapping[str, Mapping[str, object]] = {"loraclr": {}, "average": {}, "sum": {"scale": SUM_SCALE}}


@dataclass
class Studio:
    """The base, the concepts, and how pictures of them are made."""

    box: Toybox
    pipeline: Pipeline
    adapters: dict[str, Adapter]
    tick: Callable[[str, int], None]
    seconds: dict[str, float] = field(default_factory=dict)

    def plain_call(self, name: str) -> str:
        """The trigger as ordinary text: also for concepts whose learned tokens are not loaded."""
        return f"{name} {self.box.concepts[name].noun}"

    def portraits(self, what: str, calls: Mapping[str, str], adapters: Mapping[str, Adapter | None]) -> list[Image]:
        """Every concept under every template, each with its own entry of `adapters`; concepts that share one share batches."""
        jobs = [(name, template.format(call), k) for name, call in calls.items() for k, (template, _) in enumerate(TEMPLATES)]
        images: list[Image] = []
        start = 0
        while start < len(jobs):
            adapter = adapters.get(jobs[start][0])
            stop = start
            while stop < len(jobs) and stop - start < BATCH and adapters.get(jobs[stop][0]) is adapter:
                stop += 1
            with self.pipeline.applied(adapter) if adapter is not None else nullcontext():
                part = jobs[start:stop]
                images += self.sample([prompt for _, prompt, _ in part], [SEED + k for _, _, k in part])
            self.tick(what, stop - start)
            start = stop
        return images

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], **settings: object) -> list[Image]:
        with half(self.pipeline.device):
            return self.pipeline.sample(prompts, seeds=seeds, **settings)  # type: ignore[arg-type]

    def scores(self, images: Sequence[Image]) -> Scores:
        names = list(self.adapters)
        return score(
            images,
            [name for name in names for _ in TEMPLATES],
            [truth for _ in names for _, truth in TEMPLATES],
            judge=self.box.judge,
            candidates={name: self.box.concepts[name].attributes for name in names},
        )

    def scene(self, left: str, right: str, place: str, seed: int) -> Image:
        """Two people side by side, each bound to a half of the picture."""
        one, other = (self.box.concepts[name].noun for name in (left, right))
        context = f"a {one} on the left and a {other} on the right {place}"
        regions = [
            Region(f"a {self.adapters[left].call} {place}", (0.0, 0.0, 1.0, 0.5)),
            Region(f"a {self.adapters[right].call} {place}", (0.0, 0.5, 1.0, 1.0)),
        ]
        return self.sample([context], [seed], size=(64, 128), regions=regions)[0]


@dataclass(frozen=True)
class Demonstration:
    """What `run_demo` made: its page, the merged file, mean scores by row, and the seconds it took."""

    page: Path
    merged: Path
    scores: Mapping[str, Mapping[str, float]]
    seconds: float


def run_demo(output: Path, *, split: str = "test", console: Console | None = None) -> Demonstration:
    """Merge the split's twelve adapters with three methods, compare them, and write OUTPUT/report.html and merged.safetensors.

    The default split is the one that no choice of ours was made on.
    """
    console = console or Console()
    began = time.perf_counter()
    disk.make_folder(output)
    box = open_toybox()
    paths = box.adapter_paths(split)
    columns = (TextColumn("{task.description:<34}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("loading", total=100)

        def phase(what: str, total: float) -> None:
            progress.reset(task, description=what, total=total)

        def tick(what: str, count: int) -> None:
            progress.update(task, description=what, advance=count)

        adapters = {name: load_adapter(path) for name, path in paths.items()}
        studio = Studio(box, box.load(), adapters, tick)
        count = len(adapters) * len(TEMPLATES)
        calls = {name: adapter.call for name, adapter in adapters.items()}
        plain = {name: studio.plain_call(name) for name in adapters}

        first = next(iter(adapters))
        with studio.pipeline.applied(adapters[first]):
            picture = studio.sample([f"a photo of a {calls[first]}"], [SEED])[0].resize((256, 256))
        with disk.whole(output / "first.png") as part:
            picture.save(part)
        console.print(f"first picture after {time.perf_counter() - began:.0f} s: {output / 'first.png'}")

        merges: dict[str, MergeResult] = {}
        for method, parameters in METHODS.items():
            phase(f"merging: {method}", 1)

            def show(what: str, share: float, method: str = method) -> None:
                progress.update(task, description=f"{method}: {what}"[:34], completed=share)

            merges[method] = merge(
                list(paths.values()),
                base=studio.pipeline,
                method=method,
                parameters=parameters,
                seed=SEED,
                progress=show,
            )
            console.print(f"{method:>8}: merged {len(paths)} adapters in {sum(merges[method].seconds.values()):.1f} s")
        merged_file = merges["loraclr"].save(output / "merged.safetensors")

        phase("sampling: each adapter alone", count)
        images = {"single": studio.portraits("sampling: each adapter alone", calls, adapters)}
        for method, result in merges.items():
            what = f"sampling: merged by {method}"
            phase(what, count)
            images[method] = studio.portraits(what, calls, dict.fromkeys(adapters, result.adapter))
        names = list(adapters)
        strangers = {name: adapters[names[(k + 5) % len(names)]] for k, name in enumerate(names)}
        controls = {}
        for label, others in (("base, trigger only", {}), ("wrong adapter", strangers)):
            phase(f"control: {label}", count)
            controls[label] = studio.portraits(f"control: {label}", plain, others)

        scenes: dict[str, list[Image]] = {}
        pairs = [(names[2 * k], names[2 * k + 1]) for k in range(len(PLACES))]
        for method, result in merges.items():
            phase(f"scenes of two: {method}", len(pairs))
            scenes[method] = []
            with studio.pipeline.applied(result.adapter):
                for k, ((left, right), place) in enumerate(zip(pairs, PLACES, strict=True)):
                    scenes[method].append(studio.scene(left, right, place, SEED + k))
                    tick(f"scenes of two: {method}", 1)

    table = {label: studio.scores(pictures) for label, pictures in {**images, **controls}.items()}
    page = write_report(
        Report(
            split=split,
            names=names,
            calls=calls,
            files={name: path.name for name, path in paths.items()},
            references={name: box.references(name) for name in names},
            portraits=images,
            templates=[template for template, _ in TEMPLATES],
            scenes=scenes,
            scene_captions=[f"{left} and {right} {place}" for (left, right), place in zip(pairs, PLACES, strict=True)],
            scores=table,
            merges=merges,
            merged_file=merged_file,
            seconds=time.perf_counter() - began,
        ),
        output / "report.html",
    )
    console.print(f"\n{len(paths)} adapters, one file: {merged_file} ({merged_file.stat().st_size / 1e6:.1f} MB)")
    for label, scores in table.items():
        means = scores.means()
        right = f"right person of {len(names)} {means['named']:.2f}"
        console.print(f"{label:>20}: identity {means['identity']:.2f}   {right}   prompt {means['told']:.2f}")
    console.print(f"\nopen {page}   ({time.perf_counter() - began:.0f} s in all)")
    return Demonstration(
        page,
        merged_file,
        {label: {key: round(value, 3) for key, value in scores.means().items()} for label, scores in table.items()},
        round(time.perf_counter() - began, 1),
    )
