"""Sweeps, the watcher and the bundle on a tiny run: what is computed, what is taken from before, what is refused."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import call_tool, write_checkpoint, write_encoder, write_export, write_run

from drift_accel.evaluation.bundle import STAGES, BundleConfig, run_bundle
from drift_accel.evaluation.evaluate import MetricConfig, make_reference
from drift_accel.evaluation.networks import open_network
from drift_accel.evaluation.picture_sources import open_pictures
from drift_accel.evaluation.protocols import get_protocol
from drift_accel.evaluation.results import load_result
from drift_accel.evaluation.run_evaluator import RunEvaluator
from drift_accel.evaluation.statistics import load_reference, save_reference
from drift_accel.evaluation.sweeps import (
    Point,
    SweepPlan,
    best_point,
    choose_averages,
    choose_steps,
    parse_guidance,
    points_of,
    require_same_sweep,
    result_name,
    run_sweep,
    write_table,
)
from drift_accel.evaluation.watching import WatchConfig, watch_run
from drift_accel.evaluation.work_state import WorkState
from drift_accel.foundation.run_folder import RunFolder

NUM_SAMPLES = 70


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An encoder and its statistics of the digits."""
    place = tmp_path_factory.mktemp("sweeps")
    network = open_network(get_protocol("encoder"), write_encoder(place / "mae"), layer="layer1_blk1")
    save_reference(place / "real.npz", make_reference(open_pictures("digits"), network, place / "work"))
    return place


@pytest.fixture
def evaluator(place, tmp_path):
    """An evaluator of a fresh run that notes what it evaluates."""
    write_run(tmp_path / "run")
    network = open_network(get_protocol("encoder"), place / "mae", layer="layer1_blk1")

    class Noting(RunEvaluator):
        seen: list = []

        def __call__(self, point, num_samples, path, **options):
            self.seen.append((point.step, point.ema, point.guidance_scale, num_samples))
            super().__call__(point, num_samples, path, **options)

    evaluator = Noting(
        run=RunFolder(tmp_path / "run"),
        network=network,
        reference=load_reference(place / "real.npz"),
        metrics=MetricConfig(metrics=("frechet",)),
    )
    evaluator.seen = []
    return evaluator


def make_plan(points=None, **changes):
    points = points or points_of([1.0, 2.0], [10, 20], [None])
    return SweepPlan(**{"points": points, "num_samples": NUM_SAMPLES, "final_samples": 90, "protocol": "encoder", **changes})


def test_guidance_scales_are_parsed():
    assert parse_guidance("1.0,3,2") == [1.0, 2.0, 3.0]
    assert parse_guidance("1.0/3.0/5") == [1.0, 1.5, 2.0, 2.5, 3.0]
    for text in ("0.5", "1,x", "1/2", "1/2/1", "1,inf", "nan", ""):
        with pytest.raises(ValueError, match="--guidance is"):
            parse_guidance(text)


