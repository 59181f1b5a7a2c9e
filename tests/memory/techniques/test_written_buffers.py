"""State that a block writes in its forward pass: as without checkpointing, in every mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.utils.parametrizations import spectral_norm

from expt.memory.measuring.ledger import StorageLedger
from expt.memory.techniques.checkpointing import checkpoint_activations
from expt.memory.techniques.written_buffers import WrittenBuffers

MODES = [True, 2, "selective", "nested"]


class Counter(nn.Module):
    """Counts its calls; the result depends on how many there were."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) / self.calls


class Codebook(nn.Module):
    """Averages over batches, written through a view, by several operators, and under a new name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("codes", torch.ones(4, 16))
        self.register_buffer("average", torch.ones(16))
        self.register_buffer("first", None)
        self.register_buffer("table", torch.randn(64, 16))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            seen = x.mean(0)
            self.codes[1].mul_(0.9).add_(0.1 * seen)
            torch._foreach_lerp_([self.codes[2]], [seen], 0.5)
            self.average = 0.9 * self.average + 0.1 * seen
            self.first = seen if self.first is None else self.first + seen
        return (self.linear(x) * self.average + self.first).tanh() @ self.codes.T @ self.codes


class InTraining(nn.Module):
    """Counts its calls in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.linear(x).tanh() * (1 + self.calls)


def spectral() -> nn.Module:
    return nn.Sequential(spectral_norm(nn.Linear(16, 16)), nn.GELU())


def spectral_by_hook() -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(16, 16)), nn.GELU())


MADE = [Counter, Codebook, InTraining, spectral, spectral_by_hook]


def stack(make) -> nn.Module:
    """Return three blocks, each with a part of modules and a normalisation that counts."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Sequential(nn.Sequential(make(), nn.Tanh()), nn.BatchNorm1d(16)) for _ in range(3))
    )


def trained(model: nn.Module, steps: int = 4) -> list[Tensor]:
    """Return losses and gradients of some steps, and the state afterwards."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(64, 16, generator=generator)).square().sum()
        loss.backward()
        found += [loss.detach(), *(weight.grad.clone() for weight in model.parameters())]
        optimizer.step()
    return [*found, *model.state_dict().values()]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", MADE)
def test_losses_gradients_and_state_are_those_of_the_plain_run(make, mode):
    plain, saving = stack(make), stack(make)
    checkpoint_activations(saving, mode)
    for model in (plain, saving):
        model.eval()
        model(torch.zeros(4, 16)).sum().backward()  # and nothing is learnt for training
        model.train()
    for one, other in zip(trained(plain), trained(saving), strict=True):
        assert torch.equal(one, other)


def test_a_second_backward_pass_finds_the_same_values():
    plain, saving = stack(Counter), stack(Counter)
    checkpoint_activations(saving, True)
    gradients = []
    for model in (plain, saving):
        loss = model(torch.ones(8, 16)).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        gradients.append([weight.grad for weight in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
    assert all(block[0][0].calls == 1 for block in saving)


def test_a_buffer_that_is_written_to_late_is_moved_on_once():
    class Late(Counter):
        begun = False

        def forward(self, x):
            return super().forward(x) if self.begun else self.linear(x)

    plain, saving = stack(Late), stack(Late)
    checkpoint_activations(saving, True)
    for model in (plain, saving):
        trained(model, 2)
        for block in model:
            block[0][0].begun = True
        trained(model, 2)
        assert [int(block[0][0].calls) for block in model] == [2, 2, 2]


def test_what_is_only_read_is_not_copied():
    block = nn.Linear(4, 4)
    block.register_buffer("table", torch.ones(1000, 4))
    buffers = WrittenBuffers(block, apart=())
    for _ in range(2):
        run = buffers.run()
        with StorageLedger() as ledger, run.first():
            torch.ones(1000, 4).mul_(block.table)
        assert ledger.peak_bytes == 2 * 16_000
        assert not run._before


def test_only_what_is_written_to_takes_more():
    def peak(make) -> int:
        model = stack(make)
        checkpoint_activations(model, True)
        trained(model, 2)
        with StorageLedger() as ledger:
            model(torch.ones(64, 16)).sum().backward()
        return ledger.peak_bytes

    class Table(Counter):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.ones(100_000))

    assert peak(Table) == peak(Counter)


@pytest.mark.parametrize("mode", MODES)
def test_it_works_on_fake_tensors(mode):
    for make in MADE:
        with FakeTensorMode():
            model = stack(make)
            checkpoint_activations(model, mode)
            for _ in range(2):
                model(torch.empty(64, 16)).sum().backward()
            assert all(weight.grad is not None for weight in model.parameters())


class PartlyCompiled(nn.Module):
    """A block with a buffer that is only read, and a part that a user compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))
        self.part = torch.compile(self._part, backend="aot_eager")

    def _part(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x)).sin()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.part(x) * self.scale


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_part_that_is_compiled_is_compiled_both_times():
    """Or the first run and its repetition keep other tensors, and torch refuses."""
    torch._dynamo.reset()
    model = nn.Sequential(*(PartlyCompiled() for _ in range(2)))
    checkpoint_activations(model, True)
    x = torch.randn(3, 4)
    for _ in range(2):
        model(x).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
def test_an_operator_of_higher_order_may_be_in_a_block():
    """It has no derivative on a CPU, so that the watch is tried by itself."""
    block = nn.BatchNorm1d(4)
    x = torch.randn(1, 1, 3, 4)
    with torch.no_grad():
        expected = flex_attention(x, x, x)
        with WrittenBuffers(block, apart=()).run().first():
            found = flex_attention(x, x, x)
    assert torch.equal(found, expected)
