"""Pretraining an encoder on two processes, or in micro-batches, is pretraining it on one: the real trainer in float64.

On the digits, on a latent cache whose rows are drawn when read, and on pictures that the frozen VAE encodes during the run.
Losses and every weight, moment and average agree to 1e-9 over ten steps, the classifier's included.
"""

import pytest
from small_caches import small_header, write_digit_pictures, write_small_cache
from tiny_runs import TINY_MAE, checkpoint_tensors, metrics
from trainer_processes import run_trainer

from drift_accel import train_mae
from drift_accel.data.cache_format import CacheClass

STEPS = 10
# Two channels a group: with one, the norms of its 1x1 maps amplify rounding without bound.
SETTINGS = (
    *(*TINY_MAE, "--mae.width", "36", "--batch_size", "8", "--precision", "float64", "--optimizer.lr", "1e-3"),
    *("--steps", str(STEPS), "--checkpoint.every", str(STEPS), "--classifier.warmup_steps", "1", "--classifier.steps", "3"),
)
COMPARED = ("loss", "reconstruction", "classification", "accuracy", "gradient_norm", "classifier_weight")


def digits(folder):
    return ()


def cache(folder):
    """Latents [4, 8, 8] of three classes, of which a posterior's mean and deviation are stored, mirrored half of the time."""
    classes = tuple(CacheClass(index=index, id=f"n0{index}", name=f"class {index}", rows=0) for index in range(3))
    header = small_header(image_shape=(4, 8, 8), classes=classes, sampling="moments")
    write_small_cache(folder / "cache", header, labels=[0, 1, 2] * 8)
    return ("--data.source", "cache", "--data.path", str(folder / "cache"), "--data.flip", "--mae.in_channels", "4")


def pictures(folder):
    """Pictures of 64x64 through the bundled VAE, in batches that two processes cut elsewhere than one does."""
    path = write_digit_pictures(folder / "pictures", 30)
    shape = ("--mae.in_channels", "4", "--mae.input_size", "16", "--data.images.image_size", "64")
    vae = ("--data.images.vae", "digits", "--data.images.vae_batch", "3")
    return ("--data.source", "images", "--data.path", str(path), *shape, *vae)


SOURCES = {"digits": digits, "cache": cache, "pictures": pictures}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """By source: the trainer's arguments, and the run of one process in whole batches."""
    runs = {}

    def get(name: str):
        if name not in runs:
            folder = tmp_path_factory.mktemp(name)
            arguments = [*SETTINGS, *SOURCES[name](folder)]
            train_mae.main([*arguments, "--output_dir", str(folder / "whole")])
            runs[name] = arguments, folder / "whole"
        return runs[name]

    return get


def assert_equal_encoders(first, second):
    one, two = metrics(first), metrics(second)
    assert list(one) == list(two) == list(range(1, STEPS + 1)) and one[STEPS]["classifier_weight"] > 0
    for step, record in one.items():
        for tag in COMPARED:
            assert two[step][tag] == pytest.approx(record[tag], rel=1e-9), f"step {step}, {tag}"
    one, two = checkpoint_tensors(first, STEPS), checkpoint_tensors(second, STEPS)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        difference = (tensor - two[name]).norm() / tensor.norm().clamp_min(1e-12)
        assert difference < 1e-9, f"{name}: {difference:.1e}"


def test_micro_batches_equal_whole_batches(whole_run, tmp_path):
    arguments, whole = whole_run("digits")
    train_mae.main([*arguments, "--accumulate", "4", "--output_dir", str(tmp_path / "parts")])
    assert_equal_encoders(whole, tmp_path / "parts")


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "name", ["digits", pytest.param("cache", marks=pytest.mark.slow), pytest.param("pictures", marks=pytest.mark.slow)]
)
def test_two_processes_equal_one(name, whole_run, tmp_path):
    arguments, whole = whole_run(name)
    more = ["--accumulate", "2", "--num_processes", "2", "--output_dir", str(tmp_path / "two")]
    run_trainer("drift_accel.train_mae", [*arguments, *more], tmp_path, num_processes=2)
    assert_equal_encoders(whole, tmp_path / "two")
