"""Draw images with a trained generator: python tools/sample.py RUN --output samples.png

RUN is a run of drift_accel.train or one of its exports. Latents are decoded by --vae.
"""

import argparse
import json
from pathlib import Path

import torch

from drift_accel.foundation.run_folder import RunFolder
from drift_accel.models import Generator
from drift_accel.models.autoencoder import load_vae
from drift_accel.models.exports import load_export
from drift_accel.sampling import decode_latents, generate, save_class_grid


def main() -> None:
    """Parse, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a run, or of one of its exports")
    parser.add_argument("--output", type=Path, default=Path("samples.png"), help="PNG of the labelled grid")
    parser.add_argument("--export", default=None, help="name of a run's export (default: its first)")
    parser.add_argument("--classes", default=None, help="comma-separated labels or names (default: the first 10)")
    parser.add_argument("--per_class", type=int, default=10, help="images of each class")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="at least 1 (no guidance)")
    parser.add_argument("--seed", type=int, default=0, help="image i depends on (seed, i) alone")
    parser.add_argument("--vae", default=None, help='decodes latents: "digits", a folder, or a hub id')
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    arguments = parser.parse_args()
    if arguments.per_class < 1:
        parser.error(f"--per_class is {arguments.per_class}: give at least 1")
    if not 1 <= arguments.guidance_scale < float("inf"):
        parser.error(f"--guidance_scale is {arguments.guidance_scale}: guidance starts at 1 (no guidance)")
    if arguments.output.exists() and not arguments.overwrite:
        parser.error(f"{arguments.output} exists: choose another --output, or add --overwrite")
    try:
        is_export = arguments.export is None and (arguments.model / "config.json").exists()
        folder = arguments.model if is_export else RunFolder(arguments.model).find_export(arguments.export)
        generator = load_export(folder, Generator, "model")
        names = class_names(folder, generator.config.num_classes)
        labels = choose_classes(arguments.classes, names)
        vae = None if arguments.vae is None else load_vae(arguments.vae)
        if vae is None and generator.config.in_channels not in (1, 3):
            raise ValueError(f"{folder} makes latents of {generator.config.in_channels} channels: name their VAE with --vae")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    labels = torch.tensor(labels).repeat_interleave(arguments.per_class)
    images = generate(generator.to(device), labels, guidance_scale=arguments.guidance_scale, seed=arguments.seed)
    if vae is not None:
        images = decode_latents(vae.to(device), images)
    save_class_grid(images.cpu(), labels, arguments.output, class_names=names, columns=arguments.per_class)
    print(f"{len(images)} images of {folder}: {arguments.output}")


def class_names(folder: Path, num_classes: int) -> list[str]:
    """The class table that travelled with the export, else the labels' numbers."""
    description = folder / "data.json"
    if description.exists():
        return [entry["name"] for entry in json.loads(description.read_text(encoding="utf-8"))["classes"]]
    return [str(label) for label in range(num_classes)]


def choose_classes(text: str | None, names: list[str]) -> list[int]:
    """Labels of a comma-separated list of labels or names. Raises ValueError naming one that does not exist."""
    if text is None:
        return list(range(min(10, len(names))))
    labels = []
    for item in (part.strip() for part in text.split(",")):
        if item in names:
            labels.append(names.index(item))
        elif item.isdigit() and int(item) < len(names):
            labels.append(int(item))
        else:
            raise ValueError(f"--classes holds {item!r}: give labels from 0 to {len(names) - 1}, or names of the class table")
    return labels


if __name__ == "__main__":
    main()
