"""Trains the toybox's adapters, one a concept: `python adapters.py BASE OUT [NAME ...]`, two at a time, finished ones skipped.

Plain LoRAs learn from the trigger word alone (no token is learned); ED-LoRAs learn two layer-wise tokens besides. Captions tell
expression, clothes and place, never the identity. The files are what different trainers leave behind: see `KINDS`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from people import shots
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import embedding, mse_loss
from vae import pixels
from world import Person, identities

from loraclr.conditioning import conditioned


@dataclass(frozen=True)
class Kind:
    """How an adapter is trained and what its file looks like."""

    format: str  # "kohya", "diffusers" or "edlora"
    rank: int = 8
    alpha: float = 8
    text_rank: int = 0  # 0: the text encoder is left alone
    text_alpha: float = 4
    steps: int = 220
    batch: int = 8
    lr: float = 1.2e-3  # at scale 1; divided by alpha / rank
    text_lr: float = 3e-4
    token_lr: float = 5e-3


KINDS = {
    "kohya": Kind("kohya", rank=8, alpha=4),
    "kohya-text": Kind("kohya", rank=4, alpha=4, text_rank=4, text_alpha=2),
    "kohya-mixed": Kind("kohya", rank=8, alpha=8, text_rank=8, text_alpha=1),
    "diffusers": Kind("diffusers", rank=4, alpha=4),
    "diffusers-text": Kind("diffusers", rank=8, alpha=16, text_rank=8, text_alpha=16),
    "edlora": Kind("edlora", rank=4, alpha=4, text_rank=4, text_alpha=4),
}
ORDER = (
    "kohya-text", "edlora", "kohya", "diffusers-text", "kohya-mixed", "edlora", "diffusers", "kohya-text", "edlora", "diffusers-text",
    "kohya-mixed", "edlora",
)  # fmt: skip  # the kinds of the development set in order, and again of the test set
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


class Extended(nn.Module):
    """An embedding table with trainable rows appended."""

    def __init__(self, table: nn.Embedding, rows: Tensor) -> None:
        super().__init__()
        self.table, self.rows = table, nn.Parameter(rows.clone())

    def forward(self, ids: Tensor) -> Tensor:
        return embedding(ids, torch.cat([self.table.weight, self.rows]))


def deltas(module: nn.Module) -> dict[str, Tensor]:
    """path -> factor, keyed `....lora_A.weight` / `....lora_B.weight`."""
    return {key.removeprefix("base_model.model."): value for key, value in get_peft_model_state_dict(module).items()}


def train(base: Path, out: Path, name: str, person: Person, kind: Kind, seed: int) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    pipe = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32, safety_checker=None)
    unet, text, tokenizer = pipe.unet.requires_grad_(False), pipe.text_encoder.requires_grad_(False), pipe.tokenizer
    unet.set_attn_processor(AttnProcessor())
    text.set_attn_implementation("eager")
    shot_list = shots(name, person)
    with torch.no_grad():
        x = torch.stack([pixels(shot.pixels[None])[0] for shot in shot_list])
        latents = pipe.vae.encode(torch.cat([x, x.flip(-1)])).latent_dist.mean * pipe.vae.config.scaling_factor
    inject_adapter_in_model(LoraConfig(r=kind.rank, lora_alpha=kind.alpha, target_modules=UNET_TARGETS), unet)
    groups = [{"params": [p for p in unet.parameters() if p.requires_grad], "lr": kind.lr * kind.rank / kind.alpha}]
    if kind.text_rank:
        inject_adapter_in_model(LoraConfig(r=kind.text_rank, lora_alpha=kind.text_alpha, target_modules=TEXT_TARGETS), text)
        params = [p for p in text.parameters() if p.requires_grad]
        groups.append({"params": params, "lr": kind.text_lr * kind.text_rank / kind.text_alpha})
    attentions = cross_attentions(unet)
    layers = len(attentions)
    call, extended = f"{name} {person.noun}", None
    if kind.format == "edlora":
        call = f"<{name}1> <{name}2>"
        table = text.get_input_embeddings()
        noun = table.weight[tokenizer(person.noun).input_ids[1]]
        spread = float(table.weight[tokenizer("woman man smiling hoodie beach").input_ids[1:-1]].std())
        start = torch.cat([(torch.randn(1, len(noun)) * spread).expand(layers, -1), noun.expand(layers, -1)])
        extended = Extended(table, start)
        text.set_input_embeddings(extended)
        groups.append({"params": [extended.rows], "lr": kind.token_lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    heights = [group["lr"] for group in optimizer.param_groups]
    alphas = pipe.scheduler.alphas_cumprod
    size = len(tokenizer)
    token_ids = {f"<{name}{k + 1}>": [size + k * layers + layer for layer in range(layers)] for k in range(2)}
    tokenizer.add_tokens(list(token_ids) if extended else [])
    began, running = time.monotonic(), 0.0
    with conditioned(attentions, latent=(16, 16)):
        for step in range(kind.steps):
            progress = step / kind.steps
            for group, height in zip(optimizer.param_groups, heights, strict=True):
                group["lr"] = height * min(1, (step + 1) / 20) * min(1.0, 2 * (1 - progress))
            rows = [rng.randrange(len(latents)) for _ in range(kind.batch)]
            words = [shot_list[row % len(shot_list)].caption(call, rng) for row in rows]
            clean = latents[rows]
            t = torch.randint(0, 1000, (len(rows),))
            noise = torch.randn_like(clean)
            a = alphas[t].view(-1, 1, 1, 1)
            noisy, target = a.sqrt() * clean + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * clean
            padding = "max_length" if rng.random() < 0.5 else "longest"
            ids = tokenizer(words, padding=padding, truncation=True, return_tensors="pt").input_ids
            with torch.autocast("cpu", torch.bfloat16):
                if extended:
                    ids = layerwise(ids, size, token_ids)
                    states = text(ids.flatten(0, 1)).last_hidden_state.view(*ids.shape, -1)
                else:
                    states = text(ids).last_hidden_state
                v = unet(noisy, t, states).sample
            loss = mse_loss(v.float(), target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            running += 0.02 * (float(loss.detach()) - running) if step else float(loss.detach())
    parts = {"unet": deltas(unet), "text_encoder": deltas(text) if kind.text_rank else {}}
    tokens = {}
    if extended:
        tokens = {token: extended.rows.detach()[k * layers : (k + 1) * layers].clone() for k, token in enumerate(token_ids)}
    write(out, name, call, kind, parts, tokens)
    return {"seconds": round(time.monotonic() - began, 1), "loss": round(running, 4)}


def cross_attentions(unet: nn.Module) -> list[nn.Module]:
    """In the order down, mid, up."""
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    found = [(path, module) for path, module in unet.named_modules() if path.endswith(".attn2")]
    return [module for _, module in sorted(found, key=lambda item: order[item[0].split(".")[0]])]


def layerwise(ids: Tensor, size: int, token_ids: dict[str, list[int]]) -> Tensor:
    """(B, T) ids where size + k stands for learned token k -> (B, L, T) with the layer's own row."""
    rows = torch.tensor(list(token_ids.values()))  # (tokens, L)
    out = ids[:, None].expand(-1, rows.shape[1], -1).clone()
    for k, own in enumerate(rows):
        out = torch.where(ids[:, None] == size + k, own[None, :, None], out)
    return out


