"""Against the shipped METR-LA files, and a small series made here.

Letters: `S` steps in the series, `N` sensors, `W` windows, `B` batch, `T` input steps,
`P` horizon.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from expt.errors import DataError
from expt.job import Batch, Split
from expt.jobs.traffic.data import TrafficData
from expt.jobs.traffic.series import Series
from expt.jobs.traffic.windows import split_windows, window_starts

SPLITS: tuple[Split, ...] = ("train", "val", "test")
START = np.datetime64("2012-03-01T00:00:00")
ARGUMENTS: dict[str, Any] = {
    "path": "expt://metr_la_29.npz",
    "adjacency_path": None,
    "where_to_get": "Ask the librarian.",
    "expected_sensors": None,
    "input_steps": 12,
    "horizon": 12,
    "batch_size": 16,
    "eval_batch_size": 64,
    "train_fraction": 0.7,
    "test_fraction": 0.2,
    "unit": "mph",
}


def traffic(**changes: Any) -> TrafficData:
    return TrafficData(**{**ARGUMENTS, **changes})


@pytest.fixture(scope="module")
def metr_la() -> TrafficData:
    return traffic(expected_sensors=29)


def times(count: int, step: int = 300) -> npt.NDArray[np.datetime64]:
    return START + np.arange(count) * np.timedelta64(step, "s")


def saved(folder: Path, timestamps: npt.NDArray[np.datetime64], sensors: int = 3) -> str:
    """Save a series of random speeds, about one in ten missing; return its path."""
    draw = np.random.default_rng(0)
    speed = draw.uniform(20, 70, (len(timestamps), sensors)).astype(np.float32)
    speed[draw.random(speed.shape) < 0.1] = 0
    path = folder / "series.npz"
    np.savez(path, speed=speed, timestamps=timestamps)
    return str(path)


def test_the_windows_are_those_of_the_published_code(metr_la: TrafficData) -> None:
    assert [metr_la.size(split) for split in SPLITS] == [23_974, 3_425, 6_850]
    starts = np.concatenate([metr_la.split_starts[split] for split in SPLITS])
    np.testing.assert_array_equal(starts, np.arange(34_272 - 24 + 1))


def test_scaling_is_by_what_the_training_part_observed(metr_la: TrafficData) -> None:
    training = metr_la.series.values[: 23_974 - 1 + 12].astype(np.float64)
    observed = training[training > 0]
    assert metr_la.mean == pytest.approx(observed.mean(), rel=1e-12)
    assert metr_la.std == pytest.approx(observed.std(), rel=1e-12)
    whole = metr_la.series.values[metr_la.series.values > 0]
    assert abs(metr_la.mean - whole.mean(dtype=np.float64)) > 0.01


@pytest.mark.parametrize("split", SPLITS)
def test_gather_gives_slices_of_the_series(metr_la: TrafficData, split: Split) -> None:
    values = metr_la.series.values
    size, starts = metr_la.size(split), metr_la.split_starts[split]
    drawn = np.random.default_rng(0).integers(0, size, 30)
    chosen = np.concatenate((drawn, [0, size - 1]))
    batch = metr_la.gather(split, torch.from_numpy(chosen))
    for row, start in enumerate(starts[chosen]):
        past, future = values[start : start + 12], values[start + 12 : start + 24]
        observed = past > 0
        np.testing.assert_array_equal(batch.target[row].numpy(), future)
        np.testing.assert_array_equal(batch.inputs["observed"][row].numpy(), observed)
        scaled = np.where(observed, (past - metr_la.mean) / metr_la.std, 0)
        np.testing.assert_allclose(batch.inputs["speed"][row].numpy(), scaled, atol=1e-5)
        clock = metr_la.series.timestamps[start : start + 12].tolist()
        expected = [when.hour * 12 + when.minute // 5 for when in clock]
        assert batch.inputs["time_of_day"][row].tolist() == expected
        assert batch.inputs["day_of_week"][row].tolist() == [when.weekday() for when in clock]


def test_the_first_day_is_a_thursday_from_midnight(metr_la: TrafficData) -> None:
    batch = metr_la.gather("train", torch.tensor([0, 288 - 1, 4 * 288]))
    assert batch.inputs["time_of_day"][:, 0].tolist() == [0, 287, 0]
    assert batch.inputs["day_of_week"][:, 0].tolist() == [3, 3, 0]
    assert batch.inputs["day_of_week"][1, 1] == 4
    assert batch.inputs["time_of_day"].dtype == batch.inputs["day_of_week"].dtype == torch.int64


def test_the_target_is_in_mph_and_scaling_is_undone(metr_la: TrafficData) -> None:
    batch = metr_la.gather("test", torch.arange(64))
    observed = batch.target[batch.target > 0]
    assert 40 < observed.mean() < 70
    speed, seen = batch.inputs["speed"], batch.inputs["observed"]
    original = metr_la.series.values[metr_la.split_starts["test"][:64, None] + np.arange(12)]
    mph = metr_la.to_speed(speed)
    torch.testing.assert_close(mph[seen], torch.from_numpy(original)[seen])
    assert metr_la.to_speed(speed.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("split", SPLITS)
def test_weight_is_the_number_of_observed_targets(metr_la: TrafficData, split: Split) -> None:
    indices = torch.from_numpy(np.random.default_rng(1).integers(0, metr_la.size(split), 50))
    target = metr_la.gather(split, indices).target
    assert metr_la.weight(split, indices) == (target > 0).sum()


def test_weight_is_at_least_one(tmp_path: Path) -> None:
    path = tmp_path / "series.npz"
    speed = np.random.default_rng(0).uniform(20, 70, (60, 2))
    speed[20:40] = 0
    np.savez(path, speed=speed, timestamps=times(60))
    data = traffic(path=str(path), input_steps=4, horizon=4)
    index = torch.tensor([18])  # its targets are the steps 22 to 25
    assert not data.gather("train", index).target.any()
    assert data.weight("train", index) == 1
    assert data.loss(torch.zeros(1, 4, 2), data.gather("train", index)) == 0


def test_the_loss_is_the_masked_sum_in_mph(metr_la: TrafficData) -> None:
    torch.manual_seed(0)
    batch = metr_la.gather("test", torch.arange(40, 60))
    prediction = torch.randn(20, 12, 29)
    mph = prediction.double().numpy() * metr_la.std + metr_la.mean
    target = batch.target.numpy()
    expected = np.abs(mph - target)[target > 0].sum()
    assert (target == 0).any()
    assert float(metr_la.loss(prediction, batch)) == pytest.approx(expected, rel=1e-5)


def test_missing_targets_have_no_gradient(metr_la: TrafficData) -> None:
    batch = metr_la.gather("test", torch.arange(40, 60))
    prediction = torch.zeros(20, 12, 29, requires_grad=True)
    metr_la.loss(prediction, batch).backward()
    assert prediction.grad is not None
    assert torch.equal(prediction.grad != 0, batch.target > 0)


def test_losses_of_the_parts_of_a_batch_sum_to_the_whole(metr_la: TrafficData) -> None:
    torch.manual_seed(0)
    indices = torch.randperm(metr_la.size("train"))[:16]
    prediction = torch.randn(16, 12, 29)
    whole = float(metr_la.loss(prediction, metr_la.gather("train", indices)))
    for size in (1, 4, 5):
        parts = zip(indices.split(size), prediction.split(size), strict=True)
        losses = [metr_la.loss(part, metr_la.gather("train", at)) for at, part in parts]
        assert float(sum(losses)) == pytest.approx(whole, rel=1e-6)


def test_persistence_has_the_published_errors(metr_la: TrafficData) -> None:
    # The variant behind the published figures: the last reading as it is stored, so that a
    # missing one forecasts 0 mph. With the mean in its place the error would be 4.51 mph, with
    # the last reading that was observed 4.43.
    metrics = metr_la.accumulator()
    missing = -metr_la.mean / metr_la.std
    for indices in torch.arange(metr_la.size("test")).split(1000):
        batch = metr_la.gather("test", indices)
        speed, observed = batch.inputs["speed"][:, -1], batch.inputs["observed"][:, -1]
        last = torch.where(observed, speed, missing)
        metrics.update(last.unsqueeze(1).expand(-1, 12, -1), batch)
    figures = metrics.compute()
    assert figures["mae"] == pytest.approx(5.251, abs=0.001)
    for minutes, expected in ((15, 4.12), (30, 5.22), (60, 6.91)):
        assert figures[f"mae_{minutes}min"] == pytest.approx(expected, abs=0.005)


def test_model_arguments_are_what_the_file_says(metr_la: TrafficData) -> None:
    arguments = dict(metr_la.model_arguments())
    adjacency = arguments.pop("adjacency")
    assert adjacency.shape == (29, 29)
    missing = torch.tensor(arguments.pop("missing_value"))
    assert metr_la.to_speed(missing) == pytest.approx(0, abs=1e-5)
    assert arguments == {
        "num_sensors": 29,
        "input_steps": 12,
        "horizon": 12,
        "steps_per_day": 288,
    }


def test_the_week_that_ships_has_every_sensor() -> None:
    data = traffic(path="expt://metr_la_week.npz", expected_sensors=207)
    total = len(data.series.timestamps) - 24 + 1
    assert [data.size(split) for split in SPLITS] == [
        round(total * 0.7),
        total - round(total * 0.7) - round(total * 0.2),
        round(total * 0.2),
    ]
    assert data.gather("test", torch.tensor([0])).target.shape == (1, 12, 207)
    assert data.fingerprint() != traffic().fingerprint()


@pytest.mark.parametrize("input_steps, horizon", [(4, 3), (12, 12)])
def test_no_window_crosses_a_gap(tmp_path: Path, input_steps: int, horizon: int) -> None:
    timestamps = np.delete(times(300), [*range(50, 57), 120, 200, 201])
    data = traffic(path=saved(tmp_path, timestamps), input_steps=input_steps, horizon=horizon)
    length = input_steps + horizon
    whole = [
        start
        for start in range(len(timestamps) - length + 1)
        if (np.diff(timestamps[start : start + length]) == np.timedelta64(300, "s")).all()
    ]
    assert len(whole) < len(timestamps) - length + 1
    starts = np.concatenate([data.split_starts[split] for split in SPLITS])
    np.testing.assert_array_equal(starts, whole)
    for split in SPLITS:
        indices = torch.arange(data.size(split))
        target = data.gather(split, indices).target
        steps = data.split_starts[split][:, None] + np.arange(input_steps, length)
        np.testing.assert_array_equal(target.numpy(), data.series.values[steps])
        counts = [int(data.weight(split, index)) for index in indices.split(1)]
        assert counts == (target > 0).sum(dim=(1, 2)).clamp(min=1).tolist()


def test_irregular_steps_that_add_up_are_still_a_gap(tmp_path: Path) -> None:
    steps = np.full(100, 300)
    steps[40:43] = (600, 150, 150)
    timestamps = START + np.concatenate(([0], np.cumsum(steps))) * np.timedelta64(1, "s")
    data = traffic(path=saved(tmp_path, timestamps), input_steps=4, horizon=4)
    starts = np.concatenate([data.split_starts[split] for split in SPLITS])
    assert not set(starts) & set(range(34, 43))
    assert {33, 43} <= set(starts)


def test_time_of_day_in_other_steps(tmp_path: Path) -> None:
    data = traffic(path=saved(tmp_path, times(200, step=900)), input_steps=4, horizon=4)
    assert data.model_arguments()["steps_per_day"] == 96
    batch = data.gather("train", torch.tensor([95]))
    assert batch.inputs["time_of_day"].tolist() == [[95, 0, 1, 2]]
    assert batch.inputs["day_of_week"].tolist() == [[3, 4, 4, 4]]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"expected_sensors": 207},
            ["metr_la_29.npz", "found 29 sensors", "data.expected_sensors=207", "=null"],
        ),
        ({"path": None}, ["data.path is not set", "Ask the librarian."]),
        ({"path": "/no/such.npz"}, ["data.path=/no/such.npz", "no such file", "librarian"]),
        ({"path": "expt://no.npz"}, ["data.path=expt://no.npz", "no such file", "librarian"]),
        ({"adjacency_path": "/no/graph.pkl"}, ["/no/graph.pkl", "no such file"]),
    ],
)
def test_what_is_wrong_with_the_file_is_said(changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        traffic(**changes)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(("steps", "windows"), [(10, 0), (24, 1), (26, 3)])
def test_a_series_too_short_for_every_split(tmp_path: Path, steps: int, windows: int) -> None:
    path = saved(tmp_path, times(steps))
    with pytest.raises(DataError) as caught:
        traffic(path=path)
    plural = "" if windows == 1 else "s"
    assert f"series.npz: only {windows} window{plural} without a gap" in str(caught.value)
    assert "a longer series" in str(caught.value)


def test_too_few_windows_are_blamed_on_what_broke_them(tmp_path: Path) -> None:
    late = times(3000)
    late[::20] += np.timedelta64(1, "s")
    with pytest.raises(DataError) as caught:
        traffic(path=saved(tmp_path, late))
    message = str(caught.value)
    assert "series.npz: only 0 windows" in message
    assert "interval is 5 min, and 299 of 2,999 differences" in message
    assert "round or resample" in message
    assert "longer" not in message and "smaller" not in message
    with pytest.raises(DataError, match=r"149 of 2,850 differences .* Rows are missing: .*smaller"):
        traffic(path=saved(tmp_path, np.delete(times(3000), np.arange(20, 3000, 20)[:150])))


def test_a_step_that_does_not_divide_the_day_is_refused_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"series.npz: a time step of 420 seconds"):
        traffic(path=saved(tmp_path, times(400, step=420)))


def test_the_facts_count_what_the_splits_hold(metr_la: TrafficData, tmp_path: Path) -> None:
    assert metr_la.describe() == (
        "data: 29 sensors, every 5 min, 34,272 steps, 7.75 % missing; "
        "windows: 23,974 train, 3,425 val, 6,850 test"
    )
    late = times(3000)
    late[::60] += np.timedelta64(1, "s")
    facts, warning = traffic(path=saved(tmp_path, late)).describe().splitlines()
    assert facts.endswith("; 1,177 of 2,977 (39.5 %) lost to gaps")
    assert "99 of 2,999 differences" in warning and "round or resample" in warning


def test_a_training_part_without_two_readings_is_refused(tmp_path: Path) -> None:
    speed = np.full((60, 2), 50.0)
    speed[50:] = 40.0
    np.savez(tmp_path / "flat.npz", speed=speed, timestamps=times(60))
    with pytest.raises(DataError, match="no two different readings"):
        traffic(path=str(tmp_path / "flat.npz"), input_steps=4, horizon=4)


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(tmp_path, times(100))
    assert traffic(path="~/series.npz").series.values.shape == (100, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 0}, "data.horizon must be at least 1, got 0"),
        ({"batch_size": -1}, "data.batch_size must be at least 1, got -1"),
        ({"train_fraction": 0.9, "test_fraction": 0.2}, "got 0.9 and 0.2"),
        ({"test_fraction": 0.0}, "got 0.7 and 0.0"),
    ],
)
def test_impossible_arguments_are_found_before_reading(
    changes: dict[str, Any], message: str
) -> None:
    problems = TrafficData.problems({**ARGUMENTS, **changes})
    assert len(problems) == 1
    assert problems[0].endswith(message)
    assert TrafficData.problems(ARGUMENTS) == []


@pytest.mark.parametrize("kind", [staticmethod, classmethod])
def test_a_read_that_needs_no_instance_is_allowed(kind: Any) -> None:
    def of_a_class(cls: type, path: str, adjacency_path: str, where_to_get: str) -> None: ...
    def of_none(path: str, adjacency_path: str, where_to_get: str) -> None: ...
    def too_few(path: str) -> None: ...

    read = of_a_class if kind is classmethod else of_none
    assert type("Own", (TrafficData,), {"read": kind(read)}).problems(ARGUMENTS) == []
    assert len(type("Own", (TrafficData,), {"read": kind(too_few)}).problems(ARGUMENTS)) == 1


def test_windows_of_a_series_shorter_than_one(metr_la: TrafficData) -> None:
    assert len(window_starts(metr_la.series, 34_273)) == 0
    assert window_starts(metr_la.series, 34_272).tolist() == [0]


def test_splits_are_in_time_order_and_share_no_window() -> None:
    parts = split_windows(np.arange(100), 0.6, 0.3, None)
    assert [list(parts[split]) for split in SPLITS] == [
        list(range(60)),
        list(range(60, 70)),
        list(range(70, 100)),
    ]


def test_sizes_are_rounded_and_validation_takes_the_rest() -> None:
    sizes = [len(part) for part in split_windows(np.arange(13), 0.7, 0.2, None).values()]
    assert sizes == [9, 1, 3]  # of 9.1, 1.3 and 2.6
    sizes = [len(part) for part in split_windows(np.arange(14), 0.7, 0.2, None).values()]
    assert sizes == [10, 1, 3]  # of 9.8, 1.4 and 2.8


def test_readings_in_another_unit_are_not_forecast(metr_la: TrafficData) -> None:
    kept = metr_la.transforms()
    assert traffic(transforms=kept).size("train") == 0
    with pytest.raises(DataError, match=r"in km/h, and the model was trained on readings in mph"):
        traffic(transforms=kept, unit="km/h")


def test_plots_of_a_day_of_the_horizon_and_of_sensors(tmp_path: Path) -> None:
    data = traffic(path=saved(tmp_path, times(800)), eval_batch_size=50)
    sizes = []

    def predict(batch: Batch) -> torch.Tensor:
        sizes.append(len(batch.target))
        return batch.inputs["speed"]

    metrics = data.accumulator()
    batch = data.gather("test", torch.arange(20))
    metrics.update(batch.inputs["speed"], batch)
    paths = data.plots(predict, metrics, tmp_path / "plots")
    assert [path.name for path in paths] == ["forecast.png", "horizon.png", "sensors.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert sizes == [50, 50, 50, data.size("test") - 150]  # in evaluation batches


def test_one_plot_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("no such sensor")

    data = traffic(path=saved(tmp_path, times(200)), input_steps=4, horizon=4)
    metrics, batch = data.accumulator(), data.gather("test", torch.arange(3))
    metrics.update(batch.inputs["speed"], batch)
    monkeypatch.setattr("expt.jobs.traffic.figures.plot_day", fail)
    paths = data.plots(lambda batch: batch.inputs["speed"], metrics, tmp_path)
    assert [path.name for path in paths] == ["horizon.png", "sensors.png"]
    assert "a plot of this run cannot be drawn (KeyError: 'no such" in capsys.readouterr().out


def test_plots_show_one_day_at_most(tmp_path: Path) -> None:
    data = traffic(path=saved(tmp_path, times(200, step=3600)), input_steps=4, horizon=4)
    seen = []

    def predict(batch: Batch) -> torch.Tensor:
        seen.append(batch.inputs["time_of_day"][:, 0])
        return batch.inputs["speed"]

    metrics = data.accumulator()
    batch = data.gather("val", torch.arange(3))
    metrics.update(batch.inputs["speed"], batch)
    data.plots(predict, metrics, tmp_path)
    assert sorted(torch.cat(seen).tolist()) == list(range(24))


class OwnFormat(TrafficData):
    """As the README has it: a format of one's own, written before there was a choice of series."""

    def read(self, path: str | None, adjacency_path: str | None, where_to_get: str) -> Series:
        speeds = np.random.default_rng(0).uniform(20, 70, (90, 3))
        return Series.from_arrays(speeds, times(90), sensor_ids=None, adjacency=None)


