"""The referee of predicted peaks: torch.profiler's own allocation events."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from expt.memory.measuring.ledger import dense_parts

Loss = Callable[[Callable[..., object], object], Tensor]


def profiled_peak(step: Callable[[], object], live: Iterable[Tensor]) -> int:
    """Return the highest sum of allocations during `step`, plus what was alive before."""
    from torch.profiler import ProfilerActivity, profile

    before = _bytes(live)  # nothing here may hold what the step lets go of
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    highest = max(itertools.accumulate((change for _, change in changes), initial=0))
    return before + highest


def _bytes(tensors: Iterable[Tensor]) -> int:
    parts = [part for tensor in tensors for part in dense_parts(tensor.detach())]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in parts}.values())


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


@pytest.fixture
def measured_step() -> Callable[..., int]:
    """A function that takes steps of any form, and returns the highest of their peaks."""

    def measure(
        model_fn: Callable[[], nn.Module],
        batch_fn: Callable[[], object],
        optimizer_fn: Callable[[list[nn.Parameter]], object],
        step_fn: Callable[..., object],
        steps: int,
    ) -> int:
        model = model_fn()
        optimizer = optimizer_fn(list(model.parameters()))
        optimizers = list(optimizer.values()) if isinstance(optimizer, dict) else [optimizer]

        def live() -> list[Tensor]:
            slots = [one.state for one in optimizers]
            gradients = [weight.grad for weight in model.parameters()]
            tree = (list(model.parameters()), gradients, [list(s.values()) for s in slots])
            return [leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]

        return max(
            profiled_peak(lambda: step_fn(model, optimizer, batch_fn()), iter(live()))
            for _ in range(steps)
        )

    return measure
