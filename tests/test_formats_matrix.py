"""The table of docs/formats.md, family by format by direction, is what these files really do: `python tests/test_formats_matrix.py`.

Every cell is worked out on a synthetic file with one layer for every linear and convolutional module of the family's real model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from formats_families import BUILD, original_flux, original_unet, shapes

from loraclr.adapter import Adapter, LoraLayer
from loraclr.errors import FormatError
from loraclr.formats import FORMATS, comfy, diffusers, edlora, full, kohya, names, peft, single_file
from loraclr.formats.base import AdapterFormat, Content

FAMILIES = {"sd1": "SD1.x", "sd2": "SD2.x", "sdxl": "SDXL", "flux": "Flux.1"}
BEGIN, END = "<!-- begin: made by tests/test_formats_matrix.py -->", "<!-- end -->"

Stem = Callable[[str, str, str], str | None]
"""The key of a layer in a file, without its ending: family, component, path -> stem; None where the naming has none for it."""


def kohya_stem(family: str, component: str, path: str) -> str | None:
    two = family in ("sdxl", "flux")
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if two else "lora_te_"}.get(component)
    if component == "text_encoder_2":
        prefix = "lora_te3_" if family == "flux" else "lora_te2_"
    return prefix and prefix + names.with_text_model(component, path).replace(".", "_")


def original_stem(family: str, component: str, path: str) -> str | None:
    if component == "unet":
        return f"lora_unet_{ {new: old for old, new in original_unet(family).items()}[path].replace('.', '_') }"
    return kohya_stem(family, component, path)


def onetrainer_stem(family: str, component: str, path: str) -> str | None:
    return f"lora_transformer_{path.replace('.', '_')}" if component == "transformer" else kohya_stem(family, component, path)


def diffusers_stem(family: str, component: str, path: str) -> str | None:
    return f"{component}.{names.with_text_model(component, path)}"


def peft_stem(family: str, component: str, path: str) -> str | None:
    return f"{component}/base_model.model.{path}"


def edlora_stem(family: str, component: str, path: str) -> str | None:
    return f"params/{component}/{names.with_text_model(component, path)}" if component in ("unet", "text_encoder") else None


def comfy_stem(family: str, component: str, path: str) -> str | None:
    if component == "unet":
        return f"diffusion_model.{ {new: old for old, new in original_unet(family).items()}[path] }"
    first, second = ("clip_h" if family == "sd2" else "clip_l"), ("t5xxl" if family == "flux" else "clip_g")
    encoder = {"text_encoder": first, "text_encoder_2": second}.get(component)
    return encoder and f"text_encoders.{encoder}.transformer.{names.with_text_model(component, path)}"


XLABS = {"img_attn.qkv": "qkv_lora1", "txt_attn.qkv": "qkv_lora2", "img_attn.proj": "proj_lora1", "txt_attn.proj": "proj_lora2"}


def fused(naming: str) -> dict[str, int]:
    """Stem -> output rows of Flux.1's own matrices in a naming of them."""
    if naming == "xlabs":
        found = {f"double_blocks.{n}.{old}": (f"double_blocks.{n}.processor.{new}") for n in range(19) for old, new in XLABS.items()}
        found |= {f"single_blocks.{n}.linear2": f"single_blocks.{n}.processor.proj_lora" for n in range(38)}
        rows = {new: original_flux()[old][0] for old, new in found.items()}
        return rows | {f"single_blocks.{n}.processor.qkv_lora": 3 * 3072 for n in range(38)}
    shape = {"kohya": lambda old: f"lora_unet_{old.replace('.', '_')}", "comfy": lambda old: f"diffusion_model.{old}"}[naming]
    return {shape(old): rows for old, (rows, _) in original_flux().items()}


# Row of the table: what its files are called, its format, its families, its stems, and which of Flux.1's own names it has.
ROWS: tuple[tuple[str, AdapterFormat, tuple[str, ...], Stem, str | None], ...] = (
    ("`kohya`, block names of diffusers", kohya, ("sd1", "sd2", "sdxl"), kohya_stem, None),
    ("`kohya`, original block names", kohya, ("sd1", "sd2", "sdxl"), original_stem, None),
    ("`kohya`", kohya, ("flux",), kohya_stem, "kohya"),
    ("`kohya`, names of OneTrainer", kohya, ("flux",), onetrainer_stem, None),
    ("`kohya` of full differences (`diff`)", full, ("sd1", "sd2", "sdxl"), kohya_stem, None),
    ("`kohya` of full differences (`diff`)", full, ("flux",), kohya_stem, "kohya"),
    ("`diffusers` (AI-toolkit too)", diffusers, tuple(FAMILIES), diffusers_stem, None),
    ("`peft`", peft, tuple(FAMILIES), peft_stem, None),
    ("`edlora`", edlora, tuple(FAMILIES), edlora_stem, None),
    ("`comfy`", comfy, tuple(FAMILIES), comfy_stem, "comfy"),
    ("`comfy`, names of XLabs", comfy, ("flux",), lambda *_: None, "xlabs"),
)
ENDINGS = {
    "diff": ("diff",),
    "kohya": ("lora_down.weight", "lora_up.weight"),
    "edlora": ("lora_down.weight", "lora_up.weight"),
    "diffusers": ("lora_A.weight", "lora_B.weight"),
    "peft": ("lora_A.weight", "lora_B.weight"),
    "comfy": ("lora_down.weight", "lora_up.weight"),
}
ONLY_READ = {
    "original_stem": "no: the block names of diffusers are read by every tool",
    "onetrainer_stem": "no: kohya's own names are written",
}


