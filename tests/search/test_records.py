"""What the tracker is told, against a real SQLite store of MLflow."""

from __future__ import annotations

import optuna
import pytest
from optuna.trial import TrialState

from expt.config.schema import TrackingConfig
from expt.search.records import Records, recorded, tags_of
from expt.search.trial import KIND
from expt.search.winner import SweepSummary
from expt.tracking import delivery
from expt.tracking.delivery import Deliveries
from expt.tracking.mlflow import DeferredTracker
from expt.tracking.store import MlflowStore

PARENT, STATUS = "mlflow.parentRunId", "RUNNING"


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    MlflowStore(uri)
    return uri


@pytest.fixture
def make(uri, tmp_path):
    opened = []

    def make(name="sweep"):
        config = TrackingConfig(uri=uri, experiment=tmp_path.name, flush_seconds=20)
        records = Records(config, tmp_path / name, "mine")
        opened.append(records)
        return records

    yield make
    for records in opened:
        records._deliveries.close(0)


@pytest.fixture
def runs(uri, tmp_path):
    from mlflow import MlflowClient

    def runs():
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(tmp_path.name)
        found = client.search_runs([experiment.experiment_id])
        return {run.info.run_name: run for run in found}

    return runs


def told(study, value=None, state=TrialState.COMPLETE, **attributes):
    trial = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
    for name, given in attributes.items():
        trial.set_user_attr(name, given)
    trial.set_constraint("peak_memory", -0.5)
    study.tell(trial, value, state)
    return study.trials[-1]


def summary(**figures):
    return SweepSummary("mine", 3, **figures)


def test_parent_and_children_say_what_the_study_says(make, runs, tmp_path):
    records, study = make(), optuna.create_study()
    records.open({"search": {"pruner": "none"}})
    done = told(study, 3.5, **{KIND: "completed", "predicted_peak_bytes": 7})
    failed = told(study, None, TrialState.FAIL, **{KIND: "failed", "error": "no file"})
    never = told(study, None, TrialState.PRUNED, **{KIND: "predicted_over"})
    untracked = told(study, 3.75, **{KIND: "completed"})
    for trial in (done, failed):
        records.start(trial.number, tmp_path / f"sweep/trial_{trial.number:03d}")
    for trial in (done, failed, never, untracked):
        records.told(trial, tmp_path / f"sweep/trial_{trial.number:03d}")
    best = {"trial": 0, "params": {"x": 0.5}, "val/mae": 3.5, "peak_allocated_bytes": 6,
            "run_id": "r", "test/mae": 3.6}  # fmt: skip
    records.summary(summary(finished=2, best=best))
    records.close("FINISHED", summary(finished=2, best=best))
    found = runs()
    parent = found["search-mine"]
    assert parent.info.status == "FINISHED"
    assert parent.data.params["search.pruner"] == "none"
    assert parent.data.metrics["n_trials"] == 3
    assert parent.data.metrics["best/val/mae"] == 3.5
    assert parent.data.metrics["test/mae"] == 3.6
    assert parent.data.tags["best.x"] == "0.5"
    statuses = {name: run.info.status for name, run in found.items() if name != "search-mine"}
    assert statuses == {
        "mine-000": "FINISHED", "mine-001": "FAILED", "mine-002": "KILLED", "mine-003": "FINISHED",
    }  # fmt: skip
    assert found["mine-003"].data.metrics["val/mae"] == 3.75, "no process of its own recorded it"
    assert "val/mae" not in found["mine-000"].data.metrics
    for name, trial in (("mine-000", done), ("mine-001", failed), ("mine-002", never)):
        tags = found[name].data.tags
        assert tags[PARENT] == parent.info.run_id
        assert tags["trial.number"] == str(trial.number)
        assert tags["trial.state"] == trial.state.name
        assert tags["trial.kind"] == trial.user_attrs[KIND]
        assert tags["trial.constraint"] == "-0.5"
    assert found["mine-000"].data.metrics["memory/predicted_peak_bytes"] == 7
    assert found["mine-001"].data.tags["trial.error"] == "no file"
    assert found["mine-002"].data.params == {"x": str(never.params["x"])}


