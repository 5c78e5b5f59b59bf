"""What every format shares: the raw content of a file, the protocol, and the way from tensors to layers and back.

Scale is folded exactly once: a reader sets `LoraLayer.scale`, a writer bakes it into the factors, so what is written always has scale 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from loraclr.adapter import Adapter, DenseLayer, Layer, LoraLayer
from loraclr.errors import FormatError

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
WORST_ERROR = 1e-3  # relative, per layer; float16 rounding alone stays near 4e-4

Storage = Literal["file", "folder", "torch"]


class PrecisionWarning(UserWarning):
    """A layer was written with a relative error above 1e-3."""


@dataclass(frozen=True)
class Content:
    """A file as two dictionaries. Keys of a folder begin with its subfolder (`unet/...`), those of a torch file with the outer keys."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


class AdapterFormat(Protocol):
    """One grammar of names and scales; each module of this package that stands in `FORMATS` is one."""

    id: str
    storage: Storage
    holds_tokens: bool

    def detect(self, keys: Iterable[str], metadata: Mapping[str, str]) -> bool:
        """Whether this content is of this format: true for all of its files, also for those `read` then refuses."""

    def read(self, content: Content) -> Adapter:
        """Layers (and tokens, if the format holds them) under canonical names, scales set. FormatError for any key it cannot place."""

    def write(self, adapter: Adapter, dtype: torch.dtype) -> Content:
        """The reverse of `read`, scales baked in. FormatError for layers the format has no name or no key for."""


# Marks of kinds that are recognised in order to be refused by name.
KINDS = {
    "dora_scale": "DoRA magnitudes, whose effect depends on the base weights",
    "lora_magnitude_vector": "DoRA magnitudes, whose effect depends on the base weights",
    "hada_": "LoHa (Hadamard product) factors",
    "lokr_": "LoKr (Kronecker product) factors",
    "oft_": "OFT / BOFT rotations, whose effect depends on the base weights",
    ".diff_b": "bias differences",
    "lora_B.bias": "bias differences",
    "lora_up.bias": "bias differences",
    ".w_norm": "normalisation-layer differences",
    ".b_norm": "normalisation-layer differences",
    "bundle_emb.": "bundled textual-inversion embeddings",
    "lora_te2_": "a second text encoder (SDXL)",
    "lora_te3_": "a T5 text encoder (Flux, SD3)",
    "text_encoder_2.": "a second text encoder (SDXL)",
    "double_blocks": "Flux transformer layers",
    "single_blocks": "Flux transformer layers",
    "joint_blocks": "SD3 transformer layers",
    "transformer.": "layers of a diffusion transformer",
}


