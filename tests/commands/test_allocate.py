"""A budget is divided over a training, and what fits into it is found by plans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from expt.commands.allocate.allocator import first_level
from expt.commands.allocate.measures import trained_without_the_largest
from expt.commands.allocate.scales import levels
from expt.units import parse_bytes

LINE = (
    "task=allocate", "model=stid", "memory=minimal", "debug=smoke", "tracking=none",
    "memory.target=cpu", "hydra.run.dir=out", "data.batch_size=64", "data.eval_batch_size=8",
    "model.num_layers=1",
)  # fmt: skip

CHECKPOINTED = ("memory.activation_checkpointing=true",)
ONE_WAY = (*CHECKPOINTED, "memory.precision=bf16")
"""Of four ways to compute a step the one that takes least, where ways are not what is asked."""


def recorded(folder: Path) -> dict:
    record: dict = json.loads((folder / "out" / "allocation.json").read_text())
    return record


def allocated(expt, home, *more: str, code: int = 0) -> dict:
    got, out, err = expt(*LINE, *more, small=False)
    assert got == code, err
    record = recorded(home)
    answers = [line for line in out.splitlines() if line.startswith(("fits ", "does NOT fit"))]
    assert [answer.startswith("fits") for answer in answers] == [record["fits"]]
    return record


@pytest.fixture(scope="module")
def whole(once) -> dict:
    """What is found with more than enough."""
    return recorded(once(*LINE, "memory.budget=1GiB"))


def planned_peak(expt, home, *settings: str) -> int:
    line = [part for part in LINE if not part.startswith(("task", "hydra"))]
    assert expt("task=plan", *line, *settings, "hydra.run.dir=plan", small=False)[0] == 0
    return json.loads((home / "plan" / "plan.json").read_text())["peak_bytes"]


def test_what_is_recommended_is_inside_the_budget_by_a_plan_of_its_own(expt, home, whole) -> None:
    chosen = whole["chosen"]
    assert chosen["gradient_accumulation"] == 1 and not whole["emergency"]
    assert sum(chosen["by_category"].values()) == parse_bytes("1GiB")
    assert chosen["gflops_per_sample"] > 0
    assert whole["handbook"]["parameters"] == chosen["by_category"]["parameters"]
    budget = int(chosen["taken_bytes"] / whole["margin"] * 0.8)
    record = allocated(expt, home, f"memory.budget={budget}")
    assert record["chosen"]["changes"] != chosen["changes"]
    peak = planned_peak(expt, home, *record["chosen"]["changes"])
    assert peak == record["chosen"]["peak_bytes"] <= record["margin"] * budget


def test_the_checklist_has_the_bytes_of_every_change_the_most_useful_first(
    expt, home, whole
) -> None:
    saved = [row["saved_bytes"] for row in whole["checklist"]]
    assert saved == sorted(saved, reverse=True) and saved
    now = whole["now"]["peak_bytes"]
    for row in whole["checklist"]:
        assert row["peak_bytes"] == now - row["saved_bytes"]
    first = whole["checklist"][0]
    assert planned_peak(expt, home, *first["changes"]) == first["peak_bytes"]


def test_where_nothing_fits_the_smallest_sizes_and_what_is_given_up_are_said(expt, home) -> None:
    scale = "+model.scale={model.embed_dim:[32,8]}"
    small = ("model.embed_dim=32", *ONE_WAY, "memory.budget=1MiB")
    record = allocated(expt, home, *small, scale, code=1)
    assert not record["fits"] and record["chosen"]["excess_bytes"] > 0
    assert "model.embed_dim=8" in record["chosen"]["changes"]
    kept = [step for step in record["emergency"] if step.get("kept")]
    assert kept and all(step["saved_bytes"] > 0 for step in kept)
    peaks = [step["peak_bytes"] for step in kept]
    assert peaks == sorted(peaks, reverse=True)


def test_what_a_later_step_makes_needless_is_taken_back_and_sizes_grow_again(expt, home) -> None:
    line = ("model.embed_dim=32", *CHECKPOINTED, "+model.scale={model.embed_dim:[32,31]}")
    steps = allocated(expt, home, *line, "memory.budget=1MiB", code=1)["emergency"]
    tried = [step for step in steps if "peak_bytes" in step]
    number = next(n for n, step in enumerate(tried) if step["changes"] == ["optimizer=adafactor"])
    before = min(step["peak_bytes"] for step in tried[:number])
    budget = (before + tried[number]["peak_bytes"]) // 2
    record = allocated(expt, home, *line, f"memory.budget={budget}", "fit.margin=1")
    changes = record["chosen"]["changes"]
    assert "optimizer=adafactor" in changes
    assert not [one for one in changes if "embed_dim" in one], "the configured size fits again"
    back = [step for step in record["emergency"] if step.get("taken_back")]
    assert back and not [step for step in back if step["kept"]]
    assert not {line for step in back for line in step["changes"]} & set(changes)
    peak = planned_peak(expt, home, "model.embed_dim=32", *CHECKPOINTED, *changes)
    assert peak == record["chosen"]["peak_bytes"] <= budget


def test_a_whole_batch_that_takes_less_than_its_parts_is_nothing_to_give_up_for(expt, home) -> None:
    line = ("model.embed_dim=128", "data.batch_size=2", "data.eval_batch_size=2", *ONE_WAY)
    whole = planned_peak(expt, home, *line)
    halves = planned_peak(expt, home, *line, "memory.gradient_accumulation=2")
    assert whole < halves, "the gradients of the first half are kept"
    budget = f"memory.budget={(whole + halves) // 2}"
    record = allocated(expt, home, *line, budget, "fit.margin=1")
    assert not record["emergency"] and record["chosen"]["micro_batch"] == 2
    assert record["chosen"]["peak_bytes"] == whole


def test_what_saves_nothing_at_one_peak_is_tried_again_at_the_next(expt, home) -> None:
    sizes = ("data.batch_size=16", "data.eval_batch_size=32", "model.num_layers=3")
    line = ("model.embed_dim=256", *sizes, *CHECKPOINTED)
    steps = allocated(expt, home, *line, "memory.budget=1MiB", code=1)["emergency"]
    order = [step["changes"][0].partition("=")[0] for step in steps if step.get("kept")]
    assert order.index("memory.forward_chunks") > order.index("optimizer"), (
        "the training's peak comes first here, and evaluation's when that is lower"
    )


def test_the_largest_part_frozen_leaves_the_others_trained() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sensor = torch.nn.Parameter(torch.zeros(3, 4))
            self.scale = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
            self.window, self.head = torch.nn.Linear(50, 50), torch.nn.Linear(50, 3)

    assert trained_without_the_largest(Model()) == ["head.*", "sensor"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((), "give memory.budget=24GiB"),
        (("memory.budget=1GiB", "+model.scale={model.wdth:[2,1]}"), "model.wdth is no setting"),
        (("memory.budget=1GiB", "+model.scale={model.embed_dim:3}"), "must be a list of values"),
    ],
    ids=["budget", "name", "values"],
)
def test_what_cannot_be_divided_is_one_line(expt, home, more, words) -> None:
    code, _, err = expt(*LINE, *more, small=False)
    assert code == 2 and words in err


def test_levels_begin_with_the_configured_sizes_and_end_with_the_smallest() -> None:
    found = levels({"data.pixels": [224, 112], "model.rank": [32, 16, 8]})
    assert found[0].changes == () and found[-1].changes == ("data.pixels=112", "model.rank=8")
    assert [level.steps_down for level in found] == sorted(level.steps_down for level in found)
    assert len(found) == 6


@pytest.mark.parametrize("room", [0, 1, 7, 20, 60, 99, 140, 1000])
def test_the_first_level_that_fits_is_found_and_few_are_asked_about(room) -> None:
    every = levels({"data.a": [9, 5, 3, 1], "data.b": [8, 6, 2], "model.c": [50, 20, 10, 5, 1]})
    taken = {
        level: (9, 5, 3, 1)[level.steps[0]] * (8, 6, 2)[level.steps[1]]
        + (50, 20, 10, 5, 1)[level.steps[2]]
        for level in every
    }
    asked = []

    def fits(level):
        asked.append(level)
        return taken[level] <= room

    expected = next((level for level in every if taken[level] <= room), None)
    assert first_level(every, fits) == expected
    assert len(asked) <= len(every) / 2


def test_over_several_cards_it_is_sharded_or_its_blocks_are_laid_out(expt, home) -> None:
    model = ("model.embed_dim=64", *ONE_WAY, "allocate.devices=[2]")
    record = allocated(expt, home, *model, "memory.budget=1GiB")
    (row,) = record["several"]
    assert row["cards"] == 2 and row["sharded"]["fits"] and row["split"]["fits"]
    assert "trainer.strategy=fsdp" in row["sharded"]["changes"]
    assert row["split"]["peak_bytes"] == max(row["split"]["each_bytes"])
    assert len(row["split"]["first_blocks"]) == 2
    code, _, err = expt(*LINE, "memory.budget=1GiB", "allocate.devices=[1]", small=False)
    assert code == 2 and "allocate.devices" in err
