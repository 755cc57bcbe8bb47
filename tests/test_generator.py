"""The generator: agreement with the release, symmetries, precision, checkpointing, files, refusals."""

import math
import subprocess
import sys

import pytest
import torch
from golden_files import assert_norm_close, channels_first, load_arrays, unpack_artifact
from torch import nn

from drift_accel.models import GENERATOR_PRESETS, Generator, check_generator_config, load_official
from drift_accel.models.generator import patchify, unpatchify
from drift_accel.models.transformer import (
    Modulation,
    RMSNorm,
    SwiGLU,
    TransformerBlock,
    rotary_table,
    rotate,
    sincos_positions_2d,
)

SMALL = {
    "input_size": 8,
    "in_channels": 2,
    "patch_size": 2,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
    "style_codebook_size": 6,
    "num_style_tokens": 3,
    "num_context_tokens": 2,
    "condition_size": 24,
}


def small_generator(**changes) -> Generator:
    """A small generator in which no weight is zero, so that every path reaches the output."""
    model = Generator(**{**SMALL, **changes})
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=source))
    return model


def small_inputs(batch: int = 4) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(2)
    return {
        "noise": torch.randn(batch, 2, 8, 8, generator=source),
        "labels": torch.randint(5, (batch,), generator=source),
        "guidance_scale": 1 + 3 * torch.rand(batch, generator=source),
        "style_indices": torch.randint(6, (batch, 3), generator=source),
    }


def test_agrees_with_the_release(tmp_path):
    model = load_official(unpack_artifact("generator", tmp_path))
    golden = load_arrays("generator")
    inputs = (golden["label"], golden["cfg_scale"], golden["style_index"])
    with torch.no_grad():
        assert_norm_close(model.condition(*inputs), golden["condition"], 2e-5, "condition")
        sample = model(channels_first(golden["noise_bhwc"]), *inputs)
    assert_norm_close(sample, channels_first(golden["sample_bhwc"]), 2e-5, "sample")


@pytest.mark.parametrize(
    ("preset", "count"),
    [("B/2", 132_708_880), ("L/2", 462_909_456), ("B/16", 133_864_704), ("L/16", 464_450_304)],
)
def test_published_parameter_counts(preset, count):
    with torch.device("meta"):
        model = Generator(**GENERATOR_PRESETS[preset])
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_every_preset_is_valid_and_tiny_runs():
    for preset in GENERATOR_PRESETS.values():
        check_generator_config(**preset)
    model = Generator(**GENERATOR_PRESETS["tiny"], num_classes=10)
    styles = torch.zeros(2, 32, dtype=torch.int64)
    assert model(torch.randn(2, 1, 8, 8), torch.tensor([0, 9]), torch.ones(2), styles).shape == (2, 1, 8, 8)


def test_output_is_zero_at_initialisation():
    assert torch.equal(Generator(**SMALL)(**small_inputs()), torch.zeros(4, 2, 8, 8))


def test_initial_weights_are_a_function_of_the_seed_alone():
    before = torch.get_rng_state()
    first, second = Generator(**SMALL), Generator(**SMALL)
    assert torch.equal(torch.get_rng_state(), before), "building a model read torch's global random state"
    weights = first.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in second.state_dict().items())
    second.initialize_weights(torch.Generator().manual_seed(7))
    assert not torch.equal(weights["blocks.0.attention.qkv.weight"], second.blocks[0].attention.qkv.weight)


def test_initial_distributions():
    model = Generator(**{**SMALL, "hidden_size": 128, "num_classes": 200})
    qkv = model.blocks[0].attention.qkv
    bound = math.sqrt(6 / (128 + 3 * 128))
    assert qkv.weight.abs().max() <= bound
    assert qkv.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not qkv.bias.any()
    assert model.class_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(model.position_embedding[0], sincos_positions_2d(4, 128))
    assert not any(m.weight.any() or m.bias.any() for m in model.modules() if isinstance(m, Modulation))


def test_positions_code_row_and_column():
    positions = sincos_positions_2d(3, 16).unflatten(0, (3, 3))
    assert torch.equal(positions[:, :, :8], positions[:, :1, :8].expand(-1, 3, -1))
    assert torch.equal(positions[:, :, 8:], positions[:1, :, 8:].expand(3, -1, -1))
    assert torch.allclose(positions[2, 1, 0], torch.tensor(2.0).sin())
    assert torch.allclose(positions[2, 1, 12], torch.tensor(1.0).cos())


def test_permuting_the_batch_permutes_the_output():
    model, inputs = small_generator().double(), small_inputs()
    order = torch.tensor([2, 0, 3, 1])
    permuted = model(**{name: value[order] for name, value in inputs.items()})
    torch.testing.assert_close(permuted, model(**inputs)[order], rtol=0, atol=1e-12)


