"""data.archive_listing: archives that are unsafe, damaged, missing or others than they should be are refused by name."""

import gzip
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from archive_building import Archives, devkit_bytes, make_archives, read_tree, tar_bytes

from drift_accel.data.imagenet_archives import prepare_imagenet


@pytest.fixture
def archives(tmp_path) -> Archives:
    return make_archives(tmp_path)


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "output"


def link(name: str, kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


UNSAFE = [
    ({"/etc/evil.JPEG": b"x"}, [], r"member '/etc/evil.JPEG' has an absolute path"),
    ({"../evil.JPEG": b"x"}, [], r"member '../evil.JPEG' leads out of its folder"),
    ({"./../../evil.JPEG": b"x"}, [], r"leads out of its folder"),
    ({"folder/evil.JPEG": b"x"}, [], r"member 'folder/evil.JPEG' lies in a folder"),
    ({"folder\\evil.JPEG": b"x"}, [], r"lies in a folder"),
    ({".hidden.JPEG": b"x"}, [], r"hidden or unprintable name"),
    ({"line\nbreak.JPEG": b"x"}, [], r"hidden or unprintable name"),
    ({"bytes\udcff.JPEG": b"x"}, [], r"hidden or unprintable name"),
    ([("a.JPEG", b"x"), ("a.JPEG", b"y")], [], r"member 'a.JPEG' occurs twice"),
    ({}, [link("soft.JPEG", tarfile.SYMTYPE)], r"member 'soft.JPEG' is a link to '/etc/passwd'"),
    ({}, [link("hard.JPEG", tarfile.LNKTYPE, "a.JPEG")], r"member 'hard.JPEG' is a link to 'a.JPEG'"),
    ({}, [link("pipe.JPEG", tarfile.FIFOTYPE)], r"member 'pipe.JPEG' is no plain file"),
    ({}, [link("disk.JPEG", tarfile.BLKTYPE)], r"member 'disk.JPEG' is no plain file"),
    ({}, [link("folder", tarfile.DIRTYPE)], r"member 'folder' lies in a folder"),
    ({}, [], r"holds no files"),
]


@pytest.mark.parametrize(("files", "entries", "message"), UNSAFE)
@pytest.mark.parametrize("place", ["class", "train", "val"])
def test_unsafe_members_are_refused_by_name(archives, output, place, files, entries, message):
    if place == "class":
        archives.write_train({"n01440764.tar": tar_bytes(files, entries), "n03126707.tar": tar_bytes({"a.JPEG": b"1"})})
    else:
        archives.path(place).write_bytes(tar_bytes(files, entries))
    with pytest.raises(ValueError, match=message):
        prepare_imagenet(archives.config(output, split="val" if place == "val" else "train"))
    assert not (output / "train/n01440764").exists()
    assert not (output / "manifest.json").exists()
    assert not list(output.parent.rglob("evil*"))


def test_a_leading_dot_and_a_folder_entry_of_tar_are_harmless(archives, output):
    inner = tar_bytes({"./a.JPEG": b"1"}, [link("./", tarfile.DIRTYPE, "")])
    archives.write_train({"./n01440764.tar": inner})
    prepare_imagenet(archives.config(output, split="train"))
    assert read_tree(output / "train") == {"n01440764/a.JPEG": b"1"}


def swap(kind: str, other: str) -> Callable[[Archives], None]:
    return lambda archives: archives.path(kind).write_bytes(archives.path(other).read_bytes())


def content(kind: str, make: Callable[[bytes], bytes]) -> Callable[[Archives], None]:
    return lambda archives: archives.path(kind).write_bytes(make(archives.path(kind).read_bytes()))


def one_class(files: dict[str, bytes]) -> Callable[[Archives], None]:
    return lambda archives: archives.write_train({"n01440764.tar": tar_bytes(files)})


REFUSED = {
    "val for train": (
        "train",
        swap("train", "val"),
        r"given as the train archive, but holds 'ILSVRC2012_val_\d+.JPEG': .* of val",
    ),
    "devkit for train": ("train", swap("train", "devkit"), r"given as the train archive, but .* archive of devkit"),
    "train for val": ("val", swap("val", "train"), r"given as the val archive, but holds 'n\d+.tar': it is the archive of train"),
    "train for devkit": (
        "all",
        swap("devkit", "train"),
        r"given as the devkit archive, .*Give the one that holds ILSVRC2012_devkit",
    ),
    "one class for train": (
        "train",
        content("train", lambda _: tar_bytes({"n01440764_1.JPEG": b""})),
        r"archive of class of train",
    ),
    "test for val": ("val", content("val", lambda _: tar_bytes({"ILSVRC2012_test_00000001.JPEG": b""})), r"archive of test"),
    "no tar": ("train", content("train", lambda _: b"<html>Please log in"), r"has 19 bytes and begins with b'<html>Pl'"),
    "empty file": ("val", content("val", lambda _: b""), r"val archive .* it has 0 bytes"),
    "compressed": ("train", content("train", gzip.compress), r"is no plain tar .*decompress it"),
    "unknown class": (
        "train",
        content("train", lambda _: tar_bytes({"n99999999.tar": b""})),
        r"'n99999999.tar', which is no class",
    ),
    "no class": ("train", content("train", lambda _: tar_bytes({"notes.txt": b""})), r"holds 'notes.txt', which is no class"),
    "no val name": (
        "val",
        content("val", lambda _: tar_bytes({"a.JPEG": b""})),
        r"val archive .* holds 'a.JPEG': wanted names like",
    ),
    "no truth": ("val", content("devkit", lambda _: devkit_bytes(truth=[1] * 5)), r"the ground truth of .* ends at 5"),
    "no picture": (
        "train",
        one_class({"Thumbs.db": b""}),
        r"n01440764.tar in train archive .* holds 'Thumbs.db', which is no pict",
    ),
    "damaged class": (
        "train",
        content("train", lambda _: tar_bytes({"n01440764.tar": b"z" * 999})),
        r"n01440764 in .* is damaged",
    ),
    "devkit cut": ("train", content("devkit", lambda whole: whole[: len(whole) * 2 // 3]), r"devkit archive .* (damaged|cannot)"),
    "devkit without meta": (
        "val",
        content("devkit", lambda _: tar_bytes({"readme.txt": b""}, mode="w:gz")),
        r"holds no data/meta.mat",
    ),
    "bad meta": (
        "val",
        content(
            "devkit", lambda _: tar_bytes({"x/data/meta.mat": b"?", f"x/data/{'ILSVRC2012_validation_ground_truth.txt'}": b"1"})
        ),
        r"meta.mat of .* is not the ILSVRC2012 table",
    ),
    "inner class in truth": (
        "val",
        content("devkit", lambda _: devkit_bytes(truth=[1, 5])),
        r"line 2: '5' is no class of its meta",
    ),
    "words in truth": ("val", content("devkit", lambda _: devkit_bytes(truth=["x"])), r"line 1: 'x' is no class"),
    "empty truth": ("val", content("devkit", lambda _: devkit_bytes()), r"ground truth of .* is empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_archives_are_refused(archives, output, name):
    split, spoil, message = REFUSED[name]
    spoil(archives)
    with pytest.raises(ValueError, match=message):
        prepare_imagenet(archives.config(output, split=split))
    assert not (output / "manifest.json").exists()
    assert not any(files for _, _, files in os.walk(output / "train"))


@pytest.mark.parametrize("kind", ["train", "val"])
def test_a_cut_archive_is_refused_wherever_it_is_cut(archives, output, kind):
    whole = archives.path(kind).read_bytes()
    with tarfile.open(archives.path(kind)) as archive:
        members = archive.getmembers()
    end = members[-1].offset_data + -(-members[-1].size // 512) * 512
    cuts = {member.offset for member in members} | {member.offset_data for member in members} | {end - 1, end, end + 511, 700}
    for cut in sorted(cuts - {0}):
        archives.path(kind).write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="cut short|cannot be read as a tar"):
            prepare_imagenet(archives.config(output, split=kind))
    damaged = bytearray(whole)
    damaged[members[1].offset] ^= 0xFF  # tarfile takes a damaged header for the end
    archives.path(kind).write_bytes(damaged)
    with pytest.raises(ValueError, match="damaged or cut short after 1 files"):
        prepare_imagenet(archives.config(output, split=kind))


def test_a_cut_class_tar_is_refused_wherever_it_is_cut(archives, output):
    whole = tar_bytes({"a.JPEG": b"1" * 700, "b.JPEG": b"2" * 700})
    for cut in (0, 100, 512, 1300, 1536, 2000, 2048, 2500, 3072, 3500):
        archives.write_train({"n01440764.tar": whole[:cut], "n03126707.tar": whole})
        with pytest.raises(ValueError, match=r"n01440764.* damaged or cut short"):
            prepare_imagenet(archives.config(output, split="train"))
        assert os.listdir(output / "train") == []
        shutil.rmtree(output)


def test_missing_archives_say_where_they_were_looked_for(archives, output):
    config = archives.config(output)
    for kind in ("train", "val", "devkit"):
        path = archives.path(kind)
        hidden = path.rename(path.with_name(f"{path.name}.1"))
        with pytest.raises(
            FileNotFoundError, match=rf"no file {path}: is it {hidden.name}\? Then give --{kind}_archive {hidden}"
        ):
            prepare_imagenet(config)
        with pytest.raises(FileNotFoundError, match=rf"no file .*elsewhere: download {path.name} .*--{kind}_archive"):
            prepare_imagenet(replace(config, **{f"{kind}_archive": archives.folder / "elsewhere"}))
        hidden.rename(path)
    with pytest.raises(
        FileNotFoundError, match="give --devkit_archive FILE, or --archives DIR with ILSVRC2012_devkit_t12.tar.gz"
    ):
        prepare_imagenet(replace(config, archives=None))
    assert not output.exists()
