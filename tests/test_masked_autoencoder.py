"""The masked autoencoder: agreement with the release, feature maps, losses, precision, files, refusals."""

import pytest
import torch
from golden_files import assert_norm_close, channels_first, load_arrays, unpack_artifact
from torch.nn import functional as F

from drift_accel.models import MAE_PRESETS, MaskedAutoencoder, check_mae_config, expand_mask, load_official
from drift_accel.models.resnet import GroupNorm, num_groups

SMALL = {
    "in_channels": 2,
    "width": 8,
    "blocks": [1, 2, 1, 1],
    "num_classes": 5,
    "mask_patch_size": 2,
    "input_patch_size": 1,
    "input_size": 8,
}


POOLED = ("_mean", "_std", "norm_x")


def small_inputs(batch: int = 3, channels: int = 2, side: int = 8) -> tuple[torch.Tensor, ...]:
    source = torch.Generator().manual_seed(0)
    images = torch.randn(batch, channels, side, side, generator=source)
    labels = torch.randint(5, (batch,), generator=source)
    mask = (torch.rand(batch, 1, side // 2, side // 2, generator=source) < 0.5).float()
    return images, labels, expand_mask(mask, 2)


@pytest.fixture(scope="module", params=["mae", "mae_pixel"])
def release(request, tmp_path_factory):
    """The release's encoder, its images [B, C, H, W] and the recorded values."""
    golden = load_arrays(request.param)
    folder = unpack_artifact(request.param, tmp_path_factory.mktemp("artifact"))
    return load_official(folder), channels_first(golden["x_bhwc"]), golden


def test_feature_maps_agree_with_the_release(release):
    model, images, golden = release
    with torch.no_grad():
        maps = model.feature_maps(images)
    compared = [name for name in maps if f"act/{name}" in golden]
    for name in compared:
        tokens = maps[name].flatten(2).transpose(1, 2)  # [B, T, S]
        assert_norm_close(tokens, golden[f"act/{name}"], 2e-5, name)
    recorded = [key.removeprefix("act/") for key in golden if key.startswith("act/")]
    assert sorted(compared) == sorted(name for name in recorded if not any(part in name for part in POOLED))


def test_encoder_input_agrees_with_the_release(release):
    model, images, golden = release
    norms = (model.encoder_input(images).square().mean(dim=(2, 3)) + 1e-6).sqrt()  # [B, p*p*C]
    assert_norm_close(norms[:, None], golden["act/norm_x"], 2e-5, "norm_x")


@pytest.mark.parametrize("lambda_cls", [0.0, 0.1])
def test_losses_and_gradient_agree_with_the_release(release, lambda_cls):
    model, images, golden = release
    prefix = f"lambda{lambda_cls}/"
    losses = model(images, golden["label"], channels_first(golden["mask"]), lambda_cls)
    assert_norm_close(losses.loss, golden[prefix + "loss"], 2e-5, "loss")
    assert_norm_close(losses.reconstruction, golden[prefix + "recon_loss"], 2e-5, "reconstruction")
    assert_norm_close(losses.classification, golden[prefix + "cls_loss"], 2e-5, "classification")
    assert torch.equal(losses.accuracy, golden[prefix + "accuracy"])
    if prefix + "grad_global_norm" in golden:
        gradients = torch.autograd.grad(losses.loss.mean(), list(model.parameters()))
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        assert_norm_close(norm, golden[prefix + "grad_global_norm"], 2e-5, "gradient norm")


def test_release_features_and_spaces():
    with torch.device("meta"):
        model = MaskedAutoencoder()
        spaces = {name: MaskedAutoencoder(**preset).input_space for name, preset in MAE_PRESETS.items()}
        chosen = MaskedAutoencoder(**MAE_PRESETS["tiny"], input_space="pixel").input_space
        grid = MaskedAutoencoder(**MAE_PRESETS["pixel-640"]).encoder_input(torch.zeros(1, 3, 256, 256))
    blocks = ("layer1_blk2", "layer2_blk2", "layer2_blk4", "layer3_blk2", "layer3_blk4", "layer3_blk6", "layer4_blk2")
    assert model.default_features == ("conv1", "layer1", "layer2", "layer3", "layer4", *blocks)
    assert spaces == {"tiny": "latent", "latent-256": "latent", "latent-640": "latent", "pixel-640": "pixel"}
    assert chosen == "pixel"
    assert grid.shape == (1, 192, 32, 32)


def test_maps_at_paper_scale_have_the_published_sizes():
    with torch.device("meta"):
        maps = MaskedAutoencoder(**MAE_PRESETS["latent-640"]).feature_maps(torch.zeros(2, 4, 32, 32))
    sizes = {name: tuple(value.shape[1:]) for name, value in maps.items()}
    assert sizes["conv1"] == sizes["layer1"] == sizes["layer1_blk3"] == (640, 32, 32)
    assert sizes["layer2"] == sizes["layer2_blk4"] == (1280, 16, 16)
    assert sizes["layer3"] == (2560, 8, 8)
    assert sizes["layer4"] == (5120, 4, 4)


def test_feature_maps_are_ordered_and_selectable():
    model, (images, _, _) = MaskedAutoencoder(**SMALL), small_inputs()
    maps = model.feature_maps(images)
    blocks = ["layer1_blk1", "layer2_blk1", "layer2_blk2", "layer3_blk1", "layer4_blk1"]
    assert list(maps) == ["conv1", "layer1", "layer2", "layer3", "layer4", *blocks]
    sizes = [tuple(maps[name].shape[1:]) for name in ("conv1", "layer2", "layer3", "layer4")]
    assert sizes == [(8, 8, 8), (16, 4, 4), (32, 2, 2), (64, 1, 1)]
    some = model.feature_maps(images, ["layer2_blk2", "conv1"])
    assert list(some) == ["conv1", "layer2_blk2"]
    assert torch.equal(some["layer2_blk2"], maps["layer2_blk2"])


def test_block_maps_come_before_the_stage_norm():
    model, (images, _, _) = MaskedAutoencoder(**SMALL), small_inputs()
    maps = model.feature_maps(images)
    assert maps["layer2_blk2"].min() >= 0
    assert torch.equal(model.encoder.stages[1].norm(maps["layer2_blk2"]), maps["layer2"])
    assert maps["layer2"].min() < 0, "no ReLU follows a stage's norm"


@pytest.mark.parametrize("sides", [(8, 8), (7, 5), (1, 1), (3, 9)])
def test_odd_and_small_sides(sides):
    model = MaskedAutoencoder(**SMALL)
    images, mask = torch.randn(2, 2, *sides), torch.ones(2, 1, *sides)
    assert model.reconstruct(images, mask).shape == images.shape
    height, width = sides
    for stage in range(2, 5):
        height, width = (height + 1) // 2, (width + 1) // 2
        assert model.feature_maps(images)[f"layer{stage}"].shape[2:] == (height, width)


def test_patchify_orders_row_column_colour_and_is_undone():
    model = MaskedAutoencoder(**{**SMALL, "in_channels": 3, "input_patch_size": 4, "input_size": 16})
    images = torch.randn(2, 3, 16, 8)
    grid = model.encoder_input(images)
    assert grid.shape == (2, 48, 4, 2)
    for row, column, colour in [(0, 0, 0), (1, 2, 0), (3, 1, 2)]:
        assert torch.equal(grid[:, (row * 4 + column) * 3 + colour], images[:, colour, row::4, column::4])
    assert torch.equal(model.unpatchify(grid), images)


def test_expand_mask_repeats_each_patch():
    model = MaskedAutoencoder(**SMALL)
    patches = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    expanded = model.expand_mask(patches)
    assert torch.equal(expanded[0, 0], torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]))
    assert torch.equal(expanded, expand_mask(patches, 2))


