"""The command line: exit codes and messages for every mistake a user can make."""

from __future__ import annotations

import json
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from expt.__main__ import let_threads_sleep
from expt.config.compose import conf_dir
from expt.result import load_result

SMALL = ("memory=minimal", "debug=smoke", "tracking=none", "trainer.progress=false")
SHIPPED = Path(__file__).parents[1] / "src/expt/jobs/traffic/files/metr_la_29.npz"


def runs(home: Path) -> list[Path]:
    """Every run directory that something was written into."""
    return [path.parent for path in home.rglob("expt.log")]


def test_a_run_ends_with_its_table_and_its_record(expt, home, drawn):
    code, out, _ = expt("model=alternating", "hydra.run.dir=run")  # in its own size
    assert code == 0
    assert "\ndata: 29 sensors, every 5 min, 34,272 steps, 7.75 % missing; windows: 23,974" in out
    assert "test MAE, 60 min" in out
    assert "peak allocated memory" in out
    result = json.loads((home / "run/result.json").read_text())
    assert result["status"] == "completed"
    assert result["stop_reason"] == "epochs"
    assert result["epochs"] == 2
    assert result["preset"] == "minimal"
    assert set(result["metrics"]) == {
        "val/mae",
        "test/mae",
        "test/mae_15min",
        "test/mae_30min",
        "test/mae_60min",
        "test/rmse",
        "test/mape",
    }
    assert all(value > 0 for value in result["metrics"].values())
    assert result["memory"]["peak_allocated_bytes"] > 1_000_000
    assert abs(result["memory"]["prediction_error"]) < 0.02
    assert "ledger" in result["memory"]["meter"]
    assert result["oom_events"] == []
    assert len(result["weights_sha256"]) == 64
    progress = json.loads((home / "run/checkpoints/progress.json").read_text())
    assert (progress["step"], progress["epoch"]) == (8, 2)
    assert progress["val/mae"] >= result["metrics"]["val/mae"] > 0
    for name in ("forecast.png", "horizon.png", "sensors.png", "history.png"):
        picture = (home / "run/plots" / name).read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 10_000, name


