"""Which class a picture of a source belongs to, by its key: nothing unknown ever becomes a class."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from drift_accel.data.class_table import ClassEntry, ClassTable, read_table_content

NUM_IMAGENET_CLASSES = 1000
_SYNSET = re.compile(r"n\d{8}")


def read_class_table(path: str | os.PathLike) -> ClassTable:
    """A class table of `ClassTable.write`, or JSON of the form {"0": ["n01440764", "tench"], "1": ...}.

    Raises FileNotFoundError, ValueError for a file that is neither.
    """
    content = read_table_content(path, "give a class table")
    if not isinstance(content, dict) or "format" in content or not content:
        return ClassTable.from_content(content, path)
    try:
        labels = sorted(content, key=int)
        entries = []
        for rank, label in enumerate(labels):
            wnid, name = content[label]
            # Written with underscores in the place of spaces in most copies.
            entries.append(ClassEntry(index=int(label), wnid=wnid, names=tuple(name.replace("_", " ").split(", "))))
            if int(label) != rank:
                raise ValueError(f"label {label} stands at place {rank}: wanted 0, 1, 2, ...")
        return ClassTable(entries)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is no class table: wanted {{"0": ["n01440764", "tench"], ...}}: {error}') from None


def require_synset_folders(root: os.PathLike | str, class_ids: Sequence[str]) -> None:
    """Raise ValueError where the classes that a folder or data set at `root` lists do not say which labels they have.

    Classes called by synsets are labelled by the rank of their wnid among all 1,000: part of them does not tell it. A class
    of another name among them is none of these. Classes that have nothing to do with synsets are a data set of its own.
    """
    synsets = [key for key in class_ids if _SYNSET.fullmatch(key)]
    if not synsets:
        return
    others = [key for key in class_ids if not _SYNSET.fullmatch(key)]
    if others:
        raise ValueError(
            f"{Path(root) / others[0]} is named by no synset (n and eight digits), the other classes are "
            f"({synsets[0]}, ...): rename or move it; {len(others)} such classes in all"
        )
    if len(synsets) != NUM_IMAGENET_CLASSES:
        raise ValueError(
            f"{root} holds {len(synsets)} of the {NUM_IMAGENET_CLASSES} synsets, which does not tell their labels: name all "
            "classes with --class_table"
        )


def labels_in_table(place: object, class_ids: Sequence[str], used: Sequence[int], table: ClassTable) -> np.ndarray:
    """The label in `table` of each class of a source, int64 [len(class_ids)]; -1 for classes that are not `used`.

    A class is found by its key (wnid, folder name), or else by its names. Raises ValueError naming every key that the table
    does not have.
    """
    found, unknown = np.full(len(class_ids), -1, dtype=np.int64), []
    for label in used:
        key = class_ids[label]
        try:
            found[label] = (table.by_wnid(key) if key in table or _SYNSET.fullmatch(key) else table.by_name(key)).index
        except ValueError as error:
            unknown.append(f"{key!r} ({error})" if not unknown else repr(key))
    if unknown:
        kind = "synset" if all(_SYNSET.fullmatch(class_ids[label]) for label in used) else "class"
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise ValueError(
            f"{place}: unknown {kind} {', '.join(unknown[:5])}{more}: "
            f"not among the {len(table)} classes of the table; give the table of this data set with --class_table, or move its "
            "pictures away"
        )
    return found
