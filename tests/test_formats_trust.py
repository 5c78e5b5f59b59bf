"""What a file is called by, where it comes from, and by which hashes others know it."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version

import pytest
import torch
from formats_samples import ATTN, TEXT, lora, mixed
from safetensors.torch import load_file, save, save_file

from loraclr.adapter import Adapter
from loraclr.formats import describe, header, load_adapter, notes, provenance, save_adapter
from loraclr.merge import merge
from loraclr.pipeline import Pipeline

SOURCES = (
    ("a.json", {"activation text": "typed man, <lora:a:1>, typed man"}, ("typed man",)),
    (None, {"modelspec.trigger_phrase": "stated man"}, ("stated man",)),
    ("a.metadata.json", {"civitai": {"trainedWords": ["page man, hat", "coat"]}}, ("page man", "hat", "coat")),
    ("a.civitai.info", {"trainedWords": ["info man"]}, ("info man",)),
    (None, {"ss_dataset_dirs": '{"10_noted man": {}}'}, ("noted man",)),
)


@pytest.mark.parametrize("first", range(len(SOURCES)))
def test_who_says_more_deliberately_is_believed(first, tmp_path):
    """All sources from `first` on are there; the first of them is taken, and named."""
    metadata: dict[str, str] = {}
    for name, content, _ in SOURCES[first:]:
        if name:
            (tmp_path / name).write_text(json.dumps(content))
        else:
            metadata |= content
    path = save_adapter(mixed(), tmp_path / "a.safetensors", metadata=metadata)
    assert load_adapter(path).triggers == SOURCES[first][2]
    assert describe(path).trigger_source == (SOURCES[first][0] or next(iter(SOURCES[first][1])))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"activation text": 3, "trainedWords": "x"}', "[" * 100_000, "\xff"])
def test_side_files_that_say_nothing_are_passed_over(text, tmp_path):
    for ending in ("json", "metadata.json", "civitai.info"):
        (tmp_path / f"a.{ending}").write_text(text.replace("trainedWords", "words"))
    assert notes.read(tmp_path / "a.safetensors") == notes.Notes()


def test_a_folder_has_its_notes_beside_it(tmp_path):
    (tmp_path / "a.json").write_text('{"activation text": "sks"}')
    assert load_adapter(save_adapter(mixed(), tmp_path / "a", format="peft")).triggers == ("sks",)


def test_what_a_page_forbids_is_its_licence(tmp_path):
    page = {"trainedWords": [], "model": {"allowDerivatives": False, "allowNoCredit": False, "allowCommercialUse": ["None"]}}
    (tmp_path / "a.civitai.info").write_text(json.dumps(page))
    path = save_adapter(mixed(), tmp_path / "a.safetensors")
    said = "Civitai: credit the creator, no merges, no commercial use"
    assert load_adapter(path).metadata["modelspec.license"] == said
    stated = save_adapter(mixed(), tmp_path / "a.safetensors", metadata={"modelspec.license": "CC0"})
    assert load_adapter(stated).metadata["modelspec.license"] == "CC0"


class TestHashes:
    def test_they_are_those_that_others_compute(self, tmp_path):
        """Of the whole file; and of what follows the header, whatever the header says."""
        path = save_adapter(mixed(), tmp_path / "a.safetensors")
        plain = save(load_file(path))
        body = plain[8 + int.from_bytes(plain[:8], "little") :]
        found = describe(path)
        assert found.tensor_sha256 == hashlib.sha256(body).hexdigest() != found.sha256
        metadata = load_adapter(path).metadata
        assert metadata["sshs_model_hash"] == found.tensor_sha256 and metadata["modelspec.hash_sha256"] == f"0x{found.tensor_sha256}"
        again = save_adapter(load_adapter(path), tmp_path / "b.safetensors", metadata={"x": "y"})
        assert describe(again).tensor_sha256 == found.tensor_sha256 and describe(again).sha256 != found.sha256

    def test_a_folder_and_a_torch_file_have_none(self, tmp_path):
        assert describe(save_adapter(mixed(), tmp_path / "a", format="peft")).tensor_sha256 is None
        assert describe(save_adapter(mixed(), tmp_path / "a.pth", format="edlora")).tensor_sha256 is None


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("sd1", {"ss_base_model_version": "sd_v1"}),
        ("sd2", {"ss_base_model_version": "sd_v2", "ss_v2": "True"}),
        ("sdxl", {"ss_base_model_version": "sdxl_base_v1-0"}),
        ("flux", {"ss_base_model_version": "flux1"}),
        ("toybox-1", {}),
    ],
)
def test_a1111_shows_the_file_for_the_right_models(family, wanted):
    """It looks for `sdxl_` in ss_base_model_version and for ss_v2 True, and takes every other file with a header for one of SD1.x."""
    written = header.outgoing(mixed().with_(family=family), {})
    assert {key: value for key, value in written.items() if key.startswith("ss_")} == wanted
    assert header.family(written) == family


@pytest.mark.parametrize(
    ("family", "stated", "wanted"),
    [
        ("sd2", {"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, ("stable-diffusion-v2-768-v/lora", "sd_v2")),
        ("sd2", {"ss_base_model_version": "sd_v2_768_v"}, ("stable-diffusion-v2/lora", "sd_v2_768_v")),
        ("sdxl", {"ss_base_model_version": "sd_1.5"}, ("stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0")),
        ("sdxl", {"modelspec.architecture": "stable-diffusion-v1/lora"}, ("stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0")),
    ],
)
def test_what_a_header_says_of_the_model_is_kept_where_it_agrees(family, stated, wanted):
    written = header.outgoing(mixed().with_(family=family, metadata=stated), {})
    assert (written["modelspec.architecture"], written["ss_base_model_version"]) == wanted


class TestProvenance:
    def sources(self, tmp_path) -> list:
        headers = {
            "ada": {"modelspec.license": "CC-BY", "modelspec.author": "A", "ss_tag_frequency": '{"1_x": {"hat": 2}, "2_y": {"hat": 3}}'},
            "ben": {"modelspec.license": "CC-BY", "modelspec.author": "B", "modelspec.tags": "man, hat", "ss_clip_skip": "2"},
            "cai": {"modelspec.license": "MIT", "modelspec.tags": "hat,coat", "modelspec.prediction_type": "epsilon"},
        }
        return [
            save_adapter(
                Adapter.of([lora(ATTN), lora(TEXT)]),
                tmp_path / f"{name}.safetensors",
                metadata=said | {"modelspec.trigger_phrase": f"{name} man", "modelspec.resolution": "512x512"},
            )
            for name, said in headers.items()
        ]

    def test_licences_tags_and_authors_are_joined(self, tmp_path):
        files = self.sources(tmp_path)
        written = merge(files, method="sum", name="all").save(tmp_path / "all.safetensors")
        said = load_adapter(written).metadata
        assert said["modelspec.license"] == "CC-BY; MIT" and said["modelspec.author"] == "A, B"
        assert said["modelspec.tags"] == "man, hat, coat" and json.loads(said["ss_tag_frequency"]) == {"ada": {"hat": 5}}
        assert said["modelspec.merged_from"] == "ada, ben, cai" and said["modelspec.title"] == "all"
        assert (said["ss_clip_skip"], said["modelspec.prediction_type"], said["modelspec.resolution"]) == ("2", "epsilon", "512x512")
        assert said["modelspec.usage_hint"] == ("Strength 1. Called by: ada man; ben man; cai man. Prompt: a photo of ada man and ben man")
        assert said["modelspec.sai_model_spec"] == "1.0.1"
        inputs = json.loads(said["loraclr.receipt"])["inputs"]
        assert [entry["tensor_sha256"] for entry in inputs] == [describe(file).tensor_sha256 for file in files]
        assert load_adapter(written).triggers == ("ada man", "ben man", "cai man")

    def test_a_merge_of_merges_names_them_all(self, tmp_path):
        ada, ben, cai = self.sources(tmp_path)
        both = merge([ada, ben], method="sum", name="both").save(tmp_path / "both.safetensors")
        said = load_adapter(merge([both, cai], method="sum").save(tmp_path / "all.safetensors")).metadata
        assert said["modelspec.merged_from"] == "both (ada, ben), cai"

    def test_one_can_keep_it_to_oneself(self, tmp_path):
        written = merge(self.sources(tmp_path), method="sum").save(tmp_path / "all.safetensors", sources=False)
        said = load_adapter(written).metadata
        assert not said.keys() & provenance.DESCENT
        assert not any(name in "".join(said.values()).replace(said["modelspec.trigger_phrase"], "").replace(
            said["modelspec.usage_hint"], "") for name in ("ada", "ben", "cai", "CC-BY"))  # fmt: skip
        assert said["modelspec.trigger_phrase"] == "ada man, ben man, cai man" and said["ss_clip_skip"] == "2"
        assert [entry["name"] for entry in json.loads((tmp_path / "all.safetensors.json").read_text())["inputs"]] == ["ada", "ben", "cai"]

    def test_that_they_predict_v_is_not_lost(self, tmp_path):
        said = {"modelspec.architecture": "stable-diffusion-v2-768-v/lora", "ss_v_parameterization": "True"}
        files = [save_adapter(mixed(), tmp_path / f"{name}.safetensors", metadata=said) for name in "ab"]
        merged = load_adapter(merge(files, method="sum").save(tmp_path / "ab.safetensors"))
        assert said.items() <= merged.metadata.items() and merged.family == "sd2"

    def test_what_they_do_not_agree_on_is_not_said(self):
        one, two = (mixed().with_(metadata={"modelspec.resolution": size}) for size in ("512x512", "768x768"))
        assert "modelspec.resolution" not in provenance.joined([one, two])
        assert provenance.prompt(["kalle style", "ada man"]) == "a photo of ada man"
        assert provenance.prompt(["kalle style"]) == "a picture in kalle style"
        assert provenance.prompt(["in the style of kalle"]) == "a picture in the style of kalle"
        assert provenance.prompt(["", ""]) == "" and provenance.usage([]) == "Strength 1."


def test_a_receipt_names_the_libraries_that_ran(tiny_pipe):
    base = Pipeline(tiny_pipe())
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    weight = base.base_weight(name)
    one = Adapter.of([lora(name, out=weight.shape[0], in_=weight.shape[1])]).with_(triggers=("x",))
    assert {key: merge([one], method="sum", base=base).versions[key] for key in ("diffusers", "transformers", "torch")} == {
        "diffusers": version("diffusers"),
        "transformers": version("transformers"),
        "torch": str(torch.__version__),
    }
    assert "diffusers" not in merge([one], method="sum").versions


def test_a_header_from_elsewhere_gives_way(tmp_path):
    save_file(load_file(save_adapter(mixed(), tmp_path / "a.safetensors")), tmp_path / "b.safetensors", {"sshs_model_hash": "old"})
    assert (
        load_adapter(save_adapter(load_adapter(tmp_path / "b.safetensors"), tmp_path / "c.safetensors")).metadata["sshs_model_hash"]
        == describe(tmp_path / "c.safetensors").tensor_sha256
    )
