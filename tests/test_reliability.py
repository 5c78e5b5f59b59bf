"""Full disks, read-only ones, missing rights, missing and vanished inputs, for every command that writes, on file systems made for it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from concepts import SMALL, three
from PIL import Image

from loraclr import disk
from loraclr.adapter import Adapter, LoraLayer
from loraclr.cli import main
from loraclr.errors import WriteError
from loraclr.formats import load_adapter, save_adapter
from loraclr.merge import merge
from loraclr.pipeline import Pipeline
from loraclr.train import make_recipe, train

NOBODY = 65534


@pytest.fixture(scope="module")
def open_folder():
    """A temporary folder that others can look into, as into those of pytest they cannot."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def world(_tiny_original, tiny_clip, open_folder) -> Path:
    """base/, clip/, ada, ben and cai in files, pictures/ of one concept, methods/A and methods/B of pictures, prompts.txt"""
    root = open_folder / "world"
    root.mkdir()
    shutil.copytree(tiny_clip, root / "clip")
    _tiny_original.save_pretrained(root / "base")
    for adapter in three(Pipeline(_tiny_original)):
        save_adapter(adapter, root / f"{adapter.name}.safetensors")
    for name in ("pictures/ada", "methods/A/ada", "methods/B/ada"):
        (root / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (16, 16), (90 * number, len(name), 30)).save(root / name / f"{number}.png")
    (root / "prompts.txt").write_text("a photo of a {}\n")
    for folder in (root, *root.rglob("*")):  # for those with few rights
        folder.chmod(0o755)
    return root


def words(command: str, world: Path, output: Path) -> list[str]:
    base = ("--base", world / "base")
    shown = ("--references", world / "pictures" / "ada")
    judged = ("--prompts", world / "prompts.txt", *shown, "--judge", f"clip:{world / 'clip'}", "--seeds", 1)
    small = ["--sample-every", 0, *(word for setting in ("steps=2", "rank=2", "text_rank=0", "batch=1") for word in ("--set", setting))]
    asked = [f"--pictures={name}={world / 'methods' / name}" for name in "AB"]
    files = [world / f"{name}.safetensors" for name in ("ada", "ben", "cai")]
    lines = {
        "merge": ["merge", *files, "--method", "sum", "--output", output],
        "merge to a folder": ["merge", *files, "--method", "sum", "--format", "peft", "--output", output],
        "compare": ["compare", *files, "--methods", "sum,average", "--output", output],
        "convert": ["convert", files[0], "--to", "diffusers", "--output", output],
        "train": ["train", world / "pictures" / "ada", *base, "--trigger", "qq", "--class", "m", *small, "--output", output],
        "generate": ["generate", *base, "--prompt", "a dog", "--steps", 1, "--output", output],
        "evaluate": ["evaluate", *base, "--lora", files[0], *judged, "--steps", 1, "--guidance", 1, "--output", output],
        "toybox export": ["toybox", "export", output],
        "pack create": ["pack", "create", *files, *base, "--output", output],
        "study create": ["study", "create", output, "--references", world / "pictures", *asked],
        "demo": ["demo", "--output", output],
    }
    return [str(word) for word in lines[command]]


OUTPUTS = {
    "merge": "out.safetensors",
    "merge to a folder": "out",
    "compare": "out.html",
    "convert": "out.safetensors",
    "train": "out.safetensors",
    "generate": "out",
    "evaluate": "out",
    "toybox export": "out",
    "pack create": "out",
    "study create": "out",
    "demo": "out",
}
REPLACING = ("merge", "merge to a folder", "convert", "train", "generate")  # with --force
ONE_FILE = ("merge", "convert", "train")
every = pytest.mark.parametrize("command", OUTPUTS)


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture
def refused(capsys, world) -> Callable[..., str]:
    """`refused(command, output, *more)`: the one line that it says before it ends with 1."""

    def run(command: str, output: Path, *more: str) -> str:
        capsys.readouterr()
        code = main([*words(command, world, output), *more])
        said = capsys.readouterr()
        lines = said.err.splitlines()
        assert code == 1, (code, said)
        assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in lines[0], said.err
        return lines[0]

    return run


