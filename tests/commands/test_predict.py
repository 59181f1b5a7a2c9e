from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from expt.jobs.traffic.data import TrafficData
from expt.result import load_result

SHIPPED = Path(str(files("expt.jobs.traffic"))) / "files/metr_la_29.npz"
WEEK = 7 * 288


def cut(path: Path, steps: slice, **other: np.ndarray) -> Path:
    """Write some steps of the shipped series."""
    with np.load(SHIPPED) as whole:
        kept = {name: whole[name] for name in ("sensor_ids", "adjacency", "locations")}
        kept |= {name: whole[name][steps] for name in ("speed", "timestamps")}
    np.savez(path, **{**kept, **other})
    return path


@pytest.fixture(scope="module")
def kept(once, tmp_path_factory) -> Path:
    """The folder of a run whose test part is the last of five weeks."""
    five = cut(tmp_path_factory.mktemp("series") / "five.npz", slice(0, 5 * WEEK))
    return once(
        "memory=minimal", "tracking=none", "trainer.progress=false", f"data.path={five}",
        "trainer.max_steps=12", "trainer.eval_batches=2", "memory.plan=false", "trainer.test=false",
        "model.num_stages=1", "model.embed_dim=16", "hydra.run.dir=run",
    )  # fmt: skip


@pytest.fixture
def trained(kept, home) -> Path:
    """A copy of that run, begun in this test's folder with ``five.npz``, which is in it."""
    shutil.copytree(kept / "run", home / "run")
    launch = home / "run/launch.json"
    started = json.loads(launch.read_text())
    (series,) = [line for line in started["overrides"] if line.startswith("data.path=")]
    shutil.copy(series.removeprefix("data.path="), home / "five.npz")
    started["overrides"][started["overrides"].index(series)] = "data.path=five.npz"
    launch.write_text(json.dumps({**started, "cwd": str(home)}))
    return home / "run"


def test_a_held_out_week_in_a_fresh_process_is_the_tests_own(expt, trained, home) -> None:
    test = ("trainer.resume=run", "trainer.test=true", "trainer.eval_batches=null")
    code, _, err = expt(*test, "trainer.save_predictions=true", small=False)
    assert code == 0, err
    arguments = (None, "", 29, 12, 12, 8, 64, 0.7, 0.2, "mph")
    data = TrafficData("five.npz", *arguments)
    first = int(data.split_starts["test"][0])
    cut(home / "week.npz", slice(first, 5 * WEEK))
    line = ("task=predict", "predict.run=run", "data.path=week.npz", "hydra.run.dir=predicted")
    command = [sys.executable, "-m", "expt", *line]
    ran = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    record = json.loads((home / "predicted/predict.json").read_text())
    tested = load_result(trained).metrics
    assert record["metrics"].keys() == {
        "mae", "rmse", "mape", "mae_15min", "mae_30min", "mae_60min"
    }  # fmt: skip
    for name, value in record["metrics"].items():
        assert value == pytest.approx(tested[f"test/{name}"], rel=1e-9), name
    own = np.load(trained / "predictions/test.npz")
    new = np.load(home / "predicted/predictions/test.npz")
    assert len(new["issued"]) == len(own["issued"]) + 12  # the windows whose target is not known
    np.testing.assert_array_equal(new["forecast"][: len(own["forecast"])], own["forecast"])
    np.testing.assert_array_equal(new["timestamps"][: len(own["issued"])], own["timestamps"])
    with np.load(SHIPPED) as whole:
        last = whole["timestamps"][5 * WEEK - 1].astype("datetime64[s]")
        assert new["sensor_ids"].tolist() == whole["sensor_ids"].astype(str).tolist()
    assert new["issued"][-1] == last
    assert new["timestamps"][-1][0] == last + np.timedelta64(300, "s")
    assert (home / "predicted/plots/forecast.png").stat().st_size > 1000


