"""What to type for a file whose name Hydra's grammar reads as something else."""

from __future__ import annotations

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

NAMES = [
    "a b/x (1).csv",
    "x(1).csv",
    "x,y.csv",
    "a b, c/x=1.csv",
    "it's.csv",
    'the "x".csv',
    "[1]/x.csv",
    "{1}.csv",
    "straße/x#1;2.csv",
    "C:\\my data\\x (1).csv",
]


@pytest.mark.parametrize("name", NAMES)
def test_what_to_type_for_a_file_is_said_and_works(expt, home, name):
    code, _, err = expt("data=traffic", f"data.path={name}")
    assert code == 2
    assert "quote it twice: " in err
    typed = err.partition("quote it twice: ")[2].splitlines()[0]
    (argument,) = shlex.split(typed)
    assert OverridesParser.create().parse_override(argument).value() == name
    code, _, err = expt("data=traffic", argument)
    assert code == 2
    assert f"data.path={name}: there is no such file" in err


def test_a_name_that_the_shell_has_split_is_put_together(expt):
    code, _, err = expt("data=traffic", "data.path=/my", "own", "data/x.csv")
    assert code == 2
    assert """quote it twice: 'data.path="/my own data/x.csv"'""" in err


def test_a_list_that_does_not_end_is_no_name(expt):
    code, _, err = expt("model.patch_sizes=[1,2")
    assert code == 2 and "cannot be read" in err and "quote" not in err


def test_several_values_are_still_a_list_or_a_sweep(expt):
    code, _, err = expt("trainer.seed=1,2")
    assert code == 2 and "add -m" in err and "key=[a,b]" in err and "quote" not in err
