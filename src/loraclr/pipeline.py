"""The only door to diffusers: base weights, reversible changes, hooks, prompts and sampling of a loaded pipeline.

Everything that changes the model is a context manager that gives it back bit for bit. Modules are found by walking the
components, whatever the family. A UNet with one text encoder (Stable Diffusion 1 and 2) is sampled here, with learned tokens per layer;
every other family by diffusers' own calls (`sampling`), with what little they do not say of themselves in `families`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loraclr import families, loading, modules, sampling
from loraclr.adapter import STAGES, Adapter, Layer, stage_of
from loraclr.conditioning import Refine, Region, RegionStates, Vocabulary, by_encoder, conditioned, knowing, text_states
from loraclr.errors import PipelineError, UsageError
from loraclr.loading import load_pipe, placed

if TYPE_CHECKING:
    from PIL.Image import Image

STEPS = 20
GUIDANCE = 4.0


class PromptTruncationWarning(UserWarning):
    """A prompt is longer than the text encoder reads."""


class Pipeline:
    """A loaded diffusers text-to-image pipeline.

    `modules` maps canonical names (component and module path, text encoders without `text_model.`) to every Linear and
    Conv2d of the denoiser and the text encoders. `cross_attention_layers` are the paths of a UNet's attn2 modules in the
    order down, mid, up, which is the order of layer-wise embeddings. `source` is where it was loaded from.
    """

    def __init__(self, pipe: Any) -> None:
        """Wrap `pipe`, whose modules are changed in place inside contexts. Raises PipelineError if a component is missing."""
        self._denoiser = families.denoiser_of(pipe)
        self._pipe, self._unet = pipe, getattr(pipe, self._denoiser)
        self.source = str(getattr(pipe.config, "_name_or_path", None) or type(pipe).__name__)
        self._components = modules.components(pipe)
        self.modules = modules.Layers(self._components)
        self.cross_attention_layers: tuple[str, ...] = modules.cross_attention(self._unet) if self._denoiser == "unet" else ()
        self._limits = families.text_limits(pipe)  # tokens that each text encoder reads; diffusers looks long for its components
        self._unpadded: dict[str, int] = {}  # tokens that count of each text encoder's texts, while unpadded texts are captured
        self._layer_rows: Mapping[int, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}
        self._adapters: list[tuple[str, float]] = []

    @staticmethod
    def load(
        source: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        offload: bool = False,
        config: str | Path | None = None,
    ) -> Pipeline:
        """Load a diffusers folder, a single-file checkpoint (SD1.x, SD2.x, SDXL) or, if `source` is `owner/name`, a model of the hub.

        `device` may be `auto`. `offload` keeps the components in main memory and each on the device only while it runs. `config` is a
        diffusers folder of the checkpoint's own architecture, for one that is not the usual. Raises PipelineError if a local path does
        not exist or is no model, if loading fails, or without diffusers; UsageError for a device that is not there.
        """
        loaded = Pipeline(placed(lambda: load_pipe(source, dtype=dtype, config=config), device, offload=offload))
        loaded.source = str(source)
        return loaded

    @property
    def unet(self) -> nn.Module:
        """The denoiser itself, a UNet or a transformer, for passes with gradients."""
        unet: nn.Module = self._unet
        return unet

    @property
    def plain(self) -> bool:
        """Whether prompts and sampling are one text encoder and a UNet that reads nothing but its states: Stable Diffusion 1 and 2."""
        if set(self._components) != {"unet", "text_encoder"}:
            return False
        config = self._unet.config
        return config.addition_embed_type is None and config.in_channels == self._pipe.vae.config.latent_channels

    @property
    def family(self) -> str | None:
        """`sd1`, `sd2`, `sdxl`, `sd3` or `flux`, as adapters state it, whatever its sizes; None for any other."""
        return families.family_of(self._pipe).name

    @property
    def device(self) -> torch.device:
        """Where it computes; with offloading, weights rest elsewhere."""
        return torch.device(self._pipe._execution_device)

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
        self.modules.known([name])
        return self.modules.weight(name)

    def stages(self, names: Sequence[str]) -> list[list[str]]:
        """The order of a staged merge: text encoders, then cross-attention keys and values of a UNet, then the rest; no empty stages.

        Names keep their order within a stage. Raises PipelineError for names that are not in `modules`.
        """
        self.modules.known(names)
        stages: list[list[str]] = [[], [], []]
        for name in names:
            stages[STAGES.index(self.stage_of(name))].append(name)
        return [stage for stage in stages if stage]

    def stage_of(self, name: str) -> str:
        """`text`, `keys` or `spatial`: keys and values are those of a UNet that reads its text encoder's states as they are."""
        stage = stage_of(name)
        return "spatial" if stage == "keys" and self.cross_attention_index(name) is None else stage

    @property
    def cross_attentions(self) -> list[nn.Module]:
        """The modules of `cross_attention_layers`."""
        return [self._unet.get_submodule(path) for path in self.cross_attention_layers]

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
        self.modules.fitting(layers)
        tokens = (
            {}
            if not isinstance(adapter, Adapter)
            else {token: rows for token, rows in adapter.tokens.items() if not self._has(token, rows)}
        )
        with self.with_tokens(tokens), ExitStack() as restore:
            for name, layer in layers.items():
                weight = self.modules.weight(name)
                restore.callback(self._restore, name, weight.clone())
                delta = layer.delta().to(weight.device).view(weight.shape)
                weight.copy_(weight.float() + scale * delta)
            self._adapters.append((adapter.name if isinstance(adapter, Adapter) else "layers", scale))
            restore.callback(self._adapters.pop)
            yield

    @contextmanager
    def with_tokens(self, tokens: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, prompts may use learned tokens: embeddings (1, dim), or (L, dim) with one per cross-attention layer.

        `dim` is the width of the text encoder; of SDXL's two that of either, for one that the other does not know, or of both together.
        Tokenizers and embedding tables are swapped for extended copies; the very same objects come back on exit. Raises UsageError for
        tokens that exist already or whose L is not the number of cross-attention layers, PipelineError for embeddings of another width.
        """
        if not tokens:
            yield
            return
        if self.family != "sdxl":
            self.check_plain("learned tokens")
        encoders = {name: part for name, part in self._components.items() if name.startswith("text_encoder")}
        widths = {name: int(encoder.get_input_embeddings().embedding_dim) for name, encoder in encoders.items()}  # type: ignore[operator]
        kept = self._tokens, self._layer_rows
        try:
            with ExitStack() as restore:
                for name, mine in by_encoder(tokens, widths).items():
                    rows = kept[1] if name == "text_encoder" else {}
                    rows = restore.enter_context(knowing(self._pipe, name, mine, layers=len(self.cross_attention_layers), layer_rows=rows))
                    self._layer_rows = rows if name == "text_encoder" else self._layer_rows
                self._tokens = {**kept[0], **tokens}
                yield
        finally:
            self._tokens, self._layer_rows = kept

    @contextmanager
    def captured(self, names: Sequence[str], callback: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Inside, `callback(name, rows)` gets the inputs of the named modules at every forward pass, in float32.

        `rows` is (t, in): tokens or pixels of the whole batch, the very same tensor for sibling modules that are handed the
        same input; inputs of a convolution are unfolded to (t, channels * kh * kw), so
        that output = rows @ weight.flatten(1).T + bias for both. Raises PipelineError for unknown names.
        """
        self.modules.known(names)
        hooks = modules.recorder({name: self.modules[name] for name in names}, callback, self._unpadded)
        with ExitStack() as handles:
            for name, hook in hooks.items():
                handles.callback(self.modules[name].register_forward_pre_hook(hook).remove)
            yield

    def token_count(self, prompt: str) -> int:
        """Text tokens of a prompt with its begin and end marks, however long."""
        return len(self._tokenizer(prompt, verbose=False).input_ids)

    def encode(self, prompts: Sequence[str], *, pad: bool = True, layered: bool = False) -> Tensor:
        """(B, T, dim) states that cross-attention reads, or (B, L, T, dim) when some prompt holds a layer-wise token (others repeated).

        `layered` runs every prompt through the text encoder L times, also one without such a token.

        `pad` fills up to the text encoder's length, as sampling needs; without it all prompts must have equally many tokens,
        else UsageError. A longer prompt is cut with a PromptTruncationWarning.
        """
        if isinstance(prompts, str) or not prompts:
            raise UsageError("encode needs a list of at least one prompt; put a single prompt in a list")
        encoder, length = self._encoder, self.text_length
        counts = set()
        for prompt in prompts:  # no comprehension: it would be a frame between the warning and our caller
            counts.add(self._warn_if_cut(prompt, length))
        if not pad and len(counts) > 1:
            raise UsageError(f"prompts of {sorted(counts)} tokens cannot be stacked unpadded; encode them one at a time")
        if not self.plain:
            return self._encoded(prompts, pad=pad)
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
        self.check_plain("denoising of encoded prompts")
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

        unet, latent = self._unet, (height // self._pipe.vae_scale_factor, width // self._pipe.vae_scale_factor)
        states = conditioning if negative is None else _halves(negative, conditioning)
        states = states.to(self.device, self.dtype)
        sampler = sampling.fresh_scheduler(self._pipe, scheduler)
        sampler.set_timesteps(steps, device=self.device)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        # One generator per picture, on the CPU and in float32: a seed is the same picture in any batch, on any device.
        noise = torch.cat([torch.randn((1, unet.config.in_channels, *latent), generator=generator) for generator in generators])
        extra = {"generator": generators} if "generator" in inspect.signature(sampler.step).parameters else {}
        special = states.ndim == 4 or bool(regions)
        with torch.inference_mode(), conditioned(self.cross_attentions if special else (), latent=latent, regions=regions):
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
        pixels = self.check_settings(seeds=seeds, steps=steps, guidance=guidance, size=size, scheduler=scheduler)
        if isinstance(prompts, str) or len(prompts) != len(seeds) or not prompts:
            seen = "one string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
            raise UsageError(f"{seen} and {len(seeds)} seeds; give a list of prompts and one seed for each")
        guided = guidance > 1
        if regions:
            self.check_steerable()
        boxes = [RegionStates(self._halves(region, guided), region.box) for region in regions or ()]
        if not self.plain:
            scale = int(self._pipe.vae_scale_factor)
            attentions = self.cross_attentions if boxes else ()
            for prompt in prompts:
                self._warn_if_cut(prompt, self.text_length)
            with torch.inference_mode(), conditioned(attentions, latent=(pixels[0] // scale, pixels[1] // scale), regions=boxes):
                pictures: list[Image] = sampling.call(
                    self._pipe,
                    prompts,
                    seeds=seeds,
                    steps=steps,
                    size=pixels,
                    guidance=guidance,
                    negative=negative,
                    scheduler=scheduler,
                    callback=callback,
                    pictures=True,
                )
            return pictures
        latents = self.denoise(
            self.encode(prompts),
            negative=self.encode([negative]) if guided else None,
            seeds=seeds,
            steps=steps,
            size=size,
            guidance=guidance,
            regions=boxes,
            scheduler=scheduler,
            callback=callback,
        )
        return self.decode(latents)

    def run(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        steps: int = STEPS,
        size: tuple[int, int] | None = None,
        half: bool = False,
    ) -> Tensor:
        """Denoise `prompts`, conditional only, for what hooks see of it -> latents as the family keeps them.

        `half` multiplies in bfloat16 where that is safe (autocast), if the device can. Where guidance is embedded it has the
        pipeline's own value. Raises UsageError for settings that do not fit.
        """
        if self.plain:
            states = self.encode(prompts)
            with loading.half(self.device, half):
                return self.denoise(states, seeds=seeds, steps=steps, size=size)
        pixels = self.check_settings(seeds=seeds, steps=steps, guidance=1.0, size=size)
        with torch.inference_mode(), loading.half(self.device, half):
            latents: Tensor = sampling.call(self._pipe, prompts, seeds=seeds, steps=steps, size=pixels, guidance=None, pictures=False)
        return _usable(latents)

    def decode(self, latents: Tensor) -> list[Image]:
        """(B, channels, h, w) latents, as `denoise` gives them, to pictures."""
        return sampling.decode(self._pipe, latents)

    def check_settings(
        self, *, seeds: Sequence[int], steps: int, guidance: float, size: tuple[int, int] | None, scheduler: str | None = None
    ) -> tuple[int, int]:
        """The size in pixels, or UsageError with everything that is wrong, before any work is done."""
        return families.settings(self._pipe, self._unet, seeds=seeds, steps=steps, guidance=guidance, size=size, scheduler=scheduler)

    @property
    def _encoder(self) -> Any:
        return self._pipe.text_encoder

    @property
    def text_length(self) -> int:
        """The most tokens a prompt may have, with its begin and end marks."""
        return max(self._limits.values())

    @property
    def _tokenizer(self) -> Any:
        """That of the text encoder which reads most."""
        limits = self._limits
        return getattr(self._pipe, max(limits, key=lambda name: limits[name]).replace("text_encoder", "tokenizer"))

    def check_plain(self, what: str = "training") -> None:
        """Raises PipelineError for a pipeline whose prompts and sampling are more than one text encoder and a UNet (SDXL, inpainting)."""
        if not self.plain:
            others = sorted(set(self._components) - {"unet", "text_encoder"})
            has = f"{type(self._pipe).__name__} ({', '.join(others) or 'no other encoder'}, {self._unet.config.in_channels} input channels)"
            raise PipelineError(f"{what} with {has}: not supported; use a Stable Diffusion 1 or 2 text-to-image model")

    def check_steerable(self) -> None:
        """Raises PipelineError for a model whose pictures regions cannot steer."""
        if not self.cross_attention_layers:
            raise PipelineError(f"{type(self._pipe).__name__} has no cross-attention that regions could steer; use a model with a UNet")

    def _halves(self, region: Region, guided: bool) -> Tensor:
        """A region's (1, T, dim) states, or its negative's and its own where guidance wants both."""
        if not guided:
            return self.encode([region.prompt])
        states = self.encode([region.negative, region.prompt])
        if not region.negative and getattr(self._pipe.config, "force_zeros_for_empty_prompt", False):  # SDXL, as for the whole picture
            states[0] = 0
        return states

    def _encoded(self, prompts: Sequence[str], *, pad: bool) -> Tensor:
        """By the pipeline's own encode_prompt. Unpadded: as padded, but that captured rows and states end where the text ends."""
        if not pad:
            for component, limit in self._limits.items():
                tokenizer = getattr(self._pipe, component.replace("text_encoder", "tokenizer"))
                longest = max(len(tokenizer(prompt, verbose=False).input_ids) for prompt in prompts)
                self._unpadded[component] = min(longest, limit)
        try:
            with torch.inference_mode():
                states = sampling.encode(self._pipe, prompts)
            if self._unpadded and self.cross_attention_layers:
                states = states[:, : max(self._unpadded.values())]
            return _usable(states)
        finally:
            self._unpadded.clear()

    def _warn_if_cut(self, prompt: str, length: int) -> int:
        tokenizer = self._tokenizer
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

    def _restore(self, name: str, kept: Tensor) -> None:
        self.modules.weight(name).copy_(kept)

    def _has(self, token: str, rows: Tensor) -> bool:
        """So that an adapter can be applied where all concepts' tokens are in already."""
        return token in self._tokens and torch.equal(self._tokens[token], rows)


def _halves(negative: Tensor, positive: Tensor) -> Tensor:
    """(2B, T, dim), or (2B, L, T, dim) if either is layer-wise: negative first, as diffusers does."""
    layers = max(states.shape[1] if states.ndim == 4 else 0 for states in (negative, positive))
    pair = [states[:, None].expand(-1, layers, -1, -1) if layers and states.ndim == 3 else states for states in (negative, positive)]
    return torch.cat([pair[0].expand_as(pair[1]), pair[1]])


def _usable(tensor: Tensor) -> Tensor:
    """A copy that is no inference tensor: those could not enter an optimiser's graph later."""
    with torch.inference_mode(False):
        return tensor.detach().clone()
