"""Small runs of the same code: --debug, --data.max_rows, --overfit_one_batch, and the flags that switch them on."""

import re

import numpy as np
import pytest
import torch
import yaml
from small_caches import write_small_cache
from tiny_runs import ROOT, TINY_GENERATOR, TINY_MAE, checkpoint_tensors, generator_arguments, metrics, tiny_encoder

from drift_accel import train, train_mae
from drift_accel.data import DataConfig, open_source
from drift_accel.data.latent_cache import LatentCache
from drift_accel.data.sources import describe_source, read_images
from drift_accel.data.subset import BalancedSubset, balanced_counts
from drift_accel.training.mae_task import ClassifierConfig, MaeTask


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("mae"))


# --debug


@pytest.mark.parametrize("command", [train, train_mae])
def test_the_help_says_exactly_what_debug_changes(command, capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = re.search(r"--debug.*?(?=\n  --|\n\S|\Z)", capsys.readouterr().out, re.S)[0]
    text = " ".join(text.split())
    for key, value in command.DEBUG_VALUES.items():
        assert f"{key} {value}" in text, key
    assert len(re.findall(r"[a-z_]+\.[a-z_]+ \d|batch_size \d|steps \d", text)) >= len(command.DEBUG_VALUES)


def resolved(capsys, command, *arguments):
    command.main([*arguments, "--dry_run"])
    return yaml.safe_load(capsys.readouterr().out)


def value_of(configuration, key):
    for part in key.split("."):
        configuration = configuration[part]
    return configuration


@pytest.mark.parametrize("recipe", ["digits", "digits_latent", "mae_digits", "mae_digits_latent"])
def test_debug_goes_over_files_and_under_the_command_line(recipe, capsys):
    command = train_mae if "mae" in recipe else train
    file = ["--config", str(ROOT / f"train_configs/{recipe}.yaml")]
    plain, debug = resolved(capsys, command, *file), resolved(capsys, command, "--debug", *file)
    assert plain["debug"] is False and debug["debug"] is True
    for key, value in command.DEBUG_VALUES.items():
        assert value_of(debug, key) == value
    assert {key for key in plain if plain[key] != debug[key]} <= {"debug", *(key.split(".")[0] for key in command.DEBUG_VALUES)}
    assert resolved(capsys, command, "--steps", "7", "--debug", *file)["steps"] == 7
    assert resolved(capsys, command, "--debug", "false", *file) == plain


def test_a_debug_run_trains_and_its_folder_says_so(encoder, tmp_path, capsys):
    recipe = ["--config", str(ROOT / "train_configs/digits.yaml"), "--encoder.path", str(encoder), "--device", "cpu"]
    recipe += ["--features.maps", '["conv1","layer1_blk1"]']
    train.main([*recipe, "--debug", "--output_dir", str(tmp_path / "run")])
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert saved["debug"] is True and saved["steps"] == 20 and saved["generator"]["hidden_size"] == 64
    assert list(metrics(tmp_path / "run")) == list(range(1, 21))
    with pytest.raises(SystemExit, match="batch.labels: 8 -> 10"):
        train.main([*recipe, "--output_dir", str(tmp_path / "run")])


# --data.max_rows


def test_balanced_counts():
    assert balanced_counts(np.array([10, 10, 10]), 7).tolist() == [3, 2, 2]
    assert balanced_counts(np.array([1, 10, 10]), 9).tolist() == [1, 4, 4]
    assert balanced_counts(np.array([0, 2, 9]), 8).tolist() == [0, 2, 6]
    assert balanced_counts(np.array([4, 0, 5]), 100).tolist() == [4, 0, 5]


def check_subset(whole, subset, max_rows):
    counts = np.bincount(subset.labels, minlength=whole.num_classes)
    assert len(subset) == max_rows == counts.sum() and counts.max() - counts.min() <= 1
    for label in range(whole.num_classes):
        rows = subset.class_rows(label)
        assert np.array_equal(rows, np.flatnonzero(subset.labels == label))
        images = {image.tobytes() for image in read_images(whole, whole.class_rows(label)[None], 0, "n", 0, [0], False)[0]}
        chosen = {image.tobytes() for image in read_images(subset, rows[None], 0, "n", 0, [0], False)[0]}
        assert chosen <= images and len(chosen) == len(rows)
    assert describe_source(subset) == describe_source(whole)
    assert (subset.image_shape, subset.class_names) == (whole.image_shape, whole.class_names)


def test_a_balanced_part_of_the_digits():
    whole, subset = open_source(DataConfig()), open_source(DataConfig(max_rows=43))
    check_subset(whole, subset, 43)
    again = open_source(DataConfig(max_rows=43))
    assert np.array_equal(subset.rows(np.arange(43)), again.rows(np.arange(43)))
    assert len(open_source(DataConfig(max_rows=10**6))) == len(whole)
    with pytest.raises(ValueError, match="data.max_rows is 9 but the data has 10 classes with rows: give at least 10"):
        open_source(DataConfig(max_rows=9))


def test_a_balanced_part_of_a_cache(tmp_path):
    write_small_cache(tmp_path / "cache")
    whole = LatentCache(tmp_path / "cache")
    check_subset(whole, BalancedSubset(whole, 7), 7)
    flipped = open_source(DataConfig(source="cache", path=str(tmp_path / "cache"), max_rows=7, flip=True))
    indices, flags = np.arange(7), np.arange(7) % 2 == 0
    assert flipped.has_flipped and not np.array_equal(flipped.rows(indices, flags), flipped.rows(indices))


def test_both_trainers_train_on_a_part(encoder, tmp_path):
    train.main(generator_arguments(encoder, tmp_path / "run", "--steps", "2", "--data.max_rows", "30"))
    train_mae.main([*TINY_MAE, "--data.max_rows", "30", "--output_dir", str(tmp_path / "mae")])
    assert max(metrics(tmp_path / "run")) == 2 and max(metrics(tmp_path / "mae")) == 6
    queue = ("--data.queue.per_class", "5", "--data.queue.unconditional", "10", "--data.queue.push", "4")
    train.main(generator_arguments(encoder, tmp_path / "queue", "--steps", "2", "--data.max_rows", "30", *queue))


# --overfit_one_batch


def test_overfitting_repeats_the_draws_of_the_first_step(encoder, tmp_path):
    run = tmp_path / "run"
    frozen = ("--overfit_one_batch", "--optimizer.lr", "1e-12", "--optimizer.warmup_steps", "0")
    train.main(generator_arguments(encoder, run, "--steps", "3", *frozen))
    records = metrics(run)
    assert records[1]["guidance_scale"] == records[2]["guidance_scale"] == records[3]["guidance_scale"]
    assert records[3]["loss"] == pytest.approx(records[1]["loss"], rel=1e-3)
    train.main(generator_arguments(encoder, run, "--steps", "4", *frozen))
    assert metrics(run)[4]["guidance_scale"] == records[1]["guidance_scale"]
    with pytest.raises(SystemExit, match="overfit_one_batch: true -> false"):
        train.main(generator_arguments(encoder, run, "--steps", "5", *frozen[1:]))
    assert checkpoint_tensors(run, 4)


def test_an_encoder_overfits_too():
    class Grid:
        config = type("config", (), {"input_size": 8, "input_patch_size": 1, "mask_patch_size": 2})
        expand_mask = staticmethod(lambda mask: mask)

    def batches(overfit):
        settings = {"batch_size": 4, "mask_ratio": 0.5, "classifier": ClassifierConfig(), "total_steps": 9, "seed": 0}
        task = MaeTask(Grid(), open_source(DataConfig()), **settings, overfit_one_batch=overfit, device=torch.device("cpu"))
        return [task.draw(step) for step in (0, 5)]

    (first, later), (plain, other) = batches(True), batches(False)
    for name in ("images", "labels", "mask"):
        assert torch.equal(getattr(first, name), getattr(later, name))
        assert torch.equal(getattr(first, name), getattr(plain, name))
    assert not torch.equal(plain.images, other.images)


# Flags


def test_a_boolean_key_alone_means_true(capsys):
    base = [*TINY_GENERATOR, "--encoder.path", "runs/mae"]
    for flags, wanted in ((["--data.flip"], True), (["--data.flip", "false"], False), (["--data.flip=true"], True), ([], False)):
        assert resolved(capsys, train, *base, *flags)["data"]["flip"] is wanted
        assert resolved(capsys, train, *flags, *base)["data"]["flip"] is wanted
