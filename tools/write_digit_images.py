"""Write scikit-learn's digits as coloured 64x64 PNGs in class folders: python tools/write_digit_images.py OUT

OUT/0 to OUT/9 hold one picture a digit, named by its row. A second call with the same arguments writes nothing.
"""

import argparse
from pathlib import Path

from drift_accel.data.digit_images import write_digit_images
from drift_accel.data.digits import SPLITS


def main() -> None:
    """Parse, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write; it appears when all pictures are in it")
    parser.add_argument("--split", choices=SPLITS, default="train", help="which digits: 1,197 to train or 600 to test")
    parser.add_argument("--seed", type=int, default=0, help="seed of the colours")
    arguments = parser.parse_args()
    try:
        written = write_digit_images(arguments.out, arguments.split, arguments.seed)
    except (ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    print(f"{arguments.out}: {written} pictures written" if written else f"{arguments.out}: complete already, nothing written")


if __name__ == "__main__":
    main()
