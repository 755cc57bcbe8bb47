"""foundation.provenance: what made a result, without failing where something cannot be found out."""

import json
import os
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy
import pytest
import torch

import drift_accel
from drift_accel.foundation import provenance
from drift_accel.foundation.provenance import (
    collect_provenance,
    git_state,
    hash_configuration,
    package_hash,
    package_versions,
)

REPOSITORY = Path(__file__).resolve().parent.parent


def git(folder, *arguments):
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path):
    try:
        git(tmp_path, "init")
    except OSError:
        pytest.skip("git is not installed")
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("one = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    return package


def test_the_record_is_complete_and_json():
    record = collect_provenance(command=["train", Path("config.yaml")], configuration_hash="abc")
    assert json.loads(json.dumps(record)) == record
    assert record["command"] == ["train", "config.yaml"]
    assert record["configuration_hash"] == "abc"
    assert record["package_version"] == drift_accel.__version__
    assert record["package_hash"] == package_hash()
    assert record["versions"]["numpy"] == numpy.__version__
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record["torch_build"] == torch.__version__
    assert record["num_processes"] == 1
    assert len(record["devices"]) == torch.cuda.device_count()
    assert {"git", "python", "platform", "hostname"} <= record.keys()
    assert abs(datetime.fromisoformat(record["time"]) - datetime.now(timezone.utc)) < timedelta(minutes=5)
    assert os.getcwd() not in json.dumps(record)


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from drift_accel.foundation.provenance import collect_provenance;"
        "collect_provenance(command=[]);heavy = {'torch', 'diffusers', 'datasets', 'pyarrow'} & sys.modules.keys();"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert result.returncode == 0, result.stderr


def test_the_number_of_processes_before_torch_distributed_starts(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert collect_provenance(command=[])["num_processes"] == 4


def test_versions_of_missing_packages_are_none():
    assert package_versions(["numpy", "no-such-package-anywhere"]) == {
        "numpy": numpy.__version__,
        "no-such-package-anywhere": None,
    }


def test_package_hash_sees_names_and_contents_of_sources_only(tmp_path):
    (tmp_path / "room").mkdir()
    (tmp_path / "a.py").write_text("a")
    (tmp_path / "room" / "b.cu").write_text("b")
    hashes = [package_hash(tmp_path)]
    (tmp_path / "a.pyc").write_text("ignored")
    assert package_hash(tmp_path) == hashes[0]
    (tmp_path / "a.py").write_text("A")
    hashes.append(package_hash(tmp_path))
    (tmp_path / "a.py").rename(tmp_path / "c.py")
    hashes.append(package_hash(tmp_path))
    (tmp_path / "room" / "b.cu").write_text("")
    hashes.append(package_hash(tmp_path))
    assert len(set(hashes)) == 4


def test_git_commit_and_dirty_state(checkout):
    clean = git_state(checkout)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (checkout / "untracked.txt").write_text("a run folder")
    assert git_state(checkout) == clean
    (checkout / "__init__.py").write_text("one = 2\n")
    assert git_state(checkout) == {"commit": clean["commit"], "dirty": True}


def test_a_package_that_the_surrounding_checkout_does_not_track_has_no_git_state(checkout):
    installed = checkout.parent / "site-packages" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert git_state(installed) is None


def test_without_git_nothing_fails(monkeypatch, tmp_path):
    assert git_state(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(REPOSITORY / "drift_accel") is None
    assert collect_provenance(command=[])["git"] is None

    def too_slow(*_, **__):
        raise subprocess.TimeoutExpired("git", 10)

    monkeypatch.setattr(provenance.subprocess, "run", too_slow)
    assert git_state(REPOSITORY / "drift_accel") is None


def test_hash_of_a_configuration():
    first = hash_configuration({"a": 1, "b": {"c": (1, 2), "d": Path("x")}})
    assert first == hash_configuration({"b": {"d": "x", "c": [1, 2]}, "a": 1})
    assert first != hash_configuration({"b": {"d": "x", "c": [2, 1]}, "a": 1})
    assert hash_configuration({"a": float("inf")}) != hash_configuration({"a": None})
    with pytest.raises(TypeError, match=r"configuration\.a"):
        hash_configuration({"a": object()})
