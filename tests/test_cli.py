"""The command line, run in this process: what it prints where, what it refuses, and that it never leaves half a file."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch
from concepts import KEYS, TEXT, concept, three
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import loraclr
from loraclr.cli import convert as convert_command
from loraclr.cli import generate as generate_command
from loraclr.cli import main, parse
from loraclr.cli import merge as merge_command
from loraclr.cli import methods as methods_command
from loraclr.cli import toybox as toybox_command
from loraclr.errors import MergeError, UsageError
from loraclr.formats import FORMATS, WRITTEN, load_adapter, save_adapter
from loraclr.formats.files import SUFFIXES, safetensors_bytes
from loraclr.fuse import Layout
from loraclr.methods import METHODS, describe, make_method, parameters
from loraclr.pipeline import Pipeline
from loraclr.strategies import STRATEGIES
from loraclr.toybox import SPLITS
from loraclr.toybox import demo as toybox_demo


@pytest.fixture
def call(capsys):
    """`call("merge", path, ...)` -> exit code, standard output, standard error, both with their white space evened out."""

    def run(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return code, said.out if "--json" in words else " ".join(said.out.split()), said.err

    return run


@pytest.fixture(scope="module")
def base(_tiny_original, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "base"
    _tiny_original.save_pretrained(folder)
    return folder


@pytest.fixture
def model(_tiny_original) -> Pipeline:
    return Pipeline(_tiny_original)


@pytest.fixture
def files(model, tmp_path) -> list[Path]:
    """ada, ben (with a token) and cai, in three formats."""
    ada, ben, cai = three(model)
    return [
        save_adapter(ada, tmp_path / "ada.safetensors"),
        save_adapter(ben, tmp_path / "ben.safetensors", format="diffusers"),
        save_adapter(cai, tmp_path / "cai", format="peft", metadata={"modelspec.trigger_phrase": "cai man"}),
    ]


def error(said: tuple[int, str, str], code: int = 1) -> str:
    """The one line on standard error; nothing on standard output."""
    assert said[0] == code and said[1] == ""
    lines = said[2].splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), said[2]
    return lines[0].removeprefix("error: ")


def module(name: str):
    """The module, where the package's attribute of that name is the verb."""
    return importlib.import_module(f"loraclr.{name}")


# --- the frame


def test_help_names_every_command_and_every_option(call):
    code, out, _ = call("--help")
    listed = ("inspect", "merge", "verify", "convert", "generate", "evaluate", "methods", "demo", "pack", "toybox")
    assert code == 0 and all(word in out for word in (*listed, "loraclr demo"))
    commands = {"merge": merge_command.merge, "generate": generate_command.generate, "convert": convert_command.convert}
    for command, function in commands.items():
        code, out, _ = call(command, "--help")
        assert code == 0
        names = [
            name.rstrip("_").replace("_", "-")
            for name in inspect.signature(function).parameters
            if name not in ("file", "files", "context")
        ]
        assert all(f"--{name}" in out for name in names)


def test_version(call):
    assert call("--version") == (0, f"loraclr {loraclr.__version__}", "")


def test_wrong_usage_is_exit_2(call):
    for words in (["nonsense"], ["merge"], ["merge", "x.safetensors"], ["merge", "a", "--output", "b", "--formt", "kohya"], ["inspect"]):
        code, _, err = call(*words)
        assert code == 2 and "Usage" in err and "Traceback" not in err
    assert call("merge", "a.safetensors", "--output", "b.safetensors", "--format", "nothing")[0] == 2
    assert call("merge", "a.safetensors", "--output", "b.safetensors", "--rank", "0")[0] == 2


def test_defaults_are_those_of_the_library():
    """Repeated on the command line, because it must not import the library to show its help."""

    def defaults(function):
        return {name: p.default for name, p in inspect.signature(function).parameters.items() if p.default is not p.empty}

    ours, theirs = defaults(merge_command.merge), defaults(loraclr.merge)
    assert {name: ours[name] for name in ("method", "rank", "measure")} == {name: theirs[name] for name in ("method", "rank", "measure")}
    assert ours["format"] == defaults(loraclr.MergeResult.save)["format"] == defaults(loraclr.save_adapter)["format"]
    assert ours["dtype"] == "fp16" and str(defaults(loraclr.MergeResult.save)["dtype"]) == "torch.float16"
    ours, theirs = defaults(generate_command.generate), defaults(loraclr.generate)
    assert {name: ours[name] for name in ("steps", "guidance", "negative", "size")} == {
        name: theirs[name] for name in ("steps", "guidance", "negative", "size")
    }
    assert ours["batch"] == theirs["batch_size"]


def test_choices_are_those_of_the_library():
    assert get_args(get_type_hints(merge_command.merge)["format"]) == tuple(id for id in WRITTEN if id != "embedding")
    assert get_args(get_type_hints(convert_command.convert)["to"]) == tuple(parse.ENDINGS) == (*WRITTEN, *get_args(Layout))
    assert all(parse.ENDINGS[one.id] == SUFFIXES[one.storage] for one in FORMATS if one.id in WRITTEN)
    assert get_args(get_args(get_type_hints(generate_command.generate)["strategy"])[0]) == tuple(STRATEGIES)
    assert get_args(get_type_hints(toybox_command.export)["split"]) == SPLITS


