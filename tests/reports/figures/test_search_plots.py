from __future__ import annotations

import optuna
import pytest
from matplotlib.image import imread
from optuna.distributions import FloatDistribution
from optuna.trial import create_trial

from expt.reports.figures import search_plots as plots
from expt.reports.figures.search_plots import draw
from expt.result import RunResult
from expt.search.trial import KIND

MIB = 1024**2


def study_of(count):
    study = optuna.create_study(study_name="mine")
    for number in range(count):
        peak = (20 + 7 * (number * 5 % 11)) * MIB
        study.add_trial(
            create_trial(
                params={"x": 0.5},
                distributions={"x": FloatDistribution(0, 1)},
                value=3 + 20 * MIB / peak + (number % 3) * 0.2,
                user_attrs={KIND: "complete", "peak_bytes": peak},
                constraints={"peak_memory": (peak - 80 * MIB) / 1024**3},
            )
        )
    return study


def test_two_pictures_are_drawn(tmp_path):
    paths = draw(study_of(12), 80 * MIB, tmp_path)
    assert [path.name for path in paths] == ["history.png", "memory.png"]
    for path in paths:
        picture = imread(path)
        assert picture.shape[:2] == (540, 1050)
        assert picture.std() > 0.05, "it is not blank"


def test_one_trial_and_no_budget_are_enough(tmp_path):
    assert len(draw(study_of(1), None, tmp_path)) == 2


@pytest.mark.parametrize(("unit", "label"), [("km/h", "val/mae (km/h)"), (None, "val/mae")])
def test_the_error_is_in_the_unit_of_the_trials(tmp_path, monkeypatch, unit, label):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    RunResult("completed", "epochs", unit=unit).save(tmp_path / "trial_000")
    draw(study_of(2), None, tmp_path)
    assert [figure.axes[0].get_ylabel() for figure in drawn] == [label, label]


def test_nothing_is_drawn_of_nothing(tmp_path):
    assert draw(study_of(0), None, tmp_path) == []
