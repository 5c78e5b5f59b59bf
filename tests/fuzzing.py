"""Damaged adapter files by the thousand: `python tests/fuzzing.py 10000 [--seed 0]` (`make fuzz`).

Every reader is fed valid files of every format with something broken in them: bytes flipped, cut, doubled or swapped, headers and
configurations edited, commands put into pickles; also the learned tokens that lie beside a file. Each must end in an adapter whose
numbers are finite, or in one LoraclrError; within seconds, without memory that only a header claims, and no command may run.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import pickletools
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from formats_samples import BASE, exotic, mixed

from loraclr.adapter import Adapter
from loraclr.errors import LoraclrError
from loraclr.formats import FORMATS, describe, load_adapter, save_adapter, sidecar
from loraclr.formats.files import safetensors_bytes

SECONDS, MEGABYTES = 5, 600  # for one file; for a whole run
ENDINGS = {"kohya": ".safetensors", "diffusers": ".safetensors", "edlora": ".pth", "peft": ""}
EXOTIC = ".safetensors"  # kinds and namings that are read only
BESIDE = "tokens beside"  # a file whose sidecar is broken, not itself
RAN = "ran"  # the file that a pickled command would make
WORDS = ("alpha", "lora_down", "lora_up", "lora_A", "lora_B", "weight", "unet", "text", "dora_scale", "hada_w1_a", "0", "__metadata__")
NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64 - 1, 1e308, -0.5, True, None, "8", [], {}, [4, 4], [2**40, 2**40], "F8_E4M3", "I64", "BF16")


def seeds(folder: Path) -> dict[str, Path]:
    """One valid file of every format that writes, called by its name, and of the kinds and namings that are read only."""
    tokens = {"<rhea1>": torch.randn(10, 32), "<rhea2>": torch.randn(10, 32)}
    found = {}
    for form in FORMATS:
        if form.id not in ENDINGS:
            continue
        adapter = mixed().with_(triggers=("rhea woman",), metadata={"ss_output_name": "rhea", "note": "x" * 40})
        if form.holds_tokens:
            names = [name for name, layer in adapter.layers.items() if "attn" in name and len(layer.shape) == 2]
            adapter = Adapter({name: adapter.layers[name] for name in names}, tokens=tokens)
        path = folder / f"{form.id}{ENDINGS[form.id]}"
        save_adapter(adapter, path, format=form.id)
        found[form.id] = path
    for name, tensors in exotic().items():
        path = folder / f"{name}{EXOTIC}"
        path.write_bytes(safetensors_bytes(tensors, {"ss_network_module": "lycoris.kohya"}))
        found[name] = path
    found[BESIDE] = save_adapter(mixed().with_(tokens=tokens), folder / "beside.safetensors")
    return found


def flipped(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    reach = len(out) if rng.random() < 0.5 else min(len(out), 4096)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        out[rng.randrange(reach)] = rng.choice((0, 255, 34, 123, rng.randrange(256)))
    return bytes(out)


def cut(data: bytes, rng: random.Random) -> bytes:
    stop = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 4096))
    return data[:stop] + (rng.randbytes(rng.randrange(64)) if rng.random() < 0.3 else b"")


def moved(data: bytes, rng: random.Random) -> bytes:
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    piece = data[a : min(b, a + 512)]
    to = rng.randrange(len(data))
    return data[:to] + piece + data[to + (len(piece) if rng.random() < 0.5 else 0) :]


def sized(data: bytes, rng: random.Random) -> bytes:
    """Another header length in front: of a safetensors file."""
    return struct.pack("<Q", rng.choice((0, 1, 7, 2**20, 2**40, 2**63, max(0, len(data) - 8), rng.randrange(len(data))))) + data[8:]


def edited_json(text: str, rng: random.Random) -> str:
    """A value, a key or an entry of some JSON object replaced, dropped or doubled."""
    root = json.loads(text)
    for _ in range(rng.choice((1, 1, 2, 5))):
        places = list(_places(root))
        if not places:
            break
        holder, key = rng.choice(places)
        act = rng.randrange(5)
        if act == 0:
            holder[key] = copy.deepcopy(rng.choice(NUMBERS))
        elif act == 1 and isinstance(holder, dict):
            del holder[key]
        elif act == 2 and isinstance(holder, dict):
            holder[_renamed(key, rng)] = holder.pop(key)
        elif act == 3 and isinstance(holder, dict):
            holder[_renamed(key, rng)] = copy.deepcopy(holder[key])
        elif isinstance(holder[key], int) and not isinstance(holder[key], bool):
            holder[key] += rng.choice((-1, 1, 4, 2**16))
        else:
            holder[key] = copy.deepcopy(rng.choice(NUMBERS))
    return json.dumps(root)


def _places(node: object) -> Iterator[tuple[dict | list, str | int]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield node, key  # type: ignore[misc]
        yield from _places(value)


def _renamed(key: object, rng: random.Random) -> str:
    parts = str(key).split(".")
    parts[rng.randrange(len(parts))] = rng.choice(WORDS)
    return (".".join(parts) if rng.random() < 0.7 else str(key) + rng.choice(WORDS)) or "x"


def edited_header(data: bytes, rng: random.Random) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    header = edited_json(data[8 : 8 + size].decode(), rng).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def commanded(data: bytes, rng: random.Random) -> bytes:
    """A torch file whose pickle runs a command somewhere on its way, if it is only unpickled."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                at = rng.choice([place for opcode, _, place in pickletools.genops(content) if place and opcode.name != "PROTO"])
                module, name = rng.choice((b"posix system", b"os system", b"builtins exec", b"torch.hub load", b"subprocess call")).split()
                command = b"__import__('pathlib').Path('%s').touch()" if name == b"exec" else b"touch %s"
                content = content[:at] + b"c%s\n%s\n(S%r\ntR0" % (module, name, (command % RAN.encode()).decode()) + content[at:]
            new.writestr(entry.filename, content)
    return out.getvalue()


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (flipped, cut, moved)
SAFETENSORS = (*BYTES, sized, edited_header, edited_header, edited_header)
HOW = {".safetensors": SAFETENSORS, ".pth": (*BYTES, commanded)}


