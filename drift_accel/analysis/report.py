"""One self-contained HTML page of a run: curves, sample grids over time, results with their protocols, configuration, provenance.

Everything is in the file: it opens offline and loads nothing.
"""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from drift_accel.analysis.curves import metric_groups, result_curve, training_curve
from drift_accel.analysis.page import PAGE, details, figure, table
from drift_accel.evaluation.results import comparison_problems, is_result, load_result, number_text
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.storage import atomic_write_text

MAX_GRIDS = 8
PICTURE_PIXELS = 1400  # wider pictures are made smaller: the page stays a page


def write_report(run: RunFolder, output: Path) -> None:
    """Write the page of `run` to `output`, whole or not at all.

    Raises ValueError for a folder that is no run, and for records that cannot be read.
    """
    if not run.config_path.is_file():
        raise ValueError(f"{run.path} is no run: it has no {run.config_path.name}")
    configuration, records = run.read_configuration(), run.read_metrics()
    results = read_results(run)
    title = run.path.resolve().name
    sections = [
        _summary(run, configuration, records, results),
        _curves(records),
        _grids(run),
        _results(results),
        _pictures(run),
        _configuration(configuration),
        _provenance(run),
    ]
    atomic_write_text(output, PAGE.format(title=html.escape(title), sections="\n".join(filter(None, sections))))


def read_results(run: RunFolder) -> list[tuple[str, dict[str, Any]]]:
    """(name, result) of every result file of the run, by name."""
    return [(path.stem, load_result(path)) for path in sorted(run.evaluation_dir.glob("*.json")) if is_result(path)]


def comparable_groups(results: Sequence[tuple[str, Mapping[str, Any]]]) -> list[list[tuple[str, Mapping[str, Any]]]]:
    """Results in groups whose numbers may stand in one table."""
    groups: list[list[tuple[str, Mapping[str, Any]]]] = []
    for name, result in results:
        home = next((group for group in groups if not comparison_problems(group[0][1], result)), None)
        if home is None:
            groups.append([(name, result)])
        else:
            home.append((name, result))
    return groups


def _summary(run: RunFolder, configuration: Mapping[str, Any], records: Sequence[Mapping], results) -> str:
    steps, last = configuration.get("steps"), records[-1]["step"] if records else 0
    rows = [
        ("steps", f"{last:,} of {steps:,}" if isinstance(steps, int) else f"{last:,}"),
        ("checkpoints", ", ".join(map(str, run.checkpoint_steps())) or "none"),
        ("results", str(len(results))),
    ]
    sessions = _provenance_of(run).get("sessions")
    if sessions:
        devices = ", ".join(sessions[-1].get("devices") or []) or "CPU"
        rows.append(("processes, device", f"{_text(sessions[-1].get('num_processes'))}, {devices}"))
        rows.append(("first and last start", f"{_text(sessions[0].get('time'))}, {_text(sessions[-1].get('time'))}"))
    return f"<section><h2>Run</h2>{table(('', ''), rows)}</section>"


def _curves(records: Sequence[Mapping[str, Any]]) -> str:
    pictures = [figure(training_curve(records, name, tags), name) for name, tags in metric_groups(records).items()]
    body = f'<div class="grid">{"".join(pictures)}</div>' if pictures else "<p>Nothing was logged yet.</p>"
    note = "<p>The loss of a drifting model is flat by construction; progress is read from drift_sqnorm.</p>" if pictures else ""
    return f"<section><h2>Training</h2>{note}{body}</section>"


def _grids(run: RunFolder) -> str:
    paths = sorted(run.samples_dir.glob("step_*.png"))
    if not paths:
        return ""
    places = sorted({round(i * (len(paths) - 1) / max(MAX_GRIDS - 1, 1)) for i in range(min(MAX_GRIDS, len(paths)))})
    shown = [figure(_picture(paths[place]), f"step {int(paths[place].stem.removeprefix('step_')):,}") for place in places]
    return f'<section><h2>Samples over time</h2><div class="grid">{"".join(shown)}</div></section>'