def earlier(command: str, world: Path, output: Path) -> list[str]:
    """An earlier output, where the command would replace one, and the word that says so."""
    if command not in REPLACING:
        return []
    if command == "generate":
        output.mkdir()
        (output / "01-a-dog-0.png").write_bytes(b"earlier")
    else:
        save_adapter(load_adapter(world / "cai.safetensors"), output, format="peft" if output.suffix == "" else "kohya")
        output.with_name(f"{output.name}.json").write_text("earlier")
    return ["--force"]


# ---- the disk


@pytest.mark.parametrize(
    ("command", "left"),  # kB; a picture of the tiny model and a page have room in 4, and the demonstration takes minutes
    [(name, left) for name in OUTPUTS for left in (0, 4) if name != "demo" and (name, left) not in (("compare", 4), ("generate", 4))],
)
def test_a_full_disk_loses_nothing(command, left, refused, mounted, world):
    folder = mounted("size=600k")
    output = folder / OUTPUTS[command]
    more = earlier(command, world, output)
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(b"x" * 4096)
    os.truncate(folder / "filler", max(0, (folder / "filler").stat().st_size - 1024 * left))
    before = tree(folder)
    said = refused(command, output, *more)
    assert "No space left on device" in said and "make room" in said and str(folder) in said
    after = tree(folder)
    notes = {name for name in after if name.startswith(("out/pictures", "out.safetensors.train"))} | {"out"}
    assert {name: after.get(name) for name in before} == before
    assert set(after) - set(before) <= notes and not [name for name in after if "/." in f"/{name}"]


def test_what_did_not_fit_is_made_by_the_same_command_once_there_is_room(refused, mounted, world):
    folder = mounted("size=40k")
    output = folder / "out.safetensors"
    assert "No space left" in refused("train", output)
    assert not output.exists()
    subprocess.run(["mount", "-o", "remount,size=2m", folder], check=True)
    assert main(words("train", world, output)) == 0
    assert load_adapter(output)


@every
def test_a_read_only_disk_is_said(command, refused, mounted, world):
    folder = mounted("size=600k")
    output = folder / OUTPUTS[command]
    more = earlier(command, world, output)
    before = tree(folder)
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    said = refused(command, output, *more)
    assert "Read-only file system" in said and "give a folder that can be written to" in said
    assert tree(folder) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become somebody with fewer rights")
@every
def test_no_permission_is_said(command, refused, open_folder):
    theirs = open_folder / "theirs"
    theirs.mkdir(mode=0o755, exist_ok=True)
    for module in ("loraclr.toybox.demo", "loraclr.web.study"):  # before the rights to read them are gone
        importlib.import_module(module)
    os.seteuid(NOBODY)
    try:
        said = refused(command, theirs / OUTPUTS[command])
    finally:
        os.seteuid(0)
    assert "Permission denied" in said and "give a folder that you may write to" in said
    assert tree(theirs) == {}


# ---- the place


@pytest.mark.parametrize("command", [*ONE_FILE, "merge to a folder"])
def test_a_missing_folder_is_said(command, refused, tmp_path):
    assert "there is no folder" in refused(command, tmp_path / "no" / OUTPUTS[command])
    assert tree(tmp_path) == {}


@every
def test_a_file_is_not_taken_for_a_folder_nor_the_reverse(command, refused, tmp_path):
    output = tmp_path / OUTPUTS[command]
    if command in ONE_FILE:
        output.mkdir()
        (output / "thesis").write_text("years of work")
    else:
        output.write_text("years of work")
    before = tree(tmp_path)
    said = refused(command, output, *(["--force"] if command in REPLACING else []))
    assert OUTPUTS[command] in said
    assert tree(tmp_path) == before


# ---- the inputs


