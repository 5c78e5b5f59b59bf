"""The only door to diffusers: base weights, reversible changes, hooks, prompts and sampling of a loaded pipeline.

Everything that changes the model is a context manager that gives it back bit for bit. Modules are found by walking the
components, so other text encoders or a transformer need no new code for their weights; sampling knows the
StableDiffusionPipeline family (one text encoder, no added conditions).
"""

from __future__ import annotations

import difflib
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraclr.adapter import Adapter, Layer
from loraclr.conditioning import Refine, Region, RegionStates, Vocabulary, conditioned, text_states
from loraclr.errors import PipelineError, UsageError
from loraclr.loading import load_pipe, silenced

if TYPE_CHECKING:
    from PIL.Image import Image

STEPS = 20
GUIDANCE = 4.0

_NEEDED = ("unet", "text_encoder", "tokenizer", "vae", "scheduler")
_LISTED = 10  # problems spelled out in one message; the rest is counted


class PromptTruncationWarning(UserWarning):
    """A prompt is longer than the text encoder reads."""


class Pipeline:
    """A loaded diffusers pipeline: unet, text_encoder, tokenizer, vae and scheduler.

    `modules` maps canonical names (component and module path, text encoders without `text_model.`) to every Linear and
    Conv2d of the UNet and the text encoders. `cross_attention_layers` are the paths of the UNet's attn2 modules in the
    order down, mid, up, which is the order of layer-wise embeddings. `source` is where it was loaded from.
    """

    def __init__(self, pipe: Any) -> None:
        """Wrap `pipe`, whose modules are changed in place inside contexts. Raises PipelineError if a component is missing."""
        missing = [name for name in _NEEDED if getattr(pipe, name, None) is None]
        if missing:
            raise PipelineError(f"{type(pipe).__name__} has no {', '.join(missing)}; load a pipeline of the Stable Diffusion family")
        self._pipe, self._unet = pipe, pipe.unet
        self.source = str(getattr(pipe.config, "_name_or_path", None) or type(pipe).__name__)
        self._components = {
            name: part
            for name, part in pipe.components.items()
            if isinstance(part, nn.Module) and re.match(r"unet|transformer|text_encoder", name)
        }
        self.modules: dict[str, nn.Module] = {
            _canonical(component, path): module
            for component, part in self._components.items()
            for path, module in part.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }
        if any(".base_layer" in name for name in self.modules):
            raise PipelineError("the pipeline carries LoRAs loaded through diffusers; call its unload_lora_weights() first")
        paths = [path for path, _ in self._unet.named_modules() if path.rpartition(".")[2] == "attn2"]
        self.cross_attention_layers: tuple[str, ...] = tuple(
            path for part in ("down_blocks", "mid_block", "up_blocks") for path in paths if path.startswith(part)
        )
        self._layer_rows: Mapping[int, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}
        self._adapters: list[tuple[str, float]] = []

    @staticmethod
    def load(source: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Pipeline:
        """Load a diffusers folder or, if `source` is a plain `owner/name`, a model of the hub.

        Raises PipelineError if a local path does not exist or is no diffusers folder, if loading fails, or without diffusers.
        """
        pipe = load_pipe(source, dtype=dtype).to(device)
        loaded = Pipeline(pipe)
        loaded.source = str(source)
        return loaded

    @property
    def unet(self) -> nn.Module:
        """The denoiser itself, for passes with gradients."""
        unet: nn.Module = self._unet
        return unet

    @property
    def device(self) -> torch.device:
        return torch.device(self._unet.device)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._unet.dtype
        return dtype

    @property
    def adapters(self) -> tuple[tuple[str, float], ...]:
        """Name and scale of what is applied now, outermost first."""
        return tuple(self._adapters)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The learned tokens that prompts may use now."""
        return tuple(self._tokens)

    @property
    def pipe(self) -> Any:
        """The wrapped diffusers pipeline itself. Training needs it; whoever changes it gives it back as it was."""
        return self._pipe

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer and embedding table that prompts go through now."""
        return Vocabulary(self._pipe.tokenizer, self._encoder.get_input_embeddings(), self._layer_rows)

    @property
    def scheduler_name(self) -> str:
        return type(self._pipe.scheduler).__name__

    def base_weight(self, name: str) -> Tensor:
        """(out, in) or (out, channels, kh, kw), as stored now: the parameter itself, not a copy. Raises PipelineError."""
        self._known([name])
        return self._weight(name).detach()

    def stages(self, names: Sequence[str]) -> list[list[str]]:
        """The order of a staged merge: text encoders, then cross-attention keys and values, then the rest; no empty stages.

        Names keep their order within a stage. Raises PipelineError for names that are not in `modules`.
        """
        self._known(names)
        stages: list[list[str]] = [[], [], []]
        for name in names:
            stages[0 if name.startswith("text_encoder") else 2 if self.cross_attention_index(name) is None else 1].append(name)
        return [stage for stage in stages if stage]

    def cross_attention_index(self, name: str) -> int | None:
        """Which cross-attention layer a key or value projection belongs to, in the order down, mid, up; None for other layers."""
        path, _, leaf = name.removeprefix("unet.").rpartition(".")
        return self.cross_attention_layers.index(path) if leaf in ("to_k", "to_v") and path in self.cross_attention_layers else None

    @contextmanager
    def applied(self, adapter: Adapter | Mapping[str, Layer], *, scale: float = 1.0) -> Iterator[None]:
        """Inside, weights are W + scale * delta (added in fp32, then cast) and the adapter's learned tokens are known.

        Tokens are not scaled. On exit every weight is restored from a kept copy. May be nested. Raises PipelineError with all
        layers that do not fit, before anything is changed.
        """
        layers = adapter.layers if isinstance(adapter, Adapter) else adapter
        self._check(layers)
        tokens = (
            {}
            if not isinstance(adapter, Adapter)
            else {token: rows for token, rows in adapter.tokens.items() if not self._has(token, rows)}
        )
        with self.with_tokens(tokens), ExitStack() as restore:
            for name, layer in layers.items():
                weight = self._weight(name).detach()
                restore.callback(weight.copy_, weight.clone())
                delta = layer.delta().to(weight.device).view(weight.shape)
                weight.copy_(weight.float() + scale * delta)
            self._adapters.append((adapter.name if isinstance(adapter, Adapter) else "layers", scale))
            restore.callback(self._adapters.pop)
            yield

    @contextmanager
    def with_tokens(self, tokens: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, prompts may use learned tokens: embeddings (1, dim), or (L, dim) with one per cross-attention layer.

        The tokenizer and the embedding table are swapped for extended copies; the very same objects come back on exit.
        Raises UsageError for tokens that exist already or whose L is not the number of cross-attention layers, PipelineError for
        embeddings of another width.
        """
        if not tokens:
            yield
            return
        encoder, tokenizer, kept_tokens, kept_rows = self._encoder, self._pipe.tokenizer, self._tokens, self._layer_rows
        embedding = encoder.get_input_embeddings()
        extended = self.vocabulary.extended(tokens, layers=len(self.cross_attention_layers))
        try:
            self._pipe.tokenizer, self._layer_rows = extended.tokenizer, extended.layer_rows
            self._tokens = {**kept_tokens, **tokens}
            encoder.set_input_embeddings(extended.embedding)
            yield
        finally:
            encoder.set_input_embeddings(embedding)
            self._pipe.tokenizer, self._layer_rows, self._tokens = tokenizer, kept_rows, kept_tokens

    @contextmanager
    def captured(self, names: Sequence[str], callback: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Inside, `callback(name, rows)` gets the inputs of the named modules at every forward pass, in float32.

        `rows` is (t, in): tokens or pixels of the whole batch, the very same tensor for sibling modules that are handed the
        same input; inputs of a convolution are unfolded to (t, channels * kh * kw), so
        that output = rows @ weight.flatten(1).T + bias for both. Raises PipelineError for unknown names.
        """
        self._known(names)

        last: dict[str, tuple[Any, Tensor]] = {}  # by parent: queries, keys and values of one attention are handed the same input

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            parent = name.rpartition(".")[0]

            def record(module: nn.Module, inputs: tuple[Any, ...]) -> None:
                # Rows must outlive inference mode: its tensors could not enter an optimiser's graph later.
                with torch.inference_mode(False), torch.no_grad():
                    if isinstance(module, nn.Conv2d) or parent not in last or last[parent][0] is not inputs[0]:
                        last.clear()
                        last[parent] = inputs[0], _rows(module, inputs[0].detach().clone())
                    callback(name, last[parent][1])

            return record

        with ExitStack() as handles:
            for name in names:
                handles.callback(self.modules[name].register_forward_pre_hook(hook(name)).remove)
            yield

    def token_count(self, prompt: str) -> int:
        """Text tokens of a prompt with its begin and end marks, however long."""
        return len(self._pipe.tokenizer(prompt, verbose=False).input_ids)

    def encode(self, prompts: Sequence[str], *, pad: bool = True, layered: bool = False) -> Tensor:
        """(B, T, dim) states, or (B, L, T, dim) when some prompt holds a layer-wise token (the others are repeated along L).

        `layered` runs every prompt through the text encoder L times, also one without such a token.

        `pad` fills up to the text encoder's length, as sampling needs; without it all prompts must have equally many tokens,
        else UsageError. A longer prompt is cut with a PromptTruncationWarning.
        """
        if isinstance(prompts, str) or not prompts:
            raise UsageError("encode needs a list of at least one prompt; put a single prompt in a list")
        self.check_plain()
        encoder, length = self._encoder, self.text_length
        counts = set()
        for prompt in prompts:  # no comprehension: it would be a frame between the warning and our caller
            counts.add(self._warn_if_cut(prompt, length))
        if not pad and len(counts) > 1:
            raise UsageError(f"prompts of {sorted(counts)} tokens cannot be stacked unpadded; encode them one at a time")
        with torch.inference_mode():
            states = text_states(
                encoder, self.vocabulary, prompts, layers=len(self.cross_attention_layers), length=length, pad=pad, layered=layered
            )
        return _usable(states)

    def denoise(
        self,
        conditioning: Tensor,
        *,
        seeds: Sequence[int],
        steps: int = STEPS,
        size: tuple[int, int] | None = None,
        guidance: float = 1.0,
        negative: Tensor | None = None,
        regions: Sequence[RegionStates] = (),
        scheduler: str | None = None,
        refine: Refine | None = None,
        callback: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Run the sampler on encoded prompts -> latents (B, channels, height / scale, width / scale), float32.

        `conditioning` is (B, T, dim) or (B, L, T, dim), one seed per picture. Guidance 1 is conditional only (one UNet pass, what
        feature collection wants); above 1 `negative`, of one picture or of B, is the unconditional half and regions have
        two halves. `refine` may change latents before a step, `callback(step, total)` follows it. Raises UsageError for settings that do
        not fit.
        """
        self.check_plain()
        height, width = self.check_settings(seeds=seeds, steps=steps, guidance=guidance, size=size, scheduler=scheduler)
        batch, layers, halves = len(conditioning), len(self.cross_attention_layers), 1 + (guidance > 1)
        if len(seeds) != batch:
            raise UsageError(f"{batch} prompts and {len(seeds)} seeds; give one seed per prompt")
        if (negative is None) == (halves == 2):
            needs = "needs a" if halves == 2 else "takes no"
            raise UsageError(f"guidance {guidance:g} {needs} negative conditioning; 1 is conditional only")
        for states in (conditioning, *(() if negative is None else (negative,)), *(region.states for region in regions)):
            if states.ndim not in (3, 4) or (states.ndim == 4 and states.shape[1] != layers):
                raise UsageError(f"states of shape {tuple(states.shape)}; expected (B, T, dim) or (B, {layers}, T, dim), as encode gives")
        if any(len(region.states) != halves for region in regions):
            raise UsageError(f"guidance {guidance:g} needs regions with {halves} states each; encode negative prompts only when guiding")

        unet, latent = self._unet, (height // self._scale, width // self._scale)
        states = conditioning if negative is None else _halves(negative, conditioning)
        states = states.to(self.device, self.dtype)
        attentions = [unet.get_submodule(path) for path in self.cross_attention_layers]
        sampler = self._sampler(scheduler)
        sampler.set_timesteps(steps, device=self.device)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        # One generator per picture, on the CPU and in float32: a seed is the same picture in any batch, on any device.
        noise = torch.cat([torch.randn((1, unet.config.in_channels, *latent), generator=generator) for generator in generators])
        extra = {"generator": generators} if "generator" in inspect.signature(sampler.step).parameters else {}
        special = states.ndim == 4 or bool(regions)
        with torch.inference_mode(), conditioned(attentions if special else (), latent=latent, regions=regions):
            latents: Tensor = noise.to(self.device) * sampler.init_noise_sigma
            for number, time in enumerate(sampler.timesteps, start=1):
                if refine is not None:
                    latents = refine(latents, time, partial(sampler.scale_model_input, timestep=time))
                noisy = sampler.scale_model_input(torch.cat([latents] * halves), time).to(self.dtype)
                prediction = unet(noisy, time, encoder_hidden_states=states, return_dict=False)[0].float()
                if halves == 2:
                    without, with_ = prediction.chunk(2)
                    prediction = without + guidance * (with_ - without)
                latents = sampler.step(prediction, time, latents, **extra, return_dict=False)[0]
                if callback is not None:
                    callback(number, len(sampler.timesteps))
        return _usable(latents)

    def sample(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        steps: int = STEPS,
        guidance: float = GUIDANCE,
        negative: str = "",
        size: tuple[int, int] | None = None,
        regions: Sequence[Region] | None = None,
        scheduler: str | None = None,
        callback: Callable[[int, int], None] | None = None,
    ) -> list[Image]:
        """One picture per prompt and seed, `size` (height, width) pixels or the model's own.

        A seed is the same picture whatever the batch. `regions` hold for all pictures of the call. `scheduler` names a diffusers
        scheduler class, built from the model's own configuration. Raises UsageError before any work.
        """
        self.check_settings(seeds=seeds, steps=steps, guidance=guidance, size=size, scheduler=scheduler)
        if isinstance(prompts, str) or len(prompts) != len(seeds) or not prompts:
            seen = "one string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
            raise UsageError(f"{seen} and {len(seeds)} seeds; give a list of prompts and one seed for each")
        guided = guidance > 1
        latents = self.denoise(
            self.encode(prompts),
            negative=self.encode([negative]) if guided else None,
            seeds=seeds,
            steps=steps,
            size=size,
            guidance=guidance,
            regions=[
                RegionStates(self.encode([region.negative, region.prompt] if guided else [region.prompt]), region.box)
                for region in regions or ()
            ],
            scheduler=scheduler,
            callback=callback,
        )
        return self.decode(latents)

    def decode(self, latents: Tensor) -> list[Image]:
        """(B, channels, h, w) latents, as `denoise` gives them, to pictures."""
        from PIL import Image

        vae = self._pipe.vae
        with torch.inference_mode():
            scaled = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
            pictures = vae.decode(scaled.to(vae.device, vae.dtype), return_dict=False)[0].float()
            bytes_ = ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(picture) for picture in bytes_]

    def check_settings(
        self, *, seeds: Sequence[int], steps: int, guidance: float, size: tuple[int, int] | None, scheduler: str | None = None
    ) -> tuple[int, int]:
        """The size in pixels, or UsageError with everything that is wrong, before any work is done."""
        unit, side = self._scale, self._unet.config.sample_size
        own = (side, side) if isinstance(side, int) else tuple(side)
        height, width = size if size is not None else (own[0] * unit, own[1] * unit)
        wrong = []
        if height < unit or width < unit or height % unit or width % unit:
            wrong.append(f"size {height}x{width} is not made of multiples of {unit} pixels")
        if steps < 1:
            wrong.append(f"{steps} steps are too few, give 1 or more")
        if not guidance >= 1:
            wrong.append(f"guidance {guidance:g} is below 1, which is conditional only")
        if bad := [seed for seed in seeds if not 0 <= seed < 2**63]:
            wrong.append(f"seeds {bad} are not from 0 to 2**63 - 1")
        if scheduler is not None:
            known = [kind.__name__ for kind in self._pipe.scheduler.compatibles]
            if scheduler not in known:
                wrong.append(f"scheduler {scheduler!r} is not one of {', '.join(sorted(known))}")
        if wrong:
            raise UsageError("; ".join(wrong) + "; change these settings")
        return height, width

    @property
    def _encoder(self) -> Any:
        return self._pipe.text_encoder

    @property
    def text_length(self) -> int:
        """The most tokens a prompt may have, with its begin and end marks."""
        # Some tokenizers state no length of their own, which transformers turns into 10**30.
        return min(int(self._pipe.tokenizer.model_max_length), int(self._encoder.config.max_position_embeddings))

    @cached_property
    def _scale(self) -> int:
        return 1 << (len(self._pipe.vae.config.block_out_channels) - 1)

    def _sampler(self, name: str | None) -> Any:
        """Fresh per call: schedulers keep state, and the model's own must stay as it was."""
        own = self._pipe.scheduler
        kind: Any = type(own) if name is None else next(kind for kind in own.compatibles if kind.__name__ == name)
        # diffusers drops what it once noted as a default, even if it was changed since (steps_offset of every older model).
        config = {key: value for key, value in own.config.items() if key != "_use_default_values"}
        with silenced():
            return kind.from_config(config)

    def check_plain(self) -> None:
        """Raises PipelineError for a pipeline whose prompts and sampling are more than one text encoder and a UNet (SDXL, inpainting)."""
        others = sorted(set(self._components) - {"unet", "text_encoder"})
        channels = self._unet.config.in_channels
        if others or self._unet.config.addition_embed_type is not None or channels != self._pipe.vae.config.latent_channels:
            what = f"{type(self._pipe).__name__} ({', '.join(others) or 'no other encoder'}, {channels} input channels)"
            raise PipelineError(f"prompts and sampling of {what} are not supported; use a Stable Diffusion 1 or 2 text-to-image model")

    def _warn_if_cut(self, prompt: str, length: int) -> int:
        tokenizer = self._pipe.tokenizer
        ids = tokenizer(prompt, verbose=False).input_ids
        if len(ids) > length:
            lost = tokenizer.decode(ids[length - 1 : -1]).replace("</w>", " ").strip()
            warnings.warn(
                f"the prompt {prompt[:40]!r}... has {len(ids)} tokens but the text encoder reads {length}: "
                f"the last {len(ids) - length} are cut ({lost[:80]!r}); shorten it",
                PromptTruncationWarning,
                stacklevel=3,
            )
        return min(len(ids), length)

    def _weight(self, name: str) -> Tensor:
        weight = self.modules[name].weight
        assert isinstance(weight, Tensor)
        return weight

    def _has(self, token: str, rows: Tensor) -> bool:
        """So that an adapter can be applied where all concepts' tokens are in already."""
        return token in self._tokens and torch.equal(self._tokens[token], rows)

    def _known(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self.modules]
        if unknown:
            raise PipelineError(_listed([self._unknown(name) for name in unknown[:_LISTED]], len(unknown)))

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.modules, n=1, cutoff=0.7)
        return f"no layer {name!r}" + (f" (nearest: {near[0]!r})" if near else "")

    def _check(self, layers: Mapping[str, Layer]) -> None:
        wrong = [
            name for name, layer in layers.items() if name not in self.modules or not _fits(layer.shape, tuple(self._weight(name).shape))
        ]
        if wrong:
            said = [
                f"{name!r} is {tuple(layers[name].shape)}, the model's weight {tuple(self._weight(name).shape)}"
                if name in self.modules
                else self._unknown(name)
                for name in wrong[:_LISTED]
            ]
            raise PipelineError(_listed(said, len(wrong)))


def _canonical(component: str, path: str) -> str:
    return f"{component}.{path.removeprefix('text_model.') if component.startswith('text_encoder') else path}"


def _fits(shape: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Equal, or a 1x1 convolution and a linear layer of the same numbers."""
    return shape == weight or (shape[:2] == weight[:2] and set(shape[2:]) | set(weight[2:]) == {1})


def _listed(problems: Sequence[str], count: int) -> str:
    more = f"; and {count - len(problems)} more" if count > len(problems) else ""
    return f"{count} layer(s) do not fit the base model: {'; '.join(problems)}{more}; use the base model they were made for"


def _halves(negative: Tensor, positive: Tensor) -> Tensor:
    """(2B, T, dim), or (2B, L, T, dim) if either is layer-wise: negative first, as diffusers does."""
    layers = max(states.shape[1] if states.ndim == 4 else 0 for states in (negative, positive))
    pair = [states[:, None].expand(-1, layers, -1, -1) if layers and states.ndim == 3 else states for states in (negative, positive)]
    return torch.cat([pair[0].expand_as(pair[1]), pair[1]])


def _usable(tensor: Tensor) -> Tensor:
    """A copy that is no inference tensor: those could not enter an optimiser's graph later."""
    with torch.inference_mode(False):
        return tensor.detach().clone()


def _rows(module: nn.Module, inputs: Tensor) -> Tensor:
    """(t, in) float32. `t` counts tokens, or output positions of a convolution."""
    if isinstance(module, nn.Conv2d):
        if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise PipelineError(f"features of {module} cannot be captured; leave grouped and specially padded convolutions out")
        patches = functional.unfold(inputs.float(), module.kernel_size, module.dilation, module.padding, module.stride)
        return patches.transpose(1, 2).flatten(0, 1)  # from (B, in, positions)
    return inputs.float().flatten(0, -2)
