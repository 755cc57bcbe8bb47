"""data.imagenet_archives: every picture in its class folder with its bytes; what has been made is trusted only if it fits."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from archive_building import SYNSETS, Archives, devkit_bytes, digest, make_archives, read_tree, tar_bytes

from drift_accel.data import archive_listing, imagenet_archives
from drift_accel.data.archive_extraction import extract_class
from drift_accel.data.archive_listing import OFFICIAL, OfficialArchive
from drift_accel.data.class_table import ClassTable
from drift_accel.data.image_sources import ImageFolder
from drift_accel.data.imagenet_archives import PrepareConfig, prepare_imagenet

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def archives(tmp_path) -> Archives:
    return make_archives(tmp_path)


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "output"


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_imagenet_tool", ROOT / "tools/prepare_imagenet.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


# What comes out.


@pytest.mark.parametrize("num_workers", [1, 2])
def test_every_picture_lies_in_its_class_folder_with_its_bytes(archives, output, num_workers):
    summaries = prepare_imagenet(archives.config(output, num_workers=num_workers))
    assert read_tree(output / "train") == archives.train
    assert read_tree(output / "val") == archives.val
    assert {split: (summary.images, summary.classes, summary.extracted) for split, summary in summaries.items()} == {
        "train": (14, 4, 4),
        "val": (11, 4, 4),
    }
    table = ClassTable.read(output / "classes.json")
    assert table.wnids == ("n01440764", "n01443537", "n02119789", "n03126707") == ImageFolder(output / "train").class_ids
    assert table.by_index(2).names == ("kit fox", "Vulpes macrotis")
    files = {".prepare_imagenet.lock", "classes.json", "manifest.json", "provenance.json", "train", "val"}
    assert set(os.listdir(output)) == files


def test_it_agrees_with_torchvision(archives, output, tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision.datasets.imagenet")
    assert {kind: (OFFICIAL[kind].name, OFFICIAL[kind].md5) for kind in OFFICIAL} == torchvision.ARCHIVE_META
    prepare_imagenet(archives.config(output))
    monkeypatch.setattr(torchvision, "_verify_archive", lambda *arguments: None)
    oracle = shutil.copytree(archives.folder, tmp_path / "oracle")
    torchvision.parse_devkit_archive(oracle)
    torchvision.parse_train_archive(oracle)
    torchvision.parse_val_archive(oracle)
    assert read_tree(output / "train") == read_tree(oracle / "train")
    assert read_tree(output / "val") == read_tree(oracle / "val")
    names, _ = torchvision.load_meta_file(oracle)
    assert {entry.wnid: entry.names for entry in ClassTable.read(output / "classes.json")} == names


def test_the_provenance_names_archives_without_their_folders(archives, output):
    prepare_imagenet(archives.config(output), command=["/home/me/prepare.py", "--archives=/secret/place/", "--split", "all"])
    provenance = json.loads((output / "provenance.json").read_text())
    manifest = json.loads((output / "manifest.json").read_text())["splits"]
    assert str(archives.folder) not in (output / "provenance.json").read_text()
    for split, tree in (("train", archives.train), ("val", archives.val)):
        record = provenance[split]
        assert record["command"] == ["prepare.py", "--archives=place", "--split", "all"]
        assert (record["images"], record["bytes"], record["classes"]) == (len(tree), sum(map(len, tree.values())), 4)
        archive = record["archives"][split]
        assert (archive["name"], archive["bytes"]) == (OFFICIAL[split].name, archives.path(split).stat().st_size)
        assert archive["md5"] is None
        assert record["archives"]["devkit"]["sha256"] == hashlib.sha256(archives.path("devkit").read_bytes()).hexdigest()
        assert record["sha256"] == manifest[split]["sha256"]
        assert {"time", "versions", "package_version"} <= record.keys()
        for wnid, counts in manifest[split]["classes"].items():
            files = {name: content for name, content in tree.items() if name.startswith(wnid)}
            lines = [f"{Path(name).name}\0{len(files[name])}\0{digest(files)[name]}\n" for name in sorted(files)]
            assert counts["sha256"] == hashlib.sha256("".join(lines).encode()).hexdigest()
            assert (counts["images"], counts["bytes"]) == (len(files), sum(map(len, files.values())))


def test_the_command_takes_archives_of_any_name_and_does_nothing_the_second_time(archives, output, monkeypatch, capsys):
    odd = archives.path("train").rename(archives.folder / "ILSVRC2012_img_train.tar.1")
    line = [str(ROOT / "tools/prepare_imagenet.py"), "--train_archive", str(odd)]
    for kind in ("val", "devkit"):
        line += [f"--{kind}_archive", str(archives.path(kind))]
    line += ["--output_dir", str(output), "--expect", "none", "--skip_md5", "--num_workers", "2"]
    first = subprocess.run([sys.executable, *line], capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert "train: 14 pictures of 4 classes" in first.stdout
    assert read_tree(output / "train") == archives.train
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    for path in (odd, archives.path("val"), archives.path("devkit")):
        path.unlink()  # to save space, as one does
    monkeypatch.setattr(sys, "argv", line)
    load_tool().main()
    assert capsys.readouterr().out.count("verified, nothing to do") == 2
    assert times == {path: path.stat().st_mtime_ns for path in output.rglob("*")}


def test_one_split_after_the_other_gives_the_same_as_both(archives, output, tmp_path):
    prepare_imagenet(archives.config(tmp_path / "both"))
    for split in ("val", "train"):
        assert list(prepare_imagenet(archives.config(output, split=split))) == [split]
    for name in ("train", "val", "classes.json", "manifest.json"):
        a, b = ((folder / name) for folder in (output, tmp_path / "both"))
        assert (read_tree(a) == read_tree(b)) if a.is_dir() else (a.read_bytes() == b.read_bytes())
    assert set(json.loads((output / "provenance.json").read_text())) == {"train", "val"}


def test_a_removed_class_folder_is_made_again(archives, output):
    config = archives.config(output, split="train")
    prepare_imagenet(config)
    before = (output / "manifest.json").read_bytes()
    shutil.rmtree(output / "train/n01440764")
    assert prepare_imagenet(config)["train"].extracted == 1
    assert read_tree(output / "train") == archives.train
    assert (output / "manifest.json").read_bytes() == before


def test_progress_tells_rate_and_time_left(archives, output, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(imagenet_archives.Progress, "update", lambda self, steps, **values: shown.append((self.total, values)))
    prepare_imagenet(archives.config(output))
    assert [values["classes"] for _, values in shown] == [f"{number}/8" for number in range(1, 9)]
    assert all(values["images_per_second"] > 0 for _, values in shown)


# Checksums and counts.


@pytest.fixture
def official(archives, monkeypatch) -> dict[str, OfficialArchive]:
    """The test's archives, taken for the official ones."""
    made = {}
    for kind, images in (("train", 14), ("val", 11), ("devkit", 0)):
        md5 = hashlib.md5(archives.path(kind).read_bytes()).hexdigest()
        made[kind] = OfficialArchive(OFFICIAL[kind].name, md5, images)
    for module in (archive_listing, imagenet_archives):
        monkeypatch.setattr(module, "OFFICIAL", made)
        monkeypatch.setattr(module, "OFFICIAL_CLASSES", 4)
    return made


