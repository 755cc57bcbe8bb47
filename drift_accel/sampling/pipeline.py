"""The generator as a diffusers pipeline: class labels or names in, images out, one pass, no scheduler."""

import difflib
import json
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin

# From its own module: diffusers records that name and, when it loads, looks only among the modules already imported.
from drift_accel.foundation.provenance import collect_provenance
from drift_accel.foundation.storage import atomic_write_json, atomic_write_text
from drift_accel.models.generator import Generator
from drift_accel.sampling.decoding import decode_latents
from drift_accel.sampling.model_card import model_card
from drift_accel.sampling.sampler import generate
from drift_accel.sampling.trained import TrainedGenerator, align_memory
from drift_accel.sampling.vae_choice import LatentDecoder

CARD_NAME, PROVENANCE_NAME = "README.md", "provenance.json"
OUTPUT_TYPES = ("pil", "np", "pt", "latent")

ClassLabels = int | str | Sequence[int | str] | torch.Tensor


class DriftPipeline(DiffusionPipeline):
    """One-step class-conditional image generation by a drifting generator (arXiv 2602.04770).

    Load with `DriftPipeline.from_pretrained`, save with `save_pretrained`.

    Args:
        generator: the network, a `drift_accel.Generator`.
        vae: a diffusers autoencoder for a generator of latents; None for a generator of pixels in [-1, 1].
        id2label: class names by label; synonyms are separated by commas. It is saved with the pipeline.

    Raises:
        ValueError: the VAE has another number of latent channels than the generator, or `id2label` names a class that
            the generator does not have.
    """

    _optional_components = ["vae"]
    model_cpu_offload_seq = "generator->vae"

    def __init__(
        self,
        generator: Generator,
        vae: ModelMixin | None = None,
        id2label: dict | None = None,
    ):
        super().__init__()
        latent_channels = None if vae is None else getattr(vae.config, "latent_channels", None)
        if latent_channels is not None and latent_channels != generator.config.in_channels:
            raise ValueError(
                f"the VAE has {latent_channels} latent channels but the generator makes {generator.config.in_channels}; "
                "use the VAE that the training latents were made with"
            )
        if id2label is not None:
            # JSON has text keys only: written so from the start, a saved and a loaded pipeline have the same config.
            id2label = {str(int(label)): str(name) for label, name in id2label.items()}
            for label in id2label:
                _check_label(int(label), generator.config.num_classes)
        self.register_modules(generator=generator, vae=vae)
        self.register_to_config(id2label=id2label)
        self.provenance: dict[str, Any] = {}

    @classmethod
    def from_trained(cls, trained: TrainedGenerator, decoder: LatentDecoder | None = None) -> "DriftPipeline":
        """The pipeline of a run, an export or an official folder (`load_trained`), with its class names and provenance.

        `decoder` (`open_decoder`) is needed for latents. Raises ValueError for latents without one, and for a VAE whose own
        configuration is not the scaling that the latents were made with, which a saved pipeline could not keep.
        """
        if trained.makes_latents and decoder is None:
            raise ValueError(f"{trained.origin['path']} makes latents: give their VAE")
        if decoder is not None and decoder.scaling is not None:
            raise ValueError(
                f"the latents were made with scale and shift {decoder.scaling}, not those of the VAE's configuration: save a VAE "
                "with these in its configuration"
            )
        names = {entry.index: ", ".join(entry.names) for entry in trained.table}
        pipeline = cls(trained.generator, None if decoder is None else decoder.vae, id2label=names)
        pipeline.provenance = {"origin": dict(trained.origin), "training": dict(trained.provenance)}
        return pipeline

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Save weights, configuration, provenance.json and a model card (README.md, left alone where there is one).

        Other arguments and errors are those of `diffusers.DiffusionPipeline.save_pretrained`.
        """
        super().save_pretrained(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        provenance = {**self.provenance, "saved": collect_provenance(command=sys.argv)}
        atomic_write_json(folder / PROVENANCE_NAME, provenance)
        if not (folder / CARD_NAME).exists():
            card = model_card(self.generator.config, self.config.id2label or {}, provenance, has_vae=self.vae is not None)
            atomic_write_text(folder / CARD_NAME, card)

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> "DriftPipeline":
        """Load a saved pipeline; arguments and errors are those of `diffusers.DiffusionPipeline.from_pretrained`."""
        pipeline = super().from_pretrained(*args, **kwargs)
        pipeline.provenance = _read_provenance(pipeline.config.get("_name_or_path"))
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                align_memory(component)
        return pipeline

    @property
    def labels_by_name(self) -> dict[str, list[int]]:
        """The labels of every class name and every synonym, in lower case; ImageNet has names of two classes ("crane")."""
        labels: dict[str, list[int]] = {}
        for label, names in (self.config.id2label or {}).items():
            for name in {_normalised(name) for name in (names, *names.split(","))}:
                labels.setdefault(name, []).append(int(label))
        return labels

    def get_label_ids(self, class_labels: ClassLabels) -> list[int]:
        """Return labels as integers; names are looked up in `id2label`, ignoring case.

        Raises ValueError for a label out of range, an unknown name (with the closest known ones), a name of several
        classes, and a name where the pipeline has no `id2label`.
        """
        if hasattr(class_labels, "tolist"):  # tensors and arrays
            class_labels = class_labels.tolist()
        if isinstance(class_labels, str) or not isinstance(class_labels, Sequence):
            class_labels = [class_labels]
        by_name = self.labels_by_name if any(isinstance(label, str) for label in class_labels) else {}
        return [
            _label_of_name(label, by_name) if isinstance(label, str) else _check_label(label, self.generator.config.num_classes)
            for label in class_labels
        ]

    def __call__(
        self,
        class_labels: ClassLabels,
        guidance_scale: float = 1.0,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        batch_size: int = 1,
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Generate one image a class label, in the order given.

        Args:
            class_labels: one or several labels or class names.
            guidance_scale: the guidance that the network is conditioned on; 1 is none.
            seed: an integer in [0, 2^64). Image i depends on seed, i, its label and the guidance alone.
            generator: a torch generator to take the seed from instead. Without both the seed is a fresh one.
            output_type: "pil", "np" [N, H, W, C] in [0, 1], "pt" [N, C, H, W] in [0, 1], or "latent", the
                generator's output as it is.
            batch_size: images computed together; more than 1 is faster on a GPU. The last batch is padded; results of
                different sizes agree up to rounding.
            return_dict: False returns the tuple (images,).

        Raises:
            ValueError: a label as in `get_label_ids`, an unknown output type, both seed and generator, or images of a
                generator of latents without a VAE.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; choose one of {', '.join(OUTPUT_TYPES)}")
        channels = self.generator.config.in_channels
        if output_type != "latent" and self.vae is None and channels not in (1, 3):
            raise ValueError(
                f"the generator makes latents of {channels} channels; give the pipeline a vae, or use output_type='latent'"
            )
        labels = self.get_label_ids(class_labels)
        seed = _seed_of_call(seed, generator)
        # Under CPU offloading the weights' device is not where they run.
        device = self._execution_device
        images = generate(self.generator, labels, guidance_scale=guidance_scale, seed=seed, chunk=batch_size, device=device)
        if output_type != "latent":
            if self.vae is not None:
                images = decode_latents(self.vae, images, chunk=batch_size)
            images = VaeImageProcessor().postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _read_provenance(folder: str | None) -> dict[str, Any]:
    """What a saved pipeline says of itself; empty where it says nothing."""
    try:
        content = json.loads((Path(folder or "") / PROVENANCE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _seed_of_call(seed: int | None, generator: torch.Generator | None) -> int:
    if seed is not None and generator is not None:
        raise ValueError("both seed and generator are given; give one of them")
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise ValueError(f"generator must be a torch.Generator, got {type(generator).__name__}; one serves all images")
        return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    return secrets.randbits(63) if seed is None else seed


def _normalised(name: str) -> str:
    return " ".join(name.lower().split())


def _label_of_name(name: str, by_name: dict[str, list[int]]) -> int:
    if not by_name:
        raise ValueError(f"class {name!r} is a name, but this pipeline has no id2label; give the label's number")
    labels = by_name.get(_normalised(name), [])
    if len(labels) == 1:
        return labels[0]
    if labels:
        raise ValueError(f"class {name!r} is the name of several classes, {labels}; give the label's number")
    close = difflib.get_close_matches(_normalised(name), by_name, n=3)
    advice = f"did you mean {' or '.join(map(repr, close))}?" if close else "see the names in pipeline.config.id2label"
    raise ValueError(f"class {name!r} is unknown; {advice}")


def _check_label(label: int, num_classes: int) -> int:
    if isinstance(label, bool) or not hasattr(label, "__index__"):
        raise ValueError(f"class label {label!r} is neither an integer nor a name")
    label = label.__index__()
    if not 0 <= label < num_classes:
        raise ValueError(f"class label {label} is outside [0, {num_classes}), the generator's classes")
    return label
