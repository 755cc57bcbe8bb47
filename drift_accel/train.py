"""Train a one-step generator: accelerate launch -m drift_accel.train --config train_configs/X.yaml --output_dir RUN

The same command resumes an interrupted run. `--dry_run` checks and prints the configuration and touches nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from drift_accel.data import DataConfig, make_sampler, open_source
from drift_accel.data.samplers import small_classes
from drift_accel.data.sources import Source, describe_source, require_same_space
from drift_accel.drift import DriftConfig, FeatureConfig, GuidanceConfig
from drift_accel.drift.configuration import BackendError
from drift_accel.drift.loss import require_backend
from drift_accel.foundation.collectives import process_index, world_group
from drift_accel.foundation.command_line import configuration_text, parse_command, plain_errors
from drift_accel.foundation.progress import Progress
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.models.configuration import EncoderConfig, GeneratorConfig, load_encoder
from drift_accel.training.configuration import TrainingConfig
from drift_accel.training.generator_task import BatchConfig, GeneratorTask
from drift_accel.training.launch import (
    DATA_DESCRIPTION,
    TORCH_TYPES,
    closing_notes,
    finish_run,
    hash_weights,
    open_run,
    place,
    seeded_generator,
    start_accelerator,
)
from drift_accel.training.loop import Hooks, TrainingState, resume, start_state, train
from drift_accel.training.telemetry import Telemetry


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Pictures made during training, with the first average's weights. Raises ValueError for values that cannot work."""

    columns: int = 8
    """Samples of a class in a grid."""
    max_classes: int = 10
    """Classes in a grid, the first ones."""
    guidance_scale: float = 1.0
    """Guidance of the samples, at least 1."""
    vae: str | None = None
    """Decodes latents for the pictures: "digits" (bundled), a folder or a hub id; null shows channels of 1 or 3 as they are."""

    def __post_init__(self):
        if self.columns < 1 or self.max_classes < 1:
            counts = f"{self.columns} and {self.max_classes}"
            raise ValueError(f"sample.columns and sample.max_classes are {counts}: give at least 1 each")
        if not 1 <= self.guidance_scale < float("inf"):
            raise ValueError(f"sample.guidance_scale is {self.guidance_scale}: guidance starts at 1 (no guidance)")


