"""Classes by key: tables of both forms, folders that tell their labels, unknown ones named."""

import json

import numpy as np
import pytest

from drift_accel.data.class_table import ClassEntry, ClassTable
from drift_accel.data.source_classes import labels_in_table, read_class_table, require_synset_folders

ENTRIES = [("n01440764", "tench"), ("n01443537", "goldfish, Carassius auratus"), ("n01484850", "great_white_shark")]
TABLE = ClassTable(
    [ClassEntry(index=i, wnid=key, names=tuple(name.replace("_", " ").split(", "))) for i, (key, name) in enumerate(ENTRIES)]
)


def test_both_forms_of_a_table_are_read(tmp_path):
    plain, ours = tmp_path / "labels.json", tmp_path / "classes.json"
    plain.write_text(json.dumps({str(index): list(entry) for index, entry in reversed(list(enumerate(ENTRIES)))}))
    TABLE.write(ours)
    assert read_class_table(plain) == TABLE == read_class_table(ours)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"0": ["n01440764", "tench"], "2": ["n01443537", "goldfish"]}', "label 2 stands at place 1"),
        ('{"0": ["n01440764", "tench"], "1": ["n01440764", "tench"]}', "both called 'n01440764'"),
        ('{"0": "tench"}', "is no class table"),
        ('{"a": ["n01440764", "tench"]}', "is no class table"),
        ("[]", "is no class table"),
        ("{", "is no JSON"),
    ],
)
def test_other_files_are_refused(content, message, tmp_path):
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_class_table(tmp_path / "labels.json")
    with pytest.raises(FileNotFoundError, match="no class table at"):
        read_class_table(tmp_path / "none.json")


def test_labels_come_from_keys_or_names():
    ids = ("n01484850", "n01440764", "Carassius auratus", "unused")
    np.testing.assert_array_equal(labels_in_table("here", ids, [0, 1, 2], TABLE), [2, 0, 1, -1])
    with pytest.raises(
        ValueError, match=r"here: unknown synset 'n01484851' \(.*close are 'n01484850'.*\): not among the 3 classes"
    ):
        labels_in_table("here", ["n01484851", "n01440764"], [0, 1], TABLE)
    with pytest.raises(ValueError, match=r"here: unknown class 'unused' \("):
        labels_in_table("here", ids, [0, 3], TABLE)


def test_folders_alone_tell_labels_only_where_they_can():
    every = [f"n{index:08d}" for index in range(1000)]
    require_synset_folders("root", every)
    require_synset_folders("root", ["cats", "dogs"])
    with pytest.raises(ValueError, match="root holds 999 of the 1000 synsets"):
        require_synset_folders("root", every[1:])
    with pytest.raises(ValueError, match="root/cats is named by no synset .*; 2 such classes"):
        require_synset_folders("root", [*every, "cats", "n1"])
