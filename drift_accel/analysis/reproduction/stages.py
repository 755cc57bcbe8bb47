"""The stages of a whole reproduction, from archives to report: their order, what each one needs, where things lie."""

from dataclasses import dataclass
from pathlib import Path

# stage -> the stages whose output it is made from.
INPUTS: dict[str, tuple[str, ...]] = {
    "archives": (),
    "verify_images": ("archives",),
    "reference": ("archives",),
    "export": ("archives",),
    "verify_cache": ("export",),
    "mae": ("archives",),
    "train": ("export", "mae"),
    "sample": ("train",),
    "evaluate": ("sample", "reference"),
    "report": ("train", "evaluate"),
}
STAGES = tuple(INPUTS)


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """Where one reproduction keeps what it makes, and how much of it is wanted. Raises ValueError for values out of range."""

    work: Path
    """Folder of gates.json and the reports of verifications."""
    archives: Path
    """The three archives under their official names."""
    images: Path
    """What tools/prepare_imagenet.py writes."""
    cache: Path
    """What tools/export_latents.py writes."""
    reference: Path
    """Statistics of real pictures."""
    mae: Path
    """Run of the encoder."""
    encoder: Path
    """Its export, or an encoder from elsewhere, which is then not trained."""
    generator: Path
    """Run of the generator."""
    samples: Path
    """The .npz of generated pictures."""
    result: Path
    """The JSON of their evaluation."""
    mae_recipe: Path
    recipe: Path
    protocol: str
    """Of the reference and the evaluation."""
    network: Path | None = None
    """The protocol's network; None: where it is usually looked for."""
    num_samples: int = 50_000
    image_size: int = 256
    is_imagenet: bool = True
    """Whether the archives must hold ImageNet's numbers of classes and pictures."""

    def __post_init__(self):
        for name in ("num_samples", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: give at least 1")

    @property
    def gates(self) -> Path:
        """The record of what was checked."""
        return self.work / "gates.json"

    @property
    def images_report(self) -> Path:
        """What the verification of the pictures found."""
        return self.work / "verify_images.json"

    @property
    def cache_report(self) -> Path:
        """What the verification of the cache found."""
        return self.work / "verify_cache.json"

    @property
    def report(self) -> Path:
        """The page of the generator's run."""
        return self.generator / "report.html"

    @property
    def trains_encoder(self) -> bool:
        """Whether the encoder is made here."""
        return self.mae.resolve() in self.encoder.resolve().parents

    @property
    def makes_reference(self) -> bool:
        """Whether the reference is made here; else it is a file that is there already, such as a published one."""
        return self.work.resolve() in self.reference.resolve().parents
