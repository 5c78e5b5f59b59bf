"""`kill -9` at random moments of whole commands: `python tests/crashing.py 200 [--seed 0] [--job merge]` (`make crash`).

Every trial forks this process, runs one command in the child and kills it: half of the trials at any moment, half within milliseconds
of one of the moments at which something is written. The child loads the base anew, as a process of its own would. Afterwards each
file of the output is what it was before or the whole new one, byte for byte; and the same command, not killed, ends in the files of
a run that was never broken, and leaves nothing else behind.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from concepts import three
from conftest import _build_tiny_pipe
from PIL import Image

from loraclr import disk
from loraclr.cli import main as loraclr
from loraclr.formats import save_adapter
from loraclr.pipeline import Pipeline


@dataclass(frozen=True)
class Job:
    """A command that writes `output`, with `--force` over an earlier one, which the words `old` had made another."""

    output: str
    words: Callable[[Path, Path], Sequence[str]]  # of the folder with the inputs and the path of the output
    old: tuple[str, ...] = ()
    notes: str | None = None  # a folder of what the job notes down while it runs: whole files, but of any step
    before: Callable[[Path, Path], Sequence[str]] | None = None  # what made an earlier output, where it was another command
    starts: tuple[str, ...] = ("nothing", "old")  # what may be there at its start
    force: tuple[str, ...] = ("--force",)

    def is_note(self, file: Path) -> bool:
        return self.notes is not None and file.parts[0] == self.notes


def merging(inputs: Path, output: Path) -> list[str]:
    files = [str(inputs / f"{name}.safetensors") for name in ("ada", "ben", "cai")]
    return ["merge", *files, "--output", str(output)]


def training(inputs: Path, output: Path) -> list[str]:
    settings = ("steps=5", "rank=2", "text_rank=0", "batch=1")
    words = ["train", str(inputs / "pictures"), "--base", str(inputs / "base"), "--trigger", "qq", "--class", "m", "--output", str(output)]
    return [*words, "--sample-every", "0", "--checkpoint-every", "1", *(word for setting in settings for word in ("--set", setting))]


def drawing(inputs: Path, output: Path) -> list[str]:
    words = ["generate", "--base", str(inputs / "base"), "--prompt", "a dog", "--seed", "1", "--seed", "2", "--steps", "1"]
    return [*words, "--output", str(output)]


def packing(inputs: Path, output: Path, names: Sequence[str] = ("ada", "cai")) -> list[str]:
    files = [str(inputs / f"{name}.safetensors") for name in names]
    return ["pack", "create", *files, "--base", str(inputs / "base"), "--output", str(output)]


def adding(inputs: Path, output: Path) -> list[str]:
    return ["pack", "add", str(output), str(inputs / "ben.safetensors"), "--base", str(inputs / "base")]


def building(inputs: Path, output: Path) -> list[str]:
    return ["pack", "build", str(inputs / "people"), "--output", str(output)]


# One line each. What is checked and how it is killed is the same for all of them.
JOBS = {
    "merge": Job(
        "merged.safetensors",
        lambda inputs, output: [*merging(inputs, output), "--base", str(inputs / "base"), "--method", "regmean"],
        ("--weight", "ada=0.5"),
    ),
    "merge to a folder": Job(
        "merged",
        lambda inputs, output: [*merging(inputs, output), "--method", "sum", "--format", "peft"],
        ("--weight", "ada=0.5"),
    ),
    "convert": Job(
        "ben-diffusers.safetensors",
        lambda inputs, output: ["convert", str(inputs / "ben.safetensors"), "--to", "diffusers", "--output", str(output)],
        ("--dtype", "fp32"),
    ),
    "generate": Job("drawn", drawing, ("--guidance", "1")),
    "train": Job("learned.safetensors", training, ("--seed", "1"), notes="learned.safetensors.train"),
    "pack create": Job("people", packing, starts=("nothing",), force=()),
    "pack add": Job("people", adding, before=partial(packing, names=("cai",)), starts=("old",), force=()),
    "pack build": Job("merged.safetensors", building, ("--weight", "ada=0.5")),
}


def make_inputs(folder: Path) -> None:
    """base/, three adapters, pictures/ and the pack people/."""
    pipe = _build_tiny_pipe()
    pipe.save_pretrained(folder / "base")
    for adapter in three(Pipeline(pipe)):
        save_adapter(adapter, folder / f"{adapter.name}.safetensors")
    (folder / "pictures").mkdir()
    for number in range(3):
        Image.new("RGB", (20, 24), (200, 60 * number, 30)).save(folder / "pictures" / f"{number}.png")
    run(JOBS["pack create"], folder, folder)


def contents(folder: Path, job: Job) -> dict[str, bytes]:
    """Every file that a user would see, by its path in the folder, without notes. Unfinished ones begin with a dot."""
    files = (file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file())
    seen = (file for file in files if not job.is_note(file) and not any(part.startswith(".") for part in file.parts))
    return {str(file): without_times(folder / file) for file in seen}


def without_times(file: Path) -> bytes:
    """A receipt says how many seconds and bytes the work took: the one thing in which two equal runs differ."""
    if file.suffix != ".json":
        return file.read_bytes()
    return json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key not in ("seconds", "memory")}).encode()


def run(job: Job, inputs: Path, folder: Path, *more: str, moment: Callable[[], object] = lambda: None) -> int:
    """One command in this process, `moment` called before anything is put in place. Its exit code."""
    place = disk._place

    def told(staged: dict[Path, Path | None]) -> None:
        moment()
        place(staged)

    disk._place = told
    try:
        with open(os.devnull, "w") as nowhere:
            sys.stdout, kept = nowhere, sys.stdout
            try:
                return loraclr([*job.words(inputs, folder / job.output), *more, "--json"])
            finally:
                sys.stdout = kept
    finally:
        disk._place = place


def killed(work: Callable[[Callable[[], object]], int], *, after: int, wait: float) -> bool:
    """Runs `work(moment)` in a fork and kills it `wait` seconds after its start, or after its `after`-th call of `moment`.

    Whether it was killed before its end.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.close(reader)
            code = work(lambda: os.write(writer, b"w"))
        finally:
            os._exit(code)
    os.close(writer)
    for _ in range(after):
        os.read(reader, 1)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reader)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the command failed by itself")
    return os.WIFSIGNALED(status)


