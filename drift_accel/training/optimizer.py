"""AdamW with the release's schedule and clipping, and an update that a non-finite gradient cannot reach."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from drift_accel.training.sharding import whole_tensor


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, linear warm-up to a constant rate, clipping. Raises ValueError for values that cannot work."""

    lr: float = 4e-4
    """Learning rate after the warm-up, > 0."""
    warmup_steps: int = 10_000
    """Steps of the linear rise from `warmup_from` to `lr`; 0 starts at `lr`."""
    warmup_from: float = 1e-6
    """Learning rate of the first step when there is a warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moments, each in [0, 1)."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled decay, multiplied by the learning rate."""
    decay_all: bool = True
    """True: every parameter decays, as in the release; False spares norms, biases, embeddings and other vectors."""
    clip_norm: float = 2.0
    """Largest global gradient norm; gradients above it are scaled down."""

    def __post_init__(self):
        for name in ("lr", "warmup_from", "eps", "clip_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}: give a positive number")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps is {self.warmup_steps}: give an integer of at least 0")
        if any(not 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas is {self.betas}: each must lie in [0, 1)")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"optimizer.weight_decay is {self.weight_decay}: give a number of at least 0")


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Rate of a step counted from 0: linear from `warmup_from` to `lr` over `warmup_steps`, then constant."""
    if config.warmup_steps == 0:
        return config.lr
    return config.warmup_from + (config.lr - config.warmup_from) * min(step / config.warmup_steps, 1.0)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the model's trainable parameters, fused because that one can be gated on the device."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if config.decay_all:
        groups = [{"params": [p for _, p in named], "weight_decay": config.weight_decay}]
    else:
        embeddings = _embedding_parameters(model)
        spared = [p for name, p in named if p.ndim < 2 or name in embeddings]
        decayed = [p for name, p in named if not (p.ndim < 2 or name in embeddings)]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def inner_optimizer(optimizer) -> torch.optim.Optimizer:
    """The torch optimiser inside accelerate's wrapper: the one that reads the flag and holds the state."""
    return getattr(optimizer, "optimizer", optimizer)


def _embedding_parameters(model: nn.Module) -> set[str]:
    """Names of the weights of nn.Embedding layers and of learned position or token tables (no layer's own `weight`)."""
    names = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return names | {name for name, _ in model.named_parameters() if not name.endswith((".weight", ".bias"))}


def update_weights(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[nn.Parameter],
    config: OptimizerConfig,
    step: int,
    loss: Tensor,
    group=None,
    held: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Clip and apply one update; returns (gradient norm before clipping (), flag () that is 1 where nothing was updated).

    The flag is the largest over `group` and the same on every process; where it is 1 the fused optimiser leaves weights and
    moments untouched, without the host waiting for it. It is 1 where loss or gradient are not finite, and where `held` () is 1:
    the flag of an earlier step that the host has not read yet.
    """
    gradient_norm = whole_tensor(nn.utils.clip_grad_norm_(parameters, config.clip_norm))
    non_finite = (~(torch.isfinite(loss.detach()) & torch.isfinite(gradient_norm))).float()
    if held is not None:
        non_finite = torch.maximum(non_finite, held)
    if group is not None:
        torch.distributed.all_reduce(non_finite, op=torch.distributed.ReduceOp.MAX, group=group)
    inner = inner_optimizer(optimizer)
    for settings in inner.param_groups:
        settings["lr"] = learning_rate(config, step)
    inner.grad_scale, inner.found_inf = None, non_finite
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return gradient_norm, non_finite
