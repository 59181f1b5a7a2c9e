from __future__ import annotations

from typing import get_args

import pytest

from expt.reports.records import KIND_STATES, STATES, State, metric_header, metric_words
from expt.search.trial import Kind


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("val/mae", "validation MAE"),
        ("test/mae_15min", "test mae 15min"),
        ("seconds", "seconds"),
        ("val/accuracy", "validation accuracy"),
    ],
)
def test_a_metric_in_words(metric, words) -> None:
    assert metric_words(metric) == words
    assert metric_header("val/mae") == "val MAE"


def test_every_state_and_every_end_of_a_trial_has_words() -> None:
    assert set(STATES) == set(get_args(State))
    assert set(KIND_STATES.values()) <= set(STATES)
    assert set(KIND_STATES) == set(get_args(Kind)) - {"duplicate"}
