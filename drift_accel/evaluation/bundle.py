"""What is wanted at the end of a run: the last checkpoints, a guidance sweep, neighbours, the full set. Each stage resumes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from drift_accel.data.latent_export import Workers
from drift_accel.evaluation.neighbour_search import search_neighbours
from drift_accel.evaluation.run_evaluator import RunEvaluator
from drift_accel.evaluation.sweep_plots import plot_guidance, plot_steps
from drift_accel.evaluation.sweeps import (
    Point,
    SweepPlan,
    best_point,
    evaluate_once,
    point_path,
    points_of,
    run_sweep,
    sweep_rows,
    write_table,
)
from drift_accel.evaluation.work_state import WorkState
from drift_accel.sampling.pictures import Pictures

STAGES = ("last_checkpoints", "guidance_sweep", "full_set", "neighbours")


@dataclass(frozen=True, kw_only=True)
class BundleConfig:
    """What the bundle computes. Raises ValueError for values out of range."""

    guidance: tuple[float, ...] = (1.0, 1.5, 2.0, 2.5, 3.0)
    """Scales of the sweep."""
    last: int = 5
    """Checkpoints that are compared at the first scale."""
    num_samples: int = 5000
    """Samples of each cheap evaluation."""
    full_samples: int = 50_000
    """Samples of the full set, at the best checkpoint and scale."""
    num_neighbours_samples: int = 1000
    """Samples whose neighbours are looked for."""

    def __post_init__(self):
        for name in ("last", "num_samples", "full_samples", "num_neighbours_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1")
        if not self.guidance:
            raise ValueError("the bundle's sweep needs at least one guidance scale")


def run_bundle(
    evaluate: RunEvaluator,
    config: BundleConfig,
    state: WorkState,
    *,
    training: Pictures | None = None,
    held_out: Pictures | None = None,
    workers: Workers | None = None,
    log: Callable[[str], None] = print,
) -> bool:
    """Run the stages whose results are missing; returns whether all went well. Neighbours need `training`.

    The last checkpoints are compared first, then guidance at the best of them, then the full set at the best scale: a result
    file and `samples_full.npz`, the pictures themselves. A stage that fails is noted and those that need it fail with it.
    """
    bundle = _Bundle(evaluate, config, training, held_out, workers or Workers(), log)
    works = {
        "last_checkpoints": bundle.compare_checkpoints,
        "guidance_sweep": bundle.sweep_guidance,
        "full_set": bundle.make_full_set,
        "neighbours": bundle.find_neighbours,
    }
    for name in STAGES:
        if name == "neighbours" and training is None:
            state.stages.pop(name, None)
            continue
        if not state.run(name, lambda work=works[name]: bundle.workers.together(work)) and bundle.workers.is_main:
            log(f"{name}: {state.stages[name]}")
    return state.finish()


class _Bundle:
    """The stages; each begins with what the one before it found."""

    def __init__(self, evaluate: RunEvaluator, config: BundleConfig, training, held_out, workers: Workers, log):
        self.evaluate, self.config, self.training, self.held_out = evaluate, config, training, held_out
        self.workers, self.log, self.run = workers, log, evaluate.run
        self.step: int | None = None
        self.best: Point | None = None

    def compare_checkpoints(self) -> None:
        """The last checkpoints at the first scale; the best one goes on."""
        steps = self.run.checkpoint_steps()[-self.config.last :]
        if not steps:
            raise ValueError(f"{self.run.path} has no checkpoints")
        results = self._sweep(points_of(self.config.guidance[:1], steps, [None]), "bundle_checkpoints", plot_steps)
        self.step = best_point(results).step

    def sweep_guidance(self) -> None:
        """All scales at that checkpoint; the best one goes on."""
        if self.step is None:
            raise ValueError("needs the best of the last checkpoints, which is not known")
        results = self._sweep(points_of(self.config.guidance, [self.step], [None]), "bundle_guidance", plot_guidance)
        self.best = best_point(results)

    def make_full_set(self) -> None:
        """The full number of samples at the best point, measured and kept."""
        if self.best is None:
            raise ValueError("needs the best guidance scale, which is not known")
        plan = self._plan((self.best,), self.config.full_samples)
        images = self.run.evaluation_dir / "samples_full.npz"
        path = point_path(self.run, plan, self.best, self.config.full_samples)
        keeps_pixels = not self.workers.together(lambda: self.evaluate.makes_latents_alone(self.best))
        if path.exists() and (images.exists() or not keeps_pixels):
            evaluate_once(self.run, plan, self.best, self.config.full_samples, self.evaluate, self.workers, self.log)
            return
        self.evaluate(self.best, self.config.full_samples, path, images=images if keeps_pixels else None)

    def find_neighbours(self) -> None:
        """The training pictures nearest to samples of the best point."""
        if self.best is None:
            raise ValueError("needs the best guidance scale, which is not known")
        output = Path(self.run.evaluation_dir / "nearest_neighbours")
        if output.with_suffix(".json").exists():
            return
        evaluate = self.evaluate
        samples = self.workers.together(lambda: evaluate.pictures(self.best, self.config.num_neighbours_samples))
        sets = (samples, self.training, self.held_out)
        search_neighbours(*sets, evaluate.network, output, workers=self.workers, command=evaluate.command)
        self.workers.wait()

    def _sweep(self, points: tuple[Point, ...], name: str, plot):
        results, _ = run_sweep(
            self.run, self._plan(points, self.config.num_samples), self.evaluate, workers=self.workers, log=self.log
        )
        if self.workers.is_main:
            rows, base = sweep_rows(results), self.run.evaluation_path(name)
            write_table(rows, base.with_suffix(".csv"))
            if len(points) > 1:
                plot(rows, base.with_suffix(".png"))
        return results

    def _plan(self, points: tuple[Point, ...], count: int) -> SweepPlan:
        protocol = self.evaluate.network.protocol.name
        return SweepPlan(points=points, num_samples=count, final_samples=None, protocol=protocol, seed=self.evaluate.seed)
