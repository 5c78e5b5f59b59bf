"""The tables of tools/toybox: which rows there are, what is paired with what, what is written where."""

from __future__ import annotations

import concurrent.futures
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


def test_what_is_drawn_of_a_figure_does_not_change_whom_its_controls_are_of():
    import results

    entries = results.FIGURES["beyond"](())
    few = results.rows(entries, results.wanted(entries, ["12 identities, average"]))
    assert few == {label: row for label, row in results.rows(entries).items() if label in few} and len(few) == 3
    assert len(few["alone, bulk"][1].names) == 100


def test_subsets_are_nested_and_differ_between_orders():
    import entries

    names = [f"n{k}" for k in range(12)]
    found = entries.counts(names)
    for number, order in enumerate(entries.orders(names)):
        sets = [*(found[f"{count} concepts, order {number}, loraclr"].names for count in (2, 5, 8)), tuple(order)]
        assert [len(one) for one in sets] == [2, 5, 8, 12] and set(sets[-1]) == set(names)
        assert all(later[: len(earlier)] == earlier for earlier, later in itertools.pairwise(sets))
    assert len({found[f"2 concepts, order {number}, loraclr"].names for number in range(3)}) == 3


def test_all_twelve_of_the_counts_are_rows_of_the_table():
    import entries
    import report

    assert all(entries.TABLE[name].method == method and entries.TABLE[name].recipe == "edlora" for method, name in entries.WHOLE.items())
    concepts = ("a", "b", "c")
    pair = entries.orders(concepts)[0][:2]
    alone = row("alone", [1.0] * 6, concepts=concepts)
    table = {"alone, edlora": alone, "loraclr (ours)": row("merged", [0.4] * 6, concepts=concepts)}
    known = {"alone, edlora": alone, "2 concepts, order 0, loraclr": row("merged", [0.9] * 4, concepts=pair)}
    *_, two, three = report.counts(known, table).splitlines()
    assert two.startswith("| 2 | loraclr | -.100 (-.100 to -.100) |") and three.startswith("| 3 | loraclr | -.600 (-.600 to -.600) |")
    assert two.count("-.100 (") == three.count("-.600 (") == 6


def test_plots_hold_every_value(tmp_path):
    import xml.etree.ElementTree as ET

    import entries
    import report

    names = [f"n{k}" for k in range(12)]
    alone = row("alone", [1.0] * 24, concepts=names)
    found = {name: row("merged", [0.5] * 2 * len(one.names), concepts=one.names) for name, one in entries.counts(names).items()}
    table = {"alone, edlora": alone} | {name: row("merged", [0.4] * 24, concepts=names) for name in entries.WHOLE.values()}
    lines = ET.fromstring(report.counts_plot({"alone, edlora": alone} | found, table))
    svg = "{http://www.w3.org/2000/svg}"
    values = [one.text for one in lines.iter(f"{svg}title")]
    assert values.count("-0.500") == 27 and values.count("-0.600") == 9  # three measures, methods and counts; the twelve
    margins = {name: row("merged", [0.5] * 2 * len(one.names), concepts=one.names) for name, one in entries.margins(names).items()}
    cells = ET.fromstring(report.margins_map(margins, {}))
    assert len(list(cells.iter(f"{svg}rect"))) == 22 and [one.text for one in cells.iter(f"{svg}text")].count(".500") == 22


def test_contrast_is_drawn_once_where_it_does_nothing():
    import claims
    import entries

    found = entries.margins([f"n{k}" for k in range(12)])
    assert sum(not entry.parameters["penalty"] for entry in found.values()) == 2 and len(found) == 22
    assert all(entry.parameters.get("margin", 1) for entry in found.values())
    assert {claims.USUAL, claims.NO_CONTRAST} <= set(found)


def test_what_is_drawn_as_tuned_was_tried_on_the_development_identities():
    import entries

    tried = entries.tuning(())
    assert {one.split for one in tried.values()} == {"development"}
    for method, settings in entries.TUNED.items():
        if method != "svd":  # a sum, cut to a rank
            assert any(one.method == method and one.parameters == settings for one in tried.values()), method


