"""The digits protocol: generated handwritten digits, judged in their own pixels, beside real ones in their place."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from drift_accel.data.digits import load_digits
from drift_accel.evaluation.frechet import frechet_distance, gaussian_statistics
from drift_accel.evaluation.precision_recall import precision_recall
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.storage import sha256_file
from drift_accel.models.exports import load_export
from drift_accel.models.generator import Generator
from drift_accel.sampling import balanced_labels, generate

PROTOCOL = "digits pixels/16"
NUM_GENERATED = 1000
NUM_NEIGHBOURS = 5
METRICS = ("class_accuracy", "frechet", "precision", "recall")
REAL_SUFFIX = "_of_real"


def judge_digits_run(
    run: RunFolder, *, export: str | None = None, guidance_scale: float = 1.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Draw 1,000 digits with an export of a run and judge them: (images [1000,1,8,8], labels [1000], record).

    `export` None: the first by name. The record holds `judge_digits` and what made the numbers.
    Raises FileNotFoundError and ValueError for a run without that export, and for one that makes other images than these.
    """
    folder = run.find_export(export)
    generator = load_export(folder, Generator, "export")
    config = generator.config
    if (config.in_channels, config.input_size) != (1, 8) or config.num_classes < 10:
        made = f"{config.in_channels}x{config.input_size}x{config.input_size} images of {config.num_classes} classes"
        raise ValueError(f"{folder} makes {made}: the digits protocol judges 1x8x8 images of 10 classes")
    labels = balanced_labels(NUM_GENERATED, 10)
    images = generate(generator, labels, guidance_scale=guidance_scale, seed=seed).clamp(-1, 1)
    return images, labels, {"protocol": PROTOCOL, **judge_digits(images, labels), **identity(run, export, guidance_scale, seed)}


def identity(run: RunFolder, export: str | None, guidance_scale: float, seed: int) -> dict[str, Any]:
    """What a record says about the samples it judged. Raises as `RunFolder.find_export`."""
    folder = run.find_export(export)
    weights = sha256_file(next(folder.glob("*.safetensors")))
    return {"export": folder.name, "guidance_scale": guidance_scale, "seed": seed, "weights_sha256": weights}


def judge_digits(images: torch.Tensor, labels: torch.Tensor) -> dict[str, float | int]:
    """Class accuracy of all images [N,1,8,8], and distances to the test digits with as many on both sides.

    Names that end in `_of_real` are of training digits in the place of the generated ones.
    """
    from sklearn.neighbors import KNeighborsClassifier  # an extra

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
        "frechet": pixel_frechet(real_test, generated[:count]),
        "frechet_of_real": pixel_frechet(real_test, real_train[:count]),
        "precision": precision,
        "precision_of_real": real_precision,
        "recall": recall,
        "recall_of_real": real_recall,
    }


def real_values(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of real digits that a record carries, by metric."""
    return {name: record[name + REAL_SUFFIX] for name in METRICS}


def pixels(images: np.ndarray) -> np.ndarray:
    """Images [N,1,8,8] in [-1, 1] as float64 [N,64] in [0, 1]: the file's values over 16."""
    return (images.reshape(len(images), -1).astype(np.float64) + 1) / 2


def pixel_frechet(first: np.ndarray, second: np.ndarray) -> float:
    """Frechet distance of the Gaussian fits of two sets of pixels [N,64]."""
    with warnings.catch_warnings():
        # Some border pixels are blank in every digit: the covariance is singular by nature, not for want of samples.
        warnings.filterwarnings("ignore", "covariance_. is singular", RuntimeWarning)
        return frechet_distance(*gaussian_statistics(first), *gaussian_statistics(second))
