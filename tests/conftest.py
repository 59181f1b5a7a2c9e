"""Shared fixtures: a folder of its own for every test, and the smallest run that is a run."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Tests are small: two threads would mostly wait for each other, also in processes they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# As `python -m expt` does before it imports torch, which a server may do before any command runs.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

SMALL = ("memory=minimal", "debug=smoke", "tracking=none", "trainer.progress=false")
"""A run of 8 steps that records nothing outside its own directory."""
NARROW = ("model.num_stages=1", "model.embed_dim=8")
"""With these, such a run takes half of the time. A line with one of `OF_THE_MODEL` has them not."""
OF_THE_MODEL = re.compile(r"[+~]*(model|experiment|search|memory\.budget)\b")
"""Settings that choose a model, or are chosen for the size of one."""


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


_imported, _ended = 0, 0


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Set aside what a test has imported or left, which every collection would look at again.

    Runs collect garbage several times each, and torch and MLflow are a million objects.
    """
    global _imported, _ended
    _ended += 1
    if len(sys.modules) > _imported or _ended % 25 == 0:
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
        if small and not any(OF_THE_MODEL.match(argument) for argument in arguments):
            given = (*given, *NARROW)
        # A group given twice is refused by Hydra; the test's own choice wins.
        names = [argument.partition("=")[0] for argument in arguments]
        given = [a for a in given if a in arguments or a.partition("=")[0] not in names]
        capfd.readouterr()
        code = run_command(list(given))
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


class Forked:
    """Starts command lines in processes of their own that the server forks: they import little.

    Args:
        folder: where each has a folder with its ``output.log``.
        patch: undone after the test.

    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch
        self.started: list[Any] = []
        self.imported: dict[Path, Any] = {}

    def start(self, *arguments: str, run: Any = None, **variables: str) -> Any:
        """Start one in the current folder; the answer is its `TrialProcess`.

        Args:
            arguments: a command line, or what `run` takes.
            run: a function of the test's file, to be called instead; it returns the exit code.
            variables: more environment variables.

        """
        from expt.config.command_line import run_command
        from expt.run.process import TrialProcess

        folder = self.folder / f"forked_{len(self.started)}"
        called = run_command if run is None else self._importable(run)
        process = TrialProcess(called, arguments, folder, variables)
        self.started.append(process)
        return process

    def ended(self, process: Any) -> tuple[int, str]:
        """Wait for its end: the exit code, negative for a signal, and what it said."""
        deadline = time.monotonic() + 120
        while (code := process.poll()) is None:
            assert time.monotonic() < deadline, f"it did not end: {self.said(process)}"
            time.sleep(0.01)
        return code, self.said(process)

    def said(self, process: Any) -> str:
        """Return what it has written so far."""
        from expt.run.process import LOG_NAME

        log: Path = process.folder / LOG_NAME
        return log.read_text() if log.exists() else ""

    def _importable(self, function: Any) -> Any:
        """Return a test file's function under the name by which another process can import it."""
        path = Path(function.__code__.co_filename)
        if path not in self.imported:
            self.patch.syspath_prepend(str(path.parent))
            # After the test, what was there before is there again, or nothing.
            self.patch.setitem(sys.modules, path.stem, sys)
            del sys.modules[path.stem]
            self.imported[path] = importlib.import_module(path.stem)
        return getattr(self.imported[path], function.__name__)


@pytest.fixture
def forked(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Forked]:
    """See `Forked`; none outlives the test."""
    forked = Forked(tmp_path_factory.mktemp("forked"), monkeypatch)
    yield forked
    for process in forked.started:
        if process.poll() is None:
            process.kill()


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


@pytest.fixture(scope="session", autouse=True)
def _one_server() -> Iterator[None]:
    """Let the server that this process's tests fork from import all that they take, and stay.

    Otherwise the test that comes first decides what it imports, and a refused search ends it.
    """
    import multiprocessing
    from multiprocessing.context import BaseContext

    from expt.run import server
    from hydra_plugins.expt_sweeper.sweeper import PRELOADED, PRELOADED_FOR_TRACKING

    names = [*PRELOADED, *PRELOADED_FOR_TRACKING, "expt.run.ranks"]
    multiprocessing.set_forkserver_preload(names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseContext, "set_forkserver_preload", lambda context, names: None)
        patch.setattr(server, "stop_server", lambda: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _configurations_are_read_once() -> Iterator[None]:
    """Keep what Hydra reads of a file, and what OmegaConf parses of a value, for the next test.

    A quarter of a small run is composing, and the files are the same ones each time.
    """
    import pickle
    from functools import lru_cache

    import omegaconf
    from hydra._internal.core_plugins.file_config_source import FileConfigSource
    from hydra._internal.core_plugins.importlib_resources_config_source import (
        ImportlibResourcesConfigSource,
    )

    load, read = FileConfigSource.load_config, ImportlibResourcesConfigSource._read_config
    kept: dict[Any, bytes] = {}

    def remembered(source: Any, path: Any, make: Callable[[], Any]) -> Any:
        try:
            found = path.stat()
        except (OSError, AttributeError):  # not there, or in an archive
            return make()
        key = (source.path, source.provider, path, found.st_mtime_ns, found.st_size, found.st_ino)
        if key not in kept:
            kept[key] = pickle.dumps(make())
        return pickle.loads(kept[key])

    def load_config(source: FileConfigSource, config_path: str) -> Any:
        path = Path(source.path, source._normalize_file_name(config_path)).resolve()
        return remembered(source, path, lambda: load(source, config_path))

    def read_config(source: ImportlibResourcesConfigSource, resource: Any) -> Any:
        return remembered(source, resource, lambda: read(source, resource))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileConfigSource, "load_config", load_config)
        patch.setattr(ImportlibResourcesConfigSource, "_read_config", read_config)
        for module in (omegaconf.base, omegaconf._utils):
            patch.setattr(module, "parse", lru_cache(maxsize=10_000)(module.parse))
        yield


_of_others: set[str] = set()
"""Modules that no test has written."""


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
    for name in sys.modules.keys() - _of_others:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(written)):
            del sys.modules[name]
        else:
            _of_others.add(name)


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
