"""Look at a masked autoencoder: python tools/inspect_mae.py MODEL --output_dir OUT [--data digits|CACHE] [--vae VAE]

MODEL is a run of drift_accel.train_mae, one of its checkpoints or exports, or an artifact folder of the official release. Writes
into OUT: reconstructions.png (original, masked, reconstruction; latents decoded by their VAE, with --source beside the pictures
they were made of), features.png (each scale's feature energy) and inspection.json (errors of the masked cells beside simple
fillings, and the inventory of features). Give held-out rows: the digits' test split is the default, a cache is named by --data.
"""

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from drift_accel.analysis import mae_inspection as inspection
from drift_accel.analysis.panels import panel_array
from drift_accel.data.cache_format import LATENTS
from drift_accel.data.crops import ImageCrop
from drift_accel.data.digits import SPLITS, load_digits
from drift_accel.data.image_sources import open_image_source
from drift_accel.data.latent_cache import LatentCache
from drift_accel.data.row_encoders import weights_hash
from drift_accel.data.sources import Source, describe_source, require_same_space
from drift_accel.foundation.devices import add_device_argument, find_device
from drift_accel.foundation.provenance import collect_provenance
from drift_accel.foundation.random_streams import random_stream
from drift_accel.foundation.storage import atomic_write_bytes, atomic_write_json
from drift_accel.models.autoencoder import load_vae
from drift_accel.sampling import decode_latents, save_grid
from drift_accel.training.mae_validation import draw_row_masks, read_held_out
from drift_accel.training.trained_mae import TrainedMae, load_trained_mae

INVENTORY_IMAGES = 16
ENERGY_IMAGES = 6


def parse_arguments() -> argparse.Namespace:
    """The command line. Wrong values end the process with one message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path, help="a run, a checkpoint, an export or an official folder")
    add("--output_dir", type=Path, required=True, help="folder for pictures and numbers")
    add("--ema", help='of a run or checkpoint: which average, such as 0.9995, or "none" for the raw weights (default: the first)')
    add("--data", default="digits", help='"digits" or the folder of a cache (default: digits)')
    add("--split", choices=SPLITS, default="test", help="of the digits (default: test)")
    add("--num", type=int, default=16, help="images to show (default: 16)")
    add("--rows", type=int, default=512, help="images to measure (default: 512)")
    add("--mask_ratio", type=float, help="share of hidden patches (default: the run's, else 0.5)")
    add("--seed", type=int, default=0, help="seed of the masks and of the choice of images (default: 0)")
    add("--vae", help="decodes latents (default: the VAE that the cache names)")
    add("--source", type=Path, help="the pictures that the cache was made of, to show beside")
    add_device_argument(parser, default="cpu")
    arguments = parser.parse_args()
    for name in ("num", "rows"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}: give at least 1")
    if arguments.mask_ratio is not None and not 0 < arguments.mask_ratio < 1:
        parser.error(f"--mask_ratio is {arguments.mask_ratio}: give a probability between 0 and 1")
    if arguments.data == "digits" and arguments.source is not None:
        parser.error("--source is for caches of pictures: leave it out")
    return arguments


def main() -> None:
    """Parse, measure, draw, print."""
    arguments = parse_arguments()
    try:
        inspect(arguments)
    except (ValueError, OSError) as error:
        raise SystemExit(f"inspect_mae: {error}") from None


def inspect(arguments: argparse.Namespace) -> None:
    """Measure the held-out rows, draw some of them, list the features."""
    device = find_device(arguments.device)
    trained = load_trained_mae(arguments.model, ema=arguments.ema)
    model = trained.model.to(device)
    source = load_digits(arguments.split) if arguments.data == "digits" else LatentCache(arguments.data)
    require_fit(trained, source)
    ratio = arguments.mask_ratio or float(trained.configuration.get("mask_ratio", 0.5))
    decode = make_decoder(source, arguments.vae, device)

    stream = random_stream(arguments.seed, "inspect_mae/rows", 0)
    rows = stream.permutation(len(source))[: arguments.rows]
    images = read_held_out(source, rows, arguments.seed).to(device)
    found = inspection.reconstruct_rows(model, images, draw_row_masks(model, arguments.seed, rows, ratio).to(device))
    numbers = inspection.measure_fillings(found, decode)
    is_latent = isinstance(source, LatentCache) and source.header.kind == LATENTS
    caption = inspection.caption_of(numbers, len(rows), ratio, decoded=is_latent)

    shown = slice(0, min(arguments.num, len(rows)))
    columns = {
        "original": decode(images[shown]),
        "masked": inspection.paint_hidden(decode(images[shown]), found.mask[shown]),
        "reconstruction": decode(found.reconstructed[shown]),
    }
    if arguments.source is not None:
        columns = {"source": read_pictures(source, rows[shown], arguments.source), **columns}
    out = arguments.output_dir
    save_grid(panel_array(columns, caption, groups=max(1, min(4, shown.stop // 4))), out / "reconstructions.png")
    inventory = inspection.feature_inventory(model, images[:INVENTORY_IMAGES])
    energy = inspection.feature_energy(model, images[:ENERGY_IMAGES])
    draw_energy(decode(images[:ENERGY_IMAGES]), energy, out / "features.png")
    record = {
        "model": trained.origin, "data": arguments.data, "rows": len(rows), "mask_ratio": ratio, "seed": arguments.seed,
        "numbers": numbers, "features": inventory, "provenance": collect_provenance(command=sys.argv),
    }  # fmt: skip
    atomic_write_json(out / "inspection.json", record)
    print(f"{trained.origin}\n{inspection.inventory_text(inventory)}\n{caption}")
    print("written: " + ", ".join(str(out / name) for name in ("reconstructions.png", "features.png", "inspection.json")))


def require_fit(trained: TrainedMae, source: Source) -> None:
    """Raise ValueError where the model takes other images than the data has."""
    config = trained.model.config
    shape = (config.in_channels, config.input_size, config.input_size)
    if tuple(source.image_shape) != shape:
        raise ValueError(
            f"{trained.origin} takes images of shape {shape}, the data has {tuple(source.image_shape)}: change --data"
        )
    if trained.data:
        require_same_space(describe_source(source), dict(trained.data), trained.origin)


def make_decoder(source: Source, name: str | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Images of the data's space -> pictures [N, 1 or 3, H, W] in [-1, 1] on the CPU. Raises ValueError for another VAE."""
    if not isinstance(source, LatentCache) or source.header.kind != LATENTS:
        return lambda images: images.float().cpu()
    recorded = source.header.vae
    vae = load_vae(name or recorded["name"], revision=None if name else recorded["revision"])
    if weights_hash(vae) != recorded["weights_sha256"]:
        raise ValueError(f"{name or recorded['name']} has other weights than the VAE of this cache: name it with --vae")
    vae, scaling = vae.to(device), (source.header.scale, source.header.shift)
    return lambda images: decode_latents(vae, images, chunk=8, scaling=scaling).cpu()


