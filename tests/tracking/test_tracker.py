from __future__ import annotations

from typing import Any

from expt.config.schema import TrackingConfig
from expt.tracking import tracker as module
from expt.tracking.journal import Journal
from expt.tracking.tracker import NullTracker, OncePerStep


def test_steps_taken_again_leave_no_second_point_in_the_store(make: Any, client: Any) -> None:
    tracker = make()
    tracker.start("run", {}, {})
    steps = OncePerStep(tracker)
    for step, value in ((2, 0.5), (4, 0.4), (6, 0.3), (4, 0.4000001), (6, 0.3), (8, 0.2)):
        steps.metrics({"train/loss_step": value}, step)
    assert steps.finish("FINISHED")
    assert steps.run_id == tracker.run_id is not None
    points = client.get_metric_history(tracker.run_id, "train/loss_step")
    assert sorted((point.step, point.value) for point in points) == [
        (2, 0.5), (4, 0.4), (6, 0.3), (8, 0.2),
    ]  # fmt: skip


def test_every_name_counts_for_itself_and_the_rest_is_passed_on() -> None:
    heard: list[Any] = []

    class Tracker(NullTracker):
        def metrics(self, values, step):
            heard.append((dict(values), step))

        def tags(self, values):
            heard.append(values)

    steps = OncePerStep(Tracker())
    steps.metrics({"a": 1.0}, 0)
    steps.metrics({"a": 1.0, "b": 2.0}, 0)
    steps.metrics({"a": 1.0, "b": 2.0}, 0)
    steps.tags({"x": "y"})
    assert heard == [({"a": 1.0}, 0), ({"b": 2.0}, 0), {"x": "y"}]
    assert (steps.uri, steps.run_id, steps.parent_run_id) == (None, None, None)
    assert steps.flush()


def test_a_run_that_was_left_open_is_closed_once(tmp_path, monkeypatch) -> None:
    finished: list[str] = []

    class Told(NullTracker):
        def finish(self, status: str) -> bool:
            finished.append(status)
            return True

    monkeypatch.setattr(module, "open_tracker", lambda *arguments: Told())
    module.close_left_open(TrackingConfig(), tmp_path, None, "FAILED")
    assert finished == [], "nothing was recorded there"
    Journal(tmp_path, {}).append("start", {"name": "run"})
    module.close_left_open(TrackingConfig(), tmp_path, None, "FAILED")
    assert finished == ["FAILED"]
