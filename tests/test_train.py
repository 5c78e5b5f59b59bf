"""Training: laws that every recipe keeps, hand-computed values of the loop's parts, and what is refused before any work."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
from families_twins import twin
from PIL import Image, ImageDraw

import loraclr
from loraclr.adapter import Adapter, DenseLayer, LoraLayer
from loraclr.cli import main
from loraclr.collect import Collection
from loraclr.errors import PipelineError, TrainError, UsageError
from loraclr.formats import load_adapter, save_adapter
from loraclr.merge import merge
from loraclr.pipeline import Pipeline, PromptTruncationWarning
from loraclr.train import RECIPES, Recipe, SharedRowsWarning, make_recipe, parameters, shared_rows, train
from loraclr.train.attention import attention_penalty, watched
from loraclr.train.data import Examples, Shot, read_folder
from loraclr.train.loop import Diffusion, masked_mean
from loraclr.train.orthogonal import basis, warn_of_shared_rows
from loraclr.train.student import Learned, Student, keys_and_values, text_attention, unet_attention
from loraclr.train.work import WorkFolder, draw_curve

DIM, LAYERS = 32, 10  # of the tiny pipeline
STEPS = 4
SMALL = {  # settings that make every recipe quick, and exercise what it alone has
    "lora": {"rank": 2, "alpha": 1.0, "text_rank": 2},
    "edlora": {"rank": 2, "alpha": 2.0, "text_rank": 2, "lr": 1e-3, "noise_offset": 0.1},
    "orthogonal": {"rank": 4, "alpha": 4.0, "text_rank": 4, "lr": 1e-3, "index": 1},
    "textual-inversion": {},
    "pplus": {"batch": 2},
    "custom-diffusion": {"batch": 1, "prior_pictures": 2, "lr": 1e-3, "rank": 4},
    "style": {"rank": 2, "text_rank": 0},
}


def small(name: str, **changes: object) -> Recipe:
    return make_recipe(name, **{"steps": STEPS, **SMALL[name], **changes})


def learn(folder: Path, pipeline: Pipeline, recipe: Recipe, **changes: object) -> Adapter:
    asked = {"trigger": "qq", "class_word": None if recipe.name == "style" else "m", "sample_every": 0, **changes}
    return train(folder, base=pipeline, recipe=recipe, **asked)


@pytest.fixture
def pipeline(tiny_pipe) -> Pipeline:
    return Pipeline(tiny_pipe())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three small pictures with masks, one of them with a caption."""
    made = tmp_path_factory.mktemp("pictures")
    (made / "masks").mkdir()
    for number in range(3):
        image, mask = Image.new("RGB", (20, 24), (200, 60 * number, 30)), Image.new("L", (20, 24))
        ImageDraw.Draw(image).rectangle((5, 5, 12, 18), fill=(20, 200, 40 * number))
        ImageDraw.Draw(mask).rectangle((5, 5, 12, 18), fill=255)
        image.save(made / f"{number}.png")
        mask.save(made / "masks" / f"{number}.png")
    (made / "1.txt").write_text("a <TOK> by the sea\n\n <TOK>  smiling\n")
    return made


def fingerprint(pipeline: Pipeline) -> tuple[object, ...]:
    """All that a training could leave behind in a pipeline."""
    digest, flags = hashlib.sha256(), []
    for part in (pipeline.pipe.unet, pipeline.pipe.text_encoder, pipeline.pipe.vae):
        for name, tensor in part.state_dict().items():
            digest.update(name.encode() + tensor.numpy().tobytes())
        flags += [parameter.requires_grad for parameter in part.parameters()] + [module.training for module in part.modules()]
        flags += [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in part.modules()]
        flags += [type(module).__name__ for module in part.modules()] + [hasattr(part, "peft_config"), sorted(part.__dict__)]
    attention = [pipeline.pipe.unet.get_submodule(path) for path in pipeline.cross_attention_layers]
    return (
        digest.hexdigest(),
        flags,
        [id(processor) for processor in pipeline.pipe.unet.attn_processors.values()],
        ["get_attention_scores" in vars(module) for module in attention],
        id(pipeline.pipe.tokenizer),
        len(pipeline.pipe.tokenizer),
        id(pipeline.pipe.text_encoder.get_input_embeddings()),
        pipeline.pipe.text_encoder.config._attn_implementation,
        pipeline.tokens,
    )


def killed_at(step: int, of: int):
    def tell(what: str, share: float) -> None:
        if what.startswith("training") and round(share * of) == step:
            raise KeyboardInterrupt

    return tell


# ---- laws of every recipe


