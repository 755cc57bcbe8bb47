"""A set of activations in the other file format: python tools/convert_activations.py FOLDER SET --output_dir OUT

FOLDER holds activations/SET, images/SET and metadata/SET, as tools/extract_activations.py writes them. Arrow becomes .npz with
.json, and the other way round; numbers, samples and pictures stay. A killed command, given again, goes on where it was.
"""

import argparse
import sys
from pathlib import Path

from drift_accel.analysis.activations.batches import STORAGES
from drift_accel.analysis.activations.conversion import convert_set, other_storage
from drift_accel.analysis.activations.store import ActivationSet


def parse_arguments() -> argparse.Namespace:
    """The command line. Wrong values end the process with one message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, help="folder with activations/, images/ and metadata/")
    add("name", help="name of the set")
    add("--output_dir", type=Path, required=True, help="folder of the new set, such as FOLDER itself with another --new_name")
    add("--new_name", help="name of the new set (default: that of the old one)")
    add("--storage", choices=STORAGES, help="format of the new set (default: the one that the old one is not in)")
    add("--file_samples", type=int, help="samples a file (default: 1024 of arrow, 64 of npz)")
    add("--overwrite", action="store_true", help="replace a set of other settings")
    return parser.parse_args()


def main() -> None:
    """Parse, convert, say where the set is."""
    arguments = parse_arguments()
    try:
        if arguments.file_samples is not None and arguments.file_samples < 1:
            raise ValueError(f"--file_samples is {arguments.file_samples}: give at least 1")
        source = ActivationSet.open(arguments.folder, arguments.name)
        info = convert_set(
            source,
            arguments.output_dir,
            arguments.new_name or arguments.name,
            arguments.storage or other_storage(source),
            batch_size=arguments.file_samples,
            overwrite=arguments.overwrite,
            command=sys.argv,
        )
        print(f"{len(source):,} samples: {info}")
    except (ValueError, OSError) as error:
        raise SystemExit(f"convert_activations: {error}") from None


if __name__ == "__main__":
    main()