def test_as_a_program(tmp_path):
    """One real process: the exit code arrives, and an error is a line and no traceback."""
    environment = {**os.environ, "PYTHONPATH": str(Path(loraclr.__file__).parents[1])}
    words = [sys.executable, "-m", "loraclr", "inspect", str(tmp_path / "nowhere.safetensors")]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "no such file" in done.stderr


def test_errors_are_one_line_with_their_brackets(call, monkeypatch, files, tmp_path):
    def fail(*_, **__):
        raise MergeError("layers [bold]x[/] of\n shape [1, 2] do not fit; use others")

    monkeypatch.setattr(module("merge"), "merge", fail)
    said = error(call("merge", files[0], "--method", "sum", "--output", tmp_path / "out.safetensors"))
    assert said == "layers [bold]x[/] of shape [1, 2] do not fit; use others"


def test_errors_of_the_system_are_shown_alike(call, monkeypatch, files, tmp_path):
    def fail(*_, **__):
        raise PermissionError(13, "Permission denied", "out.safetensors")

    monkeypatch.setattr(module("merge").MergeResult, "save", fail)
    assert "Permission denied" in error(call("merge", files[0], "--method", "sum", "--output", tmp_path / "out.safetensors"))


def test_without_diffusers_the_remedy_is_named(call, monkeypatch, base, files, tmp_path):
    monkeypatch.setitem(sys.modules, "diffusers.utils", None)
    assert "pip install 'loraclr[diffusion]'" in error(call("merge", *files, "--base", base, "--output", tmp_path / "out.safetensors"))