@pytest.mark.parametrize("name", RECIPES)
def test_the_base_comes_back_and_a_killed_run_ends_like_an_unbroken_one(name, pipeline, folder, tmp_path):
    before, state = fingerprint(pipeline), torch.get_rng_state()
    unbroken = learn(folder, pipeline, small(name), work=tmp_path / "whole")
    assert fingerprint(pipeline) == before and torch.equal(torch.get_rng_state(), state)

    with pytest.raises(KeyboardInterrupt):
        learn(folder, pipeline, small(name), work=tmp_path / "killed", checkpoint_every=2, progress=killed_at(3, STEPS))
    assert fingerprint(pipeline) == before
    assert len((tmp_path / "killed" / "loss.csv").read_text().splitlines()) == 3
    torch.manual_seed(99)
    resumed = learn(folder, pipeline, small(name), work=tmp_path / "killed", checkpoint_every=2)
    assert resumed == unbroken and resumed.metadata == unbroken.metadata  # equal to the last bit
    assert (tmp_path / "killed" / "loss.csv").read_text() == (tmp_path / "whole" / "loss.csv").read_text()

    assert learn(folder, pipeline, small(name), seed=1) != unbroken
    changed = [layer.name for layer in unbroken if bool((layer.delta() != 0).any())]
    assert len(changed) == len(unbroken) and (changed or unbroken.tokens)


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_teaches(name, pipeline, folder):
    start = pipeline.pipe.text_encoder.get_input_embeddings().weight
    adapter = learn(folder, pipeline, small(name, steps=2))
    both = set(unet_attention(pipeline)) | set(text_attention(pipeline))
    expected = {
        "lora": (both, {}, "qq m"),
        "edlora": (both, {"<qq1>": LAYERS, "<qq2>": LAYERS}, "<qq1> <qq2>"),
        "orthogonal": (both, {"<qq1>": LAYERS, "<qq2>": LAYERS}, "<qq1> <qq2>"),
        "textual-inversion": (set(), {"<qq>": 1}, "<qq>"),
        "pplus": (set(), {"<qq>": LAYERS}, "<qq>"),
        "custom-diffusion": (set(keys_and_values(pipeline)), {"<qq>": 1}, "<qq> m"),
        "style": (set(unet_attention(pipeline)), {}, "qq style"),
    }[name]
    found = set(adapter.layers), {token: len(rows) for token, rows in adapter.tokens.items()}, adapter.triggers[0]
    assert found == expected
    assert len(both) == 2 * LAYERS * 4 + 2 * 4 and len(keys_and_values(pipeline)) == 2 * LAYERS
    for rows in adapter.tokens.values():  # the layers' rows began alike and have learned apart, none stayed at the class word
        assert len(rows.unique(dim=0)) == len(rows) and not bool((rows[:, None] == start).all(-1).any())
    told = json.loads(adapter.metadata["loraclr.training"])
    assert told["recipe"] == name and told["parameters"]["steps"] == 2 and told["call"] == expected[2] and math.isfinite(told["loss"])


@pytest.mark.parametrize("name", RECIPES)
def test_files_give_the_adapter_back(name, pipeline, folder, tmp_path):
    adapter = learn(folder, pipeline, small(name, steps=1))
    form = "edlora" if adapter.tokens else "kohya"
    path = save_adapter(adapter, tmp_path / ("qq.pth" if form == "edlora" else "qq.safetensors"), format=form, dtype=torch.float32)
    back = load_adapter(path)
    assert back.triggers == adapter.triggers and back.metadata["loraclr.training"] == adapter.metadata["loraclr.training"]
    assert back.tokens.keys() == adapter.tokens.keys() and all(torch.equal(back.tokens[key], adapter.tokens[key]) for key in back.tokens)
    for layer in adapter:
        torch.testing.assert_close(back.layers[layer.name].delta(), layer.delta(), rtol=1e-6, atol=1e-9)


def test_an_edlora_file_has_the_released_layout(pipeline, folder, tmp_path):
    adapter = learn(folder, pipeline, small("edlora", steps=1))
    raw = torch.load(save_adapter(adapter, tmp_path / "qq.pth", format="edlora"), weights_only=True)["params"]
    assert raw["new_concept_embedding"].keys() == {"<qq1>", "<qq2>"} and raw["new_concept_embedding"]["<qq1>"].shape == (LAYERS, DIM)
    assert "text_model.encoder.layers.0.self_attn.q_proj.lora_down.weight" in raw["text_encoder"]
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_up.weight" in raw["unet"]
    assert len(raw["text_encoder"]) == 2 * 8 and len(raw["unet"]) == 2 * 8 * LAYERS


def test_the_files_of_all_recipes_merge_together(pipeline, folder, tmp_path):
    triggers = dict(zip(RECIPES, ("ada", "ben", "eva", "fay", "dee", "cai", "gus"), strict=True))
    forms = {"edlora": "edlora", "orthogonal": "edlora", "pplus": "edlora", "textual-inversion": "embedding"}
    extra = {"custom-diffusion": {"rank": 0}}  # whole matrices, and its token beside them
    paths = []
    for name, trigger in triggers.items():
        adapter = learn(folder, pipeline, small(name, steps=2, **extra.get(name, {})), trigger=trigger)
        form = forms.get(name, "kohya")
        path = tmp_path / f"{trigger}{'.pth' if form == 'edlora' else '.safetensors'}"
        paths.append(save_adapter(adapter, path, format=form, dtype=torch.float32))
        assert load_adapter(path).call == adapter.call
    quick = Collection(fit=("a {}",), held_out=("the {}",), preserve=("a m",), steps=2)
    merged = merge(paths, base=pipeline, collection=quick).adapter
    assert set(merged.layers) == set(unet_attention(pipeline)) | set(text_attention(pipeline))
    assert set(merged.tokens) == {"<ben1>", "<ben2>", "<eva1>", "<eva2>", "<cai>", "<dee>", "<fay>"}
    with pipeline.applied(merged):
        assert torch.isfinite(pipeline.encode(["an ada m and <ben1> <ben2> with <cai> m in gus style"])).all()


# ---- the loop and its parts, by hand


@pytest.mark.parametrize(("prediction", "target"), [("epsilon", 2.0), ("v_prediction", 0.8 * 2 - 0.6 * 1), ("sample", 1.0)])
def test_noise_and_target_by_hand(prediction, target):
    noisy, wanted = Diffusion(torch.tensor([0.5, 0.64]), prediction).noisy(
        torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0), torch.tensor([1])
    )
    assert noisy.item() == pytest.approx(0.8 * 1 + 0.6 * 2) and wanted.item() == pytest.approx(target)


