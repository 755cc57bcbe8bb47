"""Pretrain the feature encoder: accelerate launch -m drift_accel.train_mae --config train_configs/mae_X.yaml --output_dir RUN

The same command resumes an interrupted run. `--dry_run` checks and prints the configuration and touches nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from accelerate import Accelerator

from drift_accel.data.online_images import EncoderDataConfig, OnlineImages, data_line, open_encoder_data
from drift_accel.data.sources import Source, describe_source, source_identity
from drift_accel.data.subset import BalancedSubset
from drift_accel.foundation.collectives import process_index, world_group
from drift_accel.foundation.command_line import configuration_text, parse_command, plain_errors
from drift_accel.models.configuration import MaskedAutoencoderConfig
from drift_accel.training.averages import export_names
from drift_accel.training.configuration import TrainingConfig, require_positive
from drift_accel.training.exports import finish_run
from drift_accel.training.initial_weights import find_initial_weights
from drift_accel.training.launch import (
    TORCH_TYPES,
    closing_notes,
    open_run,
    place,
    seeded_generator,
    start_accelerator,
)
from drift_accel.training.loop import Hooks, resume, start_state, train
from drift_accel.training.mae_task import ClassifierConfig, MaeTask, is_classifier_phase
from drift_accel.training.mae_validation import MaeValidation, MaeValidationConfig
from drift_accel.training.networks import compile_blocks, lay_out_encoder, require_master_weights
from drift_accel.training.online_mae_task import OnlineMaeTask
from drift_accel.training.profiling import StepProfiler, parse_steps
from drift_accel.training.state import TrainingState
from drift_accel.training.stops import StopWishes
from drift_accel.training.utilisation import encoder_step_flops, seconds_at_peak

# What --debug sets.
DEBUG_VALUES = {
    "steps": 20, "mae.width": 16, "batch_size": 64, "classifier.steps": 5, "classifier.warmup_steps": 2,
    "optimizer.warmup_steps": 5, "checkpoint.every": 10, "log.every": 1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MaeTrainingConfig(TrainingConfig):
    """Everything that decides an encoder's pretraining."""

    mae: MaskedAutoencoderConfig
    data: EncoderDataConfig = field(default_factory=EncoderDataConfig)
    batch_size: int = 8192
    """Images of a step over all processes; a multiple of the number of processes."""
    accumulate: int = 1
    """Equal parts in which a process's images go through the network, one after the other; more parts need less memory."""
    mask_ratio: float = 0.5
    """Probability that a patch is hidden, in (0, 1)."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    validation: MaeValidationConfig = field(default_factory=MaeValidationConfig)
    debug: bool = False
    """A trial run of the same code, written into config.yaml. It sets steps 20, mae.width 16, batch_size 64, classifier.steps 5,
    classifier.warmup_steps 2, optimizer.warmup_steps 5, checkpoint.every 10, log.every 1, unless the command line gives them. In
    a file it changes nothing."""

    def __post_init__(self):
        super().__post_init__()
        require_positive("", self, "batch_size", "accumulate")
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio is {self.mask_ratio}: give a probability between 0 and 1")
        if self.classifier.steps > self.steps:
            raise ValueError(f"classifier.steps is {self.classifier.steps}, more than the run's {self.steps} steps")
        self._check_validation()
        self._check_processes(self.num_processes or 1)

    @property
    def may_change(self) -> tuple[str, ...]:
        """With a classifier phase, which is counted from the end, the number of steps is part of the mathematics."""
        keys = (*super().may_change, "accumulate", "validation")
        keys = (*keys, "data.path") if self.data.source == "cache" else keys  # its content is compared by its hash
        return tuple(key for key in keys if key != "steps") if self.classifier.steps else keys

    @property
    def export_names(self) -> dict[float, str]:
        """A classifier phase from another run's weights is exported apart, as encoder_cls."""
        phase = is_classifier_phase(self.init_from, self.classifier.steps, self.steps)
        return export_names(self.ema.decays, classifier_phase=phase)

    def check_launch(self, num_processes: int) -> None:
        """Also refuse a batch that the launched processes cannot share."""
        super().check_launch(num_processes)
        self._check_processes(num_processes)

    def _check_validation(self) -> None:
        held_out = self.validation
        if held_out.every is not None and held_out.every % self.log.every:
            raise ValueError(
                f"validation.every is {held_out.every}, no multiple of log.every, {self.log.every}: its numbers are part of the "
                "records; change one of them"
            )
        if self.data.source == "digits" and held_out.path is not None:
            raise ValueError(f"validation.path is {held_out.path!r}, but the digits have splits: set validation.split instead")
        if self.data.source != "digits" and held_out.every is not None and not held_out.path:
            raise ValueError("validation.path is missing: give the folder of held-out rows, or set validation.every to null")

    def _check_processes(self, num_processes: int) -> None:
        if self.batch_size % num_processes:
            raise ValueError(f"batch_size is {self.batch_size}, which {num_processes} processes cannot share evenly: change it")
        images = self.batch_size // num_processes
        if images % self.accumulate:
            raise ValueError(f"accumulate is {self.accumulate}, which does not divide a process's {images} images: change it")