@pytest.mark.parametrize("command", ["merge", "train", "generate", "evaluate"])
def test_a_missing_base_is_said(command, refused, tmp_path):
    output = tmp_path / OUTPUTS[command]
    said = refused(command, output, "--base", str(tmp_path / "nobase"))
    assert "there is no folder" in said and "nobase" in said
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("command", ["merge", "generate", "evaluate"])
def test_a_base_of_another_family_is_said(command, refused, capsys, world, tmp_path):
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    foreign = Adapter.of([LoraLayer(name, torch.ones(2, 2048), torch.ones(640, 2), 1.0)], name="big").with_(
        family="sdxl", triggers=("big",)
    )
    file = save_adapter(foreign, tmp_path / "big.safetensors")
    before = tree(tmp_path)
    given = [str(file) if word == str(world / "ada.safetensors") else word for word in words(command, world, tmp_path / "out")]
    if command == "merge":
        given = ["merge", str(file), "--base", str(world / "base"), "--output", str(tmp_path / "out.safetensors")]
    if command != "merge":
        given += {"generate": ["--lora", str(file)], "evaluate": ["--class", "person"]}[command]
    capsys.readouterr()
    assert main(given) == 1
    said = capsys.readouterr().err.splitlines()
    where = "for sdxl models and the base is one of sd1" if command == "merge" else name
    assert len(said) == 1 and where in said[0] and "base" in said[0], said
    assert tree(tmp_path) == before


def test_a_file_that_changes_during_the_merge_is_what_it_was(world, tmp_path):
    file = Path(shutil.copy(world / "ada.safetensors", tmp_path))
    whole = hashlib.sha256(file.read_bytes()).hexdigest()
    result = merge([file], method="sum", progress=lambda what, share: file.unlink(missing_ok=True))
    assert not file.exists()
    assert result.inputs[0]["sha256"] == whole


# ---- two at once