def test_the_unit_of_the_data_is_in_table_and_record(expt, home):
    code, out, _ = expt("hydra.run.dir=run", "data.unit=km/h")
    assert code == 0
    assert "km/h" in out and "mph" not in out
    assert load_result(home / "run").unit == "km/h"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["memory=lit"], ["memory=lit", "'lite'"]),
        (["+memory=ful"], ["memory=ful", "'full'"]),
        (["modle=stid"], ["'modle'", "'model'"]),
        (["model=alternatng"], ["alternatng", "'alternating'"]),
        (["data=metr_la_92"], ["metr_la_92", "'metr_la_29'"]),
        (["experiment=prob"], ["prob", "'probe'"]),
        (["debug=smke"], ["smke", "'smoke'"]),
        (["trainer.epoch=3"], ["'epoch'", "'epochs'"]),
        (["+trainer.epoch=3"], ["trainer.epoch", "'epochs'"]),
        (["model.embed_dimm=3"], ["'embed_dimm'", "'embed_dim'"]),
        (["+model.widht=3"], ["widht", "known names"]),
        (["trainer.epochs=abc"], ["trainer.epochs", "abc"]),
        (["model.embed_dim=abc"], ["model.embed_dim", "abc", "int"]),
        (["data.batch_size=1.5"], ["data.batch_size", "1.5"]),
        (["memory.precision=fp15"], ["fp15", "bf16"]),
        (["trainer.device=tpu"], ["tpu", "cuda"]),
        (["trainer.epochs=0"], ["trainer.epochs", "at least 1"]),
        (["data.batch_size=0"], ["data.batch_size", "at least 1"]),
        (["trainer.resume=3"], ["trainer.resume", "3"]),
        (["model.patch_sizes=[5]"], ["model.patch_sizes", "5", "12"]),
        (["model.patch_sizes=[]"], ["model.patch_sizes", "empty"]),
        (["model.embed_dim=30"], ["model.embed_dim=30", "num_heads=4", "28", "32"]),
        (["model.dropout=1.5"], ["model.dropout", "1.5"]),
        (["model._target_=no.such.Net"], ["no.such.Net", "'no'"]),
        (["model._target_=expt.jobs.traffic.stid.STIDD"], ["STIDD", "'STID'"]),
        (["data.test_fraction=0.5"], ["data.test_fraction", "0.5"]),
        (["lite"], ["'lite'", "key=value"]),
        (["task=trian"], ["trian", "'train'"]),
        (["trainer.resume=nowhere"], ["nowhere", "no run"]),
        (["data.path=missing.npz"], ["missing.npz", "no such file"]),
        (["data=metr_la"], ["data.path", "metr-la.h5", "data=metr_la_29"]),
        (["data=pems_bay"], ["data.path", "pems-bay.h5", "data=metr_la_29"]),
        (["data.unit="], ["data.unit", "km/h"]),
        (["data.unit=null"], ["data.unit", "str"]),
        (["data.expected_sensors=207"], ["29", "207"]),
        (["model=null"], ["model=null", "alternating"]),
        (["tracking="], ["tracking=", "none"]),
        (["optimizer.lr=-1"], ["optimizer", "-1"]),
        (["optimizer.betas=[0.9,0.9]"], ["+optimizer.betas"]),
        (["model=stid", "model.dropout=1.5"], ["model.dropout", "1.5"]),
        (["trainer.seed=99999999999"], ["trainer.seed", "99999999999"]),
        (["trainer.compile=graf"], ["trainer.compile", "graf", "graph"]),
        (["trainer.compile=graph", "trainer.device=cpu"], ["trainer.compile=graph", "off"]),
        (["tracking.uri=foo"], ["tracking.uri='foo'", "sqlite://"]),
        (["memory=lite,full"], ["add -m"]),
        (["memory.budget=6 gigs"], ["memory.budget=6 gigs", "GiB", "80%", "auto"]),
        (["memory.budget=-1"], ["memory.budget=-1", "positive"]),
        (["memory.budget=0"], ["memory.budget=0", "at least one byte"]),
        (["memory.budget=150%"], ["memory.budget=150%", "at most 100%"]),
        (["memory.budget=abc"], ["memory.budget=abc", "200MiB"]),
        (["memory.budget=nan"], ["memory.budget=nan", "200MiB"]),
        (["memory.budget=true"], ["memory.budget=True", "200MiB"]),
        (["memory.budget=900TiB"], ["memory.budget=900TiB", "cpu", "GiB", "100%"]),
        (
            ["memory.budget=9.5MB", "memory=full"],
            ["memory.budget=9.5MB", "Alternating", "12.1 MiB"],
        ),
        (["memory.max_recoveries=0"], ["memory.max_recoveries", "at least 1"]),
        (["memory.fallback=smaller"], ["memory.fallback", "preset"]),
        (["memory.gradient_accumulation=9"], ["gradient_accumulation=9", "batch_size=8"]),
        (["--config-dir=nowhere", "model=own"], ["nowhere", "no such folder"]),
        (["-m", "trainer.epochs=1,abc"], ["trainer.epochs=abc"]),
        (["-m", "memory=lite,minimal", "trainer.epochs=-1"], ["trainer.epochs", "at least 1"]),
        (["-m", "memory=full,lit"], ["memory=lit", "'lite'"]),
        (["-m", "trainer.resume=somewhere"], ["trainer.resume=somewhere", "-m"]),
    ],
)
def test_a_mistake_is_one_clear_message(expt, home, arguments, words):
    code, _, err = expt(*arguments)
    assert code == 2
    assert "Traceback" not in err
    message = err[err.index("error:") :]
    for word in words:
        assert word in message
    assert runs(home) == [], "a refused run leaves nothing behind"
    assert not list(home.rglob("*.db")), "nor does a refused multirun"
    assert not list(home.rglob("multirun.yaml"))


