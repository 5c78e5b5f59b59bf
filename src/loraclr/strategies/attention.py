"""Where a prompt's words act: cross-attention maps, as saliency and as masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from loraclr.conditioning import map_size
from loraclr.errors import PipelineError

SIDE = 16  # of the maps that are read: those of 16x16 cells know most about layout (arXiv 2208.01626, 2403.19776)


class Watch:
    """What cross-attention layers attended to since the last `take`. Only maps whose shorter side has at most `side` cells are kept."""

    def __init__(self, latent: tuple[int, int], side: int = SIDE) -> None:
        self.latent, self.side = latent, side
        self._seen: dict[tuple[int, int], list[Tensor]] = {}

    def see(self, attn: Any, hidden: Tensor, states: Tensor) -> None:
        size = map_size(self.latent, hidden.shape[1])
        if min(size) > self.side:
            return
        keys = attn.norm_encoder_hidden_states(states) if attn.norm_cross else states
        query, key = attn.head_to_batch_dim(attn.to_q(hidden)), attn.head_to_batch_dim(attn.to_k(keys))
        probabilities = attn.get_attention_scores(query, key)  # (B * heads, cells, T)
        self._seen.setdefault(size, []).append(probabilities.unflatten(0, (len(hidden), -1)).mean(1))

    def forget(self) -> None:
        self._seen = {}

    def take(self) -> Tensor:
        """(B, T, h, w): the mean over heads and over the layers of the finest kept size. Forgets them."""
        if not self._seen:
            raise PipelineError(
                f"no cross-attention map of a {self.latent[0]}x{self.latent[1]} latent has a side of {self.side} cells or less"
            )
        size = max(self._seen)
        seen = torch.stack(self._seen[size]).mean(0)
        self.forget()
        return seen.transpose(1, 2).reshape(len(seen), -1, *size)


class _Watching:
    """The stock processor does the attention; what it attended to is computed once more beside it, with gradients where these are on."""

    def __init__(self, inner: Any, watch: Watch) -> None:
        self.inner, self.watch = inner, watch

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        if encoder_hidden_states is not None:
            self.watch.see(attn, hidden_states, encoder_hidden_states)
        out: Tensor = self.inner(attn, hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask)
        return out


@contextmanager
def watched(attentions: Sequence[Any], watch: Watch) -> Iterator[None]:
    """Let `watch` see what diffusers `Attention` modules attend to; their own processors come back on exit."""
    kept = [attention.processor for attention in attentions]
    try:
        for attention in attentions:
            attention.set_processor(_Watching(attention.processor, watch))
        yield
    finally:
        for attention, processor in zip(attentions, kept, strict=True):
            attention.set_processor(processor)


def saliency(maps: Tensor, spots: Sequence[int]) -> Tensor:
    """(T, h, w) maps -> (h, w): how much each cell attends to the tokens at `spots`, together."""
    return maps[list(spots)].sum(0)


def masks(salient: Tensor, size: tuple[int, int], *, threshold: float, exclusive: bool) -> Tensor:
    """(concepts, h, w) saliency -> (concepts, *size) bool: where a concept reaches `threshold` times its own maximum.

    With `exclusive` a cell belongs to the one concept whose saliency, each as a share of its maximum, is the largest there.
    """
    fine = interpolate(salient[None].float(), size, mode="bilinear")[0]
    share = fine / fine.amax((1, 2), keepdim=True).clamp(min=torch.finfo(fine.dtype).tiny)
    chosen = share > threshold
    if exclusive:
        chosen &= torch.nn.functional.one_hot(share.argmax(0), len(share)).permute(2, 0, 1).bool()
    return chosen
