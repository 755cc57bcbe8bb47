"""train_configs/ablations: each file is a change to any recipe of the generator, says what the literature found, and works."""

import dataclasses
import re

import pytest
import yaml
from tiny_runs import ROOT

from drift_accel.drift.configuration import DRIFT_PRESETS, DriftConfig
from drift_accel.foundation.command_line import configuration_dict, parse_command
from drift_accel.foundation.run_records import configuration_differences, flatten_configuration
from drift_accel.train import GeneratorTrainingConfig

ABLATIONS = sorted((ROOT / "train_configs/ablations").glob("*.yaml"))
BASES = ("digits", "ablation_b2", "pixel_b16")


def configuration(base, *more):
    files = [part for path in (ROOT / f"train_configs/{base}.yaml", *more) for part in ("--config", str(path))]
    return configuration_dict(parse_command(GeneratorTrainingConfig, "", [*files, "--dry_run"]).config)


@pytest.fixture(scope="module")
def plain():
    return {base: configuration(base) for base in BASES}


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_an_ablation_changes_what_it_says_and_nothing_else(path, plain):
    asked = flatten_configuration(yaml.safe_load(path.read_text()))
    assert asked and all(key.startswith("drift.") for key in asked)
    for base in BASES if path is ABLATIONS[0] else BASES[:1]:  # the merging is the same for all
        changed = configuration(base, path)
        assert configuration_differences(plain[base], changed).keys() == asked.keys()
        assert all(flatten_configuration(changed)[key] == value for key, value in asked.items())


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_an_ablation_says_what_was_published(path):
    comments = [line for line in path.read_text().splitlines() if line.startswith("# ")]
    assert any(re.match(r"# Published: \S", line) for line in comments[1:]), "a line with what the literature found"


def test_the_ablations_are_different_and_cover_what_the_configuration_offers():
    contents = {path.stem: flatten_configuration(yaml.safe_load(path.read_text())) for path in ABLATIONS}
    assert len({tuple(sorted(content.items())) for content in contents.values()}) == len(contents)
    reached = {(key.removeprefix("drift."), value) for content in contents.values() for key, value in content.items()}
    wanted = [("coupling", "row"), ("coupling", "kernel"), ("coupling", "sinkhorn"), ("drift_form", "split"), ("metric", "l2_sq")]
    wanted += [("affinity_floor", 0.0), ("weight_placement", "log_bias"), ("reduction", "paper"), ("mask_self", False)]
    wanted += [("attraction", 1.5), ("attraction", 2.0), ("repulsion", 1.5), ("repulsion", 2.0), ("repulsion", 0.0)]
    assert set(wanted) <= reached


@pytest.mark.parametrize(("name", "preset"), [("paper_preset", "paper"), ("sinkhorn_drift_baseline", "sinkhorn_drift")])
def test_presets_as_recipes_are_the_presets(name, preset):
    content = yaml.safe_load((ROOT / f"train_configs/ablations/{name}.yaml").read_text())
    assert DriftConfig(**content["drift"]) == DriftConfig.preset(preset)
    assert set(content["drift"]) == set(DRIFT_PRESETS[preset]) <= {field.name for field in dataclasses.fields(DriftConfig)}
