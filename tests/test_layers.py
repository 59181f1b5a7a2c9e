"""Imports point downwards only; a part imports no other part.

::

    cli            __main__, composition
    tasks          tasks/*, construction
    orchestration  grid, report, sweep
    loop           training, evaluation, checkpoint, progress, profiling, interruption,
                   acceleration
    parts          models/, data/, optim/, memory/, tracking/
    ground         schema, protocols, errors, units, files, results: no torch on import
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import expt

ROOT = Path(expt.__file__).parent
LAYERS = {  # from the top; a name stands for a module or a package under `expt`
    "cli": {
        "__main__",
        "composition",
        "dispatch",
        "explanation",
        "search_jobs",
        "search_request",
        "searching",
    },
    "tasks": {"tasks", "construction", "validation", "foresight", "batch_search", "fitting"},
    "orchestration": {
        "grid",
        "report",
        "plan_tables",
        "cards_table",
        "sweep",
        "expansion",
        "child_process",
        "reporting",
    },
    "loop": {
        "training",
        "evaluation",
        "checkpoint",
        "progress",
        "profiling",
        "interruption",
        "acceleration",
        "averaging",
        "recording",
        "stopping",
        "stepping",
        "capture_rules",
        "captured_steps",
        "cuda_graphs",
        "compiled_take",
        "loss_reading",
    },
    "parts": {"models", "data", "optim", "memory", "tracking"},
    "ground": {
        "",
        "schema",
        "search_config",
        "expand_config",
        "report_config",
        "protocols",
        "errors",
        "units",
        "files",
        "results",
    },
}
MEMORY = ("watching", "planning", "recovery", "diagnosis", "techniques", "measuring")
"""Packages of `expt.memory`, from the top: each may import those after it."""
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}
CONFIGURATION = {"hydra", "omegaconf"}
HEAVY = {"torch", "mlflow", "matplotlib", "pandas", "lightning_fabric"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def unit(module: str) -> str:
    """Return the module or package right under `expt`; "" is `expt` itself."""
    return module.split(".")[1] if "." in module else ""


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
                package = SOURCES.get(module, Path()).name == "__init__.py"
                parents = module.split(".")[: len(module.split(".")) - node.level + package]
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


def violations(module: str, source: str, known: Iterable[str] = frozenset(SOURCES)) -> list[str]:
    """Return one message per import of `module` that its layer does not allow."""
    order = list(LAYERS)
    own = unit(module)
    layer = LAYER_OF.get(own)
    if layer is None:
        return [
            f"{module} is in no layer: add {own!r} to LAYERS in {Path(__file__).name}, to the "
            f"lowest of {', '.join(order)} that lies above all it imports"
        ]
    found = []
    for name, line, at_import in imported(module, source, known):
        top = name.split(".")[0]
        where = f"{module}:{line} ({layer}) imports {name}"
        if layer == "ground" and at_import and top in HEAVY:
            found.append(f"{where}, which is too heavy for the ground; import it where it is used")
        if layer == "parts" and top in CONFIGURATION:
            found.append(f"{where}; parts take plain arguments and know no configuration")
        if top != "expt":
            continue
        other = unit(name)
        below = LAYER_OF.get(other)
        if below is None:
            found.append(f"{where}, which is in no layer")
        elif order.index(below) < order.index(layer):
            found.append(f"{where}, upwards ({below})")
        elif layer == below == "parts" and own != other:
            found.append(f"{where}, another part; what both need belongs to the ground")
        elif own == other == "memory":
            inner, within = (one.split(".")[2:3] for one in (name, module))
            if inner and within and MEMORY.index(inner[0]) < MEMORY.index(within[0]):
                found.append(f"{where}, upwards within memory")
    return found


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_downwards_only(module: str) -> None:
    found = violations(module, SOURCES[module].read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


def test_every_import_of_the_package_is_of_a_module_that_exists() -> None:
    # Also proves that the parsing finds imports at all.
    edges = {
        (module, name)
        for module, path in SOURCES.items()
        for name, _, _ in imported(module, path.read_text(encoding="utf-8"), SOURCES)
        if name.split(".")[0] == "expt"
    }
    assert {name for _, name in edges} <= set(SOURCES)
    assert ("expt.training", "expt.checkpoint") in edges  # from expt import checkpoint
    assert ("expt.training", "expt.optim.schedules") in edges  # from expt.optim import schedules
    assert ("expt.data.traffic", "expt.data.forecast_plots") in edges  # inside a function


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("expt.data.new", "import expt.training", "upwards (loop)"),
        ("expt.data.new", "from expt import training", "upwards (loop)"),
        ("expt.data.new", "from ..training import Trainer", "upwards (loop)"),
        ("expt.report", "def f():\n    from expt.tasks import train", "upwards (tasks)"),
        ("expt.results", "from expt.models import stid", "upwards (parts)"),
        ("expt.evaluation", "from expt.grid import Grid", "upwards (orchestration)"),
        ("expt.construction", "import expt.composition", "upwards (cli)"),
        ("expt.models.new", "from expt.data.series import Series", "another part"),
        ("expt.optim.new", "def f():\n    import omegaconf.listconfig", "know no configuration"),
        (
            "expt.memory.measuring.new",
            "from hydra.utils import instantiate",
            "know no configuration",
        ),
        (
            "expt.memory.measuring.new",
            "from expt.memory.planning.planning import plan",
            "upwards within memory",
        ),
        ("expt.units", "import torch", "too heavy"),
        (
            "expt.files",
            "try:\n    from torch import nn\nfinally:\n    pass",
            "too heavy",
        ),
        ("expt.stray", "", "expt.stray is in no layer: add 'stray' to LAYERS"),
        ("expt.training", "import expt.stray", "in no layer"),
    ],
)
def test_the_checker_finds_a_violation(module: str, source: str, message: str) -> None:
    found = violations(module, source)
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("expt.models.new", "import torch\nfrom expt.models.attention import Attention"),
        ("expt.training", "from expt.optim import schedules\nfrom expt.evaluation import evaluate"),
        ("expt.tasks.new", "from expt.report import row\nfrom omegaconf import DictConfig"),
        ("expt.protocols", "if TYPE_CHECKING:\n    import torch\ndef f():\n    import torch"),
        ("expt.grid", "from expt import __version__"),
    ],
)
def test_the_checker_lets_a_proper_import_pass(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_the_command_line_starts_without_the_heavy_packages() -> None:
    program = (
        "import sys, expt, expt.composition, expt.schema, expt.errors, expt.protocols\n"
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
