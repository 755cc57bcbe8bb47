"""What the trainers' configurations accept and refuse, before any data or weights are touched."""

import ast
import dataclasses
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import textwrap
import traceback
import typing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from golden_files import unpack_artifact
from safetensors.torch import load_file, save_file

from drift_accel import train, train_mae
from drift_accel.data import LabelledImages
from drift_accel.data import sources as data_sources
from drift_accel.drift import FeatureConfig
from drift_accel.drift.encoders import as_specs
from drift_accel.foundation.command_line import configuration_dict, parse_command
from drift_accel.models.configuration import EncoderConfig, load_encoder

ROOT = Path(__file__).resolve().parents[1]
# Those in folders are no recipes by themselves: tests/test_ablation_recipes.py, tests/test_studies.py.
RECIPES = sorted((ROOT / "train_configs").glob("*.yaml"))
COMMANDS = {"train": train, "train_mae": train_mae}
ROOTS = {"train": train.GeneratorTrainingConfig, "train_mae": train_mae.MaeTrainingConfig}
# What the cases below change, apart from the recipes, whose values are tuned.
BASES = {
    "train": """
        steps: 1000
        generator: {input_size: 8, in_channels: 1, patch_size: 1, hidden_size: 128, depth: 1, num_heads: 4, num_classes: 10}
        encoder: {path: runs/mae/exports/ema_0.99}
        batch: {labels: 10, generated: 16, positives: 16, negatives: 4}
        guidance: {maximum: 2.0}
        optimizer: {lr: 5.0e-4, warmup_steps: 50}
    """,
    "train_mae": """
        steps: 1000
        mae: {input_size: 8, in_channels: 1, width: 16, blocks: [2, 2, 2, 2], num_classes: 10, mask_patch_size: 2}
        batch_size: 128
        classifier: {steps: 300, warmup_steps: 100}
    """,
}


def command_of(recipe: Path):
    return train_mae if "mae" in recipe.name else train


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """The files of BASES."""
    folder = tmp_path_factory.mktemp("bases")
    for name, text in BASES.items():
        (folder / name).write_text(textwrap.dedent(text))
    return {name: folder / name for name in BASES}


@pytest.fixture
def configured(bases):
    """Reads BASES[name] with changes."""

    def read(name: str, *changes: str):
        return parse_command(ROOTS[name], "", ["--config", str(bases[name]), "--dry_run", *changes]).config

    return read


@pytest.fixture
def touch_nothing(monkeypatch):
    """Whoever starts processes, opens data, builds a network or loads weights fails the test."""

    def forbid(owner, name):
        def refuse(*_, **__):
            pytest.fail(f"{name} was called")

        monkeypatch.setattr(owner, name, refuse)

    for command in (train, train_mae):
        forbid(command, "open_source" if command is train else "open_encoder_data")
        forbid(command, "start_accelerator")
        forbid(command, "open_run")
    forbid(train, "load_encoders")
    forbid(train, "prepare_evaluation")
    find_spec = importlib.util.find_spec  # for no case does it matter whether wandb is installed here
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else find_spec(name, *more))
    forbid(data_sources, "load_digits")
    forbid(torch.nn.Module, "__init__")


def dry_run(capsys, command, *arguments) -> str:
    command.main([*map(str, arguments), "--dry_run"])
    return capsys.readouterr().out


# The recipes.


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_pass_a_dry_run_that_touches_nothing_and_can_be_read_back(recipe, capsys, tmp_path, touch_nothing):
    printed = dry_run(capsys, command_of(recipe), "--config", recipe, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "again.yaml").write_text(printed)
    assert dry_run(capsys, command_of(recipe), "--config", tmp_path / "again.yaml") == printed


def test_recipes_are_found_and_named_after_their_command():
    assert {"digits.yaml", "mae_digits.yaml"} <= {recipe.name for recipe in RECIPES}
    for recipe in RECIPES:
        assert recipe.name.startswith("mae_") == ("mae" in recipe.name), recipe
        assert ("mae" in yaml.safe_load(recipe.read_text())) == recipe.name.startswith("mae_"), recipe


@pytest.mark.parametrize("name", COMMANDS)
def test_a_dry_run_ends_with_status_0_in_a_process_of_its_own(name, bases, tmp_path):
    command = [sys.executable, "-m", f"drift_accel.{name}", "--config", str(bases[name]), "--dry_run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([*command, "--output_dir", "run"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load(result.stdout)["steps"] == 1000
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        "--optimizer.lr 1e-7 --optimizer.betas [0.5,0.25] --ema.decays [0.9,0.99] --checkpoint.keep_last null --num_processes 2",
        "--features.maps ['conv1','layer1'] --features.windows [] --guidance.no_guidance_fraction 0.25 --generator.mlp_ratio 3",
        "--encoder.path yes --drift.temperatures [1]",
        "--encoder.path null --seed 18446744073709551615",
        "--encoder.path ä:#{}",
    ],
)
def test_what_a_dry_run_prints_gives_the_same_configuration(changes, bases, configured, capsys, tmp_path, touch_nothing):
    printed = dry_run(capsys, train, "--config", bases["train"], *changes.split())
    (tmp_path / "again.yaml").write_text(printed)
    first = configured("train", *changes.split())
    again = parse_command(ROOTS["train"], "", ["--config", str(tmp_path / "again.yaml"), "--dry_run"]).config
    assert again == first
    assert yaml.safe_load(printed) == configuration_dict(first)


