"""`Plan`: a predicted peak of bytes allocated to tensors, and what it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Target = Literal["cuda", "cpu"]
Precision = Literal["fp32", "bf16", "fp16"]
CATEGORIES = (
    "parameters", "gradients", "optimizer_state", "activations", "temporaries", "inputs",
    "workspaces",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A predicted peak of bytes allocated to tensors, and where it comes from.

    `by_category` sums exactly to `peak_bytes`; `interval_bytes` is [low, high], where high is
    None if it is not known; `reserved_bytes` is what the caching allocator takes from the device
    (None where there is none), `captured_reserved_bytes` what it takes where training steps are
    captured as a CUDA graph, which keeps their memory to itself and gives way when memory is
    short. `method` is "trace" for a step on fake tensors, "estimate" for
    what takes its place where that cannot be done; `notes` says what else to know.
    """

    target: Target
    peak_bytes: int
    reserved_bytes: int | None
    interval_bytes: tuple[int, int | None]
    phase: str
    by_category: Mapping[str, int]
    by_module: Mapping[str, int]
    corrections: Mapping[str, int]
    method: Literal["trace", "estimate"]
    seconds: float
    notes: tuple[str, ...] = ()
    captured_reserved_bytes: int | None = None

    @property
    def dominant(self) -> str:
        """The category that takes most of the peak."""
        return max(self.by_category, key=lambda name: self.by_category[name])

    @property
    def demand_bytes(self) -> int:
        """What a budget has to allow: reserved bytes where an allocator is what enforces it."""
        return self.peak_bytes if self.reserved_bytes is None else self.reserved_bytes

    @property
    def demand_words(self) -> str:
        """What `demand_bytes` counts, for a reader."""
        if self.reserved_bytes is None:
            return "bytes allocated to tensors"
        return "bytes reserved by the allocator"

    def fits(self, budget_bytes: int | None) -> bool | None:
        """Tell whether the predicted peak is inside a budget; None if that is not known.

        A plan without an upper bound can only tell that a run does not fit.
        """
        if budget_bytes is None:
            return None
        if self.demand_bytes > budget_bytes:
            return False
        return None if self.interval_bytes[1] is None else True

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for ``plan.json``."""
        return {**asdict(self), "interval_bytes": list(self.interval_bytes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """Return the plan that `as_dict` made plain; other keys are left out.

        Raises:
            KeyError: a key is absent.
            ValueError: the interval is not one.

        """
        known = {part.name: values[part.name] for part in fields(cls)}
        low, high = values["interval_bytes"]
        return cls(**{**known, "interval_bytes": (low, high), "notes": tuple(known["notes"])})
