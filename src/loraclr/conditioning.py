"""Prompts that differ by layer or by place: learned tokens, layer-wise states (P+, ED-LoRA) and region control.

Axes: `B` pictures, `L` cross-attention layers in the order down, mid, up, `T` text tokens, `dim` the text encoder's width,
`cells` positions of a feature map, row by row. Layer-wise prompts are P+ (arXiv 2303.09522), used by ED-LoRA
(arXiv 2305.18292); region control is the regionally controllable sampling of the same paper.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loraclr.errors import PipelineError, UsageError

Box = tuple[float, float, float, float]
# (latents, time, what the scheduler makes of latents as the UNet's input) -> latents
Refine = Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]

_EDGE = 1e-6  # 0.7 * 10 is 7.000000000000001: without slack such a box would lose a row of cells


@dataclass(frozen=True)
class Region:
    """A part of the picture with its own prompt. `box` is (y1, x1, y2, x2) in fractions of height and width.

    The unconditional half of guidance uses this region's `negative` inside the box, not the picture's.
    """

    prompt: str
    box: Box
    negative: str = ""

    def __post_init__(self) -> None:
        y1, x1, y2, x2 = self.box
        if not self.prompt.strip():
            raise UsageError(f"region {self.box} has no prompt; say what is to be seen there")
        if not all(math.isfinite(edge) and 0 <= edge <= 1 for edge in self.box):
            raise UsageError(f"region {self.prompt!r}: box {self.box} is not inside the picture; fractions y1,x1,y2,x2 go from 0 to 1")
        if y1 >= y2 or x1 >= x2:
            raise UsageError(f"region {self.prompt!r}: box {self.box} is reversed or empty; give y1,x1,y2,x2 with y1 < y2 and x1 < x2")


@dataclass(frozen=True, eq=False)
class RegionStates:
    """An encoded region. `states` is (halves, T, dim) or (halves, L, T, dim); with guidance the halves are negative, positive."""

    states: Tensor
    box: Box

    def cells(self, height: int, width: int) -> Tensor:
        return box_cells(self.box, height, width)


def box_cells(box: Box, height: int, width: int) -> Tensor:
    """(n,) flat indices of the cells that lie wholly inside the box on a map of `height` x `width`; none if it is too coarse."""
    y1, x1, y2, x2 = box
    rows, columns = _within(y1, y2, height), _within(x1, x2, width)
    return (rows[:, None] * width + columns).flatten()


def _within(first: float, last: float, cells: int) -> Tensor:
    start, stop = math.ceil(first * cells - _EDGE), math.floor(last * cells + _EDGE)
    return torch.arange(start, max(start, stop))


def map_size(latent: tuple[int, int], cells: int) -> tuple[int, int]:
    """Height and width of the feature map with that many cells, reached from `latent` by halving.

    A square-root rule fails for odd and non-square sizes; the halvings that a UNet really does (rounding up, or down with
    unpadded downsampling) do not. Raises PipelineError when no halving gives `cells`.
    """
    for carry in (1, 0):
        height, width = latent
        while height * width > cells and height * width > 1:
            height, width = max((height + carry) // 2, 1), max((width + carry) // 2, 1)
        if height * width == cells:
            return height, width
    raise PipelineError(
        f"a feature map of {cells} cells is no halving of the {latent[0]}x{latent[1]} latent; "
        "region control cannot place its boxes here: use a picture size whose sides the UNet's downsampling divides"
    )


class ConditionedAttention:
    """Attention processor around the stock one: picks its layer's states, and replaces the output inside regions.

    The stock processor does every attention, so masks, upcasting and fused kernels stay what they were. Its output
    projection is affine and the regions' weights on a cell sum to one, hence averaging projected outputs over overlapping
    regions equals averaging heads before the projection.
    """

    def __init__(self, inner: Any, *, layer: int, latent: tuple[int, int], regions: Sequence[RegionStates] = ()) -> None:
        self.inner, self.layer, self.latent, self.regions = inner, layer, latent, tuple(regions)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,  # (B * halves, cells, channels)
        encoder_hidden_states: Tensor | None = None,  # (B * halves, T, dim) or (B * halves, L, T, dim)
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if encoder_hidden_states is None:
            raise PipelineError("a cross-attention layer was called without a prompt; pass encoder_hidden_states to the UNet")
        context = self._own(encoder_hidden_states)
        out: Tensor = self.inner(attn, hidden_states, encoder_hidden_states=context, attention_mask=attention_mask)
        if not self.regions:
            return out
        height, width = map_size(self.latent, hidden_states.shape[1])
        total, count = torch.zeros_like(out), out.new_zeros(hidden_states.shape[1])
        for region in self.regions:
            cells = region.cells(height, width).to(out.device)
            if cells.numel() == 0:
                continue
            states = self._own(region.states).to(context)
            states = states.repeat_interleave(hidden_states.shape[0] // states.shape[0], dim=0)
            # The mask describes the context's tokens, not the region's.
            total[:, cells] += self.inner(attn, hidden_states[:, cells], encoder_hidden_states=states, attention_mask=None)
            count[cells] += 1
        return torch.where((count > 0)[:, None], total / count.clamp(min=1)[:, None], out)

    def _own(self, states: Tensor) -> Tensor:
        return states[:, self.layer] if states.ndim == 4 else states


@contextmanager
def conditioned(attentions: Sequence[Any], *, latent: tuple[int, int], regions: Sequence[RegionStates] = ()) -> Iterator[None]:
    """Let diffusers `Attention` modules (in layer order) take 4-D states and regions; their own processors come back on exit.

    `latent` is the height and width of the latent that the UNet is given inside the context. Raises PipelineError for regions without
    any such module.
    """
    if regions and not attentions:
        raise PipelineError("this UNet has no cross-attention modules called attn2, where regions act; use another base model")
    kept = [attention.processor for attention in attentions]
    try:
        for layer, attention in enumerate(attentions):
            attention.set_processor(ConditionedAttention(attention.processor, layer=layer, latent=latent, regions=regions))
        yield
    finally:
        for attention, processor in zip(attentions, kept, strict=True):
            attention.set_processor(processor)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A tokenizer with its embedding table. `layer_rows` maps a layer-wise token's id to its (L,) rows in the table."""

    tokenizer: Any
    embedding: nn.Embedding
    layer_rows: Mapping[int, Tensor]

    def extended(self, tokens: Mapping[str, Tensor], *, layers: int) -> Vocabulary:
        """A copy that knows `tokens`: embeddings (1, dim), or (`layers`, dim) for one per cross-attention layer.

        Upper and lower case are one, as everywhere in CLIP's text. Raises UsageError for a token that exists already or has
        another number of rows, PipelineError for another width. All mistakes are in one message.
        """
        wrong = [problem for token, rows in tokens.items() if (problem := self._misfit(token, rows, layers))]
        if any("width" in problem for problem in wrong):
            raise PipelineError("; ".join(wrong) + "; use tokens trained for this base model")
        if wrong:
            raise UsageError("; ".join(wrong) + "; rename the token, or use a base model with matching layers")

        tokenizer = copy.deepcopy(self.tokenizer)
        ids = {token: _add(tokenizer, token) for token in tokens}
        clashing = [token for token, number in ids.items() if _ids(tokenizer, token) != [number]]
        if clashing:
            raise UsageError(
                f"the tokens {', '.join(map(repr, clashing))} cannot be told from others; give tokens that differ in more than case"
            )

        with torch.inference_mode(False), torch.no_grad():
            embedding, layer_rows = self._table(tokens, ids)
        return Vocabulary(tokenizer, embedding, layer_rows)

    def _table(self, tokens: Mapping[str, Tensor], ids: Mapping[str, int]) -> tuple[nn.Embedding, Mapping[int, Tensor]]:
        """Every token's first embedding at its id; the rest of a layer-wise token's behind all ids."""
        weight = self.embedding.weight
        rows = max(weight.shape[0], 1 + max(ids.values(), default=0))
        table = [weight.detach().clone(), weight.new_zeros(rows - weight.shape[0], weight.shape[1])]
        layer_rows = dict(self.layer_rows)
        for token, embeddings in tokens.items():
            if embeddings.shape[0] > 1:
                layer_rows[ids[token]] = torch.arange(rows, rows + embeddings.shape[0])
                table.append(embeddings.detach().to(weight))
                rows += embeddings.shape[0]
        full = torch.cat(table)
        for token, embeddings in tokens.items():
            full[ids[token]] = embeddings[0].detach().to(weight)
        embedding = nn.Embedding(full.shape[0], full.shape[1], padding_idx=self.embedding.padding_idx, _weight=full).train(
            self.embedding.training
        )
        return embedding.requires_grad_(weight.requires_grad), layer_rows

    def bind(self, ids: Tensor, *, layers: int) -> Tensor:
        """(T,) ids to (L, T) table rows, one per layer, if a layer-wise token is among them; else (1, T), the ids."""
        present = [number for number in self.layer_rows if bool((ids == number).any())]
        if not present:
            return ids[None]
        bound = ids.repeat(layers, 1)
        for number in present:
            bound = torch.where(bound == number, self.layer_rows[number][:, None].to(ids), bound)
        return bound

    def _misfit(self, token: str, rows: Tensor, layers: int) -> str | None:
        if not token.strip():
            return "a learned token is empty"
        if len(_ids(self.tokenizer, token)) == 1:
            return f"the token {token!r} is a word the tokenizer already has"
        if rows.ndim != 2 or rows.shape[1] != self.embedding.embedding_dim:
            return f"the token {token!r} has embeddings {tuple(rows.shape)}; the text encoder's width is {self.embedding.embedding_dim}"
        if rows.shape[0] not in (1, layers):
            return f"the token {token!r} has {rows.shape[0]} layer-wise embeddings, but the UNet has {layers} cross-attention layers"
        return None