def test_the_forward_process_is_diffusers():
    from diffusers import DDPMScheduler

    for prediction in ("epsilon", "v_prediction"):
        scheduler = DDPMScheduler(prediction_type=prediction, rescale_betas_zero_snr=True)
        clean, noise, times = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0, 999])
        noisy, target = Diffusion.of(scheduler).noisy(clean, noise, times)
        torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, times))
        torch.testing.assert_close(target, scheduler.get_velocity(clean, noise, times) if prediction != "epsilon" else noise)


def test_a_scheduler_without_noise_levels_is_refused():
    from diffusers import FlowMatchEulerDiscreteScheduler

    with pytest.raises(PipelineError, match="FlowMatchEulerDiscreteScheduler .* cannot be trained|no diffusion that can be trained"):
        Diffusion.of(FlowMatchEulerDiscreteScheduler())


def test_masked_mean_by_hand():
    error = torch.tensor([[1.0, 2.0], [3.0, 10.0]]).view(1, 1, 2, 2).repeat(2, 3, 1, 1)
    masks = torch.stack([torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.zeros(2, 2)])[:, None]
    assert masked_mean(error, masks).tolist() == [2.0, 0.0]


def test_learning_rates_rise_and_fall():
    recipe = make_recipe("lora", steps=10, warmup=2, hold=0.5)
    assert [recipe.rate(step) for step in (0, 1, 5, 9)] == pytest.approx([0.5, 1.0, 1.0, 0.2])
    assert [make_recipe("lora", steps=10).rate(step) for step in (0, 9)] == [1.0, 1.0]
    assert make_recipe("edlora", steps=10).rate(5) == pytest.approx(0.5)


def test_only_the_learned_rows_of_a_table_learn():
    table = torch.nn.Embedding(4, 2).requires_grad_(False)
    before = table.weight.clone()
    learned = Learned(table, torch.tensor([3, 1]))
    ids = torch.tensor([[0, 1, 3, 1]])
    assert torch.equal(learned(ids), table(ids))
    learned(ids).sum().backward()
    assert learned.rows.grad.tolist() == [[1.0, 1.0], [2.0, 2.0]] and table.weight.grad is None
    with torch.no_grad():
        learned.rows += 1
    assert torch.equal(learned(ids)[0, [0]], before[[0]]) and torch.equal(learned(ids)[0, 1:], before[[1, 3, 1]] + 1)


def test_training_lowers_the_loss(pipeline, folder):
    recipe = make_recipe("lora", steps=25, batch=6, rank=4, lr=1e-2, text_rank=0)
    shots, _ = read_folder(folder)
    own = Examples(pipeline, shots, templates=["a {}"], call="qq m", flip=False)
    diffusion = Diffusion.of(pipeline.pipe.scheduler)
    times = torch.arange(0, 1000, 100)
    clean = own.latents[torch.arange(len(times)) % 3]
    noisy, target = diffusion.noisy(clean, torch.randn(clean.shape, generator=torch.Generator().manual_seed(7)), times)
    states = pipeline.encode(["a qq m"]).expand(len(times), -1, -1)

    def loss() -> float:
        with torch.no_grad():
            return float((pipeline.pipe.unet(noisy, times, states).sample - target).square().mean())

    before = loss()
    with pipeline.applied(learn(folder, pipeline, recipe)):
        assert loss() < 0.9 * before


def test_the_curve_is_a_picture_of_the_losses():
    image = np.asarray(draw_curve([1.0] * 30 + [0.5] * 30))
    blue = np.argwhere((image == (30, 90, 200)).all(-1))
    left, right = blue[blue[:, 1] < 200][:, 0].mean(), blue[blue[:, 1] > 550][:, 0].mean()
    assert image.shape == (320, 640, 3) and right > left + 20  # lower losses stand lower
    assert draw_curve([0.0]).size == (640, 320)


# ---- recipes, one by one


def test_rank_alpha_and_the_text_encoder_are_free(pipeline, folder):
    adapter = learn(folder, pipeline, make_recipe("lora", steps=1, rank=3, alpha=6.0, text_rank=5, text_alpha=1.0))
    assert {(layer.rank, layer.scale) for layer in adapter if layer.name.startswith("unet")} == {(3, 2.0)}
    assert {(layer.rank, layer.scale) for layer in adapter if layer.name.startswith("text")} == {(5, 0.2)}


def test_prior_preservation_draws_the_class_once_and_adds_its_loss(pipeline, folder, tmp_path):
    recipe = small("lora", steps=1, prior_weight=1.0, prior_pictures=2, batch=1, lr=0.0, text_lr=0.0)
    learn(folder, pipeline, recipe, work=tmp_path / "a")
    drawn = sorted((tmp_path / "a" / "class").iterdir())
    assert [path.name for path in drawn] == ["0000.png", "0001.png"]
    (expected,) = pipeline.sample(["a photo of a m"], seeds=[1])
    assert (np.asarray(Image.open(drawn[1])) == np.asarray(expected)).all()
    before = [path.stat().st_mtime_ns for path in drawn]
    (tmp_path / "a" / "checkpoint.pt").unlink()  # as after a training that ended
    once = learn(folder, pipeline, recipe, work=tmp_path / "a")
    assert [path.stat().st_mtime_ns for path in drawn] == before
    twice = learn(folder, pipeline, small("lora", steps=1, prior_weight=2.0, batch=1, lr=0.0, text_lr=0.0), class_pictures=drawn[0].parent)
    none = learn(folder, pipeline, small("lora", steps=1, prior_weight=1e-9, batch=1, lr=0.0, text_lr=0.0), class_pictures=drawn[0].parent)
    losses = [json.loads(one.metadata["loraclr.training"])["loss"] for one in (none, once, twice)]
    assert losses[1] - losses[0] == pytest.approx(losses[2] - losses[1], rel=1e-4) and losses[1] > losses[0]


