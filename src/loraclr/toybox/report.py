"""One self-contained page: pictures beside numbers beside what made them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image, Resampling

from loraclr.merge import MergeResult
from loraclr.toybox.score import Scores, interval

STYLE = """
:root{--ink:#1c1e26;--soft:#5d6472;--line:#dfe2e8;--paper:#fbfaf7;--card:#fff;--mark:#c2410c}
@media(prefers-color-scheme:dark){:root{--ink:#eceef2;--soft:#a3aab8;--line:#343944;--paper:#16181d;--card:#1e2128;--mark:#fb923c}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:2.5rem 1.25rem 5rem}h1{font-size:2.2rem;line-height:1.15;margin:0 0 .5rem}
h2{margin:3.2rem 0 .4rem;font-size:1.35rem}p{margin:.4rem 0 1rem;max-width:46rem}.soft{color:var(--soft)}
.hero{display:grid;grid-template-columns:repeat(6,1fr);gap:.7rem;margin:1.6rem 0}.hero figure,.scenes figure{margin:0}
img{display:block;width:100%;border-radius:8px}figcaption{font-size:.85rem;color:var(--soft);padding:.25rem .1rem}
.wrap{overflow-x:auto}table{border-collapse:collapse;width:100%}td,th{padding:.4rem .5rem;text-align:left;vertical-align:middle}
thead th{font-weight:600;border-bottom:2px solid var(--line)}tbody tr{border-bottom:1px solid var(--line)}
.faces td{min-width:150px}.faces td:first-child{min-width:110px;font-weight:600}.faces td div{display:grid;grid-template-columns:1fr 1fr;gap:4px}
.faces img{border-radius:4px}.num td:not(:first-child),.num th:not(:first-child){text-align:right;font-variant-numeric:tabular-nums}
tr.ours td{color:var(--mark);font-weight:600}code,pre{font-family:ui-monospace,monospace;font-size:.88em}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.9rem 1rem;overflow-x:auto}
.scenes{display:grid;grid-template-columns:7rem repeat(4,1fr);gap:.6rem;align-items:center}.scenes b{font-size:.95rem}
@media(max-width:760px){.hero{grid-template-columns:repeat(3,1fr)}.scenes{grid-template-columns:repeat(2,1fr)}.scenes b{grid-column:1/-1}}
"""


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
    hero = "".join(
        f"<figure>{_img(report.portraits['loraclr'][k * shown + k % shown], 3)}<figcaption><b>{name}</b> · {report.files[name]}</figcaption></figure>"
        for k, name in enumerate(report.names)
    )
    rows = []
    for k, name in enumerate(report.names):
        cells = [f"<td>{name}<br><code>{html.escape(report.calls[name])}</code></td>", _cell(report.references[name][:2])]
        cells += [_cell(report.portraits[label][k * shown : k * shown + 2]) for label in report.portraits]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = "".join(f"<th>{_title(label)}</th>" for label in report.portraits)
    scenes = "<b></b>" + "".join(f"<figcaption>{html.escape(text)}</figcaption>" for text in report.scene_captions)
    for label, images in report.scenes.items():
        scenes += f"<b>{_title(label)}</b>" + "".join(f"<figure>{_img(image, 3)}</figure>" for image in images)
    path.write_text(
        f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>loraclr: {len(report.names)} adapters, one file</title><style>{STYLE}</style><main>
<h1>{len(report.names)} people, {len(report.names)} LoRA files,<br>one merged LoRA</h1>
<p>Every picture below is sampled from <b>one</b> file, <code>{report.merged_file.name}</code> ({report.merged_file.stat().st_size / 1e6:.1f} MB), merged by
<code>loraclr</code> in {sum(ours.seconds.values()):.0f} s without retraining and without the training pictures. No prompt tells what anybody looks like.</p>
<div class="hero">{hero}</div>
<h2>Side by side, at equal seeds</h2>
<p>References are what each adapter was trained on; <i>alone</i> is that one adapter; the others hold all {len(report.names)} at once.
Columns show the prompts <code>{html.escape(report.templates[0])}</code> and <code>{html.escape(report.templates[1])}</code>.</p>
<div class="wrap"><table class="faces"><thead><tr><th></th><th>references</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>
<h2>Two at once</h2>
<p>Each person is bound to a half of the picture by region attention; without it, people in one picture share attributes under every method.</p>
<div class="scenes">{scenes}</div>
<h2>Scores, with their controls</h2>
<p>An attribute judge, trained on other people, reads hair style, hair colour, skin, glasses and facial hair off each picture.
<i>Identity</i> is the share it finds right, with its 95 % bootstrap interval; <i>right person</i> is how often the picture is nearest to the right one of
{len(report.names)} (chance {1 / len(report.names):.2f}); <i>prompt</i> is the share of the prompt's own words (place, clothes, expression) that it finds.
{len(next(iter(report.scores.values())).identity)} pictures a row, one seed each, {report.split} identities.</p>
<div class="wrap"><table class="num"><thead><tr><th></th><th>identity</th><th>95 %</th><th>right person</th><th>prompt</th><th>held-out residual</th></tr></thead>
<tbody>{"".join(_score_row(label, scores, report.merges.get(label)) for label, scores in report.scores.items())}</tbody></table></div>
<p class="soft">Residual: how far the merged layers' outputs are from each adapter's own, on prompts the merge did not see; 0 is the adapter, 1 the base.</p>
<h2>Receipt</h2>
<p>The whole receipt lies beside the file as <code>{report.merged_file.name}.json</code>, a compact one in its header.</p>
<div class="wrap"><table class="num"><thead><tr><th>stage</th><th>layers</th><th>rows / features</th><th>residual, seen</th><th>residual, held out</th><th>rank</th></tr></thead>
<tbody>{_stages(ours)}</tbody></table></div>
<p class="soft">{_timing(report)}</p>
<h2>Use it</h2>
<pre>{html.escape(_usage(report))}</pre>
</main></html>
"""
    )
    return path


def _img(image: Image, zoom: int) -> str:
    buffer = io.BytesIO()
    image.resize((image.width * zoom, image.height * zoom), Resampling.BICUBIC).save(buffer, "WEBP", quality=86)
    return f'<img alt="" src="data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _cell(images: Sequence[Image]) -> str:
    return f"<td><div>{''.join(_img(image, 2) for image in images)}</div></td>"


def _title(label: str) -> str:
    return {"single": "alone", "loraclr": "loraclr", "average": "average", "sum": "sum, best weight"}.get(label, label)


def _score_row(label: str, scores: Scores, merged: MergeResult | None) -> str:
    means, (low, high) = scores.means(), interval(scores.identity)
    residual = "" if merged is None else f"{merged.mean_residual():.2f}"
    mark = ' class="ours"' if label == "loraclr" else ""
    return (
        f"<tr{mark}><td>{_title(label)}</td><td>{means['identity']:.2f}</td><td>{low:.2f} – {high:.2f}</td>"
        f"<td>{means['named']:.2f}</td><td>{means['told']:.2f}</td><td>{residual}</td></tr>"
    )


def _stages(result: MergeResult) -> str:
    rows = []
    for stage in sorted({layer.stage for layer in result.layers}):
        layers = [layer for layer in result.layers if layer.stage == stage]
        name = "text encoder" if layers[0].layer.startswith("text_encoder") else "cross-attention k, v" if ".to_k" in layers[0].layer and stage < 2 else "attention"
        fit, held = (
            [v for layer in layers for key, v in layer.residuals.items() if key.startswith(kind)] for kind in ("fit/", "held_out/")
        )
        rows.append(
            f"<tr><td>{name}</td><td>{len(layers)}</td><td>{layers[0].rows} / {layers[0].width}</td><td>{_mean(fit)}</td><td>{_mean(held)}</td>"
            f"<td>{min(layer.rank for layer in layers)}–{max(layer.rank for layer in layers)}</td></tr>"
        )
    return "".join(rows)


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.2f}" if values else "–"


def _timing(report: Report) -> str:
    parts = [
        f"{_title(label)}: collecting {result.seconds['collect']:.1f} s, solving {result.seconds['solve']:.2f} s" for label, result in report.merges.items()
    ]
    return "; ".join(parts) + f"; everything on this page {report.seconds:.0f} s. Statistics are collected for every method, to measure its residual."


def _usage(report: Report) -> str:
    name = next((name for name in report.names if not report.calls[name].startswith("<")), report.names[0])
    return (
        f"loraclr toybox export toybox --split {report.split}\n"
        "loraclr merge toybox/loras/* --base toybox/base --output merged.safetensors\n"
        f'loraclr generate --base toybox/base --lora merged.safetensors --prompt "a photo of a {report.calls[name]} on a beach" --output pictures'
    )