def trials(name: str, count: int, seed: int, root: Path) -> Counter[str]:
    """Outcomes of `count` trials of one job. Raises AssertionError at the first file that is neither old nor whole."""
    job, rng = JOBS[name], random.Random(f"{seed}/{name}")
    outcomes: Counter[str] = Counter()
    folder = root / "trial"

    def again(moment: Callable[[], object] = lambda: None) -> int:
        return run(job, root, folder, *job.force, moment=moment)

    wanted: dict[str, dict[str, bytes]] = {}
    moments: list[float] = []
    for version, more in (("old", job.old), ("new", ())):
        if version not in ("new", *job.starts):
            continue
        made = root / f"{name} {version}"
        if version == "new" and "nothing" not in job.starts:
            shutil.copytree(root / f"{name} old", made)
        else:
            made.mkdir()
        this = replace(job, words=job.before or job.words) if version == "old" else job
        moments.clear()
        began = time.perf_counter()
        assert run(this, root, made, *more, moment=lambda: moments.append(time.perf_counter())) == 0, f"{name}: does not run"
        took = time.perf_counter() - began
        wanted[version] = contents(made, job)
        for file in made.iterdir():
            if job.is_note(file.relative_to(made)):
                shutil.rmtree(file)
    assert wanted.get("old") != wanted["new"]
    for number in range(count):
        before = rng.choice(job.starts)
        if before == "old":
            shutil.copytree(root / f"{name} old", folder)
        else:
            folder.mkdir()
        after, wait = (rng.randint(1, len(moments)), rng.uniform(0, 0.004)) if rng.random() < 0.5 else (0, rng.uniform(0, 1.1 * took))
        early = killed(again, after=after, wait=wait)
        old, new = wanted["old"] if before == "old" else {}, wanted["new"]
        seen = contents(folder, job)
        for file in {*seen, *old}:
            assert seen.get(file) in (old.get(file), new.get(file)), f"{name}, trial {number}, over {before}: {file} is neither"
        moved = sum(seen.get(file) == new[file] for file in new)
        there = "new" if moved == len(new) else "old" if not moved else "part of the"
        outcomes[f"{name}: {'killed' if early else 'finished'}, {there} output"] += 1
        assert early or seen == new, f"{name}, trial {number}: finished without the whole output"
        assert again() == 0, f"{name}, trial {number}: it cannot be run again"
        assert contents(folder, job) == new, f"{name}, trial {number}: a second run does not end like an unbroken one"
        left = [str(file) for file in folder.rglob("*") if file.name.startswith(".")]
        assert not left, f"{name}, trial {number}: {left} is left behind"
        shutil.rmtree(folder)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--job", choices=list(JOBS), help="only this one", default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a fork has no other threads
    names = [arguments.job] if arguments.job else list(JOBS)
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_inputs(root)
        try:
            for index, name in enumerate(names):
                outcomes += trials(name, len(range(index, arguments.count, len(names))), arguments.seed, root)
        except AssertionError as error:
            raise SystemExit(f"FAILED: {error}") from error
    for outcome, times in sorted(outcomes.items()):
        print(f"{outcome:>48} {times:5}")
    print(f"{arguments.count} trials: every file was the old one or the whole new one, and a second run made the output")


if __name__ == "__main__":
    main()
