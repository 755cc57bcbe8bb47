"""Protocols on a stand-in of the Inception file: equal to clean-fid's own functions, and what is refused."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from stand_in_inception import FILE, write_stand_in
from tiny_models import write_encoder

from drift_accel.evaluation.inception import resize_by_grid
from drift_accel.evaluation.networks import PYTORCH_FILE, find_network, networks_folder, open_network
from drift_accel.evaluation.picture_sources import open_pictures
from drift_accel.evaluation.protocols import PROTOCOLS, get_protocol

NUM_PICTURES = 5
INCEPTION = ("clean", "legacy_tensorflow", "release")


@pytest.fixture(scope="module")
def network_file(tmp_path_factory):
    return write_stand_in(tmp_path_factory.mktemp("networks"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of 40x24 pixels, smooth and rough."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.Generator(np.random.Philox(key=1))
    for number in range(NUM_PICTURES):
        pixels = random.integers(256, size=(24, 40, 3), dtype=np.uint8)
        if number % 2:
            pixels = np.asarray(Image.fromarray(pixels[:4, :5]).resize((40, 24), Image.BICUBIC))
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def batch(folder):
    return open_pictures(folder).batch(range(NUM_PICTURES))


def opened(name, network_file, **options):
    return open_network(get_protocol(name), network_file, batch=2, run_code=True, **options)


def clean_fid_features(folder, network, mode):
    from cleanfid.fid import get_folder_features

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_folder_features(
            str(folder), network, num_workers=0, batch_size=3, device=torch.device("cpu"), mode=mode, verbose=False
        )


def assert_close(got, wanted, limit=1e-5):
    difference = np.abs(got - wanted)
    scale = np.abs(wanted).max()
    assert scale > 0.1 and got.std(axis=0).max() > 1e-3, "features that do not differ prove nothing"
    assert difference.max() <= limit * max(1.0, scale), (
        f"largest {difference.max():.2e}, mean {difference.mean():.2e} of {scale:.2e}"
    )


@pytest.mark.parametrize("mode", ["clean", "legacy_tensorflow"])
def test_features_equal_clean_fids(mode, network_file, folder, batch):
    from cleanfid.inception_torchscript import InceptionV3W

    own = InceptionV3W(str(network_file.parent), download=False, resize_inside=mode == "legacy_tensorflow")
    features = opened(mode, network_file)(batch)["features"]
    assert features.shape == (NUM_PICTURES, 2048) and features.dtype == np.float32
    assert_close(features, clean_fid_features(folder, own, mode))


def test_the_protocols_are_different_numbers(network_file, batch):
    clean, tensorflow, release = (opened(name, network_file)(batch)["features"] for name in INCEPTION)
    assert np.abs(clean - tensorflow).max() > 1e-2
    assert_close(release, tensorflow)  # the same weights and the same resizing; the quantiser is what differs
    assert PROTOCOLS["release"].quantizer == "truncate" and PROTOCOLS["legacy_tensorflow"].quantizer == "round"


def test_logits_are_the_files_own_without_the_bias(network_file, batch):
    logits = opened("legacy_tensorflow", network_file)(batch)["logits"]
    network = torch.jit.load(network_file)
    with torch.no_grad():
        images = torch.from_numpy(batch.pixels).permute(0, 3, 1, 2)
        expected = network(images, no_output_bias=True).numpy()
    np.testing.assert_allclose(torch.from_numpy(logits).softmax(dim=1).numpy(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", INCEPTION)
def test_the_spatial_map_is_that_of_mixed_6(name, network_file, batch):
    outputs = opened(name, network_file, spatial=True)(batch)
    assert outputs["spatial"].shape == (NUM_PICTURES, 7 * 17 * 17)
    assert np.array_equal(outputs["features"], opened(name, network_file)(batch)["features"])
    network, seen = torch.jit.load(network_file), {}
    inputs = opened(name, network_file).prepare(batch)
    inputs = inputs if inputs.shape[2] == 299 else resize_by_grid(inputs)
    with torch.no_grad():
        hidden = (inputs - 128) / 128
        for part, module in network.layers.named_children():
            seen[part] = hidden
            hidden = module(hidden)
        expected = network.layers.mixed_6(seen["mixed_6"])[:, :7].flatten(1).numpy()
    assert_close(outputs["spatial"], expected)


def test_features_do_not_depend_on_the_other_pictures(network_file, folder):
    pictures, network = open_pictures(folder), opened("clean", network_file)
    whole = network(pictures.batch(range(NUM_PICTURES)))["features"]
    assert np.array_equal(network(pictures.batch(range(2, 5)))["features"][:2], whole[2:4])


def test_resizing_by_grid_is_the_identity_at_its_own_size_and_moves_no_corner():
    images = torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(0)) * 255
    torch.testing.assert_close(resize_by_grid(images), images, rtol=0, atol=2e-2)
    ramp = torch.arange(100.0).expand(1, 3, 100, 100).contiguous()
    # TF's old bilinear: output pixel i reads at i * 100 / 299.
    expected = (torch.arange(299.0) * 100 / 299).clamp(max=99)
    torch.testing.assert_close(resize_by_grid(ramp)[0, 0, 5], expected, rtol=0, atol=1e-3)


def random_port(inception_pytorch) -> dict[str, torch.Tensor]:
    """Weights of the network that clean-fid builds, which keep the size of what passes through."""
    built = []
    build = inception_pytorch._inception_v3
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="Missing key"):
        patch.setattr(inception_pytorch, "_inception_v3", lambda **options: built.append(build(**options)) or built[0])
        patch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *args, **options: {})
        inception_pytorch.fid_inception_v3()
    random = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in built[0].state_dict().items():
        if tensor.ndim > 1:
            weights[name] = torch.randn(tensor.shape, generator=random) * (2 / tensor[0].numel()) ** 0.5
        else:
            weights[name] = torch.full_like(tensor, float(name.endswith(("running_var", "bn.weight"))))
    return weights


@pytest.mark.slow
def test_legacy_pytorch_equals_clean_fids(tmp_path, folder, monkeypatch):
    from cleanfid import inception_pytorch

    weights = random_port(inception_pytorch)
    torch.save(weights, tmp_path / PYTORCH_FILE)
    (tmp_path / "two").mkdir()
    for name in ("0.png", "1.png"):
        (tmp_path / "two" / name).write_bytes((folder / name).read_bytes())
    network = open_network(get_protocol("legacy_pytorch"), tmp_path, batch=2)
    outputs = network(open_pictures(tmp_path / "two").batch(range(2)))
    assert outputs["features"].shape == (2, 2048) and outputs["logits"].shape == (2, 1008)
    with monkeypatch.context() as patch:
        patch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *args, **kwargs: weights)
        own = inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False).eval()
    expected = clean_fid_features(tmp_path / "two", lambda x: own(x / 255)[0].flatten(1), "legacy_pytorch")
    assert_close(outputs["features"], expected)
    torch.save({"fc.weight": weights["fc.weight"]}, tmp_path / PYTORCH_FILE)
    with pytest.raises(ValueError, match="does not hold the weights of this Inception"):
        open_network(get_protocol("legacy_pytorch"), tmp_path)


def test_a_missing_network_says_what_to_get_and_where_it_goes(tmp_path, monkeypatch):
    monkeypatch.setenv("DRIFT_ACCEL_NETWORKS", str(tmp_path))
    assert networks_folder() == tmp_path
    for name, file in (("clean", FILE), ("release", FILE), ("legacy_pytorch", PYTORCH_FILE)):
        with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/{file} is missing: protocol '{name}' needs the file {file}"):
            open_network(get_protocol(name), run_code=True)
    with pytest.raises(FileNotFoundError, match="elsewhere.* is missing"):
        open_network(get_protocol("clean"), tmp_path / "elsewhere" / FILE, run_code=True)
    write_stand_in(tmp_path)
    assert find_network(get_protocol("clean")) == tmp_path / FILE
    (tmp_path / FILE).rename(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="opens this network by the name"):
        find_network(get_protocol("clean"), tmp_path / "other.pt")


def test_code_runs_only_where_it_was_allowed(network_file):
    with pytest.raises(ValueError, match="is TorchScript, a program that runs on this machine: allow it with --run_torchscript"):
        open_network(get_protocol("clean"), network_file)


def test_other_refusals(tmp_path, network_file):
    with pytest.raises(ValueError, match="no protocol 'fid': choose one of clean"):
        get_protocol("fid")
    with pytest.raises(ValueError, match="sFID needs the mixed_6 map"):
        open_network(get_protocol("encoder"), write_encoder(tmp_path / "mae"), spatial=True)
    with pytest.raises(ValueError, match="does not show its mixed_6 map .mixed_6 is not there.: no sFID"):
        opened("clean", write_stand_in(tmp_path / "other", spatial=False), spatial=True)
    with pytest.raises(ValueError, match="--layer is for the protocol 'encoder'"):
        opened("clean", network_file, layer="conv1")
    with pytest.raises(ValueError, match="network's batch is 0"):
        open_network(get_protocol("clean"), network_file, batch=0, run_code=True)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / FILE).write_bytes(b"no network")
    with pytest.raises(ValueError, match="is no Inception in TorchScript"):
        opened("clean", tmp_path / "bad")
    for name in ("encoder", "timm", "dinov2"):
        with pytest.raises(ValueError, match=f"protocol '{name}' needs --network"):
            find_network(get_protocol(name))
        with pytest.raises(FileNotFoundError, match="is no folder"):
            find_network(get_protocol(name), tmp_path / "nowhere")


def test_every_protocol_says_what_it_does():
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name and len(protocol.operations) >= 2 and protocol.quantizer in ("round", "truncate")
        assert protocol.frechet_name == ("fid" if protocol.is_inception else f"frechet_{name}")
