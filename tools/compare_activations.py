"""Generated activations against real ones: python tools/compare_activations.py REAL GENERATED [GENERATED ...] --output_dir OUT

REAL and GENERATED are sets of tools/extract_activations.py: FOLDER/activations/NAME, or FOLDER where it holds one set alone;
several generated sets are ordered by every measure. OUT gets comparison.html (scatter with pictures, tables, histograms; opens
offline), comparison.json, measures.csv, classes.csv, histograms.csv, real_samples.csv, generated_samples.csv, plots/ and the
fitted embeddings. Everything is written at once: OUT is whole or not there.
"""

import argparse
import sys
from pathlib import Path

from drift_accel.analysis.comparison.compare import ComparisonConfig, compare_sets
from drift_accel.analysis.comparison.embedding import METHODS, available_methods, load_embedding
from drift_accel.analysis.comparison.files import embedding_name, write_tables
from drift_accel.analysis.comparison.layer_space import REDUCTIONS, sample_set
from drift_accel.analysis.comparison.page import comparison_page
from drift_accel.analysis.comparison.plots import plots
from drift_accel.analysis.comparison.scatter_data import MAX_POINTS, check_shown
from drift_accel.analysis.comparison.set_paths import open_sets
from drift_accel.foundation.devices import add_device_argument
from drift_accel.foundation.storage import committed_folder


def main() -> None:
    """Parse, compare, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("real", type=Path, help="the real set: FOLDER/activations/NAME")
    add("generated", type=Path, nargs="+", help="generated sets, or other real ones to hold against it")
    add("--output_dir", type=Path, required=True, help="folder for everything that is found")
    add("--overwrite", action="store_true", help="replace an existing --output_dir")
    add("--layers", help="comma-separated layers to compare (default: all that every set has)")
    add("--main_layer", help="layer of the scatter and of the samples' scores (default: the last one)")
    add("--k", type=int, default=5, help="neighbours that a sample's ball reaches to (default: 5)")
    add(
        "--space",
        choices=REDUCTIONS,
        default="auto",
        help="how wide layers are measured (default: auto)",
    )
    add("--components", type=int, default=256, help="principal components of --space pca (default: 256)")
    add("--groups", type=int, default=8, help="groups of channels with a histogram each (default: 8)")
    add(
        "--embeddings",
        nargs="*",
        choices=METHODS,
        help="of the main layer (default: those whose library is installed)",
    )
    add("--embeddings_from", type=Path, help="an earlier --output_dir: use its fitted embeddings, so that pictures are alike")
    add("--max_samples", type=int, help="only so many samples of a set, spread over its classes (default: all)")
    add("--max_points", type=int, default=MAX_POINTS, help=f"samples in the page's scatter (default: {MAX_POINTS})")
    add("--thumbnail", type=int, default=32, help="largest side of the page's pictures in pixels (default: 32)")
    add("--seed", type=int, default=0, help="of embeddings and of every choice of samples (default: 0)")
    add_device_argument(parser)
    arguments = parser.parse_args()
    try:
        compare(arguments)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))


def compare(arguments: argparse.Namespace) -> None:
    """Everything after the command line. Raises ValueError, OSError and ImportError with what is wrong."""
    output = arguments.output_dir
    if output.exists() and not arguments.overwrite:
        raise ValueError(f"{output} exists: choose another --output_dir, or add --overwrite")
    embeddings = arguments.embeddings
    if embeddings is None:
        embeddings = available_methods()
        for method in set(METHODS) - set(embeddings):
            print(f"{method} is left out: its library is not installed (pip install 'drift_accel[analysis]')")
    config = ComparisonConfig(
        layers=None if arguments.layers is None else tuple(name.strip() for name in arguments.layers.split(",")),
        main_layer=arguments.main_layer,
        k=arguments.k,
        reduction=arguments.space,
        components=arguments.components,
        embeddings=tuple(embeddings),
        groups=arguments.groups,
        seed=arguments.seed,
        device=arguments.device,
    )
    check_shown(arguments.max_points, 1 + len(arguments.generated), config.k)
    opened = open_sets([arguments.real, *arguments.generated])
    sets = [sample_set(source, title, arguments.max_samples, arguments.seed) for title, source in opened.items()]
    saved = {}
    if arguments.embeddings_from is not None:
        saved = {method: load_embedding(arguments.embeddings_from / embedding_name(method)) for method in config.embeddings}
    comparison = compare_sets(sets[0], sets[1:], config, saved=saved)
    with committed_folder(output, replace=arguments.overwrite) as folder:
        write_tables(comparison, folder, sys.argv)
        (folder / "plots").mkdir()
        for name, content in plots(comparison):
            (folder / "plots" / name).write_bytes(content)
        title = f"{', '.join(one.title for one in sets[1:])} against {sets[0].title}"
        page = comparison_page(comparison, title=title, max_points=arguments.max_points, thumbnail=arguments.thumbnail)
        (folder / "comparison.html").write_text(page, encoding="utf-8")
    print_summary(comparison)
    print(f"{output / 'comparison.html'}: {len(page.encode()) / 1e6:.1f} MB")


def print_summary(comparison) -> None:
    """The main layer's numbers, a line a set, and the missing classes by name."""
    names = ("frechet", "kernel", "precision", "recall", "density", "coverage", "missing_classes")
    print(f"{comparison.main.layer}: {comparison.main.space}")
    width = max(len(found.title) for found in comparison.main_sets)
    print(f"  {'':{width}}" + "".join(f"{name.replace('_', ' '):>17}" for name in names))
    for found in comparison.main_sets:
        shown = ("-" if found.values[name] is None else f"{found.values[name]:.4g}" for name in names)
        print(f"  {found.title:{width}}" + "".join(f"{text:>17}" for text in shown))
    for found in comparison.main_sets:
        for state in ("absent", "uncovered", "collapsed"):
            classes = [one.name for one in found.classes if one.state == state]
            if classes:
                more = f" and {len(classes) - 20} more" if len(classes) > 20 else ""
                print(f"  {found.title}: {state}: {', '.join(classes[:20])}{more}")
    for note in comparison.notes:
        print(f"  note: {note}")


if __name__ == "__main__":
    main()