def test_official_archives_pass_all_checks(archives, official, output):
    prepare_imagenet(replace(archives.config(output), skip_md5=False, expect="imagenet"))
    assert read_tree(output / "train") == archives.train
    archive = json.loads((output / "provenance.json").read_text())["train"]["archives"]
    assert archive["train"]["md5"] == official["train"].md5
    assert archive["devkit"]["md5"] == official["devkit"].md5


@pytest.mark.parametrize("kind", ["train", "val", "devkit"])
def test_another_checksum_is_refused_before_anything_is_extracted(archives, official, output, kind):
    official[kind] = replace(official[kind], md5="0" * 32)
    with pytest.raises(ValueError, match=rf"{kind} archive .* has the MD5 [0-9a-f]+, but the official one is 0+: .*--skip_md5"):
        prepare_imagenet(replace(archives.config(output), skip_md5=False))
    assert not (output / "train").exists()
    prepare_imagenet(archives.config(output))
    assert read_tree(output / "val") == archives.val, "--skip_md5 must map the validation pictures by the ground truth"


def test_a_checksum_is_not_computed_again_after_an_interruption(archives, official, output, monkeypatch):
    config = replace(archives.config(output), skip_md5=False)
    monkeypatch.setattr(imagenet_archives, "extract_classes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_imagenet(config)
    monkeypatch.undo()
    checked = []
    monkeypatch.setattr(imagenet_archives, "check_md5", lambda path, kind: checked.append(kind))
    prepare_imagenet(config)
    assert checked == ["devkit"]
    assert json.loads((output / "provenance.json").read_text())["val"]["archives"]["val"]["md5"] == official["val"].md5


def interrupted(jobs, output_dir, num_workers):
    yield jobs[0], extract_class(jobs[0], output_dir)
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["train", "val", "classes", "devkit"])
def test_other_counts_are_refused_unless_none_is_expected(archives, official, output, kind, monkeypatch):
    if kind == "classes":
        monkeypatch.setattr(imagenet_archives, "OFFICIAL_CLASSES", 1000)
    elif kind == "devkit":
        archives.path("devkit").write_bytes(devkit_bytes(truth=[1] * 12))
    else:
        official[kind] = replace(official[kind], images=official[kind].images + 1)
    with pytest.raises(ValueError, match=r"[\d,]+ (pictures|classes|lines) in .* has [\d,]+: .*--expect none"):
        prepare_imagenet(replace(archives.config(output), expect="imagenet"))
    assert not (output / "manifest.json").exists()
    prepare_imagenet(archives.config(output))


