"""Gates of a reproduction: good output passes, each damage is named, what has passed is recognised, stages wait for others."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import ROOT, load_tool

from drift_accel.analysis.reproduction import budget as stage_budget
from drift_accel.analysis.reproduction.budget import disk_problems, plan_space
from drift_accel.analysis.reproduction.gates import STOPPED, Gates, State
from drift_accel.analysis.reproduction.stages import INPUTS, STAGES, Reproduction
from drift_accel.data.archive_verification import verify_images
from drift_accel.data.digit_archives import NAMES, WNIDS, write_digit_archives
from drift_accel.data.imagenet_archives import PrepareConfig, prepare_imagenet
from drift_accel.evaluation.statistics import ReferenceStatistics, save_reference
from drift_accel.foundation.command_line import parse_command
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.storage import atomic_write_json, committed_folder, sha256_file
from drift_accel.train import GeneratorTrainingConfig
from drift_accel.train_mae import MaeTrainingConfig
from drift_accel.training.stops import EXIT_STOPPED


def reproduction(folder: Path, **changes) -> Reproduction:
    settings = {
        "work": folder, "archives": folder / "archives", "images": folder / "images", "cache": folder / "cache",
        "reference": folder / "reference.npz", "mae": folder / "mae", "encoder": folder / "mae/exports/ema_0.99",
        "generator": folder / "generator", "samples": folder / "samples.npz", "num_samples": 12, "image_size": 8,
        "result": folder / "generator/evaluation/final.json", "mae_recipe": ROOT / "train_configs/mae_digits_latent.yaml",
        "recipe": ROOT / "train_configs/digits_latent.yaml", "protocol": "encoder", "is_imagenet": False,
    }  # fmt: skip
    return Reproduction(**{**settings, **changes})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Archives of two digits a class, extracted."""
    folder = tmp_path_factory.mktemp("prepared")
    assert write_digit_archives(folder / "archives", per_class=2, val_per_class=1)
    prepare_imagenet(prepare_config(folder), log=lambda line: None)
    return folder


def prepare_config(folder: Path) -> PrepareConfig:
    return PrepareConfig(output_dir=folder / "images", archives=folder / "archives", skip_md5=True, expect="none")


@pytest.fixture
def gates(prepared, tmp_path):
    """Gates of a copy of the extracted pictures whose first stage has passed."""
    import shutil

    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    gates = Gates(reproduction(tmp_path))
    assert gates.check("archives") == []
    return gates


def passes(gates: Gates, *stages: str) -> None:
    """Note that these have passed, without output."""
    for stage in stages:
        entry = {"status": "passed", "time": "now", "checks": [], "identity": {"file": stage}}
        gates.stages[stage] = {**entry, "inputs": {}, "next": None}


def write_run(path: Path, records: list[dict], *, steps: int = 4, last: int = 4, weights: float = 1.0) -> RunFolder:
    """A run as a trainer leaves it."""
    run = RunFolder(path)
    run.create()
    run.open_configuration({"steps": steps})
    with run.new_checkpoint(last) as folder:
        (folder / "model.bin").write_bytes(b"weights")
    for step, record in enumerate(records, start=1):
        run.append_metrics({"step": step, **record})
    with committed_folder(run.export_dir("ema_0.99")) as folder:
        (folder / "config.json").write_text("{}")
        save_file({"weight": torch.full((3,), weights)}, folder / "model.safetensors")
    return run


# The archives of digits.


def test_the_digits_archives_become_class_folders_with_their_names(prepared):
    table = json.loads((prepared / "images/classes.json").read_bytes())
    entries = table["classes"] if isinstance(table, dict) else table
    assert [entry["wnid"] for entry in entries] == sorted(WNIDS)
    assert [entry["names"][0] for entry in entries] == list(NAMES)
    assert {len(list(folder.iterdir())) for folder in (prepared / "images/train").iterdir()} == {2}
    assert {len(list(folder.iterdir())) for folder in (prepared / "images/val").iterdir()} == {1}