def _results(results: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    if not results:
        return "<section><h2>Results</h2><p>None yet: tools/evaluate.py and tools/watch.py make some.</p></section>"
    parts = ["<section><h2>Results</h2><p>Numbers of different tables may not be compared.</p>"]
    for group in comparable_groups(results):
        first = group[0][1]
        protocol, reference = first["protocol"], first["reference"] or {}
        parts.append(f"<h3>{html.escape(protocol['protocol'])}, {first['num_generated']:,} samples</h3>")
        names = list(dict.fromkeys(key for _, result in group for key in result["metrics"] if not key.endswith("_std")))
        rows = [
            (
                name,
                *(_text((result.get("model") or {}).get(key)) for key in ("step", "ema")),
                *(_text(result["generated"].get(key)) for key in ("guidance_scale", "seed")),
                *(number_text(result["metrics"], key) for key in names),
            )
            for name, result in sorted(group, key=_place)
        ]
        parts.append(table(("result", "step", "average", "guidance", "seed", *names), rows))
        curve = result_curve([result for _, result in sorted(group, key=_place)])
        parts.append(figure(curve, "over steps") if curve else "")
        facts = [
            ("quantiser", _text(first["generated"].get("quantizer"))),
            ("network", f"{protocol.get('network')}, sha256 {protocol.get('network_sha256')}"),
            ("reference", f"{reference.get('file')}, {reference.get('num_images')} images, sha256 {reference.get('sha256')}"),
            *((f"operation {i}", text) for i, text in enumerate(protocol.get("operations", []), start=1)),
            *(("note", text) for text in dict.fromkeys(text for _, result in group for text in result.get("warnings", []))),
        ]
        parts.append(details("how these numbers were made", table(("", ""), facts)))
    return "".join(parts) + "</section>"


def _place(named: tuple[str, Mapping[str, Any]]) -> tuple:
    """Where a result stands: by step, average, guidance."""
    name, result = named
    model = result.get("model") or {}
    return model.get("step") or 0, str(model.get("ema")), result["generated"].get("guidance_scale") or 0, name


def _pictures(run: RunFolder) -> str:
    paths = sorted(run.evaluation_dir.glob("*.png"))
    shown = "".join(figure(_picture(path), path.stem.replace("_", " ")) for path in paths)
    return f'<section><h2>Evaluation pictures</h2><div class="grid wide">{shown}</div></section>' if shown else ""


def _configuration(configuration: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(dict(configuration), sort_keys=False, allow_unicode=True)
    return f"<section><h2>Configuration</h2>{details('config.yaml', f'<pre>{html.escape(text)}</pre>')}</section>"


def _provenance(run: RunFolder) -> str:
    provenance = _provenance_of(run)
    rows = [(name, _text(value)) for name, value in (provenance.get("identity") or {}).items()]
    for session in provenance.get("sessions") or []:
        git = session.get("git") or {}
        commit = f"{git.get('commit', 'no git')}{' with changes' if git.get('dirty') else ''}"
        rows.append((_text(session.get("time")), f"{' '.join(session.get('command') or [])} ({commit})"))
    whole = details("provenance.json", f"<pre>{html.escape(json.dumps(provenance, indent=2))}</pre>")
    notes = run.notes_path.read_text("utf-8") if run.notes_path.exists() else ""
    diary = details("RUN.md", f"<pre>{html.escape(notes)}</pre>") if notes else ""
    return f"<section><h2>Provenance</h2>{table(('', ''), rows)}{whole}{diary}</section>"


def _provenance_of(run: RunFolder) -> dict[str, Any]:
    try:
        return json.loads(run.provenance_path.read_text("utf-8"))
    except FileNotFoundError:
        return {}


def _picture(path: Path) -> str:
    """A picture file as an <img> that carries its bytes."""
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        if image.width > PICTURE_PIXELS:
            smaller = image.convert("RGB").resize(
                (PICTURE_PIXELS, round(image.height * PICTURE_PIXELS / image.width)), Image.LANCZOS
            )
            buffer = io.BytesIO()
            smaller.save(buffer, format="PNG", optimize=True)
            content = buffer.getvalue()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'


def _text(value: Any) -> str:
    return "-" if value is None else str(value)
