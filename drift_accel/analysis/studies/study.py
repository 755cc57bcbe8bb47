"""Study files: variants of one recipe that are trained with the same seeds and budget and judged alike."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from drift_accel.foundation.run_records import flatten_configuration

DIGITS = "digits"
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
_OWN_KEYS = ("seed", "output_dir", "config", "dry_run")  # of the trainer, given for each run by the study itself


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of a study's table: the base recipe with changes."""

    name: str
    note: str = ""
    """What the literature found, in a line."""
    published: float | None = None
    """The published number of this row, in the unit that the study's `published` names."""
    recipes: tuple[Path, ...] = ()
    """YAML files that the trainer reads on top of the base."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Values by dotted key, on top of those."""


@dataclass(frozen=True, kw_only=True)
class StudyEvaluation:
    """How every run is judged: the digits protocol, or one of tools/evaluate.py with its options."""

    protocol: str = DIGITS
    metric: str | None = None
    """The number by which rows are ordered; None: the Frechet distance, else the first."""
    guidance_scale: float = 1.0
    seed: int = 0
    """Of the samples, the same for every run."""
    num_samples: int | None = None
    """None with the digits, which are always 1,000."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of tools/evaluate.py by name: network, reference, metrics, vae and so on."""

    def __post_init__(self):
        if not 1 <= self.guidance_scale < float("inf"):
            raise ValueError(f"evaluation.guidance_scale is {self.guidance_scale}: guidance starts at 1 (no guidance)")
        if self.protocol == DIGITS and (self.options or self.num_samples is not None):
            given = ", ".join([*(("num_samples",) if self.num_samples is not None else ()), *self.options])
            raise ValueError(f"evaluation.{given}: the digits protocol has no such setting; leave it out")
        if self.protocol != DIGITS and (self.num_samples is None or self.num_samples < 1):
            raise ValueError(f"evaluation.num_samples is {self.num_samples}: say how many samples to judge, at least 1")


@dataclass(frozen=True, kw_only=True)
class Study:
    """A list of variants. `read_study` makes one of a file."""

    name: str
    title: str
    base: tuple[Path, ...]
    """Recipes of drift_accel.train, in order; of a key that several have, the last one counts."""
    common: Mapping[str, Any]
    """Values by dotted key that all variants share, over the base and under their own."""
    seeds: tuple[int, ...]
    evaluation: StudyEvaluation
    published: str
    """What the variants' published numbers are and where they stand; empty without any."""
    variants: tuple[Variant, ...]

    def arguments(self, variant: Variant, seed: int) -> list[str]:
        """What drift_accel.train is given for one run, apart from --output_dir."""
        files = [part for path in (*self.base, *variant.recipes) for part in ("--config", str(path))]
        # What a variant's file says must not be lost under a common value.
        common = {key: value for key, value in self.common.items() if key not in _keys_of(variant.recipes)}
        values = {**common, **variant.overrides, "seed": seed}
        return [*files, *(part for key, value in values.items() for part in (f"--{key}", _argument(value)))]


