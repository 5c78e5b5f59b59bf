"""A pipeline while it learns: what is trained is added to it from outside, and it is given back bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraclr.adapter import DenseLayer, Layer, LoraLayer
from loraclr.conditioning import conditioned, text_states
from loraclr.loading import has_bfloat16, silenced
from loraclr.pipeline import Pipeline
from loraclr.train.attention import watched

_UNET = (".to_q", ".to_k", ".to_v", ".to_out.0")
_TEXT = (".q_proj", ".k_proj", ".v_proj", ".out_proj")
_ADAPTER = "trained"


def unet_attention(pipeline: Pipeline) -> list[str]:
    """Queries, keys, values and outputs of every attention layer of the UNet."""
    return [name for name in pipeline.modules if name.startswith("unet.") and ".attn" in name and name.endswith(_UNET)]


def text_attention(pipeline: Pipeline) -> list[str]:
    """The same of the text encoder, or of both."""
    return [name for name in pipeline.modules if name.startswith("text_encoder") and ".self_attn." in name and name.endswith(_TEXT)]


def keys_and_values(pipeline: Pipeline) -> list[str]:
    """Keys and values of the UNet's cross-attention."""
    return [name for name in pipeline.modules if pipeline.cross_attention_index(name) is not None]


class Learned(nn.Module):
    """A frozen embedding table of which some rows are trained beside it."""

    slot: Tensor

    def __init__(self, table: nn.Embedding, places: Tensor) -> None:
        super().__init__()
        self.table, self.rows = table, nn.Parameter(table.weight.detach()[places].float())
        slot = torch.full((table.num_embeddings,), -1)
        slot[places] = torch.arange(len(places))
        self.register_buffer("slot", slot.to(table.weight.device))

    def forward(self, ids: Tensor) -> Tensor:
        slot = self.slot[ids]
        own = functional.embedding(slot.clamp(min=0), self.rows).to(self.table.weight.dtype)
        return torch.where((slot >= 0)[..., None], own, self.table(ids))