def pair(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(1, 2), torch.arange(1.0, rows + 1)[:, None]


def read_cell(family: str, form: AdapterFormat, stem: Stem, naming: str | None) -> str:
    """A file with every layer that the naming has, read."""
    wanted = shapes(family)
    rows = {}
    for name, shape in wanted.items():
        key = None if naming == "xlabs" else stem(family, *names.split(name))
        if key is not None:
            rows[key] = shape[0]
    if family == "flux" and naming:
        rows |= fused(naming)
    endings = (".down.weight", ".up.weight") if naming == "xlabs" else tuple(f".{end}" for end in ENDINGS[form.id])
    stored = (lambda out: (torch.ones(out, 2),)) if form is full else pair
    tensors = {key + end: tensor for key, out in rows.items() for end, tensor in zip(endings, stored(out), strict=True)}
    config = '{"peft_type": "LORA", "r": 1, "lora_alpha": 1}'
    content = Content(tensors, {f"{part}/adapter_config.json": config for part in names.COMPONENTS} if form is peft else {})
    assert [one.id for one in FORMATS if one.detect(content.tensors, content.metadata)] == ["kohya" if form is full else form.id]
    found = form.read(content)
    assert found.layers.keys() <= wanted.keys()
    assert all(found.layers[name].shape[0] == wanted[name][0] for name in found.layers)
    missing = sorted({names.split(name)[0] for name in wanted.keys() - found.layers.keys()})
    if not missing:
        return f"all {len(found)} layers"
    if naming == "xlabs":
        return f"its {len(found)} layers: the attentions"
    return f"{len(found)} layers; it has no names for `{'` and `'.join(missing)}`"


def written_cell(family: str, form: AdapterFormat, stem: Stem) -> str:
    """An adapter with every layer, written and read back; without the components that are refused."""
    if stem.__name__ in ONLY_READ:
        return ONLY_READ[stem.__name__]
    layers = {name: LoraLayer(name, *pair(shape[0])) for name, shape in shapes(family).items()}
    refused = []
    while layers:
        adapter = Adapter(layers, family=family)
        try:
            back = form.read(form.write(adapter, torch.float32))
        except FormatError as error:
            if form is comfy:
                return "no: " + str(error).split(": ", 1)[1].split(";")[0]
            component = names.split(str(error).partition(":")[0].partition(" ")[0])[0]
            refused.append(f"`{component}`")
            layers = {name: layer for name, layer in layers.items() if not name.startswith(f"{component}.")}
            continue
        assert back == adapter
        return f"all {len(back)} layers" if not refused else f"{len(back)} layers; refuses {' and '.join(refused)}"
    return "no"


def checkpoint_cell(family: str) -> str:
    """Every tensor of the real model but its autoencoder's, in the original layout."""
    with torch.device("meta"):
        parts = {name: dict(build().state_dict()) for name, build in BUILD[family].items()}
    found = single_file.checkpoint({**parts, "vae": {}}, family=family)
    if family == "flux":
        return f"its transformer: {len(found)} tensors"
    return f"all of it: {len(found)} tensors without the autoencoder"


def table() -> str:
    lines = ["| family | file | read | written |", "|---|---|---|---|"]
    for family, called in FAMILIES.items():
        for label, form, families, stem, naming in ROWS:
            if family in families:
                cells = (
                    called,
                    label,
                    read_cell(family, form, stem, naming),
                    "no" if naming == "xlabs" else written_cell(family, form, stem),
                )
                lines.append(f"| {' | '.join(cells)} |")
        base = "as a base; what it lacks from a folder" if family == "flux" else "as a base"
        lines.append(f"| {called} | `checkpoint`, of the base with the adapter | {base} | {checkpoint_cell(family)} |")
    return "\n".join(lines)


def test_the_table_of_the_documentation_is_true():
    text = (Path(__file__).parents[1] / "docs" / "formats.md").read_text()
    stated = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert stated == table(), "docs/formats.md is out of date; paste what `python tests/test_formats_matrix.py` prints"


def test_every_format_is_in_the_table():
    """But learned tokens alone, which are no layers, and inside of a kohya file."""
    assert {form.id for _, form, *_ in ROWS} | {"embedding", "bundle"} == {form.id for form in FORMATS}


if __name__ == "__main__":
    print(table())
