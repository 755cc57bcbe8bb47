"""What a study found: means and spreads over seeds, as rows, Markdown, CSV and JSON."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drift_accel.analysis.studies.runs import DIVERGED, DONE, FAILED, UNFINISHED, Outcome, StudyRun
from drift_accel.analysis.studies.study import Study
from drift_accel.evaluation.results import LOWER_IS_BETTER, main_metric
from drift_accel.foundation.storage import atomic_write_json, atomic_write_text


def study_rows(study: Study, runs: Sequence[StudyRun], outcomes: Mapping[str, Outcome]) -> list[dict[str, Any]]:
    """One row a variant: counts by state, for each number {"mean", "spread", "values" by seed}, and `versus_first`.

    The spread is the sample standard deviation over seeds (None of one). `versus_first` is the difference to the study's first
    variant in the main number, taken seed by seed (the same draws), with its own mean and spread.
    """
    rows = []
    for variant in study.variants:
        here = {item.seed: outcomes[item.name] for item in runs if item.variant.name == variant.name and item.name in outcomes}
        done = {seed: outcome.metrics for seed, outcome in here.items() if outcome.state == DONE}
        names = list(dict.fromkeys(name for metrics in done.values() for name in metrics))
        rows.append(
            {
                "name": variant.name,
                "note": variant.note,
                "published": variant.published,
                "states": {seed: outcome.state for seed, outcome in here.items()},
                "details": {seed: outcome.detail for seed, outcome in here.items() if outcome.detail},
                "metrics": {name: summary({seed: metrics.get(name) for seed, metrics in done.items()}) for name in names},
            }
        )
    main = chosen_metric(study, rows)
    first = rows[0]["metrics"].get(main, {}).get("values", {})
    for row in rows[1:]:
        values = row["metrics"].get(main, {}).get("values", {})
        row["versus_first"] = summary({seed: values[seed] - first[seed] for seed in values if seed in first})
    return rows


def summary(values: Mapping[int, float | None]) -> dict[str, Any]:
    """Mean and sample standard deviation of numbers by seed; those that are missing or not finite are left out."""
    finite = {seed: value for seed, value in values.items() if value is not None and math.isfinite(value)}
    numbers = list(finite.values())
    return {
        "mean": statistics.fmean(numbers) if numbers else None,
        "spread": statistics.stdev(numbers) if len(numbers) > 1 else None,
        "values": finite,
    }


def chosen_metric(study: Study, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The number that orders the rows; None while nothing is done. Raises ValueError for one that was not measured."""
    measured = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    if not measured:
        return None
    asked = study.evaluation.metric
    if asked is not None and asked not in measured:
        raise ValueError(f"evaluation.metric is {asked!r}: the runs have {', '.join(measured)}")
    return asked or main_metric(dict.fromkeys(measured))


def ranking(rows: Sequence[Mapping[str, Any]], metric: str | None) -> list[str]:
    """Names from best to worst mean; those without one come last, the diverged after the others, in the study's order."""
    sign = 1 if metric is None or metric.startswith(LOWER_IS_BETTER) else -1

    def key(row: Mapping[str, Any]) -> tuple[int, float]:
        mean = row["metrics"].get(metric, {}).get("mean")
        return (0, sign * mean) if mean is not None else (1 + (DIVERGED in row["states"].values()), 0.0)

    return [row["name"] for row in sorted(rows, key=key)]


def published_agreement(rows: Sequence[Mapping[str, Any]], metric: str | None) -> float | None:
    """Spearman's rank correlation of our means and the published numbers; None with fewer than three rows that have both.

    Published numbers are taken as lower is better; of a metric where higher is better the sign is turned.
    """
    from scipy.stats import spearmanr

    pairs = [(row["metrics"].get(metric, {}).get("mean"), row["published"]) for row in rows]
    pairs = [pair for pair in pairs if None not in pair]
    if len(pairs) < 3 or min(len(set(side)) for side in zip(*pairs, strict=True)) < 2:
        return None
    sign = 1 if metric.startswith(LOWER_IS_BETTER) else -1
    return sign * float(spearmanr(*zip(*pairs, strict=True)).statistic)


