"""Methods that judge the whole model: LoRAHub and ZipLoRA, first on losses known in closed form, then on a pipeline."""

from __future__ import annotations

import math

import pytest
import torch
from concepts import KEYS, SMALL, SPATIAL, TEXT, fingerprint, three
from problems import NAME, make_problem, relative

from loraclr.adapter import LoraLayer
from loraclr.collect import Collection, Concept
from loraclr.errors import MergeError, NumericalError, UsageError
from loraclr.merge import merge
from loraclr.methods import ModelProblem, make_method
from loraclr.pipeline import Pipeline
from loraclr.predictions import MOMENTS, Predictions, predict

TEXT_NAME = "text_encoder.encoder.layers.0.mlp.fc1"
TRAINED = {"steps": 12, "learning_rate": 0.05, "penalty": 0.0}  # the adapters here change predictions far less than real ones do
TINY = Collection(fit=("a photo of a {}",), held_out=(), preserve=(), steps=2)


def model(problem, loss=None, score=None, layers=None):
    return ModelProblem(problem.concepts, layers or {NAME: problem}, loss or (lambda changes, draw: torch.zeros(())), score)


def towards(targets):
    """The squared distance of all changes to these."""
    return lambda changes, draw: sum((changes[name] - target.float()).square().sum() for name, target in targets.items())


# LoRAHub -----------------------------------------------------------------------------------------------------------------------------


def test_lorahub_finds_the_coefficients():
    problem = make_problem(3, weights=[1.0, 2.0, 1.0])
    wanted = (0.75, -0.5, 1.25)
    target = sum(c * d for c, d in zip(wanted, problem.deltas(), strict=True))
    solution = make_method("lorahub", penalty=0.0, budget=80).solve_model(model(problem, towards({NAME: target})))[NAME]
    assert relative(solution.delta(), target) < 1e-2
    assert [solution.diagnostics[f"coefficient/c{index}"] for index in range(3)] == pytest.approx(wanted, abs=0.02)
    assert solution.diagnostics["evaluations"] <= 80 and solution.diagnostics["first_cost"] == pytest.approx(1)
    assert solution.diagnostics["least_cost"] < 1e-3


def test_lorahub_stays_within_bounds_and_its_budget():
    problem = make_problem(2)
    asked = []

    def loss(changes, draw):
        asked.append(draw)
        return (changes[NAME] - 5 * (problem.delta(0) + problem.delta(1)).float()).square().sum()

    solution = make_method("lorahub", budget=12, bound=0.5, penalty=0.0).solve_model(model(problem, loss))[NAME]
    assert [solution.diagnostics[f"coefficient/c{index}"] for index in range(2)] == pytest.approx([0.5, 0.5])
    assert len(asked) <= 13 and set(asked) == {None}, "the unit, and as many as allowed"


def test_lorahubs_penalty_is_on_the_mean_coefficient():
    """cost(c) = (1 - c)^2 + p |c| for one concept, least at c = 1 - p / 2."""
    problem = make_problem(1)
    found = make_method("lorahub", penalty=0.4, budget=60).solve_model(model(problem, towards({NAME: problem.delta(0)})))[NAME]
    assert found.diagnostics["coefficient/c0"] == pytest.approx(0.8, abs=1e-2)


def test_lorahub_takes_a_score_instead_of_the_loss():
    problem = make_problem(2)

    def never(changes, draw):
        raise AssertionError("predictions were asked for")

    def score(changes):
        return -float((changes[NAME] - 0.5 * problem.delta(1).float()).square().sum())

    found = make_method("lorahub", penalty=0.0, budget=60).solve_model(model(problem, never, score))[NAME]
    assert relative(found.delta(), 0.5 * problem.delta(1)) < 0.02


def test_lorahub_weighs_whole_deltas_of_any_rank():
    problem = make_problem(2)
    a, b = problem.layers
    mixed = make_problem(2, layers=[LoraLayer(NAME, a.down[:1], a.up[:, :1]), b])
    target = 0.5 * mixed.delta(0) + 0.25 * mixed.delta(1)
    found = make_method("lorahub", penalty=0.0, budget=60).solve_model(model(mixed, towards({NAME: target})))[NAME]
    assert relative(found.delta(), target) < 1e-2 and found.up.shape[1] == 3


# ZipLoRA -----------------------------------------------------------------------------------------------------------------------------


def test_ziplora_starts_at_the_sum_and_keeps_it_without_a_reason():
    problem = make_problem(3, weights=[1.0, 0.5, 2.0])
    still = make_method("ziplora", penalty=0.0, steps=3).solve_model(model(problem, lambda changes, draw: 0 * changes[NAME].sum()))[NAME]
    assert relative(still.delta(), sum(problem.deltas())) < 1e-13


