from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from expt.errors import ConfigError
from expt.job import Metric
from expt.result import RunResult
from expt.run.process import WorkerError
from expt.search.candidates import Learned, learn_data
from expt.search.metric import EARLIER, mismatch, objectives_of
from expt.search.space import Space

ACCURACY = Metric("accuracy", goal="max")


@pytest.mark.parametrize("first", ["val", "val/accuracy"])
def test_the_metric_is_meant_by_its_own_name_or_without(first):
    assert objectives_of([first], ACCURACY) == ["val/accuracy"]
    assert objectives_of([first, "peak_memory"], ACCURACY) == ["val/accuracy", "peak_memory"]


def test_a_metric_that_is_not_monitored_is_refused_with_what_to_set():
    with pytest.raises(ConfigError, match=r"which is val/accuracy; give trainer\.monitor=auc too"):
        objectives_of(["val/auc"], ACCURACY)


def test_trials_of_another_metric_cannot_be_compared():
    assert mismatch(Metric("accuracy", goal="max", unit="x"), ACCURACY) is None
    assert mismatch(Metric("loss"), ACCURACY) == (
        "it monitors loss (min), and the search compares accuracy (max)"
    )
    assert mismatch(Metric("accuracy"), ACCURACY) is not None


class Answers:
    """Takes the place of a worker process."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked = list(answers), []

    def call(self, function, lines, own, points, seconds):
        self.asked.append(lines)
        self.points = points
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def request(tmp_path, objectives=("val",)):
    config = SimpleNamespace(plan_time_limit_seconds=1.0, objectives=list(objectives), repeats=2)
    cfg = SimpleNamespace(trainer=SimpleNamespace(seed=7))
    return SimpleNamespace(config=config, cfg=cfg, given=["a=1"], own=None, folder=tmp_path)


def test_the_base_configurations_data_set_is_asked(tmp_path):
    worker = Answers({"metric": ACCURACY.as_dict(), "fingerprint": "abc"})
    space = Space.parse({"model.width": "choice(8,16,32)"})
    assert learn_data(request(tmp_path), space, worker) == Learned(ACCURACY, "abc", asked=True)
    assert worker.asked == [["a=1"]]
    points = ["model.width=8", "model.width=16", "model.width=32", "trainer.seed=8"]
    assert worker.points == [["a=1", point] for point in points]


def test_where_the_data_are_varied_the_first_of_them_may_be_asked(tmp_path):
    worker = Answers(
        {"reason": "no data.path"}, {"metric": ACCURACY.as_dict(), "fingerprint": None}
    )
    space = Space.parse({"data.path": "choice(x,y)", "optimizer.lr": "interval(0,1)"})
    assert learn_data(request(tmp_path), space, worker) == Learned(ACCURACY, asked=True)
    assert worker.asked == [["a=1"], ["a=1", "data.path=x"]]
    assert worker.points is None, "trials have different data"


@pytest.mark.parametrize("dead", [False, True])
def test_data_that_are_required_are_there_or_nobody_knows(tmp_path, dead):
    space = Space.parse({"x": "interval(0,1)"})
    if dead:  # it may only have taken too long
        worker = Answers(WorkerError("it took more than 1 s"))
        assert not learn_data(request(tmp_path), space, worker, required=True).asked
    else:
        with pytest.raises(ConfigError, match="there is no data set of these settings: no file"):
            learn_data(request(tmp_path), space, Answers({"reason": "no file"}), required=True)


def test_a_monitor_that_is_none_is_refused(tmp_path):
    worker = Answers({"problems": ["trainer.monitor=auc: no such metric"]})
    with pytest.raises(ConfigError, match=r"trainer\.monitor=auc"):
        learn_data(request(tmp_path), Space.parse({"x": "interval(0,1)"}), worker)


def test_where_data_cannot_be_made_here_an_earlier_trial_says_it(tmp_path, capsys):
    result = RunResult("completed", "epochs")
    result.describe([ACCURACY], "accuracy")
    (tmp_path / "trial_000").mkdir()
    result.save(tmp_path / "trial_000")
    space = Space.parse({"x": "interval(0,1)"})
    worker = Answers(WorkerError("it took more than 1 s"))
    assert learn_data(request(tmp_path), space, worker).metric.goal == "max"
    assert capsys.readouterr().out == ""


def test_without_any_of_these_it_is_assumed_and_said(tmp_path, capsys):
    space = Space.parse({"x": "interval(0,1)"})
    dead = WorkerError("its process died")
    assert learn_data(request(tmp_path), space, Answers(dead)) == Learned(EARLIER)
    assert "(its process died); val/mae is taken to be monitored" in capsys.readouterr().out
    named = learn_data(request(tmp_path, ["val/loss"]), space, Answers(dead)).metric
    assert (named.name, named.goal) == ("loss", "min")
