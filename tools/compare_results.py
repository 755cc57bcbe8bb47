"""Results side by side: python tools/compare_results.py RUN/evaluation/A.json B.json ...

Refused, with every reason, where two were made by other protocols, networks, references, settings or numbers of pictures. A
folder stands for all results in it.
"""

import argparse
from pathlib import Path

from drift_accel.evaluation.results import comparison_table, is_result, load_result


def main() -> None:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="result files, or folders of them")
    arguments = parser.parse_args()
    paths = []
    for path in arguments.results:
        found = sorted(filter(is_result, path.glob("*.json"))) if path.is_dir() else [path]
        if not found:
            parser.error(f"{path} holds no results")
        paths += found
    try:
        print(comparison_table([(path.stem, load_result(path)) for path in paths]))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
