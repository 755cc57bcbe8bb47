"""Evaluation of a generator while it trains: what is configured, and everything it needs, opened before the first step."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from drift_accel.data import DataConfig
from drift_accel.evaluation.encoder_spaces import EncoderNetwork
from drift_accel.evaluation.evaluate import METRICS, MetricConfig, plan_metrics
from drift_accel.evaluation.feature_network import FeatureNetwork
from drift_accel.evaluation.networks import open_network
from drift_accel.evaluation.picture_sources import DIGITS, open_pictures
from drift_accel.evaluation.protocols import ENCODER, get_protocol
from drift_accel.evaluation.real_pictures import RealPictures
from drift_accel.evaluation.run_evaluator import RunEvaluator
from drift_accel.evaluation.statistics import ReferenceStatistics, load_reference
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.models.configuration import EncoderConfig
from drift_accel.sampling.class_choice import table_of_classes
from drift_accel.sampling.trained import TrainedGenerator
from drift_accel.sampling.vae_choice import VAE_DTYPES, LatentDecoder, open_decoder


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation of a generator in training, as tools/evaluate.py does it. Raises ValueError for values that cannot work."""

    every: int | None = None
    """Steps between evaluations, a multiple of log.every; the last step has one too. null: none."""
    num_samples: int = 5000
    """Samples of an evaluation, classes in turn."""
    sanity_samples: int = 64
    """Samples a process of a try after the very first step, which ends the run if it fails; too few to mean much. 0: none."""
    protocol: str = "encoder"
    """The way from samples to numbers: clean, legacy_tensorflow, legacy_pytorch, release, encoder, timm or dinov2."""
    network: str | None = None
    """The protocol's network, a file or folder; null: the run's own encoder, or the usual place of an Inception file."""
    run_torchscript: bool = False
    """Allow an Inception in TorchScript, which is a program, to run."""
    layer: str | None = None
    """Map of an encoder; null: its last."""
    network_batch: int = 64
    """Pictures that the network gets at once; part of the last bits of the numbers."""
    reference: str | None = None
    """Statistics of real pictures: of tools/reference_stats.py, or a published .npz; null: of the reference's pictures."""
    reference_images: str | None = None
    """Real pictures, for statistics and for precision, recall and KID: a folder, a cache, an .npz, "digits"; null: where there
    is no `reference` either, the data that the run trains on."""
    num_reference_images: int = 10_000
    """So many real pictures at most, chosen by a fixed shuffle."""
    metrics: tuple[str, ...] | None = None
    """frechet, inception_score, precision_recall, kid, sfid; null: all that network and reference allow, without sfid."""
    guidance_scale: float = 1.0
    """Guidance of the samples, at least 1."""
    ema: float | None = None
    """Decay of the average that is evaluated, one of ema.decays; null: the first."""
    seed: int = 0
    """Seed of the samples, the same noise at every evaluation."""
    vae: str | None = None
    """Decodes latents where the network looks at pixels: "digits" (bundled), a folder or a hub id; null: sample.vae."""
    vae_dtype: str = "float32"
    """Type in which the VAE computes: float32, bfloat16 or float16."""
    vae_batch: int = 8
    """Latents decoded at once; part of the last bits of the numbers."""

    def __post_init__(self):
        for name in ("num_samples", "network_batch", "num_reference_images", "vae_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluation.{name} is {getattr(self, name)}: give an integer of at least 1")
        if self.every is not None and self.every < 1:
            raise ValueError(f"evaluation.every is {self.every}: give a number of steps of at least 1, or null for none")
        if self.sanity_samples < 0:
            raise ValueError(f"evaluation.sanity_samples is {self.sanity_samples}: give a number of samples, or 0 for none")
        try:
            get_protocol(self.protocol)
        except ValueError as error:
            raise ValueError(f"evaluation.protocol: {error}") from None
        unknown = [name for name in self.metrics or () if name not in METRICS]
        if unknown or self.metrics == ():
            raise ValueError(f"evaluation.metrics is {self.metrics}: choose some of {', '.join(METRICS)}, or null")
        if not 1 <= self.guidance_scale < float("inf"):
            raise ValueError(f"evaluation.guidance_scale is {self.guidance_scale}: guidance starts at 1 (no guidance)")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"evaluation.seed is {self.seed}: give an integer from 0 to 2^64 - 1")
        if self.vae_dtype not in VAE_DTYPES:
            raise ValueError(f"evaluation.vae_dtype is {self.vae_dtype!r}: choose one of {', '.join(VAE_DTYPES)}")

    def check_run(self, decays: tuple[float, ...], log_every: int) -> None:
        """Raise ValueError where the run keeps no such average, or has no record at the steps of the evaluations."""
        if self.ema is not None and self.ema not in decays:
            raise ValueError(f"evaluation.ema is {self.ema}: the run keeps ema.decays {list(decays)}; choose one of them")
        if self.every is not None and self.every % log_every:
            raise ValueError(
                f"evaluation.every is {self.every}, no multiple of log.every, {log_every}: its numbers are part of the records; "
                "change one of them"
            )


@dataclass(frozen=True)
class PreparedEvaluation:
    """What is open before the first step: the evaluator, its decoder (None: not needed), and the real pictures that the
    evaluator's reference has still to be made of (None: it has one)."""

    config: EvaluationConfig
    evaluator: RunEvaluator
    decoder: LatentDecoder | None
    real: RealPictures | None
    data: Mapping[str, Any]


