"""`task=expand` from its command line, with probes that a table answers, and once for real."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from expt.commands.expand import probe as module
from expt.memory.planning.predict import Plan
from expt.result import RunResult, load_launch
from expt.run.process import Ended

MIB = 2**20
STID = (
    "task=expand", "model=stid", "trainer.device=cpu", "hydra.run.dir=run", "expand.probe_steps=4",
)  # fmt: skip
STEPS = "expand.steps=['model.embed_dim=48','data.batch_size=8']"


class Processes:
    """Takes the place of processes: writes the result that a test wants, by the last change."""

    def __init__(self) -> None:
        self.lines: list[list[str]] = []
        self.errors = {"start": 5.0, "model.embed_dim=48": 4.0, "data.batch_size=8": 4.5}
        self.endings: dict[str, Ended] = {}
        self.statuses: dict[str, tuple[str, str]] = {}

    def __call__(self, lines, log: Path, time_limit_seconds, stopped) -> Ended:
        self.lines.append(list(lines))
        last = next((c for c in reversed(list(self.errors)) if c in lines), "start")
        folder = Path(re.search(r'hydra\.run\.dir="(.*)"', "\n".join(lines))[1])
        folder.mkdir(parents=True, exist_ok=True)
        overrides = [line for line in lines if not line.startswith(("hydra.", "--", "trainer.res"))]
        launch = {"overrides": overrides, "cwd": "/", "config_dir": None}
        (folder / "launch.json").write_text(json.dumps(launch))
        log.write_text(f"error: what {last} said\n")
        if last in self.endings:
            return self.endings[last]
        status, reason = self.statuses.get(last, ("completed", "epochs"))
        result = RunResult(status, reason, seconds=2.0, parameters=7)  # type: ignore[arg-type]
        result.metrics["val/mae"] = self.errors[last]
        result.memory |= {"peak_allocated_bytes": 10 * MIB}
        result.save(folder)
        return Ended(result.exit_code, 2.0)


@pytest.fixture
def processes(monkeypatch) -> Processes:
    processes = Processes()
    monkeypatch.setattr(module, "run_apart", processes)
    return processes


@pytest.fixture
def quick(processes, monkeypatch) -> Processes:
    """The same, and peaks are predicted and drawn in no time."""

    def made_up(*arguments: object) -> Plan:
        return Plan("cpu", MIB, None, (MIB, MIB), "forward", {}, {}, {}, "trace", 0.0)

    monkeypatch.setattr(module, "plan_training", made_up)
    monkeypatch.setattr("expt.commands.expand.command.plot_expansion", lambda *arguments: [])
    return processes


def written(home: Path) -> dict:
    record: dict = json.loads((home / "run/expand.json").read_text())
    return record


def test_steps_are_run_on_top_of_what_was_kept(expt, home, processes, drawn) -> None:
    code, out, err = expt(*STID, STEPS)
    assert code == 0, err
    record = written(home)
    assert [step["kept"] for step in record["steps"]] == [True, True, False]
    assert [step["value"] for step in record["steps"]] == [
        5.0,
        4.0,
        4.5,
    ]
    assert record["finished"] and record["kept"] == ["model.embed_dim=48"]
    assert record["command"].startswith("python -m expt +memory=minimal ")
    assert record["command"].endswith(" model.embed_dim=48")
    assert "task=expand" not in record["command"] and "expand." not in record["command"]
    assert record["command"] in out
    for step in record["steps"]:
        assert 0 < step["predicted_peak_bytes"] < 100 * MIB
    first, second, third = processes.lines
    for line in (
        "task=train", "trainer.epochs=2", "trainer.steps_per_epoch=4", "memory.recover=false",
        "memory.on_overflow=train", "trainer.test=false", f'tracking.parent="{home}/run"',
    ):  # fmt: skip
        assert line in first and line in third
    assert "model.embed_dim=48" in second and "model.embed_dim=48" in third
    assert 'hydra.run.dir="' + str(home / "run/step_02") + '"' in third
    assert "model.embed_dim=48 | yes" in (home / "run/expand.md").read_text()
    assert (home / "run/plots/expansion.png").stat().st_size > 10_000


def test_what_is_predicted_over_the_budget_is_not_run(expt, home, processes) -> None:
    steps = "expand.steps=['model.embed_dim=2048','data.batch_size=8']"
    code, out, err = expt(*STID, steps, "memory.budget=40MiB")
    assert code == 0, err
    start, wide, batch = written(home)["steps"]
    assert (wide["outcome"], wide["kept"]) == ("predicted_over", False)
    assert wide["predicted_peak_bytes"] > 40 * MIB
    assert len(processes.lines) == 2
    assert not any("model.embed_dim=2048" in lines for lines in processes.lines)
    assert batch["kept"] and start["kept"]
    assert "inside 40.0 MiB" in out


@pytest.mark.parametrize(
    ("ending", "status", "outcome", "reason"),
    [
        (None, ("failed", "out_of_memory"), "out_of_memory", "ran out of memory"),
        (None, ("failed", "non_finite_loss"), "diverged", "diverged"),
        (Ended(-9, 1.0), None, "failed", "SIGKILL"),
        (Ended(-11, 1.0), None, "failed", "SIGSEGV"),
        (Ended(2, 1.0), None, "refused", "what model.embed_dim=48 said"),
        (Ended(-15, 9.0, timed_out=True), None, "timeout", "time limit"),
    ],
)
def test_what_ends_a_probe_costs_that_step_only(
    expt, home, quick, ending, status, outcome, reason
) -> None:
    if ending:
        quick.endings["model.embed_dim=48"] = ending
    if status:
        quick.statuses["model.embed_dim=48"] = status
    code, _, err = expt(*STID, STEPS)
    assert code == 0, err
    start, wide, batch = written(home)["steps"]
    assert (wide["outcome"], wide["kept"], wide["value"]) == (outcome, False, None)
    assert reason in wide["reason"]
    assert start["kept"] and batch["kept"]
    assert "model.embed_dim=48" not in batch["changes"]


def test_it_goes_on_where_it_was_stopped_and_repeats_nothing(expt, home, quick) -> None:
    assert expt(*STID, STEPS)[0] == 0
    stored = written(home)
    stored["steps"].pop()  # killed before this one was told
    stored["finished"] = False
    (home / "run/expand.json").write_text(json.dumps(stored))
    quick.lines.clear()
    code, _, err = expt(f"trainer.resume={home}/run", small=False)
    assert code == 0, err
    (lines,) = quick.lines
    assert "data.batch_size=8" in lines and lines[-1] == "trainer.resume=true", "in its folder"
    assert len(written(home)["steps"]) == 3
    assert not (home / "run/step_02_2").exists()


def test_other_probes_are_run_again_beside_the_earlier(expt, home, quick) -> None:
    assert expt(*STID, STEPS)[0] == 0
    quick.lines.clear()
    assert expt(f"trainer.resume={home}/run", "expand.probe_steps=5", small=False)[0] == 0
    assert len(quick.lines) == 3
    assert load_launch(home / "run/step_01") != load_launch(home / "run/step_01_2")
    quick.lines.clear()
    assert expt(f"trainer.resume={home}/run", "expand.probe_steps=5", small=False)[0] == 0
    assert quick.lines == []


def test_a_password_is_written_nowhere_and_may_change(expt, home, quick) -> None:
    def tracked(word: str) -> tuple[str, str]:
        return "tracking=mlflow", f"tracking.uri=http://me:{word}@127.0.0.1:9"

    code, out, err = expt(*STID, STEPS, *tracked("geheim"))
    assert code == 0, err
    record = written(home)
    assert "http://me:***@127.0.0.1:9" in record["command"]
    assert "tracking.uri=http://me:***@127.0.0.1:9" in record["probe"]
    assert "geheim" not in out + err
    holding = {path.name for path in home.rglob("*") if path.is_file() and ".hydra" not in
               path.parts and b"geheim" in path.read_bytes()}  # fmt: skip
    assert holding == {"launch.json"}
    quick.lines.clear()
    code, _, err = expt(f"trainer.resume={home}/run", tracked("another")[1], small=False)
    assert code == 0, err
    assert quick.lines == [], "the probes are the same"


@pytest.mark.parametrize("stored", ["[1]", '{"steps": [{}]}', '{"steps": [3]}', '"text"', "{}"])
def test_a_record_of_another_version_is_one_message(expt, home, quick, stored) -> None:
    assert expt(*STID, STEPS)[0] == 0
    (home / "run/expand.json").write_text(stored)
    code, _, err = expt(f"trainer.resume={home}/run", small=False)
    assert code == 2
    assert "run/expand.json is not of this version" in err and "Traceback" not in err
    assert (home / "run/expand.json").read_text() == stored


def test_tolerance_is_judged_anew_without_running_again(expt, home, quick) -> None:
    assert expt(*STID, STEPS)[0] == 0
    quick.lines.clear()
    assert expt(f"trainer.resume={home}/run", "expand.tolerance=0.2", small=False)[0] == 0
    assert written(home)["kept"] == ["model.embed_dim=48", "data.batch_size=8"]
    assert quick.lines == []


def test_a_starting_point_that_does_not_fit_ends_it(expt, home, processes) -> None:
    code, out, err = expt(*STID, STEPS, "memory.budget=1MiB")
    assert code == 1, err
    assert "the starting point itself cannot be kept: not run: predicted" in out
    assert written(home)["command"] is None
    assert processes.lines == []


def test_shipped_steps_that_are_of_another_model_are_skipped_with_a_line(expt, home, quick) -> None:
    code, out, err = expt(*STID)
    assert code == 0, err
    assert "skipped: model.num_stages=3: there is no 'num_stages'" in out
    changes = [step["change"] for step in written(home)["steps"]]
    assert changes == [None, "model.embed_dim=96", "data.batch_size=24", "data.batch_size=32"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("expand.steps=[]",), "expand.steps is empty"),
        (("expand.steps=['model.wdith=3']",), "expand.steps: model.wdith=3: there is no 'wdith'"),
        ((STEPS, "expand.tolerance=-1"), "expand.tolerance must not be negative"),
        ((STEPS, "expand.probe_epochs=0"), "expand.probe_epochs must be at least 1"),
        ((STEPS, "expand.probe_time_limit_seconds=0"), "must be a positive number"),
    ],
)
def test_mistakes_are_one_message_and_leave_nothing(expt, home, quick, arguments, words) -> None:
    code, _, err = expt(*STID, *arguments)
    assert code == 2
    assert words in err
    assert "Traceback" not in err
    assert not (home / "run").exists()
    assert quick.lines == []


MY_LAB = """
from torch import nn


