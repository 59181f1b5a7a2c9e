"""``-m search=NAME`` from the command line: what is refused, and one real search of seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import optuna
import pytest
from matplotlib.image import imread
from omegaconf import OmegaConf
from optuna.distributions import FloatDistribution
from optuna.trial import create_trial

from expt.commands.search import Request, _conclude, _draw, _parameters, _runner
from expt.config.search_node import SearchConfig
from expt.errors import UserError
from expt.job import Metric
from expt.locks import Lock
from expt.result import Outcome, load_result
from expt.run import server
from expt.search.metric import ATTRIBUTE
from expt.search.reservation import LOCK_NAME
from expt.search.space import Space
from expt.search.study import claim
from expt.search.trial import KIND
from expt.search.winner import SweepSummary
from expt.units import MIB
from hydra_plugins.expt_sweeper.sweeper import ExptSweeper

SEARCH = ("-m", "search=debug", "tracking=none")
LONG = "outputs/sweeps/debug/debug_retrained"


@pytest.mark.parametrize(
    ("lines", "code", "messages"),
    [
        (["search.n_trials=0"], 2, ["search.n_trials must be at least 1, got 0"]),
        (["search.n_trials=-4"], 2, ["search.n_trials must be at least 1, got -4"]),
        (
            ["+search.space.model.embed_dimm=1"], 2, ["search.space"],
        ),
        (
            ["model.embed_dim=8", "model.dropout=0", "optimizer.lr=0.1", "data.batch_size=4",
             "memory.activation_checkpointing=false"], 2, ["search.space is empty"],
        ),
        (["search.storage=nonsense"], 2, ["search.storage=nonsense is neither a URL"]),
        (["search.storage=postgresql+x://h/d"], 2, ["neither a URL"]),
        (["model.dropout=interval(0,0.3)", "trainer.epochs=0"], 2, ["trainer.epochs must be"]),
        (["memory.budget=-1"], 2, ["memory.budget"]),
        (["search.presets=[huge]"], 2, ["search.presets: 'huge' is no preset", "full"]),
        (["search.pruner=median", "search.repeats=2"], 2, ["search.pruner=median would compare"]),
        (["trainer.resume=true"], 2, ["a search goes on by itself"]),
        (["task=plan"], 2, ["search=… trains"]),
        (["optimizer.lrr=interval(0.1,0.2)"], 2, ["optimizer.lrr", "did you mean 'lr'"]),
        (["memory.gradient_accumulation=interval(1.0,4.0)"], 2, ["gradient_accumulation"]),
        (["memory.precision=choice(fp32,fp8)"], 2, ["memory.precision=fp8", "bf16"]),
        (["model.embed_dim=choice(8,wide)"], 2, ["model.embed_dim='wide': expected int"]),
        (["trainer.nothing=range(1,3)"], 2, ["trainer.nothing"]),
        (["hydra/sweeper/sampler=grid"], 2, ["infinitely many values", "model.dropout"]),
        (["search=debug2"], 2, ["debug2", "debug"]),
        (["search.enqueue=[{model.embed_dim: 9}]"], 2, ["not in search.space: model.embed_dim=9"]),
        (
            ["search.retrain=1", "search.retrain_with=['trainer.epochs=0']"],
            2, ["search.retrain_with: trainer.epochs must be at least 1"],
        ),
        (
            ["search.retrain=1", "search.retrain_with=['trainer.epoch=9']"],
            2, ["search.retrain_with: Key 'epoch' not in"],
        ),
        (
            ["search.retrain=1", "search.retrain_with=['data.path=nowhere.npz']"],
            2, ["search.retrain_with: there is no data set of these settings", "nowhere.npz"],
        ),
        (
            ["search.retrain=1", "search.retrain_with=['search.study=debug']"],
            2, ["search.retrain_with: search.study=debug is the search's own"],
        ),
        (
            ["model.dropout=0", "optimizer.lr=0.1", "data.batch_size=4",
             "model.embed_dim=choice(4,8)", "memory.activation_checkpointing=false",
             "search.retrain=1",
             "search.retrain_with=['model.embed_dim=16']"],
            2, ["search.retrain_with: it sets all of search.space"],
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_one_message_before_anything_is_started(expt, home, lines, code, messages):
    names = {line.partition("=")[0] for line in lines}
    given = [line for line in SEARCH if line.partition("=")[0] not in names]
    found, _, err = expt(*given, *lines, small=False)
    assert found == code, err
    for message in messages:
        assert message in err
    assert "Traceback" not in err
    assert err.count("search.retrain_with: ") <= 1
    assert not list(home.rglob("trial_*"))


def test_a_refusal_leaves_no_process_behind_that_holds_the_output(home):
    """The server would import for seconds more, and a pipe at our output end with it."""
    given = [sys.executable, "-m", "expt", *SEARCH, "search.n_trials=0"]
    with subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as refused:
        assert refused.wait(60) == 2
        since = time.monotonic()
        said = refused.stdout.read()
        assert time.monotonic() - since < 0.5
    assert b"search.n_trials must be at least 1" in said


@pytest.mark.parametrize("began", [True, False])
def test_a_refusal_ends_the_server_that_the_search_began_and_no_other(monkeypatch, began):
    def refuse(*arguments: object) -> None:
        raise UserError("no")

    ended: list[bool] = []
    monkeypatch.setattr(server, "start_server", lambda modules: began)
    monkeypatch.setattr(server, "stop_server", lambda: ended.append(True))
    monkeypatch.setattr("expt.commands.search.search", refuse)
    sweeper = ExptSweeper(sampler=None)
    config = OmegaConf.create({"tracking": {"uri": None}})
    sweeper.setup(hydra_context=object(), task_function=print, config=config)
    with pytest.raises(UserError, match="no"):
        sweeper.sweep([])
    assert ended == [True] * began


def test_a_search_without_m_is_refused(expt, home):
    code, _, err = expt("search=debug", "tracking=none", small=False)
    assert code == 2
    assert "python -m expt -m search=NAME" in err
    assert not (home / "outputs/runs").exists() or not list((home / "outputs/runs").rglob("*.json"))


def test_a_sweeper_of_another_kind_is_refused(expt, home):
    code, _, err = expt(*SEARCH, "hydra/sweeper=basic", small=False)
    assert code == 2
    assert "-m search=NAME" in err


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """Run a search of three trials, once for all tests of this file that look at one."""
    import os

    from expt.config.command_line import run_command

    home = tmp_path_factory.mktemp("searched")
    before = os.getcwd()
    os.chdir(home)
    try:
        code = run_command(
            ["-m", "search=debug", "memory.budget=45MiB", "search.n_trials=3", "search.seed=1",
             "model.num_stages=1", "model.num_heads=2",
             "model.embed_dim=choice(8,16,48,64)", "data.batch_size=choice(2,4,16,64)"]
        )  # fmt: skip
    finally:
        os.chdir(before)
    return home, code


def test_a_search_trains_what_fits_and_tests_the_best_once(searched):
    home, code = searched
    assert code == 0
    folder = home / "outputs/sweeps/debug"
    summary = SweepSummary.load(folder)
    assert (summary.finished, summary.failed, summary.running) == (3, 0, 0)
    assert summary.budget_bytes == 45 * 1024**2
    assert summary.best["peak_allocated_bytes"] <= summary.budget_bytes
    assert summary.best["test/mae"] > 0
    tested = []
    for trial in sorted(folder.glob("trial_*/result.json")):
        result = load_result(trial.parent)
        assert result.status == "completed"
        assert result.memory["predicted_peak_bytes"] > 0, "the plan was handed on"
        assert abs(result.memory["prediction_error"]) < 0.1
        tested += [trial.parent.name] if result.metrics["test/mae"] is not None else []
    assert tested == [f"trial_{summary.best['trial']:03d}"]
    assert (folder / "plots/trade_off.png").exists()


def test_a_trial_is_planned_once(searched):
    home, _ = searched
    for plan in home.rglob("trial_*/plan.json"):
        log = (plan.parent / "output.log").read_text()
        peak = json.loads(plan.read_text())["peak_bytes"] / 1024**2
        assert f"predicted peak: {peak:.1f} MiB" in log


def test_study_and_tracker_agree_trial_by_trial(searched):
    from mlflow import MlflowClient

    home, _ = searched
    study = optuna.load_study(study_name="debug", storage=f"sqlite:///{home}/outputs/optuna.db")
    client = MlflowClient(f"sqlite:///{home}/outputs/mlflow.db")
    experiment = client.get_experiment_by_name("expt")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if run.data.tags.get("kind") == "search"]
    assert len(parents) == 1
    children = {
        run.data.tags["trial.number"]: run for run in runs if "trial.number" in run.data.tags
    }
    assert len(children) == len(runs) - 1 == len(study.trials)
    statuses = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}
    for trial in study.trials:
        run = children[str(trial.number)]
        assert run.info.status == statuses[trial.state.name]
        assert run.data.tags["trial.kind"] == trial.user_attrs[KIND]
        assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        if trial.state.name == "COMPLETE":
            assert run.data.metrics["best/val/mae"] == pytest.approx(trial.value)


def test_starting_it_again_does_what_is_left_and_no_more(searched, expt, monkeypatch):
    import os

    home, _ = searched
    os.chdir(home)  # the fixture of `expt` brings us back
    lines = [
        "-m", "search=debug", "memory.budget=45MiB", "search.n_trials=3", "search.seed=1",
        "model.num_stages=1", "model.num_heads=2",
        "model.embed_dim=choice(8,16,48,64)", "data.batch_size=choice(2,4,16,64)",
    ]  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in home.rglob("trial_*/result.json")}
    free = []

    def page(runs, folder, command):
        lock = Lock(folder / LOCK_NAME)
        free.append(lock.acquire(wait=False))
        lock.release()

    monkeypatch.setattr("expt.commands.search.write_page", page)
    code, out, err = expt(*lines, small=False)
    assert code == 0, err
    assert free == [True], "other workers do not wait for the page"
    assert "3 of 3 trials trained" in out
    again = next(line for line in out.splitlines() if line.startswith("again: "))
    assert "memory.budget=45MiB" in again
    assert "memory.on_overflow=train" in again, "every trial was measured, whatever was predicted"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    code, _, err = expt(*lines, "model.dropout=interval(0.0,0.2)", small=False)
    assert code == 2
    assert "was begun with another space: model.dropout differs" in err
    code, _, err = expt(
        *[x for x in lines if "budget" not in x], "memory.budget=46MiB", small=False
    )
    assert code == 2
    assert "memory.budget=45MiB, not 46MiB" in err
    code, _, err = expt(*lines, "trainer.epochs=3", "optimizer=sgd", small=False)
    assert code == 2, "the trials of another training cannot be compared with these"
    assert "another setting: " in err
    assert "trainer.epochs" in err
    assert "optimizer._target_" in err
    code, _, err = expt(*lines, "trainer.progress=true", "trainer.device=cpu", small=False)
    assert code == 0, err


def test_a_search_starts_from_an_earlier_one(searched, expt):
    home, _ = searched
    os.chdir(home)  # the fixture of `expt` brings us back
    lines = [
        "-m", "search=debug", "search.study=second", "memory.budget=44MiB", "search.n_trials=1",
        "model.num_stages=1", "model.num_heads=2", "search.n_jobs=auto", "tracking=none",
        "model.embed_dim=choice(8,16,48,64)", "data.batch_size=choice(2,4,16,64)",
        "search.presets=[]", "search.test_winner=false",
    ]  # fmt: skip
    code, _, err = expt(*lines, "search.warm_start=debg", small=False)
    assert code == 2
    assert "search.warm_start=debg: there is no such study" in err
    assert "did you mean 'debug'" in err
    assert not (home / "outputs/sweeps/second/sweep.json").exists()
    code, out, err = expt(*lines, "search.warm_start=debug", small=False)
    assert code == 0, err
    assert "warm start from debug: the sampler knows " in out
    first, second = (SweepSummary.load(home / f"outputs/sweeps/{n}") for n in ("debug", "second"))
    assert second.finished == 1, "what was shown is none of its own trials"
    assert second.best["params"] == first.best["params"], "the best that fits is trained first"
    assert second.best["trial"] > 0
    page = (home / "outputs/sweeps/second/report.html").read_text()
    assert page.count("<tr") == 2, "a head and one run"


def test_points_are_made_to_fit_and_the_winner_says_how(expt, home):
    code, out, err = expt(
        *SEARCH, "memory.budget=16MiB", "memory.on_overflow=adapt", "search.n_trials=1",
        "model.num_stages=1", "model.num_heads=2", "model.embed_dim=8",
        "data.batch_size=choice(16,17)", "memory.activation_checkpointing=false",
        "search.presets=[]", small=False,
    )  # fmt: skip
    assert code == 0, err
    assert "0 that would not fit" in out
    best = SweepSummary.load(home / "outputs/sweeps/debug").best
    assert best["peak_allocated_bytes"] <= 16 * 1024**2
    assert best["test/mae"] > 0, "it is tested with them too"
    parts = best["techniques"]["memory.gradient_accumulation"]
    assert parts > 1
    again = next(line for line in out.splitlines() if line.startswith("again: "))
    assert f"memory.gradient_accumulation={parts}" in again
    trained = ["memory.on_overflow=train", "memory.fallback=none", "memory.budget=16MiB"]
    assert [
        word
        for word in again.split()
        if word.rpartition("=")[0] in ("memory.on_overflow", "memory.fallback", "memory.budget")
    ] == trained, "as every trial was"
    log = (home / f"outputs/sweeps/debug/trial_{best['trial']:03d}/output.log").read_text()
    assert "predicted peak: " in log


def test_a_budget_under_which_nothing_fits_ends_with_what_would(expt, home):
    code, out, err = expt(
        *SEARCH, "memory.budget=5MiB", "model=stid", "optimizer.lr=0.001",
        "model.dropout=0.1", "data.batch_size=2", "memory.activation_checkpointing=false",
        "model.embed_dim=choice(32,48)", "search.presets=[]", small=False,
    )  # fmt: skip
    assert code == 1
    assert "Traceback" not in err
    assert "the smallest peak seen is" in err
    assert "with model.embed_dim=32" in err
    assert "What would fit: " in err
    assert "memory.budget=" in err
    assert SweepSummary.load(home / "outputs/sweeps/debug").best is None
    assert "all 2 points of the space were tried" in out


def test_ctrl_c_before_anything_fitted_says_the_smallest_peak(expt, home, monkeypatch):
    from expt.search.candidates import TrialJobs
    from expt.search.trial import Prediction

    def predict(self, lines):
        if "search.trial=1" in lines:
            os.kill(os.getpid(), signal.SIGINT)
        peak = 20 * 1024**2 if "search.trial=0" in lines else 30 * 1024**2
        return Prediction(peak, peak, (peak, peak), {"peak_bytes": peak})

    monkeypatch.setattr(TrialJobs, "predict", predict)
    code, out, err = expt(
        *SEARCH, "memory.budget=5MiB", "model.embed_dim=choice(8,32,48)", "search.presets=[]",
        small=False,
    )  # fmt: skip
    assert code == 130, err
    assert "nothing fits so far: the smallest peak seen is 20.0 MiB, with " in out


def test_a_preset_that_the_settings_do_not_allow_is_one_message(expt, home, monkeypatch):
    from expt.run.process import Worker, WorkerError

    call = Worker.call

    def fail(self, function, *arguments, seconds):
        if function.__name__ == "preset_values":
            raise WorkerError("InterpolationResolutionError: KeyError 'minimal'")
        return call(self, function, *arguments, seconds=seconds)

    monkeypatch.setattr(Worker, "call", fail)
    code, _, err = expt(*SEARCH, small=False)
    assert code == 2
    assert "search.presets: minimal does not go with these settings" in err


def test_a_mistake_in_the_first_points_leaves_no_study_behind(expt, home):
    code, _, _ = expt(*SEARCH, "search.enqueue=[{model.embed_dim: 9}]", small=False)
    assert code == 2
    assert optuna.get_all_study_names(f"sqlite:///{home}/outputs/optuna.db") == []


def test_a_storage_that_dies_is_one_line_and_leaves_no_run_open(expt, home, monkeypatch):
    from sqlalchemy.exc import OperationalError

    from expt.search.loop import Search
    from expt.search.records import Records

    def fail(*arguments, **settings):
        raise OperationalError("select", {}, Exception("server closed the connection"))

    def die(search, interruption):
        monkeypatch.setattr(search.study, "get_trials", fail)
        fail()

    closed = []
    monkeypatch.setattr(Search, "_loop", die)
    monkeypatch.setattr(Records, "close", lambda self, status, summary: closed.append(status))
    code, _, err = expt(*SEARCH, "search.presets=[]", small=False)
    assert code == 1
    assert "does not answer any more" in err
    assert "Start the same command again" in err
    assert closed == ["FAILED"]


def test_what_is_recorded_and_shown_of_a_search_holds_no_password(tmp_path, capsys) -> None:
    node = SearchConfig(study="s")
    lines = ["search.storage=postgresql://me:geheim@h/d", "tracking.uri=http://me:geheim@h"]
    request = Request(node, OmegaConf.create(), lines, {"x": "range(0,3)"}, None, tmp_path, {})
    space = Space.parse(request.space, lambda points: None)
    recorded = _parameters(request, space, "TPESampler", None)
    assert recorded["overrides"] == (
        "search.storage=postgresql://me:***@h/d tracking.uri=http://me:***@h"
    )
    best = {"trial": 1, "val/mae": 4.0, "peak_allocated_bytes": 1, "params": {"x": 2}}
    _conclude(SweepSummary("s", 1, best=best), request, space)
    assert "again: " in (said := capsys.readouterr().out)
    assert "geheim" not in said


def test_a_winner_that_cannot_be_tested_is_an_error_with_all_files_written(expt, home, monkeypatch):
    """Its trial is the best all the same: sweep.json says so, and the exit code is 1."""
    from expt.search.runner import ProcessTrial
    from expt.search.trial import TrialOutcome

    poll = ProcessTrial.poll

    def crash_in_test(self):
        found = poll(self)
        return (
            TrialOutcome(Outcome.failed, error="a bad lens") if found and self.job.test else found
        )

    monkeypatch.setattr(ProcessTrial, "poll", crash_in_test)
    line = (*SEARCH, "search.n_trials=1", "search.presets=[]", "model=stid", "model.embed_dim=8")
    code, out, err = expt(*line, small=False)
    assert code == 1, err
    assert "error: the best trial, 0, could not be tested: failed (a bad lens)" in err
    assert "Traceback" not in err
    assert "again: python -m expt" in out
    summary = SweepSummary.load(home / "outputs/sweeps/debug")
    assert summary.best["trial"] == 0 and "test/mae" not in summary.best
    monkeypatch.setattr(ProcessTrial, "poll", poll)
    code, out, err = expt(*line, small=False)
    assert code == 0, err
    assert SweepSummary.load(home / "outputs/sweeps/debug").best["test/mae"] > 0


def test_the_best_are_trained_again_for_longer_and_one_of_these_is_tested(expt, home):
    again = "search.retrain_with=['trainer.epochs=3','optimizer.lr=2e-3']"
    line = (*SEARCH, "search.n_trials=2", "model=stid", "model.embed_dim=8", "search.retrain=1",
            "memory.precision=choice(bf16,fp32)", again)  # fmt: skip
    code, out, err = expt(*line, small=False)
    assert code == 0, err
    short, long = map(SweepSummary.load, (home / "outputs/sweeps/debug", home / LONG))
    other = 0 if short.best["trial"] else 1  # the preset, trial 0, is trained again in any case
    also = " and 1 preset" if other == 0 else ""
    assert f"the best 1 of debug{also} again with trainer.epochs=3 optimizer.lr=2e-3" in out
    assert long.finished == 1 + (other == 0)
    assert "optimizer.lr" in short.best["params"] and "optimizer.lr" not in long.best["params"]
    assert load_result(home / LONG / "trial_000").epochs == 3
    assert "test/mae" not in short.best and long.best["test/mae"] > 0
    assert "optimizer.lr=2e-3" in out.rpartition("again: ")[2]
    code, out, _ = expt(*line, small=False)
    assert code == 0 and "trial 0:" not in out, "all of it was done"
    code, _, err = expt(*line[:-1], again.replace("=3", "=4"), "search.n_trials=3", small=False)
    assert code == 2 and "was begun with another setting: trainer.epochs differs" in err
    assert not (home / "outputs/sweeps/debug/trial_002").exists(), "told before a trial"


def test_a_search_whose_retraining_is_another_study_is_not_begun(expt, home):
    (home / "outputs").mkdir()
    storage = f"sqlite:///{home}/outputs/optuna.db"
    claim(optuna.create_study(study_name="other", storage=storage), home / "elsewhere")
    taken = ("search.retrain=1", "search.retrain_with=['search.study=other']")
    code, _, err = expt(*SEARCH, "model=stid", *taken, small=False)
    assert code == 2 and "search.retrain_with: " in err and "other" in err
    assert optuna.get_all_study_names(storage) == ["other"], "or it would be begun with this"


@pytest.mark.parametrize("seconds", [None, 60.0])
def test_a_limit_that_a_launcher_does_not_keep_is_said(tmp_path, monkeypatch, capsys, seconds):
    from hydra.core.plugins import Plugins

    class Launchers:
        def instantiate_launcher(self, **settings):
            return None

    monkeypatch.setattr(Plugins, "instance", Launchers)
    launcher = {"launcher": {"_target_": "x.RayLauncher"}, "sweep": {"dir": "there"}}
    hydra = {**launcher, "runtime": {"choices": {"hydra/launcher": "ray"}}}
    node = SearchConfig(trial_time_limit_seconds=seconds)
    request = Request(node, OmegaConf.create(), [], {}, None, tmp_path, {})
    _runner(request, OmegaConf.create({"hydra": hydra}), None, None)
    said = "over hydra/launcher=ray search.trial_time_limit_seconds ends nothing"
    assert (said in capsys.readouterr().out) == (seconds is not None)


def study_of(count, metric):
    study = optuna.create_study(study_name="mine", direction=metric.direction)
    study.set_user_attr(ATTRIBUTE, metric.as_dict())
    for number in range(count):
        peak = (20 + 7 * (number * 5 % 11)) * MIB
        study.add_trial(
            create_trial(
                params={"x": 0.5},
                distributions={"x": FloatDistribution(0, 1)},
                value=0.3 + 20 * MIB / peak / 9 + (number % 3) * 0.02,
                user_attrs={KIND: "completed", "peak_bytes": peak, "demand_bytes": peak},
                constraints={"peak_memory": (peak - 80 * MIB) / 1024**3},
            )
        )
    return study


@pytest.mark.parametrize("metric", [Metric("mae", unit="mph"), Metric("accuracy", goal="max")])
@pytest.mark.parametrize("budget", [80 * MIB, None])
def test_a_search_is_drawn_as_a_report_would(tmp_path, metric, budget):
    _draw(study_of(12, metric), budget, tmp_path)
    for name in ("trade_off", "progress"):
        picture = imread(tmp_path / f"plots/{name}.png")
        assert picture.std() > 0.05, "it is not blank"


def test_of_one_trial_there_is_no_progress_and_of_none_nothing_to_draw(tmp_path):
    _draw(study_of(0, Metric("mae")), None, tmp_path)
    assert not (tmp_path / "plots").exists()
    _draw(study_of(1, Metric("mae")), None, tmp_path)
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {"trade_off"}


def test_the_page_has_the_study_also_where_its_password_is_not_written_down(tmp_path, capsys):
    hidden = "postgresql://me:***@no.such.host/d"
    SweepSummary("mine", 12, storage=hidden).save(tmp_path)
    _draw(study_of(12, Metric("mae")), 80 * MIB, tmp_path, whole_page=True)
    assert capsys.readouterr().out == f"page: {tmp_path / 'report.html'}\n"
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["study"], report["runs"]) == ("mine", 12)
    assert "cannot be read" not in " ".join(report["not_shown"])
