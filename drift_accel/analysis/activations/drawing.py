"""Samples that a generator draws for its activations, as the options of tools/extract_activations.py ask for them."""

import argparse
from pathlib import Path

from drift_accel.analysis.activations.extraction import NO_PICTURES
from drift_accel.analysis.activations.models import NOISE, ActivationModel, EdmModel, GeneratorModel
from drift_accel.analysis.activations.opening import is_edm, load_edm
from drift_accel.analysis.activations.sources import SampleSource
from drift_accel.data.class_table import ClassTable
from drift_accel.data.row_encoders import weights_hash
from drift_accel.sampling.class_choice import table_of_classes
from drift_accel.sampling.draws import sample_noise
from drift_accel.sampling.edm_samples import EdmPictures
from drift_accel.sampling.model_options import asked_labels, asked_pictures, open_trained, open_vae
from drift_accel.sampling.trained import TrainedGenerator

OF_OUR_GENERATOR, OF_UNET = ("export", "ema", "step", "vae", "quantizer"), "samples of an EDM or DMD2 UNet"


def drawn_samples(arguments: argparse.Namespace, model: ActivationModel, table: ClassTable | None, device) -> SampleSource:
    """The samples of the generator that is SOURCE; `table` names a UNet's classes.

    With --feed noise their own noise is what the model gets. Raises ValueError and OSError as the generator's loader, and for
    options that contradict each other.
    """
    refuse_options(
        arguments, ("split", "image_column", "label_map", "label_order", "image_size", "crop"), "samples of a generator"
    )  # fmt: skip
    if arguments.per_class is not None:
        refuse_options(arguments, ("num_samples", "labels"), "--per_class, another way to say how many")
    if is_edm(arguments.source):
        return _edm_samples(arguments, model, table, device)
    return _our_samples(arguments, model, device)


def refuse_options(arguments: argparse.Namespace, names: tuple[str, ...], what: str) -> None:
    """Raise ValueError for the first of `names` that was given."""
    given = [name for name in names if getattr(arguments, name) is not None]
    if given:
        raise ValueError(f"--{given[0]} does not apply to {what}: leave it out")


def _our_samples(arguments: argparse.Namespace, model: ActivationModel, device) -> SampleSource:
    is_same = isinstance(model, GeneratorModel) and arguments.model is None
    trained = model.trained if is_same else open_trained(arguments, Path(arguments.source))
    labels = asked_labels(arguments, trained, per_class=arguments.per_class)
    noise = None
    if arguments.feed == NOISE:
        _require_same(model, GeneratorModel, trained.origin["weights_sha256"])
        config = trained.generator.config

        def noise(items):
            return sample_noise(config, arguments.seed, list(map(int, items))).numpy()

    decoder = _vae_of_samples(arguments, trained, model, device)
    pictures = asked_pictures(arguments, trained, decoder, labels, device)
    return SampleSource(
        pictures,
        f"{trained.origin['path']} seed {arguments.seed}",
        is_latent=trained.makes_latents,
        table=trained.table,
        noise=noise,
        needs_pictures=arguments.images != NO_PICTURES,
    )


def _vae_of_samples(arguments: argparse.Namespace, trained: TrainedGenerator, model: ActivationModel, device):
    """The VAE of a generator of latents, where pictures are wanted or the model looks at pixels."""
    if arguments.vae is None and model.spec.space == "latent" and arguments.images == NO_PICTURES:
        return None
    return open_vae(arguments, trained, device)


def _edm_samples(arguments: argparse.Namespace, model: ActivationModel, table: ClassTable | None, device) -> SampleSource:
    """Samples of an EDM or DMD2 UNet in one step."""
    refuse_options(arguments, OF_OUR_GENERATOR, OF_UNET)
    is_same = isinstance(model, EdmModel) and arguments.model in (None, arguments.source)
    unet = model.module if is_same else load_edm(arguments.source)
    digest = model.origin["weights_sha256"] if is_same else weights_hash(unet)
    if arguments.feed == NOISE:
        _require_same(model, EdmModel, digest)
        if model.sigma != unet.config.sigma_max:
            raise ValueError(f"--sigma is {model.sigma}, but samples begin at {unet.config.sigma_max}: leave it out")
    classes = TrainedClasses(table or table_of_classes(None, unet.config.num_classes))
    labels = asked_labels(arguments, classes, per_class=arguments.per_class)
    pictures = EdmPictures(
        unet, labels, seed=arguments.seed, weights_sha256=digest, batch=arguments.model_batch, device=device
    )  # fmt: skip
    return SampleSource(
        pictures,
        f"{arguments.source} seed {arguments.seed}",
        is_latent=False,
        table=table,
        noise=pictures.noise if arguments.feed == NOISE else None,
        needs_pictures=arguments.images != NO_PICTURES,
    )


class TrainedClasses:
    """The classes of a model, as far as choosing labels needs them."""

    def __init__(self, table: ClassTable):
        self.table = table


def _require_same(model: ActivationModel, kind: type, digest: str) -> None:
    if not isinstance(model, kind) or model.origin["weights_sha256"] != digest:
        raise ValueError("--feed noise looks into the generator while it draws: leave --model out, or name SOURCE itself")
