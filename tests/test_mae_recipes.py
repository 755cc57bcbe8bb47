"""The encoders' recipes at the published scale: their values, their networks without weights, and their launch scripts."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from tiny_runs import ROOT

from drift_accel import train_mae
from drift_accel.foundation.command_line import parse_command
from drift_accel.models import MaskedAutoencoder
from drift_accel.training.optimizer import learning_rate

RECIPES = {"mae_latent_256": (256, 4, 1, 0), "mae_latent_640": (640, 4, 1, 3000), "mae_pixel_640": (640, 3, 8, 3000)}


def configured(name, *more):
    path = ROOT / f"train_configs/{name}.yaml"
    return parse_command(train_mae.MaeTrainingConfig, "", ["--config", str(path), "--dry_run", *more]).config


@pytest.mark.parametrize("name", RECIPES)
def test_the_published_values(name):
    width, channels, patch, classifier_steps = RECIPES[name]
    config = configured(name)
    mae = config.mae.resolved()
    assert (mae["width"], mae["in_channels"], mae["input_patch_size"], mae["num_classes"]) == (width, channels, patch, 1000)
    assert config.steps == (30_000 if width == 256 else 200_000)
    assert (config.batch_size, config.mask_ratio, config.ema.decays) == (8192, 0.5, (0.9995,))
    optimizer = config.optimizer
    assert (optimizer.betas, optimizer.weight_decay, optimizer.clip_norm) == ((0.9, 0.95), 0.01, 2.0)
    assert learning_rate(optimizer, 0) == pytest.approx(1e-6)
    assert learning_rate(optimizer, 4000) == pytest.approx(4e-3)
    phase = config.classifier
    assert phase.steps == classifier_steps
    assert phase.weight_at(config.steps - 3001, config.steps) == 0
    if classifier_steps:
        first = config.steps - 3000
        weights = [phase.weight_at(first + k, config.steps) for k in (0, 500, 1000, 2999)]
        assert weights == pytest.approx([0, 0.05, 0.1, 0.1])
    assert config.data.source == "images" and (config.data.images.vae is None) == (patch == 8)


@pytest.mark.parametrize("name", RECIPES)
def test_the_networks_are_built_and_take_a_batch_without_memory(name):
    config = configured(name)
    with torch.device("meta"):
        model = MaskedAutoencoder(**config.mae.arguments())
        side = model.config.input_size
        images, labels = torch.zeros(2, model.in_channels, side, side), torch.zeros(2, dtype=torch.long)
        losses = model(images, labels, torch.zeros(2, 1, 32, 32))
        assert losses.loss.shape == (2,)
        assert model.feature_maps(images)["layer4"].shape == (2, 8 * config.mae.resolved()["width"], 4, 4)


@pytest.mark.parametrize("name", RECIPES)
def test_a_classifier_phase_of_its_own_is_a_configuration(name):
    phase = ["--init_from", "runs/first/exports/ema_0.9995", "--steps", "3000", "--classifier.steps", "3000"]
    config = configured(name, *phase, "--optimizer.lr", "1e-3", "--optimizer.warmup_steps", "300")
    assert [config.classifier.weight_at(k, 3000) for k in (0, 1000, 2999)] == pytest.approx([0, 0.1, 0.1])


def script(name, *arguments, **variables):
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    command = ["bash", str(ROOT / f"launch_scripts/{name}.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize(
    ("name", "variables", "wanted"),
    [
        pytest.param("mae_latent_256", {"IMAGES": "pictures", "HELD_OUT": ""}, {"accumulate": 32}, marks=pytest.mark.slow),
        ("mae_latent_640", {"CACHE": "views", "HELD_OUT": "", "INIT_FROM": "x"}, {"steps": 3000, "init_from": "x"}),
        pytest.param(
            "mae_pixel_640", {"IMAGES": "pictures", "IMAGES_AT_ONCE": "3000"}, {"accumulate": 4}, marks=pytest.mark.slow
        ),
    ],
)
def test_the_scripts_make_the_configuration_they_say(name, variables, wanted):
    result = script(name, "--dry_run", NUM_GPUS="1", ACCELERATE_USE_CPU="true", **variables)
    assert result.returncode == 0, result.stderr
    shown = yaml.safe_load(result.stdout.split("\n", 1)[1])
    assert {key: shown[key] for key in wanted} == wanted
    source = "cache" if "CACHE" in variables else "images"
    assert (shown["data"]["source"], shown["data"]["path"]) == (source, variables.get("CACHE") or variables["IMAGES"])
    assert (shown["validation"]["every"] is None) == (variables.get("HELD_OUT") == "")


def test_several_machines_go_through_the_multi_node_script(tmp_path):
    fake = tmp_path / "accelerate"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    several = {"NUM_MACHINES": "4", "MACHINE_RANK": "0", "MAIN_ADDRESS": "node0", "NUM_GPUS": "8", "ACCELERATE": str(fake)}
    result = script("mae_latent_640", "--seed", "3", **several)
    assert result.returncode == 0, result.stderr
    assert "8192 images a step on 32 GPU(s), 256 each in 4 part(s)" in result.stdout
    launched = result.stdout.splitlines()[-1]
    numbers = ("--num_machines 4", "--num_processes 32", "--machine_rank 0", "--accumulate 4", "--seed 3")
    for part in (*numbers, "drift_accel.train_mae"):
        assert part in launched, part


def test_gpus_that_cannot_share_the_batch_are_refused():
    result = script("mae_latent_256", NUM_GPUS="7")
    assert result.returncode == 2 and "7 GPUs cannot share 8192 images" in result.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_scripts_pass_shellcheck():
    scripts = sorted((ROOT / "launch_scripts").glob("mae_*.sh"))
    result = subprocess.run(["shellcheck", *map(str, scripts)], capture_output=True, text=True, check=False)
    assert len(scripts) == 4 and result.returncode == 0, result.stdout