# Precedence: command line, file, default.


@pytest.mark.parametrize(
    "arguments",
    [
        "--config FILE --optimizer.lr 1",
        "--optimizer.lr 1 --config FILE",
        "--optimizer.lr=1 --config=FILE",
        "--seed 3 --optimizer.lr=1 --config FILE --log.every 7",
    ],
)
def test_the_command_line_goes_before_the_file_and_the_file_before_the_defaults(arguments, bases, capsys):
    shown = yaml.safe_load(dry_run(capsys, train, *arguments.replace("FILE", str(bases["train"])).split()))
    assert shown["optimizer"]["lr"] == 1.0  # command line
    assert shown["optimizer"]["warmup_steps"] == 50  # file
    assert shown["optimizer"]["clip_norm"] == 2.0  # default


def test_of_two_files_the_later_one_wins_key_by_key(bases, capsys, tmp_path):
    (tmp_path / "more.yaml").write_text("steps: 7\noptimizer:\n  eps: 1e-4\n")
    shown = yaml.safe_load(dry_run(capsys, train, "--config", bases["train"], "--seed", "3", "--config", tmp_path / "more.yaml"))
    assert (shown["steps"], shown["seed"], shown["optimizer"]["eps"]) == (7, 3, 1e-4)
    assert shown["optimizer"]["lr"] == 5e-4


# Values that YAML and the parser could read in another sense than meant.


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("optimizer: {lr: 1e-4}", "optimizer.lr", 1e-4),  # a string for YAML 1.1
        ("optimizer: {lr: 1E-4}", "optimizer.lr", 1e-4),
        ("optimizer: {lr: 1}", "optimizer.lr", 1.0),
        ("ema: {decays: [9e-1, 0]}", "ema.decays", [0.9, 0.0]),
        ("ema: {decays: ['0.9']}", "ema.decays", [0.9]),
        ("drift: {temperatures: [1, 2]}", "drift.temperatures", [1.0, 2.0]),
        ("steps: '100'", "steps", 100),
        ("steps: 1_000", "steps", 1000),
        ("optimizer: {decay_all: no}", "optimizer.decay_all", False),
        ("checkpoint: {keep_last: null}", "checkpoint.keep_last", None),
        ("num_processes: null", "num_processes", None),
        ("encoder: {path: '5'}", "encoder.path", "5"),
        ("encoder: {}", "encoder.path", "runs/mae/exports/ema_0.99"),
    ],
)
def test_values_of_a_file_are_read_as_they_are_meant(text, key, value, bases, capsys, tmp_path):
    (tmp_path / "more.yaml").write_text(text)
    shown = yaml.safe_load(dry_run(capsys, train, "--config", bases["train"], "--config", tmp_path / "more.yaml"))
    for part in key.split("."):
        shown = shown[part]
    assert shown == value
    assert type(shown) is type(value)
    assert not isinstance(value, list) or [type(item) for item in shown] == [type(item) for item in value]


# What is refused: (command, arguments, what the message must hold).

