"""Free the disk of what runs no longer need: python tools/clean.py RUN [RUN ...] [--delete]

Without --delete nothing is removed: it prints what would go and how many bytes that gives back. Older checkpoints, half-written
leftovers and profiler traces go. What a configuration, provenance, export, result or report in these runs, beside them or below
--references names stays, and the newest complete checkpoint always does. A run that is going on is not touched.
"""

import argparse
from pathlib import Path

from drift_accel.foundation.cleaning import find_leftovers, remove
from drift_accel.foundation.run_folder import RunFolder


def main() -> None:
    """Parse, find, print, delete on request."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )  # fmt: skip
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--delete", action="store_true", help="remove what is listed (default: only list it)")
    parser.add_argument("--keep_last", type=int, default=1, help="newest complete checkpoints that stay (default: 1)")
    parser.add_argument("--references", type=Path, nargs="*", default=[], help="more folders whose files may name checkpoints")
    arguments = parser.parse_args()
    for path in arguments.runs:
        if not RunFolder(path).config_path.is_file():
            parser.error(f"{path} is no run: it has no config.yaml")
    total = 0
    for path in arguments.runs:
        run = RunFolder(path)
        try:
            run.lock()
        except ValueError:
            print(f"{path}: is running, left alone")
            continue
        try:
            total += clean(run, arguments)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        finally:
            run.unlock()
    print(f"{total:,} bytes {'given back' if arguments.delete else 'would be given back: add --delete'}")


def clean(run: RunFolder, arguments: argparse.Namespace) -> int:
    """List one run's leftovers, and remove them on request; their bytes."""
    others = [run.path.resolve().parent, *arguments.references]
    leftovers, protected = find_leftovers(run, keep_last=arguments.keep_last, others=others)
    for leftover in leftovers:
        print(f"{leftover.num_bytes:>16,}  {leftover.path}  ({leftover.reason})")
    for path, reason in protected.items():
        print(f"{'stays':>16}  {path}  (named by {reason})")
    if arguments.delete:
        remove(leftovers, run)
    return sum(leftover.num_bytes for leftover in leftovers)


if __name__ == "__main__":
    main()
