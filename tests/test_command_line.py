"""foundation.command_line on a small configuration of its own; the trainers' configurations are in test_configuration.py."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from drift_accel.foundation.command_line import configuration_dict, configuration_text, default_values, parse_command


@dataclass(frozen=True, kw_only=True)
class Oven:
    """Where it is baked."""

    degrees: float = 180.0
    """Temperature in degrees Celsius: 100 % of it matters."""
    racks: tuple[int, ...] = (2,)
    """Racks that are used."""

    def __post_init__(self):
        if self.degrees > 300:
            raise ValueError(f"oven.degrees is {self.degrees}: the oven ends at 300")


@dataclass(frozen=True, kw_only=True)
class Base:
    """What every recipe has."""

    minutes: int
    """How long it takes."""
    name: str | None = None
    """What it is called."""


@dataclass(frozen=True, kw_only=True)
class Recipe(Base):
    """Everything that decides a cake."""

    oven: Oven = field(default_factory=Oven)
    sweet: bool = True
    """Whether it is sweet."""


def parse(*arguments):
    return parse_command(Recipe, "Bake a cake.", [str(argument) for argument in arguments])


def refusal(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as exit:
        parse(*arguments)
    assert exit.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("minutes: 40\noven:\n  degrees: 200\n")
    return path


def test_a_command_has_configuration_folder_and_mode(file):
    command = parse("--config", file, "--output_dir", "runs/cake")
    assert command.config == Recipe(minutes=40, oven=Oven(degrees=200.0))
    assert (command.output_dir, command.dry_run) == (Path("runs/cake"), False)
    command = parse("--minutes", "5", "--dry_run")
    assert command.config == Recipe(minutes=5)
    assert (command.output_dir, command.dry_run) == (None, True)


def test_arguments_are_taken_from_the_process_when_none_are_given(file, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bake", "--minutes", "3", "--config", str(file), "--dry_run"])
    assert parse_command(Recipe, "").config.minutes == 3


def test_single_values_go_before_whole_groups_and_groups_before_the_file(file, tmp_path):
    (tmp_path / "oven.yaml").write_text("degrees: 150\nracks: [1, 3]\n")
    for arguments in (
        ["--oven.degrees", 90, "--oven", tmp_path / "oven.yaml", "--config", file],
        ["--config", file, "--oven", tmp_path / "oven.yaml", "--oven.degrees", 90],
        [f"--oven={tmp_path / 'oven.yaml'}", "--oven.degrees=90", f"--config={file}"],
    ):
        assert parse(*arguments, "--dry_run").config == Recipe(minutes=40, oven=Oven(degrees=90.0, racks=(1, 3)))
    config = parse("--oven", tmp_path / "oven.yaml", "--config", file, "--dry_run").config
    assert config.oven == Oven(degrees=150.0, racks=(1, 3))


def test_of_one_value_given_twice_the_last_one_wins(file):
    assert parse("--minutes", 1, "--config", file, "--minutes", 2, "--dry_run").config.minutes == 2


def test_a_message_is_short_and_ends_with_the_error(capsys, file):
    message = refusal(capsys, "--config", file, "--oven.degrees", 301, "--output_dir", "run")
    lines = message.splitlines()
    assert len(lines) <= 3
    assert lines[0].startswith("usage: ")
    assert lines[-1] == "error: oven.degrees is 301.0: the oven ends at 300"


def test_help_shows_what_each_field_says(capsys):
    with pytest.raises(SystemExit) as exit:
        parse("--help")
    assert exit.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Bake a cake." in shown
    for text in ("100 % of it matters", "Whether it is sweet", "folder of the run"):
        assert text in shown


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--dry_run"], ["required", "minutes"]),
        (["--minutes", "4"], ["--output_dir is missing", "--output_dir runs/first"]),
        (["--minutes", "4", "--output_dir", ""], ["--output_dir is missing"]),
        (["--config", "missing.yaml", "--dry_run"], ["missing.yaml", "does not exist"]),
        (["--config", ".", "--dry_run"], ["not a file"]),
        (["--dry_run", "--config"], ["--config", "expected one argument"]),
        (["--minutes", "4", "--dry_run", "--oven"], ["--oven", "expected one argument"]),
        (["--minutes", "4", "--dry_run", "--oven", "hot"], ["oven", "hot"]),
        (["--min", "4", "--dry_run"], ["--min"]),
        (["--minutes", "4", "--oven.deg", "4", "--dry_run"], ["--oven.deg"]),
        (["--minutes", "4", "--dry"], ["--dry"]),
    ],
)
def test_commands_that_cannot_work_are_refused(arguments, fragments, capsys):
    error = refusal(capsys, *arguments).partition("error: ")[2]
    assert [fragment for fragment in fragments if fragment not in error] == []


def test_an_abbreviated_config_does_not_slip_behind_the_values(capsys, file):
    assert "--conf" in refusal(capsys, "--minutes", 1, "--conf", file, "--dry_run")


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (b"minutes: 1\noven:\n  degrees: 2\n  racks: [1]\n  degrees: 3\n", ["degrees twice", "line 5"]),
        (b"minutes: 1\nminutes: 2\n", ["minutes twice", "line 2"]),
        (b"minutes: [1\n", ["no YAML", "line"]),
        (b"\xff\xfe\x00", ["UTF-8"]),
        (b"minutes: 1\noven:\n", ["oven is null"]),
        (b"minutes: 1\nsweet:\n", ["sweet is null"]),
        (b"- minutes: 1\n", ["minutes"]),
        (b"", ["config"]),
    ],
)
def test_files_that_cannot_be_meant_are_refused(content, fragments, capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(content)
    error = refusal(capsys, "--config", tmp_path / "recipe.yaml", "--dry_run").partition("error: ")[2]
    assert [fragment for fragment in fragments if fragment not in error] == []


def test_the_same_key_may_stand_in_different_groups_and_files(file, tmp_path):
    (tmp_path / "more.yaml").write_text("minutes: 50\noven: {racks: [1]}\n")
    config = parse("--config", file, "--config", tmp_path / "more.yaml", "--dry_run").config
    assert config == Recipe(minutes=50, oven=Oven(degrees=200.0, racks=(1,)))


def test_a_value_may_be_used_twice_through_an_anchor(tmp_path):
    (tmp_path / "recipe.yaml").write_text("minutes: &time 7\noven: {degrees: *time}\n")
    assert parse("--config", tmp_path / "recipe.yaml", "--dry_run").config.oven.degrees == 7.0


@pytest.mark.parametrize("name", [None, "cake", "5", "1.5", "yes", "a: b", "ä #1", " ", "two\nlines", "{x}", "[1]"])
def test_a_configuration_is_read_back_from_its_text(name, tmp_path):
    recipe = Recipe(minutes=3, name=name, oven=Oven(degrees=1e-7, racks=()), sweet=False)
    text = configuration_text(recipe)
    assert yaml.safe_load(text) == configuration_dict(recipe)
    assert list(yaml.safe_load(text)) == ["minutes", "name", "oven", "sweet"]
    (tmp_path / "again.yaml").write_text(text, encoding="utf-8")
    assert parse("--config", tmp_path / "again.yaml", "--dry_run").config == recipe


@dataclass(frozen=True, kw_only=True)
class Inner:
    needed: int
    given: float = 2.0


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    made: Inner = field(default_factory=lambda: Inner(needed=3))
    names: tuple[str, ...] = ("a",)
    none: Inner | None = None
    needed: str


def test_defaults_of_a_configuration_are_plain_and_leave_out_what_must_be_given():
    expected = {"inner": {"given": 2.0}, "made": {"needed": 3, "given": 2.0}, "names": ["a"], "none": None}
    assert default_values(Outer) == expected
