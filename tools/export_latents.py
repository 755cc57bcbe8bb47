"""Pictures into a cache for training: accelerate launch tools/export_latents.py --source PICTURES --output_dir CACHE --vae VAE

PICTURES is a folder of class folders (pictures in the folder itself are one class) or an image dataset saved by `datasets`.
With --vae the cache holds latents of a diffusers AutoencoderKL, fp16, in model space: a folder, `digits` (bundled) or a hub id
such as stabilityai/sd-vae-ft-mse (4x32x32 latents of 256x256 pictures) or stabilityai/sd-vae-ft-ema. With --encoding it holds
the pixels: `uint8` needs no decoding but 252 GB for ImageNet at 256x256, `png` about half of that, `jpeg` a tenth.
Any number of processes and machines with a shared folder, to the same rows. Kill it whenever you like: the same command,
with any number of processes, goes on where it was. EXIF orientation is ignored, as published ImageNet numbers do.
"""

import argparse
import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from drift_accel.data.class_table import ClassTable
from drift_accel.data.crops import CROPS, ImageCrop
from drift_accel.data.image_sources import ImageSource, open_image_source
from drift_accel.data.latent_export import ExportConfig, Workers, export_cache
from drift_accel.data.row_encoders import PIXEL_ENCODINGS, SAMPLINGS, VAE_DTYPES, PixelEncoder, RowEncoder, VaeEncoder
from drift_accel.foundation.devices import add_device_argument, pin_launched_device

TABLE_NAME = "classes.json"


def parse_arguments() -> argparse.Namespace:
    """The command line. Wrong values end the process with one message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", type=Path, required=True, help="folder of class folders, or dataset saved by `datasets`")
    add("--output_dir", type=Path, required=True, help="the cache's folder; an unfinished export there is gone on with")
    add("--split", help="split of a saved DatasetDict")
    add("--image_column", help="image column of a saved dataset (default: its only one)")
    add("--label_column", default="label", help="label column of a saved dataset (default: label)")
    add("--class_table", help=f"JSON of index, wnid, names; `none` for none (default: {TABLE_NAME} beside the source, if there)")
    add("--vae", help="folder, hub id (stabilityai/sd-vae-ft-mse, stabilityai/sd-vae-ft-ema, ...) or `digits`")
    add("--revision", help="revision of a hub id")
    add("--dtype", choices=VAE_DTYPES, default="float32", help="type in which the VAE computes (default: float32)")
    add("--scale", type=float, help="latents are (z - shift) * scale (default: the VAE's configuration)")
    add("--shift", type=float, help="see --scale")
    add("--sampling", choices=SAMPLINGS, default="sample", help="posterior stored per picture (default: a draw of it)")
    add("--no_flip", action="store_true", help="do not encode the mirrored pictures too")
    add("--encoding", choices=PIXEL_ENCODINGS, help="store pixels instead of latents")
    add("--jpeg_quality", type=int, default=95, help="1 to 100 (default: 95)")
    add("--image_size", type=int, default=256, help="side of the crop in pixels (default: 256)")
    add("--crop", choices=CROPS, default="adm", help="adm: ADM's centre crop (default); resize: Resize and CenterCrop; "
        "random: RandomResizedCrop and flip; lanczos: the whole picture, squeezed; lanczos_centre: its middle")  # fmt: skip
    add("--crop_scale", type=float, nargs=2, default=(0.2, 1.0), metavar=("LOW", "HIGH"), help="area of random crops")
    add("--views", type=int, default=1, help="random crops a picture, a row each (default: 1)")
    add("--seed", type=int, default=0, help="seed of row order, crops and posterior draws (default: 0)")
    add("--max_rows", type=int, help="only so many rows of the shuffled order, for a trial")
    add("--max_bad", type=int, default=0, help="unreadable pictures that are left out and recorded (default: 0)")
    add("--batch_size", type=int, default=32, help="pictures encoded at once; part of the result's last bits (default: 32)")
    add("--chunk_size", type=int, default=1024, help="rows computed and resumed together (default: 1024)")
    add("--shard_bytes", type=int, default=256_000_000, help="largest file of rows (default: 256 MB)")
    add("--num_threads", type=int, default=8, help="threads a process that read pictures (default: 8)")
    add_device_argument(parser)
    arguments = parser.parse_args()
    if (arguments.vae is None) == (arguments.encoding is None):
        parser.error("give --vae for latents or --encoding for pixels, one of the two")
    return arguments


def export_config(arguments: argparse.Namespace) -> ExportConfig:
    """The export's settings. Raises ValueError."""
    crop = ImageCrop(
        kind=arguments.crop, size=arguments.image_size, scale=tuple(arguments.crop_scale), seed=arguments.seed
    )  # fmt: skip
    names = ("views", "seed", "max_rows", "chunk_size", "batch_size", "shard_bytes", "max_bad", "num_threads")
    return ExportConfig(crop=crop, **{name: getattr(arguments, name) for name in names})


