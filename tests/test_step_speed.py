"""What keeps a step fast: it never waits for the device, master weights are full precision, blocks compile, traces."""

import gzip
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import TINY_MAE, checkpoint_tensors, generator_arguments, tiny_encoder
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from drift_accel import train, train_mae
from drift_accel.models import Generator, MaskedAutoencoder
from drift_accel.training import loop, networks
from drift_accel.training.networks import compile_blocks, lay_out_encoder, require_master_weights
from drift_accel.training.optimizer import OptimizerConfig, make_optimizer
from drift_accel.training.profiling import StepProfiler, parse_steps
from drift_accel.training.step_parts import PARTS, PartMeter, metered_parts, step_part


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("mae"))


# No host synchronisation


class NoValues(TorchDispatchMode):
    """Refuses every operation that brings a tensor's values to the host, which on a GPU would wait for it."""

    REFUSED = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function._schema.name.removeprefix("aten::")
        if any(name.startswith(refused) for refused in self.REFUSED):
            raise AssertionError(f"{function} reads values on the host")
        return function(*arguments, **(options or {}))


def forbid_values(monkeypatch):
    """Inside train_step no tensor may be read: not by an operation, not by a method that copies to the host."""
    calls, train_step = [], loop.train_step

    def guarded(*arguments, **options):
        with pytest.MonkeyPatch.context() as patch, NoValues():
            for name in ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "__array__"):
                patch.setattr(torch.Tensor, name, refuse(name))
            result = train_step(*arguments, **options)
        calls.append(options["diagnostics"])
        return result

    def refuse(name):
        def method(*_, **__):
            raise AssertionError(f"Tensor.{name} in a step")

        return method

    monkeypatch.setattr(loop, "train_step", guarded)
    return calls


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--batch.labels_per_slice", "2"),
        ("--batch.labels_per_slice", "2", "--statistics_memory_gb", "0"),
        ("--batch.labels_per_slice", "2", "--statistics", "slice"),
        ("--precision", "bfloat16"),
    ],
    ids=lambda more: " ".join(more[1::2]) or "plain",
)
def test_a_generator_step_never_waits_for_the_device(encoder, tmp_path, monkeypatch, more):
    if "bfloat16" in more:
        monkeypatch.setattr(train, "start_accelerator", bfloat16_accelerator(train.start_accelerator))
        more = ()
    calls = forbid_values(monkeypatch)
    train.main(generator_arguments(encoder, tmp_path / "run", "--steps", "3", "--log.every", "3", *more))
    assert calls == [True, False, True]


def bfloat16_accelerator(start):
    """Accelerate cannot change its precision within a process: autocast as the bfloat16 trainer has it."""

    def start_with_autocast(config):
        accelerator = start(config)
        accelerator.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
        return accelerator

    return start_with_autocast


def test_lagged_statistics_read_one_flag_in_a_run(encoder, tmp_path, monkeypatch):
    reads, train_step = [], loop.train_step

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if "_local_scalar_dense" in function._schema.name:
                reads[-1] += 1
            return function(*arguments, **(options or {}))

    def counted(*arguments, **options):
        reads.append(0)
        with Count():
            return train_step(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", counted)
    train.main(generator_arguments(encoder, tmp_path / "run", "--steps", "4", "--statistics", "lagged"))
    assert reads == [0, 1, 0, 0]


def test_an_encoder_step_never_waits_for_the_device(tmp_path, monkeypatch):
    calls = forbid_values(monkeypatch)
    train_mae.main([*TINY_MAE, "--accumulate", "2", "--output_dir", str(tmp_path / "run")])
    assert len(calls) == 6


def test_the_guard_sees_a_read(monkeypatch):
    with NoValues():
        for read in (lambda x: x.item(), bool, lambda x: x.nonzero()):
            with pytest.raises(AssertionError, match="reads values"):
                read(torch.ones(()))


# Weights and layout


def test_master_weights_in_half_precision_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    require_master_weights(model, make_optimizer(model, OptimizerConfig()), torch.float32)
    model[1].bfloat16()
    with pytest.raises(ValueError, match=r"4 master weights are not torch.float32, first 1.weight \(torch.bfloat16\)"):
        require_master_weights(model, make_optimizer(model, OptimizerConfig()), torch.float32)
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(model.bfloat16(), OptimizerConfig())
    model.weight, model.bias = (nn.Parameter(p.detach().float()) for p in (model.weight, model.bias))
    with pytest.raises(ValueError, match="of the optimiser"):
        require_master_weights(model, optimizer, torch.float32)


@pytest.mark.parametrize("command", ["train", "train_mae"])
def test_the_trainers_look_at_their_master_weights(command, encoder, tmp_path, monkeypatch):
    module = {"train": train, "train_mae": train_mae}[command]
    monkeypatch.setattr(module, "place", lambda model, config, device: model.bfloat16())
    run = tmp_path / "run"
    arguments = generator_arguments(encoder, run) if module is train else [*TINY_MAE, "--output_dir", str(run)]
    with pytest.raises(ValueError, match="master weights are not torch.float32"):
        module.main(arguments)


def test_encoders_are_channels_last_on_gpus_alone():
    class Recorded(nn.Module):
        layouts = ()

        def to(self, **options):
            self.layouts = (*self.layouts, options["memory_format"])
            return self

    assert lay_out_encoder(Recorded(), torch.device("cuda")).layouts == (torch.channels_last,)
    assert lay_out_encoder(Recorded(), torch.device("cpu")).layouts == ()
    encoder = MaskedAutoencoder(in_channels=1, width=8, blocks=(1, 1, 1, 1), input_size=8, num_classes=2)
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted = encoder.feature_maps(images)
    maps = encoder.to(memory_format=torch.channels_last).feature_maps(images)
    assert all(torch.allclose(maps[name], wanted[name], atol=1e-4) for name in ("conv1", "layer1_blk1", "layer2_blk1"))


# Compiled blocks


def small_generator():
    sizes = {"input_size": 8, "in_channels": 1, "patch_size": 4, "hidden_size": 16, "num_heads": 2, "num_classes": 3}
    generator = Generator(**sizes, depth=2, num_style_tokens=0)
    nn.init.normal_(generator.final_layer.output.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return generator


def assert_compiles(model, run, monkeypatch, backend, limit):
    """Same names of weights, same output, gradients, and every repeated block compiled."""
    names, wanted = list(model.state_dict()), run(model)
    wanted.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compile_repeated_blocks, modes = type(model).compile_repeated_blocks, []

    def with_backend(self, **options):
        modes.append(options)
        compile_repeated_blocks(self, backend=backend, **options)

    monkeypatch.setattr(type(model), "compile_repeated_blocks", with_backend)
    assert compile_blocks(model, "none") is model and not modes
    assert compile_blocks(model, "blocks") is model and modes == [{"dynamic": False}]
    compiled = [module for module in model.modules() if module._compiled_call_impl is not None]
    assert {type(module).__name__ for module in compiled} == set(model._repeated_blocks)
    assert list(model.state_dict()) == names
    output = run(model)
    output.square().mean().backward()
    assert torch.allclose(output, wanted, atol=limit)
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(p.grad, gradients[name], atol=limit), name
    assert torch._dynamo.config.recompile_limit >= networks.COMPILED_VERSIONS


def draw_images(generator):
    stream = torch.Generator().manual_seed(1)
    return generator(torch.randn(4, 1, 8, 8, generator=stream), torch.tensor([0, 1, 2, 0]), torch.ones(4))


def draw_features(mae):
    maps = mae.feature_maps(torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)), names=("conv1", "layer2_blk1"))
    return torch.cat([values.flatten() for values in maps.values()])


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