def test_a_difference_is_of_the_same_pictures():
    import rows

    alone = row("alone", [1.0, 0.0, 0.5, 0.5], concepts=("a", "b"))
    merged = row("merged", [0.5, 0.25], concepts=("b",))  # a subset: b's pictures only
    found = rows.difference(merged, alone, "identity")
    assert found.mean == pytest.approx((0.5 - 0.5 + 0.25 - 0.5) / 2) and found.count == 2
    more = row("merged", [1.0, 9.0, 1.0, 9.0], concepts=("a",), seeds=2)  # of its seeds, only those that both have
    assert rows.difference(more, alone, "identity").mean == pytest.approx((1.0 - 1.0 + 1.0 - 0.0) / 2)
    assert rows.beside(more, alone, "identity") == (0.5, 1.0) and rows.beside(merged, alone, "identity") == (0.5, 0.375)


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
        name: row("merged", [1, 0, 1, 1], recipe=recipe, merge_seconds=2, drawing_seconds=8),
    }
    (tmp_path / "table1.json").write_text(json.dumps(known))
    page = tmp_path / "results.md"
    marks = ("table1", "controls", "groups", "paper", "memory", "claims")
    page.write_text("".join(f"<!-- {mark} -->\nold\n<!-- end of {mark} -->\nkept\n" for mark in marks))
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path), str(page)])
    report.main()
    text = page.read_text()
    assert "old" not in text and text.count("kept\n") == len(marks) and f"| {name} | {recipe} | 1 | 1.000, .750 | -.250 (" in text
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
    assert row["people"] == 2 and [len(one) for one in row["faces"]] == [len(one) for one in row["attributes"]] == [2, 2]
    assert 0 <= row["all present"] <= row["present"] <= row["present anywhere"] <= 1
    assert row["present"] == sum(face >= row["limit"] for one in row["faces"] for face in one) / 4
    assert len(list(tmp_path.iterdir())) == 2
    chosen, image = scenes.draw(box.load(), cast, 2, 0)
    for table, swapped in zip(scenes.read(box, chosen, image), scenes.read(box, chosen[::-1], image), strict=True):
        assert table.shape == (2, 2) and (swapped == table.flip(1)).all()  # boxes are rows, people are columns


def test_two_of_a_kind_are_of_one_class():
    import dataclasses

    import scenes

    from loraclr.toybox import open_toybox

    box = open_toybox()
    anyone = scenes.Cast(box, box.names("test"))
    alike = dataclasses.replace(anyone, alike=True)
    nouns = [[{box.concepts[name].noun for name in scenes.people(cast, 2, k)} for k in range(8)] for cast in (anyone, alike)]
    assert all(len(one) == 1 for one in nouns[1]) and any(len(one) == 2 for one in nouns[0])


def scene_row(*faces, alike=False):
    """One scene of two people for each pair of closenesses."""
    told = {"people": 2, "alike": alike, "limit": 0.5, "faces": [list(pair) for pair in faces]}
    return told | {"present": 0.5, "all present": 0.0, "taken for another": 0.0, "attributes": told["faces"], "seconds": 1.0}


def test_claims_about_scenes_compare_the_same_scenes():
    import claims

    ours = {"rows": [scene_row(*[(0.9, 0.9)] * 4), scene_row((0.1, 0.1), (0.1, 0.1), alike=True)]}
    theirs = {"rows": [scene_row(*[(0.9, 0.1)] * 4), scene_row((0.9, 0.9), (0.9, 0.9), alike=True)]}
    known = {f"{name}, regions": theirs for name in (claims.ORTHOGONAL, claims.FUSION, "P+")}
    known |= {f"{claims.PAPER}, regions": ours, "OMG, own adapters": theirs}
    evidence = claims.Evidence({}, {"scenes": known})
    found, judged = claims.in_scenes(evidence)
    assert found == "present 1.000; Orthogonal Adaptation .500, apart +.500 (+.500 to +.500)" and judged == claims.YES
    found, judged = claims.beside_omg(evidence)
    assert found == "present .000; OMG 1.000, apart -1.000 (-1.000 to -1.000)" and judged == claims.NO


def test_scenes_without_regions_are_told_by_who_is_named_first():
    import report

    def two(alike):
        told = {"people": 2, "alike": alike, "limit": 0.8, "present": 0.5, "all present": 0.0, "taken for another": 0.0, "seconds": 1.0}
        return {**told, "faces": [[0.9, 0.1]] * 3, "attributes": [[1.0, 0.4]] * 3}

    known = {
        "x, no regions": {"kind": "free", "rows": [two(False), two(True)]},
        "x, regions": {"kind": "merged", "rows": [two(False), two(True), {**two(False), "people": 3, "faces": [[0.9, 0.1, 0.9]] * 3}]},
    }
    *_, line = report.unplaced(known).splitlines()
    cells = "1.000 .900 1.000 .000 .100 .400".split()
    assert line == f"| x | {' | '.join(f'{cell} ({cell} to {cell})' for cell in cells)} |"
    assert "no regions" not in report.scenes(known, {}) and "x, regions" in report.scenes(known, {})


