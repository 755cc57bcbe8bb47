"""The training loop that the generator and the masked autoencoder share.

The loop knows steps, updates, averages, checkpoints and records; what a step computes is a `TrainingTask`, and what
happens beside training (pictures, evaluation) are hooks that the commands plug in.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from drift_accel.foundation.collectives import gather_text, require_agreement, run_on_main, world_group
from drift_accel.foundation.progress import Progress
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.storage import COMPLETE_NAME, sha256_file
from drift_accel.training.averages import WeightAverages
from drift_accel.training.checkpoint import load_checkpoint, save_checkpoint
from drift_accel.training.configuration import TrainingConfig
from drift_accel.training.optimizer import inner_optimizer, learning_rate, make_optimizer, update_weights
from drift_accel.training.prefetch import Prefetch
from drift_accel.training.telemetry import Telemetry, read_metrics


class TrainingTask(Protocol):
    """What is trained and how a step's loss comes about."""

    model: nn.Module
    num_samples: int  # samples a step trains on, over all processes

    def draw(self, step: int):
        """Everything random and real of this process's part of a step, on the host; called for one step after the other."""

    def transfer(self, batch):
        """A drawn batch on the run's device."""

    def data_state(self) -> dict[str, Tensor]:
        """What `draw` needs to go on after the step it drew last; empty where draws are functions of the step alone."""

    def load_data_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved `data_state`."""

    def compute(self, model: nn.Module, batch, step: int, *, diagnostics: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss () and metrics {tag: ()} of this process's part; `model` is the task's own, wrapped for distribution."""


@dataclass
class TrainingState:
    """The moving parts of a run; `step` counts finished optimiser steps."""

    accelerator: Accelerator
    task: TrainingTask
    model: nn.Module  # wrapped for distribution
    optimizer: torch.optim.Optimizer
    averages: WeightAverages
    step: int = 0
    data_state: dict[str, Tensor] = field(default_factory=dict)  # of the last finished step: the next one is drawn already

    @property
    def group(self):
        """Process group of the run, None for a single process."""
        return world_group()


def _nothing(*_) -> None:
    pass


@dataclass(frozen=True)
class Hooks:
    """Called on the main process: on_log(step, record), on_checkpoint(step, folder), on_sample(step, state, telemetry)."""

    on_log: Callable[[int, dict[str, float]], None] = field(default=_nothing)
    on_checkpoint: Callable[[int, object], None] = field(default=_nothing)
    on_sample: Callable[[int, TrainingState, Telemetry], None] = field(default=_nothing)


class NonFiniteError(RuntimeError):
    """A loss or gradient was not finite; the weights are those of before that step."""


class FiniteGate:
    """Reads the non-finite flag of a step while the next one is already under way, so that the device never waits."""

    def __init__(self, group=None):
        self._group = group
        self._pending: tuple[int, _HostFlag, dict[str, Tensor]] | None = None

    def watch(self, step: int, flag: Tensor, metrics: dict[str, Tensor]) -> None:
        """Check the step before this one, and keep this one's flag for later."""
        host_flag = _HostFlag(flag)
        self.check()
        self._pending = (step, host_flag, metrics)

    def check(self) -> None:
        """Raise NonFiniteError on every process where the watched step was not finite, naming what was not, and where."""
        if self._pending is None:
            return
        step, flag, metrics = self._pending
        self._pending = None
        if not flag.is_set():
            return
        names = [tag for tag, value in metrics.items() if not torch.isfinite(value)]
        # The flag is the same on all processes, so all of them come here.
        by_process = gather_text(", ".join(names[:8]) + (" ..." if len(names) > 8 else ""), self._group)
        where = by_process if len(by_process) == 1 else [f"process {i}: {text}" for i, text in enumerate(by_process) if text]
        raise NonFiniteError(
            f"step {step}: not finite: {'; '.join(where) or 'the gradient'}. The weights are untouched and the last checkpoint "
            "is good. Lower optimizer.lr, or look at the data of that step"
        )


class _HostFlag:
    """A flag () on its way to the host: reading it waits for the step that made it and for nothing enqueued later."""

    def __init__(self, flag: Tensor):
        self._value, self._copied = flag, None
        if flag.is_cuda:
            self._value = torch.empty((), dtype=flag.dtype, pin_memory=True)
            self._value.copy_(flag, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def is_set(self) -> bool:
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._value.item())


def start_state(task: TrainingTask, config: TrainingConfig, accelerator: Accelerator) -> TrainingState:
    """Prepare model and optimiser for the launched processes; averages start at the initial weights."""
    averages = WeightAverages(task.model, config.ema.decays)
    optimizer = make_optimizer(task.model, config.optimizer)
    model, optimizer = accelerator.prepare(task.model, optimizer)
    return TrainingState(accelerator=accelerator, task=task, model=model, optimizer=optimizer, averages=averages)