def test_a_trial_that_the_study_knows_and_the_tracker_does_not_is_recorded_later(
    make, runs, tmp_path
):
    """A worker was killed between the two."""
    study = optuna.create_study()
    records = make()
    records.open({})
    folder = tmp_path / "sweep/trial_000"
    records.start(0, folder)
    told(study, 1.0, **{KIND: "completed"})
    assert not recorded(folder, study.trials[0])
    again = make()
    again.open({})
    again.reconcile(study, lambda number: tmp_path / f"sweep/trial_{number:03d}")
    again.close("FINISHED", summary())
    assert recorded(folder, study.trials[0])
    assert runs()["mine-000"].info.status == "FINISHED"
    assert not [run for run in runs().values() if run.info.status == STATUS]
    before = (folder / "tracking.jsonl").read_bytes()
    third = make()
    third.reconcile(study, lambda number: tmp_path / f"sweep/trial_{number:03d}")
    assert (folder / "tracking.jsonl").read_bytes() == before, "it is recorded once"


def test_a_run_that_began_again_after_its_end_was_told_is_not_closed(make, tmp_path):
    study = optuna.create_study()
    records, folder = make(), tmp_path / "sweep/trial_000"
    trial = told(study, 1.0, **{KIND: "completed"})
    records.told(trial, folder)
    assert recorded(folder, trial)
    tracker = DeferredTracker("sqlite:///x.db", "e", folder, None)
    tracker.start("again", {}, {})
    tracker.close()
    assert not recorded(folder, trial)


def test_without_tracking_there_is_sweep_json_alone(tmp_path):
    records = Records(TrackingConfig(uri=None), tmp_path / "sweep", "mine")
    study = optuna.create_study()
    records.open({})
    records.start(0, tmp_path / "sweep/trial_000")
    records.told(told(study, 1.0, **{KIND: "completed"}), tmp_path / "sweep/trial_000")
    records.summary(summary(finished=1))
    records.close("FINISHED", summary(finished=1))
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["sweep.json"]
    assert SweepSummary.load(tmp_path / "sweep").finished == 1


def test_tags_leave_out_what_is_not_known_and_who_did_it():
    study = optuna.create_study()
    trial = told(study, 1.0, **{KIND: "completed", "worker": {"pid": 1}, "interval_bytes": [1, 2]})
    tags = tags_of(trial)
    assert tags["trial.interval_bytes"] == "[1, 2]"
    assert "trial.worker" not in tags
    assert tags["trial.param.x"] == str(trial.params["x"])


class Store:
    """A store that takes runs, and knows them by their key."""

    def __init__(self, uri):
        self.uri, self.runs = uri, {}

    def open_run(self, experiment, root, key, name, *rest):
        self.runs.setdefault(f"{self.uri} {key}", (name, {}))
        return f"{self.uri} {key}"

    def resume(self, run_id, parameters, tags):
        self.runs[run_id][1].update(tags)

    def __getattr__(self, name):
        return lambda *values: None


@pytest.fixture
def stores(monkeypatch):
    stores = {uri: Store(uri) for uri in ("http://first", "http://second")}

    def opened(self, target):
        Deliveries.__init__(self, target, stores.__getitem__)

    monkeypatch.setattr(delivery, "Deliveries", type("Opened", (Deliveries,), {"__init__": opened}))
    return stores


def test_a_search_that_goes_on_with_another_store_has_all_trials_there(stores, tmp_path):
    study = optuna.create_study()
    for uri, store in stores.items():
        records = Records(TrackingConfig(uri=uri, flush_seconds=20), tmp_path, "mine")
        records.open({})
        records.reconcile(study, lambda number: tmp_path / f"{number}")
        trial = told(study, 1.0, **{KIND: "completed"})
        records.start(trial.number, tmp_path / f"{trial.number}")
        records.told(trial, tmp_path / f"{trial.number}")
        records.close("FINISHED", summary())
        _, *trials = store.runs.values()
        assert [name for name, _ in trials] == [
            f"mine-{number:03d}" for number in range(len(study.trials))
        ]
        assert {tags[PARENT] for _, tags in trials} == {next(iter(store.runs))}


