"""What a training leaves beside its output while it runs: checkpoint, loss curve, sample pictures. Every file is whole or absent."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loraclr import disk
from loraclr.errors import TrainError

if TYPE_CHECKING:
    from PIL.Image import Image

_WIDTH, _HEIGHT, _EDGE = 640, 320, 36


class WorkFolder:
    """`checkpoint.pt`, `loss.csv`, `loss.png`, `samples/STEP.png` and `class/NUMBER.png` of one training."""

    def __init__(self, path: Path) -> None:
        self.path, self._checkpoint, self._class = path, path / "checkpoint.pt", path / "class"

    def resume(self, settings: Mapping[str, object]) -> dict[str, Any] | None:
        """The last checkpoint, or None. Raises TrainError if it is not of this training or cannot be read."""
        if not self._checkpoint.exists():
            return None
        remedy = f"remove {self.path} to begin anew, or restart"
        try:
            saved: dict[str, Any] = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
            known = json.loads(saved["settings"])
        except Exception as error:  # a damaged archive makes the unpickler raise anything
            raise TrainError(f"{self._checkpoint} cannot be read ({error}); {remedy}") from error
        mine = json.loads(json.dumps(settings))
        if other := sorted(key for key in known | mine if known.get(key) != mine.get(key)):
            said = ", ".join(f"{key} {known.get(key)!r} there, {mine.get(key)!r} now" for key in other[:3])
            raise TrainError(f"{self.path} holds an unfinished training with other settings ({said}); {remedy}")
        return saved

    def checkpoint(self, state: Mapping[str, Any], settings: Mapping[str, object]) -> None:
        buffer = io.BytesIO()  # for torch calls a full disk a RuntimeError
        torch.save({**state, "settings": json.dumps(settings)}, buffer)
        self._write(self._checkpoint, lambda path: path.write_bytes(buffer.getbuffer()))

    @contextmanager
    def alone(self, *, anew: bool = False) -> Iterator[None]:
        """One training at a time; with `anew` it begins at its first step, without the class pictures of the last one.

        Raises WriteError where another one is at work.
        """
        with disk.folder(self.path):
            if anew:
                for path in (self._checkpoint, *self._class.glob("*.png")):
                    path.unlink(missing_ok=True)
            yield

    def curve(self, losses: Sequence[float]) -> None:
        """`loss.csv` with every step, and `loss.png` with every step in grey and their running mean in blue."""
        rows = "".join(f"{step},{loss:.6g}\n" for step, loss in enumerate(losses, start=1))
        self._write(self.path / "loss.csv", lambda path: path.write_text("step,loss\n" + rows))
        self._write(self.path / "loss.png", lambda path: draw_curve(losses).save(path))

    def samples(self, step: int, images: Sequence[Image]) -> None:
        from PIL import Image

        sheet = Image.new("RGB", (sum(image.width for image in images), images[0].height))
        for number, image in enumerate(images):
            sheet.paste(image, (number * image.width, 0))
        self._write(self.path / "samples" / f"{step:05d}.png", sheet.save)

    def class_picture(self, number: int, drawn_by: Mapping[str, object]) -> Image | None:
        """`class/NUMBER.png`, if it is there and says that it was drawn by these settings."""
        from PIL import Image

        path = self._class / f"{number:04d}.png"
        if not path.exists():
            return None
        with Image.open(path) as file:
            image = file.convert("RGB")
            return image if file.info.get("loraclr.class") == json.dumps(drawn_by) else None

    def keep_class_picture(self, number: int, drawn_by: Mapping[str, object], image: Image) -> None:
        from PIL.PngImagePlugin import PngInfo

        text = PngInfo()
        text.add_text("loraclr.class", json.dumps(drawn_by))
        self._write(self._class / f"{number:04d}.png", lambda path: image.save(path, pnginfo=text))

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        disk.make_folder(path.parent)
        with disk.whole(path) as part:
            write(part)


def draw_curve(losses: Sequence[float]) -> Image:
    """The losses over the steps, at least one; the axis from 0 to the largest running mean and a bit, higher spikes cut off."""
    from PIL import Image, ImageDraw

    smooth, mean = [], losses[0]
    for number, loss in enumerate(losses):
        mean += (loss - mean) / min(number + 1, 50)
        smooth.append(mean)
    top = max(max(smooth[len(smooth) // 20 :]) * 1.25, 1e-12)
    image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    pen = ImageDraw.Draw(image)

    def places(values: Sequence[float]) -> list[tuple[float, float]]:
        wide, high = _WIDTH - 2 * _EDGE, _HEIGHT - 2 * _EDGE
        return [
            (_EDGE + wide * number / max(len(values) - 1, 1), _HEIGHT - _EDGE - high * min(value / top, 1.0))
            for number, value in enumerate(values)
        ]

    pen.line([(_EDGE, _EDGE), (_EDGE, _HEIGHT - _EDGE), (_WIDTH - _EDGE, _HEIGHT - _EDGE)], "black")
    pen.line(places(losses), (200, 200, 200))
    pen.line(places(smooth), (30, 90, 200), width=2)
    pen.text((4, _EDGE - 14), f"{top:.3g}", "black")
    pen.text((_WIDTH - _EDGE - 24, _HEIGHT - _EDGE + 6), str(len(losses)), "black")
    pen.text((_EDGE + 6, 6), f"loss {smooth[-1]:.4g}", "black")
    return image