def by_encoder(tokens: Mapping[str, Tensor], widths: Mapping[str, int]) -> dict[str, dict[str, Tensor]]:
    """What each text encoder reads of learned tokens: by their widths, of one that all know the rows of all, one after the other.

    Raises UsageError where several text encoders would have an embedding per layer, PipelineError for embeddings of another width.
    """
    if len(widths) == 1:
        return {name: dict(tokens) for name in widths}
    if layered := [token for token, rows in tokens.items() if len(rows) > 1]:
        said = f"the tokens {', '.join(layered)} have an embedding per layer, which one text encoder can give and not {len(widths)}"
        raise UsageError(f"{said}; use tokens trained for this base model")
    found: dict[str, dict[str, Tensor]] = {name: {} for name in widths}
    for token, rows in tokens.items():
        one = [name for name, width in widths.items() if width == rows.shape[1]][:1]
        own = list(widths) if rows.shape[1] == sum(widths.values()) else one
        if not own:
            told = f"the token {token!r} has embeddings {tuple(rows.shape)}; the text encoders' widths are {list(widths.values())}"
            raise PipelineError(f"{told}, or all together; use tokens trained for this base model")
        for name, part in zip(own, torch.split(rows, [widths[name] for name in own], dim=1), strict=True):
            found[name][token] = part
    return {name: mine for name, mine in found.items() if mine}


