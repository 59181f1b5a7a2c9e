from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from expt.memory.measuring.budget_ledger import BudgetLedger
from expt.memory.recovery.attempt import shortage

KIB = 1024


def test_the_message_has_the_figures_of_cudas():
    with BudgetLedger(10 * KIB), pytest.raises(torch.OutOfMemoryError) as refused:
        kept = torch.zeros(KIB)
        torch.zeros(2 * KIB)
    del kept
    words = ["CPU out of memory. Tried to allocate 8.00 KiB.", "capacity of 10.00 KiB"]
    words += ["6.00 KiB is free", "4.00 KiB is allocated by PyTorch"]
    assert all(word in str(refused.value) for word in words)
    figures = shortage(refused.value)
    assert (figures.bytes_requested, figures.bytes_free) == (8 * KIB, 6 * KIB)


def test_what_was_refused_is_dropped_and_does_not_count():
    with BudgetLedger(10 * KIB) as ledger:
        kept = torch.zeros(KIB)
        for _ in range(3):
            with pytest.raises(torch.OutOfMemoryError):
                torch.cat([kept, kept])
        assert ledger.allocated_bytes == 4 * KIB
        assert ledger.peak_bytes == 4 * KIB
        other = torch.zeros(KIB)
        assert ledger.peak_bytes == 8 * KIB
    assert ledger.refusals == 3
    del other


def test_exactly_the_limit_is_inside():
    with BudgetLedger(4 * KIB) as ledger:
        torch.zeros(KIB)
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(KIB + 1)
    assert ledger.peak_bytes == 4 * KIB


def test_operators_that_allocate_nothing_run_when_the_budget_is_full():
    with BudgetLedger(4 * KIB):
        full = torch.zeros(KIB)
        torch.add(full[:512], full[512:], out=full[:512])
        assert full.add_(1).view(32, 32).mT.shape == (32, 32)


@pytest.mark.parametrize("recomputed", [False, True])
def test_every_point_of_a_backward_pass_raises_the_same_class(recomputed):
    weight = torch.ones(32, 32, requires_grad=True)
    x = torch.ones(64, 32)

    def work() -> None:
        hidden = x
        for _ in range(3):
            layer = lambda h: (h @ weight).tanh()  # noqa: E731
            hidden = checkpoint(layer, hidden, use_reentrant=False) if recomputed else layer(hidden)
        hidden.sum().backward()

    with BudgetLedger(10**9) as free:
        work()
    raised = 0
    for limit in range(20 * KIB, free.peak_bytes, 2 * KIB):
        weight.grad = None
        with BudgetLedger(limit), pytest.raises(torch.OutOfMemoryError):
            work()
        raised += 1
    assert raised > 8
