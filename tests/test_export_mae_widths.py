"""The encoders trained one after the other: what is complete is skipped, another command is waited for, the end is audited."""

import json
import sys
import threading

import pytest
import yaml
from tiny_runs import ROOT, launch_environment, load_tool, run_tool

from drift_accel.evaluation.work_state import WorkState
from drift_accel.models import MaskedAutoencoder
from drift_accel.models.exports import load_export

PLAIN = [sys.executable]  # `python -m drift_accel.train_mae` is what a launcher would start


def write_recipe(folder, name, width, steps=3):
    recipe = {
        "steps": steps, "mae": {"preset": "tiny", "width": width, "blocks": [1, 1, 1, 1]}, "batch_size": 16, "device": "cpu",
        "ema": {"decays": [0.9]}, "log": {"every": 1}, "validation": {"every": 3, "max_rows": 20},
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return folder / f"{name}.yaml"


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    return [write_recipe(folder, "mae_8", 8), write_recipe(folder, "mae_12", 12)]


def export(monkeypatch, out, recipes, *more):
    for name, value in launch_environment().items():
        monkeypatch.setenv(name, value)
    launch = ["--launch", " ".join(PLAIN), "--recipes", *recipes]
    return run_tool("export_mae_widths", "--output_dir", out, *launch, *more)


def table(printed):
    rows = [line.split() for line in printed.splitlines() if line.startswith("mae_") and ":" not in line.split()[0]]
    return {row[0]: row for row in rows}


@pytest.mark.slow
def test_both_widths_are_trained_then_skipped_and_audited(recipes, tmp_path, monkeypatch, capfd):
    assert export(monkeypatch, tmp_path, recipes, "--audit") == 1
    assert "missing" in capfd.readouterr().out
    assert export(monkeypatch, tmp_path, recipes, "--classifier_steps", "2", "--", "--seed", "5") == 0
    rows = table(capfd.readouterr().out)
    assert list(rows) == ["mae_8", "mae_8_cls", "mae_12", "mae_12_cls"]
    assert {row[-1] for row in rows.values()} == {"complete"}
    assert [rows[name][1:3] for name in ("mae_8", "mae_12_cls")] == [["8", "3/3"], ["12", "2/2"]]
    digests = {row[-2] for row in rows.values()}
    assert len(digests) == 4
    assert load_export(tmp_path / "mae_12/exports/ema_0.9", MaskedAutoencoder).config.width == 12
    assert [path.name for path in (tmp_path / "mae_12_cls/exports").iterdir()] == ["encoder_cls"]
    assert load_export(tmp_path / "mae_12_cls/exports/encoder_cls", MaskedAutoencoder).config.width == 12
    config = yaml.safe_load((tmp_path / "mae_8_cls/config.yaml").read_text())
    assert config["seed"] == 5 and config["init_from"] == str(tmp_path / "mae_8/exports/ema_0.9")
    state = json.loads((tmp_path / "export_mae_widths.json").read_text())
    assert state["now"] == "done" and set(state["stages"].values()) == {"done"}

    assert export(monkeypatch, tmp_path, recipes, "--", "--seed", "5") == 0
    assert capfd.readouterr().out.count("complete, skipped") == 2
    weights = next((tmp_path / "mae_8/exports/ema_0.9").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4])
    assert export(monkeypatch, tmp_path, recipes, "--audit", "--", "--seed", "5") == 1
    assert "damaged" in capfd.readouterr().out
    assert export(monkeypatch, tmp_path, recipes, "--", "--seed", "5") == 0  # exported again from its last checkpoint
    assert list({row[-2] for row in table(capfd.readouterr().out).values()} - digests) == []


@pytest.mark.slow
def test_a_failed_training_ends_the_work_and_is_noted(recipes, tmp_path, monkeypatch, capfd):
    (tmp_path / "mae_8").mkdir()
    (tmp_path / "mae_8/mine.txt").write_text("precious")
    assert export(monkeypatch, tmp_path, recipes) == 1
    state = json.loads((tmp_path / "export_mae_widths.json").read_text())
    assert state["stages"]["mae_8"].startswith("failed: RuntimeError: the training ended with code")
    assert state["stages"]["mae_12"] == "waiting" and not (tmp_path / "mae_12").exists()
    assert "missing" in capfd.readouterr().out


def test_another_commands_state_is_waited_for(tmp_path, capfd):
    tool = load_tool("export_mae_widths")
    own, other = WorkState(tmp_path / "own.json"), WorkState(tmp_path / "other.json", ("a",))
    done = threading.Timer(0.5, lambda: (other.skip("a"), other.finish()))
    done.start()
    tool.wait_for(tmp_path / "other.json", own, 0.02)
    done.join()
    assert "waiting for" in capfd.readouterr().out and own.now.startswith("waiting for")
    other.run("a", lambda: (_ for _ in ()).throw(ValueError("no disk")))
    with pytest.raises(ValueError, match="that command has failed: a"):
        tool.wait_for(tmp_path / "other.json", own, 0.02)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="is no state file"):
        tool.wait_for(tmp_path / "other.json", own, 0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipes", "none.yaml"], "there is no none.yaml"),
        (["--classifier_steps", "-1"], "--classifier_steps is -1"),
        (["--poll_seconds", "0"], "--poll_seconds is 0"),
    ],
)
def test_refusals(arguments, message, tmp_path, capfd):
    assert run_tool("export_mae_widths", "--output_dir", tmp_path / "out", *arguments) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_default_contracts_are_both_widths(tmp_path, capfd):
    assert run_tool("export_mae_widths", "--output_dir", tmp_path / "out", "--audit") == 1
    rows = table(capfd.readouterr().out)
    assert [(name, row[1]) for name, row in rows.items()] == [("mae_latent_256", "256"), ("mae_latent_640", "640")]
    assert (ROOT / "launch_scripts/mae_latent_640.sh").exists()