@pytest.mark.parametrize(("usual", "best", "judged"), [(0.9, 0.9, "YES"), (0.9, 1.0, "NO"), (0.5, 0.5, "NO"), (0.4, 0.4, "NO")])
def test_the_published_margin_must_gain_and_be_the_best(usual, best, judged):
    import claims

    known = {claims.NO_CONTRAST: row("merged", [0.5] * 4), claims.USUAL: row("merged", [usual] * 4)}
    known["12 concepts, relative margin 1, lambda 0.1"] = row("merged", [best] * 4)
    assert claims.margin(claims.Evidence({}, {"margins": known}))[1] == getattr(claims, judged)


def test_more_people_are_compared_by_the_same_two():
    import claims

    two = row("merged", [0.8] * 4, method=claims.REFERENCE)
    for values, judged in (([0.8, 0.8, 0.8, 0.8, 0.1, 0.1], claims.YES), ([0.1, 0.1, 0.1, 0.1, 0.8, 0.8], claims.NO)):
        table = {claims.PAPER: row("merged", values, concepts=("a", "b", "c"))}
        evidence = claims.Evidence(table, {"counts": {"2 concepts, order 0, x": two}})
        assert claims.scales(evidence)[1] == judged


def test_what_goes_in_and_what_is_mixed_is_compared_picture_by_picture():
    import claims
    import report

    table = {"loraclr (ours), 1 round": row("merged", [0.9] * 4), "alone, edlora": row("alone", [0.9] * 4)}
    inputs = {
        "alone, quarter/edlora": row("alone", [0.5] * 4),
        "quarter of the steps, edlora": row("merged", [0.4] * 4, recipe="quarter/edlora"),
    }
    assert claims.depends(claims.Evidence(table, {"inputs": inputs}))[1] == claims.YES
    *_, quarter, whole = report.inputs(inputs, table).splitlines()
    assert "-.100 (-.100 to -.100)" in quarter and whole.startswith("| all of the steps, edlora | .900 (.900 to .900) |")

    def group(value):
        return {"concepts": ["a", "a", "b", "b"], "prompts": ["x", "y", "x", "y"], "text": [value] * 4, "image": [value] * 4}

    kinds = ("people", "things", "styles", "people in a style")
    mixture = {
        name: {"kind": "merged", "groups": {kind: group(value) for kind in kinds}}
        for name, value in ((report.OWN, 0.5), (claims.PAPER, 0.4))
    }
    found, judged = claims.alike("things")(claims.Evidence({}, {"mixture": mixture}))
    assert judged == claims.NO and "-.100 (-.100 to -.100)" in found
    assert report.mixture(mixture, {}).count("| .400, -.100 (-.100 to -.100) | .500 (.500 to .500) |") == 8


def test_a_second_round_is_compared_with_the_first_of_the_same_inputs_and_people(monkeypatch):
    import report

    def known(first, second):
        notes = {"merge_seconds": 40.0}
        return {
            "alone, lora": row("alone", [0.5] * 4, recipe="lora"),
            "loraclr (ours), DB-LoRA inputs": row("merged", [second] * 4, recipe="lora", **notes),
            "loraclr (ours), 1 round, DB-LoRA inputs": row("merged", [first] * 4, recipe="lora", **notes),
        }

    *_, chosen_on, told = report.rounds(known(0.4, 0.3), known(0.2, 0.4)).splitlines()
    assert chosen_on.startswith("| development | lora | +.200") and told.startswith("| test | lora | -.100 (-.100 to -.100) |")
    monkeypatch.setattr(report, "read_prompts", lambda path: {"a {} at sea": "context", "an angry {}": "state"})
    page = report.development(known(0.2, 0.4), {})
    assert "| identity, text | context | state |" in page
    assert "| loraclr (ours), DB-LoRA inputs | .400, .400 | .400, .400 |" in page
    assert "| loraclr (ours), DB-LoRA inputs | lora |" in page and "| alone, lora | .500 (.500 to .500) |" in page


