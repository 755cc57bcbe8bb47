"""A run evaluates its own generator: the tools' numbers, nothing of the training changed, and trouble that shows at once."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stand_in_inception import write_stand_in
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import call_tool, write_encoder
from tiny_runs import checkpoint_tensors, generator_arguments, metrics
from trainer_processes import Trainer, run_trainer

from drift_accel import train
from drift_accel.data import DataConfig, open_source
from drift_accel.evaluation import real_pictures, run_evaluator, training_evaluation
from drift_accel.evaluation.in_training import EvaluationConfig, prepare_evaluation
from drift_accel.evaluation.results import load_result
from drift_accel.foundation.collectives import SharedWorkError
from drift_accel.foundation.command_line import parse_command
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.models.configuration import EncoderConfig, GeneratorConfig
from drift_accel.sampling.pictures import GeneratedPictures
from drift_accel.training.stops import StopWishes

STEPS = ("--steps", "4", "--checkpoint.every", "3")
EVALUATED = ("--evaluation.every", "2", "--evaluation.num_samples", "70", "--evaluation.reference_images", "digits")
EVALUATED += ("--evaluation.metrics", '["frechet","precision_recall"]')
TIMING = ("steps_per_second", "samples_per_second", "data_wait_share", "memory_gb")
NAME = "training_encoder_step_{:08d}_ema_0.99_guidance_1_n70"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An encoder, and two runs of the same training: one that evaluates itself and one that does not."""
    place = tmp_path_factory.mktemp("in_training")
    encoder = write_encoder(place / "mae")
    train.main(generator_arguments(encoder, place / "plain", *STEPS))
    best = ("--checkpoint.keep_best", "evaluation/frechet_encoder", "--checkpoint.keep_last", "1")
    train.main(generator_arguments(encoder, place / "run", *STEPS, *EVALUATED, *best))
    return SimpleNamespace(path=place, encoder=encoder, plain=place / "plain", run=place / "run")


@pytest.fixture
def start(place, tmp_path):
    """Trains in `tmp_path`/run with changes."""

    def run(*changes: str, folder=tmp_path / "run"):
        train.main(generator_arguments(place.encoder, folder, *STEPS, *EVALUATED, *changes))
        return folder

    return run


@pytest.fixture
def evaluations(monkeypatch):
    """The paths that are evaluated."""
    paths, call = [], run_evaluator.RunEvaluator.__call__

    def counted(self, point, num_samples, path, **options):
        paths.append(path.stem)
        return call(self, point, num_samples, path, **options)

    monkeypatch.setattr(run_evaluator.RunEvaluator, "__call__", counted)
    return paths


def evaluation_of(record: dict) -> dict:
    return {name.partition("/")[2]: value for name, value in record.items() if name.startswith("evaluation/")}


def test_not_a_bit_of_the_training_changes(place):
    ours, theirs = checkpoint_tensors(place.run, 4), checkpoint_tensors(place.plain, 4)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    records, plain = metrics(place.run), metrics(place.plain)
    for step, record in plain.items():
        assert {k: v for k, v in records[step].items() if k not in TIMING and not k.startswith("evaluation/")} == {
            k: v for k, v in record.items() if k not in TIMING
        }


def test_numbers_stand_in_records_results_and_tensorboard(place):
    records = metrics(place.run)
    assert [step for step, record in records.items() if evaluation_of(record)] == [2, 4]
    scalars = EventAccumulator(str(place.run / "tensorboard")).Reload().Scalars("evaluation/frechet_encoder")
    for step, event in zip((2, 4), scalars, strict=True):
        result = load_result(place.run / f"evaluation/{NAME.format(step)}.json")
        assert evaluation_of(records[step]) == result["metrics"] and result["model"]["step"] == event.step == step
        assert event.value == pytest.approx(result["metrics"]["frechet_encoder"])
    assert "evaluation" not in records[2], "a mean of distances and shares would be of nothing"
    left = sorted(path.name for path in (place.run / "evaluation").iterdir())
    assert left == [*(f"{NAME.format(step)}.json" for step in (2, 4)), real_pictures.FILE_NAME]


