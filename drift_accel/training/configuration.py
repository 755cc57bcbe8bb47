"""The part of a run's configuration that both trainers share."""

from dataclasses import dataclass, field

from drift_accel.foundation.collectives import require_num_processes
from drift_accel.training.averages import AverageConfig
from drift_accel.training.checkpoint import CheckpointConfig
from drift_accel.training.optimizer import OptimizerConfig
from drift_accel.training.telemetry import LogConfig

PRECISIONS = ("float32", "bfloat16", "float64")
DEVICES = ("auto", "cpu")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, how exactly and with which optimiser a run trains. Raises ValueError for values that cannot work."""

    steps: int
    """Optimiser steps of the whole run."""
    seed: int = 0
    """Seed of every draw of the run, at least 0."""
    precision: str = "float32"
    """"float32"; "bfloat16": autocast over float32 weights; "float64": on CPU, for proofs of equality."""
    device: str = "auto"
    """"auto" takes what accelerate finds; "cpu" stays on the processor."""
    num_processes: int | None = None
    """Number of processes that the launcher must have started; null accepts any."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: AverageConfig = field(default_factory=AverageConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self):
        require_positive("", self, "steps")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}: give an integer from 0 to 2^64 - 1")
        if self.precision == "float16":
            raise ValueError(
                "precision is 'float16': its range is too small for the squared distances of the drift; use 'bfloat16'"
            )
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}: choose one of {', '.join(PRECISIONS)}")
        if self.device not in DEVICES:
            raise ValueError(f"device is {self.device!r}: choose one of {', '.join(DEVICES)}")
        if self.num_processes is not None:
            require_positive("", self, "num_processes")

    @property
    def may_change(self) -> tuple[str, ...]:
        """Keys that a run may change between two starts: its mathematics stays the same."""
        return ("steps", "device", "num_processes", "checkpoint", "log")

    def check_launch(self, num_processes: int) -> None:
        """Raise ValueError where the launcher started another number of processes than was asked for."""
        require_num_processes(self.num_processes, num_processes)


def require_positive(group: str, config, *names: str, at_least: int = 1) -> None:
    """Raise ValueError where a count of a configuration is below `at_least`."""
    for name in names:
        value = getattr(config, name)
        if value < at_least:
            raise ValueError(f"{group + '.' if group else ''}{name} is {value}: give an integer of at least {at_least}")
