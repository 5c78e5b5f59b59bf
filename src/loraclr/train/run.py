"""VERB. Pictures of one concept -> an adapter. Checks everything first, then attaches, trains and takes the result off again."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from loraclr import __version__
from loraclr.adapter import Adapter
from loraclr.errors import UsageError
from loraclr.modules import fingerprint
from loraclr.pipeline import GUIDANCE, STEPS, Pipeline, PromptTruncationWarning
from loraclr.train import loop
from loraclr.train.data import Examples, Shot, digest, read_folder
from loraclr.train.orthogonal import Orthogonal, warn_of_shared_rows
from loraclr.train.recipe import Recipe, Words
from loraclr.train.recipes import make_recipe
from loraclr.train.student import Student
from loraclr.train.work import WorkFolder

SAMPLES = 4  # pictures per sample sheet, seeds 0 to 3


def train(
    pictures: str | Path,
    *,
    base: Pipeline,
    recipe: Recipe | str,
    trigger: str,
    class_word: str | None = None,
    class_pictures: str | Path | None = None,
    templates: Sequence[str] = (),
    beside: Sequence[Adapter] = (),
    name: str | None = None,
    seed: int = 0,
    work: str | Path | None = None,
    restart: bool = False,
    checkpoint_every: int = 50,
    sample_every: int | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Adapter:
    """Train an adapter on a folder of pictures, with captions `NAME.txt` and masks `masks/NAME.png` if they are there.

    `templates` are prompts for pictures without a caption, `{}` where the concept's call goes. `class_pictures` is a folder for prior
    preservation; without it the base draws them. `beside` are adapters that an orthogonal one will be summed with. In the folder
    `work` checkpoints, loss curve and sample pictures appear, and an unfinished training in it goes on, unless `restart`; on a CPU
    the result is that of an unbroken run to the last bit. `sample_every` steps a sheet of samples is drawn (default: four times in
    all; 0: none). `base` is given back as it was.

    Raises UsageError with everything that is wrong before any work, TrainError if the training diverges or `work` is another's, and
    WriteError if another training is at work there.
    """
    recipe = make_recipe(recipe) if isinstance(recipe, str) else recipe
    tell = progress or (lambda what, share: None)
    versions = _versions()
    if not (recipe.for_sdxl and base.family == "sdxl"):
        base.check_plain(f"training by recipe {recipe.name!r}")
    folder, class_folder = Path(pictures), None if class_pictures is None else Path(class_pictures)
    words, shots, class_shots = _checked(folder, class_folder, base, recipe, trigger, class_word, templates, beside, work, checkpoint_every)
    settings: dict[str, object] = {
        "recipe": recipe.name,
        "parameters": asdict(recipe),
        "seed": seed,
        "call": words.call,
        "class": words.class_word,
        "pictures": digest(folder),
        "class pictures": None if class_folder is None else digest(class_folder),
        "templates": list(templates or recipe.templates),
        "base": fingerprint(base.pipe, vae=True),
    }
    work_folder = None if work is None else WorkFolder(Path(work))
    if work_folder and not restart:
        work_folder.resume(settings)  # another training's folder is an error before any work
    generator = torch.Generator().manual_seed(seed)
    prompts = templates or recipe.templates
    own = Examples(base, shots, templates=prompts, call=words.call, flip=recipe.flip)

    def sample(step: int) -> None:
        if work_folder:
            prompt = prompts[0].replace("{}", words.call)
            work_folder.samples(step, base.sample([prompt] * SAMPLES, seeds=range(SAMPLES)))

    every = 0 if work is None else max(1, recipe.steps // 4) if sample_every is None else sample_every
    watch = recipe.watches and own.masks is not None
    with ExitStack() as stack:
        if work_folder:
            stack.enter_context(work_folder.alone(anew=restart))
        prior = None
        if recipe.prior_weight:
            class_shots = class_shots or _class_shots(base, settings["base"], words, recipe.prior_pictures, work_folder, tell)
            template = "a photo of a {}" if words.class_word else "a picture"
            prior = Examples(base, class_shots, templates=[template], call=words.class_word or "", flip=recipe.flip)
        student = stack.enter_context(Student(base, generator=generator, bf16=recipe.bf16, watch=watch))
        recipe.attach(student, words)
        if beside:
            warn_of_shared_rows(Adapter.of(student.layers(), name or trigger), beside)
        losses = loop.run(
            student,
            recipe,
            own,
            prior,
            settings=settings,
            work=work_folder,
            checkpoint_every=checkpoint_every,
            sample=sample,
            sample_every=every,
            progress=tell,
        )
        layers, notes = recipe.layers(student)
        tokens = student.embeddings()
    kept = {key: value for key, value in settings.items() if key != "templates"}
    about = kept | {"base": base.source, "count": len(shots), "loss": loop.recent(losses), **notes, "versions": versions}
    return Adapter(
        {layer.name: layer for layer in layers},
        name=name or trigger.strip("<>"),
        tokens=tokens,
        triggers=(words.call,),
        family=base.family,
        metadata={"loraclr.training": json.dumps(about, sort_keys=True)},
    )


def _checked(
    folder: Path,
    class_folder: Path | None,
    base: Pipeline,
    recipe: Recipe,
    trigger: str,
    class_word: str | None,
    templates: Sequence[str],
    beside: Sequence[Adapter],
    work: str | Path | None,
    checkpoint_every: int,
) -> tuple[Words, list[Shot], list[Shot]]:
    """The words and the pictures, or one UsageError with everything that is wrong."""
    problems, words = [], None
    if base.dtype != torch.float32:
        problems.append(f"the base is loaded in {base.dtype}; training needs float32 (bf16=true computes in bfloat16 all the same)")
    try:
        words = recipe.words(trigger, class_word)
    except UsageError as error:
        problems.append(str(error))
    pixels = base.check_settings(seeds=[], steps=STEPS, guidance=GUIDANCE, size=None)
    latent = pixels[0] // int(base.pipe.vae_scale_factor), pixels[1] // int(base.pipe.vae_scale_factor)
    shots, found = read_folder(folder, call=words.call if words else None, latent=latent)
    problems += found
    if words:
        filled = [template.replace("{}", words.call) for template in templates or recipe.templates]
        problems += recipe.problems(base, words) + _too_long(base, [*_captions(shots), *filled], words)
    class_shots: list[Shot] = []
    if class_folder is not None:
        class_shots, found = read_folder(class_folder, latent=latent)
        problems += found + _too_long(base, _captions(class_shots), Words(""))
        if not recipe.prior_weight:
            problems.append(
                f"pictures of the class are given, but recipe {recipe.name!r} has prior_weight 0; set it to 1, or leave them out"
            )
    elif recipe.prior_weight and words and words.class_word is None:
        problems.append("prior_weight is set, but there is no class; give a folder of class pictures, or set prior_weight to 0")
    problems += [
        f"the template {template!r} has no {{}}; write {{}} where the call is to stand" for template in templates if "{}" not in template
    ]
    if beside and not isinstance(recipe, Orthogonal):
        problems.append(f"adapters beside it are for the recipe 'orthogonal'; leave them out with {recipe.name!r}")
    if work is not None and not Path(work).absolute().parent.is_dir():
        problems.append(f"there is no folder {Path(work).absolute().parent} for {Path(work).name}; make it first")
    if checkpoint_every < 1:
        problems.append(f"checkpoint_every {checkpoint_every} is not a number of steps; give 1 or more")
    if problems or words is None:
        raise UsageError("; ".join(problems))
    return words, shots, class_shots


def _captions(shots: Sequence[Shot]) -> list[str]:
    return [caption for shot in shots for caption in shot.captions]


def _too_long(base: Pipeline, prompts: Sequence[str], words: Words) -> list[str]:
    """A sentence for each prompt that is cut before the end of the call; one warning for those that lose words behind it."""
    limit, problems, cut = base.text_length, [], []

    def count(text: str) -> int:
        for token in words.tokens:  # the tokenizer does not know them yet, to which each will be one
            text = re.sub(re.escape(token), " a ", text, flags=re.IGNORECASE)
        return base.token_count(text)

    for prompt in prompts:
        named = re.search(re.escape(words.call), prompt, re.IGNORECASE)
        if named and count(prompt[: named.end()]) > limit:
            problems.append(f"{prompt[:40]!r}... names the concept behind the {limit} tokens that the text encoder reads; name it earlier")
        elif count(prompt) > limit:
            cut.append(prompt)
    if cut:
        warnings.warn(
            f"{len(cut)} of {len(prompts)} captions are longer than the {limit} tokens that the text encoder reads, such as "
            f"{cut[0][:40]!r}...: what is behind does not count; shorten them",
            PromptTruncationWarning,
            stacklevel=4,
        )
    return problems


def _class_shots(
    base: Pipeline, mark: object, words: Words, count: int, work: WorkFolder | None, tell: Callable[[str, float], None]
) -> list[Shot]:
    """Pictures of the class as the base draws them, seed by seed; those that it, by its `mark`, has drawn already are taken from the work
    folder."""
    prompt = f"a photo of a {words.class_word}"
    size = base.check_settings(seeds=[], steps=STEPS, guidance=GUIDANCE, size=None)
    drawn_by = {"prompt": prompt, "base": mark, "size": size, "steps": STEPS, "guidance": GUIDANCE}
    shots = []
    for seed in range(count):
        image = None if work is None else work.class_picture(seed, drawn_by)
        if image is None:
            (image,) = base.sample([prompt], seeds=[seed], steps=STEPS, guidance=GUIDANCE)
            if work is not None:
                work.keep_class_picture(seed, drawn_by, image)
        shots.append(Shot(image))
        tell("class pictures", (seed + 1) / count)
    return shots


def _versions() -> dict[str, str]:
    try:
        return {"loraclr": __version__} | {package: version(package) for package in ("torch", "diffusers", "transformers", "peft")}
    except PackageNotFoundError as error:
        raise UsageError(f"training needs {error.name}, which is not installed; pip install 'loraclr[train]'") from error