def test_the_numbers_are_those_of_the_tool(place, tmp_path):
    options = ("--protocol", "encoder", "--network", place.encoder, "--reference_images", "digits", "--num_samples", 70, "--cpu")
    options += ("--metrics", "frechet,precision_recall")
    call_tool("evaluate", place.run, *options, "--step", 4, "--ema", "0.99", "--output", tmp_path / "tool.json")
    tool, own = load_result(tmp_path / "tool.json"), load_result(place.run / f"evaluation/{NAME.format(4)}.json")
    assert own["metrics"] == tool["metrics"] and own["protocol"] == tool["protocol"] and own["settings"] == tool["settings"]
    assert own["generated"] == tool["generated"] and own["model"]["weights_sha256"] == tool["model"]["weights_sha256"]


def test_the_best_checkpoint_by_an_evaluation_stays(place):
    values = json.loads((place.run / "checkpoints/values.json").read_text())
    records = metrics(place.run)
    wanted = {str(step): records[seen]["evaluation/frechet_encoder"] for step, seen in ((3, 2), (4, 4))}
    assert values == {"metric": "evaluation/frechet_encoder", "values": wanted}


@pytest.mark.slow
def test_a_run_that_goes_on_takes_what_is_there(start, evaluations):
    longer = ("--steps", "6", "--evaluation.sanity_samples", "0")
    run = start(*longer)
    assert evaluations == [NAME.format(step) for step in (2, 4, 6)]
    before = metrics(run)
    shutil.rmtree(run / "checkpoints/step_00000006")
    (run / f"evaluation/{NAME.format(6)}.json").write_text("cut")
    evaluations.clear()
    start(*longer)
    assert evaluations == [NAME.format(6)], "that of step 4 was there, that of step 6 was damaged"
    assert evaluation_of(metrics(run)[4]) == evaluation_of(before[4]) and evaluation_of(metrics(run)[6]) == evaluation_of(
        before[6]
    )
    shutil.rmtree(run / "checkpoints/step_00000006")
    evaluations.clear()
    start(*longer, "--evaluation.metrics", '["frechet"]', "--evaluation.seed", "1")
    assert evaluations == [f"{NAME.format(step)}_seed_1" for step in (4, 6)], "how it is evaluated may change"


@pytest.mark.slow
def test_the_first_step_tries_the_whole_way(start, evaluations, capsys, tmp_path):
    run = start("--evaluation.every", "6", "--steps", "2", "--evaluation.sanity_samples", "20", "--log.every", "2")
    assert evaluations == ["training_sanity", NAME.format(2)]
    assert "the evaluation works: frechet_encoder" in capsys.readouterr().out
    assert not (run / "evaluation/training_sanity.json").exists() and evaluation_of(metrics(run)[1]) == {}


def broken(monkeypatch, when) -> None:
    """Pictures whose computation fails where `when(items)` says so."""
    batch = GeneratedPictures.batch

    def failing(self, items):
        if when(items):
            raise ValueError("the pictures are gone")
        return batch(self, items)

    monkeypatch.setattr(GeneratedPictures, "batch", failing)


@pytest.mark.parametrize("every", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_an_evaluation_that_does_not_work_ends_the_run_at_the_first_step(start, monkeypatch, tmp_path, every):
    broken(monkeypatch, lambda items: True)
    with pytest.raises(
        SharedWorkError, match=r"the try after step 1 shows: ValueError: the pictures are gone.*evaluation.every null"
    ):
        start("--evaluation.every", every)
    assert "stopped by SharedWorkError: the evaluation does not work" in (tmp_path / "run/RUN.md").read_text()


@pytest.mark.slow
def test_one_that_fails_later_is_told_and_training_goes_on(start, place, monkeypatch, capsys):
    broken(monkeypatch, lambda items: items.start == 64)  # beyond the samples of the first step
    run = start()
    assert capsys.readouterr().out.count("gave no numbers: ValueError: the pictures are gone") == 2
    ours, theirs = checkpoint_tensors(run, 4), checkpoint_tensors(place.plain, 4)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs), "the generator has its own weights back"
    monkeypatch.undo()
    shutil.rmtree(run / "checkpoints/step_00000004")
    start()
    assert evaluation_of(metrics(run)[4]), "what the failed one left does not stand in the way"
    assert not list((run / "evaluation").glob("*.in_progress"))


