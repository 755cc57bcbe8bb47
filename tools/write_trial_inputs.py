"""What a trial of launch_scripts/imagenet256.sh starts from: python tools/write_trial_inputs.py OUT

OUT/archives holds scikit-learn's digits in the layout of ImageNet's three archives, OUT/network a small encoder of RANDOM weights
in the place of a feature network: numbers measured with it mean nothing. A second call writes nothing.
"""

import argparse
from pathlib import Path

from drift_accel.data.digit_archives import write_digit_archives
from drift_accel.data.digit_images import IMAGE_SIZE
from drift_accel.foundation.storage import committed_folder

WIDTH = 8


def main() -> None:
    """Parse, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of both")
    parser.add_argument("--per_class", type=int, default=40, help="training pictures of each of the ten classes (default: 40)")
    parser.add_argument("--val_per_class", type=int, default=10, help="held-out pictures of each class (default: 10)")
    arguments = parser.parse_args()
    archives, network = arguments.out / "archives", arguments.out / "network"
    try:
        written = write_digit_archives(archives, per_class=arguments.per_class, val_per_class=arguments.val_per_class)
        if not network.exists():
            write_network(network)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        parser.error(str(error))
    print(f"{archives}: {'written' if written else 'there already'}\n{network}: an encoder of random weights, for a trial alone")


def write_network(folder: Path) -> None:
    """A masked autoencoder of 64x64 pictures with the weights that it has before training, always the same."""
    from drift_accel.models import MaskedAutoencoder

    settings = {"in_channels": 3, "input_size": IMAGE_SIZE, "input_patch_size": 4, "num_classes": 10}
    with committed_folder(folder) as partial:
        MaskedAutoencoder(width=WIDTH, blocks=(1, 1, 1, 1), **settings).save_pretrained(partial)


if __name__ == "__main__":
    main()
