"""The layers of a loaded pipeline: their canonical names, their weights wherever these are kept, and what they are fed."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraclr.adapter import Layer, LoraLayer
from loraclr.errors import PipelineError

_LISTED = 10  # problems spelled out in one message; the rest is counted


def components(pipe: Any) -> dict[str, nn.Module]:
    """Denoisers and text encoders of a diffusers pipeline, by name."""
    return {
        name: part
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module) and re.match(r"unet|transformer|text_encoder", name)
    }


def fingerprint(pipe: Any, *, vae: bool = False) -> str:
    """SHA-256 of what features depend on: all weights of denoisers and text encoders to the last bit, the scheduler with its settings,
    and the vocabulary. With `vae` also its weights and settings, of which pictures are made.

    The time is that of the hash alone: 3 s for the 4.3 GB of a Stable Diffusion 1.5 in float32, where a processor has SHA instructions.
    """
    found = hashlib.sha256()
    for component, part in sorted((components(pipe) | ({"vae": pipe.vae} if vae else {})).items()):
        for name, _ in sorted(part.named_parameters()):
            parent, _, leaf = name.rpartition(".")
            weight = stored(part.get_submodule(parent), leaf, f"{component}.{name}")
            found.update(f"{component}.{name} {weight.dtype} {tuple(weight.shape)}".encode())
            found.update(weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    size = getattr(getattr(pipe, "unet", None) or pipe.transformer, "config", {}).get("sample_size")  # which not every transformer has
    said = [type(pipe.scheduler).__name__, _settings(pipe.scheduler), size, sorted(pipe.tokenizer.get_vocab().items())]
    found.update(json.dumps(said + ([_settings(pipe.vae)] if vae else []), sort_keys=True, default=str).encode())
    return found.hexdigest()


def _settings(part: Any) -> dict[str, object]:
    return {key: value for key, value in part.config.items() if not key.startswith("_")}


def stored(module: nn.Module, leaf: str, name: str) -> Tensor:
    """A parameter of a module, detached, wherever it is kept: one that accelerate offloads piece by piece has it beside it. Raises
    PipelineError with the whole name where it is offloaded and cannot be found."""
    weight = getattr(module, leaf)
    assert isinstance(weight, Tensor)
    if weight.device.type != "meta":
        return weight.detach()
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        if (kept := getattr(one, "weights_map", None)) is not None:
            held: Tensor = kept[leaf]
            return held.detach()
    raise PipelineError(f"{name} has no weights in memory; load the base whole, with --offload if it is large")


class Layers(dict[str, nn.Module]):
    """Every Linear and Conv2d of some components under its canonical name."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        """Raises PipelineError where LoRAs are loaded inside."""
        super().__init__(
            (canonical(component, path), module)
            for component, part in parts.items()
            for path, module in part.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        )
        if any(".base_layer" in name for name in self):
            raise PipelineError("the pipeline carries LoRAs loaded through diffusers; call its unload_lora_weights() first")

    def weight(self, name: str) -> Tensor:
        """The weight itself, detached, to read and to write in place.

        Ask anew at every use: a module that is moved to another device gets new storage. Raises PipelineError as `stored` does.
        """
        return stored(self[name], "weight", name)

    def known(self, names: Sequence[str]) -> None:
        """Raises PipelineError for names that are not here."""
        unknown = [name for name in names if name not in self]
        if unknown:
            raise PipelineError(_listed([self._unknown(name) for name in unknown[:_LISTED]], len(unknown)))

    def fitting(self, changes: Mapping[str, Layer]) -> None:
        """Raises PipelineError with all changes of weights that have no layer here, or one of another shape."""
        shapes = {name: tuple(self[name].weight.shape) for name in changes if name in self}  # type: ignore[arg-type]
        wrong = [name for name, layer in changes.items() if name not in self or not _fits(layer.shape, shapes[name])]
        if wrong:
            said = [
                f"{name!r} is {tuple(changes[name].shape)}, the model's weight {shapes[name]}" if name in self else self._unknown(name)
                for name in wrong[:_LISTED]
            ]
            raise PipelineError(_listed(said, len(wrong)))

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name, self, n=1, cutoff=0.7)
        return f"no layer {name!r}" + (f" (nearest: {near[0]!r})" if near else "")


def canonical(component: str, path: str) -> str:
    return f"{component}.{path.removeprefix('text_model.') if component.startswith('text_encoder') else path}"


def cross_attention(unet: nn.Module) -> tuple[str, ...]:
    """Paths of the attn2 modules of a UNet in the order down, mid, up; none of a transformer, or where something stands before them."""
    if getattr(unet, "encoder_hid_proj", None) is not None:
        return ()
    paths = [path for path, _ in unet.named_modules() if path.rpartition(".")[2] == "attn2"]
    return tuple(path for part in ("down_blocks", "mid_block", "up_blocks") for path in paths if path.startswith(part))


def recorder(names: Mapping[str, nn.Module], callback: Callable[[str, Tensor], None], limits: Mapping[str, int]) -> dict[str, Any]:
    """A forward pre-hook for each module: `callback(name, rows)`, rows as `Pipeline.captured` says.

    `limits` is read at every pass: of the text encoders it names, only so many tokens of every text count.
    """
    last: dict[str, tuple[Any, Tensor]] = {}  # by parent: queries, keys and values of one attention are handed the same input

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        parent, component = name.rpartition(".")[0], name.partition(".")[0]

        def record(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            # Rows must outlive inference mode: its tensors could not enter an optimiser's graph later.
            with torch.inference_mode(False), torch.no_grad():
                if isinstance(module, nn.Conv2d) or parent not in last or last[parent][0] is not inputs[0]:
                    last.clear()
                    given = inputs[0].detach()
                    given = given.cpu() if given.device.type == "mps" else given  # which has no float64 for what follows
                    if component in limits and given.ndim == 3:
                        given = given[:, : limits[component]]
                    last[parent] = inputs[0], rows(module, given.clone())
                callback(name, last[parent][1])

        return record

    return {name: hook(name) for name in names}


def rows(module: nn.Module, inputs: Tensor) -> Tensor:
    """(t, in) float32. `t` counts tokens, or output positions of a convolution."""
    if isinstance(module, nn.Conv2d):
        if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise PipelineError(f"features of {module} cannot be captured; leave grouped and specially padded convolutions out")
        patches = functional.unfold(inputs.float(), module.kernel_size, module.dilation, module.padding, module.stride)
        return patches.transpose(1, 2).flatten(0, 1)  # from (B, in, positions)
    return inputs.float().flatten(0, -2)


@contextmanager
def side_by_side(layers: Mapping[str, nn.Module], parts: Sequence[tuple[Mapping[str, Layer], float]]) -> Iterator[None]:
    """Inside, every batch is cut into len(parts) equal ones, and part k has the k-th changes, times their weight, in its layers.

    Changes are added to what the layers give, factor after factor: no weight is touched or copied. For passes without gradients.
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        changes = [(layer, weight) if (layer := own.get(name)) is not None else None for own, weight in parts]

        def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            for change, x, out in zip(changes, inputs[0].chunk(len(parts)), output.chunk(len(parts)), strict=True):
                if change is not None:
                    out.add_(_through(*change, module, x.to(out)))
            return output

        return add

    with ExitStack() as handles:
        for name in dict.fromkeys(name for own, _ in parts for name in own):
            handles.callback(layers[name].register_forward_hook(hook(name)).remove)
        yield


