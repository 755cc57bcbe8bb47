"""Archives of ImageNet in the true layout, small: nested tars, a flat one, the devkit with its .mat and ground truth."""

import hashlib
import io
import random
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from drift_accel.data.archive_listing import OFFICIAL
from drift_accel.data.imagenet_archives import PrepareConfig

# (ILSVRC2012_ID, wnid, words, number of children): the devkit's numbers run against the order of the wnids.
SYNSETS = [
    (1, "n03126707", "crane", 0),
    (2, "n01440764", "tench, Tinca tinca", 0),
    (3, "n02119789", "kit fox, Vulpes macrotis", 0),
    (4, "n01443537", "goldfish, Carassius auratus", 0),
    (5, "n00001740", "entity", 2),
    (6, "n02084071", "dog, domestic dog", 7),
]
WNID_OF = {number: wnid for number, wnid, _, children in SYNSETS if children == 0}
FIELDS = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height", "num_train_images")

Tree = dict[str, bytes]


def tar_bytes(files: dict[str, bytes] | list[tuple[str, bytes]], entries: list[tarfile.TarInfo] = (), mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, content in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in entries:
            archive.addfile(info)
    return file.getvalue()


def meta_mat(synsets=SYNSETS) -> bytes:
    """meta.mat in the devkit's structure: [N, 1] of eight fields."""
    table = np.empty((len(synsets), 1), dtype=[(field, object) for field in FIELDS])
    for row, (number, wnid, words, children) in enumerate(synsets):
        below = np.arange(1, children + 1, dtype=float)
        table[row, 0] = (float(number), wnid, words, "gloss", float(children), below, float(bool(children)), 1300.0)
    file = io.BytesIO()
    savemat(file, {"synsets": table})
    return file.getvalue()


def devkit_bytes(synsets=SYNSETS, truth=()) -> bytes:
    """The devkit archive; `truth` is the ground truth, a devkit number a validation picture."""
    lines = "".join(f"{number}\n" for number in truth).encode()
    files = {
        "readme.txt": b"Introduction",
        "data/meta.mat": meta_mat(synsets),
        "data/ILSVRC2012_validation_ground_truth.txt": lines,
    }
    return tar_bytes({f"ILSVRC2012_devkit_t12/{name}": content for name, content in files.items()}, mode="w:gz")


def jpeg(mode: str, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, len(mode)), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(), mode="L" if mode == "L" else mode).save(file, "JPEG")
    return file.getvalue()


def digest(tree: Tree) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in tree.items()}


def read_tree(folder: Path) -> Tree:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclass
class Archives:
    """Archives under their official names in a folder, and what must come out of them."""

    folder: Path
    train: Tree
    val: Tree

    def write(self, pictures: dict[str, dict[str, bytes]], validation: list[bytes], seed: int) -> None:
        order = random.Random(seed)
        truth = [order.choice(sorted(WNID_OF)) for _ in validation]
        truth[: len(WNID_OF)] = sorted(WNID_OF)  # each class occurs
        self.write_train({f"{wnid}.tar": tar_bytes(files) for wnid, files in pictures.items()})
        names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, len(validation) + 1)]
        flat = list(zip(names, validation, strict=True))
        self.val = {f"{WNID_OF[number]}/{name}": content for number, (name, content) in zip(truth, flat, strict=True)}
        order.shuffle(flat)  # the number in the name counts, not the place in the archive
        self.path("val").write_bytes(tar_bytes(flat))
        self.path("devkit").write_bytes(devkit_bytes(truth=truth))
        self.train = {f"{wnid}/{name}": content for wnid, files in pictures.items() for name, content in files.items()}

    def write_train(self, tars: dict[str, bytes]) -> None:
        self.path("train").write_bytes(tar_bytes(tars))

    def path(self, kind: str) -> Path:
        return self.folder / OFFICIAL[kind].name

    def config(self, output_dir: Path, **settings) -> PrepareConfig:
        return PrepareConfig(output_dir=output_dir, archives=self.folder, skip_md5=True, expect="none", **settings)


def make_archives(tmp_path: Path) -> Archives:
    """A few pictures a class: colour, grey, CMYK, a corrupt one, an empty one, odd names."""
    pictures = {
        "n03126707": {f"n03126707_{k}.JPEG": jpeg("RGB", k) for k in range(7)},
        "n01440764": {
            "n01440764_1.JPEG": jpeg("CMYK", 1),
            "n01440764_2.JPEG": jpeg("L", 2),
            "n01440764_3.JPEG": jpeg("RGB", 3)[:99],
        },
        "n02119789": {"n02119789 with spaces (1).jpg": jpeg("RGB", 4), "ä-" + "long" * 60 + ".JPEG": jpeg("RGB", 5)},
        "n01443537": {"n01443537_0.JPEG": b"", "n01443537_9.png": b"no picture at all"},
    }
    (tmp_path / "archives").mkdir()
    made = Archives(tmp_path / "archives", {}, {})
    made.write(pictures, [jpeg("RGB", 100 + k) for k in range(11)], seed=0)
    return made
