"""The folder is the layer: nine packages over a small ground, imports point one way, no circle.

`PACKAGES` is the order, from the top; the last two, `memory` and `jobs`, do not know each other.
`__main__` is above all of them. Every module right under `expt` that is no package is ground: it
imports nothing of the packages, and no torch when it is imported. `expt` itself is a door besides:
it names modules of any package, and imports them when what they offer is first asked for.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import expt

ROOT = Path(expt.__file__).parent
PACKAGES = (
    "commands",
    "reports",
    "search",
    "run",
    "training",
    "tracking",
    "config",
    "memory",
    "jobs",
)
BESIDE_EACH_OTHER = {"memory", "jobs"}
MEMORY = ("watching", "planning", "recovery", "diagnosis", "techniques", "measuring")
"""Packages of `expt.memory`, from the top: each may import those after it."""
CONFIGURATION = {"hydra", "omegaconf"}
HEAVY = {"torch", "mlflow", "matplotlib", "pandas", "lightning_fabric", "scipy", "sklearn"}
MODULE_NAME = re.compile(rf"expt\.(?:__main__|{'|'.join(PACKAGES)})(?:\.\w+)*")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def package(module: str) -> str:
    """Return the package or ground module right under `expt`; "" is `expt` itself."""
    return module.split(".")[1] if "." in module else ""


def rank(module: str) -> int:
    """Return how far from the top a module's package is; the ground is lowest."""
    own = package(module)
    if own == "__main__":
        return -1
    return PACKAGES.index(own) if own in PACKAGES else len(PACKAGES)


def imported(module: str, source: str, known: Iterable[str]) -> Iterator[tuple[str, int, bool]]:
    """Yield (name, line, whether it runs when the module is imported) of every import.

    `from expt import name` is the module `expt.name` where `known` has one.
    """

    def visit(node: ast.AST, at_import: bool) -> Iterator[tuple[str, int, bool]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, at_import
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                inside = SOURCES.get(module, Path()).name == "__init__.py"
                parents = module.split(".")[: len(module.split(".")) - node.level + inside]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield (whole if whole in known else base), node.lineno, at_import
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                yield from visit(child, False)
            for child in node.orelse:
                yield from visit(child, at_import)
        else:
            in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, at_import and not in_function)

    return visit(ast.parse(source), True)


def modules_in_strings(source: str) -> Iterator[tuple[str, int]]:
    """Yield (name, line) of string constants that name a module of ours; docstrings aside."""
    tree = ast.parse(source)
    prose = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or id(node) in prose:
            continue
        if isinstance(node.value, str) and MODULE_NAME.fullmatch(node.value):
            yield node.value, node.lineno


def violations(module: str, source: str, known: Iterable[str] = frozenset(SOURCES)) -> list[str]:
    """Return one message per import of `module` that its package does not allow."""
    own = package(module)
    found = []
    for name, line, at_import in imported(module, source, known):
        top = name.split(".")[0]
        where = f"{module}:{line} imports {name}"
        if own not in PACKAGES and own != "__main__" and at_import and top in HEAVY:
            found.append(f"{where}, which is too heavy for the ground; import it where it is used")
        if own in BESIDE_EACH_OTHER and top in CONFIGURATION:
            found.append(f"{where}; {own} takes plain arguments and knows no configuration")
        if top != "expt":
            continue
        other = package(name)
        if rank(name) < rank(module):
            found.append(f"{where}, upwards")
        elif own != other and {own, other} <= BESIDE_EACH_OTHER:
            found.append(f"{where}; memory and jobs do not know each other")
        elif own == other == "memory":
            inner, within = (one.split(".")[2:3] for one in (name, module))
            if inner and within and MEMORY.index(inner[0]) < MEMORY.index(within[0]):
                found.append(f"{where}, upwards within memory")
    for name, line in modules_in_strings(source):
        if rank(name) < rank(module) and module != "expt":
            found.append(f"{module}:{line} names {name} in a string, upwards")
    return found


