"""Sets of activations by the paths that a command line names, with a title for each."""

from collections.abc import Sequence
from pathlib import Path

from drift_accel.analysis.activations.store import ACTIVATIONS, ActivationSet, set_names


def open_sets(paths: Sequence[Path]) -> dict[str, ActivationSet]:
    """{title: set}, in the order given; a path is FOLDER/activations/NAME, or a FOLDER that holds one set.

    A set's title is its name, with as many folders in front as tell it from the others. Raises FileNotFoundError, ValueError for
    a folder of several sets, a set that is given twice, and as ActivationSet.open does.
    """
    places = [_place(Path(path)) for path in paths]
    doubled = [place for place in places if places.count(place) > 1]
    if doubled:
        folder, name = doubled[0]
        raise ValueError(f"the set {name!r} of {folder} is given twice: give each set once")
    return {title: ActivationSet.open(*place) for title, place in zip(_titles(places), places, strict=True)}


def _place(path: Path) -> tuple[Path, str]:
    """(folder, name) of a set."""
    path = path.resolve()
    if path.parent.name == ACTIVATIONS:
        return path.parent.parent, path.name
    names = set_names(path)
    if len(names) == 1:
        return path, names[0]
    if names:
        raise ValueError(f"{path} holds the sets {', '.join(names)}: name one, such as {path / ACTIVATIONS / names[0]}")
    raise FileNotFoundError(f"{path} holds no set: give FOLDER/{ACTIVATIONS}/NAME of tools/extract_activations.py")


def _titles(places: Sequence[tuple[Path, str]]) -> list[str]:
    """The shortest tails of folder/name that differ."""
    parts = [(*folder.parts, name) for folder, name in places]
    length = 1
    while len({part[-length:] for part in parts}) < len(parts):
        length += 1
    return ["/".join(part[-length:]) for part in parts]