def test_control_c_is_130_and_leaves_nothing(call, monkeypatch, files, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(module("merge"), "merge", interrupt)
    code, out, err = call("merge", *files, "--method", "sum", "--output", tmp_path / "out.safetensors")
    assert (code, out, err) == (130, "", "interrupted\n")
    assert sorted(tmp_path.iterdir()) == before


def test_our_warnings_are_one_line_each(call, files, tmp_path):
    words = ["--trigger", "ada=a man", "--trigger", "cai=a man", "--method", "sum", "--output", tmp_path / "out.safetensors"]
    code, _, err = call("merge", *files, *words)
    assert code == 0
    assert [line for line in err.splitlines() if line.startswith("warning: ")] == [
        "warning: ada, cai are called by the same words 'a man': no merge can tell them apart; give each its own trigger"
    ]
    assert "stacklevel" not in err and ".py" not in err


# --- words to values


def test_settings_are_typed_by_the_method():
    types = {row.name: row.type for row in parameters(METHODS["loraclr"])}
    words = ["ridge=1e-2", "prior=mean", "normalise=false", "iterations=7", "importance=1,2.5"]
    assert parse.settings(words, types) == {
        "ridge": 0.01, "prior": "mean", "normalise": False, "iterations": 7, "importance": (1, 2.5)
    }  # fmt: skip
    assert parse.settings(["importance=2"], types) == {"importance": (2,)}
    assert parse.settings(["rank=none"], {}) == {"rank": None}
    for wrong in ("ridge", "ridge=", "=1"):
        with pytest.raises(UsageError, match="NAME=VALUE"):
            parse.settings([wrong], types)
    with pytest.raises(UsageError, match="twice"):
        parse.settings(["ridge=1", "ridge=2"], types)


def test_weights_go_by_order_or_by_name():
    names = ["ada", "ben", "cai"]
    assert parse.weights([], names) is None
    assert parse.weights(["1", "0.5", "-2"], names) == [1, 0.5, -2]
    assert parse.weights(["cai=0.8", "ada = 2"], names) == [2, 1, 0.8]
    for words, said in {
        ("1", "2"): "3 adapters and 2 plain weights",
        ("1", "ada=2", "3"): "not both",
        ("aba=1",): "did you mean 'ada'",
        ("ada=1", "ada=2"): "twice",
        ("ada=x",): "not a number",
        ("nan", "1", "1"): "not a number",
    }.items():
        with pytest.raises(UsageError, match=said):
            parse.weights(list(words), names)


def test_block_weights_go_by_name():
    assert parse.block_weights(["ada=1,0.5,-2", "a=b = 3"]) == {"ada": [1, 0.5, -2], "a=b": [3]}
    for words, said in {("ada",): "NAME=N", ("ada=",): "NAME=N", ("ada=1,x",): "ada: 'x' is not a number", ("a=1", "a=2"): "twice"}.items():
        with pytest.raises(UsageError, match=said):
            parse.block_weights(words)


def test_sizes_and_loras(tmp_path):
    assert parse.size("64x128") == (64, 128) == parse.size("64X128")
    for wrong in ("64", "64x", "axb", "-1x4", "1x2x3"):
        with pytest.raises(UsageError, match="HEIGHTxWIDTH"):
            parse.size(wrong)
    assert parse.lora("a/b.safetensors") == (Path("a/b.safetensors"), 1.0)
    assert parse.lora("a/b.safetensors:0.8") == (Path("a/b.safetensors"), 0.8)
    odd = tmp_path / "a:b.safetensors"
    odd.touch()
    assert parse.lora(str(odd)) == (odd, 1.0)
    with pytest.raises(UsageError, match="'x' is not a number"):
        parse.lora("b.safetensors:x")


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_shown_defaults_read_back(call, method):
    """Every default as `loraclr methods` shows it is what --set makes of it."""
    from loraclr.methods.describe import word

    rows = parameters(method)
    words = [f"{row.name}={word(row.default)}" for row in rows if row.default != ()]
    assert make_method(method.name, **parse.settings(words, {row.name: row.type for row in rows})) == method()


# --- inspect


def test_inspect_shows_what_files_are(call, files):
    code, out, err = call("inspect", *files)
    assert (code, err) == (0, "")
    for word in ("kohya", "diffusers", "peft", "2 text_encoder, 7 unet", "ada woman", "<ben> (10 embeddings, one per layer)", "rank 3"):
        assert word in out
    code, out, _ = call("inspect", *files, "--json")
    said = json.loads(out)
    reports, before = said["files"], said["merge"]
    assert before["verdict"] == "merge" and [one["check"] for one in before["findings"]] == ["layers"]
    assert [report["format"] for report in reports] == ["kohya", "diffusers", "peft"]
    assert reports[0]["layers"] == {"text_encoder": 2, "unet": 7} and reports[1]["tokens"] == {"<ben>": [10, 32]}
    assert reports[0]["path"] == str(files[0]) and len(reports[0]["sha256"]) == 64


def test_inspect_goes_on_after_a_bad_file(call, files, tmp_path):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\0" * 20)
    code, out, err = call("inspect", bad, files[0], tmp_path / "none.safetensors")
    assert code == 1 and "kohya" in out
    assert [line.split(":")[0] for line in err.splitlines()] == ["error", "error"] and "bad.safetensors" in err
    code, out, _ = call("inspect", bad, files[0], "--json")
    assert code == 1 and len(json.loads(out)["files"]) == 1


# --- merge


def test_merge_without_a_base(call, files, tmp_path):
    target = tmp_path / "all.safetensors"
    code, out, err = call("merge", *files, "--method", "sum", "--set", "scale=0.5", "--weight", "ben=0.25", "--output", target)
    assert (code, err) == (0, "")
    for word in ("sum, 3 adapters", "all layers 9", "ada ada woman 1", "ben <ben> 0.25", f"written: {target}", "all.tokens.safetensors"):
        assert word in out, word
    merged, sources = load_adapter(target), [load_adapter(file) for file in files]
    expected = 0.5 * sum(w * source.layers[KEYS[0]].delta() for w, source in zip((1, 0.25, 1), sources, strict=True))
    assert (merged.layers[KEYS[0]].delta() - expected).norm() < 1e-3 * expected.norm()
    assert json.loads((tmp_path / "all.safetensors.json").read_text())["inputs"][1]["weight"] == 0.25


def test_merge_weighs_blocks(call, files, tmp_path):
    target, words = tmp_path / "all.safetensors", ["--method", "concat", "--block-weights", "ada=0,0.5,2", "--weight", "ada=0.5"]
    assert call("merge", *files, *words, "--output", target)[0] == 0
    merged, (ada, *others) = load_adapter(target), [load_adapter(file) for file in files]
    expected = 0.25 * ada.layers[KEYS[0]].delta() + sum(other.layers[KEYS[0]].delta() for other in others)
    assert (merged.layers[KEYS[0]].delta() - expected).norm() < 1e-3 * expected.norm()
    assert not merged.layers[TEXT[0]].delta().any()
    receipt = json.loads((tmp_path / "all.safetensors.json").read_text())
    assert receipt["method"] == "sum" and receipt["inputs"][0]["block_weights"] == [0, 0.5, 2]
    assert "3 are needed" in error(call("merge", *files, *words[:3], "ada=1", "--output", tmp_path / "no.safetensors"))


def test_merge_with_a_base_shows_a_receipt_of_the_stages(call, model, base, tmp_path):
    paths = [
        save_adapter(concept(model, name, (*TEXT, *KEYS), rank=2, seed=seed, triggers=(f"{name} man",)), tmp_path / f"{name}.safetensors")
        for seed, name in enumerate(("dee", "eli"))
    ]
    code, out, err = call(
        "merge", *paths, "--base", base, "--output", tmp_path / "two.safetensors", "--dtype", "fp32", "--trigger", "eli=eli"
    )
    assert (code, err) == (0, "")
    for word in ("text encoder 2", "cross-attention keys and values 3", "held out", "dee dee man 1", "eli eli 1", "0 is the adapter's own"):
        assert word in out, word
    code, out, _ = call("merge", *paths, "--base", base, "--output", tmp_path / "three.safetensors", "--json", "--set", "ridge=0.1")
    receipt = json.loads(out)
    assert receipt["output"] == str(tmp_path / "three.safetensors") and receipt["tokens"] is None
    assert receipt["parameters"]["ridge"] == 0.1 and 0 < receipt["residual"]["fit"] < 2 and len(receipt["layers"]) == 5


@pytest.fixture
def prompts(tmp_path):
    """Files of prompts with and without a concept."""
    (tmp_path / "with.txt").write_text("a <TOK> on a table\n[close]\na {} in a box\n[held out]\na {} outside\n")
    (tmp_path / "without.txt").write_text("a vase\na cup\n")
    return tmp_path / "with.txt", tmp_path / "without.txt"


def test_merge_learns_from_prompts_of_files(call, model, base, prompts, tmp_path):
    paths = [
        save_adapter(concept(model, name, KEYS, rank=2, seed=seed, triggers=(f"{name} cup",)), tmp_path / f"{name}.safetensors")
        for seed, name in enumerate(("dee", "eli"))
    ]
    given, target = ("merge", *paths, "--base", base, "--json", "--output"), tmp_path / "two.safetensors"
    code, out, _ = call(*given, target, "--prompts", prompts[0], "--preserve", prompts[1])
    said = json.loads(out)["collection"]
    assert code == 0 and said["fit"] == ["a {} on a table", "a {} in a box"] and said["held_out"] == ["a {} outside"]
    assert said["preserve"] == ["", "a vase", "a cup"] and said["steps"] == 4
    assert json.loads(load_adapter(target).metadata["loraclr.receipt"])["collection"]["fit"] == said["fit"], "for who collects again"
    assert call("verify", target, *paths, "--base", base)[0] == 0
    out = call(*given, tmp_path / "three.safetensors", "--preserve", prompts[1], "--method", "custom-diffusion")[1]
    said = json.loads(out)["collection"]
    assert said["fit"] == ["photo of a {}", "{}"] and said["preserve"] == ["", "a vase", "a cup"]
    assert "fit" not in json.loads(load_adapter(tmp_path / "three.safetensors").metadata["loraclr.receipt"])["collection"]


def test_prompts_that_nobody_reads_are_refused(call, monkeypatch, base, files, prompts, tmp_path):
    monkeypatch.setattr(module("pipeline").Pipeline, "load", lambda *_, **__: pytest.fail("work was done"))

    def refused(*words):
        return error(call("merge", *files, "--base", base, "--output", tmp_path / "out.safetensors", *words))

    assert "sum learns from no prompts; leave it out, or add --measure" in refused("--method", "sum", "--prompts", prompts[0])
    assert "--quick: sum runs nothing that could be quicker; leave it out, or add --measure" in refused("--method", "sum", "--quick")
    assert "regmean with these parameters preserves no prompts" in refused("--method", "regmean", "--preserve", prompts[1])
    assert "preserves no prompts" in refused("--set", "preservation=0", "--preserve", prompts[1])
    assert "needs exactly one {}" in refused("--prompts", prompts[1])
    assert "to be without any concept" in refused("--preserve", prompts[0])
    assert "nowhere.txt" in refused("--prompts", tmp_path / "nowhere.txt")


def test_layers_whose_hinge_is_undecided_are_counted_apart():
    active, idle, undecided, without = (
        SimpleNamespace(status=status, diagnostics=notes)
        for status, notes in (("refined", {"hinge_active": 2}), ("optimal", {"hinge_active": 0}), ("undecided", {}), ("optimal", {}))
    )
    hinge = merge_command._hinge
    assert hinge([active, idle, idle]) == "1 of 3"
    assert hinge([active, idle, undecided]) == "1 of 2, 1 undecided"
    assert hinge([undecided]) == "1 undecided" and hinge([without]) == "-"


@pytest.mark.parametrize(
    ("format", "name"),
    [("kohya", "m.safetensors"), ("diffusers", "m.safetensors"), ("peft", "m"), ("edlora", "m.pth"), ("diff", "m.safetensors")],
)
def test_merge_writes_every_format(call, files, tmp_path, format, name):
    code, out, _ = call("merge", files[0], "--method", "average", "--format", format, "--output", tmp_path / name, "--json")
    assert code == 0 and json.loads(out)["output"] == str(tmp_path / name)
    assert loraclr.describe(tmp_path / name).format == ("kohya" if format == "diff" else format)


def test_merge_refuses_before_any_work(call, monkeypatch, files, tmp_path):
    def work(*_, **__):
        raise AssertionError("work was done")

    monkeypatch.setattr(module("merge"), "merge", work)
    monkeypatch.setattr(module("pipeline").Pipeline, "load", work)

    def refused(*words):
        return error(call("merge", *files, "--base", "x/y", *words))

    target = tmp_path / "out.safetensors"
    target.write_text("precious")
    assert "--force" in refused("--output", target)
    assert target.read_text() == "precious"
    beside = tmp_path / "new.safetensors.json"
    beside.write_text("precious")
    assert "new.safetensors.json exists" in refused("--output", tmp_path / "new.safetensors")
    assert "make it first" in refused("--output", tmp_path / "no" / "out.safetensors")
    assert "end its name in .safetensors" in refused("--output", tmp_path / "out.pth")
    assert "a folder" in refused("--output", tmp_path / "new2.safetensors", "--format", "peft")
    fresh = ("--output", tmp_path / "fresh.safetensors")
    assert "did you mean 'ada'" in refused(*fresh, "--weight", "adda=1")
    assert "no method 'nope'" in refused(*fresh, "--method", "nope")
    assert "no parameter 'rigde'. Did you mean 'ridge'?" in refused(*fresh, "--set", "rigde=1")
    assert "ridge='x' must be" in refused(*fresh, "--set", "ridge=x")
    assert "NAME=VALUE" in refused(*fresh, "--trigger", "ada")
    assert not (tmp_path / "fresh.safetensors").exists()


def test_force_replaces(call, files, tmp_path):
    target = tmp_path / "out.safetensors"
    target.write_text("old")
    assert call("merge", files[0], "--method", "sum", "--output", target, "--force")[0] == 0
    assert loraclr.describe(target).format == "kohya"


def test_merge_errors_of_the_inputs(call, files, tmp_path):
    target = tmp_path / "out.safetensors"
    assert "no such file" in error(call("merge", tmp_path / "nowhere.safetensors", "--method", "sum", "--output", target))
    assert "needs the base" in error(call("merge", *files, "--output", target))
    assert "two adapters are called 'ada'" in error(call("merge", files[0], files[0], "--method", "sum", "--output", target))
    assert "trigger was given for 'eve'" in error(call("merge", *files, "--method", "sum", "--output", target, "--trigger", "eve=x"))
    assert "no folder" in error(call("merge", *files, "--base", tmp_path / "none", "--output", target))
    assert not target.exists()


# --- convert


@pytest.mark.parametrize(("to", "name"), [("kohya", "ben-kohya.safetensors"), ("peft", "ben-peft"), ("edlora", "ben-edlora.pth")])
def test_convert_keeps_every_change_and_the_tokens(to, name, call, files, tmp_path):
    code, out, err = call("convert", files[1], "--to", to, "--dtype", "fp32")
    assert (code, err) == (0, "")
    assert out.startswith(f"written: {tmp_path / name}") and ("tokens:" in out) == (to != "edlora")
    before, after = load_adapter(files[1]), load_adapter(tmp_path / name)
    assert list(after.layers) == list(before.layers) and after.triggers == before.triggers
    assert all(torch.allclose(after.layers[layer].delta(), before.layers[layer].delta(), atol=1e-6) for layer in before.layers)
    assert (
        all(torch.equal(after.tokens[token], rows) for token, rows in before.tokens.items()) and after.tokens.keys() == before.tokens.keys()
    )


def test_convert_to_a_rank_says_what_it_costs(call, files, tmp_path):
    tensors = {f"lora_unet_{name.removeprefix('unet.').replace('.', '_')}.diff": torch.diag(torch.tensor([2.0, 1.0, 0.0])) for name in KEYS}
    (tmp_path / "full.safetensors").write_bytes(safetensors_bytes(tensors, {}))
    words = ("convert", tmp_path / "full.safetensors", "--to", "diffusers", "--output", tmp_path / "low.safetensors")
    assert "is a dense change, which diffusers cannot load" in error(call(*words))
    code, _, err = call(*words, "--rank", 1)
    assert code == 0 and f"{len(KEYS)} of {len(KEYS)} layers were cut to rank 1" in err and "44.7% of its change" in err  # sqrt(1 / 5)
    assert all(torch.allclose(layer.delta(), torch.diag(torch.tensor([2.0, 0, 0])), atol=1e-3) for layer in load_adapter(words[-1]))
    said = json.loads(call(*words, "--rank", 2, "--force", "--json")[1])
    assert (said["layers"], said["dense"], said["tokens"]) == (len(KEYS), 0, None) and max(said["lost"].values()) < 1e-12
    code, _, err = call("convert", tmp_path / "full.safetensors", "--to", "kohya")
    assert code == 0 and f"{len(KEYS)} of {len(KEYS)} layers have full rank" in err


def test_convert_works_a_dora_out_on_its_base(call, base, model, tmp_path):
    name = KEYS[0]
    stem, weight = f"lora_unet_{name.removeprefix('unet.').replace('.', '_')}", model.base_weight(name)
    parts = {"lora_down.weight": torch.zeros(1, weight.shape[1]), "lora_up.weight": torch.zeros(len(weight), 1)}
    parts["dora_scale"] = 3 * weight.norm(dim=1, keepdim=True)
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes({f"{stem}.{part}": tensor for part, tensor in parts.items()}, {}))
    words = ("convert", tmp_path / "a.safetensors", "--to", "kohya", "--output", tmp_path / "b.safetensors", "--dtype", "fp32")
    assert "pass the base model it is for (base=, or --base)" in error(call(*words))
    assert call(*words, "--base", base)[0] == 0
    torch.testing.assert_close(load_adapter(tmp_path / "b.safetensors").layers[name].delta(), 2 * weight)


