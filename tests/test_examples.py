"""Every example runs as it stands, is short, and writes the picture that it names."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path, monkeypatch, tmp_path, capsys):
    assert len(path.read_text().splitlines()) <= 20
    monkeypatch.setattr(sys, "argv", [str(path), str(tmp_path / "made.png")])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip() == str(tmp_path / "made.png")
    with Image.open(tmp_path / "made.png") as picture:
        assert picture.size == (128, 64) and len(picture.getcolors(10_000) or ()) > 100
