"""dlib's face embedding: 128 numbers a face, compared by distance. Real weights that come as a Python package.

The frontal detector is HOG: it misses small, tilted, masked and painted faces, so read identity together with the no-face rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from loraclr.errors import UsageError
from loraclr.evaluate import Limit

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTH = 128
UPSAMPLE = 1  # doublings before detecting: the detector's window is 80 pixels, so faces from about 40 are found
LIMIT = Limit(0.6, "l2")  # dlib's own recommendation for these weights: 99.38 % on Labeled Faces in the Wild
_FILES = ("shape_predictor_5_face_landmarks.dat", "dlib_face_recognition_resnet_model_v1.dat")


class DlibJudge:
    name = "dlib"
    limit = LIMIT

    def __init__(self, shape: Path, recognition: Path) -> None:
        import dlib

        self._detector: Any = dlib.get_frontal_face_detector()
        self._shape: Any = dlib.shape_predictor(str(shape))
        self._network: Any = dlib.face_recognition_model_v1(str(recognition))

    @staticmethod
    def load() -> DlibJudge:
        """With the weights of the package face-recognition-models, which is looked up and not imported: it cannot be, any more."""
        found = find_spec("face_recognition_models")
        if find_spec("dlib") is None or found is None or found.origin is None:
            raise UsageError("judge dlib needs dlib and its weights; pip install 'loraclr[face-dlib]'")
        files = [Path(found.origin).parent / "models" / name for name in _FILES]
        if missing := [path.name for path in files if not path.is_file()]:
            raise UsageError(f"{files[0].parent} lacks {' and '.join(missing)}; reinstall face-recognition-models")
        return DlibJudge(*files)

    def embed_faces(self, images: Sequence[Image]) -> list[Tensor]:
        """Per picture (faces, 128), not of unit length; no rows where none is found."""
        return [self._faces(np.asarray(image.convert("RGB"))) for image in images]

    def _faces(self, pixels: np.ndarray) -> Tensor:
        boxes = self._detector(pixels, UPSAMPLE)
        rows = [list(self._network.compute_face_descriptor(pixels, self._shape(pixels, box))) for box in boxes]
        return torch.tensor(rows, dtype=torch.float32).reshape(len(rows), WIDTH)
