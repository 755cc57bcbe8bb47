"""`python -m drift_accel.doctor`: what it says of a good installation and of the ways in which one is not."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import drift_accel
from drift_accel import doctor
from drift_accel.drift import ops

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def found(monkeypatch):
    """Examine with a library as it was found: call it with Extension's arguments, or without for the real one."""
    monkeypatch.delenv(ops.BACKEND_VARIABLE, raising=False)

    def examine(*extension):
        if extension:
            for module in (doctor, ops):
                monkeypatch.setattr(module, "load_extension", lambda: ops.Extension(*extension))
        ops._decide.cache_clear()
        return doctor.examine()

    yield examine
    ops._decide.cache_clear()


def text(report):
    return "\n".join(report.lines + report.problems)


INFO = {
    "version": "9.9",
    "source_hash": "0123456789abcdef",
    "torch": "2.99",
    "cuda": True,
    "cuda_architectures": "8.0;9.0+PTX",
    "compiler": "gcc 12",
    "openmp": True,
    "cpu_instructions": "avx2",
}


def test_the_command_ends_well_and_says_what_is_there():
    result = subprocess.run([sys.executable, "-m", "drift_accel.doctor"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    for word in (drift_accel.__version__, torch.__version__.partition("+")[0], metadata.version("accelerate"), "drift on cpu"):
        assert word in result.stdout
    assert result.stdout.endswith("drift_accel can be used\n")


def test_a_built_library_is_described_and_chosen(found):
    report = found(INFO, None)
    assert not report.fatal
    for fact in ("9.9", "0123456789abcdef", "2.99", "8.0;9.0+PTX", "gcc 12", "avx2", "fused, because it is built"):
        assert fact in text(report)


def test_a_library_that_is_not_built_is_a_problem_with_its_remedy_and_not_fatal(found, monkeypatch):
    obstacle = f"it is not built; build it: {ops.BUILD_COMMAND}"
    report = found(None, obstacle)
    assert not report.fatal
    assert f"the fused op is not used: {obstacle}" in report.problems
    assert f"reference, because {obstacle}" in text(report)
    assert not any("compiler" in problem for problem in report.problems) or not os.access("/usr/bin/c++", os.X_OK)
    monkeypatch.setenv("PATH", "")
    assert any("no C++ compiler" in problem for problem in found(None, obstacle).problems)


def test_a_stale_library_and_one_without_openmp_are_problems(found):
    report = found({**INFO, "openmp": False, "cuda": False}, "it is stale (built from sources 1, csrc is 2); build it again")
    assert not report.fatal
    assert any("stale" in problem for problem in report.problems)
    assert any("one core" in problem for problem in report.problems)
    assert "not built" in text(report)


def test_a_backend_of_the_environment_is_the_reason_or_the_problem(found, monkeypatch):
    monkeypatch.setenv(ops.BACKEND_VARIABLE, "reference")
    report = found()
    assert f"reference, because {ops.BACKEND_VARIABLE} asks for it" in text(report) and not report.fatal
    monkeypatch.setenv(ops.BACKEND_VARIABLE, "fastest")
    report = found()
    assert report.fatal and any("fastest" in problem for problem in report.problems)
    monkeypatch.setenv(ops.BACKEND_VARIABLE, "fused")
    report = found(None, "it is not built; build it")
    assert report.fatal and any("cannot be used: it is not built" in problem for problem in report.problems)


def test_a_missing_package_is_fatal(found, monkeypatch):
    version = metadata.version

    def without_accelerate(package):
        if package == "accelerate":
            raise metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(metadata, "version", without_accelerate)
    report = found()
    assert report.fatal and any(problem.startswith("accelerate is not installed: pip install") for problem in report.problems)


def test_an_old_torch_is_fatal(found, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    report = found(INFO, None)
    assert report.fatal and any("2.10.1+cpu is too old: install torch 2.11" in problem for problem in report.problems)


def test_variables_that_matter_are_shown(found, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert any(line.split() == ["OMP_NUM_THREADS", "7"] for line in found().lines)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert not any("OMP_NUM_THREADS" in line for line in found().lines)


def test_the_exit_code_says_whether_it_can_be_used(monkeypatch, capsys):
    report = doctor.Report()
    monkeypatch.setattr(doctor, "examine", lambda: report)
    assert doctor.main() == 0
    report.problem("something", "mend it")
    assert doctor.main() == 0
    report.problem("something worse", "mend it", fatal=True)
    assert doctor.main() == 1
    assert "problem: something worse: mend it\n" in capsys.readouterr().out