def read_study(path: str | Path, *, seeds: Sequence[int] | None = None) -> Study:
    """Read a study file; paths in it are relative to its folder. `seeds` replace its own.

    Raises ValueError naming the file and the key for whatever is wrong in it, FileNotFoundError for a file that is not there.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no study file {path}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
        return _study(path, _mapping(content, "the file"), seeds)
    except (ValueError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _study(path: Path, content: Mapping[str, Any], seeds: Sequence[int] | None) -> Study:
    known = ("title", "base", "common", "seeds", "evaluation", "published", "variants")
    _require_known(content, known, "study")
    for key in ("base", "variants"):
        if not content.get(key):
            raise ValueError(f"{key} is missing or empty: a study needs a base recipe and at least one variant")
    return Study(
        name=path.stem,
        title=_text(content.get("title", path.stem), "title"),
        base=_files(content["base"], path.parent, "base"),
        common=_overrides(content.get("common") or {}, "common"),
        seeds=_seeds(content.get("seeds", [0]) if seeds is None else list(seeds)),
        evaluation=_evaluation(content.get("evaluation") or {}, path.parent),
        published=_text(content.get("published", ""), "published"),
        variants=_variants(content["variants"], path.parent),
    )


def _variants(content: Any, folder: Path) -> tuple[Variant, ...]:
    if not isinstance(content, list):
        raise ValueError(f"variants is {content!r}: give a list, each with a name")
    variants, names = [], set()
    for place, entry in enumerate(content, start=1):
        entry = _mapping(entry, f"variant {place}")
        name = entry.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"variant {place} has the name {name!r}: give letters, digits, and _ . + - after the first")
        if name.lower() in names:  # runs are folders, and some file systems do not tell a from A
            raise ValueError(f"variant {place}: the name {name!r} is there already")
        names.add(name.lower())
        where = f"variant {name}"
        _require_known(entry, [f.name for f in fields(Variant)], where)
        published = entry.get("published")
        if published is not None and (isinstance(published, bool) or not isinstance(published, int | float)):
            raise ValueError(f"{where}: published is {published!r}: give a number")
        variants.append(
            Variant(
                name=name,
                note=_text(entry.get("note", ""), f"{where}: note"),
                published=None if published is None else float(published),
                recipes=_files(entry["recipes"], folder, f"{where}: recipes") if entry.get("recipes") else (),
                overrides=_overrides(entry.get("overrides") or {}, f"{where}: overrides"),
            )
        )
    return tuple(variants)


def _evaluation(content: Any, folder: Path) -> StudyEvaluation:
    content = dict(_mapping(content, "evaluation"))
    _require_known(content, [f.name for f in fields(StudyEvaluation)], "evaluation")
    content["options"] = dict(_mapping(content.get("options") or {}, "evaluation.options"))
    for name, kind in (("guidance_scale", int | float), ("seed", int), ("num_samples", int | None)):
        value = content.get(name, StudyEvaluation.__dataclass_fields__[name].default)
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ValueError(f"evaluation.{name} is {value!r}: give a number")
    return StudyEvaluation(**content)


def _overrides(content: Any, where: str) -> dict[str, Any]:
    """Values by dotted key; nested mappings are taken apart."""
    values = flatten_configuration(_mapping(content, where))
    for key in values:
        if key in _OWN_KEYS:
            raise ValueError(f"{where} has {key}, which the study gives to each run by itself: take it out")
    return values


def _files(content: Any, folder: Path, where: str) -> tuple[Path, ...]:
    entries = content if isinstance(content, list) else [content]
    paths = []
    for entry in entries:
        path = folder / _text(entry, where)
        if not path.is_file():
            raise ValueError(f"{where}: there is no {path} (paths are relative to the study's folder)")
        paths.append(path.resolve())
    return tuple(paths)


def _seeds(content: Any) -> tuple[int, ...]:
    if not isinstance(content, list) or not content:
        raise ValueError(f"seeds is {content!r}: give a list with at least one number")
    for seed in content:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seeds holds {seed!r}: a seed is an integer of at least 0")
    if len(set(content)) < len(content):
        raise ValueError(f"seeds {content} repeats one: each gives one run")
    return tuple(content)


def _keys_of(recipes: Sequence[Path]) -> set[str]:
    """The dotted keys that YAML files set."""
    contents = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in recipes]
    return {key for content in contents if isinstance(content, Mapping) for key in flatten_configuration(content)}


def _argument(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _mapping(content: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{where} is {content!r}: give keys with values")
    return content


def _text(content: Any, where: str) -> str:
    if not isinstance(content, str):
        raise ValueError(f"{where} is {content!r}: give a text")
    return content


def _require_known(content: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    unknown = sorted(set(content) - set(known))
    if unknown:
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}: it may have {', '.join(known)}")


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice in one mapping is an error, as in the trainers' recipes."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        repeated = sorted({key for key in keys if keys.count(key) > 1 and key != "<<"})
        if repeated:
            raise ValueError(f"{repeated[0]} stands twice in one place, again in line {node.start_mark.line + 1} or below")
        return super().construct_mapping(node, deep)