class MyNet(nn.Module):
    def __init__(self, num_sensors: int, input_steps: int, horizon: int, width: int = 8):
        super().__init__()
        self.layer = nn.Linear(input_steps, horizon)

    def forward(self, speed, observed, time_of_day, day_of_week):
        return self.layer(speed.transpose(1, 2)).transpose(1, 2)
"""


def test_a_model_of_ones_own_without_a_file(expt, home, quick, monkeypatch) -> None:
    (home / "my_lab.py").write_text(MY_LAB)
    monkeypatch.syspath_prepend(str(home))
    quick.errors |= {"model.width=16": 4.0}
    code, _, err = expt(
        "task=expand", "model._target_=my_lab.MyNet", "+model.width=4", "trainer.device=cpu",
        "hydra.run.dir=run", "expand.steps=['model.width=16']",
    )  # fmt: skip
    assert code == 0, err
    assert [step["kept"] for step in written(home)["steps"]] == [True, True]
    assert " +model.width=16" in written(home)["command"], "as it was added"


def test_the_command_names_ones_own_yaml_files(expt, home, quick) -> None:
    (home / "conf/model").mkdir(parents=True)
    (home / "conf/model/mine.yaml").write_text("_target_: expt.jobs.traffic.stid.STID\n")
    code, _, err = expt(
        f"--config-dir={home}/conf", "task=expand", "model=mine", "hydra.run.dir=run",
        "trainer.device=cpu", "expand.steps=['data.batch_size=8']",
    )  # fmt: skip
    assert code == 0, err
    assert written(home)["command"].startswith(f"python -m expt --config-dir={home}/conf ")


def test_steps_that_contradict_each_other_cost_the_later_one(expt, home, quick) -> None:
    quick.errors = {"start": 5.0, "+optimizer.amsgrad=true": 4.0}
    steps = "expand.steps=['+optimizer.amsgrad=true','+optimizer.amsgrad=false']"
    code, _, err = expt(*STID, steps)
    assert code == 0, err
    start, first, second = written(home)["steps"]
    assert start["kept"] and first["kept"]
    assert (second["outcome"], second["kept"]) == ("refused", False)
    assert "Could not append" in second["reason"]


def test_a_folder_with_an_expansion_is_not_overwritten(expt, home, quick) -> None:
    assert expt(*STID, STEPS)[0] == 0
    before = (home / "run/expand.json").read_text()
    code, _, err = expt(*STID, STEPS)
    assert code == 2
    assert "already holds an expansion" in err
    assert (home / "run/expand.json").read_text() == before


def test_for_real_in_processes_of_their_own(expt, home) -> None:
    code, _, err = expt(
        "task=expand", "model=stid", "hydra.run.dir=run", "expand.probe_epochs=1",
        "expand.probe_steps=2", "expand.steps=['data.batch_size=12']", "expand.tolerance=10",
        "tracking=mlflow", f"tracking.uri=sqlite:///{home}/mlflow.db",
        f"tracking.artifacts={home}/artifacts",
    )  # fmt: skip
    assert code == 0, err
    steps = written(home)["steps"]
    assert [step["outcome"] for step in steps] == ["completed", "completed"]
    for step in steps:
        assert step["peak_allocated_bytes"] == pytest.approx(step["predicted_peak_bytes"], rel=0.05)
    assert steps[1]["peak_allocated_bytes"] != steps[0]["peak_allocated_bytes"]

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("expt").experiment_id])
    (parent,) = [run for run in runs if run.data.tags.get("kind") == "expand"]
    children = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert [run.info.run_id for run in children][::-1] == [step["run_id"] for step in steps]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert "expand.json" in {item.path for item in client.list_artifacts(parent.info.run_id)}
