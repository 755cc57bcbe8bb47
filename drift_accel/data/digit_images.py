"""Coloured 64x64 pictures of scikit-learn's digits: real handwriting in three channels, without a download.

A digit's 8x8 grey values become a pen's stroke on paper, and every picture has its own two colours.
"""

import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from drift_accel.data.digits import load_digits
from drift_accel.foundation.random_streams import random_stream
from drift_accel.foundation.storage import atomic_write_json, committed_folder, verify_folder

IMAGE_SIZE = 64
RECORD_NAME = "digit_images.json"
DIGIT_SIZE = 8
# Strokes may touch the border of the 8x8 image: around it there is paper, so that none is cut.
PAPER_MARGIN = 1
# Ink begins and is full at these brightnesses of the enlarged image; between them lies the stroke's soft edge.
INK_BEGINS, INK_IS_FULL = 0.3, 0.65
LUMA_WEIGHTS = np.array([0.299, 0.587, 0.114])  # Rec. 601, of the values as they are stored
DARK_LUMA, BRIGHT_LUMA = (0.1, 0.35), (0.7, 0.95)
COLOUR_STREAM = "digit_colours"  # part of the meaning of a seed: renaming it changes every picture


def coloured_digit(image: np.ndarray, seed: int, index: int) -> np.ndarray:
    """One digit [8, 8] in [-1, 1] as a picture, uint8 [64, 64, 3], in the two colours that belong to (seed, index).

    Raises ValueError for another shape or values out of range, and as `random_stream` does.
    """
    return to_pixels(stroke_cover(image), draw_colours(random_stream(seed, COLOUR_STREAM, index)))


def coloured_digits(split: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """All digits of a split ("train" or "test") as pictures, uint8 [rows, 64, 64, 3], and their labels, int64 [rows].

    The test rows go on counting behind the train rows, so no two pictures of one seed share their colours' draw.
    Raises as `load_digits` and `random_stream` do.
    """
    digits = load_digits(split)
    first = 0 if split == "train" else len(load_digits("train"))
    pictures = [coloured_digit(image, seed, first + row) for row, image in enumerate(digits.images[:, 0])]
    return np.stack(pictures), digits.labels


def write_digit_images(folder: str | os.PathLike, split: str = "train", seed: int = 0) -> int:
    """Write the digits of a split as `folder`/CLASS/ROW.png, CLASS from 0 to 9; returns how many pictures were written.

    The folder appears complete or not at all, with COMPLETE.json (sha256 of every file) and digit_images.json (split and
    seed). Where it is complete already nothing is written and 0 returned; where files are missing or changed it is replaced.
    A killed call leaves a hidden folder beside it, which nothing reads.
    Raises ValueError for another split, and for a folder that holds something else or another split or seed.
    """
    folder = Path(folder)
    record = {"split": split, "seed": seed}
    if _holds_other_things(folder, record):
        raise ValueError(f"{folder} holds something else than the {split} digits of seed {seed}: choose or make an empty folder")
    if not verify_folder(folder):
        return 0
    pictures, labels = coloured_digits(split, seed)
    with committed_folder(folder, replace=True) as partial:
        for label in np.unique(labels):
            (partial / str(label)).mkdir()
        for row, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            Image.fromarray(picture).save(partial / str(label) / f"{row:05d}.png")
        atomic_write_json(partial / RECORD_NAME, record)
    return len(pictures)


def stroke_cover(image: np.ndarray) -> np.ndarray:
    """How much of each pixel the ink covers, float32 [64, 64] in [0, 1], for a digit [8, 8] in [-1, 1].

    Raises ValueError for another shape or values out of range.
    """
    image = np.asarray(image, dtype=np.float32)
    if image.shape != (DIGIT_SIZE, DIGIT_SIZE):
        raise ValueError(f"the digit is {image.shape}: wanted ({DIGIT_SIZE}, {DIGIT_SIZE})")
    if not (np.abs(image) <= 1).all():
        raise ValueError(f"the digit reaches from {image.min()} to {image.max()}: wanted values in [-1, 1]")
    padded = np.pad((image + 1) / 2, PAPER_MARGIN)
    enlarged = np.asarray(Image.fromarray(padded).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
    # Enlarging alone gives a blur; a steep smooth step at half the brightness gives the outline of a stroke.
    cover = np.clip((enlarged - INK_BEGINS) / (INK_IS_FULL - INK_BEGINS), 0, 1)
    return cover * cover * (3 - 2 * cover)


def draw_colours(stream: np.random.Generator) -> np.ndarray:
    """The colours of ink and paper, float64 [2, 3] in [0, 1], drawn from `stream`.

    One is dark and the other bright, either way round: their lumas (Rec. 601) lie at least 0.35 apart.
    """
    colours = stream.random((2, 3))
    lumas = np.array([stream.uniform(*DARK_LUMA), stream.uniform(*BRIGHT_LUMA)])
    if stream.random() < 0.5:
        lumas = lumas[::-1]
    return np.stack([_with_luma(colour, luma) for colour, luma in zip(colours, lumas, strict=True)])


def to_pixels(cover: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Ink over paper, uint8 [H, W, 3], from a cover [H, W] in [0, 1] and the colours [2, 3] of ink and paper."""
    ink, paper = colours
    return np.round(255 * (paper + cover[..., None] * (ink - paper))).astype(np.uint8)


def _with_luma(colour: np.ndarray, luma: float) -> np.ndarray:
    """The colour darkened towards black or bleached towards white until it has this luma."""
    own = colour @ LUMA_WEIGHTS
    return colour * (luma / own) if own > luma else 1 - (1 - colour) * ((1 - luma) / (1 - own))


def _holds_other_things(folder: Path, record: dict) -> bool:
    """Whether there is something at `folder` that is neither empty nor a folder of pictures with this record."""
    if not folder.exists():
        return False
    if folder.is_dir() and not any(folder.iterdir()):
        return False
    try:
        return json.loads((folder / RECORD_NAME).read_bytes()) != record
    except (OSError, ValueError):
        return True
