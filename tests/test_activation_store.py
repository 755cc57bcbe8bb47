"""Sets of activations: one content in two formats, read by layer, class and sample; damage is named, nothing is half there."""

import json
import re

import datasets
import numpy as np
import pytest
from small_activation_sets import CLASSES, SHAPES, files_of, small_labels, small_values, write_small_set
from tiny_models import call_tool

from drift_accel.analysis.activations.conversion import convert_set
from drift_accel.analysis.activations.histograms import plot_activation_histograms
from drift_accel.analysis.activations.staging import StagedSet
from drift_accel.analysis.activations.store import (
    ActivationSet,
    load_batch_activations,
    require_same_layers,
    set_names,
    slice_sample,
)
from drift_accel.foundation.locks import exclusive_lock

COUNT = 23
STORAGES = ("arrow", "npz")


@pytest.fixture(params=STORAGES)
def written(request, tmp_path):
    values = write_small_set(tmp_path, count=COUNT, storage=request.param)
    return ActivationSet.open(tmp_path, "real"), values


def test_rows_are_those_that_were_written(written):
    opened, values = written
    assert len(opened) == COUNT and opened.layers == SHAPES and set_names(opened.folder) == ["real"]
    chosen = np.array([22, 0, 9, 10, 9, 19])
    for layer, array in values.items():
        flat = array.reshape(COUNT, -1)
        assert opened.rows(layer).dtype == np.float32
        np.testing.assert_array_equal(opened.rows(layer), flat)
        np.testing.assert_array_equal(opened.rows(layer, chosen), flat[chosen])
        assert opened.rows(layer, []).shape == (0, flat.shape[1])
        for size in (1, 7, 10, 100):
            parts = list(opened.iterate(layer, size))
            assert [len(part) for part in parts[:-1]] == [size] * (len(parts) - 1)
            np.testing.assert_array_equal(np.concatenate(parts), flat)


def test_samples_classes_and_slices(written):
    opened, values = written
    np.testing.assert_array_equal(opened.labels, small_labels(COUNT))
    assert opened.class_names() == {label: name for label, (_, name) in enumerate(CLASSES)}
    for label in range(4):
        np.testing.assert_array_equal(opened.class_rows(label), np.flatnonzero(small_labels(COUNT) == label))
    sample = opened.sample(11)
    assert sample.pop("image_path").read_bytes() == b"picture 11"
    assert sample == {
        "class_id": 2, "synset_id": "n02012849", "class_name": "crane", "original_path": "/data/n02012849/11.JPEG",
    }  # fmt: skip
    assert [found["original_path"] for found in opened.samples([12, 3])] == [
        "/data/n01440764/12.JPEG", "/data/n01440764/3.JPEG"
    ]  # fmt: skip
    for layer, array in values.items():
        np.testing.assert_array_equal(opened.activations(20)[layer], array[20])


def test_a_batch_and_one_sample_of_it(written):
    opened, values = written
    activations, metadata = load_batch_activations(opened.folder / "activations/real/batch_000001")
    assert metadata["batch_size"] == 10 and metadata["layers"] == list(SHAPES)
    assert metadata["shapes"] == {layer: list(shape) for layer, shape in SHAPES.items()}
    for layer, array in values.items():
        np.testing.assert_array_equal(activations[layer], array[10:20].reshape(10, -1))
    assert metadata["samples"][3] == {
        "batch_index": 3, "class_id": 1, "synset_id": "n01443537", "class_name": "goldfish",
        "original_path": "/data/n01443537/13.JPEG", "image_path": "images/real/sample_000013.png",
    }  # fmt: skip
    layers, sample = slice_sample(activations, metadata, 3)
    np.testing.assert_array_equal(layers["maps"], values["maps"][13])
    assert sample["batch_index"] == 3
    with pytest.raises(IndexError, match="sample 10 does not exist: the batch has 10"):
        slice_sample(activations, metadata, 10)
    with pytest.raises(ValueError, match="without .npz"):
        load_batch_activations(opened.folder / "activations/real/batch_000001.npz")


def test_one_arrow_file_is_read_in_place(tmp_path):
    write_small_set(tmp_path, count=8, storage="arrow", at_once=8)
    rows = ActivationSet.open(tmp_path, "real").rows("maps")
    assert not rows.flags.owndata and not rows.flags.writeable


def test_datasets_opens_the_arrow_files_as_one_table(tmp_path):
    values = write_small_set(tmp_path, count=COUNT, storage="arrow")
    table = datasets.load_from_disk(str(tmp_path / "activations/real")).with_format("numpy")
    assert len(table) == COUNT and table["class_id"][:].tolist() == small_labels(COUNT).tolist()
    np.testing.assert_array_equal(table["maps"][:], values["maps"].reshape(COUNT, -1))
    assert table[13]["original_path"] == "/data/n01443537/13.JPEG"


