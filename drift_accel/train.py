"""Train a one-step generator: accelerate launch -m drift_accel.train --config train_configs/X.yaml --output_dir RUN

The same command resumes an interrupted run. `--dry_run` checks and prints the configuration and touches nothing.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from drift_accel.data import DataConfig, make_sampler, open_source
from drift_accel.data.class_neighbours import PositivesConfig
from drift_accel.data.row_encoders import weights_hash
from drift_accel.data.row_pairs import open_row_images
from drift_accel.data.samplers import small_classes
from drift_accel.data.sources import Source, describe_source, latent_scaling, require_same_space, source_identity
from drift_accel.drift import DriftConfig, FeatureConfig, GuidanceConfig
from drift_accel.drift.configuration import BackendError
from drift_accel.drift.encoders import (
    EncoderEntryConfig,
    EncoderSpec,
    check_encoder_inputs,
    load_specs,
    require_different,
)
from drift_accel.drift.loss import require_backend
from drift_accel.evaluation.in_training import EvaluationConfig, PreparedEvaluation, prepare_evaluation
from drift_accel.foundation.collectives import process_index, world_group
from drift_accel.foundation.command_line import configuration_text, parse_command, plain_errors
from drift_accel.foundation.progress import Progress
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.models.configuration import DecoderConfig, EncoderConfig, GeneratorConfig, load_decoder
from drift_accel.training.configuration import TrainingConfig
from drift_accel.training.exports import DATA_DESCRIPTION, finish_run
from drift_accel.training.generator_task import BatchConfig, GeneratorTask
from drift_accel.training.initial_weights import find_initial_weights, hash_weight_files
from drift_accel.training.launch import (
    TORCH_TYPES,
    closing_notes,
    open_run,
    place,
    seeded_generator,
    start_accelerator,
)
from drift_accel.training.loop import Hooks, TrainingState, resume, start_state, train
from drift_accel.training.networks import compile_blocks, lay_out_encoder, require_master_weights
from drift_accel.training.positives_table import chosen_map, neighbour_sampler
from drift_accel.training.profiling import StepProfiler, parse_steps
from drift_accel.training.slices import STATISTICS_MODES
from drift_accel.training.stops import StopWishes
from drift_accel.training.telemetry import Telemetry
from drift_accel.training.utilisation import generator_step_flops, seconds_at_peak

# What --debug sets.
DEBUG_VALUES = {
    "steps": 20, "generator.hidden_size": 64, "generator.depth": 2, "generator.num_heads": 4, "batch.labels": 8,
    "batch.generated": 8, "batch.positives": 8, "batch.negatives": 4, "optimizer.warmup_steps": 5, "checkpoint.every": 10,
    "log.every": 1, "log.sample_every": 10, "sample.columns": 2,
}  # fmt: skip


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
    positives: PositivesConfig = field(default_factory=PositivesConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    drift: DriftConfig = field(default_factory=DriftConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    more_encoders: tuple[EncoderEntryConfig, ...] = ()
    """Encoders beside `encoder`, each with its own features and weight; all losses are summed."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    statistics: str = "global"
    """Over which samples the drift's scale and norms are taken. "global": all labels of the step, the published method, whose
    result does not depend on slices or processes; with slices it costs a second forward pass. "lagged": the previous step's
    global values, one pass. "slice": one slice over all processes. "rank": one slice of one process."""
    statistics_memory_gb: float = 16.0
    """Memory of a process, in GB, that "global" may keep between its passes over slices; above it there is a third pass. It is
    free again before the gradient pass, so up to what that pass takes it costs nothing."""
    gradient_checkpointing: bool = False
    """Recompute each block of the generator in the backward pass instead of keeping its activations."""
    debug: bool = False
    """A trial run of the same code, written into config.yaml. It sets steps 20, generator.hidden_size 64, generator.depth 2,
    generator.num_heads 4, batch.labels 8, batch.generated 8, batch.positives 8, batch.negatives 4, optimizer.warmup_steps 5,
    checkpoint.every 10, log.every 1, log.sample_every 10, sample.columns 2, unless the command line gives them. In a file it
    changes nothing."""

    def __post_init__(self):
        super().__post_init__()
        if self.statistics not in STATISTICS_MODES:
            raise ValueError(f"statistics is {self.statistics!r}: choose one of {', '.join(STATISTICS_MODES)}")
        if not 0 <= self.statistics_memory_gb < float("inf"):
            raise ValueError(f"statistics_memory_gb is {self.statistics_memory_gb}: give a number of GB of at least 0")
        if self.overfit_one_batch and self.data.queue is not None:
            raise ValueError("overfit_one_batch is true but data.queue holds other samples in every step: set data.queue to null")
        if self.positives.needs_table and self.data.queue is not None:
            raise ValueError(
                f"positives.choice is {self.positives.choice!r}, which looks at whole classes, but data.queue holds recent "
                "samples alone: set data.queue to null"
            )
        require_different([entry.name for entry in (self.encoder, *self.more_encoders)])
        self.evaluation.check_run(self.ema.decays, self.log.every)
        self.guidance.check_counts(self.batch.generated, self.batch.negatives)
        self.drift.check_guidance(self.guidance.smallest, self.batch.negatives)
        if self.num_processes is not None:
            self.batch.check_processes(self.num_processes)

    @property
    def may_change(self) -> tuple[str, ...]:
        """Also what only looks on, what changes memory and pace alone (the drift's backend to rounding, as DRIFT_ACCEL_BACKEND
        does), and where encoder and cache lie: their contents are compared by their hash."""
        keys = (
            *super().may_change,
            "sample",
            "evaluation",
            "drift.backend",
            "gradient_checkpointing",
            "encoder.path",
            "encoder.preset",
            "statistics_memory_gb",
        )
        keys = (*keys, "decoder.batch", "decoder.checkpointing", "drift.keep_distances", "positives.folder")
        keys = (*keys, "decoder.real_images") if self.decoder.real_images is not None else keys
        keys = (*keys, "data.path") if self.data.source == "cache" else keys
        return (*keys, "batch.labels_per_slice") if self.statistics in ("global", "lagged") else keys

    def check_launch(self, num_processes: int) -> None:
        """Also refuse labels that the launched processes cannot share."""
        super().check_launch(num_processes)
        self.batch.check_processes(num_processes)
        options = {"dtype": TORCH_TYPES[self.precision], "coupling": self.drift.coupling}
        require_backend(self.drift.backend, len(self.drift.temperatures), **options)


