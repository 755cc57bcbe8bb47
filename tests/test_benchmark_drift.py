"""The benchmark's own arithmetic and output, on problems too small to time."""

import json
import sys

import pytest
from tiny_runs import load_tool

from drift_accel.drift.configuration import BackendError
from drift_accel.drift.loss import require_backend


def built() -> bool:
    try:
        require_backend("fused")
    except BackendError:
        return False
    return True


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_measures_every_backend(tmp_path, monkeypatch, capsys, dtype):
    backends = ["reference", *(["fused"] if built() else [])]
    report = tmp_path / "report.json"
    command = ["benchmark_drift", "--shape", "3", "4", "5", "2", "8", "--shape", "2", "3", "2", "1", "300", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--dtype", dtype, "--backends", *backends, "--report", str(report)])
    load_tool("benchmark_drift").main()
    results = json.loads(report.read_text())
    assert [case["shape"] for case in results["cases"]] == [[3, 4, 5, 2, 8], [2, 3, 2, 1, 300]]
    for case in results["cases"]:
        assert list(case["backends"]) == backends
        for entry in case["backends"].values():
            assert entry["gradient_error"] < 1e-2
            assert entry["median_s"] > case["bound_s"] > 0
    assert "speed-up" in capsys.readouterr().out


@pytest.mark.parametrize("recipe, keys", [("latent_l2", 86), ("latent_b2_ablation", 86), ("pixel_l16", 86 + 13)])
def test_recipes_cover_all_keys(recipe, keys):
    tool = load_tool("benchmark_drift")
    arguments = type("Arguments", (), {"recipe": recipe, "labels": 2, "shape": None})
    cases = tool.cases_of(arguments)
    assert sum(case["count"] for case in cases) == keys
    assert all(case["shape"][0] % 2 == 0 for case in cases)


@pytest.mark.slow
def test_the_compiled_reference_is_the_reference(tmp_path):
    import torch

    from drift_accel import DriftConfig

    tool = load_tool("benchmark_drift")
    tensors = tool.make_problem((3, 4, 5, 2, 8), torch.device("cpu"), torch.float32)
    for wanted, given in zip(
        tool.runner("reference", DriftConfig())(*tensors), tool.runner("compiled", DriftConfig())(*tensors), strict=True
    ):
        torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-6)