def test_convert_replaces_nothing_unasked(call, files, tmp_path):
    words = ("convert", files[0], "--to", "diffusers", "--output")
    assert "no such file" in error(call("convert", tmp_path / "nowhere" / "a.pth", "--to", "kohya"))
    assert "end its name in .safetensors" in error(call(*words, tmp_path / "a.pth"))
    assert "there is no folder" in error(call(*words, tmp_path / "no" / "a.safetensors"))
    assert "exists already" in error(call(*words, files[1]))
    assert "is the file to convert" in error(call(*words, files[0], "--force"))
    assert call(*words, tmp_path / "a.safetensors")[0] == 0 and call(*words, tmp_path / "a.safetensors", "--force")[0] == 0
    (tmp_path / "b.tokens.safetensors").write_bytes(b"of something else")
    assert "b.tokens.safetensors exists already" in error(call(*words, tmp_path / "b.safetensors"))


def test_merge_and_generate_read_what_needs_the_base(call, base, model, tmp_path):
    """A rotation alone is refused, and read where a base is given."""
    name = KEYS[0]
    stem, out = f"lora_unet_{name.removeprefix('unet.').replace('.', '_')}", len(model.base_weight(name))
    blocks = {f"{stem}.oft_blocks": torch.randn(out // 4, 4, 4)}
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(blocks, {"modelspec.trigger_phrase": "ada"}))
    words = ("merge", tmp_path / "a.safetensors", "--method", "sum", "--output", tmp_path / "b.safetensors")
    assert "OFT / BOFT rotation" in error(call(*words))
    assert call(*words, "--base", base)[0] == 0
    picture = ("generate", "--base", base, "--prompt", "ada", "--output", tmp_path, "--steps", 1, "--lora", tmp_path / "a.safetensors")
    assert call(*picture)[0] == 0


def test_convert_makes_models_with_the_base(call, base, model, tmp_path):
    cai = save_adapter(three(model)[2], tmp_path / "cai.safetensors")
    assert "--to checkpoint is the base model with the adapter in it" in error(call("convert", cai, "--to", "checkpoint"))
    code, out, err = call("convert", cai, "--to", "fused", "--base", base)
    assert (code, err) == (0, "") and out == f"written: {tmp_path / 'cai-fused'}"
    fused = Pipeline.load(tmp_path / "cai-fused")
    for name in KEYS:
        expected = model.base_weight(name) + load_adapter(cai).layers[name].delta()
        assert (fused.base_weight(name) - expected).norm() < 1e-3 * expected.norm()


# --- inspect several, verify


def test_inspect_advises_and_fails_where_merge_refuses(call, model, base, files, tmp_path):
    code, out, _ = call("inspect", *files, "--base", base, "--rank", 1, "--trigger", "cai=ada")
    assert code == 0
    for word in ("AutoV2", "share the word 'ada'", "expected loss at rank 1", "verdict: merge with care"):
        assert word in out, word
    fast = save_adapter(three(model)[0], tmp_path / "lcm-lora.safetensors")
    words = (files[0], fast)
    code, out, _ = call("inspect", *words)
    assert code == 1 and "verdict: do not merge" in out
    target = tmp_path / "x.safetensors"
    assert "--allow distilled" in error(call("merge", *words, "--method", "sum", "--output", target))
    assert call("inspect", *words, "--allow", "distilled")[0] == 0
    code, _, err = call("merge", *words, "--method", "sum", "--output", target, "--allow", "distilled", "--no-sources")
    assert code == 0 and "warning: lcm-lora" in err
    assert not load_adapter(target).metadata.keys() & {"modelspec.merged_from", "loraclr.receipt"}


def test_verify_tells_a_good_merge_from_a_weak_one(call, base, files, tmp_path):
    good, weak = tmp_path / "good.safetensors", tmp_path / "weak.safetensors"
    assert call("merge", *files, "--method", "sum", "--output", good)[0] == 0
    assert call("merge", *files, "--method", "average", "--output", weak)[0] == 0
    code, out, err = call("verify", good, *files)
    assert (code, err) == (0, "") and "by weights" in out and out.endswith("good")
    code, out, _ = call("verify", weak, *files, "--json")
    said = json.loads(out)
    assert code == 1 and not said["good"] and [round(one["strength"], 2) for one in said["concepts"]] == [0.33] * 3
    assert call("verify", weak, *files, *(word for name in ("ada", "ben", "cai") for word in ("--weight", f"{name}=0.333")))[0] == 0


# --- generate


def test_generate_draws_prompts_times_seeds(call, base, files, tmp_path):
    folder = tmp_path / "new" / "pictures"
    words = ["--base", base, "--prompt", "a <ben> at home", "--prompt", "a dog!", "--seed", 1, "--seed", 2, "--seed", 1, "--steps", 2]
    code, out, err = call("generate", *words, "--lora", files[1], "--lora", f"{files[0]}:0.5", "--output", folder)
    assert (code, err) == (0, "")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["01-a-ben-at-home-1.png", "01-a-ben-at-home-2.png", "02-a-dog-1.png", "02-a-dog-2.png"]
    assert all(str(folder / name) in out.replace(" ", "") for name in names)
    with Image.open(folder / names[1]) as picture:
        settings = json.loads(picture.text["loraclr"])
    assert settings["prompt"] == "a <ben> at home" and settings["seed"] == 2 and settings["steps"] == 2
    assert settings["adapters"] == [{"name": "ben", "scale": 1.0}, {"name": "ada", "scale": 0.5}]

    kept = (folder / names[0]).read_bytes()
    said = error(call("generate", *words, "--lora", files[1], "--output", folder))
    assert "01-a-ben-at-home-1.png" in said and "--force" in said
    assert (folder / names[0]).read_bytes() == kept


def test_an_interrupted_picture_is_not_there(call, monkeypatch, base, tmp_path):
    def half(picture, path, **_):
        Path(path).write_bytes(b"half a picture")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", half)
    folder = tmp_path / "out"
    assert call("generate", "--base", base, "--prompt", "a dog", "--steps", 1, "--output", folder)[0] == 130
    assert list(folder.iterdir()) == []


def test_generate_regions_and_json(call, base, tmp_path):
    words = ["--base", base, "--prompt", "two people", "--steps", 1, "--size", "16x32", "--output", tmp_path, "--json"]
    code, out, _ = call("generate", *words, "--region", "a man|blurry|0,0,16,16", "--region", "a dog|0,0.5,1,1", "--negative", "bad")
    assert code == 0
    (record,) = json.loads(out)
    assert record["file"] == str(tmp_path / "01-two-people-0.png") and record["size"] == [16, 32] and record["negative"] == "bad"
    assert [region["box"] for region in record["regions"]] == [[0, 0, 1, 0.5], [0, 0.5, 1, 1]]
    assert Image.open(record["file"]).size == (32, 16)
    assert call("generate", *words, "--force")[0] == 0


@pytest.fixture
def drawn(call, base, files, tmp_path) -> Path:
    """One picture with an adapter, a region, a T2I-Adapter, and a precision and settings that are nobody's defaults."""
    from diffusers import T2IAdapter

    T2IAdapter(in_channels=3, channels=(32, 64, 64), num_res_blocks=1, downscale_factor=2).save_pretrained(tmp_path / "pose")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    words = ["--prompt", "a <ben>", "--lora", f"{files[1]}:0.5", "--negative", "bad", "--region", "a man|blurry|0,0,1,0.5", "--seed", 7]
    words += ["--steps", 2, "--guidance", 3, "--size", "16x32", "--base-dtype", "bf16"]
    words += ["--adapter", f"{tmp_path / 'pose'}|{tmp_path / 'red.png'}|0.5"]
    assert call("generate", "--base", base, *words, "--output", tmp_path / "first")[0] == 0
    (path,) = (tmp_path / "first").iterdir()
    return path


def test_a_picture_is_drawn_again_from_itself(call, drawn, tmp_path):
    assert call("generate", "--from", drawn, "--output", tmp_path / "again")[0] == 0
    with Image.open(drawn) as one, Image.open(tmp_path / "again" / drawn.name) as other:
        assert one.tobytes() == other.tobytes() and one.text == other.text
    assert call("generate", "--from", drawn, "--output", tmp_path / "changed", "--seed", 8, "--steps", 1, "--base-dtype", "fp32")[0] == 0
    (changed,) = (tmp_path / "changed").iterdir()
    with Image.open(changed) as picture:
        settings = json.loads(picture.text["loraclr"])
    assert (settings["seed"], settings["steps"], settings["guidance"], settings["prompt"]) == (8, 1, 3.0, "a <ben>")
    assert settings["dtype"] == "float32"


def test_a_picture_whose_files_are_gone_or_others_is_not_drawn_again(call, drawn, files, tmp_path):
    words = ("generate", "--from", drawn, "--output", tmp_path / "again")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "red.png")
    files[1].unlink()
    said = error(call(*words))
    assert "ben.safetensors is not there any more; give --lora" in said
    assert "red.png is not the file that" in said and "give --adapter" in said
    assert "holds no settings" in error(call("generate", "--from", tmp_path / "red.png", "--output", tmp_path / "again"))
    info = PngInfo()
    info.add_text("loraclr", json.dumps({**dict.fromkeys(("prompt", "seed", "steps", "guidance", "negative", "base"), 1), "size": 3}))
    Image.new("RGB", (8, 8)).save(tmp_path / "odd.png", pnginfo=info)
    assert "not of the form" in error(call("generate", "--from", tmp_path / "odd.png", "--output", tmp_path / "again"))
    assert "--base and --prompt, or --from" in error(call("generate", "--output", tmp_path / "again"))