def test_a_wish_to_stop_ends_an_evaluation(start, monkeypatch, capsys):
    batch = GeneratedPictures.batch

    def asked(self, items):
        wishes[0]._code = 1
        return batch(self, items)

    wishes = []
    enter = StopWishes.__enter__
    monkeypatch.setattr(StopWishes, "__enter__", lambda self: wishes.append(enter(self)) or wishes[-1])
    monkeypatch.setattr(GeneratedPictures, "batch", asked)
    with pytest.raises(SystemExit) as stop:
        start("--steps", "6", "--evaluation.sanity_samples", "0", "--evaluation.metrics", '["frechet"]')
    assert stop.value.code == 75
    assert (
        "the evaluation after step 2 gave no numbers: StopRequested: the run was asked to stop (SIGTERM)"
        in capsys.readouterr().out
    )


def test_latents_are_evaluated_as_pixels_through_their_vae(tmp_path, monkeypatch):
    """An Inception's protocol on the recipe of the coloured digits, with a network of random weights in the file's place."""
    write_stand_in(tmp_path / "networks")
    np.savez(tmp_path / "published.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    sizes = {
        "input_size": 16,
        "in_channels": 4,
        "patch_size": 4,
        "hidden_size": 16,
        "depth": 1,
        "num_heads": 2,
        "num_classes": 10,
    }
    generator = GeneratorConfig(**sizes).resolved()
    description = {"kind": "latents", "classes": [], "scale": None, "shift": None, "vae": None}
    data = DataConfig(source="cache", path=str(tmp_path / "cache"))
    options = {"generator": generator, "encoder": EncoderConfig(path="nowhere"), "loaded_encoder": None, "data": data}
    options |= {"description": description, "vae": "digits"}

    def prepare(**changes):
        values = {"protocol": "release", "network": str(tmp_path / "networks"), "reference": str(tmp_path / "published.npz")}
        config = EvaluationConfig(every=1, **{**values, "run_torchscript": True, **changes})
        return prepare_evaluation(config, RunFolder(tmp_path / "run"), **options)

    prepared = prepare()
    assert prepared.decoder.name == "digits" and prepared.real is None
    assert not (tmp_path / "run").exists()
    refused = {
        "evaluation.run_torchscript": {"run_torchscript": False},
        "inception-2015-12-05.pt": {"network": str(tmp_path / "nowhere")},
        "evaluation.reference is missing: protocol 'release' looks at pixels": {"reference": None},
        "none.npz does not exist": {"reference": str(tmp_path / "none.npz")},
        "precision_recall needs real features: give evaluation.reference_images": {"metrics": ("precision_recall",)},
        "5 pictures are too few: inception_score needs at least 10": {"sanity_samples": 5},
    }
    for message, changes in refused.items():
        with pytest.raises((ValueError, OSError)) as error:
            prepare(**changes)
        assert message in str(error.value) and "evaluation" in str(error.value)


