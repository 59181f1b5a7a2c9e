"""What is trained from which epoch on, as it is written and as it is refused."""

from __future__ import annotations

import pytest

from expt.config.stages import Stage, combination_problems, stage_problems, stages_of, unreached
from expt.config.validate import validated


def test_stages_end_where_the_next_begins() -> None:
    assert stages_of(None, 5) == ()
    assert stages_of(["head.*"], 5) == (Stage(0, 4, ("head.*",)),)
    assert stages_of({0: ["head.*"], "2": ["head.*", "body.*"], 3: ["*"]}, 5) == (
        Stage(0, 1, ("head.*",)),
        Stage(2, 2, ("head.*", "body.*")),
        Stage(3, 4, ("*",)),
    )


@pytest.mark.parametrize(
    ("trainable", "words"),
    [
        ("head.*", "must be a list of patterns"),
        ([1], "must be a list of patterns"),
        ({0: "head.*"}, "trainable.0 must be a list"),
        ({"first": ["head.*"]}, "'first' is no epoch"),
        ({-1: ["head.*"]}, "-1 is no epoch"),
        ({True: ["head.*"]}, "True is no epoch"),
        ({1: ["head.*"]}, "must begin with epoch 0"),
        ({0: ["a"], 3: ["b"], 2: ["c"]}, "must rise"),
        ({0: ["a"], "0": ["b"]}, "two stages begin with epoch 0"),
    ],
)
def test_what_is_no_row_of_stages_is_said(trainable, words) -> None:
    (problem,) = stage_problems(trainable)
    assert words in problem


def test_what_stages_cannot_be_combined_with_is_said() -> None:
    assert combination_problems(1, True, True, "alternating") == []
    found = combination_problems(2, True, True, "alternating")
    for problem, words in zip(found, ("fsdp", "weight_offload", "alternating"), strict=True):
        assert words in problem
    assert combination_problems(2, False, False, "prefix") == []


def test_the_command_line_and_yaml_say_the_same(composed) -> None:
    settings = validated(
        composed("trainer.trainable={0: ['embed*'], 2: ['*']}", "trainer.epochs=4")
    )
    assert [stage.first_epoch for stage in settings.trainer.stages] == [0, 2]


def test_a_stage_after_the_last_epoch_is_left_out_and_known() -> None:
    trainable = {0: ["head.*"], 2: ["*"], 7: ["head.*"]}
    assert stages_of(trainable, 3) == (Stage(0, 1, ("head.*",)), Stage(2, 2, ("*",)))
    assert unreached(trainable, 3) == [7] and unreached(trainable, 8) == []
    assert unreached(["*"], 1) == unreached(None, 1) == []
