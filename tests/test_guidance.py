"""Guidance: its distribution, the weight it gives the negatives, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from dense_evaluation import assert_close, dense_guidance, dense_negative_weight

from drift_accel.drift import GuidanceConfig, draw_guidance, negative_weight
from drift_accel.foundation.random_streams import uniform_draws
from drift_accel.training.monitoring import drawn_values

GOLDENS = Path(__file__).parent / "goldens" / "guidance.npz"


def grid(count=257):
    """Uniform draws from 0 to just under 1, and draws that never skip."""
    u = np.linspace(0.0, np.nextafter(1.0, 0.0), count)
    return u, np.full(count, np.nextafter(1.0, 0.0))


def distribution_by_quadrature(draws, minimum, maximum, power):
    """F(a) of the density proportional to a^-power, by Simpson's rule: nothing is inverted here."""

    def integral(upper):
        a = np.linspace(minimum, upper, 4001)
        weights = np.ones(4001)
        weights[1:-1:2], weights[2:-1:2] = 4, 2
        return (weights * a**-power).sum() * (upper - minimum) / 4000 / 3

    whole = integral(maximum)
    return np.array([integral(a) / whole for a in draws])


def test_agrees_with_the_release():
    """Three recorded steps: power 3 on [1, 4], three labels in ten without guidance."""
    with np.load(GOLDENS) as archive:
        uniforms, recorded = archive["uniforms"], archive["guidance_scale"]
    config = GuidanceConfig(power=3.0, no_guidance_fraction=0.3)
    for step in range(len(uniforms)):
        draws = draw_guidance(config, uniforms[step, 0], uniforms[step, 1])
        assert_close(f"step {step}", draws, recorded[step], relative=1e-6)
        dense = dense_guidance(*uniforms[step], 1.0, 4.0, 3.0, 0.3)
        assert_close(f"step {step}, dense evaluation", dense, recorded[step], relative=1e-6)
    assert (recorded == 1.0).any() and (recorded > 1.0).any()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 1.0 + 1e-6, 2.0, 3.0, 5.0, -1.0])
@pytest.mark.parametrize("limits", [(1.0, 4.0), (1.5, 2.0), (1.0, 40.0)])
def test_power_follows_its_distribution(power, limits):
    u, no_skip = grid()
    minimum, maximum = limits
    draws = draw_guidance(GuidanceConfig(minimum=minimum, maximum=maximum, power=power), u, no_skip)
    assert draws.dtype == np.float64
    assert draws.min() >= minimum and draws.max() <= maximum
    assert np.all(np.diff(draws) >= 0)
    dense = dense_guidance(u, no_skip, minimum, maximum, power, 0.0)
    assert_close("draws", draws, dense, relative=1e-12 if abs(power - 1) > 1e-3 or power == 1 else 1e-9)
    cumulative = distribution_by_quadrature(draws, minimum, maximum, power)
    assert_close("distribution function", cumulative, u, relative=1e-5, absolute=1e-6)


def test_uniform_mode_is_power_zero():
    u, no_skip = grid()
    draws = draw_guidance(GuidanceConfig(mode="uniform", minimum=1.5, maximum=3.5, power=7.0), u, no_skip)
    assert_close("draws", draws, 1.5 + 2.0 * u, relative=1e-12)


def test_mixed_mode_is_power_with_half_of_the_labels_unguided():
    u, _ = grid()
    skip = np.random.default_rng(0).uniform(size=len(u))
    draws = draw_guidance(GuidanceConfig(mode="mixed", power=3.0), u, skip)
    assert_close("draws", draws, dense_guidance(u, skip, 1.0, 4.0, 3.0, 0.5), relative=1e-12)


@pytest.mark.parametrize("mode", ["power", "uniform"])
def test_modes_without_a_fraction_guide_every_label(mode):
    u, _ = grid()
    draws = draw_guidance(GuidanceConfig(mode=mode, minimum=2.0), u, np.zeros_like(u))
    assert draws.min() >= 2.0


@pytest.mark.parametrize("mode", ["power", "uniform", "mixed"])
@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_no_guidance_fraction_is_strictly_below(mode, fraction):
    """One where the draw is below the fraction: never at fraction 0, always at fraction 1, also under the minimum."""
    skip = np.array([0.0, 0.1, np.nextafter(0.25, 0.0), 0.25, 0.7, np.nextafter(1.0, 0.0)])
    u = np.full_like(skip, 0.5)
    config = GuidanceConfig(mode=mode, minimum=2.0, no_guidance_fraction=fraction)
    draws = draw_guidance(config, u, skip)
    assert np.array_equal(draws == 1.0, skip < fraction)


@pytest.mark.parametrize("value", [1.0, 2.5])
@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
def test_equal_limits_give_that_value(value, power):
    u, no_skip = grid()
    draws = draw_guidance(GuidanceConfig(minimum=value, maximum=value, power=power), u, no_skip)
    assert np.all(draws == value)


@pytest.mark.parametrize("power", [0.0, 1.0, 3.0, 5.0])
def test_draw_of_zero_is_exactly_the_minimum(power):
    """a = 1 has to be exact: it is what makes the weight of the negatives zero."""
    draws = draw_guidance(GuidanceConfig(power=power), np.zeros(1), np.full(1, 0.9))
    assert draws[0] == 1.0