def test_float16_keeps_half_the_bytes_and_refuses_what_does_not_fit(tmp_path):
    values = write_small_set(tmp_path, dtype="float16")
    opened = ActivationSet.open(tmp_path, "real")
    np.testing.assert_array_equal(opened.rows("pooled"), values["pooled"].astype(np.float16).astype(np.float32))
    assert opened.metadata["num_non_finite"] == 0
    damaged = small_values(COUNT)
    damaged["pooled"][3, 1], damaged["maps"][3], damaged["maps"][20, 0, 0, 0] = np.nan, np.inf, -np.inf
    write_small_set(tmp_path, "damaged", values=damaged)
    assert ActivationSet.open(tmp_path, "damaged").metadata["num_non_finite"] == 2
    large = small_values(COUNT)
    large["pooled"][12, 0] = 70_000
    with pytest.raises(ValueError, match=r"layer pooled reaches 7e\+04, more than float16 holds"):
        write_small_set(tmp_path, "large", values=large, dtype="float16")


@pytest.mark.parametrize("storage", STORAGES)
def test_conversion_there_and_back_gives_the_same_files(storage, tmp_path):
    write_small_set(tmp_path / "a", storage=storage, at_once=64, batch_size=15)
    call_tool("convert_activations", tmp_path / "a", "real", "--output_dir", tmp_path / "b", "--file_samples", 7)
    call_tool("convert_activations", tmp_path / "b", "real", "--output_dir", tmp_path / "c", "--file_samples", 15)
    first, between, last = (ActivationSet.open(tmp_path / folder, "real") for folder in "abc")
    assert between.metadata["storage"] != storage == last.metadata["storage"]
    np.testing.assert_array_equal(between.rows("maps"), first.rows("maps"))
    assert between.samples([22])[0]["image_path"].read_bytes() == b"picture 22"
    ours, theirs = files_of(tmp_path / "a"), files_of(tmp_path / "c")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == ["metadata/real/dataset_info.json"]  # says where from
    with pytest.raises(ValueError, match="would replace itself"):
        convert_set(first, tmp_path / "a", "real", "npz")


def test_files_of_other_tools_without_shapes_can_be_read(tmp_path):
    values = write_small_set(tmp_path, storage="npz")
    for path in (tmp_path / "activations/real").glob("*.json"):
        content = json.loads(path.read_text())
        del content["shapes"]
        for sample in content["samples"]:
            del sample["image_path"]
        path.write_text(json.dumps(content))
    (tmp_path / "metadata/real/dataset_info.json").write_text(json.dumps({"num_samples": COUNT}))
    opened = ActivationSet.open(tmp_path, "real")
    assert opened.layers == {"pooled": (5,), "maps": (12,)} and opened.sample(2)["image_path"] is None
    np.testing.assert_array_equal(opened.rows("maps"), values["maps"].reshape(COUNT, -1))
    convert_set(opened, tmp_path / "b", "real", "arrow", log=lambda message: None)
    np.testing.assert_array_equal(ActivationSet.open(tmp_path / "b", "real").rows("maps"), opened.rows("maps"))


def test_what_is_not_a_whole_set_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no set 'real': it has none"):
        ActivationSet.open(tmp_path, "real")
    write_small_set(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no set 'other': it has real"):
        ActivationSet.open(tmp_path, "other")
    work = tmp_path / "activations/real.in_progress"
    work.mkdir()
    with pytest.raises(ValueError, match="'real' of .* is not finished: give the command that extracts it again"):
        ActivationSet.open(tmp_path, "real")
    work.rmdir()
    info = tmp_path / "metadata/real/dataset_info.json"
    content = json.loads(info.read_text())
    info.write_text(json.dumps({**content, "files": []}))
    with pytest.raises(ValueError, match="'real' of .* is empty"):
        ActivationSet.open(tmp_path, "real")
    info.write_text(json.dumps({**content, "format": 2}))
    with pytest.raises(ValueError, match="has format 2, this version reads format 1"):
        ActivationSet.open(tmp_path, "real")
    info.unlink()
    with pytest.raises(ValueError, match="dataset_info.json is missing"):
        ActivationSet.open(tmp_path, "real")


@pytest.mark.parametrize("storage", STORAGES)
def test_damage_names_the_file(storage, tmp_path):
    write_small_set(tmp_path, storage=storage)
    path = tmp_path / f"activations/real/batch_000001.{storage}"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        ActivationSet.open(tmp_path, "real").rows("maps")
    path.unlink()
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is missing"):
        ActivationSet.open(tmp_path, "real").rows("maps")
    write_small_set(tmp_path / "b", count=5, storage=storage)
    for suffix in (storage, "json"):
        other = tmp_path / f"b/activations/real/batch_000000.{suffix}"
        if other.exists():
            path.with_suffix(f".{suffix}").write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match="has 5 samples, the metadata says 10"):
        ActivationSet.open(tmp_path, "real")


