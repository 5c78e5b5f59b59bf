"""Damaged files by the thousand: `python tests/fuzzing.py 10000 [--seed 0] [--kind pack]` (`make fuzz`).

Readers are fed valid files with something broken in them: bytes flipped, cut, doubled or swapped, headers and configurations edited,
commands put into pickles. That is adapters in every format and embeddings, also by the tokens or the notes beside them, single-file
checkpoints, packs, the settings inside pictures, and studies. Each must end in what was read, its numbers finite, or in one LoraclrError;
within seconds, without memory that only a header claims, and no command may run.
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from conftest import _build_tiny_pipe
from formats_samples import BASE, dense, exotic, lora, mixed
from original_names import checkpoint
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from loraclr.adapter import Adapter, Layer
from loraclr.cli import again
from loraclr.collect import Collection
from loraclr.conditioning import Region
from loraclr.errors import LoraclrError
from loraclr.formats import describe, load_adapter, save_adapter
from loraclr.formats.files import safetensors_bytes
from loraclr.generate import Generated
from loraclr.loading import load_pipe, silenced
from loraclr.pack import Pack, file
from loraclr.statistics import Moments
from loraclr.web.study import Question, Study

SECONDS, MEGABYTES = 5, 600  # of a processor's time for one file; for a whole run
ENDINGS = {
    "kohya": ".safetensors", "diffusers": ".safetensors", "diff": ".safetensors", "bundle": ".safetensors", "embedding": ".safetensors",
    "edlora": ".pth", "peft": "",
}  # fmt: skip
SELDOM = {"checkpoint": 10}  # which take long: one turn in so many
RAN = "ran"  # the file that a pickled command would make
WORDS = ("alpha", "lora_down", "lora_up", "lora_A", "lora_B", "weight", "unet", "text", "dora_scale", "hada_w1_a", "0", "__metadata__")
NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64 - 1, 1e308, -0.5, True, None, "8", [], {}, [4, 4], [2**40, 2**40], "F8_E4M3", "I64", "BF16")


@dataclass(frozen=True)
class Seed:
    """A valid file, or a folder of which one of the files that match `victims` is to be broken; and its reader."""

    path: Path
    read: Callable[[Path], None]
    victims: str = "*"


def read_adapter(path: Path, name: str = "") -> None:
    """The file at `path`, or the one of that name in it."""
    adapter = load_adapter(path / name, base=BASE)
    describe(path / name, base=BASE)
    finite(adapter)


def finite(layers: Iterable[Layer]) -> None:
    for layer in layers:
        assert bool(torch.isfinite(layer.delta(torch.float64)).all()), f"{layer.name} is not finite"


def read_checkpoint(path: Path, config: Path) -> None:
    load_pipe(path, dtype=torch.float32, config=config)


def read_pack(path: Path) -> None:
    pack = Pack.open(path)
    for name in pack.concepts:
        assert all(isinstance(word, str) for word in (name, pack.base, *pack.held(name).adapted))
        finite(pack.concept(name).adapter)
    pack.build()


def read_picture(path: Path) -> None:
    told = again.told_by(path, set())
    assert all(isinstance(word, str) for word in (told["base"], told["negative"], told["base_dtype"], *told["prompt"]))
    assert all(isinstance(number, int) for number in (told["steps"], *told["seed"], *told["size"])) and len(told["size"]) == 2
    assert isinstance(told["guidance"], float)


def read_study(path: Path) -> None:
    study = Study(path)
    assert sorted(one.id for one in study.order("a" * 32)) == sorted(one.id for one in study.questions)
    assert set(study.methods) == {one.method for one in study.questions}
    assert study.answers() == []


def seeds(folder: Path) -> dict[str, Seed]:
    """One valid file of everything that is read, called by its kind."""
    tokens = {"<rhea1>": torch.randn(10, 32), "<rhea2>": torch.randn(10, 32)}
    flat = {"<rhea>": torch.randn(1, 768)}
    found: dict[str, Seed] = {}
    for form, ending in ENDINGS.items():
        adapter = mixed().with_(triggers=("rhea woman",), metadata={"ss_output_name": "rhea", "note": "x" * 40})
        if form == "edlora":
            names = [name for name, layer in adapter.layers.items() if "attn" in name and len(layer.shape) == 2]
            adapter = Adapter({name: adapter.layers[name] for name in names}, tokens=tokens)
        elif form in ("bundle", "embedding"):
            adapter = adapter.with_(tokens=flat, layers=adapter.layers if form == "bundle" else {})
        found[form] = Seed(save_adapter(adapter, folder / f"{form}{ending}", format=form), read_adapter)
    for name, tensors in exotic().items():
        path = folder / f"{name}.safetensors"
        path.write_bytes(safetensors_bytes(tensors, {"ss_network_module": "lycoris.kohya"}))
        found[name] = Seed(path, read_adapter)
    old = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.randn(2, 768)}, "name": "rhea", "step": 7}
    for ending, content in ((".pt", old), (".bin", flat)):
        torch.save(content, folder / f"embedding{ending}")
        found[f"embedding{ending}"] = Seed(folder / f"embedding{ending}", read_adapter)
    for kind, victims in (("tokens beside", "*.tokens.safetensors"), ("notes beside", "*.[cj]*")):
        (folder / kind).mkdir()
        save_adapter(mixed().with_(tokens=tokens), folder / kind / "a.safetensors")
        found[kind] = Seed(folder / kind, partial(read_adapter, name="a.safetensors"), victims)
    page = {"trainedWords": ["rhea woman, smiling", "<lora:a:1>"], "model": {"allowNoCredit": False, "allowCommercialUse": ["None"]}}
    (folder / "notes beside" / "a.json").write_text(json.dumps({"activation text": "rhea woman"}))
    (folder / "notes beside" / "a.civitai.info").write_text(json.dumps(page))
    (folder / "notes beside" / "a.metadata.json").write_text(json.dumps({"civitai": page}))

    with silenced():
        pipe = _build_tiny_pipe()
        pipe.save_pretrained(folder / "config")
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    state = {key: tensor.contiguous() for key, tensor in checkpoint(parts).items()}
    (folder / "checkpoint.safetensors").write_bytes(safetensors_bytes(state, {"modelspec.prediction_type": "epsilon"}))
    found["checkpoint"] = Seed(folder / "checkpoint.safetensors", partial(read_checkpoint, config=folder / "config"))

    found["pack"] = Seed(folder / "pack", read_pack)
    (folder / "pack").mkdir()
    for name in ("ada", "ben", None):
        _pack_file(folder / "pack" / f"{name}.safetensors", name)

    part = {"name": "rhea", "scale": 0.5, "noun": "woman"}
    settings = {
        "base": "base", "adapters": [part], "steps": 3, "guidance": 4.0, "negative": "bad", "size": [16, 16], "tokens": [],
        "regions": [asdict(Region("a rhea woman", (0.0, 0.0, 1.0, 0.5), "bad"))], "controls": [], "scheduler": "DDIMScheduler",
        "strategy": {"name": "omg", "start": 0.3, "threshold": 0.3}, "dtype": "float32", "versions": {"loraclr": "0.1.0", "torch": "2"},
        "files": {"base_config": str(folder), "loras": [{"file": str(folder / "kohya.safetensors"), "scale": 0.5, "sha256": None}],
            "controls": []},
    }  # fmt: skip
    drawn = Generated(Image.new("RGB", (16, 16)), "a rhea woman", 7, {"prompt": "a rhea woman", "seed": 7, **settings})
    found["settings"] = Seed(drawn.save(folder / "drawn.png"), read_picture)

    asked = [asdict(Question(f"{k:016x}", "ab"[k % 2], "ada", f"{k}.png", ("r.png",), f"ada/{k // 2}")) for k in range(4)]
    (folder / "study").mkdir()
    (folder / "study" / "study.json").write_text(json.dumps({"title": "who", "note": "", "questions": asked}))
    found["study"] = Seed(folder / "study", read_study)
    return found


def _pack_file(path: Path, name: str | None) -> None:
    """Of a concept with a layer of every kind, or of prompts without any."""
    layers = [lora("unet.a.attn2.to_k"), lora("text_encoder.b", scale=0.5), dense("unet.c")]
    said, entries = file.adapter_entries(Adapter.of(layers).with_(tokens={f"<{name}>": torch.randn(1, 5)}, triggers=("x man",)))
    kinds = ("preserve",) if name is None else ("fit", "held_out")
    rows = {layer.name: Moments.of(torch.randn(3 if "text" in layer.name else 9, 5)) for layer in layers}
    table, moments = file.moments_entries(dict.fromkeys(kinds, rows))
    about = {
        "base": {"source": "base", "sha256": "0" * 64}, "collection": asdict(Collection(sample=0)), "versions": {"diffusers": "0"},
        "fingerprint": None, "call": None, "input": None, "adapter": None, "texts": 1, "concept": name, "moments": table,
        "layers": {"unet.a.attn2.to_k": "keys", "text_encoder.b": "text", "unet.c": "spatial"},
    }  # fmt: skip
    if name is not None:
        about |= {"call": f"{name} man", "input": {"file": f"{name}.pth", "sha256": "1"}, "adapter": said}
        about["fingerprint"] = file.fingerprint([said, about["call"]], entries)
        moments |= entries
    file.write(path, about, moments)


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
    """Of a safetensors file; of a pack's the JSON text that is in it."""
    size = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + size].decode()
    said = json.loads(header)
    if file.MARK in said.get("__metadata__", {}) and rng.random() < 0.7:
        said["__metadata__"][file.MARK] = edited_json(said["__metadata__"][file.MARK], rng)
        header = json.dumps(said)
    else:
        header = edited_json(header, rng)
    return struct.pack("<Q", len(header)) + header.encode() + data[8 + size :]