def test_blocks_of_both_models_compile_and_keep_their_names(monkeypatch, fresh_dynamo):
    assert_compiles(small_generator(), draw_images, monkeypatch, "eager", 0)
    mae = MaskedAutoencoder(in_channels=1, width=8, blocks=(2, 1, 1, 1), input_size=8, num_classes=2)
    assert_compiles(mae, draw_features, monkeypatch, "eager", 0)


@pytest.mark.slow
def test_blocks_compile_with_the_default_compiler(monkeypatch, fresh_dynamo):
    assert_compiles(small_generator(), draw_images, monkeypatch, "inductor", 1e-5)


def test_a_run_may_switch_compilation_on(encoder, tmp_path, monkeypatch, fresh_dynamo):
    for model in (Generator, MaskedAutoencoder):
        compile_repeated_blocks = model.compile_repeated_blocks
        monkeypatch.setattr(
            model, "compile_repeated_blocks", lambda self, f=compile_repeated_blocks, **o: f(self, backend="eager", **o)
        )
    train.main(generator_arguments(encoder, tmp_path / "run", "--steps", "2"))
    arguments = generator_arguments(encoder, tmp_path / "run", "--steps", "3", "--compile", "blocks")
    train.main([*arguments, "--batch.labels_per_slice", "2"])
    names = {name for name in checkpoint_tensors(tmp_path / "run", 3) if name.startswith("model/")}
    exported = load_file(tmp_path / "run/exports/ema_0.99/diffusion_pytorch_model.safetensors")
    assert {name.removeprefix("model/") for name in names} == set(exported)
    assert not [name for name in names if "_orig_mod" in name]


# Parts and traces


def test_parts_report_to_a_meter_and_cost_nothing_without_one():
    counts = iter(range(100))
    meter = PartMeter(lambda: next(counts))
    with step_part("drift"):
        pass
    with metered_parts(meter):
        for name in ("drift", "encoder", "drift"):
            with step_part(name):
                pass
    with step_part("drift"):
        pass
    assert meter.read() == {"drift": 2, "encoder": 1} and meter.read() == {}


def test_a_part_inside_another_counts_for_itself_alone():
    now = 0.0
    meter = PartMeter(lambda: now)
    with metered_parts(meter), step_part("transfer"):
        now += 1
        for _ in range(2):
            with step_part("vae"):
                now += 10
        now += 2
    assert meter.read() == {"transfer": 3, "vae": 20}


def test_a_trace_of_some_steps_lies_in_the_run_folder(encoder, tmp_path):
    run = tmp_path / "run"
    train.main(generator_arguments(encoder, run, "--steps", "3", "--profile_steps", "2-3", "--batch.labels", "2"))
    (trace,) = (run / "profiles").iterdir()
    assert trace.name == "step_00000002_to_step_00000003.json.gz"
    with gzip.open(trace, "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    wanted = set(PARTS) - {"data", "vae"}
    assert wanted <= names, wanted - names
    train.main(generator_arguments(encoder, run, "--steps", "4", "--batch.labels", "2"))  # may change between two starts


def test_the_profiler_does_nothing_without_steps_and_refuses_nonsense():
    profiler = StepProfiler()
    profiler.before(0)
    assert profiler.after(1) is None
    assert parse_steps("3-3") == (3, 3)
    for text in ("3", "3-2", "0-1", "a-b", "-1-2", "1-2-3"):
        with pytest.raises(ValueError, match="profile_steps is"):
            parse_steps(text)
