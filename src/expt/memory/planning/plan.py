"""`Plan`: a predicted peak of bytes allocated to tensors, and what it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from expt.memory.planning.allocator import Requests
    from expt.memory.planning.blocks import Blocks

Target = Literal["cuda", "cpu"]
Precision = Literal["fp32", "bf16", "fp16"]
CATEGORIES = (
    "parameters", "gradients", "optimizer_state", "activations", "temporaries", "inputs",
    "workspaces",
)  # fmt: skip
CUDA_MARGIN = 0.05
"""What a card must have more than the bytes that are predicted to be reserved."""
CUDA_FAILURES = 0.01
"""The share of published GPU runs, at most, that would run out of memory with that margin: see
`benchmarks/published_gpu.py`."""

NOT_WRITTEN = ("requests", "blocks")
"""Fields of a plan that are for further questions to it, and in no file."""


@dataclass(frozen=True)
class StagePeak:
    """What a stage of training takes: of its epochs, from `first_epoch` to `last_epoch`, from 0."""

    first_epoch: int
    last_epoch: int
    peak_bytes: int
    demand_bytes: int
    """See `Plan.demand_bytes`."""


@dataclass(frozen=True)
class Plan:
    """A predicted peak of bytes allocated to tensors, and where it comes from.

    `by_category` sums exactly to `peak_bytes`; `interval_bytes` is [low, high], where high is None
    if it is not known; `reserved_bytes` is what the caching allocator takes from the device (None
    where there is none), `captured_reserved_bytes` what it takes where training steps are captured
    as a CUDA graph, which keeps their memory to itself and gives way when memory is short;
    `reserved_interval_bytes` are bounds of `reserved_bytes`, and `requests` is what the allocator
    was asked for; `blocks` is what each block of the model takes, where that was asked. `method` is
    "trace" for a step on fake tensors, "estimate" for what takes its place where that cannot be
    done; `notes` says what else to know. Where training goes in stages, it is the plan of the
    largest, and `stages` has the peaks of all.
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
    reserved_interval_bytes: tuple[int, int | None] | None = None
    stages: tuple[StagePeak, ...] = ()
    requests: Requests | None = field(default=None, repr=False, compare=False)
    blocks: Blocks | None = field(default=None, repr=False, compare=False)

    @property
    def dominant(self) -> str:
        """The category that takes most of the peak."""
        return max(self.by_category, key=lambda name: self.by_category[name])

    @property
    def demand_bytes(self) -> int:
        """What a budget has to allow: reserved bytes where an allocator is what enforces it."""
        return self.peak_bytes if self.reserved_bytes is None else self.reserved_bytes

    @property
    def margin(self) -> float:
        """The share of `demand_bytes` that a budget has to allow beside them."""
        return 0.0 if self.reserved_bytes is None else CUDA_MARGIN

    def within(self, limit_bytes: int | None) -> Plan:
        """Return the plan on a device with so many bytes for the allocator.

        It gives segments that are wholly free back before it fails, so that less may be reserved;
        more than the limit is where the run does not fit.
        """
        if self.requests is None or self.reserved_bytes is None:
            return self
        if limit_bytes is None or self.reserved_bytes <= limit_bytes:
            return self
        return replace(self, reserved_bytes=self.requests.reserved_bytes(limit_bytes))

    @property
    def demand_words(self) -> str:
        """What `demand_bytes` counts, for a reader."""
        if self.reserved_bytes is None:
            return "bytes allocated to tensors"
        return "bytes reserved by the allocator"

    def fits(self, budget_bytes: int | None) -> bool | None:
        """Tell whether the predicted peak is inside a budget; None if that is not known.

        On CUDA what is reserved inside the budget is compared, with `margin` beside it. A plan
        without an upper bound can only tell that a run does not fit.
        """
        if budget_bytes is None:
            return None
        allowed = int(budget_bytes / (1 + self.margin))
        if self.within(allowed).demand_bytes > allowed:
            return False
        return None if self.interval_bytes[1] is None else True

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for ``plan.json``."""
        values = asdict(replace(self, requests=None, blocks=None))
        for name in NOT_WRITTEN:
            del values[name]
        reserved = self.reserved_interval_bytes
        return {
            **values,
            "interval_bytes": list(self.interval_bytes),
            "reserved_interval_bytes": None if reserved is None else list(reserved),
            "stages": list(values["stages"]),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """Return the plan that `as_dict` made plain; other keys are left out.

        Raises:
            KeyError: a key is absent.
            ValueError: the interval is not one.

        """
        optional = (*NOT_WRITTEN, "stages")
        known = {part.name: values[part.name] for part in fields(cls) if part.name not in optional}
        low, high = values["interval_bytes"]
        reserved = values["reserved_interval_bytes"]
        changed = {
            "interval_bytes": (low, high),
            "reserved_interval_bytes": None if reserved is None else (reserved[0], reserved[1]),
            "notes": tuple(known["notes"]),
            "stages": tuple(StagePeak(**stage) for stage in values.get("stages", ())),
        }
        return cls(**{**known, **changed})
