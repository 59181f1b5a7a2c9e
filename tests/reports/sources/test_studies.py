"""A study in a real Optuna storage, with the attributes that a search gives its trials."""

from __future__ import annotations

import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState

from expt.reports.records import ranked_by
from expt.reports.sources.folders import runs_in_folders
from expt.reports.sources.studies import StudyError, load
from expt.search.winner import SweepSummary

GIB = 2**30
SPACE = {"model.dropout": FloatDistribution(0, 0.3), "data.batch_size": IntDistribution(4, 32)}


def ranked(patterns, metric=None):
    return ranked_by(runs_in_folders(patterns), metric)


@pytest.fixture
def swept(tmp_path, put_run):
    """A search's folder with four trials: trained, over budget by prediction, repeated, failed."""
    storage = f"sqlite:///{tmp_path}/optuna.db"
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(study_name="tiny", storage=storage)
    folder = tmp_path / "sweep"
    put_run(folder / "trial_0000", 3.9, peak=GIB // 2, batch_size=8)

    def add(batch_size: int, kind: str, value: float | None, **attributes: object) -> None:
        state = TrialState.COMPLETE if value else TrialState.PRUNED
        trial = optuna.create_trial(
            state=state,
            value=value,
            params={"model.dropout": 0.1, "data.batch_size": batch_size},
            distributions=SPACE,
            user_attrs={"kind": kind, **attributes},
        )
        study.add_trial(trial)

    add(8, "complete", 3.9, run_dir=str(folder / "trial_0000"), peak_bytes=GIB // 2, seconds=7.0)
    add(32, "infeasible_predicted", None, predicted_peak_bytes=3 * GIB)
    add(8, "duplicate", 3.9, duplicate_of=0)
    add(16, "nan", None, error="the loss is not finite")
    SweepSummary("tiny", 4, budget_bytes=GIB, storage=storage).save(folder)
    return folder


def test_trials_are_joined_with_their_runs(swept) -> None:
    runs = ranked([str(swept)])
    assert runs.study == "tiny"
    assert set(runs.space) == set(SPACE)
    assert [(r.name, r.outcome.value) for r in runs.records] == [
        ("trial 0", "completed"),
        ("trial 1", "predicted_over"),
        ("trial 3", "diverged"),
    ], "a duplicate is no run"
    trained, spared, failed = runs.records
    assert (trained.value, trained.seconds, trained.peak_allocated_bytes) == (3.9, 7.0, GIB // 2)
    assert trained.metrics["test/mae"] == pytest.approx(4.1), "from the run's folder"
    assert trained.settings["trainer.seed"] == "0"
    assert spared.predicted_peak_bytes == 3 * GIB
    assert spared.settings["data.batch_size"] == "32"
    assert failed.detail == "the loss is not finite"
    assert {r.budget_bytes for r in runs.records} == {GIB}
    assert runs.parameters[1] == {"model.dropout": 0.1, "data.batch_size": 32}


def test_another_metric_than_the_search_minimised_is_the_runs_own(swept) -> None:
    trained = ranked([str(swept)], "test/mae").records[0]
    assert trained.value == pytest.approx(4.1), "3.9 is what the study was told: val/mae"


def test_another_budget_is_compared_with_what_trials_demanded(swept, tmp_path) -> None:
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{tmp_path}/optuna.db")
    attributes = {"peak_bytes": GIB // 2, "demand_bytes": 2 * GIB, "budget_bytes": GIB}
    study.add_trial(
        optuna.create_trial(value=3.0, user_attrs={"kind": "infeasible_measured", **attributes})
    )
    trained, *_, over = ranked([str(swept)]).records
    assert over.run_dir is None
    assert (over.outcome.value, over.demand_bytes, over.peak_allocated_bytes) == (
        "over_budget", 2 * GIB, GIB // 2,
    )  # fmt: skip
    assert [trained.fits(GIB), over.fits(GIB)] == [True, False]
    assert over.fits(2 * GIB) and not over.fits(GIB + 1)
    assert not trained.fits(GIB // 4)


def test_what_was_compared_before_a_run_is_the_budget_and_the_excess(swept, tmp_path) -> None:
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{tmp_path}/optuna.db")
    attributes = {"predicted_peak_bytes": GIB // 2, "budget_bytes": GIB}
    for kind in ("predicted_over", "pruned"):
        study.add_trial(
            optuna.create_trial(
                state=TrialState.PRUNED,
                user_attrs={"kind": kind, **attributes},
                constraints={"peak_memory": 0.5},
            )
        )
    *_, over, pruned = ranked([str(swept)]).records
    assert over.predicted_demand_bytes == 3 * GIB // 2
    assert pruned.predicted_demand_bytes is None, "its excess was measured"


def test_the_retraining_in_a_searchs_folder_has_a_page_of_its_own(swept, put_run, tmp_path) -> None:
    inner, storage = swept / "tiny_retrained", f"sqlite:///{tmp_path}/optuna.db"
    optuna.create_study(study_name="tiny_retrained", storage=storage).add_trial(
        optuna.create_trial(value=3.0, user_attrs={"kind": "completed"})
    )
    put_run(inner / "trial_000", 3.0)
    SweepSummary("tiny_retrained", 1, storage=storage).save(inner)
    assert [r.value for r in ranked([str(swept)]).records if r.outcome.trained] == [3.9]
    found = ranked([str(inner)])
    assert (found.study, [r.value for r in found.records]) == ("tiny_retrained", [3.0])


def test_a_searchs_folder_may_have_been_moved(swept) -> None:
    trained = ranked([str(swept.rename(swept.parent / "kept"))]).records[0]
    assert trained.metrics["test/mae"] == pytest.approx(4.1), "from the run's folder"
    assert trained.prediction_error == 0


def test_the_runs_of_a_trials_seeds_are_one(swept, tmp_path, put_run) -> None:
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{tmp_path}/optuna.db")
    seeds = {seed: swept / f"trial_0004/seed_{seed}" for seed in (0, 1)}
    for seed, error in ((0, 3.0), (1, 4.0)):
        put_run(seeds[seed], error, seed=seed)
    peaks = {"peak_bytes": GIB, "predicted_peak_bytes": GIB}
    for run_dir in (seeds[0].parent, tmp_path / "gone"):
        attributes = {"kind": "completed", "run_dir": str(run_dir), **peaks}
        study.add_trial(optuna.create_trial(value=3.5, user_attrs=attributes))
    study.add_trial(optuna.create_trial(value=3.5, user_attrs={**attributes, "oom_events": 1}))
    runs = ranked([str(swept)])
    *_, trial, lost, recovered = runs.records
    assert recovered.prediction_error is None, "its peak is of other settings than its prediction"
    assert (trial.value, trial.metrics["test/mae"]) == (3.5, pytest.approx(3.7))
    assert trial.settings["model.embed_dim"] == "64"
    assert "trainer.seed" not in trial.settings, "it is of both"
    assert (trial.run_dir, lost.prediction_error) == (str(seeds[0].parent), 0)
    assert runs.notes[0].startswith(f"Of 2 trained trials there is no folder in {swept}: ")


def test_runs_from_elsewhere_stay(swept, tmp_path, put_run) -> None:
    put_run(tmp_path / "alone", 2.0, started=1.0)
    runs = ranked([str(swept), str(tmp_path / "alone")])
    assert [r.name for r in runs.records] == ["alone", "trial 0", "trial 1", "trial 3"]
    assert runs.study is None


def test_a_journal_is_read_as_well(tmp_path) -> None:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = tmp_path / "study.journal"
    optuna.create_study(study_name="tiny", storage=JournalStorage(JournalFileBackend(str(path))))
    assert load(SweepSummary("tiny", 4, storage=str(path))).study_name == "tiny"


def test_a_study_that_is_not_there(swept, tmp_path) -> None:
    storage = f"sqlite:///{tmp_path}/optuna.db"
    with pytest.raises(StudyError, match="the study other cannot be read"):
        load(SweepSummary("other", 4, storage=storage))
    with pytest.raises(StudyError, match="does not say where"):
        load(SweepSummary("other", 4))


def test_a_hidden_password_is_left_to_the_driver(monkeypatch) -> None:
    opened: list[tuple[str, dict]] = []

    def refuse(url: str, engine_kwargs: dict) -> None:
        opened.append((url, engine_kwargs))
        raise OSError("no password supplied")

    monkeypatch.setattr(optuna.storages, "RDBStorage", refuse)
    with pytest.raises(StudyError, match=r"no password supplied; its password is never .*PGPASS"):
        load(SweepSummary("tiny", 4, storage="postgresql://me:***@host/db"))
    with pytest.raises(StudyError, match=r"no password supplied$"):
        load(SweepSummary("tiny", 4, storage="postgresql://me@host/db"))
    assert {url for url, _ in opened} == {"postgresql://me@host/db"}
    assert opened[0][1]["connect_args"] == {"connect_timeout": 10}
