"""The record of storages: births, deaths, phases, modules, and the highest point."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from expt.memory.planning.fake import build_fake
from expt.memory.planning.hybrid import HybridFakeMode
from expt.memory.planning.trace import FAR, Storage, StorageTrace, find_peak

KIB = 1024


def live(trace: StorageTrace) -> int:
    return sum(change for _, change, _ in trace.events)


def test_births_and_deaths_of_fake_and_real_storages_are_events() -> None:
    for mode in (HybridFakeMode(), torch.no_grad()):
        trace = StorageTrace()
        with mode, trace:
            one = torch.empty(256)
            two = one + 1
            assert live(trace) == 2 * KIB
            view = two[:3]
            del two
            assert live(trace) == 2 * KIB, "a view keeps its storage"
            del view
            assert live(trace) == KIB
            del one
        assert live(trace) == 0
        assert find_peak(trace, int).bytes == 2 * KIB


def test_phases_and_modules_are_noted() -> None:
    mode = HybridFakeMode()
    model = build_fake(lambda: nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh())), mode)
    trace = StorageTrace()
    with mode, trace, trace.naming(model):
        with trace.phase("forward"):
            output = model(torch.empty(8, 4))
        after = output * 2
    made = [s for s in trace.storages if s.made]
    assert [(s.phase, s.module) for s in made] == [
        ("forward", ""), ("forward", "0"), ("forward", "1.0"), ("between", ""),
    ]  # fmt: skip
    assert made[1].operator == "aten::addmm"
    assert after.shape == (8, 4)
    handles = torch.nn.modules.module._global_forward_hooks
    assert not handles, "the hooks are gone"


def test_a_module_that_raises_is_left_again() -> None:
    mode = HybridFakeMode()
    model = build_fake(lambda: nn.Linear(4, 4), mode)
    trace = StorageTrace()
    with mode, trace, trace.naming(model):
        with pytest.raises(RuntimeError):
            model(torch.empty(8, 5))
        late = torch.empty(3)
    assert late is not None
    assert trace.storages[-1].module == ""


def test_a_category_is_given_and_a_module_kept() -> None:
    with HybridFakeMode():
        weight, other = torch.empty(10), torch.empty(20)
        trace = StorageTrace()
        with trace:
            trace.enter([weight], "parameters", "layer")
            trace.enter([weight, other], "inputs")
    assert [(s.category, s.module) for s in trace.storages] == [("inputs", "layer"), ("inputs", "")]
    assert len(trace.alive()) == 2


def test_a_real_tensor_and_its_fake_views_are_one_storage() -> None:
    data = torch.ones(1000)
    trace = StorageTrace()
    with HybridFakeMode(), trace:
        trace.enter([data], "inputs")
        parts = data[:10], *data[10:].chunk(3)
        assert live(trace) == 4000
        assert len(trace.alive()) == 1
        del parts
        gc.collect()
        assert live(trace) == 4000
        copied = data[:10] * 2
        assert live(trace) == 4040
        view = torch.ones(50).mul(2)[:5]  # of a fake tensor: as ever
        assert live(trace) == 4240
        del copied, view
    assert live(trace) == 4000


def test_a_view_outlives_its_real_base() -> None:
    trace, held = StorageTrace(), [torch.ones(100)]
    with HybridFakeMode(), trace:
        view = held[0][:10]
        held.clear()
        gc.collect()
        assert live(trace) == 400
        assert view.shape == (10,)
        del view
        gc.collect()
        assert live(trace) == 0


def test_a_constant_that_is_made_on_the_way_is_counted_once() -> None:
    trace = StorageTrace()
    with HybridFakeMode(), trace:
        constant = torch.tensor([1.0, 2.0])
        gc.collect()
        assert live(trace) == 8
        assert find_peak(trace, int).bytes == 8
        assert torch.tensor(3).item() == 3, "constants keep their value"
        del constant
    assert live(trace) == 0


def test_a_storage_may_be_resized() -> None:
    trace = StorageTrace()
    with trace:
        tensor = torch.empty(10)
        tensor.resize_(100)
        assert live(trace) == 400


def test_a_bias_is_added_in_place_as_without_a_trace() -> None:
    # While it is watched, torch adds it out of place; see `in_place_sums`.
    mode = HybridFakeMode()
    weight, bias = torch.empty(5, 4), torch.empty(5)
    trace = StorageTrace()
    with mode, trace, torch.no_grad():
        tokens = torch.empty(64, 32, 4).transpose(0, 1)
        before = live(trace)
        output = nn.functional.linear(tokens, weight, bias)
        assert live(trace) - before == output.nbytes + weight.nbytes + bias.nbytes
    peak = find_peak(trace, int).bytes
    assert peak < before + 2 * output.nbytes + 4 * tokens.nbytes


def test_a_count_of_steps_is_answered_inside_the_optimizer_only() -> None:
    trace = StorageTrace()
    with HybridFakeMode() as mode, trace:
        count = torch.zeros(())
        trace.step_begins()
        assert count.item() == FAR
        with trace.outside_step():
            assert count.item() == 0, "a closure has its own numbers"
        trace.step_ends()
        with trace.phase("optimizer_step"):
            assert count.item() == 0
        assert not mode.questions


def test_the_phases_of_anybodys_loop_are_told_apart() -> None:
    mode = HybridFakeMode()
    with mode.faking():
        weight = torch.empty(1000, 1000, requires_grad=True)
    trace = StorageTrace()
    with mode, trace, trace.finding_phases():
        loss = (torch.empty(1000, 1000) @ weight).square().sum()
        loss.backward()
        trace.step_begins()
        with torch.no_grad():
            change = weight.grad * 2
        trace.step_ends()
        after = weight.detach() + 1
    made = [storage.phase for storage in trace.storages if storage.bytes >= 4_000_000]
    assert list(dict.fromkeys(made[1:])) == ["forward", "backward", "optimizer_step"]
    assert made[-1] == "forward" and change.shape == after.shape
    kept = [s.category for s in trace.storages if s.phase == "forward" and s.bytes >= 4_000_000]
    assert "activations" in kept


def made(trace: StorageTrace, *changes: tuple[int, int]) -> StorageTrace:
    """Fill a trace with (storage, change) events."""
    for number, change in changes:
        if number == len(trace.storages):
            trace.storages.append(Storage(change, "build", "", "op", True))
        trace.events.append((number, change, 0))
    return trace


def test_the_peak_is_the_highest_sum_with_what_is_inside_a_kernel() -> None:
    trace = made(StorageTrace(), (0, 100), (1, 50), (1, -50), (2, 30))
    peak = find_peak(trace, int)
    assert (peak.bytes, peak.alive, peak.scratch) == (150, {0: 100, 1: 50}, {})
    trace.scratch += [(3, 10, "small"), (3, 70, "pack")]  # the larger of two at one event
    peak = find_peak(trace, int)
    assert (peak.bytes, peak.alive) == (200, {0: 100, 2: 30})
    assert peak.scratch == {"pack": 70}


def test_the_peak_is_looked_for_from_a_start_and_with_rounding() -> None:
    trace = made(StorageTrace(), (0, 600), (0, -600), (1, 10), (2, 10))
    assert find_peak(trace, int).bytes == 600
    assert find_peak(trace, int, start=2).bytes == 20
    assert find_peak(trace, lambda count: -(-count // 512) * 512, start=2).bytes == 1024
    assert find_peak(StorageTrace(), int).bytes == 0


def test_the_backward_pass_and_its_gradients_are_seen() -> None:
    mode = HybridFakeMode()
    trace = StorageTrace()
    with mode:
        weight: Tensor = torch.empty(100, 100, requires_grad=True)
    with mode, trace:
        with trace.phase("forward"):
            loss = (torch.empty(10, 100) @ weight).square().sum()
        with trace.phase("backward"):
            loss.backward()
        trace.enter([weight.grad], "gradients")
    (gradient,) = [s for s in trace.storages if s.category == "gradients"]
    assert (gradient.bytes, gradient.phase) == (40_000, "backward")
