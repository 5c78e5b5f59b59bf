"""Values: one LoRA file's content. No files, no modules.

Axis names, here and everywhere: `out`, `in` a layer's output and input features (for a convolution `in` is the flattened
channels x kh x kw); `rank` a LoRA's inner dimension; `rows` tokens or pixels of features; `dim` a text encoder's width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor

from loraclr.errors import FormatError

STAGES = ("text", "keys", "spatial")  # of a staged merge, in order


def stage_of(name: str) -> str:
    """A layer's stage by its name alone: `text` encoders, cross-attention `keys` and values, or `spatial`, the rest of the denoiser."""
    if name.startswith("text_encoder"):
        return "text"
    return "keys" if name.endswith((".attn2.to_k", ".attn2.to_v")) else "spatial"


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """A low-rank change of one linear or convolutional module: `scale * up @ down`.

    `name` is component and real module path, such as `unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k` or
    `text_encoder.encoder.layers.0.self_attn.q_proj` (never with `text_model.`). `scale` is set once, by the format's reader.
    """

    name: str
    down: Tensor  # (rank, in) or (rank, channels, kh, kw)
    up: Tensor  # (out, rank) or (out, rank, 1, 1)
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.down.ndim not in (2, 4) or self.up.ndim not in (2, 4) or self.up.shape[1] != self.down.shape[0]:
            raise FormatError(
                f"{self.name}: down {tuple(self.down.shape)} and up {tuple(self.up.shape)} do not make a LoRA; "
                "expected (rank, in) and (out, rank), or convolution kernels of those"
            )
        if self.up.ndim == 4 and self.up.shape[2:] != (1, 1):
            raise FormatError(f"{self.name}: up {tuple(self.up.shape)} must be a 1x1 convolution")
        if not math.isfinite(self.scale):
            raise FormatError(f"{self.name}: scale {self.scale} is not a finite number")

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The module's weight: (out, in) or (out, channels, kh, kw)."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out, in) or (out, channels, kh, kw): the only product of factors and scale."""
        return (self.up.flatten(1).to(dtype) @ self.down.flatten(1).to(dtype) * self.scale).view(self.shape)


@dataclass(frozen=True, eq=False)
class DenseLayer:
    """A full-rank change of one module: a full difference, or what DoRA and OFT come to on a certain base."""

    name: str
    change: Tensor  # (out, in) or (out, channels, kh, kw)

    def __post_init__(self) -> None:
        if self.change.ndim not in (2, 4):
            raise FormatError(f"{self.name}: a dense change of shape {tuple(self.change.shape)}; expected 2 or 4 dimensions")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.change.shape)

    @property
    def rank(self) -> int:
        """The largest rank it may have."""
        return min(self.change.shape[0], self.change[0].numel())

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.change.to(dtype)


class ProductLayer(DenseLayer):
    """A full-rank change that is worked out when it is asked for, each time anew (LoHa, LoKr): a model's worth of them fits in memory.

    `make(dtype)` returns the change, (out, in) or (out, channels, kh, kw), in `dtype`; `shape` is its shape.
    """

    def __init__(self, name: str, shape: tuple[int, ...], make: Callable[[torch.dtype], Tensor]) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "_shape", tuple(shape))
        object.__setattr__(self, "_make", make)
        self._shape: tuple[int, ...]
        self._make: Callable[[torch.dtype], Tensor]

    @property
    def change(self) -> Tensor:
        """In float32."""
        return self._make(torch.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def rank(self) -> int:
        return min(self._shape[0], math.prod(self._shape[1:]))

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._make(dtype)


Layer = LoraLayer | DenseLayer


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter: layers by name, learned tokens, and the words that call it.

    `tokens` maps a learned token such as `<rhea>` to its embeddings, (1, dim), or (cross-attention layers, dim) for the
    layer-wise tokens of ED-LoRA and P+; `dim` is what the text encoder reads, of SDXL's two the one after the other. `triggers` are
    words of plain text. Two adapters are equal when their deltas are.
    """

    layers: Mapping[str, Layer]
    name: str = "adapter"
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    triggers: tuple[str, ...] = ()
    family: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType({key: self.layers[key] for key in sorted(self.layers)}))
        object.__setattr__(self, "tokens", MappingProxyType(dict(self.tokens)))
        object.__setattr__(self, "metadata", MappingProxyType(dict(self.metadata)))
        for key, layer in self.layers.items():
            if key != layer.name:
                raise FormatError(f"layer {layer.name!r} is filed under {key!r}")
        for token, rows in self.tokens.items():
            if rows.ndim != 2:
                raise FormatError(f"token {token!r} has embeddings of shape {tuple(rows.shape)}; expected (layers, dim)")

    @staticmethod
    def of(layers: Iterable[Layer], name: str = "adapter") -> Adapter:
        return Adapter({layer.name: layer for layer in layers}, name=name)

    def with_(self, **changes: object) -> Adapter:
        """A copy with some fields replaced."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers.values())

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def components(self) -> tuple[str, ...]:
        """`unet`, `text_encoder`, ... in sorted order."""
        return tuple(sorted({name.split(".", 1)[0] for name in self.layers}))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the weights it changes, by layer."""
        return {layer.name: layer.shape for layer in self}

    @property
    def call(self) -> str:
        """The words that call it in a prompt: a trigger that holds every learned token, else the tokens, else the first trigger."""
        for trigger in self.triggers:
            if set(self.tokens) <= set(trigger.split()):  # without tokens: the first
                return trigger
        return " ".join(self.tokens)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The different ranks of its layers, ascending."""
        return tuple(sorted({layer.rank for layer in self}))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Adapter):
            return NotImplemented
        if self.layers.keys() != other.layers.keys() or self.tokens.keys() != other.tokens.keys():
            return False
        return all(torch.equal(a.delta(), b.delta()) for a, b in zip(self, other, strict=True)) and all(
            torch.equal(self.tokens[token], other.tokens[token]) for token in self.tokens
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        ranks = "/".join(map(str, self.ranks)) or "-"
        parts = [f"{len(self)} layers ({', '.join(self.components) or 'none'})", f"rank {ranks}"]
        if self.tokens:
            parts.append("tokens " + " ".join(self.tokens))
        if self.triggers:
            parts.append("triggers " + ", ".join(self.triggers))
        return f"Adapter({self.name!r}: {'; '.join(parts)})"


def noun_of(call: str) -> str | None:
    """The class noun in a plain call: `woman` of `rhea woman`. None where the call is one word, or learned tokens."""
    words = call.split()
    return words[-1] if len(words) > 1 and not re.fullmatch(r"<.*>", words[-1]) else None


def style_of(call: str) -> str | None:
    """The style that the words name, as it stands behind "in": `kalle style`, `the style of kalle`. None where they name anything else."""
    words = re.sub(r"^in\s+", "", call.strip(" ,."), flags=re.IGNORECASE)
    named = re.fullmatch(r"(the )?style of \S.*|(?!.*\bin\b).*\bstyle", words, re.IGNORECASE)
    return words if named else None