def test_the_runs_own_data_are_its_test_part(expt, trained, home) -> None:
    code, out, err = expt("task=predict", "predict.run=run", "hydra.run.dir=own", small=False)
    assert code == 0, err
    record = json.loads((home / "own/predict.json").read_text())
    assert record["samples"] == round((5 * WEEK - 23) * 0.2)
    assert "MAE, 15 min" in out
    code, out, err = expt(
        "task=predict", "predict.run=run", "predict.split=val", "hydra.run.dir=val", small=False
    )
    assert code == 0, err
    assert (home / "val/predictions/val.npz").exists()


def test_an_hour_is_enough_to_forecast_the_next_and_parquet_is_a_table(expt, trained, home) -> None:
    import pandas as pd

    cut(home / "hour.npz", slice(100, 112))
    code, out, err = expt(
        "task=predict", "predict.run=run", "data.path=hour.npz", "predict.format=parquet",
        "hydra.run.dir=next", small=False,
    )  # fmt: skip
    assert code == 0, err
    assert "nothing was measured" in out
    table = pd.read_parquet(home / "next/predictions/test.parquet")
    assert table.shape == (12, 2 + 29)
    with np.load(SHIPPED) as whole:
        times = whole["timestamps"].astype("datetime64[s]")
    assert (table["timestamp"].to_numpy() == times[112:124]).all()
    assert (table["issued"].to_numpy() == times[111]).all()


def test_sensors_in_another_order_and_more_of_them_are_put_right(expt, trained, home) -> None:
    cut(home / "hour.npz", slice(100, 124))
    with np.load(home / "hour.npz") as stored:
        speed, ids, times = stored["speed"], stored["sensor_ids"].astype(str), stored["timestamps"]
    order = np.r_[np.arange(29)[::-1], 0]
    more = np.append(ids[::-1], "extra")
    np.savez(home / "mixed.npz", speed=speed[:, order], timestamps=times, sensor_ids=more)
    for name in ("hour", "mixed"):
        line = ("task=predict", "predict.run=run", f"data.path={name}.npz", f"hydra.run.dir={name}")
        code, _, err = expt(*line, "predict.plots=false", "data.expected_sensors=null", small=False)
        assert code == 0, err
    stored = [np.load(home / f"{name}/predictions/test.npz") for name in ("hour", "mixed")]
    np.testing.assert_array_equal(stored[0]["forecast"], stored[1]["forecast"])
    np.savez(home / "few.npz", speed=speed[:, :28], timestamps=times, sensor_ids=ids[:28])
    line = ("task=predict", "predict.run=run", "data.path=few.npz", "data.expected_sensors=null")
    code, _, err = expt(*line, small=False)
    assert code == 2
    assert "1 of the 29 sensors that the model was trained on are not in it" in err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (("predict.run=null",), "predict.run must be the directory of a run"),
        (("predict.run=nowhere",), "no run's directory"),
        (("predict.run=run", "predict.split=tset"), "predict.split='tset' must be"),
        (("predict.run=run", "predict.format=csv"), "does not write it"),
        (("predict.run=run", "data.path=five.npz", "data.horizon=6"), "expected"),
    ],
)
def test_what_cannot_be_done_is_a_line(expt, trained, home, line, words) -> None:
    code, _, err = expt("task=predict", *line, "hydra.run.dir=out", small=False)
    assert code == 2, err
    assert words in err and "Traceback" not in err
    assert not (home / "out").exists()


def test_damaged_weights_are_called_damaged(expt, trained, home) -> None:
    best = trained / "checkpoints/best.pt"
    best.write_bytes(best.read_bytes()[:500])
    code, _, err = expt("task=predict", "predict.run=run", small=False)
    assert code == 2
    assert "best.pt is damaged" in err


def test_a_run_of_an_earlier_version_predicts_from_its_own_config(expt, trained, home) -> None:
    import torch

    import expt.run.saved as saved

    expected = saved.load(trained)
    path = trained / "checkpoints/best.pt"
    stored = torch.load(path, weights_only=True)
    del stored["recipe"]
    torch.save(stored, path)
    model, transforms = saved.load(trained)
    assert transforms == expected.transforms
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected.model.state_dict()[name])
