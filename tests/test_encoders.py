"""Several encoders in one step: whose keys are whose, weights, the decoder before pixel encoders, and what does not fit."""

import pytest
import torch
from golden_files import GOLDENS, assert_norm_close

from drift_accel.drift import EncoderSpec, FeatureConfig, encoder_features, multi_scale_features
from drift_accel.drift.encoders import EncoderEntryConfig, as_specs, check_encoder_inputs, key_weight, load_specs
from drift_accel.models import MaskedAutoencoder, VaeDecoder
from drift_accel.models.autoencoder import load_vae
from drift_accel.models.configuration import DecoderConfig, EncoderConfig, load_decoder
from drift_accel.models.convnext import load_convnext

FEATURES = FeatureConfig(maps=("conv1",), windows=())
MAE_KEYS = {"norm_x", "conv1", "conv1_mean", "conv1_std"}


@pytest.fixture(scope="module")
def mae():
    model = MaskedAutoencoder(width=8, blocks=(1, 1, 1, 1), in_channels=3, input_size=16, input_patch_size=2, num_classes=2)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def convnext():
    return load_convnext(GOLDENS / "convnextv2", image_size=64)


@pytest.fixture(scope="module")
def decoder():
    return VaeDecoder(load_vae("digits"), batch=2)


def images(*shape):
    return torch.randn(shape or (2, 3, 16, 16), generator=torch.Generator().manual_seed(0))


# Keys


def test_one_encoder_has_no_prefix(mae):
    for given in (
        as_specs(mae, FEATURES),
        as_specs(EncoderSpec("mae", mae, FEATURES)),
        as_specs([EncoderSpec("mae", mae, FEATURES)]),
    ):
        features = encoder_features(given, images())
        plain = multi_scale_features(mae, images(), FEATURES)
        assert list(features) == list(plain) and set(plain) == MAE_KEYS
        assert all(torch.equal(features[key], plain[key]) for key in plain)


def test_keys_of_several_are_prefixed_and_each_has_its_own_features(mae, convnext):
    specs = as_specs([EncoderSpec("mae", mae, FEATURES), EncoderSpec("convnext", convnext)])
    features = encoder_features(specs, images())
    ours = {f"mae/{key}": value for key, value in multi_scale_features(mae, images(), FEATURES).items()}
    theirs = {f"convnext/{key}": value for key, value in multi_scale_features(convnext, images()).items()}
    assert list(features) == [*ours, *theirs]
    assert "convnext/norm_x" not in features and "global" not in features
    for key, value in {**ours, **theirs}.items():
        assert torch.equal(features[key], value), key


def test_weights_belong_to_keys(mae, convnext):
    specs = as_specs([EncoderSpec("a", mae, FEATURES, weight=0.5), EncoderSpec("ab", convnext, weight=3)])
    weights = {key: key_weight(specs, key) for key in [*encoder_features(specs, images()), "global"]}
    assert {value for key, value in weights.items() if key.startswith("a/")} == {0.5}
    assert {value for key, value in weights.items() if key.startswith("ab/")} == {3}
    assert weights["global"] == 1
    assert key_weight(as_specs(EncoderSpec("a", mae, weight=2.0)), "conv1") == 2
    with pytest.raises(ValueError, match="c/conv1 is no key of the encoders a, ab"):
        key_weight(specs, "c/conv1")


def test_gradients_of_all_encoders_reach_the_images(mae, convnext):
    specs = as_specs([EncoderSpec("mae", mae, FEATURES), EncoderSpec("convnext", convnext)])

    def gradient(prefix):
        x = images().requires_grad_()
        features = encoder_features(specs, x)
        sum(value.square().mean() for key, value in features.items() if key.startswith(prefix)).backward()
        return x.grad

    parts = [gradient("mae/"), gradient("convnext/")]
    assert all(part.any() for part in parts)
    assert_norm_close(gradient(""), sum(parts), 1e-5)
    assert all(parameter.grad is None for model in (mae, convnext) for parameter in model.parameters())


# The decoder


def test_pixel_encoders_of_a_latent_generator_share_one_decoding(convnext, decoder, monkeypatch):
    latent_mae = MaskedAutoencoder(width=8, blocks=(1, 1, 1, 1), in_channels=4, input_size=16).eval().requires_grad_(False)
    decoded = []
    monkeypatch.setattr(decoder, "forward", lambda x, forward=decoder.forward: decoded.append(forward(x)) or decoded[-1])
    specs = as_specs(
        [
            EncoderSpec("mae", latent_mae, FEATURES),
            EncoderSpec("convnext", convnext, decoder=decoder),
            EncoderSpec("again", convnext, FeatureConfig(maps=("global_mean",)), decoder=decoder),
        ]
    )
    x = images(3, 4, 16, 16).requires_grad_()
    features = encoder_features(specs, x)
    assert len(decoded) == 1 and decoded[0].shape == (3, 3, 64, 64)
    assert torch.equal(features["mae/conv1"], multi_scale_features(latent_mae, x, FEATURES)["conv1"])
    for key, value in multi_scale_features(convnext, decoded[0]).items():
        assert torch.equal(features[f"convnext/{key}"], value), key
    assert torch.equal(features["again/global_mean"], features["convnext/global_mean"])
    features["convnext/global_mean"].square().sum().backward()
    assert x.grad.any() and torch.isfinite(x.grad).all()
    assert all(parameter.grad is None for parameter in decoder.parameters())