def test_a_refused_multirun_leaves_a_folder_that_was_there(expt, home):
    (home / "mine").mkdir()
    assert expt("-m", "memory=full,lit", "hydra.sweep.dir=mine")[0] == 2
    assert [path.name for path in (home / "mine").iterdir()] == ["multirun.yaml"]


def test_a_refusal_keeps_empty_folders_of_the_users(expt, home):
    (home / "lab").mkdir()
    assert expt("memory=lit", "hydra.run.dir=lab/run", small=False)[0] == 2
    assert expt("trainer.epochs=0", "hydra.run.dir=lab/run")[0] == 2
    assert expt("-m", "memory=full,lit", "hydra.sweep.dir=lab/sweep")[0] == 2
    assert [path.name for path in home.rglob("*")] == ["lab"]


def test_all_problems_come_in_one_message(expt):
    code, _, err = expt(
        "trainer.epochs=0", "model.embed_dim=30", "model.patch_sizes=[5]", "data.batch_size=0"
    )
    assert code == 2
    assert "4 problems" in err
    code, _, err = expt("trainer.epoch=1", "model.embed_dimm=1", "experiment=prob")
    assert code == 2
    assert "3 problems" in err
    code, _, err = expt("trainer.epoch=3", "model.patch_sizes=[5]", "data.batch_size=x", "+foo=1")
    assert code == 2
    assert "4 problems" in err, err


def test_keys_are_judged_by_a_class_of_ones_own(expt, home):
    (home / "lab_keys.py").write_text(MODULE.format(body="pass"))
    code, _, err = expt("model._target_=lab_keys.Net", "model.width=8")
    assert code == 2
    assert "+model.width" in err
    code, _, err = expt("model._target_=lab_keys.Net", "+model.width=8", "+experiment=probe")
    assert code == 0, err


def test_groups_of_which_nothing_may_be_chosen(expt, home):
    code, _, err = expt("experiment=null", "memory=null", "hydra.run.dir=run")
    assert code == 0, err
    assert load_result(home / "run").preset is None


def write_npz(path: Path, **changes: object) -> Path:
    """Write a short, sound series with some arrays changed or left out (None)."""
    with np.load(SHIPPED) as file:
        arrays = {name: file[name] for name in file.files}
    steps = 400
    arrays |= {"speed": arrays["speed"][:steps], "timestamps": arrays["timestamps"][:steps]}
    arrays |= changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def backwards() -> np.ndarray:
    with np.load(SHIPPED) as file:
        times = file["timestamps"][:400].copy()
    times[7] = times[3]
    return times


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"speed": np.zeros((400, 29), np.float32)}, "missing"),
        ({"speed": np.full((400, 29), "fast")}, "number"),
        ({"timestamps": backwards()}, "increas"),
        ({"timestamps": None}, "timestamps"),
        ({"adjacency": np.eye(28, dtype=np.float32)}, "28"),
    ],
)
def test_a_data_file_that_is_wrong_is_refused(expt, home, changes, word):
    write_npz(home / "bad.npz", **changes)
    code, _, err = expt("data.path=bad.npz")
    assert code == 2
    assert "bad.npz" in err
    assert word in err
    assert "Traceback" not in err
    assert runs(home) == []


def test_a_part_without_any_target_is_refused(expt, home):
    with np.load(SHIPPED) as file:
        speed = file["speed"][:400].copy()
    speed[270:340] = 0
    write_npz(home / "gap.npz", speed=speed)
    code, _, err = expt("data.path=gap.npz")
    assert code == 2
    assert "val part is missing" in err


@pytest.mark.parametrize("content", [b"", SHIPPED.read_bytes()[:50_000], b"speed,fast\n1,2\n"])
def test_a_file_that_is_no_npz_is_refused(expt, home, content):
    (home / "bad.npz").write_bytes(content)
    code, _, err = expt("data.path=bad.npz")
    assert code == 2
    assert "bad.npz" in err
    assert "Traceback" not in err


