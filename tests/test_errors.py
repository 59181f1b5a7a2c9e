from __future__ import annotations

import pytest

from expt.errors import ConfigError, DataError, ExptError, StorageError, UserError, nearest


@pytest.mark.parametrize(
    ("kind", "code", "is_value_error"),
    [
        (ExptError, 1, False),
        (UserError, 2, True),
        (ConfigError, 2, True),
        (DataError, 2, True),
        (StorageError, 1, False),
    ],
)
def test_the_tree(kind: type[ExptError], code: int, is_value_error: bool) -> None:
    error = kind("what is wrong")
    assert isinstance(error, ExptError)
    assert str(error) == "what is wrong"
    assert error.exit_code == kind.exit_code == code
    assert isinstance(error, ValueError) is is_value_error
    assert isinstance(error, UserError) is (code == 2)


def test_a_password_is_in_no_message() -> None:
    error = StorageError("postgresql://me:secret@host/db does not answer")
    assert str(error) == "postgresql://me:***@host/db does not answer"


def test_one_problem_is_its_own_message() -> None:
    for given in ("a is wrong", ["a is wrong"]):
        error = ConfigError(given)
        assert str(error) == "a is wrong"
        assert error.problems == ["a is wrong"]


def test_several_problems_are_a_list() -> None:
    error = ConfigError(("a is wrong", "b too"))
    assert error.problems == ["a is wrong", "b too"]
    assert str(error) == "2 problems in the configuration:\n  - a is wrong\n  - b too"


def test_the_problems_are_the_errors_own() -> None:
    problems = ["a"]
    error = ConfigError(problems)
    problems.append("b")
    assert error.problems == ["a"]


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("lit", ["full", "lite", "minimal"], "did you mean 'lite'?"),
        ("epoch", ["epochs", "device"], "did you mean 'epochs'?"),
        ("learning_rate", ["lr", "eps"], "known names: eps, lr"),
        ("x", ["b", "a", "b"], "known names: a, b"),
        ("x", [], "nothing can be set here"),
    ],
)
def test_the_nearest_name(word: str, known: list[str], expected: str) -> None:
    assert nearest(word, known) == expected


def test_several_near_names_the_nearest_first() -> None:
    known = ["step_factor", "steps_per_epoch", "max_steps", "seed", "step_milestones"]
    said = nearest("step_factors", known)
    assert said.startswith("did you mean 'step_factor'")
    assert nearest("step", ["step1", "step2", "step3", "step4"]).count(" or ") == 2
    assert nearest("step", ["step1", "step2"], count=1).count("'") == 2
