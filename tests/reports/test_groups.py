from __future__ import annotations

import pytest

from expt.reports.groups import LIMIT, groups_by_data
from expt.reports.records import RunSet
from expt.result import Outcome

SPEEDS = {
    "data._target_": "expt.jobs.traffic.data.TrafficData",
    "data.path": "expt://metr_la_29.npz",
    "data.horizon": "12",
    "data.batch_size": "16",
    "trainer.eval_batches": "None",
}


def shown(*records, **about):
    groups = groups_by_data(RunSet(records, "here", **about))
    return {group.name: [record.name for record in group.records] for group in groups}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data.batch_size", "64"),
        ("data.eval_batch_size", "8"),
        ("data.adjacency_path", "roads.csv"),
        ("data.expected_sensors", "29"),
        ("data.input_steps", "24"),
        ("model.embed_dim", "8"),
        ("trainer.epochs", "2"),
    ],
)
def test_what_does_not_change_what_is_measured_on_does_not_part_runs(record, name, value) -> None:
    runs = record("a", 3.0, settings=SPEEDS), record("b", 2.0, settings={**SPEEDS, name: value})
    assert shown(*runs) == {"metr_la_29": ["a", "b"]}


@pytest.mark.parametrize(
    ("name", "value", "names"),
    [
        ("data.path", "/x/ten.npz", ["metr_la_29", "ten"]),
        ("data.horizon", "6", ["metr_la_29 horizon=12", "metr_la_29 horizon=6"]),
        ("data._target_", "my.Own", ["metr_la_29 TrafficData", "metr_la_29 Own"]),
        ("data.noise", "0.5", ["metr_la_29", "metr_la_29 noise=0.5"]),
        ("trainer.eval_batches", "2", ["metr_la_29", "metr_la_29 eval_batches=2"]),
    ],
)
def test_what_does_parts_them_and_gives_them_a_name(record, name, value, names) -> None:
    """The data with the most errors come first, and their runs keep their order."""
    other = {**SPEEDS, name: value}
    found = shown(
        record("a", 3.0, settings=other),
        record("b", 3.0, settings=SPEEDS),
        record("c", None, settings=other),
        record("d", 2.0, settings=SPEEDS),
    )
    assert list(found.items()) == [(names[0], ["b", "d"]), (names[1], ["a", "c"])]


def test_a_relative_path_starts_where_the_run_was_started(record) -> None:
    settings = [{**SPEEDS, "data.path": path} for path in ("../ten.npz", "/home/ten.npz")]
    runs = [
        record("a", 1.0, settings=settings[0], cwd="/home/here"),
        record("b", 1.0, settings=settings[1], cwd="/home/here"),
        record("c", 1.0, settings=settings[0], cwd="/lab/here"),
    ]
    assert shown(*runs) == {"ten in home": ["a", "b"], "ten in lab": ["c"]}


def test_what_a_search_varies_is_compared_on_purpose(record) -> None:
    runs = [record(str(n), 1.0, trial=n, settings={**SPEEDS, "data.horizon": n}) for n in (6, 12)]
    assert len(shown(*runs)) == 2
    for name in ("data.horizon", "+data.horizon", "data"):
        assert len(shown(*runs, space={name: None})) == 1


def test_a_record_from_before_the_setting_was_in_miles_per_hour(record) -> None:
    mph, kmh = ({**SPEEDS, "data.unit": unit} for unit in ("mph", "km/h"))
    runs = [record(str(n), 1.0, settings=one) for n, one in enumerate((SPEEDS, mph, kmh))]
    assert sorted(shown(*runs).values()) == [["0", "1"], ["2"]]


def test_where_no_data_are_recorded(record) -> None:
    trial = record(
        "trial 1", None, trial=1, outcome=Outcome.predicted_over, settings={"model.width": "8"}
    )
    lost = record("lost", None, outcome=Outcome.unfinished)
    known = record("trial 0", 3.0, trial=0, settings=SPEEDS)
    assert shown(known, trial, lost) == {"metr_la_29": ["trial 0", "trial 1", "lost"]}
    assert len(shown(known, record("old", 1.0))) == 2, "an error of it is ranked with no other"
    assert shown(lost) == shown(record("lost", 1.0)) == {"not recorded": ["lost"]}
    own = {"data._target_": "my_lab.Rain"}
    assert list(shown(record("a", 1.0, settings=own))) == ["Rain"], "without a file, its class"


def test_runs_with_the_same_fingerprint_are_on_the_same_data_wherever_they_lie(record) -> None:
    def on(name, path, mark):
        settings = {**SPEEDS, "data.path": path}
        return record(name, 1.0, settings=settings, fingerprint=mark)

    one, moved = on("one", "/a/la.npz", "11"), on("moved", "/b/la.npz", "11")
    earlier, changed = on("earlier", "/b/la.npz", None), on("changed", "/a/la.npz", "22")
    assert shown(one, moved, earlier, changed) == {
        "la": ["one", "moved", "earlier"],
        "la fingerprint=22": ["changed"],
    }
    part = record("part", 1.0, settings={**one.settings, LIMIT: "2"}, fingerprint="11")
    assert len(shown(one, part)) == 2, "a part of the data is other data"


def test_a_fingerprint_that_a_search_changes_on_purpose_parts_nothing(record) -> None:
    runs = [
        record(str(n), 1.0, trial=n, fingerprint=str(n), settings={**SPEEDS, "data.horizon": n})
        for n in (6, 12)
    ]
    assert len(shown(*runs, space={"data.horizon": None})) == 1
    assert len(shown(*runs, space={"data.batch_size": None})) == 2


def test_a_class_that_has_moved_since_is_the_same_one(record) -> None:
    earlier = {**SPEEDS, "data._target_": "expt.data.traffic.TrafficData"}
    assert len(shown(record("a", 1.0, settings=SPEEDS), record("b", 1.0, settings=earlier))) == 1
