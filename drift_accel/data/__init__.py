"""Real samples: where they come from and which of them a step uses."""

from importlib import import_module

# name -> module; loaded on first access, because the caches bring torch with them and the archive tools need neither.
_EXPORTS = {
    "DataConfig": "drift_accel.data.sources",
    "LabelledImages": "drift_accel.data.labelled_images",
    "LatentCache": "drift_accel.data.latent_cache",
    "make_sampler": "drift_accel.data.sources",
    "open_source": "drift_accel.data.sources",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