class Planted:
    """Unpickling this would create a file."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, ("planted", "w")


def test_a_pickle_with_anything_but_arrays_is_refused_unexecuted(expt, home):
    write_npz(home / "series.npz", adjacency=None)
    (home / "graph.pkl").write_bytes(pickle.dumps(Planted()))
    code, _, err = expt("data.path=series.npz", "data.adjacency_path=graph.pkl")
    assert code == 2
    assert "graph.pkl" in err
    assert "open" in err
    assert not (home / "planted").exists()


REAL = "(type(speed).__name__ == 'Tensor')"
MODULE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_sensors: int, input_steps: int, horizon: int, width: int = 4):
        super().__init__()
        self.layer = nn.Linear(input_steps, horizon)

    def forward(self, speed, observed, time_of_day, day_of_week):
        {body}
        return self.layer(speed.transpose(1, 2)).transpose(1, 2)
"""


def test_a_users_model_by_its_target_alone(expt, home):
    (home / "lab_plain.py").write_text(MODULE.format(body="pass"))
    code, _, err = expt("model._target_=lab_plain.Net", "hydra.run.dir=run")
    assert code == 0, err
    assert load_result(home / "run").parameters == 12 * 12 + 12
    assert "not passing on embed_dim" in (home / "run/expt.log").read_text()


def test_a_fault_in_a_users_model_is_exit_1_with_its_traceback(expt, home):
    (home / "lab_broken.py").write_text(MODULE.format(body="raise RuntimeError('my own bug')"))
    with pytest.raises(RuntimeError, match="my own bug"):
        expt("model._target_=lab_broken.Net", "hydra.run.dir=run")
    result = load_result(home / "run")
    assert result.status == "failed"
    assert "my own bug" in result.stop_reason


def test_a_loss_that_is_not_finite_stops_with_a_verdict(expt, home):
    (home / "lab_nan.py").write_text(MODULE.format(body="speed = speed / 0 * 0"))
    code, out, _ = expt("model._target_=lab_nan.Net", "hydra.run.dir=run")
    assert code == 1
    assert "not finite" in out
    assert load_result(home / "run").stop_reason == "non_finite_loss"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_step_with_everything_saved(expt, home, number, code):
    # Not while the plan calls the model with tensors that hold nothing.
    body = f"import signal; {REAL} and signal.raise_signal({int(number)})"
    (home / f"lab_signal{code}.py").write_text(MODULE.format(body=body))
    got, _, _ = expt(f"model._target_=lab_signal{code}.Net", "hydra.run.dir=run")
    assert got == code
    result = load_result(home / "run")
    assert (result.status, result.stop_reason, result.steps) == ("stopped", "signal", 1)
    assert (home / "run/checkpoints/last.pt").exists()


def test_a_prediction_of_another_shape_is_refused_not_broadcast(expt, home):
    body = "return self.layer(speed.transpose(1, 2)).transpose(1, 2).mean(2, keepdim=True)"
    (home / "lab_wide.py").write_text(MODULE.format(body=body))
    code, _, err = expt("model._target_=lab_wide.Net", "hydra.run.dir=run")
    assert code == 2
    assert "[8, 12, 1]" in err
    assert "[8, 12, 29]" in err
    assert not (home / "run").exists(), "the plan meets it before anything starts"
    code, _, err = expt("model._target_=lab_wide.Net", "hydra.run.dir=run", "memory.plan=false")
    assert code == 2
    assert "[8, 12, 1]" in err
    assert load_result(home / "run").status == "failed"


def test_a_new_run_does_not_mix_with_an_old_one(expt, home):
    assert expt("hydra.run.dir=run")[0] == 0
    before = (home / "run/result.json").read_bytes()
    code, _, err = expt("hydra.run.dir=run", "trainer.seed=5")
    assert code == 2
    assert "already holds a run" in err
    assert (home / "run/result.json").read_bytes() == before


