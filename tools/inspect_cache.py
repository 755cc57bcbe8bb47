"""Look at a cache: python tools/inspect_cache.py CACHE --output_dir OUT [--vae VAE] [--source PICTURES]

Writes into OUT: grid.png (rows decoded through the VAE, labelled), with --source also pairs.png (each source picture beside its
decoded row), classes.png (rows a class) and statistics.json.
"""

import argparse
import dataclasses
import io
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from drift_accel.data.cache_format import LATENTS
from drift_accel.data.crops import ImageCrop
from drift_accel.data.image_sources import open_image_source
from drift_accel.data.latent_cache import LatentCache
from drift_accel.foundation.devices import add_device_argument, find_device
from drift_accel.foundation.provenance import collect_provenance
from drift_accel.foundation.random_streams import random_stream
from drift_accel.foundation.storage import atomic_write_bytes, atomic_write_json
from drift_accel.models.autoencoder import vae_scaling
from drift_accel.sampling import decode_latents, save_class_grid


def main() -> None:
    """Parse, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, help="folder of the cache")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--num", type=int, default=64, help="rows to show (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of rows (default: 0)")
    parser.add_argument("--flipped", action="store_true", help="show the mirrored views")
    parser.add_argument("--vae", help="decodes latents (default: the VAE that the header names)")
    parser.add_argument("--compare", "--source", dest="source", type=Path, help="the pictures that were exported, to compare")
    parser.add_argument("--split", help="split of a saved DatasetDict")
    parser.add_argument("--image_column", help="image column of a saved dataset")
    parser.add_argument("--label_column", default="label", help="label column of a saved dataset (default: label)")
    add_device_argument(parser, default="cpu")
    arguments = parser.parse_args()
    if arguments.num < 1:
        parser.error(f"--num is {arguments.num}: give at least 1")
    try:
        inspect(arguments)
    except (ValueError, OSError) as error:
        raise SystemExit(f"inspect_cache: {error}") from None


def inspect(arguments: argparse.Namespace) -> None:
    """Draw all pictures of a cache and write its numbers."""
    cache = LatentCache(arguments.cache)
    stream = random_stream(arguments.seed, "inspect/rows", 0)
    indices = stream.choice(len(cache), min(arguments.num, len(cache)), replace=False)
    rows = cache.rows(
        indices,
        arguments.flipped or None,
        stream if cache.is_sampled_at_read else None,
    )
    originals = None if arguments.source is None else read_originals(cache, indices, arguments)
    images = decode(cache, torch.from_numpy(rows), arguments.vae, find_device(arguments.device))
    labels = cache.labels[indices]
    grid = {"class_names": cache.class_names, "columns": 8}
    save_class_grid(images, labels, arguments.output_dir / "grid.png", **grid)
    written = ["grid.png", "classes.png", "statistics.json"]
    numbers = {"rows": len(cache), "shown": len(indices), "mean_of_shown": rows.mean(), "std_of_shown": rows.std()}
    if originals is not None:
        error = ((images.clamp(-1, 1) - originals) / 2).square().mean((1, 2, 3))
        numbers["psnr_of_shown"] = float((-10 * error.clamp_min(1e-10).log10()).mean())
        pairs = torch.stack([originals, images.clamp(-1, 1)], dim=1).flatten(0, 1)  # original, decoded, original, ...
        save_class_grid(pairs, np.repeat(labels, 2), arguments.output_dir / "pairs.png", **grid)
        written.append("pairs.png")
    counts = [len(cache.class_rows(label)) if entry.rows else 0 for label, entry in enumerate(cache.header.classes)]
    draw_histogram(counts, arguments.output_dir / "classes.png")
    numbers |= {"smallest_class": min(counts), "largest_class": max(counts), "class_rows": counts}
    record = {**numbers, "header": dataclasses.asdict(cache.header), "provenance": collect_provenance(command=sys.argv)}
    atomic_write_json(arguments.output_dir / "statistics.json", record)
    for name, value in numbers.items():
        if name != "class_rows":
            print(f"{name}: {value:.4f}" if isinstance(value, float | np.floating) else f"{name}: {value:,}")
    print("written: " + ", ".join(str(arguments.output_dir / name) for name in written))


def decode(cache: LatentCache, rows: torch.Tensor, name: str | None, device: torch.device) -> torch.Tensor:
    """Rows of a cache as images [N, 3, H, W] in [-1, 1]. Raises ValueError for another VAE's latents."""
    if cache.header.kind != LATENTS:
        return rows
    from drift_accel.data.row_encoders import weights_hash
    from drift_accel.models.autoencoder import load_vae

    vae = load_vae(name or cache.header.vae["name"], revision=None if name else cache.header.vae["revision"])
    if weights_hash(vae) != cache.header.vae["weights_sha256"]:
        raise ValueError(f"{name or cache.header.vae['name']} has other weights than the VAE of this cache: name it with --vae")
    # decode_latents undoes the scale of the VAE's configuration; the export may have been given another one.
    mine, configured = ([torch.tensor(value).reshape(-1, 1, 1) for value in pair] for pair in (
        (cache.header.scale, cache.header.shift), vae_scaling(vae.config)
    ))  # fmt: skip
    latents = (rows / mine[0] + mine[1] - configured[1]) * configured[0]
    return decode_latents(vae.to(device), latents.to(device)).cpu()


def read_originals(cache: LatentCache, indices: np.ndarray, arguments: argparse.Namespace) -> torch.Tensor:
    """The source pictures of rows, cropped as they were for the export, [N, 3, S, S] in [-1, 1].

    Raises ValueError where a row's picture has another name at the source.
    """
    source = open_image_source(
        arguments.source,
        split=arguments.split,
        image_column=arguments.image_column,
        label_column=arguments.label_column,
    )
    settings = cache.header.crop
    crop = ImageCrop(**{**settings, "scale": tuple(settings["scale"])})
    pictures = []
    for origin in cache.origins(indices):
        if origin.image_index >= len(source) or source.name(origin.image_index) != origin.source:
            raise ValueError(f"{arguments.source} has no {origin.source} in its place: give the folder that was exported")
        pixels = crop(source.load(origin.image_index), origin.image_index, origin.view)
        pictures.append(pixels[:, ::-1] if arguments.flipped else pixels)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_histogram(counts: list[int], path: Path) -> None:
    """Rows a class, in label order."""
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(np.arange(len(counts)), counts, width=1.0 if len(counts) > 50 else 0.8, color="#4c72b0")
    axes.set(xlabel="class", ylabel="rows", title=f"{sum(counts):,} rows of {len(counts)} classes")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    atomic_write_bytes(path, picture.getvalue())


if __name__ == "__main__":
    main()
