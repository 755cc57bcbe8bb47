"""One process, two processes and label slices train the same model: the real trainers over ten steps.

In float64 losses, statistics and every weight agree to 1e-9. The drift is sensitive to rounding (a softmax at temperature 0.02),
so in float32 only what is asserted below can be promised.
"""

import shutil

import pytest
from small_caches import small_header, write_small_cache
from tiny_runs import TINY_MAE, checkpoint_tensors, generator_arguments, launch, metrics, tiny_encoder
from trainer_processes import run_trainer

from drift_accel import train, train_mae
from drift_accel.data.cache_format import CacheClass

FIRST, LAST = 5, 15
TIMING = ("steps_per_second", "samples_per_second", "data_wait_share", "memory_gb")
SLICED = ("--batch.labels_per_slice", "1")  # of the two labels of each of two processes
# The second forward pass of pass 1 and the norms from kept products, or a third pass in their place.
KEPT, NOT_KEPT = ("--statistics_memory_gb", "1"), ("--statistics_memory_gb", "0")


def settings(precision, steps):
    return ("--precision", precision, "--checkpoint.every", "5", "--steps", str(steps))


class Recipe:
    """A tiny recipe and, by precision, a run of five steps of it: its output layer has left its zero start."""

    def __init__(self, folder, encoder, more=(), *, with_launcher):
        self.folder, self.encoder, self.more, self.started = folder, encoder, more, {}
        self.with_launcher = with_launcher  # several processes by accelerate's launcher, or started here, which is quicker

    def arguments(self, run, *more):
        return generator_arguments(self.encoder, run, *self.more, *more)

    def start(self, precision):
        if precision not in self.started:
            run = self.folder / f"start_{precision}"
            train.main(self.arguments(run, *settings(precision, FIRST)))
            self.started[precision] = run
        return self.started[precision]

    def go_on(self, name, precision, *more, num_processes=1):
        """Ten more steps from the start; cached by `name`."""
        run = self.folder / f"{name}_{precision}"
        if not run.exists():
            shutil.copytree(self.start(precision), run)
            arguments = self.arguments(run, *settings(precision, LAST), *more)
            if num_processes == 1:
                train.main(arguments)
            elif not self.with_launcher:
                run_trainer("drift_accel.train", arguments, run.with_suffix(".logs"), num_processes=num_processes)
            else:
                result = launch(num_processes, "drift_accel.train", [*arguments, "--num_processes", str(num_processes)])
                assert result.returncode == 0, result.stderr[-3000:]
        return run


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    return Recipe(folder, tiny_encoder(folder / "mae"), with_launcher=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Latents [4, 8, 8] of three classes, mirrored half of the time."""
    folder = tmp_path_factory.mktemp("cache")
    classes = tuple(CacheClass(index=index, id=f"n0{index}", name=f"class {index}", rows=0) for index in range(3))
    write_small_cache(folder / "cache", small_header(image_shape=(4, 8, 8), classes=classes), labels=[0, 1, 2] * 8)
    data = ("--data.source", "cache", "--data.path", str(folder / "cache"), "--data.flip")
    train_mae.main([*TINY_MAE, "--mae.in_channels", "4", *data, "--output_dir", str(folder / "mae")])
    return Recipe(folder, folder / "mae/exports/ema_0.99", (*data, "--generator.in_channels", "4"), with_launcher=False)


def assert_equal_runs(first, second):
    """float64: every metric and every tensor of the checkpoint, moments and averages too."""
    one, two = metrics(first), metrics(second)
    assert list(one) == list(two) == list(range(1, LAST + 1))
    for step in range(FIRST + 1, LAST + 1):
        assert one[step].keys() == two[step].keys()
        for tag, value in one[step].items():
            if tag not in TIMING:
                assert two[step][tag] == pytest.approx(value, rel=1e-9, abs=1e-15), f"step {step}, {tag}"
    one, two = checkpoint_tensors(first, LAST), checkpoint_tensors(second, LAST)
    assert one.keys() == two.keys() and one["model/final_layer.output.weight"].abs().max() > 0
    for name, tensor in one.items():
        difference = (tensor - two[name]).norm() / tensor.norm().clamp_min(1e-12)
        assert difference < 1e-9, f"{name}: {difference:.1e}"


def assert_close_runs(start, first, second):
    """float32: the loss, and the distance between the runs next to the way they went."""
    one, two = metrics(first), metrics(second)
    for step in range(FIRST + 1, LAST + 1):
        assert two[step]["loss"] == pytest.approx(one[step]["loss"], rel=1e-3), f"step {step}"
    initial, one, two = checkpoint_tensors(start, FIRST), checkpoint_tensors(first, LAST), checkpoint_tensors(second, LAST)
    names = [name for name in one if name.startswith("model/")]
    error = sum((one[name] - two[name]).square().sum() for name in names).sqrt()
    update = sum((one[name] - initial[name]).square().sum() for name in names).sqrt()
    assert error / update < 0.03


@pytest.mark.parametrize(
    ("recipe", "name", "how"),
    [
        ("digits", "kept", KEPT),
        ("cache", "not_kept", NOT_KEPT),
        pytest.param("digits", "not_kept", NOT_KEPT, marks=pytest.mark.slow),
        pytest.param("cache", "kept", KEPT, marks=pytest.mark.slow),
    ],
)
def test_slices_on_one_process_equal_none(recipe, name, how, request):
    recipe = request.getfixturevalue(recipe)
    whole = recipe.go_on("whole", "float64")
    assert_equal_runs(whole, recipe.go_on(name, "float64", "--batch.labels_per_slice", "2", *how))


def test_slices_in_float32(digits):
    whole = digits.go_on("whole", "float32")
    for name, how in (("kept", KEPT), ("not_kept", NOT_KEPT)):
        sliced = digits.go_on(name, "float32", "--batch.labels_per_slice", "3", *how)
        assert_close_runs(digits.start("float32"), whole, sliced)


PROCESSES = [
    pytest.param("digits", "two_kept", (*SLICED, *KEPT), "float64"),
    pytest.param("cache", "two_not_kept", (*SLICED, *NOT_KEPT), "float64"),
    pytest.param("digits", "two_not_kept", (*SLICED, *NOT_KEPT), "float64", marks=pytest.mark.slow),
    pytest.param("cache", "two_kept", (*SLICED, *KEPT), "float64", marks=pytest.mark.slow),
    pytest.param("cache", "two", (), "float64", marks=pytest.mark.slow),
    pytest.param("digits", "two_kept", (*SLICED, *KEPT), "float32", marks=pytest.mark.slow),
    pytest.param("digits", "two_not_kept", (*SLICED, *NOT_KEPT), "float32", marks=pytest.mark.slow),
]


@pytest.mark.multiprocess
@pytest.mark.parametrize(("recipe", "name", "how", "precision"), PROCESSES)
def test_slices_on_two_processes_equal_one_process(recipe, name, how, precision, request):
    recipe = request.getfixturevalue(recipe)
    whole = recipe.go_on("whole", precision)
    both = recipe.go_on(name, precision, *how, num_processes=2)
    if precision == "float64":
        assert_equal_runs(whole, both)
    else:
        assert_close_runs(recipe.start(precision), whole, both)


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), [("fsdp_kept", KEPT), ("fsdp_not_kept", NOT_KEPT)])
def test_slices_of_a_model_that_is_split_over_two_processes_equal_one_process(digits, tmp_path, name, how):
    """FSDP2 gathers weights in the passes without gradient too, and holds gradients back until the last slice."""
    whole, run = digits.go_on("whole", "float64"), digits.folder / f"{name}_float64"
    shutil.copytree(digits.start("float64"), run)
    arguments = digits.arguments(run, *settings("float64", LAST), *SLICED, *how)
    run_trainer("drift_accel.train", arguments, tmp_path, num_processes=2, fsdp=True)
    assert_equal_runs(whole, run)


@pytest.mark.parametrize("slices", [(), ("--batch.labels_per_slice", "2")], ids=["whole", "slices"])
def test_lagged_statistics_after_a_resume_are_bitwise_those_of_a_run_that_never_stopped(digits, tmp_path, slices):
    lagged = ("--statistics", "lagged", *slices, "--checkpoint.every", "3")
    train.main(digits.arguments(tmp_path / "whole", *lagged, "--steps", "6"))
    train.main(digits.arguments(tmp_path / "parts", *lagged, "--steps", "3"))
    train.main(digits.arguments(tmp_path / "parts", *lagged, "--steps", "6"))
    whole, parts = (checkpoint_tensors(tmp_path / name, 6) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert [name for name in whole if name.startswith("data/statistics/")], "the statistics are in the checkpoint"
    different = [name for name in whole if not whole[name].equal(parts[name])]
    assert not different, different[:3]
    one, two = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert [one[step]["loss"] for step in one] == [two[step]["loss"] for step in two]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_lagged_statistics_are_global_ones(digits):
    lagged = ("--statistics", "lagged", "--precision", "float64", "--steps", "6")
    one, two = digits.folder / "lagged_one", digits.folder / "lagged_two"
    train.main(digits.arguments(one, *lagged))
    result = launch(2, "drift_accel.train", digits.arguments(two, *lagged, *SLICED))
    assert result.returncode == 0, result.stderr[-3000:]
    for step, record in metrics(one).items():
        assert metrics(two)[step]["loss"] == pytest.approx(record["loss"], rel=1e-9)
