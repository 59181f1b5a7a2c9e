"""Checkpointed activations: the same mathematics, a lower peak, the same names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expt.memory.checkpointing import checkpoint_activations, repeated_blocks
from expt.memory.ledger import StorageLedger


class Stack(nn.Module):
    """Two stages of three blocks each, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleList(block() for _ in range(3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            for layer in stage:
                x = x + layer(x)
        return x


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 16))


def one_step(model: nn.Module) -> tuple[float, list[Tensor], int]:
    """Return loss, gradients and the peak of one step, from the same random state."""
    torch.manual_seed(3)
    x = torch.randn(256, 16)
    with StorageLedger() as ledger:
        loss = model(x).square().mean()
        loss.backward()
    return loss.item(), [weight.grad for weight in model.parameters()], ledger.peak_bytes


def test_loss_and_gradients_are_the_same_and_the_peak_is_lower():
    torch.manual_seed(0)
    plain, saving = Stack(), Stack()
    saving.load_state_dict(plain.state_dict())
    assert checkpoint_activations(saving) == 6
    loss, gradients, peak = one_step(plain)
    saved_loss, saved_gradients, saved_peak = one_step(saving)
    assert saved_loss == loss
    for one, other in zip(gradients, saved_gradients, strict=True):
        assert torch.equal(one, other)
    assert saved_peak < 0.6 * peak


def test_names_and_evaluation_stay_as_they_are():
    plain, saving = Stack(), Stack()
    checkpoint_activations(saving)
    assert list(plain.state_dict()) == list(saving.state_dict())
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 16)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), saving.eval()(x))


def test_a_block_used_twice_is_checkpointed_once():
    shared = block()
    model = nn.ModuleDict({"a": nn.ModuleList([shared]), "b": nn.ModuleList([shared])})
    assert repeated_blocks(model) == [shared]


def test_a_model_without_repeated_blocks_has_none():
    assert checkpoint_activations(nn.Linear(2, 2)) == 0