def load_encoders(config: GeneratorTrainingConfig, source: Source) -> tuple[EncoderSpec, ...]:
    """Every configured encoder; latents reach the pixel encoders through the decoder, with the scale they were made with.

    Raises what `load_specs` raises.
    """
    decoder = load_decoder(config.decoder, scaling=latent_scaling(source))
    return load_specs(config.encoder, config.features, config.more_encoders, decoder)


def open_real_images(config: GeneratorTrainingConfig, specs: Sequence[EncoderSpec], source: Source) -> Source | None:
    """The pictures that encoders behind the decoder see of real latents, None where those are decoded.

    Raises what `open_row_images` raises, and ValueError where no encoder stands behind the decoder.
    """
    path = config.decoder.real_images
    if path is None:
        return None
    decoders = [spec.decoder for spec in specs if spec.decoder is not None]
    if not decoders:
        raise ValueError(f"decoder.real_images is {path}, but no encoder takes pixels: leave it out")
    return open_row_images(path, source, decoders[0].image_shape(source.image_shape[-1]), max_rows=config.data.max_rows)


def check_fit(config: GeneratorTrainingConfig, specs: Sequence[EncoderSpec], source: Source) -> None:
    """Raise ValueError where generator, encoders and data do not agree on shapes or classes."""
    generator = config.generator.resolved()
    shape = (generator["in_channels"], generator["input_size"], generator["input_size"])
    if tuple(source.image_shape) != shape:
        raise ValueError(
            f"generator makes images of shape {shape} but the data has {tuple(source.image_shape)}: change generator"
        )
    if generator["num_classes"] < source.num_classes:
        raise ValueError(f"generator.num_classes is {generator['num_classes']} but the data has {source.num_classes} classes")
    for spec in specs:
        known = getattr(spec.encoder, "map_names", None)
        unknown = [name for name in spec.features.maps or () if known is not None and name not in known]
        if unknown:
            owner = "the encoder" if len(specs) == 1 else f"encoder {spec.name}"
            raise ValueError(f"features.maps names {', '.join(unknown)}, but {owner} has {', '.join(known)}")
    check_encoder_inputs(specs, shape, latents=latent_scaling(source) is not None)
    if config.positives.needs_table:
        chosen_map(config.positives, specs[0].encoder)
    for entry in (config.encoder, *config.more_encoders):
        description = Path(entry.path) / DATA_DESCRIPTION
        if entry.kind == "mae" and description.exists():
            require_same_space(describe_source(source), json.loads(description.read_text()), f"encoder.path {entry.path}")


