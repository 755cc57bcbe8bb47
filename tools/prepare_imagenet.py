"""ImageNet folders from its archives: python tools/prepare_imagenet.py --archives DIR --output_dir OUT

Writes OUT/train/<wnid>/*.JPEG, OUT/val/<wnid>/*.JPEG, OUT/classes.json (index, wnid, names), manifest.json and
provenance.json. Archives are read where they are, never copied or unpacked elsewhere. Interrupt it whenever you like: the
same command goes on, and on finished output it verifies counts and sizes and does nothing. --verify reads every picture again and
compares it with the manifest; the archives are not needed for that.
"""

import argparse
import os
import sys
from pathlib import Path

from drift_accel.data.archive_listing import OFFICIAL, SPLITS
from drift_accel.data.archive_verification import verify_images
from drift_accel.data.imagenet_archives import PrepareConfig, prepare_imagenet
from drift_accel.foundation.provenance import collect_provenance
from drift_accel.foundation.storage import atomic_write_json

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
    parser.add_argument("--verify", action="store_true", help="only compare what is there with its manifest, picture by picture")
    parser.add_argument("--report", type=Path, help="with --verify: write the findings there as JSON")
    arguments = vars(parser.parse_args())
    only_verify, report = arguments.pop("verify"), arguments.pop("report")
    if report is not None and not only_verify:
        parser.error("--report is written with --verify alone")
    if only_verify:
        raise SystemExit(verify(arguments["output_dir"], report))
    try:
        config = PrepareConfig(**arguments)
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


def verify(output_dir: Path, report: Path | None) -> int:
    """Read all pictures, print what is wrong; 1 if anything is."""
    try:
        found = verify_images(output_dir)
        if report is not None:
            atomic_write_json(report, {**found, "provenance": collect_provenance(command=sys.argv)})
    except (ValueError, OSError) as error:
        raise SystemExit(f"prepare_imagenet: {error}") from None
    for problem in found["problems"]:
        print(f"error: {problem}\n  what to do: remove that folder, then make it again from the archives without --verify")
    for split, counts in found["splits"].items():
        print(f"{split}: {counts['images']:,} pictures of {counts['classes']:,} classes read")
    print(f"{output_dir}: {'good' if found['is_good'] else 'NOT good'}")
    return 0 if found["is_good"] else 1


if __name__ == "__main__":
    main()