def test_seeds_are_under_their_trial_in_another_store_too(stores, tmp_path):
    for seed, (uri, store) in enumerate(stores.items()):
        records = Records(TrackingConfig(uri=uri, flush_seconds=20), tmp_path, "mine")
        records.open({})
        records.start(0, tmp_path / "0", own_process=False)
        own = DeferredTracker(uri, "expt", tmp_path / f"0/seed_{seed}", None, tmp_path / "0")
        own.start("seed", {}, {})
        own.close()
        records._send(tmp_path / f"0/seed_{seed}")
        assert records._deliveries.close(20)  # and the worker is killed
        ids = list(store.runs)
        assert [tags.get(PARENT) for _, tags in store.runs.values()] == [None, *ids[:2]]


def test_seeds_of_a_trial_that_has_ended_are_in_another_store_too(stores, tmp_path):
    study = optuna.create_study()
    trial = told(study, 1.0, **{KIND: "completed"})
    for number, (uri, store) in enumerate(stores.items()):
        records = Records(TrackingConfig(uri=uri, flush_seconds=20), tmp_path, "mine")
        records.open({})
        if number == 0:
            records.start(0, tmp_path / "0", own_process=False)
            own = DeferredTracker(uri, "expt", tmp_path / "0/seed_3", None, tmp_path / "0")
            own.start("seed", {}, {})
            own.finish("FINISHED")
            records.told(trial, tmp_path / "0")
        records.reconcile(study, lambda number: tmp_path / f"{number}")
        records.close("FINISHED", summary())
        ids = list(store.runs)
        assert [name for name, _ in store.runs.values()] == ["search-mine", "mine-000", "seed"]
        assert [tags.get(PARENT) for _, tags in store.runs.values()] == [None, *ids[:2]]


def test_the_run_of_a_seed_whose_process_was_killed_is_closed_with_its_trial(make, runs, tmp_path):
    study, records = optuna.create_study(), make()
    records.open({})
    folder = tmp_path / "sweep/trial_000"
    records.start(0, folder, own_process=False)
    for seed in (0, 1):
        config = records.tracking
        own = DeferredTracker(
            config.uri, config.experiment, folder / f"seed_{seed}", None, parent_directory=folder
        )
        own.start(f"seed {seed}", {}, {})
        if seed == 0:
            own.finish("FINISHED")
        own.close()
    records.told(told(study, None, TrialState.FAIL, **{KIND: "killed"}), folder)
    records.close("FINISHED", summary())
    found = {name: run.info.status for name, run in runs().items()}
    assert found == {
        "search-mine": "FINISHED", "mine-000": "FAILED", "seed 0": "FINISHED", "seed 1": "FAILED",
    }  # fmt: skip


def test_seeds_that_did_not_arrive_with_their_trial_follow_later(stores, tmp_path):
    study = optuna.create_study()
    uri, store = next(iter(stores.items()))
    trial = told(study, 1.0, **{KIND: "completed"})
    for start in (0, 1):
        records = Records(TrackingConfig(uri=uri, flush_seconds=20), tmp_path, "mine")
        records.open({})
        if start == 0:
            records.start(0, tmp_path / "0", own_process=False)
            records.told(trial, tmp_path / "0")
            assert records._deliveries.close(20)  # and the worker is killed
            own = DeferredTracker(uri, "expt", tmp_path / "0/seed_3", None, tmp_path / "0")
            own.start("seed", {}, {})
            own._record("end", status="FINISHED")
            own.close()
            store.runs = {key: run for key, run in store.runs.items() if run[0] != "seed"}
            continue
        records.reconcile(study, lambda number: tmp_path / f"{number}")
        records.close("FINISHED", summary())
    assert [name for name, _ in store.runs.values()] == ["search-mine", "mine-000", "seed"]
