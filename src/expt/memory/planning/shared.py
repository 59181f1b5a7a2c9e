"""What plans of one loop with other techniques have in common: traced once, then put together.

Evaluation does not know in how many parts a step's batch is cut, and a training step does not know
in how many slices evaluation is. Nothing is lost: evaluation makes and drops storages of its own,
on top of what the steps left.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace

from expt.memory.planning.differences import Differences
from expt.memory.planning.trace import StorageTrace


@dataclass(frozen=True)
class _Recorded:
    """A trace of which the events from `begin` to `end` are evaluation's, the ones before not."""

    trace: StorageTrace
    differences: Differences
    begin: int
    end: int

    @property
    def evaluates_alone(self) -> bool:
        """Tell whether evaluation touched no storage that was there before."""
        born = {number for number, _, _ in self.trace.events[: self.begin]}
        return all(number not in born for number, _, _ in self.trace.events[self.begin : self.end])


@dataclass
class Shared:
    """Parts of traces by what they depend on."""

    _steps: dict[Hashable, _Recorded] = field(default_factory=dict)
    _evaluations: dict[Hashable, _Recorded] = field(default_factory=dict)
    alike: set[Hashable] = field(default_factory=set)
    """Which weights are trained where a plan found that its steps do not differ."""

    def has_steps(self, key: Hashable) -> bool:
        """Tell whether training steps were traced."""
        return key in self._steps

    def has_evaluation(self, key: Hashable) -> bool:
        """Tell whether evaluation was traced."""
        return key in self._evaluations

    def joined(
        self,
        keys: tuple[Hashable, Hashable],
        trace: StorageTrace,
        differences: Differences,
        begin: int,
        end: int,
        keep: bool,
    ) -> tuple[StorageTrace, Differences]:
        """Return a trace with the parts that it was not taken with; `keep` the others for later.

        `keys` are of steps and evaluation; evaluation's events are those from `begin` to `end`.
        """
        steps = evaluation = own = _Recorded(trace, differences, begin, end)
        if self.has_steps(keys[0]):
            steps = self._steps[keys[0]]
        elif keep:
            self._steps[keys[0]] = own
        if self.has_evaluation(keys[1]):
            evaluation = self._evaluations[keys[1]]
        elif keep and own.evaluates_alone:
            self._evaluations[keys[1]] = own
        if steps is evaluation:
            return steps.trace, steps.differences
        return _put_together(steps, evaluation), steps.differences


def _put_together(steps: _Recorded, evaluation: _Recorded) -> StorageTrace:
    """Return the trace of the steps of one and the evaluation of another."""
    first, second, made = steps.trace, evaluation.trace, steps.trace.like()
    shift = steps.begin - evaluation.begin
    made.phases = [*first.phases, *second.phases]
    made.storages = [replace(storage) for storage in first.storages]
    made.events = first.events[: steps.begin]
    numbers: dict[int, int] = {}
    for number, change, phase in second.events[evaluation.begin : evaluation.end]:
        if number not in numbers:
            numbers[number] = len(made.storages)
            made.storages.append(replace(second.storages[number]))
        made.events.append((numbers[number], change, phase + len(first.phases)))
    inside = range(evaluation.begin, evaluation.end)
    made.scratch = [entry for entry in first.scratch if entry[0] < steps.begin]
    made.scratch += [(at + shift, n, name) for at, n, name in second.scratch if at in inside]
    made.calls = [entry for entry in first.calls if entry[0] < steps.begin]
    made.calls += [(at + shift, call) for at, call in second.calls if at in inside]
    made.convolution_bytes = max(first.convolution_bytes, second.convolution_bytes)
    return made
