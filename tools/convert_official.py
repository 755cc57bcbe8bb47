"""Turn a published model into a folder of ours: python tools/convert_official.py FOLDER OUT_DIR

FOLDER is one of these, or a hub id, of which --subfolder chooses one:
- an artifact folder of the official release (metadata.json and ema_params.msgpack), a generator or a masked autoencoder;
- a generator of DMD2 for ImageNet 64x64: its pytorch_model.bin or the folder with it
  (tianweiy/DMD2 --subfolder model/imagenet/NAME);
- EDM's ImageNet 64x64 network (edm-imagenet-64x64-cond-adm), its tensors as a torch or safetensors file; of the pickled network
  the error says how to save them.
OUT_DIR gets what `from_pretrained` reads (config.json, safetensors, provenance.json), after it was read back: weights bit for
bit, a forward pass within 2e-5.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from drift_accel.foundation.provenance import collect_provenance


def main() -> None:
    """Parse, convert, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="artifact folder of the release, EDM's or DMD2's weights, or a hub id")
    parser.add_argument("out_dir", type=Path, help="folder to write")
    parser.add_argument("--subfolder", help="the artifact's folder within FOLDER")
    parser.add_argument("--revision", help="revision of a hub id")
    parser.add_argument("--edm_config", type=Path, help="JSON file with settings of an EDM network other than ImageNet 64x64's")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing converted model")
    arguments = parser.parse_args()
    if arguments.out_dir.exists() and not arguments.overwrite:
        parser.error(f"{arguments.out_dir} exists: give another folder, or --overwrite")
    from drift_accel.models.official_conversion import convert_official

    try:
        edm_config = read_edm_config(arguments.edm_config)
        conversion = convert_official(
            find_folder(arguments),
            arguments.out_dir,
            provenance=collect_provenance(command=sys.argv),
            overwrite=arguments.overwrite,
            edm_config=edm_config,
        )
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"convert_official: {error}") from None
    worst = max(conversion.differences, key=conversion.differences.get)
    print(f"{conversion.model_class}, {conversion.num_parameters:,} weights: {arguments.out_dir}")
    print(f"read back: all weights bit for bit; outputs within {conversion.differences[worst]:.1e} ({worst})")


def read_edm_config(path: Path | None) -> dict | None:
    """The settings of a JSON file. Raises ValueError for a file that holds no possible settings of EdmUNet."""
    if path is None:
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--edm_config {path} is no JSON file ({error}): give an object of EdmUNet's settings") from None
    if not isinstance(settings, dict):
        raise ValueError(f"--edm_config {path} holds a {type(settings).__name__}: give an object of EdmUNet's settings")
    from drift_accel.models import check_edm_config

    check_edm_config(**settings)
    return settings


def find_folder(arguments: argparse.Namespace) -> Path:
    """The published folder or file, downloaded where a hub id is given. Raises ValueError for a path that leads nowhere."""
    folder = Path(arguments.folder)
    if folder.is_file():
        if arguments.subfolder:
            raise ValueError(f"{folder} is a file, which has no subfolder {arguments.subfolder}: leave --subfolder out")
        return folder
    if not folder.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", arguments.folder):
            raise ValueError(f"{folder} is no folder, no file and no hub id (owner/name): give the place of the model")
        from huggingface_hub import snapshot_download

        inside = f"{arguments.subfolder.strip('/')}/" if arguments.subfolder else ""
        patterns = [f"{inside}{name}" for name in ("metadata.json", "**.msgpack", "pytorch_model.bin")]
        folder = Path(snapshot_download(arguments.folder, revision=arguments.revision, allow_patterns=patterns))
    return folder / arguments.subfolder if arguments.subfolder else folder


if __name__ == "__main__":
    main()