def test_a_subclass_needs_none_of_the_later_arguments() -> None:
    assert OwnFormat.problems(ARGUMENTS) == []
    assert len(OwnFormat(**ARGUMENTS).describe().splitlines()) == 1
    assert OwnFormat(**ARGUMENTS, key=None, channel=None, start=None, step_minutes=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": "2018-01-01"}, "given together, or neither"),
        ({"step_minutes": 5}, "given together, or neither"),
        ({"start": "2018-01-01", "step_minutes": 0}, "at least a second, 1/60, got 0"),
        ({"start": "1/1/2018", "step_minutes": 5}, "like 2018-01-01T00:00, got '1/1/2018'"),
    ],
)
def test_a_beginning_that_cannot_be_is_found_before_reading(
    changes: dict[str, Any], message: str
) -> None:
    (problem,) = TrafficData.problems({**ARGUMENTS, **changes})
    assert problem.startswith("data.s") and message in problem
    assert TrafficData.problems({**ARGUMENTS, "start": "2018-01-01", "step_minutes": 0.5}) == []


def test_what_was_read_and_left_is_in_the_lines_about_the_data(tmp_path: Path) -> None:
    speed = np.random.default_rng(0).uniform(20, 70, (90, 3))
    data = np.stack([speed * 5, speed], axis=-1)
    np.savez(tmp_path / "x.npz", data=data, labels=speed)
    given = {"path": str(tmp_path / "x.npz"), "start": "2018-01-01", "step_minutes": 5}
    first, note, channel, warning = traffic(**given).describe().splitlines()
    assert first.startswith("data: 3 sensors, every 5 min")
    assert note == "data: read data, left labels; data.key names another"
    assert channel.startswith("data: read channel 0 of data, of 2;")
    assert warning.startswith("data: warning: a typical reading is")
    assert len(traffic(**given, channel=1).describe().splitlines()) == 3


