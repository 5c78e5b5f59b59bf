"""The bundled world is what it says, and its scores are what a hand computes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

from loraclr.errors import UsageError
from loraclr.formats import describe, load_adapter
from loraclr.toybox import SPLITS, Toybox, open_toybox
from loraclr.toybox.judge import Judge, agreement, nearest_identity
from loraclr.toybox.score import SCORE_TEMPLATES, score

HEADS = {"hair": ("bob", "bun"), "skin": ("pale", "dark", "tan")}


@pytest.fixture(scope="module")
def box() -> Toybox:
    return open_toybox()


def test_what_ships_is_at_most_45_mib(box):
    assert sum(path.stat().st_size for path in box.data.rglob("*") if path.is_file()) <= 45 * 2**20


def test_concepts_are_30_and_the_splits_do_not_overlap(box):
    names = {split: box.names(split) for split in SPLITS}
    assert [len(found) for found in names.values()] == [12, 12, 4, 2] and len({name for found in names.values() for name in found}) == 30
    with pytest.raises(UsageError, match=r"the splits are development, test, objects, styles"):
        box.names("validation")


def test_each_set_of_people_has_close_pairs_and_people_who_are_far_from_all(box):
    for split in ("development", "test"):
        people = [box.concepts[name].attributes for name in box.names(split)]
        apart = [min(sum(a[key] != b[key] for key in a) for b in people if b is not a) for a in people]
        assert apart.count(1) == 6 and max(apart) >= 3 and 0 not in apart


def test_objects_and_styles_have_no_attributes_and_one_adapter_each(box):
    assert {box.concepts[name].noun for name in box.names("objects")} == {"cat", "chair", "vase", "monument"}
    for split in ("objects", "styles"):
        assert all(not box.concepts[name].attributes for name in box.names(split)) and len(box.adapter_paths(split)) == len(
            box.names(split)
        )


@pytest.mark.parametrize("split", ["development", "test"])
def test_adapters_come_in_the_formats_of_the_wild(box, split):
    reports = [describe(path) for path in box.adapter_paths(split).values()]
    formats = [report.format for report in reports]
    assert formats.count("edlora") >= 3 and formats.count("kohya") >= 3 and formats.count("diffusers") >= 2
    adapters = {name: load_adapter(path) for name, path in box.adapter_paths(split).items()}
    assert sum("text_encoder" in adapter.components for adapter in adapters.values()) >= 6
    assert any(layer.scale != 1 for adapter in adapters.values() for layer in adapter if hasattr(layer, "scale"))
    for name, adapter in adapters.items():
        assert (tuple(adapter.tokens) == (f"<{name}1>", f"<{name}2>")) or adapter.triggers == (f"{name} {box.concepts[name].noun}",)


def test_triggers_are_single_reserved_words_of_the_tokenizer(box):
    pipeline = box.load()
    for name in box.concepts:
        assert pipeline.token_count(name) == 3  # begin, the word, end


def test_every_adapter_fits_the_base(box):
    pipeline = box.load()
    for split in SPLITS:
        for path in box.adapter_paths(split).values():
            with pipeline.applied(load_adapter(path)):
                pass


def test_references_are_16_pictures(box):
    pictures = box.references("rhea")
    assert len(pictures) == 16 and all(picture.size == (64, 64) for picture in pictures)
    assert len({hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures}) == 16


def test_the_judge_reads_the_references(box):
    """Real renders of identities that it never saw: most attributes must be right, or no score means anything."""
    names = box.names("development")
    pictures = [picture for name in names for picture in box.references(name)[:8]]
    truth = [box.concepts[name].attributes for name in names for _ in range(8)]
    assert float(agreement(box.judge.read(pictures), truth, box.judge.heads).mean()) > 0.85


def test_export_writes_ordinary_files_and_refuses_a_full_folder(box, tmp_path):
    target = box.export(tmp_path / "toybox", "test")
    assert (target / "base" / "model_index.json").exists()
    assert len(list((target / "loras").iterdir())) == 12
    assert (target / "prompts.txt").read_bytes() == box.prompts_path.read_bytes()
    assert all(len(list(folder.iterdir())) == 16 for folder in (target / "references").iterdir())
    with pytest.raises(UsageError, match="not an empty folder"):
        box.export(target)


def test_scoring_prompts_are_not_the_merge_s_own():
    from loraclr.collect import CHOOSING_TEMPLATES, FIT_TEMPLATES, HELD_OUT_TEMPLATES, PRESERVE_PROMPTS

    used = {*FIT_TEMPLATES, *CHOOSING_TEMPLATES, *PRESERVE_PROMPTS}
    assert not used & {template for template, _ in SCORE_TEMPLATES}
    assert set(HELD_OUT_TEMPLATES) <= set(CHOOSING_TEMPLATES) and not set(CHOOSING_TEMPLATES) & {*FIT_TEMPLATES, *PRESERVE_PROMPTS}


def test_what_is_preserved_has_two_people_in_one_picture_with_quick_too():
    """Without them a merge loses the second person of a prompt."""
    from loraclr.collect import PRESERVE_PROMPTS, QUICK

    several = [prompt for prompt in PRESERVE_PROMPTS if "on the left and" in prompt]
    assert len(several) == 2 and several[0] in PRESERVE_PROMPTS[: QUICK.spatial_preserve]
    assert not any("forest" in prompt for prompt in several), "which scenes are judged by"


def test_the_protocol_has_twenty_prompts_in_four_groups_of_words_that_the_base_knows(box):
    from loraclr.collect import CHOOSING_TEMPLATES, FIT_TEMPLATES
    from loraclr.evaluate import read_prompts

    prompts = read_prompts(box.prompts_path)
    assert Counter(prompts.values()) == {"context": 5, "style": 5, "interaction": 5, "state": 5}
    assert not set(prompts) & {*FIT_TEMPLATES, *CHOOSING_TEMPLATES, *(template for template, _ in SCORE_TEMPLATES)}
    tokenizer = CLIPTokenizer.from_pretrained(box.base_path / "tokenizer")
    assert all(tokenizer.tokenize(word) == [f"{word}</w>"] for prompt in prompts for word in prompt.replace("{}", "").split())


def test_agreement_counts_told_attributes_only():
    read = {"hair": torch.tensor([[0.9, 0.1], [0.2, 0.8]]), "skin": torch.tensor([[0.1, 0.8, 0.1], [0.6, 0.3, 0.1]])}
    shares = agreement(read, [{"hair": "bob", "skin": "pale"}, {"hair": "bun"}], HEADS)
    assert shares.tolist() == [0.5, 1.0]


def test_nearest_identity_takes_the_joint_probability():
    read = {"hair": torch.tensor([[0.6, 0.4]]), "skin": torch.tensor([[0.1, 0.9, 0.0]])}
    people = [{"hair": "bob", "skin": "pale"}, {"hair": "bun", "skin": "dark"}]
    assert nearest_identity(read, people, HEADS).tolist() == [1]  # .4 x .9 against .6 x .1


def test_judge_file_round_trip(tmp_path):
    from safetensors.torch import save_file

    judge = Judge(HEADS, width=32).eval()
    save_file(
        {key: value.contiguous() for key, value in judge.state_dict().items()},
        tmp_path / "judge.safetensors",
        metadata={"heads": json.dumps(HEADS)},
    )
    picture = Image.effect_noise((64, 64), 60).convert("RGB")
    again = Judge.load(tmp_path / "judge.safetensors").read([picture])
    for name, probabilities in judge.read([picture]).items():
        assert torch.equal(probabilities, again[name]) and float(probabilities.sum()) == pytest.approx(1)


def test_scores_name_the_right_person(box):
    name = box.names("development")[0]
    scores = score(
        box.references(name)[:4],
        [name] * 4,
        [{}] * 4,
        judge=box.judge,
        candidates={one: box.concepts[one].attributes for one in box.names("development")},
    )
    assert float(scores.named.mean()) >= 0.75 and bool(scores.told.isnan().all())


def test_the_page_is_one_file_with_everything_in_it(box, tmp_path):
    from loraclr.merge import merge
    from loraclr.toybox.report import Report, write_report

    names = box.names()[:2]
    paths = [box.adapter_paths()[name] for name in names]
    merges = {label: merge(paths, method="average") for label in ("loraclr", "average")}
    pictures = [box.references(name)[k] for name in names for k in range(2)]
    read = {"people": [name for name in names for _ in range(2)], "told": [{}] * 4}
    candidates = {name: box.concepts[name].attributes for name in names}
    scores = score(pictures, read["people"], read["told"], judge=box.judge, candidates=candidates)
    page = write_report(
        Report(
            split="development",
            names=names,
            calls={name: f"<{name}>" for name in names},
            files={name: path.name for name, path in zip(names, paths, strict=True)},
            references={name: box.references(name) for name in names},
            portraits={"single": pictures, "loraclr": pictures, "average": pictures},
            templates=["a {}", "a {} & b"],
            scenes={"loraclr": pictures[:1]},
            scene_captions=["both"],
            scores={"loraclr": scores},
            merges=merges,
            merged_file=merges["loraclr"].save(tmp_path / "merged.safetensors"),
            seconds=1.0,
        ),
        tmp_path / "report.html",
    ).read_text()
    assert page.count("data:image/webp;base64,") == 2 + 2 * (2 + 3 * 2) + 1  # hero, references and three columns a row, one scene
    assert "http" not in page and "$" not in page and "&lt;rhea&gt;" in page and "a {} &amp; b" in page
    assert f"{float(scores.identity.mean()):.2f}" in page
