"""Textual Inversion files: the layouts by hand, other tools' ways of saying the same, and what is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraclr.adapter import Adapter, LoraLayer
from loraclr.errors import FormatError
from loraclr.formats import FORMATS, describe, load_adapter, save_adapter
from loraclr.formats.embedding import LAYERS

ONE = {"<rhea>": torch.arange(4.0)[None]}
MANY = {"<rhea>": torch.arange(32.0).view(16, 2)}


@pytest.mark.parametrize("tokens", [ONE, MANY], ids=["one row", "a row per layer"])
def test_read_after_write_is_identity(tokens, tmp_path):
    adapter = Adapter({}, name="rhea", tokens=tokens, triggers=("<rhea>",))
    path = save_adapter(adapter, tmp_path / "rhea.safetensors", format="embedding")
    assert load_adapter(path) == adapter and load_adapter(path).call == "<rhea>" and describe(path).format == "embedding"
    assert [form.id for form in FORMATS if form.detect(load_file(path), {})] == ["embedding"]
    assert not (tmp_path / "rhea.tokens.safetensors").exists()


def test_the_tensors_have_the_names_that_other_tools_look_for(tmp_path):
    one = load_file(save_adapter(Adapter({}, tokens=ONE), tmp_path / "one.safetensors", format="embedding"))
    assert one.keys() == {"<rhea>"} and one["<rhea>"].tolist() == [[0, 1, 2, 3]]
    many = load_file(save_adapter(Adapter({}, tokens=MANY), tmp_path / "many.safetensors", format="embedding"))
    assert (
        *("IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID"),
        *("OUT03", "OUT04", "OUT05", "OUT06", "OUT07", "OUT08", "OUT09", "OUT10", "OUT11"),
    ) == LAYERS
    assert {key: row.tolist() for key, row in many.items()} == {key: [[2.0 * k, 2.0 * k + 1]] for k, key in enumerate(LAYERS)}


def test_a_file_that_names_no_token_is_called_by_its_own_name(tmp_path):
    save_file({"emb_params": torch.arange(6.0).view(3, 2)}, tmp_path / "old-cat.safetensors")
    cat = load_adapter(tmp_path / "old-cat.safetensors")
    assert {token: rows.tolist() for token, rows in cat.tokens.items()} == {
        "<old-cat>": [[0, 1]],
        "<old-cat>_1": [[2, 3]],
        "<old-cat>_2": [[4, 5]],
    }
    assert cat.call == "<old-cat> <old-cat>_1 <old-cat>_2"
    save_file({key: torch.ones(2) for key in LAYERS}, tmp_path / "xti.safetensors")  # without a trigger in its header
    assert load_adapter(tmp_path / "xti.safetensors").tokens["<xti>"].shape == (16, 2)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"clip_l": torch.ones(1, 4), "clip_g": torch.ones(1, 8)}, "for the text encoders of SDXL"),
        ({"IN01": torch.ones(1, 4), "MID": torch.ones(1, 4)}, "but not of IN02, IN04"),
        ({key: torch.ones(2, 4) for key in LAYERS}, "several vectors for each layer"),
        ({"emb_params": torch.ones(1, 4, 4)}, r"emb_params has shape \(1, 4, 4\)"),
    ],
)
def test_what_cannot_be_read_is_said(tensors, message, tmp_path):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match=message):
        load_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Adapter.of([LoraLayer("unet.a", torch.ones(1, 2), torch.ones(2, 1))]).with_(tokens=ONE), "has 1 layers"),
        (Adapter({}, tokens={**ONE, "<b>": torch.ones(1, 4)}), "there are <b>, <rhea>|there are <rhea>, <b>"),
        (Adapter({}, tokens={"<rhea>": torch.ones(10, 4)}), "a token with 10 layers has no names"),
        (Adapter({}, tokens={"rhea": torch.ones(1, 4)}), "has no angle brackets"),
    ],
)
def test_what_it_cannot_hold_is_said(adapter, message, tmp_path):
    with pytest.raises(FormatError, match=message):
        save_adapter(adapter, tmp_path / "a.safetensors", format="embedding")
    assert not list(tmp_path.iterdir())
