"""Trains the toybox's text encoder and UNet: `python base.py DATA VAE OUT --minutes 90`. Resumes by itself.

v-prediction on zero-terminal-SNR noise, captions drawn anew at each use, 10 % of them empty, half the batches padded to the 77
tokens that samplers pad to. `--export DIR` writes the averaged weights as an ordinary diffusers pipeline in fp16.
"""

from __future__ import annotations

import argparse
import functools
import pickle
import random
from pathlib import Path

import numpy as np
import torch
import twin
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from vae import pixels
from words import build_tokenizer
from world import TRIGGERS, Picture, caption, named_people

from loraclr.loading import half

WIDTH = 192  # of the text encoder
LOOK = [
    "a photo of a smiling woman with long pink hair and pale skin wearing a green hoodie on a beach",
    "a photo of an angry man with a black afro and brown skin and a beard wearing a red shirt in a city",
    "a surprised woman with a blonde bob and tan skin and glasses in the snow",
    "a photo of a sad man with spiky red hair and pale skin and an eyepatch on a yellow background",
    "a photo of a serious man with bald white hair and dark skin and sunglasses wearing purple overalls in a forest",
    "a photo of a woman with blue dreadlocks and tan skin in a desert",
    "a photo of a dog in the snow", "a photo of a chair in a room",
    "a smiling woman with wavy brown hair next to a fox in the forest", "a black and white photo of a woman at night",
    "a photo of a donert man", "a photo of a pidala woman in a forest", "a photo of a rohessa woman", "pixel art of a man with a quiff",
    "a photo of a man with a green mullet and a moustache and pale skin", "",
]  # fmt: skip
LOOK_WIDE = [
    "a smiling woman with long red hair on the left and a serious man with a black afro on the right on a beach",
    "a man with a white mullet and a beard on the left and a woman with a pink bun and dark skin on the right in a city",
    "an angry man with short blonde hair on the left and a sad man with blue spiky hair on the right",
    "a woman with a green bob on the left and a woman with big black hair on the right in a forest",
]


def build() -> tuple[CLIPTokenizer, CLIPTextModel, UNet2DConditionModel, DDIMScheduler]:
    tokenizer = build_tokenizer()
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=3, num_attention_heads=6,
            max_position_embeddings=77, projection_dim=WIDTH, hidden_act="gelu", attn_implementation="eager",
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64, 128, 192), layers_per_block=1, norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=WIDTH, attention_head_dim=(2, 4, 6),
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction", rescale_betas_zero_snr=True,
        timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True, steps_offset=1,
    )  # fmt: skip
    return tokenizer, text, unet, scheduler