def encoder_identity(config: GeneratorTrainingConfig, specs: Sequence[EncoderSpec]) -> dict[str, str]:
    """Hashes of every frozen weight that the loss depends on."""
    hashes = {}
    for entry, spec in zip((config.encoder, *config.more_encoders), specs, strict=True):
        name = "encoder" if entry is config.encoder else f"encoder_{spec.name}"
        hashes[f"{name}_weights_sha256"] = hash_weight_files(entry.path) if entry.kind == "mae" else weights_hash(spec.encoder)
        if spec.decoder is not None:
            hashes["decoder_weights_sha256"] = weights_hash(spec.decoder.vae)
    return hashes


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
            if not state.accelerator.is_main_process:
                return
            images = generate(model, labels, guidance_scale=config.sample.guidance_scale, seed=config.seed)
        images = images if vae is None else decode_latents(vae, images.float())
        grid = class_grid_array(images, labels, class_names=source.class_names, columns=config.sample.columns)
        try:
            save_grid(grid, run.sample_path(step))
        except OSError as error:
            if config.checkpoint.on_error != "continue":
                raise
            print(f"warning: the samples of step {step} could not be written: {error}", file=sys.stderr)
        telemetry.add_image("samples", grid, step)

    return Hooks(on_sample=sample)


def open_evaluation(
    config: GeneratorTrainingConfig, run: RunFolder, specs: Sequence[EncoderSpec], source: Source, device: torch.device | str
) -> PreparedEvaluation | None:
    """What the run's own evaluation needs; None where it is off. Raises as `prepare_evaluation`."""
    if config.evaluation.every is None:
        return None
    return prepare_evaluation(
        config.evaluation,
        run,
        generator=config.generator.resolved(),
        encoder=config.encoder,
        # Shared where memory is scarce alone: on a processor the evaluation moves its weights, which changes how kernels round.
        loaded_encoder=specs[0].encoder if torch.device(device).type == "cuda" else None,
        data=config.data,
        description=describe_source(source),
        vae=config.sample.vae,
        device=device,
    )


def make_task(
    config: GeneratorTrainingConfig,
    accelerator: Accelerator,
    specs: Sequence[EncoderSpec],
    sampler,
    initial=None,
    real_images: Source | None = None,
) -> GeneratorTask:
    """The generator, fresh or from `initial` weights, with everything that its steps need, on the run's device."""
    from drift_accel.models import Generator

    device = accelerator.device
    generator = Generator(**config.generator.arguments())
    generator.initialize_weights(seeded_generator(config.seed, "generator_weights"))
    if initial is not None:
        initial.put_into(generator)
    if config.gradient_checkpointing:
        generator.enable_gradient_checkpointing()
    return GeneratorTask(
        compile_blocks(place(generator, config, device), config.compile),
        tuple(place_encoder(spec, config, device) for spec in specs),
        sampler,
        batch=config.batch,
        guidance=config.guidance,
        drift=config.drift,
        seed=config.seed,
        real_images=real_images,
        flip=config.data.flip,
        overfit_one_batch=config.overfit_one_batch,
        statistics=config.statistics,
        statistics_memory_gb=config.statistics_memory_gb,
        log=accelerator.print,
        device=device,
        dtype=TORCH_TYPES[config.precision],
        rank=process_index(world_group()),
        num_processes=accelerator.num_processes,
        group=world_group(),
    )


