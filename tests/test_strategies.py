"""Several adapters in one picture without merging: the laws that hold whatever the weights, and values by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loraclr.adapter import Adapter, LoraLayer
from loraclr.conditioning import Region
from loraclr.errors import PipelineError, UsageError
from loraclr.generate import generate
from loraclr.pipeline import Pipeline
from loraclr.strategies import STRATEGIES, Cast, Clora, Omg, Part, Scene, make_strategy
from loraclr.strategies.attention import Watch, masks, saliency, watched
from loraclr.strategies.clora import contrast
from loraclr.strategies.scene import Script
from loraclr.strategies.words import Words

DIM, LAYERS, SIZE = 32, 10, (16, 16)
WHOLE = (0.0, 0.0, 1.0, 1.0)


@pytest.fixture
def pipeline(tiny_pipe) -> Pipeline:
    return Pipeline(tiny_pipe())


def adapter(pipeline: Pipeline, name: str, *, tokens=None, triggers=None) -> Adapter:
    """Changes text encoder and UNet strongly enough to be seen."""
    names = [*(n for n in pipeline.modules if n.startswith("text_encoder"))][:2] + [n for n in pipeline.modules if n.startswith("unet")][
        8:30
    ]
    layers = []
    for layer in names:
        weight = pipeline.base_weight(layer)
        down = torch.randn(2, *weight.shape[1:])
        up = torch.randn(weight.shape[0], 2, *(1,) * (weight.ndim - 2))
        layers.append(LoraLayer(layer, down, up, 0.05))
    return Adapter.of(layers, name=name).with_(tokens=tokens or {}, triggers=triggers if triggers is not None else (f"{name} man",))


@pytest.fixture
def parts(pipeline) -> list[Part]:
    return [
        Part(adapter(pipeline, "ada")),
        Part(adapter(pipeline, "ben", tokens={"<ben>": torch.randn(LAYERS, DIM)}, triggers=()), noun="dog"),
    ]


def scene(prompt: str = "an ada man and a <ben>", **changes) -> Scene:
    return Scene(prompt, **{"seed": 1, "size": SIZE, "steps": 3, **changes})


# ---- words


def test_words_are_told_apart_and_replaced_by_nouns(parts):
    words = Words.of("An Ada Man, an ada manor and a <ben>", parts)
    assert words.pieces == (("An ", None), ("Ada Man", 0), (", an ada manor and a ", None), ("<ben>", 1))
    assert words.said(parts, None).text == "An man, an ada manor and a dog"
    assert words.said(parts, 0).text == "An Ada Man, an ada manor and a dog"
    assert words.said(parts, 1).text == "An man, an ada manor and a <ben>"


def test_the_longer_call_wins():
    long, short = (Part(Adapter({}, name=name, triggers=(call,))) for name, call in (("long", "ada man"), ("short", "ada")))
    assert Words.of("ada man ada", [short, long]).pieces == (("ada man", 1), (" ", None), ("ada", 0))


def test_spots_are_positions_among_the_tokens(parts):
    """Counted in words: begin, an, ada, man, and, a, <ben>, end."""
    spots = Words.of("an ada man and a <ben>", parts).spots(lambda text: len(text.split()) + 2)
    assert spots == {0: [2, 3], 1: [6]}


def test_spots_in_the_real_tokenizer(pipeline, parts):
    """The tiny tokenizer has letters only."""
    spots = Words.of("an ada man", parts).spots(pipeline.token_count)
    assert spots == {0: [3, 4, 5, 6, 7, 8]}
    ids = pipeline.vocabulary.tokenizer("an ada man").input_ids
    assert pipeline.vocabulary.tokenizer.decode([ids[spot] for spot in spots[0]]).replace(" ", "").replace("</w>", "") == "adaman"


# ---- attention


def test_saliency_and_masks_by_hand():
    maps = torch.tensor([[[0.0, 0.2], [0.4, 0.0]], [[0.0, 0.2], [0.0, 0.1]], [[0.5, 0.1], [0.5, 0.1]]])
    assert torch.allclose(saliency(maps, [0, 1]), torch.tensor([[0.0, 0.4], [0.4, 0.1]]))
    both = torch.stack([saliency(maps, [0, 1]), saliency(maps, [2])])  # as shares: 0 1 / 1 .25 and 1 .2 / 1 .2
    assert masks(both, (2, 2), threshold=0.3, exclusive=False).int().tolist() == [[[0, 1], [1, 0]], [[1, 0], [1, 0]]]
    assert masks(both, (2, 2), threshold=0.3, exclusive=True).int().tolist() == [[[0, 1], [1, 0]], [[1, 0], [0, 0]]]
    assert masks(both, (2, 2), threshold=0.1, exclusive=True).sum(0).eq(1).all()


def test_watched_layers_do_what_they_did_and_attention_sums_to_one(pipeline):
    states, layers, watch = (
        pipeline.encode(["a man"]),
        [pipeline.unet.get_submodule(path) for path in pipeline.cross_attention_layers],
        Watch((8, 8), 4),
    )
    kept = [layer.processor for layer in layers]
    plain = pipeline.denoise(states, seeds=[0], steps=1)
    with watched(layers, watch):
        assert torch.equal(pipeline.denoise(states, seeds=[0], steps=1), plain)
        seen = watch.take()
    assert seen.shape == (1, 77, 4, 4)
    torch.testing.assert_close(seen.sum(1), torch.ones(1, 4, 4))
    assert all(layer.processor is processor for layer, processor in zip(layers, kept, strict=True))


def test_contrast_by_hand():
    """Two maps of concept 0 and one of concept 1, scaled to 0..1: cosines 1, 0 and 0."""
    maps = torch.tensor([[1.0, 3.0, 1.0], [0.0, 0.5, 0.0], [2.0, 0.0, 0.0]])
    loss = contrast(maps, torch.tensor([0, 0, 1]), temperature=0.5)
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-2)))
    assert float(contrast(maps, torch.tensor([0, 1, 0]), temperature=0.5)) == pytest.approx((math.log(1 + math.exp(2)) + math.log(2)) / 2)


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]])
def test_no_contrast_without_others_or_without_pairs(labels):
    maps = torch.rand(3, 5, requires_grad=True)
    loss = contrast(maps, torch.tensor(labels), temperature=0.5)
    assert float(loss.detach()) == 0 and not torch.autograd.grad(loss, maps)[0].any()


def test_contrast_ignores_order_and_scale():
    maps, labels, order = torch.rand(6, 9), torch.tensor([0, 0, 1, 1, 2, 2]), torch.randperm(6)
    loss = contrast(maps, labels, temperature=0.5)
    torch.testing.assert_close(contrast(maps[order] * 3 + 1, labels[order], temperature=0.5), loss)


def test_the_gradient_is_that_of_every_readers_own_weights(pipeline, parts):
    """A change of weights between a pass and its gradient would go unnoticed by the loss alone."""
    cast, steady, latent = Cast(pipeline, parts), Clora(), torch.randn(1, 4, 8, 8)
    script, watch, layers = Script.of(cast, scene(guidance=1.0)), Watch((8, 8)), cast.pipeline.cross_attentions
    from loraclr.conditioning import conditioned

    with watched(layers, watch), conditioned(layers, latent=(8, 8)):
        moved = latent.clone().requires_grad_()
        time = torch.tensor(500)
        (slope,) = torch.autograd.grad(steady.loss(cast, script, watch, moved, time), moved)
        step = slope / slope.norm()
        ends = [float(steady.loss(cast, script, watch, latent + sign * 0.02 * step, time).double()) for sign in (1, -1)]
    assert (ends[0] - ends[1]) / 0.04 == pytest.approx(float(slope.norm()), rel=0.05)


# ---- the cast


def test_the_model_comes_back_and_plays_what_applying_gives(pipeline, parts):
    before = {name: (module.weight, module.weight.clone()) for name, module in pipeline.modules.items()}
    cast, states = Cast(pipeline, parts), pipeline.encode(["a"])
    with cast.playing(0):
        playing = pipeline.denoise(states, seeds=[0], steps=1)
    with pipeline.applied(parts[0].adapter):
        assert torch.equal(pipeline.denoise(states, seeds=[0], steps=1), playing)
    with pytest.raises(ZeroDivisionError), cast.playing(1), cast.speaking(1):
        1 / 0  # noqa: B018
    for name, module in pipeline.modules.items():
        assert module.weight is before[name][0] and torch.equal(module.weight, before[name][1])


# ---- whole pictures


def ordinary(pipeline, part: Part, prompt: str, **changes) -> torch.Tensor:
    with pipeline.applied(part.adapter, scale=part.scale):
        return pipeline.denoise(
            pipeline.encode([prompt]),
            **{"seeds": [1], "steps": 3, "size": SIZE, "guidance": 4.0, "negative": pipeline.encode([""]), **changes},
        )


ALL = [Omg(start=0.0, threshold=0.0), Clora(threshold=0.0)]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("strategy", ALL, ids=lambda one: one.name)
def test_one_part_over_the_whole_picture_is_ordinary_sampling(pipeline, parts, strategy, which):
    prompt = f"two {parts[which].call} here"
    drawn = strategy.draw(Cast(pipeline, [parts[which]]), scene(prompt, regions=(Region(prompt, WHOLE),)))
    torch.testing.assert_close(drawn, ordinary(pipeline, parts[which], prompt), rtol=0, atol=1e-5)


@pytest.mark.parametrize("strategy", [Omg(start=0.0), Clora()], ids=lambda one: one.name)
def test_a_part_of_no_strength_called_by_its_noun_is_the_base(pipeline, strategy):
    part = Part(adapter(pipeline, "ada", triggers=("man",)), scale=0.0, noun="man")
    drawn = strategy.draw(Cast(pipeline, [part]), scene("a man"))
    plain = pipeline.denoise(pipeline.encode(["a man"]), negative=pipeline.encode([""]), seeds=[1], steps=3, size=SIZE, guidance=4.0)
    torch.testing.assert_close(drawn, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("start", "passes"), [(0.0, 12), (0.5, 10), (0.9, 6)])
def test_the_base_alone_takes_away_the_first_noise(pipeline, parts, start, passes):
    """Times 751, 501, 251 and 1: a pass of the base at each, and of both parts where no more than 1 - start of 1000 is left."""
    regions, times = (Region("an ada man", (0, 0, 1, 0.5)), Region("a <ben>", (0, 0.5, 1, 1))), []
    handle = pipeline.unet.register_forward_pre_hook(lambda module, inputs: times.append(int(inputs[1])))
    Omg(start=start).draw(Cast(pipeline, parts), scene(regions=regions, steps=4))
    handle.remove()
    assert len(times) == passes and times[0] == 751


@pytest.mark.parametrize("strategy", [Omg(), Clora(refinements=1)], ids=lambda one: one.name)
def test_the_order_of_the_parts_does_not_matter(pipeline, parts, strategy):
    forward, backward = (strategy.draw(Cast(pipeline, order), scene()) for order in (parts, parts[::-1]))
    torch.testing.assert_close(forward, backward, rtol=0, atol=1e-3)


def test_contrast_moves_the_picture(pipeline, parts):
    still, moved = (Clora(rate=rate, refinements=1).draw(Cast(pipeline, parts), scene(guidance=1.0)) for rate in (0.0, 5.0))
    assert not torch.allclose(still, moved, atol=1e-3)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_seed_is_a_picture_whatever_the_batch_and_the_settings_say_how(pipeline, parts, name):
    def draw(seeds, batch):
        pictures = generate(
            pipeline,
            ["an ada man and a <ben>"],
            seeds=seeds,
            steps=2,
            size=SIZE,
            batch_size=batch,
            strategy=make_strategy(name),
            parts=parts,
        )
        return {made.seed: made for made in pictures}

    together, alone = draw([1, 2], 2), draw([2], 1)
    assert (np.asarray(together[2].image) == np.asarray(alone[2].image)).all()
    assert together[2].settings == alone[2].settings
    assert alone[2].settings["strategy"]["name"] == name
    assert alone[2].settings["adapters"] == [{"name": "ada", "scale": 1.0, "noun": "man"}, {"name": "ben", "scale": 1.0, "noun": "dog"}]


# ---- mistakes


@pytest.mark.parametrize(
    ("prompt", "regions", "message"),
    [
        ("a dog", [], r"does not hold 'ada man' \(ada\), '<ben>' \(ben\)"),
        ("an ada man and a <ben>", [Region("a", WHOLE)], "2 adapters and 1 regions"),
    ],
)
@pytest.mark.parametrize("name", STRATEGIES)
def test_mistakes_are_said_at_the_call(pipeline, parts, name, prompt, regions, message):
    with pytest.raises(UsageError, match=message):
        generate(pipeline, [prompt], seeds=[0], strategy=make_strategy(name), parts=parts, regions=regions)


def test_more_mistakes(pipeline, parts):
    regions = [Region("a man", WHOLE), Region("a <ben>", WHOLE)]
    with pytest.raises(UsageError, match="ada's region 'a man' does not hold 'ada man'"):
        generate(pipeline, ["an ada man and a <ben>"], seeds=[0], strategy=Clora(), parts=parts, regions=regions)
    generate(pipeline, ["two people"], seeds=[0], strategy=Omg(), parts=parts, regions=regions)
    unsaid = [parts[0], Part(parts[1].adapter)]
    for places in ([], regions):
        with pytest.raises(UsageError, match="what kind of thing is ben.*--class ben=WORDS"):
            generate(pipeline, ["an ada man and a <ben>"], seeds=[0], strategy=Omg(), parts=unsaid, regions=places)
    for strategy in (Omg(), Clora()):
        with pytest.raises(UsageError, match="beyond the 77 tokens"):
            generate(pipeline, ["a" * 80 + " ada man"], seeds=[0], strategy=strategy, parts=parts[:1])
        with pytest.raises(PipelineError, match="144x160 has 18 cells a side, and masks are read from those of 16 or less"):
            generate(pipeline, ["an ada man"], seeds=[0], strategy=strategy, parts=parts[:1], size=(144, 160))
        generate(pipeline, ["an ada man"], seeds=[0], strategy=strategy, parts=parts[:1], size=(128, 160))
    foreign = Part(Adapter.of([LoraLayer("unet.nowhere", torch.ones(1, 4), torch.ones(4, 1))], name="far").with_(triggers=("far man",)))
    with pytest.raises(PipelineError, match=r"unet\.nowhere"):
        generate(pipeline, ["a far man"], seeds=[0], strategy=Omg(), parts=[foreign])
    with pytest.raises(UsageError, match="no strategy called 'ogm'.*did you mean 'omg'"):
        make_strategy("ogm")
    with pytest.raises(UsageError, match="at least one adapter"):
        generate(pipeline, ["a"], seeds=[0], strategy=Omg())
    with pytest.raises(UsageError, match="need a strategy"):
        generate(pipeline, ["a"], seeds=[0], parts=parts)
    with pytest.raises(UsageError, match="takes its adapters as parts"), pipeline.applied(parts[0].adapter):
        generate(pipeline, ["an ada man"], seeds=[0], strategy=Omg(), parts=parts[:1])
    for wrong in (lambda: Omg(start=1.0), lambda: Omg(threshold=-0.1), lambda: Clora(temperature=0), lambda: Clora(until=2)):
        with pytest.raises(UsageError):
            wrong()
