from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from expt.memory.recovery.undo import SMALL_BYTES, StepUndo, step_one_by_one, why_not

CPU = torch.device("cpu")


def trained(optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW, **options):
    """Return a model after one step, with gradients for the next."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    made = optimizer(model.parameters(), lr=0.1, **options)
    for _ in range(2):
        model(torch.randn(8, 4)).square().sum().backward()
        made.step()
        made.zero_grad()
    model(torch.randn(8, 4)).square().sum().backward()
    return model, made


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer):
    state = {
        (index, name): value.clone() if isinstance(value, torch.Tensor) else value
        for index, entries in enumerate(optimizer.state.values())
        for name, value in entries.items()
    }
    return {name: value.clone() for name, value in model.state_dict().items()}, state


def test_random_numbers_gradients_and_batch_statistics_are_put_back():
    model, optimizer = trained()
    undo = StepUndo(model, optimizer, CPU)
    undo.note()
    before, _ = snapshot(model, optimizer)
    drawn = []
    for _ in range(2):
        drawn.append((random.random(), np.random.rand(), float(torch.rand(()))))
        model(torch.ones(8, 4)).sum().backward()
        assert undo.undo("backward")
    assert drawn[0] == drawn[1]
    assert all(weight.grad is None for weight in model.parameters())
    after, _ = snapshot(model, optimizer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert before["1.num_batches_tracked"] == 3


def test_state_that_the_first_step_had_begun_to_set_up_is_taken_away():
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    undo = StepUndo(model, optimizer, CPU)
    undo.note()
    optimizer.state[model.weight]["step"] = torch.zeros(())
    assert undo.undo("optimizer_step")
    assert len(optimizer.state) == 0


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_that_was_taken_is_seen(kind, options):
    model, optimizer = trained(kind, **options)
    undo = StepUndo(model, optimizer, CPU)
    undo.note()
    optimizer.step()
    assert not undo.undo("optimizer_step")


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_a_step_that_did_not_begin_is_seen_too(options):
    model, optimizer = trained(**options)
    undo = StepUndo(model, optimizer, CPU)
    undo.note()
    assert undo.undo("optimizer_step")


class Own(torch.optim.SGD):
    """Stands for one whose kernels write past torch."""


Own.__module__ = "somewhere"
UNSEEN = [(Own, {}), (torch.optim.SGD, {"fused": True})]


@pytest.mark.parametrize(("kind", "options"), UNSEEN)
def test_an_optimizer_that_does_not_count_is_trusted_until_it_begins(kind, options):
    model, optimizer = trained(kind, **options)
    undo = StepUndo(model, optimizer, CPU)
    undo.note()
    for phase in ("backward", "step", "optimizer_step"):
        assert undo.phase(phase) == phase
        assert undo.undo(phase)
    handle = optimizer.register_step_pre_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert undo.phase("step") == "optimizer_step"
    assert not undo.undo("step")
    handle.remove()
    undo.note()
    optimizer.step()
    assert undo.phase("step") == "step"
    assert not undo.undo("backward")


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(("kind", "options"), UNSEEN)
def test_an_optimizer_whose_hooks_are_not_called_is_not_trusted(kind, options):
    model, optimizer = trained(kind, **options)
    undo = StepUndo(model, optimizer, CPU)
    optimizer.step = lambda: None
    undo.note()
    assert undo.undo("forward")
    assert not undo.undo("step")


def test_a_closure_is_no_part_of_the_optimizers_work():
    model, optimizer = trained(torch.optim.SGD, foreach=True)
    undo = StepUndo(model, optimizer, CPU)
    undo.note()
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step(out_of_memory)
    assert undo.phase("step") == "step"
    assert undo.undo("step")


def test_hooks_go_with_what_they_were_for():
    model, optimizer = trained()
    undo = StepUndo(model, optimizer, CPU)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    del undo
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_weights_that_came_later_are_put_back_too():
    model, optimizer = trained(torch.optim.SGD)
    undo = StepUndo(model, optimizer, CPU)
    model.append(nn.BatchNorm1d(2))
    optimizer.add_param_group({"params": list(model[3].parameters())})
    undo.note()
    model(torch.randn(8, 4)).square().sum().backward()
    assert undo.undo("backward")
    assert model[3].weight.grad is None
    assert not model[3].running_mean.any()
    with torch.no_grad():
        model[3].weight.add_(1)
    assert not undo.undo("backward")


def test_a_large_buffer_that_was_written_needs_a_checkpoint():
    model, optimizer = trained()
    model.register_buffer("memory", torch.zeros(SMALL_BYTES))
    undo = StepUndo(model, optimizer, CPU)
    undo.note()
    assert undo.undo("forward")
    model.memory.add_(1)
    assert not undo.undo("forward")


def test_settings_that_the_optimizer_keeps_in_its_groups_are_put_back():
    model, optimizer = trained()
    undo = StepUndo(model, optimizer, CPU)
    undo.note()
    optimizer.param_groups[0]["lr"] = 9.0
    undo.undo("forward")
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_stepping_one_by_one_is_the_same_step():
    whole, one = trained(foreach=True), trained(foreach=True)
    step_one_by_one(one[1])
    assert "already" in why_not(one[1])
    for _, optimizer in (whole, one):
        optimizer.step()
        assert len(optimizer.param_groups) == 1
    for left, right in zip(whole[0].parameters(), one[0].parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)


def test_stepping_one_by_one_calls_hooks_once_and_suits_schedulers():
    _, optimizer = trained(foreach=True)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("pre"))
    optimizer.register_step_post_hook(lambda *_: called.append("post"))
    before = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    step_one_by_one(optimizer)
    after = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    assert called == ["pre", "post"]
    before.step()  # neither warns that the optimizer was not called
    after.step()


@pytest.mark.parametrize(
    ("kind", "options", "word"),
    [
        (torch.optim.AdamW, {"foreach": True}, None),
        (torch.optim.AdamW, {}, "no temporaries"),
        (torch.optim.AdamW, {"fused": True}, "no temporaries"),
        (torch.optim.LBFGS, {}, "not known"),
    ],
)
def test_where_stepping_one_by_one_helps(kind, options, word):
    reason = why_not(kind(nn.Linear(2, 2).parameters(), **options))
    assert reason is None if word is None else word in reason
