"""tools/benchmark_metrics.py: what it prints, and (slow) the memory of precision and recall with many features."""

import re
import subprocess
import sys

import pytest
from tiny_runs import ROOT, run_tool


def test_it_measures_both(capsys):
    assert run_tool("benchmark_metrics", "precision_recall", "--rows", 60, "--dimensions", 5) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("60 x 60 x 5: ") and re.search(r"peak memory \d+\.\d\d GB", printed)
    assert run_tool("benchmark_metrics", "frechet", "--dimensions", 24, "--rounds", 1) == 0
    difference = float(re.search(r"relative difference (\S+)", capsys.readouterr().out)[1])
    assert difference < 1e-9


def test_impossible_sizes_are_refused(capsys):
    assert run_tool("benchmark_metrics", "precision_recall", "--rows", 0) == 2
    assert "--rows is 0" in capsys.readouterr().err
    assert run_tool("benchmark_metrics", "precision_recall", "--rows", 3, "--dimensions", 2) == 2
    assert "needs at least 4" in capsys.readouterr().err


@pytest.mark.slow
def test_twenty_thousand_features_stay_far_below_their_distances():
    """The distances of 20,000 to 20,000 take 3.2 GB; a process of its own, because a peak never falls again."""
    sizes = ["--rows", "20000", "--dimensions", "64"]
    command = [sys.executable, str(ROOT / "tools/benchmark_metrics.py"), "precision_recall", *sizes]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peak, before = map(float, re.search(r"peak memory (\S+) GB; .* (\S+) GB", printed).groups())
    assert peak - before < 1.2
