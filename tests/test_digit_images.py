"""The digits as coloured pictures: same seed same picture, readable colours, a folder that is whole or absent."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from drift_accel.data import digit_images
from drift_accel.data.digit_images import coloured_digit, coloured_digits, draw_colours, stroke_cover, write_digit_images
from drift_accel.data.digits import load_digits
from drift_accel.data.labelled_images import LabelledImages
from drift_accel.foundation.random_streams import random_stream
from drift_accel.foundation.storage import verify_folder

TOOL = Path(__file__).parent.parent / "tools" / "write_digit_images.py"
FEW = 40


@pytest.fixture(scope="module")
def digits():
    return load_digits("train").images[:, 0]


@pytest.fixture
def few(monkeypatch):
    """Lets every split have only its first rows: what is written does not change, the number of pictures does."""
    parts = {split: load_digits(split) for split in ("train", "test")}
    parts = {split: LabelledImages(part.images[:FEW], part.labels[:FEW], "0123456789") for split, part in parts.items()}
    monkeypatch.setattr(digit_images, "load_digits", parts.__getitem__)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The pictures.


def test_a_picture_is_a_function_of_digit_seed_and_index(digits):
    picture = coloured_digit(digits[0], 3, 5)
    assert (picture.shape, picture.dtype) == ((64, 64, 3), np.uint8)
    np.random.seed(1)
    torch.manual_seed(1)
    assert np.array_equal(coloured_digit(digits[0], 3, 5), picture)
    for other in (coloured_digit(digits[1], 3, 5), coloured_digit(digits[0], 4, 5), coloured_digit(digits[0], 3, 6)):
        assert not np.array_equal(other, picture)
    # Pinned: other colours would make the bundled VAE's record that of other pictures.
    assert (picture[0, 0].tolist(), picture[32, 32].tolist()) == PINNED


PINNED = ([53, 39, 12], [243, 226, 233])


def test_ink_and_paper_differ_clearly_in_brightness():
    colours = np.stack([draw_colours(random_stream(0, digit_images.COLOUR_STREAM, index)) for index in range(2000)])
    assert colours.shape == (2000, 2, 3)
    assert colours.min() >= 0 and colours.max() <= 1
    lumas = colours @ digit_images.LUMA_WEIGHTS
    assert np.abs(lumas[:, 0] - lumas[:, 1]).min() >= 0.35 - 1e-9
    assert 0.45 < (lumas[:, 0] < lumas[:, 1]).mean() < 0.55, "as often dark ink on bright paper as the other way round"
    # Not only greys.
    assert (np.ptp(colours, axis=2) > 0.3).mean() > 0.2


def test_every_picture_holds_its_pure_ink_and_paper(digits):
    pictures, labels = coloured_digits("train", 0)
    assert pictures.shape == (1197, 64, 64, 3)
    assert np.array_equal(labels, load_digits("train").labels)
    for row in range(0, 1197, 10):
        ink, paper = np.round(255 * draw_colours(random_stream(0, digit_images.COLOUR_STREAM, row)))
        assert (pictures[row, 0, 0] == paper).all()
        assert (pictures[row] == ink).all(-1).any(), f"picture {row} has no pixel that is all ink"
        assert np.array_equal(pictures[row], coloured_digit(digits[row], 0, row))


def test_the_splits_draw_different_colours():
    train, test = coloured_digits("train", 0)[0], coloured_digits("test", 0)[0]
    assert len(test) == 600
    assert np.array_equal(test[0], coloured_digit(load_digits("test").images[0, 0], 0, 1197))
    assert (train[:600, 0, 0] != test[:, 0, 0]).any(-1).mean() > 0.99


def test_strokes_keep_the_shape_of_the_digit():
    # A classifier of the 8x8 originals hardly loses on the strokes, averaged back to 8x8.
    neighbours = pytest.importorskip("sklearn.neighbors")

    def shrunk(split):
        covers = np.stack([stroke_cover(image) for image in load_digits(split).images[:, 0]])
        return covers.reshape(len(covers), 8, 8, 8, 8).mean((2, 4)).reshape(len(covers), 64)

    classifier = neighbours.KNeighborsClassifier(5).fit(shrunk("train"), load_digits("train").labels)
    assert classifier.score(shrunk("test"), load_digits("test").labels) > 0.95


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((1, 8, 8)), r"the digit is \(1, 8, 8\): wanted \(8, 8\)"),
        (np.full((8, 8), 16.0), "the digit reaches from 16.0 to 16.0"),
        (np.full((8, 8), np.nan), "the digit reaches from nan"),
    ],
)
def test_what_is_no_digit_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        coloured_digit(image, 0, 0)


# The folder.


def test_the_folder_holds_every_digit_in_its_class(tmp_path):
    folder = tmp_path / "digits"
    assert write_digit_images(folder, "test", 2) == 600
    pictures, labels = coloured_digits("test", 2)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == list("0123456789")
    assert len(list(folder.glob("*/*.png"))) == 600
    for row in range(0, 600, 7):
        with Image.open(folder / str(labels[row]) / f"{row:05d}.png") as picture:
            assert picture.mode == "RGB"
            assert np.array_equal(np.asarray(picture), pictures[row])
    assert verify_folder(folder) == []
    assert json.loads((folder / "digit_images.json").read_text()) == {"split": "test", "seed": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_a_second_call_writes_nothing_and_damage_is_repaired(few, tmp_path):
    folder = tmp_path / "digits"
    assert write_digit_images(folder) == FEW
    before = content(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert write_digit_images(folder) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times
    picture = next(folder.glob("3/*.png"))
    for damage in (picture.unlink, lambda: picture.write_bytes(b""), (folder / "COMPLETE.json").unlink):
        damage()
        assert write_digit_images(folder) == FEW
        assert content(folder) == before


def test_a_killed_call_leaves_no_folder_of_that_name(few, tmp_path, monkeypatch):
    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(digit_images, "atomic_write_json", die)
        with pytest.raises(KeyboardInterrupt):
            write_digit_images(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []
    # What kill -9 leaves: a hidden folder, which is neither read nor in the way.
    (tmp_path / ".digits.partial-1-elsewhere/0").mkdir(parents=True)
    assert write_digit_images(tmp_path / "digits") == FEW


def test_a_folder_with_something_else_is_left_alone(few, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert write_digit_images(empty) == FEW
    for split, seed in (("test", 0), ("train", 1)):
        with pytest.raises(ValueError, match=f"holds something else than the {split} digits of seed {seed}"):
            write_digit_images(empty, split, seed)
    shutil.rmtree(empty / "0")
    other = tmp_path / "photos"
    other.mkdir()
    (other / "holiday.jpg").write_bytes(b"sea")
    with pytest.raises(ValueError, match="holds something else"):
        write_digit_images(other)
    assert content(other) == {"holiday.jpg": b"sea"}
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="holds something else"):
        write_digit_images(tmp_path / "file")


def test_another_split_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="digits split is 'validation': choose one of train, test"):
        write_digit_images(tmp_path / "digits", "validation")
    assert list(tmp_path.iterdir()) == []


def test_the_command(few, tmp_path, monkeypatch, capsys):
    specification = importlib.util.spec_from_file_location("write_digit_images_tool", TOOL)
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["write_digit_images.py", *map(str, arguments)])
        tool.main()
        return capsys.readouterr().out

    folder = tmp_path / "digits"
    assert run(folder, "--split", "test", "--seed", 5) == f"{folder}: {FEW} pictures written\n"
    assert json.loads((folder / "digit_images.json").read_text()) == {"split": "test", "seed": 5}
    assert run(folder, "--split", "test", "--seed", 5) == f"{folder}: complete already, nothing written\n"
    with pytest.raises(SystemExit):
        run(folder)
    assert "holds something else than the train digits of seed 0" in capsys.readouterr().err
