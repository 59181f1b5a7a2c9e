from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from expt.memory.measuring.ledger import StorageLedger

KIB = 1024
COUNT = 256  # float32 numbers in one KiB


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of tiny operators wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_chain_of_additions_is_counted_to_the_byte() -> None:
    a, b = torch.ones(COUNT), torch.ones(COUNT)
    with StorageLedger() as ledger:
        assert ledger.allocated_bytes == 0
        c = a + b
        assert ledger.allocated_bytes == 3 * KIB  # both inputs are seen, and the result
        d = c + b
        assert ledger.allocated_bytes == 4 * KIB
        e = (d * 2) + 1  # the product dies, but lives together with the sum
        assert ledger.allocated_bytes == 5 * KIB
    assert ledger.peak_bytes == 6 * KIB
    assert e.sum() == 7 * COUNT


def test_what_dies_is_taken_off_and_the_peak_stays() -> None:
    with StorageLedger() as ledger:
        a = torch.zeros(4 * COUNT)
        b = torch.zeros(2 * COUNT)
        del a
        assert ledger.allocated_bytes == 2 * KIB
        c = torch.zeros(COUNT)
        assert ledger.allocated_bytes == 3 * KIB
        del b, c
        assert ledger.allocated_bytes == 0
    assert ledger.peak_bytes == 6 * KIB


def test_views_and_work_in_place_add_nothing() -> None:
    with StorageLedger() as ledger:
        a = torch.zeros(COUNT)
        views = [a[3:], a.view(16, 16).mT, a.reshape(2, -1), a.expand(5, -1), a.detach()]
        a.add_(1).mul_(2)
        torch.add(a, 1, out=a)
        assert len(views) == 5
        assert ledger.allocated_bytes == ledger.peak_bytes == KIB


def test_a_storage_lives_as_long_as_its_last_view() -> None:
    with StorageLedger() as ledger:
        a = torch.zeros(COUNT)
        part = a[:2]
        del a
        assert ledger.allocated_bytes == KIB
        del part
        assert ledger.allocated_bytes == 0


def test_a_view_of_a_tensor_from_before_counts_its_whole_storage() -> None:
    part = torch.zeros(COUNT)[:2]
    with StorageLedger() as ledger:
        kept = part + 1
        assert ledger.allocated_bytes == KIB + kept.nbytes


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float64, 8), (torch.bfloat16, 2), (torch.bool, 1), (torch.int64, 8)]
)
def test_the_type_decides_the_bytes(dtype: torch.dtype, size: int) -> None:
    with StorageLedger() as ledger:
        a = torch.zeros(10, dtype=dtype)
        assert ledger.allocated_bytes == 10 * size
    assert a.numel() == 10


def test_several_results_lists_and_keyword_arguments_are_seen() -> None:
    a = torch.rand(COUNT)
    with StorageLedger() as ledger:
        values, order = torch.sort(a)
        assert ledger.allocated_bytes == KIB + KIB + 2 * KIB  # int64 positions
        joined = torch.cat([values, torch.where(order > 0, input=a, other=values)])
        assert ledger.allocated_bytes == 6 * KIB
    assert len(joined) == 2 * COUNT
    with StorageLedger() as ledger:
        found = torch.searchsorted(a, a, sorter=order, out_int32=True)
        assert ledger.allocated_bytes == KIB + 2 * KIB + found.nbytes


def test_a_sparse_tensor_is_the_tensors_it_is_made_of() -> None:
    with StorageLedger() as ledger:
        indices, values = torch.tensor([[0, 1, 2, 3]]), torch.ones(4)
        before = ledger.allocated_bytes
        sparse = torch.sparse_coo_tensor(indices, values, (COUNT,), check_invariants=False)
        doubled = sparse * 2
        assert ledger.allocated_bytes - before == 4 * 8 + 4 * 4
    assert doubled.is_sparse