def three(folder: Path, ids: list[str] | None, name: str = "new.npz") -> str:
    """Save three sensors, whose readings begin with 10, 20 and 30; those of `ids` by their name."""
    speed = np.arange(90)[:, None] / 90 + [10.0, 20.0, 30.0]
    order = list(range(3)) if ids is None else [int(name[-1]) for name in ids]
    named = {} if ids is None else {"sensor_ids": np.array(ids)}
    np.savez(folder / name, speed=speed[:, order], timestamps=times(90), **named)
    return str(folder / name)


@pytest.mark.parametrize(
    ("trained", "found"),
    [(None, ["1", "0", "2"]), (["1", "2", "0"], None), (["s1", "s2", "s0"], ["s0", "s1", "s2"])],
)
def test_sensors_of_a_forecast_are_found_by_name_in_any_order(
    tmp_path: Path, trained: list[str] | None, found: list[str] | None
) -> None:
    before = traffic(path=three(tmp_path, trained, "trained.npz"))
    after = traffic(path=three(tmp_path, found), transforms=before.transforms())
    assert after.series.sensor_ids == before.series.sensor_ids
    np.testing.assert_array_equal(after.series.values[:90], before.series.values)
    assert after.series.notes == ()


@pytest.mark.parametrize(
    ("trained", "found", "unnamed"),
    [(None, ["s0", "s1", "s2"], "the training's file"), (["s0", "s1", "s2"], None, "the file")],
)
def test_sensors_without_ids_are_taken_in_order_and_said_to_be(
    tmp_path: Path, trained: list[str] | None, found: list[str] | None, unnamed: str
) -> None:
    before = traffic(path=three(tmp_path, trained, "trained.npz"))
    after = traffic(path=three(tmp_path, found), transforms=before.transforms())
    assert after.series.values[0].tolist() == [10, 20, 30]
    assert f"data: {unnamed} has no sensor ids: its sensors are taken in" in after.describe()


