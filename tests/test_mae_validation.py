"""Validation of the encoder's pretraining: its numbers by hand, the same for any number of processes, and in the records."""

import json
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tiny_runs import TINY_MAE, checkpoint_tensors, launch, metrics

from drift_accel import train_mae
from drift_accel.data.digits import load_digits
from drift_accel.data.subset import BalancedSubset
from drift_accel.foundation.command_line import parse_command
from drift_accel.models import MaskedAutoencoder
from drift_accel.training.mae_validation import MEASURES, MaeValidation, draw_row_masks, measure_rows
from drift_accel.training.trained_mae import load_trained_mae

SMALL = {"width": 8, "blocks": (1, 1, 1, 1), "in_channels": 1, "input_size": 8, "num_classes": 10}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    model = MaskedAutoencoder(**SMALL)
    model.initialize_weights(torch.Generator().manual_seed(1))
    return model


def test_measures_follow_their_definitions(model):
    digits = load_digits("test")
    images, labels = torch.from_numpy(digits.images[:12]), torch.from_numpy(digits.labels[:12])
    mask = draw_row_masks(model, 3, np.arange(12), 0.5)
    found = dict(zip(MEASURES, measure_rows(model, images, labels, mask).T, strict=True))
    with torch.no_grad():
        hidden, shown = model(images, labels, mask), model(images, labels, mask * 0)
        error = (model.reconstruct(images, mask * 0) - images).square()
    torch.testing.assert_close(found["reconstruction"], hidden.reconstruction.double())
    torch.testing.assert_close(found["reconstruction_unmasked"], error.mean((1, 2, 3)).double())  # one channel
    assert torch.equal(found["accuracy"], hidden.accuracy.double())
    assert torch.equal(found["accuracy_unmasked"], shown.accuracy.double())


def test_a_rows_mask_depends_on_seed_and_row_alone(model):
    rows = np.arange(20)
    together = draw_row_masks(model, 3, rows, 0.5)
    assert torch.equal(together[[7, 4]], draw_row_masks(model, 3, rows[[7, 4]], 0.5))
    assert not torch.equal(together, draw_row_masks(model, 4, rows, 0.5))
    assert 0.3 < draw_row_masks(model, 0, np.arange(500), 0.5).mean() < 0.7
    assert draw_row_masks(model, 0, np.arange(500), 0.1).mean() < 0.2


def test_the_mean_is_over_all_rows_whatever_the_chunks(model):
    source = BalancedSubset(load_digits("test"), 50)
    double = MaskedAutoencoder(**SMALL).double()
    double.load_state_dict(model.state_dict())
    measured = [
        MaeValidation(source, seed=0, mask_ratio=0.5, batch_size=size, dtype=torch.float64).measure(double, CPU, nullcontext)
        for size in (7, 50, 64)
    ]
    assert measured[1] == pytest.approx(measured[0], rel=1e-12) == measured[2]


VALIDATED = [*TINY_MAE, "--validation.every", "3", "--validation.max_rows", "30", "--validation.batch_size", "8"]


def validation_records(run):
    return {
        step: {tag: value for tag, value in record.items() if tag.startswith("val/")} for step, record in metrics(run).items()
    }


def test_a_run_records_raw_weights_and_averages(tmp_path):
    train_mae.main([*VALIDATED, "--output_dir", str(tmp_path / "run"), "--precision", "float64"])
    records = validation_records(tmp_path / "run")
    assert {step for step, record in records.items() if record} == {3, 6}
    assert set(records[6]) == {f"val/{measure}_{name}" for measure in MEASURES for name in ("raw", "ema_0.99")}
    assert "val" not in json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    # The recorded numbers are those of the weights that the run leaves behind.
    trained = MaskedAutoencoder(**SMALL).double()
    saved = checkpoint_tensors(tmp_path / "run", 6)
    trained.load_state_dict({name: saved[f"ema_0.99/{name}"] for name in trained.state_dict()})
    source = BalancedSubset(load_digits("test"), 30)
    again = MaeValidation(source, seed=0, mask_ratio=0.5, batch_size=8, dtype=torch.float64).measure(trained, CPU, nullcontext)
    recorded = [records[6][f"val/{measure}_ema_0.99"] for measure in MEASURES]
    assert again == pytest.approx(recorded, rel=1e-9)


def test_validation_does_not_change_the_training(tmp_path):
    for name, arguments in (("with", VALIDATED), ("without", TINY_MAE)):
        train_mae.main([*arguments, "--output_dir", str(tmp_path / name)])
    first, second = metrics(tmp_path / "with"), metrics(tmp_path / "without")
    assert [record["loss"] for record in first.values()] == [record["loss"] for record in second.values()]


