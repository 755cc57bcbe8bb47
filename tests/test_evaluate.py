"""From pictures to a result: one pass, every number as its own function gives it, refusals before work, comparisons."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
from stand_in_inception import write_stand_in
from tiny_models import trained, write_encoder

from drift_accel.evaluation import frechet_distance, gaussian_statistics, inception_score, precision_recall
from drift_accel.evaluation.evaluate import MetricConfig, evaluate_pictures, make_reference, plan_metrics
from drift_accel.evaluation.kernel_distance import kernel_distance
from drift_accel.evaluation.networks import open_network
from drift_accel.evaluation.picture_sources import open_pictures
from drift_accel.evaluation.protocols import get_protocol
from drift_accel.evaluation.results import (
    MARKDOWN_HEADER,
    comparison_problems,
    comparison_table,
    load_result,
    markdown_line,
    numbers_text,
    write_result,
)
from drift_accel.evaluation.statistics import load_reference, save_reference
from drift_accel.sampling.pictures import GeneratedPictures

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def model(place):
    return trained(place / "export")


@pytest.fixture(scope="module")
def network(place):
    return open_network(get_protocol("encoder"), write_encoder(place / "mae"), layer="layer1_blk1")


@pytest.fixture(scope="module")
def reference(place, network):
    made = make_reference(open_pictures("digits"), network, place / "real", num_features=200)
    save_reference(place / "real.npz", made)
    return load_reference(place / "real.npz")


def samples(model, count=130, **options):
    return GeneratedPictures(model, np.arange(count) % 4, **{"guidance_scale": 1.0, "seed": 0, **options})


@pytest.fixture(scope="module")
def result(place, model, network, reference):
    return evaluate_pictures(samples(model), network, place / "work", reference=reference, model=model.origin, command=["test"])


def test_every_number_is_that_of_its_own_function(result, model, network, reference):
    features = network(samples(model).batch(range(64)))["features"]
    for start in (64, 128):
        features = np.concatenate([features, network(samples(model).batch(range(start, min(start + 64, 130))))["features"]])
    real = network(open_pictures("digits").batch(range(600)))["features"]
    numbers = result["metrics"]
    expected = frechet_distance(*gaussian_statistics(features), *gaussian_statistics(real))
    assert numbers["frechet_encoder"] == pytest.approx(expected, rel=1e-6)
    assert (numbers["precision"], numbers["recall"]) == precision_recall(reference.features, features)
    assert (numbers["kid"], numbers["kid_std"]) == kernel_distance(reference.features, features)
    assert "inception_score" not in numbers and len(reference.features) == 200


def test_the_result_says_everything(result, place, model, reference):
    write_result(place / "result.json", result)
    saved = load_result(place / "result.json")
    assert saved["protocol"]["protocol"] == "encoder" and len(saved["protocol"]["network_sha256"]) == 64
    assert saved["protocol"]["layer"] == "layer1_blk1" and saved["protocol"]["operations"]
    assert saved["num_generated"] == 130 and saved["generated"]["seed"] == 0 and saved["generated"]["guidance_scale"] == 1.0
    assert saved["generated"]["quantizer"] == "round" and saved["model"]["weights_sha256"] == model.origin["weights_sha256"]
    assert saved["reference"] == {
        "file": "real.npz", "sha256": reference.sha256, "protocol": "encoder", "num_images": 600, "num_features": 200,
        "features_from": None,
    }  # fmt: skip
    assert saved["settings"]["neighbours"] == 3 and saved["provenance"]["command"] == ["test"]
    line = markdown_line(saved)
    assert line.count("|") == MARKDOWN_HEADER.splitlines()[0].count("|") and line == saved["markdown"]
    for text in ("| 130 |", "encoder, round, network", "real.npz", model.origin["weights_sha256"][:8], "frechet_encoder"):
        assert text in line
    with pytest.raises(FileExistsError, match="add --overwrite"):
        write_result(place / "result.json", result)
    write_result(place / "result.json", result, overwrite=True)


def test_a_second_run_takes_the_chunks_that_are_there(result, place, model, network, reference, monkeypatch):
    monkeypatch.setattr(model.generator, "forward", lambda *inputs: pytest.fail("computed again"))
    again = evaluate_pictures(samples(model), network, place / "work", reference=reference, log=lambda text: None)
    assert again["metrics"] == result["metrics"]


def test_few_samples_are_warned_of_in_the_result(place, model, network, reference):
    few = evaluate_pictures(
        samples(model, 6), network, place / "few", reference=reference, config=MetricConfig(metrics=("frechet",))
    )
    assert any("the generated covariance is singular" in text for text in few["warnings"])


def test_inception_protocols_give_every_metric(place, model):
    network = open_network(get_protocol("release"), write_stand_in(place / "networks"), batch=4, run_code=True, spatial=True)
    digits = open_pictures("digits", limit=12)
    reference = make_reference(digits, network, place / "inception_real", num_features=12)
    config = MetricConfig(metrics=("frechet", "inception_score", "precision_recall", "kid", "sfid"), kid_subsets=2)
    pictures = samples(model, 12, quantizer="truncate")
    result = evaluate_pictures(pictures, network, place / "inception", reference=reference, config=config)
    outputs = network(pictures.batch(range(12)))
    numbers = result["metrics"]
    assert set(numbers) == {
        "fid", "sfid", "inception_score", "inception_score_std", "precision", "recall", "kid", "kid_std"
    }  # fmt: skip
    assert (numbers["inception_score"], numbers["inception_score_std"]) == inception_score(outputs["logits"])
    with pytest.warns(RuntimeWarning):
        expected = frechet_distance(*gaussian_statistics(outputs["spatial"]), *reference.spatial)
    assert numbers["sfid"] == pytest.approx(expected, rel=1e-6)
    assert "inception_score" in numbers_text(numbers) and " ± " in numbers_text(numbers)


def test_what_cannot_be_computed_is_refused_before_any_work(model, network, reference):
    def refused(message, config=None, count=130, reference=reference):
        with pytest.raises(ValueError, match=message):
            plan_metrics(config or MetricConfig(), count, network, reference)

    refused("inception_score needs logits, which protocol 'encoder' has not", MetricConfig(metrics=("inception_score",)))
    refused("sfid needs the mixed_6 map", MetricConfig(metrics=("sfid",)))
    refused("frechet needs a reference: give --reference", MetricConfig(metrics=("frechet",)), reference=None)
    refused("kid needs real features", MetricConfig(metrics=("kid",)), reference=None)
    refused("there is nothing to compute", reference=None)
    refused("1 pictures are too few: frechet needs at least 2", count=1)
    refused("3 pictures are too few: precision_recall needs at least 4", count=3)
    refused("belong to another protocol", reference=replace(reference, record={**reference.record, "protocol": "clean"}))
    assert plan_metrics(MetricConfig(), 130, network, reference) == ("frechet", "precision_recall", "kid")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"metrics": ("fid",)}, "choose some of frechet"),
        ({"metrics": ()}, "choose some of frechet"),
        ({"neighbours": 0}, "neighbours is 0"),
        ({"splits": 0}, "splits is 0"),
        ({"kid_subset_size": 1}, "kid_subset_size is 1"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        MetricConfig(**values)


def changed(result, **changes):
    """The result with other values at dotted places."""
    other = copy.deepcopy(result)
    for key, value in changes.items():
        *groups, name = key.split("__")
        target = other
        for group in groups:
            target = target[group]
        target[name] = value
    return other


def test_results_that_differ_in_what_is_compared_stand_side_by_side(result):
    other = changed(result, generated__guidance_scale=2.0, generated__seed=1, model__step=5, model__weights_sha256="x")
    assert comparison_problems(result, other) == []
    table = comparison_table([("a", result), ("b", other)])
    assert table.splitlines()[0] == "| result | step | average | guidance | frechet_encoder | precision | recall | kid |"
    assert len(table.splitlines()) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol__protocol": "clean"}, "protocol: 'encoder' against 'clean'"),
        ({"protocol__network_sha256": "b"}, "network: "),
        ({"protocol__layer": "conv1"}, "layer: 'layer1_blk1' against 'conv1'"),
        ({"generated__quantizer": "truncate"}, "quantiser: 'round' against 'truncate'"),
        ({"reference__sha256": "b"}, "reference: "),
        ({"num_generated": 50_000}, "number of pictures: 130 against 50000"),
        ({"settings__neighbours": 5}, "settings: "),
    ],
)
def test_results_of_different_protocols_are_refused_side_by_side(result, change, message):
    with pytest.raises(ValueError, match="a and b may not be compared") as error:
        comparison_table([("a", result), ("b", changed(result, **change))])
    assert message in str(error.value)


def test_files_that_are_no_results_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="give a result of tools/evaluate.py"):
        load_result(tmp_path / "none.json")
    for content in ("no json", json.dumps([]), json.dumps({"format": 1, "metrics": {}})):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ValueError, match="is no result"):
            load_result(tmp_path / "x.json")
