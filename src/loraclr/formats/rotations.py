"""OFT and BOFT: output rows of the base weight turned by orthogonal blocks. Only on a base are they a change."""

from __future__ import annotations

import torch
from torch import Tensor

from loraclr.errors import FormatError


def change(name: str, weight: Tensor, blocks: Tensor, rescale: Tensor | None, constraint: float) -> Tensor:
    """R W - W in float32, W (out, in) or (out, channels, kh, kw).

    `blocks` (k, b, b) with k * b = out are Diag-OFT, R their Cayley transforms on the diagonal, transposed. (m, k, b, b) are the m
    stages of BOFT, where stage i turns rows 2^i * b / 2 apart, untransposed. `rescale` (out, 1) multiplies rows last. `constraint`
    times `out` is the largest norm of all skew matrices together; 0 is no limit. As in LyCORIS.
    """
    rows, size = weight.shape[0], blocks.shape[-1]
    if blocks.ndim not in (3, 4) or blocks.shape[-2] != size or blocks.shape[-3] * size != rows:
        raise FormatError(f"{name}: rotations {tuple(blocks.shape)} for {rows} output rows; give the base it was trained on")
    if rescale is not None and (rescale.shape[0] != rows or rescale.numel() != rows):
        raise FormatError(f"{name}: rescale has shape {tuple(rescale.shape)} for {rows} output rows; the file is damaged")
    base = weight.double().flatten(1)
    turn = rotation(blocks, constraint * rows)
    if blocks.ndim == 3:
        turned = torch.einsum("knm,kni->kmi", turn, base.view(-1, size, base.shape[1])).reshape(base.shape)
    else:
        turned = base
        for stage, one in enumerate(turn):
            order = butterfly(name, rows, size, stage)
            inner = torch.einsum("kmn,kni->kmi", one, turned[order].view(-1, size, base.shape[1])).reshape(base.shape)
            turned = torch.empty_like(inner)
            turned[order] = inner
    if rescale is not None:
        turned = turned * rescale.double().view(-1, 1)
    return (turned - base).view(weight.shape).float()


def rotation(blocks: Tensor, limit: float) -> Tensor:
    """The Cayley transforms (I + Q)(I - Q)^-1 of the skew parts Q = B - B^T, float64; Q scaled to norm `limit` if that is above 0."""
    skew = blocks.double() - blocks.double().transpose(-1, -2)
    norm = float(skew.norm())
    if 0 < limit < norm:
        skew = skew * (limit / norm)
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype)
    # One by one: torch's batched solve is broken on some CPUs. Never singular: the eigenvalues of a skew matrix are imaginary.
    solved = [torch.linalg.solve((eye - one).T, (eye + one).T).T for one in skew.flatten(0, -3)]
    return torch.stack(solved).view(skew.shape)


def butterfly(name: str, rows: int, size: int, stage: int) -> Tensor:
    """The order in which a stage takes rows: groups of two runs of 2^stage * size / 2 rows, the runs interleaved."""
    run = 2**stage * (size // 2) if stage < 30 else 0
    if run == 0 or rows % (2 * run):
        raise FormatError(f"{name}: {rows} output rows do not have a butterfly stage {stage} of blocks of {size}; the file is damaged")
    return torch.arange(rows).view(-1, 2, run).transpose(1, 2).flatten()