ON_THE_COMMAND_LINE = [
    ("train", "--steps 0", ["steps is 0"]),
    ("train", "--steps -5", ["steps is -5"]),
    ("train", "--steps 100.5", ["steps", "100.5", "int"]),
    ("train", "--steps 1e3", ["steps", "1000.0", "int"]),
    ("train", "--steps true", ["steps", "True", "int"]),
    ("train", "--steps null", ["steps", "None", "int"]),
    ("train", "--steps ten", ["steps", "ten", "int"]),
    ("train", "--seed -1", ["seed is -1"]),
    ("train", "--seed 18446744073709551616", ["seed is 18446744073709551616"]),
    ("train", "--seed 1.5", ["seed", "1.5", "int"]),
    ("train", "--precision float16", ["precision is 'float16'", "range", "bfloat16"]),
    ("train", "--precision fp32", ["precision is 'fp32'", "float32"]),
    ("train", "--device gpu", ["device is 'gpu'", "auto", "cuda:N"]),
    ("train", "--device cuda:-1", ["device is 'cuda:-1'", "cuda:N"]),
    ("train", "--compile all", ["compile is 'all'", "blocks"]),
    ("train", "--profile_steps 5", ["profile_steps is '5'", "11-13"]),
    ("train", "--profile_steps 5-4", ["profile_steps is '5-4'"]),
    ("train", "--profile_steps 0-4", ["profile_steps is '0-4'", "counted from 1"]),
    ("train", "--statistics local", ["statistics is 'local'", "global, lagged, slice, rank"]),
    ("train", "--statistics_memory_gb -1", ["statistics_memory_gb is -1.0"]),
    ("train", "--statistics_memory_gb .nan", ["statistics_memory_gb is nan"]),
    ("train", "--overfit_one_batch --data.queue.push 4", ["overfit_one_batch is true", "data.queue to null"]),
    ("train", "--decoder.batch 0", ["decoder.batch is 0"]),
    ("train", "--decoder.dtype float16", ["decoder.dtype is 'float16'"]),
    ("train", "--decoder.real_images pixels", ["decoder.real_images is 'pixels'", "without decoder.vae"]),
    ("train", "--positives.choice closest", ["positives.choice is 'closest'", "random, nearest, farthest"]),
    ("train", "--positives.map layer1", ["positives.map is 'layer1'", "leave it out"]),
    ("train", "--positives.choice nearest --data.queue.push 4", ["positives.choice is 'nearest'", "data.queue to null"]),
    ("train", "--drift.keep_distances sometimes", ["drift.keep_distances is 'sometimes'", "always"]),
    ("train", "--log.trackers [crystal]", ["log.trackers holds ['crystal']", "wandb"]),
    ("train", "--log.trackers [wandb]", ["wandb", "install"]),
    ("train", "--log.peak_tflops 0", ["log.peak_tflops is 0.0", "null"]),
    ("train", "--log.peak_tflops .nan", ["log.peak_tflops is nan"]),
    ("train", "--evaluation.every 0", ["evaluation.every is 0", "null"]),
    ("train", "--evaluation.every 60", ["evaluation.every is 60", "multiple of log.every, 50"]),
    ("train", "--evaluation.ema 0.5", ["evaluation.ema is 0.5", "ema.decays [0.999]"]),
    ("train", "--evaluation.num_samples 0", ["evaluation.num_samples is 0"]),
    ("train", "--evaluation.network_batch 0", ["evaluation.network_batch is 0"]),
    ("train", "--evaluation.num_reference_images 0", ["evaluation.num_reference_images is 0"]),
    ("train", "--evaluation.vae_batch 0", ["evaluation.vae_batch is 0"]),
    ("train", "--evaluation.vae_dtype int8", ["evaluation.vae_dtype is 'int8'", "bfloat16"]),
    ("train", "--evaluation.sanity_samples -1", ["evaluation.sanity_samples is -1", "0 for none"]),
    ("train", "--evaluation.protocol fid", ["evaluation.protocol", "'fid'", "legacy_tensorflow"]),
    ("train", "--evaluation.metrics [fid]", ["evaluation.metrics is ('fid',)", "frechet"]),
    ("train", "--evaluation.metrics []", ["evaluation.metrics is ()"]),
    ("train", "--evaluation.guidance_scale 0.9", ["evaluation.guidance_scale is 0.9"]),
    ("train", "--evaluation.guidance_scale .inf", ["evaluation.guidance_scale is inf"]),
    ("train", "--evaluation.seed -1", ["evaluation.seed is -1"]),
    ("train", """--more_encoders [{"path":"a"}]""", ["encoders are called ['encoder'] more than once"]),
    ("train", "--batch.labels_per_slice 0", ["batch.labels_per_slice is 0", "null"]),
    ("train", "--data.max_rows 0", ["data.max_rows is 0"]),
    ("train", "--num_processes 0", ["num_processes is 0"]),
    ("train", "--num_processes 3", ["batch.labels is 10", "3 processes", "9 labels"]),
    ("train", "--num_processes 1.0", ["num_processes", "1.0", "int"]),
    ("train", "--optimizer.lr 0", ["optimizer.lr is 0.0"]),
    ("train", "--optimizer.lr=-1e-4", ["optimizer.lr is -0.0001"]),
    ("train", "--optimizer.lr nan", ["optimizer.lr", "nan"]),
    ("train", "--optimizer.lr .nan", ["optimizer.lr is nan"]),
    ("train", "--optimizer.lr .inf", ["optimizer.lr is inf"]),
    ("train", "--optimizer.lr true", ["optimizer.lr", "True", "float"]),
    ("train", "--optimizer.lr fast", ["optimizer.lr", "fast", "float"]),
    ("train", "--optimizer.lr null", ["optimizer.lr", "None", "float"]),
    ("train", "--optimizer.warmup_from 0", ["optimizer.warmup_from is 0.0"]),
    ("train", "--optimizer.eps .inf", ["optimizer.eps is inf"]),
    ("train", "--optimizer.clip_norm 0", ["optimizer.clip_norm is 0.0"]),
    ("train", "--optimizer.warmup_steps -1", ["optimizer.warmup_steps is -1"]),
    ("train", "--optimizer.betas [0.9,1]", ["optimizer.betas is (0.9, 1.0)"]),
    ("train", "--optimizer.betas [.nan,0.9]", ["optimizer.betas is (nan, 0.9)"]),
    ("train", "--optimizer.betas 0.9", ["optimizer.betas", "0.9", "tuple"]),
    ("train", "--optimizer.betas [0.9]", ["optimizer.betas", "[0.9]", "2 elements"]),
    ("train", "--optimizer.weight_decay -1", ["optimizer.weight_decay is -1.0"]),
    ("train", "--optimizer.decay_all 2", ["optimizer.decay_all", "2"]),
    ("train", "--ema.decays []", ["ema.decays is ()"]),
    ("train", "--ema.decays [0.9,0.9]", ["ema.decays is (0.9, 0.9)", "once"]),
    ("train", "--ema.decays [1]", ["ema.decays is (1.0,)"]),
    ("train", "--ema.decays [-0.1]", ["ema.decays is (-0.1,)"]),
    ("train", "--ema.decays [.nan]", ["ema.decays is (nan,)"]),
    ("train", "--ema.decays 0.9", ["ema.decays", "0.9", "tuple"]),
    ("train", "--checkpoint.every 0", ["checkpoint.every is 0"]),
    ("train", "--checkpoint.keep_last 0", ["checkpoint.keep_last is 0", "null"]),
    ("train", "--checkpoint.keep_every 1500", ["checkpoint.keep_every is 1500", "multiple of checkpoint.every (1000)"]),
    ("train", "--checkpoint.export_every 0", ["checkpoint.export_every is 0", "multiple of checkpoint.every (1000)"]),
    ("train", "--checkpoint.keep_best=", ["checkpoint.keep_best is empty"]),
    ("train", "--checkpoint.best_is least", ["checkpoint.best_is is 'least'", "min, max"]),
    ("train", "--checkpoint.on_error retry", ["checkpoint.on_error is 'retry'", "stop, continue"]),
    ("train", "--init_from=", ["init_from is empty", "null"]),
    ("train", "--nonfinite skip", ["nonfinite is 'skip'", "skip:3"]),
    ("train", "--nonfinite skip:0", ["nonfinite is 'skip:0'", "skip:N"]),
    ("train", "--max_hours 0", ["max_hours is 0.0", "null"]),
    ("train", "--max_hours .nan", ["max_hours is nan"]),
    ("train", "--collective_timeout_minutes 0", ["collective_timeout_minutes is 0.0"]),
    ("train", "--collective_timeout_minutes .inf", ["collective_timeout_minutes is inf", "a week"]),
    ("train", "--log.every 0", ["log.every is 0"]),
    ("train", "--log.sample_every -1", ["log.sample_every is -1"]),
    ("train", "--batch.labels 0", ["batch.labels is 0"]),
    ("train", "--batch.generated 0", ["batch.generated is 0"]),
    ("train", "--batch.positives 0", ["batch.positives is 0"]),
    ("train", "--batch.negatives -1", ["batch.negatives is -1"]),
    ("train", "--batch.labels 2.5", ["batch.labels", "2.5", "int"]),
    ("train", "--batch.label_order random", ["batch.label_order is 'random'", "shuffled"]),
    ("train", "--guidance.mode linear", ["guidance.mode is 'linear'", "power"]),
    ("train", "--guidance.minimum 0.5", ["guidance.minimum is 0.5"]),
    ("train", "--guidance.minimum .nan", ["guidance.minimum is nan"]),
    ("train", "--guidance.maximum 0.5", ["guidance.maximum is 0.5", "minimum = 1"]),
    ("train", "--guidance.minimum 3", ["guidance.maximum is 2.0", "minimum = 3"]),
    ("train", "--guidance.maximum .inf", ["guidance.maximum is inf"]),
    ("train", "--guidance.power .nan", ["guidance.power is nan"]),
    ("train", "--guidance.power=-1e6", ["guidance.power is -1000000.0"]),
    ("train", "--features.windows [2,2]", ["features.windows is (2, 2)", "list each value once"]),
    ("train", "--features.maps [conv1,conv1]", ["features.maps is", "list each value once"]),
    ("train", "--data.queue.push 0", ["queue.push is 0"]),
    ("train", "--data.source cache", ["data.path is missing"]),
    ("train", "--data.path somewhere", ["data.path is 'somewhere'", "set data.source to 'cache'"]),
    ("train", "--data.queue.per_class 0", ["queue.per_class is 0"]),
    ("train", "--data.queue.unconditional -3", ["queue.unconditional is -3"]),
    ("train", "--guidance.no_guidance_fraction 1.5", ["guidance.no_guidance_fraction is 1.5"]),
    ("train", "--batch.generated 1", ["guidance up to 2.0", "1 generated", "guidance.maximum to 1"]),
    ("train", "--batch.negatives 0", ["guidance up to 2.0", "0 negatives", "conditioning_only"]),
    ("train", "--drift.temperatures []", ["drift.temperatures is empty"]),
    ("train", "--drift.temperatures [0.2,0.2]", ["drift.temperatures (0.2, 0.2)", "once"]),
    ("train", "--drift.temperatures [0.2,-0.1]", ["drift.temperatures holds -0.1"]),
    ("train", "--drift.temperatures [0]", ["drift.temperatures holds 0.0"]),
    ("train", "--drift.temperatures [.nan]", ["drift.temperatures holds nan"]),
    ("train", "--drift.temperatures 0.2", ["drift.temperatures", "0.2", "tuple"]),
    ("train", "--drift.backend gpu", ["drift.backend is 'gpu'", "reference"]),
    ("train", "--drift.reduction sum", ["drift.reduction is 'sum'", "release"]),
    ("train", "--drift.field all", ["drift.field is 'all'", "summed"]),
    ("train", "--drift.weight_placement before", ["drift.weight_placement is 'before'", "after"]),
    ("train", "--drift.coupling column", ["drift.coupling is 'column'", "two_sided"]),
    ("train", "--drift.sinkhorn_marginal rows", ["drift.sinkhorn_marginal is 'rows'", "weighted_cols"]),
    ("train", "--drift.sinkhorn_iterations 0", ["drift.sinkhorn_iterations is 0"]),
    ("train", "--drift.drift_form both", ["drift.drift_form is 'both'", "joint"]),
    ("train", "--drift.metric l1", ["drift.metric is 'l1'", "l2"]),
    ("train", "--drift.affinity_floor .inf", ["drift.affinity_floor is inf"]),
    ("train", "--drift.affinity_floor .nan", ["drift.affinity_floor is nan"]),
    ("train", "--drift.attraction -1", ["drift.attraction is -1.0"]),
    ("train", "--drift.repulsion .inf", ["drift.repulsion is inf"]),
    (
        "train",
        "--drift.coupling sinkhorn --drift.sinkhorn_marginal none",
        ["drift.sinkhorn_marginal is 'none'", "4 negatives", "guidance from 1.0", "weighted_cols"],
    ),
    ("train", "--features.maps []", ["features.maps is empty", "null"]),
    ("train", "--features.maps conv1", ["features.maps", "conv1", "tuple"]),
    ("train", "--features.statistics [median]", ["features.statistics holds ['median']", "mean"]),
    ("train", "--features.windows [1]", ["features.windows is (1,)"]),
    ("train", "--features.windows [2.5]", ["features.windows", "2.5", "int"]),
    ("train", "--features.windows 2", ["features.windows", "2", "tuple"]),
    ("train", "--features.vectors false --features.statistics [] --features.norm_x false", ["features", "all off"]),
    ("train", "--data.source images --data.path pictures", ["data.source is 'images'", "digits, cache"]),
    ("train_mae", "--data.source images", ["data.path is missing", "pictures a class"]),
    ("train_mae", "--data.source images --data.path p --data.flip true", ["data.flip is True", "mirrored already"]),
    ("train_mae", "--data.source images --data.path p --data.max_rows 5", ["data.max_rows is 5", "leave it out"]),
    ("train_mae", "--data.images.image_size 0", ["data.images.image_size is 0"]),
    ("train_mae", "--data.images.dtype float16", ["data.images.dtype is 'float16'", "bfloat16"]),
    ("train_mae", "--data.images.vae_batch 0", ["data.images.vae_batch is 0"]),
    ("train_mae", "--data.images.min_area 0", ["data.images.min_area is 0.0"]),
    ("train_mae", "--validation.every 0", ["validation.every is 0", "null for no validation"]),
    ("train_mae", "--validation.max_rows 0", ["validation.max_rows is 0", "null for all rows"]),
    ("train_mae", "--validation.batch_size 0", ["validation.batch_size is 0"]),
    ("train_mae", "--validation.split all", ["validation.split is 'all'", "test or train"]),
    ("train_mae", "--validation.every 60", ["validation.every is 60", "multiple of log.every, 50"]),
    ("train_mae", "--validation.path x", ["validation.path is 'x'", "validation.split"]),
    (
        "train_mae",
        "--data.source cache --data.path x --validation.every 50",
        ["validation.path is missing", "validation.every to null"],
    ),
    ("train", "--sample.columns 0", ["sample.columns", "0 and 10"]),
    ("train", "--sample.max_classes 0", ["sample.max_classes", "8 and 0"]),
    ("train", "--sample.guidance_scale 0.5", ["sample.guidance_scale is 0.5"]),
    ("train", "--sample.guidance_scale .nan", ["sample.guidance_scale is nan"]),
    ("train", "--sample.guidance_scale .inf", ["sample.guidance_scale is inf"]),
    ("train", "--generator.preset huge", ["generator.preset is 'huge'", "tiny", "null"]),
    ("train", "--generator.patch_size 3", ["generator", "patch_size 3", "input_size 8"]),
    ("train", "--generator.patch_size 2.0", ["generator.patch_size", "2.0", "int"]),
    ("train", "--generator.num_heads 3", ["generator", "num_heads 3", "hidden_size 128"]),
    ("train", "--generator.hidden_size 12", ["generator", "hidden_size 12", "odd width 3"]),
    ("train", "--generator.hidden_size 2 --generator.num_heads 1", ["generator", "hidden_size 2", "multiple of 4"]),
    ("train", "--generator.depth 0", ["generator", "depth is 0"]),
    ("train", "--generator.num_style_tokens -1", ["generator", "num_style_tokens is -1"]),
    ("train", "--generator.condition_size 0", ["generator", "condition_size is 0"]),
    ("train", "--generator.mlp_ratio .nan", ["generator", "mlp_ratio is nan"]),
    ("train", "--generator.mlp_ratio 1e-4", ["generator", "mlp_ratio 0.0001", "hidden_size 128"]),
    ("train", "--data.source imagenet", ["data.source is 'imagenet'", "digits"]),
    ("train", "--data.split validation", ["data.split is 'validation'", "train"]),
    ("train", "--encoder.path=", ["encoder.path is empty"]),
    ("train", "--encoder.kind vit", ["encoder.kind is 'vit'", "convnextv2"]),
    ("train", "--encoder.architecture resnet18", ["encoder.architecture is 'resnet18'", "kind resnet", "leave it out"]),
    ("train", "--encoder.preset huge", ["encoder.preset is 'huge'", "latent-640", "or null"]),
    ("train", "--encoder.preset tiny --encoder.kind dinov2", ["encoder.preset is 'tiny'", "kind mae", "leave it out"]),
    ("train", "--encoder.kind code", ["would run", "encoder.allow_code"]),
    ("train", "--encoder.name a/b", ["encoder.name is 'a/b'"]),
    ("train", "--encoder.weight 0", ["encoder.weight of encoder is 0.0"]),
    ("train", "--optimizer.rate 1", ["--optimizer.rate"]),
    ("train", "--mae.preset tiny", ["--mae.preset"]),
    ("train", "--optimiser.lr 1", ["--optimiser.lr"]),
    ("train", "--step 5", ["--step"]),
    ("train", "digits", ["digits"]),
    ("train_mae", "--steps 0", ["steps is 0"]),
    ("train_mae", "--precision float16", ["precision is 'float16'", "bfloat16"]),
    ("train_mae", "--batch_size 0", ["batch_size is 0"]),
    ("train_mae", "--num_processes 3", ["batch_size is 128", "3 processes"]),
    ("train_mae", "--accumulate 0", ["accumulate is 0"]),
    ("train_mae", "--accumulate 3", ["accumulate is 3", "128 images"]),
    ("train_mae", "--num_processes 4 --accumulate 64", ["accumulate is 64", "32 images"]),
    ("train_mae", "--mask_ratio 0", ["mask_ratio is 0.0"]),
    ("train_mae", "--mask_ratio 1", ["mask_ratio is 1.0"]),
    ("train_mae", "--mask_ratio .nan", ["mask_ratio is nan"]),
    ("train_mae", "--classifier.steps -1", ["classifier.steps is -1"]),
    ("train_mae", "--classifier.steps 1001", ["classifier.steps is 1001", "1000 steps"]),
    ("train_mae", "--classifier.weight 1.5", ["classifier.weight is 1.5"]),
    ("train_mae", "--classifier.weight .nan", ["classifier.weight is nan"]),
    ("train_mae", "--classifier.warmup_steps 0", ["classifier.warmup_steps is 0"]),
    ("train_mae", "--mae.preset huge", ["mae.preset is 'huge'", "tiny"]),
    ("train_mae", "--mae.blocks 2", ["mae.blocks", "2", "tuple"]),
    ("train_mae", "--mae.blocks [1,2,3]", ["mae.blocks", "[1, 2, 3]", "4 elements"]),
    ("train_mae", "--mae.blocks [1,2,3,0]", ["mae", "blocks[3] is 0"]),
    ("train_mae", "--mae.width 0", ["mae", "width is 0"]),
    ("train_mae", "--mae.input_patch_size 3", ["mae", "input_patch_size 3", "input_size 8"]),
    ("train_mae", "--mae.mask_patch_size 3", ["mae", "mask_patch_size 3", "grid of 8"]),
    ("train_mae", "--generator.preset tiny", ["--generator.preset"]),
]

