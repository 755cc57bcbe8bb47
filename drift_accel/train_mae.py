"""Pretrain the feature encoder: accelerate launch -m drift_accel.train_mae --config train_configs/mae_X.yaml --output_dir RUN

The same command resumes an interrupted run. `--dry_run` checks and prints the configuration and touches nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from drift_accel.data import DataConfig, open_source
from drift_accel.data.sources import Source, describe_source
from drift_accel.foundation.collectives import process_index, world_group
from drift_accel.foundation.command_line import configuration_text, parse_command, plain_errors
from drift_accel.models.configuration import MaskedAutoencoderConfig
from drift_accel.training.configuration import TrainingConfig, require_positive
from drift_accel.training.launch import (
    TORCH_TYPES,
    closing_notes,
    finish_run,
    open_run,
    place,
    seeded_generator,
    start_accelerator,
)
from drift_accel.training.loop import Hooks, resume, start_state, train
from drift_accel.training.mae_task import ClassifierConfig, MaeTask


@dataclass(frozen=True, kw_only=True)
class MaeTrainingConfig(TrainingConfig):
    """Everything that decides an encoder's pretraining."""

    mae: MaskedAutoencoderConfig
    data: DataConfig = field(default_factory=DataConfig)
    batch_size: int = 8192
    """Images of a step over all processes; a multiple of the number of processes."""
    mask_ratio: float = 0.5
    """Probability that a patch is hidden, in (0, 1)."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)

    def __post_init__(self):
        super().__post_init__()
        require_positive("", self, "batch_size")
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio is {self.mask_ratio}: give a probability between 0 and 1")
        if self.classifier.steps > self.steps:
            raise ValueError(f"classifier.steps is {self.classifier.steps}, more than the run's {self.steps} steps")
        if self.num_processes is not None:
            self._check_processes(self.num_processes)

    @property
    def may_change(self) -> tuple[str, ...]:
        """With a classifier phase, which is counted from the end, the number of steps is part of the mathematics."""
        keys = super().may_change
        return tuple(key for key in keys if key != "steps") if self.classifier.steps else keys

    def check_launch(self, num_processes: int) -> None:
        """Also refuse a batch that the launched processes cannot share."""
        super().check_launch(num_processes)
        self._check_processes(num_processes)

    def _check_processes(self, num_processes: int) -> None:
        if self.batch_size % num_processes:
            raise ValueError(f"batch_size is {self.batch_size}, which {num_processes} processes cannot share evenly: change it")


def check_fit(config: MaeTrainingConfig, source: Source) -> None:
    """Raise ValueError where autoencoder and data do not agree on shapes or classes."""
    mae = config.mae.resolved()
    shape = (mae["in_channels"], mae["input_size"], mae["input_size"])
    if tuple(source.image_shape) != shape:
        raise ValueError(f"mae takes images of shape {shape} but the data has {tuple(source.image_shape)}: change mae")
    if mae["num_classes"] < source.num_classes:
        raise ValueError(f"mae.num_classes is {mae['num_classes']} but the data has {source.num_classes} classes")


def run_training(config: MaeTrainingConfig, output_dir: Path) -> None:
    """Train to the configured number of steps, from the newest checkpoint of the folder if there is one."""
    from drift_accel.models import MaskedAutoencoder

    with plain_errors():
        accelerator = start_accelerator(config)
        source = open_source(config.data)
        check_fit(config, source)
        run = open_run(output_dir, config, accelerator)

    def work() -> None:
        mae = MaskedAutoencoder(**config.mae.arguments())
        mae.initialize_weights(seeded_generator(config.seed, "mae_weights"))
        task = MaeTask(
            place(mae, config, accelerator.device),
            source,
            batch_size=config.batch_size,
            mask_ratio=config.mask_ratio,
            classifier=config.classifier,
            total_steps=config.steps,
            seed=config.seed,
            flip=config.data.flip,
            device=accelerator.device,
            dtype=TORCH_TYPES[config.precision],
            rank=process_index(world_group()),
            num_processes=accelerator.num_processes,
        )
        state = start_state(task, config, accelerator)
        resume(state, run, accelerator.print)
        first_step = state.step
        train(state, config, run, Hooks())
        if accelerator.is_main_process:
            finish_run(run, state, first_step, describe_source(source))

    closing_notes(run, accelerator, work)
    accelerator.end_training()


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    command = parse_command(MaeTrainingConfig, __doc__, argv)
    if command.dry_run:
        print(configuration_text(command.config), end="")
        return
    run_training(command.config, command.output_dir)


if __name__ == "__main__":
    main()