# What does not fit


def test_specs_that_cannot_work_are_refused(mae, decoder):
    for name in ("", "a/b", "global", None):
        with pytest.raises(ValueError, match="encoder.name is .*without '/'"):
            EncoderSpec(name, mae)
    for weight in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="encoder.weight of mae is .*positive"):
            EncoderSpec("mae", mae, weight=weight)
    latent = MaskedAutoencoder(width=8, blocks=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="encoder mae takes latents, and a decoder makes pixels"):
        EncoderSpec("mae", latent, decoder=decoder)
    with pytest.raises(ValueError, match=r"encoders are called \['mae'\] more than once"):
        as_specs([EncoderSpec("mae", mae), EncoderSpec("mae", mae)])
    with pytest.raises(ValueError, match="there is no encoder"):
        as_specs([])
    with pytest.raises(ValueError, match="features are given beside EncoderSpecs"):
        as_specs([EncoderSpec("mae", mae)], FEATURES)


class Maps(torch.nn.Module):
    """Returns maps of the names it is given."""

    def __init__(self, *names):
        super().__init__()
        self.map_names = self.default_features = names

    def feature_maps(self, images, names=None):
        return dict.fromkeys(self.map_names, images)


def test_keys_that_would_be_mixed_up_are_refused():
    with pytest.raises(ValueError, match="two of the encoder's maps make the key a_mean: leave one out"):
        encoder_features(as_specs(Maps("a", "a_mean")), images())
    with pytest.raises(ValueError, match="encoder encoder makes a key 'global', which is the generator's output"):
        encoder_features(as_specs(Maps("global")), images())


def test_an_encoder_that_leaves_no_key_is_refused(convnext):
    silent = Maps("a")
    silent.has_norm_x = False
    with pytest.raises(ValueError, match="nothing would be compared"):
        multi_scale_features(silent, images(), FeatureConfig(vectors=False, statistics=()))
    assert set(multi_scale_features(Maps("a"), images(), FeatureConfig(vectors=False, statistics=()))) == {"norm_x"}


def test_encoders_are_checked_against_the_generator(mae, convnext, decoder):
    latent = MaskedAutoencoder(width=8, blocks=(1, 1, 1, 1), in_channels=4, input_size=16)
    check_encoder_inputs(as_specs([EncoderSpec("mae", mae), EncoderSpec("c", convnext)]), (3, 16, 16), latents=False)
    check_encoder_inputs(
        as_specs([EncoderSpec("mae", latent), EncoderSpec("c", convnext, decoder=decoder)]), (4, 16, 16), latents=True
    )
    grey = MaskedAutoencoder(width=8, blocks=(1, 1, 1, 1), in_channels=1, input_size=8)
    check_encoder_inputs(as_specs(grey), (1, 8, 8), latents=False)
    refused = [
        (
            EncoderSpec("c", convnext),
            (4, 16, 16),
            True,
            "encoder c takes pixels and the generator makes latents: set decoder.vae",
        ),
        (EncoderSpec("c", convnext, decoder=decoder), (3, 64, 64), False, "encoder c .*decoder.*: leave decoder.vae out"),
        (EncoderSpec("c", convnext), (1, 8, 8), False, "encoder c takes 3 channels but the generator makes 1"),
        (EncoderSpec("mae", latent), (8, 16, 16), True, "encoder mae takes 4 channels but the generator makes 8"),
        (EncoderSpec("mae", latent), (4, 32, 32), True, r"encoder mae was made for input_size 16 but the .* makes \(32, 32\)"),
        (EncoderSpec("mae", mae), (3, 15, 15), False, r"encoder mae patchifies by 2, which does not divide .*\(15, 15\)"),
    ]
    for spec, shape, latents, message in refused:
        with pytest.raises(ValueError, match=message):
            check_encoder_inputs(as_specs(spec), shape, latents=latents)


# From configurations


def test_specs_of_a_configuration(tmp_path):
    latent = MaskedAutoencoder(width=8, blocks=(1, 1, 1, 1), in_channels=4, input_size=16, num_classes=2)
    latent.save_pretrained(tmp_path)
    decoder = load_decoder(DecoderConfig(vae="digits"))
    entry = EncoderEntryConfig(
        kind="convnextv2", path=str(GOLDENS / "convnextv2"), name="c", weight=2.0, features=FeatureConfig(maps=("global_std",))
    )
    specs = load_specs(EncoderConfig(path=str(tmp_path)), FEATURES, [entry], decoder)
    assert [(spec.name, spec.weight, spec.decoder) for spec in specs] == [("encoder", 1.0, None), ("c", 2.0, decoder)]
    check_encoder_inputs(specs, (4, 16, 16), latents=True)
    assert set(encoder_features(specs, images(1, 4, 16, 16))) == {*(f"encoder/{key}" for key in MAE_KEYS), "c/global_std"}


def test_two_of_one_name_are_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match=r"encoders are called \['encoder'\] more than once"):
        load_specs(EncoderConfig(path="none"), FEATURES, [EncoderEntryConfig(path="none either")])
