"""The drifting loss on points in the plane: two modes from three bad starts, a checkerboard, a Swiss roll.

    python tools/toy2d.py                         all cases, about three minutes on two CPU cores
    python tools/toy2d.py --cases swiss_roll --quick

A small network maps noise [G, 2] to points [G, 2]; the points themselves are the features of one problem (B = 1, S = 2).
Writes evolution.png, evolution.gif and results.json into the output directory. The same seed gives the same samples.
"""

import argparse
import io
import math
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from drift_accel import DriftConfig, drift_loss
from drift_accel.foundation.progress import Progress
from drift_accel.foundation.provenance import package_versions
from drift_accel.foundation.random_streams import normal_draws, random_stream
from drift_accel.foundation.storage import atomic_write_bytes, atomic_write_json

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

# The widest kernel moves samples that start far from every target; the narrow ones draw the details.
TEMPERATURES = (0.05, 0.2, 1.0)
NUM_GENERATED = NUM_POSITIVES = 256
NOISE_DIM = 2  # as many as the plane has: with more, nearby points come from unrelated noise and the details blur
WIDTH, HIDDEN_LAYERS = 256, 4
LEARNING_RATE, WARM_UP_STEPS, LAST_RATE = 2e-3, 50, 0.02  # cosine from the first rate to LAST_RATE times it
STEPS, QUICK_STEPS = 2500, 300
EVALUATION_POINTS, PICTURE_POINTS = 4096, 1500
NUM_DIRECTIONS, NUM_FLOOR_PAIRS = 128, 8
PICTURE_FRACTIONS = (0.0, 0.01, 0.04, 0.12, 0.4, 1.0)  # of the steps: most happens early
GIF_FRAMES, GIF_MILLISECONDS, GIF_BLENDS = 40, 90, 7
GREY, COLOUR = "#c4c8cf", "#d1495b"

MODE_CENTRES = np.array([[-2.0, 0.0], [2.0, 0.0]])
MODE_DEVIATION = 0.3
MODE_RADIUS = 4 * MODE_DEVIATION  # a sample farther away from both centres belongs to no mode


def two_modes(generator: np.random.Generator, num_points: int) -> np.ndarray:
    """Return [num_points, 2] from two equal Gaussians."""
    modes = generator.integers(2, size=num_points)
    return MODE_CENTRES[modes] + MODE_DEVIATION * generator.standard_normal((num_points, 2))


def checkerboard(generator: np.random.Generator, num_points: int) -> np.ndarray:
    """Return [num_points, 2] from the eight dark unit squares of a 4 x 4 board on [-2, 2]^2."""
    squares = generator.integers(8, size=num_points)
    columns = squares // 2
    rows = 2 * (squares % 2) + columns % 2
    return np.stack([columns, rows], axis=1) + generator.random((num_points, 2)) - 2.0


def swiss_roll(generator: np.random.Generator, num_points: int) -> np.ndarray:
    """Return [num_points, 2] from a noisy spiral of one and a half turns, about 4.5 wide."""
    angles = 1.5 * math.pi * (1 + 2 * generator.random(num_points))
    spiral = angles[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1) / 6
    return spiral + 0.04 * generator.standard_normal((num_points, 2))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A target and where the generated points start."""

    title: str
    target: Callable[[np.random.Generator, int], np.ndarray]
    start: tuple[float, float] = (0.0, 0.0)
    """Mean of the first generated points."""
    start_deviation: float = 0.3
    """Their standard deviation."""


CASES = {
    "two_modes_middle": Case(title="two modes:\nstart between", target=two_modes),
    "two_modes_far": Case(title="two modes:\nstart far away", target=two_modes, start=(5.0, 3.5)),
    "two_modes_collapsed": Case(title="two modes:\nstart on one", target=two_modes, start=(-2.0, 0.0), start_deviation=0.1),
    "checkerboard": Case(title="checkerboard", target=checkerboard),
    "swiss_roll": Case(title="Swiss roll", target=swiss_roll),
}


@dataclass
class Evolution:
    """What a training run leaves: the fixed real points, the generated ones at some steps, and the drift's size."""

    real: np.ndarray
    generated: dict[int, np.ndarray] = field(default_factory=dict)
    drift_sqnorm: dict[int, dict[str, float]] = field(default_factory=dict)


