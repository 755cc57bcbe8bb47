"""What the costly metrics cost: python tools/benchmark_metrics.py precision_recall --rows 50000 --dimensions 2048

precision_recall: time and this process's memory at its peak, features included, for as many real as generated features.
frechet: time of our form and of scipy's square root of the product on covariances of full rank, and what they differ by.
Features are drawn from normal distributions: neither time nor memory depends on what they are.
"""

import argparse
import resource
import statistics
import sys
import time

import numpy as np
import torch
from scipy.linalg import sqrtm

from drift_accel.evaluation import frechet_distance, gaussian_statistics, precision_recall

# ru_maxrss counts in kilobytes on Linux and in bytes on macOS.
PEAK_UNIT = 1 if sys.platform == "darwin" else 1024


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metric", choices=("precision_recall", "frechet"))
    parser.add_argument("--rows", type=int, default=50_000, help="features of each set of precision_recall (default: 50000)")
    parser.add_argument("--dimensions", type=int, default=2048, help="of a feature (default: 2048)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of the two Frechet forms (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="of products and eigenvalues (default: 1)")
    arguments = parser.parse_args()
    for name in ("rows", "dimensions", "rounds", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}: give at least 1")
    torch.set_num_threads(arguments.threads)
    try:
        if arguments.metric == "precision_recall":
            measure_precision_recall(arguments.rows, arguments.dimensions)
        else:
            measure_frechet(arguments.dimensions, arguments.rounds)
    except ValueError as error:
        parser.error(str(error))


def measure_precision_recall(rows: int, dimensions: int) -> None:
    """One call, and the most memory that this process has ever had."""
    draws = torch.Generator().manual_seed(0)
    real, generated = (torch.randn(rows, dimensions, generator=draws) for _ in range(2))
    before = peak_memory()
    started, computed = time.perf_counter(), time.process_time()
    precision, recall = precision_recall(real, generated)
    seconds, computed = time.perf_counter() - started, time.process_time() - computed
    print(f"{rows:,} x {rows:,} x {dimensions:,}: {seconds:.1f} s, of these {computed:.1f} s on processors")
    print(f"precision {precision:.4f}, recall {recall:.4f}")
    print(f"peak memory {peak_memory() / 1e9:.2f} GB; before the call, features included, {before / 1e9:.2f} GB")


def measure_frechet(dimensions: int, rounds: int) -> None:
    """Both forms in turn on two well-conditioned Gaussians."""
    random = np.random.default_rng(0)
    # Features whose directions vary by a factor of ten in size, as networks' do, with five rows a dimension.
    scales = np.logspace(-0.5, 0.5, dimensions)
    sets = [random.standard_normal((5 * dimensions, dimensions)) * scales + shift for shift in (0.0, 0.1)]
    gaussians = [value for features in sets for value in gaussian_statistics(features)]
    forms = {"ours": frechet_distance, "scipy": scipy_distance}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    values = {}
    for _ in range(rounds):
        for name, form in forms.items():
            started = time.perf_counter()
            values[name] = form(*gaussians)
            seconds[name].append(time.perf_counter() - started)
    for name, times in seconds.items():
        print(f"{name:<8}{statistics.median(times):8.2f} s (of {rounds}), distance {values[name]:.12g}")
    print(f"relative difference {abs(values['ours'] / values['scipy'] - 1):.1e}")


def scipy_distance(mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray) -> float:
    """The form of the usual evaluation code: the trace of scipy's square root of A B."""
    root = sqrtm(covariance_a @ covariance_b)
    difference = mean_a - mean_b
    return float(difference @ difference + np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.trace(root.real))


def peak_memory() -> int:
    """Bytes that this process has had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * PEAK_UNIT


if __name__ == "__main__":
    main()
