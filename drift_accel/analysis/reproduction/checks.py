"""What each stage of a reproduction must have left behind: counts, hashes, finite numbers, a loss or statistic that moved.

A check returns its findings and an identity, hashes by which later stages recognise what they were made from. `full` reads
everything; without it only what costs little is looked at again, which is for stages that have passed before.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from drift_accel.analysis.reproduction.findings import Findings
from drift_accel.analysis.reproduction.stages import Reproduction
from drift_accel.data.archive_extraction import folder_problems
from drift_accel.data.archive_listing import OFFICIAL, OFFICIAL_CLASSES
from drift_accel.data.archive_records import manifest_records, read_manifest
from drift_accel.data.cache_checks import verify_cache
from drift_accel.data.cache_format import MANIFEST_NAME, parse_manifest
from drift_accel.evaluation.picture_sources import ArrayPictures
from drift_accel.evaluation.results import load_result
from drift_accel.evaluation.statistics import load_reference
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.storage import COMPLETE_NAME, sha256_file, verify_folder

PICTURES_AT_ONCE = 1024
MOVED = 0.01  # relative: far below what any training does to the statistic, far above rounding


def check_stage(stage: str, paths: Reproduction, identities: Mapping[str, Mapping[str, str]], *, full: bool) -> Findings:
    """Look at what `stage` left. `identities` are those of the stages before it, as far as they have passed.

    Whatever cannot be read becomes a finding. Raises KeyError for an unknown stage.
    """
    findings = Findings()
    try:
        _CHECKS[stage](paths, findings, identities, full)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        text = str(error) if isinstance(error, OSError | ValueError) else repr(error)
        findings.holds("readable", False, text, "output of this stage")
    return findings


def _archives(paths: Reproduction, findings: Findings, identities, full: bool) -> None:
    manifest = read_manifest(paths.images)
    findings.equal("splits", sorted(manifest), ["train", "val"])
    for split, entry in sorted(manifest.items()):
        images, classes = entry["images"], len(entry["classes"])
        if paths.is_imagenet:
            findings.equal(f"{split}: pictures", images, OFFICIAL[split].images)
            findings.equal(f"{split}: classes", classes, OFFICIAL_CLASSES)
        else:
            findings.holds(f"{split}: pictures", images > 0 and classes > 0, f"{images} of {classes} classes", "at least one")
        absent = [name for name in entry["classes"] if not (paths.images / split / name).is_dir()]
        problems = folder_problems(paths.images, split, manifest_records(entry))
        findings.none(f"{split}: folders", [*(f"{paths.images / split / name}: is missing" for name in absent), *problems])
        findings.identity[split] = entry["sha256"]


def _verify_images(paths: Reproduction, findings: Findings, identities, full: bool) -> None:
    report = json.loads(paths.images_report.read_bytes())
    findings.none("every picture's content", report["problems"])
    read = {split: counts["sha256"] for split, counts in report["splits"].items()}
    findings.equal("pictures that were read", read, {s: entry["sha256"] for s, entry in read_manifest(paths.images).items()})
    findings.identity["report"] = sha256_file(paths.images_report)


def _reference(paths: Reproduction, findings: Findings, identities, full: bool) -> None:
    reference = load_reference(paths.reference)
    findings.holds("finite", np.isfinite(reference.mean).all() and np.isfinite(reference.covariance).all(), "mu, sigma", "finite")
    findings.holds("features vary", np.trace(reference.covariance) > 0, float(np.trace(reference.covariance)), "above 0")
    if reference.is_stated:
        findings.equal("protocol", reference.record["protocol"], paths.protocol)
    if paths.makes_reference:
        findings.equal("pictures", reference.record["num_images"], read_manifest(paths.images)["train"]["images"])
    findings.identity["file"] = reference.sha256


def _export(paths: Reproduction, findings: Findings, identities, full: bool) -> None:
    report = verify_cache(paths.cache, "quick")
    errors = [finding for finding in report.findings if finding.level == "error"]
    problems = [f"{paths.cache / finding.file}: {finding.problem}" for finding in errors]
    findings.none("cache", problems or _changed_shards(paths.cache))
    images = read_manifest(paths.images)["train"]
    findings.equal("rows", report.statistics.get("rows"), images["images"])
    findings.equal("classes", report.statistics.get("classes"), len(images["classes"]))
    findings.identity["manifest"] = sha256_file(paths.cache / MANIFEST_NAME)


def _changed_shards(cache: Path) -> list[str]:
    """Shards that were written to after their manifest and are not what it says; hashing all of them is verify_cache's work."""
    written = (cache / MANIFEST_NAME).stat().st_mtime_ns
    shards = parse_manifest((cache / MANIFEST_NAME).read_text("utf-8")).shards
    later = [shard for shard in shards if (cache / shard.file).stat().st_mtime_ns > written]
    return [f"{cache / s.file}: is not what was exported" for s in later if sha256_file(cache / s.file) != s.sha256]


def _verify_cache(paths: Reproduction, findings: Findings, identities, full: bool) -> None:
    report = json.loads(paths.cache_report.read_bytes())
    errors = [finding for finding in report["findings"] if finding["level"] == "error"]
    findings.none("every row", [f"{finding['file']}: {finding['problem']}" for finding in errors])
    findings.equal("mode", report["mode"], "full")
    std = report["statistics"].get("std")
    findings.holds("latents are finite and vary", std is not None and 0 < std < math.inf, f"deviation {std}", "above 0")
    findings.identity["report"] = sha256_file(paths.cache_report)


