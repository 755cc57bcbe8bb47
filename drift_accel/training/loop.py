"""The training loop that the generator and the masked autoencoder share.

The loop knows steps, updates, averages, checkpoints and records; what a step computes is a `TrainingTask`, and what
happens beside training (pictures, evaluation) are hooks that the commands plug in.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from drift_accel.foundation.progress import Progress
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.training.accumulation import accumulate_gradients
from drift_accel.training.alarms import watch_for
from drift_accel.training.configuration import TrainingConfig
from drift_accel.training.finite_gate import NonFiniteError
from drift_accel.training.monitoring import drawn_values, memory_gb, open_trackers, step_norms
from drift_accel.training.optimizer import inner_optimizer, learning_rate, update_weights
from drift_accel.training.prefetch import Prefetch
from drift_accel.training.saver import Saver
from drift_accel.training.state import TrainingState, TrainingTask, resume, start_state
from drift_accel.training.step_parts import step_part
from drift_accel.training.stops import REASONS, Exchange, StopRequested
from drift_accel.training.telemetry import Telemetry, read_metrics

__all__ = ["Hooks", "NonFiniteError", "TrainingState", "TrainingTask", "resume", "start_state", "train", "train_step"]


def _nothing(*_) -> None:
    pass


@dataclass(frozen=True)
class Hooks:
    """What happens beside training.

    measure(step, state) is called on every process at each log step; the {name: value} that it returns on the main one become
    part of the step's record. on_log(step, record) and on_checkpoint(step, folder), which is complete then, are called on the
    main process. What the latter returns, {name: value}, is known to checkpoint.keep_best. on_sample(step, state, telemetry) is
    called on every process: `averages.applied_to` may need all of them; pictures are for the main one. A long hook ends early
    where `state.stops.code` is not 0.
    """

    measure: Callable[[int, TrainingState], Mapping[str, float] | None] = field(default=_nothing)
    on_log: Callable[[int, dict[str, float]], None] = field(default=_nothing)
    on_checkpoint: Callable[[int, Path], Mapping[str, float] | None] = field(default=_nothing)
    on_sample: Callable[[int, TrainingState, Telemetry], None] = field(default=_nothing)


def train(state: TrainingState, config: TrainingConfig, run: RunFolder, hooks: Hooks) -> None:
    """Train from `state.step` to `config.steps`, with records, samples and checkpoints on the way.

    Returns when the last checkpoint is complete. On every process it raises NonFiniteError when a loss or gradient is not finite
    more often than is tolerated, CheckpointError when a checkpoint cannot be written, and StopRequested when the run was asked
    to stop: after a checkpoint, at the first step that all processes know of it.
    """
    is_main = state.accelerator.is_main_process
    state.data_state = state.data_state or state.task.data_state()
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(config.steps, state.step, run.path.name, enabled=is_main))
        saver = stack.enter_context(closing(Saver(state, config, run, hooks.on_checkpoint, progress.log)))
        lenient = config.checkpoint.on_error == "continue"
        reports = {"enabled": is_main, "lenient": lenient, "watch": watch_for(config), "log": progress.log}
        reports |= {"forward": open_trackers(state, config, run), "seconds_at_peak": state.seconds_at_peak}
        telemetry = stack.enter_context(closing(Telemetry(run, state.step, **reports)))
        exchange = Exchange(state.accelerator.device, state.group)
        reason, _ = exchange.agree(state.stops.code, 0)
        prefetch = stack.enter_context(
            closing(Prefetch(lambda step: (state.task.draw(step), state.task.data_state()), state.step, config.steps))
        )
        if state.step == config.steps:
            progress.log(f"{run.path}: all {config.steps} steps are done")
        while state.step < config.steps and not reason:
            due = _due(config, state.step + 1)
            batch, state.data_state = prefetch.take()
            metrics, non_finite = train_step(state, config, batch, diagnostics=due.log)
            state.gate.watch(state.step, non_finite, metrics)
            reason, failed = exchange.swap(state.stops.code, saver.failure_code())
            saver.poll(failed)
            if due.log or due.sample or due.checkpoint or reason:
                state.gate.check()  # what follows must never show or keep a step that was not finite
            shown = {}
            if due.log:
                with telemetry.beside():
                    measured = hooks.measure(state.step, state) or {}
                record = log_step(state, config, metrics, telemetry, prefetch, measured)
                telemetry.add_histograms(state.step, drawn_values(batch))
                shown = progress_values(record)
                saver.retention.report(state.step, record)
                if is_main:
                    hooks.on_log(state.step, record)
            if due.sample:
                with telemetry.beside():
                    hooks.on_sample(state.step, state, telemetry)
            if due.checkpoint or reason:
                saver.save()
            progress.update(**shown)
        state.gate.check()
        if reason and state.step < config.steps:
            saver.save()
        saver.finish()
    if reason and state.step < config.steps:
        raise StopRequested(f"{REASONS[reason]}, after step {state.step} of {config.steps}")


def log_step(
    state: TrainingState,
    config: TrainingConfig,
    metrics: dict[str, Tensor],
    telemetry: Telemetry,
    prefetch: Prefetch,
    measured: Mapping[str, float],
) -> dict[str, float]:
    """Read a step's metrics from the device and record them, with what was `measured` beside training."""
    values = read_metrics(metrics, state.accelerator.num_processes, state.group)
    values["memory_gb"] = memory_gb(state.accelerator.device)
    if config.nonfinite != "stop":
        values["skipped_steps"] = float(state.gate.skipped)
    return telemetry.record(state.step, {**values, **measured}, state.task.num_samples, prefetch.read_waited())


def progress_values(record: dict[str, float]) -> dict[str, float]:
    """What the progress line shows of a record: the loss, and drift_sqnorm at the largest temperature."""
    norms = [name for name in record if name.startswith("drift_sqnorm_") and "/" not in name]
    largest = sorted(norms, key=lambda name: float(name.removeprefix("drift_sqnorm_")))[-1:]
    return {name: record[name] for name in ("loss", *largest, "reconstruction", "accuracy", "vae_share") if name in record}


def train_step(state: TrainingState, config: TrainingConfig, batch, *, diagnostics: bool) -> tuple[dict[str, Tensor], Tensor]:
    """One optimiser step: loss, gradient, clipped update, averages. Returns metrics and the non-finite flag.

    Nothing here waits for the device.
    """
    step = state.step
    state.profiler.before(step)
    with step_part("transfer"):
        batch = state.task.transfer(batch)
    loss, metrics = accumulate_gradients(state.accelerator, state.model, state.task, batch, step, diagnostics=diagnostics)
    with step_part("optimiser"):
        gradient_norm, non_finite = update_weights(
            state.optimizer, state.model.parameters(), config.optimizer, step, loss, state.group, held=state.gate.held
        )
        if diagnostics:
            rate = learning_rate(config.optimizer, step)
            metrics = {**metrics, **step_norms(inner_optimizer(state.optimizer), rate, non_finite)}
    with step_part("ema"):
        state.averages.update(state.task.model, non_finite)
    state.data_state = {**state.data_state, **state.task.end_step(non_finite)}
    state.step += 1
    state.profiler.after(state.step)
    rate = torch.full_like(gradient_norm, learning_rate(config.optimizer, step))
    return {**metrics, "gradient_norm": gradient_norm, "learning_rate": rate}, non_finite


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
