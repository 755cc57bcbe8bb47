"""Classes by label, key and name, folders that sort like labels."""

import pytest
from tiny_models import CLASSES

from drift_accel.sampling.class_choice import choose_labels, find_label, folder_names, table_of_classes

ENTRIES = [{"index": index, "id": key, "name": name} for index, (key, name) in enumerate(CLASSES)]


@pytest.fixture
def table():
    return table_of_classes(ENTRIES, 4)


def numbered(*names: str):
    return table_of_classes([{"index": i, "id": name, "name": name} for i, name in enumerate(names)], len(names))


def test_labels_wnids_and_names(table):
    text = "3, n01440764, Goldfish, 2"
    assert choose_labels(text, table) == [3, 0, 1, 2]
    assert choose_labels("tinca tinca", table) == [0] and find_label(1, table) == 1
    assert choose_labels("0-2,3", table) == [0, 1, 2, 3]
    assert choose_labels(None, table) == [0, 1, 2, 3] and choose_labels(None, table, 2) == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("goldfsh", "there is no class named 'goldfsh'; close are 'goldfish'"),
        ("crane", "2 classes are named 'crane': choose one by its wnid: n02012849"),
        ("4", "class 4 does not exist: there are 4 classes, 0 to 3; give labels from 0 to 3"),
        ("0-9", "class 4 does not exist"),
        ("2-1", "the range runs backwards"),
        ("n01440765", "close are"),
        ("", "--classes holds ''"),
    ],
)
def test_what_does_not_exist_is_named(table, text, message):
    with pytest.raises(ValueError, match=message):
        choose_labels(text, table)


def test_a_number_that_is_two_things_is_refused():
    shifted = numbered("1", "2", "3")
    with pytest.raises(ValueError, match="'1' is the label of class '2' and the name of class 0: write label:1 or name:1"):
        find_label("1", shifted)
    assert find_label("label:1", shifted) == 1 and find_label("name:1", shifted) == 0
    assert find_label("3", shifted) == 2  # no label 3
    assert find_label("2", numbered("0", "1", "2")) == 2


def test_missing_names_are_numbers():
    assert [entry.name for entry in table_of_classes(None, 3)] == ["0", "1", "2"]
    extended = table_of_classes(ENTRIES, 6)
    assert [entry.name for entry in extended][4:] == ["4", "5"] and find_label("5", extended) == 5
    assert len(table_of_classes([{"index": 0, "id": "1", "name": "one"}], 2)) == 2
    with pytest.raises(ValueError, match="has 4 classes but the model has 3"):
        table_of_classes(ENTRIES, 3)


def test_folders_sort_like_labels(table):
    assert folder_names(table) == [key for key, _ in CLASSES]
    for names in (tuple(map(str, range(12))), ("b", "a"), ("a/b", "c")):
        folders = folder_names(numbered(*names))
        assert folders == sorted(folders) and len(set(folders)) == len(names)
    assert folder_names(numbered(*map(str, range(12))))[:3] == ["00", "01", "02"]
