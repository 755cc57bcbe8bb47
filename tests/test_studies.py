"""Studies: what a file may say, that all is checked before any training, and the tables and plots of known numbers."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image
from tiny_runs import ROOT, run_tool
from tiny_studies import check, study_writer

from drift_accel.analysis.studies.judges import check_evaluation, make_judge
from drift_accel.analysis.studies.plot import plot_study
from drift_accel.analysis.studies.runs import DIVERGED, DONE, Outcome, choose_runs, plan_runs
from drift_accel.analysis.studies.study import StudyEvaluation, read_study
from drift_accel.analysis.studies.table import (
    markdown_table,
    published_agreement,
    ranking,
    shown,
    study_rows,
    summary,
    write_tables,
)
from drift_accel.foundation.command_line import configuration_dict

STUDIES = sorted((ROOT / "train_configs/studies").glob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    """Writes a study of a tiny recipe into the test's folder."""
    return study_writer(tmp_path)


# The files.


def test_every_study_of_the_project_is_accepted(tmp_path):
    """Also together: runs/studies holds the runs of all of them, so a name must mean one configuration."""
    seen = {}
    for path in STUDIES:
        study = read_study(path)
        runs = plan_runs(study, tmp_path, check)
        assert len(study.seeds) == 3 and len(runs) == 3 * len(study.variants) and all(variant.note for variant in study.variants)
        assert f"tools/ablate.py train_configs/studies/{path.name}" in path.read_text().splitlines()[0]
        for item in runs:
            assert seen.setdefault(item.name, item.config) == item.config, f"{path.stem}: {item.name}"
            assert item.config.seed == item.seed and item.arguments[-2:] == ["--seed", str(item.seed)]
    assert len(seen) > 45 and not list(tmp_path.iterdir())


def test_what_is_nearer_to_a_variant_counts_more(write, tmp_path):
    (tmp_path / "more.yaml").write_text("optimizer: {lr: 0.003, eps: 1.0e-7}\ndrift: {metric: l2_sq}\n")
    path = write(
        common={"optimizer": {"lr": 0.002, "eps": 1e-6}, "steps": 9},
        variants=[
            {"name": "a"},
            {"name": "b", "recipes": "more.yaml"},
            {"name": "c", "recipes": ["more.yaml"], "overrides": {"optimizer.lr": 0.004, "drift": {"temperatures": [0.1]}}},
        ],
    )
    a, b, c = (item.config for item in plan_runs(read_study(path, seeds=[7]), tmp_path, check))
    assert [config.optimizer.lr for config in (a, b, c)] == [0.002, 0.003, 0.004]
    assert [config.optimizer.eps for config in (a, b, c)] == [1e-6, 1e-7, 1e-7]
    assert [config.drift.metric for config in (a, b, c)] == ["l2", "l2_sq", "l2_sq"]
    assert c.drift.temperatures == (0.1,) and {config.seed for config in (a, b, c)} == {7}
    assert {config.steps for config in (a, b, c)} == {9}