def test_losses_follow_their_formulas():
    model, (images, labels, mask) = MaskedAutoencoder(**SMALL).double(), small_inputs()
    losses = model(images, labels, mask, 0.3)
    error = ((model.reconstruct(images, mask) - images) ** 2 * mask).sum(dim=(1, 2, 3))
    torch.testing.assert_close(losses.reconstruction, error / mask.sum(dim=(1, 2, 3)))
    pooled = model.feature_maps(images * (1 - mask))["layer4"].mean(dim=(2, 3))
    logits = model.classifier(pooled)
    torch.testing.assert_close(losses.classification, F.cross_entropy(logits, labels, reduction="none"))
    torch.testing.assert_close(losses.loss, 0.3 * losses.classification + 0.7 * losses.reconstruction)
    assert torch.equal(losses.accuracy, (logits.argmax(1) == labels).double())


def test_hidden_values_do_not_reach_the_prediction():
    model, (images, _, mask) = MaskedAutoencoder(**SMALL), small_inputs()
    assert torch.equal(model.reconstruct(images, mask), model.reconstruct(images + 5 * mask, mask.bool()))


def test_nothing_hidden_gives_zero_and_finite_gradients():
    model, (images, labels, mask) = MaskedAutoencoder(**SMALL), small_inputs()
    losses = model(images, labels, torch.zeros_like(mask), 0.1)
    assert not losses.reconstruction.any()
    losses.loss.mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("value", [0.0, 1.0, 100.0])