def test_what_another_class_or_another_base_drew_is_drawn_again(pipeline, folder, tmp_path):
    recipe = small("lora", steps=1, prior_weight=1.0, prior_pictures=1, batch=1)

    def drawn(word: str, *, restart: bool = False) -> tuple[np.ndarray, int]:
        learn(folder, pipeline, recipe, class_word=word, work=tmp_path / "a", restart=restart)
        (tmp_path / "a" / "checkpoint.pt").unlink()  # as after a training that ended
        (path,) = (tmp_path / "a" / "class").iterdir()
        return np.asarray(Image.open(path)), path.stat().st_mtime_ns

    def expected(word: str) -> np.ndarray:
        return np.asarray(pipeline.sample([f"a photo of a {word}"], seeds=[0])[0])

    man, cat = drawn("m")[0], drawn("k")[0]
    assert (man != cat).any() and (cat == expected("k")).all()
    with torch.no_grad():
        pipeline.base_weight(keys_and_values(pipeline)[0]).mul_(-3)
    other, when = drawn("k")
    assert (other == expected("k")).all() and (other != cat).any()
    again, later = drawn("k", restart=True)
    assert (again == other).all() and later > when


def test_learned_tokens_stop_at_their_norm(pipeline, folder, tmp_path):
    runs = {
        (stop, steps): learn(folder, pipeline, small("edlora", steps=steps, norm_stop=stop, hold=1.0)).tokens["<qq1>"]
        for stop in (0.0, None)
        for steps in (1, 3)
    }
    recipe = small("edlora", steps=3, norm_stop=0.0, hold=1.0)
    with pytest.raises(KeyboardInterrupt):
        learn(folder, pipeline, recipe, work=tmp_path, checkpoint_every=1, progress=killed_at(2, 3))
    assert torch.equal(learn(folder, pipeline, recipe, work=tmp_path).tokens["<qq1>"], runs[0.0, 1])  # stopped stays stopped
    assert torch.equal(runs[0.0, 1], runs[0.0, 3]) and not torch.equal(runs[None, 1], runs[None, 3])


def test_attention_penalty_by_hand():
    maps = torch.zeros(1, 4, 3)  # one picture, 2x2 cells, three text tokens
    maps[0, :, 1], maps[0, :, 2] = torch.tensor([0.4, 0.2, 0.0, 0.0]), torch.tensor([0.5, 0.0, 0.0, 0.25])
    mask = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).view(1, 1, 2, 2)
    places = torch.tensor([[1, 2]])
    inside = attention_penalty([maps], places, mask, latent=(2, 2), whole=False)
    assert inside.item() == pytest.approx(((0.5 + 0 + 0) / 3 + (0 + 0 + 0.5) / 3) / 2)
    whole = attention_penalty([maps, maps], places, mask, latent=(2, 2), whole=True)
    assert whole.item() == pytest.approx((0.5 / 3 + (0 + 0 + 0 + 0.25) / 4) / 2)
    assert attention_penalty([maps], places, torch.ones(1, 1, 2, 2), latent=(2, 2), whole=False) is None
    assert attention_penalty([maps], torch.tensor([[1, -1]]), mask, latent=(2, 2), whole=False) is None


def test_watching_changes_nothing_and_sees_every_layer(pipeline):
    unet, states = pipeline.pipe.unet, torch.randn(2, 5, DIM)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), states
    with torch.no_grad():
        plain = unet(*inputs).sample
        maps: list[torch.Tensor] = []
        with watched([unet.get_submodule(path) for path in pipeline.cross_attention_layers], maps, lambda: True):
            seen = unet(*inputs).sample
    torch.testing.assert_close(seen, plain, rtol=1e-4, atol=1e-5)
    assert len(maps) == LAYERS and {one.shape for one in maps} == {(2, 64, 5), (2, 16, 5), (2, 4, 5)}
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 64))


def test_masks_and_the_attention_penalty_count(pipeline, folder):
    told = [
        learn(folder, pipeline, small("edlora", steps=2, attention_weight=weight)).metadata["loraclr.training"] for weight in (0.0, 0.5)
    ]
    losses = [json.loads(one)["loss"] for one in told]
    assert 0 < losses[1] - losses[0] < 0.5  # every map is between 0 and 1


def test_orthogonal_blocks_are_disjoint_and_stay_as_they_were(pipeline, folder):
    rank = 4
    ones = [learn(folder, pipeline, small("orthogonal", steps=2, index=index), trigger=f"q{index}") for index in (0, 1, 0)]
    for layer in ones[1]:
        width = layer.down.shape[1]
        assert torch.equal(layer.down, basis(width)[rank : 2 * rank].float() / 2)  # untouched by training
    apart, same = shared_rows(ones[0], ones[1]), shared_rows(ones[0], ones[2])
    assert set(apart) == set(ones[0].layers) and max(apart.values()) < 1e-9
    assert list(same.values()) == pytest.approx([rank] * len(same))
    own = ones[0].layers[unet_attention(pipeline)[0]]
    other = ones[1].layers[own.name]
    assert float((other.delta() @ own.down.T).abs().max()) < 1e-6 < float((own.delta() @ own.down.T).abs().max())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_shared_rows(ones[0], [ones[1]])
    with pytest.warns(SharedRowsWarning, match=r"q0 and q0 share directions in 88 layers .*another index"):
        learn(folder, pipeline, small("orthogonal", steps=1, index=0), trigger="q0", beside=[ones[2]])