def test_the_digits_archives_are_written_once_and_whole(tmp_path):
    assert write_digit_archives(tmp_path / "a", per_class=1, val_per_class=1)
    assert not write_digit_archives(tmp_path / "a", per_class=1, val_per_class=1)
    next((tmp_path / "a").glob("*train.tar")).write_bytes(b"cut")
    with pytest.raises(ValueError, match="not whole: .*train.tar"):
        write_digit_archives(tmp_path / "a")
    with pytest.raises(ValueError, match="give a number from 1 to"):
        write_digit_archives(tmp_path / "b", per_class=10_000)
    assert not (tmp_path / "b").exists()


# Reading all pictures again.


def test_a_changed_picture_is_found_though_its_size_is_the_same(gates):
    images = gates.paths.images
    assert verify_images(images)["is_good"]
    picture = sorted((images / "train" / WNIDS[3]).iterdir())[0]
    content = bytearray(picture.read_bytes())
    content[300] ^= 1
    picture.write_bytes(content)
    found = verify_images(images)
    assert not found["is_good"] and len(found["problems"]) == 1 and str(images / "train" / WNIDS[3]) in found["problems"][0]


def test_missing_and_added_pictures_are_found(gates):
    images = gates.paths.images
    sorted((images / "val" / WNIDS[0]).iterdir())[0].unlink()
    (images / "train" / WNIDS[1] / "more.JPEG").write_bytes(b"x")
    problems = "\n".join(verify_images(images)["problems"])
    assert f"val/{WNIDS[0]}" in problems and f"train/{WNIDS[1]}" in problems
    with pytest.raises(ValueError, match="no finished split"):
        verify_images(images / "train")


# What a gate says of each stage.


def test_archives_pass_and_damage_is_named_with_the_next_command(gates):
    assert gates.look("archives") == (State.FINISHED, [])
    folder = gates.paths.images / "train" / WNIDS[2]
    sorted(folder.iterdir())[0].unlink()
    again = Gates(gates.paths)
    state, problems = again.look("archives")
    assert state is State.BROKEN and str(folder) in problems[0]
    record = json.loads(gates.paths.gates.read_bytes())["stages"]["archives"]
    assert record["status"] == "failed" and record["next"].endswith("imagenet256.sh archives")
    assert Gates(gates.paths).look("archives")[0] is State.UNFINISHED  # it is to be run again, which makes the class anew


def test_imagenets_numbers_are_wanted_of_imagenet(gates):
    problems = Gates(reproduction(gates.paths.work, is_imagenet=True)).check("archives")
    assert any("1281167" in problem for problem in problems) and any("50000" in problem for problem in problems)


def test_a_stage_waits_for_those_it_needs(gates):
    state, problems = gates.look("train")
    assert state is State.BLOCKED
    assert len(problems) == 2 and "needs stage export" in problems[0] and problems[1].endswith("imagenet256.sh mae")


def test_a_verification_of_other_pictures_is_done_again_and_other_output_refused(gates):
    atomic_write_json(gates.paths.images_report, verify_images(gates.paths.images))
    assert gates.check("verify_images") == []
    write_run(gates.paths.mae, [{"loss": 2.0, "reconstruction": 2.0}, {"loss": 1.0, "reconstruction": 1.0}])
    assert gates.check("mae") == []
    assert gates.look("verify_images")[0] is State.FINISHED and gates.look("mae")[0] is State.FINISHED
    gates.stages["archives"]["identity"] = {"train": "others"}
    assert gates.look("verify_images")[0] is State.UNFINISHED
    state, problems = gates.look("mae")
    assert state is State.BROKEN and "made from another output of stage archives" in problems[0]


