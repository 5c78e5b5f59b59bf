"""Sampling that follows a picture: ControlNet and T2I-Adapter models of diffusers, as a context around any UNet.

A hook adds their residuals to every pass of the UNet, whoever calls it: ordinary sampling, regions, or a strategy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from loraclr.conditioning import Box, box_cells, conditioned
from loraclr.errors import PipelineError
from loraclr.loading import looks_local, silenced

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class Control:
    """A loaded model with the picture that it reads. `weight` scales its residuals; 0 is as if it were not there.

    `boxes` give parts of the picture a weight of their own, the last one given wins: (y1, x1, y2, x2) in fractions -> weight.
    """

    model: Any
    image: Image
    weight: float = 1.0
    boxes: tuple[tuple[Box, float], ...] = ()
    name: str = "control"

    @property
    def is_adapter(self) -> bool:
        return hasattr(self.model, "total_downscale_factor")

    @property
    def settings(self) -> dict[str, object]:
        kind = "adapter" if self.is_adapter else "control"
        return {"kind": kind, "name": self.name, "weight": self.weight, "boxes": [[list(box), weight] for box, weight in self.boxes]}

    def cells(self, height: int, width: int) -> Tensor:
        """(h, w) weight of each cell."""
        weights = torch.full((height * width,), float(self.weight))
        for box, weight in self.boxes:
            weights[box_cells(box, height, width)] = weight
        return weights.view(height, width)

    def pixels(self, size: tuple[int, int]) -> Tensor:
        """(1, channels, *size) in [0, 1]; gray where the model reads one channel."""
        channels = int(self.model.config.in_channels if self.is_adapter else self.model.config.conditioning_channels)
        image = self.image.convert("L" if channels == 1 else "RGB").resize((size[1], size[0]))
        array = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
        return array[None, None] if channels == 1 else array.permute(2, 0, 1)[None]


def load_control(kind: str, source: str | Path) -> Any:
    """`kind` "control" or "adapter": a folder with a ControlNetModel or T2IAdapter of diffusers. Raises PipelineError; never downloads."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        more = "" if looks_local(source) else "; save it to a folder first, nothing is downloaded here"
        raise PipelineError(f"there is no folder {folder} with a {kind} model{more}")
    try:
        from diffusers import ControlNetModel, T2IAdapter
    except ImportError as error:
        raise PipelineError(f"loading a {kind} model needs diffusers ({error}); pip install 'loraclr[diffusion]'") from error
    wanted: Any = ControlNetModel if kind == "control" else T2IAdapter
    seen = _class_of(folder)
    if seen != wanted.__name__:
        raise PipelineError(f"{folder} holds {seen}; --{kind} takes a {wanted.__name__} as diffusers saves it")
    with silenced():
        try:
            return wanted.from_pretrained(str(folder), local_files_only=True).eval()
        except Exception as error:  # the libraries raise a dozen unrelated kinds
            raise PipelineError(
                f"{folder} is no {wanted.__name__} that loads ({type(error).__name__}: {error}); check the files"
            ) from error


@contextmanager
def controlled(unet: nn.Module, controls: Sequence[Control], *, size: tuple[int, int]) -> Iterator[None]:
    """Inside, every pass of `unet` follows the pictures, brought to `size` (height, width) pixels; residuals of several add up.

    A ControlNet reads the same prompts as the UNet, layer-wise ones by its own layers, but knows no regions. Raises PipelineError at the
    first pass for a model whose residuals do not fit the UNet.
    """
    active = [control for control in controls if control.weight or control.boxes]
    if not active:
        yield
        return
    state: Any = next(unet.parameters())
    kept = [control.model for control in active]
    for model in kept:
        model.to(state.device, state.dtype)
    with torch.inference_mode(False), torch.no_grad():
        read = [control.pixels(size).to(state) for control in active]
        features = [control.model(pixels) if control.is_adapter else None for control, pixels in zip(active, read, strict=True)]

    def add(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        sample, time = inputs[:2]
        states = named["encoder_hidden_states"]
        inner: list[Tensor] | None = None
        down: list[Tensor] | None = None
        middle: Tensor | None = None
        for control, pixels, found in zip(active, read, features, strict=True):
            if found is not None:
                inner = _sum(inner, [_weighted(one, control).expand(len(sample), -1, -1, -1) for one in found])
                continue
            own = _cross_attentions(control.model)
            with conditioned(own, latent=(sample.shape[-2], sample.shape[-1])) if states.ndim == 4 else nullcontext():
                blocks, mid = control.model(
                    sample,
                    time,
                    states,
                    pixels.expand(len(sample), -1, -1, -1),
                    added_cond_kwargs=named.get("added_cond_kwargs"),
                    return_dict=False,
                )
            down = _sum(down, [_weighted(one, control) for one in blocks])
            middle = _weighted(mid, control) if middle is None else middle + _weighted(mid, control)
        # Fresh lists: the UNet empties the first one.
        more: dict[str, Any] = {"down_intrablock_additional_residuals": inner} if inner is not None else {}
        more |= {"down_block_additional_residuals": tuple(down)} if down is not None else {}
        more |= {"mid_block_additional_residual": middle} if middle is not None else {}
        return inputs, {**named, **more}

    handle = unet.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def check_fit(unet: nn.Module, controls: Sequence[Control]) -> None:
    """Raises PipelineError for models made for another UNet, with other widths of its blocks or of the prompts, and without a UNet."""
    widths = list(getattr(unet.config, "block_out_channels", ()))
    if not widths:
        raise PipelineError(
            f"{controls[0].name} is for a UNet, and the base has a {type(unet).__name__}; leave it out, or use another base"
        )
    for control in controls:
        config = control.model.config
        own = list(config.channels if control.is_adapter else config.block_out_channels)
        if own != widths:
            raise PipelineError(f"{control.name} has blocks of {own} channels, the UNet of {widths}; use one made for this base")
        if not control.is_adapter and config.cross_attention_dim != unet.config.cross_attention_dim:  # type: ignore[union-attr]
            raise PipelineError(f"{control.name} reads prompts of another width than the UNet; use one made for this base")


def _weighted(residual: Tensor, control: Control) -> Tensor:
    return residual * control.cells(residual.shape[-2], residual.shape[-1]).to(residual)


def _sum(one: list[Tensor] | None, other: list[Tensor]) -> list[Tensor]:
    return other if one is None else [a + b for a, b in zip(one, other, strict=True)]


def _cross_attentions(model: nn.Module) -> list[Any]:
    """In the order down, mid, which is the UNet's."""
    paths = [path for path, _ in model.named_modules() if path.rpartition(".")[2] == "attn2"]
    return [model.get_submodule(path) for part in ("down_blocks", "mid_block") for path in paths if path.startswith(part)]


def _class_of(folder: Path) -> str:
    import json

    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        return "no model (a config.json with a _class_name is missing)"