def read_pictures(source: LatentCache, rows: np.ndarray, folder: Path) -> Tensor:
    """The pictures of rows, cropped as they were for the cache, [N, 3, S, S] in [-1, 1]. Raises ValueError for other pictures."""
    pictures = open_image_source(folder)
    settings = source.header.crop
    crop = ImageCrop(**{**settings, "scale": tuple(settings["scale"])})
    found = []
    for origin in source.origins(rows):
        if origin.image_index >= len(pictures) or pictures.name(origin.image_index) != origin.source:
            raise ValueError(f"{folder} has no {origin.source} in its place: give the folder that was exported")
        found.append(crop(pictures.load(origin.image_index), origin.image_index, origin.view))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_energy(pictures: Tensor, energy: dict[str, np.ndarray], path: Path) -> None:
    """One row an image: the image, then the mean square over channels of each scale, from black to its own largest value."""
    figure = Figure(figsize=(1.7 * (1 + len(energy)), 1.75 * len(pictures) + 0.5), layout="constrained")
    axes = figure.subplots(len(pictures), 1 + len(energy), squeeze=False)
    for row, picture in enumerate(pictures.clamp(-1, 1).permute(0, 2, 3, 1).numpy() / 2 + 0.5):
        grey = picture.shape[-1] == 1
        axes[row, 0].imshow(picture[..., 0] if grey else picture, cmap="gray" if grey else None, vmin=0, vmax=1)
        for column, (name, values) in enumerate(energy.items(), start=1):
            axes[row, column].imshow(values[row], cmap="magma", vmin=0)
            if row == 0:
                axes[0, column].set_title(f"{name} {values.shape[1]}x{values.shape[2]}", fontsize=9)
    axes[0, 0].set_title("image", fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    atomic_write_bytes(path, content.getvalue())


if __name__ == "__main__":
    main()
