"""The referee of predicted peaks: torch.profiler's own allocation events."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

Loss = Callable[[Callable[..., object], object], Tensor]


def profiled_peak(step: Callable[[], object], live: Iterable[Tensor]) -> int:
    """Return the highest sum of allocations during `step`, plus what was alive before."""
    from torch.profiler import ProfilerActivity, profile

    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in live}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    highest = max(itertools.accumulate((change for _, change in changes), initial=0))
    return sum(storages.values()) + highest


@pytest.fixture
def measured() -> Callable[..., int]:
    """A function that trains a model as `expt.memory.plan` would, and returns the peak."""

    def measure(
        model_fn: Callable[[], nn.Module],
        batch_fn: Callable[[], object],
        optimizer_fn: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        loss_fn: Loss,
        precision: str = "fp32",
        micro_batches: int = 1,
        prepare: Callable[[nn.Module], object] = lambda model: None,
    ) -> int:
        torch.manual_seed(0)
        model = model_fn()
        prepare(model)
        optimizer = optimizer_fn(list(model.parameters()))

        def forward(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                output = model(x)
            return output.float()

        def step() -> None:
            for _ in range(micro_batches):
                batch = batch_fn()
                loss = loss_fn(forward, batch)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        state = tree_iter(list(optimizer.state.values()))
        tensors = [value for value in state if isinstance(value, Tensor)]
        return profiled_peak(step, [*model.parameters(), *model.buffers(), *tensors])

    return measure
