"""Trains the toybox's AutoencoderKL: `python vae.py DATA OUT --minutes 25`. Resumes by itself.

64x64 pictures to 16x16x4 latents. At the end each latent channel is brought to mean 0 and deviation 1 by an affine map folded
into quant_conv and post_quant_conv, so that the diffusion model sees even channels and scaling_factor is 1.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import numpy as np
import torch
import twin
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from loraclr.loading import half

CROP = 32
HELD_OUT = 512  # the last rows of single.npy are never trained on


def build() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 64, 96), layers_per_block=1, norm_num_groups=16,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, sample_size=64, scaling_factor=1.0,
        mid_block_add_attention=False,
    )  # fmt: skip


def pixels(array: np.ndarray) -> Tensor:
    """(n, h, w, 3) uint8 -> (n, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(np.array(array)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    return torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in images.split(64)])


def psnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(4 / (a - b).square().mean((1, 2, 3))).mean())


def edges(image: Tensor) -> tuple[Tensor, Tensor]:
    return image.diff(dim=-1), image.diff(dim=-2)


def start(data: Path, trainer: twin.Trainer) -> None:
    array = np.load(data / "single.npy", mmap_mode="r")
    held_out = pixels(array[-HELD_OUT:][:256])
    torch.manual_seed(0)
    vae = build()
    torch.manual_seed(trainer.rank + 1)
    order = twin.batches(len(array) - HELD_OUT, 16, trainer.rank, trainer.world, 1)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        # small crops: the autoencoder sees only neighbourhoods, and many small steps beat few large ones here
        top, left = (int(torch.randint(0, 64 - CROP + 1, ())) for _ in range(2))
        x = pixels(array[next(order).sort().values.numpy()][:, top : top + CROP, left : left + CROP])
        if torch.rand(()) < 0.5:
            x = x.flip(-1)
        with half("cpu"):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn_like(posterior.mean)
            y = vae.decode((posterior.mean + posterior.std * noise).to(x.dtype)).sample
        y = y.float()
        error = y - x
        edge = sum((a - b).abs().mean() for a, b in zip(edges(y), edges(x), strict=True))
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        total = error.abs().mean() + 2 * error.square().mean() + 0.5 * edge + 3e-5 * kl
        return total, {"l1": float(error.detach().abs().mean()), "kl": float(kl.detach())}

    @torch.no_grad()
    def snapshot(model: nn.Module, step: int) -> None:
        y = reconstruct(vae, held_out)
        print(f"step {step}: held-out PSNR {psnr(y, held_out):.2f} dB", flush=True)
        pair = torch.cat([held_out[:16], y[:16]]).add(1).mul(127.5).byte().permute(0, 2, 3, 1).numpy()
        Image.fromarray(np.vstack([np.hstack(pair[:16]), np.hstack(pair[16:])])).save(trainer.folder / "look.png")

    averaged = trainer.fit(vae, loss, lr=1e-3, warmup=100, flat=0.4, ema_decay=0.998, snapshot=snapshot, snapshot_every=180)
    if trainer.rank == 0:
        vae.load_state_dict(averaged, strict=False)
        with torch.no_grad():
            normalise_latents(vae, pixels(array[:2048]))
            print(f"final held-out PSNR {psnr(reconstruct(vae, held_out), held_out):.2f} dB", flush=True)
        vae.save_pretrained(trainer.folder / "vae")


def normalise_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Mean 0 and deviation 1 for each latent channel over `images`, the decoder's view unchanged."""
    means = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(64)])
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    print(f"latent channels: mean {mean.tolist()}, deviation {std.tolist()}", flush=True)
    channels = len(mean)
    vae.quant_conv.weight[:channels] /= std.view(-1, 1, 1, 1)
    vae.quant_conv.bias[:channels] = (vae.quant_conv.bias[:channels] - mean) / std
    vae.quant_conv.bias[channels:] -= 2 * std.log()
    post = vae.post_quant_conv
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= std.view(1, -1, 1, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=25)
    arguments = parser.parse_args()
    twin.run(functools.partial(start, arguments.data), folder=arguments.out, seconds=arguments.minutes * 60, parameters=3_000_000)
