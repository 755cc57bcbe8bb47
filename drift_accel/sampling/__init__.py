"""From a trained generator to images: per-index draws, fixed batches, labelled grids, the diffusers pipeline."""

from importlib import import_module

# name -> module; loaded on first access, because the pipeline brings diffusers with it.
_EXPORTS = {
    "DriftPipeline": "drift_accel.sampling.pipeline",
    "GeneratedPictures": "drift_accel.sampling.pictures",
    "SampleStore": "drift_accel.sampling.sample_store",
    "balanced_labels": "drift_accel.sampling.sampler",
    "class_grid_array": "drift_accel.sampling.grid",
    "decode_latents": "drift_accel.sampling.decoding",
    "generate": "drift_accel.sampling.sampler",
    "load_trained": "drift_accel.sampling.trained",
    "open_decoder": "drift_accel.sampling.vae_choice",
    "sample_noise": "drift_accel.sampling.draws",
    "sample_styles": "drift_accel.sampling.draws",
    "save_grid": "drift_accel.sampling.grid",
    "save_class_grid": "drift_accel.sampling.grid",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
