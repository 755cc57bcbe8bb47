"""Model FLOP utilisation: operations against torch's counter on real steps, time that is no training, unknown devices."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_models import write_encoder
from tiny_runs import ROOT
from torch.utils.flop_counter import FlopCounterMode

from drift_accel import train, train_mae
from drift_accel.data import make_sampler, open_source
from drift_accel.foundation.command_line import parse_command
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.models import MaskedAutoencoder
from drift_accel.training.launch import start_accelerator
from drift_accel.training.measurement import count_operations
from drift_accel.training.telemetry import LogConfig, Telemetry
from drift_accel.training.utilisation import encoder_step_flops, generator_step_flops, seconds_at_peak


def configured(command, recipe: str, *changes: str):
    root = {train: train.GeneratorTrainingConfig, train_mae: train_mae.MaeTrainingConfig}[command]
    arguments = ["--config", str(ROOT / f"train_configs/{recipe}.yaml"), "--dry_run", "--device", "cpu", *changes]
    return parse_command(root, "", arguments).config


def test_a_generators_operations_are_those_of_its_real_step(tmp_path):
    sizes = ("--batch.labels", "2", "--batch.generated", "3", "--batch.positives", "4", "--batch.negatives", "2")
    sizes += ("--generator.depth", "2", "--generator.hidden_size", "32", "--generator.num_heads", "2")
    config = configured(
        train, "digits", "--encoder.path", str(write_encoder(tmp_path / "mae")), *sizes, "--features.maps", '["conv1"]'
    )
    source = open_source(config.data)
    specs = train.load_encoders(config, source)
    before = {name: tensor.clone() for name, tensor in specs[0].encoder.state_dict().items()}
    flops = generator_step_flops(config, specs)
    assert generator_step_flops(replace(config, gradient_checkpointing=True, precision="float64"), specs) == flops
    assert all(torch.equal(tensor, before[name]) for name, tensor in specs[0].encoder.state_dict().items())
    sampler = make_sampler(config.data, source, 0, positives=4, negatives=2)
    task = train.make_task(config, start_accelerator(config), specs, sampler)
    counted = count_operations(task, task.transfer(task.draw(0)))
    networks = counted["generator"] + counted["encoder"] + counted["backward"]
    assert flops == pytest.approx(networks, rel=0.02)


def test_an_encoders_operations_are_those_of_its_real_step():
    config = configured(train_mae, "mae_digits", "--mae.width", "8", "--mae.blocks", "[1,1,1,1]", "--batch_size", "6")
    model = MaskedAutoencoder(**config.mae.arguments())
    with FlopCounterMode(display=False) as counter:
        losses = model(torch.randn(6, 1, 8, 8), torch.zeros(6, dtype=torch.int64), torch.ones(6, 1, 8, 8), 0.1)
        losses.loss.mean().backward()
    assert encoder_step_flops(config) == pytest.approx(counter.get_total_flops(), rel=0.02)


def accelerator_of(num_processes: int, is_main: bool = True) -> SimpleNamespace:
    said = []
    return SimpleNamespace(
        device=torch.device("cpu"), num_processes=num_processes, is_main_process=is_main, print=said.append, said=said
    )


def test_the_peak_is_that_of_all_devices_and_may_be_unknown():
    config = configured(train_mae, "mae_digits")
    known = replace(config, log=LogConfig(peak_tflops=2.0))
    assert seconds_at_peak(config, accelerator_of(1), lambda: 1e12) is None, "nobody knows a processor's"
    assert seconds_at_peak(known, accelerator_of(1), lambda: 1e12) == 0.5
    assert seconds_at_peak(known, accelerator_of(4), lambda: 1e12) == 0.125
    assert seconds_at_peak(known, accelerator_of(4, is_main=False), lambda: 1e12) is None


def test_what_cannot_be_counted_ends_no_run():
    accelerator = accelerator_of(1)

    def count() -> float:
        raise RuntimeError("no contents\nmore")

    assert seconds_at_peak(configured(train_mae, "mae_digits", "--log.peak_tflops", "1"), accelerator, count) is None
    assert accelerator.said == ["model_flop_utilisation is left out: RuntimeError: no contents"]


def test_time_beside_training_does_not_lower_it(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    telemetry = Telemetry(RunFolder(tmp_path), 0, enabled=False, seconds_at_peak=0.5)
    for seconds_beside in (0.0, 30.0, 0.0):
        with telemetry.beside():
            clock[0] += seconds_beside
        clock[0] += 10.0
        step = telemetry._last_step + 4
        record = telemetry.record(step, {}, num_samples=1, waited=0.0)
        assert record["model_flop_utilisation"] == pytest.approx(4 * 0.5 / 10)
        assert record["steps_per_second"] == pytest.approx(4 / (10 + seconds_beside))
    telemetry.close()