def test_of_a_series_to_forecast_only_what_was_read_is_told(tmp_path: Path) -> None:
    path = three(tmp_path, None)
    before = traffic(path=path)
    line = traffic(path=path, transforms=before.transforms()).describe()
    assert line == "data: 3 sensors, every 5 min, 90 steps, 0.00 % missing; windows: 79 test"


def test_what_cannot_be_opened_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"there is no such file\. Ask the librarian"):
        traffic(path=str(tmp_path / "x.npz"))
    with pytest.raises(DataError, match=r"there is no such file\. Ask the librarian"):
        traffic(path="~nobody-of-this-name/x.npz")
    for name, reason in (("x" * 300 + ".npz", "File name too long"), ("\0.npz", "null")):
        with pytest.raises(DataError, match=f"cannot be opened: .*{reason}"):
            traffic(path=str(tmp_path / name))

    def refuse(self: Path, **_: Any) -> None:  # chmod does not stop root, under which tests may run
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(DataError, match=r"x\.npz: permission denied; make it readable"):
        traffic(path=str(tmp_path / "x.npz"))


def test_of_daily_data_more_than_a_day_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    days = np.datetime64("2020-01-01", "s") + 86_400 * np.arange(300)
    speed = np.random.default_rng(0).uniform(20, 70, (300, 2))
    np.savez(tmp_path / "x.npz", speed=speed, timestamps=days)
    drawn: list[np.ndarray] = []

    def plot_day(forecasts: np.ndarray, *_: Any) -> Path:
        drawn.append(forecasts)
        return tmp_path

    monkeypatch.setattr("expt.jobs.traffic.figures.plot_day", plot_day)
    data = traffic(path=str(tmp_path / "x.npz"))
    data._plot_day(lambda batch: batch.inputs["speed"], tmp_path)
    assert len(drawn[0]) == 24
