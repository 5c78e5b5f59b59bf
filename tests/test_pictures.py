"""Every command reads the user's pictures as they are seen."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from loraclr.cli import generate as command
from loraclr.errors import UsageError
from loraclr.evaluate import read_references
from loraclr.pictures import read_picture
from loraclr.train.data import read_folder

TURNED = 6  # of the EXIF orientation: by 90 degrees


def trained(folder: Path) -> list[Image.Image]:
    shots, problems = read_folder(folder)
    if problems:
        raise UsageError("; ".join(problems))
    return [shot.image for shot in shots]


def referred(folder: Path) -> list[Image.Image]:
    return read_references(folder)[folder.name]


def followed(folder: Path) -> list[Image.Image]:
    return [command._control("control", folder, path, 1.0).image for path in sorted(folder.glob("[!.]*"))]


@pytest.fixture(params=[trained, referred, followed])
def read(request, monkeypatch):
    monkeypatch.setattr("loraclr.control.load_control", lambda kind, source: None)
    return request.param


def test_turned_and_transparent_pictures_are_read_as_they_are_seen(read, tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "1.png")
    turned = Image.new("RGB", (6, 4))
    exif = turned.getexif()
    exif[0x0112] = TURNED
    turned.save(tmp_path / "2.jpg", exif=exif)
    (tmp_path / "._2.jpg").write_bytes(b"what macOS notes of 2.jpg")
    clear, upright = read(tmp_path)
    assert clear.getpixel((0, 0)) == (255, 255, 255) and upright.size == (4, 6) and upright.mode == "RGB"


def test_what_is_no_picture_or_too_large_is_one_sentence(read, tmp_path, monkeypatch):
    Image.new("RGB", (6, 4)).save(tmp_path / "1.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UsageError, match=r"1\.png is not a picture that can be read .*exceeds limit.*remove it or save it anew$"):
        read(tmp_path)
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"1\.png is not a picture that can be read \(cannot identify"):
        read(tmp_path)


def test_a_mask_is_gray(tmp_path):
    Image.new("RGB", (2, 2), "white").save(tmp_path / "mask.png")
    assert read_picture(tmp_path / "mask.png", "L").getextrema() == (255, 255)
