"""Shared fixtures: a folder of its own for every test, and the smallest run that is a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

# Tests are small: two threads would mostly wait for each other, also in processes they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SMALL = ("memory=minimal", "debug=smoke", "tracking=none", "trainer.progress=false")
"""A run of 8 steps that records nothing outside its own directory."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, so that relative outputs go there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def composed() -> Iterator[Callable[..., Any]]:
    """A function that composes the configuration from overrides."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from expt.config.compose import conf_dir, register

    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir())):
        yield lambda *overrides: compose("config", overrides=list(overrides))


@pytest.fixture
def expt(home: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A function that runs one command line in this process: (exit code, stdout, stderr)."""
    from expt.config.command_line import run_command

    def run(*arguments: str, small: bool = True) -> tuple[int, str, str]:
        given: Sequence[str] = (*SMALL, *arguments) if small else arguments
        # A group given twice is refused by Hydra; the test's own choice wins.
        names = [argument.partition("=")[0] for argument in arguments]
        given = [a for a in given if a in arguments or a.partition("=")[0] not in names]
        capfd.readouterr()
        code = run_command(list(given))
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(autouse=True)
def _restore_process_state(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Undo what running a command line in this process changes."""
    import logging
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    for name in ("EXPT_METR_LA", "EXPT_PEMS_BAY"):
        monkeypatch.delenv(name, raising=False)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    # A user's module of the same name in the next test is another one.
    written = str(tmp_path_factory.getbasetemp())
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(written):
            del sys.modules[name]


TOYS = Path(__file__).parent / "toys"


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the toy jobs, whose classes can be imported; worker processes find them too."""
    monkeypatch.syspath_prepend(str(TOYS))
    monkeypatch.setenv("PYTHONPATH", f"{TOYS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return TOYS


@pytest.fixture
def clips(toys: Path, home: Path) -> Path:
    """The folder ``clips`` of the streamed toy job, in the current folder."""
    from clips import write_clips

    write_clips(home / "clips")
    return home / "clips"
