"""One-step image generators by drifting (arXiv 2602.04770).

`from drift_accel import drift_loss, DriftConfig` is the loss alone; models and pipeline load their libraries on first use.
"""

from importlib import import_module

__version__ = "0.1.0"

# name -> the module that defines it. Loaded on first access: importing the package must not import torch's heavy friends.
_EXPORTS = {
    "DriftConfig": "drift_accel.drift",
    "DriftLoss": "drift_accel.drift",
    "drift_loss": "drift_accel.drift",
    "Generator": "drift_accel.models",
    "MaskedAutoencoder": "drift_accel.models",
    "DriftPipeline": "drift_accel.sampling.pipeline",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
