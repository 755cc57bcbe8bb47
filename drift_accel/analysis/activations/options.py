"""The options of tools/extract_activations.py, and what they name."""

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from drift_accel.analysis.activations.batches import DTYPES, STORAGES
from drift_accel.analysis.activations.drawing import OF_OUR_GENERATOR, OF_UNET, drawn_samples, refuse_options
from drift_accel.analysis.activations.extraction import MODEL_PICTURES, PICTURES, ActivationExtraction, ExtractionConfig
from drift_accel.analysis.activations.models import IMAGES, NOISE, ActivationModel, EdmModel, default_layers
from drift_accel.analysis.activations.opening import (
    DIGITS,
    MODEL_KINDS,
    is_edm,
    model_kind,
    name_classes,
    open_model,
    open_real_source,
)
from drift_accel.analysis.activations.sample_selection import select_samples
from drift_accel.analysis.activations.sources import ActivationSource, RowSource
from drift_accel.analysis.activations.staging import require_set_name
from drift_accel.data.crops import CROPS, ImageCrop
from drift_accel.data.downsampled_imagenet import STANDARD
from drift_accel.data.source_classes import read_class_table
from drift_accel.models.encoder_configuration import EncoderConfig
from drift_accel.models.pixel_encoder import PixelEncoder
from drift_accel.sampling.class_choice import choose_labels
from drift_accel.sampling.model_options import add_model_options, add_sample_options
from drift_accel.sampling.trained import is_model

CROP_OF_EDM, DEFAULT_CROP = "lanczos", "adm"


def add_extraction_options(parser: argparse.ArgumentParser) -> None:
    """All options of the command but what it takes activations of."""
    add = parser.add_argument
    add("--model", help="whose activations: a run, an export, a checkpoint, an encoder's folder or file, module:function "
        "(default: the generator that is SOURCE)")  # fmt: skip
    add("--model_kind", choices=MODEL_KINDS, help="what --model is (default: by what lies there)")
    for name in ("export", "ema", "step"):
        add(f"--model_{name}", help=f"--{name} of the model, where it is a run")
    add("--encoder", nargs="*", default=[], metavar="KEY=VALUE", help="settings of an encoder: architecture=resnet50 ...")
    add("--run_code", action="store_true", help="allow module:function to run with all rights of this process")
    add("--layers", help="comma-separated names (default: an encoder's last map, a UNet's bottleneck and midblock)")
    add("--list_layers", action="store_true", help="print the model's layers with their shapes, and stop")
    add("--maps", action="store_true", help="keep whole maps (default: averages over space)")
    add("--feed", choices=(IMAGES, NOISE), default=IMAGES,
        help="what a generator gets: the finished images in place of its noise, or its own noise (default: images)")  # fmt: skip
    add("--sigma", type=float, help="noise level of an EDM or DMD2 UNet, by which its input is scaled (default: its highest, 80)")
    add("--output_dir", type=Path, help="folder with activations/, images/ and metadata/")
    add("--name", help="name of the set in it")
    add("--storage", choices=STORAGES, default=STORAGES[0], help="file format (default: arrow)")
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="type of the stored numbers (default: float32)")
    add("--file_samples", type=int, help="samples a file (default: 1024 of arrow, 64 of npz)")
    add("--model_batch", type=int, default=64, help="samples in the model at once; part of the last bits (default: 64)")
    add("--images", choices=PICTURES, default=MODEL_PICTURES, help="which pictures to keep (default: as the model gets them)")
    add("--image_size", type=int, help="side that pictures are cropped to (default: the model's own)")
    add("--crop", choices=[kind for kind in CROPS if kind != "random"],
        help=f"how (default: {CROP_OF_EDM} for EDM and DMD2, else {DEFAULT_CROP})")  # fmt: skip
    add("--per_class", type=int, help="samples of each class, drawn by --seed")
    add("--class_table", type=Path, help='JSON of all classes: a class table, or {"0": ["n01440764", "tench"], ...}')
    add("--label_map", type=Path, help="of downsampled ImageNet: its map_clsloc.txt")
    add("--label_order", help=f'of downsampled ImageNet without a map: "{STANDARD}", label - 1 is the rank of the wnid')
    add("--split", help="of a saved dataset with several")
    add("--image_column", help="of a saved dataset with several columns of pictures")
    add("--label_column", default="label", help="of a saved dataset (default: label)")
    add("--max_bad", type=int, default=0, help="unreadable pictures that may be left out (default: 0)")
    add("--overwrite", action="store_true", help="replace a set of other settings")
    add_model_options(parser)
    add_sample_options(parser)


def encoder_options(pairs: list[str]) -> dict[str, Any]:
    """KEY=VALUE pairs, values as in YAML. Raises ValueError for one of another form."""
    options = {}
    known = {field.name for field in fields(EncoderConfig)} - {"kind", "path", "allow_code", "name", "weight"}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if key not in known or not separator:
            raise ValueError(f"--encoder has {pair!r}: write KEY=VALUE with a key among {', '.join(sorted(known))}")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--encoder has {pair!r}: {error}") from None
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