def edited_text(data: bytes, rng: random.Random) -> bytes:
    return edited_json(data.decode(), rng).encode()


def edited_settings(data: bytes, rng: random.Random) -> bytes:
    """Of a picture."""
    out, text = io.BytesIO(), PngInfo()
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        text.add_text("loraclr", edited_json(image.text["loraclr"], rng))
        image.save(out, format="PNG", pnginfo=text)
    return out.getvalue()


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
HOW = {
    ".safetensors": (*BYTES, sized, *(edited_header,) * 3),
    **dict.fromkeys((".pth", ".pt", ".bin"), (*BYTES, commanded)),
    **dict.fromkeys((".json", ".info"), (*BYTES, *(edited_text,) * 6)),
    ".png": (*BYTES, *(edited_settings,) * 6),
}


def mutate(seed: Seed, target: Path, rng: random.Random) -> None:
    """A broken copy of `seed` at `target`."""
    victim = target
    if seed.path.is_dir():
        shutil.copytree(seed.path, target)
        victim = rng.choice(sorted(found for found in target.rglob(seed.victims) if found.is_file()))
        if rng.random() < 0.02:
            victim.unlink()
            return
    else:
        shutil.copy(seed.path, target)
    victim.write_bytes(rng.choice(HOW[victim.suffix])(victim.read_bytes(), rng))


