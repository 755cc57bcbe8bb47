"""One step of generator training up to its loss: the paper's algorithm in the paper's order.

Shapes: L labels of this process, G generated, P positives, N unconditional negatives a label, K style coordinates,
[C,H,W] an image or latent, T locations and S features of a key. Generated samples are label-major: index = label * G + g.
Source: arXiv 2602.04770, algorithm 1 and appendix A.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from drift_accel.drift import (
    DriftConfig,
    DriftLoss,
    DriftProblems,
    DriftStatistics,
    FeatureConfig,
    drift_losses,
    negative_weight,
)
from drift_accel.drift.encoders import (
    GLOBAL_KEY,
    EncoderSpec,
    as_specs,
    decoded_images,
    encoder_features,
    has_decoder,
    key_weight,
)
from drift_accel.training.step_parts import step_part

Encoders = nn.Module | EncoderSpec | Sequence[EncoderSpec]


@dataclass(frozen=True)
class DriftBatch:
    """Everything a step draws: labels [L], guidance_scale [L], positives [L,P,C,H,W], negatives [L,N,C,H,W],
    noise [L*G,C,H,W], style_indices [L*G,K]. guidance_weighs False: the negatives weigh 0 whatever the guidance.
    positive_images [L,P,3,H,W] and negative_images [L,N,3,H,W] are what encoders behind a decoder see of the real latents; None:
    the latents decoded.

    Raises ValueError where the shapes do not fit together.
    """

    labels: Tensor
    guidance_scale: Tensor
    positives: Tensor
    negatives: Tensor
    noise: Tensor
    style_indices: Tensor
    guidance_weighs: bool = True
    positive_images: Tensor | None = None
    negative_images: Tensor | None = None

    def __post_init__(self):
        num_labels = self.labels.shape[0]
        for name in ("positive", "negative"):
            images, latents = getattr(self, f"{name}_images"), getattr(self, f"{name}s")
            if (images is None) != (self.positive_images is None):
                raise ValueError("give positive_images and negative_images, or neither of them")
            if images is not None and images.shape[:2] != latents.shape[:2]:
                shapes = f"{list(images.shape)}: wanted one image for each of {list(latents.shape[:2])} latents"
                raise ValueError(f"{name}_images has shape {shapes}")
        for name in ("guidance_scale", "positives", "negatives"):
            given = getattr(self, name).shape
            if given[0] != num_labels:
                raise ValueError(f"{name} has shape {list(given)}: wanted {num_labels} labels on its first axis")
        if num_labels == 0 or self.noise.shape[0] == 0 or self.noise.shape[0] % num_labels:
            raise ValueError(
                f"noise has shape {list(self.noise.shape)}: wanted the same number of samples for each of {num_labels} labels"
            )
        if self.style_indices.shape[0] != self.noise.shape[0]:
            raise ValueError(
                f"style_indices has shape {list(self.style_indices.shape)}: "
                f"wanted one row for each of {self.noise.shape[0]} samples"
            )

    @property
    def num_generated(self) -> int:
        return self.noise.shape[0] // self.labels.shape[0]

    @property
    def num_negatives(self) -> int:
        return self.negatives.shape[1]

    def negative_weight(self) -> Tensor:
        """w [L] of this batch's guidance."""
        w = negative_weight(self.guidance_scale, self.num_generated, self.num_negatives)
        return w if self.guidance_weighs else torch.zeros_like(w)

    def labels_from(self, start: int, stop: int) -> "DriftBatch":
        """The labels `start` to `stop` with all their samples, as views."""
        G = self.num_generated
        by_sample = ("noise", "style_indices")
        members = {
            name: value[start * G : stop * G] if name in by_sample else value[start:stop]
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return DriftBatch(**members, guidance_weighs=self.guidance_weighs)

    def pinned(self) -> "DriftBatch":
        """The batch in page-locked memory, from which `to` copies to a GPU while the host goes on."""
        members = {name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return DriftBatch(**members, guidance_weighs=self.guidance_weighs)

    def to(self, device, dtype: torch.dtype) -> "DriftBatch":
        """The batch on `device`, its real-valued members as `dtype`."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=True)

        members = {name: move(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return DriftBatch(**members, guidance_weighs=self.guidance_weighs)


@dataclass(frozen=True)
class StepResult:
    """loss (): call `.backward()` on it; metrics {tag: ()}, detached; statistics {key: DriftStatistics}."""

    loss: Tensor
    metrics: dict[str, Tensor]
    statistics: dict[str, DriftStatistics]


def drift_step(
    generator: nn.Module,
    encoder: Encoders,
    batch: DriftBatch,
    drift: DriftConfig | None = None,
    features: FeatureConfig | None = None,
    statistics: Mapping[str, DriftStatistics] | None = None,
    group=None,
    diagnostics: bool = False,
) -> StepResult:
    """Generate, extract features, drift: the loss of one step, summed over feature keys, mean over this process's labels.

    `encoder` is one encoder, whose keys `features` chooses, or one or several EncoderSpecs with their own features and weights.
    `statistics` (by key) are used instead of this batch's when given; `group` is the process group they are taken over.
    Metrics: loss, scale/KEY, drift_sqnorm_TAU/KEY, key_loss/KEY and, with `diagnostics`, NAME_TAU/KEY.
    """
    specs = as_specs(encoder, features)
    problems = step_problems(generator, specs, batch)
    return step_loss(problems, batch, drift, specs=specs, statistics=statistics, group=group, diagnostics=diagnostics)


def step_problems(
    generator: nn.Module, encoder: Encoders, batch: DriftBatch, features: FeatureConfig | None = None
) -> dict[str, DriftProblems]:
    """Generate and extract features: the drift problems of every key, one a label and location."""
    specs = as_specs(encoder, features)
    G, N = batch.num_generated, batch.num_negatives
    with step_part("generator"):
        generated = generator(
            batch.noise, batch.labels.repeat_interleave(G), batch.guidance_scale.repeat_interleave(G), batch.style_indices
        )  # [L*G,C,H,W]
    with step_part("encoder"):
        with torch.no_grad():
            real = torch.cat([batch.positives, batch.negatives], dim=1).flatten(0, 1)  # [L*(P+N),C,H,W]
            seen = None
            if batch.positive_images is not None:
                seen = torch.cat([batch.positive_images, batch.negative_images], dim=1).flatten(0, 1)  # [L*(P+N),3,H,W]
            real_features = all_features(specs, real, seen)  # {key: [L*(P+N),T,S]}
        generated_features = all_features(specs, generated)  # {key: [L*G,T,S]}
        weight = batch.negative_weight()
        return {
            key: make_problems(values, real_features[key], weight, num_negatives=N) for key, values in generated_features.items()
        }


def step_loss(
    problems: Mapping[str, DriftProblems],
    batch: DriftBatch,
    drift: DriftConfig | None = None,
    *,
    specs: Sequence[EncoderSpec] | None = None,
    statistics: Mapping[str, DriftStatistics] | None = None,
    group=None,
    diagnostics: bool = False,
) -> StepResult:
    """Drift: the loss of `step_problems` of a batch, each key weighed by its encoder (None: 1); the rest as `drift_step`."""
    drift = DriftConfig() if drift is None else drift
    with step_part("drift"):
        results = drift_losses(problems, config=drift, statistics=statistics, group=group, diagnostics=diagnostics)
        num_labels = batch.labels.shape[0]
        weights = {key: 1.0 if specs is None else key_weight(specs, key) for key in results}
        key_losses = {key: key_loss(result, problems[key], num_labels, drift) for key, result in results.items()}
        loss = torch.stack([weights[key] * value for key, value in key_losses.items()]).sum()
        return StepResult(loss, step_metrics(loss, key_losses, results), {key: r.statistics for key, r in results.items()})


def all_features(specs: Sequence[EncoderSpec], images: Tensor, seen: Tensor | None = None) -> dict[str, Tensor]:
    """The encoders' keys and `global`: {key: [B,T,S]}. `global` and `norm_x` keep full precision under autocast.

    `seen` [B,3,H,W] takes the place of what decoders make of `images`.
    """
    images = images.float() if images.dtype in (torch.bfloat16, torch.float16) else images
    if not has_decoder(specs):
        decoded = {}
    elif seen is not None:
        decoded = {id(spec.decoder): seen for spec in specs}
    else:
        with step_part("vae"):
            decoded = decoded_images(specs, images)
    keys = encoder_features(specs, images, decoded)
    keys[GLOBAL_KEY] = images.flatten(1).unsqueeze(1)
    return keys


def make_problems(generated: Tensor, real: Tensor, weight: Tensor, *, num_negatives: int) -> DriftProblems:
    """Regroup a key's features [images,T,S] into one problem a label and location: [L*T, members, S]; weight [L]."""
    L, T = weight.shape[0], generated.shape[1]

    def by_problem(values: Tensor) -> Tensor:  # [L*members,T,S] -> [L*T,members,S]
        return values.unflatten(0, (L, -1)).transpose(1, 2).flatten(0, 1)

    real = by_problem(real.to(generated.dtype))
    positives, negatives = real.split([real.shape[1] - num_negatives, num_negatives], dim=1)
    weight = weight.repeat_interleave(T)[:, None].expand(-1, num_negatives)
    return DriftProblems(by_problem(generated), positives, negatives, weight)


def key_loss(result: DriftLoss, problems: DriftProblems, num_labels: int, drift: DriftConfig) -> Tensor:
    """Mean over problems; reduction "paper" sums over locations instead of averaging them."""
    loss = result.loss.mean()
    return loss * (problems.num_problems // num_labels) if drift.reduction == "paper" else loss


def step_metrics(loss: Tensor, key_losses: Mapping[str, Tensor], results: Mapping[str, DriftLoss]) -> dict[str, Tensor]:
    """Flatten a step's numbers into {tag: ()}, all detached and on the device."""
    metrics = {"loss": loss.detach()}
    for key, result in results.items():
        metrics[f"key_loss/{key}"] = key_losses[key].detach()
        metrics[f"scale/{key}"] = result.scale
        for temperature, value in result.drift_sqnorm.items():
            metrics[f"drift_sqnorm_{temperature:.12g}/{key}"] = value
        for name, values in (result.diagnostics or {}).items():
            for temperature, value in values.items():
                metrics[f"{name}_{temperature:.12g}/{key}"] = value
    return metrics