BAD = {
    "unknown key": ({"varaints": []}, "study has the unknown key 'varaints': it may have title, base"),
    "no variants": ({"variants": []}, "variants is missing or empty"),
    "variants no list": ({"variants": {"a": 1}}, "variants is {'a': 1}: give a list"),
    "no base": ({"base": None}, "base is missing or empty"),
    "unknown base": ({"base": "other.yaml"}, "base: there is no .*other.yaml .paths are relative to the study's folder"),
    "same name": ({"variants": [{"name": "a"}, {"name": "A"}]}, "variant 2: the name 'A' is there already"),
    "no name": ({"variants": [{"note": "x"}]}, "variant 1 has the name None"),
    "name with a slash": ({"variants": [{"name": "a/b"}]}, "variant 1 has the name 'a/b'"),
    "variant's key": ({"variants": [{"name": "a", "override": {}}]}, "variant a has the unknown key 'override'"),
    "variant's recipe": ({"variants": [{"name": "a", "recipes": ["no.yaml"]}]}, "variant a: recipes: there is no .*no.yaml"),
    "published": ({"variants": [{"name": "a", "published": "8"}]}, "variant a: published is '8': give a number"),
    "seed as override": ({"variants": [{"name": "a", "overrides": {"seed": 3}}]}, "variant a: overrides has seed"),
    "folder as common": ({"common": {"output_dir": "x"}}, "common has output_dir"),
    "overrides no mapping": ({"variants": [{"name": "a", "overrides": [1]}]}, r"variant a: overrides is \[1\]"),
    "no seeds": ({"seeds": []}, r"seeds is \[\]: give a list"),
    "a seed twice": ({"seeds": [1, 1]}, r"seeds \[1, 1\] repeats one"),
    "a negative seed": ({"seeds": [-1]}, "seeds holds -1"),
    "guidance": ({"evaluation": {"guidance_scale": 0.5}}, "evaluation.guidance_scale is 0.5: guidance starts at 1"),
    "evaluation's key": ({"evaluation": {"guidance": 1}}, "evaluation has the unknown key 'guidance'"),
    "samples of digits": ({"evaluation": {"num_samples": 5}}, "evaluation.num_samples: the digits protocol has no such setting"),
    "samples of others": ({"evaluation": {"protocol": "encoder"}}, "evaluation.num_samples is None: say how many"),
    "samples as text": ({"evaluation": {"protocol": "encoder", "num_samples": "5"}}, "evaluation.num_samples is '5'"),
    "title": ({"title": 3}, "title is 3: give a text"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_study_is_refused_with_the_reason(write, name):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        read_study(write(**changes))
    assert "mine.yaml: " in str(error.value)


def test_a_file_that_is_no_study_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no study file"):
        read_study(tmp_path / "none.yaml")
    for text, message in (
        ("- 1\n", "give keys with values"),
        ("a: [\n", "mine.yaml"),
        ("title: a\ntitle: b\n", "title stands twice"),
    ):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_study(tmp_path / "mine.yaml")


def test_an_evaluation_that_cannot_work_is_refused_before_any_training(write, tmp_path):
    with pytest.raises(ValueError, match="evaluation.protocol is 'fid': choose one of digits, clean"):
        check_evaluation(StudyEvaluation(protocol="fid", num_samples=3), [])
    with pytest.raises(ValueError, match="evaluation.options: unrecognized arguments: --refrence x"):
        check_evaluation(StudyEvaluation(protocol="encoder", num_samples=3, options={"refrence": "x"}), [])
    (run, *_) = plan_runs(read_study(write(common={"generator.input_size": 16})), tmp_path, check)
    with pytest.raises(ValueError, match="'digits' judges 1x8x8 images, a generator here makes 1x16x16"):
        check_evaluation(StudyEvaluation(), [run.config])
    with pytest.raises((ValueError, OSError), match="no_encoder"):
        make_judge(StudyEvaluation(protocol="encoder", num_samples=3, options={"network": "no_encoder"}), tmp_path)


# The plan.


def test_configurations_are_checked_before_any_training(write, tmp_path):
    path = write(variants=[{"name": "a"}, {"name": "b", "overrides": {"drift.copling": "row"}}])
    with pytest.raises(ValueError, match="variant b: the trainer refuses its configuration: .*copling"):
        plan_runs(read_study(path), tmp_path, check)
    path = write(variants=[{"name": "a", "overrides": {"drift.coupling": "sinkhorn", "drift.sinkhorn_marginal": "none"}}])
    with pytest.raises(ValueError, match="variant a: .*which no transport plan with uniform columns meets"):
        plan_runs(read_study(path), tmp_path, check)
    path = write(variants=[{"name": "a"}, {"name": "b", "overrides": {"drift.attraction": 1.0}}])
    with pytest.raises(ValueError, match="variants a and b have one and the same configuration"):
        plan_runs(read_study(path), tmp_path, check)


def test_runs_of_another_configuration_are_not_taken(write, tmp_path):
    runs = plan_runs(read_study(write()), tmp_path, check)
    for item in runs:
        item.run.create()
        item.run.open_configuration(configuration_dict(item.config))
    assert [item.config for item in plan_runs(read_study(write()), tmp_path, check)] == [item.config for item in runs]
    assert plan_runs(read_study(write(common={"steps": 50})), tmp_path, check)[0].config.steps == 50, "a longer run goes on"
    with pytest.raises(ValueError, match=r"variant plain: the run in .* has another configuration .* optimizer.lr: 0.001 -> 0.5"):
        plan_runs(read_study(write(common={"optimizer.lr": 0.5})), tmp_path, check)


def test_variants_are_chosen_by_name(write, tmp_path):
    runs = plan_runs(read_study(write()), tmp_path, check)
    assert [item.name for item in runs] == ["plain-seed_0", "row-seed_0", "plain-seed_1", "row-seed_1"]
    assert [item.name for item in choose_runs(runs, ["row"])] == ["row-seed_0", "row-seed_1"]
    with pytest.raises(ValueError, match="--only col: the study has no such variant; it has plain, row"):
        choose_runs(runs, ["col"])


# Tables and plots.

VALUES = {"plain": [1.0, 2.0, 3.0], "row": [2.0, 2.0, 5.0], "bad": [None, None, None], "other": [0.5, 0.7, 0.6]}
PUBLISHED = {"plain": 8.0, "row": 9.0, "bad": 100.0, "other": 10.0}


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """(study, runs, rows) with the numbers of VALUES."""
    folder = tmp_path_factory.mktemp("known")
    overrides = {"row": {"drift.coupling": "row"}, "bad": {"drift.repulsion": 0.0}, "other": {"drift.metric": "l2_sq"}}
    entries = [{"name": n, "overrides": overrides.get(n, {}), "published": PUBLISHED[n], "note": f"{n} | x"} for n in VALUES]
    study = read_study(study_writer(folder)(variants=entries, seeds=[0, 1, 2], published="FID, a paper"))
    runs, outcomes = plan_runs(study, folder, check), {}
    for item in runs:
        value = VALUES[item.variant.name][item.seed]
        metrics = {"class_accuracy": 0.9, "frechet": value}
        outcomes[item.name] = Outcome(DIVERGED, "step 3: not finite") if value is None else Outcome(DONE, metrics=metrics)
    return study, runs, study_rows(study, runs, outcomes)


def test_means_and_spreads_are_those_of_the_runs(known):
    study, runs, rows = known
    for row in rows:
        values = VALUES[row["name"]]
        if row["name"] == "bad":
            assert row["metrics"] == {}
            continue
        assert row["metrics"]["frechet"]["mean"] == pytest.approx(np.mean(values))
        assert row["metrics"]["frechet"]["spread"] == pytest.approx(np.std(values, ddof=1))
        if row["name"] != "plain":
            difference = np.subtract(values, VALUES["plain"])
            assert row["versus_first"]["mean"] == pytest.approx(difference.mean())
            assert row["versus_first"]["spread"] == pytest.approx(difference.std(ddof=1))
    assert ranking(rows, "frechet") == ["other", "plain", "row", "bad"]
    assert ranking(rows, "class_accuracy")[-1] == "bad"
    # Ours: other < plain < row; published: plain < row < other.
    assert published_agreement(rows, "frechet") == pytest.approx(-0.5)
    assert published_agreement(rows[:2], "frechet") is None
    assert summary({0: None, 1: float("nan")})["mean"] is None and summary({0: 4.0})["spread"] is None


def test_the_table_reads_well_and_comes_back(known, tmp_path):
    study, runs, rows = known
    text = markdown_table(study, rows)
    assert "| plain | 3/3 | 2.0 ± 1.0 | 0.900 | - | 8 | plain \\| x |" in text
    assert "| bad | 0/3, 3 diverged | - | - | - | 100 |" in text
    assert "bad, seed 1, diverged: step 3: not finite" in text
    assert "By frechet, best first: other, plain, row, bad." in text and "(Spearman): -0.50" in text
    markdown, table, record = write_tables(study, runs, rows, tmp_path / "out")
    assert text in markdown.read_text()
    lines = list(csv.DictReader(io.StringIO(table.read_text())))
    assert len(lines) == 12 and {line["state"] for line in lines} == {"done", "diverged"}
    assert [float(line["frechet"]) for line in lines if line["variant"] == "row"] == VALUES["row"]
    content = json.loads(record.read_text())
    assert content["ranking"][0] == "other" and content["metric"] == "frechet"
    assert content["variants"][0]["metrics"]["frechet"]["values"] == {"0": 1.0, "1": 2.0, "2": 3.0}


def test_a_metric_that_was_not_measured_is_refused(known):
    study, _, rows = known
    other = dataclasses.replace(study, evaluation=StudyEvaluation(metric="fid"))
    with pytest.raises(ValueError, match="evaluation.metric is 'fid': the runs have class_accuracy, frechet"):
        markdown_table(other, rows)


def test_numbers_have_the_digits_that_their_spread_allows():
    assert shown({"mean": 1.23456, "spread": 0.0123}) == "1.235 ± 0.012"
    assert shown({"mean": 123.456, "spread": 12.3}) == "123 ± 12"
    assert shown({"mean": 0.5, "spread": None}) == "0.500" and shown({"mean": -0.5, "spread": 0.1}, signed=True) == "-0.50 ± 0.10"
    assert shown(None) == "-"


def test_the_plot_draws_runs_and_says_what_diverged(known, tmp_path):
    study, _, rows = known
    plot_study(rows, tmp_path / "a.png", title="A", metric="frechet", reference={"frechet": 0.1})
    plot_study([row for row in rows if row["name"] != "bad"], tmp_path / "b.png", title="A", metric="frechet")
    first, second = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")) for name in "ab")
    assert first.shape[1] == second.shape[1] and first.shape[0] > second.shape[0]
    assert (first < 128).mean() > 0.005
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_study([row for row in rows if row["name"] == "bad"], tmp_path / "c.png", title="A", metric="frechet")


# The command.


def test_the_tool_refuses_before_it_touches_anything(write, tmp_path, capsys):
    out = tmp_path / "out"
    for options, message in (
        (["--seeds", "a"], "--seeds is 'a'"),
        (["--only", "col"], "--only col"),
        (["--num_processes", "0"], "--num_processes is 0"),
    ):
        assert run_tool("ablate", write(), "--output_dir", out, *options) == 2
        assert message in capsys.readouterr().err and not out.exists()
    assert run_tool("ablate", write(), "--output_dir", out, "--dry_run", "--seeds", "3", "--num_processes", "2") == 0
    printed = capsys.readouterr().out
    assert "2 runs; every configuration is accepted" in printed and not out.exists()
    assert "--multi_gpu --main_process_port 0 --num_processes 2" in printed and "--drift.coupling row --seed 3" in printed


def test_a_table_of_nothing_says_so(write, tmp_path, capsys):
    assert run_tool("ablate", write(), "--output_dir", tmp_path / "out", "--table") == 1
    assert "| plain | 0/2, 2 not run |" in capsys.readouterr().out
    assert not (tmp_path / "out/mine.png").exists() and (tmp_path / "out/mine.csv").exists()
