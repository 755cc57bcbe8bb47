"""The options by which tools that work on a run name what to evaluate of it."""

import argparse
import sys
from pathlib import Path

from drift_accel.data.latent_export import Workers
from drift_accel.evaluation.network_options import asked_metrics, asked_network, asked_reference
from drift_accel.evaluation.run_evaluator import RunEvaluator
from drift_accel.foundation.devices import add_device_argument
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.sampling.quantization import QUANTIZERS
from drift_accel.sampling.vae_choice import VAE_DTYPES


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """How samples of a run are made."""
    add = parser.add_argument
    add("run", type=Path, help="folder of a run of drift_accel.train")
    add("--classes", help="labels, ranges, wnids or names (default: all)")
    add("--seed", type=int, default=0, help="seed of the samples: the same noise everywhere (default: 0)")
    add("--quantizer", choices=QUANTIZERS, help="pixels to 256 levels (default: the protocol's)")
    add("--vae", help='decodes latents: "digits", a folder or a hub id (default: that of the training data)')
    add("--vae_dtype", choices=VAE_DTYPES, default="float32", help="type in which the VAE computes (default: float32)")
    add("--vae_batch", type=int, default=8, help="latents decoded at once (default: 8)")
    add_device_argument(parser)


def asked_evaluator(arguments: argparse.Namespace, device, workers: Workers) -> RunEvaluator:
    """The evaluator that the options describe. Raises ValueError and OSError before any work."""
    run = RunFolder(arguments.run)
    if not run.config_path.is_file():
        raise ValueError(f"{arguments.run} is no run: it has no {run.config_path.name}")
    return described_evaluator(arguments, run, run.evaluation_dir, device, workers)


def described_evaluator(
    arguments: argparse.Namespace, run: RunFolder, reference_dir: Path, device, workers: Workers
) -> RunEvaluator:
    """`asked_evaluator` of a run that need not exist yet; a reference in the making lies in `reference_dir`."""
    config = asked_metrics(arguments)
    network = asked_network(arguments, device, spatial="sfid" in (config.metrics or ()))
    reference = asked_reference(arguments, network, reference_dir / "reference.in_progress", workers)
    return RunEvaluator(
        run=run,
        network=network,
        reference=reference,
        metrics=config,
        seed=arguments.seed,
        classes=arguments.classes,
        vae=arguments.vae,
        vae_dtype=arguments.vae_dtype,
        vae_batch=arguments.vae_batch,
        quantizer=arguments.quantizer,
        device=device,
        workers=workers,
        command=sys.argv,
    )
