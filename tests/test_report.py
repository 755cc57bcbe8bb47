"""The report of a run: one page that loads nothing, with everything in it, also for a run that has hardly begun."""

import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image
from tiny_models import call_tool, write_encoder, write_run

from drift_accel.analysis.curves import metric_groups
from drift_accel.analysis.report import comparable_groups, read_results
from drift_accel.foundation.run_folder import RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with records, grids, two results of one protocol and one of another count."""
    place = tmp_path_factory.mktemp("report")
    run = write_run(place / "run")
    tags = ("drift_sqnorm_0.02", "drift_sqnorm_0.2", "drift_sqnorm_0.2/conv1")
    records = [{"step": step, "loss": 200 - step, **dict.fromkeys(tags, 0.1 / step)} for step in range(1, 21)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "samples").mkdir()
    for step in range(1, 13):
        Image.new("RGB", (30, 30), (step * 20, 0, 0)).save(run / f"samples/step_{step:08d}.png")
    network = ("--protocol", "encoder", "--network", write_encoder(place / "mae"), "--layer", "layer1_blk1", "--cpu")
    call_tool("reference_stats", "digits", *network, "--output", place / "real.npz")
    for step, count in ((10, 70), (20, 70), (20, 80)):
        call_tool("evaluate", run, *network, "--reference", place / "real.npz", "--step", step, "--num_samples", count)
    Image.new("RGB", (3000, 100)).save(run / "evaluation/wide.png")
    (run / "RUN.md").write_text("- opened <b>bold</b>\n")
    return run


class Links(HTMLParser):
    """Every address in a page, and whether its tags close."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action", "srcset")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


def test_the_page_is_whole_and_loads_nothing(run):
    printed = call_tool("report", run)
    assert str(run / "report.html") in printed
    text = (run / "report.html").read_text()
    links = Links(text)
    assert links.open == []
    assert all(link.startswith(("data:", "#")) for link in links.found)
    assert "default-src 'none'" in text and not re.search(r"url\((?!#)", text) and "<script" not in text


def test_everything_is_in_it(run):
    call_tool("report", run)
    text = (run / "report.html").read_text()
    assert text.count("<svg") == 3  # loss, drift_sqnorm, the Frechet distance over steps
    shown = re.findall(r"<figcaption>step ([\d,]+)</figcaption>", text)
    assert len(shown) == 8 and shown[0] == "1" and shown[-1] == "12"
    assert text.count("<h3>encoder, ") == 2 and "frechet_encoder" in text and "network" in text
    for expected in ("input_size: 8", "train.py", "wide", "- opened &lt;b&gt;bold&lt;/b&gt;", "tables may not be compared"):
        assert expected in text
    assert len(text) < 2e6


def test_results_are_grouped_by_what_may_be_compared(run):
    groups = comparable_groups(read_results(RunFolder(run)))
    assert sorted(len(group) for group in groups) == [1, 2]


def test_curves_of_one_quantity_share_a_picture_and_single_keys_are_left_out():
    records = [
        {"step": 1, "loss": 1.0, "drift_sqnorm_0.02": 1.0, "drift_sqnorm_0.2": 1.0, "drift_sqnorm_0.2/a": 1.0, "note": "x"}
    ]
    assert metric_groups(records) == {"loss": ["loss"], "drift_sqnorm": ["drift_sqnorm_0.02", "drift_sqnorm_0.2"]}


def test_a_run_that_has_hardly_begun_has_a_page(tmp_path):
    run = write_run(tmp_path / "run", steps=())
    (run / "provenance.json").unlink()
    call_tool("report", run, "--output", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "Nothing was logged yet" in text and "None yet" in text
    assert "add --overwrite" in call_tool("report", run, "--output", tmp_path / "page.html", status=2)
    assert "is no run" in call_tool("report", tmp_path, status=2)


def test_values_that_are_missing_do_not_break_a_curve(run, tmp_path):
    other = write_run(tmp_path / "run", steps=(10,))
    records = [{"step": 1, "loss": None, "drift_sqnorm_0.2": 0.0}, {"step": 2, "loss": 3.0, "drift_sqnorm_0.2": 1.0}]
    (other / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    call_tool("report", other)
    assert (other / "report.html").read_text().count("<svg") == 2