class PointGenerator(nn.Module):
    """Noise [G, 2] to points [G, 2]: an MLP beside an affine map, which alone decides where the points start."""

    def __init__(self, seed: int, start: tuple[float, float], start_deviation: float):
        super().__init__()
        weights = torch.Generator().manual_seed(seed)
        sizes = [NOISE_DIM, *[WIDTH] * HIDDEN_LAYERS, 2]
        layers = []
        for inputs, outputs in zip(sizes, sizes[1:], strict=False):
            linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
            nn.init.normal_(linear.weight, std=math.sqrt(2 / inputs), generator=weights)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.SiLU()]
        # Offsets of the first layer spread the bends over the noise; without them every bend passes through the origin.
        nn.init.uniform_(layers[0].bias, -1.0, 1.0, generator=weights)
        self.mlp = nn.Sequential(*layers[:-1])
        nn.init.zeros_(self.mlp[-1].weight)
        self.offset = nn.Parameter(torch.tensor(start))
        self.scale = nn.Parameter(torch.tensor(start_deviation))

    def forward(self, noise: Tensor) -> Tensor:
        """Map noise [G, 2] to points [G, 2]."""
        return self.offset + self.scale * noise + self.mlp(noise)


def noise_at(seed: int, stream: str, step: int, num_points: int) -> Tensor:
    """Return noise [num_points, NOISE_DIM] that depends on the arguments alone."""
    return torch.from_numpy(normal_draws(seed, stream, step, [0], (num_points, NOISE_DIM))[0])


def train(name: str, seed: int, steps: int, snapshots: set[int], progress: Progress) -> Evolution:
    """Train one case from scratch and return its evolution; `snapshots` are steps, 0 the start and `steps` the end."""
    case = CASES[name]
    network = PointGenerator(seed, case.start, case.start_deviation)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    config = DriftConfig(temperatures=TEMPERATURES)
    evolution = Evolution(real=case.target(random_stream(seed, f"toy_real/{name}", 0), EVALUATION_POINTS))
    evaluation_noise = noise_at(seed, "toy_evaluation", 0, EVALUATION_POINTS)
    for step in range(steps + 1):
        if step in snapshots:
            with torch.no_grad():
                evolution.generated[step] = network(evaluation_noise).numpy()
        if step == steps:
            break
        positives = case.target(random_stream(seed, f"toy_target/{name}", step), NUM_POSITIVES)
        generated = network(noise_at(seed, "toy_noise", step, NUM_GENERATED))  # [G, 2]
        result = drift_loss(generated[None], torch.from_numpy(positives).float()[None], config=config)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.zero_grad()
        result.loss.mean().backward()
        optimizer.step()
        if step in snapshots or step == steps - 1:
            evolution.drift_sqnorm[step] = {str(tau): value.item() for tau, value in result.drift_sqnorm.items()}
        # The loss is nearly constant by construction; the squared norm of the drift is what falls.
        shown = {"case": name, "drift": result.drift_sqnorm[TEMPERATURES[-1]].item()} if step % 50 == 0 else {}
        progress.update(**shown)
    return evolution


def learning_rate(step: int, steps: int) -> float:
    """Return the rate of a step: linear warm-up, then half a cosine down to LAST_RATE of the first."""
    cosine = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / steps))
    return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * cosine


def sliced_wasserstein(points_a: np.ndarray, points_b: np.ndarray) -> float:
    """Return the mean 1-Wasserstein distance of two sets [N, 2] of equal size over directions of the half circle."""
    angles = math.pi * np.arange(NUM_DIRECTIONS) / NUM_DIRECTIONS
    directions = np.stack([np.cos(angles), np.sin(angles)])  # [2, directions]
    return float(np.abs(np.sort(points_a @ directions, axis=0) - np.sort(points_b @ directions, axis=0)).mean())


def mode_shares(points: np.ndarray) -> list[float]:
    """Return the share of points [N, 2] within MODE_RADIUS of each mode's centre."""
    distances = np.linalg.norm(points[:, None] - MODE_CENTRES[None], axis=2)  # [N, modes]
    return (distances <= MODE_RADIUS).mean(axis=0).tolist()


