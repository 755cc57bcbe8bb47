"""Train the small VAE that comes with the package: python tools/train_digits_vae.py drift_accel/models/digits_vae --replace

A diffusers AutoencoderKL from 3x64x64 pictures of coloured digits to 4x16x16 latents, a few minutes on one processor core.
Every step colours its digits anew. OUT gets config.json (with the scaling factor and shift that give the training latents
mean 0 and standard deviation 1), the weights in float32 safetensors, provenance.json, and COMPLETE.json with the hashes. The
same seed, thread count and library versions give the same weights.
"""

import argparse
import io
import math
import platform
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from drift_accel.data.digit_images import IMAGE_SIZE, coloured_digits, draw_colours, stroke_cover, to_pixels
from drift_accel.data.digits import load_digits
from drift_accel.foundation.progress import Progress
from drift_accel.foundation.provenance import package_versions
from drift_accel.foundation.random_streams import normal_draws, random_stream
from drift_accel.foundation.storage import atomic_write_bytes, atomic_write_json, committed_folder
from drift_accel.models.initialization import draw
from drift_accel.sampling.grid import class_grid_array

LATENT_CHANNELS, DOWNSAMPLING = 4, 4
ARCHITECTURE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (16, 32, 48),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": LATENT_CHANNELS,
    "sample_size": IMAGE_SIZE,
}
STEPS, BATCH_SIZE = 1000, 16
LEARNING_RATE, WARM_UP_STEPS, LAST_RATE = 3e-3, 50, 0.01  # linear warm-up, then cosine to LAST_RATE times the rate
WEIGHT_DECAY, LARGEST_GRADIENT = 1e-4, 1.0
# Weight of the KL divergence, a mean over latent values, beside the mean squared error of the pixels in [-1, 1]: enough to
# keep the latents' scale and to let the decoder bear noise, little enough that reconstructions stay sharp.
KL_WEIGHT = 1e-3
FIRST_LOG_VARIANCE = -5.0
CHUNK = 50  # pictures that are encoded or decoded at once outside of training
NUM_PAIRS = 10  # pairs in a row of the picture, one a class