def resume(state: TrainingState, run: RunFolder, log: Callable[[str], None]) -> None:
    """Go to the newest complete checkpoint of the run, if there is one; damaged ones are named and skipped.

    The main process chooses it. Raises ValueError on every process where one of them does not see the same files.
    """
    found = run_on_main(lambda: run.latest_complete_checkpoint(on_damaged=log), state.group)
    if found is None:
        return
    state.step, folder = found
    mark = folder / COMPLETE_NAME
    seen = sha256_file(mark) if mark.exists() else "missing"
    require_agreement(seen, f"checkpoint {folder} (is the folder shared by all machines?)", state.group)
    state.data_state = load_checkpoint(folder, state.task.model, inner_optimizer(state.optimizer), state.averages)
    state.task.load_data_state(state.data_state)
    log(f"resuming from {folder} after {state.step} steps")


def train(state: TrainingState, config: TrainingConfig, run: RunFolder, hooks: Hooks) -> None:
    """Train from `state.step` to `config.steps`, with records, samples and checkpoints on the way.

    Raises NonFiniteError on every process when a loss or gradient is not finite.
    """
    is_main = state.accelerator.is_main_process
    telemetry = Telemetry(run, state.step, enabled=is_main)
    prefetch = Prefetch(lambda step: (state.task.draw(step), state.task.data_state()), state.step, config.steps)
    gate = FiniteGate(state.group)
    try:
        with Progress(config.steps, initial=state.step, description=run.path.name, enabled=is_main) as progress:
            if state.step == config.steps:
                progress.log(f"{run.path}: all {config.steps} steps are done")
            while state.step < config.steps:
                due = _due(config, state.step + 1)
                batch, state.data_state = prefetch.take()
                metrics, non_finite = train_step(state, config, batch, diagnostics=due.log)
                gate.watch(state.step, non_finite, metrics)
                shown = {}
                if due.log:
                    record = log_step(state, metrics, telemetry, prefetch)
                    shown = progress_values(record)
                    if is_main:
                        hooks.on_log(state.step, record)
                if due.sample or due.checkpoint:
                    gate.check()  # what follows must never show or keep a step that was not finite
                if due.sample and is_main:
                    hooks.on_sample(state.step, state, telemetry)
                if due.checkpoint:
                    write_checkpoint(state, config, run, hooks)
                progress.update(**shown)
            gate.check()
    finally:
        prefetch.close()
        telemetry.close()


def log_step(state: TrainingState, metrics: dict[str, Tensor], telemetry: Telemetry, prefetch: Prefetch) -> dict[str, float]:
    """Read a step's metrics from the device and record them."""
    values = read_metrics(metrics, state.accelerator.num_processes, state.group)
    return telemetry.record(state.step, values, state.task.num_samples, prefetch.read_waited())


def progress_values(record: dict[str, float]) -> dict[str, float]:
    """What the progress line shows of a record: the loss, and drift_sqnorm at the largest temperature."""
    norms = [name for name in record if name.startswith("drift_sqnorm_") and "/" not in name]
    largest = sorted(norms, key=lambda name: float(name.removeprefix("drift_sqnorm_")))[-1:]
    return {name: record[name] for name in ("loss", *largest, "reconstruction", "accuracy") if name in record}


def train_step(state: TrainingState, config: TrainingConfig, batch, *, diagnostics: bool) -> tuple[dict[str, Tensor], Tensor]:
    """One optimiser step: loss, gradient, clipped update, averages. Returns metrics and the non-finite flag."""
    step = state.step
    batch = state.task.transfer(batch)
    with state.accelerator.autocast():
        loss, metrics = state.task.compute(state.model, batch, step, diagnostics=diagnostics)
    state.accelerator.backward(loss)
    gradient_norm, non_finite = update_weights(
        state.optimizer, state.model.parameters(), config.optimizer, step, loss, state.group
    )
    state.averages.update(state.task.model)
    state.step += 1
    rate = torch.full_like(gradient_norm, learning_rate(config.optimizer, step))
    return {**metrics, "gradient_norm": gradient_norm, "learning_rate": rate}, non_finite


def write_checkpoint(state: TrainingState, config: TrainingConfig, run: RunFolder, hooks: Hooks) -> None:
    """Write a checkpoint on the main process while the others wait, then drop the oldest ones."""

    def write() -> None:
        folder = save_checkpoint(
            run,
            state.step,
            state.task.model,
            inner_optimizer(state.optimizer),
            state.averages,
            data_state=state.data_state,
            record={"num_processes": state.accelerator.num_processes, "torch": torch.__version__},
        )
        run.prune_checkpoints(config.checkpoint.keep_last)
        hooks.on_checkpoint(state.step, folder)

    run_on_main(write, state.group)


@dataclass(frozen=True)
class _Due:
    log: bool
    sample: bool
    checkpoint: bool


def _due(config: TrainingConfig, step: int) -> _Due:
    """What happens after `step` finished steps; the first step is logged so that trouble shows at once."""
    last = step == config.steps
    return _Due(
        log=last or step == 1 or step % config.log.every == 0,
        sample=last or step % config.log.sample_every == 0,
        checkpoint=last or step % config.checkpoint.every == 0,
    )
