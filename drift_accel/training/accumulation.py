"""Forward and backward of a step in parts that fit the memory: one gradient, summed over processes once."""

import contextlib

from accelerate import Accelerator
from torch import Tensor, nn

from drift_accel.training.step_parts import step_part


def accumulate_gradients(
    accelerator: Accelerator, model: nn.Module, task, batch, step: int, *, diagnostics: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Leave the step's gradient in the weights; return its loss () and metrics {tag: ()}, detached.

    `task` is a `loop.TrainingTask`. Loss and metrics are means over the batch's labels, whatever its parts. Processes exchange
    gradients in the last part's backward pass only. Each pass through the networks has an autocast context of its own: autocast
    keeps converted weights until its context ends, and in older torch one converted without gradient has none in the next pass.
    """
    parts = task.split(batch)
    num_labels = sum(part.labels.shape[0] for part in parts)
    task.prepare(model, parts, accelerator.autocast)
    loss, metrics = None, {}
    for index, part in enumerate(parts):
        share = part.labels.shape[0] / num_labels
        is_last = index == len(parts) - 1
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
            with accelerator.autocast():
                part_loss, part_metrics = task.compute(model, part, step, diagnostics=diagnostics)
            with step_part("backward"):
                accelerator.backward(part_loss * share if len(parts) > 1 else part_loss)
        if len(parts) == 1:
            return part_loss.detach(), part_metrics
        loss = part_loss.detach() * share if loss is None else loss + part_loss.detach() * share
        metrics = {tag: value * share + metrics.get(tag, 0) for tag, value in part_metrics.items()}
    return loss, metrics
