"""Compiled steps: the same weights as eager ones, and eager ones wherever compiling fails."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from expt.memory.measuring.budget_ledger import BudgetLedger
from expt.memory.recovery.recovery import Recovery
from expt.memory.techniques.techniques import Techniques, apply
from expt.training.steps.compiled import LEDGER_STEPS, CompiledStep

BATCH = 6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x).squeeze(1)


class Run:
    """A loop of a few lines around `CompiledStep`."""

    def __init__(
        self, compiled: bool, techniques: Techniques | None = None, **options: Any
    ) -> None:
        torch.manual_seed(0)
        self.net = Net()
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2)
        self.recovery = Recovery(techniques or Techniques(), torch.device("cpu"), apply=apply)
        apply(self.net, self.recovery.techniques)
        self.recovery.attach(self.net, self.optimizer)
        self.x, self.said = torch.randn(20, 4), list[str]()
        self.take: Any = self.plain
        if compiled:
            self.take = CompiledStep(
                self.plain, self.net, self.recovery, BATCH, self.said.append, **options
            )

    def plain(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(())
        parts = self.recovery.techniques.gradient_accumulation
        for part in indices.tensor_split(parts):
            self.recovery.phase = "forward"
            x = self.x[part]
            loss = (self.net(x) - x.sum(dim=1)).abs().sum() / len(indices)
            loss.backward()
            total += loss.detach()
        self.recovery.phase = "optimizer_step"
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, torch.tensor(float(len(indices)))

    def steps(self, count: int) -> Tensor:
        for number in range(count):
            size = 2 if number % 5 == 4 else BATCH  # the last batch of an epoch is smaller
            indices = torch.arange(number, number + size) % len(self.x)
            self.recovery.step(self.take, indices, size)
        return torch.cat([weight.detach().flatten() for weight in self.net.parameters()])


@pytest.mark.parametrize(
    "techniques",
    [
        Techniques(),
        Techniques(gradient_accumulation=2),
        Techniques(activation_checkpointing=True),
    ],
)
def test_two_hundred_compiled_steps_are_those_of_eager_mode(techniques):
    expected = Run(False, techniques).steps(200)
    backend = CompileCounterWithBackend("aot_eager")
    run = Run(True, techniques, backend=backend)
    torch.testing.assert_close(run.steps(200), expected, rtol=1e-4, atol=1e-6)
    assert run.said == []
    assert backend.frame_count == 1, "smaller batches are not compiled for"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")  # the compiler's own imports
def test_the_default_backend_gives_the_same_weights(monkeypatch):
    expected = Run(False).steps(12)
    run = Run(True)
    # In this process: each of those that compile beside it would import torch first.
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    torch.testing.assert_close(run.steps(12), expected, rtol=1e-4, atol=1e-6)
    assert run.said == []


def test_a_backend_that_fails_leaves_eager_steps_and_says_so():
    expected = Run(False).steps(10)

    def backend(module: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler found")

    run = Run(True, backend=backend)
    torch.testing.assert_close(run.steps(10), expected, rtol=0, atol=0)
    assert len(run.said) == 1
    assert "the model is not compiled: " in run.said[0]
    assert "no compiler found" in run.said[0]


def test_an_enforced_budget_on_the_cpu_leaves_eager_steps():
    run = Run(True, backend="aot_eager")
    with BudgetLedger(2**30):
        run.steps(LEDGER_STEPS + 2)
    assert len(run.said) == 1
    assert "memory.budget" in run.said[0]


def test_running_out_of_memory_is_recoverys_and_no_failure_to_compile():
    expected = Run(False).steps(10)
    run = Run(True, backend="aot_eager")
    plain, failed = run.take._function, []

    def once(indices: Tensor) -> tuple[Tensor, Tensor]:
        if run.take._eager_left == 0 and not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("CPU out of memory. Tried to allocate 2.50 KiB.")
        return plain(indices)

    run.take._function = once
    torch.testing.assert_close(run.steps(10), expected, rtol=1e-4, atol=1e-6)
    assert run.said == []
    assert [event["rung"] for event in run.recovery.events] == ["halve_micro_batch"]


def test_the_model_is_left_as_it_was(tmp_path: Path):
    run = Run(True, backend="aot_eager")
    run.steps(6)
    assert run.net._compiled_call_impl is None
    torch.save(run.net.state_dict(), tmp_path / "weights.pt")
    assert run.net.state_dict().keys() == Net().state_dict().keys()