def test_checkpoints_and_averages_are_chosen(evaluator, tmp_path):
    run = evaluator.run
    assert choose_steps(run, None, None) == [None] and choose_steps(run, "all", None) == [10, 20]
    assert choose_steps(run, "20,10", None) == [10, 20] and choose_steps(run, None, 1) == [20]
    assert choose_averages(run, "all") == ["ema_0.9", "ema_0.99"] and choose_averages(run, "0.9, none") == ["0.9", "none"]
    for steps, last, message in (
        ("15", None, "no checkpoint of step 15"),
        ("x", None, "give steps such as"),
        (None, 0, "--last is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_steps(run, steps, last)
    with pytest.raises(ValueError, match="give one of them"):
        choose_steps(run, "all", 2)
    with pytest.raises(ValueError, match="has no checkpoints"):
        choose_steps(RunFolder(tmp_path), "all", None)


def test_names_tell_settings_apart():
    names = {
        result_name("clean", step, ema, guidance, count, seed)
        for step in (None, 10) for ema in (None, "ema_0.9") for guidance in (1.0, 1.25) for count in (5, 50) for seed in (0, 1)
    }  # fmt: skip
    assert len(names) == 32 and all("/" not in name for name in names)


def test_a_sweep_evaluates_every_point_and_the_best_again_in_full(evaluator):
    results, final = run_sweep(evaluator.run, make_plan(), evaluator, log=lambda text: None)
    assert evaluator.seen[:4] == [(10, None, 1.0, 70), (10, None, 2.0, 70), (20, None, 1.0, 70), (20, None, 2.0, 70)]
    numbers = [result["metrics"]["frechet_encoder"] for _, result in results]
    best = results[numbers.index(min(numbers))][0]
    assert len(set(numbers)) == 4 and best_point(results) == best
    assert evaluator.seen[4:] == [(best.step, None, best.guidance_scale, 90)] and final["num_generated"] == 90
    assert len({result["generated"]["seed"] for _, result in results}) == 1


def test_an_interrupted_sweep_computes_what_is_missing(evaluator):
    plan = make_plan(final_samples=None)
    first, _ = run_sweep(evaluator.run, plan, evaluator, log=lambda text: None)
    evaluator.run.evaluation_path(result_name("encoder", 10, None, 2.0, NUM_SAMPLES, 0)).unlink()
    evaluator.seen.clear()
    again, _ = run_sweep(evaluator.run, plan, evaluator, log=lambda text: None)
    assert evaluator.seen == [(10, None, 2.0, 70)]
    assert [result["metrics"] for _, result in again] == [result["metrics"] for _, result in first]


def test_results_that_were_made_in_another_way_are_refused(evaluator):
    plan = make_plan(points_of([1.0], [10], [None]), final_samples=None)
    run_sweep(evaluator.run, plan, evaluator, log=lambda text: None)
    evaluator.metrics = MetricConfig(metrics=("frechet",), neighbours=5)
    with pytest.raises(ValueError, match="was made in another way:\n  settings: .*'neighbours': 3.* there, .*'neighbours': 5"):
        run_sweep(evaluator.run, plan, evaluator, log=lambda text: None)


def test_the_table_of_another_sweep_is_not_written_over(tmp_path):
    plan, path = make_plan(), tmp_path / "sweep.csv"
    require_same_sweep(path, plan)
    shared = {"ema": "ema_0.9", "num_samples": NUM_SAMPLES}
    rows = [{"step": p.step, "guidance_scale": p.guidance_scale, **shared} for p in plan.points]
    write_table(rows, path)
    require_same_sweep(path, plan)  # the same sweep again, after a kill
    require_same_sweep(path, make_plan(points_of([1.0, 2.0], [None], [None])))  # of an export, whose step is not known before
    for other in (make_plan(points_of([1.0, 3.0], [10, 20], [None])), make_plan(points_of([1.0, 2.0], [20], [None]))):
        with pytest.raises(ValueError, match="another sweep: give another --name"):
            require_same_sweep(path, other)
    with pytest.raises(ValueError, match="another sweep"):
        require_same_sweep(path, make_plan(num_samples=NUM_SAMPLES + 1))
    path.write_text("mine")
    with pytest.raises(ValueError, match="no table of a sweep|another sweep"):
        require_same_sweep(path, plan)


def test_the_tool_writes_table_and_curves(place, tmp_path):
    run = write_run(tmp_path / "run")
    command = (run, "--guidance", "1.0,2.0", "--steps", "all", "--protocol", "encoder", "--network", place / "mae", "--cpu")
    command += ("--layer", "layer1_blk1", "--reference", place / "real.npz", "--num_samples", NUM_SAMPLES, "--final_samples", 90)
    command += ("--metrics", "frechet")
    printed = call_tool("sweep", *command)
    assert "the best:" in printed and printed.count("| ema_0.9 |") == 5
    rows = list(csv.DictReader((run / "evaluation/sweep.csv").read_text().splitlines()))
    assert [(row["step"], row["guidance_scale"]) for row in rows] == [("10", "1.0"), ("10", "2.0"), ("20", "1.0"), ("20", "2.0")]
    assert float(rows[0]["frechet_encoder"]) > 0
    for name in ("sweep_guidance.png", "sweep_step.png"):
        assert Image.open(run / "evaluation" / name).size[0] > 400
    assert "guidance starts at 1" in call_tool("sweep", *command, "--guidance", "0.5", status=2)


# The watcher.


def watch(evaluator, state, on_sleep, **config):
    """Watch with a clock that only moves when the watcher sleeps."""
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds
        on_sleep(int(now[0]))

    plan = make_plan(points_of([1.0], [None], [None]), final_samples=None)
    options = {"config": WatchConfig(poll_seconds=1, **config), "sleep": sleep, "clock": lambda: now[0], "log": lambda text: None}
    return watch_run(evaluator.run, plan, evaluator, state, **options)


def test_each_new_checkpoint_is_evaluated_until_the_last_one(evaluator, tmp_path):
    shutil.rmtree(evaluator.run.checkpoint_dir(20))
    state = WorkState(tmp_path / "state.json")
    seen = []

    def on_sleep(now):
        seen.append(json.loads((tmp_path / "state.json").read_text())["now"])
        if now == 2:
            write_checkpoint(evaluator.run.path, 15)
        if now == 4:
            write_checkpoint(evaluator.run.path, 20)

    assert watch(evaluator, state, on_sleep)
    assert [step for step, *_ in evaluator.seen] == [10, 15, 20]
    assert set(seen) == {"waiting for a checkpoint"}
    assert state.stages == {"checkpoint 10": "done", "checkpoint 15": "done", "checkpoint 20": "done"}


def test_a_restarted_watcher_takes_what_is_there_and_ends_with_the_run(evaluator, tmp_path):
    state = WorkState(tmp_path / "state.json")
    assert watch(evaluator, state, pytest.fail)
    evaluator.seen.clear()
    assert watch(evaluator, WorkState(tmp_path / "state.json"), pytest.fail)
    assert evaluator.seen == []


def test_a_run_that_stands_still_is_given_up(evaluator, tmp_path):
    shutil.rmtree(evaluator.run.checkpoint_dir(20))
    assert not watch(evaluator, WorkState(tmp_path / "state.json"), lambda now: None, give_up_seconds=5)
    assert [step for step, *_ in evaluator.seen] == [10]


def test_only_some_checkpoints_and_the_last(evaluator, tmp_path):
    write_checkpoint(evaluator.run.path, 15)
    assert watch(evaluator, WorkState(tmp_path / "state.json"), pytest.fail, every=15)
    assert [step for step, *_ in evaluator.seen] == [15, 20]


def test_a_damaged_checkpoint_is_noted_and_a_removed_one_passed_over(evaluator, tmp_path, monkeypatch):
    (evaluator.run.checkpoint_dir(10) / "model.safetensors").write_bytes(b"cut")
    write_checkpoint(evaluator.run.path, 15)
    model = RunEvaluator.model

    def pruning(self, point):
        if point.step == 15:
            shutil.rmtree(self.run.checkpoint_dir(15))
        return model(self, point)

    monkeypatch.setattr(RunEvaluator, "model", pruning)
    state = WorkState(tmp_path / "state.json")
    assert watch(evaluator, state, pytest.fail)
    assert "is damaged" in state.stages["checkpoint 10"] and state.stages["checkpoint 10"].startswith("failed: ValueError")
    assert state.stages["checkpoint 15"] == state.stages["checkpoint 20"] == "done"
    assert not state.finish() and state.now == "failed: checkpoint 10"


@pytest.mark.parametrize("values", [{"poll_seconds": 0}, {"every": 0}, {"give_up_seconds": 0}])
def test_impossible_watches_are_refused(values):
    with pytest.raises(ValueError, match="(is|every) 0"):
        WatchConfig(**values)


# The bundle.


BUNDLE = BundleConfig(guidance=(1.0, 2.0), last=2, num_samples=NUM_SAMPLES, full_samples=90, num_neighbours_samples=12)


def bundle(evaluator, state):
    sets = {"training": open_pictures("digits:train", limit=60), "held_out": open_pictures("digits", limit=30)}
    return run_bundle(evaluator, BUNDLE, state, **sets, log=lambda text: None)


def test_the_bundle_makes_everything_once(evaluator, tmp_path):
    write_export(evaluator.run.path / "exports/ema_0.9")
    state = WorkState(tmp_path / "state.json", STAGES)
    assert bundle(evaluator, state)
    folder = evaluator.run.evaluation_dir
    names = {path.name for path in folder.iterdir()}
    assert {"bundle_checkpoints.csv", "bundle_guidance.png", "samples_full.npz", "nearest_neighbours.png"} <= names
    assert not any("in_progress" in name for name in names)
    assert json.loads((tmp_path / "state.json").read_text())["stages"] == dict.fromkeys(STAGES, "done")
    full = [load_result(path) for path in folder.glob("*_n90.json")]
    assert len(full) == 1 and full[0]["num_generated"] == 90
    evaluator.seen.clear()
    assert bundle(evaluator, WorkState(tmp_path / "state.json", STAGES)) and evaluator.seen == []
    (folder / "samples_full.npz").unlink()
    assert bundle(evaluator, WorkState(tmp_path / "state.json", STAGES)) and len(evaluator.seen) == 1


def test_a_stage_that_fails_is_noted_and_the_next_start_goes_on(evaluator, tmp_path, monkeypatch):
    import drift_accel.evaluation.bundle as module

    def fail(*arguments, **options):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(module, "search_neighbours", fail)
        state = WorkState(tmp_path / "state.json", STAGES)
        assert not bundle(evaluator, state)
    saved = json.loads((tmp_path / "state.json").read_text())
    assert saved["stages"]["neighbours"] == "failed: OSError: disk full" and saved["now"] == "failed: neighbours"
    evaluator.seen.clear()
    assert bundle(evaluator, WorkState(tmp_path / "state.json", STAGES)) and evaluator.seen == []


def test_the_tool_watches_to_the_end_and_makes_the_bundle(place, tmp_path):
    run = write_run(tmp_path / "run")
    command = (run, "--protocol", "encoder", "--network", place / "mae", "--layer", "layer1_blk1", "--cpu")
    command += ("--reference", place / "real.npz", "--num_samples", NUM_SAMPLES, "--then", "bundle", "--full_samples", 80)
    printed = call_tool("watch", *command, "--bundle_guidance", "1.0,2.0", "--metrics", "frechet")
    assert printed.endswith("run: done\n")
    state = json.loads((run / "evaluation/watch/state.json").read_text())
    assert state["now"] == "done" and "neighbours" not in state["stages"] and state["stages"]["full_set"] == "done"


def test_evaluations_leave_the_global_generators_alone(evaluator, tmp_path):
    before = torch.get_rng_state()
    evaluator(Point(guidance_scale=1.0, step=10), 10, tmp_path / "x.json")
    assert torch.equal(torch.get_rng_state(), before)
    assert Path(tmp_path / "x.json").exists()
