"""Two workers of one study on a real PostgreSQL server, which the test starts for itself.

The trials take a tenth of a second and train nothing, so that the workers meet at the study as
often as they can; the workers are processes of their own, which call `be_worker`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest

from expt.config.schema import TrackingConfig
from expt.config.search_node import SearchConfig
from expt.result import Outcome
from expt.search.loop import Search
from expt.search.metric import EARLIER, objectives_of
from expt.search.records import Records
from expt.search.reservation import Reservations
from expt.search.runner import Job
from expt.search.samplers import make_pruner, make_sampler
from expt.search.space import Space
from expt.search.study import open_storage, open_study
from expt.search.trial import KIND, STARTED, WORKER, Prediction, TrialOutcome

N_TRIALS, SECONDS = 16, 0.1
BUDGET = 100 * 1024**2
SPACE = {"x": "range(0,12)", "width": "choice(8,16,32,64)"}
"""48 points, a quarter of which cannot fit: both workers often suggest what was tried before."""
ROOTLESS = ("postgres", "nobody")
"""PostgreSQL refuses to be run by root."""


class Timed:
    """A trial that ends after a moment, and writes a line that says who trained it."""

    def __init__(self, job: Job) -> None:
        with (job.folder / "trained.log").open("a", encoding="utf-8") as log:
            log.write(f"{os.getpid()}\n")
        params = dict(line.split("=", 1) for line in job.lines)
        self.outcome = TrialOutcome(
            Outcome.completed, float(params["x"]), 1000, 1000, seconds=SECONDS
        )
        self.until = time.monotonic() + SECONDS

    def poll(self) -> TrialOutcome | None:
        return self.outcome if time.monotonic() >= self.until else None

    def epochs(self) -> list[tuple[int, float]]:
        return []

    def stop(self, why: str) -> None:
        self.until = 0.0

    def kill(self) -> None:
        self.until = 0.0


class TimedRunner:
    prunes = True

    def start(self, job: Job) -> Timed:
        return Timed(job)

    def flush(self) -> None:
        """Do nothing."""


class WidthJobs:
    """Predicts 2 MiB per unit of width: 64 cannot fit."""

    budget_bytes = BUDGET

    def lines(self, number: int, params: Any) -> list[str]:
        return list(params)

    def predict(self, lines: Any) -> Prediction:
        peak = 2 * 1024**2 * int(dict(line.split("=", 1) for line in lines)["width"])
        return Prediction(peak, peak, (peak, peak), {"peak_bytes": peak})

    def advise(self, lines: Any) -> None:
        return None


def be_worker(arguments: Sequence[str]) -> int:
    """Do a worker's share: the storage's URL, the study's folder, the sampler's seed."""
    url, folder, seed = arguments[0], Path(arguments[1]), int(arguments[2])
    config = SearchConfig(study="shared", n_trials=N_TRIALS)
    space = Space.parse(SPACE)
    node = {"_target_": "optuna.samplers.TPESampler", "seed": None}
    sampler = make_sampler(node, space, seed, 1)
    reservations = Reservations(None, space, N_TRIALS, folder)  # type: ignore[arg-type]
    # Both at once, so that they also meet where tables are made.
    (folder / f"ready.{seed}").touch()
    while len(list(folder.glob("ready.*"))) < 2:
        time.sleep(0.01)
    storage = open_storage(url)
    with reservations.locked():
        reservations.study = open_study(
            config.study, storage, sampler, make_pruner(config.pruner, 1),
            objectives_of(config.objectives, EARLIER), EARLIER, {"space": space.as_json()},
        )  # fmt: skip
    (folder / f"open.{seed}").touch()
    while len(list(folder.glob("open.*"))) < 2:  # neither begins before the other can
        time.sleep(0.01)
    Search(
        config, space, reservations, TimedRunner(), WidthJobs(),
        Records(TrackingConfig(), folder, config.study), folder, [0],
    ).run()  # fmt: skip
    return 0


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Run a server as a user that may, on a socket in a folder of its own; yields its URL."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'expt[sql]'")
    found = shutil.which("initdb") or shutil.which("postgres")
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found is None and not installed:
        pytest.skip("there is no PostgreSQL server here: apt-get install postgresql")
    programs = Path(found).resolve().parent if found else installed[-1].parent
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # a socket's name must be short
    user: dict[str, Any] = {}
    if os.geteuid() == 0:
        names = {entry.pw_name for entry in pwd.getpwall()}
        entry = pwd.getpwnam(next(name for name in ROOTLESS if name in names))
        os.chown(folder, entry.pw_uid, entry.pw_gid)
        user = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}

    def run(*command: str) -> None:
        log = folder / "command.log"
        with log.open("w") as output:  # a pipe would be kept open by the server
            done = subprocess.run(
                command, cwd=folder, stdout=output, stderr=output, timeout=60, check=False, **user
            )
        assert done.returncode == 0, log.read_text()

    data, settings = str(folder / "data"), f"-k {folder} -c listen_addresses= -c fsync=off"
    try:
        run(str(programs / "initdb"), "-D", data, "-U", "expt", "-A", "trust", "--no-sync")
        run(
            str(programs / "pg_ctl"), "-D", data, "-o", settings, "-l", str(folder / "server.log"),
            "-w", "start",
        )  # fmt: skip
        yield f"postgresql://expt@/postgres?host={folder}"
    finally:
        with contextlib.suppress(AssertionError):
            run(str(programs / "pg_ctl"), "-D", data, "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def test_two_workers_do_every_trial_once(server: str, tmp_path: Path, forked: Any) -> None:
    workers = [forked.start(server, str(tmp_path), str(seed), run=be_worker) for seed in (0, 1)]
    while any(worker.poll() is None for worker in workers):
        # One that failed would be waited for by the other for ever.
        if any(worker.poll() for worker in workers):
            break
        time.sleep(0.05)
    said = "\n".join(map(forked.said, workers))
    assert [worker.poll() for worker in workers] == [0, 0], said

    storage = open_storage(server)
    assert isinstance(storage, optuna.storages.RDBStorage)
    trials = optuna.load_study(study_name="shared", storage=storage).trials
    storage.remove_session()
    storage.engine.dispose()
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert all(trial.state.is_finished() for trial in trials)
    trained = {path.parent.name: path.read_text().split() for path in tmp_path.rglob("trained.log")}
    started = [trial for trial in trials if trial.user_attrs.get(STARTED)]
    assert sorted(trained) == [f"trial_{trial.number:03d}" for trial in started]
    assert all(len(by) == 1 for by in trained.values()), "nobody does another's trial again"
    assert len(trained) == N_TRIALS
    assert len({tuple(sorted(trial.params.items())) for trial in started}) == N_TRIALS
    kinds = Counter(trial.user_attrs[KIND] for trial in trials)
    assert kinds["completed"] == N_TRIALS
    assert set(kinds) <= {"completed", "predicted_over", "duplicate"}
    shares = Counter(trial.user_attrs[WORKER]["pid"] for trial in started)
    assert len(shares) == 2, "both worked"
    assert {str(pid) for pid in shares} == {by[0] for by in trained.values()}
