"""ResNet encoders: published layouts of weights, built here, load completely or are refused by name; maps and frozen norms."""

import argparse

import pytest
import torch
import torchvision
from golden_files import assert_norm_close
from safetensors.torch import save_file

from drift_accel.drift import multi_scale_features
from drift_accel.models.checkpoint_file import read_tensors
from drift_accel.models.pixel_encoder import draw_weights
from drift_accel.models.pretrained_resnet import load_resnet

SIZE = 64
HEADS = {
    "fc.weight": (1000, 512),
    "fc.bias": (1000,),
    "fc.0.weight": (512, 512),
    "fc.0.bias": (512,),
    "fc.2.weight": (128, 512),
    "fc.2.bias": (128,),
}


@pytest.fixture(scope="module")
def network():
    """A ResNet-18 with statistics unlike those of any batch."""
    network = torchvision.models.resnet18(weights=None)
    generator = torch.Generator().manual_seed(5)
    draw_weights(network, generator)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator).mul_(0.1)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.num_batches_tracked.fill_(1000)
    return network.eval()


@pytest.fixture(scope="module")
def body(network):
    return {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")}


def heads(prefix, *names):
    return {prefix + name: torch.ones(HEADS[name]) for name in names}


def prefixed(prefix, tensors):
    return {prefix + name: value for name, value in tensors.items()}


def moco(body, mlp=True):
    names = ("fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias") if mlp else ("fc.weight", "fc.bias")
    both = {}
    for encoder in ("module.encoder_q.", "module.encoder_k."):
        turned = body if encoder.endswith("q.") else {name: value * 0 for name, value in body.items()}
        both |= prefixed(encoder, turned) | heads(encoder, *names)
    queue = {"module.queue": torch.zeros(128, 16), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    return {"epoch": 800, "arch": "resnet18", "state_dict": both | queue, "optimizer": {"state": {}, "param_groups": []}}


def simclr_of(repository, body):
    """The content of a checkpoint as the repository writes it."""
    if repository == "tonylins":
        return {"state_dict": body | heads("", "fc.weight", "fc.bias")}
    if repository == "sthalles":
        head = heads("backbone.", "fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias")
        return {"epoch": 100, "arch": "resnet18", "state_dict": prefixed("backbone.", body) | head, "optimizer": {}}
    if repository == "solo-learn":
        names = ("projector.0.weight", "projector.0.bias", "projector.2.weight", "projector.2.bias", "classifier.weight")
        extra = {name: torch.zeros(2, 2) for name in (*names, "classifier.bias")}
        return {"epoch": 1, "state_dict": prefixed("backbone.", body) | extra}
    if repository == "Spijkervet":
        return prefixed("encoder.", body) | {f"projector.{k}.weight": torch.zeros(2, 2) for k in (0, 2)}
    if repository == "AndrewAtanov":
        norms = {
            f"projection.bn{k}.{n}": torch.zeros(2) for k in (1, 2) for n in ("weight", "bias", "running_mean", "running_var")
        }
        counts = {f"projection.bn{k}.num_batches_tracked": torch.tensor(3) for k in (1, 2)}
        linear = {f"projection.fc{k}.weight": torch.zeros(2, 2) for k in (1, 2)}
        convnet = prefixed("convnet.", body) | heads("convnet.", "fc.weight", "fc.bias")
        return {"state_dict": convnet | norms | counts | linear}
    trunk = prefixed("_feature_blocks.", body)
    return {
        "phase_idx": 3,
        "classy_state_dict": {"base_model": {"model": {"trunk": trunk, "heads": {"0.weight": torch.zeros(2)}}}},
    }


REPOSITORIES = ("tonylins", "sthalles", "solo-learn", "Spijkervet", "AndrewAtanov", "vissl")


def saved(content, path):
    torch.save(content, path)
    return path


def load(path, weights, **settings):
    return load_resnet(path, architecture="resnet18", weights=weights, image_size=SIZE, **settings)


def images(count=2, dtype=torch.float32):
    return torch.rand(count, 3, 48, 48, generator=torch.Generator().manual_seed(0)).to(dtype) * 2 - 1


def assert_loaded(encoder, body):
    state = encoder.network.state_dict()
    assert set(state) == set(body)
    wrong = [name for name, value in body.items() if "num_batches" not in name and not torch.equal(state[name], value)]
    assert wrong == []


# Layouts


def test_supervised_weights_of_torchvision_and_timm(network, body, tmp_path):
    """With the classifier or without it, from both kinds of file."""
    assert_loaded(load(saved(network.state_dict(), tmp_path / "resnet18-f37072fd.pth"), "supervised"), body)
    assert_loaded(load(saved(body, tmp_path / "headless.pth"), "supervised"), body)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    assert_loaded(load(tmp_path / "model.safetensors", "supervised"), body)
    old = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert_loaded(load(saved(old, tmp_path / "old.pth"), "supervised"), body)


@pytest.mark.parametrize("mlp", [True, False], ids=["v2", "v1"])
def test_moco_takes_the_query_encoder(mlp, body, tmp_path):
    assert_loaded(load(saved(moco(body, mlp), tmp_path / "moco.pth.tar"), "moco_v2"), body)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "module."])