def test_float32_draws_and_any_shape_are_taken():
    u = np.random.default_rng(1).uniform(size=(2, 3)).astype(np.float32)
    draws = draw_guidance(GuidanceConfig(), u, np.full((2, 3), 0.5, dtype=np.float32))
    assert draws.shape == (2, 3) and draws.dtype == np.float64
    assert_close("draws", draws, dense_guidance(u, u + 1, 1.0, 4.0, 3.0, 0.0), relative=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_generated, num_negatives", [(64, 16), (6, 4), (2, 1)])
def test_negative_weight(dtype, num_generated, num_negatives):
    a = torch.tensor([1.0, 1.1, 2.0, 4.0], dtype=dtype)
    w = negative_weight(a, num_generated, num_negatives)
    assert w.dtype == dtype and w.shape == a.shape
    assert w[0] == 0.0
    expected = dense_negative_weight(a.double().numpy(), num_generated, num_negatives)
    assert_close("weight", w.double().numpy(), expected, relative=10 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"mode": "strong"}, ("mode", "strong", "power")),
        ({"minimum": 0.5}, ("minimum", "0.5")),
        ({"minimum": float("nan")}, ("minimum", "nan")),
        ({"minimum": 3.0, "maximum": 2.0}, ("maximum", "2.0")),
        ({"maximum": float("inf")}, ("maximum", "inf")),
        ({"maximum": float("nan")}, ("maximum", "nan")),
        ({"no_guidance_fraction": -0.1}, ("no_guidance_fraction", "-0.1")),
        ({"no_guidance_fraction": 1.5}, ("no_guidance_fraction", "1.5")),
        ({"no_guidance_fraction": float("nan")}, ("no_guidance_fraction", "nan")),
        ({"power": float("nan")}, ("power", "nan")),
    ],
)
def test_bad_configuration_is_refused(options, words):
    with pytest.raises(ValueError) as refusal:
        GuidanceConfig(**options)
    for word in words:
        assert word in str(refusal.value), f"the refusal does not say {word!r}: {refusal.value}"


@pytest.mark.parametrize("num_generated, num_negatives", [(6, 0), (1, 4), (1, 0)])
def test_guidance_without_a_defined_weight_is_refused(num_generated, num_negatives):
    with pytest.raises(ValueError, match="conditioning_only"):
        GuidanceConfig(maximum=4.0).check_counts(num_generated, num_negatives)
    GuidanceConfig(maximum=4.0, conditioning_only=True).check_counts(num_generated, num_negatives)
    GuidanceConfig(maximum=1.0).check_counts(num_generated, num_negatives)


def test_guidance_with_negatives_is_accepted():
    GuidanceConfig(maximum=4.0).check_counts(2, 1)


def analytic_distribution(a, config):
    """P(guidance <= a) in closed form: an atom at 1, and (a^q - min^q) / (max^q - min^q) with q = 1 - p, logarithms at p = 1."""
    q = 1 - config.exponent
    low, high = config.minimum, config.maximum
    share = np.log(a / low) / np.log(high / low) if q == 0 else (a**q - low**q) / (high**q - low**q)
    return config.skip_fraction + (1 - config.skip_fraction) * np.clip(share, 0, 1)


@pytest.mark.parametrize(
    "options",
    [{"mode": "power", "power": 5.0}, {"mode": "power", "power": 1.0}, {"mode": "uniform", "maximum": 2.5},
     {"mode": "mixed"}, {"mode": "mixed", "minimum": 1.5, "no_guidance_fraction": 0.3}],
    ids=str,
)  # fmt: skip
def test_a_runs_draws_follow_each_mode_in_every_step_and_process(options):
    """What a task draws, over steps and label slots: Kolmogorov's distance to the closed form, and the share without guidance."""
    config = GuidanceConfig(**options)
    uniforms = np.concatenate([uniform_draws(3, "guidance", step, range(64), (2,), "float64") for step in range(100)])
    draws = draw_guidance(config, uniforms[:, 0], uniforms[:, 1])
    guided = np.sort(draws[draws > 1])
    alone = np.concatenate([uniform_draws(3, "guidance", 7, [slot], (2,), "float64") for slot in range(64)])
    assert np.array_equal(draw_guidance(config, alone[:, 0], alone[:, 1]), draws[7 * 64 : 8 * 64])
    n, unguided = len(draws), (draws == 1).sum()
    assert abs(unguided / n - config.skip_fraction) <= 3.3 * (config.skip_fraction * (1 - config.skip_fraction) / n) ** 0.5
    below = unguided + np.arange(len(guided) + 1)  # draws at most guided[k] are below[k + 1] of n
    expected = analytic_distribution(guided, config)
    distance = max(np.abs(below[1:] / n - expected).max(), np.abs(below[:-1] / n - expected).max())
    assert distance < 1.95 / n**0.5  # the 0.999 quantile


def test_the_monitored_histogram_holds_every_labels_guidance():
    class Batch:
        guidance_scale = torch.tensor([1.0, 1.0, 2.5, 4.0])

    assert torch.equal(drawn_values(Batch())["guidance"], Batch.guidance_scale)
