"""Model FLOP utilisation of a run: the operations that its step's networks need at least, over what the devices could have done.

Recomputation, passes for statistics, the drift and the optimiser are not counted, so that the number compares runs by the same
work. The networks run once on tensors without contents; nothing is computed, allocated or changed.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from drift_accel.drift.encoders import EncoderSpec
from drift_accel.training.configuration import TrainingConfig
from drift_accel.training.estimation import HollowStep
from drift_accel.training.measurement import decoders_keep_activations, peak_flops


def seconds_at_peak(config: TrainingConfig, accelerator: Accelerator, count_flops: Callable[[], float]) -> float | None:
    """What a step of `count_flops` operations would take if all devices of the run reached their peak.

    That is `log.peak_tflops`, or what is known of this process's device; None where neither says, on other processes than the
    main one, and, with a line about it, where the operations cannot be counted (an encoder of a user's own).
    """
    known = peak_flops(accelerator.device, config.precision)
    peak = known if config.log.peak_tflops is None else 1e12 * config.log.peak_tflops
    if peak is None or not accelerator.is_main_process:
        return None
    try:
        return count_flops() / (peak * accelerator.num_processes)
    except Exception as error:  # whatever code without contents in its tensors leads to: a number to look at ends no run
        lines = str(error).splitlines() or [""]
        accelerator.print(f"model_flop_utilisation is left out: {type(error).__name__}: {lines[0]}")
        return None


def generator_step_flops(config, specs: Sequence[EncoderSpec]) -> float:
    """Operations of a generator's step over all processes, a multiply-add as 2: generator and encoders, forward and backward.

    `config`: a `train.GeneratorTrainingConfig`; `specs`: its encoders as they were loaded, on the processor.
    """
    plain = replace(config, gradient_checkpointing=False, precision="float32")  # neither changes what must be done
    with FakeTensorMode(allow_non_fake_inputs=True), decoders_keep_activations(specs):
        return config.batch.labels * sum(HollowStep(plain, specs).operations().values())


def encoder_step_flops(config) -> float:
    """Operations of an encoder's step over all processes, forward and backward; `config`: a `train_mae.MaeTrainingConfig`."""
    from drift_accel.models import MaskedAutoencoder

    with FakeTensorMode():
        model: nn.Module = MaskedAutoencoder(**config.mae.arguments())
        sizes = model.config
        images = torch.zeros(1, sizes.in_channels, sizes.input_size, sizes.input_size)
        side = sizes.input_size // sizes.input_patch_size
        with FlopCounterMode(display=False) as counter:
            losses = model(images, torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, side, side), config.classifier.weight)
            losses.loss.sum().backward()
    return float(config.batch_size * counter.get_total_flops())
