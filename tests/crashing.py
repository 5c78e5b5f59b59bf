"""`kill -9` at random moments of a merge and of its writing: `python tests/crashing.py 200 [--seed 0]` (`make crash`).

Every trial forks this process, lets the child merge three adapters into one output and kills it at a random moment: half of the
trials anywhere in the whole merge, half within the few milliseconds in which files are written. Afterwards each file of the output
is what it was before or the whole new one, byte for byte, and a run that is not killed makes the output again.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from concepts import SMALL, three
from conftest import _build_tiny_pipe

from loraclr.errors import LoraclrError
from loraclr.formats import load_adapter
from loraclr.merge import MergeResult, merge
from loraclr.pipeline import Pipeline

OUTPUTS = {"kohya": "merged.safetensors", "diffusers": "merged.safetensors", "peft": "merged"}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that a user would see, by its path in the folder. Unfinished ones begin with a dot."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    }


def killed(work: Callable[[Callable[[], None]], None], wait: float, *, from_writing: bool) -> bool:
    """Runs `work(writing)` in a fork and kills it after `wait` seconds, counted from its call of `writing` or from the start.

    Whether it was killed before its end.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            work(lambda: os.write(writer, b"w") and None)  # type: ignore[func-returns-value]
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    if from_writing:
        os.read(reader, 1)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reader)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the child failed by itself")
    return os.WIFSIGNALED(status)


def run(count: int, seed: int) -> Counter[str]:
    """Outcomes of `count` trials. Raises AssertionError at the first file that is neither old nor whole."""
    torch.set_num_threads(1)  # a fork has no other threads
    base = Pipeline(_build_tiny_pipe())
    adapters = three(base)
    outcomes: Counter[str] = Counter()
    rng = random.Random(seed)

    def make(weight: float) -> MergeResult:
        made = merge(adapters, base=base, collection=SMALL, weights=[weight, 1.0, 1.0])
        return replace(made, seconds={})  # the one thing in which two equal merges differ

    began = time.perf_counter()
    results = {"old": make(1.0), "new": make(0.5)}
    whole = (time.perf_counter() - began) / 2
    with tempfile.TemporaryDirectory() as name:
        expected: dict[tuple[str, str], dict[str, bytes]] = {}
        took: dict[str, float] = {}
        for format, output in OUTPUTS.items():
            for which, result in results.items():
                folder = Path(name) / f"{format} {which}"
                folder.mkdir()
                began = time.perf_counter()
                result.save(folder / output, format=format)
                took[format] = time.perf_counter() - began
                expected[format, which] = contents(folder)
        for number in range(count):
            format = rng.choice(list(OUTPUTS))
            before = rng.choice(("nothing", "old"))
            folder = Path(name) / "trial"
            folder.mkdir()
            if before == "old":
                results["old"].save(folder / OUTPUTS[format], format=format)
            writing = number % 2 == 0

            def work(tell: Callable[[], None], writing: bool = writing, format: str = format, folder: Path = folder) -> None:
                result = results["new"] if writing else make(0.5)
                tell()
                result.save(folder / OUTPUTS[format], format=format)

            wait = rng.uniform(0, 1.5 * took[format]) if writing else rng.uniform(0, 1.2 * whole)
            early = killed(work, wait, from_writing=writing)
            old, new = expected[format, "old"] if before == "old" else {}, expected[format, "new"]
            seen = contents(folder)
            for file in {*seen, *old}:
                assert seen.get(file) in (old.get(file), new.get(file)), f"trial {number}: {format} over {before}: {file} is neither"
            moved = sum(seen.get(file) == new[file] for file in new)
            outcomes[
                f"{'killed' if early else 'finished'}, {'new' if moved == len(new) else 'old' if not moved else 'part of the'} output"
            ] += 1
            assert early or seen == new, f"trial {number}: finished without the whole output"
            if (folder / OUTPUTS[format]).exists():
                load_adapter(folder / OUTPUTS[format])
            results["new"].save(folder / OUTPUTS[format], format=format)
            assert contents(folder) == new, f"trial {number}: a second run does not mend it"
            shutil.rmtree(folder)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        outcomes = run(arguments.count, arguments.seed)
    except (AssertionError, LoraclrError) as error:
        raise SystemExit(f"FAILED: {error}") from error
    for outcome, times in sorted(outcomes.items()):
        print(f"{outcome:>32} {times:5}")
    print(f"{arguments.count} trials: every file was the old one or the whole new one, and a second run made the output")


if __name__ == "__main__":
    main()
