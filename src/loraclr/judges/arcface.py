"""ArcFace through insightface and onnxruntime, with the user's own weights: a recognition network and the detector of its pack.

Deng et al. 2019, arXiv 1801.07698. insightface's packs, such as buffalo_l, are for non-commercial research: their terms are yours to
keep, and nothing here fetches them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from loraclr.errors import UsageError
from loraclr.evaluate import Limit

if TYPE_CHECKING:
    from PIL.Image import Image

LIMIT = Limit(0.32, "cosine")  # a cosine distance of 0.68: the detection rate of the field's tables
DETECTORS = ("det_*.onnx", "scrfd_*.onnx")


class ArcFaceJudge:
    limit = LIMIT

    def __init__(self, recognition: Any, detector: Any, *, name: str = "arcface") -> None:
        self._recognition, self._detector, self.name = recognition, detector, name

    @staticmethod
    def load(file: Path) -> ArcFaceJudge:
        """`file` is the recognition network; the one file det_*.onnx or scrfd_*.onnx in the same folder finds the faces.

        Raises UsageError for files that are missing, are no such networks, or without insightface.
        """
        if not file.is_file() or file.suffix != ".onnx":
            raise UsageError(
                f"there is no ONNX file {file}; give the recognition network of an insightface pack, such as w600k_r50.onnx of buffalo_l"
            )
        detectors = sorted(path for pattern in DETECTORS for path in file.parent.glob(pattern) if path != file)
        if len(detectors) != 1:
            seen = ", ".join(path.name for path in detectors) or "no detector"
            raise UsageError(f"{seen} beside {file}; put exactly one of its pack there, such as det_10g.onnx of buffalo_l")
        try:
            from insightface.model_zoo import get_model
        except ImportError as error:
            raise UsageError(f"judge arcface needs insightface ({error}); pip install 'loraclr[face-arcface]'") from error
        recognition, detector = (_task(get_model, path, task) for path, task in ((file, "recognition"), (detectors[0], "detection")))
        detector.prepare(-1)
        if not detector.use_kps:
            raise UsageError(f"{detectors[0]} finds no landmarks, which faces are aligned by; take a detector with five key points")
        return ArcFaceJudge(recognition, detector, name=f"arcface:{file.name}")

    def embed_faces(self, images: Sequence[Image]) -> list[Tensor]:
        """Per picture (faces, d), not of unit length; no rows where none is found."""
        return [self._faces(np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])) for image in images]

    def _faces(self, pixels: np.ndarray) -> Tensor:
        """`pixels` (height, width, 3) in OpenCV's order, blue first."""
        from insightface.utils.face_align import norm_crop

        _, points = self._detector.detect(pixels)
        width = int(self._recognition.output_shape[-1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # scikit-image's, about how insightface calls it
            crops = [norm_crop(pixels, landmark, self._recognition.input_size[0]) for landmark in points]
        if not crops:
            return torch.empty(0, width)
        # One at a time: a network may have been exported for a batch of one.
        return torch.from_numpy(np.concatenate([self._recognition.get_feat(crop) for crop in crops])).float()


def _task(get_model: Any, path: Path, task: str) -> Any:
    try:
        model = get_model(str(path), download=False, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnx, onnxruntime and protobuf each have their own
        raise UsageError(f"{path} is no ONNX network that loads ({type(error).__name__}: {error}); take the file of the pack") from error
    seen = getattr(model, "taskname", None)
    if seen != task:
        raise UsageError(f"{path} is no {task} network (insightface takes it for: {seen or 'nothing it knows'}); check which file is which")
    return model
