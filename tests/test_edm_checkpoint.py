"""Files of EDM and DMD2: every way in which they hold the tensors, what is refused by name, and their conversion."""

import json
import pickle

import pytest
import torch
from edm_networks import TINY, published_shapes, random_network
from safetensors.torch import save_file
from tiny_runs import run_tool

from drift_accel.foundation.storage import verify_folder
from drift_accel.models import EdmUNet, load_edm_unet
from drift_accel.models.edm_checkpoint import fit_edm_weights
from drift_accel.models.exports import load_export
from drift_accel.models.official_conversion import convert_official

FILTERED = ("enc.4x4_down", "dec.8x8_up")


@pytest.fixture(scope="module")
def network() -> EdmUNet:
    return random_network(TINY, dtype=torch.float32)


@pytest.fixture
def published(network) -> dict[str, torch.Tensor]:
    """The network's tensors as EDM and DMD2 write them."""
    tensors = {f"model.{name}": value.clone() for name, value in network.state_dict().items()}
    for block in FILTERED:
        for part in ("conv0", "skip"):
            tensors[f"model.{block}.{part}.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
    return tensors


def saved(content, path):
    path.parent.mkdir(exist_ok=True)
    torch.save(content, path)
    return path


def assert_loaded(model: EdmUNet, network: EdmUNet) -> None:
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    ours, wanted = model.state_dict(), network.state_dict()
    assert ours.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(ours[name], wanted[name])] == []
    assert {value.dtype for value in ours.values()} == {torch.float32}


# What is read


def wrappings(tensors: dict[str, torch.Tensor]) -> dict[str, object]:
    inner = {name.removeprefix("model."): value for name, value in tensors.items()}
    return {
        "EDM's state dict and DMD2's pytorch_model.bin": tensors,
        "without the preconditioning's prefix": inner,
        "without the constant filters": {name: value for name, value in inner.items() if not name.endswith("filter")},
        "from data-parallel training": {f"module.{name}": value for name, value in tensors.items()},
        "below ema": {"ema": tensors},
        "below state_dict": {"state_dict": tensors, "epoch": 3},
    }


@pytest.mark.parametrize("kind", list(wrappings({})))
def test_every_wrapping_gives_the_same_weights(kind, published, network, tmp_path):
    path = saved(wrappings(published)[kind], tmp_path / "network.pt")
    assert_loaded(load_edm_unet(path, TINY), network)


def test_a_folder_of_dmd2_and_safetensors_are_read(published, network, tmp_path):
    """DMD2's folders hold the guidance model beside the generator."""
    saved(published, tmp_path / "dmd2/pytorch_model.bin")
    saved({f"fake_unet.{name}": value for name, value in published.items()}, tmp_path / "dmd2/pytorch_model_1.bin")
    save_file(published, tmp_path / "network.safetensors")
    (tmp_path / "safe").mkdir()
    save_file(published, tmp_path / "safe/model.safetensors")
    for path in ("dmd2", "network.safetensors", "safe"):
        assert_loaded(load_edm_unet(tmp_path / path, TINY), network)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_become_float32(dtype, published, tmp_path):
    path = saved({name: value.to(dtype) for name, value in published.items()}, tmp_path / "network.pt")
    state = load_edm_unet(path, TINY).state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert all(torch.equal(value, published[f"model.{name}"].to(dtype).float()) for name, value in state.items())


def test_the_default_is_the_published_network():
    """All 553 tensors of the two listings fit, none but the 12 filters is left over."""
    with torch.device("meta"):
        wanted = EdmUNet().state_dict()
        tensors = {name: torch.empty(shape) for name, shape in published_shapes().items() if not name.endswith("filter")}
    filters = {name: torch.full(shape, 0.25) for name, shape in published_shapes().items() if name.endswith("filter")}
    fitted = fit_edm_weights({**tensors, **filters}, wanted, "pytorch_model.bin")
    assert fitted.keys() == wanted.keys() and len(filters) == 12


def test_one_step_with_the_weights_of_a_file(published, network, tmp_path):
    model = load_edm_unet(saved(published, tmp_path / "network.pt"), TINY)
    noise, labels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 4])
    assert torch.equal(model.generate(noise, labels), network.generate(noise, labels))


# What is refused