def test_classes_without_pictures_are_told(archives, output):
    archives.write_train({f"{wnid}.tar": tar_bytes({"a.JPEG": b"1"}) for wnid in ("n01440764", "n03126707")})
    lines = []
    prepare_imagenet(archives.config(output, split="train"), log=lines.append)
    assert lines == [
        "warning: 2 of 4 classes have no pictures in the train archive, such as n01443537; labels by rank of the class folders "
        "are not the indices of classes.json"
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"split": "test"}, "split is 'test'"), ({"expect": "some"}, "expect is 'some'"), ({"num_workers": 0}, "num_workers is 0")],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(output_dir=Path("output"), **settings)


# Output folders that are refused.


def test_a_full_disk_is_refused_first(archives, output, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match=r"extracting 8 class folders needs 0.0\d\d GB at .*free some space"):
        prepare_imagenet(archives.config(output))
    assert not (output / "train").exists()


def test_another_archive_does_not_go_on_with_what_one_began(archives, output, monkeypatch):
    config = archives.config(output, split="train")
    monkeypatch.setattr(imagenet_archives, "extract_classes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_imagenet(config)
    monkeypatch.undo()
    whole = archives.path("train").read_bytes()
    archives.write_train({"n01440764.tar": tar_bytes({"other.JPEG": b"2" * 3000})})
    with pytest.raises(ValueError, match=r"was begun with another train archive \(ILSVRC2012_img_train.tar, \d+ bytes\)"):
        prepare_imagenet(config)
    archives.path("train").write_bytes(whole)
    prepare_imagenet(config)
    archives.write_train({"n01440764.tar": tar_bytes({"other.JPEG": b"2" * 30000})})
    with pytest.raises(ValueError, match=r"was made from an archive of \d+ bytes, but .* has \d+: choose another --output_dir"):
        prepare_imagenet(config)
    archives.path("devkit").write_bytes(devkit_bytes(SYNSETS[:3], truth=[1] * 11))
    with pytest.raises(ValueError, match=r"classes.json has other classes than .*devkit"):
        prepare_imagenet(archives.config(output, split="val"))


@pytest.mark.parametrize("finished", [False, True])
def test_folders_that_it_did_not_make_and_changed_ones_are_refused(archives, output, finished):
    config = archives.config(output, split="train")
    if finished:
        prepare_imagenet(config)
        (output / "train/n03126707/n03126707_0.JPEG").write_bytes(b"short")
        (output / "train/n01440764/extra.JPEG").write_bytes(b"")
        with pytest.raises(ValueError) as refusal:
            prepare_imagenet(config)
        assert "train/n01440764: 4 files of" in str(refusal.value)
        assert "train/n03126707: 7 files of" in str(refusal.value)
        for wnid in ("n03126707", "n01440764"):
            shutil.rmtree(output / "train" / wnid)
        assert prepare_imagenet(config)["train"].extracted == 2
        assert read_tree(output / "train") == archives.train
    for name in ("n01440764" if not finished else "n01440765", "notes.txt"):
        foreign = output / "train" / name
        foreign.mkdir(parents=True)
        with pytest.raises(ValueError, match=rf"remove these, or choose another --output_dir.*\n.*{name}: was not made by this"):
            prepare_imagenet(config)
        foreign.rmdir()


def test_damaged_records_are_named(archives, output, monkeypatch):
    config = archives.config(output, split="train")
    monkeypatch.setattr(imagenet_archives, "extract_classes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_imagenet(config)
    monkeypatch.undo()
    record = output / "in_progress/train/n01440764.json"
    whole = record.read_text()
    record.write_text(whole[:9])
    with pytest.raises(ValueError, match=rf"{record} is damaged .*: remove it and .*train/n01440764"):
        prepare_imagenet(config)
    record.write_text(whole)
    prepare_imagenet(config)
    for text in ('{"format": 9}', "[]", "{"):
        (output / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"manifest.json is (no manifest|damaged)"):
            prepare_imagenet(config)


def test_two_commands_do_not_write_one_folder(archives, output):
    output.mkdir()
    with (
        imagenet_archives.exclusive_lock(output / ".prepare_imagenet.lock", "the first"),
        pytest.raises(ValueError, match="prepare_imagenet into .* is already running"),
    ):
        prepare_imagenet(archives.config(output))


def test_the_command_refuses_without_a_traceback(archives, output, monkeypatch, capsys):
    archives.path("devkit").unlink()
    line = ["prepare_imagenet.py", "--archives", str(archives.folder), "--output_dir", str(output), "--skip_md5"]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit, match="prepare_imagenet: the devkit archive is needed, but there is no file"):
        load_tool().main()
    monkeypatch.setattr(sys, "argv", [*line, "--num_workers", "0"])
    with pytest.raises(SystemExit, match="2"):
        load_tool().main()
    assert "num_workers is 0" in capsys.readouterr().err