def _too_long(*_: object) -> None:
    raise TimeoutError(f"reading took more than {SECONDS} s")


def outcome(seed: Seed, path: Path) -> str:
    """`read` or `refused`. Raises whatever a reader lets through, TimeoutError, or AssertionError for what cannot be."""
    signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seed.read(path)
        return "read"
    except LoraclrError:
        return "refused"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def run(count: int, seed: int, only: str | None = None) -> tuple[Counter[str], list[str]]:
    """How often each outcome came, and for every failure the command that makes it again with its traceback."""
    found: Counter[str] = Counter()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        originals = seeds(folder)
        for original in originals.values():
            original.read(original.path)
        turns = [kind for turn in range(max(SELDOM.values())) for kind in sorted(originals) if turn % SELDOM.get(kind, 1) == 0]
        kinds = [kind for kind in turns if only in (None, kind)]
        for number in range(count):
            rng = random.Random(f"{seed}/{number}")
            kind = kinds[number % len(kinds)]
            original = originals[kind]
            target = folder / f"broken{original.path.suffix}"
            mutate(original, target, rng)
            try:
                found[f"{kind}: {outcome(original, target)}"] += 1
            except BaseException:
                failures.append(f"{kind}, file {number} of seed {seed}:\n{traceback.format_exc()}")
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
            if Path(RAN).exists():
                Path(RAN).unlink()
                failures.append(f"{kind}, file {number} of seed {seed}: a command in it was run")
    return found, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", help="only files of this one", default=None)
    arguments = parser.parse_args()
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    found, failures = run(arguments.count, arguments.seed, arguments.kind)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    for failure in failures[:10]:
        print(failure)
    for kind, times in sorted(found.items()):
        print(f"{kind:>24} {times:6}")
    print(f"{arguments.count} files in {time.monotonic() - began:.0f} s, {grown:.0f} MB more memory, {len(failures)} failures")
    raise SystemExit(bool(failures) or grown > MEGABYTES)


if __name__ == "__main__":
    main()