IN_A_FILE = [
    ("train", "optimizer: {rate: 1}", ["optimizer", "rate"]),
    ("train", "optimiser: {lr: 1}", ["optimiser"]),
    ("train", "mae: {preset: tiny}", ["mae.preset"]),
    ("train", "steps: 100.5", ["steps", "100.5", "int"]),
    ("train", "steps: true", ["steps", "True", "int"]),
    ("train", "steps: 1e3", ["steps", "1000.0", "int"]),
    ("train", "steps: null", ["steps"]),
    ("train", "seed: on", ["seed", "True", "int"]),
    ("train", "precision: 16", ["precision", "16", "str"]),
    ("train", "precision: null", ["precision is null"]),
    ("train", "optimizer: {lr: nan}", ["optimizer.lr", "nan"]),
    ("train", "optimizer: {lr: .nan}", ["optimizer.lr is nan"]),
    ("train", "optimizer: {lr: .inf}", ["optimizer.lr is inf"]),
    ("train", "optimizer: {lr: true}", ["optimizer.lr", "True", "float"]),
    ("train", "optimizer: {lr: null}", ["optimizer.lr is null"]),
    ("train", "optimizer: {lr: [1]}", ["optimizer.lr", "[1]", "float"]),
    ("train", "optimizer: {decay_all: null}", ["optimizer.decay_all is null"]),
    ("train", "optimizer: {decay_all: 1}", ["optimizer.decay_all", "1", "bool"]),
    ("train", "optimizer: {betas: [0.9, null]}", ["optimizer.betas", "None", "float"]),
    ("train", "optimizer: null", ["optimizer is null"]),
    ("train", "optimizer: 5", ["optimizer is 5"]),
    ("train", "optimizer: [lr, 5]", ["optimizer is ['lr', 5]"]),
    ("train", "generator: null", ["generator is null"]),
    ("train", "checkpoint: {every: null}", ["checkpoint.every is null"]),
    ("train", "ema: {decays: 0.9}", ["ema.decays", "0.9", "tuple"]),
    ("train", "ema: {decays: [true]}", ["ema.decays", "True", "float"]),
    ("train", "ema: {decays: null}", ["ema.decays is null"]),
    ("train", "drift: {temperatures: null}", ["drift.temperatures is null"]),
    ("train", "features: {windows: [true]}", ["features.windows", "True", "int"]),
    ("train", "features: {maps: [1]}", ["features.maps", "[1]", "str"]),
    ("train", "generator: {patch_size: true}", ["generator.patch_size", "True", "int"]),
    ("train", "encoder: {path: null}", ["encoder.path"]),
    ("train", "encoder: {path: 5}", ["encoder.path", "5", "str"]),
    ("train", "encoder: runs/mae", ["encoder", "runs/mae"]),
    ("train", "steps: 5\nseed: 1\nsteps: 6", ["steps twice", "line 3"]),
    ("train", "optimizer: {lr: 1}\noptimizer: {eps: 1}", ["optimizer twice", "line 2"]),
    ("train", "optimizer:\n  lr: 1\n  lr: 2", ["lr twice", "line 3"]),
    ("train", "steps: [", ["no YAML", "line 1"]),
    ("train", "steps", ["steps"]),
    ("train_mae", "mae: {blocks: [2, 2, 2, true]}", ["mae.blocks", "True", "int"]),
    ("train_mae", "batch_size: 128.0", ["batch_size", "128.0", "int"]),
    ("train_mae", "mask_ratio: half", ["mask_ratio", "half", "float"]),
    ("train_mae", "batch: {labels: 10}", ["batch.labels"]),
]