def prepare_evaluation(
    config: EvaluationConfig,
    run: RunFolder,
    *,
    generator: Mapping[str, Any],
    encoder: EncoderConfig,
    loaded_encoder: nn.Module | None,
    data: DataConfig,
    description: Mapping[str, Any],
    vae: str | None,
    device: torch.device | str = "cpu",
) -> PreparedEvaluation:
    """Open network, reference, real pictures and decoder of a run's evaluation; nothing is written or computed.

    `generator` are its resolved arguments, `encoder` is the run's first encoder and `loaded_encoder` itself, to be shared (None:
    it is loaded again); `description` is what the run's exports will say of its images, `vae` what its grids are decoded by.
    Raises ValueError and OSError for what is missing or does not fit, in the words of the configuration.
    """
    with _words_of_the_configuration():
        protocol = get_protocol(config.protocol)
        own = protocol.network == ENCODER and config.network is None
        if own and encoder.kind != "mae":
            raise ValueError(f"--network is missing: encoder.kind is {encoder.kind!r}, which has no such maps")
        metrics = MetricConfig(metrics=config.metrics)
        network = open_network(
            protocol,
            encoder.path if own else config.network,
            device=device,
            batch=config.network_batch,
            layer=config.layer,
            spatial="sfid" in (config.metrics or ()),
            run_code=config.run_torchscript,
            encoder=loaded_encoder if own else None,
        )
        if isinstance(network, EncoderNetwork):
            _check_encoder(network, generator)
        reference = None if config.reference is None else load_reference(config.reference)
        if reference is not None:
            reference.require_protocol(network.identity())
        real = _real_pictures(config, run, reference, network, data, description)
        _check_plan(config, metrics, network, reference, real)
        decoder = None
        if protocol.network != ENCODER:
            name = (config.vae or vae) if description.get("kind") == "latents" else config.vae
            trained = _hollow(generator, description)
            decoder = open_decoder(trained, name, dtype=config.vae_dtype, batch=config.vae_batch, device=device)
    evaluator = RunEvaluator(
        run=run,
        network=network,
        reference=None if real is not None else reference,
        metrics=metrics,
        seed=config.seed,
        device=device,
    )
    return PreparedEvaluation(config, evaluator, decoder, real, description)


def _real_pictures(
    config: EvaluationConfig,
    run: RunFolder,
    reference: ReferenceStatistics | None,
    network: FeatureNetwork,
    data: DataConfig,
    description: Mapping[str, Any],
) -> RealPictures | None:
    name = config.reference_images
    if name is None and reference is not None:
        return None
    if name is None:
        if description.get("kind") == "latents" and network.protocol.network != ENCODER:
            raise ValueError(
                f"--reference is missing: protocol {network.protocol.name!r} looks at pixels, and the run's own data are "
                "latents; give statistics of the pictures (tools/reference_stats.py, or a published .npz), or --reference_images"
            )
        name = data.path if data.source == "cache" else (DIGITS if data.split == "test" else f"{DIGITS}:{data.split}")
    pictures = open_pictures(name)
    if len(pictures) > config.num_reference_images:
        pictures = open_pictures(name, limit=config.num_reference_images)
    return RealPictures(run, pictures, Path(name).name, reference)


def _check_encoder(network: EncoderNetwork, generator: Mapping[str, Any]) -> None:
    wanted = network.encoder.config.in_channels, network.encoder.config.input_size
    made = generator["in_channels"], generator["input_size"]
    if wanted != made:
        raise ValueError(
            f"--network {network.path} takes images of {wanted[0]} channels and side {wanted[1]}, the generator makes {made[0]} "
            f"channels of side {made[1]}: give an encoder of what it makes, or another --protocol"
        )


def _check_plan(
    config: EvaluationConfig,
    metrics: MetricConfig,
    network: FeatureNetwork,
    reference: ReferenceStatistics | None,
    real: RealPictures | None,
) -> None:
    """Every metric must be possible for both numbers of samples, also before the reference's features are there."""
    if real is not None:
        nothing = np.empty(0)
        later = np.empty((len(real.pictures), 0), dtype=np.float32)
        base = ReferenceStatistics(mean=nothing, covariance=nothing) if reference is None else reference
        reference = replace(base, features=later, record={})
    for count in (config.num_samples, config.sanity_samples or config.num_samples):
        plan_metrics(metrics, count, network, reference)


def _hollow(generator: Mapping[str, Any], description: Mapping[str, Any]) -> TrainedGenerator:
    """What the run will train, without weights: enough to choose its decoder."""
    from drift_accel.models import Generator

    with torch.device("meta"):
        model = Generator(**generator)
    table = table_of_classes(description.get("classes"), model.config.num_classes)
    return TrainedGenerator(generator=model, table=table, data=description, origin={"path": "the run"}, provenance={})


@contextmanager
def _words_of_the_configuration() -> Iterator[None]:
    """Errors that name the tools' options, by the keys of the configuration."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        text = re.sub(r"(?<![\w./-])--(\w+)", r"evaluation.\1", str(error))
        kind = OSError if isinstance(error, OSError) else ValueError  # their subclasses take other arguments than a text
        raise kind(text if "evaluation." in text else f"evaluation: {text}") from error
