"""Three optimiser steps of the official generator training, reproduced through drift_step and the trainer's own update code.

The small encoder has as many groups as channels in its first stage, so layer1_mean and layer1_std are constant up to
rounding: the record itself only holds noise there, and they are left out where single keys are compared.
"""

import json

import msgpack
import numpy as np
import pytest
import torch
from golden_files import GOLDENS, unpack_artifact

from drift_accel.drift import DriftConfig, GuidanceConfig, draw_guidance
from drift_accel.models import load_official
from drift_accel.training import DriftBatch, drift_step
from drift_accel.training.averages import WeightAverages
from drift_accel.training.optimizer import OptimizerConfig, learning_rate, make_optimizer, update_weights

NOISE_KEYS = ("layer1_mean", "layer1_std")
DRIFT = DriftConfig(temperatures=(0.2, 0.05, 0.02))
OPTIMIZER = OptimizerConfig(lr=4e-4, warmup_steps=5, warmup_from=1e-6, weight_decay=0.01, clip_norm=2.0)
GUIDANCE = GuidanceConfig(minimum=1.0, maximum=4.0, power=3.0, no_guidance_fraction=0.3)
NUM_STEPS = 3


@pytest.fixture(scope="module")
def record():
    with np.load(GOLDENS / "train_step.npz") as archive:
        return {name: archive[name] for name in archive.files}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifacts")
    generator = load_official(unpack_artifact("train_step_generator", folder))
    encoder = load_official(unpack_artifact("mae", folder)).requires_grad_(False)
    return generator, encoder


def batch_of(record: dict, step: int) -> DriftBatch:
    """The recorded draws of one step; images are recorded channels last."""
    uniforms = record["uniforms"][step].astype(np.float64)
    guidance = draw_guidance(GUIDANCE, uniforms[0], uniforms[1])
    return DriftBatch(
        labels=torch.from_numpy(record["labels"][step]).long(),
        guidance_scale=torch.from_numpy(guidance).float(),
        positives=torch.from_numpy(record["positives_bnhwc"][step]).permute(0, 1, 4, 2, 3),
        negatives=torch.from_numpy(record["negatives_bnhwc"][step]).permute(0, 1, 4, 2, 3),
        noise=torch.from_numpy(record["noise"][step]).permute(0, 3, 1, 2),
        style_indices=torch.from_numpy(record["style_index"][step]).long(),
    )


@pytest.fixture(scope="module")
def replayed(record, models):
    """Run the three steps; returns per-step numbers, the initial, final and averaged weights."""
    generator, encoder = models
    initial = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    generator.train()
    optimizer = make_optimizer(generator, OPTIMIZER)
    averages = WeightAverages(generator, (0.999,))
    steps = []
    for step in range(NUM_STEPS):
        batch = batch_of(record, step)
        result = drift_step(generator, encoder, batch, DRIFT)
        result.loss.backward()
        gradient_norm, non_finite = update_weights(optimizer, generator.parameters(), OPTIMIZER, step, result.loss)
        averages.update(generator)
        assert non_finite.item() == 0
        steps.append((batch, result, gradient_norm))
    return steps, initial, dict(generator.state_dict()), averages.averages[0.999]


def relative(got, wanted) -> float:
    got, wanted = np.asarray(got, dtype=np.float64), np.asarray(wanted, dtype=np.float64)
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("step", range(NUM_STEPS))
def test_guidance_rate_gradient_norm_and_loss(record, replayed, step):
    batch, result, gradient_norm = replayed[0][step]
    assert relative(batch.guidance_scale, record[f"step{step}/cfg_scale"]) < 1e-6
    assert relative(learning_rate(OPTIMIZER, step), record[f"step{step}/lr"]) < 1e-4
    assert relative(gradient_norm, record[f"step{step}/g_norm"]) < 5e-4
    assert relative(result.loss.detach(), record[f"step{step}/loss"]) < 1e-2


@pytest.mark.parametrize("step", range(NUM_STEPS))
def test_statistics_of_every_key(record, replayed, step):
    _, result, _ = replayed[0][step]
    recorded = {name.split("/", 2)[2] for name in record if name.startswith(f"step{step}/scale/")}
    assert set(result.statistics) == recorded
    worst = {"scale": 0.0, "drift_sqnorm": 0.0}
    for key in sorted(recorded - set(NOISE_KEYS)):
        statistics = result.statistics[key]
        worst["scale"] = max(worst["scale"], relative(statistics.scale, record[f"step{step}/scale/{key}"]))
        for temperature, value in statistics.drift_sqnorm.items():
            error = relative(value, record[f"step{step}/loss_{temperature:g}/{key}"])
            worst["drift_sqnorm"] = max(worst["drift_sqnorm"], error)
            assert torch.equal(result.metrics[f"drift_sqnorm_{temperature:g}/{key}"], value)
    assert worst["scale"] < 2e-3 and worst["drift_sqnorm"] < 3e-2, worst


def test_key_losses_of_the_first_step(record, replayed):
    _, result, _ = replayed[0][0]
    keys = sorted(set(result.statistics) - set(NOISE_KEYS))
    got = sum(result.metrics[f"key_loss/{key}"].item() for key in keys)
    wanted = sum(float(record[f"step0/key_loss/{key}"]) for key in keys)
    assert abs(got - wanted) < 1e-4 * wanted


@pytest.mark.parametrize(("prefix", "limit"), [("final_params/", 1e-2), ("final_ema/", 1e-1)])
def test_final_weights_relative_to_the_update(record, replayed, tmp_path, prefix, limit):
    _, initial, final, averaged = replayed
    got = final if prefix == "final_params/" else averaged
    recorded = load_official(write_artifact(record, prefix, tmp_path)).state_dict()
    assert set(got) == set(recorded)
    error = torch.sqrt(sum((got[name] - recorded[name]).double().square().sum() for name in recorded))
    update = torch.sqrt(sum((recorded[name] - initial[name]).double().square().sum() for name in recorded))
    assert update > 0
    assert error / update < limit, f"error over update {error / update:.2e}, limit {limit:.0e}"


def write_artifact(record: dict, prefix: str, folder) -> object:
    """Recorded weights as an artifact folder of the release, so that its public reader maps the names."""
    tree: dict = {}
    for name, value in record.items():
        if name.startswith(prefix):
            *parents, leaf = name.removeprefix(prefix).split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            packed = msgpack.packb((value.shape, value.dtype.name, value.tobytes()), use_bin_type=True)
            node[leaf] = msgpack.ExtType(1, packed)
    metadata = json.loads((GOLDENS / "train_step_generator" / "metadata.json").read_text())
    (folder / "metadata.json").write_text(json.dumps(metadata))
    (folder / "ema_params.msgpack").write_bytes(msgpack.packb(tree, use_bin_type=True))
    return folder