def check_fit(config: MaeTrainingConfig, source: Source) -> None:
    """Raise ValueError where autoencoder and data do not agree on shapes or classes."""
    mae = config.mae.resolved()
    shape = (mae["in_channels"], mae["input_size"], mae["input_size"])
    if tuple(source.image_shape) != shape:
        raise ValueError(f"mae takes images of shape {shape} but the data has {tuple(source.image_shape)}: change mae")
    if mae["num_classes"] < source.num_classes:
        raise ValueError(f"mae.num_classes is {mae['num_classes']} but the data has {source.num_classes} classes")


def open_held_out(config: MaeTrainingConfig, source: Source | OnlineImages) -> Source | OnlineImages | None:
    """The rows that validation measures; None where it is off. Raises as `open_encoder_data`, ValueError for another shape."""
    wanted = config.validation
    if wanted.every is None:
        return None
    if isinstance(source, OnlineImages):
        held_out = OnlineImages(wanted.path, source.encoder)
    else:
        held_out = open_encoder_data(
            replace(config.data, split=wanted.split, path=wanted.path, max_rows=None, flip=False, queue=None)
        )  # fmt: skip
    if tuple(held_out.image_shape) != tuple(source.image_shape) or held_out.num_classes != source.num_classes:
        raise ValueError(
            f"validation.path {wanted.path} has rows {held_out.image_shape} of {held_out.num_classes} classes, training has "
            f"{source.image_shape} of {source.num_classes}: give held-out rows of the same data"
        )
    return held_out if wanted.max_rows is None else BalancedSubset(held_out, max(wanted.max_rows, held_out.num_classes))


def make_hooks(config: MaeTrainingConfig, source: Source | OnlineImages, held_out: Source | OnlineImages | None) -> Hooks:
    """Validation of raw weights and averages, and the share of the time that the VAE took, in the records."""
    wanted = config.validation
    validation = None
    if held_out is not None:
        dtype = TORCH_TYPES[config.precision]
        validation = MaeValidation(
            held_out, seed=config.seed, mask_ratio=config.mask_ratio, batch_size=wanted.batch_size, dtype=dtype
        )  # fmt: skip

    def measure(step: int, state: TrainingState) -> dict[str, float]:
        values = {}
        if isinstance(source, OnlineImages) and source.encoder.vae is not None:
            values["vae_share"] = source.encoder.seconds.read_share()
        if validation is not None and (step % wanted.every == 0 or step == config.steps):
            values |= validation(state)
        return values

    return Hooks(measure=measure)


def make_task(config: MaeTrainingConfig, accelerator: Accelerator, source: Source, initial=None) -> MaeTask:
    """The autoencoder, fresh or from `initial` weights, with everything that its steps need, on the run's device."""
    from drift_accel.models import MaskedAutoencoder

    device = accelerator.device
    mae = MaskedAutoencoder(**config.mae.arguments())
    mae.initialize_weights(seeded_generator(config.seed, "mae_weights"))
    if initial is not None:
        initial.put_into(mae)
    task_class = OnlineMaeTask if isinstance(source, OnlineImages) else MaeTask
    if isinstance(source, OnlineImages):
        source.encoder.to(device)
    return task_class(
        compile_blocks(lay_out_encoder(place(mae, config, device), device), config.compile),
        source,
        batch_size=config.batch_size,
        mask_ratio=config.mask_ratio,
        classifier=config.classifier,
        total_steps=config.steps,
        seed=config.seed,
        flip=config.data.flip,
        accumulate=config.accumulate,
        overfit_one_batch=config.overfit_one_batch,
        device=device,
        dtype=TORCH_TYPES[config.precision],
        rank=process_index(world_group()),
        num_processes=accelerator.num_processes,
    )


def run_training(config: MaeTrainingConfig, output_dir: Path) -> None:
    """Train to the configured number of steps, from the newest checkpoint of the folder if there is one."""
    from drift_accel.models import MaskedAutoencoder

    with plain_errors():
        accelerator = start_accelerator(config)
        source = open_encoder_data(config.data)
        check_fit(config, source)
        held_out = open_held_out(config, source)
        initial = find_initial_weights(config.init_from, MaskedAutoencoder, config.mae.resolved(), output_dir)
        identity = source_identity(source)
        if initial is not None:
            identity["init_from_sha256"] = initial.sha256
        if isinstance(source, OnlineImages) and source.encoder.digest is not None:
            identity["vae_sha256"] = source.encoder.digest
        run = open_run(output_dir, config, accelerator, identity)
        accelerator.print(data_line(config.data, source))

    def work(stops: StopWishes) -> None:
        task = make_task(config, accelerator, source, initial)
        state = start_state(task, config, accelerator, stops)
        require_master_weights(state.model, state.optimizer, TORCH_TYPES[config.precision])
        if config.profile_steps is not None and accelerator.is_main_process:
            state.profiler = StepProfiler(run, parse_steps(config.profile_steps))
        state.seconds_at_peak = seconds_at_peak(config, accelerator, lambda: encoder_step_flops(config))
        resume(state, run, accelerator.print)
        first_step = state.step
        train(state, config, run, make_hooks(config, source, held_out))
        finish_run(run, state, first_step, describe_source(source), config.export_names)

    closing_notes(run, accelerator, work, max_hours=config.max_hours)
    accelerator.end_training()


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    command = parse_command(MaeTrainingConfig, __doc__, argv, debug_values=DEBUG_VALUES)
    if command.dry_run:
        print(configuration_text(command.config), end="")
        return
    run_training(command.config, command.output_dir)


if __name__ == "__main__":
    main()
