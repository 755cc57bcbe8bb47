"""50,000 samples through the extraction and back: memory does not grow with the set."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
SAMPLES, LIMIT = 50_000, 2e9  # bytes
WIDTHS = {"first": 4096, "second": 8192}  # 2.46 GB in all, more than the limit


class Counters:
    """Labelled rows whose only number is their own index."""

    is_sampled_at_read = False
    class_names = tuple(map(str, range(10)))

    def __init__(self):
        self.labels = np.arange(SAMPLES) % 10

    def __len__(self) -> int:
        return SAMPLES

    def rows(self, indices):
        return (np.asarray(indices, dtype=np.float32) / SAMPLES)[:, None, None, None] * np.ones((1, 1, 2, 2), np.float32)


class Widths(nn.Module):
    """An encoder whose maps are the row's number times different factors."""

    input_space, in_channels, map_names = "pixel", 1, tuple(WIDTHS)
    default_features = map_names

    def feature_maps(self, images, names=None):
        return {
            name: images[:, :, :1, :1] * torch.arange(1, WIDTHS[name] + 1).reshape(1, -1, 1, 1) for name in names or WIDTHS
        }  # fmt: skip


def extract_and_read(folder: Path, storage: str) -> None:
    """In a process of its own: write the set, read it back, print what it took."""
    from drift_accel.analysis.activations.extraction import ActivationExtraction, ExtractionConfig
    from drift_accel.analysis.activations.models import EncoderModel
    from drift_accel.analysis.activations.sources import RowSource
    from drift_accel.analysis.activations.store import ActivationSet

    torch.set_num_threads(1)
    model = EncoderModel(Widths(), {"kind": "test"}, "cpu")
    source = RowSource(Counters(), "counters", {}, is_latent=False)
    config = ExtractionConfig(
        layers=tuple(WIDTHS), storage=storage, pictures="none", dtype="float32" if storage == "arrow" else "float16"
    )
    started = time.monotonic()
    ActivationExtraction(folder, "set", source, np.arange(SAMPLES), model, config).run(log=lambda message: None)
    written = time.monotonic()
    opened = ActivationSet.open(folder, "set")
    worst = 0.0
    for layer, width in WIDTHS.items():
        start = 0
        for rows in opened.iterate(layer):
            expected = np.arange(start, start + len(rows), dtype=np.float64) / SAMPLES * width
            worst = max(worst, float(np.abs(rows[:, -1] - expected).max()) / width)
            start += len(rows)
        assert start == SAMPLES
    read = time.monotonic()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{storage} {peak} {worst} {size / 1e9:.2f} GB, {SAMPLES / (written - started):.0f} samples/s written, "
          f"{SAMPLES / (read - written):.0f} samples/s read (both layers)")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["arrow", "npz"])
def test_fifty_thousand_samples_stay_below_two_gigabytes(storage, tmp_path):
    code = (
        f"import test_activation_memory as t; from pathlib import Path; t.extract_and_read(Path({str(tmp_path)!r}), {storage!r})"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    name, peak, worst, *rates = result.stdout.split()
    print(f"{storage}: peak {float(peak) / 1e9:.2f} GB; {' '.join(rates)}")
    assert float(peak) < LIMIT
    assert float(worst) < (1e-6 if storage == "arrow" else 1e-3)
