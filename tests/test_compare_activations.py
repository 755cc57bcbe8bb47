"""The comparison as a whole on digits: good, collapsed, missing and bad generators told apart, files, refusals."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from digit_activations import digit_sets, write_set
from tiny_models import call_tool
from tiny_runs import launch, run_tool

from drift_accel.analysis.activations.store import ActivationSet
from drift_accel.analysis.comparison.compare import ComparisonConfig, compare_sets
from drift_accel.analysis.comparison.layer_space import sample_set
from drift_accel.analysis.comparison.measures import MEASURES
from drift_accel.analysis.comparison.page import comparison_page
from drift_accel.analysis.comparison.set_paths import open_sets
from drift_accel.evaluation import frechet_distance, gaussian_statistics
from drift_accel.evaluation.kernel_distance import kernel_distance
from drift_accel.foundation.storage import verify_folder

GENERATED = ("early", "collapsed", "prototypes", "finished")
QUIET = {"log": lambda text: None}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return digit_sets(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def sets(places):
    return {name: sample_set(ActivationSet.open(path.parent.parent, name), name) for name, path in places.items()}


@pytest.fixture(scope="module")
def output(places, tmp_path_factory):
    """(folder, what was printed) of one call of the tool."""
    folder = tmp_path_factory.mktemp("comparison") / "out"
    generated = [places[name] for name in GENERATED]
    printed = call_tool("compare_activations", places["real"], *generated, "--output_dir", folder, "--embeddings", "pca", "--cpu")
    return folder, printed


@pytest.fixture(scope="module")
def record(output):
    return json.loads((output[0] / "comparison.json").read_text())


@pytest.mark.parametrize("space", ["pixels", "features"])
def test_every_measure_orders_the_sets_as_it_must(record, space):
    values = record["layers"][space]["sets"]
    finished, collapsed, early, prototypes = (values[name] for name in ("finished", "collapsed", "early", "prototypes"))
    for name in ("frechet", "kernel"):
        assert finished[name] < collapsed[name] < early[name], name
        assert finished[name] < prototypes[name], name
    for name in ("recall", "coverage", "least_class_coverage"):
        assert finished[name] > collapsed[name] > prototypes[name], name
    for name in ("coverage", "density", "precision", "label_agreement"):
        assert finished[name] > early[name], name
    # Leaving classes out harms no single sample: what measures these alone must not punish it.
    for name in ("precision", "label_agreement", "density", "centroid_distance"):
        assert collapsed[name] == pytest.approx(finished[name], abs=0.1), name
    assert [found["missing_classes"] for found in (finished, collapsed)] == [0, 2]
    assert [found["collapsed_classes"] for found in (finished, early, prototypes)] == [0, 0, 10]
    best = record["layers"][space]["best_first"]
    assert {best[name][0] for name in ("frechet", "kernel", "coverage", "least_class_coverage")} == {"finished"}


def test_missing_and_collapsed_classes_are_named(output, record):
    _, printed = output
    for space in ("pixels", "features"):
        missing = record["layers"][space]["missing_classes"]
        assert [(one["name"], one["state"]) for one in missing["collapsed"]] == [("digit 3", "absent"), ("digit 7", "absent")]
        assert missing["finished"] == missing["prototypes"] == []
        assert len(record["layers"][space]["collapsed_classes"]["prototypes"]) == 10
        assert {one["name"] for one in record["layers"][space]["worst_classes"]["collapsed"][:2]} == {"digit 3", "digit 7"}
    assert "collapsed: absent: digit 3, digit 7\n" in printed
    assert "prototypes: collapsed: digit 0, digit 1" in printed


def test_numbers_are_those_of_the_single_measures(record, sets):
    real, generated = (sets[name].source.rows("features") for name in ("real", "finished"))
    values = record["layers"]["features"]["sets"]["finished"]
    assert values["frechet"] == pytest.approx(frechet_distance(*gaussian_statistics(real), *gaussian_statistics(generated)))
    assert (values["kernel"], values["kernel_std"]) == pytest.approx(kernel_distance(real, generated, num_subsets=1))


def test_a_set_against_itself_is_perfect(sets):
    config = ComparisonConfig(layers=("features",), embeddings=("pca",))
    other = sample_set(sets["real"].source, "copy")
    found = compare_sets(sets["real"], [other], config, **QUIET)
    for values in (found.main_sets[0].values, found.embedded["pca"].sets[0].values):
        assert values["frechet"] == pytest.approx(0, abs=1e-9)
        assert values["kernel"] <= 0  # unbiased for independent draws; of copies the diagonal alone is left
        assert [values[name] for name in ("precision", "recall", "coverage", "least_class_coverage")] == [1.0] * 4
        assert (values["missing_classes"], values["collapsed_classes"], values["centroid_distance"]) == (0, 0, 0.0)
    np.testing.assert_array_equal(found.layers["features"].histograms.overlap[1].round(12), 1.0)
    np.testing.assert_array_equal(found.embedded["pca"].coordinates[0], found.embedded["pca"].coordinates[1])


def test_what_else_is_compared_and_the_order_of_samples_change_no_number(sets, tmp_path):
    source, order = sets["finished"].source, np.random.default_rng(0).permutation(len(sets["finished"]))
    write_set(tmp_path, "shuffled", {"features": source.rows("features")[order]}, source.labels[order])
    moved = sample_set(ActivationSet.open(tmp_path, "shuffled"), "shuffled")
    config = ComparisonConfig(layers=("features",), embeddings=("pca",))
    # The stand-in's classes have no names of their own: only numbers are asked for.
    real = write_set(tmp_path, "real", {"features": sets["real"].source.rows("features")}, sets["real"].labels)
    real = sample_set(ActivationSet.open(tmp_path, real.name), "real")
    plain = write_set(tmp_path, "plain", {"features": source.rows("features")}, source.labels)
    plain = sample_set(ActivationSet.open(tmp_path, plain.name), "plain")
    alone = compare_sets(real, [moved], config, **QUIET)
    both = compare_sets(real, [plain, moved], config, **QUIET)
    assert alone.main_sets[0].values == both.main_sets[1].values
    for name in MEASURES:
        assert both.main_sets[0].values[name] == pytest.approx(both.main_sets[1].values[name], rel=1e-6, abs=1e-9), name
    np.testing.assert_array_equal(alone.embedded["pca"].coordinates[1], both.embedded["pca"].coordinates[2])


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_files_are_whole_and_agree(output, record, sets):
    folder, printed = output
    assert verify_folder(folder) == []
    assert f"{folder / 'comparison.html'}: " in printed
    names = {path.name for path in (folder / "plots").iterdir()}
    assert {"measures.png", "classes.png", "embedding_pca.png"} < names and sum("histograms" in name for name in names) == 2
    measures = rows_of(folder / "measures.csv")
    assert [(row["space"], row["set"]) for row in measures[:4]] == [("pixels", name) for name in GENERATED]
    assert len(measures) == 12
    assert float(measures[3]["coverage"]) == record["layers"]["pixels"]["sets"]["finished"]["coverage"]
    assert len(rows_of(folder / "classes.csv")) == 2 * 4 * 10
    shares = [
        float(row["share"]) for row in rows_of(folder / "histograms.csv") if row["set"] == "early" and row["layer"] == "pixels"
    ]
    assert sum(shares) == pytest.approx(1)  # one channel, one group
    generated, real = (rows_of(folder / f"{kind}_samples.csv") for kind in ("generated", "real"))
    assert len(generated) == sum(len(sets[name]) for name in GENERATED) and len(real) == 4 * len(sets["real"])
    covered = [row["covered"] == "True" for row in real if row["against"] == "prototypes"]
    assert np.mean(covered) == pytest.approx(record["layers"]["features"]["sets"]["prototypes"]["coverage"])
    one = max((row for row in generated if row["set"] == "early"), key=lambda row: float(row["isolation"]))
    assert record["outliers"]["early"][0]["sample"] == int(one["sample"])
    features = [sets[name].source.rows("features").astype(np.float64) for name in ("early", "real")]
    across = np.linalg.norm(features[0][int(one["sample"])] - features[1], axis=1)
    assert int(one["nearest_real"]) == across.argmin()
    assert float(one["nearest_real_distance"]) == pytest.approx(across.min())
    assert "threshold comes from the data's own distances" in record["statements"][0]


def test_a_saved_embedding_shows_later_sets_in_the_same_picture(output, places, tmp_path):
    folder, _ = output
    call_tool(
        "compare_activations", places["real"], places["collapsed"], "--output_dir", tmp_path / "out", "--embeddings", "pca",
        "--embeddings_from", folder, "--layers", "features", "--max_points", 200, "--max_samples", 100, "--cpu",
    )  # fmt: skip
    first = {row["sample"]: row for row in rows_of(folder / "generated_samples.csv") if row["set"] == "collapsed"}
    later = rows_of(tmp_path / "out/generated_samples.csv")
    assert len(later) == 100
    for row in later:
        assert float(row["pca_x"]) == pytest.approx(float(first[row["sample"]]["pca_x"]), abs=1e-5)


def test_a_saved_embedding_of_another_layer_is_refused(output, places, tmp_path):
    options = ("--embeddings_from", output[0], "--layers", "pixels", "--output_dir", tmp_path / "out", "--cpu")
    printed = call_tool(
        "compare_activations", places["real"], places["early"], *options, "--embeddings", "pca", status=2
    )  # fmt: skip
    assert "the saved embedding pca is of layer 'features', the main layer is 'pixels'" in printed


# Bad input, refused before anything is written.


def refused(tmp_path, *arguments) -> str:
    printed = call_tool("compare_activations", *arguments, "--output_dir", tmp_path / "out", "--cpu", "--embeddings", status=2)
    assert not (tmp_path / "out").exists()
    return printed


def test_sets_that_cannot_be_compared_are_refused(places, tmp_path):
    real = places["real"]
    random = np.random.default_rng(0)
    few = write_set(tmp_path, "few", {"pixels": random.random((5, 1, 8, 8))}, range(5))
    assert "'few' has 5 samples; a 5-th neighbour needs at least 6" in refused(tmp_path, real, few)
    wide = write_set(tmp_path, "wide", {"pixels": random.random((9, 1, 4, 4))}, [-1] * 9)
    assert "layer 'pixels' has the shape (1, 8, 8) in 'real' and (1, 4, 4) in 'wide'" in refused(tmp_path, real, wide)
    other = write_set(tmp_path, "other", {"logits": random.random((9, 3))}, [-1] * 9)
    assert "no layer in common" in refused(tmp_path, real, other)
    assert "no layer is in all of the sets" in refused(tmp_path, real, places["early"], other)
    named = write_set(tmp_path, "named", {"pixels": random.random((9, 1, 8, 8))}, [0] * 9, classes={0: "tench"})
    assert "class 0 is 'digit 0' in 'real' and 'tench' in 'named'" in refused(tmp_path, real, named)
    hashes = [{"model": {"weights_sha256": letter * 64}} for letter in "ab"]
    a, b = (write_set(tmp_path, n, {"x": random.random((9, 3))}, [0] * 9, metadata=h) for n, h in zip("ab", hashes, strict=True))
    assert "models of different weights (aaaaaaaa and bbbbbbbb)" in refused(tmp_path, a, b)
    broken = random.random((9, 1, 8, 8))
    broken[4, 0, 2, 2] = np.nan
    broken = write_set(tmp_path, "broken", {"pixels": broken}, [-1] * 9)
    assert "holds a NaN or an infinite value in sample 4 (broken/4)" in refused(tmp_path, real, broken, "--layers", "pixels")
    assert "is given twice" in refused(tmp_path, real, real)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--k", 0), "--k is 0: give at least 1"),
        (("--groups", 0), "--groups is 0"),
        (("--components", 1), "--components is 1"),
        (("--max_samples", 0), "max_samples is 0"),
        (("--layers", "blocks"), "has no layer 'blocks'"),
        (("--layers", "pixels", "--main_layer", "features"), "which is not among --layers pixels"),
        (("--main_layer", "blocks"), "--main_layer is 'blocks': the sets have pixels, features in common"),
        (("--layers", "features", "--space", "pooled"), "no positions to average"),
        (("--device", "gpu"), "device is 'gpu'"),
        (("--max_points", 11), "page of 11 samples of 2 sets, each with 5 neighbours; give at least 12"),
    ],
)
def test_options_that_cannot_work_are_refused(places, tmp_path, arguments, message):
    out = tmp_path / "out"
    printed = call_tool(
        "compare_activations", places["real"], places["finished"], "--output_dir", out, "--embeddings", *arguments, status=2
    )
    assert message in printed and not out.exists()


def test_folders_without_a_set_or_with_several_are_refused(places, tmp_path, output):
    folder = places["real"].parent.parent
    assert "holds the sets collapsed, early, finished, prototypes, real: name one" in refused(tmp_path, folder, places["early"])
    assert "holds no set" in refused(tmp_path, tmp_path, places["early"])
    printed = call_tool("compare_activations", folder, places["early"], "--output_dir", output[0], status=2)
    assert "add --overwrite" in printed


def test_samples_of_no_known_class_are_compared_without_class_measures(tmp_path):
    random = np.random.default_rng(0)
    a, b = (write_set(tmp_path, name, {"x": random.standard_normal((40, 3))}, [-1] * 40) for name in "ab")
    chosen = [sample_set(ActivationSet.open(tmp_path, path.name), path.name) for path in (a, b)]
    found = compare_sets(chosen[0], chosen[1:], ComparisonConfig(embeddings=()), **QUIET)
    assert found.main_sets[0].values["missing_classes"] is None and found.main_sets[0].values["coverage"] > 0.8
    page = comparison_page(found, title="unknown")
    assert "No sample has a known class" in page and "No embedding was asked for" in page


def test_titles_tell_sets_of_one_name_apart(tmp_path):
    paths = [write_set(tmp_path / folder, "generated", {"x": np.ones((2, 3))}, [0, 0]) for folder in "ab"]
    assert list(open_sets(paths)) == ["a/generated", "b/generated"]
    assert list(open_sets([paths[0].parent.parent])) == ["generated"]


QUICKSTART = Path(__file__).resolve().parents[1] / "runs/quickstart"


@pytest.mark.slow
@pytest.mark.skipif(not (QUICKSTART / "generator/exports").is_dir(), reason="needs launch_scripts/quickstart.sh's run")
def test_trained_generators_are_told_apart(tmp_path):
    """The quickstart's generator, the same without two classes, and one stopped early, in the space of its encoder."""
    encoder = QUICKSTART / "mae/exports/ema_0.99"
    config = QUICKSTART.parents[1] / "train_configs/digits.yaml"
    options = [
        "--config",
        config,
        "--encoder.path",
        encoder,
        "--output_dir",
        tmp_path / "early",
        "--steps",
        60,
        "--device",
        "cpu",
    ]
    result = launch(1, "drift_accel.train", list(map(str, options)), timeout=1800)
    assert result.returncode == 0, result.stderr[-2000:]
    sources = {
        "real": ("digits",),
        "early": (tmp_path / "early", "--ema", "none", "--step", "latest", "--num_samples", 1000),
        "collapsed": (QUICKSTART / "generator", "--classes", "0-2,4-6,8-9", "--num_samples", 1000),
        "finished": (QUICKSTART / "generator", "--num_samples", 1000),
    }
    common = ("--model", encoder, "--layers", "layer2_blk2,layer4_blk2", "--output_dir", tmp_path, "--cpu")
    for name, source in sources.items():
        assert not run_tool("extract_activations", *source, *common, "--name", name)
    paths = [tmp_path / "activations" / name for name in sources]
    call_tool("compare_activations", *paths, "--output_dir", tmp_path / "out", "--embeddings", "pca", "--cpu")
    record = json.loads((tmp_path / "out/comparison.json").read_text())
    for layer in record["layers"].values():
        early, collapsed, finished = (layer["sets"][name] for name in ("early", "collapsed", "finished"))
        for name in ("frechet", "kernel"):
            assert finished[name] < collapsed[name] < early[name], name
        assert finished["coverage"] > collapsed["coverage"] > early["coverage"]
        assert finished["least_class_coverage"] > 0.7 > 0.5 > collapsed["least_class_coverage"]
        assert finished["recall"] > collapsed["recall"]  # that of the early one is high: its samples are far apart
        for name in ("precision", "density", "label_agreement"):
            assert early[name] < min(finished[name], collapsed[name]), name
        assert early["centroid_distance"] > max(finished["centroid_distance"], collapsed["centroid_distance"])
        assert [one["class_id"] for one in layer["missing_classes"]["collapsed"]] == [3, 7]
        assert layer["missing_classes"]["finished"] == []
