"""Result files: what is in one, how it reads in a line, and why two may not be compared."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drift_accel.foundation.storage import atomic_write_json

FORMAT = 1
_REQUIRED = ("metrics", "protocol", "num_generated", "generated", "reference")
_LINE = "| {model} | {step} | {ema} | {guidance} | {seed} | {count} | {protocol} | {numbers} | {reference} |"
_COLUMNS = ("model", "step", "average", "guidance", "seed", "images", "protocol", "numbers", "reference")
MARKDOWN_HEADER = f"| {' | '.join(_COLUMNS)} |\n{'|---' * len(_COLUMNS)}|"
LOWER_IS_BETTER = ("fid", "sfid", "kid", "frechet")


def write_result(path: str | os.PathLike, result: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Write a result as JSON, its Markdown line in it, whole or not at all. Raises FileExistsError unless `overwrite`."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another output, or add --overwrite")
    atomic_write_json(path, {"format": FORMAT, **result, "markdown": markdown_line(result)})


def load_result(path: str | os.PathLike) -> dict[str, Any]:
    """Read a result back. Raises FileNotFoundError, ValueError for a file that is none."""
    path = Path(path)
    try:
        result = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: give a result of tools/evaluate.py") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no result: {error}") from None
    if not isinstance(result, dict) or result.get("format") != FORMAT or any(key not in result for key in _REQUIRED):
        raise ValueError(f"{path} is no result of tools/evaluate.py (format {FORMAT})")
    return result


def is_result(path: Path) -> bool:
    """Whether a file reads as a result."""
    try:
        load_result(path)
    except (OSError, ValueError):
        return False
    return True


def markdown_line(result: Mapping[str, Any]) -> str:
    """One row of the table that MARKDOWN_HEADER begins: everything that a number needs beside it."""
    model, generated, reference = result.get("model") or {}, result["generated"], result["reference"] or {}
    digest = (model.get("weights_sha256") or generated.get("sha256") or generated.get("fingerprint") or "")[:8]
    protocol, network = result["protocol"], (result["protocol"].get("network_sha256") or "")[:8]
    return _LINE.format(
        model=f"{Path(model.get('run') or model.get('path') or generated.get('source', '?')).name} {digest}".strip(),
        step=_shown(model.get("step")),
        ema=_shown(model.get("ema")),
        guidance=_shown(generated.get("guidance_scale")),
        seed=_shown(generated.get("seed")),
        count=f"{result['num_generated']:,}",
        protocol=f"{protocol['protocol']}, {generated.get('quantizer') or 'as given'}, network {network}",
        numbers=numbers_text(result["metrics"]),
        reference=f"{reference.get('file', 'none')} {(reference.get('sha256') or '')[:8]}".strip(),
    )


def numbers_text(metrics: Mapping[str, float]) -> str:
    """The numbers of a result in words: "fid 1.54, inception_score 260.1 +- 2.1"."""
    return ", ".join(f"{name} {number_text(metrics, name)}" for name in metrics if not name.endswith("_std"))


def number_text(metrics: Mapping[str, float], name: str) -> str:
    """One number with its deviation where there is one, "-" where it is not there: "260.1 +- 2.1"."""
    deviation = metrics.get(f"{name}_std")
    return _number(metrics.get(name)) + ("" if deviation is None else f" ± {_number(deviation)}")


def comparison_problems(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Why the numbers of two results may not stand side by side, one line a reason; empty where they may.

    Guidance, seed, step, average and weights may differ: these are what is compared. Protocol, network, quantiser, reference,
    settings and the number of pictures may not.
    """
    protocols = first["protocol"], second["protocol"]
    pairs = {
        "protocol": [protocol["protocol"] for protocol in protocols],
        "operations": [protocol.get("operations") for protocol in protocols],
        "network": [protocol.get("network_sha256") for protocol in protocols],
        "layer": [protocol.get("layer") for protocol in protocols],
        "quantiser": [result["generated"].get("quantizer") for result in (first, second)],
        "reference": [(result["reference"] or {}).get("sha256") for result in (first, second)],
        "real features": [(result["reference"] or {}).get("features_from") for result in (first, second)],
        "number of pictures": [result["num_generated"] for result in (first, second)],
        "settings": [result.get("settings") for result in (first, second)],
    }
    return [f"{name}: {a!r} against {b!r}" for name, (a, b) in pairs.items() if a != b]


def comparison_table(results: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """A Markdown table of results by name. Raises ValueError, with every reason, where two may not be compared."""
    name, first = results[0]
    for other_name, other in results[1:]:
        problems = comparison_problems(first, other)
        if problems:
            raise ValueError(f"{name} and {other_name} may not be compared:\n  " + "\n  ".join(problems))
    metrics = list(dict.fromkeys(key for _, result in results for key in result["metrics"] if not key.endswith("_std")))
    lines = ["| result | step | average | guidance | " + " | ".join(metrics) + " |", "|---" * (4 + len(metrics)) + "|"]
    for name, result in results:
        model = result.get("model") or {}
        cells = [name, *(_shown(value) for value in (model.get("step"), model.get("ema")))]
        cells += [_shown(result["generated"].get("guidance_scale")), *(_number(result["metrics"].get(key)) for key in metrics)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main_metric(metrics: Mapping[str, float]) -> str:
    """The number that chooses: the Frechet distance, else the first one. Raises ValueError for no number."""
    names = [name for name in metrics if not name.endswith("_std")]
    if not names:
        raise ValueError("a result without numbers")
    return next((name for name in names if name == "fid" or name.startswith("frechet")), names[0])


def is_better(name: str, value: float, than: float) -> bool:
    """Whether one value of a metric is better than another."""
    return value < than if name.startswith(LOWER_IS_BETTER) else value > than


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