def elsewhere(work: Callable[[], object]) -> None:
    """In another thread, to its end: a lock is a thread's own."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@every
def test_the_second_run_on_one_output_is_told(command, refused, tmp_path):
    if command in ("generate", "toybox export", "study create"):
        output = tmp_path / OUTPUTS[command]
        held = disk.reserved(output / "01-a-dog-0.png" if command == "generate" else output)
        output.mkdir()
    else:
        output = tmp_path / OUTPUTS[command]
        held = disk.folder(output) if command in ("evaluate", "demo") else disk.reserved(output)
    said: list[str] = []
    with held:
        before = tree(tmp_path)
        elsewhere(lambda: said.append(refused(command, output)))
        assert "another run is writing it" in said[0]
        assert {name: data for name, data in tree(tmp_path).items() if "pictures" not in name} == before


def locked(file: Path) -> bool:
    """Whether some process has it, asked without taking it."""
    held = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return file.exists() and any(words[1] == "FLOCK" and words[5].endswith(f":{file.stat().st_ino}") for words in held)


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="needs Linux to see who has the output")
def test_of_two_merges_into_one_output_the_first_wins_whole_and_the_second_is_told(world, tmp_path):
    """Two processes; the first is held up where it has the output, until the second has ended."""
    output = tmp_path / "out.safetensors"
    asked = [sys.executable, "-W", "ignore", "-m", "loraclr", *words("merge", world, output)]
    with subprocess.Popen(asked, stdout=subprocess.DEVNULL) as first:
        while not locked(tmp_path / ".out.safetensors.lock"):
            assert first.poll() is None, "it ended before it had the output"
            time.sleep(0.001)
        first.send_signal(signal.SIGSTOP)
        try:
            assert not output.exists()
            second = subprocess.run([*asked, "--weight", "ada=0.5", "--force"], capture_output=True, text=True, check=False)
        finally:
            first.send_signal(signal.SIGCONT)
        assert second.returncode == 1 and "another run is writing it" in second.stderr and len(second.stderr.splitlines()) == 1
        assert first.wait() == 0
    alone = tmp_path / "alone"
    alone.mkdir()
    assert main(words("merge", world, alone / "out.safetensors")) == 0
    assert output.read_bytes() == (alone / "out.safetensors").read_bytes()
    assert {name for name in tree(tmp_path) if not name.startswith("alone")} == set(tree(alone)), "nothing is left over"


@pytest.mark.parametrize("command", [*ONE_FILE, "compare"])
def test_what_another_run_ended_meanwhile_is_not_replaced(command, refused, monkeypatch, tmp_path):
    """It ends after the output was looked at and before it is reserved."""
    output, reserved = tmp_path / OUTPUTS[command], disk.reserved

    def late(path: Path, *beside: Path) -> contextlib.AbstractContextManager[None]:
        path.write_text("theirs")
        return reserved(path, *beside)

    monkeypatch.setattr(disk, "reserved", late)
    assert "exists already" in refused(command, output)
    assert tree(tmp_path) == {output.name: b"theirs"}


def test_a_picture_that_another_run_drew_meanwhile_is_not_replaced(refused, monkeypatch, tmp_path):
    output, reserved = tmp_path / "out", disk.reserved

    def late(path: Path) -> contextlib.AbstractContextManager[None]:
        path.write_text("theirs")
        return reserved(path)

    monkeypatch.setattr(disk, "reserved", late)
    assert "already has 01-a-dog-0.png" in refused("generate", output)
    assert tree(output) == {"01-a-dog-0.png": b"theirs"}


def test_two_trainings_in_one_work_folder(world, tmp_path):
    said = []

    def learn(**more: object) -> None:
        recipe = make_recipe("lora", steps=2, rank=2, text_rank=0, batch=1)
        asked = {"recipe": recipe, "trigger": "qq", "class_word": "m", "work": tmp_path / "work", "sample_every": 0}
        train(world / "pictures" / "ada", base=Pipeline.load(world / "base"), **asked, **more)

    def second() -> None:
        with pytest.raises(WriteError, match="work: another run is writing it"):
            learn(restart=True)
        said.append("told")

    learn(progress=lambda what, share: None if said else elsewhere(second))
    assert said == ["told"]
    assert (tmp_path / "work" / "checkpoint.pt").exists()


# ---- the same again


MERGE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from concepts import SMALL
from loraclr import Pipeline, merge
files = [f"{sys.argv[2]}/{name}.safetensors" for name in ("ada", "ben", "cai")]
merge(files, base=Pipeline.load(f"{sys.argv[2]}/base"), collection=SMALL).save(sys.argv[3], dtype=torch.float32)
"""


def test_two_processes_make_the_same_bytes_and_thread_counts_nearly(world, tmp_path):
    files, before = [world / f"{name}.safetensors" for name in ("ada", "ben", "cai")], torch.get_num_threads()
    made = {}
    for label in ("one", "two", "other"):
        (tmp_path / label).mkdir()
        output = tmp_path / label / "out.safetensors"
        if label == "other":
            words = [sys.executable, "-W", "ignore", "-c", MERGE, Path(__file__).parent, world, output]
            subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}, check=True)
        else:
            torch.set_num_threads(1 if label == "one" else 2)
            try:
                merge(files, base=Pipeline.load(str(world / "base")), collection=SMALL).save(output, dtype=torch.float32)
            finally:
                torch.set_num_threads(before)
        made[label] = tree(tmp_path / label)
        receipt = json.loads(made[label].pop("out.safetensors.json"))
        assert receipt.pop("seconds") and receipt.pop("memory")
        made[label]["receipt"] = json.dumps(receipt).encode()
    assert made["other"] == made["one"]
    one, two = (load_adapter(tmp_path / label / "out.safetensors") for label in ("one", "two"))
    assert list(one.layers) == list(two.layers)
    for layer in one:
        change = layer.delta(torch.float64)
        assert float((two.layers[layer.name].delta(torch.float64) - change).norm() / change.norm()) < 1e-4
