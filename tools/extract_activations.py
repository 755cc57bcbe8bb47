"""Activations of real or generated images: python tools/extract_activations.py SOURCE --model MODEL --output_dir OUT --name SET

SOURCE is a generator (a run, a checkpoint, an export, a pipeline, an official folder, an EDM or DMD2 UNet), whose samples are
drawn, or what exists already: a folder of class folders, a dataset saved by `datasets`, a latent cache, an .npz with arr_0, the
chunks of a generation, train_data_batch_N.npz of the downsampled ImageNet, "digits" or "digits:train". MODEL is our generator,
our masked autoencoder, an encoder of --model_kind, an EDM or DMD2 UNet, or module:function. OUT gets activations/SET (Arrow, or
.npz with .json), images/SET and metadata/SET/dataset_info.json. `accelerate launch` with any number of processes gives the same
files; a killed command, given again, goes on where it was.
"""

import argparse
import json
import sys
from pathlib import Path

from drift_accel.analysis.activations.options import add_extraction_options, asked_config, asked_extraction, asked_model
from drift_accel.sampling.model_options import start_workers


def parse_arguments() -> argparse.Namespace:
    """The command line. Wrong values end the process with one message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", help="a generator, or images that exist; not needed with --list_layers")
    add_extraction_options(parser)
    arguments = parser.parse_args()
    if arguments.source is None and not (arguments.list_layers and arguments.model):
        parser.error("give SOURCE: what activations are taken of")
    return arguments


def main() -> None:
    """Parse, compute, say where the set is."""
    arguments = parse_arguments()
    accelerator, workers = start_workers(arguments.device)
    try:
        config = None if arguments.list_layers else asked_config(arguments)
        model = asked_model(arguments, accelerator.device)
        if config is None:
            if workers.is_main:
                print_layers(model.layer_shapes())
        else:
            extraction = asked_extraction(arguments, config, model, accelerator.device)
            info = extraction.run(workers=workers, overwrite=arguments.overwrite, command=sys.argv)
            if workers.is_main:
                report(info)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"extract_activations: {error}") from None
    accelerator.end_training()


def report(info: Path) -> None:
    """Where the set is, and what should be known before it is used."""
    described = json.loads(info.read_bytes())
    for name, text in (
        ("num_non_finite", "hold numbers that are not finite"),
        ("left_out", "could not be read and are left out"),
    ):
        found = described[name]
        count = len(found) if isinstance(found, list) else found
        if count:
            print(f"note: {count:,} samples {text}")
    print(f"{described['num_samples']:,} samples: {info}")


def print_layers(shapes: dict[str, tuple[int, ...]]) -> None:
    """One line a layer: its name and the shape of one sample."""
    width = max(map(len, shapes), default=0)
    for name, shape in shapes.items():
        print(f"{name:<{width}}  {' x '.join(map(str, shape))}")


if __name__ == "__main__":
    main()
