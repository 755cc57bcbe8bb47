"""What a recipe's step needs, before anything is bought or booked: parameters, operations, memory of a GPU, time.

The networks run on tensors without contents (torch's FakeTensorMode), so that operations and live bytes are those of the real
code under the recipe's autocast, slices and checkpointing; what stays the whole run (weights, moments, averages) is counted.

Shapes: L labels, G generated, P positives, N negatives a label, [C,H,W] an image or latent.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from drift_accel.drift.cost import DriftCost, KeySize, drift_cost
from drift_accel.drift.encoders import as_specs
from drift_accel.drift.slice_statistics import target_products, target_products_bytes
from drift_accel.training.measurement import PEAK_TFLOPS, LiveTensors, operations_of
from drift_accel.training.step import DriftBatch, Encoders, step_loss, step_problems

ADAMW_OPERATIONS = 14  # of a parameter: moments, their corrections, decay, step
AVERAGE_OPERATIONS = 3
# The CUDA context, NCCL's buffers, the drift op's and cuDNN's workspaces.
FIXED_BYTES = 2.5e9
# Of a device's memory; the rest is lost between blocks of the allocator.
USABLE_SHARE = 0.92
DRIFT_EFFICIENCY = 0.5  # of the memory's bandwidth
FLOAT32_SLOWDOWN = 2  # of convolutions in float32, which run as TF32, against bfloat16
VAE_PARTS = ("vae forward", "vae backward")


@dataclass(frozen=True)
class Gpu:
    """A device: what torch sees of its memory (bytes), bfloat16 products a second, bytes a second of its memory."""

    name: str
    memory: float
    flops: float
    bandwidth: float


GPUS = {
    "h100": Gpu("H100 80 GB", 79.1 * 2**30, 1e12 * PEAK_TFLOPS["H100"][0], 3.35e12),
    "h200": Gpu("H200 141 GB", 139.7 * 2**30, 1e12 * PEAK_TFLOPS["H200"][0], 4.8e12),
    "a100": Gpu("A100 80 GB", 79.1 * 2**30, 1e12 * PEAK_TFLOPS["A100"][0], 2.0e12),
}


@dataclass(frozen=True)
class Estimate:
    """parameters by network; flops of a step over all GPUs by part; memory of one GPU in bytes by part (they add up to its peak);
    passes: how often the networks run forward in a step; drift: its least work in a step over all GPUs."""

    parameters: dict[str, int]
    flops: dict[str, float]
    memory: dict[str, float]
    passes: int
    drift: DriftCost
    num_samples: int
    num_slices: int
    float32_parts: tuple[str, ...] = ()
    """Parts of flops that run in float32 whatever the precision."""

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())

    def step_seconds(self, gpu: Gpu, num_gpus: int, utilisation: float) -> float:
        """Networks at a share of the products that the device can do, the drift at a share of its bandwidth."""
        slow = (FLOAT32_SLOWDOWN - 1) * sum(self.flops[name] for name in self.float32_parts)
        networks = (self.total_flops - self.flops["drift"] + slow) / (num_gpus * gpu.flops * utilisation)
        drift = self.passes * self.drift.num_bytes / (num_gpus * gpu.bandwidth * DRIFT_EFFICIENCY)
        return networks + drift

    def fits(self, gpu: Gpu) -> bool:
        return self.total_memory + FIXED_BYTES <= USABLE_SHARE * gpu.memory


def estimate_step(config, num_gpus: int, *, encoder: Callable[[], Encoders], sharded: bool = False) -> Estimate:
    """Estimate a step of a generator's recipe (`train.GeneratorTrainingConfig`) on `num_gpus` devices.

    `encoder` makes the feature encoder or several specs, their tensors without contents; `sharded`: weights and optimiser split
    over devices (FSDP2).
    Raises ValueError for labels that the devices cannot share.
    """
    config.batch.check_processes(num_gpus)
    batch = config.batch
    labels_here = batch.labels // num_gpus
    labels_in_slice = min(batch.labels_per_slice or labels_here, labels_here)
    num_slices = math.ceil(labels_here / labels_in_slice)
    with FakeTensorMode():
        runs = HollowStep(config, encoder())
        per_label = runs.operations()
        products, sizes = runs.of_one_label()
        products *= labels_here
        extra = _extra_passes(config, num_slices, products)
        activations = runs.gradient_peak(labels_in_slice, has_gradient=num_slices > 1)
        if extra:
            kept = products if extra == 1 else 0.0
            activations = max(activations, runs.statistics_peak(labels_in_slice) + kept)
    counts = {"generated": batch.generated, "positives": batch.positives, "negatives": batch.negatives}
    element = 2 if config.precision == "bfloat16" else 4
    drift = drift_cost(
        sizes, labels=batch.labels, num_temperatures=len(config.drift.temperatures), element_size=element, **counts
    )
    num_parameters, num_averages = runs.num_parameters, len(config.ema.decays)
    flops = {name: value * batch.labels for name, value in per_label.items()}
    flops["statistics pass"] = extra * sum(value for name, value in flops.items() if name.endswith("forward"))
    flops["drift"] = float(drift.flops)
    flops["optimiser"] = float(num_parameters * (ADAMW_OPERATIONS + AVERAGE_OPERATIONS * num_averages))
    return Estimate(
        parameters={
            "generator": num_parameters,
            "encoder": runs.num_encoder_parameters,
            **({"vae": runs.num_vae_parameters} if runs.decoders else {}),
        },
        flops=flops,
        memory=_memory(config, runs, num_gpus, sharded, activations, labels_here, has_gradient=num_slices > 1),
        passes=1 + extra,
        drift=drift,
        num_samples=batch.labels * batch.generated,
        num_slices=num_slices,
        float32_parts=VAE_PARTS if runs.decoders and config.decoder.dtype == "float32" else (),
    )


def _extra_passes(config, num_slices: int, products_bytes: float) -> int:
    """Passes without gradient that the statistics need beside the one with it (slices.py)."""
    if config.statistics != "global" or num_slices == 1:
        return 0
    return 1 if products_bytes <= config.statistics_memory_gb * 1e9 else 2


def _memory(
    config, runs: "HollowStep", num_gpus: int, sharded: bool, activations: float, labels: int, has_gradient: bool
) -> dict:
    """Bytes of one device by part; the gradient of a step in one slice arises within the activations' peak."""
    item = 8 if config.precision == "float64" else 4
    split = num_gpus if sharded else 1
    weights = runs.num_parameters * item
    several = num_gpus > 1
    return {
        "weights": weights / split,
        "optimiser": 2 * weights / split,
        "averages": len(config.ema.decays) * weights / split,
        "gradients": weights / split if has_gradient or several else 0.0,
        # Data parallelism packs gradients into buckets beside them; FSDP2 gathers a block at a time.
        "messages": (2 * weights / runs.depth if sharded else weights) if several else 0.0,
        "encoder": runs.num_encoder_parameters * item,
        **({"vae": runs.num_vae_parameters * item} if runs.decoders else {}),
        "batch": labels * runs.label_bytes(item),
        "activations": activations,
    }