@pytest.mark.parametrize("repository", REPOSITORIES)
def test_simclr_layouts(repository, wrapped, body, tmp_path):
    content = simclr_of(repository, body)
    if wrapped:
        if "state_dict" in content:
            content["state_dict"] = prefixed("module.", content["state_dict"])
        elif repository == "Spijkervet":
            content = prefixed("module.", content)
    assert_loaded(load(saved(content, tmp_path / "simclr.pth"), "simclr", normalization="unit"), body)


def test_resnet50_loads_completely(tmp_path):
    network = torchvision.models.resnet50(weights=None)
    path = saved(network.state_dict(), tmp_path / "resnet50.pth")
    encoder = load_resnet(path, architecture="resnet50", weights="supervised", image_size=SIZE)
    assert_loaded(encoder, {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")})
    blocks = ("layer1_blk2", "layer2_blk2", "layer3_blk2", "layer3_blk4", "layer4_blk2")
    assert encoder.default_features == ("layer1", "layer2", "layer3", "layer4", *blocks)
    with pytest.raises(ValueError, match="missing tensors .* unknown tensors .*check encoder.architecture"):
        load(path, "supervised")


CONTENTS = {
    "supervised": lambda body: body | heads("", "fc.weight", "fc.bias"),
    "moco_v2": moco,
    **{f"simclr {name}": lambda body, name=name: simclr_of(name, body) for name in REPOSITORIES},
}


def innermost(content):
    """The mapping of tensors in a checkpoint."""
    for key in ("state_dict", "classy_state_dict", "base_model", "model", "trunk"):
        content = content.get(key, content)
    return content


@pytest.mark.parametrize("layout", CONTENTS)
def test_one_missing_or_unknown_tensor_is_refused_by_name(layout, body, tmp_path):
    content = CONTENTS[layout](body)
    weights = layout.split()[0]
    tensors = innermost(content)
    module = "module." if weights == "moco_v2" else ""
    name = next(name for name in tensors if name.endswith("layer3.0.downsample.1.running_var")).removeprefix(module)
    removed = tensors.pop(module + name)
    with pytest.raises(ValueError, match=rf"missing tensors \['{name}'\] \(1\), unknown tensors \[\] \(0\)"):
        load(saved(content, tmp_path / "missing.pth"), weights)
    tensors[module + name] = removed
    for stranger in ("predictor.weight", name.replace("layer3", "layer5")):
        tensors[module + stranger] = torch.zeros(1)
        with pytest.raises(ValueError, match=rf"missing tensors \[\] \(0\), unknown tensors \['{stranger}'\] \(1\)"):
            load(saved(content, tmp_path / "unknown.pth"), weights)
        del tensors[module + stranger]
    assert_loaded(load(saved(content, tmp_path / "whole.pth"), weights), body)


def test_a_wrong_shape_names_the_tensor(body, tmp_path):
    """The stem of the CIFAR form."""
    content = body | {"conv1.weight": torch.zeros(64, 3, 3, 3)}
    with pytest.raises(ValueError, match=r"conv1.weight has shape \[64, 3, 3, 3\], wanted \[64, 3, 7, 7\]"):
        load(saved(content, tmp_path / "cifar.pth"), "supervised")


def test_another_layout_says_which_one_it_looks_like(body, tmp_path):
    with pytest.raises(ValueError, match="no tensor 'conv1.weight', as a supervised checkpoint would: it looks like moco_v2"):
        load(saved(moco(body), tmp_path / "moco.pth"), "supervised")
    with pytest.raises(
        ValueError, match=r"as a moco_v2 checkpoint would: it looks like supervised or simclr; set encoder.weights"
    ):
        load(saved(body, tmp_path / "plain.pth"), "moco_v2")
    with pytest.raises(ValueError, match=r"it begins with \['a', 'b'\]"):
        load(saved({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "other.pth"), "simclr")


# Files


@pytest.mark.parametrize(
    ("weights", "source"),
    [("supervised", "download.pytorch.org"), ("moco_v2", "moco_v2_800ep_pretrain"), ("simclr", "simclr-converter")],
)
def test_a_missing_file_says_what_to_get(weights, source, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"encoder.path .* is no file: .*{source}.*give the file"):
        load(tmp_path / "none.pth", weights)


def test_python_objects_are_not_unpickled(body, tmp_path):
    """One published SimCLR keeps its command line beside the tensors."""
    content = {"state_dict": prefixed("convnet.", body), "hparams": argparse.Namespace(lr=1)}
    with pytest.raises(ValueError, match="holds Python objects.*would run code.*save its tensors alone"):
        load(saved(content, tmp_path / "objects.pth"), "simclr")


class RunsCode:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the file ran')",))


def test_code_in_a_file_does_not_run(tmp_path):
    with pytest.raises(ValueError, match="would run code from the file"):
        read_tensors(saved({"state_dict": {"a": torch.zeros(1)}, "x": RunsCode()}, tmp_path / "evil.pth"))


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_damaged_files_are_refused(name, body, tmp_path):
    path = tmp_path / name
    save_file(body, path) if name.endswith("safetensors") else torch.save(body, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="damaged.*download it again"):
        read_tensors(path)
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(ValueError, match="damaged.*download it again"):
        read_tensors(path)


def test_a_file_without_tensors_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no mapping of names to tensors \(it has \['epoch'\]\)"):
        read_tensors(saved({"epoch": 3}, tmp_path / "empty.pth"))


# Maps


@pytest.fixture(scope="module")
def encoder(network, tmp_path_factory):
    return load(saved(network.state_dict(), tmp_path_factory.mktemp("resnet") / "weights.pth"), "supervised")


def test_maps_are_those_of_torchvision(encoder, network):
    from torchvision.models.feature_extraction import create_feature_extractor

    nodes = {"relu": "conv1", "layer1.0": "layer1_blk1", "layer2.0": "layer2_blk1", "layer3": "layer3", "layer4": "layer4"}
    with torch.no_grad():
        wanted = create_feature_extractor(network, nodes)(encoder.network_input(images()))
        maps = encoder.feature_maps(images())
    for name, value in wanted.items():
        assert_norm_close(maps[name], value, 1e-6, name)
    assert encoder.default_features == ("layer1", "layer2", "layer3", "layer4")
    assert set(encoder.map_names) == {"conv1", *encoder.default_features, *(f"layer{s}_blk1" for s in range(1, 5))}


def test_keys_of_the_drift(encoder):
    features = multi_scale_features(encoder, images())
    suffixes = ("", "_mean", "_std", "_mean_2", "_std_2", "_mean_4", "_std_4")
    wanted = {f"layer{s}{suffix}" for s in range(1, 5) for suffix in suffixes}
    assert set(features) == wanted - {"layer4_mean_4", "layer4_std_4"}  # 2x2 locations


def test_unit_colours_are_left_as_they_are(network, tmp_path):
    path = saved(network.state_dict(), tmp_path / "weights.pth")
    x = torch.rand(1, 3, SIZE, SIZE)
    unit = load(path, "supervised", normalization="unit")
    assert torch.allclose(unit.network_input(x * 2 - 1), x, atol=1e-6)


def test_gradients_reach_the_images_alone_and_norms_stay_frozen(encoder):
    encoder.train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    x = images().requires_grad_()
    sum(value.square().mean() for value in encoder.feature_maps(x).values()).backward()
    assert x.grad.any() and torch.isfinite(x.grad).all()
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_bfloat16_and_channels_last(encoder):
    full = encoder.feature_maps(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = encoder.feature_maps(images())
    try:
        encoder.to(memory_format=torch.channels_last)
        turned = encoder.feature_maps(images().to(memory_format=torch.channels_last))
    finally:
        encoder.to(memory_format=torch.contiguous_format)
    for name, value in full.items():
        assert half[name].dtype == torch.bfloat16
        assert_norm_close(half[name].float(), value, 5e-2, name)
        assert_norm_close(turned[name], value, 1e-5, name)


def test_random_weights_read_no_file_and_draw_nothing_globally(tmp_path):
    state = torch.get_rng_state()
    first, second = (load(tmp_path / "none", "supervised", random=True) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    assert all(torch.isfinite(value).all() and value.std() > 1e-3 for value in first.feature_maps(images()).values())
