"""Judge a generator of the handwritten digits: python tools/evaluate_digits.py RUN

Draws 1,000 digits with the exported average's weights and writes into RUN: samples.png (labelled grid), training_curve.png
(drift_sqnorm by temperature) and evaluation/digits.json (the table that is printed).
"""

import argparse
import io
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.neighbors import KNeighborsClassifier

from drift_accel.data.digits import load_digits
from drift_accel.evaluation import frechet_distance, precision_recall
from drift_accel.evaluation.frechet import gaussian_statistics
from drift_accel.foundation.provenance import collect_provenance
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.storage import atomic_write_bytes, atomic_write_json, sha256_file
from drift_accel.models import Generator
from drift_accel.models.exports import load_export
from drift_accel.sampling import balanced_labels, generate, save_class_grid

NUM_GENERATED = 1000
NUM_NEIGHBOURS = 5
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
        folder = run.find_export(arguments.export)
        generator = load_export(folder, Generator, "export")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    labels = balanced_labels(NUM_GENERATED, 10)
    images = generate(generator, labels, guidance_scale=arguments.guidance_scale, seed=arguments.seed).clamp(-1, 1)
    results = evaluate(images, labels)

    samples_path, curve_path = run.path / "samples.png", run.path / "training_curve.png"
    save_class_grid(images, labels, samples_path, columns=10)
    save_training_curve(run.read_metrics(), curve_path)
    settings = {"export": folder.name, "guidance_scale": arguments.guidance_scale, "seed": arguments.seed}
    weights = sha256_file(next(folder.glob("*.safetensors")))
    record = {"protocol": "digits pixels/16", **results, **settings, "weights_sha256": weights}
    results_path = run.evaluation_path("digits")
    atomic_write_json(results_path, {**record, "provenance": collect_provenance(command=sys.argv)})
    print_table(results)
    print(
        f"samples:        {samples_path}\ntraining curve: {curve_path}\nresults:        {results_path}\nmodel:          {folder}"
    )


def evaluate(images: torch.Tensor, labels: torch.Tensor) -> dict[str, float | int]:
    """Class accuracy of all generated digits, and distances to the test digits with as many on both sides."""
    train, test = load_digits("train"), load_digits("test")
    generated = pixels(images.numpy())
    real_train, real_test = pixels(train.images), pixels(test.images)
    classifier = KNeighborsClassifier(NUM_NEIGHBOURS).fit(real_train, train.labels)
    count = len(real_test)
    precision, recall = precision_recall(real_test, generated[:count])
    real_precision, real_recall = precision_recall(real_test, real_train[:count])
    return {
        "num_generated": len(generated),
        "class_accuracy": float((classifier.predict(generated) == labels.numpy()).mean()),
        "class_accuracy_of_real": float(classifier.score(real_test, test.labels)),
        "num_compared": count,
        "frechet": frechet(real_test, generated[:count]),
        "frechet_of_real": frechet(real_test, real_train[:count]),
        "precision": precision,
        "precision_of_real": real_precision,
        "recall": recall,
        "recall_of_real": real_recall,
    }


def pixels(images: np.ndarray) -> np.ndarray:
    """Images [N,1,8,8] in [-1, 1] as float64 [N,64] in [0, 1]: the file's values over 16."""
    return (images.reshape(len(images), -1).astype(np.float64) + 1) / 2


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """Frechet distance of the Gaussian fits of two sets of pixels."""
    with warnings.catch_warnings():
        # Some border pixels are blank in every digit: the covariance is singular by nature, not for want of samples.
        warnings.filterwarnings("ignore", "covariance_. is singular", RuntimeWarning)
        return frechet_distance(*gaussian_statistics(first), *gaussian_statistics(second))


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