def test_more_seeds_stand_beside_those_of_before():
    import results

    assert results.woven([1, 2, 3], [10, 11, 20, 21, 30, 31], 3) == [1, 10, 11, 2, 20, 21, 3, 30, 31]


def test_a_whole_name_is_one_row_and_a_part_of_it_all_that_begin_so():
    import results

    assert list(results.wanted(results.TABLE, ["loraclr (ours)"])) == ["loraclr (ours)"]
    assert set(results.wanted(results.TABLE, ["loraclr (ours), 1"])) == {name for name in results.TABLE if "1 round" in name}
    assert set(results.wanted(results.TABLE, ["core", "P+"])) == {*results.CORE, "P+"}
    assert len(results.wanted(results.TABLE, [])) == len(results.TABLE)
    with pytest.raises(SystemExit, match="no entry begins with 'ours'"):
        results.wanted(results.TABLE, ["ours"])


def test_the_page_has_a_place_for_every_table_and_figure():
    import report

    page = (TOOLS.parents[1] / "docs" / "results.md").read_text()
    for name in ("table1", "controls", "groups", "rounds", "paper", "memory", "claims", *report.FIGURES):
        assert page.count(f"<!-- {name} -->") == page.count(f"<!-- end of {name} -->") == 1, name


def test_sheets_show_what_was_drawn_and_leave_out_the_rest(tmp_path):
    import results
    import sheets
    from PIL import Image

    assert not any(sheets.scenes(tmp_path).values()) and not any(sheets.mixture(tmp_path).values())
    for scene in sheets.SHOWN_SCENES:
        path = tmp_path / "scenes" / results.slug("OMG, own adapters") / f"{scene}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (128, 64), "red").save(path)
    drawn = {label: images for label, images in sheets.scenes(tmp_path).items() if images}
    assert list(drawn) == ["OMG, own adapters"] and len(drawn["OMG, own adapters"]) == 6
    made = sheets.sheet(drawn)
    assert made.size == (sheets.TITLES + 6 * (128 + sheets.GAP), 64 + sheets.GAP) and made.getpixel((sheets.TITLES + 5, 5)) == (255, 0, 0)
    assert set(sheets.TABLE_ROWS) <= set(results.rows(results.TABLE))


def test_whose_adapters_lack_is_told(tmp_path):
    import results

    bench = results.Bench(tmp_path, tmp_path, 1)
    (tmp_path / "edlora" / "test").mkdir(parents=True)
    first, *others = bench.box.names("test")
    (tmp_path / "edlora" / "test" / f"{first}.pth").touch()
    assert bench.lacking(results.TABLE["loraclr (ours)"]) == others
    chosen_on = results.replace(results.TABLE["loraclr (ours)"], split="development")
    assert bench.names(chosen_on) == bench.lacking(chosen_on) == bench.box.names("development")
    assert bench.lacking(results.TABLE["P+"]) == [first, *others] and bench.lacking(results.TABLE["average, mixed inputs"]) == []


def test_a_merge_is_made_once_and_measured_in_a_process_of_its_own(tmp_path):
    import results

    bench = results.Bench(tmp_path, tmp_path / "work", 1)
    entry = results.Entry("wild", "average", names=tuple(bench.box.names("test")[:2]))
    adapter, notes = bench.merged(entry)
    assert len(adapter) and set(notes) == {"merge_seconds", "rank", "merge_megabytes"} and 0 <= notes["merge_megabytes"] < 500
    (noted,) = (tmp_path / "work" / "merged").glob("*.json")
    noted.write_text(noted.read_text().replace(f'"rank": {notes["rank"]}', '"rank": -1'))
    assert bench.merged(entry)[1]["rank"] == -1


def test_a_row_is_drawn_anew_when_what_makes_it_changes(tmp_path, monkeypatch):
    import results

    names = results.open_toybox().names("test")
    (tmp_path / "edlora" / "test").mkdir(parents=True)
    for name in names:
        (tmp_path / "edlora" / "test" / f"{name}.pth").write_text(name)
    bench = results.Bench(tmp_path, tmp_path, 1)
    entry = results.TABLE["sum, tuned"]
    key = bench.row_key("merged", entry)
    other = [
        bench.row_key("alone", entry),
        bench.row_key("merged", results.replace(entry, parameters={"scale": 0.2})),
        bench.row_key("merged", results.replace(entry, names=tuple(names[:2]))),
        results.Bench(tmp_path, tmp_path, 2).row_key("merged", entry),
    ]
    (tmp_path / "edlora" / "test" / f"{names[0]}.pth").write_text("trained anew")
    results.file_digest.cache_clear()
    other.append(bench.row_key("merged", entry))
    assert len({key, *other}) == 6
    base = bench.row_key("base", entry)
    assert base == bench.row_key("base", results.replace(entry, recipe="lora"))  # needs no adapters