@pytest.mark.parametrize("width", [32, 48])
def test_the_basis_is_orthogonal_and_always_the_same(width):
    q = basis(width)
    torch.testing.assert_close(q @ q.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-13)
    assert torch.equal(basis.__wrapped__(width), q)


def test_beyond_the_width_orthogonal_rows_are_random_and_say_so(pipeline, folder):
    recipe = small("orthogonal", steps=1, index=9)  # 9 * 4 + 4 is beyond 32, not beyond 64
    with pytest.warns(SharedRowsWarning, match=r"index 9 at rank 4 is beyond layers of width 32, which hold 8 concepts"):
        adapter = learn(folder, pipeline, recipe)
    wide = next(layer for layer in adapter if layer.down.shape[1] == 64)
    assert torch.equal(wide.down, basis(64)[36:40].float() / 2)
    narrow = next(layer for layer in adapter if layer.down.shape[1] == 32)
    torch.testing.assert_close(narrow.down @ narrow.down.T, torch.eye(4) / 4)


def test_random_and_gaussian_rows_are_choices(pipeline, folder):
    for rows in ("random", "gaussian"):
        pair = [learn(folder, pipeline, small("orthogonal", steps=1, rows=rows), seed=seed) for seed in (0, 1)]
        assert max(shared_rows(*pair).values()) > 0.01
        assert float(next(iter(pair[0])).down.norm(dim=1).mean()) == pytest.approx(0.5, rel=0.3)


def test_custom_diffusion_is_whole_or_says_what_the_rank_lost(pipeline, folder):
    whole = learn(folder, pipeline, small("custom-diffusion", rank=0))
    cut = learn(folder, pipeline, small("custom-diffusion", rank=2))
    assert all(isinstance(layer, DenseLayer) for layer in whole)
    assert all(isinstance(layer, LoraLayer) and layer.rank == 2 for layer in cut)
    gone = sum(float((layer.delta() - cut.layers[layer.name].delta()).square().sum()) for layer in whole)
    total = sum(float(layer.delta().square().sum()) for layer in whole)
    told = json.loads(cut.metadata["loraclr.training"])
    assert 0 < told["lost"] < 1 and told["lost"] == pytest.approx((gone / total) ** 0.5, rel=1e-3)
    assert "lost" not in json.loads(whole.metadata["loraclr.training"])


def test_bfloat16_trains_and_gives_the_base_back(pipeline, folder):
    before = fingerprint(pipeline)
    adapter = learn(folder, pipeline, small("edlora", bf16=True))
    assert fingerprint(pipeline) == before
    assert all(layer.up.dtype == torch.float32 and bool(layer.up.any()) for layer in adapter)


def test_a_student_encodes_as_the_pipeline_does(pipeline):
    rows = {"<qq>": torch.randn(LAYERS, DIM)}
    with pipeline.with_tokens(rows):
        expected = pipeline.encode(["a <qq> m", "a m"])
    with Student(pipeline, generator=torch.Generator()) as student:
        student.add_tokens(rows, lr=1.0)
        states = student.states(["a <qq> m", "a m"], pad=True)
        assert states.requires_grad and torch.equal(states.detach(), expected)
        assert student.token_places(["a <qq> m", "a m"]).tolist() == [[2], [-1]]


# ---- pictures


def test_captions_masks_and_mirrors(pipeline, folder):
    shots, problems = read_folder(folder, call="qq m")
    assert not problems and [shot.captions for shot in shots] == [(), ("a qq m by the sea", "qq m smiling"), ()]
    own = Examples(pipeline, shots, templates=["one {}", "two {}"], call="qq m", flip=True)
    assert own.latents.shape == (6, 4, 8, 8) and own.masks.shape == (6, 1, 8, 8)
    assert torch.equal(own.masks[3:], own.masks[:3].flip(-1)) and set(own.masks.unique().tolist()) == {0.0, 1.0}
    latents, prompts, masks = own.draw(50, torch.Generator().manual_seed(0))
    assert (
        set(prompts) == {"one qq m", "two qq m", "a qq m by the sea", "qq m smiling"}
        and latents.shape == (50, 4, 8, 8)
        and len(masks) == 50
    )
    plain = Examples(pipeline, [Shot(shots[0].image)], templates=["one {}"], call="x", flip=False)
    assert plain.masks is None and torch.equal(plain.draw(1, torch.Generator())[2], torch.ones(1, 1, 8, 8))


def test_latents_are_what_the_pipeline_decodes(pipeline):
    image = Image.new("RGB", (32, 16), (250, 10, 100))
    own = Examples(pipeline, [Shot(image)], templates=["{}"], call="x", flip=False)
    pixels = torch.tensor([250, 10, 100]).view(1, 3, 1, 1).expand(-1, -1, 16, 16) / 127.5 - 1
    with torch.no_grad():
        mean = pipeline.pipe.vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(own.latents, mean * pipeline.pipe.vae.config.scaling_factor)


