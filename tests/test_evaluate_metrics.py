"""Metrics on vectors that a hand can multiply, and the laws they obey."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraclr.errors import UsageError
from loraclr.evaluate import (
    Limit,
    acceptance,
    attribute_closeness,
    centres,
    clip_score,
    closest,
    confusion,
    identity,
    image_alignment,
    leakage,
    nearest,
    presence,
    text_cosine,
)

COSINE = Limit(0.9, "cosine")


def rows(*values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def at(degrees: float, length: float = 1.0) -> tuple[float, float]:
    return length * math.cos(math.radians(degrees)), length * math.sin(math.radians(degrees))


# --- text and image


def test_clip_score_is_the_clipped_cosine_times_two_and_a_half():
    pictures = rows((1, 0), (2, 0), (0, 5), (1, 0))
    texts = rows((0.6, 0.8), (3, 4), (0, 0.1), (-1, 1))
    assert text_cosine(pictures, texts).tolist() == pytest.approx([0.6, 0.6, 1.0, -math.sqrt(0.5)])
    assert clip_score(pictures, texts).tolist() == pytest.approx([1.5, 1.5, 2.5, 0.0])


def test_image_alignment_is_the_mean_over_all_pairs():
    assert image_alignment(rows((1, 0), (0.6, 0.8)), rows((3, 0), (0, 2))).tolist() == pytest.approx([0.5, 0.7])


def test_a_set_against_itself_has_its_mean_pairwise_cosine_and_a_single_picture_one():
    pair = rows((1, 0), (0, 1))
    assert float(image_alignment(pair, pair).mean()) == pytest.approx(0.5)
    assert float(image_alignment(pair[:1], pair[:1])) == pytest.approx(1.0)


def test_neither_lengths_nor_the_order_of_references_matter():
    pictures, references = torch.randn(5, 7), torch.randn(6, 7)
    plain = image_alignment(pictures, references)
    assert torch.allclose(plain, image_alignment(3 * pictures, references[torch.randperm(6)] * torch.rand(6, 1).add(0.1)), atol=1e-6)
    faces, people = list(pictures[:, None]), list(references[:, None])
    for limit in (COSINE, Limit(3.0, "l2")):
        one, other = identity(faces, people, limit), identity(faces, people[::-1], limit)
        assert torch.allclose(one.closeness, other.closeness) and torch.equal(one.any_reference, other.any_reference)


# --- identity


def test_identity_by_hand():
    references = [rows(at(0)), rows(at(90, length=7)), torch.empty(0, 2)]  # their mean direction is 45 degrees; the third has no face
    faces = [rows(at(45)), rows(at(0)), torch.empty(0, 2), rows(at(180), at(60, length=3))]
    found = identity(faces, references, COSINE)
    wanted = [1.0, math.cos(math.radians(45)), math.nan, math.cos(math.radians(15))]
    assert found.closeness.tolist() == pytest.approx(wanted, nan_ok=True)
    assert found.accepted.tolist() == [1, 0, 0, 1]  # cos 45 = .71, cos 15 = .97
    assert found.any_reference.tolist() == [0, 1, 0, 0]  # to the nearest reference: cos 45, cos 0, none, cos 30 = .87
    assert found.no_face.tolist() == [0, 0, 1, 0]


def test_identity_by_distance_keeps_lengths():
    limit = Limit(0.6, "l2")
    references = [rows((0, 0)), rows((2, 0))]  # their mean is (1, 0)
    found = identity([rows((1, 0.5)), rows((2, 0.6)), rows((1, 9), (1, 0.6))], references, limit)
    assert found.closeness.tolist() == pytest.approx([-0.5, -math.hypot(1, 0.6), -0.6])
    assert found.accepted.tolist() == [1, 0, 1] and found.any_reference.tolist() == [0, 1, 0]


@given(st.lists(st.floats(-1, 1), min_size=1), st.lists(st.floats(-1, 1), min_size=2))
def test_the_rate_falls_as_the_cosine_asked_for_rises(closeness, limits):
    values = torch.tensor([*closeness, math.nan], dtype=torch.float64)
    rates = acceptance(values, sorted(limits), "cosine")
    assert rates == sorted(rates, reverse=True) and min(rates) >= 0 and max(rates) < 1  # the picture without a face never counts
    assert acceptance(-values.abs(), sorted(abs(limit) for limit in limits), "l2") == sorted(
        acceptance(-values.abs(), [abs(limit) for limit in limits], "l2")
    )


def test_references_without_any_face_are_said():
    with pytest.raises(UsageError, match="no face was found in any of 2 reference pictures"):
        identity([rows((1, 0))], [torch.empty(0, 2)] * 2, COSINE)


# --- who else is seen


def table() -> tuple[torch.Tensor, torch.Tensor]:
    """Three concepts at 0, 90 and 80 degrees, two pictures of each; closeness (6, 3) and who was asked."""
    middles = centres([[rows(at(degrees))] for degrees in (0, 90, 80)], COSINE)
    shown = [[rows(at(0))], [torch.empty(0, 2)], [rows(at(90))], [rows(at(0))], [rows(at(80))], [rows(at(85), at(1))]]
    return closest([faces[0] for faces in shown], middles, COSINE), torch.tensor([0, 0, 1, 1, 2, 2])


def test_confusion_by_hand():
    closeness, asked = table()
    accepted = COSINE.accepts(closeness)
    assert confusion(accepted, asked).tolist() == [[0.5, 0, 0], [0.5, 0.5, 0.5], [0.5, 1, 1]]
    assert nearest(closeness).tolist() == [0, -1, 1, 0, 2, 0]


def test_leakage_is_the_mean_off_the_diagonal():
    closeness, asked = table()
    accepted = COSINE.accepts(closeness)
    assert leakage(accepted, asked).tolist() == [0, 0, 0.5, 0.5, 0.5, 1]
    rates = confusion(accepted, asked)
    assert float(leakage(accepted, asked).mean()) == pytest.approx(float(rates[~torch.eye(3, dtype=torch.bool)].mean()))
    assert float(rates.diag().mean()) == pytest.approx(float(accepted[torch.arange(6), asked].double().mean()))


def test_one_concept_cannot_leak_and_one_not_asked_has_no_row():
    assert leakage(torch.tensor([[True]]), torch.tensor([0])).isnan().all()
    assert confusion(torch.tensor([[True, False]]), torch.tensor([0])).isnan().tolist() == [[False, False], [True, True]]


# --- mistakes


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: clip_score(rows((1, 0)), rows((1, 0), (0, 1))), "1 pictures and 2 texts"),
        (lambda: image_alignment(rows((1, 0)), rows((1, 0, 0))), "shapes .1, 2. and .1, 3."),
        (lambda: image_alignment(torch.ones(2), torch.ones(2)), "the same judge's embeddings"),
        (lambda: Limit(0.5, "angle"), "cosine or l2, not by 'angle'"),
    ],
)
def test_mistakes_are_said(wrong, message):
    with pytest.raises(UsageError, match=message):
        wrong()


# --- scenes


def test_presence_where_everybody_has_a_place():
    """Places in rows, people in columns; a pass is 0.9 or more. The second picture has them exchanged, the third nobody at place 1."""
    right, exchanged = rows((0.95, 0.1), (0.2, 0.91)), rows((0.1, 0.95), (0.91, 0.2))
    half = rows((0.95, 0.1), (math.nan, math.nan))
    found = presence([right, exchanged, half], COSINE, placed=True)
    assert found.share.tolist() == [1.0, 0.0, 0.5] and found.everyone.tolist() == [1.0, 0.0, 0.0]
    free = presence([right, exchanged, half], COSINE, placed=False)
    assert free.share.tolist() == [1.0, 1.0, 0.5] and free.everyone.tolist() == [1.0, 1.0, 0.0]
    assert free.assigned[:2].tolist() == [[0, 1], [1, 0]]


def test_one_face_is_not_two_people_and_the_most_passes_win():
    """Both pass for the only face. Of two faces, the first is the best for both people, and giving it to person 1 lets both pass."""
    assert presence([rows((0.95, 0.99))], COSINE, placed=False).share.tolist() == [0.5]
    assert presence([rows((0.95, 0.99))], COSINE, placed=False).assigned.tolist() == [[-1, 0]]
    both = presence([rows((0.99, 0.92), (0.91, 0.1))], COSINE, placed=False)
    assert both.assigned.tolist() == [[1, 0]] and both.everyone.tolist() == [1.0]


def test_presence_without_any_face_and_with_more_faces_than_people():
    assert presence([torch.zeros(0, 2)], COSINE, placed=False).share.tolist() == [0.0]
    many = presence([rows((0.1, 0.2), (0.2, 0.95), (0.96, 0.3))], COSINE, placed=False)
    assert many.assigned.tolist() == [[2, 1]] and many.everyone.tolist() == [1.0]


def test_presence_by_distance():
    near = Limit(0.5, "l2")
    closeness = near.closeness(rows((0.0, 0.0), (3.0, 0.0)), rows((3.0, 0.1), (0.0, 9.0)))
    found = presence([closeness], near, placed=False)
    assert found.share.tolist() == [0.5] and found.assigned[0, 0] == 1


@given(st.integers(1, 5), st.integers(0, 5), st.integers(0, 10_000))
def test_the_order_of_places_does_not_matter_and_free_is_at_least_placed(people, places, seed):
    table = torch.rand(places, people, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loose = Limit(0.5, "cosine")
    free = presence([table], loose, placed=False)
    assert float(presence([table.flip(0)], loose, placed=False).share) == float(free.share)
    if places == people:
        assert float(presence([table], loose, placed=True).share) <= float(free.share)
    kept = [place for place in free.assigned[0].tolist() if place >= 0]
    assert len(set(kept)) == len(kept) == min(places, people)


def test_placed_people_need_a_place_each():
    with pytest.raises(UsageError, match="1 places and 2 people"):
        presence([rows((1, 1))], COSINE, placed=True)


def test_attribute_closeness_by_hand():
    read = {"hair": rows((0.9, 0.1), (0.4, 0.6)), "skin": rows((0.1, 0.8, 0.1), (0.2, 0.3, 0.5))}
    people = [{"hair": 0, "skin": 1}, {"hair": 1, "skin": 1}]
    assert attribute_closeness(read, people).tolist() == [[1.0, 0.5], [0.0, 0.5]]
