"""Laws of every format: read after write is identity, one format claims each file, equal adapters make equal bytes, all or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from formats_samples import ATTN, CONV, FF, KERNEL, KERNELS, NAMES, TEXT, assert_same, dense, lora, mixed
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, safe_open

from loraclr.adapter import Adapter, LoraLayer
from loraclr.errors import FormatError, WriteError
from loraclr.formats import FORMATS, WRITTEN, PrecisionWarning, describe, detect_format, files, load_adapter, save_adapter
from loraclr.formats.base import stored_layers

ENDINGS = {"kohya": "a.safetensors", "diffusers": "a.safetensors", "peft": "a", "edlora": "a.pth"}
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
TOKENS = {"<rhea>": torch.arange(8.0).view(2, 4), "<man>": torch.ones(1, 4)}


@pytest.fixture(params=list(ENDINGS))
def format(request):
    return request.param


def test_every_format_is_tested():
    assert (*ENDINGS, "diff", "bundle", "embedding") == WRITTEN  # the last three: test_formats_outputs.py, test_formats_sdxl.py
    assert [one.id for one in FORMATS] == [*WRITTEN, "comfy"]  # read only: test_formats_flux.py and test_formats_sdxl.py


def test_read_after_write_is_identity(format, tmp_path):
    adapter = mixed().with_(
        tokens=TOKENS, triggers=("rhea woman", "photo"), family="sd1", metadata={"ss_output_name": "rhea", "ss_network_alpha": "1"}
    )
    path = save_adapter(adapter, tmp_path / ENDINGS[format], format=format, dtype=torch.float32)
    back = load_adapter(path, name="again")
    assert_same(back, adapter)
    if format != "kohya":
        assert all(layer.scale == 1.0 for layer in back)
    assert back.tokens.keys() == TOKENS.keys() and all(torch.equal(back.tokens[token], TOKENS[token]) for token in TOKENS)
    assert (back.name, back.triggers, back.family) == ("again", ("rhea woman", "photo"), "sd1")
    assert back.metadata["ss_output_name"] == "rhea"
    assert "ss_network_alpha" not in back.metadata  # no longer true of the baked factors
    assert detect_format(path) == format


@settings(max_examples=40, deadline=None)
@given(data=st.data(), which=st.sampled_from(list(ENDINGS)))
def test_read_after_write_for_any_ranks_and_scales(data, which, tmp_path_factory):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    chosen = data.draw(st.sets(st.sampled_from(NAMES), min_size=1))
    layers = []
    for name in sorted(chosen):
        rank, in_, out = (data.draw(st.integers(1, most)) for most in (5, 7, 6))
        scale = data.draw(st.floats(1e-6, 1e6)) * data.draw(st.sampled_from([-1.0, 1.0]))
        layers.append(lora(name, rank=rank, scale=scale, in_=in_, out=out))
    adapter = Adapter.of(layers)
    path = save_adapter(adapter, tmp_path_factory.mktemp("any") / ENDINGS[which], format=which, dtype=torch.float32)
    assert_same(load_adapter(path), adapter)


def test_the_default_is_half_precision_within_tolerance(format, tmp_path):
    adapter = mixed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = load_adapter(save_adapter(adapter, tmp_path / ENDINGS[format], format=format))
    assert {layer.down.dtype for layer in back} == {torch.float16}
    assert_same(back, adapter, tolerance=1e-3)


def test_writing_what_was_read_writes_the_same_bytes(format, tmp_path):
    first = save_adapter(mixed(), tmp_path / ("1" + ENDINGS[format]), format=format)
    second = save_adapter(load_adapter(first), tmp_path / ("2" + ENDINGS[format]), format=format)
    assert [m.read_bytes() for m in files.members(first)] == [m.read_bytes() for m in files.members(second)]


def test_equal_bytes_in_another_process(tmp_path):
    """safetensors itself orders metadata differently from process to process."""
    adapter = mixed().with_(tokens=TOKENS)
    metadata = {f"key{i}": str(i) for i in range(9)}
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    for format, name in ENDINGS.items():
        save_adapter(adapter, tmp_path / "here" / (format + name), format=format, metadata=metadata)
    code = (
        "import sys; from pathlib import Path; from loraclr.formats import *; there = Path('there')\n"
        "for format, name in zip(sys.argv[1::2], sys.argv[2::2]):\n"
        "    save_adapter(load_adapter(f'here/{format}{name}'), there / (format + name), format=format)"
    )
    subprocess.run(
        [sys.executable, "-c", code, *(word for pair in ENDINGS.items() for word in pair)], check=True, cwd=tmp_path, env=ENVIRONMENT
    )
    here, there = (
        {p.relative_to(tmp_path / d): p.read_bytes() for p in (tmp_path / d).rglob("*") if p.is_file()} for d in ("here", "there")
    )
    assert len(here) == 10 and here == there


def test_exactly_one_format_claims_each_file(format, tmp_path):
    path = save_adapter(mixed(), tmp_path / ENDINGS[format], format=format)
    content = files.read(path)
    assert [one.id for one in FORMATS if one.detect(content.tensors, content.metadata)] == [format]


@pytest.mark.parametrize("name", NAMES)
def test_one_layer_is_enough_to_be_claimed(name, format, tmp_path):
    assert detect_format(save_adapter(Adapter.of([lora(name)]), tmp_path / ENDINGS[format], format=format)) == format


def test_a_file_of_two_formats_is_refused(tmp_path):
    one, two = (load_file(save_adapter(mixed(), tmp_path / f"{f}.safetensors", format=f)) for f in ("kohya", "diffusers"))
    (tmp_path / "both.safetensors").write_bytes(files.safetensors_bytes(one | two, {}))
    with pytest.raises(FormatError, match="keys of kohya and diffusers at once"):
        load_adapter(tmp_path / "both.safetensors")


def test_an_edlora_may_also_be_a_safetensors_file(tmp_path):
    """Its dictionaries are then the parts of a path."""
    adapter = mixed().with_(tokens=TOKENS)
    content = files.read(save_adapter(adapter, tmp_path / "a.pth", format="edlora", dtype=torch.float32))
    (tmp_path / "b.safetensors").write_bytes(files.safetensors_bytes(content.tensors, content.metadata))
    assert load_adapter(tmp_path / "b.safetensors") == load_adapter(tmp_path / "a.pth")


class TestDense:
    def test_kohya_holds_full_differences(self, tmp_path):
        adapter = Adapter.of([dense(ATTN), dense(KERNEL), lora(TEXT)])
        path = save_adapter(adapter, tmp_path / "a.safetensors", dtype=torch.float32)
        assert load_adapter(path) == adapter
        assert "lora_unet_down_blocks_0_downsamplers_0_conv.diff" in load_file(path)

    @pytest.mark.parametrize("format", ["diffusers", "peft", "edlora"])
    def test_others_refuse_with_advice(self, format, tmp_path):
        with pytest.raises(FormatError, match=f"{ATTN} is a dense change.*write format 'kohya'"):
            save_adapter(Adapter.of([dense(ATTN)]), tmp_path / ENDINGS[format], format=format)
        assert list(tmp_path.iterdir()) == []


class TestKohyaOutput:
    def test_names_and_alphas(self, tmp_path):
        tensors = load_file(save_adapter(mixed(), tmp_path / "a.safetensors"))
        assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in tensors
        assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0.lora_up.weight" in tensors
        alphas = {key: float(tensor) for key, tensor in tensors.items() if key.endswith("alpha")}
        assert len(alphas) == len(NAMES)
        assert set(alphas.values()) == {1.0}  # the commonest rank, with the lower of equals
        assert all(tensors[key].dtype == torch.float32 for key in alphas)

    def test_alpha_is_the_rank_where_all_ranks_are_equal(self, tmp_path):
        adapter = Adapter.of(lora(name, rank=3, scale=0.5) for name in NAMES)
        path = save_adapter(adapter, tmp_path / "a.safetensors", dtype=torch.float32)
        assert {float(tensor) for key, tensor in load_file(path).items() if key.endswith("alpha")} == {3.0}
        assert load_adapter(path) == adapter and {layer.scale for layer in load_adapter(path)} == {1.0}

    def test_a_component_without_kohya_names(self, tmp_path):
        with pytest.raises(FormatError, match="text_encoder_3.*no kohya name.*write it as format 'diffusers'"):
            save_adapter(Adapter.of([lora("text_encoder_3.encoder.layers.0.mlp.fc1")]), tmp_path / "a.safetensors")

    def test_a_module_outside_the_lexicon(self, tmp_path):
        with pytest.raises(FormatError, match="no kohya name that could be read back"):
            save_adapter(Adapter.of([lora("unet.mid_block.my_own_layer")]), tmp_path / "a.safetensors")


class TestPrecision:
    def test_balanced_factors_survive_where_plain_ones_underflow(self):
        """up of 1e-9 is zero in float16; half of its smallness can be carried by down."""
        layer = LoraLayer(ATTN, torch.randn(2, 8) * 1e3, torch.randn(8, 2) * 1e-9)
        assert not layer.up.half().any()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            [(_, (down, up))] = stored_layers(Adapter.of([layer]), torch.float16)
        torch.testing.assert_close(
            up.double() @ down.double(), layer.delta(torch.float64), rtol=0, atol=1e-3 * float(layer.delta().abs().max())
        )

    def test_balancing_costs_no_bit(self):
        layer = LoraLayer(ATTN, torch.randn(3, 8) * 300, torch.randn(8, 3), 0.125)
        [(_, (down, up))] = stored_layers(Adapter.of([layer]), torch.float32)
        assert torch.equal(up.double() @ down.double(), layer.delta(torch.float64))
        assert 0.5 <= float(up.norm() / down.norm()) <= 2

    def test_overflow_names_the_layer(self, tmp_path):
        with pytest.raises(FormatError, match=f"{FF}.*do not fit torch.float16; write float32"):
            save_adapter(Adapter.of([lora(FF, scale=1e12)]), tmp_path / "a.safetensors")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("layer", [lora(FF, scale=1e-15), lora(KERNEL, scale=1e-16)], ids=["linear", "conv"])
    def test_loss_warns_with_the_layer(self, layer, tmp_path):
        with pytest.warns(PrecisionWarning, match=f"1 layers lose more than 0.001 in torch.float16: {layer.name}"):
            save_adapter(Adapter.of([layer, lora(TEXT)]), tmp_path / "a.safetensors")

    def test_zero_layers_are_no_loss(self, tmp_path):
        zero = LoraLayer(ATTN, torch.randn(2, 4), torch.zeros(3, 2))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not next(iter(load_adapter(save_adapter(Adapter.of([zero]), tmp_path / "a.safetensors")))).delta().any()

    def test_only_floats_are_written(self, tmp_path):
        with pytest.raises(FormatError, match="cannot be written as torch.int8"):
            save_adapter(mixed(), tmp_path / "a.safetensors", dtype=torch.int8)


class TestAllOrNothing:
    def test_failure_leaves_the_old_file_and_nothing_else(self, format, tmp_path, monkeypatch):
        path = save_adapter(mixed(), tmp_path / ENDINGS[format], format=format)
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(WriteError, match="No space left.*make room"):
            save_adapter(Adapter.of([lora(ATTN)]).with_(tokens=TOKENS), path, format=format)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before

    def test_a_sidecar_does_not_outlive_the_failure_of_its_file(self, tmp_path, monkeypatch):
        rename = os.rename

        def only_sidecars(source, target):
            if target == tmp_path / "a.safetensors":
                raise OSError("cannot be renamed")
            rename(source, target)

        monkeypatch.setattr(os, "rename", only_sidecars)
        with pytest.raises(WriteError, match="cannot be renamed"):
            save_adapter(mixed().with_(tokens=TOKENS), tmp_path / "a.safetensors")
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_replaces_an_older_one(self, tmp_path):
        save_adapter(mixed(), tmp_path / "a", format="peft")
        save_adapter(Adapter.of([lora(ATTN)]), tmp_path / "a", format="peft")
        assert list(load_adapter(tmp_path / "a").layers) == [ATTN]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
        assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]

    def test_a_folder_of_something_else_is_left_alone(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "thesis.txt").write_text("years of work")
        with pytest.raises(FormatError, match="holds more than one PEFT adapter; choose another name"):
            save_adapter(mixed(), tmp_path / "a", format="peft")
        assert (tmp_path / "a" / "thesis.txt").read_text() == "years of work"

    def test_a_folder_of_adapters_is_not_taken_for_one(self, tmp_path):
        adapter = mixed()
        (tmp_path / "loras").mkdir()
        for name in ("one", "two"):
            save_adapter(adapter, tmp_path / "loras" / name, format="peft")
        with pytest.raises(FormatError, match="nothing of it is replaced"):
            save_adapter(adapter, tmp_path / "loras", format="peft")
        assert load_adapter(tmp_path / "loras" / "two") == load_adapter(tmp_path / "loras" / "one")
        save_adapter(adapter, tmp_path / "loras" / "one", format="peft")  # one adapter's own folder is

    def test_files_are_readable_by_others_as_usual(self, tmp_path):
        plain = tmp_path / "plain"
        plain.touch()
        assert save_adapter(mixed(), tmp_path / "a.safetensors").stat().st_mode == plain.stat().st_mode


class TestUse:
    @pytest.mark.parametrize(
        ("path", "format", "message"),
        [
            ("a.pth", "kohya", "files ending in .safetensors"),
            ("a", "diffusers", "files ending in .safetensors"),
            ("a.safetensors", "edlora", "files ending in .pth or .pt"),
            ("a.safetensors", "peft", "makes a folder"),
            ("a.safetensors", "khoya", "no format 'khoya'.*did you mean 'kohya'"),
            ("no/where/a.safetensors", "kohya", "there is no folder .*make it first"),
        ],
    )
    def test_impossible_outputs(self, path, format, message, tmp_path):
        with pytest.raises((FormatError, WriteError), match=message):
            save_adapter(mixed(), tmp_path / path, format=format)

    def test_metadata_must_be_text(self, tmp_path):
        with pytest.raises(FormatError, match="metadata 'rank' is a int"):
            save_adapter(mixed(), tmp_path / "a.safetensors", metadata={"rank": 4})

    def test_metadata_is_written_in_order(self, tmp_path):
        path = save_adapter(mixed(), tmp_path / "a.safetensors", metadata={"zebra": "1", "ant": "2"})
        with safe_open(path, framework="pt") as file:
            assert {"ant": "2", "zebra": "1"}.items() <= file.metadata().items()
        assert path.read_bytes()[8:].startswith(b'{"__metadata__":{"ant":"2","modelspec.hash_sha256":"0x')

    def test_nothing_to_write(self, tmp_path):
        with pytest.raises(FormatError, match="no layers"):
            save_adapter(Adapter({}), tmp_path / "a.safetensors")

    def test_tokens_alone_are_told_where_they_fit(self, tmp_path):
        alone = Adapter({}, tokens=TOKENS)
        with pytest.raises(FormatError, match="learned tokens only.* use one of edlora, bundle, embedding"):
            save_adapter(alone, tmp_path / "x.safetensors")
        assert not list(tmp_path.iterdir())

    def test_tokens_alone_are_an_edlora(self, tmp_path):
        adapter = Adapter({}, tokens=TOKENS)
        assert load_adapter(save_adapter(adapter, tmp_path / "a.pth", format="edlora")) == adapter


class TestSidecar:
    def test_one_tensor_per_token(self, tmp_path):
        save_adapter(mixed().with_(tokens=TOKENS), tmp_path / "v1.0.safetensors")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["v1.0.safetensors", "v1.0.tokens.safetensors"]
        tensors = load_file(tmp_path / "v1.0.tokens.safetensors")
        assert tensors.keys() == TOKENS.keys() and all(torch.equal(tensors[t], TOKENS[t]) for t in TOKENS)

    def test_tokens_of_an_earlier_adapter_do_not_come_along(self, tmp_path):
        save_adapter(mixed().with_(tokens=TOKENS), tmp_path / "a.safetensors")
        save_adapter(mixed(), tmp_path / "a.safetensors")
        assert not load_adapter(tmp_path / "a.safetensors").tokens

    def test_loaded_by_itself(self, tmp_path):
        save_adapter(mixed().with_(tokens=TOKENS), tmp_path / "a.safetensors")
        with pytest.raises(FormatError, match="learned tokens of an adapter; load the file it lies beside"):
            load_adapter(tmp_path / "a.tokens.safetensors")

    def test_a_file_that_only_has_its_name(self, tmp_path):
        save_adapter(mixed(), tmp_path / "a.tokens.safetensors")
        save_adapter(Adapter.of([lora(ATTN)]), tmp_path / "b.safetensors")
        os.rename(tmp_path / "b.safetensors", tmp_path / "a.safetensors")
        with pytest.raises(FormatError, match="a.tokens.safetensors lies beside it but holds no tokens"):
            load_adapter(tmp_path / "a.safetensors")


class TestHeader:
    @pytest.mark.parametrize(
        ("metadata", "triggers"),
        [
            ({"modelspec.trigger_phrase": "sks man, blue hat"}, ("sks man", "blue hat")),
            ({"modelspec.trigger_phrase": "sks", "ss_dataset_dirs": '{"10_other": {}}'}, ("sks",)),
            ({"ss_dataset_dirs": '{"10_sks man": {"n_repeats": 10}, "reg": {}}'}, ("sks man",)),
            ({"ss_tag_frequency": '{"10_sks man": {"1boy": 3, "sks man": 9}, "b": {"1boy": 4}}'}, ("sks man",)),
            ({"ss_dataset_dirs": '{"2_ohwx": {}}', "ss_tag_frequency": '{"2_ohwx": {"hat": 2, "cat": 2}}'}, ("ohwx", "cat")),
            ({"ss_tag_frequency": "{broken", "ss_dataset_dirs": "[1]"}, ()),
            ({"ss_tag_frequency": "[" * 100_000}, ()),
            ({}, ()),
        ],
    )
    def test_triggers(self, metadata, triggers, tmp_path):
        assert load_adapter(save_adapter(mixed(), tmp_path / "a.safetensors", metadata=metadata)).triggers == triggers

    @pytest.mark.parametrize(
        ("metadata", "family"),
        [
            ({"ss_base_model_version": "sd_v1"}, "sd1"),
            ({"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
            ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "sd1"),
            ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl"),
            ({"modelspec.architecture": "Flux.1-dev/lora"}, "flux"),
            ({"modelspec.architecture": "toybox-1/lora"}, "toybox-1"),
            ({}, None),
        ],
    )
    def test_family(self, metadata, family, tmp_path):
        assert load_adapter(save_adapter(mixed(), tmp_path / "a.safetensors", metadata=metadata)).family == family


class TestDescribe:
    def test_a_record_of_the_file(self, tmp_path):
        adapter = Adapter.of([lora(ATTN, rank=2), lora(CONV, rank=4), lora(TEXT, rank=2), dense(FF)]).with_(
            tokens=TOKENS, triggers=("rhea",), family="sd1"
        )
        path = save_adapter(adapter, tmp_path / "a.safetensors")
        found = describe(path)
        assert (found.format, found.family, found.triggers, found.warnings) == ("kohya", "sd1", ("rhea",), ())
        assert (found.layers, found.dense, found.ranks, found.scales) == ({"text_encoder": 1, "unet": 3}, 1, {2: 2, 4: 1}, {0.5: 1, 1.0: 2})
        assert (found.dtypes, found.tokens) == (("float16",), {"<man>": (1, 4), "<rhea>": (2, 4)})
        assert found.size == path.stat().st_size
        assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()

    def test_what_deserves_attention(self, tmp_path):
        tensors = load_file(save_adapter(mixed((ATTN, TEXT)), tmp_path / "a.safetensors", dtype=torch.float32))
        tensors["lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha"] /= 4
        tensors["lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight"].zero_()
        (tmp_path / "b.safetensors").write_bytes(files.safetensors_bytes(tensors, {"ss_base_model_version": "sdxl_base_v1-0"}))
        notes = "\n".join(describe(tmp_path / "b.safetensors").warnings)
        for words in ("different alphas", f"1 layers change nothing, the first is {TEXT}", "no trigger words", "for sdxl models"):
            assert words in notes

    def test_a_folder_is_hashed_by_its_members(self, tmp_path):
        one, two = (describe(save_adapter(mixed(), tmp_path / name, format="peft")) for name in "ab")
        assert one.sha256 != two.sha256  # two draws of random numbers
        assert one.sha256 == describe(save_adapter(load_adapter(tmp_path / "a"), tmp_path / "c", format="peft")).sha256
        members = files.members(tmp_path / "a")
        assert len(members) == 4 and one.size == sum(member.stat().st_size for member in members)


def test_peft_config_covers_mixed_ranks(tmp_path):
    save_adapter(mixed((ATTN, FF, KERNEL, CONV)), tmp_path / "a", format="peft")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and len(config["target_modules"]) == 4
    assert config["rank_pattern"] == config["alpha_pattern"] and len(config["rank_pattern"]) == 3


def test_samples_have_the_kernels_they_claim():
    assert all(lora(name).delta().shape[2:] == KERNELS.get(name, ()) for name in NAMES)


def test_formats_load_without_diffusers_and_peft():
    code = "import loraclr.formats, sys; sys.exit(bool({'diffusers', 'peft', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=ENVIRONMENT).returncode == 0
