"""Buckets of gradients: what they hold, in which order they are summed, and what they cost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from expt.errors import ModelError
from expt.memory.measuring.ledger import StorageLedger
from expt.memory.techniques.gradient_buckets import GradientBuckets


class Sums:
    """Stands for another process with the same gradients."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, flat: torch.Tensor):
        flat *= 2
        self.sizes.append(flat.numel())
        return lambda: None


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))


def test_gradients_are_those_of_all_and_lie_in_buckets() -> None:
    net, reduced = model(), Sums()
    buckets = GradientBuckets(net.parameters(), reduced, bucket_bytes=600)
    x = torch.randn(5, 8)
    net(x).sum().backward()
    expected = [2 * weight.grad for weight in net.parameters()]
    net.zero_grad()
    buckets.begin()
    for last in (False, True):  # two micro-batches, halves of the batch
        with buckets.summing(last):
            (net(x).sum() / 2).backward()
    assert reduced.sizes == [152, 136], "sums begin in the backward pass"
    buckets.finish()
    for weight, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)
    storages = {weight.grad.untyped_storage().data_ptr() for weight in net.parameters()}
    assert len(storages) == len(reduced.sizes) == 2


def test_who_failed_takes_part_with_zeros_and_in_the_same_order() -> None:
    whole, broken = Sums(), Sums()
    for reduced, fails in ((whole, False), (broken, True)):
        net = model()
        buckets = GradientBuckets(net.parameters(), reduced, bucket_bytes=100)
        buckets.begin()
        if fails:
            with buckets.summing():
                net[3](torch.randn(2, 8)).sum().backward()  # and then it broke off
            buckets.abandon()
            assert all(weight.grad is None for weight in net.parameters())
        else:
            with buckets.summing():
                net(torch.randn(2, 8)).sum().backward()
            buckets.finish()
    assert broken.sizes == whole.sizes


def test_a_weight_that_nobody_uses_has_no_gradient_and_one_that_another_uses_has() -> None:
    told: list[list[bool]] = []

    def share(present: list[bool]) -> list[bool]:
        told.append(present)
        return [True, *present[1:]]  # the other process used the last weight

    net = model()
    buckets = GradientBuckets(net.parameters(), Sums(), share)
    buckets.begin()
    with buckets.summing():
        net[:2](torch.randn(3, 8)).sum().backward()
    buckets.finish()
    assert told == [[False] * 4 + [True] * 4]
    assert net[3].bias.grad.abs().sum() == 0
    assert [weight.grad is None for weight in net.parameters()] == [False] * 4 + [True] * 3 + [
        False
    ]


def test_they_take_no_more_than_a_gradient_besides() -> None:
    def peak(buckets: GradientBuckets | None, net: nn.Module) -> int:
        with StorageLedger() as ledger:
            x = torch.randn(2, 8)
            if buckets is None:
                net(x).sum().backward()
            else:
                buckets.begin()
                with buckets.summing():
                    net(x).sum().backward()
                buckets.finish()
        return ledger.peak_bytes

    net, other = model(), model()
    alone = peak(None, net)
    one = 8 * 8 * 4
    assert peak(GradientBuckets(other.parameters(), Sums(), bucket_bytes=1), other) <= alone + one


def test_sparse_gradients_are_refused() -> None:
    net = nn.Embedding(5, 3, sparse=True)
    buckets = GradientBuckets(net.parameters(), Sums())
    with pytest.raises(ModelError, match="sparse=False"), buckets.summing():
        net(torch.tensor([1, 2])).sum().backward()
