"""Autoencoders that come with the package, so that latents mean something without a download."""

from pathlib import Path

# name -> folder beside this module, as diffusers' save_pretrained writes it
_VAE_FOLDERS = {"digits": "digits_vae"}
BUNDLED_VAES = tuple(_VAE_FOLDERS)


def bundled_vae_path(name: str = "digits") -> Path:
    """The folder of a bundled VAE: `AutoencoderKL.from_pretrained(bundled_vae_path("digits"))`.

    "digits": 3x64x64 images in [-1, 1] to 4x16x16 latents, trained on coloured handwritten digits by
    tools/train_digits_vae.py; provenance.json in the folder says how, and how well it reconstructs.
    Raises ValueError for a name that is not bundled, FileNotFoundError where the installation left the weights out.
    """
    if name not in _VAE_FOLDERS:
        raise ValueError(f"there is no bundled VAE {name!r}: choose one of {', '.join(BUNDLED_VAES)}, or give a folder or hub id")
    folder = Path(__file__).resolve().parent / _VAE_FOLDERS[name]
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is missing: install the package again, its data files are part of it")
    return folder
