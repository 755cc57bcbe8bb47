"""The release's artifacts as folders of ours: the same bits, the same outputs as recorded, and nothing overwritten by mistake."""

import json

import pytest
import torch
from golden_files import assert_norm_close, channels_first, load_arrays, unpack_artifact
from safetensors.torch import load_file, save_file
from tiny_runs import load_tool, run_tool

from drift_accel.foundation.storage import verify_folder
from drift_accel.models import Generator, MaskedAutoencoder, load_official
from drift_accel.models.configuration import EncoderConfig, load_encoder
from drift_accel.models.exports import load_export
from drift_accel.models.official_conversion import check_conversion, check_outputs, convert_official

CLASSES = {"generator": Generator, "mae": MaskedAutoencoder, "mae_pixel": MaskedAutoencoder}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """{artifact: (its folder, ours)}, made by the command."""
    root = tmp_path_factory.mktemp("converted")
    folders = {name: (unpack_artifact(name, root / "official"), root / "ours" / name) for name in CLASSES}
    for source, target in folders.values():
        assert run_tool("convert_official", source, target) == 0
    return folders


@pytest.mark.parametrize("name", CLASSES)
def test_weights_come_back_bit_for_bit(name, converted):
    source, target = converted[name]
    assert verify_folder(target) == []
    official, ours = load_official(source).state_dict(), load_export(target, CLASSES[name]).state_dict()
    assert official.keys() == ours.keys()
    assert all(torch.equal(official[key], value) for key, value in ours.items())


def test_the_converted_generator_agrees_with_the_release(converted):
    golden = load_arrays("generator")
    model = Generator.from_pretrained(converted["generator"][1]).eval()
    with torch.no_grad():
        sample = model(
            channels_first(golden["noise_bhwc"]), golden["label"], golden["cfg_scale"], golden["style_index"]
        )  # fmt: skip
    assert_norm_close(sample, channels_first(golden["sample_bhwc"]), 2e-5, "sample")


@pytest.mark.parametrize("name", ["mae", "mae_pixel"])
def test_the_converted_encoders_agree_with_the_release_and_serve_the_drift(name, converted):
    golden = load_arrays(name)
    encoder = load_encoder(EncoderConfig(path=str(converted[name][1])))
    images = channels_first(golden["x_bhwc"])
    with torch.no_grad():
        losses = encoder(images, golden["label"], channels_first(golden["mask"]), 0.1)
        maps = encoder.feature_maps(images)
    assert_norm_close(losses.loss, golden["lambda0.1/loss"], 2e-5, "loss")
    for key in [key for key in maps if f"act/{key}" in golden]:
        assert_norm_close(maps[key].flatten(2).transpose(1, 2), golden[f"act/{key}"], 2e-5, key)


def test_the_record_says_where_the_weights_came_from(converted):
    source, target = converted["mae"]
    record = json.loads((target / "provenance.json").read_text())
    assert set(record["identity"]["official_sha256"]) == {"metadata.json", "ema_params.msgpack"}
    assert record["official_metadata"] == json.loads((source / "metadata.json").read_text())
    assert record["check"]["bit_identical"] and max(record["check"]["forward_differences"].values()) <= 2e-5


def test_an_existing_folder_needs_overwrite_and_must_be_a_model(converted, tmp_path, capsys):
    source, _ = converted["mae"]
    target = tmp_path / "ours"
    target.mkdir()
    (target / "mine.txt").write_text("precious")
    assert run_tool("convert_official", source, target) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert "is no exported model" in run_tool("convert_official", source, target, "--overwrite")
    assert "which it would replace" in run_tool("convert_official", source, source.parent, "--overwrite")
    assert [path.name for path in target.iterdir()] == ["mine.txt"]
    assert run_tool("convert_official", source, tmp_path / "new") == 0
    assert run_tool("convert_official", source, tmp_path / "new", "--overwrite") == 0
    with pytest.raises(FileExistsError, match="overwrite"):
        convert_official(source, tmp_path / "new", provenance={})


def test_what_is_not_the_release_is_refused_and_nothing_is_written(tmp_path):
    assert "no hub id" in run_tool("convert_official", tmp_path / "nowhere", tmp_path / "out")
    assert "metadata.json is missing" in run_tool("convert_official", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_hub_id_is_downloaded(converted, monkeypatch, tmp_path):
    import huggingface_hub

    asked = {}
    root = converted["mae"][0].parent
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **more: asked.update(name=name, **more) or str(root))
    assert run_tool("convert_official", "some/release", tmp_path / "out", "--subfolder", "mae", "--revision", "abc") == 0
    assert asked == {
        "name": "some/release",
        "revision": "abc",
        "allow_patterns": ["mae/metadata.json", "mae/**.msgpack", "mae/pytorch_model.bin"],
    }
    assert load_tool("convert_official").__doc__


def test_a_lost_bit_and_another_output_are_found(converted):
    source, _ = converted["mae"]
    first, second = load_official(source), load_official(source)
    with torch.no_grad():
        second.classifier.bias[0] = torch.nextafter(second.classifier.bias[0], torch.tensor(9.0))
    with pytest.raises(RuntimeError, match=r"1 weights did not come back .*classifier\.bias"):
        check_conversion(first, second)
    second = load_official(source)
    second.encoder.stem.norm.eps = 0.1
    with pytest.raises(RuntimeError, match="output .* is off by"):
        check_conversion(first, second)


def test_the_check_is_a_function_of_the_weights_alone(converted):
    model = load_official(converted["generator"][0])
    torch.manual_seed(1)
    first = check_outputs(model)
    torch.manual_seed(2)
    assert all(torch.equal(value, check_outputs(model)[name]) for name, value in first.items())


def test_a_folder_that_cannot_be_read_back_is_not_committed(converted, tmp_path, monkeypatch):
    source, _ = converted["mae"]
    save = MaskedAutoencoder.save_pretrained

    def lossy(self, folder):
        save(self, folder)
        path = folder / "diffusion_pytorch_model.safetensors"
        save_file({name: value * 1.5 for name, value in load_file(path).items()}, path)

    monkeypatch.setattr(MaskedAutoencoder, "save_pretrained", lossy)
    with pytest.raises(RuntimeError, match="did not come back"):
        convert_official(source, tmp_path / "out", provenance={})
    assert list(tmp_path.iterdir()) == []
