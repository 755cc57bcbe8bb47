"""Which classes are asked for: by label, by wnid or folder name, by the names people use."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from drift_accel.data.class_table import ClassEntry, ClassTable

_WHOLE_NUMBER = re.compile(r"\d+")


def table_of_classes(classes: Sequence[Mapping[str, Any]] | None, num_classes: int) -> ClassTable:
    """The class table of a model with `num_classes`, from what its export says about its data.

    `classes` are {"index", "id", "name"} by label, names with their synonyms separated by ", "; None and labels beyond the
    end are named by their numbers. Raises ValueError for more classes than the model has and for entries that are no table.
    """
    classes = list(classes or ())
    if len(classes) > num_classes:
        raise ValueError(f"the class table has {len(classes)} classes but the model has {num_classes}: it belongs to another one")
    entries = [
        ClassEntry(index=entry["index"], wnid=str(entry["id"]), names=tuple(str(entry["name"]).split(", "))) for entry in classes
    ]
    taken = {entry.wnid for entry in entries}
    for label in range(len(entries), num_classes):
        key = str(label) if str(label) not in taken else f"label {label}"
        entries.append(ClassEntry(index=label, wnid=key, names=(key,)))
    return ClassTable(entries)


def find_label(item: str | int, table: ClassTable) -> int:
    """The label of one class: a label (207, "207"), a key ("n02099601") or a name ("golden retriever").

    A number that is also the key or name of another class is refused: write "label:3" or "name:3". Raises ValueError, naming
    close classes, for one that does not exist.
    """
    if not isinstance(item, str):
        return table.by_index(int(item)).index
    item = item.strip()
    kind, _, rest = item.partition(":")
    if kind == "label" and _WHOLE_NUMBER.fullmatch(rest):
        return table.by_index(int(rest)).index
    if kind == "name":
        return _named(rest, table)
    if not _WHOLE_NUMBER.fullmatch(item):
        return _named(item, table)
    number = int(item)
    try:
        named = _named(item, table)
    except ValueError:
        return table.by_index(number).index
    if number < len(table) and named != number:
        raise ValueError(
            f"{item!r} is the label of class {table.by_index(number).name!r} and the name of class {named}: "
            f"write label:{item} or name:{item}"
        )
    return named


def choose_labels(text: str | None, table: ClassTable, default: int | None = None) -> list[int]:
    """The labels of a comma-separated list of classes and of ranges of labels ("0-9, goldfish").

    None asks for the first `default` classes (None: all). Raises ValueError naming what does not exist, and for an empty list.
    """
    if text is None:
        return list(range(len(table) if default is None else min(default, len(table))))
    labels = []
    for item in (part.strip() for part in text.split(",")):
        span = re.fullmatch(r"(\d+)-(\d+)", item)
        try:
            if span and item not in table:
                if int(span[1]) > int(span[2]):
                    raise ValueError("the range runs backwards")
                labels += [table.by_index(label).index for label in range(int(span[1]), int(span[2]) + 1)]
            else:
                labels.append(find_label(item, table))
        except ValueError as error:
            advice = f"give labels from 0 to {len(table) - 1}, wnids or names"
            raise ValueError(f"--classes holds {item!r}: {error}; {advice}") from None
    if not labels:
        raise ValueError(f"--classes is {text!r}: name at least one class")
    return labels


def folder_names(table: ClassTable) -> list[str]:
    """A folder name a class, by label, whose sorted order is the order of the labels.

    The keys themselves where they are wnids or sort so anyway, else zero-padded labels.
    """
    keys = list(table.wnids)
    plain = all(re.fullmatch(r"[\w.+-]+", key) and not key.startswith(".") for key in keys)
    if plain and keys == sorted(keys):
        return keys
    return [f"{label:0{len(str(len(keys) - 1))}d}" for label in range(len(keys))]


def _named(name: str, table: ClassTable) -> int:
    is_key = name in table or re.fullmatch(r"n\d{8}", name)
    return (table.by_wnid(name) if is_key else table.by_name(name)).index
