"""The page of a comparison: it loads nothing, and in a browser it hovers, filters, selects, zooms and sorts."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from chromium import find_chromium, open_browser
from digit_activations import digit_sets, write_set
from PIL import Image

from drift_accel.analysis.activations.store import ActivationSet
from drift_accel.analysis.comparison.compare import ComparisonConfig, compare_sets
from drift_accel.analysis.comparison.layer_space import sample_set
from drift_accel.analysis.comparison.page import comparison_page
from drift_accel.analysis.comparison.thumbnails import thumbnail_sheets
from drift_accel.analysis.page import scripted_page

needs_chromium = pytest.mark.skipif(find_chromium() is None, reason="no Chromium or Chrome is installed")
NAMES = ("real", "early", "finished")
QUIET = {"log": lambda text: None}


def compare(folder: Path, names, **options):
    sets = [sample_set(ActivationSet.open(folder, name), name) for name in names]
    return compare_sets(sets[0], sets[1:], ComparisonConfig(embeddings=("pca",), **options), **QUIET)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    digit_sets(folder, count=150)
    return compare(folder, NAMES, layers=("features",))


@pytest.fixture(scope="module")
def page(comparison, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "comparison.html"
    path.write_text(comparison_page(comparison, title="a <b>title</b>"), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def test_it_loads_nothing_and_runs_one_script(page):
    text = page.read_text()
    assert "default-src 'none'" in text and re.search(r"script-src 'sha256-[\w+/]{43}='", text)
    assert len(re.findall(r"<script[ >]", text)) == 2 and text.count('type="application/json"') == 1
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", text) and "a &lt;b&gt;title&lt;/b&gt;" in text
    assert len(text) < 2e6


def test_text_of_sets_cannot_leave_its_place(tmp_path):
    evil = "</script><script>alert(1)</script>"
    random = np.random.default_rng(0)
    for name in "ab":
        write_set(tmp_path, name, {"x": random.standard_normal((12, 3))}, [0] * 12, classes={0: evil})
    text = comparison_page(compare(tmp_path, "ab"), title="t")
    assert "alert(1)" in text and text.count("</script>") == 2 and "<script>alert" not in text
    with pytest.raises(ValueError, match="would end it"):
        scripted_page("t", "", "x = '</script>'")


def test_few_shown_samples_are_spread_and_too_few_refused(comparison):
    text = comparison_page(comparison, title="t", max_points=90)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    assert [one["count"] for one in data["sets"]] == [30, 30, 30]
    assert "90 of 450 samples are shown" in text
    with pytest.raises(ValueError, match="page of 15 samples of 3 sets, each with 5 neighbours; give at least 18"):
        comparison_page(comparison, title="t", max_points=15)


def test_thumbnails_stand_in_order_and_what_is_missing_stays_empty(tmp_path):
    for index in range(70):
        Image.new("RGB", (40, 20), (3 * index, 0, 255 - 3 * index)).save(tmp_path / f"{index}.png")
    (tmp_path / "5.png").write_bytes(b"no picture")
    (tmp_path / "grey.png").write_bytes(b"")
    Image.new("CMYK", (30, 30), (0, 255, 255, 0)).save(tmp_path / "6.jpg")
    paths = [None if index == 3 else tmp_path / f"{index}.{'jpg' if index == 6 else 'png'}" for index in range(70)]
    found = thumbnail_sheets(paths, largest=16)
    assert found.tile == 16 and len(found.sources) == 1
    assert np.flatnonzero(~found.present).tolist() == [3, 5]
    assert thumbnail_sheets([None, None]).present.tolist() == [False, False]
    with pytest.raises(ValueError, match="give at least 4"):
        thumbnail_sheets(paths, largest=2)


def to_window(browser, point: int) -> tuple[float, float]:
    """Where a point lies in the window."""
    return tuple(
        browser.run(
            "(() => { const box = document.getElementById('stage').getBoundingClientRect();"
            f"const place = explorer.toScreen({point}); return [box.left + place[0], box.top + place[1]]; }})()"
        )
    )


def lonely_points(comparison, count: int) -> list[int]:
    """Shown points far from all others in the plane, real ones first: what a pointer there must find."""
    points = np.concatenate(comparison.embedded["pca"].coordinates).astype(np.float64)
    apart = np.linalg.norm(points[:, None] - points, axis=2) + np.diag(np.full(len(points), np.inf))
    return np.argsort(-apart.min(axis=1))[:count].tolist()


@needs_chromium
def test_a_person_can_use_it(browser, page, comparison, tmp_path):
    browser.open(page)
    browser.run("explorer.ready.then(() => true)")
    browser.run("document.getElementById('stage').scrollIntoView({ block: 'center' })")
    starts = np.cumsum([0, *map(len, comparison.sets)])

    def facts(point: int) -> tuple[str, str]:
        place = int(np.searchsorted(starts, point, side="right")) - 1
        number = point - int(starts[place])
        label = int(comparison.sets[place].labels[number])
        return f"digit {label}", f"{NAMES[place]}, sample {number}"

    for point in lonely_points(comparison, 5):
        browser.mouse("mouseMoved", *to_window(browser, point))
        said = browser.run("document.getElementById('tooltip').innerText")
        assert said.splitlines()[:2] == list(facts(point))
        # The picture that is shown is the sample's own.
        place = int(np.searchsorted(starts, point, side="right")) - 1
        path = comparison.sets[place].source.sample(point - int(starts[place]))["image_path"]
        shown = browser.run("[...document.querySelector('#tooltip canvas').getContext('2d').getImageData(0, 0, 96, 96).data]")
        shown = np.array(shown).reshape(96, 96, 4)[6::12, 6::12, 0]  # 8x8 pixels, each 12 wide
        np.testing.assert_array_equal(shown, np.asarray(Image.open(path)))
    browser.mouse("mouseMoved", *np.add(to_window(browser, point), (0, 4000)))

    generated = next(point for point in lonely_points(comparison, 450) if point >= starts[1])
    browser.click(*to_window(browser, generated))
    place = int(np.searchsorted(starts, generated, side="right")) - 1
    near = comparison.main_sets[place - 1].neighbourhoods
    distances = near.nearest_real_distances[generated - starts[place]]
    detail = browser.run("document.getElementById('detail').innerText")
    assert "nearest in real" in detail.lower()
    assert [float(text) for text in re.findall(r"digit \d · ([\d.]+)", detail)] == pytest.approx(distances, rel=0.01)
    assert browser.run("location.hash") == f"#sample={generated}"

    # One class alone: its row in the table of classes, and the boxes of the list.
    browser.run("document.querySelector('#classes th[data-class=\"3\"]').click()")
    expected = sum(int((one.labels == 3).sum()) for one in comparison.sets)
    assert browser.run("explorer.visible()") == expected
    browser.run("[...document.querySelectorAll('#controls label input')].find((box) => box.dataset.class === '4').click()")
    assert browser.run("explorer.visible()") == expected + sum(int((one.labels == 4).sum()) for one in comparison.sets)
    browser.run("document.querySelectorAll('#controls label input')[1].click()")  # the set "early" away
    kept = sum(int(np.isin(one.labels, (3, 4)).sum()) for one in (comparison.sets[0], comparison.sets[2]))
    assert browser.run("explorer.visible()") == kept
    browser.run("explorer.filterClasses(null)")

    # Zooming at a point leaves it where it is.
    before = to_window(browser, generated)
    browser.mouse("mouseWheel", *before, deltaX=0, deltaY=-400)
    browser.wait_for("explorer.state.zoom > 1.5")
    assert to_window(browser, generated) == pytest.approx(before, abs=2)  # events come at whole pixels

    order = "[...document.querySelectorAll('#classes tbody tr')].map((row) => Number(row.cells[3].dataset.v))"
    browser.run("document.querySelectorAll('#classes thead tr')[1].cells[3].click()")
    coverages = browser.run(order)
    assert coverages == sorted(coverages) and len(set(coverages)) > 1
    browser.screenshot(tmp_path / "page.png")
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert pixels.shape == (960, 1360, 3) and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200
    assert browser.complaints == []


@pytest.mark.slow
@needs_chromium
def test_twenty_thousand_points(browser, tmp_path):
    random = np.random.default_rng(0)
    for name in ("real", "generated"):
        labels = np.arange(10_000) % 100
        rows = (random.standard_normal((100, 16)) * 3)[labels] + random.standard_normal((10_000, 16))
        pictures = random.integers(0, 255, (10_000, 32, 32), dtype=np.uint8)
        write_set(tmp_path, name, {"x": rows}, labels, pictures=pictures)
    page = tmp_path / "page.html"
    page.write_text(comparison_page(compare(tmp_path, ("real", "generated")), title="many"), encoding="utf-8")
    browser.open(page)
    browser.run("explorer.ready.then(() => true)")
    browser.run("document.getElementById('stage').scrollIntoView({ block: 'center' })")
    assert browser.run("explorer.visible()") == 20_000
    left, top = browser.run("(({ left, top }) => [left, top])(document.getElementById('stage').getBoundingClientRect())")
    found = []
    for x, y in random.integers((60, 60), (760, 600), (12, 2)).tolist():
        browser.mouse("mouseMoved", round(left) + x, round(top) + y)
        distance = "((p) => Math.hypot(...explorer.toScreen(p).map((v, i) => v - place[i])))"
        place = f"const place = [{round(left) + x - left}, {round(top) + y - top}];"
        nearest = browser.run(
            f"(() => {{ {place} let least = 1e9; for (let p = 0; p < 20000; p++) least = Math.min(least, "
            f"{distance}(p)); return least; }})()"
        )
        hovered = browser.run("explorer.state.hovered")
        if nearest > 12:
            assert hovered == -1
        else:
            there = browser.run(f"(() => {{ {place} return {distance}({hovered}); }})()")
            assert there == pytest.approx(nearest, abs=1e-3)
            found.append(hovered)
    assert len(found) > 4
    assert browser.complaints == []