def write(out: Path, name: str, call: str, kind: Kind, parts: dict[str, dict[str, Tensor]], tokens: dict[str, Tensor]) -> None:
    """One file as that trainer would leave it, fp16."""
    tensors: dict[str, Tensor] = {}
    if kind.format == "kohya":
        for component, prefix, alpha in (("unet", "lora_unet_", kind.alpha), ("text_encoder", "lora_te_text_model_", kind.text_alpha)):
            for key, value in parts[component].items():
                path, factor = key.rsplit(".lora_", 1)
                module = prefix + path.replace(".", "_")
                tensors[f"{module}.lora_{'down' if factor[0] == 'A' else 'up'}.weight"] = value.half().contiguous()
                tensors[f"{module}.alpha"] = torch.tensor(float(alpha))
        metadata = {
            "ss_network_module": "networks.lora", "ss_network_dim": str(kind.rank), "ss_network_alpha": str(kind.alpha),
            "ss_base_model_version": "sd_v1", "ss_output_name": name, "modelspec.trigger_phrase": call,
            "modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.sai_model_spec": "1.0.0", "modelspec.title": name,
        }  # fmt: skip
        save_file(tensors, out / f"{name}.safetensors", metadata=metadata)
    elif kind.format == "diffusers":
        config = {}
        for component, rank, alpha in (("unet", kind.rank, kind.alpha), ("text_encoder", kind.text_rank, kind.text_alpha)):
            tensors |= {f"{component}.{key}": value.half().contiguous() for key, value in parts[component].items()}
            if parts[component]:
                targets = UNET_TARGETS if component == "unet" else TEXT_TARGETS
                config |= {f"{component}.r": rank, f"{component}.lora_alpha": alpha, f"{component}.target_modules": targets}
        metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config, sort_keys=True), "modelspec.trigger_phrase": call}
        save_file(tensors, out / f"{name}.safetensors", metadata=metadata)
    else:
        renamed = {
            component: {
                ("text_model." if component == "text_encoder" else "")
                + key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): value.half()
                for key, value in part.items()
            }
            for component, part in parts.items()
        }
        torch.save({"params": {"new_concept_embedding": {k: v.half() for k, v in tokens.items()}, **renamed}}, out / f"{name}.pth")


def _job(arguments: tuple[Path, Path, str, Person, str, int]) -> tuple[str, str, dict[str, float]]:
    base, out, name, person, kind, seed = arguments
    return name, kind, train(base, out, name, person, KINDS[kind], seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    jobs = []
    for index, (name, person) in enumerate(identities().items()):
        folder = arguments.out / ("development" if index < 12 else "test")
        folder.mkdir(parents=True, exist_ok=True)
        if (arguments.names and name not in arguments.names) or list(folder.glob(f"{name}.*")):
            continue
        jobs.append((arguments.base, folder, name, person, ORDER[index % 12], index))
    with ProcessPoolExecutor(arguments.workers) as pool:
        for name, kind, report in pool.map(_job, jobs):
            print(name, kind, json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
