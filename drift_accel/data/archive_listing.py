"""What the ILSVRC2012 archives hold, read in place and checked before anything is written.

train: a tar of one tar a class, n01440764.tar, each with pictures; val: a flat tar of ILSVRC2012_val_00000001.JPEG and so
on; devkit: a tar.gz with data/meta.mat (the synsets) and data/ILSVRC2012_validation_ground_truth.txt (a devkit number a
line). torchvision parses the same devkit, but only with the official checksum and after unpacking it elsewhere; in the tests
it is the oracle.
"""

import hashlib
import re
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from drift_accel.data.class_table import ClassTable, read_synsets
from drift_accel.foundation.progress import Progress

SPLITS = ("train", "val")
PICTURE_SUFFIXES = (".jpeg", ".jpg", ".png")
_META_PATH = ("data", "meta.mat")
_TRUTH_PATH = ("data", "ILSVRC2012_validation_ground_truth.txt")
_KINDS = {
    "train": re.compile(r"n\d{8}\.tar"),
    "val": re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG"),
    "devkit": re.compile(r"ILSVRC2012_devkit_\w+(/.*)?"),
    "test": re.compile(r"(test/)?ILSVRC2012_test_\d{8}\.JPEG"),
    "class of train": re.compile(r"n\d{8}_\d+\.JPEG"),
}
_SAMPLE_NAMES = {"train": "n01440764.tar", "val": "ILSVRC2012_val_00000001.JPEG", "devkit": "ILSVRC2012_devkit_t12/data/meta.mat"}
_NUM_PEEKED = 3
_BLOCK = tarfile.BLOCKSIZE
_READ_BYTES = 1 << 20
_TAR_ERRORS = (tarfile.TarError, EOFError, zlib.error, OSError)


@dataclass(frozen=True)
class OfficialArchive:
    """An archive as it is distributed: its file name, its MD5, the number of pictures in it (0 for the devkit)."""

    name: str
    md5: str
    images: int


OFFICIAL = {
    "train": OfficialArchive("ILSVRC2012_img_train.tar", "1d675b47d978889d74fa0da5fadfb00e", 1_281_167),
    "val": OfficialArchive("ILSVRC2012_img_val.tar", "29b22e2961454d5413ddabcf34fc5622", 50_000),
    "devkit": OfficialArchive("ILSVRC2012_devkit_t12.tar.gz", "fa75699e90414af021442c21a62c3abf", 0),
}
OFFICIAL_CLASSES = 1_000


class Member(NamedTuple):
    """A regular file in a tar: its safe name, and where its bytes lie in the archive."""

    name: str
    size: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class ClassJob:
    """The pictures of one class folder of a split, still in the archive."""

    split: str
    wnid: str
    archive: Path
    nested: Member | None = None
    """The tar in the archive that holds the pictures (train), or None."""
    pictures: tuple[Member, ...] = ()
    """The pictures themselves, where they lie in the archive directly (val)."""

    @property
    def num_bytes(self) -> int:
        """Bytes to read."""
        return self.nested.size if self.nested else sum(picture.size for picture in self.pictures)


@dataclass(frozen=True, kw_only=True)
class SplitListing:
    """What the archive of one split holds: a job a class, by wnid."""

    split: str
    archive: Path
    jobs: tuple[ClassJob, ...]
    num_bytes: int
    """Size of the archive."""
    listing_sha256: str
    """Over names and sizes of the files in the archive: tells one archive from another without reading all of it."""


@dataclass(frozen=True, kw_only=True)
class Devkit:
    """The devkit's class table and the wnid of every validation picture, by its number from 1."""

    path: Path
    table: ClassTable
    validation_wnids: tuple[str, ...]


def find_archive(kind: str, given: Path | None, folder: Path | None) -> Path:
    """The path of the "train", "val" or "devkit" archive: the one given, or the official name in `folder`.

    Raises FileNotFoundError saying where it was looked for, and what there is under a similar name.
    """
    name = OFFICIAL[kind].name
    if given is None and folder is None:
        raise FileNotFoundError(f"the {kind} archive is needed: give --{kind}_archive FILE, or --archives DIR with {name} in it")
    path = given if given is not None else folder / name
    if path.is_file():
        return path
    hint = f"download {name} from image-net.org, or give its path with --{kind}_archive"
    if given is None and folder.is_dir():
        similar = sorted(entry.name for entry in folder.iterdir() if entry.name.startswith(name.split(".")[0]))
        if similar:
            hint = f"is it {similar[0]}? Then give --{kind}_archive {folder / similar[0]}"
    raise FileNotFoundError(f"the {kind} archive is needed, but there is no file {path}: {hint}")


