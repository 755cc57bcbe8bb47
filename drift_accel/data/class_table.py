"""The class table: which label is which class, by index, by wnid (or folder name), by the names people use.

The index of an ILSVRC2012 class is the rank of its wnid in sorted order, as in every published model. The devkit's own
numbers (ILSVRC2012_ID) are another order and appear only where its ground truth is read.
"""

import difflib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drift_accel.data.image_sources import sort_class_names
from drift_accel.foundation.storage import atomic_write_json

FORMAT = 1
_WNID = re.compile(r"n\d{8}")
_META_FIELDS = ("ILSVRC2012_ID", "WNID", "words", "num_children")


@dataclass(frozen=True, kw_only=True)
class ClassEntry:
    """One class: its label from 0, its key on disk (wnid or folder name), its names, the usual one first."""

    index: int
    wnid: str
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        """The usual name."""
        return self.names[0]


@dataclass(frozen=True, kw_only=True)
class Synset:
    """A class as the devkit numbers it: `devkit_id` is the ILSVRC2012_ID of its ground truth, from 1."""

    devkit_id: int
    wnid: str
    names: tuple[str, ...]


class ClassTable:
    """All classes by label. Raises ValueError unless the labels count up from 0, keys differ and every class has a name."""

    def __init__(self, classes: Sequence[ClassEntry]):
        self.classes = tuple(classes)
        if not self.classes:
            raise ValueError("a class table needs at least one class")
        self._by_wnid: dict[str, ClassEntry] = {}
        self._by_name: dict[str, list[ClassEntry]] = {}
        for rank, entry in enumerate(self.classes):
            if entry.index != rank:
                raise ValueError(f"class {entry.wnid!r} has the index {entry.index} at place {rank}: wanted 0, 1, 2, ...")
            if entry.wnid in self._by_wnid:
                raise ValueError(f"the classes {self._by_wnid[entry.wnid].index} and {rank} are both called {entry.wnid!r}")
            if not entry.names or not all(entry.names):
                raise ValueError(f"class {rank} ({entry.wnid!r}) has the names {entry.names}: give at least one, and none empty")
            self._by_wnid[entry.wnid] = entry
            for name in dict.fromkeys(map(_name_key, (*entry.names, ", ".join(entry.names)))):
                self._by_name.setdefault(name, []).append(entry)

    @classmethod
    def from_wnids(cls, names: dict[str, Sequence[str]]) -> "ClassTable":
        """The table of {wnid: names}, labels by sorted wnid; as numbers where all are numbers, so that 10 comes after 9."""
        return cls(
            [
                ClassEntry(index=index, wnid=wnid, names=tuple(names[wnid]))
                for index, wnid in enumerate(sort_class_names(list(names)))
            ]
        )

    @classmethod
    def from_meta(cls, meta: bytes, source: str = "meta.mat") -> "ClassTable":
        """The table of the devkit's meta.mat, given by its content; labels by sorted wnid. Raises as `read_synsets`."""
        return cls.from_wnids({synset.wnid: synset.names for synset in read_synsets(meta, source)})

    @classmethod
    def from_folder(cls, root: str | os.PathLike) -> "ClassTable":
        """The table of a folder of class folders: each folder's name is key and name; hidden ones are left out.

        Labels as `ImageFolder` gives them. Raises FileNotFoundError if there is no folder, ValueError if it holds no class
        folders or two spellings of one number.
        """
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"{root} is no folder: give the folder that holds one folder a class")
        names = [entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
        if not names:
            raise ValueError(f"{root} holds no class folders")
        return cls.from_wnids({name: (name,) for name in names})

    @classmethod
    def read(cls, path: str | os.PathLike) -> "ClassTable":
        """Read what `write` wrote. Raises FileNotFoundError, ValueError for a file that is no class table."""
        return cls.from_content(read_table_content(path), path)

    @classmethod
    def from_content(cls, content: Any, path: str | os.PathLike) -> "ClassTable":
        """The table of what `write` wrote to `path`, parsed. Raises ValueError naming the file for other content."""
        try:
            return cls(list(_entries(content)))
        except ValueError as error:
            raise ValueError(f"{path} is no class table: {error}") from None

    def write(self, path: str | os.PathLike) -> None:
        """Write the table as JSON, whole or not at all. Raises OSError."""
        classes = [{"index": entry.index, "wnid": entry.wnid, "names": entry.names} for entry in self.classes]
        atomic_write_json(path, {"format": FORMAT, "classes": classes})

    def __len__(self) -> int:
        return len(self.classes)

    def __iter__(self) -> Iterator[ClassEntry]:
        return iter(self.classes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClassTable) and self.classes == other.classes

    def __hash__(self) -> int:
        return hash(self.classes)

    def __contains__(self, wnid: object) -> bool:
        return wnid in self._by_wnid

    @property
    def wnids(self) -> tuple[str, ...]:
        """The keys, by label."""
        return tuple(entry.wnid for entry in self.classes)

    def by_index(self, index: int) -> ClassEntry:
        """The class of a label. Raises ValueError for a label that there is not; negative ones do not count from the end."""
        if not 0 <= index < len(self.classes):
            raise ValueError(f"class {index} does not exist: there are {len(self.classes)} classes, 0 to {len(self.classes) - 1}")
        return self.classes[index]

    def by_wnid(self, wnid: str) -> ClassEntry:
        """The class of a key. Raises ValueError, naming the keys that are close, where there is none."""
        if wnid not in self._by_wnid:
            raise ValueError(f"there is no class folder {wnid!r}{_did_you_mean(wnid, self._by_wnid)}")
        return self._by_wnid[wnid]

    def by_name(self, name: str) -> ClassEntry:
        """The class that has this name among its names, upper and lower case alike.

        Raises ValueError where there is none, naming those that are close, and where several classes have that name (two
        ImageNet classes are called "crane").
        """
        found = self._by_name.get(_name_key(name), [])
        if not found:
            raise ValueError(f"there is no class named {name!r}{_did_you_mean(_name_key(name), self._by_name)}")
        if len(found) > 1:
            choices = "; ".join(f"{entry.wnid} (class {entry.index}: {', '.join(entry.names)})" for entry in found)
            raise ValueError(f"{len(found)} classes are named {name!r}: choose one by its wnid: {choices}")
        return found[0]


def read_synsets(meta: bytes, source: str = "meta.mat") -> list[Synset]:
    """The classes of the devkit's meta.mat: its synsets without children, in the order of their devkit numbers.

    `source` names the file in messages. Raises ValueError for a content that is no such file, for keys that are no wnids
    (they become folder names) and for numbers or wnids that occur twice.
    """
    from scipy.io import loadmat  # a quarter of a second that only this needs

    try:
        table = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"].reshape(-1)
        columns = [table[field] for field in _META_FIELDS]
        rows = [(int(number), str(wnid), str(words), int(count)) for number, wnid, words, count in zip(*columns, strict=True)]
    # scipy raises whatever damaged bytes lead it to.
    except Exception as error:
        raise ValueError(
            f"{source} is not the ILSVRC2012 table of synsets ({type(error).__name__}: {error}); get the devkit again"
        ) from None
    leaves = sorted(row for row in rows if row[3] == 0)
    for _, wnid, words, _ in leaves:
        if not _WNID.fullmatch(wnid) or not words.strip():
            raise ValueError(f"{source} has a class {wnid!r} named {words!r}: wanted a wnid like n01440764 and its names")
    for column, label in ((0, "ILSVRC2012_ID"), (1, "WNID")):
        values = [row[column] for row in leaves]
        if len(set(values)) < len(values):
            twice = next(value for value in values if values.count(value) > 1)
            raise ValueError(f"{source} has two classes with the {label} {twice}; get the devkit again")
    # Some names hold a comma of their own without a space; torchvision cuts at the same place.
    return [Synset(devkit_id=number, wnid=wnid, names=tuple(words.strip().split(", "))) for number, wnid, words, _ in leaves]


def read_table_content(path: str | os.PathLike, remedy: str = "make it again") -> Any:
    """The parsed JSON of a class table's file. Raises FileNotFoundError, ValueError with the remedy for what is no JSON."""
    path = Path(path)
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no class table at {path}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): {remedy}") from None


def _entries(content: Any) -> Iterator[ClassEntry]:
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("classes"), list):
        raise ValueError(f"wanted an object of format {FORMAT} with a list of classes")
    for place, item in enumerate(content["classes"]):
        index, wnid, names = (item.get(key) for key in ("index", "wnid", "names")) if isinstance(item, dict) else (None,) * 3
        named = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not (isinstance(index, int) and isinstance(wnid, str) and named):
            raise ValueError(f"entry {place} is {item!r}: wanted index, wnid and a list of names")
        yield ClassEntry(index=index, wnid=wnid, names=tuple(names))


def _name_key(name: str) -> str:
    return " ".join(name.casefold().split())


def _did_you_mean(asked: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(asked, known, n=4, cutoff=0.6)
    close += [name for name in known if asked and asked in name and name not in close][: 4 - len(close)]
    return f"; close are {', '.join(map(repr, close))}" if close else f"; there are {len(known)}, such as {next(iter(known))!r}"
