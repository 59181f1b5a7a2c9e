"""What a search asks of the rest, without processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from expt.config.search_node import SearchConfig
from expt.memory.measuring.device_memory import device_type, total_bytes
from expt.run.process import WorkerError
from expt.search.candidates import (
    TrialJobs,
    advise,
    base_data,
    base_facts,
    checker,
    learn_data,
    predict,
    preset_values,
)
from expt.search.space import Space

SMALL = ["search=debug", "model.num_stages=1", "data.batch_size=4"]
MIB = 1024**2


class FakeWorker:
    def __init__(self, answer):
        self.answer = answer

    def call(self, *arguments, seconds):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_a_trial_is_the_command_line_with_what_the_search_decides(tmp_path):
    given = ["search=debug", "trainer.test=true", "memory.budget=80%", "memory.on_overflow=refuse"]
    jobs = TrialJobs(given, None, tmp_path, 5000, worker=FakeWorker(None))
    lines = jobs.lines(3, ["model.embed_dim=8"])
    assert lines[: len(given)] == [
        "search=debug", "memory.budget=80%", "memory.on_overflow=refuse", "model.embed_dim=8",
    ]  # fmt: skip
    for wanted in ("search.trial=3", "memory.on_overflow=train", "memory.budget=5000"):
        assert wanted in lines[len(given) :]
    assert f'tracking.parent="{tmp_path}"' in lines


@pytest.mark.parametrize("answer", [WorkerError("its process died"), "RuntimeError: no trace"])
def test_what_cannot_be_predicted_is_said_once_and_measured(tmp_path, capsys, answer):
    jobs = TrialJobs([], None, tmp_path, 5000, worker=FakeWorker(answer))
    assert jobs.predict(["a=1"]) is None
    assert jobs.predict(["a=2"]) is None
    assert capsys.readouterr().out.count("cannot be predicted") == 1


def test_planning_may_be_off(tmp_path):
    jobs = TrialJobs([], None, tmp_path, 5000, plan=False, worker=FakeWorker(AssertionError()))
    assert jobs.predict(["a=1"]) is None


def test_a_prediction_is_the_plans(home):
    found = predict([*SMALL, "memory.budget=1GiB", "search.trial=1"], None)
    assert found.refusal is None
    low, high = found.interval_bytes
    assert low < found.peak_bytes == found.demand_bytes < high
    assert found.plan["peak_bytes"] == found.peak_bytes
    assert not found.exceeds(low)
    assert found.exceeds(low - 1)


def test_settings_that_contradict_each_other_are_refused_in_words(home):
    found = predict([*SMALL, "memory.gradient_accumulation=9"], None)
    assert "more parts than there are samples" in found.refusal
    assert found.plan is None


def test_advice_fits_the_budget(home):
    lines = [*SMALL, "data.batch_size=64", "search.trial=1"]
    peak = predict(lines, None).peak_bytes
    advice = advise(lines, None, int(peak * 0.8))
    assert "memory." in advice


def test_the_facts_that_all_trials_share(home):
    assert base_facts([*SMALL, "memory.budget=200MiB"], None) == {
        "problems": [], "budget_bytes": 200 * MIB, "device": device_type("auto"),
        "device_bytes": total_bytes(torch.device(device_type("auto"))),
    }  # fmt: skip
    found = base_facts([*SMALL, "memory.budget=none", "trainer.epochs=0"], None)
    assert len(found["problems"]) == 2


def test_a_preset_gives_its_values_to_the_space(home):
    names = ["model.embed_dim", "model.patch_sizes", "memory.precision", "not.there"]
    found = preset_values("full", names, ["memory=lite", "trainer.epochs=1"], None)
    assert found == {
        "model.embed_dim": 96, "model.patch_sizes": [1, 2, 4], "memory.precision": "auto",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("optimizer.lr=0.001", None),
        ("model.patch_sizes=[1,2]", None),
        ("memory.precision=bf16", None),
        ("memory.activation_checkpointing=2", None),
        ("optimizer=sgd", None),
        ("memory=lite", None),
        ("+optimizer.amsgrad=true", None),
        ("optimizer.amsgrad=true", "write +optimizer.amsgrad"),
        ("optimizer=sgdd", "did you mean 'sgd'"),
        ("optimiser.lr=0.1", "there is no 'optimiser'"),
        ("trainer.epoch=3", "did you mean 'trainer.epochs'"),
        ("trainer.epochs=2.5", "trainer.epochs=2.5"),
        ("model.embed_dim=2.5", "expected int"),
        ("memory.precision=fp8", "fp8"),
    ],
)
def test_a_setting_is_judged_by_its_name_and_type(composed, line, problem):
    found = checker(composed())(line)
    assert (found is None) if problem is None else (problem in found)


def test_a_file_of_the_users_own_is_an_option_of_its_group(composed, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mynet.yaml").write_text("_target_: my_lab.MyNet\n")
    check = checker(composed(), str(tmp_path))
    assert check("model=mynet") is None
    assert check("model=stid") is None
    assert "did you mean 'mynet'" in check("model=mynett")
    assert "no such option" in checker(composed())("model=mynet")


def test_a_trial_does_not_learn_the_address_of_the_study(tmp_path):
    given = ["search=debug", "search.storage=postgresql://me:word@host/db", "memory.plan_file=x"]
    lines = TrialJobs(given, None, tmp_path, None).lines(3, ["model.dropout=0.1"])
    assert not any(line.startswith(("search.storage", "memory.plan_file")) for line in lines)
    assert "search=debug" in lines


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([], ("metric", "mae")),
        (["trainer.monitor=rmse"], ("metric", "rmse")),
        (["trainer.monitor=auc"], ("problems", "trainer.monitor=auc: the data set has no such")),
        (["data.path=nowhere.npz"], ("reason", "there is no such file")),
        (["data=nothing"], ("reason", "nothing")),
    ],
)
def test_the_metric_of_these_settings_or_what_stands_in_the_way(home, lines, found):
    answer = base_data(["tracking=none", *lines], None, [])
    kind, words = found
    assert list(answer) == ([kind, "fingerprint"] if kind == "metric" else [kind])
    assert words in str(answer[kind])


@pytest.mark.parametrize(
    ("point", "shared"),
    [
        (["model.embed_dim=8", "data.batch_size=4"], True),
        (["data.horizon=6"], False),
        (["data.horizon=${trainer.seed}", "trainer.seed=6"], False),
        (["data.horizon=${model.nothing}"], False),
    ],
)
def test_the_fingerprint_is_that_of_data_that_all_trials_share(home, point, shared):
    found = base_data(["tracking=none"], None, [["tracking=none"], ["tracking=none", *point]])
    assert (found["fingerprint"] is not None) is shared


@pytest.mark.parametrize(
    ("space", "shared"),
    [
        ({"model.embed_dim": "choice(8,16)", "data.batch_size": "choice(2,4)"}, True),
        ({"data.train_fraction": "interval(0.6,0.65)"}, False),
        ({"trainer.seed": "choice(0,1,2)"}, False),
        ({"optimizer.lr": "interval(1e-4,12.0)"}, False),
    ],
)
def test_a_search_knows_whether_any_of_its_points_has_other_data(home, space, shared):
    """One choice in between, or one end, is enough."""

    class Here:
        def call(self, function, *arguments, seconds):
            return function(*arguments)

    given = ["tracking=none", "data.horizon='${horizon_of:${trainer.seed},${optimizer.lr}}'"]
    OmegaConf.register_resolver(
        "horizon_of", lambda seed, lr: 6 if seed == 1 or lr > 10 else 12, replace=True
    )
    request = SimpleNamespace(
        config=SearchConfig(), cfg=SimpleNamespace(trainer=SimpleNamespace(seed=0)), given=given,
        own=None, folder=home,
    )  # fmt: skip
    learned = learn_data(request, Space.parse(space), Here())
    assert learned.metric.name == "mae" and learned.asked
    assert (learned.fingerprint is not None) is shared
