"""The methods in words, made from their code: docs/methods.md and the README's table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from loraclr import disk
from loraclr.errors import UsageError
from loraclr.methods import METHODS, NEEDS
from loraclr.methods.options import Parameter, parameters

MARKS = ("<!-- methods: made by `make docs` -->\n", "<!-- end of methods -->\n")
INTRODUCTION = """\
# Merge methods

Made by `make docs` from the methods themselves. One layer at a time: `D_i` is the delta of concept `i`, `w_i` its weight, `X_i` what the
layer saw on its prompts, `G_i = X_i^T X_i`, `A_i` and `B_i` its `down` and `up`. A parameter is given as `--set NAME=VALUE`, a preset as
`--method NAME:PRESET`. With every method `merge`, `compare` and `pack build` take weights per adapter (`--weight`) and per block
(`--block-weights`).
"""


def needs_base(method: Any) -> bool:
    """Whether a method, with its default parameters, looks at the base model or its features."""
    return bool(method().needs - {"generator"})


def inputs(method: Any) -> str:
    """What a method with its default parameters is given, in words."""
    return "; ".join(["the adapters", *(words for need, words in NEEDS.items() if need in method().needs)])


def word(value: object) -> str:
    """A parameter's value as `--set` reads it back."""
    if isinstance(value, tuple):
        return ",".join(map(word, value))
    return str(value).lower() if isinstance(value, bool) or value is None else f"{value:g}" if isinstance(value, float) else str(value)


def table() -> str:
    """The README's table."""
    rows = ["| name | what it is | needs a base |", "|---|---|---|"]
    method: Any
    for method in METHODS.values():
        presets = f"; presets {', '.join(f'`{preset}`' for preset in method.presets)}" if method.presets else ""
        rows.append(f"| `{method.name}`{_also(method)} | {method.summary}{presets} | {'yes' if needs_base(method) else 'no'} |")
    return "\n".join(rows) + "\n"


def page() -> str:
    """docs/methods.md: the same five lines for every method, then what its code says of it."""
    return "\n".join([INTRODUCTION, *(_section(method) for method in METHODS.values())])


def write(root: Path) -> list[Path]:
    """Rewrites docs/methods.md and the README's table under `root`. Raises UsageError where the README has no place for it."""
    readme, target = root / "README.md", root / "docs" / "methods.md"
    text = readme.read_text() if readme.is_file() else ""
    before, opened, rest = text.partition(MARKS[0])
    _, closed, after = rest.partition(MARKS[1])
    if not (opened and closed and target.parent.is_dir()):
        raise UsageError(f"{root} is not this package's source: it needs docs/ and a README.md with {MARKS[0].strip()!r} and its end mark")
    with disk.together():
        disk.write(readme, before + opened + table() + closed + after)
        disk.write(target, page())
    return [target, readme]


def _section(method: Any) -> str:
    options = [_option(row) for row in parameters(method)]
    lines = [
        f"## `{method.name}`{_also(method)}\n",
        f"- **Idea:** {method.summary}.",
        f"- **When:** {method.when}.",
        f"- **Inputs:** {inputs(method)}.",
        f"- **Parameters:** {', '.join(f'`{row.name}={word(row.default)}`' for row in parameters(method)) or 'none'}.",
        f"- **Source:** {method.reference}.\n",
        f"{_unwrapped(method.__doc__ or '')}\n",
    ]
    if options:
        lines += ["| parameter | default | meaning |", "|---|---|---|", *options, ""]
    if method.presets:
        lines += ["| preset | sets |", "|---|---|"]
        lines += [
            f"| `{name}` | {', '.join(f'`{key}={word(value)}`' for key, value in values.items()) or 'the defaults'} |"
            for name, values in method.presets.items()
        ]
        lines.append("")
    return "\n".join(lines)


def _also(method: Any) -> str:
    return f" (also {', '.join(f'`{alias}`' for alias in method.aliases)})" if method.aliases else ""


def _option(row: Parameter) -> str:
    choices = f" ({', '.join(f'`{choice}`' for choice in row.choices)})" if row.choices else ""
    default = f"`{word(row.default)}`" if row.default != () else ""
    return f"| `{row.name}` | {default} | {row.help.replace('|', '&#124;')}{choices} |"


def _unwrapped(text: str) -> str:
    paragraphs = re.split(r"\n\s*\n", text.strip())
    return "\n\n".join(" ".join(line.strip() for line in paragraph.splitlines()) for paragraph in paragraphs)
