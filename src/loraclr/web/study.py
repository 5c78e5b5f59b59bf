"""A user study on disk: what is asked (study.json, pictures/), what was answered (answers.sqlite), and what follows from it.

The protocol is that of the LoRACLR paper's user study (arXiv 2412.09622, section 4.3): references on the left, a picture on the right,
"how well does the image capture the identity" from 1 to 5, methods hidden and in random order.
"""

from __future__ import annotations

import json
import random
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from loraclr import disk
from loraclr.errors import UsageError, WriteError
from loraclr.pictures import pictures_in, read_picture

SCALE = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Question:
    """One picture of one method, beside the references of whom it should show. File names tell nothing of the method."""

    id: str
    method: str
    concept: str
    picture: str
    references: tuple[str, ...]
    item: str  # the same for all methods' pictures of one concept and prompt: what is compared in pairs


@dataclass(frozen=True)
class MethodScore:
    """Mean rating with its 95 % interval: raters and items are both drawn anew, so neither few people nor few pictures look certain."""

    method: str
    mean: float
    low: float
    high: float
    answers: int


class Study:
    """A study's folder. Raises UsageError if it is none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        file = folder / "study.json"
        if not file.is_file():
            raise UsageError(f"{folder} is not a study: it has no study.json; make one with `loraclr study create`")
        try:
            described = json.loads(file.read_text())
            self.title: str = described["title"]
            self.note: str = described["note"]
            self.questions = tuple(Question(**{**entry, "references": tuple(entry["references"])}) for entry in described["questions"])
            words = [word for question in self.questions for word in (*question.references, question.id, question.method, question.concept)]
            words += [word for question in self.questions for word in (question.picture, question.item)]
            if not all(isinstance(word, str) for word in (self.title, self.note, *words)):
                raise TypeError("something in it is no text")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(f"{file} cannot be read ({error}); make the study again") from error
        self.by_id = {question.id: question for question in self.questions}

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(question.method for question in self.questions))

    def order(self, rater: str) -> list[Question]:
        """This rater's own order, the same at every visit."""
        questions = list(self.questions)
        random.Random(f"{rater}/{len(questions)}").shuffle(questions)
        return questions

    @contextmanager
    def _database(self, mode: str) -> Iterator[sqlite3.Connection]:
        """Raises WriteError where it cannot be used."""
        file = self.folder / "answers.sqlite"
        try:
            with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode={mode}", uri=True, timeout=30)) as connection:
                yield connection
        except sqlite3.Error as error:
            raise WriteError(f"{file} cannot be used ({error}); look at the room on its disk and your rights") from error

    def _rows(self, query: str, *values: str) -> list[tuple[Any, ...]]:
        """None before the first answer. Nothing is written, so that a study on a read-only disk can be scored."""
        file = self.folder / "answers.sqlite"
        if not file.exists() or not file.stat().st_size:
            return []
        with self._database("rw") as connection:  # or to read only, where that is all that is allowed
            return connection.execute(query, values).fetchall()

    def answer(self, rater: str, question: str, rating: int) -> None:
        """The last answer of a rater to a question counts; it is on disk when this returns. Raises UsageError for a question or rating
        that does not exist, WriteError where it cannot be kept."""
        if question not in self.by_id:
            raise UsageError(f"no question {question!r} in this study")
        if rating not in SCALE:
            raise UsageError(f"a rating is 1 to 5, not {rating}")
        with self._database("rwc") as connection, connection:
            connection.execute("PRAGMA synchronous=EXTRA")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS answers "
                "(rater TEXT, question TEXT, rating INTEGER NOT NULL CHECK (rating BETWEEN 1 AND 5), "
                "at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP, PRIMARY KEY (rater, question))"
            )
            connection.execute(
                "INSERT INTO answers (rater, question, rating) VALUES (?, ?, ?) "
                "ON CONFLICT (rater, question) DO UPDATE SET rating = excluded.rating, at = CURRENT_TIMESTAMP",
                (rater, question, rating),
            )

    def answered(self, rater: str) -> dict[str, int]:
        """Question id -> rating."""
        return dict(self._rows("SELECT question, rating FROM answers WHERE rater = ?", rater))

    def answers(self) -> list[tuple[str, str, int]]:
        """(rater, question id, rating) of everybody."""
        rows = self._rows("SELECT rater, question, rating FROM answers ORDER BY rater, question")
        return [(rater, question, rating) for rater, question, rating in rows if question in self.by_id]


