from __future__ import annotations

import warnings

import optuna
import pytest

from expt.config.search_node import Pruner
from expt.errors import ConfigError, UserError
from expt.search import samplers
from expt.search.samplers import make_pruner, make_sampler, seed_of
from expt.search.space import Space

DISCRETE = Space.parse({"a": "choice(1,2)", "b": "range(0,3)"})
ENDLESS = Space.parse({"a": "choice(1,2)", "x": "interval(0.0,1.0)"})
GRID = {"_target_": "optuna.samplers.GridSampler", "_partial_": True, "seed": None}


def test_the_seed_of_the_search_holds_where_the_sampler_has_none():
    def draws(node, seed):
        sampler = make_sampler(node, ENDLESS, seed)
        study = optuna.create_study(sampler=sampler)
        return [study.ask(dict(ENDLESS.distributions)).params["x"] for _ in range(3)]

    node = {"_target_": "optuna.samplers.RandomSampler", "seed": None}
    assert draws(node, 1) == draws(node, 1) != draws(node, 2)
    own = {**node, "seed": 1}
    assert draws(own, 5) == draws(node, 1)


def test_a_grid_has_all_points():
    made = make_sampler(GRID, DISCRETE, 0)
    assert isinstance(made, optuna.samplers.GridSampler)
    assert made._n_min_trials == 6


def test_a_grid_over_an_interval_is_refused_by_name():
    with pytest.raises(ConfigError, match="infinitely many values: x;"):
        make_sampler(GRID, ENDLESS, 0)


def test_a_sampler_that_is_experimental_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        node = {"_target_": "optuna.samplers.QMCSampler", "seed": None}
        assert isinstance(make_sampler(node, ENDLESS, 0), optuna.samplers.QMCSampler)


def test_a_package_that_is_missing_is_one_line_with_the_command(monkeypatch):
    def absent(*arguments, **settings):
        raise RuntimeError("Error in call") from ModuleNotFoundError("no", name="cmaes")

    monkeypatch.setattr(samplers, "instantiate", absent)
    with pytest.raises(UserError, match="pip install cmaes"):
        make_sampler({"_target_": "optuna.samplers.CmaEsSampler"}, ENDLESS, 0)


def test_the_removed_sampler_says_what_takes_its_place():
    node = {"_target_": "hydra_plugins.hydra_optuna_sweeper.config.raise_motpe_removed"}
    with pytest.raises(UserError, match="sampler=tpe"):
        make_sampler(node, ENDLESS, 0)


def test_cma_es_cannot_minimise_two_figures():
    node = {"_target_": "optuna.samplers.CmaEsSampler", "seed": None}
    with pytest.raises(ConfigError, match="nsgaii"):
        make_sampler(node, ENDLESS, 0, objectives=2)


def test_pruners_are_optunas():
    assert isinstance(make_pruner(Pruner.none, 4), optuna.pruners.NopPruner)
    assert isinstance(make_pruner(Pruner.median, 4), optuna.pruners.MedianPruner)
    assert isinstance(make_pruner(Pruner.asha, 4), optuna.pruners.SuccessiveHalvingPruner)
    hyperband = make_pruner(Pruner.hyperband, 27)
    assert isinstance(hyperband, optuna.pruners.HyperbandPruner)
    assert hyperband._max_resource == 27


def test_the_median_ends_nothing_in_the_first_half_of_a_training():
    study = optuna.create_study(pruner=make_pruner(Pruner.median, 4))
    for _ in range(4):
        trial = study.ask()
        for epoch in range(1, 5):
            trial.report(1.0, epoch)
        study.tell(trial, 1.0)
    slow, asked = study.ask(), []
    for epoch in range(1, 5):
        slow.report(9.0, epoch)
        asked.append(slow.should_prune())
    assert asked == [False, False, True, True]


def test_no_two_workers_draw_the_same_numbers_unless_they_share_a_sequence():
    node = {"_target_": "optuna.samplers.RandomSampler", "seed": None}
    made = make_sampler(node, ENDLESS, 3)
    assert seed_of(made, 3, 0) == 3
    assert len({seed_of(made, 3, worker) for worker in range(5)}) == 5
    assert seed_of(make_sampler(GRID, DISCRETE, 3), 3, 4) == 3