def test_generate_with_a_strategy(call, base, files, tmp_path):
    words = ["generate", "--base", base, "--prompt", "an ada woman and a <ben>", "--lora", files[0], "--lora", files[1], "--steps", 1]
    said = error(call(*words, "--strategy", "omg", "--output", tmp_path / "out"))
    assert "what kind of thing is ben" in said and "--class ben=WORDS" in said
    code, out, _ = call(*words, "--strategy", "omg", "--class", "ben=man", "--output", tmp_path / "out", "--json")
    (record,) = json.loads(out)
    assert code == 0 and record["strategy"] == {"name": "omg", "start": 0.3, "threshold": 0.3}
    assert [adapter["noun"] for adapter in record["adapters"]] == ["woman", "man"]
    assert call("generate", "--from", record["file"], "--output", tmp_path / "again")[0] == 0
    with Image.open(record["file"]) as one, Image.open(tmp_path / "again" / Path(record["file"]).name) as other:
        assert one.tobytes() == other.tobytes()
    assert "--class is for --strategy" in error(call(*words, "--class", "ben=man", "--output", tmp_path / "new"))
    assert "leave --offload out" in error(call(*words, "--strategy", "omg", "--offload", "--output", tmp_path / "new"))
    assert call(*words, "--strategy", "none", "--output", tmp_path / "new")[0] == 2


