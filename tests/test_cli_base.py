"""The base of a command: any family, from a folder or from one file, in the precision and on the device that were asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from families_twins import twin
from original_names import checkpoint
from PIL import Image
from safetensors.torch import save_file
from test_families import adapter

from loraclr.cli import main
from loraclr.formats import load_adapter, save_adapter, single_file
from loraclr.pipeline import Pipeline


@pytest.fixture
def xl(tmp_path) -> Path:
    """base/, base.safetensors and two adapters of an SDXL."""
    pipe = twin("sdxl")
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    save_file({key: tensor.contiguous().clone() for key, tensor in checkpoint(parts).items()}, tmp_path / "base.safetensors")
    pipe.save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("ada", "ben")):
        save_adapter(adapter(Pipeline(pipe), name, seed), tmp_path / f"{name}.safetensors")
    return tmp_path


def call(capsys, *words: object) -> tuple[int, str, str]:
    capsys.readouterr()  # what making the files said
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_an_xl_from_one_file_in_half_precision_merged_and_drawn(capsys, xl):
    base = ["--base", xl / "base.safetensors", "--base-config", xl / "base", "--base-dtype", "bf16", "--device", "cpu", "--json"]
    code, out, err = call(capsys, "merge", xl / "ada.safetensors", xl / "ben.safetensors", "--output", xl / "both.safetensors", *base)
    assert (code, err) == (0, "") and json.loads(out)["base"] == str(xl / "base.safetensors")
    assert set(load_adapter(xl / "both.safetensors").layers) == set(load_adapter(xl / "ada.safetensors").layers)
    words = ["--lora", xl / "both.safetensors", "--prompt", "ada", "--output", xl / "drawn", "--steps", 1]
    code, out, err = call(capsys, "generate", *words, *base)
    (made,) = json.loads(out)
    assert (code, err) == (0, "") and made["dtype"] == "bfloat16" and made["size"] == [16, 16] and Path(made["file"]).exists()


def test_a_picture_knows_its_bases_precision_and_configuration(capsys, xl):
    base = ["--base", xl / "base.safetensors", "--base-config", xl / "base", "--base-dtype", "bf16", "--device", "cpu"]
    assert call(capsys, "generate", "--prompt", "ada", "--output", xl / "drawn", "--steps", 1, *base)[0] == 0
    (drawn,) = (xl / "drawn").iterdir()
    again = ["generate", "--from", drawn, "--device", "cpu", "--output"]
    assert call(capsys, *again, xl / "again")[0] == 0
    with Image.open(drawn) as one, Image.open(xl / "again" / drawn.name) as other:
        assert one.tobytes() == other.tobytes() and one.text == other.text
    assert call(capsys, *again, xl / "folder", "--base", xl / "base")[0] == 0  # a folder has a configuration of its own
    (xl / "base").rename(xl / "moved")
    assert "give --base-config" in call(capsys, *again, xl / "other")[2]


def test_a_file_with_a_configuration_is_a_base_of_the_other_commands_too(capsys, xl):
    ada, one, base = xl / "ada.safetensors", xl / "one.safetensors", ["--base", xl / "base.safetensors", "--base-config", xl / "base"]
    assert call(capsys, "merge", ada, "--method", "sum", "--output", one)[0] == 0
    assert call(capsys, "inspect", ada, xl / "ben.safetensors", *base)[0] == 0
    assert call(capsys, "convert", ada, "--to", "diffusers", *base)[0] == 0
    code, out, _ = call(capsys, "verify", one, ada, *base, "--base-dtype", "bf16", "--device", "cpu", "--json")
    assert code == 0 and json.loads(out)["space"] == "features"
    for words in (["compare", ada, "--output", xl / "page.html"], ["pack", "create", ada, "--output", xl / "pack"]):
        code, _, err = call(capsys, *words, *base, "--device", "nonsense")
        assert code == 1 and "device 'nonsense' cannot be used" in err


def test_a_flux_transformer_with_a_folder_for_the_rest(capsys, tmp_path):
    pipe = twin("flux")
    state = single_file.checkpoint({"transformer": pipe.transformer.state_dict()}, family="flux")
    save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, tmp_path / "flux1.safetensors")
    pipe.save_pretrained(tmp_path / "folder")
    shutil.rmtree(tmp_path / "folder" / "transformer")
    (tmp_path / "folder" / "transformer").mkdir()
    pipe.transformer.save_config(tmp_path / "folder" / "transformer")
    files = []
    for seed, name in enumerate(("ada", "ben")):
        one = adapter(Pipeline(pipe), name, seed)
        one = one.with_(layers={key: layer for key, layer in one.layers.items() if not key.startswith("text_encoder")}, family="flux")
        files.append(save_adapter(one, tmp_path / f"{name}.safetensors"))
    base = ["--base", tmp_path / "flux1.safetensors", "--base-config", tmp_path / "folder"]
    code, out, err = call(capsys, "inspect", *files, *base, "--json")
    assert (code, err) == (0, "") and json.loads(out)["merge"]["verdict"] == "merge"
    code, out, err = call(capsys, "convert", files[0], "--to", "checkpoint", "--output", tmp_path / "new.safetensors", *base)
    assert (code, err) == (0, "")
    again = Pipeline.load(tmp_path / "new.safetensors", config=tmp_path / "folder", dtype=torch.float16)
    with Pipeline(pipe).applied(load_adapter(files[0])):
        expected = pipe.transformer.state_dict()
        assert all(torch.equal(tensor, expected[key].half()) for key, tensor in again.pipe.transformer.state_dict().items())
    code, _, err = call(capsys, "inspect", *files, *base[:2])
    assert code == 1 and len(err.splitlines()) == 1 and "without CLIP, T5, autoencoder; give a diffusers folder" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "nonsense"), "device 'nonsense' cannot be used"),
        (("--device", "cpu", "--offload"), "offloading spares the memory of a GPU"),
        (("--base-config", "."), "a config goes with a single-file checkpoint"),
    ],
)
def test_what_cannot_be_is_one_line(capsys, xl, options, message):
    code, out, err = call(
        capsys, "merge", xl / "ada.safetensors", "--base", xl / "base", "--output", xl / "out.safetensors", "--device", "cpu", *options
    )
    assert (code, out) == (1, "") and message in err and len(err.splitlines()) == 1
    assert not (xl / "out.safetensors").exists()


def test_training_takes_a_file_with_a_configuration_and_says_which_families_it_can(capsys, xl):
    (xl / "pictures").mkdir()
    Image.new("RGB", (16, 16)).save(xl / "pictures" / "a.png")
    words = ["train", xl / "pictures", "--trigger", "qq", "--class", "man", "--output", xl / "qq.safetensors", "--device", "cpu"]
    code, _, err = call(capsys, *words, "--base", xl / "base", "--recipe", "edlora")
    assert code == 1 and "not supported; use a Stable Diffusion 1 or 2" in err and "edlora" in err
    small = ["--set", "steps=1", "--set", "rank=2", "--set", "text_rank=0", "--sample-every", 0]
    code, _, err = call(capsys, *words, *small, "--base", xl / "base.safetensors", "--base-config", xl / "base")
    assert (code, err) == (0, "") and load_adapter(xl / "qq.safetensors").family == "sdxl"
