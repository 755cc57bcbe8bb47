"""The command line of the trainers: a YAML file, single values on top of it, strict errors before any work."""

import dataclasses
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from drift_accel.foundation.storage import plain_value

ConfigType = TypeVar("ConfigType")
USAGE = "%(prog)s [--config FILE] [--key VALUE] [--group.key VALUE] ... [--output_dir RUN] [--dry_run]"


@dataclass(frozen=True)
class Command(Generic[ConfigType]):
    """What a trainer was asked to do. `output_dir` is None only for a dry run."""

    config: ConfigType
    output_dir: Path | None
    dry_run: bool


def parse_command(
    config_type: type[ConfigType],
    description: str,
    argv: Sequence[str] | None = None,
    *,
    debug_values: Mapping[str, Any] | None = None,
) -> Command[ConfigType]:
    """Read `--config FILE`, overrides like `--optimizer.lr 1e-4`, `--output_dir RUN` and `--dry_run`.

    The command line goes before the file and the file before the defaults, wherever --config stands. `--debug` puts
    `debug_values` (by dotted key) over the files, and other values of the command line still go before them. A boolean key
    without a value means true. An unknown key, a wrong type or a value that the configuration refuses ends the process with
    status 2 and one message.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # --help shows what each field's docstring says
    parser = ArgumentParser(description=description, usage=USAGE, allow_abbrev=False)
    parser.add_argument(
        "--config", action="config", help="YAML file with the configuration; of a key that several have, the last counts"
    )
    parser.add_argument("--output_dir", type=str, default=None, help="folder of the run; an existing run is resumed")
    parser.add_argument("--dry_run", action="store_true", help="check and print the configuration, then stop")
    parser.add_class_arguments(config_type, None, fail_untyped=True)
    groups = [name for name, hint in get_type_hints(config_type).items() if dataclasses.is_dataclass(hint)]
    arguments = _with_values(sys.argv[1:] if argv is None else argv, _boolean_keys(config_type))
    arguments = _wholes_first(arguments, groups, _as_arguments(debug_values or {}))
    try:
        for file in _config_files(arguments):
            _refuse_repeated_keys(file)
        namespace = parser.parse_args(arguments)
        output_dir, dry_run = namespace.pop("output_dir"), namespace.pop("dry_run")
        namespace.pop("config")
        _refuse_null(config_type, namespace)
        config = _instantiate(parser, config_type, namespace)
    except ValueError as error:
        parser.error(str(error))
    if not output_dir and not dry_run:
        parser.error("--output_dir is missing: name the folder of the run, for example --output_dir runs/first")
    return Command(config, Path(output_dir) if output_dir else None, dry_run)


@contextmanager
def plain_errors(*more: type[Exception]) -> Iterator[None]:
    """End the process with one line for what the user can mend (ValueError, OSError, a missing module, and `more`).

    For what a command does before its work: a fault in the work itself keeps its traceback.
    """
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError, *more) as error:
        raise SystemExit(f"error: {error}") from error


def configuration_dict(config) -> dict[str, Any]:
    """A configuration dataclass as plain nested dicts and lists."""
    return plain_value(dataclasses.asdict(config), "configuration")


def default_values(config_type: type) -> dict[str, Any]:
    """The defaults of a configuration dataclass as plain nested dicts and lists, without the fields that have none."""
    values, hints = {}, get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        if field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
            values[field.name] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
        elif dataclasses.is_dataclass(hints[field.name]):
            values[field.name] = default_values(hints[field.name])
    return plain_value(values, "configuration")


def configuration_text(config) -> str:
    """A configuration dataclass as YAML that `--config` reads back."""
    return yaml.safe_dump(configuration_dict(config), sort_keys=False, allow_unicode=True)


def _instantiate(parser: ArgumentParser, config_type: type[ConfigType], namespace: Namespace) -> ConfigType:
    values = parser.instantiate_classes(namespace)
    return config_type(**{field.name: values[field.name] for field in dataclasses.fields(config_type)})


def _boolean_keys(config_type: type, prefix: str = "--") -> set[str]:
    """The options of all boolean fields: --debug, --data.flip."""
    keys = set()
    for name, hint in get_type_hints(config_type).items():
        if dataclasses.is_dataclass(hint):
            keys |= _boolean_keys(hint, f"{prefix}{name}.")
        elif hint is bool:
            keys.add(prefix + name)
    return keys


def _with_values(arguments: Sequence[str], boolean_keys: Collection[str]) -> list[str]:
    """Give boolean options that stand alone the value true."""
    complete = []
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        complete.append(argument)
        if argument in boolean_keys and following.startswith("--"):
            complete.append("true")
    return complete


def _as_arguments(values: Mapping[str, Any]) -> list[str]:
    return [text for key, value in values.items() for text in (f"--{key}", str(value))]


def _wholes_first(arguments: Sequence[str], groups: Collection[str], debug_arguments: Sequence[str] = ()) -> list[str]:
    """Put every --config first and whole groups (--optimizer FILE) after them: the parser lets whatever comes later win.

    Next come `debug_arguments`, if --debug is asked for, and then all single values.
    """
    asked = dict(zip(arguments, [*arguments[1:], ""], strict=True)).get("--debug", "") == "true" or "--debug=true" in arguments
    ranks = {"--config": 0, **{f"--{group}": 1 for group in groups}}
    ranked = ([], [], [])
    remaining = iter(arguments)
    for argument in remaining:
        option, separator, _ = argument.partition("=")
        rank = ranks.get(option, 2)
        ranked[rank].append(argument)
        if rank < 2 and not separator:
            ranked[rank].extend(islice(remaining, 1))
    return [*ranked[0], *ranked[1], *(debug_arguments if asked else ()), *ranked[2]]


def _config_files(arguments: Sequence[str]) -> Iterator[Path]:
    """The files that --config names, as far as they exist; the parser speaks about the others."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, separator, value = argument.partition("=")
        path = Path(value if separator else following)
        if option == "--config" and path.is_file():
            yield path


def _refuse_repeated_keys(file: Path) -> None:
    """Raise ValueError for a key that stands twice in one mapping: YAML would drop the first one silently."""
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {file} is no text in UTF-8: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"--config {file} is no YAML: {error}") from None
    nodes = [root]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise ValueError(f"--config {file} has {key.value} twice, again in line {line}: merge them")
                seen.add(key.value)
                nodes.append(value)


def _refuse_null(config_type: type, values: Namespace, prefix: str = "") -> None:
    """Raise ValueError for null where a value is needed, and for a group without keys: the parser lets both pass."""
    for name, hint in get_type_hints(config_type).items():
        key, value = prefix + name, values[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Namespace):
                shown = "null" if value is None else repr(value)
                raise ValueError(f"{key} is {shown}: give the keys of this group below it, or leave {key} out")
            _refuse_null(hint, value, f"{key}.")
        elif value is None and type(None) not in get_args(hint):
            raise ValueError(f"{key} is null: give a value, or leave the key out")
