from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from expt.memory.measuring.in_place_sums import SUM, InPlaceSums
from expt.memory.measuring.ledger import StorageLedger

TOKENS = torch.ones(2, 3, 4, 8)
WEIGHT, BIAS = torch.ones(8, 8), torch.ones(8)


class Judge(TorchDispatchMode):
    """Asks about every sum, and keeps the answers."""

    def __init__(self) -> None:
        super().__init__()
        self.sums = InPlaceSums()
        self.answers: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = self.sums.has(func, args)
        if func is SUM:
            self.answers.append(answer)
        return func(*args, **(kwargs or {}))


def answers(run: Callable[[], object]) -> list[bool]:
    with Judge() as judge:
        run()
    return judge.answers


def used_twice(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> list[bool]:
    """Return what is said of the sum of the two gradients of a tensor."""
    hidden = TOKENS.clone().requires_grad_() * 2.0
    results = [first(hidden).sum(), second(hidden).sum()]
    return answers(lambda: torch.autograd.backward(results))


def test_the_bias_of_a_linear_layer_is_added_in_place() -> None:
    across = TOKENS.transpose(1, 2)  # a layout for which there is no kernel that adds the bias
    assert answers(lambda: F.linear(across, WEIGHT, BIAS)) == [True]
    with torch.no_grad():
        assert answers(lambda: F.linear(across, WEIGHT, BIAS)) == [True]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert answers(lambda: F.linear(across, WEIGHT, BIAS)) == [True]
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert answers(lambda: F.linear(across, WEIGHT, BIAS)) == [True]


def test_the_gradients_of_a_tensor_used_twice_are_summed_in_place() -> None:
    assert used_twice(torch.exp, torch.sin) == [True]


def test_a_gradient_that_something_else_holds_is_not_summed_into() -> None:
    # Both uses pass the same gradient on: neither owns it.
    hidden = TOKENS.clone().requires_grad_() * 2.0
    total = (hidden + torch.exp(hidden)).sum()
    assert answers(total.backward) == [False]


@pytest.mark.parametrize("named", [False, True])
def test_a_sum_that_python_writes_makes_a_new_tensor(named: bool) -> None:
    def run() -> Tensor:
        if not named:
            return torch.matmul(TOKENS, WEIGHT) + BIAS
        product = torch.matmul(TOKENS, WEIGHT)
        return product.add(BIAS)

    assert answers(run) == [False]


def test_other_operators_and_operands_are_none_of_its_business() -> None:
    sums = InPlaceSums()
    assert not sums.has(torch.ops.aten.mul.Tensor, (TOKENS, TOKENS))
    assert not sums.has(SUM, (2.0, TOKENS))
    assert not sums.has(SUM, (TOKENS.to_sparse(), TOKENS))


def test_it_can_be_made_inside_another_mode() -> None:
    from expt.memory.measuring import in_place_sums

    in_place_sums._holders_of_one_owner.cache_clear()
    with StorageLedger():
        assert in_place_sums._holders_of_one_owner()
    in_place_sums._holders_of_one_owner.cache_clear()
    with FakeTensorMode():
        assert in_place_sums._holders_of_one_owner()


def test_unwatched_the_sum_takes_no_memory_of_its_own() -> None:
    layer = nn.Linear(8, 8)
    with (
        torch.no_grad(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        result = layer(TOKENS.transpose(1, 2))
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    made = [event.nbytes() for event in events if event.name() == "[memory]"]
    # The folded input and the product; the input is dropped.
    assert made == [TOKENS.nbytes, result.nbytes, -TOKENS.nbytes]