def asked_model(arguments: argparse.Namespace, device) -> ActivationModel:
    """The model of --model, or SOURCE itself. Raises ValueError and OSError as its loader."""
    choices = {name: getattr(arguments, f"model_{name}") for name in ("export", "ema", "step")}
    path, kind = arguments.model, arguments.model_kind
    if path is None:
        if not is_generating(arguments.source):
            is_there = Path(arguments.source).exists() or arguments.source.partition(":")[0] == DIGITS
            what = "is no generator: name the model with --model" if is_there else "does not exist: give a generator, or images"
            raise ValueError(f"{arguments.source} {what}")
        if any(value is not None for value in (*choices.values(), kind)):
            raise ValueError("--model_* options belong to --model: name it, or use --export, --ema and --step for SOURCE")
        path, choices = arguments.source, {name: getattr(arguments, name) for name in choices}
        if is_edm(path):
            refuse_options(arguments, OF_OUR_GENERATOR, OF_UNET)
    if kind is None and Path(path).exists() and is_edm(path):
        kind = "edm"
    options = {"guidance_scale": arguments.guidance_scale, "seed": arguments.seed, "sigma": arguments.sigma}
    return open_model(
        path,
        kind,
        choices=choices,
        encoder_options=encoder_options(arguments.encoder),
        run_code=arguments.run_code,
        device=device,
        **options,
    )


def is_generating(path: str) -> bool:
    """Whether SOURCE is a model that draws samples, not pictures that exist."""
    place = Path(path)
    if not place.exists() or place.suffix == ".npz":
        return False
    return is_edm(place) or (is_model(place) and model_kind(path) == "generator")


def asked_source(
    arguments: argparse.Namespace, model: ActivationModel, device
) -> tuple[ActivationSource, np.ndarray, dict[str, Any]]:
    """(source, the indices to take, what was asked for, in plain values). Raises ValueError and OSError as its reader."""
    table = None if arguments.class_table is None else read_class_table(arguments.class_table)
    if is_generating(arguments.source):
        source = drawn_samples(arguments, model, table, device)
        return source, np.arange(len(source)), {"seed": arguments.seed}
    if arguments.feed == NOISE:
        raise ValueError(f"--feed noise is for samples of a generator, {arguments.source} exists already: use --feed images")
    refuse_options(arguments, ("export", "ema", "step", "labels"), "pictures that exist")
    source = open_real_source(
        arguments.source,
        crop=_asked_crop(arguments, model),
        split=arguments.split,
        image_column=arguments.image_column,
        label_column=arguments.label_column,
        label_map=arguments.label_map,
        label_order=arguments.label_order,
        table=table,
        vae=arguments.vae,
        device=device,
    )
    if isinstance(source, RowSource):
        refuse_options(arguments, ("image_size", "crop"), "rows that have their size already")
    else:
        refuse_options(arguments, ("vae",), "pictures that exist")
    name_classes(source, table, model)
    classes = None if arguments.classes is None else choose_labels(arguments.classes, source.table())
    items = select_samples(
        source.labels,
        classes=classes,
        per_class=arguments.per_class,
        num_samples=arguments.num_samples,
        seed=arguments.seed,
        class_name=lambda label: source.class_of(label)[1],
    )
    asked = {name: getattr(arguments, name) for name in ("classes", "per_class", "num_samples", "seed")}
    return source, items, asked


def asked_config(arguments: argparse.Namespace) -> ExtractionConfig:
    """How activations are taken and kept, with the layers that are named; looks at no model and no source. Raises ValueError."""
    if arguments.output_dir is None or not arguments.name:
        raise ValueError("give --output_dir and --name: where the set goes and what it is called")
    require_set_name(arguments.name)
    for name in ("file_samples", "image_size", "per_class", "num_samples"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}: give at least 1")
    return ExtractionConfig(
        layers=() if arguments.layers is None else tuple(name.strip() for name in arguments.layers.split(",")),
        pooled=not arguments.maps,
        storage=arguments.storage,
        dtype=arguments.dtype,
        batch_size=arguments.file_samples,
        model_batch=arguments.model_batch,
        pictures=arguments.images,
        max_bad=arguments.max_bad,
    )


def asked_extraction(
    arguments: argparse.Namespace, config: ExtractionConfig, model: ActivationModel, device
) -> ActivationExtraction:
    """The work that the options ask for; nothing is written yet. Raises ValueError and OSError."""
    config = replace(config, layers=config.layers or default_layers(model))
    source, items, selection = asked_source(arguments, model, device)
    selection = {**selection, "feed": arguments.feed}
    return ActivationExtraction(arguments.output_dir, arguments.name, source, items, model, config, selection=selection)


def _asked_crop(arguments: argparse.Namespace, model: ActivationModel) -> ImageCrop | None:
    """How pictures of any size become the model's; None where nothing says a size."""
    own = model.module.image_size if isinstance(model.module, PixelEncoder) else model.spec.size
    size = arguments.image_size or (own if model.spec.space == "pixel" else None)
    if size is None:
        if arguments.crop is not None:
            raise ValueError("--crop needs a size: give --image_size")
        return None
    return ImageCrop(kind=arguments.crop or (CROP_OF_EDM if isinstance(model, EdmModel) else DEFAULT_CROP), size=size)