@dataclass(frozen=True, kw_only=True)
class GeneratorTrainingConfig(TrainingConfig):
    """Everything that decides a generator's training."""

    generator: GeneratorConfig
    encoder: EncoderConfig
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    drift: DriftConfig = field(default_factory=DriftConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    gradient_checkpointing: bool = False
    """Recompute each block of the generator in the backward pass instead of keeping its activations."""

    def __post_init__(self):
        super().__post_init__()
        self.guidance.check_counts(self.batch.generated, self.batch.negatives)
        self.drift.check_guidance(self.guidance.smallest, self.batch.negatives)
        if self.num_processes is not None:
            self.batch.check_processes(self.num_processes)

    @property
    def may_change(self) -> tuple[str, ...]:
        """Also pictures, what saves memory alone, and where the encoder lies: its weights are compared by their hash."""
        return (*super().may_change, "sample", "gradient_checkpointing", "encoder.path")

    def check_launch(self, num_processes: int) -> None:
        """Also refuse labels that the launched processes cannot share."""
        super().check_launch(num_processes)
        self.batch.check_processes(num_processes)
        require_backend(self.drift.backend)


def check_fit(config: GeneratorTrainingConfig, encoder, source: Source) -> None:
    """Raise ValueError where generator, encoder and data do not agree on shapes or classes."""
    generator = config.generator.resolved()
    shape = (generator["in_channels"], generator["input_size"], generator["input_size"])
    if tuple(source.image_shape) != shape:
        raise ValueError(
            f"generator makes images of shape {shape} but the data has {tuple(source.image_shape)}: change generator"
        )
    if generator["num_classes"] < source.num_classes:
        raise ValueError(f"generator.num_classes is {generator['num_classes']} but the data has {source.num_classes} classes")
    unknown = [name for name in config.features.maps or () if name not in encoder.map_names]
    if unknown:
        raise ValueError(f"features.maps names {', '.join(unknown)}, but the encoder has {', '.join(encoder.map_names)}")
    if encoder.config.in_channels != shape[0]:
        raise ValueError(
            f"encoder.path {config.encoder.path} takes {encoder.config.in_channels} channels but the generator makes {shape[0]}"
        )
    description = Path(config.encoder.path) / DATA_DESCRIPTION
    if description.exists():
        require_same_space(describe_source(source), json.loads(description.read_text()), f"encoder.path {config.encoder.path}")
    if shape[1] % encoder.config.input_patch_size:
        raise ValueError(
            f"encoder.path {config.encoder.path} patchifies by {encoder.config.input_patch_size}, "
            f"which does not divide the generator's {shape[1]}"
        )


def make_hooks(config: GeneratorTrainingConfig, run: RunFolder, source: Source, device: torch.device) -> Hooks:
    """Sample grids with the first average's weights, as PNG and in TensorBoard; none of latents without a VAE."""
    from drift_accel.models.autoencoder import load_vae
    from drift_accel.sampling import class_grid_array, decode_latents, generate, save_grid

    vae = None if config.sample.vae is None else load_vae(config.sample.vae).to(device)
    if vae is None and source.image_shape[0] not in (1, 3):
        return Hooks()

    num_classes = min(config.sample.max_classes, source.num_classes)
    labels = torch.arange(num_classes).repeat_interleave(config.sample.columns)

    def sample(step: int, state: TrainingState, telemetry: Telemetry) -> None:
        with state.averages.applied_to(state.task.model, config.ema.decays[0]) as model:
            images = generate(model, labels, guidance_scale=config.sample.guidance_scale, seed=config.seed)
        images = images if vae is None else decode_latents(vae, images.float())
        grid = class_grid_array(images, labels, class_names=source.class_names, columns=config.sample.columns)
        save_grid(grid, run.sample_path(step))
        telemetry.add_image("samples", grid, step)

    return Hooks(on_sample=sample)


def run_training(config: GeneratorTrainingConfig, output_dir: Path) -> None:
    """Train to the configured number of steps, from the newest checkpoint of the folder if there is one."""
    from drift_accel.models import Generator

    with plain_errors(BackendError):
        accelerator = start_accelerator(config)
        source = open_source(config.data)
        encoder = load_encoder(config.encoder)
        check_fit(config, encoder, source)
        counts = {"positives": config.batch.positives, "negatives": config.batch.negatives}
        sampler = make_sampler(config.data, source, config.seed, **counts)
        repeated = small_classes(source, config.batch.positives)
        identity = {"encoder_weights_sha256": hash_weights(config.encoder.path)}
        run = open_run(output_dir, config, accelerator, identity)
        hooks = make_hooks(config, run, source, accelerator.device)

    def work() -> None:
        generator = Generator(**config.generator.arguments())
        generator.initialize_weights(seeded_generator(config.seed, "generator_weights"))
        if config.gradient_checkpointing:
            generator.enable_gradient_checkpointing()
        task = GeneratorTask(
            place(generator, config, accelerator.device),
            place(encoder, config, accelerator.device),
            sampler,
            batch=config.batch,
            guidance=config.guidance,
            drift=config.drift,
            features=config.features,
            seed=config.seed,
            flip=config.data.flip,
            device=accelerator.device,
            dtype=TORCH_TYPES[config.precision],
            rank=process_index(world_group()),
            num_processes=accelerator.num_processes,
            group=world_group(),
        )
        if repeated:
            accelerator.print(f"classes with fewer than {config.batch.positives} images repeat some: {', '.join(repeated)}")
        state = start_state(task, config, accelerator)
        resume(state, run, accelerator.print)
        if state.step == 0:
            fill(sampler, source.num_classes, enabled=accelerator.is_main_process)
        first_step = state.step
        train(state, config, run, hooks)
        if accelerator.is_main_process:
            finish_run(run, state, first_step, describe_source(source))

    closing_notes(run, accelerator, work)
    accelerator.end_training()


def fill(sampler, num_classes: int, *, enabled: bool) -> None:
    """Warm the sampler up, showing how many classes are ready."""
    with Progress(num_classes, description="filling the sample queue", enabled=enabled) as progress:
        sampler.warm_up(lambda ready, wanted: progress.update(ready - progress.step))


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    command = parse_command(GeneratorTrainingConfig, __doc__, argv)
    if command.dry_run:
        print(configuration_text(command.config), end="")
        return
    run_training(command.config, command.output_dir)


if __name__ == "__main__":
    main()