REACHED: dict[tuple[str, str], set[tuple[str, int]]] = {}  # case of ON_THE_COMMAND_LINE -> (file, line) it was stopped by


def refusal_of(capsys, module, arguments, reached: set | None = None) -> str:
    """The message of a command that ends with status 2 and prints nothing else; `reached` gets the lines that raised."""
    with pytest.raises(SystemExit) as exit:
        module.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    if reached is not None and isinstance(exit.value.__context__, ValueError):
        frames = traceback.extract_tb(exit.value.__context__.__traceback__)
        reached.update((frame.filename, frame.lineno) for frame in frames)
    assert exit.value.code == 2
    assert printed.out == ""
    return printed.err[printed.err.index("error: ") :]


def require_all(message: str, fragments: list[str]):
    missing = [fragment for fragment in fragments if fragment not in message]
    assert not missing, f"{missing} not in: {message}"


@pytest.mark.parametrize(("name", "arguments", "fragments"), ON_THE_COMMAND_LINE, ids=lambda value: str(value))
def test_refused_on_the_command_line(name, arguments, fragments, bases, capsys, tmp_path, touch_nothing):
    command = ["--config", bases[name], *arguments.split(), "--output_dir", tmp_path / "run"]
    message = refusal_of(capsys, COMMANDS[name], command, REACHED.setdefault((name, arguments), set()))
    require_all(message, fragments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "text", "fragments"), IN_A_FILE, ids=lambda value: str(value))
