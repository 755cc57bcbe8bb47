"""The part of a run's configuration that both trainers share."""

from dataclasses import dataclass, field

from drift_accel.foundation.collectives import require_num_processes
from drift_accel.foundation.devices import check_device_name
from drift_accel.training.averages import AverageConfig, export_names
from drift_accel.training.checkpoint import CheckpointConfig
from drift_accel.training.finite_gate import check_policy
from drift_accel.training.optimizer import OptimizerConfig
from drift_accel.training.profiling import parse_steps
from drift_accel.training.telemetry import LogConfig

PRECISIONS = ("float32", "bfloat16", "float64")
_OF_ONE_START = ("nonfinite", "max_hours", "collective_timeout_minutes")
COMPILE_MODES = ("none", "blocks")


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
    """"auto" takes what accelerate finds; "cpu" stays on the processor; "cuda": a GPU a process; "cuda:N": that one, alone."""
    num_processes: int | None = None
    """Number of processes that the launcher must have started; null accepts any."""
    compile: str = "none"
    """"blocks": torch.compile each repeated block of the networks (minutes at the start); weights keep their names."""
    overfit_one_batch: bool = False
    """Train on the draws of step 0 in every step, to see whether the loss can be driven down at all."""
    profile_steps: str | None = None
    """"A-B": write a torch profiler trace of these steps, counted from 1, into the run's profiles folder; null: none."""
    init_from: str | None = None
    """Start a new run from weights of a run or a checkpoint (the plain ones), of an export (its average), or of a folder of the
    official release; null: from random ones."""
    nonfinite: str = "stop"
    """What follows a loss or gradient that is not finite, whose step changes nothing: "stop", or "skip:N" to tolerate up to N
    steps in a row."""
    max_hours: float | None = None
    """Hours after which this start writes a checkpoint and ends with exit code 75, as after SIGTERM or SIGUSR1; the same command
    goes on. null: no limit."""
    collective_timeout_minutes: float = 30.0
    """Minutes that a process waits for the others before it gives up; longer than anything that one of them does alone."""
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
        check_device_name(self.device)
        if self.compile not in COMPILE_MODES:
            raise ValueError(f"compile is {self.compile!r}: choose one of {', '.join(COMPILE_MODES)}")
        if self.profile_steps is not None:
            parse_steps(self.profile_steps)
        if self.num_processes is not None:
            require_positive("", self, "num_processes")
        if self.init_from is not None and not self.init_from:
            raise ValueError("init_from is empty: give a folder with weights, or null")
        check_policy(self.nonfinite)
        if self.max_hours is not None and not 0 < self.max_hours < float("inf"):
            raise ValueError(f"max_hours is {self.max_hours}: give a positive number of hours, or null for no limit")
        if not 0 < self.collective_timeout_minutes <= 7 * 24 * 60:
            raise ValueError(
                f"collective_timeout_minutes is {self.collective_timeout_minutes}: give minutes above 0 and up to a week"
            )

    @property
    def may_change(self) -> tuple[str, ...]:
        """Keys that a run may change between two starts: its mathematics stays the same."""
        return ("steps", "device", "num_processes", "compile", "profile_steps", "checkpoint", "log", *_OF_ONE_START)

    @property
    def export_names(self) -> dict[float, str]:
        """The name under which each average is exported."""
        return export_names(self.ema.decays)

    def check_launch(self, num_processes: int) -> None:
        """Raise ValueError where the launcher started another number of processes than was asked for."""
        require_num_processes(self.num_processes, num_processes)


def require_positive(group: str, config, *names: str, at_least: int = 1) -> None:
    """Raise ValueError where a count of a configuration is below `at_least`."""
    for name in names:
        value = getattr(config, name)
        if value < at_least:
            raise ValueError(f"{group + '.' if group else ''}{name} is {value}: give an integer of at least {at_least}")
