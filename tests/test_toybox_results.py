"""The tables of tools/toybox: which rows there are, what is paired with what, what is written where."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools" / "toybox"


@pytest.fixture(autouse=True)
def _tools(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(TOOLS)):
            del sys.modules[name]


def row(kind, values, *, concepts=("a", "b"), seeds=1, recipe="edlora", **notes):
    """Two prompts a concept; the same values for every measure."""
    shared = {name: list(values) for name in ("text", "image", "identity", "attributes", "leakage")}
    return {"kind": kind, "recipe": recipe, "concepts": list(concepts), "prompts": 2, "seeds": seeds, "values": shared, **notes}


def test_every_entry_is_drawn_beside_its_adapters_alone_and_the_controls_once():
    import results

    rows = results.rows(results.TABLE)
    assert {entry.recipe for entry in results.TABLE.values()} == {
        label.removeprefix("alone, ") for label, (kind, _) in rows.items() if kind == "alone"
    }
    assert [label for label, (kind, _) in rows.items() if kind == "base"] == ["base, class word"]
    assert [label for label, (kind, _) in rows.items() if kind == "merged"] == list(results.TABLE)
    assert all(len(entry.paper) in (0, 6) for entry in results.TABLE.values())


def test_subsets_are_nested_and_differ_between_orders():
    import results

    names = [f"n{k}" for k in range(12)]
    entries = results.counts(names)
    for number, order in enumerate(results.orders(names)):
        sets = [*(entries[f"{count} concepts, order {number}, loraclr"].names for count in (2, 5, 8)), tuple(order)]
        assert [len(one) for one in sets] == [2, 5, 8, 12] and set(sets[-1]) == set(names)
        assert all(later[: len(earlier)] == earlier for earlier, later in itertools.pairwise(sets))
    assert len({entries[f"2 concepts, order {number}, loraclr"].names for number in range(3)}) == 3


def test_all_twelve_of_the_counts_are_rows_of_the_table():
    import report
    import results

    assert all(results.TABLE[name].method == method and results.TABLE[name].recipe == "edlora" for method, name in results.WHOLE.items())
    concepts = ("a", "b", "c")
    pair = results.orders(concepts)[0][:2]
    alone = row("alone", [1.0] * 6, concepts=concepts)
    table = {"alone, edlora": alone, "loraclr (ours)": row("merged", [0.4] * 6, concepts=concepts)}
    known = {"alone, edlora": alone, "2 concepts, order 0, loraclr": row("merged", [0.9] * 4, concepts=pair)}
    *_, two, three = report.counts(known, table).splitlines()
    assert two == "| 2 | loraclr | -0.100 | -0.100 | -0.100 | -0.100 | -0.100 |" and three.startswith("| 3 | loraclr | -0.600 |")


def test_contrast_is_drawn_once_where_it_does_nothing():
    import claims
    import results

    entries = results.margins([f"n{k}" for k in range(12)])
    assert sum(not entry.parameters["penalty"] for entry in entries.values()) == 2 and len(entries) == 22
    assert all(entry.parameters.get("margin", 1) for entry in entries.values())
    assert claims.USUAL in entries


def test_a_difference_is_of_the_same_pictures():
    import rows

    alone = row("alone", [1.0, 0.0, 0.5, 0.5], concepts=("a", "b"))
    merged = row("merged", [0.5, 0.25], concepts=("b",))  # a subset: b's pictures only
    found = rows.difference(merged, alone, "identity")
    assert found.mean == pytest.approx((0.5 - 0.5 + 0.25 - 0.5) / 2) and found.count == 2
    more = row("merged", [1.0, 9.0, 1.0, 9.0], concepts=("a",), seeds=2)  # of its seeds, only those that both have
    assert rows.difference(more, alone, "identity").mean == pytest.approx((1.0 - 1.0 + 1.0 - 0.0) / 2)


def test_rows_drawn_anew_must_lie_within_the_committed_intervals():
    import report

    known = {"x": row("merged", [0.0, 1.0, 0.0, 1.0])}
    assert report.apart(known, {"x": row("merged", [0.5, 0.5, 0.5, 0.5])}) == []
    (problem, *_) = report.apart({"x": row("merged", [0.5, 0.5, 0.5, 0.5])}, {"x": row("merged", [0.5, 0.5, 0.5, 0.6])})
    assert "x: text 0.525" in problem
    assert report.apart(known, {"y": known["x"]}) == ["y: not among the committed rows"]


@pytest.mark.parametrize(
    ("merged", "expected"), [([1.0] * 4, "reproduced"), ([0.0, 0.5] * 2, "**not reproduced**"), ([0.1, 1.7] * 2, "undecided")]
)
def test_a_claim_is_judged_by_its_interval(merged, expected):
    import claims

    table = {"alone, edlora": row("alone", [1.0] * 4), claims.PAPER: row("merged", merged)}
    found, judged = claims.kept(claims.PAPER, "identity", "+.029")(claims.Evidence(table, {}))
    assert judged == expected and "published +.029" in found


def test_what_is_best_is_told_beside_the_next():
    import claims

    table = {name: row("merged", [value] * 4) for name, value in ((claims.PAPER, 0.7), (claims.FUSION, 0.8), ("P+", 0.2))}
    found, judged = claims.highest("identity")(claims.Evidence(table, {}))
    assert found.startswith(".700; MoS (gradient fusion) .800, apart -.100 (") and judged == "**not reproduced**"
    table[claims.PAPER] = row("merged", [0.9] * 4)
    assert claims.highest("image")(claims.Evidence(table, {}))[1] == "reproduced"


def test_tables_are_written_between_their_marks_and_nowhere_else(tmp_path, monkeypatch):
    import report
    import results

    name = next(iter(results.TABLE))
    recipe = results.TABLE[name].recipe
    known = {
        f"alone, {recipe}": row("alone", [1, 1, 1, 1], recipe=recipe),
        name: row("merged", [1, 0, 1, 1], recipe=recipe, merge_seconds=2),
    }
    (tmp_path / "table1.json").write_text(json.dumps(known))
    page = tmp_path / "results.md"
    page.write_text("".join(f"<!-- {mark} -->\nold\n<!-- end of {mark} -->\nkept\n" for mark in ("table1", "controls", "paper", "claims")))
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path), str(page)])
    report.main()
    text = page.read_text()
    assert "old" not in text and text.count("kept\n") == 4 and f"| {name} | {recipe} | 1.000, .750 | -.250 (" in text
    assert "is not drawn yet | open |" in text and "| people prefer it: 3.42 against 2.41 | Table 2 |" in text
    page.write_text("nothing to write to\n")
    with pytest.raises(SystemExit, match="table1"):
        report.main()
    assert page.read_text() == "nothing to write to\n"


def test_a_scene_is_read_box_by_box(tmp_path):
    import scenes

    from loraclr.toybox import open_toybox

    box = open_toybox()
    cast = scenes.Cast(box, box.names("test"))
    assert cast.call(cast.names[0]).startswith("a") and cast.names[0] not in cast.call(cast.names[0])
    (row,) = scenes.rows(box.load(), cast, [2], 2, tmp_path)
    assert row["people"] == 2 and len(row["each"]) == 2 and 0 <= row["all present"] <= row["present"] <= row["present anywhere"] <= 1
    assert len(list(tmp_path.iterdir())) == 2
    chosen, image = scenes.draw(box.load(), cast, 2, 0)
    table = scenes.read(box.judge, box, chosen, image)
    swapped = scenes.read(box.judge, box, chosen[::-1], image)
    assert table.shape == (2, 2) and (swapped == table.flip(1)).all()  # boxes are rows, people are columns


def test_the_page_has_a_place_for_every_table_and_figure():
    import report

    page = (TOOLS.parents[1] / "docs" / "results.md").read_text()
    for name in ("table1", "controls", "paper", "claims", *report.FIGURES):
        assert page.count(f"<!-- {name} -->") == page.count(f"<!-- end of {name} -->") == 1, name


def test_entries_without_adapters_are_left_out(tmp_path):
    import results

    (tmp_path / "edlora" / "test").mkdir(parents=True)
    there = [name for name, entry in results.TABLE.items() if results.has_adapters(tmp_path, entry)]
    assert {results.TABLE[name].recipe for name in there} == {"edlora", "wild"} and len(there) < len(results.TABLE)


def test_a_merge_errs_not_at_all_as_itself_and_wholly_as_nothing(tiny_pipe):
    import fidelity
    from concepts import three

    from loraclr.adapter import Adapter
    from loraclr.pipeline import Pipeline

    pipeline = Pipeline(tiny_pipe())
    adapters = {adapter.name: adapter for adapter in three(pipeline)[:1]}
    (name,) = adapters
    assert fidelity.errors(pipeline, adapters, adapters) == {name: pytest.approx(0, abs=1e-6)}
    assert fidelity.errors(pipeline, adapters, {name: Adapter({}, name="nothing")}) == {name: pytest.approx(1, rel=1e-4)}


def test_rows_weigh_what_their_cells_are_attended_to():
    import attended
    import torch

    seen = {}
    weights = torch.ones(1, attended.SIDE, attended.SIDE)
    weights[0, 0, 0] = 4.0
    weigher = attended.Weigher(seen.__setitem__, weights)
    rows = torch.ones(attended.SIDE**2, 2)
    weigher.add("q", rows)
    weigher.add("k", rows)
    assert seen["q"] is seen["k"] and seen["q"][0].tolist() == [2, 2] and bool((seen["q"][1:] == 1).all())


def test_the_example_study_asks_about_the_methods_of_the_papers(tmp_path):
    import example_study
    import results
    from PIL import Image

    with pytest.raises(SystemExit, match=r"no pictures of loraclr \(ours\), Orthogonal"):
        example_study.example(tmp_path / "study", tmp_path)
    assert not (tmp_path / "study").exists() and set(example_study.METHODS) <= set(results.TABLE)
    from loraclr.toybox import open_toybox

    for method in example_study.METHODS:
        for name in open_toybox().names("test"):
            folder = tmp_path / results.slug(method) / "pictures" / "row" / name
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / "00-0.png")
    study = example_study.example(tmp_path / "study", tmp_path)
    assert len(study.questions) == 40 and study.methods == example_study.METHODS
