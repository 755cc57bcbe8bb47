"""Evaluate each new checkpoint of a run while it trains: python tools/watch.py RUN --protocol clean --reference real.npz

Results go to RUN/evaluation, what the watcher is at to RUN/evaluation/watch/state.json (waiting, running X, done, failed: why).
It ends after the run's last checkpoint; stopped and started again it goes on where it was. `--then bundle` compares the last
checkpoints at the end, sweeps guidance at the best, makes the full set there and looks for memorised pictures.
"""

import argparse
from contextlib import nullcontext

from drift_accel.evaluation.bundle import STAGES, BundleConfig, run_bundle
from drift_accel.evaluation.network_options import add_metric_options, add_network_options
from drift_accel.evaluation.picture_sources import open_pictures
from drift_accel.evaluation.run_options import add_run_options, asked_evaluator
from drift_accel.evaluation.sweeps import SweepPlan, parse_guidance, points_of
from drift_accel.evaluation.watching import STATE_NAME, WatchConfig, watch_run
from drift_accel.evaluation.work_state import WorkState
from drift_accel.foundation.collectives import SharedWorkError
from drift_accel.foundation.locks import exclusive_lock
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.sampling.model_options import start_workers


def main() -> None:
    """Parse, watch, finish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_run_options(parser)
    add("--guidance", default="1.0", help="scales at which each checkpoint is evaluated (default: 1.0)")
    add("--num_samples", type=int, default=5000, help="samples of each evaluation (default: 5000)")
    add("--every", type=int, default=1, help="only checkpoints of multiples of so many steps, and the last (default: all)")
    add("--poll_seconds", type=float, default=60.0, help="between two looks at the run (default: 60)")
    add("--give_up_seconds", type=float, help="end when no checkpoint came for so long (default: never)")
    add("--then", choices=("bundle",), help="what follows when the run is finished")
    add("--bundle_guidance", default="1.0/3.0/5", help="scales of the bundle's sweep (default: 1.0/3.0/5)")
    add("--bundle_last", type=int, default=5, help="checkpoints that the bundle compares (default: 5)")
    add("--full_samples", type=int, default=50_000, help="samples of the bundle's full set (default: 50000)")
    add("--training", help="training pictures for the bundle's neighbours (default: none, no such stage)")
    add("--held_out", help="real pictures that training has not seen, for comparison")
    add_network_options(parser)
    add_metric_options(parser)
    arguments = parser.parse_args()
    try:
        config = WatchConfig(
            poll_seconds=arguments.poll_seconds, every=arguments.every, give_up_seconds=arguments.give_up_seconds
        )  # fmt: skip
        plan = SweepPlan(
            points=points_of(parse_guidance(arguments.guidance), [None], [None]),
            num_samples=arguments.num_samples,
            final_samples=None,
            protocol=arguments.protocol,
            seed=arguments.seed,
        )
        bundle = BundleConfig(
            guidance=tuple(parse_guidance(arguments.bundle_guidance)),
            last=arguments.bundle_last,
            num_samples=arguments.num_samples,
            full_samples=arguments.full_samples,
        )
        training, held_out = (None if path is None else open_pictures(path) for path in (arguments.training, arguments.held_out))
        accelerator, workers = start_workers(arguments.device)
        folder = RunFolder(arguments.run).evaluation_dir / "watch"
        evaluator = workers.together(lambda: asked_evaluator(arguments, accelerator.device, workers))
        stages = STAGES if arguments.then else ()
        lock = exclusive_lock(folder / "lock", f"a watcher of {arguments.run}") if workers.is_main else nullcontext()
        workers.together(lock.__enter__)  # held until the process ends
        state = WorkState(folder / STATE_NAME, stages, enabled=workers.is_main)
        finished = watch_run(evaluator.run, plan, evaluator, state, config=config, workers=workers)
        if finished and arguments.then:
            run_bundle(evaluator, bundle, state, training=training, held_out=held_out, workers=workers)
    except (ValueError, OSError, ImportError, SharedWorkError) as error:
        parser.error(str(error))
    well = state.finish() if finished else False
    accelerator.end_training()
    if workers.is_main:
        print(f"{arguments.run}: {state.now if finished else 'given up, the run has not reached its last step'}")
    raise SystemExit(0 if well else 1)


if __name__ == "__main__":
    main()
