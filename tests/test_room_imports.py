"""The rooms of the package: who imports whom, what importing costs, and that nothing reads a global random generator."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "drift_accel"
# A room imports itself and the rooms before it; foundation imports none.
ROOMS = ("foundation", "models", "data", "drift", "training", "sampling", "evaluation", "analysis")
# Modules at the top: the commands plug rooms together, the package's own names lead into rooms but load none at import.
COMMANDS = ("__init__", "train", "train_mae", "doctor")
HEAVY = ("diffusers", "transformers", "datasets", "accelerate")


def imported_modules(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import in a file below `root`, also inside functions and of type checkers."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            module = (base + (node.module or "")).rstrip(".")
            yield node.lineno, module
            # `from drift_accel import models` names the room only behind the import.
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant):
                yield node.lineno, name.value


def wrong_arrows(root: Path) -> list[str]:
    """Imports of one room by another that must not, and of a module at the top by any room, below `root`/drift_accel."""
    wrong = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        room = parts[0]
        if len(parts) == 1:
            if room not in COMMANDS:
                wrong.append(f"{path.relative_to(root)}: a module outside of the rooms {', '.join(ROOMS)}")
            continue
        if room not in ROOMS:
            wrong.append(f"{path.relative_to(root)}: no room of the list {', '.join(ROOMS)}")
            continue
        for line, module in imported_modules(path, root):
            target = module.split(".")
            if target[0] != PACKAGE or len(target) == 1 or target[1] == "__version__":
                continue
            if target[1] not in ROOMS[: ROOMS.index(room) + 1]:
                wrong.append(f"{path.relative_to(root)}:{line}: {room} imports {module}")
    return wrong


def wrong_tool_imports(root: Path) -> list[str]:
    """Imports of one tool by another."""
    tools = {path.stem for path in (root / "tools").glob("*.py")} | {"tools"}
    return [
        f"{path.relative_to(root)}:{line}: imports {module}"
        for path in sorted((root / "tools").rglob("*.py"))
        for line, module in imported_modules(path, root)
        if module.split(".")[0] in tools
    ]


def test_no_room_imports_a_later_room():
    assert wrong_arrows(ROOT) == []


def test_tools_import_the_package_and_never_each_other():
    assert wrong_tool_imports(ROOT) == []


# The checks themselves.

WRONG = [
    ("foundation/storage.py", "from drift_accel.drift import loss"),
    ("foundation/storage.py", "import drift_accel.models"),
    ("models/generator.py", "def build():\n    from drift_accel.training.loop import train"),
    ("models/generator.py", "from ..data import LabelledImages"),
    ("models/generator.py", "from .. import sampling"),
    ("models/parts/block.py", "from ...drift import loss"),
    ("data/samplers.py", "from drift_accel import training"),
    ("data/samplers.py", "from drift_accel import drift_loss"),
    (
        "drift/loss.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from drift_accel.training.step import DriftBatch",
    ),
    ("training/loop.py", "import drift_accel.sampling.sampler as sampler"),
    ("training/loop.py", "from importlib import import_module\nimport_module('drift_accel.evaluation')"),
    ("training/loop.py", "from drift_accel.train import main"),
    ("evaluation/frechet.py", "from drift_accel.analysis.report import write"),
    ("helpers/lists.py", ""),
    ("helpers.py", ""),
]
RIGHT = [
    ("foundation/storage.py", "import os\nfrom drift_accel import __version__\nfrom drift_accel.foundation.paths import home"),
    ("models/generator.py", "from .checks import check\nfrom ..foundation.storage import write\nimport diffusers.models"),
    ("training/loop.py", "from drift_accel.drift import drift_loss\nfrom drift_accel.data import LabelledImages"),
    ("analysis/report.py", "from drift_accel.evaluation.frechet import frechet_distance"),
    ("train.py", "from drift_accel.sampling import generate\nfrom drift_accel.training.loop import train"),
]


def plant(root: Path, name: str, text: str):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(("name", "text"), WRONG)
def test_a_planted_wrong_arrow_is_found(name, text, tmp_path):
    plant(tmp_path, f"{PACKAGE}/{name}", text)
    assert len({line.split(": ")[0] for line in wrong_arrows(tmp_path)}) == 1


@pytest.mark.parametrize(("name", "text"), RIGHT)
def test_a_planted_right_arrow_is_left_alone(name, text, tmp_path):
    plant(tmp_path, f"{PACKAGE}/{name}", text)
    assert wrong_arrows(tmp_path) == []


def test_a_planted_import_between_tools_is_found(tmp_path):
    plant(tmp_path, "tools/sample.py", "from drift_accel.sampling import generate")
    plant(tmp_path, "tools/evaluate.py", "import sample\n\ndef main():\n    from tools.sample import main")
    assert len({line.split(": ")[0] for line in wrong_tool_imports(tmp_path)}) == 2


# What an import costs.


@pytest.mark.parametrize("statement", ["import drift_accel", "from drift_accel import drift_loss, DriftConfig"])
def test_the_loss_alone_is_imported_without_heavy_libraries(statement):
    code = f"import sys; {statement}; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


# Randomness is stateless: see foundation/random_streams.py.

# Draw from a generator that they are given as `generator=`, or else from the global one.
TORCH_DRAWS = {
    *("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"),
    *("normal_", "uniform_", "bernoulli_", "random_", "exponential_", "geometric_", "cauchy_", "log_normal_", "trunc_normal_"),
    *("xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_", "orthogonal_", "sparse_"),
}
# Have no such argument, or set the global state.
TORCH_GLOBAL = {"rand_like", "randn_like", "randint_like", "seed", "initial_seed", "set_rng_state", "manual_seed_all"}
TORCH_INIT = ("torch", "torch.nn.init", "nn.init", "init")
DROPOUT = {f"{owner}.{name}" for owner in ("nn", "F", "torch", "nn.functional") for name in ("dropout", "Dropout")}
NUMPY_OWN_STATE = {"Generator", "Philox", "SeedSequence", "BitGenerator"}
NUMPY_OWN_STATE_WHEN_SEEDED = {"RandomState", "default_rng"}


def global_draws(path: Path) -> list[str]:
    """Uses of torch's, numpy's and Python's global generators in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    seeded = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call) and (node.args or node.keywords)}
    uses = ((node, global_use(node, seeded)) for node in ast.walk(tree))
    return [f"{path.name}:{node.lineno}: {use}" for node, use in uses if use]


