"""What our pages share: one look, in light and dark, on a laptop and a phone, and pictures inside the file. Nothing is fetched."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

STYLE = """\
:root{--ink:#1c1e26;--soft:#5d6472;--line:#dfe2e8;--paper:#fbfaf7;--card:#fff;--mark:#c2410c;--own:#0f766e}
@media(prefers-color-scheme:dark){:root{--ink:#eceef2;--soft:#a3aab8;--line:#343944;--paper:#16181d;--card:#1e2128;--mark:#fb923c;--own:#2dd4bf}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:2.5rem 1.25rem 5rem}h1{font-size:2.2rem;line-height:1.15;margin:0 0 .5rem}
h2{margin:3.2rem 0 .4rem;font-size:1.35rem}p{margin:.4rem 0 1rem;max-width:46rem}.soft{color:var(--soft)}
img{display:block;width:100%;border-radius:8px}figcaption{font-size:.85rem;color:var(--soft);padding:.25rem .1rem}
.wrap{overflow-x:auto}table{border-collapse:collapse;width:100%}td,th{padding:.4rem .5rem;text-align:left;vertical-align:middle}
thead th{font-weight:600;border-bottom:2px solid var(--line)}tbody tr{border-bottom:1px solid var(--line)}
.num td:not(:first-child),.num th:not(:first-child){text-align:right;font-variant-numeric:tabular-nums}
code,pre{font-family:ui-monospace,monospace;font-size:.88em}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.9rem 1rem;overflow-x:auto}"""


def img(image: Image, width: int, *, title: str = "") -> str:
    """The picture scaled to `width` pixels, as WebP inside an <img>; `title` must be escaped."""
    from PIL.Image import Resampling

    buffer = io.BytesIO()
    image.resize((width, round(image.height * width / image.width)), Resampling.BICUBIC).save(buffer, "WEBP", quality=86)
    hover = f' title="{title}"' if title else ""
    return f'<img alt="{title}"{hover} src="data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