def check_md5(path: Path, kind: str) -> str:
    """The MD5 of an archive, shown in progress. Raises ValueError where it is not the official one."""
    size, done, digest = path.stat().st_size, 0, hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file, Progress(size // 10**6, 0, f"MD5 of {path.name}, in MB") as progress:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            done += len(block)
            progress.update(min(done, size) // 10**6 - progress.step)
    if digest.hexdigest() != OFFICIAL[kind].md5:
        raise ValueError(
            f"{kind} archive {path} has the MD5 {digest.hexdigest()}, but the official one is {OFFICIAL[kind].md5}: download it "
            "again, or say --skip_md5 if you know why it differs"
        )
    return digest.hexdigest()


def read_devkit(path: Path) -> Devkit:
    """Read classes and ground truth from the devkit archive. Raises ValueError for anything else or a damaged one."""
    _refuse_other_kind(path, "devkit")
    contents = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for info in archive:
                place = PurePosixPath(info.name).parts[-2:]
                if place in (_META_PATH, _TRUTH_PATH) and info.isreg():
                    contents[place] = archive.extractfile(info).read()
    except _TAR_ERRORS as error:
        raise ValueError(f"devkit archive {path} is damaged ({error}): get it again") from None
    for place in (_META_PATH, _TRUTH_PATH):
        if place not in contents:
            raise ValueError(f"{path} holds no {'/'.join(place)}: it is not the devkit of ILSVRC2012, tasks 1 and 2")
    synsets = read_synsets(contents[_META_PATH], f"meta.mat of {path}")
    if not synsets:
        raise ValueError(f"meta.mat of {path} has no class without children: get the devkit again")
    wnids = {synset.devkit_id: synset.wnid for synset in synsets}
    table = ClassTable.from_wnids({synset.wnid: synset.names for synset in synsets})
    return Devkit(path=path, table=table, validation_wnids=_ground_truth(contents[_TRUTH_PATH], wnids, path))


def list_train(path: Path, table: ClassTable) -> SplitListing:
    """List the class tars of the train archive; the tars in it are read later.

    Raises ValueError for another archive, a damaged one, a name that is unsafe or a class that the devkit does not know.
    """
    members, num_bytes = _open_and_list(path, "train")
    jobs = []
    for member in members:
        wnid = member.name.removesuffix(".tar")
        if not _KINDS["train"].fullmatch(member.name) or wnid not in table:
            raise ValueError(f"train archive {path} holds {member.name!r}, which is no class of the devkit (like n01440764.tar)")
        jobs.append(ClassJob(split="train", wnid=wnid, archive=path, nested=member))
    return _split_listing("train", path, jobs, members, num_bytes)


def list_val(path: Path, devkit: Devkit) -> SplitListing:
    """List the pictures of the val archive, each under the class that the ground truth gives its number.

    Raises ValueError for another archive, a damaged one, a name that is unsafe or a number without ground truth.
    """
    members, num_bytes = _open_and_list(path, "val")
    pictures: dict[str, list[Member]] = {}
    for member in members:
        match = _KINDS["val"].fullmatch(member.name)
        if match is None:
            raise ValueError(f"val archive {path} holds {member.name!r}: wanted names like ILSVRC2012_val_00000001.JPEG")
        number = int(match[1])
        if not 1 <= number <= len(devkit.validation_wnids):
            raise ValueError(
                f"val archive {path} holds {member.name!r}, but the ground truth of {devkit.path} ends at "
                f"{len(devkit.validation_wnids)}: give the devkit that belongs to this archive"
            )
        pictures.setdefault(devkit.validation_wnids[number - 1], []).append(member)
    jobs = [ClassJob(split="val", wnid=wnid, archive=path, pictures=tuple(found)) for wnid, found in pictures.items()]
    return _split_listing("val", path, jobs, members, num_bytes)


def list_members(archive: tarfile.TarFile, label: str) -> list[Member]:
    """All files of an open tar, refusing whatever is not a plain file with a plain name, and a tar that is cut short.

    `label` names the archive in messages. Raises ValueError naming the member: absolute or relative paths, hidden or
    unprintable names, links, devices, sparse files, folders, two files of one name.
    """
    members: dict[str, Member] = {}
    end = 0
    try:
        for info in archive:
            end = info.offset_data + (-(-info.size // _BLOCK) * _BLOCK if info.isreg() else 0)
            if info.isdir() and PurePosixPath(info.name) == PurePosixPath("."):
                continue  # what `tar cf archive.tar .` puts first
            problem = _member_problem(info)
            name = info.name.removeprefix("./")
            if problem is None and name in members:
                problem = "occurs twice"
            if problem is not None:
                raise ValueError(f"{label}: member {info.name!r} {problem}; nothing of it is extracted. Get the archive again")
            members[name] = Member(name, info.size, info.offset_data)
        # tarfile takes a damaged header, or the end of the file between two members, for the end of the archive.
        archive.fileobj.seek(end)
        mark = archive.fileobj.read(_BLOCK)
    except _TAR_ERRORS as error:
        raise ValueError(f"{label} is damaged or cut short after {len(members)} files ({error}): get it again") from None
    if len(mark) < _BLOCK or any(mark):
        raise ValueError(f"{label} is damaged or cut short after {len(members)} files (at byte {end}): get it again")
    if not members:
        raise ValueError(f"{label} holds no files: get it again")
    return list(members.values())


def require_pictures(members: Sequence[Member], label: str) -> None:
    """Raise ValueError naming the first member whose suffix is not a picture's."""
    for member in members:
        if not member.name.lower().endswith(PICTURE_SUFFIXES):
            raise ValueError(f"{label} holds {member.name!r}, which is no picture ({', '.join(PICTURE_SUFFIXES)})")


def _member_problem(info: tarfile.TarInfo) -> str | None:
    """Why a member must not become a file, or None."""
    name = info.name.removeprefix("./")
    if info.issym() or info.islnk():
        return f"is a link to {info.linkname!r}"
    if name.startswith("/"):
        return "has an absolute path"
    if ".." in PurePosixPath(name).parts:
        return "leads out of its folder"
    if info.isdir() or "/" in name or "\\" in name:
        return "lies in a folder, but this archive is flat"
    if not info.isreg() or info.issparse():
        return "is no plain file (a device, a pipe or a sparse file)"
    if info.size < 0:
        return f"has a size of {info.size} bytes"
    if not name or name.startswith(".") or not name.isprintable():  # bytes that are no UTF-8 are not printable either
        return "has a hidden or unprintable name"
    return None


def _open_and_list(path: Path, kind: str) -> tuple[list[Member], int]:
    _refuse_other_kind(path, kind)
    label = f"{kind} archive {path}"
    try:
        with tarfile.open(path, "r:") as archive:
            return list_members(archive, label), path.stat().st_size
    except tarfile.TarError as error:
        raise ValueError(f"{label} is no plain tar ({error}): if it is compressed, decompress it; else get it again") from None


def _refuse_other_kind(path: Path, wanted: str) -> None:
    """Raise ValueError where the first names in an archive tell that it is another one, or where it is no archive."""
    try:
        with tarfile.open(path, "r:*") as archive:
            names = [info.name.removeprefix("./") for info in islice(archive, _NUM_PEEKED)]
    except _TAR_ERRORS:
        with open(path, "rb") as file:
            start = file.read(8)
        raise ValueError(
            f"{wanted} archive {path} cannot be read as a tar: it has {path.stat().st_size} bytes and begins with {start!r}; "
            "get it again"
        ) from None
    for kind, pattern in _KINDS.items():
        if kind != wanted and any(pattern.fullmatch(name) for name in names):
            raise ValueError(
                f"{path} was given as the {wanted} archive, but holds {names[0]!r}: it is the archive of {kind}. "
                f"Give the one that holds {_SAMPLE_NAMES[wanted]}"
            )


def _ground_truth(content: bytes, wnids: dict[int, str], path: Path) -> tuple[str, ...]:
    truth = []
    for place, line in enumerate(content.decode("ascii", "replace").split(), start=1):
        if not line.isdecimal() or int(line) not in wnids:
            raise ValueError(f"ground truth of {path}, line {place}: {line!r} is no class of its meta.mat; get the devkit again")
        truth.append(wnids[int(line)])
    if not truth:
        raise ValueError(f"the ground truth of {path} is empty; get the devkit again")
    return tuple(truth)


def _split_listing(split: str, path: Path, jobs: list[ClassJob], members: list[Member], num_bytes: int) -> SplitListing:
    digest = hashlib.sha256()
    for member in sorted(members):
        digest.update(f"{member.name}\0{member.size}\n".encode())
    jobs = tuple(sorted(jobs, key=lambda job: job.wnid))
    return SplitListing(split=split, archive=path, jobs=jobs, num_bytes=num_bytes, listing_sha256=digest.hexdigest())