def test_statistics_must_be_finite_of_the_protocol_and_of_all_pictures(gates):
    def reference(protocol="encoder", num_images=20, scale=1.0):
        record = {"protocol": protocol, "num_images": num_images}
        save_reference(gates.paths.reference, ReferenceStatistics(mean=np.ones(3), covariance=scale * np.eye(3), record=record))
        return gates.check("reference")

    assert reference() == []
    assert "protocol" in reference(protocol="clean")[0]
    assert "pictures: 19" in reference(num_images=19)[0]
    assert "features vary" in reference(scale=0.0)[0]
    assert "finite" in reference(scale=math.nan)[0]
    gates.paths.reference.write_bytes(b"damaged")
    assert "reference.npz" in gates.check("reference")[0]


MAE = [{"loss": value, "reconstruction": value} for value in (3.0, 2.0, 1.5, 1.0)]


@pytest.mark.parametrize(
    ("records", "changes", "wanted"),
    [
        (MAE, {}, None),
        (MAE[::-1], {}, "reconstruction loss fell"),
        ([*MAE, {"loss": math.nan, "reconstruction": 1.0}], {}, "no finite loss at step 5"),
        (MAE, {"last": 3}, "last checkpoint: 3, wanted 4"),
        (MAE, {"weights": math.nan}, "weight holds a NaN"),
        (MAE[:1], {}, "a change needs two"),
    ],
    ids=["good", "rising", "nan", "unfinished", "nan weights", "one record"],
)
def test_an_encoder_must_be_finished_finite_and_better_than_at_its_start(gates, records, changes, wanted):
    write_run(gates.paths.mae, records, **changes)
    problems = gates.check("mae")
    assert (problems == []) if wanted is None else any(wanted in problem for problem in problems), problems


def test_a_changed_export_is_named(gates):
    write_run(gates.paths.mae, MAE)
    assert gates.check("mae") == []
    file = gates.paths.encoder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    state, problems = gates.look("mae")
    assert state is State.BROKEN and str(file) in problems[0] and "remove or repair" in gates.next_command("mae", problems)


def test_an_encoder_from_elsewhere_needs_no_run(gates, tmp_path):
    write_run(tmp_path / "other", MAE)
    paths = reproduction(tmp_path, encoder=tmp_path / "other/exports/ema_0.99")
    assert not paths.trains_encoder and Gates(paths).check("mae") == []


def test_the_generators_statistic_must_have_moved(gates):
    passes(gates, "export", "mae")
    still = [{"loss": 1.0, "drift_sqnorm_0.2": 0.5, "drift_sqnorm_0.2/layer1": value} for value in (0.1, 0.2, 0.3)]
    write_run(gates.paths.generator, still)
    assert "drift_sqnorm_0.2 moved" in gates.check("train")[0]
    (gates.paths.generator / "metrics.jsonl").unlink()
    for step, value in enumerate((0.5, 0.4, 0.3), start=1):
        RunFolder(gates.paths.generator).append_metrics({"step": step, "loss": 1.0, "drift_sqnorm_0.2": value})
    assert gates.check("train") == []


def write_samples(path: Path, count=12, non_finite=0, flat=0, labels=None) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    pixels[:flat] = 7
    labels = np.arange(count) % 3 if labels is None else labels
    record = {"model": {"path": "m"}, "num_non_finite": non_finite, "seed": 0, "guidance_scale": 1.0}
    np.savez(path, arr_0=pixels, arr_1=labels, record=np.array(json.dumps(record)))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, None),
        ({"count": 11}, "pictures: 11"),
        ({"non_finite": 2}, "not finite: 2"),
        ({"flat": 1}, "one level: 1"),
        ({"labels": np.zeros(12, dtype=np.int64) + (np.arange(12) > 8)}, "balanced"),
    ],
    ids=["good", "too few", "not finite", "flat", "unbalanced"],
)
def test_samples_are_counted_and_looked_at(gates, changes, wanted):
    passes(gates, "train")
    write_samples(gates.paths.samples, **changes)
    problems = gates.check("sample")
    assert (problems == []) if wanted is None else any(wanted in problem for problem in problems), problems


