"""Single-file checkpoints: one .safetensors with a whole Stable Diffusion 1, 2 or XL, or with Flux.1, in the names of its original code.

diffusers does the renaming of Stable Diffusion. It wants to fetch configurations and a tokenizer, and does so even where it is told to
stay offline; here it is handed both, so nothing is ever downloaded.
"""

from __future__ import annotations

import inspect
import json
import lzma
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from loraclr.checkpoints import flux
from loraclr.checkpoints.configs import ARCHITECTURES, PADDING, PIPELINES
from loraclr.errors import PipelineError
from loraclr.formats.names import READ

_UNET = "model.diffusion_model."
_PARTS = {_UNET: "no UNet", "first_stage_model.": "no autoencoder"}
_WIDTHS = " or ".join((", ".join(map(str, sorted(READ)[:-1])), str(max(READ))))
_TEXT = ("cond_stage_model.", "conditioner.embedders.")
_QUANTISED = (".scale_weight", ".weight_scale", "scaled_fp8", ".absmax", ".quant_map", ".comfy_quant")  # beside numbers that need them


class Header(NamedTuple):
    """What a file says without its weights being read."""

    stated: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]


def load_checkpoint(file: Path, *, dtype: torch.dtype, config: Path | None = None) -> Any:
    """A diffusers pipeline of the file's weights. `config` is a diffusers folder of its architecture.

    Without it Stable Diffusion 1.x, 2.x or XL is told by its shapes, and v-prediction by what the file states; Stable Diffusion 2 has it
    unless the file says otherwise. With it no weights of the folder are read, but for Flux.1, of which it gives what the file lacks.
    Raises PipelineError for a file that is no such checkpoint, and says what is missing.
    """
    header = _header(file)
    if flux.known(header.shapes):
        return flux.load(file, header.shapes, dtype=dtype, config=config)
    family, changes = _recognised(file, header, known=config is None)
    with TemporaryDirectory() as folder:
        home, objects = config, {}
        if home is None:
            home, objects = Path(folder), dict(zip(("tokenizer", "tokenizer_2"), map(tokenizer, PADDING[family]), strict=False))
            write_config(family, home, scheduler=changes)
        return _converted(file, home, objects, dtype=dtype)


def _converted(file: Path, config: Path, objects: dict[str, Any], *, dtype: torch.dtype) -> Any:
    import diffusers

    try:
        name = json.loads((config / "model_index.json").read_text())["_class_name"]
        kind = getattr(diffusers, name)
        pipe = kind.from_single_file(str(file), config=str(config), local_files_only=True, dtype=dtype, safety_checker=None, **objects)
    except Exception as error:  # the libraries raise a dozen unrelated kinds
        raise PipelineError(f"{file} does not load as a checkpoint ({type(error).__name__}: {error}); {_REMEDY}") from error
    empty = [
        f"{component}.{key}"
        for component, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
        for key, tensor in part.named_parameters()
        if tensor.is_meta
    ]
    if empty:  # diffusers says nothing of them
        raise PipelineError(f"{file} lacks {len(empty)} weights, such as {empty[0]}; {_REMEDY}")
    return pipe


_REMEDY = (
    "use a whole checkpoint of Stable Diffusion 1, 2 or XL, or one of Flux.1, or for another architecture give a diffusers folder of it as "
    "its config (--base-config)"
)


def _header(file: Path) -> Header:
    if file.suffix != ".safetensors":
        raise PipelineError(f"{file} is one file but no .safetensors, and others may run code when read; save it as .safetensors first")
    try:
        with safe_open(file, framework="pt") as content:
            shapes = {key: tuple(content.get_slice(key).get_shape()) for key in content.keys()}  # noqa: SIM118
            found = Header(content.metadata() or {}, shapes)
    except (SafetensorError, OSError) as error:
        raise PipelineError(f"{file} is no readable .safetensors ({error}); download it again") from error
    if mark := next((key for key in found.shapes if key.endswith(_QUANTISED)), None):
        raise PipelineError(f"{file} is quantised ({mark}), and weights cannot be read out of it; use the fp16, bf16 or plain fp8 file")
    return found


def _recognised(file: Path, header: Header, *, known: bool) -> tuple[str, dict[str, Any]]:
    """Its family, empty where that need not be `known`, and what differs in its scheduler."""
    stated, shapes = header
    missing = [words for prefix, words in _PARTS.items() if not any(key.startswith(prefix) for key in shapes)]
    missing += [] if any(key.startswith(_TEXT) for key in shapes) else ["no text encoder"]
    if missing:
        raise PipelineError(f"{file} holds {', '.join(missing)}, as one file of a base model would; {_REMEDY}")
    if shapes.get(f"{_UNET}input_blocks.0.0.weight", (0, 4))[1] != 4:
        raise PipelineError(f"{file} is a checkpoint for inpainting or editing; use a text-to-image model")
    width = next((shape[-1] for key, shape in sorted(shapes.items()) if key.endswith("attn2.to_k.weight")), 0)
    if known and width not in READ:
        raise PipelineError(f"{file} has cross-attention that reads {width} numbers, not {_WIDTHS}; {_REMEDY}")
    changes: dict[str, Any] = {}
    architecture, prediction = stated.get("modelspec.architecture", ""), stated.get("modelspec.prediction_type", "")
    if "v_pred" in shapes or prediction.startswith("v"):
        changes["prediction_type"] = "v_prediction"
    elif prediction == "epsilon" or architecture.startswith("stable-diffusion-v2-512"):
        changes["prediction_type"] = "epsilon"
    if "ztsnr" in shapes:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return READ.get(width, ""), changes


def write_config(family: str, folder: Path, *, scheduler: dict[str, Any]) -> None:
    """The configuration half of a diffusers folder: all but weights and tokenizers.

    Whole, with the defaults of diffusers' classes, as its converters look up what is in the file and nothing else.
    """
    import diffusers

    index: dict[str, Any] = {"_class_name": PIPELINES[family]}
    for name, (library, kind, values) in ARCHITECTURES[family].items():
        index[name] = [library, kind]
        (folder / name).mkdir()
        own = {**values, **scheduler} if name == "scheduler" else dict(values)
        if library == "diffusers":
            stated = inspect.signature(getattr(diffusers, kind).__init__).parameters.values()
            own = {one.name: one.default for one in stated if one.default is not one.empty} | own
        target = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
        target.write_text(json.dumps({"_class_name": kind, **own}))
    for number, _ in enumerate(PADDING[family]):
        index["tokenizer" if number == 0 else "tokenizer_2"] = ["transformers", "CLIPTokenizer"]
    if family != "sdxl":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index))


def tokenizer(padding: str) -> Any:
    """CLIP's, which all these models share but for the token they pad with."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    merges = lzma.decompress((Path(__file__).parent / "merges.txt.xz").read_bytes()).decode().split("\n")
    letters = list(bytes_to_unicode().values())
    pieces = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    pairs = [(first, second) for first, second in (merge.split(" ") for merge in merges)]
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=77, pad_token=padding)
