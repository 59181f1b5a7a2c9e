"""Shared fixtures: a folder of its own for every test, and the smallest run that is a run."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Tests are small: two threads would mostly wait for each other, also in processes they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SMALL = ("memory=minimal", "debug=smoke", "tracking=none", "trainer.progress=false")
"""A run of 8 steps that records nothing outside its own directory."""


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Make the pictures of runs blank, and ask the model for only a part of what is in them.

    A day of traffic takes 36 batches of eight, more than all of a small run's training and tests.
    Its forecasts are then those of its first batch, again and again.
    """
    from expt.jobs.traffic.data import TrafficData

    drawn = TrafficData.plots

    def plots(self: TrafficData, predict: Callable[..., Any], *rest: Any) -> list[Path]:
        found: dict[int, Any] = {}

        def first(batch: Any) -> Any:
            size = len(batch.target)
            if size not in found:
                found[size] = predict(batch)
            return found[size]

        return drawn(self, first, *rest)

    patch.setattr("matplotlib.figure.Figure.draw", lambda figure, renderer: None)
    patch.setattr(TrafficData, "plots", plots)


def pytest_configure() -> None:
    """Let processes that tests start hear SIGINT, which a shell's background job ignores."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


_imported = 0


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Set aside what a test has imported, which every collection would look at again.

    Runs collect garbage several times each, and torch and MLflow are a million objects.
    """
    global _imported
    if len(sys.modules) > _imported:
        _imported = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture
def unfrozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set nothing aside while a test runs that asks what the collector looks after."""
    from expt.memory.planning import fake

    monkeypatch.setattr(fake, "_set_aside_elsewhere", False)
    gc.unfreeze()
    yield
    gc.unfreeze()
    gc.freeze()


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
def drawn() -> None:
    """Ask for runs that draw their pictures: one takes as long as ten steps, so most do not."""


@pytest.fixture
def expt(
    home: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Callable[..., tuple[int, str, str]]:
    """A function that runs one command line in this process: (exit code, stdout, stderr).

    Pictures are made and stored, but blank, unless the test asks for the fixture `drawn`.
    """
    from expt.config.command_line import run_command

    if "drawn" not in request.fixturenames:
        draw_nothing(monkeypatch)

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


@pytest.fixture(scope="session", autouse=True)
def _tables_are_made_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Copy MLflow's empty tables into every new SQLite store: they take two seconds to make."""
    import shutil

    from expt.tracking import store

    made, made_by = tmp_path_factory.mktemp("tables") / "mlflow.db", store._create_database

    def copied(database: Path) -> None:
        if not made.exists():
            made_by(made)
        shutil.copy(made, database)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_create_database", copied)
        yield


@contextmanager
def restored(written: Path) -> Iterator[None]:
    """Undo what running a command line in this process changes; `written` is the tests' folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.delenv("HYDRA_FULL_ERROR", raising=False)
        for name in ("EXPT_METR_LA", "EXPT_PEMS_BAY"):
            patch.delenv(name, raising=False)
        root = logging.getLogger()
        handlers, level = list(root.handlers), root.level
        yield
        for handler in root.handlers:
            if handler not in handlers:
                handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
    # A user's module of the same name in the next test is another one.
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(written)):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def _restore_process_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with restored(tmp_path_factory.getbasetemp()):
        yield


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that runs one command line, for all tests of a file to look at: its folder.

    `files` are written into the folder before: text by name. The pictures are blank.
    """
    from expt.config.command_line import run_command

    def run(*arguments: str, files: Mapping[str, str] | None = None) -> Path:
        folder = tmp_path_factory.mktemp("once")
        for name, text in (files or {}).items():
            (folder / name).write_text(text)
        with restored(tmp_path_factory.getbasetemp()), pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            draw_nothing(patch)
            assert run_command(list(arguments)) == 0
        return folder

    return run


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
