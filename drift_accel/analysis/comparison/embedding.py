"""Two coordinates for every sample: principal components or UMAP, fitted on real samples, others projected by transform.

Features are standardised by the real samples first (mean 0, variance 1 in every number that varies). Saved as safetensors and
restored without unpickling anything: principal components are a matrix; UMAP's neighbour graph is a function of its training
features and its seed, so it is computed again from them and given the saved coordinates.
"""

import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

METHODS = ("pca", "umap")
EXTRA = "pip install 'drift_accel[analysis]'"
LEAST_SAMPLES = 4  # UMAP's own limit for two coordinates


class Embedding:
    """A map of features [n, D] to the plane, fitted on real ones; `fit_embedding` and `load_embedding` make it."""

    def __init__(self, mean: np.ndarray, scale: np.ndarray, coordinates: np.ndarray, facts: dict[str, Any]):
        self.mean, self.scale = mean, scale
        self.coordinates = coordinates
        """float32 [N, 2] of the real samples it was fitted on."""
        self.facts = facts
        """method, parameters, seed, versions; `statement` in words."""

    @property
    def method(self) -> str:
        """pca or umap."""
        return self.facts["method"]

    def transform(self, features: np.ndarray) -> np.ndarray:
        """Coordinates float32 [n, 2] of features [n, D] of other samples. Raises ValueError for another dimension."""
        return self._project(_standardised(features, self.mean, self.scale)).astype(np.float32)

    def save(self, path: Path) -> None:
        """Write everything that `load_embedding` needs to one safetensors file."""
        tensors = {"mean": self.mean, "scale": self.scale, "coordinates": self.coordinates, **self._state()}
        save_file(
            {name: np.ascontiguousarray(values) for name, values in tensors.items()}, path, {"facts": json.dumps(self.facts)}
        )

    def _project(self, standardised: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _state(self) -> dict[str, np.ndarray]:
        raise NotImplementedError


class PcaEmbedding(Embedding):
    """The first two principal components."""

    def __init__(self, components: np.ndarray, **common):
        super().__init__(**common)
        self.components = components  # [2, D]

    @classmethod
    def fit(cls, standardised: np.ndarray, mean: np.ndarray, scale: np.ndarray, seed: int) -> "PcaEmbedding":
        """Fit on standardised features [N, D]; the seed matters where D is large, and components are found at random."""
        PCA = _scikit_learn().PCA
        model = PCA(n_components=2, random_state=seed).fit(standardised)
        # The training features are centred already: no offset of the model's own.
        coordinates = (standardised @ model.components_.T).astype(np.float32)
        shares = [float(share) for share in model.explained_variance_ratio_]
        statement = f"first two principal components, with {100 * shares[0]:.1f} % and {100 * shares[1]:.1f} % of the variance"
        facts = {"method": "pca", "seed": seed, "explained_variance": shares, "statement": statement}
        return cls(model.components_, mean=mean, scale=scale, coordinates=coordinates, facts=facts)

    def _project(self, standardised: np.ndarray) -> np.ndarray:
        return standardised @ self.components.T

    def _state(self) -> dict[str, np.ndarray]:
        return {"components": self.components}


class UmapEmbedding(Embedding):
    """UMAP (McInnes et al. 2018, arXiv 1802.03426), by umap-learn, on one thread with a fixed seed."""

    def __init__(self, model: Any, training: np.ndarray, **common):
        super().__init__(**common)
        self.model, self.training = model, training

    @classmethod
    def fit(cls, standardised: np.ndarray, mean: np.ndarray, scale: np.ndarray, seed: int) -> "UmapEmbedding":
        """Fit on standardised features [N, D], N at least LEAST_SAMPLES."""
        UMAP = _umap()
        parameters = {"n_neighbors": min(15, len(standardised) - 1), "min_dist": 0.1, "random_state": seed}
        model = UMAP(**parameters, n_jobs=1).fit(standardised)
        statement = f"UMAP of {parameters['n_neighbors']} neighbours, least distance {parameters['min_dist']:g}, seed {seed}"
        facts = {"method": "umap", "parameters": parameters, "versions": {}, "statement": statement}
        facts["versions"] = {name: version(name) for name in ("umap-learn", "pynndescent", "numba")}
        coordinates = np.asarray(model.embedding_, dtype=np.float32)
        return cls(model, standardised, mean=mean, scale=scale, coordinates=coordinates, facts=facts)

    @classmethod
    def restore(cls, tensors: dict[str, np.ndarray], common: dict[str, Any]) -> "UmapEmbedding":
        """The fitted model again: its graph computed from the training features, its coordinates as they were saved."""
        model = _umap()(**common["facts"]["parameters"], n_jobs=1, init=common["coordinates"], n_epochs=0)
        model.fit(tensors["training"])
        model.embedding_ = common["coordinates"]
        model.n_epochs = None  # as when it was fitted: transform takes its own number of epochs from it
        return cls(model, tensors["training"], **common)

    def _project(self, standardised: np.ndarray) -> np.ndarray:
        return self.model.transform(standardised)

    def _state(self) -> dict[str, np.ndarray]:
        return {"training": self.training}


def available_methods() -> list[str]:
    """The methods whose libraries are installed."""
    libraries = {"pca": "sklearn", "umap": "umap"}
    return [method for method in METHODS if find_spec(libraries[method]) is not None]


def fit_embedding(method: str, real: np.ndarray, seed: int = 0) -> Embedding:
    """Fit `method`, "pca" or "umap", on real features [N, D].

    Raises ValueError for another method, too few samples, features that never vary; ModuleNotFoundError for a missing library.
    """
    if method not in METHODS:
        raise ValueError(f"the embedding is {method!r}: choose one of {', '.join(METHODS)}")
    if len(real) < LEAST_SAMPLES or real.shape[1] < 2:
        raise ValueError(
            f"an embedding needs {LEAST_SAMPLES} real samples of 2 numbers, got {len(real)} of {real.shape[1]}: extract more"
        )
    mean = real.mean(axis=0, dtype=np.float64)
    deviation = real.std(axis=0, dtype=np.float64)
    varies = deviation > 1e-7 * np.abs(mean)
    if not varies.any():
        raise ValueError("no number of the real samples ever varies: there is nothing to embed")
    mean, scale = mean.astype(np.float32), np.where(varies, deviation, 1.0).astype(np.float32)
    kind = {"pca": PcaEmbedding, "umap": UmapEmbedding}[method]
    return kind.fit(_standardised(real, mean, scale), mean, scale, seed)


def load_embedding(path: Path) -> Embedding:
    """Read what `save` wrote. Raises FileNotFoundError, ValueError for another file, ModuleNotFoundError without the library."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give an embedding that tools/compare_activations.py saved")
    try:
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = json.loads((file.metadata() or {})["facts"])
        common = {"facts": facts, **{name: tensors[name] for name in ("mean", "scale", "coordinates")}}
        if facts["method"] == "pca":
            return PcaEmbedding(tensors["components"], **common)
        return UmapEmbedding.restore(tensors, common)
    except (KeyError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path} is no saved embedding ({error!r})") from None


def _standardised(features: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    if features.ndim != 2 or features.shape[1] != len(mean):
        raise ValueError(f"features are {list(features.shape)}, the embedding was fitted on {len(mean)} numbers a sample")
    return ((features - mean) / scale).astype(np.float32)


def _scikit_learn():
    try:
        from sklearn import decomposition
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"principal components need scikit-learn: {EXTRA}") from error
    return decomposition


def _umap():
    try:
        from umap import UMAP
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"UMAP needs umap-learn: {EXTRA}, or choose the embedding pca") from error
    return UMAP