def test_ziplora_gives_each_concept_its_columns():
    """A target of D_0 on the first three columns and D_1 on the others has the mergers 1 and 0, found column by column."""
    problem = make_problem(2)
    first = (torch.arange(6) < 3).double()
    target = problem.delta(0) * first + problem.delta(1) * (1 - first)
    found = make_method("ziplora", steps=400, learning_rate=0.03, penalty=0.0).solve_model(model(problem, towards({NAME: target})))[NAME]
    assert relative(found.delta(), target) < 1e-2
    assert found.diagnostics["first_loss"] > 100 * found.diagnostics["last_loss"] and found.diagnostics["collisions"] < 0.05
    assert found.up.shape[1] == 4


def test_ziploras_penalty_pulls_columns_apart_until_one_has_them():
    """Without a loss the gradient of mean |m_0 * m_1| is the other merger: both shrink alike, by Adam's step each time."""
    problem = make_problem(2)
    problem_of = model(problem, lambda changes, draw: 0 * changes[NAME].sum())
    found = make_method("ziplora", steps=10, learning_rate=0.01, penalty=1.0).solve_model(problem_of)[NAME]
    assert found.diagnostics["collisions"] == pytest.approx(0.9**2, abs=1e-3)
    assert relative(found.delta(), 0.9 * (problem.delta(0) + problem.delta(1))) < 1e-3


def test_ziplora_leaves_text_encoders_at_the_sum_and_absent_layers_alone():
    problem = make_problem(2)
    lone = make_problem(2, layers=[problem.layers[0], None])
    layers = {NAME: lone, TEXT_NAME: problem}
    loss = towards({NAME: problem.delta(0) * 0.5, TEXT_NAME: problem.delta(0) * 0})
    found = make_method("ziplora", steps=300, learning_rate=0.02, penalty=1.0).solve_model(model(problem, loss, layers=layers))
    assert relative(found[TEXT_NAME].delta(), problem.delta(0) + problem.delta(1)) < 1e-13
    assert relative(found[NAME].delta(), problem.delta(0) * 0.5) < 1e-2, "alone in its layer, it collides with nobody"


def test_ziplora_says_when_training_made_it_worse():
    problem = make_problem(2)
    given = model(problem, towards({NAME: problem.delta(0) + problem.delta(1)}))
    far = make_method("ziplora", steps=3, learning_rate=100.0).solve_model(given)[NAME]
    assert far.diagnostics["last_loss"] > far.diagnostics["first_loss"]
    assert "above the sum's" in far.advice and "lower `learning_rate`" in far.advice
    near = make_method("ziplora", steps=20, learning_rate=0.01, penalty=10.0).solve_model(given)[NAME]
    assert near.diagnostics["last_loss"] > 10 * near.diagnostics["first_loss"], "what the penalty asks for is no fault"
    assert not near.advice


def test_ziploras_draws_are_the_seeds():
    problem = make_problem(2)
    draws: list[list[int]] = []
    for seed in (0, 0, 1):
        draws.append([])

        def loss(changes, draw, seen=draws[-1]):
            seen.append(draw)
            return changes[NAME].square().sum()

        make_method("ziplora", steps=4).solve_model(ModelProblem(problem.concepts, {NAME: problem}, loss, seed=seed))
    assert draws[0] == draws[1] != draws[2] and draws[0][0] is draws[0][-1] is None and len(set(draws[0][1:-1])) == 4


def test_a_loss_of_nan_is_an_error():
    problem = make_problem(2)
    with pytest.raises(NumericalError, match="loss became nan; lower `learning_rate`"):
        make_method("ziplora", steps=1).solve_model(model(problem, lambda changes, draw: changes[NAME].sum() * math.nan))


# On a pipeline -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(_tiny_original) -> Pipeline:
    return Pipeline(_tiny_original)


@pytest.fixture(scope="module")
def adapters(shared):
    return three(shared)


@pytest.fixture(scope="module")
def predictions(shared, adapters) -> Predictions:
    """Of `ada`, with text encoder layers, and of `ben`, whose token is layer-wise."""
    return Predictions(shared, [Concept(adapters[0], "ada woman"), Concept(adapters[1], "<ben>", 0.5)], TINY)


def changes_of(adapter, scale=1.0):
    return {layer.name: layer.delta().flatten(1) * scale for layer in adapter}


def test_a_prediction_with_changes_is_the_prediction_of_the_changed_model(shared, adapters, predictions):
    ada, ben = adapters[:2]
    before = fingerprint(shared)
    for adapter, call, scale, moments in ((ada, "ada woman", 1.0, predictions.moments[0]), (ben, "<ben>", 0.5, predictions.moments[1])):
        assert len(moments) == 2 and not torch.equal(moments[0].latents, moments[1].latents)
        with shared.with_tokens(adapter.tokens), shared.applied(adapter.layers, scale=scale):
            states = shared.encode([f"a photo of a {call}"])
        unet = {name: change for name, change in changes_of(adapter, scale).items() if name.startswith("unet")}
        for moment in moments:
            found = predict(shared, moment.latents, moment.time, states, unet)
            assert relative(found, moment.prediction) < 1e-4
            assert relative(predict(shared, moment.latents, moment.time, states, {}), moment.prediction) > 1e-2
    assert fingerprint(shared) == before