def _through(layer: Layer, weight: float, module: nn.Module, x: Tensor) -> Tensor:
    """What a layer's change, times `weight`, adds to the module's output on its input x."""
    assert isinstance(module.weight, Tensor)
    kernel = module.weight.shape[1:]
    if not isinstance(layer, LoraLayer):
        return _apply(module, (weight * layer.delta()).to(x).view(-1, *kernel), x)
    inner = _apply(module, layer.down.to(x).view(-1, *kernel), x)
    up = (layer.up.flatten(1).float() * (layer.scale * weight)).to(x)
    return functional.conv2d(inner, up[:, :, None, None]) if isinstance(module, nn.Conv2d) else functional.linear(inner, up)


def _apply(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    if isinstance(module, nn.Conv2d):
        return functional.conv2d(x, weight, None, module.stride, module.padding, module.dilation)
    return functional.linear(x, weight)


def _fits(shape: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Equal, or a 1x1 convolution and a linear layer of the same numbers."""
    return shape == weight or (shape[:2] == weight[:2] and set(shape[2:]) | set(weight[2:]) == {1})


def _listed(problems: Sequence[str], count: int) -> str:
    more = f"; and {count - len(problems)} more" if count > len(problems) else ""
    return f"{count} layer(s) do not fit the base model: {'; '.join(problems)}{more}; use the base model they were made for"
