"""Turn a model of the official release into a folder of ours: python tools/convert_official.py FOLDER OUT_DIR

FOLDER is an artifact folder of the release (metadata.json and ema_params.msgpack) of a generator or a masked autoencoder, or a
hub id, of which --subfolder chooses one. OUT_DIR gets what `from_pretrained` reads (config.json, safetensors, provenance.json),
after it was read back: weights bit for bit, a forward pass within 2e-5.
"""

import argparse
import re
import sys
from pathlib import Path

from drift_accel.foundation.provenance import collect_provenance


def main() -> None:
    """Parse, convert, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="artifact folder of the release, or a hub id")
    parser.add_argument("out_dir", type=Path, help="folder to write")
    parser.add_argument("--subfolder", help="the artifact's folder within FOLDER")
    parser.add_argument("--revision", help="revision of a hub id")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing converted model")
    arguments = parser.parse_args()
    if arguments.out_dir.exists() and not arguments.overwrite:
        parser.error(f"{arguments.out_dir} exists: give another folder, or --overwrite")
    from drift_accel.models.official_conversion import convert_official

    try:
        conversion = convert_official(
            find_folder(arguments),
            arguments.out_dir,
            provenance=collect_provenance(command=sys.argv),
            overwrite=arguments.overwrite,
        )
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"convert_official: {error}") from None
    worst = max(conversion.differences, key=conversion.differences.get)
    print(f"{conversion.model_class}, {conversion.num_parameters:,} weights: {arguments.out_dir}")
    print(f"read back: all weights bit for bit; outputs within {conversion.differences[worst]:.1e} ({worst})")


def find_folder(arguments: argparse.Namespace) -> Path:
    """The artifact's folder, downloaded where a hub id is given. Raises ValueError for a path that leads nowhere."""
    folder = Path(arguments.folder)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", arguments.folder):
            raise ValueError(f"{folder} is no folder and no hub id (owner/name): give the folder that holds metadata.json")
        from huggingface_hub import snapshot_download

        inside = f"{arguments.subfolder.strip('/')}/" if arguments.subfolder else ""
        patterns = [f"{inside}metadata.json", f"{inside}**.msgpack"]
        folder = Path(snapshot_download(arguments.folder, revision=arguments.revision, allow_patterns=patterns))
    return folder / arguments.subfolder if arguments.subfolder else folder


if __name__ == "__main__":
    main()
