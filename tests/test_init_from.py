"""--init_from: new runs from a run, a checkpoint, an export or the release's folder; what does not fit is refused."""

import json
import shutil

import pytest
import torch
from golden_files import unpack_artifact
from safetensors.torch import load_file
from tiny_runs import generator_arguments, tiny_encoder

from drift_accel import train
from drift_accel.models import Generator
from drift_accel.training.initial_weights import find_initial_weights

TINY = {"input_size": 8, "in_channels": 1, "patch_size": 4, "hidden_size": 8, "depth": 1, "num_heads": 1, "num_classes": 2}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("mae"))


@pytest.fixture(scope="module")
def first(encoder, tmp_path_factory):
    run = tmp_path_factory.mktemp("first") / "run"
    train.main(generator_arguments(encoder, run, "--steps", "3", "--checkpoint.every", "1"))
    return run


def started_from(first, encoder, run, path, monkeypatch) -> dict[str, torch.Tensor]:
    """The weights with which a run from `path` starts, and those of its averages, checked to be equal."""
    seen = {}
    start_state = train.start_state

    def look(task, *rest):
        state = start_state(task, *rest)
        seen.update({name: tensor.detach().clone() for name, tensor in task.model.state_dict().items()})
        assert all(torch.equal(seen[name], value) for name, value in state.averages.averages[0.99].items())
        return state

    monkeypatch.setattr(train, "start_state", look)
    train.main(generator_arguments(encoder, run, "--steps", "1", "--init_from", str(path)))
    return seen


@pytest.mark.parametrize("kind", ["run", "checkpoint", "export"])
def test_a_new_run_starts_from_the_weights_and_records_their_hash(kind, first, encoder, tmp_path, monkeypatch):
    checkpoint, export = first / "checkpoints/step_00000002", first / "exports/ema_0.99"
    path = {"run": first, "checkpoint": checkpoint, "export": export}[kind]
    files = {
        "run": first / "checkpoints/step_00000003/model.safetensors",
        "checkpoint": checkpoint / "model.safetensors",
        "export": export / "diffusion_pytorch_model.safetensors",
    }
    started = started_from(first, encoder, tmp_path / "run", path, monkeypatch)
    wanted = load_file(files[kind])
    assert started.keys() == wanted.keys() and all(torch.equal(started[name], wanted[name]) for name in wanted)
    identity = json.loads((tmp_path / "run/provenance.json").read_text())["identity"]
    assert len(identity["init_from_sha256"]) == 64


def test_a_run_that_has_checkpoints_needs_the_source_no_more(first, encoder, tmp_path):
    source, run = shutil.copytree(first / "exports/ema_0.99", tmp_path / "source"), tmp_path / "run"
    settings = ("--init_from", str(source))
    train.main(generator_arguments(encoder, run, "--steps", "1", *settings))
    shutil.rmtree(source)
    train.main(generator_arguments(encoder, run, "--steps", "2", *settings))
    with pytest.raises(SystemExit, match="init_from: .* -> null"):
        train.main(generator_arguments(encoder, run, "--steps", "3"))


def test_other_weights_under_the_same_path_are_refused_before_the_first_checkpoint(first, encoder, tmp_path):
    source, run = shutil.copytree(first / "checkpoints/step_00000002", tmp_path / "source"), tmp_path / "run"
    settings = ("--steps", "1", "--init_from", str(source))
    train.main(generator_arguments(encoder, run, *settings))
    shutil.rmtree(run / "checkpoints/step_00000001")
    shutil.rmtree(source)
    shutil.copytree(first / "checkpoints/step_00000003", source)
    with pytest.raises(SystemExit, match="init_from_sha256"):
        train.main(generator_arguments(encoder, run, *settings))


def test_another_architecture_is_shown(first, tmp_path):
    settings = json.loads((first / "exports/ema_0.99/config.json").read_text())
    for path in (first, first / "checkpoints/step_00000003", first / "exports/ema_0.99"):
        with pytest.raises(ValueError, match=r"another architecture .*\n  depth: 1 -> 4\n.*Configure the model as it is there"):
            find_initial_weights(str(path), Generator, {**settings, "depth": 4}, tmp_path / "new")


def test_an_official_folder(tmp_path):
    folder = unpack_artifact("generator", tmp_path)
    from drift_accel.models import load_official

    official = load_official(folder)
    found = find_initial_weights(str(folder), Generator, official.config, tmp_path / "new")
    model = Generator(**{name: value for name, value in official.config.items() if name[0] != "_"})
    found.put_into(model)
    assert all(torch.equal(value, official.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="holds a MaskedAutoencoder, but this trains a Generator"):
        find_initial_weights(str(unpack_artifact("mae", tmp_path)), Generator, official.config, tmp_path / "new")


def test_folders_without_weights_and_damaged_ones_are_named(first, tmp_path):
    with pytest.raises(FileNotFoundError, match="init_from .* holds no weights: give a run"):
        find_initial_weights(str(tmp_path), Generator, TINY, tmp_path / "new")
    copy = shutil.copytree(first / "checkpoints/step_00000003", tmp_path / "damaged")
    (copy / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is damaged: .*model\.safetensors"):
        find_initial_weights(str(copy), Generator, TINY, tmp_path / "new")
    empty = shutil.copytree(first, tmp_path / "empty", ignore=shutil.ignore_patterns("step_*"))
    with pytest.raises(ValueError, match="is a run without a complete checkpoint"):
        find_initial_weights(str(empty), Generator, TINY, tmp_path / "new")
    Generator(**TINY).save_pretrained(tmp_path / "broken")
    (tmp_path / "broken/config.json").write_text("{}")
    with pytest.raises(ValueError, match="describes no model"):
        find_initial_weights(str(tmp_path / "broken"), Generator, TINY, tmp_path / "new")