@pytest.mark.parametrize("name", ["lora", "edlora"])
def test_captions_that_are_cut_before_the_concept_are_refused_and_others_warned_of(name, pipeline, tmp_path):
    call = 2 if name == "edlora" else pipeline.token_count("qq m") - 2
    room = pipeline.text_length - 2 - call  # for words before the call
    Image.new("RGB", (16, 16)).save(tmp_path / "1.png")
    recipe, caption = small(name, steps=1), tmp_path / "1.txt"
    caption.write_text("m " * room + "<TOK>")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromptTruncationWarning)
        learn(tmp_path, pipeline, recipe)
    caption.write_text("m " * room + "<TOK> m")
    with pytest.warns(PromptTruncationWarning, match=r"1 of \d+ captions are longer than the \d+ tokens .*: what is behind does not count"):
        learn(tmp_path, pipeline, recipe)
    caption.write_text("m " * (room + 1) + "<TOK>")
    with pytest.raises(UsageError, match=r"'m m .*\.\.\. names the concept behind the \d+ tokens that the text encoder reads; name it"):
        learn(tmp_path, pipeline, recipe)


def test_a_mask_without_white_where_the_picture_is_trained_is_refused(pipeline, tmp_path):
    (tmp_path / "masks").mkdir()
    outside = Image.new("L", (48, 16))  # of which the middle third is trained
    outside.paste(255, (0, 0, 10, 16))
    for file, mask in (("1.png", Image.new("L", (48, 16), 127)), ("2.png", outside), ("3.png", Image.new("L", (48, 16), 128))):
        Image.new("RGB", mask.size).save(tmp_path / file)
        mask.save(tmp_path / "masks" / file)
    with pytest.raises(UsageError, match=r"the mask of 1.png is black all over .*8x8 cells; make it white.*the mask of 2.png") as caught:
        learn(tmp_path, pipeline, small("lora"))
    assert "3.png" not in str(caught.value)


# ---- the work folder


def test_samples_appear_while_training(pipeline, folder, tmp_path):
    seen: list[str] = []
    learn(folder, pipeline, small("textual-inversion"), work=tmp_path / "w", sample_every=3, progress=lambda what, share: seen.append(what))
    assert sorted(path.name for path in (tmp_path / "w" / "samples").iterdir()) == ["00000.png", "00003.png", "00004.png"]
    assert Image.open(tmp_path / "w" / "samples" / "00004.png").size == (64, 16)
    assert len(seen) == STEPS and all(what.startswith("training: loss ") for what in seen)
    assert {path.name for path in (tmp_path / "w").iterdir()} == {"checkpoint.pt", "loss.csv", "loss.png", "samples"}


def test_a_work_folder_of_another_training_is_refused(pipeline, folder, tmp_path):
    learn(folder, pipeline, small("lora"), work=tmp_path / "w")
    with pytest.raises(TrainError, match=r"unfinished training with other settings \(parameters .*remove .* or restart"):
        learn(folder, pipeline, small("lora", rank=1), work=tmp_path / "w")
    with pytest.raises(TrainError, match=r"seed 0 there, 5 now"):
        learn(folder, pipeline, small("lora"), work=tmp_path / "w", seed=5)
    learn(folder, pipeline, small("lora"), work=tmp_path / "w", seed=5, restart=True)
    (tmp_path / "w" / "checkpoint.pt").write_bytes(b"no archive")
    with pytest.raises(TrainError, match=r"checkpoint.pt cannot be read"):
        WorkFolder(tmp_path / "w").resume({})


def test_a_training_that_diverges_stops(pipeline, folder):
    with pytest.raises(TrainError, match=r"the loss is (nan|inf) at step \d; lower the learning rates"):
        learn(folder, pipeline, small("lora", lr=1e20, clip=0.0, steps=6))


# ---- refused before any work


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("lora", {"class_word": None}, "no class word; say what 'qq' is"),
        ("lora", {"trigger": "M"}, "the trigger 'M' is an ordinary word of the class .m.; give a rare word"),
        ("lora", {"trigger": " "}, "the trigger is empty"),
        ("lora", {"trigger": "<qq>"}, "looks like a learned token, and this recipe learns none"),
        ("style", {"class_word": "m"}, "the class word 'm' has no place in this recipe"),
        ("style", {"trigger": "style"}, "an ordinary word of the class .style."),
        ("edlora", {"class_word": "woman"}, "the class word 'woman' is 5 tokens"),
        ("edlora", {"trigger": "two words"}, "makes no token; give one word"),
        ("pplus", {"trigger": "m"}, "is an ordinary word of the class"),
        ("lora", {"class_pictures": "absent"}, "there is no folder absent.*prior_weight 0; set it to 1"),
        ("lora", {"templates": ["a photo"]}, "the template 'a photo' has no {}"),
        ("lora", {"work": "/no/such/folder/w"}, "there is no folder /no/such/folder for w"),
        ("lora", {"beside": [Adapter({})]}, "adapters beside it are for the recipe 'orthogonal'"),
        ("lora", {"checkpoint_every": 0}, "checkpoint_every 0 is not a number of steps"),
    ],
)
def test_wrong_words_are_refused(name, asked, message, pipeline, folder):
    before = fingerprint(pipeline)
    with pytest.raises(UsageError, match=message):
        learn(folder, pipeline, small(name), **asked)
    assert fingerprint(pipeline) == before


def test_everything_wrong_is_in_one_message(pipeline, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "c.png")
    (tmp_path / "b.txt").write_text("\n")
    (tmp_path / "c.txt").write_text("a tree")
    (tmp_path / "masks").mkdir()
    Image.new("L", (5, 4)).save(tmp_path / "masks" / "b.png")
    with pytest.raises(UsageError) as caught:
        learn(tmp_path, pipeline, make_recipe("lora", rank=33, text_rank=40))
    said = str(caught.value)
    for part in (
        "a.png is not a picture that can be read",
        "a.png has no mask in",
        "b.png is 4x4 and its mask 5x4; make them equal",
        "b.txt is empty; write a caption into it, or remove it",
        "the caption c.txt does not name the concept; write <TOK>",
        "rank 33 is larger than",
        "rank 40 is larger than 8 layers, such as text_encoder.encoder.layers.0.self_attn.k_proj of rank 32; give 32 or less",
    ):
        assert part in said
    with pytest.raises(UsageError, match=r"has no pictures; put some there, ending in .*\.png"):
        learn(tmp_path / "masks" / "..", pipeline, small("lora"), class_pictures=_empty(tmp_path))