class HollowStep:
    """A recipe's networks without contents; use inside FakeTensorMode."""

    def __init__(self, config, encoder: Encoders):
        from drift_accel.models import Generator

        self.config = config
        self.generator = Generator(**config.generator.arguments())
        if config.gradient_checkpointing:
            self.generator.enable_gradient_checkpointing()
        self.specs = as_specs(encoder, config.features if isinstance(encoder, nn.Module) else None)
        if config.precision == "float64":
            self.generator = self.generator.double()
            for spec in self.specs:
                spec.encoder.double()
                if spec.decoder is not None:
                    spec.decoder.double()
        self.dtype = torch.float64 if config.precision == "float64" else torch.float32
        settings = self.generator.config
        self.depth = settings.depth
        self.image_shape = (settings.in_channels, settings.input_size, settings.input_size)
        self.num_style_tokens = settings.num_style_tokens
        self.num_parameters = sum(parameter.numel() for parameter in self.generator.parameters())
        self.num_encoder_parameters = sum(parameter.numel() for spec in self.specs for parameter in spec.encoder.parameters())
        self.decoders = {id(spec.decoder): spec.decoder for spec in self.specs if spec.decoder is not None}
        self.num_vae_parameters = sum(weight.numel() for decoder in self.decoders.values() for weight in decoder.parameters())
        self.seen_shape = None  # of real samples that are read as pictures
        if self.decoders and config.decoder.real_images is not None:
            self.seen_shape = next(iter(self.decoders.values())).image_shape(settings.input_size)

    def label_bytes(self, item: int) -> float:
        counts = self.config.batch
        real = counts.positives + counts.negatives
        pictures = 0 if self.seen_shape is None else real * math.prod(self.seen_shape)
        return ((counts.generated + real) * math.prod(self.image_shape) + pictures) * item

    def batch(self, labels: int) -> DriftBatch:
        counts, shape = self.config.batch, self.image_shape

        def zeros(*sizes: int) -> Tensor:
            return torch.zeros(*sizes, dtype=self.dtype)

        return DriftBatch(
            labels=torch.zeros(labels, dtype=torch.int64),
            guidance_scale=zeros(labels) + 1,
            positives=zeros(labels, counts.positives, *shape),
            negatives=zeros(labels, counts.negatives, *shape),
            noise=zeros(labels * counts.generated, *shape),
            style_indices=torch.zeros(labels * counts.generated, self.num_style_tokens, dtype=torch.int64),
            positive_images=None if self.seen_shape is None else zeros(labels, counts.positives, *self.seen_shape),
            negative_images=None if self.seen_shape is None else zeros(labels, counts.negatives, *self.seen_shape),
        )

    def autocast(self):
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.config.precision == "bfloat16" else nullcontext()

    def problems(self, labels: int):
        with self.autocast():
            return step_problems(self.generator, self.specs, self.batch(labels))

    def operations(self) -> dict[str, float]:
        """Operations of one label by part; recomputation of checkpointed blocks and slices is in their part's "backward"."""
        images = self.batch(1)
        G = self.config.batch.generated
        conditions = (images.labels.repeat_interleave(G), images.guidance_scale.repeat_interleave(G), images.style_indices)
        with FlopCounterMode(display=False) as forward, self.autocast():
            generated = self.generator(images.noise, *conditions)
        with FlopCounterMode(display=False) as backward:
            generated.backward(torch.ones_like(generated))
        problems, parts = operations_of(lambda: self.problems(1))
        vae_backward = self._vae_backward(generated.detach())
        with FlopCounterMode(display=False) as counter:
            torch.stack([(members.generated.float() ** 2).sum() for members in problems.values()]).sum().backward()
        encoder_backward = counter.get_total_flops() - backward.get_total_flops() - vae_backward
        self.generator.zero_grad(set_to_none=True)
        return {
            "generator forward": float(forward.get_total_flops()),
            "generator backward": float(backward.get_total_flops()),
            "encoder forward": parts["encoder"],
            "encoder backward": float(encoder_backward),
            **(dict(zip(VAE_PARTS, (parts["vae"], vae_backward), strict=True)) if self.decoders else {}),
        }

    def _vae_backward(self, latents: Tensor) -> float:
        """Operations of the decoders' backward pass to generated latents."""
        total = 0.0
        for decoder in self.decoders.values():
            with self.autocast():
                images = decoder(latents.requires_grad_())
            with FlopCounterMode(display=False) as counter:
                images.backward(torch.ones_like(images))
            total += counter.get_total_flops()
        return total

    def of_one_label(self) -> tuple[float, list[KeySize]]:
        """Bytes of a label's kept products, and its feature keys."""
        with torch.no_grad():
            problems = self.problems(1)
            sizes = [KeySize(key, members.num_problems, members.num_features) for key, members in problems.items()]
            return float(target_products_bytes(problems)), sizes

    def gradient_peak(self, labels: int, *, has_gradient: bool) -> float:
        """Bytes at the peak of forward and backward pass beside the weights."""
        if has_gradient:
            for parameter in self.generator.parameters():
                parameter.grad = torch.zeros_like(parameter)
        batch = self.batch(labels)
        with LiveTensors() as live:
            with self.autocast():
                problems = step_problems(self.generator, self.specs, batch)
                loss = step_loss(problems, batch, self.config.drift, specs=self.specs).loss
            del problems
            loss.backward()
            peak = live.peak
        self.generator.zero_grad(set_to_none=True)
        return float(peak)

    def statistics_peak(self, labels: int) -> float:
        """Bytes at the peak of a pass without gradient, its kept products left out."""
        with torch.no_grad(), LiveTensors() as live:
            problems = self.problems(labels)
            for key in list(problems):
                target_products(problems[key])
            return float(live.peak)


def advice(config, estimate: Estimate, gpu: Gpu, num_gpus: int, *, encoder: Callable[[], Encoders], sharded: bool) -> list[str]:
    """What makes a recipe fit that does not, cheapest first; each is tried. Empty where nothing helps."""
    found = []
    here = config.batch.labels // num_gpus
    current = min(config.batch.labels_per_slice or here, here)
    smaller = [count for count in (8, 4, 2, 1) if count < current]

    def fits(changed, split: bool = sharded) -> bool:
        return estimate_step(changed, num_gpus, encoder=encoder, sharded=split).fits(gpu)

    variants = [("", config)]
    if not config.gradient_checkpointing:
        variants.append(("--gradient_checkpointing true ", replace(config, gradient_checkpointing=True)))
    for text, changed in variants:
        counts = [current, *smaller] if text else smaller
        for count in counts:
            if fits(replace(changed, batch=replace(changed.batch, labels_per_slice=count))):
                found.append(f"{text}--batch.labels_per_slice {count}")
                break
        if found:
            break
    if num_gpus > 1 and not sharded and fits(config, split=True):
        found.append("FSDP2 (SHARDING=fsdp2, or --use_fsdp --fsdp_version 2)")
    return found
