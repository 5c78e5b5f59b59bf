"""The user study: blind by construction, nothing lost, scored from what was answered and nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from loraclr.cli import main
from loraclr.errors import UsageError, WriteError
from loraclr.web.server import make_app, make_server
from loraclr.web.study import Study, agreement, create, score

METHODS = ("ours-secret", "average-secret", "sum-secret", "svd-secret")


@pytest.fixture
def folders(tmp_path):
    """References and four methods' pictures of three concepts, two prompts each; a PNG field tells the method."""
    for method in ("references", *METHODS):
        for c, concept in enumerate(("ada", "ben", "cai")):
            (tmp_path / method / concept).mkdir(parents=True)
            for k in range(2):
                colour = (40 * c, 60 * k, METHODS.index(method) * 50 if method in METHODS else 255)
                info = PngImagePlugin.PngInfo()
                info.add_text("method", method)
                Image.new("RGB", (16, 16), colour).save(tmp_path / method / concept / f"{k}.png", pnginfo=info)
    return tmp_path


def make(folders, **changes):
    settings = {"references": folders / "references", "methods": {m: folders / m for m in METHODS}, "questions": 24, **changes}
    return create(folders / "study", **settings)


def test_every_method_is_asked_about_the_same_items_and_none_is_named(folders):
    study = make(folders)
    assert len(study.questions) == 24
    assert study.methods == METHODS
    by_item = {}
    for question in study.questions:
        by_item.setdefault(question.item, []).append(question.method)
    assert all(sorted(asked) == sorted(METHODS) for asked in by_item.values())
    assert {item.split("/")[0] for item in by_item} == {"ada", "ben", "cai"}
    for path in (study.folder / "pictures").iterdir():
        assert b"secret" not in path.read_bytes()
        assert re.fullmatch("[0-9a-f]{16}.png", path.name)
    for question in study.questions:
        source = np.asarray(Image.open(folders / question.method / f"{question.item}.png"))
        assert np.array_equal(np.asarray(Image.open(study.folder / "pictures" / question.picture)), source)


def test_the_same_seed_makes_the_same_study(folders):
    first = (make(folders).folder / "study.json").read_bytes()
    shutil.rmtree(folders / "study")
    assert (make(folders).folder / "study.json").read_bytes() == first
    shutil.rmtree(folders / "study")
    assert (make(folders, seed=1).folder / "study.json").read_bytes() != first


def test_raters_see_different_orders_and_each_always_the_same(folders):
    study = make(folders)
    orders = [[question.id for question in study.order(rater)] for rater in ("a" * 32, "b" * 32, "a" * 32)]
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: {"methods": {"one": f / METHODS[0]}}, "at least two methods"),
        (lambda f: {"references": f / "nowhere"}, "is not a folder"),
        (lambda f: shutil.rmtree(f / "references" / "ben") or {}, "no references for ben"),
        (lambda f: (f / METHODS[0] / "ada" / "0.png").write_bytes(b"no picture") and {}, "is not a picture"),
        (lambda f: [shutil.rmtree(f / METHODS[0] / c) for c in ("ada", "ben", "cai")] and {}, "holds no pictures"),
        (lambda f: (f / "study").mkdir() or (f / "study" / "x").touch() or {}, "not an empty folder"),
    ],
)
def test_bad_input_says_what_to_do_and_leaves_nothing(folders, spoil, words):
    changes = spoil(folders)
    before = sorted(path.name for path in folders.iterdir())
    with pytest.raises(UsageError, match=words):
        make(folders, **changes)
    assert sorted(path.name for path in folders.iterdir()) == before
    assert not (folders / "study" / "study.json").exists()


def test_photos_are_shown_upright(folders):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    for method in METHODS:
        Image.new("RGB", (16, 8)).save(folders / method / "ada" / "0.png", exif=exif)
    study = make(folders)
    turned = [one.picture for one in study.questions if one.item == "ada/0"]
    assert turned and all(Image.open(study.folder / "pictures" / name).size == (8, 16) for name in turned)


def test_answers_survive_and_the_last_one_counts(folders):
    study = make(folders)
    question = study.questions[0].id
    study.answer("r" * 32, question, 2)
    study.answer("r" * 32, question, 5)
    assert Study(study.folder).answered("r" * 32) == {question: 5}
    for bad in (0, 6):
        with pytest.raises(UsageError, match="1 to 5"):
            study.answer("r" * 32, question, bad)
    with pytest.raises(UsageError, match="no question"):
        study.answer("r" * 32, "nothing", 3)


def test_scores_by_hand(folders):
    study = make(folders)
    assert score(study) == ([], 0, None)
    wanted = dict(zip(METHODS, (5, 4, 2, 1), strict=True))
    for rater in ("a" * 32, "b" * 32):
        for question in study.questions:
            study.answer(rater, question.id, wanted[question.method])
    scores, raters, alpha = score(study)
    assert [one.method for one in scores] == list(METHODS)
    assert [one.mean for one in scores] == [5, 4, 2, 1]
    assert all(one.low == one.mean == one.high and one.answers == 12 for one in scores)
    assert raters == 2
    assert alpha == pytest.approx(1.0)
    study.answer("b" * 32, study.questions[0].id, 1)
    scores, _, alpha = score(study)
    first = next(one for one in scores if one.method == study.questions[0].method)
    assert first.mean == pytest.approx((11 * wanted[first.method] + 1) / 12)
    assert first.low < first.mean
    assert 0 < alpha < 1
    assert agreement(study) == alpha


def test_one_rater_has_no_agreement_with_anybody(folders):
    study = make(folders)
    for index, question in enumerate(study.questions):
        study.answer("a" * 32, question.id, 1 + index % 5)
    assert score(study)[2] is None


