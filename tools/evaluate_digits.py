"""Judge a generator of the handwritten digits: python tools/evaluate_digits.py RUN

Draws 1,000 digits with the exported average's weights and writes into RUN: samples.png (labelled grid), training_curve.png
(drift_sqnorm by temperature) and evaluation/digits.json (the table that is printed).
"""

import argparse
import io
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from drift_accel.evaluation.digits import NUM_NEIGHBOURS, judge_digits_run
from drift_accel.foundation.provenance import collect_provenance
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.storage import atomic_write_bytes, atomic_write_json
from drift_accel.sampling import save_class_grid

CURVES = "drift_sqnorm_"


def main() -> None:
    """Parse, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run of drift_accel.train on the digits")
    parser.add_argument("--export", default=None, help="name of the export to draw with (default: the first one)")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="guidance of the samples, at least 1")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    arguments = parser.parse_args()
    if not 1 <= arguments.guidance_scale < float("inf"):
        parser.error(f"--guidance_scale is {arguments.guidance_scale}: guidance starts at 1 (no guidance)")

    run = RunFolder(arguments.run)
    try:
        images, labels, record = judge_digits_run(
            run, export=arguments.export, guidance_scale=arguments.guidance_scale, seed=arguments.seed
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    samples_path, curve_path = run.path / "samples.png", run.path / "training_curve.png"
    save_class_grid(images, labels, samples_path, columns=10)
    save_training_curve(run.read_metrics(), curve_path)
    results_path = run.evaluation_path("digits")
    atomic_write_json(results_path, {**record, "provenance": collect_provenance(command=sys.argv)})
    print_table(record)
    for name, path in (
        ("samples", samples_path),
        ("training curve", curve_path),
        ("results", results_path),
        ("model", run.export_dir(record["export"])),
    ):
        print(f"{name + ':':16}{path}")


def print_table(results: dict[str, float | int]) -> None:
    """The numbers beside those of real digits."""
    print(f"\n{'':42}{'generated':>10}{'real':>10}")
    for name, text in (
        ("class_accuracy", f"class accuracy ({NUM_NEIGHBOURS} nearest neighbours)"),
        ("frechet", f"Frechet distance ({results['num_compared']} against test)"),
        ("precision", "precision"),
        ("recall", "recall"),
    ):
        print(f"{text:42}{results[name]:10.3f}{results[name + '_of_real']:10.3f}")
    print()


def save_training_curve(metrics: list[dict], path: Path) -> None:
    """Draw drift_sqnorm over steps, one line a temperature: the loss itself is flat by construction."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    tags = sorted({tag for record in metrics for tag in record if tag.startswith(CURVES) and "/" not in tag})
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(tags)))
    for tag, colour in zip(tags, colours, strict=True):
        points = [(record["step"], record[tag]) for record in metrics if record.get(tag) is not None]
        axes.plot(*zip(*points, strict=True), color=colour, label=f"temperature {tag.removeprefix(CURVES)}")
    axes.set(xlabel="step", ylabel="drift_sqnorm (mean over feature keys)", yscale="log")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    atomic_write_bytes(path, picture.getvalue())


if __name__ == "__main__":
    main()
