"""From pictures to a result: features once, in chunks, then every number that was asked for."""

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drift_accel.data.latent_export import Workers
from drift_accel.evaluation.feature_network import FeatureNetwork
from drift_accel.evaluation.frechet import frechet_distance
from drift_accel.evaluation.inception_score import inception_score
from drift_accel.evaluation.kernel_distance import kernel_distance
from drift_accel.evaluation.precision_recall import precision_recall
from drift_accel.evaluation.statistics import ReferenceStatistics, streamed_statistics
from drift_accel.foundation.provenance import collect_provenance
from drift_accel.foundation.random_streams import random_stream
from drift_accel.sampling.pictures import Pictures
from drift_accel.sampling.sample_store import SampleStore

METRICS = ("frechet", "inception_score", "precision_recall", "kid", "sfid")
KEPT_STREAM = "evaluation/kept_features"


@dataclass(frozen=True, kw_only=True)
class MetricConfig:
    """Which numbers, and their settings. Raises ValueError for unknown metrics and counts out of range."""

    metrics: tuple[str, ...] | None = None
    """Of METRICS; None: all that network and reference allow, without sFID."""
    neighbours: int = 3
    """k of precision and recall."""
    splits: int = 10
    """Parts of the inception score."""
    kid_subsets: int = 100
    """Subsets of KID."""
    kid_subset_size: int = 1000
    """Rows of a subset, at most."""
    tile_size: int = 4096
    """Rows of precision's and recall's tiles; memory, not the result, depends on it."""

    def __post_init__(self):
        unknown = [name for name in self.metrics or () if name not in METRICS]
        if unknown or self.metrics == ():
            raise ValueError(f"--metrics is {self.metrics}: choose some of {', '.join(METRICS)}")
        for name in ("neighbours", "splits", "kid_subsets", "tile_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.kid_subset_size < 2:
            raise ValueError(f"kid_subset_size is {self.kid_subset_size}: give at least 2")

    def recorded(self) -> dict[str, int]:
        """The settings that numbers depend on."""
        return {key: value for key, value in asdict(self).items() if key not in ("metrics", "tile_size")}


def plan_metrics(
    config: MetricConfig, num_pictures: int, network: FeatureNetwork, reference: ReferenceStatistics | None
) -> tuple[str, ...]:
    """The metrics that will be computed, before any work.

    Raises ValueError, saying what is missing, for one that network or reference cannot give, for statistics of another protocol,
    and for too few pictures.
    """
    if reference is not None:
        reference.require_protocol(network.identity())
    real = None if reference is None else reference.features
    missing = {
        "frechet": "a reference: give --reference" if reference is None else None,
        "inception_score": None if "logits" in network.provides else f"logits, which protocol {network.protocol.name!r} has not",
        "precision_recall": "real features: give --reference_images" if real is None else None,
        "kid": "real features: give --reference_images" if real is None else None,
        "sfid": "the spatial statistics mu_s and sigma_s of a reference"
        if reference is None or reference.spatial is None
        else None,
    }
    if "spatial" not in network.provides:
        missing["sfid"] = "the mixed_6 map, which this network does not give"
    if config.metrics is None:
        chosen = tuple(name for name in METRICS if missing[name] is None and name != "sfid")
    else:
        chosen = config.metrics
        for name in chosen:
            if missing[name] is not None:
                raise ValueError(f"{name} needs {missing[name]}")
    if not chosen:
        raise ValueError(f"there is nothing to compute: frechet needs {missing['frechet']}")
    wanted = {
        "frechet": 2,
        "sfid": 2,
        "inception_score": config.splits,
        "precision_recall": config.neighbours + 1,
        "kid": 2,
    }
    for name in chosen:
        if num_pictures < wanted[name]:
            raise ValueError(f"{num_pictures} pictures are too few: {name} needs at least {wanted[name]}")
        if name in ("precision_recall", "kid") and len(real) < wanted[name]:
            raise ValueError(f"{len(real)} real pictures are too few: {name} needs at least {wanted[name]}")
    return chosen


def compute_metrics(
    store: SampleStore, names: Sequence[str], config: MetricConfig, reference: ReferenceStatistics | None, frechet_name: str
) -> tuple[dict[str, float], list[str]]:
    """The numbers by name, and what was warned of. Raises ValueError as the metrics themselves do."""
    values: dict[str, float] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        if "frechet" in names:
            mean, covariance, _ = streamed_statistics(store.arrays("features"))
            values[frechet_name] = frechet_distance(mean, covariance, reference.mean, reference.covariance)
        if "sfid" in names:
            mean, covariance, _ = streamed_statistics(store.arrays("spatial"))
            values["sfid"] = frechet_distance(mean, covariance, *reference.spatial)
        if "inception_score" in names:
            score = inception_score(store.rows("logits"), config.splits)
            values["inception_score"], values["inception_score_std"] = score
        if {"precision_recall", "kid"} & set(names):
            features = store.rows("features")
            if "precision_recall" in names:
                device = "cuda" if torch.cuda.is_available() else "cpu"
                real = torch.from_numpy(reference.features).to(device)
                values["precision"], values["recall"] = precision_recall(
                    real, features, k=config.neighbours, tile_size=config.tile_size
                )
            if "kid" in names:
                values["kid"], values["kid_std"] = kernel_distance(
                    reference.features, features, num_subsets=config.kid_subsets, subset_size=config.kid_subset_size
                )
    texts = [str(warning.message).replace("covariance_a", "the generated covariance") for warning in caught]
    return values, [text.replace("covariance_b", "the reference's covariance") for text in dict.fromkeys(texts)]


def evaluate_pictures(
    pictures: Pictures,
    network: FeatureNetwork,
    folder: Path,
    *,
    reference: ReferenceStatistics | None,
    config: MetricConfig | None = None,
    model: Mapping[str, Any] | None = None,
    keep_pixels: bool = False,
    workers: Workers | None = None,
    command: Sequence[str] = (),
    log: Callable[[str], None] = print,
) -> dict[str, Any] | None:
    """Measure `pictures` in chunks under `folder` and return the result on the main process, None on the others.

    `model` is the origin of generated pictures. Chunks stay in `folder`: remove it (`discard`) when the result is written.
    Raises ValueError before any work as `plan_metrics` does, and as SampleStore does.
    """
    config, workers = config or MetricConfig(), workers or Workers()
    names = plan_metrics(config, len(pictures), network, reference)
    store = SampleStore(folder, pictures, network, keep_pixels=keep_pixels)
    store.compute(workers=workers, description=network.protocol.name, log=log)
    if not workers.is_main:
        return None
    values, texts = compute_metrics(store, names, config, reference, network.protocol.frechet_name)
    non_finite = store.num_non_finite()
    if non_finite:
        texts.append(f"{non_finite} of {len(pictures)} pictures held values that are not finite; they became black or white")
    if reference is not None and not reference.is_stated:
        texts.append(f"{reference.file} does not say which protocol made it")
    return {
        "metrics": values,
        "protocol": network.identity(),
        "num_generated": len(pictures),
        "generated": pictures.identity(),
        "model": None if model is None else dict(model),
        "num_non_finite": non_finite,
        "reference": describe_reference(reference),
        "settings": config.recorded(),
        "warnings": texts,
        "provenance": collect_provenance(command=command),
    }


def make_reference(
    pictures: Pictures,
    network: FeatureNetwork,
    folder: Path,
    *,
    num_features: int = 10_000,
    workers: Workers | None = None,
    command: Sequence[str] = (),
    log: Callable[[str], None] = print,
) -> ReferenceStatistics:
    """The statistics of real pictures, on every process; chunks stay in `folder` as in `evaluate_pictures`.

    `num_features` rows (all, if there are fewer; 0: none) are kept for precision, recall and KID, chosen by a fixed shuffle.
    """
    workers = workers or Workers()
    if len(pictures) < 2:
        raise ValueError(f"{len(pictures)} pictures are too few for statistics: give at least 2")
    if num_features < 0:
        raise ValueError(f"--num_features is {num_features}: give at least 0")
    store = SampleStore(folder, pictures, network)
    store.compute(workers=workers, description=f"reference, {network.protocol.name}", log=log)
    mean, covariance, count = streamed_statistics(store.arrays("features"))
    spatial = streamed_statistics(store.arrays("spatial"))[:2] if "spatial" in network.provides else None
    kept = np.sort(random_stream(0, KEPT_STREAM, 0).permutation(count)[:num_features])
    record = {
        **network.identity(),
        "num_images": count,
        "num_features": len(kept),
        "num_non_finite": store.num_non_finite(),
        "pictures": pictures.identity(),
        "provenance": collect_provenance(command=command),
    }
    features = store.rows("features")[kept] if len(kept) else None
    return ReferenceStatistics(mean=mean, covariance=covariance, spatial=spatial, features=features, record=record)


def discard(folder: Path) -> None:
    """Remove the chunks of work that is finished."""
    shutil.rmtree(folder)


def describe_reference(reference: ReferenceStatistics | None) -> dict[str, Any] | None:
    """What a result keeps of its reference."""
    if reference is None:
        return None
    return {
        "file": reference.file,
        "sha256": reference.sha256,
        "protocol": reference.record.get("protocol"),
        "num_images": reference.record.get("num_images"),
        "num_features": None if reference.features is None else len(reference.features),
        "features_from": reference.record.get("features_from"),
    }
