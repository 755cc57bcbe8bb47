"""scikit-learn's bundled handwritten digits: 1,797 real 8x8 images, so that a first run needs no download."""

import numpy as np

from drift_accel.data.labelled_images import LabelledImages
from drift_accel.foundation.random_streams import random_stream

NUM_TEST = 600
BRIGHTEST = 16.0  # pixel values are counts from 0 to 16
SPLITS = ("train", "test")


def load_digits(split: str) -> LabelledImages:
    """The digits [rows,1,8,8] in [-1, 1]: "train" 1,197 rows or "test" 600 rows, the same ones always.

    The split is a fixed shuffle, because the file lists its writers one after the other.
    Raises ValueError for another split, ModuleNotFoundError where scikit-learn is missing.
    """
    if split not in SPLITS:
        raise ValueError(f"digits split is {split!r}: choose one of {', '.join(SPLITS)}")
    try:
        from sklearn.datasets import load_digits as load
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the digits come with scikit-learn: pip install 'drift_accel[quickstart]'") from error
    bundle = load()
    order = random_stream(0, "digits/split", 0).permutation(len(bundle.target))
    rows = np.sort(order[:NUM_TEST] if split == "test" else order[NUM_TEST:])
    images = bundle.images[rows][:, None] * (2 / BRIGHTEST) - 1
    return LabelledImages(images, bundle.target[rows], [str(digit) for digit in range(10)])
