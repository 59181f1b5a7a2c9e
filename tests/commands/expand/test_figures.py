from __future__ import annotations

import io

import pytest

from expt.commands.expand.figures import as_markdown, expansion_table, plot_expansion
from expt.commands.expand.policy import Probe, Step
from expt.job import Metric
from expt.result import Outcome

MAE = Metric("val/mae", label="MAE")
MIB = 2**20


@pytest.fixture
def steps() -> list[Step]:
    def step(number: int, change: str | None, probe: Probe, kept: bool, reason: str) -> Step:
        return Step(number, change, (), probe, kept, reason)

    done = {"predicted_peak_bytes": 30 * MIB, "peak_allocated_bytes": 31 * MIB, "seconds": 9.0}
    spared = Probe(Outcome.predicted_over, None, 90 * MIB)
    return [
        step(0, None, Probe(Outcome.completed, 5.0, **done), True, "the starting point"),
        step(1, "model.num_stages=3", Probe(Outcome.completed, 4.5, **done), True, "fits"),
        step(2, "data.batch_size=24", Probe(Outcome.completed, 4.9, **done), False, "worse"),
        step(3, "data.batch_size=32", spared, False, "not run"),
        step(4, "model.cross_stage_attention=true", Probe(Outcome.failed), False, "it was killed"),
    ]


def test_a_row_per_step(steps) -> None:
    lines = as_markdown(steps, MAE).splitlines()
    assert lines[0] == (
        "| step | change | kept | predicted | measured | validation MAE | time | why |"
    )
    assert lines[2] == (
        "| 0 | start | yes | 30.0 MiB | 31.0 MiB | 5.000 | 9.0 s | the starting point |"
    )
    assert lines[5] == "| 3 | data.batch_size=32 | no | 90.0 MiB | - | - | - | not run |"
    assert expansion_table(steps, MAE).row_count == 5


def test_a_reason_may_hold_what_separates_cells() -> None:
    step = Step(1, "a=b|c", (), Probe(Outcome.failed), False, "x | y")
    row = as_markdown([step], MAE).splitlines()[2]
    assert "a=b\\|c" in row and "x \\| y" in row


def test_it_is_drawn_however_steps_ended(steps, tmp_path) -> None:
    assert len(plot_expansion(steps, MAE, 80 * MIB, tmp_path)) == 2
    assert len(plot_expansion(steps[:1], MAE, None, tmp_path)) == 2
    assert len(plot_expansion(steps[4:], MAE, None, tmp_path)) == 2, "nothing measured"


@pytest.mark.parametrize("width", [80, 120])
def test_headings_are_whole_also_on_a_narrow_console(width) -> None:
    from rich.console import Console

    probe = Probe(Outcome.completed, 4.1, 3 * 2**30, 3 * 2**30, None, 1, 65.0)
    why = "validation MAE 4.2 is 3.4 % worse than the best so far"
    steps = [Step(1, "model.cross_stage_attention=true", (), probe, False, why)]
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(expansion_table(steps, Metric("val/mae", label="MAE")))
    text = console.export_text()
    for word in ("step", "change", "kept", "predicted", "measured", "validation", "MAE", "why"):
        assert word in text
    assert "…" not in text and "3.00 GiB" in text
