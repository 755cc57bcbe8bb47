"""FID and its kin: python tools/evaluate.py SOURCE --protocol clean --reference real.npz

SOURCE is a model (a run, a checkpoint, an export, a pipeline, an official folder), whose samples are generated as they are
measured, or pictures that exist (a folder, a dataset saved by `datasets`, an .npz with arr_0, kept chunks, a cache). The result,
a JSON file with protocol, hashes, counts, guidance, average and seed, goes to RUN/evaluation/ or --output. `accelerate launch`
with any number of processes gives the same numbers; a killed command, given again, goes on where it was. Statistics of real
pictures come from tools/reference_stats.py or a published .npz; tools/compare_results.py lays results side by side.
"""

import argparse
import sys
from pathlib import Path

from drift_accel.data.latent_export import Workers
from drift_accel.evaluation.evaluate import discard, evaluate_pictures, plan_metrics
from drift_accel.evaluation.network_options import (
    add_metric_options,
    add_network_options,
    asked_metrics,
    asked_network,
    asked_reference,
)
from drift_accel.evaluation.picture_sources import open_pictures
from drift_accel.evaluation.protocols import get_protocol
from drift_accel.evaluation.results import MARKDOWN_HEADER, markdown_line, write_result
from drift_accel.evaluation.sweeps import result_name
from drift_accel.foundation.collectives import SharedWorkError
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.sampling.model_options import (
    add_model_options,
    add_sample_options,
    asked_labels,
    asked_pictures,
    open_trained,
    open_vae,
    start_workers,
)
from drift_accel.sampling.outputs import write_image_folder, write_npz
from drift_accel.sampling.sample_store import SampleStore
from drift_accel.sampling.trained import TrainedGenerator, is_model

NUM_SAMPLES = 50_000


def parse_arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line. Wrong values end the process with one message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", help="a model, or pictures that exist")
    add("--output", type=Path, help="the result's JSON file (default: RUN/evaluation/NAME.json)")
    add("--name", help="name of the result in RUN/evaluation (default: protocol, step, average, guidance, count)")
    add("--keep_images", type=Path, help="also write the generated images: an .npz or a folder of PNGs")
    add("--image_size", type=int, help="side to which existing pictures are cropped (default: all must have one size)")
    add("--overwrite", action="store_true", help="replace existing outputs")
    add_network_options(parser)
    add_metric_options(parser)
    add_model_options(parser)
    add_sample_options(parser)
    return parser, parser.parse_args()


def main() -> None:
    """Parse, measure, save, print."""
    parser, arguments = parse_arguments()
    accelerator, workers = start_workers(arguments.device)
    try:
        workers.together(lambda: evaluate(arguments, accelerator.device, workers))
    except (ValueError, OSError, ImportError, SharedWorkError) as error:
        parser.error(str(error))
    accelerator.end_training()


def evaluate(arguments: argparse.Namespace, device, workers: Workers) -> None:
    """All of it, on every process. Raises ValueError, OSError and ImportError for what the user can mend."""
    config = asked_metrics(arguments)
    trained, pictures = open_source(arguments, device)
    output = output_path(arguments, trained, len(pictures))
    for path in (output, arguments.keep_images):
        if path is not None and path.exists() and not arguments.overwrite:
            raise ValueError(f"{path} exists: choose another, or add --overwrite")
    network = asked_network(arguments, device, spatial="sfid" in (config.metrics or ()))
    work = output.with_name(f"{output.stem}.in_progress")
    reference = asked_reference(arguments, network, work, workers)
    plan_metrics(config, len(pictures), network, reference)
    result = evaluate_pictures(
        pictures,
        network,
        work,
        reference=reference,
        config=config,
        model=getattr(pictures, "origin", None) if trained is None else trained.origin,
        keep_pixels=arguments.keep_images is not None,
        workers=workers,
        command=sys.argv,
    )
    if workers.is_main:
        if arguments.keep_images is not None:
            keep_images(SampleStore(work, pictures, network, keep_pixels=True), trained, arguments)
        write_result(output, result, overwrite=arguments.overwrite)
        discard(work)
        print("\n".join([*(f"note: {text}" for text in result["warnings"]), MARKDOWN_HEADER, markdown_line(result)]))
        print(f"result: {output}")


def open_source(arguments: argparse.Namespace, device):
    """(the generator or None, the pictures)."""
    if not is_model(arguments.source):
        if arguments.keep_images is not None:
            raise ValueError(f"{arguments.source} are pictures already: leave --keep_images out")
        return None, open_pictures(arguments.source, image_size=arguments.image_size, limit=arguments.num_samples)
    if arguments.num_samples is None and arguments.labels is None:
        arguments.num_samples = NUM_SAMPLES
    trained = open_trained(arguments, Path(arguments.source))
    labels = asked_labels(arguments, trained)
    protocol = get_protocol(arguments.protocol)
    # Features of latents need no pictures.
    decoder = None if protocol.name == "encoder" and arguments.vae is None else open_vae(arguments, trained, device)
    return trained, asked_pictures(arguments, trained, decoder, labels, device, quantizer=protocol.quantizer)


def output_path(arguments: argparse.Namespace, trained: TrainedGenerator | None, count: int) -> Path:
    """Where the result goes. Raises ValueError where that has to be said."""
    if arguments.output is not None:
        return arguments.output
    run = None if trained is None else trained.origin.get("run")
    if run is None:
        raise ValueError(f"{arguments.source} is no run with a folder for results: give --output")
    origin = trained.origin
    name = arguments.name or result_name(
        arguments.protocol, origin.get("step"), origin.get("ema"), arguments.guidance_scale, count, arguments.seed
    )
    return RunFolder(run).evaluation_path(name)


def keep_images(store: SampleStore, trained: TrainedGenerator, arguments: argparse.Namespace) -> None:
    """Write the pictures that were measured."""
    output, record = arguments.keep_images, {**store.pictures.identity(), "model": dict(trained.origin)}
    if output.suffix == ".npz":
        write_npz(store, output, record)
    else:
        write_image_folder(store, trained.table, output, record, replace=arguments.overwrite)


if __name__ == "__main__":
    main()
