"""data.image_sources: label order, names, and what is refused."""

import io
import os

import datasets
import numpy as np
import pytest
from PIL import Image

from drift_accel.data.image_sources import ImageDataset, ImageFolder, open_image_source, sort_class_names


def save(path, colour=(10, 20, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), colour).save(path)


def saved_dataset(path, labels, **extra):
    pictures = []
    for place in range(len(labels)):
        content = io.BytesIO()
        Image.new("RGB", (6, 4), (place, 0, 0)).save(content, format="PNG")
        pictures.append({"bytes": content.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": extra.pop("label", datasets.Value("int64"))})
    dataset = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)
    dataset.save_to_disk(str(path))
    return path


def test_numbers_are_sorted_as_numbers_and_the_rest_as_text():
    assert sort_class_names(["10", "9", "1"]) == ["1", "9", "10"]
    assert sort_class_names(["n02", "n10", "n01"]) == ["n01", "n02", "n10"]
    assert sort_class_names(["10", "9", "a"]) == ["10", "9", "a"]
    with pytest.raises(ValueError, match="'01' and '1' are the same number"):
        sort_class_names(["1", "01", "2"])


def test_a_folder_of_class_folders(tmp_path):
    for name in ("10/b.png", "10/a.JPEG", "9/sub/x.jpg", "9/a.png", "9/notes.txt", "9/.hidden.png", ".git/a.png"):
        save(tmp_path / name) if not name.endswith("txt") else (tmp_path / name).write_text("")
    source = ImageFolder(tmp_path)
    assert source.class_ids == source.class_names == ("9", "10")
    assert [source.name(index) for index in range(len(source))] == ["9/a.png", "9/sub/x.jpg", "10/a.JPEG", "10/b.png"]
    assert source.labels.tolist() == [0, 0, 1, 1] and source.labels.dtype == np.int64
    assert source.load(0).size == (6, 4)


def test_links_are_followed_and_odd_names_are_kept(tmp_path):
    save(tmp_path / "elsewhere" / "ä b.png")
    root = tmp_path / "root"
    root.mkdir()
    (root / "k").symlink_to(tmp_path / "elsewhere")
    os.rename(tmp_path / "elsewhere" / "ä b.png", os.fsencode(tmp_path / "elsewhere") + b"/\xff.png")
    source = ImageFolder(root)
    assert source.name(0) == "k/\\udcff.png" and source.load(0).size == (6, 4)
    source.name(0).encode("utf-8")


def test_pictures_without_class_folders_are_one_class(tmp_path):
    save(tmp_path / "flowers" / "b.png")
    save(tmp_path / "flowers" / "a.png")
    source = open_image_source(tmp_path / "flowers")
    assert (source.class_names, source.labels.tolist(), source.name(0)) == (("flowers",), [0, 0], "a.png")


def test_unfit_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no class folders and no pictures"):
        ImageFolder(tmp_path)
    save(tmp_path / "a" / "x.png")
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="b holds no pictures"):
        ImageFolder(tmp_path)
    save(tmp_path / "b" / "x.png")
    save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match=r"class folders and pictures \(loose.png\)"):
        ImageFolder(tmp_path)
    with pytest.raises(ValueError, match="for datasets saved by"):
        open_image_source(tmp_path, split="train")


def test_damaged_pictures_are_errors_that_name_them(tmp_path):
    save(tmp_path / "a" / "whole.png")
    content = (tmp_path / "a" / "whole.png").read_bytes()
    (tmp_path / "a" / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "a" / "empty.jpg").write_bytes(b"")
    (tmp_path / "a" / "text.png").write_text("no picture")
    (tmp_path / "a" / "head.png").write_bytes(content[:20])
    source = ImageFolder(tmp_path)
    for index in range(len(source)):
        if source.name(index) != "a/whole.png":
            with pytest.raises(OSError, match=source.name(index)):
                source.load(index)


def test_the_fingerprint_is_of_names_and_labels(tmp_path):
    for name in ("a/1.png", "b/2.png"):
        save(tmp_path / name)
    first = ImageFolder(tmp_path).fingerprint()
    assert ImageFolder(tmp_path).fingerprint() == first
    save(tmp_path / "b/3.png")
    assert ImageFolder(tmp_path).fingerprint() != first


def test_labels_of_a_class_table(tmp_path):
    for name in ("n02/1.png", "n05/2.png"):
        save(tmp_path / name)
    source = ImageFolder(tmp_path)
    source.use_classes(["n01", "n02", "n05"], ["one", "two", "five"])
    assert (source.labels.tolist(), source.class_names[2]) == ([1, 2], "five")
    with pytest.raises(ValueError, match=r"1 of 3 classes are not in the class table \(n01"):
        source.use_classes(["n02", "n05"], ["two", "five"])


def test_a_saved_dataset(tmp_path):
    source = open_image_source(saved_dataset(tmp_path / "set", [1, 0, 1], label=datasets.ClassLabel(names=["cat", "dog"])))
    assert isinstance(source, ImageDataset)
    assert (len(source), source.class_names, source.labels.tolist()) == (3, ("cat", "dog"), [1, 0, 1])
    assert np.array(source.load(2))[0, 0].tolist() == [2, 0, 0] and source.name(2) == "row 2"
    plain = open_image_source(saved_dataset(tmp_path / "plain", [2, 0]))
    assert plain.class_names == ("0", "1", "2")


def test_a_split_of_a_saved_dictionary(tmp_path):
    part = datasets.load_from_disk(str(saved_dataset(tmp_path / "part", [0, 1])))
    datasets.DatasetDict({"train": part}).save_to_disk(str(tmp_path / "both"))
    assert len(open_image_source(tmp_path / "both", split="train")) == 2
    with pytest.raises(ValueError, match="has the splits train: choose one with --split, not None"):
        open_image_source(tmp_path / "both")


def test_unfit_datasets_are_refused(tmp_path):
    path = saved_dataset(tmp_path / "set", [0, -1])
    with pytest.raises(ValueError, match="is -1 in row 1"):
        open_image_source(path)
    with pytest.raises(ValueError, match="no column 'kind'"):
        open_image_source(path, label_column="kind")
    with pytest.raises(ValueError, match="no image column 'photo': it has image"):
        open_image_source(path, image_column="photo")
    with pytest.raises(ValueError, match="wanted class labels or integers"):
        open_image_source(path, label_column="image")
    datasets.Dataset.from_dict({"label": [0]}).save_to_disk(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="has 0 image columns"):
        open_image_source(tmp_path / "none")


def test_a_row_without_a_picture_is_unreadable(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": [None], "label": [0]}, features=features).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(OSError, match="row 0: no picture in this row"):
        open_image_source(tmp_path / "set").load(0)
