"""From the tensors of one module to its change: LoRA, Tucker, LoHa, LoKr, full difference, DoRA, OFT and BOFT, each exactly.

A change is low-rank where that takes less room than the full matrix: the product of two rank-r matrices by elements has rank r^2,
a Kronecker product has the product of the ranks. Otherwise it is worked out when asked for. Formulas after LyCORIS
(arXiv 2309.14859), DoRA (arXiv 2402.09353), OFT (arXiv 2306.07280) and BOFT (arXiv 2311.06243).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from loraclr.adapter import DenseLayer, Layer, LoraLayer, ProductLayer
from loraclr.errors import FormatError
from loraclr.formats import names, rotations

Scale = Callable[[str, int, float | None], float]
"""`scale(name, rank, alpha)` is a format's rule; alpha is None where the file has none."""

PARTS = {
    *("lora_down", "lora_up", "lora_mid", "diff", "alpha", "dora_scale", "oft_blocks", "rescale"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
}
LARGEST = 2**27  # elements of one expanded layer; the largest of Flux.1 has 2^26. Two small factors must not ask for terabytes.
_FREE = {"alpha", "dora_scale", "rescale"}  # parts that need not be matrices

Parts = Mapping[str, Tensor]


def build(name: str, parts: Parts, scale: Scale, base: Callable[[], Tensor] | None) -> Layer:
    """The layer called `name`. `base()` is its frozen weight, None where no base was given. Raises FormatError for misfits."""
    for part, tensor in parts.items():
        if 0 in tensor.shape or (part not in _FREE | {"oft_blocks"} and tensor.ndim not in (2, 4)):
            raise FormatError(f"{name}: {part} has shape {tuple(tensor.shape)}; expected a matrix or a kernel, so the file is damaged")
    alpha = parts.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise FormatError(f"{name}: alpha has shape {tuple(alpha.shape)}; expected one number")
    value = None if alpha is None else float(alpha)
    held = parts.keys() - {"alpha", "dora_scale"}
    if "oft_blocks" in held and held <= {"oft_blocks", "rescale"} and "dora_scale" not in parts:
        weight = _weight(name, "an OFT / BOFT rotation", base)
        change = rotations.change(name, weight, parts["oft_blocks"], parts.get("rescale"), value or 0.0)
        return DenseLayer(name, _finite(name, change))
    if parts.keys() == {"diff"}:
        return DenseLayer(name, parts["diff"])
    if {"lora_down", "lora_up"} <= held <= {"lora_down", "lora_up", "lora_mid"}:
        layer = _lora(name, parts, scale, value)
    elif any(part.startswith("hada_") for part in held):
        layer = _loha(name, parts, held, scale, value)
    elif any(part.startswith("lokr_") for part in held):
        layer = _lokr(name, parts, held, scale, value)
    else:
        raise FormatError(f"{name}: has only {', '.join(sorted(parts))}; a LoRA needs its down and its up, a full difference stands alone")
    if "dora_scale" in parts:
        return DenseLayer(name, _dora(name, layer, parts["dora_scale"], _weight(name, "a DoRA", base)))
    return layer


def _lora(name: str, parts: Parts, scale: Scale, alpha: float | None) -> Layer:
    down, up = parts["lora_down"], parts["lora_up"]
    factor = scale(name, down.shape[0], alpha)
    if "lora_mid" in parts:
        down = _fold(name, down, parts["lora_mid"])
    if down.ndim == 2 and up.ndim == 4:
        down = down[:, :, None, None]  # some tools squeeze one factor of a 1x1 convolution only
    if up.ndim == 2 and down.ndim == 4:
        up = up[:, :, None, None]
    return LoraLayer(name, down, up, factor)


def _fold(name: str, down: Tensor, mid: Tensor) -> Tensor:
    """Tucker: (rank, in, 1, 1) through the core (rank, rank, kh, kw) is one (rank, in, kh, kw) convolution, exactly."""
    if down.ndim != 4 or down.shape[2:] != (1, 1) or mid.ndim != 4 or mid.shape[:2] != (down.shape[0], down.shape[0]):
        raise FormatError(f"{name}: mid {tuple(mid.shape)} and down {tuple(down.shape)} are no Tucker pair; the file is damaged")
    return _finite(name, torch.einsum("mnhw,ni->mihw", mid.float(), down.flatten(1).float()))


def _loha(name: str, parts: Parts, held: set[str], scale: Scale, alpha: float | None) -> Layer:
    """(w1_a w1_b) * (w2_a w2_b) by elements; with Tucker cores each half is sum_mn a_mo t_mn b_ni."""
    pairs = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
    if not pairs <= held <= pairs | {"hada_t1", "hada_t2"} or ("hada_t1" in held) != ("hada_t2" in held):
        raise FormatError(f"{name}: has only {', '.join(sorted(held))} of a LoHa; the file is incomplete, fetch it again")
    (a1, b1), (a2, b2) = ((parts[f"hada_{w}_a"].flatten(1), parts[f"hada_{w}_b"].flatten(1)) for w in ("w1", "w2"))
    factor = scale(name, b1.shape[0], alpha)
    if "hada_t1" in held:
        t1, t2 = parts["hada_t1"], parts["hada_t2"]
        shape = _tucker_shape(name, t1, a1, b1)
        if shape != _tucker_shape(name, t2, a2, b2):
            raise FormatError(f"{name}: the two halves of this LoHa have different shapes; the file is damaged")
        return ProductLayer(name, shape, lambda dtype: _tucker(t1, a1, b1, dtype) * _tucker(t2, a2, b2, dtype) * factor)
    if a1.shape[1] != b1.shape[0] or a2.shape[1] != b2.shape[0] or a1.shape[0] != a2.shape[0] or b1.shape[1] != b2.shape[1]:
        raise FormatError(f"{name}: {', '.join(f'{part} {tuple(parts[part].shape)}' for part in sorted(held))} do not make a LoHa")
    shape = _shaped(name, a1.shape[0], b1.shape[1], parts["hada_w1_b"].shape[2:])
    rank = a1.shape[1] * a2.shape[1]
    if not _smaller(rank, shape):
        return ProductLayer(name, shape, lambda d: ((a1.to(d) @ b1.to(d)) * (a2.to(d) @ b2.to(d)) * factor).view(shape))
    up = torch.einsum("oi,oj->oij", a1.float(), a2.float()).flatten(1)
    down = torch.einsum("in,jn->ijn", b1.float(), b2.float()).flatten(0, 1)
    return _low_rank(name, down, up, shape, factor)


def _lokr(name: str, parts: Parts, held: set[str], scale: Scale, alpha: float | None) -> Layer:
    """kron(w1, w2), each a matrix or a product a b. Scaled only if some factor is decomposed: alpha / its rank."""
    first, second, core = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}), ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}), {"lokr_t2"}
    if not any(held in (one | two, one | two | (core if len(two) == 2 else set())) for one in first for two in second):
        raise FormatError(f"{name}: has only {', '.join(sorted(held))} of a LoKr; the file is incomplete, fetch it again")
    ranks = [parts[part].shape[0] for part in ("lokr_w2_b", "lokr_w1_b") if part in held]  # w2 last: it decides where both are
    factor = scale(name, ranks[0], alpha) if ranks else 1.0
    w1 = _pair(name, parts, "lokr_w1")
    if "lokr_t2" in held:
        core2, a2, b2 = parts["lokr_t2"], parts["lokr_w2_a"].flatten(1), parts["lokr_w2_b"].flatten(1)
        out2, in2, *kernel = _tucker_shape(name, core2, a2, b2)
        shape = _sized(name, (w1[0].shape[0] * out2, w1[1].shape[1] * in2, *kernel))

        def tucker(dtype: torch.dtype) -> Tensor:
            return torch.kron(_product(w1, dtype)[:, :, None, None], _tucker(core2, a2, b2, dtype)) * factor

        return ProductLayer(name, shape, tucker)
    w2 = _pair(name, parts, "lokr_w2")
    kernel = list((parts["lokr_w2"] if "lokr_w2" in held else parts["lokr_w2_b"]).shape[2:])
    shape = _shaped(name, w1[0].shape[0] * w2[0].shape[0], w1[1].shape[1] * w2[1].shape[1], kernel)
    if not _smaller(w1[1].shape[0] * w2[1].shape[0], shape):
        return ProductLayer(name, shape, lambda dtype: (torch.kron(_product(w1, dtype), _product(w2, dtype)) * factor).view(shape))
    return _low_rank(name, torch.kron(w1[1].float(), w2[1].float()), torch.kron(w1[0].float(), w2[0].float()), shape, factor)


