"""The options by which tools name a protocol, its network, references and metrics."""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from drift_accel.data.latent_export import Workers
from drift_accel.evaluation.evaluate import METRICS, MetricConfig, discard, make_reference
from drift_accel.evaluation.feature_network import FeatureNetwork
from drift_accel.evaluation.networks import FOLDER_VARIABLE, open_network
from drift_accel.evaluation.picture_sources import open_pictures
from drift_accel.evaluation.protocols import PROTOCOLS, get_protocol
from drift_accel.evaluation.statistics import ReferenceStatistics, load_reference


def add_network_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Protocol, network, layer, spatial map, batch."""
    add = parser.add_argument
    add("--protocol", choices=PROTOCOLS, required=required, help="the way from pictures to numbers; never compared across")
    add("--network", type=Path, help=f"its network: a file or folder (Inception: also looked for in ${FOLDER_VARIABLE})")
    add("--run_torchscript", action="store_true", help="allow an Inception in TorchScript, which is a program, to run")
    add("--layer", help="map of our own encoder (default: its last)")
    add("--network_batch", type=int, default=64, help="pictures the network gets at once; part of the last bits (default: 64)")


def add_metric_options(parser: argparse.ArgumentParser) -> None:
    """References, metrics and their settings."""
    add = parser.add_argument
    add("--reference", type=Path, help="statistics: of tools/reference_stats.py, or a published .npz (mu, sigma)")
    add("--reference_images", help="real pictures for precision, recall and KID where --reference keeps no features")
    add("--num_reference_images", type=int, default=10_000, help="so many of them at most (default: 10000)")
    add("--metrics", help=f"comma-separated, of {', '.join(METRICS)} (default: all that is possible, without sfid)")
    add("--neighbours", type=int, default=3, help="k of precision and recall (default: 3)")
    add("--splits", type=int, default=10, help="parts of the inception score (default: 10)")


def asked_metrics(arguments: argparse.Namespace) -> MetricConfig:
    """The metrics that the options ask for. Raises ValueError."""
    names = None if arguments.metrics is None else tuple(part.strip() for part in arguments.metrics.split(",") if part.strip())
    return MetricConfig(metrics=names, neighbours=arguments.neighbours, splits=arguments.splits)


def asked_network(arguments: argparse.Namespace, device: torch.device | str, *, spatial: bool = False) -> FeatureNetwork:
    """The network that the options name. Raises ValueError and OSError as `open_network`."""
    return open_network(
        get_protocol(arguments.protocol),
        arguments.network,
        device=device,
        batch=arguments.network_batch,
        layer=arguments.layer,
        spatial=spatial,
        run_code=arguments.run_torchscript,
    )


def asked_reference(
    arguments: argparse.Namespace, network: FeatureNetwork, folder: Path, workers: Workers
) -> ReferenceStatistics | None:
    """The reference that the options name, with the features of --reference_images where these are given.

    Every process gets it. Raises ValueError and OSError; statistics of another protocol are refused before pictures are read.
    """
    reference = None if arguments.reference is None else load_reference(arguments.reference)
    if reference is not None:
        reference.require_protocol(network.identity())
    if arguments.reference_images is None:
        return reference
    pictures = open_pictures(arguments.reference_images)
    if len(pictures) > arguments.num_reference_images:
        pictures = open_pictures(arguments.reference_images, limit=arguments.num_reference_images)
    work = folder.with_name(f"{folder.name}.reference")
    made = make_reference(pictures, network, work, num_features=len(pictures), workers=workers)
    workers.wait()  # all have read the chunks
    if workers.is_main:
        discard(work)
    source = {"path": Path(arguments.reference_images).name, **pictures.identity()}
    if reference is None:
        return replace(made, record={**made.record, "features_from": source}, file=source["path"])
    return replace(reference, features=made.features, record={**reference.record, "features_from": source})
