"""data.class_table: labels by sorted wnid, look-ups that help, numbers sorted as numbers."""

import io
import json

import numpy as np
import pytest
from archive_building import meta_mat
from scipy.io import savemat

from drift_accel.data.class_table import ClassEntry, ClassTable, read_synsets
from drift_accel.data.image_sources import ImageFolder

# (ILSVRC2012_ID, wnid, words, number of children): the devkit's order is not the order of the wnids.
SYNSETS = [
    (1, "n02119789", "kit fox, Vulpes macrotis", 0),
    (2, "n01440764", "tench, Tinca tinca", 0),
    (3, "n03126707", "crane", 0),
    (4, "n02012849", "crane", 0),
    (5, "n01530575", "brambling, Fringilla montifringilla", 0),
    (6, "n00001740", "entity", 3),
    (7, "n02084071", "dog, domestic dog, Canis familiaris", 189),
]


@pytest.fixture
def table() -> ClassTable:
    return ClassTable.from_meta(meta_mat(SYNSETS))


def test_labels_are_the_ranks_of_the_sorted_wnids_and_only_leaves_are_classes(table):
    assert table.wnids == ("n01440764", "n01530575", "n02012849", "n02119789", "n03126707")
    assert [entry.index for entry in table] == [0, 1, 2, 3, 4]
    assert table.by_index(3) == ClassEntry(index=3, wnid="n02119789", names=("kit fox", "Vulpes macrotis"))
    assert table.by_index(3).name == "kit fox"
    assert len(table) == 5
    assert "n02119789" in table
    assert "n00001740" not in table
    # The ground truth speaks the devkit's numbers: they stay with their wnids.
    assert [(synset.devkit_id, synset.wnid) for synset in read_synsets(meta_mat(SYNSETS))] == [row[:2] for row in SYNSETS[:5]]


def test_a_devkit_of_a_single_class_is_read():
    assert ClassTable.from_meta(meta_mat(SYNSETS[:1])).wnids == ("n02119789",)


def test_a_class_is_found_by_wnid_and_by_every_name(table):
    assert table.by_wnid("n01440764").index == 0
    for name in ("tench", "Tinca tinca", "  TINCA  Tinca", "tench, Tinca tinca"):
        assert table.by_name(name).wnid == "n01440764"


def test_failed_look_ups_name_what_is_close(table):
    with pytest.raises(ValueError, match="class 5 does not exist: there are 5 classes, 0 to 4"):
        table.by_index(5)
    with pytest.raises(ValueError, match="class -1 does not exist"):
        table.by_index(-1)
    with pytest.raises(ValueError, match=r"no class folder 'n01440765'; close are 'n01440764'"):
        table.by_wnid("n01440765")
    with pytest.raises(ValueError, match=r"no class named 'kitfox'; close are 'kit fox'"):
        table.by_name("kitfox")
    with pytest.raises(ValueError, match=r"no class named 'Vulpes'; close are 'vulpes macrotis'"):
        table.by_name("Vulpes")
    with pytest.raises(ValueError, match=r"no class named 'zzz'; there are \d+, such as 'tench'"):
        table.by_name("zzz")
    with pytest.raises(ValueError, match=r"2 classes are named 'Crane': choose one by its wnid: n02012849 .* n03126707"):
        table.by_name("Crane")


def test_it_is_written_and_read_back(table, tmp_path):
    path = tmp_path / "new" / "classes.json"
    table.write(path)
    assert ClassTable.read(path) == table
    assert json.loads(path.read_text())["classes"][0] == {"index": 0, "wnid": "n01440764", "names": ["tench", "Tinca tinca"]}
    assert [entry.name for entry in path.parent.iterdir()] == ["classes.json"]


def test_names_beyond_ascii_survive(tmp_path):
    table = ClassTable.from_wnids({"b": ("bärtierchen", "水熊"), "a": ("é",)})
    table.write(tmp_path / "classes.json")
    assert ClassTable.read(tmp_path / "classes.json").by_name("BÄRTIERCHEN").index == 1


def test_numeric_folders_are_sorted_as_numbers(tmp_path):
    for number in range(1000):
        (tmp_path / str(number)).mkdir()
    (tmp_path / ".hidden").mkdir()
    table = ClassTable.from_folder(tmp_path)
    assert [int(wnid) for wnid in table.wnids] == list(range(1000))
    assert table.by_wnid("10").index == 10
    assert table.by_name("999").index == 999


def test_a_folder_gives_the_labels_that_the_image_folder_gives(tmp_path):
    for name in ("n02", "n10", "n01", "Äpfel"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(b"")
    assert ClassTable.from_folder(tmp_path).wnids == ImageFolder(tmp_path).class_ids


def entry(index: int, wnid: str, names=("name",)) -> ClassEntry:
    return ClassEntry(index=index, wnid=wnid, names=names)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "at least one class"),
        ([entry(0, "a"), entry(2, "b")], r"'b' has the index 2 at place 1"),
        ([entry(0, "a"), entry(1, "a")], r"0 and 1 are both called 'a'"),
        ([entry(0, "a", ())], "give at least one"),
        ([entry(0, "a", ("x", ""))], "none empty"),
    ],
)
def test_tables_that_contradict_themselves_are_refused(classes, message):
    with pytest.raises(ValueError, match=message):
        ClassTable(classes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "wanted an object of format 1"),
        ('{"format": 2, "classes": []}', "wanted an object of format 1"),
        ('{"format": 1, "classes": []}', "at least one class"),
        ('{"format": 1, "classes": [7]}', "entry 0 is 7"),
        ('{"format": 1, "classes": [{"index": 0, "wnid": "a", "names": "tench"}]}', "a list of names"),
        ('{"format": 1, "classes": [{"index": 1, "wnid": "a", "names": ["tench"]}]}', "index 1 at place 0"),
    ],
)
def test_files_that_are_no_class_table_are_refused(text, message, tmp_path):
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(ValueError, match=message) as refusal:
        ClassTable.read(tmp_path / "classes.json")
    assert "classes.json" in str(refusal.value)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no class table at .*classes.json"):
        ClassTable.read(tmp_path / "classes.json")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        ClassTable.from_folder(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds no class folders"):
        ClassTable.from_folder(tmp_path)
    for name in ("1", "01"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="are the same number"):
        ClassTable.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("synsets", "message"),
    [
        ([(1, "../../etc", "evil", 0)], "wanted a wnid like n01440764"),
        ([(1, "n01440764", " ", 0)], "wanted a wnid like n01440764 and its names"),
        ([(1, "n01440764", "a", 0), (1, "n01440765", "b", 0)], "two classes with the ILSVRC2012_ID 1"),
        ([(1, "n01440764", "a", 0), (2, "n01440764", "b", 0)], "two classes with the WNID n01440764"),
    ],
)
def test_unfit_synsets_are_refused(synsets, message):
    with pytest.raises(ValueError, match=message):
        read_synsets(meta_mat(synsets))


def test_contents_that_are_no_meta_mat_are_refused():
    whole = meta_mat(SYNSETS)
    other = io.BytesIO()
    savemat(other, {"classes": np.eye(3)})
    for content in (b"", b"not a mat file at all", whole[: len(whole) // 2], other.getvalue()):
        with pytest.raises(ValueError, match="devkit's meta is not the ILSVRC2012 table of synsets"):
            read_synsets(content, "devkit's meta")