def open_pictures(arguments: argparse.Namespace) -> ImageSource:
    """The source, with labels and names of its class table where there is one. Raises ValueError, OSError."""
    source = open_image_source(
        arguments.source,
        split=arguments.split,
        image_column=arguments.image_column,
        label_column=arguments.label_column,
    )
    if arguments.output_dir.resolve().is_relative_to(arguments.source.resolve()):
        raise ValueError(
            f"--output_dir {arguments.output_dir} lies in the source: it would be taken for pictures; choose another"
        )
    beside = arguments.source.resolve().parent / TABLE_NAME
    path = arguments.class_table or (beside if beside.is_file() else "none")
    if path != "none":
        table = ClassTable.read(path)
        source.use_classes(table.wnids, [", ".join(entry.names) for entry in table])
    return source


def make_encoder(arguments: argparse.Namespace, device: torch.device) -> RowEncoder:
    """The VAE on its device, or the pixels' encoder. Raises ValueError, OSError."""
    if arguments.encoding is not None:
        return PixelEncoder(size=arguments.image_size, encoding=arguments.encoding, jpeg_quality=arguments.jpeg_quality)
    from drift_accel.data.row_encoders import weights_hash
    from drift_accel.models.autoencoder import load_vae

    vae = load_vae(arguments.vae, revision=arguments.revision)
    digest = weights_hash(vae)  # of the weights as they are, before they are rounded to another type
    if arguments.dtype != "float32":
        vae = load_vae(arguments.vae, revision=arguments.revision, dtype=VAE_DTYPES[arguments.dtype])
    return VaeEncoder(
        vae.to(device),
        name=arguments.vae,
        revision=arguments.revision,
        size=arguments.image_size,
        sampling=arguments.sampling,
        flip=not arguments.no_flip,
        seed=arguments.seed,
        scale=arguments.scale,
        shift=arguments.shift,
        weights_sha256=digest,
    )


def main() -> None:
    """Parse, export, print."""
    arguments = parse_arguments()
    try:
        config = export_config(arguments)
        source = open_pictures(arguments)
        # Processes wait for the slowest one, which may be hours behind.
        pin_launched_device(arguments.device)
        waiting = InitProcessGroupKwargs(timeout=timedelta(days=7))
        accelerator = Accelerator(cpu=arguments.device == "cpu", kwargs_handlers=[waiting])
        export_cache(
            source,
            make_encoder(arguments, accelerator.device),
            arguments.output_dir,
            config,
            workers=Workers(index=accelerator.process_index, count=accelerator.num_processes, wait=accelerator.wait_for_everyone),
            command=sys.argv,
        )
    except (ValueError, OSError) as error:
        raise SystemExit(f"export_latents: {error}") from None
    if accelerator.is_main_process:
        print(f"next: python tools/verify_cache.py {arguments.output_dir} --mode full")
    accelerator.end_training()


if __name__ == "__main__":
    main()