def _pair(name: str, parts: Parts, which: str) -> tuple[Tensor, Tensor]:
    """A factor as (out, p) and (p, in) with the least p: its own decomposition, or itself and an identity."""
    if which not in parts:
        a, b = parts[f"{which}_a"].flatten(1), parts[f"{which}_b"].flatten(1)
        if a.shape[1] != b.shape[0]:
            raise FormatError(f"{name}: {which}_a {tuple(a.shape)} and {which}_b {tuple(b.shape)} do not fit; the file is damaged")
        return a, b
    whole = parts[which].flatten(1)
    out, width = whole.shape
    _sized(name, (min(out, width), min(out, width)))
    eye = torch.eye(min(out, width), dtype=whole.dtype)
    return (eye, whole) if out <= width else (whole, eye)


def _product(pair: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    return pair[0].to(dtype) @ pair[1].to(dtype)


def _tucker(core: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """(m, n, kh, kw), (m, out), (n, in) -> (out, in, kh, kw)."""
    return torch.einsum("mnhw,mo,ni->oihw", core.to(dtype), a.to(dtype), b.to(dtype)).contiguous()


def _tucker_shape(name: str, core: Tensor, a: Tensor, b: Tensor) -> tuple[int, ...]:
    if core.ndim != 4 or core.shape[:2] != (a.shape[0], b.shape[0]):
        raise FormatError(f"{name}: {tuple(core.shape)} is no Tucker core of {tuple(a.shape)} and {tuple(b.shape)}; the file is damaged")
    return _sized(name, (a.shape[1], b.shape[1], *core.shape[2:]))


def _dora(name: str, layer: Layer, magnitude: Tensor, base: Tensor) -> Tensor:
    """m * (W + D) / ||W + D|| - W: norms of output rows if m has one number for each, as PEFT, else of input columns (old LyCORIS)."""
    weight = base.double()
    delta = layer.delta(torch.float64)
    if delta.shape[0] != weight.shape[0] or delta.numel() != weight.numel():
        raise FormatError(f"{name}: is {layer.shape} in the file and {tuple(weight.shape)} in the base; give the base it was trained on")
    moved = weight + delta.view(weight.shape)
    rows, columns = weight.shape[0], weight.shape[1]
    if magnitude.shape[0] == rows and magnitude.numel() == rows:
        axis, sides = tuple(range(1, weight.ndim)), (rows, 1)
    elif magnitude.ndim > 1 and magnitude.shape[:2] == (1, columns) and magnitude.numel() == columns:
        axis, sides = (0, *range(2, weight.ndim)), (1, columns)
    else:
        raise FormatError(
            f"{name}: magnitudes of shape {tuple(magnitude.shape)} for a weight of {tuple(weight.shape)}; "
            f"expected ({rows}, 1) or (1, {columns}), so the file is damaged"
        )
    norm = torch.linalg.vector_norm(moved, dim=axis, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    change: Tensor = magnitude.double().view(*sides, *[1] * (weight.ndim - 2)) * moved / norm - weight
    return _finite(name, change.float())


def _weight(name: str, what: str, base: Callable[[], Tensor] | None) -> Tensor:
    if base is None:
        raise FormatError(f"{name} is {what}, whose change depends on the base weights; pass the base model it is for (base=, or --base)")
    return base().detach().cpu()


def _shaped(name: str, out: int, width: int, kernel: torch.Size | list[int]) -> tuple[int, ...]:
    """The module's shape; factors of convolutions are often flattened, and then the module's name tells its kernel."""
    if not kernel:
        kernel = list(names.kernel(name))
        if width % math.prod(kernel):
            raise FormatError(f"{name}: {width} inputs are no whole number of {kernel} kernels; the file is damaged")
        width //= math.prod(kernel)
    else:
        width //= math.prod(kernel)
    return _sized(name, (out, width, *kernel))


def _sized(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if math.prod(shape) > LARGEST:
        raise FormatError(f"{name}: would expand to {shape}, more than any layer of the known families; the file is damaged or hostile")
    return shape


def _smaller(rank: int, shape: tuple[int, ...]) -> bool:
    """Whether factors of that rank take less room than the change itself."""
    width = math.prod(shape[1:])
    return rank * (shape[0] + width) < shape[0] * width


def _low_rank(name: str, down: Tensor, up: Tensor, shape: tuple[int, ...], factor: float) -> LoraLayer:
    down, up = _finite(name, down), _finite(name, up)
    return LoraLayer(name, down.view(-1, *shape[1:]), up.view(*up.shape, *[1] * (len(shape) - 2)), factor)


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise FormatError(f"{name}: its factors multiply to more than float32 can hold; the file is damaged or its training diverged")
    return tensor