def measure(name: str, seed: int, evolution: Evolution) -> dict:
    """Return the numbers of one case: distances to the target before and after, their floor, shares of the modes."""
    target, steps = CASES[name].target, sorted(evolution.generated)
    first, last = (evolution.generated[step] for step in (steps[0], steps[-1]))
    pairs = [
        [target(random_stream(seed, f"toy_floor/{name}", 2 * pair + side), EVALUATION_POINTS) for side in (0, 1)]
        for pair in range(NUM_FLOOR_PAIRS)
    ]
    before, after = sliced_wasserstein(first, evolution.real), sliced_wasserstein(last, evolution.real)
    return {
        "steps": steps[-1],
        "mode_shares": mode_shares(last) if target is two_modes else None,
        "sliced_wasserstein_before": before,
        "sliced_wasserstein_after": after,
        "sliced_wasserstein_fall": before / after,
        "sliced_wasserstein_floor": float(np.mean([sliced_wasserstein(*pair) for pair in pairs])),
        "num_points": EVALUATION_POINTS,
        "drift_sqnorm": evolution.drift_sqnorm,
    }


def axis_limits(evolution: Evolution) -> np.ndarray:
    """Return [[x low, x high], [y low, y high]] that hold the target and where the generated points start."""
    shown = np.concatenate([evolution.real, evolution.generated[0]])
    low, high = shown.min(axis=0), shown.max(axis=0)
    # The modes lie on a line: their panels need not be square, but some room is left above and below.
    half = np.maximum(high - low, 0.5 * (high - low).max()) / 2 + 0.05 * (high - low).max()
    return np.stack([(low + high) / 2 - half, (low + high) / 2 + half], axis=1)


def panel_height(evolution: Evolution) -> float:
    """Return the height of a panel in units of its width."""
    widths = np.ptp(axis_limits(evolution), axis=1)
    return float(widths[1] / widths[0])


def draw_panel(axis, evolution: Evolution, step: int, point_size: float) -> None:
    """Draw the target in grey and, over it, the points generated at a step."""
    axis.scatter(*evolution.real[:PICTURE_POINTS].T, s=point_size, c=GREY, linewidths=0)
    axis.scatter(*evolution.generated[step][:PICTURE_POINTS].T, s=point_size, c=COLOUR, linewidths=0, alpha=0.75)
    limits_x, limits_y = axis_limits(evolution)
    axis.set(xlim=limits_x, ylim=limits_y, xticks=[], yticks=[], aspect="equal")
    for spine in axis.spines.values():
        spine.set_color("#d8dade")


def save_picture(path: Path, evolutions: dict[str, Evolution], steps: list[int]) -> None:
    """Write the still: one row a case, one column a step."""
    heights = [panel_height(evolution) for evolution in evolutions.values()]
    figure, axes = plt.subplots(
        len(evolutions), len(steps), squeeze=False, height_ratios=heights, layout="constrained",
        figsize=(1.75 * len(steps) + 0.4, 1.8 * sum(heights) + 0.4),
    )  # fmt: skip
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03, wspace=0.01, hspace=0.01)
    for row, (name, evolution) in zip(axes, evolutions.items(), strict=True):
        row[0].set_ylabel(CASES[name].title, fontsize=8.5)
        for axis, step in zip(row, steps, strict=True):
            draw_panel(axis, evolution, step, point_size=2.2)
    for axis, step in zip(axes[0], steps, strict=True):
        axis.set_title("start" if step == 0 else f"step {step:,}", fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130, metadata={"Software": None})
    plt.close(figure)
    atomic_write_bytes(path, picture.getvalue())


def save_animation(path: Path, evolutions: dict[str, Evolution], steps: list[int]) -> None:
    """Write the animation: all cases side by side, one frame a step, the last one held."""
    widths = [1 / panel_height(evolution) for evolution in evolutions.values()]
    palette, frames = gif_palette(), []
    for step in steps:
        figure, axes = plt.subplots(
            1, len(evolutions), squeeze=False, width_ratios=widths, figsize=(1.3 * sum(widths), 1.75), layout="constrained"
        )
        for axis, (name, evolution) in zip(axes[0], evolutions.items(), strict=True):
            draw_panel(axis, evolution, step, point_size=1.6)
            axis.set_title(CASES[name].title.replace("\n", " "), fontsize=7.5)
        axes[0, 0].set_xlabel(f"step {step:,}", fontsize=8, loc="left")
        figure.canvas.draw()
        frame = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
        # One palette for all frames: they would flicker with one each.
        frames.append(frame.quantize(palette=palette, dither=Image.Dither.NONE))
        plt.close(figure)
    durations = [600, *[GIF_MILLISECONDS] * (len(frames) - 2), 2500] if len(frames) > 1 else [2500]
    animation = io.BytesIO()
    frames[0].save(animation, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)
    atomic_write_bytes(path, animation.getvalue())


