"""Numbers of a step that tell how training goes, beside those of the drift itself; taken at log steps alone.

Shapes: L labels, G generated and P positive samples a label, S features of a key.
"""

import hashlib
import resource
import sys
from collections.abc import Callable, Iterable, Mapping

import torch
from accelerate.tracking import filter_trackers
from torch import Tensor

from drift_accel.drift import DriftProblems
from drift_accel.foundation.command_line import configuration_dict
from drift_accel.training.sharding import whole_tensor

SMALLEST_DEVIATION = 1e-12
PROJECT = "drift_accel"


@torch.no_grad()
def class_diversity(problems: Mapping[str, DriftProblems], num_labels: int) -> dict[str, Tensor]:
    """How much samples of a class differ, beside real ones: metrics {tag/KEY: ()} for every key with one location.

    diversity_generated: root of the within-class variance (over the samples of a label, summed over features), mean over labels;
    diversity_real: the same of the positives; diversity_ratio: mean over labels of the first over the second. All are means over
    labels, so that neither slices nor processes change them. Empty for fewer than two samples.
    """
    metrics = {}
    for key, members in problems.items():
        if members.num_problems != num_labels or min(members.num_generated, members.num_positives) < 2:
            continue
        generated, real = _deviation(members.generated), _deviation(members.positives)
        metrics[f"diversity_generated/{key}"] = generated.mean()
        metrics[f"diversity_real/{key}"] = real.mean()
        metrics[f"diversity_ratio/{key}"] = (generated / real.clamp_min(SMALLEST_DEVIATION)).mean()
    return metrics


def _deviation(samples: Tensor) -> Tensor:
    """Root of the unbiased variance within each label of [L, samples, S], summed over S: [L]."""
    wide = samples.double() if samples.dtype == torch.float64 else samples.float()
    return wide.var(1, correction=1).sum(-1).sqrt()


@torch.no_grad()
def step_norms(optimizer: torch.optim.Optimizer, rate: float, non_finite: Tensor) -> dict[str, Tensor]:
    """weight_norm after the step and update_norm, the length of what AdamW added to the weights: each ().

    The update follows from the optimiser's moments after the step, so that no copy of the weights is needed.
    """
    weights, updates = [], []
    for settings in optimizer.param_groups:
        first, second = settings["betas"]
        for parameter in settings["params"]:
            state = optimizer.state.get(parameter)
            if not state:
                continue
            weights.append(_squared(parameter))
            step = state["step"].to(parameter.device)
            direction = state["exp_avg"] / (1 - first**step)
            direction = direction / ((state["exp_avg_sq"] / (1 - second**step)).sqrt_() + settings["eps"])
            # after = before (1 - rate decay) - rate direction, so before - after = (rate direction + rate decay after) / (1 -
            # rate decay)
            shrink = rate * settings["weight_decay"]
            updates.append(_squared((rate * direction + shrink * parameter) / (1 - shrink)))
    # In a first step that is not counted the moments' own step is 0, and the quotients above are no numbers.
    update_norm = torch.where(non_finite > 0, torch.zeros_like(non_finite), _root(updates, non_finite))
    return {"weight_norm": _root(weights, non_finite), "update_norm": update_norm}


def _squared(tensor: Tensor) -> Tensor:
    return whole_tensor(tensor.detach().square().sum())


def _root(squares: Iterable[Tensor], like: Tensor) -> Tensor:
    squares = list(squares)
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros_like(like)


def memory_gb(device: torch.device) -> float:
    """The most that this process has held so far, in GB: of the device's memory, or of the machine's where there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def drawn_values(batch) -> dict[str, Tensor]:
    """What of a drawn batch is shown as a histogram: {tag: values on the host}."""
    guidance = getattr(batch, "guidance_scale", None)
    return {} if guidance is None else {"guidance": guidance.detach()}


def open_trackers(state, config, run) -> Callable[[dict[str, float], int], None] | None:
    """Start accelerate's trackers of `log.trackers` under the run's name; what gets (values, step), None without trackers.

    A run that goes on has the same id, so that no step appears twice. Every process must call this.
    """
    if not config.log.trackers:
        return None
    name = run.path.name
    identity = hashlib.sha256(str(run.path.absolute()).encode()).hexdigest()[:16]
    settings = {"wandb": {"name": name, "id": identity, "resume": "allow"}}
    state.accelerator.log_with = filter_trackers(list(config.log.trackers), str(run.path))
    state.accelerator.init_trackers(PROJECT, config=configuration_dict(config), init_kwargs=settings)
    return lambda values, step: state.accelerator.log(values, step=step)