def _mae(paths: Reproduction, findings: Findings, identities, full: bool) -> None:
    if paths.trains_encoder:
        _finished_run(RunFolder(paths.mae), findings)
        records = RunFolder(paths.mae).read_metrics()
        first, last = _ends([record.get("reconstruction") for record in records])
        findings.holds("reconstruction loss fell", last < first, f"{first:.4g} to {last:.4g}", "lower at the end")
    _weights(paths.encoder, findings, full)


def _train(paths: Reproduction, findings: Findings, identities, full: bool) -> None:
    run = RunFolder(paths.generator)
    _finished_run(run, findings)
    records = run.read_metrics()
    tag = max(name for name in records[0] if name.startswith("drift_sqnorm_") and "/" not in name)
    first, last = records[0].get(tag), _ends([record.get(tag) for record in records])[1]
    findings.holds(f"{tag} moved", abs(last - first) > MOVED * abs(first), f"{first:.4g} to {last:.4g}", "another value")
    _weights(run.find_export(), findings, full)


def _finished_run(run: RunFolder, findings: Findings) -> None:
    steps, done = run.read_configuration()["steps"], run.checkpoint_steps()
    findings.equal("last checkpoint", done[-1] if done else None, steps)
    if done:
        findings.none("last checkpoint's files", verify_folder(run.checkpoint_dir(done[-1]), full=False))
    records = run.read_metrics()
    broken = [record["step"] for record in records if record.get("loss") is None]
    findings.holds("every recorded loss is finite", bool(records) and not broken, f"{len(records)} records", "no NaN")
    if broken:
        findings.none("losses", [f"{run.metrics_path}: no finite loss at step {step}" for step in broken])


def _weights(folder: Path, findings: Findings, full: bool) -> None:
    """Files of a model as they were written, and finite. A folder of the release has no list of hashes of its own."""
    if (folder / COMPLETE_NAME).is_file():
        findings.none("export's files", verify_folder(folder))
    files = sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.msgpack")])
    findings.holds("weights", bool(files), f"{len(files)} files in {folder}", "at least one")
    for file in files:
        findings.identity[file.name] = sha256_file(file)
        if full and file.suffix == ".safetensors":
            findings.none("weights are finite", _non_finite(file))


def _non_finite(file: Path) -> list[str]:
    import torch
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        keys = list(tensors.keys())  # no mapping: it has no iterator
        names = [name for name in keys if not torch.isfinite(tensors.get_tensor(name)).all()]
    return [f"{file}: {name} holds a NaN or an infinite value" for name in names]


def _sample(paths: Reproduction, findings: Findings, identities, full: bool) -> None:
    pictures = ArrayPictures(paths.samples)
    findings.equal("pictures", len(pictures), paths.num_samples)
    shape = pictures.batch(range(1)).pixels.shape[1:]
    findings.equal("size", list(shape[:2]), [paths.image_size, paths.image_size])
    if pictures.labels is None:
        raise ValueError(f"{paths.samples} has no labels (arr_1): it is not what tools/sample.py wrote")
    counts = np.unique(pictures.labels, return_counts=True)[1]
    findings.holds("classes are balanced", np.ptp(counts) <= 1, f"{counts.min()} to {counts.max()} a class", "equal up to one")
    identity = pictures.identity()
    findings.equal("pictures with values that are not finite", identity.get("num_non_finite"), 0)
    findings.identity["file"] = identity["sha256"]
    if full:
        starts = range(0, len(pictures), PICTURES_AT_ONCE)
        blocks = (pictures.batch(range(k, min(k + PICTURES_AT_ONCE, len(pictures)))).pixels for k in starts)
        flat = sum(int((np.ptp(block, axis=(1, 2, 3)) == 0).sum()) for block in blocks)
        findings.equal("pictures of one level", flat, 0)


def _evaluate(paths: Reproduction, findings: Findings, identities, full: bool) -> None:
    result = load_result(paths.result)
    metrics = result["metrics"]
    findings.holds("numbers", bool(metrics) and all(value is not None for value in metrics.values()), metrics, "finite ones")
    findings.equal("pictures", result["num_generated"], paths.num_samples)
    findings.equal("protocol", result["protocol"]["protocol"], paths.protocol)
    findings.equal("samples", result["generated"].get("sha256"), identities.get("sample", {}).get("file"))
    findings.equal("reference", (result["reference"] or {}).get("sha256"), identities.get("reference", {}).get("file"))
    findings.identity["file"] = sha256_file(paths.result)


def _report(paths: Reproduction, findings: Findings, identities, full: bool) -> None:
    page = paths.report.read_text("utf-8")
    findings.holds("whole page", page.rstrip().endswith("</html>"), f"{len(page):,} characters", "a closed page")
    # No hash: the page may be made again at any time.
    findings.holds("shows the result", paths.result.stem in page, paths.report, f"the result {paths.result.stem}")


def _ends(values: Sequence[float | None]) -> tuple[float, float]:
    """Means of the first and the last tenth of a curve. Raises ValueError for one without two values."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        raise ValueError(f"the records hold {len(known)} values: a change needs two")
    count = max(1, len(known) // 10)
    return sum(known[:count]) / count, sum(known[-count:]) / count


_CHECKS: dict[str, Callable[[Reproduction, Findings, Mapping[str, Mapping[str, str]], bool], None]] = {
    "archives": _archives,
    "verify_images": _verify_images,
    "reference": _reference,
    "export": _export,
    "verify_cache": _verify_cache,
    "mae": _mae,
    "train": _train,
    "sample": _sample,
    "evaluate": _evaluate,
    "report": _report,
}