@contextmanager
def knowing(
    pipe: Any, component: str, tokens: Mapping[str, Tensor], *, layers: int, layer_rows: Mapping[int, Tensor]
) -> Iterator[Mapping[int, Tensor]]:
    """Inside, one text encoder of `pipe` and its tokenizer know `tokens`; gives the layer rows of these and of `layer_rows`.

    Both are swapped for extended copies, and the very same objects come back on exit. Raises as `Vocabulary.extended`.
    """
    place = component.replace("text_encoder", "tokenizer")
    encoder, tokenizer = getattr(pipe, component), getattr(pipe, place)
    embedding = encoder.get_input_embeddings()
    if embedding.weight.is_meta:
        raise PipelineError("learned tokens need the text encoder in memory; offload whole components (--offload), not layer by layer")
    extended = Vocabulary(tokenizer, embedding, layer_rows).extended(tokens, layers=layers)
    # A 2 in old configurations means the token of the highest number, which is the end mark as long as there are no others behind it.
    pooling = [module for module in encoder.modules() if getattr(module, "eos_token_id", None) == 2]
    try:
        setattr(pipe, place, extended.tokenizer)
        encoder.set_input_embeddings(extended.embedding)
        for module in pooling:
            module.eos_token_id = tokenizer.eos_token_id
        yield extended.layer_rows
    finally:
        for module in pooling:
            module.eos_token_id = 2
        encoder.set_input_embeddings(embedding)
        setattr(pipe, place, tokenizer)


def text_states(
    encoder: Any, vocabulary: Vocabulary, prompts: Sequence[str], *, layers: int, length: int, pad: bool = True, layered: bool = False
) -> Tensor:
    """(B, T, dim) states, or (B, L, T, dim) when some prompt holds a layer-wise token (the others are repeated along L).

    Differentiable. `pad` fills up to `length` tokens, otherwise to the longest prompt; what is longer is cut. `layered` encodes every
    prompt L times.
    """
    padding = "max_length" if pad else "longest"
    text = vocabulary.tokenizer(list(prompts), truncation=True, return_tensors="pt", padding=padding, max_length=length)
    bound = [vocabulary.bind(ids, layers=layers) for ids in text.input_ids]
    if layered:
        bound = [ids.expand(layers, -1) for ids in bound]
    device = torch.device("cpu") if encoder.device.type == "meta" else encoder.device  # offloaded layer by layer: accelerate moves inputs
    mask = None
    if getattr(encoder.config, "use_attention_mask", False):
        mask = torch.cat([row.expand(len(ids), -1) for row, ids in zip(text.attention_mask, bound, strict=True)]).to(device)
    states: Tensor = encoder(torch.cat(bound).to(device), attention_mask=mask).last_hidden_state
    parts = torch.split_with_sizes(states, [len(ids) for ids in bound])
    if any(len(part) > 1 for part in parts):
        states = torch.stack([part.expand(layers, -1, -1) for part in parts])
    return states


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _add(tokenizer: Any, token: str) -> int:
    from transformers import AddedToken

    # normalized: CLIP lower-cases prompts, so the token must be looked for in, and as, lower-cased text.
    whole_word = token[0].isalnum() and token[-1].isalnum()
    tokenizer.add_tokens([AddedToken(token, normalized=True, single_word=whole_word)])
    return int(tokenizer.convert_tokens_to_ids(token))