class Student:
    """Inside the context a pipeline whose own weights are frozen; `add_*` put trainable parts beside them.

    `generator` is where all random numbers of a training come from. `groups` are the optimiser's parameter groups.
    """

    def __init__(self, pipeline: Pipeline, *, generator: torch.Generator, bf16: bool = False, watch: bool = False) -> None:
        self.pipeline, self.generator, self.bf16 = pipeline, generator, bf16
        self.device = pipeline.device  # once: diffusers walks all modules at every asking
        self.groups: list[dict[str, Any]] = []
        self.tokens: dict[str, slice] = {}
        self.tokens_frozen = False
        self.maps: list[Tensor] = []  # of the last forward pass, where they are watched
        self.watching = False
        self._watch = watch
        self._learned: Learned | None = None
        self._loras: dict[str, Any] = {}
        self._changes: dict[str, nn.Parameter] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            pipe = self.pipeline.pipe
            for part in (pipe.unet, *_text_encoders(pipe), pipe.vae):
                for parameter in part.parameters():
                    stack.callback(parameter.requires_grad_, parameter.requires_grad)
                    parameter.requires_grad_(False)
                for module in part.modules():
                    stack.callback(setattr, module, "training", module.training)
                part.eval()
            attentions = self.pipeline.cross_attentions
            if self.bf16 and self.device.type == "cpu" and has_bfloat16(self.device):
                _plain_attention(pipe, stack)
            if self._watch:
                stack.enter_context(watched(attentions, self.maps, lambda: self.watching))
            stack.enter_context(conditioned(attentions, latent=(1, 1)))  # the latent's size matters to regions alone
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def add_lora(self, names: Sequence[str], *, rank: int, alpha: float, lr: float, downs: Mapping[str, Tensor] | None = None) -> None:
        """A LoRA on each of these linear layers: downs as nn.Linear starts them, ups 0. Given `downs` (rank, in) are frozen."""
        from peft import LoraConfig, inject_adapter_in_model

        for component in sorted({name.split(".", 1)[0] for name in names}):
            part = getattr(self.pipeline.pipe, component)
            own = [name for name in names if name.startswith(f"{component}.")]
            places = {id(child): (parent, key, path) for path, parent in part.named_modules() for key, child in parent.named_children()}
            found = {name: places[id(self.pipeline.modules[name])] for name in own}
            paths = [f"{path}.{key}" for _, key, path in found.values()]
            self._stack.callback(_delete, part, "peft_config")
            for name, (parent, key, _) in found.items():
                self._stack.callback(setattr, parent, key, self.pipeline.modules[name])
            trained = [parameter for parameter in part.parameters() if parameter.requires_grad]
            with torch.random.fork_rng(devices=[]):  # peft draws from the global generator; what it drew is replaced below
                inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=paths), part, _ADAPTER)
            for parameter in trained:  # peft has frozen all that is not its own, learned tokens too
                parameter.requires_grad_(True)
            for name, (parent, key, _) in found.items():
                self._loras[name] = layer = getattr(parent, key)
                down, up = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]
                start = torch.empty(down.weight.shape)
                nn.init.kaiming_uniform_(start, a=5**0.5, generator=self.generator)
                down.weight = nn.Parameter((start if downs is None else downs[name].float()).to(self.device), downs is None)
                up.weight = nn.Parameter(torch.zeros(up.weight.shape, device=self.device))
        weights = [factor[_ADAPTER].weight for name in names for factor in (self._loras[name].lora_A, self._loras[name].lora_B)]
        self.groups.append({"params": [weight for weight in weights if weight.requires_grad], "lr": lr})

    def add_changes(self, names: Sequence[str], *, lr: float) -> None:
        """A full change of each of these linear layers' weights, 0 at first."""
        for name in names:
            module = self.pipeline.modules[name]
            assert isinstance(module, nn.Linear)
            self._changes[name] = change = nn.Parameter(torch.zeros(module.weight.shape, device=self.device))

            def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, change: Tensor = change) -> Tensor:
                return output + functional.linear(inputs[0], change)

            self._stack.callback(module.register_forward_hook(add).remove)
        self.groups.append({"params": [self._changes[name] for name in names], "lr": lr})

    def add_tokens(self, tokens: Mapping[str, Tensor], *, lr: float) -> None:
        """Learned tokens, (1, dim), or (L, dim) with one row per cross-attention layer, that start at these embeddings."""
        self._stack.enter_context(self.pipeline.with_tokens(tokens))
        vocabulary = self.pipeline.vocabulary
        places, total = [], 0
        for token, rows in tokens.items():
            number = int(vocabulary.tokenizer.convert_tokens_to_ids(token))
            places.append(vocabulary.layer_rows.get(number, torch.tensor([number])))
            self.tokens[token] = slice(total, total := total + len(rows))
        self._learned = Learned(vocabulary.embedding, torch.cat(places))
        self.pipeline.pipe.text_encoder.set_input_embeddings(self._learned)
        self.groups.append({"params": [self._learned.rows], "lr": lr})

    def freeze_tokens(self) -> None:
        """From here on the learned tokens stay as they are."""
        self.tokens_frozen = True
        self.rows.requires_grad_(False)

    @property
    def rows(self) -> nn.Parameter:
        """(n, dim): all rows of all learned tokens."""
        assert self._learned is not None
        return self._learned.rows

    def random_row(self, spread: float | None, *, like: str) -> Tensor:
        """(dim,) normal numbers of that standard deviation; without one, of the embeddings of `like`'s tokens."""
        known = self._table[word_ids(self.pipeline, like)].float()
        return torch.randn(known.shape[1], generator=self.generator) * (float(known.std()) if spread is None else spread)

    def embedding_of(self, word: str) -> Tensor:
        """(dim,), of a word that is one token."""
        (number,) = word_ids(self.pipeline, word)
        return self._table[number].float().cpu()

    @property
    def _table(self) -> Tensor:
        return self.pipeline.vocabulary.embedding.weight.detach()

    def conditions(self, prompts: Sequence[str], *, pad: bool, size: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor] | None]:
        """States as `states` gives them, and what else the UNet is told: of SDXL, which always pads, pooled states and `size` in pixels."""
        if self.pipeline.family != "sdxl":
            return self.states(prompts, pad=pad), None
        with silenced():
            states, _, pooled, _ = self.pipeline.pipe.encode_prompt(list(prompts), device=self.device, do_classifier_free_guidance=False)
        uncropped = torch.tensor([[*size, 0, 0, *size]], dtype=pooled.dtype, device=self.device)  # original size, corner, target size
        return states, {"text_embeds": pooled, "time_ids": uncropped.expand(len(states), -1)}

    def states(self, prompts: Sequence[str], *, pad: bool) -> Tensor:
        """(B, T, dim) or (B, L, T, dim)."""
        return text_states(
            self.pipeline.pipe.text_encoder,
            self.pipeline.vocabulary,
            prompts,
            layers=len(self.pipeline.cross_attention_layers),
            length=self.pipeline.text_length,
            pad=pad,
        )

    def token_places(self, prompts: Sequence[str]) -> Tensor:
        """(B, tokens) positions of the learned tokens in each prompt, -1 where one was cut off."""
        tokenizer = self.pipeline.vocabulary.tokenizer
        own = [int(tokenizer.convert_tokens_to_ids(token)) for token in self.tokens]
        ids = [tokenizer(prompt, truncation=True, max_length=self.pipeline.text_length).input_ids for prompt in prompts]
        return torch.tensor([[row.index(number) if number in row else -1 for number in own] for row in ids])

    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything trained or frozen of what was added, by name."""
        found = {f"{name}.change": change for name, change in self._changes.items()}
        for name, layer in self._loras.items():
            found[f"{name}.down"], found[f"{name}.up"] = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        return found | ({"tokens": self._learned.rows} if self._learned is not None else {})

    def layers(self) -> list[Layer]:
        """What was added, as values."""
        loras = [
            LoraLayer(name, _value(layer.lora_A[_ADAPTER].weight), _value(layer.lora_B[_ADAPTER].weight), float(layer.scaling[_ADAPTER]))
            for name, layer in self._loras.items()
        ]
        return [*loras, *(DenseLayer(name, _value(change)) for name, change in self._changes.items())]

    def embeddings(self) -> dict[str, Tensor]:
        """Learned token -> (1, dim) or (L, dim)."""
        return {token: _value(self.rows[place]) for token, place in self.tokens.items()}


def _text_encoders(pipe: Any) -> list[Any]:
    return [part for name, part in sorted(pipe.components.items()) if name.startswith("text_encoder") and part is not None]


def word_ids(pipeline: Pipeline, word: str) -> list[int]:
    return list(pipeline.vocabulary.tokenizer(word, add_special_tokens=False).input_ids)


def _value(parameter: Tensor) -> Tensor:
    return parameter.detach().float().cpu().clone()


def _delete(part: Any, name: str) -> None:
    if hasattr(part, name):
        delattr(part, name)


def _plain_attention(pipe: Any, stack: ExitStack) -> None:
    """Attention spelled out: torch's fused kernel is several times slower in bfloat16 on a CPU."""
    from diffusers.models.attention_processor import AttnProcessor

    for module in pipe.unet.modules():
        if hasattr(module, "set_processor"):
            stack.callback(module.set_processor, module.processor)
            module.set_processor(AttnProcessor())
    for encoder in _text_encoders(pipe):
        stack.callback(encoder.set_attn_implementation, encoder.config._attn_implementation)
        encoder.set_attn_implementation("eager")
