"""Label slices: views of a batch, statistics of the whole step in every mode, what passes cost and what they agree on."""

from contextlib import nullcontext

import pytest
import torch
from test_drift_loss import random_problem
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from drift_accel.drift import DriftConfig, DriftProblems, DriftStatistics, FeatureConfig, field_norm_sums
from drift_accel.drift.reference import distances_and_sums
from drift_accel.drift.slice_statistics import norm_sums_of_products, target_products, target_products_bytes
from drift_accel.models import Generator, MaskedAutoencoder
from drift_accel.training import DriftBatch, drift_step
from drift_accel.training.accumulation import accumulate_gradients
from drift_accel.training.slices import STATE_PREFIX, StepStatistics, slice_batch
from drift_accel.training.step import step_loss, step_problems

L, G, P, N = 4, 3, 4, 2
MAPS = FeatureConfig(maps=("conv1", "layer1_blk1", "layer2_blk1"))

# Norms from kept products against norms from the features.

CASES = {
    "plain": lambda x, p, n: (x, p, n),
    "far from the origin": lambda x, p, n: (x + 100, p + 100, n + 100),
    "tiny": lambda x, p, n: (x * 1e-3, p * 1e-3, n * 1e-3),
    "generated samples alike": lambda x, p, n: (x * 1e-2, p, n),
    "generated samples on positives": lambda x, p, n: (p[:, : x.shape[1]] + 1e-4 * x[:, : p.shape[1]], p, n),
}
OPTIONS = [
    {},
    {"drift_form": "split"},
    {"coupling": "sinkhorn"},
    {"coupling": "row", "metric": "l2_sq"},
    {"attraction": 0.5, "affinity_floor": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [{"S": 8}, {"B": 2, "G": 16, "P": 16, "N": 4, "S": 640}], ids=str)
def test_norms_from_kept_products_are_those_from_the_features(case, size, options):
    config = DriftConfig(temperatures=(0.02, 0.05, 0.2, 5.0), **options)
    *features, weight = (torch.from_numpy(array) for array in random_problem(**size))
    features = CASES[case](*features)
    for dtype, limit in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        problems = DriftProblems(*(values.to(dtype) for values in features), weight.to(dtype))
        d, sums = distances_and_sums(problems)
        direct = field_norm_sums(problems, d, sums.mean(), config)
        kept = norm_sums_of_products(target_products(problems), sums.mean(), config)
        assert kept.count == direct.count
        for temperature, value in direct.squared_field.items():
            if value / direct.count > 1e-6:
                assert abs(kept.squared_field[temperature] / value - 1) < limit, f"{dtype}, temperature {temperature}"


def test_the_bytes_that_are_foretold_are_those_that_are_kept():
    *features, weight = (torch.from_numpy(array).float() for array in random_problem())
    problems = DriftProblems(*features, weight)
    products = target_products(problems)
    kept = (products.of_generated, products.of_real, products.weight)
    assert target_products_bytes({"key": problems}) == sum(tensor.numel() * tensor.element_size() for tensor in kept)


# A step in slices.


def networks(dtype=torch.float64):
    generator = Generator(
        input_size=8, in_channels=1, patch_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=5, num_style_tokens=2
    )
    nn.init.normal_(generator.final_layer.output.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    encoder = MaskedAutoencoder(in_channels=1, width=8, blocks=(1, 1, 1, 1), input_size=8, num_classes=5)
    return generator.to(dtype), encoder.to(dtype).eval().requires_grad_(False)


def random_batch(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return DriftBatch(
        labels=torch.tensor([3, 0, 4, 1]),
        guidance_scale=torch.tensor([1.0, 1.5, 2.0, 3.0], dtype=dtype),
        positives=torch.randn(L, P, 1, 8, 8, generator=g).to(dtype),
        negatives=torch.randn(L, N, 1, 8, 8, generator=g).to(dtype),
        noise=torch.randn(L * G, 1, 8, 8, generator=g).to(dtype),
        style_indices=torch.randint(64, (L * G, 2), generator=g),
    )


class OneProcess:
    """The part of accelerate's Accelerator that a step uses; that one cannot change its precision within a process."""

    def __init__(self, precision):
        self.enabled = precision == "bf16"

    def autocast(self):
        return torch.autocast("cpu", torch.bfloat16, enabled=self.enabled)

    def no_sync(self, model):
        return model.no_sync() if hasattr(model, "no_sync") else nullcontext()

    def backward(self, loss):
        loss.backward()


class SlicedTask:
    """What GeneratorTask does with a batch, without data; counts passes through the generator."""

    def __init__(self, mode, *, slices=2, memory_gb=1.0, dtype=torch.float64, drift=None):
        self.model, self.encoder = networks(dtype)
        self.drift = DriftConfig() if drift is None else drift
        self.slices, self.lines, self.passes, self.given, self.seen = slices, [], [], [], []
        self.statistics = StepStatistics(mode, self.drift, group=None, memory_gb=memory_gb, log=self.lines.append)
        self.model.register_forward_hook(lambda module, inputs, output: self.passes.append(output.requires_grad))

    def split(self, batch):
        return slice_batch(batch, self.slices)

    def prepare(self, model, slices, autocast):
        def extract(part):
            with torch.no_grad(), autocast():
                problems = step_problems(model, self.encoder, part, MAPS)
            self.seen.append(problems)
            return problems

        self.statistics.prepare(slices, extract)

    def compute(self, model, batch, step, *, diagnostics):
        problems = step_problems(model, self.encoder, batch, MAPS)
        self.seen.append(problems)
        result = step_loss(problems, batch, self.drift, diagnostics=diagnostics, **self.statistics.of_slice())
        self.given.append(result.statistics)
        self.statistics.observe(problems)
        return result.loss, result.metrics

    def step(self, batch, precision="no", wrapped=None):
        self.model.zero_grad()
        for record in (self.passes, self.given, self.seen):
            record.clear()
        loss, metrics = accumulate_gradients(OneProcess(precision), wrapped or self.model, self, batch, 0, diagnostics=True)
        gradient = torch.cat([parameter.grad.flatten() for parameter in self.model.parameters()])
        return loss, metrics, gradient


def close(first, second, limit):
    return (first - second).norm() <= limit * second.norm()


def test_slices_are_views_that_make_up_the_batch():
    batch = random_batch()
    for size in (1, 3, 4, 9, None):
        parts = slice_batch(batch, size)
        assert [part.labels.shape[0] for part in parts] == {1: [1] * 4, 3: [3, 1]}.get(size, [4])
        for name, whole in vars(batch).items():
            if isinstance(whole, torch.Tensor):
                assert torch.equal(torch.cat([getattr(part, name) for part in parts]), whole)
                assert getattr(parts[0], name).data_ptr() == whole.data_ptr()


@pytest.mark.parametrize(
    ("slices", "memory_gb", "drift"),
    [
        (1, 1.0, {}),
        (2, 0.0, {}),
        (3, 1.0, {"reduction": "paper"}),
        (2, 1.0, {"metric": "l2_sq", "drift_form": "split"}),
    ],
    ids=str,
)
def test_global_statistics_make_slices_equal_the_whole_step(slices, memory_gb, drift):
    drift, batch = DriftConfig(**drift), random_batch()
    generator, encoder = networks()
    whole = drift_step(generator, encoder, batch, drift, MAPS, diagnostics=True)
    whole.loss.backward()
    wanted = torch.cat([parameter.grad.flatten() for parameter in generator.parameters()])
    task = SlicedTask("global", slices=slices, memory_gb=memory_gb, drift=drift)
    loss, metrics, gradient = task.step(batch)
    assert close(loss, whole.loss.detach(), 1e-12) and close(gradient, wanted, 1e-9)
    assert metrics.keys() == whole.metrics.keys()
    for tag, value in whole.metrics.items():
        assert torch.allclose(metrics[tag], value, rtol=1e-9, atol=1e-15), tag
    num_slices = -(-L // slices)
    assert task.passes == [False] * num_slices * (1 if memory_gb else 2) + [True] * num_slices
    assert len(task.lines) == 1 and f"over {num_slices} slices" in task.lines[0] and "bytes" in task.lines[0]
    assert ("two extra" in task.lines[0]) == (memory_gb == 0)
    task.step(batch)
    assert len(task.lines) == 1, "the choice is logged once"


def test_one_slice_with_global_statistics_is_the_plain_step_to_the_bit():
    batch = random_batch(torch.float32)
    generator, encoder = networks(torch.float32)
    whole = drift_step(generator, encoder, batch, DriftConfig(), MAPS)
    whole.loss.backward()
    task = SlicedTask("global", slices=None, dtype=torch.float32)
    loss, _, gradient = task.step(batch)
    assert torch.equal(loss, whole.loss.detach()) and task.passes == [True] and task.lines == []
    assert torch.equal(gradient, torch.cat([parameter.grad.flatten() for parameter in generator.parameters()]))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_slices_features_are_bitwise_the_same_in_every_pass(precision):
    task = SlicedTask("global", slices=2, memory_gb=0.0, dtype=torch.float32)
    task.step(random_batch(torch.float32), precision)
    first, second, last = task.seen[:2], task.seen[2:4], task.seen[4:]
    assert len(last) == 2
    for other in (second, last):
        for problems, again in zip(first, other, strict=True):
            for key, members in problems.items():
                for name in ("generated", "positives", "negatives", "negative_weight"):
                    assert torch.equal(getattr(members, name), getattr(again[key], name)), f"{key}, {name}"


def test_gradients_survive_autocast_after_a_pass_without_gradient():
    """autocast keeps converted weights: in older torch one converted without gradient would do so in the gradient pass too."""
    batch = random_batch(torch.float32)
    _, _, wanted = SlicedTask("global", slices=None, dtype=torch.float32).step(batch, "bf16")
    _, _, gradient = SlicedTask("global", slices=2, dtype=torch.float32).step(batch, "bf16")
    assert (gradient != 0).sum() == (wanted != 0).sum()
    assert torch.nn.functional.cosine_similarity(gradient, wanted, dim=0) > 0.98


@pytest.mark.parametrize("mode", ["global", "lagged", "slice"])
def test_gradients_are_reduced_once_a_step(mode, tmp_path):
    """Real DistributedDataParallel in a group of one process; its hook is called once a bucket."""
    store = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        reduced, batch = [], random_batch()

        def count(_, bucket):
            reduced.append(bucket.index())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        task = SlicedTask(mode, slices=1)
        wrapped = DistributedDataParallel(task.model)
        wrapped.register_comm_hook(None, count)
        _, _, gradient = task.step(batch, wrapped=wrapped)
        assert len(task.passes) >= 4 and reduced and len(set(reduced)) == len(reduced), reduced
        assert close(gradient, SlicedTask(mode, slices=1).step(batch)[2], 1e-12)
    finally:
        distributed.destroy_process_group()


def test_slice_and_rank_take_the_statistics_of_each_slice_in_one_pass():
    batch = random_batch()
    for mode in ("slice", "rank"):
        task = SlicedTask(mode, slices=2)
        _, metrics, _ = task.step(batch)
        assert task.passes == [True, True] and task.lines == []
        generator, encoder = networks()
        own = [drift_step(generator, encoder, part, DriftConfig(), MAPS).statistics for part in slice_batch(batch, 2)]
        for given, wanted in zip(task.given, own, strict=True):
            assert all(torch.equal(given[key].scale, wanted[key].scale) for key in wanted)
        mean = (own[0]["conv1"].scale + own[1]["conv1"].scale) / 2
        assert torch.allclose(metrics["scale/conv1"], mean)


# Statistics of the step before.


def numbers(statistics: dict[str, DriftStatistics]) -> torch.Tensor:
    return torch.stack([torch.stack([s.scale, s.mean_squared_distance, *s.drift_sqnorm.values()]) for s in statistics.values()])


@pytest.mark.parametrize("slices", [None, 2])
def test_lagged_uses_the_global_statistics_of_the_step_before(slices):
    fine = torch.zeros(())
    task, batches = SlicedTask("lagged", slices=slices), [random_batch(seed=seed) for seed in range(3)]
    task.step(batches[0])
    generator, encoder = networks()
    exact = [drift_step(generator, encoder, batch, DriftConfig(), MAPS).statistics for batch in batches]
    assert torch.allclose(numbers(task.given[0]), numbers(exact[0]), rtol=1e-9), "the first step computes its own"
    task.statistics.end_step(fine)
    task.step(batches[1])
    assert task.passes == [True] * (1 if slices is None else 2), "one pass"
    assert torch.allclose(numbers(task.given[-1]), numbers(exact[0]), rtol=1e-9)
    state = task.statistics.end_step(fine)
    task.step(batches[2])
    given = task.given[-1]
    # s is exact; n_tau was measured under the statistics that step had.
    assert all(torch.allclose(given[key].scale, exact[1][key].scale, rtol=1e-12) for key in given)
    assert all(torch.allclose(given[k].drift_sqnorm[0.2], exact[1][k].drift_sqnorm[0.2], rtol=0.5) for k in given)
    restored = SlicedTask("lagged", slices=slices)
    restored.statistics.load_state(state, torch.device("cpu"))
    loss, _, gradient = restored.step(batches[2])
    again, _, wanted = task.step(batches[2])
    assert torch.equal(numbers(restored.given[-1]), numbers(given))
    assert torch.equal(gradient, wanted) and torch.equal(loss, again)


def test_a_step_that_did_not_happen_leaves_the_lagged_statistics_alone():
    task = SlicedTask("lagged", slices=2)
    task.step(random_batch())
    before = task.statistics.end_step(torch.ones(()))  # the very first step: nothing to fall back on
    task.step(random_batch(seed=1))
    assert len(task.passes) == 4, "computed again"
    before = task.statistics.end_step(torch.zeros(()))
    broken = random_batch(seed=2)
    broken.noise.fill_(float("nan"))
    task.step(broken)
    after = task.statistics.end_step(torch.ones(()))
    assert all(torch.equal(after[name], row) for name, row in before.items())
    assert all(name.startswith(STATE_PREFIX) for name in after)


def test_statistics_of_other_temperatures_are_refused():
    statistics = StepStatistics("lagged", DriftConfig(temperatures=(0.1,)), group=None, memory_gb=1, log=print)
    with pytest.raises(ValueError, match=r"key 'conv1' have \[5\] numbers, wanted 3 .*restore drift.temperatures"):
        statistics.load_state({f"{STATE_PREFIX}conv1": torch.ones(5)}, torch.device("cpu"))


def test_products_are_kept_exactly_where_they_fit():
    batch = random_batch()
    task = SlicedTask("global", slices=1)
    with torch.no_grad():
        needed = target_products_bytes(step_problems(task.model, task.encoder, batch, MAPS))
    for memory, passes in ((needed, 8), (needed - 1, 12)):
        task = SlicedTask("global", slices=1, memory_gb=memory / 1e9)
        task.step(batch)
        assert len(task.passes) == passes and f"{needed:,} bytes" in task.lines[0]