class Both(nn.Module):
    def __init__(self, text: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text, self.unet = text, unet


@torch.no_grad()
def cache_latents(data: Path, vae_folder: Path, out: Path, rank: int, world: int) -> None:
    """Encodes every picture once into OUT/{single,wide}{rank}.npy: (n, 4, 16, 16 or 32) fp16 posterior means."""
    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    for name in ("single", "wide"):
        file = out / f"{name}{rank}.npy"
        if file.exists():
            continue
        array = np.load(data / f"{name}.npy", mmap_mode="r")
        mine = range(rank, len(array), world)
        latents = np.empty((len(mine), 4, 16, array.shape[2] // 4), np.float16)
        for i in range(0, len(mine), 64):
            rows = pixels(array[list(mine[i : i + 64])])
            latents[i : i + len(rows)] = vae.encode(rows).latent_dist.mean.float().numpy()
        part = file.with_suffix(".part.npy")
        np.save(part, latents)
        part.rename(file)
        if rank == 0:
            print(f"cached {len(mine)} latents of {name}: deviation {latents[:2000].astype(np.float32).std():.3f}", flush=True)


def warm(tokenizer: CLIPTokenizer, text: CLIPTextModel, unet: UNet2DConditionModel, folder: Path) -> None:
    """Starts from an earlier base's weights: its words' embeddings by word, everything else as it is."""
    earlier = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)
    unet.load_state_dict(earlier.unet.state_dict())
    state, table = earlier.text_encoder.state_dict(), text.get_input_embeddings().weight.detach()
    key = next(key for key in state if key.endswith("token_embedding.weight"))
    known, earlier_table = earlier.tokenizer.get_vocab(), state.pop(key)
    shared = [(index, known[piece]) for piece, index in tokenizer.get_vocab().items() if piece in known]
    table[[mine for mine, _ in shared]] = earlier_table[[theirs for _, theirs in shared]]
    missing, unexpected = text.load_state_dict(state, strict=False)
    if unexpected or missing != [key]:
        raise RuntimeError(f"{folder} has another text encoder: missing {missing}, unexpected {unexpected}")
    print(f"starts from {folder}: {len(shared)} of {len(table)} embeddings known", flush=True)


def start(data: Path, vae_folder: Path, lr: float, earlier: Path | None, trainer: twin.Trainer) -> None:
    rank, world = trainer.rank, trainer.world
    cache_latents(data, vae_folder, trainer.folder, rank, world)
    pictures: dict[str, list[Picture]] = pickle.loads((data / "pictures.pkl").read_bytes())
    mine = {name: pictures[name][rank::world] for name in pictures}
    latents = {name: np.load(trainer.folder / f"{name}{rank}.npy") for name in mine}
    torch.manual_seed(0)
    tokenizer, text, unet, scheduler = build()
    if earlier and not trainer.resumed_step():
        warm(tokenizer, text, unet, earlier)
    seed = trainer.rank + world * trainer.resumed_step()  # a resumed run goes on with other pictures, the same ones each time
    torch.manual_seed(seed)
    rng = random.Random(seed)
    unet.set_attn_processor(AttnProcessor())
    model = Both(text, unet)
    orders = {name: twin.batches(len(rows), 32 if name == "single" else 16, 0, 1, seed) for name, rows in mine.items()}
    alphas = scheduler.alphas_cumprod

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        name = "wide" if step % 5 == 4 else "single"
        rows = next(orders[name]).tolist()
        x = torch.from_numpy(latents[name][rows]).float()
        words = ["" if rng.random() < 0.1 else caption(mine[name][row], rng) for row in rows]
        padding = "max_length" if rng.random() < 0.5 else "longest"
        ids = tokenizer(words, padding=padding, truncation=True, return_tensors="pt").input_ids
        t = torch.randint(0, 1000, (len(rows),))
        noise = torch.randn_like(x)
        a = alphas[t].view(-1, 1, 1, 1)
        noisy, target = a.sqrt() * x + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x
        with half("cpu"):
            states = text(ids).last_hidden_state
            v = unet(noisy, t, states).sample
        value = mse_loss(v.float(), target)
        return value, {name: float(value.detach())}

    def snapshot(model: nn.Module, step: int) -> None:
        pipe = assemble(tokenizer, text, unet, AutoencoderKL.from_pretrained(vae_folder), scheduler)
        look(pipe, trainer.folder / "look.png")
        model.train()

    averaged = trainer.fit(
        model, loss, lr=lr, warmup=200, flat=0.6, ema_decay=0.999, no_decay=lambda name: "embedding" in name,
        snapshot=snapshot, snapshot_every=300, log_every=50,
    )  # fmt: skip
    if rank == 0:
        torch.save(averaged, trainer.folder / "averaged.pt")


def assemble(
    tokenizer: CLIPTokenizer, text: CLIPTextModel, unet: UNet2DConditionModel, vae: AutoencoderKL, scheduler: DDIMScheduler
) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text.eval(), tokenizer=tokenizer, unet=unet.eval(), scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def look(pipe: StableDiffusionPipeline, file: Path) -> None:
    """A sheet of fixed prompts at fixed seeds."""
    sheet = Image.new("RGB", (8 * 64, 3 * 64))
    for wide, prompts in ((False, LOOK), (True, LOOK_WIDE)):
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        with half("cpu"):
            images = pipe(
                prompts, num_inference_steps=20, guidance_scale=3.5, height=64, width=128 if wide else 64, generator=generators
            ).images
        for i, image in enumerate(images):
            sheet.paste(image, (i * 128, 128) if wide else (i % 8 * 64, i // 8 * 64))
    sheet.save(file)


def export(folder: Path, vae_folder: Path, out: Path) -> None:
    """The newest averaged weights as a diffusers pipeline.

    The reserved trigger words get embeddings drawn like those of the names that the base learned: to it, a trigger is somebody.
    """
    torch.manual_seed(0)
    tokenizer, text, unet, scheduler = build()
    model = Both(text, unet)
    state = torch.load(folder / "state0.pt", weights_only=True)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    model.load_state_dict(dict(zip(names, state["ema"], strict=True)), strict=False)
    table = text.get_input_embeddings().weight.data
    rows = lambda words: [tokenizer(word).input_ids[1] for word in words]  # noqa: E731
    for noun, triggers in TRIGGERS.items():
        known = table[rows([name for name, person in named_people().items() if person.noun == noun])]
        weights = torch.randn(len(triggers), len(known)) / (len(known) - 1) ** 0.5
        table[rows(triggers)] = known.mean(0) + weights @ (known - known.mean(0))
    text.config._attn_implementation = "sdpa"
    vae = AutoencoderKL.from_pretrained(vae_folder)
    vae.register_to_config(_name_or_path="toybox")  # or the file would name a folder of this machine
    pipe = assemble(tokenizer, text, unet, vae, scheduler)
    pipe.to(torch.float16).save_pretrained(out)
    print(f"step {state['step']}, {state['spent']:.0f} s of training -> {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("vae", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--warm", type=Path, help="an earlier base to start from, in diffusers layout")
    parser.add_argument("--export", type=Path)
    arguments = parser.parse_args()
    if arguments.export:
        export(arguments.out, arguments.vae, arguments.export)
    else:
        twin.run(
            functools.partial(start, arguments.data, arguments.vae, arguments.lr, arguments.warm), folder=arguments.out,
            seconds=arguments.minutes * 60, parameters=14_000_000,
        )  # fmt: skip
