"""The plan of one rank: of several processes that train one model, what one of them takes.

Nothing of the others is needed. With whole models (ddp) the buckets that gradients are summed in
run under the trace as they run in training. With a sharded one (fsdp) FSDP2 itself runs under it,
in a process group of torch's that sends nothing (backend ``fake``).
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from expt.memory.planning.plan import Plan

if TYPE_CHECKING:
    from expt.memory.techniques.gradient_buckets import GradientBuckets

SUMS = "_gradient_sums"
"""Attribute of a traced model."""


@dataclass
class PlannedRank:
    """One of `count` processes, the one with the largest share of the samples."""

    count: int = 1
    sharded: bool = False
    _mesh: Any = field(default=None, init=False)
    _model: weakref.ref[nn.Module] | None = field(default=None, init=False)

    def share(self, samples: int) -> int:
        """Return how many of a step's samples it has."""
        return -(-samples // self.count)

    @contextmanager
    def grouped(self) -> Iterator[None]:
        """Let the process be one of the group inside, as far as sharding needs it."""
        if not self.sharded:
            yield
            return
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=0, world_size=self.count, store=FakeStore())
        try:
            self._mesh = init_device_mesh("cpu", (self.count,))
            with warnings.catch_warnings():
                # FSDP2's advice to whoever wrote the model is for the run, which shows it.
                warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
                yield
        finally:
            self._mesh = None
            dist.destroy_process_group()

    def prepare(self, model: nn.Module) -> None:
        """Make the model this process's."""
        if self.sharded:
            from expt.memory.techniques.sharding import shard

            shard(model, self._mesh)
        elif self.count > 1:
            from expt.memory.techniques.gradient_buckets import GradientBuckets

            # With the model, which is to be gone when it is traced.
            vars(model)[SUMS] = GradientBuckets(model.parameters(), lambda flat: _nothing)
            self._model = weakref.ref(model)

    @contextmanager
    def last_backward(self) -> Iterator[None]:
        """Sum gradients in the backward pass inside, the last of a step."""
        model = None if self._model is None else self._model()
        if model is None:
            yield
            return
        sums: GradientBuckets = vars(model)[SUMS]
        sums.begin()
        with sums.summing():
            yield
        sums.finish()

    def received(self, given: Any) -> Any:
        """Return as much as the first process receives of another, in evaluation."""
        return tree_map_only(Tensor, Tensor.clone, given)

    def noted(self, planned: Plan) -> Plan:
        """Return the plan, which says that it is of one process of several."""
        if self.count == 1:
            return planned
        how = "fsdp" if self.sharded else "ddp"
        note = f"of one of {self.count} ranks ({how}), the one with the largest share of a step"
        return replace(planned, notes=(note, *planned.notes))


def _nothing() -> None:
    """Wait for nothing."""
