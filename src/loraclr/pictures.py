"""Pictures of the user, read as they are seen: upright, and white where they are transparent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loraclr.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder in the order of their names, but for hidden ones such as `._1.jpg`, which macOS writes beside `1.jpg`."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))


def read_picture(path: Path, mode: str = "RGB") -> Image:
    """The picture in `mode`, RGB or L. Raises UsageError for what is none, is damaged, or is too large to be unpacked safely."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if mode == "RGB" and image.has_transparency_data:  # what is transparent has colours nobody was meant to see
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return image.convert(mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises for damaged files
        raise UsageError(f"{path} is not a picture that can be read ({error}); remove it or save it anew") from error
