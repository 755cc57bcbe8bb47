"""The downsampled ImageNet: files by number, labels through its own order, pictures as they are, nothing assumed."""

import json

import numpy as np
import pytest
from tiny_models import CLASSES, write_encoder
from tiny_runs import run_tool

from drift_accel.analysis.activations.store import ActivationSet
from drift_accel.data.class_table import ClassEntry, ClassTable
from drift_accel.data.downsampled_imagenet import DownsampledImageNet, is_downsampled_imagenet, read_map

# The set's order of four classes is another one than that of their wnids.
MAP = "n03126707 1 crane\nn01440764 2 tench\nn02012849 3 wading_crane\nn01443537 4 goldfish\n"
SIDE = 4
TABLE = ClassTable([ClassEntry(index=i, wnid=key, names=(name,)) for i, (key, name) in enumerate(CLASSES)])


def write_files(folder, numbers=range(1, 12), rows: int = 3, compressed=False, first_label=1):
    """One file a number; a picture's red is its file's number, its green its row, its label runs on."""
    folder.mkdir(exist_ok=True)
    save = np.savez_compressed if compressed else np.savez
    for number in numbers:
        data = np.zeros((rows, 3, SIDE, SIDE), dtype=np.uint8)
        data[:, 0], data[:, 1] = number, np.arange(rows)[:, None, None]
        data[:, 2, 1, 2] = 200  # row 1, column 2
        labels = (number * rows + np.arange(rows)) % 4 + first_label
        save(folder / f"train_data_batch_{number}.npz", data=data.reshape(rows, -1), labels=labels, mean=np.zeros(3 * SIDE**2))
    return folder


@pytest.fixture
def label_map(tmp_path):
    path = tmp_path / "map_clsloc.txt"
    path.write_text(MAP)
    return path


@pytest.mark.parametrize("compressed", [False, True])
def test_pictures_and_labels_by_number(compressed, tmp_path, label_map):
    source = DownsampledImageNet(write_files(tmp_path / "set", compressed=compressed), map_file=label_map)
    assert (
        len(source) == 33
        and source.name(32) == "train_data_batch_11.npz row 2"
        and source.name(3).startswith("train_data_batch_2.")
    )
    pixels = np.asarray(source.load(31))
    assert pixels.shape == (SIDE, SIDE, 3) and pixels[0, 0].tolist() == [11, 1, 0] and pixels[1, 2].tolist() == [11, 1, 200]
    assert source.class_ids == tuple(sorted(key for key, _ in CLASSES)) and source.class_names[2] == "wading crane"
    theirs = [line.split()[0] for line in MAP.splitlines()]
    for index in range(33):
        number, row = index // 3 + 1, index % 3
        assert source.class_ids[source.labels[index]] == theirs[(number * 3 + row) % 4]


def test_standard_order_has_to_be_said(tmp_path, label_map):
    folder = write_files(tmp_path / "set", [1, 2])
    assert DownsampledImageNet(folder, label_order="standard", table=TABLE).labels.tolist() == [3, 0, 1, 2, 3, 0]
    for options in ({}, {"map_file": label_map, "label_order": "standard"}):
        with pytest.raises(ValueError, match="--label_map map_clsloc.txt, or say --label_order standard .* never assumed"):
            DownsampledImageNet(folder, **options)
    with pytest.raises(ValueError, match="--label_order is 'sorted'"):
        DownsampledImageNet(folder, label_order="sorted", table=TABLE)
    with pytest.raises(ValueError, match="says nothing of names: give the classes with --class_table"):
        DownsampledImageNet(folder, label_order="standard")


def test_files_and_maps_that_do_not_fit_are_refused(tmp_path, label_map):
    def refused(folder, message, **options):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            DownsampledImageNet(folder, **{"map_file": label_map, **options})

    refused(write_files(tmp_path / "gap", [1, 2, 4]), r"numbers \[1, 2, 4\]: .* missing are \[3\]")
    refused(write_files(tmp_path / "zero", [1], first_label=0), "reach from 0 to 3: wanted 1 to 4")
    refused(tmp_path / "nothing", "does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no train_data_batch_1.npz")
    np.savez(tmp_path / "val_data.npz", data=np.zeros((2, 10), np.uint8), labels=np.ones(2, np.int64))
    refused(tmp_path / "val_data.npz", r"has data uint8 \[2, 10\]")
    np.savez(tmp_path / "train_data_batch_1.npz", pictures=np.zeros(3))
    refused(tmp_path / "train_data_batch_1.npz", "lacks `data` or `labels`")
    (tmp_path / "train_data_batch_1.npz").write_bytes(b"PK damaged")
    refused(tmp_path / "train_data_batch_1.npz", "cannot be read")
    good = write_files(tmp_path / "good", [1])
    for text, message in (
        ("n01440764 1 tench\nn01440764 2 tench\n", "names a wnid twice"),
        ("n01440764 1 tench\nn01443537 1 goldfish\n", "line 2 is"),
        ("n01440764 2 tench\n", "1 classes whose numbers are not 1 to 1"),
        ("tench\n", "line 1 is 'tench'"),
    ):
        label_map.write_text(text)
        refused(good, message)
    refused(good, "does not exist", map_file=tmp_path / "none.txt")
    label_map.write_text(MAP)
    assert read_map(label_map)[2] == ("n02012849", "wading crane")
    assert is_downsampled_imagenet(good) and not is_downsampled_imagenet(tmp_path / "empty")


def test_the_extraction_takes_them_at_another_size(tmp_path, label_map):
    folder = write_files(tmp_path / "set", compressed=True)
    encoder = write_encoder(tmp_path / "mae", channels=3)  # of 8 x 8 images
    run = ("--model", encoder, "--layers", "conv1", "--output_dir", tmp_path / "out", "--name", "real", "--cpu", "--per_class", 6)
    assert "never assumed" in str(run_tool("extract_activations", folder, *run))
    # The ranks of four classes are not the labels of a thousand.
    assert "holds 4 of the 1000 synsets" in str(run_tool("extract_activations", folder, *run, "--label_map", label_map))
    table = tmp_path / "labels.json"
    table.write_text(json.dumps({str(index): entry for index, entry in enumerate(CLASSES)}))
    assert run_tool("extract_activations", folder, *run, "--label_map", label_map, "--class_table", table) == 0
    opened = ActivationSet.open(tmp_path / "out", "real")
    assert np.bincount(opened.labels).tolist() == [6] * 4
    sample = opened.sample(0)
    assert sample["original_path"].endswith("train_data_batch_1.npz row 0") and sample["synset_id"] == "n01443537"
