"""tools/reference_stats.py, evaluate.py and compare_results.py: the whole path, resumed, refused, in several processes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stand_in_inception import write_stand_in
from tiny_models import call_tool, tiny_vae, write_encoder, write_export, write_run
from tiny_runs import launch_tool

from drift_accel.evaluation.results import load_result
from drift_accel.evaluation.statistics import load_reference

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run, an encoder, and the encoder's statistics of the digits."""
    place = tmp_path_factory.mktemp("tools")
    write_run(place / "run")
    write_encoder(place / "mae")
    options = ("--protocol", "encoder", "--network", place / "mae", "--layer", "layer1_blk1", "--cpu")
    call_tool("reference_stats", "digits", *options, "--output", place / "real.npz", "--num_features", 100)
    return place


def options(place: Path) -> list:
    """What every evaluation here shares."""
    network = ["--protocol", "encoder", "--network", place / "mae", "--layer", "layer1_blk1", "--cpu"]
    return [*network, "--reference", place / "real.npz", "--num_samples", 150]


def test_reference_statistics_and_their_record(place):
    reference = load_reference(place / "real.npz")
    assert reference.record["protocol"] == "encoder" and reference.record["num_images"] == 600
    assert reference.record["pictures"]["source"] == "digits, test" and len(reference.features) == 100
    assert not (place / "real.npz.in_progress").exists()
    shown = call_tool("reference_stats", place / "real.npz", "--show")
    assert reference.sha256 in shown and '"protocol": "encoder"' in shown
    np.savez(place / "published.npz", ref_mu=np.zeros(3), ref_sigma=np.eye(3))
    assert "does not say which protocol" in call_tool("reference_stats", place / "published.npz", "--show")


def test_a_run_is_evaluated_into_its_folder_and_compared(place):
    printed = call_tool("evaluate", place / "run", *options(place))
    path = place / "run/evaluation/encoder_step_00000020_ema_0.9_guidance_1_n150.json"
    assert f"result: {path}" in printed and "| encoder, round, network" in printed
    result = load_result(path)
    assert set(result["metrics"]) == {"frechet_encoder", "precision", "recall", "kid", "kid_std"}
    assert result["model"]["step"] == 20 and result["provenance"]["command"]
    assert "add --overwrite" in call_tool("evaluate", place / "run", *options(place), status=2)
    call_tool("evaluate", place / "run", *options(place), "--overwrite")
    assert load_result(path)["metrics"] == result["metrics"]
    call_tool("evaluate", place / "run", *options(place), "--step", 10, "--guidance_scale", 1.5)
    table = call_tool("compare_results", place / "run/evaluation")
    assert table.count("\n") == 4 and "| 10 | ema_0.9 | 1.5 |" in table
    assert sorted(p.suffix for p in (place / "run/evaluation").iterdir()) == [".json", ".json"]
    other = place / "other.json"
    other.write_text(json.dumps({**result, "protocol": {**result["protocol"], "protocol": "clean"}}))
    refused = call_tool("compare_results", path, other, status=2)
    assert "may not be compared" in refused and "protocol: 'encoder' against 'clean'" in refused


def test_kept_images_give_the_same_features_and_are_pictures(place, tmp_path):
    more = ("--output", tmp_path / "a.json", "--keep_images", tmp_path / "images.npz")
    call_tool("evaluate", place / "run", *options(place), *more)
    with np.load(tmp_path / "images.npz") as images:
        assert images["arr_0"].shape == (150, 8, 8, 3)
    assert not (tmp_path / "a.in_progress").exists()


def test_a_stopped_evaluation_goes_on(place, tmp_path, monkeypatch):
    from drift_accel.sampling.pictures import GeneratedPictures

    batch, calls = GeneratedPictures.batch, []

    def stopping(self, items):
        calls.append(items.start)
        if len(calls) == 2:
            raise OSError("disk full")
        return batch(self, items)

    monkeypatch.setattr(GeneratedPictures, "batch", stopping)
    assert "disk full" in call_tool("evaluate", place / "run", *options(place), "--output", tmp_path / "a.json", status=2)
    assert not (tmp_path / "a.json").exists() and (tmp_path / "a.in_progress").exists()
    call_tool("evaluate", place / "run", *options(place), "--output", tmp_path / "a.json")
    assert calls == [0, 64, 64, 128]


