"""The VAE decoder with a gradient: finite differences, slices, precision, and that only the latents learn."""

import pytest
import torch
from diffusers import AutoencoderKL
from golden_files import assert_norm_close

from drift_accel.models.configuration import DecoderConfig, load_decoder
from drift_accel.models.pixel_encoder import draw_weights
from drift_accel.models.vae_decoder import VaeDecoder
from drift_accel.sampling import decode_latents


@pytest.fixture
def vae():
    """A tiny autoencoder with attention and a scale and shift of its own."""
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=2,
        norm_num_groups=2,
        scaling_factor=0.6,
        shift_factor=-0.3,
    )
    draw_weights(vae, torch.Generator().manual_seed(1))
    return vae.eval()


def latents(count=3, dtype=torch.float64):
    return torch.randn(count, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(dtype)


def gradient(decoder, x, weights):
    x = x.clone().requires_grad_()
    (decoder(x) * weights).sum().backward()
    return x.grad


def test_the_gradient_agrees_with_finite_differences(vae):
    decoder = VaeDecoder(vae.double(), batch=2).double()
    x = latents()
    weights = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    exact = gradient(decoder, x, weights)
    with torch.no_grad():
        for index in torch.randint(x.numel(), (10,), generator=torch.Generator().manual_seed(4)).tolist():
            step = torch.zeros(x.numel(), dtype=x.dtype)
            step[index] = 1e-5
            step = step.reshape(x.shape)
            difference = ((decoder(x + step) - decoder(x - step)) * weights).sum() / 2e-5
            assert exact.flatten()[index].item() == pytest.approx(difference.item(), rel=1e-6, abs=1e-8)


def test_only_the_latents_learn_and_the_vae_stays_as_it_is(vae):
    vae.train().requires_grad_(True)
    decoder = VaeDecoder(vae).train()
    assert not any(module.training for module in decoder.modules())
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    assert gradient(decoder, latents(dtype=torch.float32), 1.0).any()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in decoder.parameters())
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_slices_and_checkpointing_change_nothing(batch, checkpointing, vae):
    vae = vae.double()
    x, weights = latents(5), torch.randn(5, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    whole = VaeDecoder(vae, batch=5, checkpointing=False).double()
    cut = VaeDecoder(vae, batch=batch, checkpointing=checkpointing).double()
    assert_norm_close(cut(x), whole(x), 1e-13)
    assert_norm_close(gradient(cut, x, weights), gradient(whole, x, weights), 1e-12)


@pytest.mark.parametrize(("checkpointing", "calls"), [(False, [2, 2, 1]), (True, [2, 2, 1, 1, 2, 2])])
def test_checkpointing_decodes_each_slice_again_in_the_backward_pass(checkpointing, calls, vae, monkeypatch):
    seen, decode = [], vae.decode
    monkeypatch.setattr(vae, "decode", lambda z, **settings: seen.append(len(z)) or decode(z, **settings))
    decoder = VaeDecoder(vae, batch=2, checkpointing=checkpointing)
    gradient(decoder, latents(5, torch.float32), 1.0)
    assert sorted(seen) == sorted(calls)
    seen.clear()
    with torch.no_grad():
        decoder(latents(5, torch.float32))
    assert seen == [2, 2, 1]


def test_values_are_those_of_the_sampler(vae):
    """Scale and shift of the configuration are undone in the same way, also given ones and those of every channel."""
    x = latents(dtype=torch.float32)
    assert_norm_close(VaeDecoder(vae)(x), decode_latents(vae, x, chunk=8), 1e-6)
    scaling = ([2.0, 3.0], [0.5, -0.5])
    assert_norm_close(VaeDecoder(vae, scaling=scaling)(x), decode_latents(vae, x, chunk=8, scaling=scaling), 1e-6)
    vae.register_to_config(latents_mean=[0.1, 0.2], latents_std=[1.5, 0.5])
    assert_norm_close(VaeDecoder(vae)(x), decode_latents(vae, x, chunk=8), 1e-6)


def test_images_are_not_clamped(vae):
    assert VaeDecoder(vae)(50 * latents(dtype=torch.float32)).abs().max() > 1


def test_float32_ignores_the_autocast_around_it(vae):
    x, decoder = latents(dtype=torch.float32).requires_grad_(), VaeDecoder(vae)
    outside = decoder(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = decoder(x)
    assert torch.equal(inside, outside)
    assert torch.equal(*(torch.autograd.grad(images.sum(), x)[0] for images in (inside, outside)))


def test_bfloat16_is_near_finite_and_comes_back_in_float32(vae):
    """Also where activations are far beyond float16."""
    x = latents(dtype=torch.float32)
    wide, narrow = VaeDecoder(vae), VaeDecoder(vae, dtype="bfloat16")
    assert narrow(x).dtype == torch.float32
    assert_norm_close(narrow(x), wide(x), 3e-2)
    assert not torch.equal(narrow(x), wide(x))
    assert_norm_close(gradient(narrow, x, 1.0), gradient(wide, x, 1.0), 0.1)
    assert next(vae.parameters()).dtype == torch.float32
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(1e6)
    assert torch.isfinite(narrow(x)).all() and torch.isfinite(gradient(narrow, x, 1.0)).all()


def test_what_cannot_work_is_refused(vae):
    with pytest.raises(ValueError, match="decoder.batch is 0"):
        VaeDecoder(vae, batch=0)
    with pytest.raises(ValueError, match="decoder.dtype is 'float16': choose one of float32, bfloat16 .*overflows"):
        DecoderConfig(dtype="float16")
    with pytest.raises(ValueError, match="decoder.batch is -1"):
        DecoderConfig(batch=-1)
    with pytest.raises(ValueError, match=r"latents have shape \[1, 4, 4, 4\], this VAE decodes \[B, 2, h, w\]"):
        VaeDecoder(vae)(torch.zeros(1, 4, 4, 4))


def test_the_configured_decoder():
    assert load_decoder(DecoderConfig()) is None
    decoder = load_decoder(DecoderConfig(vae="digits", batch=3, checkpointing=False, dtype="bfloat16"))
    assert (decoder.batch, decoder.checkpointing, decoder.dtype) == (3, False, "bfloat16")
    assert decoder(torch.zeros(2, 4, 16, 16)).shape == (2, 3, 64, 64)


def test_the_size_of_images_follows_from_the_configuration(vae):
    assert VaeDecoder(vae).image_shape(4) == tuple(VaeDecoder(vae)(latents(dtype=torch.float32)).shape[1:])
    digits = load_decoder(DecoderConfig(vae="digits"))
    assert digits.image_shape(16) == (3, 64, 64)