def test_sets_whose_layers_differ_are_refused(tmp_path):
    write_small_set(tmp_path, "a")
    whole = {"pooled": small_values(COUNT)["pooled"], "maps": small_values(COUNT)["maps"].mean(axis=(2, 3))}
    write_small_set(tmp_path, "b", values=whole, shapes={"pooled": (5,), "maps": (3,)})
    write_small_set(tmp_path, "c", values={"other": whole["pooled"]}, shapes={"other": (5,)})
    a, b, c = (ActivationSet.open(tmp_path, name) for name in "abc")
    assert require_same_layers(a, b, ["pooled"]) == ("pooled",)
    with pytest.raises(ValueError, match=r"layer 'maps' has the shape \(3, 2, 2\) in 'a' and \(3,\) in 'b': extract both"):
        require_same_layers(a, b)
    with pytest.raises(ValueError, match="no layer in common: pooled, maps and other"):
        require_same_layers(a, c)
    for call in (lambda: a.rows("other"), lambda: a.iterate("other")):
        with pytest.raises(ValueError, match="has no layer 'other': it has pooled, maps"):
            call()
    with pytest.raises(IndexError, match="sample 23 does not exist"):
        a.rows("maps", [23])
    with pytest.raises(IndexError, match="sample -1 does not exist"):
        a.sample(-1)
    with pytest.raises(ValueError, match="indices are float64"):
        a.rows("maps", [0.5])


def test_a_set_is_resumed_left_alone_or_replaced(tmp_path):
    write_small_set(tmp_path)
    before = files_of(tmp_path)
    write_small_set(tmp_path)  # complete already
    assert files_of(tmp_path) == before
    path = tmp_path / "activations/real/batch_000001.arrow"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"batch_000001.arrow is missing or cut \(1 such files\): --overwrite extracts"):
        write_small_set(tmp_path)
    write_small_set(tmp_path, overwrite=True)
    assert files_of(tmp_path) == before
    with pytest.raises(ValueError, match="a finished set 'real' with other settings:\n  dtype: 'float32' there, 'float16' now"):
        write_small_set(tmp_path, dtype="float16")
    staged = StagedSet(tmp_path, "real", {"seed": 1}, shapes=SHAPES, num_samples=COUNT)
    with pytest.raises(ZeroDivisionError):
        staged.write(lambda places, writer, advance: 1 / 0, overwrite=True, log=lambda message: None)
    with pytest.raises(ValueError, match="unfinished work 'real' with other settings"):
        write_small_set(tmp_path)
    with (
        exclusive_lock(staged.work / "lock", "a test"),
        pytest.raises(ValueError, match="work on the set 'real' is already running"),
    ):
        staged.write(lambda *_: [], log=lambda message: None)
    (tmp_path / "images/stranger").mkdir(parents=True)
    (tmp_path / "images/stranger/picture.png").write_bytes(b"")
    with pytest.raises(ValueError, match="images/stranger holds other things"):
        write_small_set(tmp_path, "stranger")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a/b", {}, "--name is 'a/b'"),
        (".a", {}, "--name is '.a'"),
        ("a.in_progress", {}, "without .in_progress"),
        ("a", {"storage": "hdf5"}, "storage is 'hdf5'"),
        ("a", {"dtype": "float64"}, "of 'float64'"),
        ("a", {"shapes": {"class_id": (3,)}}, "a layer cannot be called 'class_id'"),
        ("a", {"batch_size": 0}, "chunks of 0"),
    ],
)
def test_impossible_sets_are_refused(name, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        StagedSet(tmp_path, name, {}, num_samples=3, **{"shapes": SHAPES, **options})


def test_histograms_of_two_sets(tmp_path):
    real, fake = small_values(40), small_values(40)
    real = {layer: array.reshape(40, -1) for layer, array in real.items()}
    fake = {layer: array.reshape(40, -1) + 3 for layer, array in fake.items()}
    figure = plot_activation_histograms(real, fake, path=tmp_path / "plot.png", bins=50)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    panel = figure.axes[0]
    assert panel.get_title().startswith("pooled") and len(figure.axes) == 2
    for patch, values in zip(panel.patches, (real, fake), strict=True):
        heights, edges, _ = patch.get_data()
        assert np.sum(heights * np.diff(edges)) == pytest.approx(1)
        assert np.average((edges[1:] + edges[:-1]) / 2, weights=heights) == pytest.approx(values["pooled"].mean(), abs=0.1)
    with pytest.raises(ValueError, match="generated activations have no layer 'maps'"):
        plot_activation_histograms(real, {"pooled": fake["pooled"]}, ["maps"])
    with pytest.raises(ValueError, match="layer 'pooled' has 5 numbers a sample in real and 4 in generated"):
        plot_activation_histograms(real, {"pooled": fake["pooled"][:, :4]})
    with pytest.raises(ValueError, match="no layer in common"):
        plot_activation_histograms(real, {})
    with pytest.raises(ValueError, match="all numbers finite"):
        plot_activation_histograms(real, {"pooled": fake["pooled"] * np.nan})
