"""Every combination of the drift's discrete options trains a small network on points, or is refused with the reason."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from drift_accel.drift import DriftConfig, DriftProblems, GuidanceConfig, drift_losses, negative_weight
from drift_accel.training.slices import StepStatistics
from drift_accel.training.step import key_loss

COUPLINGS = {
    "two_sided": {"coupling": "two_sided"},
    "two_sided_without_floor": {"coupling": "two_sided", "affinity_floor": 0.0},
    "row": {"coupling": "row"},
    "kernel": {"coupling": "kernel"},
    "sinkhorn": {"coupling": "sinkhorn", "sinkhorn_marginal": "weighted_cols"},
    "sinkhorn_none": {"coupling": "sinkhorn", "sinkhorn_marginal": "none"},
}
FACTORS = {
    "coupling": tuple(COUPLINGS),
    "weight_placement": ("after", "log_bias"),
    "drift_form": ("joint", "split"),
    "metric": ("l2", "l2_sq"),
    "mask_self": (True, False),
    "reduction": ("release", "paper"),
    "field": ("summed", "per_temperature"),
    "statistics": ("global", "lagged", "slice"),  # "rank" is "slice" for one process
    "guidance": (1.0, 2.5),
    "negatives": (0, 3),
}
COMBINATIONS = tuple(itertools.product(*FACTORS.values()))
WITHOUT_PLACEMENT = ("kernel", "sinkhorn", "sinkhorn_none")  # weight_placement is not read: a few steps show it
STEPS, SLICES, GENERATED, POSITIVES, LOCATIONS = 20, 2, 5, 6, 2
TEMPERATURES = (0.05, 0.5)


def options_of(combination):
    return dict(zip(FACTORS, combination, strict=True))


def drift_config(options):
    names = ("weight_placement", "drift_form", "metric", "mask_self", "reduction", "field")
    changes = {name: options[name] for name in names}
    # Transport with few updates: the number is no discrete option, and 20 of them would be most of the time.
    return DriftConfig(temperatures=TEMPERATURES, sinkhorn_iterations=4, **COUPLINGS[options["coupling"]], **changes)


def refusal(options):
    """What the configuration says before any work, or None."""
    guidance = GuidanceConfig(minimum=options["guidance"], maximum=options["guidance"])
    try:
        guidance.check_counts(GENERATED, options["negatives"])
        drift_config(options).check_guidance(guidance.smallest, options["negatives"])
    except ValueError as error:
        return str(error)
    return None


def expected_refusal(options):
    if options["guidance"] > 1 and options["negatives"] == 0:
        return "needs unconditional negatives"
    if options["coupling"] == "sinkhorn_none" and options["guidance"] <= 1 and options["negatives"]:
        return "which no transport plan with uniform columns meets"
    return None


class PointTask:
    """A network of points in the plane, one label a slice and two problems a label, trained through the step's statistics."""

    def __init__(self, options):
        self.options, self.config = options, drift_config(options)
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 2)).double()
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.05)
        self.statistics = StepStatistics(options["statistics"], self.config, group=None, memory_gb=1.0, log=str)

    def problems(self, part):
        guidance = torch.tensor([self.options["guidance"]], dtype=torch.float64)
        weight = negative_weight(guidance, GENERATED, part.negatives.shape[1]).expand(LOCATIONS)[:, None]
        generated = self.network(part.noise)
        return {"": DriftProblems(generated, part.positives, part.negatives, weight.expand(-1, part.negatives.shape[1]))}

    def step(self, draw):
        parts = [self.draw(draw) for _ in range(SLICES)]

        def extract(part):
            with torch.no_grad():
                return self.problems(part)

        self.statistics.prepare(parts, extract)
        self.optimizer.zero_grad()
        values = []
        for part in parts:
            problems = self.problems(part)
            result = drift_losses(problems, config=self.config, **self.statistics.of_slice())[""]
            self.statistics.observe(problems)
            loss = key_loss(result, problems[""], 1, self.config) / SLICES
            loss.backward()
            values.append(loss.detach())
        self.statistics.end_step(torch.zeros(()))
        self.optimizer.step()
        return torch.stack(values)

    def draw(self, draw):
        def points(count, centre=0.0):
            return torch.from_numpy(centre + draw.standard_normal((LOCATIONS, count, 2)))

        real = {"positives": points(POSITIVES, 1.0), "negatives": points(self.options["negatives"], 0.5)}
        return SimpleNamespace(labels=torch.zeros(1), noise=points(GENERATED), **real)


def check(combination, steps=STEPS):
    """Train where it is accepted; returns the losses, None for one that is refused."""
    options = options_of(combination)
    wanted, said = expected_refusal(options), refusal(options)
    if wanted is not None:
        assert said is not None and wanted in said, f"{options} must be refused, got {said}"
        return None
    assert said is None, f"{options} is refused: {said}"
    task, draw = PointTask(options), np.random.default_rng(0)
    before = [parameter.detach().clone() for parameter in task.network.parameters()]
    losses = torch.stack([task.step(draw) for _ in range(steps)])
    assert torch.isfinite(losses).all(), f"{options}: losses {losses}"
    after = list(task.network.parameters())  # one gradient that is not finite would stay in them
    assert all(torch.isfinite(parameter).all() for parameter in after), options
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True)), f"{options}: nothing was learned"
    return losses


def pairs_of(combinations):
    """[combinations, pairs of factors]: a number for each pair of values that a combination holds."""
    levels = [len(values) for values in FACTORS.values()]
    index = np.array(list(itertools.product(*map(range, levels))))
    chosen = np.array([COMBINATIONS.index(combination) for combination in combinations]) if combinations else None
    columns, base = [], 0
    for a, b in itertools.combinations(range(len(levels)), 2):
        columns.append(base + index[:, a] * levels[b] + index[:, b])
        base += levels[a] * levels[b]
    pairs = np.stack(columns, axis=1)
    return pairs if chosen is None else pairs[chosen]


def pairwise(candidates):
    """Few of the candidates that together hold every pair of values that any of them holds: each time the most that are new."""
    pairs = pairs_of(candidates)
    open_pairs = np.zeros(pairs.max() + 1, dtype=bool)
    open_pairs[np.unique(pairs)] = True
    rows = []
    while open_pairs.any():
        best = int(open_pairs[pairs].sum(axis=1).argmax())
        rows.append(candidates[best])
        open_pairs[pairs[best]] = False
    return rows


ACCEPTED = [combination for combination in COMBINATIONS if expected_refusal(options_of(combination)) is None]
REFUSED = [combination for combination in COMBINATIONS if expected_refusal(options_of(combination)) is not None]


def test_pairs_of_options_train_or_are_refused():
    trained, refused = pairwise(ACCEPTED), pairwise(REFUSED)
    whole, covered = set(np.unique(pairs_of(COMBINATIONS))), set(np.unique(pairs_of(trained + refused)))
    assert covered == whole and len(trained) < 80
    assert all(check(combination) is not None for combination in trained)
    assert all(check(combination) is None for combination in refused)


@pytest.mark.slow
def test_every_combination_trains_or_is_refused():
    for combination in COMBINATIONS:
        options = options_of(combination)
        if options["coupling"] in WITHOUT_PLACEMENT and options["weight_placement"] == "log_bias":
            options["weight_placement"] = "after"
            losses, same = check(combination, steps=2), check(tuple(options.values()), steps=2)
            assert losses is same is None or torch.equal(losses, same), combination
        else:
            check(combination)