def global_use(node: ast.AST, called_with_arguments: set[ast.AST]) -> str | None:
    """What a node of a syntax tree takes from a global generator, or None."""
    if isinstance(node, ast.Import) and any(alias.name == "random" for alias in node.names):
        return "import random"
    if isinstance(node, ast.ImportFrom):
        taken = {alias.name for alias in node.names} & (TORCH_DRAWS | TORCH_GLOBAL | {"manual_seed"})
        if node.module in ("random", "numpy.random") or (node.module == "torch" and taken):
            return f"from {node.module}"
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("np.random", "numpy.random"):
        seeded = node.attr in NUMPY_OWN_STATE_WHEN_SEEDED and node in called_with_arguments
        return None if seeded or node.attr in NUMPY_OWN_STATE else ast.unparse(node)
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return None
    name, owner = node.func.attr, ast.unparse(node.func.value)
    drawn = name in TORCH_DRAWS and (owner in TORCH_INIT or name.endswith("_"))
    if drawn and not any(keyword.arg == "generator" for keyword in node.keywords):
        return f"{owner}.{name} without generator="
    sets_state = name in TORCH_GLOBAL or (name == "manual_seed" and "Generator" not in owner)
    if (owner.startswith("torch") and sets_state) or f"{owner}.{name}" in DROPOUT:
        return f"{owner}.{name}"
    return None


