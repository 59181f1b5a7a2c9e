"""The plan of a run in stages (`trainer.trainable` by epoch): that of the largest one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from expt.config.stages import Stage
from expt.memory.planning.plan import Plan, StagePeak
from expt.units import format_bytes


def largest(plans: Sequence[Plan]) -> int:
    """Return the number of the plan that needs most of a budget."""
    return max(range(len(plans)), key=lambda n: (plans[n].demand_bytes, plans[n].peak_bytes))


def joined(plans: Sequence[Plan], stages: Sequence[Stage]) -> Plan:
    """Return the largest plan, which says so and has the peaks of all stages."""
    number = largest(plans)
    found, stage = plans[number], stages[number]
    low, high = found.interval_bytes
    unknown = any(planned.interval_bytes[1] is None for planned in plans)
    note = f"largest of {len(stages)} stages: {epochs_of(stage.first_epoch, stage.last_epoch)}"
    return replace(
        found,
        interval_bytes=(low, None if unknown else high),
        notes=(note, *found.notes),
        seconds=sum(planned.seconds for planned in plans),
        stages=tuple(
            StagePeak(one.first_epoch, one.last_epoch, planned.peak_bytes, planned.demand_bytes)
            for one, planned in zip(stages, plans, strict=True)
        ),
    )


def epochs_of(first: int, last: int) -> str:
    """Return a stage's epochs for a reader, counted from 0 as in `trainer.trainable`."""
    return f"epoch {first}" if first == last else f"epochs {first} to {last}"


def stage_lines(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for every stage of a plan's record, none where there are no stages."""
    return [
        f"stage {number} of {len(stages)}, {epochs_of(one['first_epoch'], one['last_epoch'])}: "
        f"predicted peak {format_bytes(one['peak_bytes'])}"
        for number, one in enumerate(stages, 1)
    ]


def compared(planned: Plan | None, history: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Return the predicted and the measured peak of every stage that has come to an epoch's end.

    Args:
        planned: before the run.
        history: a row for every epoch, with its peak.

    """
    found = []
    for one in planned.stages if planned is not None else ():
        rows = history[one.first_epoch : one.last_epoch + 1]
        peaks = [row["peak_allocated_bytes"] for row in rows if "peak_allocated_bytes" in row]
        found.append(
            {
                "first_epoch": one.first_epoch,
                "last_epoch": one.last_epoch,
                "predicted_peak_bytes": one.peak_bytes,
                "peak_allocated_bytes": int(max(peaks)) if peaks else None,
            }
        )
    return found
