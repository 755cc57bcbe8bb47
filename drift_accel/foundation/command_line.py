"""The command line of the trainers: a YAML file, single values on top of it, strict errors before any work."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace

from drift_accel.foundation.storage import plain_value

ConfigType = TypeVar("ConfigType")


@dataclass(frozen=True)
class Command(Generic[ConfigType]):
    """What a trainer was asked to do. `output_dir` is None only for a dry run."""

    config: ConfigType
    output_dir: Path | None
    dry_run: bool


def parse_command(config_type: type[ConfigType], description: str, argv: Sequence[str] | None = None) -> Command[ConfigType]:
    """Read `--config FILE`, overrides like `--optimizer.lr 1e-4`, `--output_dir RUN` and `--dry_run`.

    The command line goes before the file and the file before the defaults, wherever --config stands. An unknown key, a wrong
    type or a value that the configuration refuses ends the process with status 2 and one message.
    """
    parser = ArgumentParser(description=description, exit_on_error=True)
    parser.add_argument("--config", action="config", help="YAML file with the configuration")
    parser.add_argument("--output_dir", type=str, default=None, help="folder of the run; an existing run is resumed")
    parser.add_argument("--dry_run", action="store_true", help="check and print the configuration, then stop")
    parser.add_class_arguments(config_type, None, fail_untyped=True)
    arguments = _config_first(sys.argv[1:] if argv is None else list(argv))
    namespace = parser.parse_args(arguments)
    output_dir, dry_run = namespace.pop("output_dir"), namespace.pop("dry_run")
    namespace.pop("config")
    try:
        config = _instantiate(parser, config_type, namespace)
    except ValueError as error:
        parser.error(str(error))
    if output_dir is None and not dry_run:
        parser.error("--output_dir is missing: name the folder of the run, for example --output_dir runs/first")
    return Command(config, None if output_dir is None else Path(output_dir), dry_run)


def configuration_dict(config) -> dict[str, Any]:
    """A configuration dataclass as plain nested dicts and lists."""
    return plain_value(dataclasses.asdict(config), "configuration")


def configuration_text(config) -> str:
    """A configuration dataclass as YAML that `--config` reads back."""
    return yaml.safe_dump(configuration_dict(config), sort_keys=False, allow_unicode=True)


def _instantiate(parser: ArgumentParser, config_type: type[ConfigType], namespace: Namespace) -> ConfigType:
    values = parser.instantiate_classes(namespace)
    return config_type(**{field.name: values[field.name] for field in dataclasses.fields(config_type)})


def _config_first(arguments: list[str]) -> list[str]:
    """Move every --config to the front: the parser lets whatever comes later win."""
    first, rest = [], []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config":
            first += [argument, *[value for value in [next(remaining, None)] if value is not None]]
        elif argument.startswith("--config="):
            first.append(argument)
        else:
            rest.append(argument)
    return first + rest