@pytest.mark.multiprocess
def test_two_processes_measure_the_same(tmp_path):
    for count in (1, 2):
        # A rate too small to move a weight: what differs then is the measuring.
        still = ["--precision", "float64", "--optimizer.lr", "1e-30", "--optimizer.warmup_steps", "0"]
        arguments = [*VALIDATED, *still, "--output_dir", str(tmp_path / str(count))]
        result = launch(count, "drift_accel.train_mae", arguments)
        assert result.returncode == 0, result.stderr
    one, two = validation_records(tmp_path / "1"), validation_records(tmp_path / "2")
    for step in (3, 6):
        assert two[step] == one[step]


def test_held_out_rows_of_another_shape_are_refused(tmp_path):
    from small_caches import write_small_cache

    write_small_cache(tmp_path / "cache")
    config = ["--data.source", "cache", "--data.path", str(tmp_path / "cache"), "--validation.path", str(tmp_path / "none")]
    with pytest.raises(SystemExit, match=r"mae takes images of shape|no complete|manifest|none"):
        train_mae.main([*VALIDATED, *config, "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_the_classifier_phase_is_a_run_of_its_own(tmp_path, capsys):
    train_mae.main([*TINY_MAE, "--classifier.steps", "0", "--output_dir", str(tmp_path / "mae")])
    capsys.readouterr()
    phase = ["--init_from", str(tmp_path / "mae/exports/ema_0.99"), "--classifier.steps", "6", "--classifier.warmup_steps", "3"]
    train_mae.main([*TINY_MAE, *phase, "--optimizer.lr", "1e-3", "--output_dir", str(tmp_path / "mae_cls")])
    assert capsys.readouterr().out.startswith("data: 1,197 rows of 10 classes, handwritten digits (train)\n")
    weights = [record["classifier_weight"] for record in metrics(tmp_path / "mae_cls").values()]
    assert weights == pytest.approx([0, 1 / 30, 2 / 30, 0.1, 0.1, 0.1])
    first = MaskedAutoencoder.from_pretrained(tmp_path / "mae/exports/ema_0.99").state_dict()
    exports = tmp_path / "mae_cls/exports"
    assert [path.name for path in exports.iterdir()] == ["encoder_cls"], "exported apart from the encoder that it started from"
    second = MaskedAutoencoder.from_pretrained(exports / "encoder_cls").state_dict()
    assert first.keys() == second.keys() and not torch.equal(first["classifier.weight"], second["classifier.weight"])
    for ema in (None, "0.99"):
        found = load_trained_mae(tmp_path / "mae_cls", ema=ema)
        assert found.origin == str(exports / "encoder_cls")
        assert all(torch.equal(value, second[name]) for name, value in found.model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, ["ema_0.99"]),
        ({"init_from": "mae"}, ["ema_0.99"]),  # goes on with reconstruction before its classifier phase
        ({"init_from": "mae", "classifier.steps": 6}, ["encoder_cls"]),
        ({"init_from": "mae", "classifier.steps": 6, "ema.decays": [0.9, 0.99]}, ["encoder_cls_ema_0.9", "encoder_cls_ema_0.99"]),
        ({"classifier.steps": 6}, ["ema_0.99"]),  # an encoder of its own, from random weights
    ],
)
def test_names_of_exports(changes, wanted):
    given = [text for name, value in changes.items() for text in (f"--{name}", str(value))]
    config = parse_command(train_mae.MaeTrainingConfig, "", [*TINY_MAE, *given, "--dry_run"]).config
    assert list(config.export_names.values()) == wanted


def test_a_run_under_way_is_read_from_its_newest_checkpoint(tmp_path):
    """Not from the export of a step on the way, whose name comes before that of the end."""
    averages = ["--ema.decays", "[0.99,0.9]", "--checkpoint.every", "2", "--checkpoint.export_every", "2"]
    train_mae.main([*TINY_MAE, *averages, "--output_dir", str(tmp_path / "run")])
    assert load_trained_mae(tmp_path / "run").origin.endswith("exports/ema_0.99"), "the first average of the configuration"
    for decay in ("0.99", "0.9"):
        shutil.rmtree(tmp_path / f"run/exports/ema_{decay}")
    assert (tmp_path / "run/exports/ema_0.99_step_00000002").is_dir()
    assert load_trained_mae(tmp_path / "run").origin.endswith("checkpoints/step_00000006 (ema_0.99)")