def test_what_cannot_be_read_becomes_a_finding(gates):
    write_run(gates.paths.mae, MAE)
    (gates.paths.encoder / "model.safetensors").write_bytes(b"cut")
    assert any("model.safetensors" in problem for problem in gates.check("mae"))
    passes(gates, "train", "export", "mae")
    np.savez(gates.paths.samples, arr_0=np.zeros((12, 8, 8, 3), np.uint8))
    assert any("has no labels" in problem for problem in gates.check("sample"))
    write_run(gates.paths.generator, [])
    assert gates.check("train")
    gates.paths.images_report.write_text("[]")
    assert gates.check("verify_images")


def test_samples_that_were_exchanged_are_named(gates):
    passes(gates, "train")
    write_samples(gates.paths.samples)
    assert gates.check("sample") == []
    write_samples(gates.paths.samples, labels=np.arange(12)[::-1] % 3)
    state, problems = gates.look("sample")
    assert state is State.BROKEN and str(gates.paths.samples) in problems[0]


def test_a_result_must_be_of_these_samples_and_this_reference(gates):
    passes(gates, "sample", "reference")
    result = {
        "format": 1, "metrics": {"frechet_encoder": 1.0}, "protocol": {"protocol": "encoder"}, "num_generated": 12,
        "generated": {"sha256": "sample"}, "reference": {"sha256": "reference"},
    }  # fmt: skip
    atomic_write_json(gates.paths.result, result)
    assert gates.check("evaluate") == []
    for change in ({"generated": {"sha256": "x"}}, {"reference": None}, {"num_generated": 3}, {"metrics": {"fid": None}}):
        atomic_write_json(gates.paths.result, {**result, **change})
        assert gates.check("evaluate"), change


def test_a_result_of_other_samples_is_measured_again(gates):
    test_a_result_must_be_of_these_samples_and_this_reference(gates)
    assert gates.look("evaluate")[0] is State.UNFINISHED  # its last check failed
    gates.stages["evaluate"]["status"] = "passed"
    gates.stages["sample"]["status"] = "failed"
    assert gates.look("evaluate") == (State.BLOCKED, [f"needs stage sample, which has not passed; type {gates.command} sample"])


def test_a_cut_page_does_not_pass(gates):
    passes(gates, "train", "evaluate")
    gates.paths.report.parent.mkdir(parents=True)
    gates.paths.report.write_text("<html>final</html>")
    assert gates.check("report") == []
    gates.paths.report.write_text("<html>final</ht")
    assert "whole page" in gates.look("report")[1][0]


# The record.


def test_every_stage_has_a_check_and_needs_only_earlier_ones(gates):
    for place, stage in enumerate(STAGES):
        assert set(INPUTS[stage]) <= set(STAGES[:place])
        if stage != "archives":
            assert gates.check(stage), f"{stage} passes without any output"


def test_a_failed_command_is_recorded_with_what_to_type(gates):
    problems = gates.fail("export", 137)
    record = json.loads(gates.paths.gates.read_bytes())["stages"]["export"]
    assert "137" in record["problems"][0] and record["status"] == "failed"
    assert gates.next_command("export", problems) == "mend that, then: bash launch_scripts/imagenet256.sh export"


def test_a_training_that_was_asked_to_stop_needs_no_mending(gates):
    assert STOPPED == EXIT_STOPPED
    problems = gates.fail("mae", STOPPED)
    assert "with a checkpoint" in problems[0] and gates.next_command("mae", problems) == "bash launch_scripts/imagenet256.sh mae"


@pytest.mark.parametrize("content", ["no json", "[]", '{"format": 2, "stages": {}}', '{"format": 1, "stages": {"mae": 3}}'])
def test_a_record_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "gates.json").write_text(content)
    with pytest.raises(ValueError, match="is no record of gates"):
        Gates(reproduction(tmp_path))


# The disk.


