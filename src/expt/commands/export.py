"""`task=export`: a run's model as a program that needs neither its code nor this package.

    python -m expt task=export export.run=RUN_DIR

``model.pt2`` is `torch.export`'s (``torch.export.load(FILE).module()(**inputs)``), with any number
of samples where the model allows it, else with ``export.batch_size``; ``model.onnx`` is written
where ONNX's packages are installed. Both are run again from their files, and compared with the
model on samples of the data.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from expt.commands.predict import open_for
from expt.config.command_nodes import ExportConfig
from expt.config.settings import RunContext
from expt.config.validate import validated
from expt.errors import ConfigError, DataError, ExptError, ModelError, first_line
from expt.files import replace_atomically, write_json
from expt.job import DataSet, Split
from expt.memory.techniques.wrapping import bare
from expt.run.saved import load
from expt.tracking.tracker import open_tracker
from expt.training.batches import Batches, place

log = logging.getLogger(__name__)

FILE_NAME, PROGRAM, ONNX = "export.json", "model.pt2", "model.onnx"
ONNX_PACKAGES = ("onnx", "onnxscript")
NO_ONNX = "no ONNX: its packages are not installed; pip install 'expt[onnx]'"


class ExportError(ExptError):
    """A program does not compute what its model does."""


@dataclass(frozen=True)
class ExportResult:
    """What ``export.json`` holds, and the programs that were written."""

    record: dict[str, Any]
    files: tuple[Path, ...]
    exit_code: int = 0


def run(cfg: DictConfig, context: RunContext) -> ExportResult:
    """Write the programs of the configured run's model.

    Raises:
        ConfigError: a setting is wrong, or the run has no weights to use.
        ModelError: the model cannot be made a program.
        ExportError: a program's output differs from the model's by more than `export.tolerance`.

    """
    node = cast(ExportConfig, OmegaConf.to_object(cfg.export))
    if problems := node.problems():
        raise ConfigError(problems)
    settings = validated(cfg, context.overridden)
    saved = load(str(node.run))
    data, _ = open_for(saved, settings, context)
    place(data, torch.device("cpu"))
    batches = Batches(data, torch.device("cpu"), settings.loader, settings.trainer.seed)
    try:
        examples = _inputs(data, batches, node.batch_size + 1)
    finally:
        batches.close()
    model = bare(saved.model)
    path = context.run_dir / PROGRAM
    known = len(next(iter(examples.values())))
    size = min(node.batch_size, known - 1 if known > 2 else known)
    inputs = {name: value[:size] for name, value in examples.items()}
    dynamic = write_program(model, inputs, path) and known > size
    dynamic = dynamic and _takes(_program(path), examples)
    if not dynamic:
        untried = "" if known > size else "; another could not be tried, the data hold no more"
        print(f"note: the program takes {size} samples at a time, no other number{untried}")
    record: dict[str, Any] = {
        "run": str(saved.run_dir),
        "step": saved.step,
        "inputs": {name: [str(v.dtype), list(v.shape)] for name, v in inputs.items()},
        "any_batch_size": dynamic,
        "difference": _checked(_program(path), model, inputs, node.tolerance, path),
    }
    print(f"program: {path}, {_said(record['difference'])}")
    files = [path]
    if node.onnx and all(map(importlib.util.find_spec, ONNX_PACKAGES)):
        path = context.run_dir / ONNX
        try:
            write_onnx(model, inputs, path, dynamic)
        except ModelError as error:
            print(f"no ONNX: {error}")
        else:
            record["onnx_difference"] = _checked(_onnx(path), model, inputs, node.tolerance, path)
            print(f"ONNX: {path}, {_said(record['onnx_difference'])}")
            files.append(path)
    elif node.onnx:
        print(NO_ONNX)
    write_json(context.run_dir / FILE_NAME, record)
    tracker = open_tracker(settings.tracking, context.run_dir, context.parent_dir)
    tags = {"kind": "export", "run_dir": str(context.run_dir), "of": str(saved.run_dir)}
    tracker.start(f"export-{context.run_dir.name}", {}, tags)
    for file in (*files, context.run_dir / FILE_NAME):
        tracker.artifact(file)
    tracker.finish("FINISHED")
    return ExportResult(record, tuple(files))


def write_program(model: nn.Module, inputs: Mapping[str, Tensor], path: Path) -> bool:
    """Write a model as `torch.export`'s program; return whether it takes any number of samples.

    Args:
        model: in evaluation mode, on the CPU.
        inputs: by the names of its forward's arguments, each [B, ...].
        path: of the file, ``.pt2``.

    Raises:
        ModelError: it cannot be traced: it looks at values to decide what to do.

    """
    program, dynamic = None, True
    with _quiet():
        try:
            program = torch.export.export(model, (), dict(inputs), dynamic_shapes=_shapes(inputs))
        except Exception as error:  # whatever a user's forward does under a tracer
            print(f"note: only for {len(next(iter(inputs.values())))} samples at a time "
                  f"({first_line(error)})")  # fmt: skip
            dynamic = False
        try:
            program = program or torch.export.export(model, (), dict(inputs))
        except Exception as error:
            raise ModelError(
                f"{type(model).__name__} cannot be exported: {first_line(error)}"
            ) from error
        exported = program
        replace_atomically(path, lambda temporary: _save(exported, temporary))
    return dynamic


def write_onnx(model: nn.Module, inputs: Mapping[str, Tensor], path: Path, dynamic: bool) -> None:
    """Write a model as ONNX.

    Raises:
        ModelError: it has an operator that ONNX does not.

    """
    with _quiet():
        try:
            program = torch.onnx.export(
                model,
                kwargs=dict(inputs),
                dynamo=True,
                dynamic_shapes=_shapes(inputs) if dynamic else None,
                verbose=False,
            )
        except Exception as error:
            raise ModelError(
                f"{type(model).__name__} cannot be written as it ({first_line(error)})"
            ) from error
    assert program is not None
    replace_atomically(path, lambda temporary: program.save(temporary))


def _inputs(data: DataSet, batches: Batches, count: int) -> dict[str, Tensor]:
    """Return the inputs of the first samples of the test, else of the validation, of one shape.

    Raises:
        DataError: there is none that can be read.

    """
    split: Split = "test" if data.size("test") else "val"
    found: list[Mapping[str, Tensor]] = []
    held = 0
    for samples in batches.evaluation(split, min(count, data.size(split))):
        inputs = samples.batch().inputs
        if found and any(v.shape[1:] != found[0][name].shape[1:] for name, v in inputs.items()):
            break
        found.append(inputs)
        held += len(samples)
        if held >= count:
            break
    if not found:
        raise DataError(f"{type(data).__name__} has no {split} sample that can be read")
    return {name: torch.cat([inputs[name] for inputs in found])[:count] for name in found[0]}


def _takes(program: Any, inputs: Mapping[str, Tensor]) -> bool:
    """Tell whether a program takes another number of samples than it was traced with."""
    try:
        with torch.no_grad():
            program(**inputs)
    except Exception:
        log.info("the program was specialised", exc_info=True)
        return False
    return True


def _shapes(inputs: Mapping[str, Tensor]) -> dict[str, dict[int, Any]]:
    return {name: {0: torch.export.Dim.AUTO} for name in inputs}


def _save(program: Any, path: Path) -> None:
    with path.open("wb") as file:
        torch.export.save(program, file)


def _program(path: Path) -> Any:
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _onnx(path: Path) -> Any:
    """Return what runs an ONNX file: its runtime where that is installed, else the reference."""
    if importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    else:
        from onnx.reference import ReferenceEvaluator

        session = ReferenceEvaluator(str(path))

    def call(**inputs: Tensor) -> Tensor:
        given = {name: value.numpy() for name, value in inputs.items()}
        return torch.from_numpy(session.run(None, given)[0])

    return call


def _checked(
    program: Any, model: nn.Module, inputs: Mapping[str, Tensor], tolerance: float, path: Path
) -> float:
    """Return by how much a program's output differs, relative to the model's largest.

    Raises:
        ExportError: by more than `tolerance`.

    """
    with torch.no_grad():
        expected, found = model(**inputs), program(**inputs)
    scale = max(float(expected.abs().max()), 1e-12)
    difference = float((found.double() - expected.double()).abs().max()) / scale
    if not difference <= tolerance:
        raise ExportError(
            f"{path}: its output differs from the model's by {difference:.1e} of the largest, and "
            f"export.tolerance={tolerance:g}"
        )
    return difference


def _said(difference: float) -> str:
    return f"which differs from the model by {difference:.1e} at most, relative to the largest"


class _quiet(warnings.catch_warnings):  # noqa: N801 (a context manager)
    """Leave out what exporters say about their own code."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.simplefilter("ignore")
        return entered
