"""The options of the drift: which field is computed and how its loss is read."""

from dataclasses import dataclass

BACKENDS = ("auto", "reference", "fused")
KEEP_DISTANCES = ("auto", "always", "never")


class BackendError(RuntimeError):
    """A backend was asked for that this build does not have."""


@dataclass(frozen=True, kw_only=True)
class DriftConfig:
    """Options of the drifting field; the defaults are the behaviour of the official release.

    Raises ValueError for an empty or repeated list of temperatures, a temperature that is not positive, or an unknown name.
    """

    temperatures: tuple[float, ...] = (0.02, 0.05, 0.2)
    """Kernel temperatures, relative to the mean distance; each > 0. The fields are normalised one by one and summed."""
    backend: str = "auto"
    """"auto" takes the fastest that is built, or what DRIFT_ACCEL_BACKEND names; "reference": plain PyTorch; "fused": the
    compiled op, an error where it is not built."""
    keep_distances: str = "auto"
    """Hold the distances of all keys between the stages ("always") or compute them again ("never", less memory, same result);
    "auto" holds them up to 2 GiB."""
    reduction: str = "release"
    """"release": a key's loss is the mean over its locations; "paper": the sum, so that every vector weighs 1."""
    field: str = "summed"
    """"summed": one loss on the sum of the fields; "per_temperature": one loss a temperature, summed (same gradient)."""

    weight_placement: str = "after"
    """"after": the negatives' weight multiplies the affinity; "log_bias": log w enters the softmax, w = 0 means absent."""
    affinity_floor: float = 1e-6
    """Floor under row times column probability of the two-sided coupling; part of the method, not a guard. 0: none."""
    coupling: str = "two_sided"
    """"two_sided": geometric mean of row and column softmax; "row": row softmax alone; "sinkhorn": transport plan; "kernel": the
    kernel without normalisation (Z = 1), whose low temperatures may vanish below the floor of the field's norm."""
    sinkhorn_iterations: int = 20
    """Updates of the rows then the columns, in the log domain."""
    sinkhorn_marginal: str = "weighted_cols"
    """"weighted_cols": column mass proportional to max(w, 1e-6); "none": uniform columns with log w as bias."""
    drift_form: str = "joint"
    """"joint": one coupling over all targets; "split": positives and negatives coupled apart, each row-normalised."""
    metric: str = "l2"
    """"l2": distances over their mean; "l2_sq": squared distances over their mean."""
    mask_self: bool = True
    """A generated sample does not see itself."""
    attraction: float = 1.0
    """Multiplier of the positives' part of the field."""
    repulsion: float = 1.0
    """Multiplier of the generated samples' and negatives' part of the field."""

    @classmethod
    def preset(cls, name: str, **changes) -> "DriftConfig":
        """A published system's options by name (`DRIFT_PRESETS`), with changes. Raises ValueError for an unknown name."""
        _require_one_of("preset", name, tuple(DRIFT_PRESETS))
        return cls(**{**DRIFT_PRESETS[name], **changes})

    def check_guidance(self, minimum: float, num_negatives: int) -> None:
        """Raise ValueError where guidance down to `minimum` (a <= 1 gives w <= 0) has no solution under these options."""
        if self.coupling == "sinkhorn" and self.sinkhorn_marginal == "none" and minimum <= 1 and num_negatives > 0:
            raise ValueError(
                f"drift.sinkhorn_marginal is 'none' with {num_negatives} negatives and guidance from {minimum}: guidance 1 "
                "weighs them 0, which no transport plan with uniform columns meets. Use 'weighted_cols' or guidance.minimum > 1"
            )

    def __post_init__(self):
        if not self.temperatures:
            raise ValueError("drift.temperatures is empty: give at least one positive number, for example [0.02, 0.05, 0.2]")
        for temperature in self.temperatures:
            if not 0 < temperature < float("inf"):
                raise ValueError(f"drift.temperatures holds {temperature}: every temperature must be positive and finite")
        if len(set(self.temperatures)) != len(self.temperatures):
            raise ValueError(f"drift.temperatures {self.temperatures} repeats a value: list each temperature once")
        _require_one_of("backend", self.backend, BACKENDS)
        _require_one_of("keep_distances", self.keep_distances, KEEP_DISTANCES)
        _require_one_of("reduction", self.reduction, ("release", "paper"))
        _require_one_of("field", self.field, ("summed", "per_temperature"))
        _require_one_of("weight_placement", self.weight_placement, ("after", "log_bias"))
        _require_one_of("coupling", self.coupling, ("two_sided", "row", "sinkhorn", "kernel"))
        _require_one_of("sinkhorn_marginal", self.sinkhorn_marginal, ("weighted_cols", "none"))
        _require_one_of("drift_form", self.drift_form, ("joint", "split"))
        _require_one_of("metric", self.metric, ("l2", "l2_sq"))
        if not 0 <= self.affinity_floor < float("inf"):
            raise ValueError(f"drift.affinity_floor is {self.affinity_floor}: give a finite number of at least 0")
        if not isinstance(self.sinkhorn_iterations, int) or self.sinkhorn_iterations < 1:
            raise ValueError(f"drift.sinkhorn_iterations is {self.sinkhorn_iterations}: give an integer of at least 1")
        for name in ("attraction", "repulsion"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"drift.{name} is {getattr(self, name)}: give a finite number of at least 0")


# official: the release. paper: the text of arXiv 2602.04770. sinkhorn_drift: the baseline of the follow-up on couplings.
DRIFT_PRESETS: dict[str, dict] = {
    "official": {},
    "paper": {"affinity_floor": 0.0, "reduction": "paper"},
    "sinkhorn_drift": {"affinity_floor": 0.0, "weight_placement": "log_bias"},
}


def _require_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"drift.{name} is {value!r}: choose one of {', '.join(allowed)}")
