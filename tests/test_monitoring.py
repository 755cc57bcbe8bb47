"""What a run reports beside the drift's own numbers: every tag is documented, alarms fire where they are caused alone."""

import importlib.util
import json
import math
import re
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from accelerate import tracking
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import ROOT, TINY_MAE, generator_arguments, metrics, tiny_encoder

from drift_accel.drift import DriftProblems
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.train import main as train_generator
from drift_accel.train_mae import main as train_encoder
from drift_accel.training import generator_task, loop, monitoring
from drift_accel.training.alarms import ALARMS, AlarmWatch, loss_bound
from drift_accel.training.metric_tags import TAGS, dashboard, find_tag, markdown
from drift_accel.training.optimizer import OptimizerConfig, make_optimizer, update_weights
from drift_accel.training.telemetry import LogConfig, Telemetry


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A generator's run of 20 steps and its encoder's."""
    folder = tmp_path_factory.mktemp("runs")
    encoder = tiny_encoder(folder / "mae")
    more = ("--steps", "20", "--optimizer.warmup_steps", "5", "--nonfinite", "skip:1", "--optimizer.lr", "1e-3")
    more += ("--evaluation.every", "10", "--evaluation.num_samples", "40", "--evaluation.metrics", '["frechet"]')
    train_generator(generator_arguments(encoder, folder / "generator", *more, "--log.peak_tflops", "0.1"))
    return folder


def tags_of(run) -> dict[str, set[str]]:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0}).Reload().Tags()
    texts = {tag.removesuffix("/text_summary") for tag in events["tensors"] if tag.endswith("/text_summary")}
    return {
        "scalar": set(events["scalars"]),
        "histogram": set(events["histograms"]),
        "image": set(events["images"]),
        "text": texts,
    }


def test_every_tag_of_a_run_is_documented_and_every_documented_one_is_there(runs):
    found = {"generator": tags_of(runs / "generator"), "encoder": tags_of(runs / "mae")}
    unknown = [tag for tags in found.values() for kind, names in tags.items() for tag in names if find_tag(tag, kind) is None]
    assert unknown == [], "add them to drift_accel/training/metric_tags.py"
    for tag in TAGS:
        for trainer in found if tag.of == "both" else (tag.of,):
            if tag.when and trainer == "encoder":
                continue
            names = found[trainer][tag.kind]
            assert any(re.fullmatch(tag.pattern, name) for name in names), f"{tag.title} is documented but no {trainer} writes it"
            if tag.per_key or tag.kinds:
                assert any("/" in name and re.fullmatch(tag.pattern, name) for name in names), f"{tag.title} has no keys"


def test_the_document_is_the_one_that_the_code_makes():
    assert (ROOT / "docs/metrics.md").read_text() == markdown(), "python -m drift_accel.training.metric_tags > docs/metrics.md"


def test_tags_are_told_apart_and_explained():
    names = [tag.name for tag in TAGS]
    assert len(set(names)) == len(names)
    assert all(tag.meaning and tag.healthy for tag in TAGS)
    assert find_tag("drift_sqnorm_0.02/layer1_mean_2").name == "drift_sqnorm"
    assert find_tag("drift_sqnorm_1e-05").name == "drift_sqnorm"
    assert find_tag("evaluation/fid").name == "evaluation" and find_tag("evaluation") is None
    assert find_tag("loss/layer1") is None and find_tag("lossy") is None and find_tag("guidance") is None


def test_the_layout_shows_the_numbers_of_an_evaluation():
    pattern = dashboard("generator")["1 Progress"]["evaluation"][1][0]
    assert re.search(pattern, "evaluation/frechet_encoder") and not re.search(pattern, "evaluations")


def test_the_layout_shows_progress_first():
    for trainer in ("generator", "encoder"):
        groups = dashboard(trainer)
        assert [name.split()[1] for name in groups] == ["Progress", "Health", "Optimiser", "Speed"]
    progress = dashboard("generator")["1 Progress"]
    assert list(progress)[0] == "drift_sqnorm" and progress["drift_sqnorm"][0] == "Multiline"
    assert re.search(progress["drift_sqnorm"][1][0], "drift_sqnorm_0.05")
    assert not re.search(progress["drift_sqnorm"][1][0], "drift_sqnorm_0.05/conv1")


def test_a_run_has_the_layout_and_says_what_it_watches_for(runs):
    events = EventAccumulator(str(runs / "generator/tensorboard")).Reload()
    assert any("custom_scalars" in tag for tag in events.Tags()["tensors"])
    text = events.Tensors("alarms/text_summary")[0].tensor_proto.string_val[0].decode()
    assert all(name in text for name in ALARMS)


def test_numbers_of_a_run_are_plausible(runs):
    records = metrics(runs / "generator")
    first, last = records[1], records[20]
    assert first["diversity_ratio"] < 1e-3, "an untrained generator's output is constant"
    assert last["diversity_ratio"] > first["diversity_ratio"] and last["diversity_real"] > 0
    assert 0 < last["update_norm"] < last["weight_norm"] and last["memory_gb"] > 0.01
    keys = {name.partition("/")[2] for name in last if name.startswith("diversity_ratio/")}
    assert "global" in keys and "conv1_mean" in keys and "conv1" not in keys


# The numbers themselves.


def test_diversity_is_the_deviation_within_a_class():
    random = torch.Generator().manual_seed(0)
    classes = 10 * torch.randn(3, 1, 7, generator=random)
    real = classes + 2 * torch.randn(3, 50, 7, generator=random)
    generated = classes + torch.randn(3, 40, 7, generator=random)
    numbers = monitoring.class_diversity({"mean": DriftProblems(generated, real)}, num_labels=3)
    own, others = ([math.sqrt(((m - m.mean(0)) ** 2).sum().item() / (len(m) - 1)) for m in each] for each in (generated, real))
    assert numbers["diversity_generated/mean"].item() == pytest.approx(sum(own) / 3, rel=1e-5)
    ratio = sum(a / b for a, b in zip(own, others, strict=True)) / 3
    assert numbers["diversity_ratio/mean"].item() == pytest.approx(ratio, rel=1e-5) == pytest.approx(0.5, rel=0.1)
    assert monitoring.class_diversity({"map": DriftProblems(generated, real)}, num_labels=1) == {}, "three locations of a label"
    assert monitoring.class_diversity({"one": DriftProblems(generated[:, :1], real)}, num_labels=3) == {}


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_update_is_what_the_weights_moved_by(decay):
    model = torch.nn.Linear(5, 3)
    config = OptimizerConfig(lr=0.05, warmup_steps=4, weight_decay=decay)
    optimizer = make_optimizer(model, config)
    for step in range(4):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        loss = model(torch.ones(2, 5) * (step + 1)).square().mean()
        loss.backward()
        _, flag = update_weights(optimizer, model.parameters(), config, step, loss)
        numbers = monitoring.step_norms(optimizer, config.warmup_from + (config.lr - config.warmup_from) * step / 4, flag)
        moved = math.sqrt(sum((a - b).square().sum().item() for a, b in zip(before, model.parameters(), strict=True)))
        assert numbers["update_norm"].item() == pytest.approx(moved, rel=1e-2, abs=1e-6)
        assert numbers["weight_norm"].item() == pytest.approx(math.sqrt(sum(p.square().sum().item() for p in model.parameters())))


def test_a_step_that_did_not_happen_moved_nothing():
    model = torch.nn.Linear(2, 2)
    optimizer = make_optimizer(model, OptimizerConfig())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert monitoring.step_norms(optimizer, 1e-3, torch.ones(()))["update_norm"].item() == 0
    assert monitoring.step_norms(optimizer, 1e-3, torch.zeros(()))["update_norm"].item() > 0


# Alarms.


def fired(records, **options) -> list[str]:
    watch = AlarmWatch(**options)
    return [alarm.name for step, record in enumerate(records, start=1) for alarm in watch.check({"step": step, **record})]


def test_alarms_need_records_in_a_row_are_said_once_and_may_come_back():
    bad, good = {"data_wait_share": 0.8}, {"data_wait_share": 0.0}
    assert fired([good, bad, bad, good, bad, bad]) == []
    assert fired([good, bad, bad, bad, bad, bad]) == ["data_starvation"]
    assert fired([good, bad, bad, bad, good, bad, bad, bad]) == ["data_starvation"] * 2
    assert fired([bad, bad, bad]) == [], "the first record holds the start"


def test_diversity_may_be_missing_until_the_warm_up_is_over():
    flat, wide = {"diversity_ratio": 0.01}, {"diversity_ratio": 0.8}
    assert fired([flat] * 10, warmup_steps=10) == []
    assert fired([flat] * 13, warmup_steps=10) == ["diversity_collapse"]
    assert fired([flat, wide, flat, flat, flat], warmup_steps=100) == ["diversity_collapse"]


def test_a_number_that_is_missing_or_not_finite_is_no_other_alarm():
    assert fired([{}, {"diversity_ratio": None, "data_wait_share": float("nan")}] * 4) == []
    assert fired([{"key_loss/conv1": None}], max_key_loss=9) == ["loss_range"]


def test_the_bound_of_a_keys_loss():
    options = {"reduction": "mean", "statistics": "global"}
    assert loss_bound(3, field="summed", **options) == pytest.approx(9, rel=0.05)
    assert loss_bound(3, field="per_temperature", **options) == pytest.approx(3, rel=0.05)
    assert loss_bound(3, field="summed", reduction="paper", statistics="global") is None
    assert loss_bound(3, field="summed", reduction="mean", statistics="lagged") is None


def alarms_of(run, steps: str, *changes, encoder) -> dict[str, str]:
    """Trains and returns the alarms that TensorBoard shows."""
    train_generator(generator_arguments(encoder, run, "--steps", steps, *changes))
    texts = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0}).Reload().Tensors("alarms/text_summary")
    lines = [text.tensor_proto.string_val[0].decode() for text in texts]
    return {line.split()[1]: line for line in lines if line.startswith("ALARM ")}


@pytest.fixture
def encoder(runs):
    return runs / "mae/exports/ema_0.99"


def test_samples_that_collapse_are_told(tmp_path, encoder, capfd):
    """A learning rate of almost nothing leaves every sample of a class what it was: the same."""
    changes = ("--optimizer.warmup_steps", "0", "--optimizer.lr", "1e-9")
    alarms = alarms_of(tmp_path / "run", "5", *changes, encoder=encoder)
    assert "diversity_collapse" in alarms and "at step 3" in alarms["diversity_collapse"]
    assert "ALARM diversity_collapse" in capfd.readouterr().err


def test_a_floor_that_hides_everything_is_told(tmp_path, encoder):
    alarms = alarms_of(
        tmp_path / "run", "4", "--drift.temperatures", "[0.0001,0.0002]", "--drift.affinity_floor", "0.2", encoder=encoder
    )
    assert "at temperature 0.0002" in alarms["floor"]


def test_a_loss_that_cannot_be_is_told(tmp_path, encoder, monkeypatch):
    """Statistics of another batch: the fields are not normalised by their own length."""
    true = generator_task.step_loss

    def broken(*arguments, **options):
        result = true(*arguments, **options)
        metrics = {name: 4 * value if name == "key_loss/conv1" else value for name, value in result.metrics.items()}
        return SimpleNamespace(loss=result.loss, metrics=metrics, statistics=result.statistics)

    monkeypatch.setattr(generator_task, "step_loss", broken)
    alarms = alarms_of(tmp_path / "run", "2", encoder=encoder)
    assert "key conv1 has a loss of" in alarms["loss_range"]


def test_a_device_that_waits_for_data_is_told(tmp_path, encoder, monkeypatch):
    monkeypatch.setattr(loop.Prefetch, "read_waited", lambda self: 1e6)
    assert "waiting for data" in alarms_of(tmp_path / "run", "5", encoder=encoder)["data_starvation"]


@pytest.mark.slow
def test_a_healthy_run_on_the_digits_has_no_alarm(tmp_path, capfd):
    recipes = ROOT / "train_configs"
    train_encoder(
        ["--config", str(recipes / "mae_digits.yaml"), "--steps", "400", "--output_dir", str(tmp_path / "mae"), "--device", "cpu"]
    )
    arguments = ["--config", str(recipes / "digits.yaml"), "--encoder.path", str(tmp_path / "mae/exports/ema_0.99")]
    train_generator([*arguments, "--steps", "200", "--output_dir", str(tmp_path / "run"), "--device", "cpu"])
    assert "ALARM" not in capfd.readouterr().err
    last = metrics(tmp_path / "run")[200]
    assert last["diversity_ratio"] > 0.5


def test_a_short_healthy_run_has_no_alarm_of_its_numbers(runs):
    watch = AlarmWatch(max_key_loss=9.18, warmup_steps=5)
    for record in metrics(runs / "generator").values():
        assert [alarm for alarm in watch.check({**record, "data_wait_share": 0.0}) if alarm.name != "diversity_collapse"] == []


# Weights & Biases, through accelerate, in front of a stand-in.

STAND_IN = """
    import json, os
    __version__ = "0.99"
    calls = []
    class config:
        @staticmethod
        def update(values, **_): calls.append(("config", dict(values)))
    class _Run:
        name = "stand-in"
        def log(self, values, step=None, **_): calls.append(("log", step, dict(values)))
        def finish(self): calls.append(("finish",))
    def init(**settings):
        calls.append(("init", settings))
        return _Run()
