"""Judges by name: `open_judge("clip:PATH")`. None of them downloads anything unless it is told to."""

from __future__ import annotations

import difflib
from pathlib import Path

from loraclr.errors import UsageError
from loraclr.evaluate import FaceJudge, PictureJudge

__all__ = ["JUDGES", "open_face_judge", "open_judge", "open_picture_judge"]

# What can be asked for, in the order in which it is shown: how it is written, and what it is.
JUDGES = {
    "clip:PATH_OR_ID": "CLIP through transformers: a folder, or a hub id that is cached or that --download fetches",
    "toyclip[:FILE]": "the toybox's own: pictures and texts of its world",
    "arcface:FILE.onnx": "ArcFace through insightface, your weights, the detector of the same pack beside it",
    "dlib": "dlib's face embedding; the weights come with loraclr[face-dlib]",
    "toyface[:FILE]": "the toybox's own: identities of its world",
}


def open_judge(text: str, *, download: bool = False) -> PictureJudge | FaceJudge:
    """A judge from words as in `JUDGES`. `download` allows `clip:` to fetch a hub id; nothing else ever reaches for the network.

    Raises UsageError for an unknown kind, a missing argument, missing packages or weights that cannot be used, with the remedy.
    """
    kind, colon, rest = text.partition(":")
    known = {word.partition(":")[0].partition("[")[0]: word for word in JUDGES}
    if kind not in known:
        near = difflib.get_close_matches(kind, known, n=1)
        hint = f"did you mean {known[near[0]]}?" if near else f"the judges are {', '.join(JUDGES)}"
        raise UsageError(f"no judge {text!r}; {hint}")
    optional = known[kind] == kind or "[" in known[kind]
    if (not rest and not (optional and not colon)) or (colon and known[kind] == kind):
        raise UsageError(f"judge {text!r} is written {known[kind]}")
    if download and kind != "clip":
        raise UsageError(f"judge {text!r} is never downloaded; leave --download out")
    if kind == "clip":
        from loraclr.judges.clip import ClipJudge

        return ClipJudge.load(rest, download=download)
    if kind == "arcface":
        from loraclr.judges.arcface import ArcFaceJudge

        return ArcFaceJudge.load(Path(rest))
    if kind == "dlib":
        from loraclr.judges.dlib import DlibJudge

        return DlibJudge.load()
    from loraclr.toybox import open_toybox

    if kind == "toyclip":
        from loraclr.toybox.clip import ToyClip

        return ToyClip.load(rest) if rest else open_toybox().clip
    from loraclr.toybox.face import ToyFace

    return ToyFace.load(rest) if rest else open_toybox().face


def open_picture_judge(text: str, *, download: bool = False) -> PictureJudge:
    """`open_judge`, for one that reads texts."""
    judge = open_judge(text, download=download)
    if not isinstance(judge, PictureJudge):
        raise UsageError(f"{text!r} tells people apart and reads no text; give it as the face judge, and clip:PATH_OR_ID as the judge")
    return judge


def open_face_judge(text: str) -> FaceJudge:
    """`open_judge`, for one that tells people apart."""
    judge = open_judge(text)
    if not isinstance(judge, FaceJudge):
        raise UsageError(f"{text!r} does not tell people apart; as the face judge give arcface:FILE.onnx, dlib or toyface")
    return judge
