"""One self-contained HTML page of a run: python tools/report.py RUN

Curves, sample grids over time, results with their protocols, evaluation pictures, configuration, provenance. It opens offline.
"""

import argparse
from pathlib import Path

from drift_accel.analysis.report import write_report
from drift_accel.foundation.run_folder import RunFolder


def main() -> None:
    """Parse, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--output", type=Path, help="the page (default: RUN/report.html, replaced)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    arguments = parser.parse_args()
    if arguments.output is not None and arguments.output.exists() and not arguments.overwrite:
        parser.error(f"{arguments.output} exists: choose another --output, or add --overwrite")
    output = arguments.output or arguments.run / "report.html"
    try:
        write_report(RunFolder(arguments.run), output)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