@pytest.mark.parametrize(
    ("method", "fit", "preserve"),
    [
        ("average", False, False),
        ("loraclr", True, True),
        ("loraclr:exact", True, False),
        ("custom-diffusion", True, True),
        ("loraclr-reference:paper", True, False),
    ],
)
def test_other_prompts_make_another_row_where_the_method_asks_for_them(tmp_path, monkeypatch, method, fit, preserve):
    import results

    bench = results.Bench(tmp_path, tmp_path, 1)
    monkeypatch.setattr(bench, "files", lambda entry: {})
    entry, usual = results.Entry("edlora", method), results.collection_for
    key = bench.merge_key(entry)
    for asked, change in ((fit, {"fit": ("a {} at sea",)}), (preserve, {"preserve": ("a boat",)})):
        monkeypatch.setattr(results, "collection_for", lambda needs, change=change: results.replace(usual(needs), **change))
        assert (bench.merge_key(entry) != key) == asked


def test_the_study_s_table_has_whole_numbers_and_gaps():
    import study

    row = {"identity": 0.975, "named": 1.0, "told": 0.9}
    lines = study.table({"single": row, "cut": {**row, "held_out": 12.261, "error": 0.3, "merge_seconds": 20.5}}).splitlines()
    assert lines[2] == "| single | 0.975 | - | 1.00 | .90 | - | - | - |"
    assert lines[3] == "| cut | 0.975 | - | 1.00 | .90 | 12.261 | .300 | 20 |"


def test_the_study_s_differences_are_to_the_row_that_is_asked_for(monkeypatch):
    import study

    row = {"identity": 0.5, "named": 1.0, "told": 0.9}
    done = {name: {**row, "pictures": [value] * 4} for name, value in (("single", 1.0), ("best", 0.75), ("cut", 0.5))}
    monkeypatch.setattr(study, "CONCEPTS", 2)
    head, _, *lines = study.table(done, "best").splitlines()
    assert head.split(" | ")[2] == "paired, to best (95 %)"
    assert [line.split(" | ")[2] for line in lines] == ["+.250 (+.250 to +.250)", "-", "-.250 (-.250 to -.250)"]


def test_of_a_method_with_several_settings_the_study_can_show_the_best_alone():
    import study

    scored = {"sum 0.1": (0.5, 0.9), "sum 0.15": (0.6, 0.8), "sum 0.2": (0.6, 0.9), "loraclr": (0.9, 0.9)}
    done = {name: {"identity": identity, "told": told, "named": 1.0} for name, (identity, told) in scored.items()}
    best = study.tuned(done)
    assert best == {"sum 0.2 (of 3, from 0.500)": done["sum 0.2"]}
    _head, _, line = study.table(done, shown=best).splitlines()
    assert line.startswith("| sum 0.2 (of 3, from 0.500) | 0.600 |")


def test_one_row_that_fails_does_not_take_the_others_with_it(tmp_path, monkeypatch, capsys):
    import results

    class Pool:
        """What the executor does, in this process."""

        def __init__(self, workers):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, work, *arguments):
            done = concurrent.futures.Future()
            try:
                done.set_result(work(*arguments))
            except OSError as error:
                done.set_exception(error)
            return done

    def draw(loras, work, seeds, label, kind, entry):
        if "average" in label:
            raise OSError("no room")
        return row("merged", [1.0] * 4)

    monkeypatch.setattr(results, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(results, "draw_row", draw)
    out = tmp_path / "table.json"
    monkeypatch.setattr(sys, "argv", ["results.py", str(tmp_path), str(out), "average, mixed", "loraclr (ours), mixed"])
    with pytest.raises(SystemExit, match="1 rows could not be drawn"):
        results.main()
    assert "average, mixed inputs: OSError: no room" in capsys.readouterr().out
    assert "loraclr (ours), mixed inputs" in (known := json.loads(out.read_text())) and "average, mixed inputs" not in known
    monkeypatch.setattr(sys, "argv", ["results.py", str(tmp_path), str(out), "nobody"])
    with pytest.raises(SystemExit, match="no entry begins with 'nobody'"):
        results.main()


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