"""


def test_records_go_to_wandb_on_request(tmp_path, encoder, monkeypatch):
    package = tmp_path / "packages/wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(textwrap.dedent(STAND_IN))
    (package.parent / "wandb-0.99.dist-info").mkdir()
    (package.parent / "wandb-0.99.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: wandb\nVersion: 0.99\n")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)  # the real one, where it is installed
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.WANDB])  # accelerate looks once, when it is imported
    for steps in ("3", "5"):
        train_generator(generator_arguments(encoder, tmp_path / "run", "--steps", steps, "--log.trackers", '["wandb"]'))
    calls = sys.modules["wandb"].calls
    monkeypatch.delitem(sys.modules, "wandb")
    starts = [call[1] for call in calls if call[0] == "init"]
    assert len(starts) == 2 and starts[0]["id"] == starts[1]["id"] and starts[0]["resume"] == "allow"
    logged = [call for call in calls if call[0] == "log"]
    assert [step for _, step, _ in logged] == [1, 2, 3, 4, 5], "no step twice"
    assert {"loss", "diversity_ratio", "memory_gb"} <= logged[0][2].keys()
    assert next(call[1] for call in calls if call[0] == "config")["steps"] == 3


def test_trackers_that_are_not_there_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="choose of wandb"):
        LogConfig(trackers=("mlflow",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # whatever this machine has
    with pytest.raises(ValueError, match="pip install wandb"):
        LogConfig(trackers=("wandb",))


def test_alarms_are_written_where_records_are(tmp_path):
    said = []
    run = RunFolder(tmp_path)
    telemetry = Telemetry(run, 0, enabled=True, watch=AlarmWatch(), log=said.append)
    for step in range(1, 6):
        telemetry.record(step, {"loss": 1.0}, 1, waited=1e6)
    telemetry.close()
    assert len(said) == 1 and said[0].startswith("ALARM data_starvation at step 4")
    assert len(json.loads(run.metrics_path.read_text().splitlines()[0])) >= 4
    assert TINY_MAE
