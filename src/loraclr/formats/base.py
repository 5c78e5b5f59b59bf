"""What every format shares: the raw content of a file, the protocol, and the way from layers to what is stored of them.

Scale is folded exactly once: a reader sets `LoraLayer.scale`, a writer bakes it into the factors, so what is written always has scale 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from loraclr.adapter import Adapter, DenseLayer, Layer
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


class BaseWeights(Protocol):
    """What is asked of a base model; `loraclr.Pipeline` is one."""

    def base_weight(self, name: str) -> Tensor:
        """(out, in) or (out, channels, kh, kw) of the layer of that canonical name; a LoraclrError if there is none."""


class AdapterFormat(Protocol):
    """One grammar of names and scales; each module of this package that stands in `FORMATS` is one."""

    id: str
    storage: Storage
    holds_tokens: bool

    def detect(self, keys: Iterable[str], metadata: Mapping[str, str]) -> bool:
        """Whether this content is of this format: true for all of its files, also for those `read` then refuses."""

    def read(self, content: Content, base: BaseWeights | None = None) -> Adapter:
        """Layers (and tokens that the file holds) under canonical names, scales set. FormatError for any key it cannot place.

        Kinds whose change depends on the base weights are worked out on `base`, and are a FormatError without one.
        """

    def write(self, adapter: Adapter, dtype: torch.dtype) -> Content:
        """The reverse of `read`, scales baked in. FormatError for layers the format has no name or no key for."""


# Marks of kinds that are recognised in order to be refused by name.
KINDS = {
    "model.diffusion_model.": "the weights of a whole checkpoint",
    "dora_scale": "DoRA magnitudes where this format has none",
    "lora_magnitude_vector": "DoRA magnitudes where this format has none",
    "hada_": "LoHa (Hadamard product) factors where this format has none",
    "lokr_": "LoKr (Kronecker product) factors where this format has none",
    "oft_diag": "OFT rotations of an older layout",
    "oft_": "OFT / BOFT rotations where this format has none",
    ".diff_b": "bias differences, and a merge solves for weights alone",
    "lora_B.bias": "bias differences, and a merge solves for weights alone",
    "lora_up.bias": "bias differences, and a merge solves for weights alone",
    ".w_norm": "normalisation-layer differences, and a merge solves for linear and convolutional layers alone",
    ".b_norm": "normalisation-layer differences, and a merge solves for linear and convolutional layers alone",
    "_norm.scale": "normalisation-layer differences (a Flux control LoRA)",
    "bundle_emb.": "bundled textual-inversion embeddings of a kind that has no place here",
    "lora_te3_": "a third text encoder (SD3)",
    "joint_blocks": "SD3 transformer layers",
    "double_blocks": "Flux layers that Flux.1 does not have",
    "single_blocks": "Flux layers that Flux.1 does not have",
    "diffusion_model.": "layers of another family than SD1.x, SD2.x, SDXL and Flux.1",
    "transformer.": "layers of another transformer than Flux.1's",
}


def unplaced(keys: Iterable[str], format_id: str) -> FormatError:
    """The error for keys a reader could not place, naming the kind where it is a known one."""
    unknown = sorted(keys)
    shown = ", ".join(key[:120] for key in unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
    kind = next((text for mark, text in KINDS.items() for key in unknown if mark in key), None)
    if kind is None:
        return FormatError(
            f"{len(unknown)} keys that {format_id} does not have: {shown}; use an adapter of an SD1.x, SD2.x, SDXL or Flux.1 model"
        )
    return FormatError(f"holds {kind} ({shown}), so it cannot be read as changes of weights; use a plain LoRA file instead")


def stored_layers(adapter: Adapter, dtype: torch.dtype, *, alpha: float | None = None) -> Iterator[tuple[Layer, tuple[Tensor, ...]]]:
    """Each layer with what is stored of it: (down, up) with the scale baked in and norms balanced, or (change,).

    The factors make the delta at scale 1, or at alpha / rank if the file is going to state that one alpha everywhere. Raises
    FormatError on overflow; warns once, naming the worst layers, when some delta lost more than 1e-3 of its norm.
    """
    errors: dict[str, float] = {}
    for layer in adapter:
        if isinstance(layer, DenseLayer):
            whole = layer.delta(torch.float64)
            change = _cast(layer.name, whole, dtype)
            errors[layer.name] = _ratio((change.double() - whole).norm(), whole.norm())
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
