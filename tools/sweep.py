"""Many evaluations of a run: python tools/sweep.py RUN --guidance 1.0,1.5,2.0 --protocol clean --reference real.npz

Guidance scales ("1.0,1.5" or least/most/number), averages and checkpoints in every combination, with the same noise; first
--num_samples each, then --final_samples at the best. Results are files of their own in RUN/evaluation: a killed sweep, given
again, goes on with those that are missing. The table is printed and written as CSV, with curves, beside them.
"""

import argparse
from pathlib import Path

from drift_accel.evaluation.network_options import add_metric_options, add_network_options
from drift_accel.evaluation.results import MARKDOWN_HEADER, markdown_line
from drift_accel.evaluation.run_options import add_run_options, asked_evaluator
from drift_accel.evaluation.sweep_plots import plot_guidance, plot_steps
from drift_accel.evaluation.sweeps import (
    SweepPlan,
    choose_averages,
    choose_steps,
    markdown_table,
    parse_guidance,
    points_of,
    require_same_sweep,
    run_sweep,
    sweep_rows,
    write_table,
)
from drift_accel.foundation.collectives import SharedWorkError
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.sampling.model_options import start_workers


def main() -> None:
    """Parse, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_run_options(parser)
    add("--guidance", default="1.0", help="scales: 1.0,1.5,2.0 or least/most/number (default: 1.0)")
    add("--averages", help='averages: 0.999,0.9999, "all", or "none" for the raw weights (default: the first)')
    add("--steps", help='checkpoints: 1000,2000 or "all" (default: the export)')
    add("--last", type=int, help="the last so many checkpoints")
    add("--num_samples", type=int, default=5000, help="samples of each point (default: 5000)")
    add("--final_samples", type=int, help="then so many at the best point, such as 50000 (default: no second pass)")
    add("--overwrite", action="store_true", help="replace table and curves of another sweep (results stay)")
    add("--name", default="sweep", help="name of table and curves in RUN/evaluation (default: sweep)")
    add_network_options(parser)
    add_metric_options(parser)
    arguments = parser.parse_args()
    try:
        run = RunFolder(arguments.run)
        guidance = parse_guidance(arguments.guidance)
        steps = choose_steps(run, arguments.steps, arguments.last)
        points = points_of(guidance, steps, choose_averages(run, arguments.averages))
        accelerator, workers = start_workers(arguments.device)
        plan = SweepPlan(
            points=points,
            num_samples=arguments.num_samples,
            final_samples=arguments.final_samples,
            protocol=arguments.protocol,
            seed=arguments.seed,
        )
        if not arguments.overwrite:
            require_same_sweep(run.evaluation_path(arguments.name).with_suffix(".csv"), plan)
        evaluator = workers.together(lambda: asked_evaluator(arguments, accelerator.device, workers))
        results, final = workers.together(lambda: run_sweep(run, plan, evaluator, workers=workers))
    except (ValueError, OSError, ImportError, SharedWorkError) as error:
        parser.error(str(error))
    if workers.is_main:
        rows = sweep_rows(results)
        base = run.evaluation_path(arguments.name)
        write_table(rows, base.with_suffix(".csv"))
        written = [base.with_suffix(".csv"), *plots(rows, base)]
        print(markdown_table(rows))
        if final is not None:
            print(f"\nthe best:\n{MARKDOWN_HEADER}\n{markdown_line(final)}")
        print("\n" + "\n".join(map(str, written)))
    accelerator.end_training()


def plots(rows: list[dict], base: Path) -> list[Path]:
    """The curves that the points allow."""
    written = []
    for key, draw in (("guidance_scale", plot_guidance), ("step", plot_steps)):
        if len({row[key] for row in rows}) > 1:
            written.append(base.with_name(f"{base.stem}_{key.split('_')[0]}.png"))
            draw(rows, written[-1])
    return written


if __name__ == "__main__":
    main()