def unplaced(keys: Iterable[str], format_id: str) -> FormatError:
    """The error for keys a reader could not place, naming the kind where it is a known one."""
    unknown = sorted(keys)
    shown = ", ".join(key[:120] for key in unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
    kind = next((text for mark, text in KINDS.items() for key in unknown if mark in key), None)
    if kind is None:
        return FormatError(f"{len(unknown)} keys that {format_id} does not have: {shown}; use a plain LoRA of an SD1.x model")
    return FormatError(f"holds {kind} ({shown}), which cannot be read as low-rank or dense changes; convert it to a plain SD1.x LoRA first")


class Parts:
    """Tensors gathered by module until each module is complete."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[str, Tensor]] = {}

    def put(self, name: str, part: str, tensor: Tensor) -> None:
        mine = self._parts.setdefault(name, {})
        if part in mine:
            raise FormatError(f"{name}: two keys give its {part!r}; keep one of the two naming schemes")
        mine[part] = tensor

    def layers(self, scale: Callable[[str, int, float | None], float]) -> dict[str, Layer]:
        """`scale(name, rank, alpha)` is the format's rule; alpha is None where the file has none."""
        return {name: _layer(name, parts, scale) for name, parts in self._parts.items()}


def _layer(name: str, parts: dict[str, Tensor], scale: Callable[[str, int, float | None], float]) -> Layer:
    for part, tensor in parts.items():
        if 0 in tensor.shape or (part != "alpha" and tensor.ndim not in (2, 4)):
            raise FormatError(f"{name}: {part} has shape {tuple(tensor.shape)}; expected a matrix or a kernel, so the file is damaged")
    if parts.keys() == {"diff"}:
        return DenseLayer(name, parts["diff"])
    if not {"down", "up"} <= parts.keys() <= {"down", "up", "mid", "alpha"}:
        raise FormatError(f"{name}: has only {', '.join(sorted(parts))}; a LoRA needs its down and its up, a full difference stands alone")
    alpha = parts.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise FormatError(f"{name}: alpha has shape {tuple(alpha.shape)}; expected one number")
    down, up = parts["down"], parts["up"]
    factor = scale(name, down.shape[0], None if alpha is None else float(alpha))
    if "mid" in parts:
        down = _fold(name, down, parts["mid"])
    if down.ndim == 2 and up.ndim == 4:
        down = down[:, :, None, None]  # some tools squeeze one factor of a 1x1 convolution only
    if up.ndim == 2 and down.ndim == 4:
        up = up[:, :, None, None]
    return LoraLayer(name, down, up, factor)


def _fold(name: str, down: Tensor, mid: Tensor) -> Tensor:
    """Tucker: (rank, in, 1, 1) through the core (rank, rank, kh, kw) is one (rank, in, kh, kw) convolution, exactly."""
    if down.ndim != 4 or mid.ndim != 4 or down.shape[2:] != (1, 1) or mid.shape[1] != down.shape[0]:
        raise FormatError(f"{name}: mid {tuple(mid.shape)} and down {tuple(down.shape)} are no Tucker pair; the file is damaged")
    return torch.einsum("mnhw,ni->mihw", mid.float(), down.flatten(1).float())


def stored_layers(adapter: Adapter, dtype: torch.dtype, *, alpha: float | None = None) -> Iterator[tuple[Layer, tuple[Tensor, ...]]]:
    """Each layer with what is stored of it: (down, up) with the scale baked in and norms balanced, or (change,).

    The factors make the delta at scale 1, or at alpha / rank if the file is going to state that one alpha everywhere. Raises
    FormatError on overflow; warns once, naming the worst layers, when some delta lost more than 1e-3 of its norm.
    """
    errors: dict[str, float] = {}
    for layer in adapter:
        if isinstance(layer, DenseLayer):
            change = _cast(layer.name, layer.change.double(), dtype)
            errors[layer.name] = _ratio((change.double() - layer.change.double()).norm(), layer.change.double().norm())
            yield layer, (change,)
        else:
            exact = layer.down.double(), layer.up.double() * (layer.scale * layer.rank / alpha if alpha else layer.scale)
            down, up = (_cast(layer.name, factor, dtype) for factor in _balanced(*exact))
            errors[layer.name] = _factor_error(exact, (down.double(), up.double()))
            yield layer, (down, up.reshape(*up.shape[:2], *[1] * (down.ndim - 2)))
    worst = sorted((name for name in errors if errors[name] > WORST_ERROR), key=lambda name: (-errors[name], name))
    if worst:
        shown = ", ".join(f"{name} ({errors[name]:.1e})" for name in worst[:3])
        message = f"{len(worst)} layers lose more than {WORST_ERROR:g} in {dtype}: {shown}; write float32"
        warnings.warn(message, PrecisionWarning, stacklevel=4)  # the caller of save_adapter


def _balanced(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Equal norms as near as a power of two goes, so that balancing itself costs no bit and neither factor underflows first."""
    a, b = float(down.norm()), float(up.norm())
    if not (a > 0 and b > 0 and math.isfinite(a * b)):
        return down, up
    tilt = 2.0 ** round((math.log2(b) - math.log2(a)) / 2)
    return down * tilt, up / tilt


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    stored = tensor.to(dtype).contiguous()
    if not torch.isfinite(stored).all():
        raise FormatError(f"{name}: values up to {float(tensor.abs().max()):.3g} do not fit {dtype}; write float32, or check the merge")
    return stored


def _factor_error(exact: tuple[Tensor, Tensor], stored: tuple[Tensor, Tensor]) -> float:
    """|| stored delta - delta ||_F / || delta ||_F from the factors alone: || U D ||_F^2 = sum of (U^T U) * (D D^T)."""
    (down, up), (down_, up_) = (tuple(factor.flatten(1) for factor in pair) for pair in (exact, stored))
    wide, tall = torch.cat([down_, down]), torch.cat([up_, -up], dim=1)
    return _ratio(_norm(wide, tall), _norm(down, up))


def _norm(down: Tensor, up: Tensor) -> Tensor:
    return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()


def _ratio(error: Tensor, norm: Tensor) -> float:
    return float(error / norm) if norm > 0 else 0.0