def test_one_sample_equals_the_same_sample_in_a_batch():
    model, inputs = small_generator().double(), small_inputs()
    together = model(**inputs)
    for k in range(4):
        alone = model(**{name: value[k : k + 1] for name, value in inputs.items()})
        torch.testing.assert_close(alone[0], together[k], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["noise", "labels", "guidance_scale", "style_indices"])
def test_every_input_reaches_the_output(name):
    model, inputs = small_generator(), small_inputs()
    changed = {**inputs, name: (inputs[name] + 1) % 5 if name != "noise" else inputs[name] + 1}
    assert (model(**changed) - model(**inputs)).abs().amax(dim=(1, 2, 3)).min() > 1e-6


def test_style_coordinates_have_codebooks_of_their_own():
    model, inputs = small_generator(), small_inputs(1)
    swapped = {**inputs, "style_indices": torch.tensor([[1, 0, 0]])}
    inputs["style_indices"] = torch.tensor([[0, 1, 0]])
    assert not torch.allclose(model(**swapped), model(**inputs))


@pytest.mark.parametrize("style_indices", [None, torch.zeros(2, 0, dtype=torch.int64)])
def test_generator_without_style(style_indices):
    model, inputs = small_generator(num_style_tokens=0), small_inputs(2)
    assert model(inputs["noise"], inputs["labels"], inputs["guidance_scale"], style_indices).shape == (2, 2, 8, 8)
    assert not any("style" in name for name in model.state_dict())


def test_rotation_sees_relative_positions_only():
    source = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 16, dtype=torch.float64, generator=source)
    cosines, sines = rotary_table(12, 16, torch.float64, torch.device("cpu"))
    queries, keys = (rotate(vector.expand(12, -1), cosines, sines) for vector in (query, key))
    products = queries @ keys.T  # [T, T]
    for offset in range(-11, 12):
        diagonal = products.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-12)
    assert torch.equal(queries[0], query)
    torch.testing.assert_close(queries.norm(dim=1), query.norm().expand(12))


def test_rms_norm_is_exact():
    x = torch.randn(3, 5, dtype=torch.float64)
    norm = RMSNorm(5).double()
    nn.init.constant_(norm.weight, 2.0)
    torch.testing.assert_close(norm(x), 2 * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())


@pytest.mark.parametrize(("hidden_size", "inner_size"), [(64, 192), (768, 2048), (1024, 2752)])
def test_swiglu_width_is_two_thirds_rounded_up(hidden_size, inner_size):
    with torch.device("meta"):
        assert SwiGLU(hidden_size, 4.0).gate.out_features == inner_size


def test_patchify_orders_row_column_channel_and_is_undone():
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    assert torch.equal(patches[0, 1].reshape(2, 2, 3), images[0, :, :2, 2:4].permute(1, 2, 0))
    assert torch.equal(unpatchify(patches, 2, 4), images)


def test_gradient_checkpointing_changes_no_bit():
    plain, inputs = small_generator(), small_inputs()
    checkpointed = small_generator()
    checkpointed.enable_gradient_checkpointing()
    assert checkpointed.is_gradient_checkpointing
    outputs = [model(**inputs) for model in (plain, checkpointed)]
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(*outputs)
    for (name, left), right in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(left.grad, right.grad), name


def test_save_and_load_keep_every_bit(tmp_path):
    model, inputs = small_generator(), small_inputs()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    loaded = Generator.from_pretrained(tmp_path)
    assert {k: v for k, v in loaded.config.items() if k in SMALL} == SMALL
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert torch.equal(loaded(**inputs), model(**inputs))


def test_float64_agrees_with_float32():
    single, double = small_generator(), small_generator().double()
    inputs = small_inputs()
    output = double(**inputs)
    assert output.dtype == torch.float64
    assert_norm_close(single(**inputs), output, 1e-5)


def test_float64_is_float64_throughout():
    # A step through float32 anywhere would leave about 1e-7 of noise in the difference quotient.
    model, inputs = small_generator().double(), small_inputs(1)
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    inputs["guidance_scale"].requires_grad_()
    gradient = torch.autograd.grad(model(**inputs).sum(), inputs["guidance_scale"])[0].item()
    with torch.no_grad():
        shifted = [{**inputs, "guidance_scale": inputs["guidance_scale"] + step} for step in (1e-5, -1e-5)]
        upper, lower = (model(**values).sum().item() for values in shifted)
    assert (upper - lower) / 2e-5 == pytest.approx(gradient, rel=1e-6)