def markdown_table(study: Study, rows: Sequence[Mapping[str, Any]]) -> str:
    """The table and what it says, for people."""
    metric = chosen_metric(study, rows)
    metrics = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    metrics.sort(key=lambda name: name != metric)
    has_published = any(row["published"] is not None for row in rows)
    header = ["variant", "runs", *metrics]
    header += [f"{metric} - {rows[0]['name']}'s"] if metric else []
    header += ["published"] if has_published else []
    lines = [_line([*header, "found in the literature"]), "|---" * (len(header) + 1) + "|"]
    for row in rows:
        cells = [row["name"], _runs_text(row), *(shown(row["metrics"].get(name)) for name in metrics)]
        cells += [shown(row.get("versus_first"), signed=True)] if metric else []
        cells += ["-" if row["published"] is None else f"{row['published']:g}"] if has_published else []
        lines.append(_line([*cells, row["note"]]))
    return "\n".join([*lines, "", *_remarks(study, rows, metric)])


def shown(value: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """Mean and spread with as many digits as the spread allows."""
    if value is None or value["mean"] is None:
        return "-"
    sign = "+" if signed else ""
    if not value["spread"]:
        return f"{value['mean']:{sign}.3f}"
    digits = max(0, 1 - math.floor(math.log10(value["spread"])))
    return f"{value['mean']:{sign}.{digits}f} ± {value['spread']:.{digits}f}"


def write_tables(study: Study, runs: Sequence[StudyRun], rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """STUDY.md, STUDY.csv (one line a run) and STUDY.json; each whole or not at all. Returns their paths."""
    paths = [folder / f"{study.name}{suffix}" for suffix in (".md", ".csv", ".json")]
    metric = chosen_metric(study, rows)
    atomic_write_text(paths[0], f"# {study.title}\n\n{markdown_table(study, rows)}\n")
    atomic_write_text(paths[1], _csv(rows))
    record = {
        "title": study.title,
        "seeds": study.seeds,
        "protocol": study.evaluation.protocol,
        "metric": metric,
        "ranking": ranking(rows, metric),
        "published": study.published,
        "rank_correlation_with_published": published_agreement(rows, metric),
        "variants": [_text_keys(row) for row in rows],
        "arguments": {item.name: item.arguments for item in runs},
    }
    atomic_write_json(paths[2], record)
    return paths


def _remarks(study: Study, rows: Sequence[Mapping[str, Any]], metric: str | None) -> list[str]:
    counts = sorted({len(row["states"]) for row in rows})
    lines = [
        f"Mean ± sample standard deviation over {'-'.join(map(str, counts))} seed(s), protocol {study.evaluation.protocol}, "
        f"guidance {study.evaluation.guidance_scale:g}."
    ]
    if metric is not None:
        lines.append(f"By {metric}, best first: {', '.join(ranking(rows, metric))}.")
    if any(row["published"] is not None for row in rows):
        agreement = published_agreement(rows, metric) if metric else None
        ranks = "" if agreement is None else f" Rank correlation of our means with them (Spearman): {agreement:.2f}."
        lines.append(f"Published: {study.published or 'see the notes'}.{ranks}")
    for row in rows:
        for seed, detail in row["details"].items():
            if row["states"][seed] in (DIVERGED, FAILED):
                lines.append(f"{row['name']}, seed {seed}, {row['states'][seed]}: {detail}")
    return lines


def _runs_text(row: Mapping[str, Any]) -> str:
    states = list(row["states"].values())
    others = [f"{states.count(state)} {state}" for state in (DIVERGED, FAILED, UNFINISHED) if state in states]
    return ", ".join([f"{states.count(DONE)}/{len(states)}", *others]) if states else UNFINISHED


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    metrics = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "seed", "state", *metrics])
    for row in rows:
        for seed, state in row["states"].items():
            values = [row["metrics"].get(name, {}).get("values", {}).get(seed) for name in metrics]
            writer.writerow([row["name"], seed, state, *("" if value is None else repr(value) for value in values)])
    return text.getvalue()


def _text_keys(value: Any) -> Any:
    """Seeds as text, as JSON wants keys."""
    return {str(key): _text_keys(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