def _empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def test_a_token_that_exists_is_refused(pipeline, folder):
    with (
        pipeline.with_tokens({"<qq1>": torch.randn(1, DIM)}),
        pytest.raises(UsageError, match="'<qq1>' is a word the tokenizer already has"),
    ):
        learn(folder, pipeline, small("edlora"))


def test_unknown_recipes_and_settings_are_answered_with_the_nearest():
    with pytest.raises(UsageError, match=r"no recipe 'edlor'. Did you mean 'edlora'\? There are: lora, edlora, "):
        make_recipe("edlor")
    with pytest.raises(
        UsageError, match=r"no preset 'toy'.* no parameter 'stepz'. Did you mean 'steps'\?.*rank='x' must be a whole number"
    ):
        make_recipe("lora:toy", stepz=3, rank="x")
    with pytest.raises(UsageError, match=r"recipe 'lora': hold=2.0 must be at most 1"):
        make_recipe("lora", hold=2.0)


def test_every_preset_can_be_made_and_every_setting_says_what_it_is():
    for name, recipe in RECIPES.items():
        assert recipe.summary and recipe.reference and recipe.__doc__ and make_recipe(name) == recipe()
        assert all(row.help for row in parameters(recipe))
        for preset, values in recipe.presets.items():
            made = make_recipe(f"{name}:{preset}")
            assert all(getattr(made, key) == value for key, value in values.items())


def test_a_base_in_half_precision_is_refused(pipeline, folder):
    pipeline.pipe.unet.to(torch.bfloat16)
    with pytest.raises(UsageError, match=r"the base is loaded in torch.bfloat16; training needs float32"):
        learn(folder, pipeline, small("lora"))


