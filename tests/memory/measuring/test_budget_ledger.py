from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

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


class InWorker(Dataset):
    """Small samples that take more in the making than the budget of who asks for them."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.zeros(10 * KIB)[:2] + index


def test_a_forked_worker_has_no_part_in_the_budget():
    loader = DataLoader(InWorker(), num_workers=1, multiprocessing_context="fork")
    with BudgetLedger(16 * KIB) as ledger:
        found = [batch.shape for batch in loader]
    assert found == [(1, 2)] * 2
    assert ledger.refusals == 0


def test_tensors_without_bytes_are_not_refused():
    with BudgetLedger(4 * KIB) as ledger:
        shape = torch.zeros(KIB, KIB, device="meta")
        shape += shape + 1
        with FakeTensorMode():
            torch.zeros(KIB, KIB)
        torch.zeros(KIB)
    assert (ledger.refusals, ledger.peak_bytes) == (0, 4 * KIB)