def dropped(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


LABEL, CONV = "model.map_label.weight", "model.dec.4x4_in0.conv1.weight"
QKV, FILTER = "model.dec.4x4_in0.qkv.weight", "model.enc.4x4_down.conv0.resample_filter"
CHANGES = {
    "missing": (lambda t: dropped(t, CONV), r"missing tensors \['dec.4x4_in0.conv1.weight'\] \(1\), unknown tensors \[\] \(0\)"),
    "extra": (
        lambda t: {**t, "model.map_augment.weight": torch.zeros(16, 9)},
        r"missing tensors \[\] \(0\), unknown tensors \['map_augment.weight'\] \(1\)",
    ),
    "shape": (lambda t: {**t, LABEL: torch.zeros(64, 7)}, r"map_label.weight has shape \[64, 7\], wanted \[64, 5\]"),
    "integers": (lambda t: {**t, QKV: t[QKV].to(torch.int8)}, "dec.4x4_in0.qkv.weight has dtype torch.int8"),
    "another filter": (
        lambda t: {**t, FILTER: torch.tensor([[[[1.0, 3.0], [3.0, 9.0]]]]) / 16},
        "enc.4x4_down.conv0.resample_filter is not the mean of 2x2 pixels",
    ),
    "a larger filter": (lambda t: {**t, FILTER: torch.full((1, 1, 4, 4), 1 / 16)}, "conv0.resample_filter is not the mean"),
    "a filter elsewhere": (
        lambda t: {**t, "model.enc.8x8_block0.conv0.resample_filter": torch.full((1, 1, 2, 2), 0.25)},
        r"unknown tensors \['enc.8x8_block0.conv0.resample_filter'\]",
    ),
    "guidance model": (
        lambda t: {**{f"real_unet.{n}": v for n, v in t.items()}, "karras_sigmas": torch.zeros(1000)},
        "holds DMD2's guidance model .*: give the generator's file, pytorch_model.bin",
    ),
    "mixed prefixes": (lambda t: {**dropped(t, LABEL), "map_label.weight": t[LABEL]}, "missing tensors"),
    "another network": (lambda t: {"conv_in.weight": torch.zeros(3)}, r"unknown tensors \['conv_in.weight'\]"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_file_that_does_not_fit_is_refused_by_name(kind, published, tmp_path):
    change, message = CHANGES[kind]
    path = saved(change(published), tmp_path / "network.pt")
    with pytest.raises(ValueError, match=message) as refusal:
        load_edm_unet(path, TINY)
    assert str(path) in str(refusal.value)


class Opened:
    """Unpickling it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_a_pickled_network_is_not_opened(tmp_path):
    """Neither under its name nor under another; the message says how to convert it."""
    mark = tmp_path / "opened"
    for name, message in (
        ("edm-imagenet-64x64-cond-adm.pkl", r"(?s)is a pickled network.*torch\.save"),
        ("network.pt", "no file|holds"),
    ):
        with open(tmp_path / name, "wb") as file:
            pickle.dump({"ema": Opened(mark)}, file, protocol=2)
        with pytest.raises(ValueError, match=message):
            load_edm_unet(tmp_path / name, TINY)
    with pytest.raises(ValueError, match="holds Python objects beside its tensors"):
        load_edm_unet(saved({"ema": Opened(mark)}, tmp_path / "network.pth"), TINY)
    assert not mark.exists()


def test_what_is_not_there_or_damaged_is_refused(published, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no file of weights and no folder with pytorch_model.bin"):
        load_edm_unet(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="huggingface.co/tianweiy/DMD2"):
        load_edm_unet(tmp_path)
    path = saved(published, tmp_path / "network.pt")
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ValueError, match="damaged"):
        load_edm_unet(path, TINY)
    with pytest.raises(ValueError, match=r"no setting \['depth'\]"):
        load_edm_unet(path, {"depth": 3})


# Conversion


def test_a_file_becomes_a_folder_of_ours(published, network, tmp_path):
    saved(published, tmp_path / "dmd2/pytorch_model.bin")
    (tmp_path / "edm.json").write_text(json.dumps(TINY))
    assert run_tool("convert_official", tmp_path / "dmd2", tmp_path / "ours", "--edm_config", tmp_path / "edm.json") == 0
    assert verify_folder(tmp_path / "ours") == []
    assert_loaded(load_export(tmp_path / "ours", EdmUNet).requires_grad_(False), network)
    assert_loaded(load_edm_unet(tmp_path / "ours"), network)
    record = json.loads((tmp_path / "ours/provenance.json").read_text())
    assert list(record["identity"]["official_sha256"]) == ["pytorch_model.bin"]
    assert record["check"]["bit_identical"] and record["check"]["forward_differences"]["sample"] <= 2e-5
    with pytest.raises(ValueError, match=r"has a config.json of its own"):
        load_edm_unet(tmp_path / "ours", TINY)


def test_a_single_file_is_converted_and_never_replaced(published, network, tmp_path):
    path = saved(published, tmp_path / "files/edm.pt")
    (tmp_path / "edm.json").write_text(json.dumps(TINY))
    settings = ("--edm_config", tmp_path / "edm.json")
    assert run_tool("convert_official", path, tmp_path / "ours", *settings) == 0
    assert_loaded(load_edm_unet(tmp_path / "ours"), network)
    message = run_tool("convert_official", path, path.parent, "--overwrite", *settings)
    assert "which it would replace" in message and path.is_file()
    assert "has no subfolder" in run_tool("convert_official", path, tmp_path / "new", "--subfolder", "x", *settings)


def test_wrong_conversions_say_why_and_write_nothing(published, tmp_path):
    path = saved(published, tmp_path / "network.pt")
    assert "missing tensors" in run_tool("convert_official", path, tmp_path / "out"), "the default is ImageNet 64x64"
    for text, message in (("{", "is no JSON file"), ("[1]", "holds a list"), ('{"depth": 1}', "no setting ['depth']")):
        (tmp_path / "edm.json").write_text(text)
        assert message in run_tool("convert_official", path, tmp_path / "out", "--edm_config", tmp_path / "edm.json")
    (tmp_path / "edm.json").write_text(json.dumps(TINY))
    (tmp_path / "empty").mkdir()
    assert "no file of EDM's" in run_tool(
        "convert_official", tmp_path / "empty", tmp_path / "out", "--edm_config", tmp_path / "edm.json"
    )
    (tmp_path / "edm-imagenet-64x64-cond-adm.pkl").write_bytes(pickle.dumps({"ema": 1}))
    assert "is a pickled network" in run_tool("convert_official", tmp_path / "edm-imagenet-64x64-cond-adm.pkl", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="no file of EDM's or DMD2's weights"):
        convert_official(tmp_path / "empty", tmp_path / "out", provenance={}, edm_config=TINY)


def test_a_generator_on_the_hub_is_asked_for_once_its_configuration_is_possible(published, network, monkeypatch, tmp_path):
    asked = []

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (tmp_path / "snapshot/model/imagenet").mkdir(parents=True)
    saved(published, tmp_path / "snapshot/model/imagenet/NAME/pytorch_model.bin")
    command = ("convert_official", "tianweiy/DMD2", tmp_path / "out", "--subfolder", "model/imagenet/NAME")
    (tmp_path / "edm.json").write_text('{"input_size": 0}')
    assert "input_size is 0" in run_tool(*command, "--edm_config", tmp_path / "edm.json") and asked == []
    (tmp_path / "edm.json").write_text(json.dumps(TINY))
    assert run_tool(*command, "--edm_config", tmp_path / "edm.json") == 0
    assert_loaded(load_edm_unet(tmp_path / "out"), network)
    assert [(name, "model/imagenet/NAME/pytorch_model.bin" in patterns) for name, _, patterns in asked] == [
        ("tianweiy/DMD2", True)
    ]


@pytest.mark.slow
def test_a_file_of_the_published_size_is_converted(tmp_path):
    """As DMD2 writes it, in half precision to spare the disk: 553 tensors, 296 million weights."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in published_shapes().items():
        scale = 0.25 if name.endswith("filter") else 0.1 if len(shape) < 2 else torch.Size(shape[1:]).numel() ** -0.5
        values = torch.full(shape, 1.0) if name.endswith("filter") else torch.randn(shape, generator=generator)
        tensors[name] = (scale * values).half()
    saved(tensors, tmp_path / "dmd2/pytorch_model.bin")
    assert run_tool("convert_official", tmp_path / "dmd2", tmp_path / "ours") == 0
    state = load_edm_unet(tmp_path / "ours").state_dict()
    assert all(torch.equal(value, tensors[f"model.{name}"].float()) for name, value in state.items())