@pytest.fixture(scope="module")
def opening(place):
    """Opens the evaluation of a run with changes of its configuration."""
    arguments = generator_arguments(place.encoder, place.path / "none", *EVALUATED, "--dry_run")
    config = parse_command(train.GeneratorTrainingConfig, "", arguments).config
    source = open_source(config.data)
    specs = train.load_encoders(config, source)

    def open_evaluation(folder, **changes):
        changed = replace(config, evaluation=replace(config.evaluation, **changes))
        return train.open_evaluation(changed, RunFolder(folder), specs, source, "cpu")

    return open_evaluation


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "none.npz"}, "none.npz does not exist: make it with tools/reference_stats.py"),
        ({"reference_images": "nowhere"}, "nowhere does not exist"),
        ({"protocol": "clean"}, "is missing: protocol 'clean' needs the file inception-2015-12-05.pt"),
        ({"protocol": "timm"}, "evaluation.network: the folder of its timm model"),
        ({"metrics": ("inception_score",)}, "inception_score needs logits"),
        ({"sanity_samples": 2}, "2 pictures are too few: precision_recall"),
    ],
)
def test_what_is_missing_is_refused_before_the_first_step(opening, tmp_path, changes, message, monkeypatch):
    monkeypatch.setenv("DRIFT_ACCEL_NETWORKS", str(tmp_path / "networks"))
    with pytest.raises((ValueError, OSError)) as refusal:
        opening(tmp_path / "run", **changes)
    assert message in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_a_published_file_that_was_cut_is_refused(opening, tmp_path):
    np.savez(tmp_path / "published.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "published.npz").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"evaluation: .*cut\.npz holds no reference statistics"):
        opening(tmp_path / "run", reference=str(tmp_path / "cut.npz"))


def test_a_refusal_ends_the_command_in_one_line(start, tmp_path):
    with pytest.raises(SystemExit, match=r"^error: evaluation.layer is 'layer9': the encoder in"):
        start("--evaluation.layer", "layer9")
    assert not (tmp_path / "run").exists()


def test_an_encoder_of_other_images_is_refused(opening, tmp_path):
    write_encoder(tmp_path / "colours", channels=3)
    with pytest.raises(ValueError, match=r"evaluation.network .*takes images of 3 channels and side 8, the generator makes 1"):
        opening(tmp_path / "run", network=str(tmp_path / "colours"))


@pytest.mark.slow
def test_the_runs_own_data_are_the_reference_where_none_is_named(start):
    run = start("--evaluation.reference_images", "null", "--evaluation.num_reference_images", "100", "--steps", "2")
    reference = load_result(run / f"evaluation/{NAME.format(2)}.json")["reference"]
    assert reference["features_from"]["source"] == "digits, train" and reference["num_images"] == 100


# Several processes.


def lose_the_second_ones_pictures(rank: int) -> None:
    def failing(self, items):
        raise ValueError("the pictures are gone")

    if rank == 1:  # a process of its own, which ends with the run
        GeneratedPictures.batch = failing


def lose_the_second_ones_memory(rank: int) -> None:
    def failing(model):
        raise RuntimeError("out of memory")

    if rank == 1:
        training_evaluation.weights_hash = failing


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("fsdp", [False, True], ids=["data parallel", "split"])
def test_two_processes_share_the_work_and_find_the_same(place, tmp_path, fsdp):
    exact = ("--precision", "float64", "--evaluation.every", "4")
    runs = {}
    for count in (1, 2):
        arguments = generator_arguments(place.encoder, tmp_path / str(count), *STEPS, *EVALUATED, *exact)
        trainer = run_trainer(
            "drift_accel.train", arguments, tmp_path / f"logs_{count}", num_processes=count, fsdp=fsdp and count > 1
        )
        assert trainer.text().count("the evaluation works") == trainer.text().count("evaluation after step 4: ") == 1
        runs[count] = evaluation_of(metrics(tmp_path / str(count))[4])
    assert runs[2] == pytest.approx(runs[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("tamper", "fault"),
    [
        (lose_the_second_ones_pictures, "ValueError: the pictures are gone"),
        (lose_the_second_ones_memory, "RuntimeError: out of memory"),
    ],
)
def test_a_fault_of_one_process_reaches_all(place, tmp_path, tamper, fault):
    arguments = generator_arguments(place.encoder, tmp_path / "run", *STEPS, *EVALUATED)
    trainer = Trainer("drift_accel.train", arguments, tmp_path / "logs", num_processes=2, tamper=tamper)
    assert trainer.wait(120) == [1, 1]
    for rank in range(2):
        assert f"the try after step 1 shows: process 1, {fault}" in trainer.text(rank)
