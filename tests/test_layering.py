"""The architecture, as a test: imports only point down, nothing heavy is imported before it is needed, no file grows without end."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import loraclr

SOURCE = Path(loraclr.__file__).parent
# From the bottom up. Those of one row may not import each other.
ORDER = (
    ("errors", "page"),
    ("disk", "linalg", "memory", "pictures"),
    ("adapter",),
    ("blocks", "statistics"),
    ("formats", "methods", "scratch"),
    ("checkpoints", "conditioning", "families", "modules", "resume"),
    ("loading",),
    ("sampling",),
    ("pipeline",),
    ("control", "settings", "strategies"),
    ("collect",),
    ("lockstep", "predictions", "preflight"),
    ("refit",),
    ("merge",),
    ("fuse", "pack", "verify"),
    ("generate", "train"),
    ("evaluate",),
    ("toybox", "web"),
    ("judges",),
    ("compare",),
    ("cli",),
)
LEVEL = {name: level for level, row in enumerate(ORDER) for name in row}
FILES = sorted(SOURCE.rglob("*.py"))


def shelf(path: Path) -> str:
    """The module or subpackage of loraclr that a file belongs to: `merge`, `formats`, or `__init__`."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(source: str) -> set[str]:
    """What a source imports of loraclr, wherever the import stands: shelves, or bare names of the package itself."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("loraclr.")}


def upward(of: str, source: str) -> set[str]:
    """The imports of shelf `of` that do not point down. The version is the one thing anybody may take from the package itself."""
    return {name for name in imported(source) - {of, "__version__"} if LEVEL.get(name, len(ORDER)) >= LEVEL[of]}


@pytest.mark.parametrize(
    "path", [path for path in FILES if not shelf(path).startswith("__")], ids=lambda path: str(path.relative_to(SOURCE))
)
def test_imports_point_down(path):
    assert upward(shelf(path), path.read_text()) == set()


def test_the_rule_sees_what_it_should():
    assert upward("collect", "from loraclr.merge import merge") == {"merge"}
    assert upward("formats", "def f():\n    from loraclr.methods.sum import Sum") == {"methods"}
    assert upward("merge", "from loraclr import merge, toybox, __version__") == {"toybox"}
    assert upward("merge", "from loraclr import Adapter") == {"Adapter"}
    assert upward("merge", "import torch\nfrom loraclr.collect import collect\nfrom loraclr.errors import MergeError") == set()


def test_every_module_has_its_place_and_a_telling_name():
    shelves = {shelf(path) for path in FILES} - {"__init__", "__main__"}
    assert shelves == set(LEVEL)
    assert not {path.stem for path in FILES} & {"utils", "util", "core", "common", "helpers", "misc"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_file_is_too_long(path):
    assert len(path.read_text().splitlines()) < 500


def modules_after(code: str) -> set[str]:
    """The top-level modules that are loaded after running `code` in a fresh interpreter."""
    script = f"import sys\n{code}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment())
    return set(done.stdout.splitlines()[-1].split())


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(SOURCE.parent), "HF_HUB_OFFLINE": "1"}


def test_importing_the_package_imports_nothing_heavy():
    assert not modules_after("import loraclr") & {"torch", "numpy", "diffusers", "transformers", "rich", "typer"}


def test_help_does_not_import_torch():
    for words in (
        ["--help"],
        ["merge", "--help"],
        ["inspect", "--help"],
        ["verify", "--help"],
        ["generate", "--help"],
        ["evaluate", "--help"],
        ["train", "--help"],
        ["--version"],
    ):
        assert not modules_after(f"from loraclr.cli import main\nassert main({words}) == 0") & {
            "torch",
            "numpy",
            "diffusers",
            "transformers",
        }


def test_all_but_a_loaded_pipeline_works_without_diffusers():
    heavy = {"diffusers", "transformers", "peft", "accelerate"}
    assert not modules_after("import loraclr\nfor name in loraclr.__all__: getattr(loraclr, name)") & heavy


def test_public_names_exist_and_are_listed():
    assert len(set(loraclr.__all__)) == len(loraclr.__all__)
    assert all(hasattr(loraclr, name) and name in dir(loraclr) for name in loraclr.__all__)
    assert set(loraclr._HOMES) == set(loraclr.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="no attribute 'mergee'"):
        loraclr.mergee  # noqa: B018


def test_type_checkers_see_the_same_public_names():
    block = next(node for node in ast.parse((SOURCE / "__init__.py").read_text()).body if isinstance(node, ast.If))
    seen = {alias.name: node.module.removeprefix("loraclr.") for node in block.body for alias in node.names}
    assert seen == loraclr._HOMES


@pytest.mark.parametrize(
    "first",
    [
        "import loraclr.collect",
        "from loraclr.generate import Region",
        "from loraclr import merge",
        "from loraclr.train import Recipe",
        "pass",
    ],
)
def test_a_verb_is_its_function_whichever_import_came_first(first):
    check = (
        "import loraclr\nfor verb in ('collect', 'merge', 'generate', 'evaluate', 'train'): assert callable(getattr(loraclr, verb)), verb"
    )
    modules_after(f"{first}\n{check}\nfrom loraclr.merge import MergeResult\nfrom loraclr import methods\nassert methods.METHODS")
