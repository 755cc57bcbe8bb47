"""Is a cache whole, and does it fit? python tools/verify_cache.py CACHE [--mode full] [--model EXPORT] [--vae VAE]

quick: sizes, counts, labels, small files' hashes, some rows of every shard. full: also the hash of every file and every row.
Prints what is wrong, in which file and what to do; ends with status 1 if anything is.
"""

import argparse
import sys
from pathlib import Path

from drift_accel.data.cache_checks import MODES, CheckReport, model_requirements, verify_cache
from drift_accel.foundation.provenance import collect_provenance
from drift_accel.foundation.storage import atomic_write_json


def main() -> None:
    """Parse, verify, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, help="folder of the cache")
    parser.add_argument("--mode", choices=MODES, default="quick", help="how much is read (default: quick)")
    parser.add_argument("--model", type=Path, help="folder of an exported model that the rows must fit")
    parser.add_argument("--vae", help="folder, hub id or `digits`: the VAE that the latents must be of")
    parser.add_argument("--revision", help="revision of a hub id")
    parser.add_argument("--report", type=Path, help="write the findings there as JSON")
    arguments = parser.parse_args()
    try:
        model = model_requirements(arguments.model) if arguments.model else None
        vae = describe_vae(arguments.vae, arguments.revision) if arguments.vae else None
    except (ValueError, OSError) as error:
        raise SystemExit(f"verify_cache: {error}") from None
    report = verify_cache(arguments.cache, arguments.mode, model=model, vae=vae, show_progress=True)
    if arguments.report:
        atomic_write_json(arguments.report, {**report.as_dict(), "provenance": collect_provenance(command=sys.argv)})
    print_report(report)
    raise SystemExit(0 if report.is_good else 1)


def describe_vae(name: str, revision: str | None) -> dict:
    """Scale, shift and weights of a VAE, to compare with the header."""
    from drift_accel.data.row_encoders import weights_hash
    from drift_accel.models.autoencoder import load_vae, vae_scaling

    vae = load_vae(name, revision=revision)
    scale, shift = vae_scaling(vae.config)
    return {"scale": scale, "shift": shift, "weights_sha256": weights_hash(vae)}


def print_report(report: CheckReport) -> None:
    """Findings, then the numbers."""
    for finding in report.findings:
        print(f"{finding.level}: {finding.file}: {finding.problem}\n  what to do: {finding.advice}")
    numbers = report.statistics
    if "rows" in numbers:
        print(f"{numbers['rows']:,} rows of {numbers['classes']} classes in {numbers['shards']} shards, ", end="")
        print(f"{numbers['bytes'] / 1e9:.3f} GB")
    if "class_rows" in numbers:
        print(f"rows a class: {min(numbers['class_rows'])} to {max(numbers['class_rows'])}")
    if "mean" in numbers:
        print(f"mean {numbers['mean']:.4f}, deviation {numbers['std']:.4f}")
    print(f"{report.path}: {'good' if report.is_good else 'NOT good'} ({report.mode})")


if __name__ == "__main__":
    main()