def mutate(path: Path, target: Path, rng: random.Random) -> None:
    """A broken copy of `path` at `target`."""
    if path.is_dir():
        shutil.copytree(path, target)
        victim = rng.choice(sorted(file for file in target.rglob("*") if file.is_file()))
        if victim.suffix == ".json" and rng.random() < 0.7:
            victim.write_text(edited_json(victim.read_text(), rng))
        elif rng.random() < 0.05:
            victim.unlink()
        else:
            victim.write_bytes(rng.choice(HOW.get(victim.suffix, BYTES))(victim.read_bytes(), rng))
    elif (beside := sidecar.path_for(path)).exists():
        shutil.copy(path, target)
        sidecar.path_for(target).write_bytes(rng.choice(SAFETENSORS)(beside.read_bytes(), rng))
    else:
        target.write_bytes(rng.choice(HOW.get(path.suffix, BYTES))(path.read_bytes(), rng))


def _too_long(*_: object) -> None:
    raise TimeoutError(f"reading took more than {SECONDS} s")


def outcome(path: Path) -> str:
    """`read` or `refused`. Raises whatever a reader lets through, TimeoutError, or AssertionError for numbers that are not finite."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                adapter = load_adapter(path, base=BASE)
            except LoraclrError:
                return "refused"
            describe(path, base=BASE)
            for layer in adapter:
                assert bool(torch.isfinite(layer.delta(torch.float64)).all()), f"{layer.name} is not finite"
            return "read"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def run(count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """How often each outcome came, and for every failure the command that makes it again with its traceback."""
    found: Counter[str] = Counter()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        originals = seeds(folder)
        for path in originals.values():
            assert outcome(path) == "read", f"the undamaged {path.name} is not read"
        kinds = sorted(originals)
        for number in range(count):
            rng = random.Random(f"{seed}/{number}")
            kind = kinds[number % len(kinds)]
            target = folder / f"broken{ENDINGS.get(kind, EXOTIC)}"
            mutate(originals[kind], target, rng)
            try:
                found[f"{kind}: {outcome(target)}"] += 1
            except BaseException:
                failures.append(f"{kind}, file {number} of seed {seed}:\n{traceback.format_exc()}")
            for made in (target, sidecar.path_for(target)):
                shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)
            if Path(RAN).exists():
                Path(RAN).unlink()
                failures.append(f"{kind}, file {number} of seed {seed}: a command in it was run")
    return found, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    found, failures = run(arguments.count, arguments.seed)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    for failure in failures[:10]:
        print(failure)
    for kind, times in sorted(found.items()):
        print(f"{kind:>24} {times:6}")
    print(f"{arguments.count} files in {time.monotonic() - began:.0f} s, {grown:.0f} MB more memory, {len(failures)} failures")
    raise SystemExit(bool(failures) or grown > MEGABYTES)


if __name__ == "__main__":
    main()
