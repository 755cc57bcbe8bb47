"""A trained generator as a pipeline folder, and onto the hub: python tools/push_to_hub.py MODEL --output_dir PIPELINE

Writes the folder that DriftPipeline.from_pretrained reads (weights, VAE, class names, model card, provenance). With --repo_id it
is uploaded by huggingface_hub, with the login of that library; --dry_run only says what would be sent.
"""

import argparse
from pathlib import Path

from drift_accel.sampling.model_options import add_model_options, open_trained, open_vae
from drift_accel.sampling.pipeline import DriftPipeline


def main() -> None:
    """Parse, save, upload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path, help="a run, a checkpoint, an export, a pipeline or an official folder")
    add("--output_dir", type=Path, required=True, help="folder of the pipeline")
    add("--repo_id", help="USER/NAME on the hub (default: no upload)")
    add("--private", action="store_true", help="make a new repository private")
    add("--dry_run", action="store_true", help="write the folder, say what would be sent, and send nothing")
    add("--overwrite", action="store_true", help="write into an existing folder")
    add_model_options(parser)
    arguments = parser.parse_args()
    folder = arguments.output_dir
    if folder.exists() and any(folder.iterdir()) and not arguments.overwrite:
        parser.error(f"{folder} exists: choose another --output_dir, or add --overwrite")
    try:
        trained = open_trained(arguments, arguments.model)
        DriftPipeline.from_trained(trained, open_vae(arguments, trained, "cpu")).save_pretrained(folder)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in files)
    print(f"{folder}: {len(files)} files, {total / 1e6:.1f} MB\n" + "\n".join(f"  {path.relative_to(folder)}" for path in files))
    if arguments.repo_id is None:
        return
    if arguments.dry_run:
        print(f"dry run: nothing was sent to {arguments.repo_id}")
        return
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(arguments.repo_id, private=arguments.private, exist_ok=True)
    print(f"sent: {api.upload_folder(repo_id=arguments.repo_id, folder_path=folder)}")


if __name__ == "__main__":
    main()
