"""README.md against the tree: every module has its line, every function of the equation table exists, links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "drift_accel"


def modules():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "tools").glob("*.py"), *(ROOT / "launch_scripts").glob("*.sh")]
    return sorted(path.relative_to(ROOT).as_posix() for path in files if path.name != "__init__.py")


@pytest.mark.parametrize("module", modules())
def test_every_module_has_its_line_in_the_tree(module):
    tree = README.split("## The tree", 1)[1].split("## ", 1)[0]
    name = Path(module).name
    family = re.sub(r"_.*", "_*.py", name)  # archive_*.py stands for its family
    assert name in tree or family in tree, f"{module} is not in the README's tree"


def test_every_function_of_the_equation_table_exists():
    table = README.split("## Equation to function", 1)[1].split("## ", 1)[0]
    named = re.findall(r"`([\w/]+\.py): ([\w.]+)`", table)
    assert len(named) > 8
    for path, function in named:
        source = (PACKAGE / path).read_text(encoding="utf-8")
        for part in function.split("."):
            assert re.search(rf"^\s*(def|class) {part}\b", source, re.M), f"{path} has no {function}"


def test_pictures_and_scripts_that_are_named_exist():
    for path in re.findall(r"\]\((docs/[^)]+)\)", README) + re.findall(r"bash (launch_scripts/\S+\.sh)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"python (tools/\w+\.py)", README):
        assert (ROOT / path).exists(), path