def create(
    folder: Path,
    *,
    references: Path,
    methods: Mapping[str, Path],
    questions: int = 40,
    seed: int = 0,
    title: str = "How well does the image capture the identity?",
    note: str = "",
) -> Study:
    """A study from folders of pictures: REFERENCES/CONCEPT/*, and METHOD/CONCEPT/* of every method, equal file names for equal prompts.

    `questions` are drawn by whole items (one concept and prompt, a picture of every method), the concepts in turn. Raises UsageError
    where a method lacks a concept's picture, nothing is left to ask, or a file is no picture; nothing is written then.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not an empty folder; give another one")
    if len(methods) < 2:
        raise UsageError(f"a study compares at least two methods; seen {', '.join(methods) or 'none'}")
    shown = {method: _pictures(path) for method, path in methods.items()}
    known = _pictures(references)
    items = sorted(set.intersection(*({(c, name) for c, files in found.items() for name in files} for found in shown.values())))
    if not items:
        raise UsageError(
            "the methods share no picture: each needs CONCEPT/NAME.png with the same names; seen "
            + ", ".join(f"{method}: {sum(map(len, found.values()))} pictures of {len(found)} concepts" for method, found in shown.items())
        )
    lacking = sorted({concept for concept, _ in items} - set(known))
    if lacking:
        raise UsageError(f"no references for {', '.join(lacking)}; put their pictures into {references}/CONCEPT")
    rng = random.Random(seed)
    chosen = _in_turn(items, max(1, questions // len(methods)), rng)
    with disk.reserved(folder), disk.whole(folder) as part:
        (part / "pictures").mkdir(parents=True)
        told: dict[str, tuple[str, ...]] = {}
        for concept in dict.fromkeys(concept for concept, _ in chosen):
            told[concept] = tuple(_copy(path, part, rng) for path in sorted(known[concept].values())[:4])
        asked = [
            Question(_opaque(rng), method, concept, _copy(shown[method][concept][name], part, rng), told[concept], f"{concept}/{name}")
            for concept, name in chosen
            for method in methods
        ]
        described = {"title": title, "note": note, "questions": [asdict(question) for question in asked]}
        (part / "study.json").write_text(json.dumps(described, indent=1) + "\n")
    return Study(folder)


def score(study: Study, *, seed: int = 0) -> tuple[list[MethodScore], int, float | None]:
    """Per method the mean rating, the number of raters, and their agreement: Krippendorff's alpha for interval data, None if undefined.

    Methods stand best first. With no answers the list is empty: nothing is made up.
    """
    import torch

    from loraclr.evaluate import estimate

    answers = [(rater, study.by_id[question], rating) for rater, question, rating in study.answers()]
    scores = []
    for method in study.methods:
        own = [(rater, asked.item, float(rating)) for rater, asked, rating in answers if asked.method == method]
        if own:
            raters, items, ratings = zip(*own, strict=True)
            found = estimate(torch.tensor(ratings), factors=(raters, items), seed=seed)
            scores.append(MethodScore(method, found.mean, found.low, found.high, found.count))
    return sorted(scores, key=lambda one: -one.mean), len({rater for rater, _, _ in answers}), agreement(study)


def agreement(study: Study) -> float | None:
    """Krippendorff's alpha over all questions, interval distance; None with fewer than two raters of a question, or no variation."""
    import krippendorff

    answers = study.answers()
    raters, questions = sorted({rater for rater, _, _ in answers}), [question.id for question in study.questions]
    table = np.full((len(raters), len(questions)), np.nan)
    for rater, question, rating in answers:
        table[raters.index(rater), questions.index(question)] = rating
    paired = (~np.isnan(table)).sum(0) > 1
    values = table[:, paired]
    if not paired.any() or len(np.unique(values[~np.isnan(values)])) < 2:
        return None
    return float(krippendorff.alpha(reliability_data=values, level_of_measurement="interval"))


def _pictures(folder: Path) -> dict[str, dict[str, Path]]:
    """Concept -> file stem -> file."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; give one that holds CONCEPT/NAME.png")
    found: dict[str, dict[str, Path]] = {}
    for inside in sorted(path for path in folder.glob("*") if path.is_dir()):
        for path in pictures_in(inside):
            found.setdefault(inside.name, {})[path.stem] = path
    if not found:
        raise UsageError(f"{folder} holds no pictures: it needs CONCEPT/NAME.png")
    return found


def _in_turn(items: Sequence[tuple[str, str]], count: int, rng: random.Random) -> list[tuple[str, str]]:
    """`count` items at random, the concepts taking turns."""
    waiting: dict[str, list[tuple[str, str]]] = {}
    for item in rng.sample(list(items), len(items)):
        waiting.setdefault(item[0], []).append(item)
    chosen: list[tuple[str, str]] = []
    while len(chosen) < count and waiting:
        for concept in list(waiting):
            chosen.append(waiting[concept].pop())
            if not waiting[concept]:
                del waiting[concept]
    return chosen[:count]


def _opaque(rng: random.Random) -> str:
    return f"{rng.getrandbits(64):016x}"


def _copy(path: Path, folder: Path, rng: random.Random) -> str:
    """The pixels alone under a name that says nothing: a PNG's text fields would give the method away."""
    name = f"{_opaque(rng)}.png"
    plain = read_picture(path)
    Image.frombytes("RGB", plain.size, plain.tobytes()).save(folder / "pictures" / name)
    return name


def new_rater() -> str:
    return secrets.token_hex(16)
