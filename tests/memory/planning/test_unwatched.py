"""Where torch takes another formula because a mode watches, found by comparing what it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._autograd import _disable_profiler_legacy, _enable_profiler_legacy
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig
from torch.utils._python_dispatch import TorchDispatchMode

from expt.memory import plan

ROWS, COLUMNS = 64, 2048
CHOSEN = torch.arange(0, ROWS, 4)
Function = Callable[[Tensor], Tensor]


def every(rows: Tensor) -> Tensor:
    return rows[:, None].expand(-1, COLUMNS)


def ones() -> Tensor:
    return torch.ones(ROWS, COLUMNS)


FUNCTIONS: dict[str, Function] = {
    "amax": lambda w: w.amax(1),
    "bce": lambda w: F.binary_cross_entropy(w.sigmoid(), ones()),
    "bce of a target": lambda w: F.binary_cross_entropy_with_logits(w, w.sigmoid()),
    "bce with logits": lambda w: F.binary_cross_entropy_with_logits(w, ones()),
    "cat": lambda w: torch.cat([w, w * 2]),
    "clamp": lambda w: w.clamp(-1, 1),
    "cosine": lambda w: F.cosine_similarity(w, w.flip(0)),
    "cross entropy": lambda w: F.cross_entropy(w, torch.arange(ROWS)),
    "cummax": lambda w: w.cummax(0).values,
    "cumprod": lambda w: w.cumprod(0),
    "cumsum": lambda w: w.cumsum(0),
    "cumulative logs": lambda w: w.logcumsumexp(0),
    "diff": lambda w: w.diff(),
    "einsum": lambda w: torch.einsum("ij,kj->ik", w, w),
    "embedding": lambda w: F.embedding(CHOSEN, w),
    "fft": lambda w: torch.fft.rfft(w).abs(),
    "gather": lambda w: w.gather(0, every(CHOSEN)),
    "index": lambda w: w[CHOSEN],
    "index select": lambda w: w.index_select(0, CHOSEN),
    "kthvalue": lambda w: w.kthvalue(3, 1).values,
    "layer norm": lambda w: F.layer_norm(w, (COLUMNS,)),
    "logsumexp": lambda w: w.logsumexp(1),
    "masked fill": lambda w: w.masked_fill(ones() > 0, 0.0),
    "max": lambda w: w.max(1).values,
    "max of all": lambda w: w.max(),
    "median": lambda w: w.median(1).values,
    "median of all": lambda w: w.median(),
    "min of all": lambda w: w.min(),
    "mode": lambda w: w.mode(1).values,
    "nanmedian": lambda w: w.nanmedian(1).values,
    "norm": lambda w: w.norm(dim=1),
    "pad": lambda w: F.pad(w, (3, 3)),
    "prod": lambda w: w.prod(0),
    "prod of all": lambda w: w.prod(),
    "put": lambda w: w.put(CHOSEN, torch.zeros(len(CHOSEN))),
    "roll": lambda w: w.roll(1, 0),
    "scatter": lambda w: torch.zeros_like(w).scatter(0, every(CHOSEN), w[:16]),
    "softmax": lambda w: w.softmax(1),
    "sort": lambda w: w.sort(1).values,
    "std": lambda w: w.std(0),
    "take": lambda w: w.take(CHOSEN),
    "take along": lambda w: w.take_along_dim(CHOSEN[:, None], 0),
    "topk": lambda w: w.topk(10, 1).values,
    "where": lambda w: torch.where(w > 0, w, w * 0.1),
}
BY_NAME: dict[str, Function] = {
    "cumprod by name": lambda w: torch.cumprod(input=w, dim=1),
    "max by name": lambda w: torch.max(input=w),
    "prod by name": lambda w: torch.prod(input=w, axis=1, keepdims=True),
    "prod of all by name": lambda w: torch.prod(input=w),
}
"""The same, with arguments by name, torch's own or NumPy's."""
IN_PLACE = {
    "add_", "index_add_", "index_put_", "logical_and_", "logical_or_", "put_", "scatter_",
    "scatter_add_", "mul_", "sub_",
}  # fmt: skip
"""Forms that are out of place only under a mode; `InPlaceSums` tells them."""
OTHER = {
    "cumprod": {"any", "item", "_local_scalar_dense"},
    "max of all": {"masked_fill_", "item", "_local_scalar_dense", "is_nonzero"},
    "median of all": {"masked_fill_", "item", "_local_scalar_dense", "is_nonzero"},
    "min of all": {"masked_fill_", "item", "_local_scalar_dense", "is_nonzero"},
    "prod": {"_to_copy", "copy_", "div", "eq", "item", "_local_scalar_dense", "mul", "sum"},
    "prod of all": {"_to_copy", "as_strided_", "copy_", "div", "eq", "mul", "nonzero"},
}
"""Other formulas, which `unwatched_rules` has of its own."""
NO_MATTER = {
    "_reshape_alias", "as_strided", "conj", "detach", "empty", "expand", "fill_", "new_empty",
    "new_zeros", "resize_", "resolve_conj", "to", "zero_", "zeros",
}  # fmt: skip
"""Views, and names under which the same storage is made."""


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def operators(function: Function) -> Counter[str]:
    """Return what torch runs for a function and its derivative, by name."""
    weight = torch.linspace(0.5, 1.5, ROWS * COLUMNS).view(ROWS, COLUMNS).requires_grad_()
    config = ProfilerConfig(
        ProfilerState.CPU, False, False, False, False, False, _ExperimentalConfig()
    )
    _enable_profiler_legacy(config)
    try:
        function(weight * 1).square().sum().backward()
    finally:
        threads = _disable_profiler_legacy()
    names = [event.name() for events in threads for event in events if event.kind() == "push"]
    return Counter(name[6:] for name in names if name.startswith("aten::"))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_other_formula_is_one_that_is_allowed_for(name: str) -> None:
    alone = operators(FUNCTIONS[name])
    with Watching():
        watched = operators(FUNCTIONS[name])
    only_alone = set(alone - watched) - NO_MATTER
    assert only_alone - IN_PLACE <= OTHER.get(name, set())
    if name in OTHER:
        assert only_alone - IN_PLACE, "torch has one formula now, and ours can go"


class Weight(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(ROWS, COLUMNS) + 0.5)
        self.function = function

    def forward(self, scale: Tensor) -> Tensor:
        return self.function(self.weight * scale)


@pytest.mark.parametrize("name", FUNCTIONS | BY_NAME)
def test_the_plan_is_of_what_runs_unwatched(measured, name: str) -> None:
    def loss(forward: Callable[..., Tensor], batch: Tensor) -> Tensor:
        return forward(batch).square().mean()

    def optimizer(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(weights, lr=1e-3)

    function = (FUNCTIONS | BY_NAME)[name]
    case = lambda: Weight(function), lambda: torch.ones(()), optimizer, loss
    planned = plan(*case, target="cpu")
    assert planned.method == "trace", planned.notes
    assert planned.peak_bytes == pytest.approx(measured(*case), rel=0.01)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_values_of_a_derivative_are_torchs(target) -> None:
    from expt.memory.planning.autocast import target_rules

    for name in (*OTHER, *BY_NAME):
        function, found = (FUNCTIONS | BY_NAME)[name], []
        for watching in (False, True):
            weight = torch.linspace(0.5, 1.5, 12).view(3, 4).requires_grad_()
            if watching:
                with target_rules(target):
                    function(weight).square().sum().backward()
            else:
                function(weight).square().sum().backward()
            found.append(weight.grad)
        torch.testing.assert_close(*found)