def test_a_real_process_ends_with_1_and_a_traceback(home):
    (home / "lab_process.py").write_text(MODULE.format(body="raise RuntimeError('my own bug')"))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "expt",
            *SMALL,
            "model._target_=lab_process.Net",
            "memory.plan=false",
        ],
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "my own bug" in done.stderr


def test_a_full_disk_is_exit_1_and_what_was_saved_is_intact(expt, home, monkeypatch):
    (home / "lab_full.py").write_text(
        MODULE.format(
            body=f"import os, signal; 'STOP' in os.environ and {REAL} and signal.raise_signal(15)"
        )
    )
    target = (
        "model._target_=lab_full.Net", "+model.width=4", "trainer.resume=true",
        "memory.plan=false", "trainer.epochs=1",
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setenv("STOP", "1")
        assert expt("hydra.run.dir=run", *target)[0] == 143
    saved = (home / "run/checkpoints/last.pt").read_bytes()
    limit = (len(saved) // 2,) * 2
    full = subprocess.run(
        [sys.executable, "-m", "expt", *SMALL, "hydra.run.dir=run", *target],
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert full.returncode == 1, full.stderr
    assert "cannot write" in full.stderr
    assert "Traceback" not in full.stderr
    assert (home / "run/checkpoints/last.pt").read_bytes() == saved
    assert expt("hydra.run.dir=run", *target)[0] == 0
    assert load_result(home / "run").resumed_from_step == 1


def test_an_output_folder_that_cannot_be_written_is_exit_1(expt, home):
    (home / "file").write_text("")
    code, _, err = expt("hydra.run.dir=file/run")
    assert code == 1
    assert "file/run" in err
    assert "Traceback" not in err


def test_help_shows_groups_presets_and_six_commands(expt):
    with pytest.raises(SystemExit) as ended:
        expt("--help", small=False)
    assert ended.value.code in (0, None)


def test_help_text(expt, capfd):
    with pytest.raises(SystemExit):
        expt("--help", small=False)
    out = capfd.readouterr().out
    tasks = {path.stem for path in (conf_dir() / "task").glob("*.yaml")} - {"train"}
    assert len(tasks) > 10 and all(f"task={name} " in out for name in tasks)
    for word in ("full", "lite", "minimal", "experiment: ", "debug: ", "-sc install=bash"):
        assert word in out


def test_shell_completion_offers_presets_and_keys(expt, monkeypatch):
    monkeypatch.setenv("COMP_LINE", "expt +memory=mi")
    monkeypatch.setenv("COMP_POINT", "15")
    _, out, _ = expt("-sc", "query=bash", small=False)
    assert "+memory=minimal" in out
    monkeypatch.setenv("COMP_LINE", "expt trainer.ep")
    _, out, _ = expt("-sc", "query=bash", small=False)
    assert "trainer.epochs=" in out


def test_checkpointing_a_model_without_blocks_is_refused(expt, home):
    (home / "lab_flat.py").write_text(MODULE.format(body="pass"))
    code, _, err = expt("model._target_=lab_flat.Net", "memory.activation_checkpointing=true")
    assert code == 2
    assert "memory.activation_checkpointing" in err
    assert runs(home) == []


def test_checkpointing_changes_the_peak_and_not_the_weights(expt, home):
    one = ("memory.plan=false", "trainer.epochs=1")
    assert expt(*one, "hydra.run.dir=plain")[0] == 0
    assert expt(*one, "memory.activation_checkpointing=true", "hydra.run.dir=saving")[0] == 0
    plain, saving = load_result(home / "plain"), load_result(home / "saving")
    assert saving.metrics == pytest.approx(plain.metrics, rel=1e-5)
    peaks = [result.memory["peak_allocated_bytes"] for result in (saving, plain)]
    assert peaks[0] < peaks[1]


def test_threads_that_wait_sleep_soon_unless_the_user_has_said_how() -> None:
    alone: dict[str, str] = {}
    let_threads_sleep(alone)
    assert alone == {"GOMP_SPINCOUNT": "1000"}
    for own in ({"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "5"}):
        given = dict(own)
        let_threads_sleep(given)
        assert given == own