def test_refused_in_a_file(name, text, fragments, bases, capsys, tmp_path, touch_nothing):
    (tmp_path / "more.yaml").write_text(text)
    arguments = ["--config", bases[name], "--config", tmp_path / "more.yaml", "--output_dir", tmp_path / "run"]
    require_all(refusal_of(capsys, COMMANDS[name], arguments), fragments)
    assert not (tmp_path / "run").exists()


def test_required_keys_and_the_output_dir_are_asked_for(bases, capsys, touch_nothing):
    require_all(refusal_of(capsys, train, ["--output_dir", "run", "--encoder.path", "mae"]), ["steps"])
    require_all(refusal_of(capsys, train, ["--output_dir", "run", "--steps", "5"]), ["encoder.path"])
    require_all(refusal_of(capsys, train_mae, ["--output_dir", "run", "--mae.preset", "tiny"]), ["steps"])
    for name, command in COMMANDS.items():
        for arguments in ([], ["--output_dir", ""]):
            message = refusal_of(capsys, command, ["--config", bases[name], *arguments])
            require_all(message, ["--output_dir is missing"])
            assert len(message.splitlines()) == 1, name


def test_the_table_reaches_every_refusal_of_every_configuration():
    """Every `raise ValueError` of the classes below the two roots must have stopped one of the cases above."""
    if len(REACHED) < len(ON_THE_COMMAND_LINE):
        pytest.skip("counts only after all cases of ON_THE_COMMAND_LINE ran")
    reached = set().union(*REACHED.values())
    classes = {config_class for root in ROOTS.values() for config_class in configuration_classes(root)}
    places = {place for config_class in classes for place in refusals_in(config_class)}
    assert len(places) > 50
    missed = [f"{file}:{lines.start}" for file, lines in places if not any((file, line) in reached for line in lines)]
    assert not missed, f"{missed}: add a case to ON_THE_COMMAND_LINE for each of these lines"