def main() -> None:
    """Parse, train, measure, save."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    vae = train(arguments.steps, arguments.batch_size, arguments.seed)
    moments = scale_latents(vae, arguments.seed)
    results = {**moments, **measure(vae, arguments.seed)}
    save(vae, arguments, {**results, "cpu_seconds": round(time.process_time())})
    if arguments.picture is not None:
        save_pairs(vae, arguments.seed, arguments.picture)
    print(f"PSNR on {results['num_held_out']} held-out digits: {results['psnr']:.2f} dB "
          f"({results['psnr_of_samples']:.2f} dB from posterior samples)\n{arguments.out}")  # fmt: skip


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line before anything is computed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write; it appears when the VAE is trained")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps (default {STEPS})")
    parser.add_argument("--batch_size", type=int, default=BATCH_SIZE, help=f"digits a step (default {BATCH_SIZE})")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, colours, order and noise")
    parser.add_argument("--threads", type=int, default=1, help="processor threads; the weights' last bits depend on it")
    parser.add_argument("--replace", action="store_true", help="replace OUT where it exists")
    parser.add_argument("--picture", type=Path, help="also write a PNG of held-out digits and their reconstructions")
    arguments = parser.parse_args(argv)
    if min(arguments.steps, arguments.batch_size, arguments.threads) < 1:
        parser.error("--steps, --batch_size and --threads must be at least 1")
    if arguments.seed < 0:
        parser.error(f"--seed is {arguments.seed}: give an integer from 0")
    if arguments.out.exists() and not arguments.replace:
        parser.error(f"{arguments.out} exists: choose another folder, or say --replace")
    if arguments.out.exists() and not (arguments.out / "provenance.json").is_file():
        parser.error(f"{arguments.out} is no folder of this command, so it is not replaced: choose another one")
    return arguments


@torch.no_grad()
def build(seed: int) -> AutoencoderKL:
    """The untrained VAE, its weights a function of the seed alone."""
    with torch.device("meta"):  # diffusers' constructors draw from torch's global generator: here they draw nothing
        vae = AutoencoderKL(**ARCHITECTURE)
    vae = vae.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            draw(module.weight, nn.init.kaiming_uniform_, generator, nonlinearity="linear")
            nn.init.zeros_(module.bias)
            # Every residual branch begins as nothing: colours pass from the first step on. Otherwise brightness is learned
            # first and the colours take ten times as long.
            if name.endswith((".conv2", ".to_out.0")):
                nn.init.zeros_(module.weight)
        elif isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    # The posterior begins narrow, or its noise would hide what the first latents say.
    vae.quant_conv.bias[LATENT_CHANNELS:] = FIRST_LOG_VARIANCE
    return vae


def train(steps: int, batch_size: int, seed: int) -> AutoencoderKL:
    """Train on the train digits and return the VAE, ready to use."""
    covers = np.stack([stroke_cover(image) for image in load_digits("train").images[:, 0]])  # [rows, 64, 64]
    vae = build(seed).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY)
    with Progress(steps, description="digits VAE", seconds_between_lines=20) as progress:
        for step in range(steps):
            images = to_model(draw_batch(covers, seed, step, batch_size))
            posterior = vae.encode(images).latent_dist
            latents = posterior.mean + posterior.std * latent_noise(seed, "digits_vae/noise", step, range(batch_size))
            error = (vae.decode(latents).sample - images).square().mean()
            kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            optimizer.zero_grad()
            (error + KL_WEIGHT * kl).backward()
            nn.utils.clip_grad_norm_(vae.parameters(), LARGEST_GRADIENT)
            optimizer.step()
            # Images span 2 here and 1 where PSNR is measured: 4 times the squared error.
            progress.update(psnr=decibel(error.item() / 4), kl=kl.item())
    return vae.eval().requires_grad_(False)


def draw_batch(covers: np.ndarray, seed: int, step: int, batch_size: int) -> np.ndarray:
    """Digits of a step, each in colours of its own, uint8 [batch, 64, 64, 3]."""
    rows = random_stream(seed, "digits_vae/rows", step).integers(len(covers), size=batch_size)
    colours = [draw_colours(random_stream(seed, "digits_vae/colours", step, slot)) for slot in range(batch_size)]
    return np.stack([to_pixels(covers[row], pair) for row, pair in zip(rows, colours, strict=True)])


def latent_noise(seed: int, stream: str, index: int, slots: range) -> Tensor:
    """Standard normal noise [slots, 4, 16, 16] for posterior samples."""
    side = IMAGE_SIZE // DOWNSAMPLING
    return torch.from_numpy(normal_draws(seed, stream, index, slots, (LATENT_CHANNELS, side, side)))


def learning_rate(step: int, steps: int) -> float:
    """The rate of a step."""
    cosine = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / steps))
    return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * cosine


def to_model(pixels: np.ndarray) -> Tensor:
    """Pixels uint8 [N, H, W, 3] as float32 [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def decibel(squared_error: float) -> float:
    """Peak signal-to-noise ratio of a mean squared error of images in [0, 1]."""
    return -10 * math.log10(max(squared_error, 1e-12))


@torch.inference_mode()
def encode(vae: AutoencoderKL, pixels: np.ndarray, seed: int | None) -> Tensor:
    """Latents [N, 4, 16, 16] as the VAE gives them: posterior means, or with a seed posterior samples."""
    latents = []
    for start in range(0, len(pixels), CHUNK):
        posterior = vae.encode(to_model(pixels[start : start + CHUNK])).latent_dist
        slots = range(start, start + len(posterior.mean))
        noise = 0.0 if seed is None else latent_noise(seed, "digits_vae/posterior", 0, slots)
        latents.append(posterior.mean + posterior.std * noise)
    return torch.cat(latents)


def scale_latents(vae: AutoencoderKL, seed: int) -> dict[str, float]:
    """Set the scaling factor and shift that give posterior samples of the train digits mean 0 and deviation 1."""
    latents = encode(vae, coloured_digits("train", seed)[0], seed)
    mean, deviation = latents.mean().item(), latents.std().item()
    vae.register_to_config(scaling_factor=1 / deviation, shift_factor=mean)
    return {
        "latent_mean": mean,
        "latent_std": deviation,
        "latent_mean_by_channel": latents.mean((0, 2, 3)).tolist(),
        "latent_std_by_channel": latents.std((0, 2, 3)).tolist(),
    }


def measure(vae: AutoencoderKL, seed: int) -> dict[str, float]:
    """PSNR on the test digits, images in [0, 1], mean over images; from posterior means and from posterior samples."""
    pixels = coloured_digits("test", seed)[0]
    return {
        "num_held_out": len(pixels),
        "psnr": psnr(pixels, decode(vae, encode(vae, pixels, None))),
        "psnr_of_samples": psnr(pixels, decode(vae, encode(vae, pixels, seed))),
    }


def psnr(pixels: np.ndarray, images: Tensor) -> float:
    """Mean over images of the PSNR in dB between uint8 [N, H, W, 3] and reconstructions [N, 3, H, W] in [-1, 1], clipped."""
    errors = ((to_model(pixels) - images.clamp(-1, 1)) / 2).square().mean((1, 2, 3))
    return float(np.mean([decibel(error) for error in errors.tolist()]))


@torch.inference_mode()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images [N, 3, 64, 64] of latents as `encode` gives them."""
    return torch.cat([vae.decode(part).sample for part in latents.split(CHUNK)])


def save(vae: AutoencoderKL, arguments: argparse.Namespace, results: dict) -> None:
    """Write the folder, complete or not at all."""
    packages = ("torch", "diffusers", "numpy", "pillow", "scikit-learn")
    record = {
        "command": shlex.join(["python", "tools/train_digits_vae.py", *sys.argv[1:]]),
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "seed": arguments.seed,
        "threads": arguments.threads,
        "kl_weight": KL_WEIGHT,
        **results,
        "num_parameters": sum(parameter.numel() for parameter in vae.parameters()),
        "versions": {"python": platform.python_version(), **package_versions(packages)},
    }
    with committed_folder(arguments.out, replace=arguments.replace) as folder:
        vae.save_pretrained(folder)
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors lets nobody else read the file; a package is for all users of the machine
        atomic_write_json(folder / "provenance.json", record)


def save_pairs(vae: AutoencoderKL, seed: int, path: Path) -> None:
    """Write the picture: rows of held-out digits, each with its reconstructions below."""
    pixels, labels = coloured_digits("test", seed)
    ranks = [np.flatnonzero(labels == label)[:2] for label in range(NUM_PAIRS)]
    rows = np.array(ranks).T.reshape(-1)  # the first digit of every class, then the second one
    originals = to_model(pixels[rows])
    images = torch.stack([originals.view(2, NUM_PAIRS, *originals.shape[1:]),
                          decode(vae, encode(vae, pixels[rows], None)).view(2, NUM_PAIRS, *originals.shape[1:])], 1)  # fmt: skip
    names = ["held-out", "through VAE"] * 2
    grid = class_grid_array(images.flatten(0, 2), np.arange(4).repeat(NUM_PAIRS), class_names=names, columns=NUM_PAIRS, scale=1)
    png = io.BytesIO()
    Image.fromarray(grid).save(png, format="PNG", optimize=True)
    atomic_write_bytes(path, png.getvalue())


if __name__ == "__main__":
    main()