def gif_palette() -> Image.Image:
    """Return an image whose palette holds the colours of a panel and the blends at their edges."""
    colours = {name: np.array(matplotlib.colors.to_rgb(name)) for name in ("white", "black", GREY, COLOUR)}
    pairs = [("white", "black"), ("white", GREY), ("white", COLOUR), (GREY, COLOUR)]
    blends = [np.linspace(colours[first], colours[second], GIF_BLENDS) for first, second in pairs]
    palette = Image.new("P", (1, 1))
    palette.putpalette((np.concatenate(blends) * 255).round().astype(np.uint8).tobytes())
    return palette


def snapshot_steps(steps: int) -> tuple[list[int], list[int]]:
    """Return the steps of the still's columns and of the animation's frames, both with the start and the end."""
    columns = sorted({round(fraction * steps) for fraction in PICTURE_FRACTIONS})
    frames = sorted({round(steps * (frame / (GIF_FRAMES - 1)) ** 2.5) for frame in range(GIF_FRAMES)})
    return columns, frames


def run(cases: list[str], steps: int, seed: int, output_dir: Path, show_progress: bool = True) -> dict[str, dict]:
    """Train the named cases, write the pictures and results.json into output_dir, and return the results by case."""
    columns, frames = snapshot_steps(steps)
    evolutions, results = {}, {}
    with Progress(len(cases) * steps, description="toy2d", enabled=show_progress) as progress:
        for name in cases:
            evolutions[name] = train(name, seed, steps, {*columns, *frames}, progress)
            results[name] = measure(name, seed, evolutions[name])
    save_picture(output_dir / "evolution.png", evolutions, columns)
    save_animation(output_dir / "evolution.gif", evolutions, frames)
    versions = {"python": platform.python_version(), **package_versions(("torch", "numpy", "matplotlib", "pillow"))}
    record = {
        "command": shlex.join(sys.argv), "seed": seed, "temperatures": TEMPERATURES, "versions": versions, "cases": results,
    }  # fmt: skip
    atomic_write_json(output_dir / "results.json", _with_text_keys(record))
    return results


def _with_text_keys(value):
    """JSON knows text keys only; the drift is recorded by step."""
    return {str(key): _with_text_keys(item) for key, item in value.items()} if isinstance(value, dict) else value


def print_table(results: dict[str, dict]) -> None:
    """Print one line a case."""
    print(f"{'case':<20} {'modes %':>11}   sliced-Wasserstein: {'before':>7} {'after':>7} {'floor':>7} {'fall':>6}")
    for name, result in results.items():
        shares = " : ".join(f"{100 * share:.0f}" for share in result["mode_shares"] or []) or "-"
        numbers = [result[f"sliced_wasserstein_{key}"] for key in ("before", "after", "floor")]
        distances = " ".join(f"{number:>7.4f}" for number in numbers)
        print(f"{name:<20} {shares:>11} {'':>21} {distances} {result['sliced_wasserstein_fall']:>5.1f}x")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="which to run (all)")
    parser.add_argument("--steps", type=int, help=f"optimiser steps a case ({STEPS}; {QUICK_STEPS} with --quick)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, noise and targets (0)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/toy2d"), help="where to write (runs/toy2d)")
    parser.add_argument("--quick", action="store_true", help="few steps: a look, not the numbers")
    parsed = parser.parse_args(arguments)
    if parsed.steps is None:
        parsed.steps = QUICK_STEPS if parsed.quick else STEPS
    if parsed.steps < 1:
        parser.error(f"--steps must be at least 1, got {parsed.steps}")
    return parsed


if __name__ == "__main__":
    options = parse_arguments()
    print_table(run(options.cases, options.steps, options.seed, options.output_dir))
    print(f"written: {options.output_dir}/evolution.png, evolution.gif, results.json")