def test_an_inception_protocol_from_pictures_to_a_line(place, tmp_path, monkeypatch):
    write_stand_in(tmp_path / "networks")
    monkeypatch.setenv("DRIFT_ACCEL_NETWORKS", str(tmp_path / "networks"))
    call_tool("sample", place / "run", "--output", tmp_path / "fake.npz", "--per_class", 3, "--cpu", "--quantizer", "truncate")
    for number in range(12):
        pixels = np.random.default_rng(number).integers(256, size=(10, 12, 3), dtype=np.uint8)
        (tmp_path / "real").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"real/{number}.png")
    network = ("--protocol", "release", "--run_torchscript", "--network_batch", 4, "--cpu")
    command = (tmp_path / "fake.npz", *network, "--reference_images", tmp_path / "real", "--output", tmp_path / "r.json")
    printed = call_tool("evaluate", *command, "--metrics", "inception_score,precision_recall,kid")
    assert "inception_score 1" in printed and "release, truncate" in printed  # as the file says
    result = load_result(tmp_path / "r.json")
    assert result["reference"]["features_from"]["num_pictures"] == 12 and result["num_generated"] == 12
    assert result["model"]["step"] == 20 and result["generated"]["guidance_scale"] == 1 and result["generated"]["seed"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fake.npz", "networks", "r.json", "real"]


@pytest.mark.multiprocess
def test_two_processes_give_the_same_result(place, tmp_path):
    call_tool("evaluate", place / "run", *options(place), "--output", tmp_path / "one.json")
    done = launch_tool("evaluate", place / "run", *options(place), "--output", tmp_path / "two.json")
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (load_result(tmp_path / f"{name}.json") for name in ("one", "two"))
    assert two["provenance"]["num_processes"] == 2
    for name, value in one["metrics"].items():  # threads of the two launches may differ, so rounding may
        assert two["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--network", "nowhere"], "is no folder: give the folder of the encoder model"),
        (["run", "--reference", "none.npz"], "make it with tools/reference_stats.py"),
        (["run", "--layer", "layer2_blk1"], "belong to another protocol or network:\n  layer: 'layer1_blk1' there"),
        (["run", "--num_samples", "1"], "1 pictures are too few"),
        (["run", "--num_samples", "0"], "--num_samples is 0"),
        (["run", "--metrics", "fid"], "choose some of frechet"),
        (["run", "--metrics", "inception_score"], "needs logits"),
        (["run", "--classes", "dog"], "there is no class named 'dog'"),
        (["run", "--step", "15"], "has no checkpoint of step 15: it has 10, 20"),
        (["mae", "--output", "x.json"], "holds a MaskedAutoencoder: give the folder of a Generator"),
        (["empty", "--output", "x.json"], "no class folders and no pictures"),
        (["nowhere", "--output", "x.json"], "does not exist"),
        (["digits"], "is no run with a folder for results: give --output"),
    ],
)
def test_refusals_before_any_work(place, arguments, message, monkeypatch):
    monkeypatch.chdir(place)
    Path("empty").mkdir(exist_ok=True)
    before = sorted(path for path in place.rglob("*"))
    assert message in call_tool("evaluate", arguments[0], *options(place), "--name", "x", *arguments[1:], status=2)
    assert sorted(path for path in place.rglob("*")) == before


def test_latents_need_no_vae_in_our_own_feature_space(place, tmp_path):
    write_export(tmp_path / "export", channels=4)
    write_encoder(tmp_path / "mae", channels=4)
    network = ("--protocol", "encoder", "--network", tmp_path / "mae", "--cpu", "--num_samples", 10)
    printed = call_tool("evaluate", tmp_path / "export", *network, "--output", tmp_path / "x.json", status=2)
    assert "there is nothing to compute: frechet needs a reference" in printed
    tiny_vae().save_pretrained(tmp_path / "vae")
    call_tool("sample", tmp_path / "export", "--vae", tmp_path / "vae", "--output", tmp_path / "s", "--per_class", 2, "--cpu")
    assert "takes latents" in call_tool(
        "reference_stats", tmp_path / "s", "--protocol", "encoder", "--network", tmp_path / "mae", "--output", tmp_path / "r.npz",
        "--cpu", status=2,
    )  # fmt: skip
