"""Progressive expansion (guide A): one parameter at a time, kept if it fits and does not hurt.

    steps = expand(["model.num_stages=3", "data.batch_size=24"], probe, tolerance=0.01)

`probe` says what a configuration did, `expand` decides. Neither trains anything here: the first
is a function that the caller gives, so that a probe may be a process, or a table in a test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from expt.job import Metric
from expt.result import Outcome
from expt.units import format_bytes


@dataclass(frozen=True)
class Probe:
    """What one configuration did; None is what is not known.

    `value` is the validation's figure of the monitored metric; `detail` is why it did not complete.
    """

    outcome: Outcome
    value: float | None = None
    predicted_peak_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    parameters: int | None = None
    seconds: float | None = None
    run_dir: str | None = None
    run_id: str | None = None
    detail: str = ""

    @property
    def demand_bytes(self) -> int | None:
        """What a budget had to allow: reserved bytes where an allocator reserves."""
        return (
            self.peak_allocated_bytes
            if self.peak_reserved_bytes is None
            else (self.peak_reserved_bytes)
        )


@dataclass(frozen=True)
class Step:
    """One change, what it did on top of those kept before it, and what became of it.

    `change` is None for the starting point; `changes` are all that the probe was run with.
    """

    number: int
    change: str | None
    changes: tuple[str, ...]
    probe: Probe
    kept: bool
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for ``expand.json``."""
        rest = {"number": self.number, "change": self.change, "changes": list(self.changes)}
        probe = {**asdict(self.probe), "outcome": self.probe.outcome.value}
        return {**rest, "kept": self.kept, "reason": self.reason, **probe}


def expand(
    changes: Sequence[str],
    probe: Callable[[int, tuple[str, ...]], Probe],
    metric: Metric,
    tolerance: float,
    budget_bytes: int | None = None,
    known: Mapping[tuple[str, ...], Probe] | None = None,
    on_step: Callable[[list[Step]], None] = lambda steps: None,
) -> list[Step]:
    """Try the changes in order; return a step each, the starting point first.

    Ends early where the starting point itself cannot be kept, and where a probe was stopped.

    Args:
        changes: settings as on a command line.
        probe: from a step's number and the settings on top of the starting point to what they do.
        metric: that steps are judged by.
        tolerance: by what part of the best figure so far a step's figure may be worse.
        budget_bytes: what a measured peak may take.
        known: probes of an earlier part of the same expansion, which are not run again.
        on_step: told all steps after each one.

    """
    known = known or {}
    kept: tuple[str, ...] = ()
    steps: list[Step] = []
    best: float | None = None
    for number, change in enumerate([None, *changes]):
        tried = kept if change is None else (*kept, change)
        found = known.get(tried) or probe(number, tried)
        keep, reason = verdict(found, best, metric, tolerance, budget_bytes)
        steps.append(Step(number, change, tried, found, keep, reason))
        on_step(steps)
        if found.outcome is Outcome.stopped or (change is None and not keep):
            break
        if keep:
            kept = tried
            assert found.value is not None
            best = found.value if metric.better(found.value, best) else best
    return steps


def verdict(
    probe: Probe, best: float | None, metric: Metric, tolerance: float, budget_bytes: int | None
) -> tuple[bool, str]:
    """Tell whether a step is kept, and why."""
    if probe.outcome is not Outcome.completed:
        return False, probe.detail or probe.outcome.words
    demand = probe.demand_bytes
    if budget_bytes is not None and demand is not None and demand > budget_bytes:
        over = f"{format_bytes(demand)} is above the budget of {format_bytes(budget_bytes)}"
        return False, f"measured: {over}"
    if probe.value is None:
        return False, f"no validation {metric.label} was measured"
    if best is None:
        return True, "the starting point"
    difference = metric.cost(probe.value) - metric.cost(best)
    # Of the size of the best: a figure that may be negative, a log-likelihood, has no other scale.
    change = difference / (abs(best) or 1.0)
    if difference > tolerance * abs(best):
        return False, f"the validation {metric.label} is {100 * change:.1f} % worse than the best"
    if change > 0:
        return True, f"fits; {100 * change:.1f} % worse than the best, which is tolerated"
    return True, f"fits; {-100 * change:.1f} % better" if change < 0 else "fits; as good"


def kept_changes(steps: Sequence[Step]) -> list[str]:
    """Return the settings that were kept, the last one for each key."""
    last = next((step.changes for step in reversed(steps) if step.kept), ())
    return last_values(last)


def last_values(lines: Sequence[str]) -> list[str]:
    """Return the last line for each key; one that had to be added with ``+`` still is."""
    by_key: dict[str, str] = {}
    for line in lines:
        name = line.partition("=")[0]
        bare = name.lstrip("+")
        earlier = by_key.get(bare, "").partition("=")[0]
        added = "" if name != bare else earlier.removesuffix(bare)
        by_key[bare] = added + line
    return list(by_key.values())


def stored_probe(record: Mapping[str, Any]) -> Probe:
    """Return the probe of a step of ``expand.json``, also of one that an earlier version wrote.

    Raises:
        KeyError, TypeError: it is not such a step.

    """
    known = {**record, "value": record["value"] if "value" in record else record["error"]}
    known["outcome"] = Outcome.parse(record["outcome"])
    return Probe(**{name: known[name] for name in Probe.__dataclass_fields__})