def recipes(paths: Reproduction):
    generator = parse_command(GeneratorTrainingConfig, "", ["--config", str(paths.recipe), "--dry_run"]).config
    mae = parse_command(MaeTrainingConfig, "", ["--config", str(paths.mae_recipe), "--validation.path", "x", "--dry_run"]).config
    return generator, mae


def test_the_published_run_needs_what_its_parts_need(tmp_path):
    configs = {"recipe": ROOT / "train_configs/latent_l2.yaml", "mae_recipe": ROOT / "train_configs/mae_latent_640.yaml"}
    paths = reproduction(tmp_path, is_imagenet=True, num_samples=50_000, image_size=256, **configs)
    with pytest.raises(FileNotFoundError, match=r"ILSVRC2012_img_train.tar.*ARCHIVES"):
        plan_space(paths, *recipes(paths))
    (tmp_path / "archives").mkdir()
    for name in ("train", "val"):
        (tmp_path / f"archives/ILSVRC2012_img_{name}.tar").write_bytes(bytes(10**6))
    spaces = {space.stage: space for space in plan_space(paths, *recipes(paths))}
    assert spaces["export"].kept == 1_281_167 * 2 * 2 * 4 * 32 * 32  # two orientations of float16 latents
    assert spaces["sample"].kept == 50_000 * 256 * 256 * 3
    # Weights, two moments and an average of 463 M numbers: 7.4 GB; ten stay for good, two at the end, one is being written.
    assert spaces["train"].kept / 1e9 == pytest.approx(13 * 7.41 + 1.85, abs=0.3)
    assert spaces["archives"].kept >= 2.06e6 + 1_331_167 * 4096
    left = plan_space(paths, *recipes(paths), finished=("archives", "export"))
    assert {space.stage for space in left} == set(spaces) - {"archives", "export"}


def test_pictures_of_other_archives_are_counted(prepared, tmp_path):
    paths = reproduction(tmp_path, archives=prepared / "archives")
    spaces = {space.stage: space for space in plan_space(paths, *recipes(paths))}
    assert spaces["export"].kept == 20 * 2 * 2 * 4 * 16 * 16


def test_a_disk_that_is_too_small_is_named_with_both_numbers(prepared, tmp_path, monkeypatch):
    spaces = plan_space(paths := reproduction(tmp_path, archives=prepared / "archives"), *recipes(paths))
    assert disk_problems(spaces) == []
    usage = type("Usage", (), {"free": 10**6})
    monkeypatch.setattr(stage_budget.shutil, "disk_usage", lambda path: usage)
    (problem,) = disk_problems(spaces)
    assert "archives, reference, export, mae, train, sample, evaluate need" in problem and "0.0 GB are free" in problem


def test_the_tool_refuses_what_cannot_start(prepared, tmp_path, monkeypatch, capsys):
    tool = load_tool("check_stage")
    paths = reproduction(tmp_path, archives=prepared / "archives")
    fields = Reproduction.__dataclass_fields__.keys() - {"protocol", "network", "is_imagenet"}
    options = [text for name in sorted(fields) for text in (f"--{name}", str(getattr(paths, name)))]

    def call(stage, *more):
        monkeypatch.setattr("sys.argv", ["check_stage.py", stage, *options, "--protocol", "encoder", "--other_archives", *more])
        return tool.main()

    assert call("all") == 1
    assert "needs --network" in capsys.readouterr().err
    assert call("all", "--network", str(tmp_path)) == 0
    assert "GB for 10 of 10 stages" in capsys.readouterr().out
    assert call("archives", "--look") == tool.TO_RUN
    assert call("archives") == 1 and "next:" in capsys.readouterr().err
    assert call("mae", "--look") == 1 and "needs stage archives" in capsys.readouterr().err
    assert call("all", "--list") == 1 and "archives      failed" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        call("all", "--num_samples", "0")
    assert "--num_samples is 0" in capsys.readouterr().err
    assert sha256_file(paths.gates)
