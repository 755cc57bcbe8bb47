"""The paper-scale recipes: what they say against the published table, and the networks that they build."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from drift_accel.foundation.command_line import parse_command
from drift_accel.models import Generator
from drift_accel.train import GeneratorTrainingConfig

ROOT = Path(__file__).resolve().parents[1]
# steps, labels, G, P, N, rate, warm-up, decay, p, f, parameters: arXiv 2602.04770, table 8, with the release's values.
PUBLISHED = {
    "ablation_b2": (30_000, 64, 64, 64, 16, 2e-4, 5_000, 0.01, 3, 0.0, 132_708_880),
    "latent_b2": (200_000, 128, 64, 64, 32, 4e-4, 10_000, 0.0, 5, 0.0, 132_708_880),
    "latent_l2": (200_000, 128, 64, 64, 32, 4e-4, 10_000, 0.01, 3, 0.5, 462_909_456),
    "pixel_b16": (100_000, 128, 64, 128, 32, 2e-4, 10_000, 0.01, 5, 0.0, 133_864_704),
    "pixel_l16": (100_000, 128, 64, 128, 32, 4e-4, 10_000, 0.01, 5, 0.0, 464_450_304),
}


def recipe(name: str, *changes: str) -> GeneratorTrainingConfig:
    path = str(ROOT / f"train_configs/{name}.yaml")
    return parse_command(GeneratorTrainingConfig, "", ["--config", path, "--dry_run", *changes]).config


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_values(name):
    config = recipe(name)
    batch, optimizer, guidance = config.batch, config.optimizer, config.guidance
    values = (config.steps, batch.labels, batch.generated, batch.positives, batch.negatives, optimizer.lr, optimizer.warmup_steps)
    assert (*values, optimizer.weight_decay, guidance.power, guidance.skip_fraction) == PUBLISHED[name][:-1]
    assert (guidance.minimum, guidance.maximum, guidance.mode) == (1, 4, "power")
    assert (optimizer.betas, optimizer.eps, optimizer.clip_norm, optimizer.warmup_from) == ((0.9, 0.95), 1e-8, 2.0, 1e-6)
    assert optimizer.decay_all and config.ema.decays[0] == 0.999
    assert config.drift.temperatures == (0.02, 0.05, 0.2) and config.precision == "bfloat16"
    queue = config.data.queue
    assert (queue.per_class, queue.unconditional) == (128, 1000) and 64 <= queue.push <= 128


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipes_generator_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        generator = Generator(**recipe(name).generator.arguments())
    assert sum(parameter.numel() for parameter in generator.parameters()) == PUBLISHED[name][-1]
    side = 256 if name.startswith("pixel") else 32
    assert (generator.config.input_size, generator.config.num_classes, generator.config.num_style_tokens) == (side, 1000, 32)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_step_is_the_same_on_any_number_of_gpus(name):
    """Labels belong to the step, slices change nothing but memory: no variant of the file is needed."""
    config = recipe(name)
    assert config.statistics == "global"
    assert "batch.labels_per_slice" in config.may_change
    for num_gpus in (1, 2, 4, 8, 16):
        config.check_launch(num_gpus)
        assert config.batch.labels // num_gpus % config.batch.labels_per_slice == 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_script_names_its_recipe_and_what_to_set(name):
    script = (ROOT / f"launch_scripts/{name}.sh").read_text()
    assert f"train_configs/{name}.yaml" in script
    defaults = dict(re.findall(r"^export (\w+)=\$\{\w+:-(.*?)\}", script, re.M))
    config = yaml.safe_load((ROOT / f"train_configs/{name}.yaml").read_text())
    assert defaults["CACHE"] == config["data"]["path"] and defaults["ENCODER"] == config["encoder"]["path"]
    assert {"RUN", "NUM_GPUS", "SHARDING", "LABELS_PER_SLICE"} <= defaults.keys()


STAND_IN = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case "$*" in *preflight*) exit "${PREFLIGHT_RESULT:-0}" ;; esac
"""


@pytest.fixture
def run_script(tmp_path):
    """Runs a recipe's script with a stand-in for Python that writes down what it was called with."""
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def run(name: str, *arguments: str, **variables: str):
        calls = tmp_path / "calls"
        calls.write_text("")
        environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "CALLS": str(calls), **variables}
        command = ["bash", str(ROOT / f"launch_scripts/{name}.sh"), *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        return result, calls.read_text().splitlines()

    return run


def test_a_script_checks_and_then_trains_with_the_same_options(run_script):
    result, calls = run_script("latent_l2", "--compile", "blocks", NUM_GPUS="8", RUN="/big/run", LABELS_PER_SLICE="2")
    assert result.returncode == 0, result.stderr
    check, training = calls
    assert "tools/preflight.py --encoder_width 640" in check and "-m drift_accel.train " in training
    for call in calls:
        assert "--num_processes 8" in call and "--multi_gpu" in call and "--output_dir /big/run" in call
        assert "--config train_configs/latent_l2.yaml" in call and call.endswith("--batch.labels_per_slice 2 --compile blocks")


def test_a_script_stops_where_the_check_finds_a_problem(run_script):
    result, calls = run_script("pixel_b16", NUM_GPUS="1", PREFLIGHT_RESULT="1")
    assert result.returncode == 1
    assert len(calls) == 1 and "preflight" in calls[0] and "--multi_gpu" not in calls[0]


def test_a_script_shards_on_request_and_refuses_nonsense(run_script):
    _, calls = run_script("ablation_b2", NUM_GPUS="2", SHARDING="fsdp2")
    assert all("--use_fsdp --fsdp_version 2" in call for call in calls) and len(calls) == 2
    result, calls = run_script("ablation_b2", NUM_GPUS="2", SHARDING="fsdp1")
    assert result.returncode == 2 and "choose ddp or fsdp2" in result.stderr and calls == []
    result, _ = run_script("ablation_b2")
    assert result.returncode == 1 and "no GPU found; set NUM_GPUS" in result.stderr
    for other in ({"SHARDING": "fsdp2"}, {"NUM_MACHINES": "2"}):
        result, calls = run_script("ablation_b2", NUM_GPUS="2", ACCELERATE_CONFIG="my.yaml", **other)
        assert result.returncode == 2 and "ACCELERATE_CONFIG is for one machine" in result.stderr and not calls


@pytest.mark.parametrize("path", sorted((ROOT / "launch_scripts/accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_files(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.mixed_precision == "no", "the trainer's own `precision` decides"
    kinds = {
        "one_gpu": ("NO", 1),
        "eight_gpus_ddp": ("MULTI_GPU", 8),
        "eight_gpus_fsdp2": ("FSDP", 8),
        "multi_node": ("MULTI_GPU", 16),
    }
    assert (config.distributed_type.value, config.num_processes) == kinds[path.stem]
    if path.stem == "eight_gpus_fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if path.stem == "multi_node":
        assert config.num_machines == 2 and config.rdzv_backend == "c10d"
