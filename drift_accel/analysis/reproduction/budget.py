"""What the stages of a reproduction will take on the disk, and whether it fits, before the first of them begins."""

import shutil
import tarfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from drift_accel.analysis.reproduction.stages import STAGES, Reproduction
from drift_accel.data.archive_listing import OFFICIAL, SPLITS
from drift_accel.data.archive_records import read_manifest
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.models import Generator, MaskedAutoencoder
from drift_accel.training.retention import run_bytes

_BYTES_A_FILE, _FOLDERS = 4096, 1.03  # blocks that are not full, inodes, the folders themselves
_FEATURE_BYTES = 4 * (2048 + 1008)  # features and logits of the largest network
_LATENT_BYTES = 2  # float16
_ORIENTATIONS = 2
_SHARDS = 2_000_000_000  # shards of eight processes, which exist twice while they are made
_SMALL = 100_000_000  # statistics, reports, records


@dataclass(frozen=True, kw_only=True)
class StageSpace:
    """Bytes that a stage leaves behind in `folder`, and those that it needs beside them while it runs."""

    stage: str
    folder: Path
    kept: int
    passing: int = 0


def plan_space(paths: Reproduction, generator, mae, finished: Collection[str] = ()) -> list[StageSpace]:
    """What each stage that is not `finished` will take; `generator` and `mae` are the configurations of both trainings.

    Pictures are counted in the archives; ImageNet's are known. Raises FileNotFoundError and ValueError for archives that are
    missing or no tars.
    """
    images, archive_bytes = _count_pictures(paths)
    latent = generator.generator.resolved()
    rows = _LATENT_BYTES * _ORIENTATIONS * latent["in_channels"] * latent["input_size"] ** 2 * images["train"]
    pixels = 3 * paths.image_size**2 * paths.num_samples
    extracted = int(_FOLDERS * archive_bytes) + _BYTES_A_FILE * sum(images.values()) * bool(archive_bytes)
    training = _run_bytes(generator, Generator, generator.generator, paths.generator)
    spaces = {
        "archives": (paths.images, extracted, 0),
        "reference": (paths.reference.parent, _SMALL, _FEATURE_BYTES * images["train"]),
        "export": (paths.cache, rows, min(rows, _SHARDS)),
        "mae": (paths.mae, _run_bytes(mae, MaskedAutoencoder, mae.mae, paths.mae), 0),
        "train": (paths.generator, training, 0),
        "sample": (paths.samples.parent, pixels, pixels),
        "evaluate": (paths.result.parent, _SMALL, _FEATURE_BYTES * paths.num_samples),
    }
    given = {*finished, *(() if paths.trains_encoder else ("mae",)), *(() if paths.makes_reference else ("reference",))}
    return [
        StageSpace(stage=stage, folder=spaces[stage][0], kept=spaces[stage][1], passing=spaces[stage][2])
        for stage in STAGES
        if stage in spaces and stage not in given
    ]


def disk_problems(spaces: Sequence[StageSpace]) -> list[str]:
    """One line for each disk that is too small for all that is kept on it and the largest of what passes."""
    disks: dict[int, list[StageSpace]] = {}
    for space in spaces:
        disks.setdefault(_existing(space.folder).stat().st_dev, []).append(space)
    problems = []
    for group in disks.values():
        place = _existing(group[0].folder)
        needed = sum(space.kept for space in group) + max(space.passing for space in group)
        free = shutil.disk_usage(place).free
        if needed > free:
            names = ", ".join(space.stage for space in group)
            problems.append(
                f"{names} need {needed / 1e9:.1f} GB on the disk of {place}, but {free / 1e9:.1f} GB are free: free some space, "
                "or put ARCHIVES, IMAGES, CACHE or WORK on another disk"
            )
    return problems


def _count_pictures(paths: Reproduction) -> tuple[dict[str, int], int]:
    """Pictures by split, and the bytes of the archives whose pictures are not extracted yet."""
    manifest = read_manifest(paths.images)
    images = {split: manifest[split]["images"] for split in SPLITS if split in manifest}
    files = {split: paths.archives / OFFICIAL[split].name for split in SPLITS if split not in images}
    for split, file in files.items():
        if not file.is_file():
            raise FileNotFoundError(f"there is no {file}: put the archive there, or name its folder with ARCHIVES")
        images[split] = OFFICIAL[split].images if paths.is_imagenet else _archive_pictures(file)
    return images, sum(file.stat().st_size for file in files.values())


def _archive_pictures(file: Path) -> int:
    """Pictures in a train archive (tars of pictures) or a val archive (pictures)."""
    try:
        with tarfile.open(file, "r:") as archive:
            count = 0
            for member in archive:
                if not member.name.endswith(".tar"):
                    count += 1
                    continue
                with tarfile.open(fileobj=archive.extractfile(member)) as inner:
                    count += sum(1 for _ in inner)
            return count
    except tarfile.TarError as error:
        raise ValueError(f"{file} cannot be read as a tar ({error}): get it again") from None


def _run_bytes(config, network: type, group, folder: Path) -> int:
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in network(**group.arguments()).parameters())
    there = len(RunFolder(folder).checkpoint_steps())
    return run_bytes(config.checkpoint, parameters, len(config.ema.decays), config.steps, there=there)[1] + _SMALL


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