def configuration_classes(root: type) -> set[type]:
    classes = {base for base in root.__mro__ if dataclasses.is_dataclass(base)}
    for hint in typing.get_type_hints(root).values():
        if dataclasses.is_dataclass(hint):
            classes |= configuration_classes(hint)
    return classes


def refusals_in(config_class: type) -> set[tuple[str, range]]:
    """(file, lines) of every statement that raises or calls a check; `check_launch` sees what no file says."""
    text, first = inspect.getsourcelines(config_class)
    members = ast.parse(textwrap.dedent("".join(text))).body[0].body
    methods = [node for node in members if isinstance(node, ast.FunctionDef) and not node.decorator_list]
    statements = [node for method in methods if method.name != "check_launch" for node in ast.walk(method)]
    refusals = [node for node in statements if isinstance(node, ast.Raise) or calls_a_check(node)]
    file = inspect.getsourcefile(config_class)
    return {(file, range(first + node.lineno - 1, first + node.end_lineno)) for node in refusals}


def calls_a_check(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return False
    name = ast.unparse(node.value.func).rpartition(".")[2]
    return "require" in name or "check" in name or name == "with_group"


# What only the launched run can know.


def test_a_launch_that_does_not_fit_is_refused(configured):
    with pytest.raises(ValueError, match="2 processes were asked for, but this run has 1"):
        configured("train", "--num_processes", "2").check_launch(1)
    with pytest.raises(ValueError, match="batch.labels is 10, which 4 processes cannot share"):
        configured("train").check_launch(4)
    with pytest.raises(ValueError, match="batch_size is 128, which 3 processes cannot share"):
        configured("train_mae").check_launch(3)
    with pytest.raises(RuntimeError, match="'fused', which cannot be used"):
        configured("train", "--drift.backend", "fused", "--precision", "float64").check_launch(1)


def images(channels: int = 1, size: int = 8, classes: int = 10) -> LabelledImages:
    return LabelledImages(np.zeros((classes, channels, size, size)), np.arange(classes), [str(k) for k in range(classes)])


@pytest.fixture(scope="module")
def tiny_encoder():
    from drift_accel.models import MaskedAutoencoder

    return MaskedAutoencoder(width=4, blocks=(1, 1, 1, 1), in_channels=1, input_size=8, num_classes=10)


def test_a_generator_that_fits_encoder_and_data_passes(configured, tiny_encoder):
    train.check_fit(configured("train"), as_specs(tiny_encoder), images())
    train.check_fit(configured("train"), as_specs(tiny_encoder), images(classes=3))
    train_mae.check_fit(configured("train_mae"), images())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"channels": 3}, r"\(1, 8, 8\) but the data has \(3, 8, 8\)"),
        ({"size": 16}, r"\(1, 8, 8\) but the data has \(1, 16, 16\)"),
        ({"classes": 11}, "num_classes is 10 but the data has 11 classes"),
    ],
)
def test_data_that_does_not_fit_is_refused(source, message, configured, tiny_encoder):
    with pytest.raises(ValueError, match=message):
        train.check_fit(configured("train"), as_specs(tiny_encoder), images(**source))
    with pytest.raises(ValueError, match=message):
        train_mae.check_fit(configured("train_mae"), images(**source))


