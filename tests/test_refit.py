"""The rounds after the first: what the merged model misses behind a block, and the layer that makes it good."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from concepts import BLOCK, DEEP, KEYS, SMALL, concept, fingerprint, three
from problems import features, make_problem

from loraclr.collect import LATENTS, Concept
from loraclr.errors import FormatError, MergeError, UsageError, WriteError
from loraclr.merge import merge
from loraclr.methods import make_method
from loraclr.methods.loraclr import Loraclr
from loraclr.pipeline import Pipeline
from loraclr.refit import _gap, _in_order, _passes, _writers, rounds_of
from loraclr.resume import Outputs, Room
from loraclr.scratch import Scratch
from loraclr.statistics import Gap

SETTINGS = {"ridge": 1e-3, "preservation": 0.5, "margin": 0.0}
WRITERS = [f"{BLOCK}.attn2.to_out.0", f"{DEEP}.ff.net.2"]  # of the adapters of concepts.py, as the UNet runs them


@pytest.fixture(scope="module")
def shared(_tiny_original) -> Pipeline:
    return Pipeline(_tiny_original)


def spatial(result):
    """Names of the layers that a merge solved last."""
    return [receipt.layer for receipt in result.layers if receipt.stage == max(one.stage for one in result.layers)]


@pytest.mark.parametrize("normalise", [True, False])
def test_the_gradient_of_what_is_written_in_the_docs_is_zero(normalise):
    problem = make_problem(2)
    make = torch.Generator().manual_seed(1)
    rows = features(problem)
    before = torch.randn(problem.out, problem.width, generator=make, dtype=torch.float64)
    missing = [torch.randn(len(x), problem.out, generator=make, dtype=torch.float64) for x in rows]
    free = [torch.randn(30, size, generator=make, dtype=torch.float64) for size in (problem.out, problem.width)]
    method = Loraclr(ridge=0.01, preservation=0.5, margin=0.0, importance=(1.0, 2.0), normalise=normalise, rounds=2)
    gaps = {name: Gap.of(e, x) for name, e, x in zip(problem.concepts, missing, rows, strict=True)}
    solution = method.refit(problem, before, iter([*gaps.items(), (None, Gap.of(*free))]))
    delta = solution.delta().requires_grad_()
    shares = [share / (len(x) if normalise else 1) for share, x in zip((1.0, 2.0), rows, strict=True)]
    mu = 0.01 * sum(share * float(x.square().sum()) for share, x in zip(shares, rows, strict=True)) / problem.width
    concepts = sum(share * (e - x @ (delta - before).T).square().sum() for share, e, x in zip(shares, missing, rows, strict=True))
    value = concepts + mu * (delta - before).square().sum()
    value = value + 0.5 * 2 / (30 if normalise else 1) * (free[0] - free[1] @ (delta - before).T).square().sum()
    (gradient,) = torch.autograd.grad(value, delta)
    assert gradient.norm() < 1e-9 * delta.norm() and solution.diagnostics["mu"] == pytest.approx(mu)
    whole = sum(share * float(e.square().sum()) for share, e in zip(shares, missing, strict=True))
    assert solution.diagnostics["left"] == pytest.approx(float(concepts) / whole) and 0 < solution.diagnostics["left"] < 1


def test_where_nothing_is_missing_nothing_changes():
    problem = make_problem(3)
    gaps = {name: Gap.of(torch.zeros(len(x), problem.out), x) for name, x in zip(problem.concepts, features(problem), strict=True)}
    before = torch.randn(problem.out, problem.width, dtype=torch.float64)
    found = Loraclr(**SETTINGS, rounds=2).refit(problem, before, [*gaps.items(), (None, next(iter(gaps.values())))])
    assert torch.equal(found.delta(), before) and found.diagnostics["left"] == 0
    with pytest.raises(MergeError, match="no concept-free prompts"):
        Loraclr(**SETTINGS, rounds=2).refit(problem, before, gaps.items())
    with pytest.raises(MergeError, match=f"what {problem.concepts[0]} lacks"):
        Loraclr(**SETTINGS, rounds=2).refit(problem, before, [*gaps.items(), (None, next(iter(gaps.values())))][1:])


def test_sums_of_two_runs_add_and_nan_is_refused():
    missing, rows = torch.randn(10, 3), torch.randn(10, 4)
    whole, parts = Gap.of(missing, rows), Gap.of(missing[:3], rows[:3]) + Gap.of(missing[3:], rows[3:])
    assert whole.count == parts.count == 10 and whole.cross.shape == (3, 4) and whole.size == pytest.approx(parts.size)
    assert torch.allclose(whole.cross, (missing.T @ rows).double(), atol=1e-5) and torch.allclose(whole.cross, parts.cross)
    assert torch.allclose(whole.square, (rows.T @ rows).double(), atol=1e-5) and torch.allclose(whole.square, parts.square)
    for wrong in ((missing / 0, rows), (missing, rows / 0)):
        with pytest.raises(FormatError, match="NaN"):
            Gap.of(*wrong)


def test_more_rounds_change_the_last_layer_of_each_block_alone_and_leave_the_base(shared):
    before = fingerprint(shared)
    adapters = three(shared)
    told: list[tuple[str, float]] = []
    once, twice, thrice = (
        merge(
            adapters, base=shared, method=make_method("loraclr", rounds=rounds), collection=SMALL,
            progress=lambda what, share: told.append((what, share)),
        )
        for rounds in (1, 2, 3)
    )  # fmt: skip
    assert fingerprint(shared) == before and ("catching up with the adapters, block after block", 1.0) in told
    assert [receipt.layer for receipt in once.layers] == [receipt.layer for receipt in twice.layers]
    for name, layer in once.adapter.layers.items():
        assert torch.equal(layer.delta(), twice.adapter.layers[name].delta()) == (name not in WRITERS)
        assert torch.equal(twice.adapter.layers[name].delta(), thrice.adapter.layers[name].delta()) == (name not in WRITERS)
        assert twice.adapter.layers[name].rank <= sum(a.layers[name].rank for a in adapters if name in a.layers)
    receipts = {receipt.layer: receipt for receipt in twice.layers}
    assert {name for name, receipt in receipts.items() if receipt.status == "refitted"} == set(WRITERS)
    assert all(0 < receipts[name].diagnostics["left"] < 1 for name in WRITERS)


def test_one_adapter_alone_stays_what_it_is(shared):
    adapter = three(shared)[0]
    settings = {"ridge": 1e-9, "preservation": 0.0}
    twice = merge([adapter], base=shared, method=make_method("loraclr", rounds=2, **settings), collection=SMALL)
    assert twice.mean_residual("fit") < 1e-3


def seen_at(pipeline, layers, places, prompts, seeds):
    """Stock: what `places` are given at the first step, with `layers` in the weights."""
    found = {}
    handles = [place.register_forward_pre_hook(lambda module, inputs: found.setdefault(module, inputs[0].clone())) for place in places]
    with torch.inference_mode(), pipeline.applied(layers):
        pipeline.run(prompts, seeds=seeds, steps=1)
    for handle in handles:
        handle.remove()
    return [found[place].flatten(0, 1).double() for place in places]


def test_a_gap_is_what_the_hidden_states_behind_the_layer_lack(shared):
    """One step: from the same noise, one model after the other, with the changes in the weights."""
    adapters = three(shared)
    merged = dict(merge(adapters, base=shared, collection=SMALL).adapter.layers)
    names = [name for name in merged if name.startswith("unet.") and name not in KEYS]
    one, settings = Concept(adapters[0], adapters[0].call), replace(SMALL, steps=1, padded=False)
    earlier = {name: layer for name, layer in merged.items() if name not in names}
    own = {name: layer for name, layer in one.adapter.layers.items() if name in names}
    prompts = one.said(SMALL.fit)
    with shared.with_tokens({token: rows for a in adapters for token, rows in a.tokens.items()}):
        with torch.inference_mode(), shared.applied(earlier):
            passes = _passes(shared, prompts, settings, LATENTS["fit"], (own, 1.0), Room(0))
            writer = _in_order(shared, _writers(shared, names))[0]
            gap = _gap(shared, writer, passes, (own, 1.0), {name: merged[name] for name in names})
        seeds = [LATENTS["fit"] + index for index in range(len(prompts))]
        places = writer.behind, writer.module
        (theirs, _), (ours, given) = (seen_at(shared, layers, places, prompts, seeds) for layers in ({**earlier, **own}, merged))
    assert writer.layer == WRITERS[0] and gap.count == len(ours)
    missing = theirs - ours
    assert gap.size == pytest.approx(float(missing.square().sum()), rel=1e-3)
    for found, wanted in ((gap.square, given.T @ given), (gap.cross, missing.T @ given)):
        assert (found - wanted).norm() < 1e-3 * wanted.norm()


def test_what_is_missing_behind_the_last_block_shrinks(shared):
    adapters = three(shared)
    concepts = [Concept(adapter, adapter.call) for adapter in adapters]
    method = Loraclr(ridge=1e-6, preservation=0.0, margin=0.0)
    left = {}
    for rounds in (1, 2):
        merged = dict(merge(adapters, base=shared, method=replace(method, rounds=rounds), collection=SMALL).adapter.layers)
        names = [name for name in merged if name.startswith("unet.") and name not in KEYS]
        earlier = {name: layer for name, layer in merged.items() if name not in names}
        tokens = {token: rows for a in adapters for token, rows in a.tokens.items()}
        with torch.inference_mode(), shared.applied(earlier), shared.with_tokens(tokens):
            last = _in_order(shared, _writers(shared, names))[-1]
            for one in concepts:
                own = {name: layer for name, layer in one.adapter.layers.items() if name in names}, 1.0
                passes = _passes(shared, one.said(SMALL.fit), SMALL, LATENTS["fit"], own, Room(0))
                left[rounds, one.name] = _gap(shared, last, passes, own, {name: merged[name] for name in names}).size
    assert sum(left[2, one.name] for one in concepts) < 0.9 * sum(left[1, one.name] for one in concepts)


def test_the_last_adapted_layer_of_each_block_is_fitted_as_the_unet_runs(shared):
    every = [f"{place}.{own}" for place in (DEEP, BLOCK) for own in ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2", "attn2.to_q")]
    with torch.inference_mode():
        found = _writers(shared, every)
        assert [one.layer for one in _in_order(shared, found[::-1])] == [f"{BLOCK}.ff.net.2", f"{DEEP}.ff.net.2"]
        assert [one.layer for one in _writers(shared, every[:2])] == [f"{DEEP}.attn2.to_out.0"]


def test_adapters_that_add_nothing_to_a_block_are_told_so_before_any_work(shared, monkeypatch):
    monkeypatch.setattr(Pipeline, "run", lambda *_, **__: pytest.fail("work was done"))
    adapter = concept(shared, "ada", [f"{BLOCK}.attn1.to_q"], rank=2, seed=1, triggers=("ada woman",))
    with pytest.raises(UsageError, match=r"attn2\.to_out.*leave rounds at 1"):
        merge([adapter], base=shared, method=make_method("loraclr", rounds=2), collection=SMALL)


def test_one_prompt_is_too_few_for_a_further_round(shared):
    for few in (replace(SMALL, spatial=1), replace(SMALL, fit=SMALL.fit[:1])):
        with pytest.raises(UsageError, match=r"two prompts.*leave --quick out"):
            merge(three(shared), base=shared, method=make_method("loraclr", rounds=2), collection=few)


@pytest.mark.parametrize(
    "settings", [{"choose": "held_out"}, {"balance": True}, {"prior": "mean"}, {"penalty": 1e-3}, {"certificate": "exact"}]
)
def test_what_further_rounds_cannot_do_is_refused(settings):
    with pytest.raises(UsageError, match=f"rounds=2 knows no {next(iter(settings))}"):
        make_method("loraclr", rounds=2, **settings)


def of_a_merge(pipeline, monkeypatch, free, on_disk=0, *, rounds=3, scratch=None):
    """A merge with that many bytes free, in memory and on disk, and how often each attention of the UNet ran."""
    monkeypatch.setattr("loraclr.resume._free", lambda: free)
    monkeypatch.setattr("loraclr.resume._free_on_disk", lambda scratch: on_disk)
    ran: Counter[str] = Counter()
    attentions = {path: module for path, module in pipeline.unet.named_modules() if path.endswith((".attn1", ".attn2"))}
    handles = []
    for path, module in attentions.items():
        handles.append(module.to_q.register_forward_pre_hook(lambda *_, path=path: ran.update([path])))
    merged = merge(three(pipeline), base=pipeline, method=make_method("loraclr", rounds=rounds), collection=SMALL, scratch=scratch)
    for handle in handles:
        handle.remove()
    return merged.adapter, ran


def test_what_visits_go_on_from_changes_nothing_but_the_time(shared, monkeypatch):
    before = {path: dict(vars(module)) for path, module in shared.unet.named_modules()}
    slow, often = of_a_merge(shared, monkeypatch, 0)
    tight, _ = of_a_merge(shared, monkeypatch, 1 << 20)
    fast, seldom = of_a_merge(shared, monkeypatch, 1 << 34)
    stored, stored_often = of_a_merge(shared, monkeypatch, 0, 1 << 34)
    mixed, _ = of_a_merge(shared, monkeypatch, 1 << 20, 1 << 22)
    for other in (tight, fast, stored, mixed):
        assert all(torch.equal(layer.delta(), other.layers[name].delta()) for name, layer in slow.layers.items())
    assert all(seldom[path] <= often[path] for path in often) and sum(seldom.values()) < sum(often.values())
    assert stored_often == seldom, "nothing was too much for the disk"
    assert all(vars(module).get("forward") == before[path].get("forward") for path, module in shared.unet.named_modules())


def test_a_disk_that_is_full_costs_time_and_nothing_else(shared, monkeypatch, mounted):
    slow, often = of_a_merge(shared, monkeypatch, 0)
    folder, full, lend = mounted("size=96k"), [], Scratch.lend

    def told(scratch, tensor):
        try:
            return lend(scratch, tensor)
        except WriteError as error:
            full.append(error)
            raise

    monkeypatch.setattr(Scratch, "lend", told)
    found, ran = of_a_merge(shared, monkeypatch, 0, 1 << 34, scratch=folder)
    assert all(torch.equal(layer.delta(), found.layers[name].delta()) for name, layer in slow.layers.items())
    assert len(full) == 1 and sum(ran.values()) <= sum(often.values()) and list(folder.iterdir()) == []


def test_there_is_a_quarter_of_a_gigabyte_of_room_or_of_what_is_free_and_sixteen_on_disk(monkeypatch, tmp_path):
    assert 0 < Room().left <= 1 << 28 and Room().on_disk == 0
    scratch = Scratch(tmp_path)
    assert 0 < Room(scratch=scratch).on_disk <= 1 << 34
    for free, left, on_disk in ((4000, 1000, 1000), (1 << 40, 1 << 28, 1 << 34)):
        monkeypatch.setattr("loraclr.resume._free", lambda free=free: free)
        monkeypatch.setattr("loraclr.resume._free_on_disk", lambda scratch, free=free: free)
        room = Room(scratch=scratch)
        assert (room.left, room.on_disk) == (left, on_disk)


def test_a_part_takes_the_place_of_its_own_parts_and_no_more_room_than_there_is():
    outputs = Outputs(Room(100))
    outputs.keep(("down.0.attn", 0), torch.zeros(10))
    assert outputs.room.left == 60
    outputs.keep(("down.0", 0), (torch.ones(12), [torch.ones(8)]))
    assert outputs.room.left == 20 and list(outputs.given) == [("down.0", 0)]
    again = outputs.again(("down.0", 0))
    again[0].zero_()
    assert outputs.again(("down.0", 0))[0].sum() == 12 and outputs.again(("up.0", 0)) is None
    for unfit in (torch.zeros(6), {"sample": torch.zeros(1)}, (torch.zeros(1), None)):
        outputs.keep(("up.0", 0), unfit)
    assert outputs.again(("up.0", 0)) is None
    outputs.clear()
    assert outputs.room.left == 100


def test_what_does_not_fit_into_memory_waits_on_disk(tmp_path):
    outputs = Outputs(Room(40, scratch := Scratch(tmp_path, memory=0), 200))
    outputs.keep(("down.0.a", 0), torch.zeros(10))
    for number in range(2):
        outputs.keep(("down.0.b", number), (torch.full((2, 5), 1.0 + number, dtype=torch.bfloat16), [torch.ones(5)]))
    room = outputs.room
    assert (room.left, room.on_disk, scratch.written) == (0, 120, 80)
    again = outputs.again(("down.0.b", 1))
    assert torch.equal(again[0], torch.full((2, 5), 2.0, dtype=torch.bfloat16)) and torch.equal(again[1][0], torch.ones(5))
    outputs.keep(("down.0", 0), torch.arange(30.0))
    assert (room.left, room.on_disk) == (40, 80) and list(outputs.given) == [("down.0", 0)]
    assert torch.equal(outputs.again(("down.0", 0)), torch.arange(30.0)) and scratch.written == 120, "where the two were"
    outputs.keep(("up.0", 0), torch.zeros(6, 5).T), outputs.keep(("up.1", 0), torch.zeros(30, device="meta"))
    assert outputs.again(("up.0", 0)) is None and outputs.again(("up.1", 0)) is None, "not contiguous; not on this processor"
    outputs.clear()
    assert (room.left, room.on_disk) == (40, 200)


def test_a_full_disk_is_left_alone_and_what_is_on_it_stays(mounted):
    with Scratch(mounted("size=16k"), memory=0) as scratch:
        outputs = Outputs(Room(0, scratch, 1 << 20))
        outputs.keep(("down", 0), first := torch.rand(1500))
        outputs.keep(("mid", 0), (torch.rand(1000), torch.rand(4000)))
        assert outputs.again(("mid", 0)) is None and torch.equal(outputs.again(("down", 0)), first)
        outputs.keep(("up", 0), torch.rand(10))
        assert list(outputs.given) == [("down", 0)], "nor is it tried again"
        assert outputs.room.on_disk == (1 << 20) - 6000
        assert torch.equal(scratch.lend(first).read(), first), "where the first of the two was"


def test_without_a_number_it_goes_again_where_it_can(shared):
    def refitted(adapters=None, collection=SMALL, **settings):
        made = merge(adapters or three(shared), base=shared, method=make_method("loraclr", **settings), collection=collection)
        assert made.receipt()["parameters"]["rounds"] == (2 if any(one.status == "refitted" for one in made.layers) else 1)
        return {one.layer for one in made.layers if one.status == "refitted"}

    assert refitted() == set(WRITERS) and refitted(rounds=1) == set()
    assert refitted(collection=replace(SMALL, spatial=1)) == set(), "one prompt a concept"
    assert refitted(balance=True) == set(), "which a further round does not know"
    assert refitted([concept(shared, "ada", [f"{BLOCK}.attn1.to_q"], rank=2, seed=1, triggers=("ada woman",))]) == set()
    asked = {"choose": "held_out"}, {"prior": "mean"}, {"penalty": 1e-3}, {"margin": 0.1}, {"space": "delta"}, {"distance": "rms"}
    for method in ("loraclr:exact", "loraclr:contrastive", *asked):
        made = make_method(method) if isinstance(method, str) else make_method("loraclr", **method)
        assert rounds_of(made, shared, WRITERS, SMALL) == 1, method
    assert rounds_of(Loraclr(margin=0.0), shared, WRITERS, SMALL) == 2 and rounds_of(Loraclr(), None, WRITERS, SMALL) == 1
    assert rounds_of(Loraclr(distance="rms", rounds=3), shared, WRITERS, SMALL) == 3, "whoever asks gets it"
