"""The options of the drift: which field is computed and how its loss is read."""

from dataclasses import dataclass

BACKENDS = ("auto", "reference", "fused")


@dataclass(frozen=True, kw_only=True)
class DriftConfig:
    """Options of the drifting field; the defaults are the behaviour of the official release.

    Raises ValueError for an empty or repeated list of temperatures, a temperature that is not positive, or an unknown name.
    """

    temperatures: tuple[float, ...] = (0.02, 0.05, 0.2)
    """Kernel temperatures, relative to the mean distance; each > 0. The fields are normalised one by one and summed."""
    backend: str = "auto"
    """"auto" takes the fastest that is built; "reference" is plain PyTorch; "fused" is an error where it is not built."""
    reduction: str = "release"
    """"release": a key's loss is the mean over its locations; "paper": the sum, so that every vector weighs 1."""
    field: str = "summed"
    """"summed": one loss on the sum of the fields; "per_temperature": one loss a temperature, summed (same gradient)."""

    def __post_init__(self):
        if not self.temperatures:
            raise ValueError("drift.temperatures is empty: give at least one positive number, for example [0.02, 0.05, 0.2]")
        for temperature in self.temperatures:
            if not 0 < temperature < float("inf"):
                raise ValueError(f"drift.temperatures holds {temperature}: every temperature must be positive and finite")
        if len(set(self.temperatures)) != len(self.temperatures):
            raise ValueError(f"drift.temperatures {self.temperatures} repeats a value: list each temperature once")
        _require_one_of("backend", self.backend, BACKENDS)
        _require_one_of("reduction", self.reduction, ("release", "paper"))
        _require_one_of("field", self.field, ("summed", "per_temperature"))


def _require_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"drift.{name} is {value!r}: choose one of {', '.join(allowed)}")
