"""Memorisation: python tools/nearest_neighbours.py MODEL --training CACHE --held_out PICTURES --protocol encoder --network MAE

Writes OUTPUT.json, the distances of samples to their nearest training pictures beside those of held-out real pictures, and
OUTPUT.png, a row a sample with its nearest training pictures. Samples are balanced over the classes. --training and --held_out
are folders, saved datasets, .npz files, caches, or "digits:train" and "digits".
"""

import argparse
import sys
from pathlib import Path

from drift_accel.evaluation.neighbour_search import NeighbourConfig, search_neighbours
from drift_accel.evaluation.network_options import add_network_options, asked_network
from drift_accel.evaluation.picture_sources import open_pictures
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.sampling.model_options import (
    add_model_options,
    add_sample_options,
    asked_labels,
    asked_pictures,
    open_trained,
    open_vae,
    start_workers,
)


def main() -> None:
    """Parse, search, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path, help="a run, a checkpoint, an export, a pipeline or an official folder")
    add("--training", required=True, help="the pictures that the model was trained on")
    add("--held_out", help="real pictures that it has not seen, for comparison")
    add("--num_held_out", type=int, help="only so many of them, chosen by a fixed shuffle (default: all)")
    add("--image_size", type=int, help="side to which pictures are cropped (default: all must have one size)")
    add("--k", type=int, default=10, help="neighbours shown of each sample (default: 10)")
    add("--shown_per_class", type=int, default=1, help="samples shown of each class (default: 1)")
    add("--output", type=Path, help="path without suffix (default: RUN/evaluation/nearest_neighbours)")
    add("--overwrite", action="store_true", help="replace existing outputs")
    add_network_options(parser)
    add_model_options(parser)
    add_sample_options(parser, num_samples=1000)
    arguments = parser.parse_args()
    try:
        config = NeighbourConfig(k=arguments.k, shown_per_class=arguments.shown_per_class)
        accelerator, workers = start_workers(arguments.device)
        trained = open_trained(arguments, arguments.model)
        labels = asked_labels(arguments, trained)
        output = output_path(arguments, trained.origin.get("run"))
        network = asked_network(arguments, accelerator.device)
        decoder = None
        if network.protocol.name != "encoder" or arguments.vae is not None or not trained.makes_latents:
            decoder = open_vae(arguments, trained, accelerator.device)
        training = open_pictures(arguments.training, image_size=arguments.image_size)
        held_out = None
        if arguments.held_out is not None:
            held_out = open_pictures(arguments.held_out, image_size=arguments.image_size, limit=arguments.num_held_out)
        samples = asked_pictures(
            arguments, trained, decoder, labels, accelerator.device, quantizer=network.protocol.quantizer
        )  # fmt: skip
        record = search_neighbours(samples, training, held_out, network, output, config=config, workers=workers, command=sys.argv)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    if workers.is_main:
        print_summary(record["nearest_distance"])
        print(f"record: {output.with_suffix('.json')}\npicture: {output.with_suffix('.png')}")
    accelerator.end_training()


def output_path(arguments: argparse.Namespace, run: str | None) -> Path:
    """Where the files go, without suffix. Raises ValueError where there is no place, or files are there already."""
    if arguments.output is None and run is None:
        raise ValueError(f"{arguments.model} is no run with a folder for results: give --output")
    output = arguments.output or RunFolder(run).evaluation_path("nearest_neighbours").with_suffix("")
    for suffix in (".json", ".png"):
        if output.with_suffix(suffix).exists() and not arguments.overwrite:
            raise ValueError(f"{output.with_suffix(suffix)} exists: choose another --output, or add --overwrite")
    return output


def print_summary(summary: dict) -> None:
    """Quantiles of the distance to the nearest training picture."""
    rows = {name: values for name, values in summary.items() if isinstance(values, dict)}
    print(f"{'distance to the nearest training picture':42}" + "".join(f"{q:>9}" for q in next(iter(rows.values()))))
    for name, values in rows.items():
        print(f"  {name.replace('_', '-'):40}" + "".join(f"{value:9.3g}" for value in values.values()))
    share = summary["share_nearer_than_real"]
    if share is not None:
        print(f"samples nearer than the nearest 1 % of held-out pictures: {100 * share:.1f} % (1 % where nothing is memorised)")


if __name__ == "__main__":
    main()