def edges() -> dict[str, set[str]]:
    """Return what every module imports of ours, wherever in the file."""
    return {
        module: {
            name
            for name, _, _ in imported(module, path.read_text(encoding="utf-8"), SOURCES)
            if name.split(".")[0] == "expt"
        }
        for module, path in SOURCES.items()
    }


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of one circle of imports, none if there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph.get(module, set())):
            if found := visit(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_one_way(module: str) -> None:
    found = violations(module, SOURCES[module].read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


def test_no_module_imports_itself_through_others() -> None:
    assert circle(edges()) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "a"]


def test_every_folder_is_a_package_of_the_order_and_at_most_two_levels_deep() -> None:
    folders = {path.parent.relative_to(ROOT) for path in SOURCES.values()} - {Path()}
    assert {folder.parts[0] for folder in folders} == set(PACKAGES)
    assert max(len(folder.parts) for folder in folders) == 2
    assert all((ROOT / folder / "__init__.py").exists() for folder in folders)


def test_every_import_of_the_package_is_of_a_module_that_exists() -> None:
    # Also proves that the parsing finds imports at all.
    graph = edges()
    assert set().union(*graph.values()) <= set(SOURCES)
    trainer = graph["expt.training.trainer"]
    assert "expt.training.checkpoint" in trainer  # from expt.training import checkpoint
    assert "expt.job" in trainer  # from expt.job import DataSet
    assert "expt.jobs.traffic.figures" in graph["expt.jobs.traffic.data"]  # inside a function


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("expt.jobs.new", "import expt.training.trainer", "upwards"),
        ("expt.memory.new", "from expt.training import trainer", "upwards"),
        ("expt.jobs.new", "from ..training.trainer import Trainer", "upwards"),
        ("expt.run.new", "def f():\n    from expt.commands import train", "upwards"),
        ("expt.result", "from expt.jobs.traffic import stid", "upwards"),
        ("expt.config.new", "import expt.__main__", "upwards"),
        ("expt.memory.measuring.new", "from expt.jobs.attention import x", "do not know each"),
        ("expt.jobs.new", "def f():\n    import omegaconf.listconfig", "knows no configuration"),
        ("expt.memory.measuring.new", "from hydra.utils import x", "knows no configuration"),
        (
            "expt.memory.measuring.new",
            "from expt.memory.planning import plan",
            "upwards within memory",
        ),
        ("expt.units", "import torch", "too heavy"),
        ("expt.files", "try:\n    from torch import nn\nfinally:\n    pass", "too heavy"),
        ("expt.search.new", 'NAMES = ("expt.commands.train",)', "in a string, upwards"),
        ("expt.run.new", 'f"{1}"; load("expt.__main__")', "in a string, upwards"),
    ],
)
def test_the_checker_finds_a_violation(module: str, source: str, message: str) -> None:
    found = violations(module, source)
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("expt.jobs.traffic.new", "import torch\nfrom expt.jobs.attention import Attention"),
        ("expt.training.new", "from expt.training import schedules\nfrom expt.job import Batch"),
        ("expt.commands.new", "from expt.tables import x\nfrom omegaconf import DictConfig"),
        ("expt.job", "if TYPE_CHECKING:\n    import torch\ndef f():\n    import torch"),
        ("expt.commands.new", "from expt import __version__"),
        ("expt.commands.new", 'PRELOADED = ("expt.search.candidates",)'),
        ("expt", '_OFFERED = {"train": "expt.commands.train"}'),
        ("expt.search.new", '"""Prose about `expt.commands`."""\n"expt.commands.train"'),
    ],
)
def test_the_checker_lets_a_proper_import_pass(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_the_command_line_starts_without_the_heavy_packages() -> None:
    program = (
        "import sys, expt.__main__, expt.config.compose, expt.config.schema, expt.job\n"
        f"print(*({HEAVY!r} & sys.modules.keys()))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={"PYTHONPATH": str(ROOT.parent), "PATH": ""},
    )
    assert ran.stdout.split() == []