def test_bfloat16_autocast_is_finite_and_close():
    model, inputs = small_generator(), small_inputs()
    exact = model(**inputs)
    dtypes = {}
    model.blocks[0].modulation.register_forward_hook(lambda *args: dtypes.update(modulation=args[2][0].dtype))
    model.blocks[0].attention.qkv.register_forward_hook(lambda *args: dtypes.update(qkv=args[2].dtype))
    model.guidance_embedding.register_forward_hook(lambda *args: dtypes.update(guidance=args[2].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**inputs)
    assert dtypes == {"modulation": torch.float32, "qkv": torch.bfloat16, "guidance": torch.float32}
    assert output.dtype == torch.float32
    assert_norm_close(output, exact, 3e-2)  # bfloat16 carries 8 bits
    output.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_weights_in_bfloat16_run():
    output = small_generator().bfloat16()(**small_inputs())
    assert output.dtype == torch.float32
    assert torch.isfinite(output).all()


def test_block_compiles_in_one_graph_and_is_named_for_wrapping():
    model = small_generator()
    assert all(isinstance(block, TransformerBlock) for block in model.blocks)
    assert Generator._no_split_modules == Generator._repeated_blocks == ["TransformerBlock"]
    block = torch.compile(model.blocks[0], backend="eager", fullgraph=True)
    tables = rotary_table(5, 16, torch.float32, torch.device("cpu"))
    x, condition = torch.randn(2, 5, 32), torch.randn(2, 24)
    assert torch.equal(block(x, condition, *tables), model.blocks[0](x, condition, *tables))


REFUSED_CONFIGS = [
    ({"patch_size": 3}, "patch_size 3 does not divide input_size 32"),
    ({"num_heads": 7}, "num_heads 7 does not divide hidden_size 768"),
    ({"hidden_size": 36, "num_heads": 4}, "odd width 9"),
    ({"hidden_size": 18, "num_heads": 9}, "hidden_size 18 is no multiple of 4"),
    ({"input_size": 0}, "input_size is 0"),
    ({"in_channels": -1}, "in_channels is -1"),
    ({"patch_size": 0}, "patch_size is 0"),
    ({"hidden_size": 64.0}, "hidden_size is 64.0"),
    ({"depth": 0}, "depth is 0"),
    ({"num_heads": True}, "num_heads is True"),
    ({"num_classes": 0}, "num_classes is 0"),
    ({"style_codebook_size": 0}, "style_codebook_size is 0"),
    ({"num_style_tokens": -1}, "num_style_tokens is -1"),
    ({"num_context_tokens": 0}, "num_context_tokens is 0"),
    ({"condition_size": 0}, "condition_size is 0"),
    ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0"),
    ({"mlp_ratio": float("nan")}, "mlp_ratio is nan"),
    ({"mlp_ratio": 1e-4}, "no feed-forward width"),
    ({"width": 5}, "no setting"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED_CONFIGS)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_generator_config(**changes)


def test_constructor_refuses_before_building():
    with pytest.raises(ValueError, match="does not divide input_size"):
        Generator(patch_size=3, hidden_size=2**20, depth=10**6)


REFUSED_INPUTS = [
    ({"noise": torch.zeros(4, 2, 8, 6)}, r"noise has shape \[4, 2, 8, 6\]; wanted \[\*, 2, 8, 8\]"),
    ({"noise": torch.zeros(2, 8, 8)}, "noise has shape"),
    ({"noise": torch.zeros(4, 2, 8, 8, dtype=torch.int64)}, "noise has dtype torch.int64"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels has shape \[3\]; wanted \[4\]"),
    ({"labels": torch.zeros(4)}, "labels has dtype torch.float32; wanted int64"),
    ({"guidance_scale": torch.ones(4, 1)}, r"guidance_scale has shape \[4, 1\]; wanted \[4\]"),
    ({"guidance_scale": torch.ones(4, dtype=torch.int64)}, "guidance_scale has dtype"),
    ({"guidance_scale": 1.0}, "guidance_scale is a float"),
    ({"style_indices": torch.zeros(4, 2, dtype=torch.int64)}, r"style_indices has shape \[4, 2\]; wanted \[4, 3\]"),
    ({"style_indices": torch.zeros(4, 3)}, "style_indices has dtype"),
    ({"style_indices": None}, "style_indices is a NoneType"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED_INPUTS)
def test_wrong_inputs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Generator(**SMALL)(**{**small_inputs(), **changes})


def test_the_room_is_light_until_it_is_used():
    code = "import sys, drift_accel.models as m; dir(m); sys.exit('diffusers' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="Nothing"):
        __import__("drift_accel.models").models.Nothing  # noqa: B018
