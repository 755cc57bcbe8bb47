"""Draw images with a trained generator: python tools/sample.py MODEL --output samples.png

MODEL is a run of drift_accel.train, one of its checkpoints or exports, a saved pipeline, or an artifact folder of the official
release. --output decides the format, or --format: samples.png is a labelled grid, samples.npz holds uint8 arr_0 [N, H, W, 3] and
the labels arr_1 (as the ADM suite takes them), anything else is a folder of class folders of PNGs, or a `datasets` folder.
Sample i depends on (seed, i), its label and the guidance alone: `accelerate launch tools/sample.py ...` with any number of
processes makes the same files, and a killed command, given again, goes on where it was.
"""

import argparse
import shutil
import sys
from pathlib import Path

from drift_accel.foundation.provenance import collect_provenance
from drift_accel.sampling import SampleStore, save_class_grid
from drift_accel.sampling.class_choice import folder_names
from drift_accel.sampling.model_options import (
    add_model_options,
    add_sample_options,
    asked_labels,
    asked_pictures,
    open_trained,
    open_vae,
    start_workers,
)
from drift_accel.sampling.outputs import write_dataset, write_image_folder, write_npz
from drift_accel.sampling.pictures import GeneratedPictures

FORMATS = ("grid", "folder", "dataset", "npz")
PER_CLASS = 10


def parse_arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line. Wrong values end the process with one message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path, help="a run, a checkpoint, an export, a pipeline or an official folder")
    add("--output", type=Path, default=Path("samples.png"), help="file or folder to write (default: samples.png)")
    add("--format", choices=FORMATS, help="default: .png is a grid, .npz an npz, anything else a folder")
    add("--per_class", type=int, help=f"images of each class (default: {PER_CLASS})")
    add("--max_grid_classes", type=int, default=10, help="classes in a grid, the first of those asked for (default: 10)")
    add("--overwrite", action="store_true", help="replace an existing output")
    add_model_options(parser)
    add_sample_options(parser)
    arguments = parser.parse_args()
    for name in ("per_class", "max_grid_classes"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}: give at least 1")
    if arguments.per_class is not None and (arguments.num_samples is not None or arguments.labels is not None):
        parser.error("--per_class is another way to say how many: leave out --num_samples and --labels")
    if not 1 <= arguments.guidance_scale < float("inf"):
        parser.error(f"--guidance_scale is {arguments.guidance_scale}: guidance starts at 1 (no guidance)")
    suffixes = {".png": "grid", ".npz": "npz"}
    arguments.format = arguments.format or suffixes.get(arguments.output.suffix, "folder")
    if arguments.output.exists() and not arguments.overwrite:
        parser.error(f"{arguments.output} exists: choose another --output, or add --overwrite")
    return parser, arguments


def main() -> None:
    """Parse, draw, save."""
    parser, arguments = parse_arguments()
    accelerator, workers = start_workers(arguments.device)
    try:
        trained = open_trained(arguments, arguments.model)
        default_classes = arguments.max_grid_classes if arguments.format == "grid" else None
        per_class = arguments.per_class or PER_CLASS
        labels = asked_labels(arguments, trained, per_class=per_class, default_classes=default_classes)
        decoder = open_vae(arguments, trained, accelerator.device)
        pictures = asked_pictures(arguments, trained, decoder, labels, accelerator.device)
        if arguments.format == "grid":
            if workers.is_main:
                write_grid(pictures, arguments)
        else:
            write_files(pictures, arguments, workers)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if workers.is_main:
        print(f"{len(pictures)} images of {trained.origin['path']}: {arguments.output}")
    accelerator.end_training()


def write_grid(pictures: GeneratedPictures, arguments: argparse.Namespace) -> None:
    """One row a class, at most --max_grid_classes of them."""
    names = {entry.index: ", ".join(entry.names) for entry in pictures.trained.table}
    shown = list(dict.fromkeys(pictures.labels.tolist()))[: arguments.max_grid_classes]
    columns = max(pictures.labels.tolist().count(label) for label in shown)
    images = pictures.images(range(len(pictures)))
    chosen = [place for place, label in enumerate(pictures.labels.tolist()) if label in shown]
    save_class_grid(images[chosen], pictures.labels[chosen], arguments.output, class_names=names, columns=columns)


def write_files(pictures: GeneratedPictures, arguments: argparse.Namespace, workers) -> None:
    """Chunks by all processes, then the files by the first one."""
    output = arguments.output
    store = SampleStore(output.with_name(f"{output.name}.in_progress"), pictures, keep_pixels=True)
    store.compute(workers=workers)
    if not workers.is_main:
        return
    trained = pictures.trained
    record = {
        **pictures.identity(),
        "model": dict(trained.origin),
        "num_non_finite": store.num_non_finite(),
        "class_folders": folder_names(trained.table) if arguments.format == "folder" else None,
        "provenance": collect_provenance(command=sys.argv),
    }
    if arguments.format == "npz":
        write_npz(store, output, record)
    else:
        write = write_dataset if arguments.format == "dataset" else write_image_folder
        write(store, trained.table, output, record, replace=arguments.overwrite)
    shutil.rmtree(store.folder)


if __name__ == "__main__":
    main()
