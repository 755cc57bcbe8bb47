"""From the quickstart to the report's page: the README's commands as they stand there, one after the other, on a fresh run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import ROOT

from drift_accel.evaluation.results import load_result

README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.split("## Sampling and evaluation", 1)[1].split("\n## ", 1)[0]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", SECTION, re.S)


def test_the_section_shows_every_command_after_training():
    commands = blocks("bash")[0]
    for tool in ("sample", "reference_stats", "evaluate", "sweep", "watch", "nearest_neighbours", "compare_results", "report"):
        assert f"python tools/{tool}.py" in commands
    assert "RUN=runs/quickstart/generator" in commands and "DriftPipeline" in blocks("python")[0]


@pytest.mark.slow
def test_from_the_quickstart_to_the_page(tmp_path):
    """Each command must end well, and what it is for must be there. The quickstart itself takes most of the time."""
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    run("bash", str(ROOT / "launch_scripts/quickstart.sh"), "runs/quickstart")
    printed = run("bash", "-euo", "pipefail", "-c", blocks("bash")[0])
    script = f"{blocks('python')[0]}\nassert [image.size for image in images] == [(8, 8)] * 2\nimages[0].save('pipe.png')"
    run(sys.executable, "-c", script)

    generator, evaluation = tmp_path / "runs/quickstart/generator", tmp_path / "runs/quickstart/generator/evaluation"
    for picture in (tmp_path / "grid.png", evaluation / "nearest_neighbours.png", *evaluation.glob("sweep*.png")):
        with Image.open(picture) as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 20, f"{picture} is nearly blank"
    assert len(list(evaluation.glob("sweep*.png"))) == 2
    with np.load(tmp_path / "samples.npz") as samples:
        assert samples["arr_0"].shape == (2000, 8, 8, 3) and np.array_equal(samples["arr_1"], np.arange(2000) % 10)
    results = {path.stem: load_result(path) for path in evaluation.glob("encoder_*.json")}
    assert {result["num_generated"] for result in results.values()} == {200, 300, 1000}
    # Far from an untrained generator (distance 12 and more), near to what training digits reach (README: 1.14).
    assert all(result["metrics"]["frechet_encoder"] < 3 for result in results.values())
    state = json.loads((evaluation / "watch/state.json").read_text())
    assert state["now"] == "done" and set(state["stages"].values()) == {"done"}
    assert (evaluation / "samples_full.npz").is_file() and (evaluation / "sweep.csv").is_file()
    memorised = json.loads((evaluation / "nearest_neighbours.json").read_text())["nearest_distance"]
    assert memorised and "dry run: nothing was sent" in printed
    check_page(generator / "report.html", results, tmp_path)


def check_page(page: Path, results: dict, tmp_path: Path) -> None:
    """It shows every result, loads nothing, and a browser draws it."""
    text = page.read_text("utf-8")
    assert all(name in text for name in results)
    loaded = re.findall(r"(?:src|href)=\"(?!data:|#)([^\"]+)", text)
    assert loaded == [], f"the page loads {loaded[:3]}"
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        return
    picture = tmp_path / "page.png"
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1300,3000", f"--screenshot={picture}"]
    subprocess.run([*command, page.resolve().as_uri()], check=True, capture_output=True, timeout=300)
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("L"))
    assert len(np.unique(pixels)) > 100 and (pixels < 128).mean() > 0.005, "the browser shows a blank page"