def test_a_missing_package_is_named_first(pipeline, monkeypatch):
    def absent(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(import_module("loraclr.train.run"), "version", absent)  # the package's attribute is the verb
    with pytest.raises(UsageError, match=r"training needs torch, which is not installed; pip install 'loraclr\[train\]'"):
        learn(Path("nowhere"), pipeline, small("lora"))


def test_other_families_are_refused(pipeline, folder):
    pipeline.pipe.unet.config.addition_embed_type = "text_time"  # what makes an SDXL
    with pytest.raises(PipelineError, match="training by recipe 'lora' with .*: not supported; use a Stable Diffusion 1 or 2"):
        learn(folder, pipeline, small("lora"))


@pytest.mark.parametrize("bf16", [False, True])
def test_lora_trains_both_text_encoders_of_sdxl(folder, tmp_path, bf16):
    pipeline = Pipeline(twin("sdxl"))
    before = [
        parameter.clone() for part in ("unet", "text_encoder", "text_encoder_2") for parameter in getattr(pipeline.pipe, part).parameters()
    ]
    first = learn(folder, pipeline, small("lora", steps=3, bf16=bf16), work=tmp_path / "whole")
    after = [parameter for part in ("unet", "text_encoder", "text_encoder_2") for parameter in getattr(pipeline.pipe, part).parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert first.components == ("text_encoder", "text_encoder_2", "unet") and first.family == "sdxl"
    still = [layer.name for layer in first if not bool((layer.delta() != 0).any())]
    last = len(pipeline.pipe.text_encoder.encoder.layers) - 1  # SDXL reads what goes into it, never what comes out
    assert still and all(name.startswith(f"text_encoder.encoder.layers.{last}.") for name in still)
    with pytest.raises(KeyboardInterrupt):
        learn(folder, pipeline, small("lora", steps=3, bf16=bf16), work=tmp_path / "killed", checkpoint_every=2, progress=killed_at(2, 3))
    assert learn(folder, pipeline, small("lora", steps=3, bf16=bf16), work=tmp_path / "killed", checkpoint_every=2) == first
    back = load_adapter(save_adapter(first, tmp_path / "a.safetensors", dtype=torch.float32))
    assert back.family == "sdxl" and back.layers.keys() == first.layers.keys()
    with pipeline.applied(back):
        (image,) = pipeline.sample([first.call], seeds=[0], steps=1)
    assert image.size[0] > 0


def test_a_student_tells_the_unet_of_sdxl_what_diffusers_tells_it(folder):
    pipeline, told = Pipeline(twin("sdxl")), []
    pipe = pipeline.pipe
    size = pipeline.check_settings(seeds=[], steps=1, guidance=1, size=None)
    with torch.no_grad(), Student(pipeline, generator=torch.Generator()) as student:
        states, added = student.conditions(["a m"], pad=True, size=size)
    handle = pipe.unet.register_forward_pre_hook(lambda module, inputs, named: told.append(named), with_kwargs=True)
    pipe("a m", num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    handle.remove()
    torch.testing.assert_close(states, told[0]["encoder_hidden_states"])
    torch.testing.assert_close(added, {key: told[0]["added_cond_kwargs"][key] for key in added})


def test_recipes_with_learned_tokens_are_refused_for_sdxl(folder):
    with pytest.raises(PipelineError, match="training by recipe 'edlora' with StableDiffusionXLPipeline"):
        learn(folder, Pipeline(twin("sdxl")), small("edlora"))


# ---- the command


@pytest.fixture(scope="module")
def base(_tiny_original, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("model") / "base"
    _tiny_original.save_pretrained(made)
    return made


def test_the_command_writes_what_the_function_returns(base, folder, tmp_path, capsys, pipeline):
    words = ["train", folder, "--base", base, "--recipe", "edlora", "--trigger", "qq", "--class", "m", "--dtype", "fp32", "--device", "cpu"]
    words += [part for key, value in {"steps": 2, **SMALL["edlora"]}.items() for part in ("--set", f"{key}={value}")]
    assert main([str(word) for word in [*words, "--output", tmp_path / "qq.pth", "--sample-every", 0]]) == 0
    said = capsys.readouterr().out
    assert f"written: {tmp_path / 'qq.pth'}" in said and "called by: <qq1> <qq2>" in said
    written, expected = load_adapter(tmp_path / "qq.pth"), learn(folder, pipeline, small("edlora", steps=2))
    assert written.layers.keys() == expected.layers.keys()
    for layer in expected:  # two loadings of one base may round differently, and AdamW's first steps are all but signs
        assert (written.layers[layer.name].delta() - layer.delta()).norm() < 1e-2 * layer.delta().norm(), layer.name
    assert {path.name for path in (tmp_path / "qq.pth.train").iterdir()} == {"loss.csv", "loss.png"}  # the checkpoint is gone
    assert main([str(word) for word in [*words, "--output", tmp_path / "qq.pth"]]) == 1
    assert "exists already; give another name, or --force" in capsys.readouterr().err


def test_the_command_keeps_tokens_beside_a_kohya_file(base, folder, tmp_path, capsys):
    words = ["train", folder, "--base", base, "--recipe", "custom-diffusion", "--trigger", "qq", "--class", "m", "--json"]
    words += ["--set", "steps=1", "--set", "prior_pictures=1", "--sample-every", 0, "--output", tmp_path / "qq.safetensors"]
    assert main([str(word) for word in words]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tokens"] == str(tmp_path / "qq.tokens.safetensors") and told["call"] == "<qq> m" and told["recipe"] == "custom-diffusion"
    back = load_adapter(tmp_path / "qq.safetensors")
    assert set(back.tokens) == {"<qq>"} and all(isinstance(layer, DenseLayer) for layer in back)


def test_a_textual_inversion_is_a_file_that_diffusers_loads_and_that_merges(base, folder, tmp_path, capsys, tiny_pipe, pipeline):
    words = ["train", folder, "--base", base, "--recipe", "textual-inversion", "--trigger", "qq", "--class", "m", "--set", "steps=1"]
    assert main([str(word) for word in [*words, "--sample-every", 0, "--output", tmp_path / "qq.safetensors"]]) == 0
    assert "learned tokens:" not in capsys.readouterr().out  # none lie beside it
    pipe = tiny_pipe()
    pipe.load_textual_inversion(tmp_path / "qq.safetensors", token="<qq>")
    token = load_adapter(tmp_path / "qq.safetensors")
    row = pipe.text_encoder.get_input_embeddings().weight[pipe.tokenizer.convert_tokens_to_ids("<qq>")]
    assert token.call == "<qq>" and torch.equal(row.detach(), token.tokens["<qq>"][0].float())
    save_adapter(learn(folder, pipeline, small("lora", steps=1), trigger="ada"), tmp_path / "ada.safetensors")
    quick = Collection(fit=("a {}",), held_out=("the {}",), preserve=("a m",), steps=2)
    merged = merge([tmp_path / "qq.safetensors", tmp_path / "ada.safetensors"], base=pipeline, collection=quick).adapter
    assert set(merged.tokens) == {"<qq>"} and len(merged) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "nowhere/qq.pth"], "there is no folder nowhere; make it first"),
        (["--output", "qq.ckpt"], "format kohya is a file: end its name in .safetensors"),
        (
            ["--output", "qq.safetensors", "--recipe", "pplus"],
            "a token with 10 layers has no place in embedding files, which have 16; end its name in .pth",
        ),
        (
            ["--output", "qq.safetensors", "--recipe", "pplus", "--format", "diffusers"],
            "makes a learned token and no layers; leave --format out",
        ),
        (["--output", "qq.safetensors", "--format", "embedding"], "recipe 'lora' makes layers; choose another --format"),
        (["--output", "qq.pth", "--recipe", "custom-diffusion"], "cannot hold whole matrices"),
        (["--output", "qq.pth", "--recipe", "edlor"], "Did you mean 'edlora'?"),
        (["--output", "qq.pth", "--set", "rank"], "not of the form NAME=VALUE"),
        (["--output", "qq.pth", "--device", "nodevice"], "device 'nodevice' cannot be used"),
    ],
)
def test_the_command_refuses(words, message, base, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(folder), "--base", str(base), "--trigger", "qq", "--class", "m", *words]) == 1
    said = capsys.readouterr()
    assert message in said.err and said.out == "" and not list(tmp_path.iterdir())


def test_recipes_are_listed(capsys):
    assert main(["recipes"]) == 0 and main(["recipes", "orthogonal:toybox"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in RECIPES) and "arXiv 2312.02432" in said and "index" in said
    assert main(["recipes", "pplus", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["name"] == "pplus" and {row["name"]: row["default"] for row in told["parameters"]}["token_lr"] == 5e-3
    assert main(["recipes", "orthgonal"]) == 1 and "Did you mean 'orthogonal'?" in capsys.readouterr().err


def test_the_package_offers_the_verb():
    assert loraclr.train is train and loraclr.RECIPES is RECIPES