def test_no_file_of_the_package_uses_a_global_generator():
    assert [use for path in sorted((ROOT / PACKAGE).rglob("*.py")) for use in global_draws(path)] == []


@pytest.mark.parametrize(
    ("text", "uses"),
    [
        ("torch.manual_seed(0)", 1),
        ("torch.cuda.manual_seed_all(0)", 1),
        ("torch.randn(3)", 1),
        ("torch.randn(3, generator=g)", 0),
        ("torch.randn_like(x)", 1),
        ("torch.randperm(3)", 1),
        ("x.normal_()", 1),
        ("x.normal_(generator=g)", 0),
        ("nn.init.xavier_uniform_(x)", 1),
        ("np.random.seed(0)", 1),
        ("numpy.random.rand(3)", 1),
        ("np.random.default_rng()", 1),
        ("np.random.default_rng(5)", 0),
        ("np.random.RandomState()", 1),
        ("np.random.RandomState(seed=5).permutation(3)", 0),
        ("shuffle = np.random.shuffle", 1),
        ("numpy.random.Generator(numpy.random.Philox(key=1))", 0),
        ("import random", 1),
        ("from random import shuffle", 1),
        ("from torch import manual_seed, nn", 1),
        ("from torch import Tensor, nn", 0),
        ("from numpy.random import rand", 1),
        ("F.dropout(x)", 1),
        ("torch.Generator().manual_seed(0)", 0),
        ("stream.normal(3)", 0),
    ],
)
def test_a_planted_global_draw_is_found(text, uses, tmp_path):
    plant(tmp_path, "planted.py", text)
    assert len(global_draws(tmp_path / "planted.py")) == uses


@pytest.fixture(scope="module")
def task():
    """A generator's task, tiny enough for a step in a blink."""
    from drift_accel.data import LabelledImages
    from drift_accel.data.samplers import DirectSampler
    from drift_accel.drift import DriftConfig, FeatureConfig, GuidanceConfig
    from drift_accel.models import Generator, MaskedAutoencoder
    from drift_accel.training.generator_task import BatchConfig, GeneratorTask

    images = np.random.Generator(np.random.Philox(key=1)).uniform(-1, 1, (40, 1, 8, 8))
    sizes = {"input_size": 8, "in_channels": 1, "num_classes": 4}
    generator = Generator(**sizes, patch_size=4, hidden_size=16, depth=1, num_heads=2, num_style_tokens=2, num_context_tokens=1)
    return GeneratorTask(
        generator,
        MaskedAutoencoder(**sizes, width=8, blocks=(1, 1, 1, 1)).eval().requires_grad_(False),
        DirectSampler(LabelledImages(images, np.arange(40) % 4, "abcd"), 0, positives=4, negatives=2),
        batch=BatchConfig(labels=3, generated=4, positives=4, negatives=2),
        guidance=GuidanceConfig(),
        drift=DriftConfig(),
        features=FeatureConfig(maps=("conv1",)),
        seed=0,
        device=torch.device("cpu"),
    )


def test_two_training_steps_do_not_depend_on_global_seeds_and_leave_their_state(task):
    def two_steps(seed: int) -> list[float]:
        torch.manual_seed(seed)
        np.random.seed(seed)
        states = torch.get_rng_state(), np.random.get_state()[1].copy()
        losses = []
        for step in range(2):
            task.model.zero_grad()
            loss, _ = task.compute(task.model, task.draw(step), step, diagnostics=True)
            loss.backward()
            gradient = sum(parameter.grad.double().square().sum() for parameter in task.model.parameters())
            losses += [loss.item(), gradient.item()]
        assert torch.equal(torch.get_rng_state(), states[0])
        assert np.array_equal(np.random.get_state()[1], states[1])
        return losses

    first = two_steps(1)
    assert first == two_steps(2)
    assert first[:2] != first[2:], "two steps drew the same"
