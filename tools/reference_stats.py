"""Statistics of real pictures under a protocol: python tools/reference_stats.py PICTURES --protocol clean --output real.npz

PICTURES is a folder (class folders or pictures), a dataset saved by `datasets`, an .npz with arr_0 uint8 [N, H, W, 3], a cache of
tools/export_latents.py, or "digits" (scikit-learn's test digits; "digits:train" the others). The file holds mu and sigma, some
features for precision, recall and KID, and a record of protocol, network hash, count and pictures. `accelerate launch` with any
number of processes gives the same file; a killed command, given again, goes on where it was. --show prints what is in a file,
published ones (mu and sigma, or ref_mu and ref_sigma) too.
"""

import argparse
import json
import sys
from pathlib import Path

from drift_accel.data.crops import CROPS
from drift_accel.evaluation.evaluate import discard, make_reference
from drift_accel.evaluation.network_options import add_network_options, asked_network
from drift_accel.evaluation.picture_sources import open_pictures
from drift_accel.evaluation.statistics import load_reference, save_reference
from drift_accel.foundation.devices import add_device_argument
from drift_accel.sampling.model_options import start_workers


def main() -> None:
    """Parse, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("pictures", help="real pictures; with --show a file of statistics")
    add("--output", type=Path, help="the .npz to write")
    add("--show", action="store_true", help="print what a file of statistics holds, and stop")
    add("--image_size", type=int, help="side to which pictures are cropped (default: all must have one size)")
    add("--crop", choices=CROPS[:2], default="adm", help="how they are cropped (default: adm, as published ImageNet numbers)")
    add("--split", help="split of a saved DatasetDict")
    add("--image_column", help="image column of a saved dataset (default: its only one)")
    add("--num_images", type=int, help="only so many pictures, chosen by a fixed shuffle (default: all)")
    add("--num_features", type=int, default=10_000, help="features kept for precision, recall and KID (default: 10000; 0: none)")
    add("--spatial", action="store_true", help="statistics of the mixed_6 map too, for sFID")
    add_device_argument(parser)
    add("--overwrite", action="store_true", help="replace an existing output")
    add_network_options(parser, required=False)
    arguments = parser.parse_args()
    try:
        if arguments.show:
            show(arguments.pictures)
            return
        if arguments.output is None or arguments.protocol is None:
            parser.error("give --protocol and --output")
        if arguments.output.exists() and not arguments.overwrite:
            parser.error(f"{arguments.output} exists: choose another --output, or add --overwrite")
        pictures = open_pictures(
            arguments.pictures,
            image_size=arguments.image_size,
            crop=arguments.crop,
            split=arguments.split,
            image_column=arguments.image_column,
            limit=arguments.num_images,
        )
        accelerator, workers = start_workers(arguments.device)
        network = asked_network(arguments, accelerator.device, spatial=arguments.spatial)
        work = arguments.output.with_name(f"{arguments.output.name}.in_progress")
        count = arguments.num_features
        reference = make_reference(pictures, network, work, num_features=count, workers=workers, command=sys.argv)
        workers.wait()
        if workers.is_main:
            save_reference(arguments.output, reference)
            discard(work)
            print(f"{len(pictures):,} pictures under {arguments.protocol!r}: {arguments.output}")
        accelerator.end_training()
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))


def show(path: str) -> None:
    """Print the record of a file of statistics."""
    reference = load_reference(path)
    kept = 0 if reference.features is None else len(reference.features)
    print(f"{reference.file}: sha256 {reference.sha256}")
    print(f"{len(reference.mean)} dimensions, {kept} features kept, sFID statistics: {'yes' if reference.spatial else 'no'}")
    print(json.dumps(dict(reference.record), indent=2) if reference.is_stated else "it does not say which protocol made it")


if __name__ == "__main__":
    main()