def place_encoder(spec: EncoderSpec, config: GeneratorTrainingConfig, device: torch.device) -> EncoderSpec:
    """The encoder, and the decoder before it, on the run's device, laid out and compiled as configured."""
    encoder = lay_out_encoder(place(spec.encoder, config, device), device)
    if hasattr(encoder, "compile_repeated_blocks"):  # a user's own may have no blocks
        encoder = compile_blocks(encoder, config.compile)
    decoder = None if spec.decoder is None else place(spec.decoder, config, device)
    return replace(spec, encoder=encoder, decoder=decoder)


def run_training(config: GeneratorTrainingConfig, output_dir: Path) -> None:
    """Train to the configured number of steps, from the newest checkpoint of the folder if there is one."""
    from drift_accel.evaluation.training_evaluation import TrainingEvaluation
    from drift_accel.models import Generator

    with plain_errors(BackendError):
        accelerator = start_accelerator(config)
        source = open_source(config.data)
        specs = load_encoders(config, source)
        check_fit(config, specs, source)
        real_images = open_real_images(config, specs, source)
        counts = {"positives": config.batch.positives, "negatives": config.batch.negatives}
        direct_sampler = make_sampler(config.data, source, config.seed, **counts)
        repeated = small_classes(source, config.batch.positives)
        identity = {**encoder_identity(config, specs), **source_identity(source)}
        if real_images is not None:
            identity["real_images_sha256"] = source_identity(real_images)["cache_sha256"]
        if config.statistics in ("slice", "rank"):  # the loss depends on how many processes share the labels
            identity["num_processes"] = str(accelerator.num_processes)
        initial = find_initial_weights(config.init_from, Generator, config.generator.resolved(), output_dir)
        if initial is not None:
            identity["init_from_sha256"] = initial.sha256
        at_peak = seconds_at_peak(config, accelerator, lambda: generator_step_flops(config, specs))
        evaluation = open_evaluation(config, RunFolder(output_dir), specs, source, accelerator.device)
        run = open_run(output_dir, config, accelerator, identity)
        hooks = make_hooks(config, run, source, accelerator.device)
        if evaluation is not None:
            settings = {"ema": config.ema.decays[0], "last_step": config.steps, "log": accelerator.print}
            hooks = replace(hooks, measure=TrainingEvaluation(evaluation, **settings))

    def work(stops: StopWishes) -> None:
        sampler = direct_sampler
        if config.positives.needs_table:
            with plain_errors():
                sampler = neighbour_sampler(config, accelerator, specs[0], source, run.path, identity)
        task = make_task(config, accelerator, specs, sampler, initial, real_images)
        if repeated:
            accelerator.print(f"classes with fewer than {config.batch.positives} images repeat some: {', '.join(repeated)}")
        state = start_state(task, config, accelerator, stops)
        require_master_weights(state.model, state.optimizer, TORCH_TYPES[config.precision])
        if config.profile_steps is not None and accelerator.is_main_process:
            state.profiler = StepProfiler(run, parse_steps(config.profile_steps))
        state.seconds_at_peak = at_peak
        resume(state, run, accelerator.print)
        if state.step == 0:
            fill(sampler, source.num_classes, enabled=accelerator.is_main_process)
        first_step = state.step
        train(state, config, run, hooks)
        finish_run(run, state, first_step, describe_source(source), config.export_names)

    closing_notes(run, accelerator, work, max_hours=config.max_hours)
    accelerator.end_training()


def fill(sampler, num_classes: int, *, enabled: bool) -> None:
    """Warm the sampler up, showing how many classes are ready."""
    with Progress(num_classes, description="filling the sample queue", enabled=enabled) as progress:
        sampler.warm_up(lambda ready, wanted: progress.update(ready - progress.step))


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    command = parse_command(GeneratorTrainingConfig, __doc__, argv, debug_values=DEBUG_VALUES)
    if command.dry_run:
        print(configuration_text(command.config), end="")
        return
    run_training(command.config, command.output_dir)


if __name__ == "__main__":
    main()