def test_constant_images_have_finite_gradients(value):
    model = MaskedAutoencoder(**SMALL)
    images = torch.full((2, 2, 8, 8), value, requires_grad=True)
    sum(feature.square().sum() for feature in model.feature_maps(images).values()).backward()
    assert torch.isfinite(images.grad).all()


def test_every_weight_gets_a_gradient_even_without_the_classifier():
    # Data-parallel training waits for the gradient of every parameter.
    model = MaskedAutoencoder(**SMALL)
    model(*small_inputs(), lambda_cls=0.0).loss.mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_one_sample_equals_the_same_sample_in_a_batch():
    model, (images, labels, mask) = MaskedAutoencoder(**SMALL).double(), small_inputs()
    together, maps = model(images, labels, mask, 0.1), model.feature_maps(images)
    for k in range(3):
        one = slice(k, k + 1)
        torch.testing.assert_close(model(images[one], labels[one], mask[one], 0.1).loss, together.loss[one])
        for name, value in model.feature_maps(images[one]).items():
            torch.testing.assert_close(value, maps[name][one])


def test_gradient_checkpointing_changes_no_bit():
    plain, checkpointed = MaskedAutoencoder(**SMALL), MaskedAutoencoder(**SMALL)
    checkpointed.enable_gradient_checkpointing()
    for model in (plain, checkpointed):
        model(*small_inputs(), lambda_cls=0.1).loss.mean().backward()
    for (name, left), right in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(left.grad, right.grad), name


def test_frozen_encoder_passes_gradients_to_the_images():
    model = MaskedAutoencoder(**SMALL).requires_grad_(False)
    model.enable_gradient_checkpointing()
    images = small_inputs()[0].requires_grad_()
    model.feature_maps(images)["layer4_blk1"].sum().backward()
    assert images.grad.abs().sum() > 0


def test_save_and_load_keep_every_bit(tmp_path):
    model = MaskedAutoencoder(**SMALL)
    model.initialize_weights(torch.Generator().manual_seed(3))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    loaded = MaskedAutoencoder.from_pretrained(tmp_path)
    assert {name: loaded.config[name] for name in SMALL} == SMALL
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_initial_weights_are_a_function_of_the_seed_alone():
    before = torch.get_rng_state()
    first, second = MaskedAutoencoder(**SMALL), MaskedAutoencoder(**SMALL)
    assert torch.equal(torch.get_rng_state(), before), "building a model read torch's global random state"
    weights = first.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in second.state_dict().items())