def test_an_encoder_that_does_not_fit_is_refused(configured):
    from drift_accel.models import MaskedAutoencoder

    other_channels = MaskedAutoencoder(width=4, blocks=(1, 1, 1, 1), in_channels=3, input_size=8)
    with pytest.raises(ValueError, match="encoder takes 3 channels but the generator makes 1"):
        train.check_fit(configured("train"), as_specs(other_channels), images())
    # Only what it says of itself is read: a patch that does not divide 8 needs no network.
    other_patch = SimpleNamespace(in_channels=1, input_patch_size=3, input_space="latent", feature_maps=None)
    with pytest.raises(ValueError, match=r"encoder patchifies by 3, which does not divide the generator's \(8, 8\)"):
        train.check_fit(configured("train"), as_specs(other_patch), images())
    with pytest.raises(ValueError, match="names layer9, but the encoder has conv1"):
        train.check_fit(
            configured("train"), as_specs(MaskedAutoencoder(width=4, in_channels=1), FeatureConfig(maps=("layer9",))), images()
        )


def test_a_run_whose_encoder_is_missing_stops_before_its_folder_exists(bases, tmp_path):
    changes = ["--device", "cpu", "--encoder.path", tmp_path / "none", "--output_dir", tmp_path / "run"]
    with pytest.raises(SystemExit, match="train one first"):
        train.main([str(argument) for argument in ["--config", bases["train"], *changes]])
    assert not (tmp_path / "run").exists()


# Loading the encoder.


def load(folder: Path):
    return load_encoder(EncoderConfig(path=str(folder)))


@pytest.fixture
def export(tiny_encoder, tmp_path):
    tiny_encoder.save_pretrained(tmp_path / "export")
    return tmp_path / "export"


def test_an_export_is_loaded_frozen_and_in_evaluation_mode(export, tiny_encoder):
    loaded = load(export)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for name, value in tiny_encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_an_official_artifact_is_loaded_by_its_kind(tmp_path):
    assert type(load(unpack_artifact("mae", tmp_path))).__name__ == "MaskedAutoencoder"
    with pytest.raises(ValueError, match=r"generator holds a Generator: give the folder of a masked autoencoder"):
        load(unpack_artifact("generator", tmp_path))


def test_a_folder_without_a_model_says_what_belongs_there(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"encoder.path .* train one first .*train_mae.* give RUN/exports"):
            load(path)


def test_the_export_of_a_generator_is_refused(tmp_path):
    from drift_accel.models import Generator

    small = Generator(input_size=8, in_channels=1, patch_size=4, hidden_size=8, depth=1, num_heads=1, num_classes=2)
    small.save_pretrained(tmp_path / "export")
    with pytest.raises(ValueError, match="holds a Generator: give the folder of a MaskedAutoencoder"):
        load(tmp_path / "export")


def change_settings(export: Path, **changes):
    settings = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**settings, **changes}))


def change_weights(export: Path, change):
    path = export / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda export: (export / "config.json").write_text("{"), ValueError, "config.json describes no model"),
        (lambda export: (export / "config.json").write_text("[]"), ValueError, "config.json describes no model"),
        (lambda export: change_settings(export, colour="red"), ValueError, r"has no setting \['colour'\]"),
        (lambda export: change_settings(export, blocks=[1, 2, 1, 1]), ValueError, "weights are missing or unknown"),
        (lambda export: change_settings(export, width=8), ValueError, "expected shape"),
        (lambda export: change_weights(export, lambda w: w.pop("classifier.bias")), ValueError, "classifier.bias"),
        (lambda export: change_weights(export, lambda w: w.update(x=torch.zeros(1))), ValueError, r"1 weights .*\(x"),
        (lambda export: (export / "diffusion_pytorch_model.safetensors").unlink(), OSError, "safetensors"),
    ],
    ids=["no JSON", "no mapping", "unknown setting", "more blocks", "wider", "weight missing", "weight unknown", "no weights"],
)
def test_a_damaged_export_is_refused(damage, error, message, export):
    # Left to itself from_pretrained would draw what is missing at random, and only warn.
    damage(export)
    with pytest.raises(error, match=message):
        load(export)


def test_pickled_weights_are_not_read(export, tiny_encoder):
    (export / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(tiny_encoder.state_dict(), export / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load(export)
