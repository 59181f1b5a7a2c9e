from __future__ import annotations

import pytest

from expt.config.search_node import Pruner, SearchConfig


def test_the_defaults_are_sound():
    assert SearchConfig().problems() == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_trials": 0}, "search.n_trials must be at least 1, got 0"),
        ({"n_trials": -3}, "search.n_trials must be at least 1, got -3"),
        ({"n_jobs": 0}, "search.n_jobs must be at least 1"),
        ({"repeats": 0}, "search.repeats must be at least 1"),
        ({"seed": -1}, "search.seed must be at least 0"),
        ({"study": "a/b"}, "search.study='a/b' names a folder"),
        ({"study": ".."}, "search.study='..' names a folder"),
        ({"study": ""}, "search.study='' names a folder"),
        ({"retry": 2}, "search.retry must be 0 or 1"),
        ({"trial_time_limit_seconds": 0.0}, "search.trial_time_limit_seconds must be a positive"),
        ({"time_limit_seconds": -1.0}, "search.time_limit_seconds must be a positive number"),
        ({"plan_time_limit_seconds": float("inf")}, "search.plan_time_limit_seconds must be"),
        ({"objectives": ["test/mae"]}, "search.objectives must be [val] or [val,peak_memory]"),
        ({"objectives": []}, "search.objectives must be [val] or"),
        ({"objectives": ["peak_memory"]}, "search.objectives must be [val] or"),
        (
            {"objectives": ["val/mae", "peak_memory"], "pruner": Pruner.median},
            "search.pruner=median compares one figure",
        ),
        ({"repeats": 3, "pruner": Pruner.asha}, "search.pruner=asha would compare one seed"),
    ],
)
def test_what_is_out_of_range_is_said(settings, message):
    (problem,) = SearchConfig(**settings).problems()
    assert message in problem
