"""ImageNet folders from its archives: python tools/prepare_imagenet.py --archives DIR --output_dir OUT

Writes OUT/train/<wnid>/*.JPEG, OUT/val/<wnid>/*.JPEG, OUT/classes.json (index, wnid, names), manifest.json and
provenance.json. Archives are read where they are, never copied or unpacked elsewhere. Interrupt it whenever you like: the
same command goes on, and on finished output it verifies counts and sizes and does nothing.
"""

import argparse
import os
import sys
from pathlib import Path

from drift_accel.data.archive_listing import OFFICIAL, SPLITS
from drift_accel.data.imagenet_archives import PrepareConfig, prepare_imagenet

MAX_DEFAULT_WORKERS = 8


def main() -> None:
    """Parse, prepare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(archive.name for archive in OFFICIAL.values())
    parser.add_argument("--archives", type=Path, help=f"folder with {names}")
    parser.add_argument("--train_archive", type=Path, help="path of the train archive, such as data/ILSVRC2012_img_train.tar.1")
    parser.add_argument("--val_archive", type=Path, help="path of the validation archive")
    parser.add_argument("--devkit_archive", type=Path, help="path of the devkit of tasks 1 and 2 (needed for every split)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write; an unfinished one is gone on with")
    parser.add_argument("--split", choices=(*SPLITS, "all"), default="all", help="what to prepare (default: all)")
    parser.add_argument("--skip_md5", action="store_true", help="do not compare the archives with the official checksums")
    parser.add_argument(
        "--expect", choices=("imagenet", "none"), default="imagenet",
        help="imagenet: refuse any other count than 1,281,167 and 50,000 pictures of 1,000 classes (default)",
    )  # fmt: skip
    default_workers = min(MAX_DEFAULT_WORKERS, os.cpu_count() or 1)
    parser.add_argument(
        "--num_workers", type=int, default=default_workers, help=f"processes that extract (here by default {default_workers})"
    )
    try:
        config = PrepareConfig(**vars(parser.parse_args()))
    except ValueError as error:
        parser.error(str(error))
    try:
        summaries = prepare_imagenet(config, command=sys.argv)
    except (ValueError, OSError) as error:
        raise SystemExit(f"prepare_imagenet: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("prepare_imagenet: interrupted; the same command goes on") from None
    for split, summary in summaries.items():
        work = f"{summary.extracted:,} classes extracted now" if summary.extracted else "verified, nothing to do"
        print(f"{split}: {summary.images:,} pictures of {summary.classes:,} classes, {summary.bytes / 1e9:.3f} GB; {work}")


if __name__ == "__main__":
    main()
