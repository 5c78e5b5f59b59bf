"""Where a prompt's words look in a picture: cross-attention maps while training, and the penalty of Mix-of-Show on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from loraclr.conditioning import map_size


@contextmanager
def watched(attentions: Sequence[Any], maps: list[Tensor], wanted: Callable[[], bool]) -> Iterator[None]:
    """Inside, every forward pass of these diffusers `Attention` modules appends its map (B, cells, T), the mean of the heads, to `maps`.

    Only where `wanted()`. Their processors and methods come back on exit.
    """
    from diffusers.models.attention_processor import AttnProcessor  # the one that spells the map out

    with ExitStack() as stack:
        for attention in attentions:
            scores = attention.get_attention_scores

            def record(
                query: Tensor, key: Tensor, mask: Tensor | None = None, scores: Any = scores, heads: int = attention.heads
            ) -> Tensor:
                probabilities: Tensor = scores(query, key, mask)  # (B * heads, cells, T)
                if wanted():
                    maps.append(probabilities.view(-1, heads, *probabilities.shape[1:]).mean(1))
                return probabilities

            stack.callback(attention.set_processor, attention.processor)
            attention.set_processor(AttnProcessor())
            attention.get_attention_scores = record
            stack.callback(delattr, attention, "get_attention_scores")
        yield


def attention_penalty(maps: Sequence[Tensor], places: Tensor, masks: Tensor, *, latent: tuple[int, int], whole: bool) -> Tensor | None:
    """How far the concept's words look outside the mask (Mix-of-Show, arXiv 2305.18292, its released trainer). None if nothing can be said.

    `maps` (B, cells, T) of all layers, averaged per resolution and divided by their largest value; `places` (B, 2) positions of the two
    words, -1 for none; `masks` (B, 1, h, w) of 0 and 1. For the first word the mean outside the mask, for the second the same, or with
    `whole` the squared difference to the mask. Pictures that are all mask do not count, nor do prompts cut before their words.
    """
    terms = []
    kept = (places >= 0).all(1) & (masks.flatten(1) < 0.5).any(1).cpu()
    for cells in sorted({one.shape[1] for one in maps}):
        average = torch.stack([one.float() for one in maps if one.shape[1] == cells]).mean(0)
        inside = interpolate(masks, map_size(latent, cells), mode="nearest").flatten(1)  # (B, cells)
        outside = 1 - inside
        rows = [row for row in range(len(places)) if kept[row] and outside[row].any()]
        if not rows:
            continue
        for word in range(places.shape[1]):
            looks = torch.stack([average[row, :, places[row, word]] for row in rows])
            looks = looks / looks.max().clamp(min=1e-12)
            if whole and word == places.shape[1] - 1:
                terms.append(((looks - inside[rows]) ** 2).mean())
            else:
                terms.append((looks * outside[rows]).sum() / outside[rows].sum())
    return torch.stack(terms).mean() if terms else None