def test_bfloat16_autocast_keeps_maps_in_bfloat16_and_losses_in_float32(release):
    model, images, golden = release
    inputs = (images, golden["label"], channels_first(golden["mask"]), 0.1)
    exact = model(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, maps = model(*inputs), model.feature_maps(images)
    assert {value.dtype for value in maps.values()} == {torch.bfloat16}
    assert {value.dtype for value in losses} == {torch.float32}
    assert_norm_close(losses.loss, exact.loss, 3e-2)  # bfloat16 carries 8 bits
    gradients = torch.autograd.grad(losses.loss.mean(), list(model.parameters()))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_float64_agrees_with_float32():
    inputs = small_inputs()
    double = MaskedAutoencoder(**SMALL).double()(*inputs, lambda_cls=0.1)
    assert double.loss.dtype == torch.float64
    assert_norm_close(MaskedAutoencoder(**SMALL)(*inputs, lambda_cls=0.1).loss, double.loss, 1e-5)


@pytest.mark.parametrize(("channels", "groups"), [(640, 32), (16, 16), (48, 24), (96, 32), (33, 11), (37, 1), (1, 1)])
def test_number_of_groups(channels, groups):
    assert num_groups(channels) == groups


def test_group_norm_uses_the_biased_variance():
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    norm = GroupNorm(4).double()
    deviation = x - x.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(norm(x), deviation / (deviation.square().mean(dim=(2, 3), keepdim=True) + 1e-6).sqrt())


REFUSED_CONFIGS = [
    ({"in_channels": 0}, "in_channels is 0"),
    ({"width": -8}, "width is -8"),
    ({"num_classes": 2.5}, "num_classes is 2.5"),
    ({"mask_patch_size": 0}, "mask_patch_size is 0"),
    ({"input_patch_size": 0}, "input_patch_size is 0"),
    ({"input_size": 0}, "input_size is 0"),
    ({"blocks": (3, 4, 6)}, r"blocks is \(3, 4, 6\)"),
    ({"blocks": 4}, "blocks is 4"),
    ({"blocks": (3, 0, 6, 3)}, r"blocks\[1\] is 0"),
    ({"input_patch_size": 5}, "input_patch_size 5 does not divide input_size 32"),
    ({"mask_patch_size": 3}, "mask_patch_size 3 does not divide the encoder's grid of 32"),
    ({"input_patch_size": 8, "mask_patch_size": 8}, "mask_patch_size 8 does not divide the encoder's grid of 4"),
    ({"input_space": "wavelet"}, "input_space is 'wavelet'"),
    ({"depth": 3}, "no setting"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED_CONFIGS)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_mae_config(**changes)
    with pytest.raises((ValueError, TypeError)):
        MaskedAutoencoder(**changes)


def test_every_preset_is_valid():
    for preset in MAE_PRESETS.values():
        check_mae_config(**preset)


IMAGES, LABELS, MASK = small_inputs()
REFUSED_INPUTS = [
    ((IMAGES[:, :1], LABELS, MASK), r"images has shape \[3, 1, 8, 8\]; wanted \[\*, 2, \*, \*\]"),
    ((IMAGES.long(), LABELS, MASK), "images has dtype torch.int64"),
    ((IMAGES, LABELS[:2], MASK), r"labels has shape \[2\]; wanted \[3\]"),
    ((IMAGES, LABELS.float(), MASK), "labels has dtype torch.float32"),
    ((IMAGES, LABELS, MASK[:, 0]), r"mask has shape \[3, 8, 8\]; wanted \[3, 1, 8, 8\]"),
    ((IMAGES, LABELS, MASK[..., :4, :4]), "mask has shape"),
    ((IMAGES, LABELS, MASK.long()), "mask has dtype torch.int64"),
    ((IMAGES, LABELS, None), "mask is a NoneType"),
]


@pytest.mark.parametrize(("inputs", "message"), REFUSED_INPUTS)
def test_wrong_inputs_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        MaskedAutoencoder(**SMALL)(*inputs)


def test_wrong_calls_are_refused():
    model = MaskedAutoencoder(**{**SMALL, "input_patch_size": 2})
    with pytest.raises(ValueError, match="7 x 8 do not divide into patches of 2"):
        model.encoder_input(torch.zeros(1, 2, 7, 8))
    with pytest.raises(ValueError, match="grid has shape"):
        model.unpatchify(torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match="patch_mask has shape"):
        model.expand_mask(torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match=r"no feature map is called \['layer9'\]"):
        model.feature_maps(torch.zeros(1, 2, 8, 8), ["conv1", "layer9"])