def test_generate_refuses(call, base, files, tmp_path):
    words = ["generate", "--base", base, "--prompt", "a dog", "--output", tmp_path / "out"]
    assert "HEIGHTxWIDTH" in error(call(*words, "--size", "big"))
    assert "multiples" in error(call(*words, "--size", "15x16"))
    assert "0 steps" in error(call(*words, "--steps", 0))
    assert "no such file" in error(call(*words, "--lora", tmp_path / "none.safetensors"))
    assert "not a number" in error(call(*words, "--lora", f"{files[0]}:strong"))
    assert "four" in error(call(*words, "--region", "a man|0,0,1"))
    assert "MODEL|IMAGE" in error(call(*words, "--control", "model"))
    assert "there is no picture" in error(call(*words, "--control", f"model|{tmp_path / 'none.png'}"))
    assert "not a picture that can be read" in error(call(*words, "--adapter", f"model|{files[0]}"))
    assert "no folder" in error(call("generate", "--base", tmp_path / "none", "--prompt", "a", "--output", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# --- methods, toybox, demo


def test_methods_lists_everything(call):
    code, out, _ = call("methods")
    assert code == 0
    assert all(method.name in out and row.name in out for method in METHODS.values() for row in parameters(method))
    assert ":exact" in out and "[zero, mean]" in out
    code, out, _ = call("methods", "--json")
    listed = json.loads(out)
    assert [method["name"] for method in listed] == list(METHODS)
    assert listed[0]["presets"]["exact"]["penalty"] == 1e-3 and listed[0]["parameters"][0]["name"] == "ridge"


def test_methods_writes_its_docs(call, tmp_path):
    """The page and the table in this source are what the code says now."""
    root = Path(__file__).parent.parent
    (tmp_path / "docs").mkdir()
    readme = (root / "README.md").read_text()
    (tmp_path / "README.md").write_text(readme)
    assert call("methods", "--markdown", tmp_path)[0] == 0
    assert (tmp_path / "README.md").read_text() == readme, "run `make docs`"
    assert (tmp_path / "docs" / "methods.md").read_text() == (root / "docs" / "methods.md").read_text(), "run `make docs`"
    start, end = (readme.index(mark) for mark in describe.MARKS)
    (tmp_path / "README.md").write_text(readme[:start] + describe.MARKS[0] + "old\n" + readme[end:])
    assert call("methods", "--markdown", tmp_path)[0] == 0 and (tmp_path / "README.md").read_text() == readme
    (tmp_path / "README.md").write_text("# another project\n")
    assert "is not this package's source" in error(call("methods", "--markdown", tmp_path))
    assert (tmp_path / "README.md").read_text() == "# another project\n"


def test_every_method_has_the_same_five_lines():
    sections = describe.page().split("\n## ")[1:]
    assert [section.split("`")[1] for section in sections] == list(METHODS)
    for section, method in zip(sections, METHODS.values(), strict=True):
        lines = [line for line in section.splitlines() if line.startswith("- **")]
        assert [line.split("**")[1] for line in lines] == ["Idea:", "When:", "Inputs:", "Parameters:", "Source:"]
        assert method.reference in lines[4] and all(row.name in lines[3] for row in parameters(method))


def test_methods_describes_one(call, monkeypatch):
    code, out, _ = call("methods", "svd")
    assert code == 0 and "Eckart-Young" in out and "loraclr-reference" not in out
    assert call("methods", "loraclr:exact")[0] == 0
    assert "sum, also concat, task-arithmetic" in call("methods", "concat")[1]
    monkeypatch.setattr(methods_command.show.out, "_width", 200)
    assert "as loading all adapters at once; also concat, task-arithmetic no" in call("methods")[1], "where a user of PEFT looks for it"
    assert "| `sum` (also `concat`, `task-arithmetic`) | weighted sum" in describe.table()
    assert "Did you mean 'average'?" in error(call("methods", "averige"))


def test_toybox_export_and_demo_call_one_function_each(call, monkeypatch, tmp_path):
    asked = []

    class Box:
        def export(self, folder, split):
            asked.append((folder, split))
            return folder

    monkeypatch.setattr(module("toybox"), "open_toybox", Box)
    assert call("toybox", "export", tmp_path / "toy", "--split", "test")[:2] == (0, f"written: {tmp_path / 'toy'}")
    assert call("toybox", "export", tmp_path / "toy", "--split", "train")[0] == 2
    code, out, _ = call("toybox", "export", tmp_path / "toy", "--json")
    assert code == 0 and json.loads(out)["base"] == str(tmp_path / "toy" / "base")
    made = toybox_demo.Demonstration(Path("demo/report.html"), Path("demo/merged.safetensors"), {"loraclr": {"identity": 0.5}}, 1.0)
    monkeypatch.setattr(toybox_demo, "run_demo", lambda output, console: asked.append(output) or made)
    assert call("demo", "--output", tmp_path / "here")[0] == 0
    assert call("demo")[0] == 0
    assert json.loads(call("demo", "--json")[1])["scores"] == {"loraclr": {"identity": 0.5}}
    toy = tmp_path / "toy"
    assert asked == [(toy, "test"), (toy, "development"), tmp_path / "here", Path("demo"), Path("demo")]