def test_the_loss_is_zero_for_ones_own_adapter_and_only_there(shared, adapters):
    alone = Predictions(shared, [Concept(adapters[0], "ada woman")], TINY)
    own, none = (float(alone.loss(changes_of(adapters[0], scale), None)) for scale in (1.0, 0.0))
    assert own < 1e-9 < 1e-4 < none
    text = {name: change * (not name.startswith("text")) for name, change in changes_of(adapters[0]).items()}
    assert float(alone.loss(text, None)) > 1e-6, "the text encoder counts"
    draws = [float(alone.loss(changes_of(adapters[0], 0.0), draw)) for draw in (0, 1, 2)]
    assert draws[0] == draws[2] != draws[1] and none == pytest.approx(sum(draws[:2]) / 2, rel=1e-5)


def test_gradients_reach_the_changes(predictions, adapters):
    name = KEYS[0]
    changes = {one: change * 0.5 for one, change in changes_of(adapters[0]).items()}
    changes[name].requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(predictions.loss(changes, None), [changes[name]])
    direction = gradient / gradient.norm()
    values = [float(predictions.loss({**changes, name: changes[name].detach() + step * direction}, None)) for step in (0.05, -0.05)]
    assert (values[0] - values[1]) / 0.1 == pytest.approx(float(gradient.norm()), rel=0.05)


def test_no_more_moments_than_needed_are_kept(shared, adapters):
    long = Predictions(shared, [Concept(adapters[2], "cai man")], Collection(fit=("{}", "a {}"), steps=MOMENTS + 3, spatial=1))
    times = [float(moment.time) for moment in long.moments[0]]
    assert len(times) == MOMENTS and times == sorted(times, reverse=True) and len(set(times)) == MOMENTS
    assert len(long.moments[0][0].latents) == 1


def test_ziplora_trains_and_leaves_no_trace(shared, adapters):
    before = fingerprint(shared)
    result = merge(adapters[:2], base=shared, method="ziplora", parameters=TRAINED, collection=TINY)
    assert fingerprint(shared) == before
    notes = result.layers[0].diagnostics
    assert notes["last_loss"] < 0.9 * notes["first_loss"]
    added = merge(adapters[:2], method="sum").adapter
    for name in TEXT:
        assert torch.allclose(result.adapter.layers[name].delta(), added.layers[name].delta(), atol=1e-5)
    assert any(relative(result.adapter.layers[n].delta(), added.layers[n].delta()) > 0.05 for n in (*KEYS, *SPATIAL))
    again = merge(adapters[:2], base=shared, method="ziplora", parameters=TRAINED, collection=TINY)
    assert all(torch.equal(a.up, b.up) and torch.equal(a.down, b.down) for a, b in zip(result.adapter, again.adapter, strict=True))


def test_lorahub_brings_one_adapter_back(shared, adapters):
    result = merge(adapters[:1], base=shared, method="lorahub", parameters={"penalty": 0.0, "budget": 15}, collection=TINY, measure=True)
    assert result.layers[0].diagnostics["coefficient/ada"] == pytest.approx(1, abs=0.02)
    assert result.mean_residual("fit") < 0.02


def test_a_score_of_ones_own_judges_merged_adapters(shared, adapters):
    seen = []

    def score(adapter):
        seen.append(adapter)
        with shared.applied(adapter):
            return -float((adapter.layers[KEYS[0]].delta() - adapters[2].layers[KEYS[0]].delta()).square().sum())

    before = fingerprint(shared)
    result = merge(adapters, base=shared, method="lorahub", score=score, parameters={"penalty": 0.0, "budget": 40}, collection=SMALL)
    assert fingerprint(shared) == before
    assert len(seen) == result.layers[0].diagnostics["evaluations"] <= 40 and list(seen[0].tokens) == ["<ben>"]
    assert result.layers[0].diagnostics["coefficient/cai"] == pytest.approx(1, abs=0.1)
    assert seen[0].layers[SPATIAL[3]].shape == tuple(shared.base_weight(SPATIAL[3]).shape)


def test_what_models_need_is_asked_for(shared, adapters):
    for method in ("ziplora", "lorahub"):
        with pytest.raises(MergeError, match=f"{method} needs the base"):
            merge(adapters, method=method)
        with pytest.raises(MergeError, match="--trigger cai=WORDS"):
            merge([adapters[2].with_(triggers=())], base=shared, method=method)
    with pytest.raises(UsageError, match="takes no score; use lorahub"):
        merge(adapters, base=shared, method="ziplora", score=lambda adapter: 0.0)
