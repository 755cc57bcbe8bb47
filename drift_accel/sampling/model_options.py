"""The options by which tools name a trained generator and how to draw from it: one spelling, one meaning everywhere."""

import argparse
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drift_accel.data.latent_export import Workers
from drift_accel.foundation.collectives import SharedWork, world_group
from drift_accel.foundation.command_line import plain_errors
from drift_accel.foundation.devices import add_device_argument, pin_launched_device
from drift_accel.sampling.class_choice import choose_labels
from drift_accel.sampling.pictures import GeneratedPictures, sample_labels
from drift_accel.sampling.quantization import QUANTIZERS
from drift_accel.sampling.sampler import CHUNK
from drift_accel.sampling.trained import TrainedGenerator, load_trained
from drift_accel.sampling.vae_choice import VAE_DTYPES, LatentDecoder, open_decoder

LONGEST_WAIT = timedelta(days=7)  # processes wait for the slowest one, which may be hours behind


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which generator: export, ema, step, vae and its type and batch, device."""
    add = parser.add_argument
    add("--export", help="name of a run's export (default: its first)")
    add("--ema", help='average of a run or checkpoint, such as 0.999; "none" for the raw weights (default: the first)')
    add("--step", help='checkpoint of a run: a number of steps or "latest" (default: the export)')
    add("--vae", help='decodes latents: "digits", a folder or a hub id (default: that of the training data, if it is at hand)')
    add("--vae_dtype", choices=VAE_DTYPES, default="float32", help="type in which the VAE computes (default: float32)")
    add("--vae_batch", type=int, default=8, help="latents decoded at once; part of the result's last bits (default: 8)")
    add_device_argument(parser)


def add_sample_options(parser: argparse.ArgumentParser, *, num_samples: int | None = None) -> None:
    """Which samples: classes, counts, guidance, seed, quantiser."""
    add = parser.add_argument
    add("--classes", help='labels, ranges, wnids or names: "207, 0-9, n02099601, golden retriever" (default: all)')
    add("--labels", type=Path, help="file with the label of each sample: .npy of integers, or text with one a line")
    add(
        "--num_samples",
        type=int,
        default=num_samples,
        help=f"samples in all, classes in turn (default: {num_samples or 'by class'})",
    )
    add("--guidance_scale", type=float, default=1.0, help="at least 1 (no guidance; default: 1)")
    add("--seed", type=int, default=0, help="sample i depends on (seed, i), its label and the guidance alone (default: 0)")
    add("--quantizer", choices=QUANTIZERS, help="pixels to 256 levels: to the nearest, or cut as the release does")
    add("--batch_size", type=int, default=CHUNK, help=f"samples decoded at once; does not change them (default: {CHUNK})")


def open_trained(arguments: argparse.Namespace, model: Path) -> TrainedGenerator:
    """The generator that the options name. Raises ValueError and OSError as `load_trained`."""
    return load_trained(model, export=arguments.export, ema=arguments.ema, step=arguments.step)


def open_vae(arguments: argparse.Namespace, trained: TrainedGenerator, device: torch.device | str) -> LatentDecoder | None:
    """The decoder that the options name. Raises ValueError and OSError as `open_decoder`."""
    return open_decoder(trained, arguments.vae, dtype=arguments.vae_dtype, batch=arguments.vae_batch, device=device)


def asked_labels(
    arguments: argparse.Namespace, trained: TrainedGenerator, *, per_class: int | None = None, default_classes: int | None = None
) -> np.ndarray:
    """The label of every sample that the options ask for, classes in turn.

    Raises ValueError for classes that do not exist, a list that is none, and options that contradict each other.
    """
    if arguments.labels is not None:
        given = [name for name in ("classes", "num_samples") if getattr(arguments, name) is not None]
        if given:
            raise ValueError(f"--labels gives every sample's class: leave --{given[0]} out")
        return read_labels(arguments.labels)
    chosen = choose_labels(arguments.classes, trained.table, default_classes)
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"--classes names a class twice: {arguments.classes}")
    if arguments.num_samples is None and per_class is None:
        raise ValueError("give --num_samples")
    if arguments.num_samples is not None and arguments.num_samples < 1:
        raise ValueError(f"--num_samples is {arguments.num_samples}: give at least 1")
    return sample_labels(chosen, arguments.num_samples or per_class * len(chosen))


def asked_pictures(
    arguments: argparse.Namespace,
    trained: TrainedGenerator,
    decoder: LatentDecoder | None,
    labels: Sequence[int],
    device: torch.device | str,
    *,
    quantizer: str = "round",
) -> GeneratedPictures:
    """The pictures that the options ask for; `quantizer` is taken where they name none. Raises ValueError."""
    return GeneratedPictures(
        trained,
        labels,
        guidance_scale=arguments.guidance_scale,
        seed=arguments.seed,
        decoder=decoder,
        quantizer=arguments.quantizer or quantizer,
        batch_size=arguments.batch_size,
        device=device,
    )


def read_labels(path: Path) -> np.ndarray:
    """Labels int64 [N] of a .npy or text file. Raises FileNotFoundError, ValueError for anything else."""
    try:
        labels = np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.loadtxt(path, dtype=np.int64, ndmin=1)
    except FileNotFoundError:
        raise FileNotFoundError(f"--labels {path} does not exist") from None
    except ValueError as error:
        raise ValueError(f"--labels {path} is no list of integers ({error})") from None
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise ValueError(f"--labels {path} is {labels.dtype} {list(labels.shape)}: wanted integers [N]")
    return labels.astype(np.int64)


def start_workers(device: str) -> tuple[Any, Workers]:
    """Join the launched processes on the named device: (accelerator, workers). One process without `accelerate launch`.

    An error of one process within `workers.together` ends that work on all: SharedWorkError where the others wait.
    Ends the process with one line for a GPU that is not there.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    with plain_errors():
        pin_launched_device(device)
    accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)])
    if accelerator.num_processes == 1:
        return accelerator, Workers()
    shared = SharedWork(world_group())
    workers = Workers(
        index=accelerator.process_index, count=accelerator.num_processes, wait=shared.wait, together=shared.run
    )  # fmt: skip
    return accelerator, workers
