"""One self-contained page: pictures beside numbers beside what made them."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from PIL.Image import Image

from loraclr import disk
from loraclr.adapter import stage_of
from loraclr.evaluate import interval
from loraclr.merge import MergeResult, mean_residual
from loraclr.page import STYLE, img
from loraclr.toybox.score import Scores


@dataclass(frozen=True, eq=False)
class Report:
    """What the demonstration found. `portraits` and `scores` are by row label; pictures are concept-major, template-minor."""

    split: str
    names: Sequence[str]
    calls: Mapping[str, str]
    files: Mapping[str, str]
    references: Mapping[str, Sequence[Image]]
    portraits: Mapping[str, Sequence[Image]]
    templates: Sequence[str]
    scenes: Mapping[str, Sequence[Image]]
    scene_captions: Sequence[str]
    scores: Mapping[str, Scores]
    merges: Mapping[str, MergeResult]
    merged_file: Path
    seconds: float


def write_report(report: Report, path: Path) -> Path:
    """The page as one HTML file without any outside request."""
    shown = len(report.templates)
    ours = report.merges["loraclr"]
    hero = ""
    for k, name in enumerate(report.names):
        picture = _img(report.portraits["loraclr"][k * shown + k % shown], 3)
        hero += f"<figure>{picture}<figcaption><b>{name}</b> · {report.files[name]}</figcaption></figure>"
    rows = []
    for k, name in enumerate(report.names):
        cells = [f"<td>{name}<br><code>{html.escape(report.calls[name])}</code></td>", _cell(report.references[name][:2])]
        cells += [_cell(report.portraits[label][k * shown : k * shown + 2]) for label in report.portraits]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = "".join(f"<th>{_title(label)}</th>" for label in report.portraits)
    scenes = "<b></b>" + "".join(f"<figcaption>{html.escape(text)}</figcaption>" for text in report.scene_captions)
    for label, images in report.scenes.items():
        scenes += f"<b>{_title(label)}</b>" + "".join(f"<figure>{_img(image, 3)}</figure>" for image in images)
    page = Template((Path(__file__).parent / "page.html").read_text())
    disk.write(
        path,
        page.substitute(
            style=STYLE,
            count=len(report.names),
            file=report.merged_file.name,
            megabytes=f"{report.merged_file.stat().st_size / 1e6:.1f}",
            merge_seconds=f"{sum(ours.seconds.values()):.0f}",
            hero=hero,
            first_template=html.escape(report.templates[0]),
            second_template=html.escape(report.templates[1]),
            heads=heads,
            rows="".join(rows),
            scenes=scenes,
            chance=f"{1 / len(report.names):.2f}",
            pictures=len(next(iter(report.scores.values())).identity),
            split=report.split,
            scores="".join(_score_row(label, scores, shown) for label, scores in report.scores.items()),
            stages=_stages(ours),
            timing=_timing(report),
            usage=html.escape(_usage(report)),
        ),
    )
    return path


def _img(image: Image, zoom: int) -> str:
    return img(image, image.width * zoom)


def _cell(images: Sequence[Image]) -> str:
    return f"<td><div>{''.join(_img(image, 2) for image in images)}</div></td>"


def _title(label: str) -> str:
    return {"single": "alone", "loraclr": "loraclr", "average": "average", "sum": "sum, best weight"}.get(label, label)


def _score_row(label: str, scores: Scores, shown: int) -> str:
    concepts, prompts = ([part(k, shown) for k in range(len(scores.identity))] for part in (int.__floordiv__, int.__mod__))
    means, (low, high) = scores.means(), interval(scores.identity, factors=[concepts, prompts])
    mark = ' class="ours"' if label == "loraclr" else ""
    return (
        f"<tr{mark}><td>{_title(label)}</td><td>{means['identity']:.2f}</td><td>{low:.2f} – {high:.2f}</td>"
        f"<td>{means['named']:.2f}</td><td>{means['told']:.2f}</td></tr>"
    )


def _stages(result: MergeResult) -> str:
    rows = []
    for stage in sorted({layer.stage for layer in result.layers}):
        layers = [layer for layer in result.layers if layer.stage == stage]
        name = {"text": "text encoder", "keys": "cross-attention k, v", "spatial": "other attention"}[stage_of(layers[0].layer)]
        means = [f"{mean_residual(layers, kind):.2f}".replace("nan", "–") for kind in ("fit", "held_out")]
        ranks = f"{min(layer.rank for layer in layers)}–{max(layer.rank for layer in layers)}"
        cells = (name, len(layers), f"{layers[0].rows} / {layers[0].width}", *means, ranks)
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return "".join(rows)


def _timing(report: Report) -> str:
    parts = [f"{_title(label)}: {sum(result.seconds.values()):.1f} s" for label, result in report.merges.items()]
    return f"Merging took {'; '.join(parts)}; everything on this page {report.seconds:.0f} s."


def _usage(report: Report) -> str:
    name = next((name for name in report.names if not report.calls[name].startswith("<")), report.names[0])
    return (
        f"loraclr toybox export toybox --split {report.split}\n"
        "loraclr merge toybox/loras/* --base toybox/base --output merged.safetensors\n"
        "loraclr generate --base toybox/base --lora merged.safetensors "
        f'--prompt "a photo of a {report.calls[name]} on a beach" --output pictures'
    )
