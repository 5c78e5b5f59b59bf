"""CLIP through transformers: any folder or hub id that `CLIPModel` loads. ViT-B/32 is what the tables of the field use."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from loraclr.errors import UsageError
from loraclr.loading import looks_local, silenced

if TYPE_CHECKING:
    from PIL.Image import Image

_AT_ONCE = 16
_FILES = ("*.json", "*.txt", "model*.safetensors", "pytorch_model.bin")


class ClipJudge:
    """Image and text embeddings of length 1. Pictures go through the model's own processor: bicubic to 224, centre crop."""

    def __init__(self, model: Any, processor: Any, tokenizer: Any, *, name: str = "clip") -> None:
        self.model, self.processor, self.tokenizer, self.name = model.eval().requires_grad_(False), processor, tokenizer, name
        # Some tokenizers state no length of their own, which transformers turns into 10**30.
        self.length = min(int(tokenizer.model_max_length), int(model.config.text_config.max_position_embeddings))

    @staticmethod
    def load(source: str, *, download: bool = False) -> ClipJudge:
        """A folder, or `owner/name` of the hub: from the local cache, and from the network only with `download`.

        Raises UsageError for a folder that holds no CLIP, an id that is not cached, or without transformers.
        """
        try:
            # The class without the suffix needs torchvision, and warns where it falls back to this one.
            from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
        except ImportError as error:
            raise UsageError(f"judge clip:{source} needs transformers ({error}); pip install 'loraclr[diffusion]'") from error
        folder = _folder(source, download=download)
        with silenced():
            try:
                local: dict[str, Any] = {"local_files_only": True}
                judge = ClipJudge(
                    CLIPModel.from_pretrained(folder, dtype=torch.float32, **local),
                    CLIPImageProcessorPil.from_pretrained(folder, **local),
                    CLIPTokenizer.from_pretrained(folder, **local),
                    name=f"clip:{source}",
                )
            except Exception as error:  # the libraries raise a dozen unrelated kinds
                seen = f"{type(error).__name__}: {error}"
                raise UsageError(
                    f"{source} is no CLIP that loads ({seen}); give a folder with config.json, model.safetensors, "
                    "preprocessor_config.json and the tokenizer's files"
                ) from error
        return judge

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image]) -> Tensor:
        """(n, d) unit vectors, on the CPU."""
        parts = []
        for start in range(0, len(images), _AT_ONCE):
            some = [image.convert("RGB") for image in images[start : start + _AT_ONCE]]
            pixels = self.processor(images=some, return_tensors="pt")["pixel_values"]
            parts.append(_rows(self.model.get_image_features(pixel_values=pixels.to(self.model.device))))
        return torch.cat(parts)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(n, d) unit vectors, on the CPU. A text longer than the model reads is cut, with a warning."""
        for text in texts:
            if (count := len(self.tokenizer(text, verbose=False).input_ids)) > self.length:
                warnings.warn(f"{self.name} reads {self.length} tokens of {text[:40]!r}..., which has {count}; shorten it", stacklevel=2)
        words = self.tokenizer(list(texts), padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        place = self.model.device
        return _rows(
            self.model.get_text_features(input_ids=words.input_ids.to(place), attention_mask=words.attention_mask.to(place))
        )  # fmt: skip


def _rows(out: Any) -> Tensor:
    """transformers 5 wraps what transformers 4 returned."""
    features: Tensor = out if isinstance(out, Tensor) else out.pooler_output
    return normalize(features.float(), dim=-1).cpu()


def _folder(source: str, *, download: bool) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(f"{folder} has no config.json; give a folder written by CLIPModel's and its processor's save_pretrained")
        return folder
    if looks_local(source):
        raise UsageError(f"there is no folder {folder}; check the path, or give a hub id as owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, local_files_only=not download, allow_patterns=list(_FILES)))
    except Exception as error:  # offline, unknown, gated: each has its own class
        if download:
            raise UsageError(f"{source} cannot be downloaded ({type(error).__name__}: {error}); check the id and the network") from error
        raise UsageError(f"{source} is not in the local cache; allow fetching it with --download, or give a folder") from error
