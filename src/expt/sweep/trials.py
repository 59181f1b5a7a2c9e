"""What became of one trial: `TrialOutcome`, and the names under which the study keeps it.

Every trial of the study has these user attributes (`KIND` first), so that a reader needs nothing
but the study; the same are tags of its run in the tracker, with the prefix ``trial.``:

``kind``                  one of `Kind`
``peak_bytes``            measured peak of tensors, None where none was measured
``demand_bytes``          what the budget was compared with: reserved bytes where there are any
``predicted_peak_bytes``  of the plan, and ``interval_bytes``, [low, high]
``budget_bytes``          the limit, None without one
``seconds``               of training
``run_dir``, ``run_id``   its folder and its run in the tracker
``error``                 one line, where something went wrong
``attempts``              how often it was started
``started``               true once its process was, whatever became of it
``worker``                which process sees to it
``values_by_seed``, ``spread``  with `search.repeats`: each seed's value and their deviation
``duplicate_of``          the number of the trial with the same values
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from expt.units import GIB

Kind = Literal[
    "complete",
    "infeasible_measured",  # trained to the end, above the budget
    "oom",  # memory ran out
    "pruned",
    "crashed",
    "killed",
    "timeout",
    "nan",
    "refused",  # the settings contradict each other
    "infeasible_predicted",  # never started
    "duplicate",
]
State = Literal["COMPLETE", "PRUNED", "FAIL"]
KIND, WORKER, STARTED, CONSTRAINT = "kind", "worker", "started", "peak_memory"
PREDICTED = "predicted_peak_bytes"
STATES: dict[Kind, State] = {
    "complete": "COMPLETE",
    "infeasible_measured": "COMPLETE",
    "oom": "PRUNED",  # samplers ignore what failed, and this is to be learned from
    "pruned": "PRUNED",
    "infeasible_predicted": "PRUNED",
    "crashed": "FAIL",
    "killed": "FAIL",
    "timeout": "FAIL",
    "nan": "FAIL",
    "refused": "FAIL",
}
"""The state that the study is told; a duplicate takes that of the trial it repeats."""
UNTRAINED: frozenset[str] = frozenset({"infeasible_predicted", "duplicate", "refused"})
"""Kinds that do not count as one of `search.n_trials`, unless they were started."""
FAILED: frozenset[str] = frozenset({"crashed", "killed", "timeout", "nan", "refused"})
OVER: frozenset[str] = frozenset({"oom", "infeasible_measured"})
AGAIN: frozenset[str] = frozenset({"crashed", "killed", "timeout"})
"""Kinds that may end otherwise the next time."""


@dataclass(frozen=True)
class Prediction:
    """What a plan says about a trial that was not started yet; bytes.

    `interval_bytes` is about `demand_bytes`, what the budget has to allow; its upper end may be
    None. `plan` is the content of ``plan.json``; `refusal` says why the settings contradict each
    other, and then the rest is None.
    """

    peak_bytes: int | None = None
    demand_bytes: int | None = None
    interval_bytes: tuple[int, int | None] | None = None
    plan: dict[str, Any] | None = None
    refusal: str | None = None
    advice: str | None = None

    def exceeds(self, budget_bytes: int | None) -> bool:
        """Tell whether the peak is over the budget by more than the interval leaves open."""
        if budget_bytes is None or self.interval_bytes is None:
            return False
        return self.interval_bytes[0] > budget_bytes


@dataclass(frozen=True)
class TrialOutcome:
    """How one trial ended.

    `value` is the validation's error; `demand_bytes` what was measured of what the budget limits;
    `excess_bytes` what an out-of-memory error says was missing, at least.
    """

    kind: Kind
    value: float | None = None
    peak_bytes: int | None = None
    demand_bytes: int | None = None
    excess_bytes: int | None = None
    seconds: float = 0.0
    error: str | None = None
    run_id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def constraint(self, prediction: Prediction | None, budget_bytes: int | None) -> float | None:
        """Return by how many GiB the budget is exceeded (negative: not), None if unknown.

        What was measured counts, where a trial ran to its end or was pruned; for one that ran out
        of memory the larger of what was missing and what was predicted.
        """
        if budget_bytes is None:
            return None
        predicted = None if prediction is None else prediction.demand_bytes
        excess = None if predicted is None else predicted - budget_bytes
        if self.kind == "oom":
            known = [count for count in (self.excess_bytes, excess) if count is not None]
            return max(known) / GIB if known and max(known) > 0 else None
        if self.demand_bytes is not None:
            excess = self.demand_bytes - budget_bytes
        return None if excess is None else excess / GIB