def test_the_server_keeps_to_its_own_pictures_and_refuses_nonsense(folders):
    study = make(folders)
    client = make_app(study).test_client()
    assert client.post("/answer", data={"question": study.questions[0].id, "rating": "3"}).status_code == 400  # no cookie yet
    page = client.get("/").data
    assert b"Start" in page and b"no cookie" not in page
    page = client.get("/?start=1").data.decode()
    assert "no cookie" not in page and "0 of 24 answered" in page
    assert "secret" not in page
    for path in ("study.json", "../study.json", "answers.sqlite", "..%2fstudy.json"):
        assert client.get(f"/pictures/{path}").status_code == 404
    for data in (
        {},
        {"question": "x", "rating": "3"},
        {"question": study.questions[0].id, "rating": "9"},
        {"question": "x", "rating": "?"},
    ):
        assert client.post("/answer", data=data).status_code == 400
    assert study.answers() == []


def test_a_browser_without_cookies_is_told(folders):
    client = make_app(make(folders)).test_client(use_cookies=False)
    assert "no cookie" not in client.get("/").text
    assert "Allow\n  cookies for this address" in client.get("/?start=1").text


def test_a_copy_that_cannot_be_written_to_is_scored(folders, mounted):
    study = make(folders)
    assert study.answers() == [] and sorted(path.name for path in study.folder.iterdir()) == ["pictures", "study.json"]
    study.answer("r" * 32, study.questions[0].id, 4)
    assert sorted(path.name for path in study.folder.glob("*.*")) == ["answers.sqlite", "study.json"]
    disk = mounted("size=600k")
    shutil.copytree(study.folder, disk / "study")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert score(Study(disk / "study")) == score(study) != ([], 0, None)
    with pytest.raises(WriteError, match=r"answers\.sqlite cannot be used .*readonly"):
        Study(disk / "study").answer("r" * 32, study.questions[0].id, 5)


@pytest.mark.parametrize("change", [{"title": 1}, {"questions": {"a": 1}}, {"questions": [{"id": 1}]}, {"note": None}])
def test_a_damaged_study_is_said(folders, change):
    study = make(folders)
    file = study.folder / "study.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UsageError, match="make the study again"):
        Study(study.folder)


def test_a_port_in_use_is_said(folders):
    study = make(folders)
    server = make_server(study, port=0)
    try:
        with pytest.raises(UsageError, match="give another --port"):
            make_server(study, port=server.port)
    finally:
        server.server_close()


@contextmanager
def served(folder, port=0):
    """`loraclr study serve` in a process of its own; yields its address."""
    command = [sys.executable, "-u", "-m", "loraclr", "study", "serve", str(folder), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "COLUMNS": "200"})
    try:
        yield re.search(r"http://\S+", process.stdout.readline()).group(), process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def browser():
    """A real headless browser."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def test_from_start_to_scored_table_in_a_browser(folders, browser, capsys):
    pictures = [word for method in METHODS for word in ("--pictures", f"{method}={folders / method}")]
    study = folders / "study"
    assert main(["study", "create", str(study), "--references", str(folders / "references"), *pictures, "--questions", "8"]) == 0
    context = browser.new_context(viewport={"width": 375, "height": 740})
    page = context.new_page()
    with served(study) as (address, process):
        page.goto(address)
        assert "8 pictures" in page.inner_text("body")
        page.click("#start")
        for done in range(3):
            assert f"{done} of 8 answered" in page.inner_text("body")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out on a phone
            assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
            page.keyboard.press("5")
            page.wait_for_url(address)
            page.wait_for_function(f"document.body.innerText.includes('{done + 1} of 8 answered')")
        page.reload()
        assert "3 of 8 answered" in page.inner_text("body")
        page.click("#back")
        given = page.locator("button.given")
        given.wait_for()
        assert given.count() == 1 and given.get_attribute("value") == "5"
        process.send_signal(signal.SIGKILL)
        port = address.rstrip("/").rpartition(":")[2]
    with served(study, port) as (address, _):
        page.goto(address)
        assert "3 of 8 answered" in page.inner_text("body")
        for done in range(3, 8):
            page.click(f"button[value='{1 + done % 5}']")
            if done < 7:
                page.wait_for_function(f"document.body.innerText.includes('{done + 1} of 8 answered')")
        page.wait_for_selector("#done")
        assert "secret" not in page.content()
    capsys.readouterr()
    assert main(["study", "score", str(study), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["raters"] == 1
    assert sum(one["answers"] for one in report["methods"]) == 8
    assert {one["method"] for one in report["methods"]} == set(METHODS)
    assert main(["study", "score", str(study)]) == 0
    assert "1 raters" in capsys.readouterr().out


def test_nobody_has_answered(folders, capsys):
    study = make(folders)
    assert main(["study", "score", str(study.folder)]) == 0
    assert "nobody has answered yet" in capsys.readouterr().out
    assert main(["study", "score", str(folders)]) == 1
    assert "is not a study" in capsys.readouterr().err


def test_an_answer_that_cannot_be_kept_is_said(folders, capsys):
    study = make(folders)
    client = make_app(study).test_client()
    client.get("/")
    (study.folder / "answers.sqlite").write_bytes(b"no database" * 100)
    said = client.get("/?start=1")
    assert said.status_code == 503 and "cannot go on" in said.text and "answers.sqlite" in said.text
    said = client.post("/answer", data={"question": study.questions[0].id, "rating": "3"})
    assert said.status_code == 503 and "was not kept" in said.text and "answers.sqlite" in said.text
    assert main(["study", "score", str(study.folder)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "answers.sqlite cannot be used" in lines[0]