def test_tensors_can_be_entered_by_hand() -> None:
    ledger = StorageLedger()
    a, b = torch.zeros(COUNT), torch.zeros(COUNT)
    ledger.add({"a": a, "b": [b, a.view(2, -1)]}, "no tensor", None)
    assert ledger.allocated_bytes == ledger.peak_bytes == 2 * KIB


def test_it_can_be_entered_again_and_given_a_new_peak() -> None:
    ledger = StorageLedger()
    with ledger:
        a = torch.zeros(8 * COUNT)
    del a
    assert (ledger.allocated_bytes, ledger.peak_bytes) == (0, 8 * KIB)
    ledger.reset_peak()
    assert ledger.peak_bytes == 0
    with ledger:
        b = torch.zeros(COUNT)
    torch.zeros(COUNT)  # outside: not watched
    assert (ledger.allocated_bytes, ledger.peak_bytes) == (KIB, KIB)
    assert b.numel() == COUNT


def test_an_error_inside_leaves_the_mode() -> None:
    ledger = StorageLedger()
    with pytest.raises(RuntimeError, match="must match"), ledger:
        torch.zeros(2) + torch.zeros(3)
    kept = torch.zeros(COUNT) + 1
    assert kept.numel() == COUNT
    assert ledger.allocated_bytes < KIB


def test_the_ledger_changes_no_value() -> None:
    def gradient() -> Tensor:
        torch.manual_seed(0)
        net = nn.Linear(8, 8)
        nn.functional.dropout(net(torch.randn(4, 8))).square().sum().backward()
        assert net.weight.grad is not None
        return net.weight.grad

    with StorageLedger():
        watched = gradient()
    assert torch.equal(watched, gradient())


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 10)
    )


def profiled_peak(step: Callable[[], None]) -> int:
    """Return the peak of the running sum of the CPU allocator's events during `step`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [
        event
        for event in profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
        if event.name() == "[memory]"
    ]
    assert len(events) > 10
    running = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        running += event.nbytes()
        peak = max(peak, running)
    return peak


@pytest.mark.parametrize("recompute", [False, True])
def test_the_peak_of_a_training_step_is_the_allocators(recompute: bool) -> None:
    net, inputs = mlp(), torch.randn(512, 256)
    live_before = sum(p.nbytes for p in net.parameters()) + inputs.nbytes

    def step() -> None:
        hidden = checkpoint(net, inputs, use_reentrant=False) if recompute else net(inputs)
        hidden.square().mean().backward()

    step()  # what is made once is no part of the comparison
    net.zero_grad()
    gc.collect()
    expected = profiled_peak(step) + live_before
    net.zero_grad()
    with StorageLedger() as ledger:
        step()
    assert ledger.peak_bytes == pytest.approx(expected, rel=0.005)
    gradients = sum(p.nbytes for p in net.parameters())
    assert ledger.allocated_bytes == pytest.approx(live_before + gradients, rel=0.005)


def biased(inputs: Tensor, layer: nn.Linear) -> None:
    """Peak where the bias is added, in place unless a mode watches."""
    layer(inputs.transpose(1, 2)).mean().backward()


def twice(inputs: Tensor, layer: nn.Linear) -> None:
    """Peak where two gradients of one tensor are summed, in place unless a mode watches."""
    hidden = inputs * layer.bias[0]
    loss = hidden.neg().sum() + hidden.neg().sum()
    del hidden
    loss.backward()


@pytest.mark.parametrize("run", [biased, twice])
def test_watching_raises_no_peak(run: Callable[[Tensor, nn.Linear], None]) -> None:
    layer = nn.Linear(64, 128)
    inputs = torch.randn(4, 6, 40, 64)
    live_before = sum(p.nbytes for p in layer.parameters()) + inputs.nbytes
    run(inputs, layer)
    layer.zero_grad()
    gc.collect()
    expected = profiled_peak(lambda: run(inputs, layer)) + live_before
    layer.zero_grad()
    with StorageLedger() as ledger:
        ledger.add(list(layer.parameters()))
        run(inputs, layer)
    assert ledger.peak_bytes == pytest.approx(expected, rel=0.002)
