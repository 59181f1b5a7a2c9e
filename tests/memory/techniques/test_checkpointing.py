"""Checkpointed activations: the same mathematics, a lower peak, the same names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from expt.memory.measuring.ledger import StorageLedger
from expt.memory.techniques.checkpointing import (
    _policy,
    checkpoint_activations,
    remove_checkpointing,
)
from expt.memory.techniques.repeated_blocks import repeated_blocks
from expt.memory.techniques.wrapping import layer_of


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


@pytest.mark.parametrize("mode", [True, 2, "selective"])
def test_every_mode_draws_the_same_dropout_and_saves(mode):
    torch.manual_seed(0)
    plain, saving = Stack(), Stack()
    saving.load_state_dict(plain.state_dict())
    assert checkpoint_activations(saving, mode) == (3 if mode == 2 else 6)
    loss, gradients, peak = one_step(plain)
    saved_loss, saved_gradients, saved_peak = one_step(saving)
    assert saved_loss == loss
    for one, other in zip(gradients, saved_gradients, strict=True):
        assert torch.equal(one, other)
    assert saved_peak < peak


def test_every_nth_block_is_the_nth():
    model = Stack()
    checkpoint_activations(model, 4)
    marked = [layer_of(block, "activation_checkpointing") for block in repeated_blocks(model)]
    assert [layer is not None for layer in marked] == [False, False, False, True, False, False]


def test_it_is_switched_on_and_off_between_steps():
    model = Stack()
    _, gradients, peak = one_step(model)
    model.zero_grad()
    for mode in (True, "selective", "nested", True):
        assert checkpoint_activations(model, mode) == 6
    _, saved_gradients, saved_peak = one_step(model)
    assert saved_peak < 0.6 * peak
    for one, other in zip(gradients, saved_gradients, strict=True):
        assert torch.equal(one, other)
    model.zero_grad()
    assert remove_checkpointing(model) == 6
    assert remove_checkpointing(model) == 0
    assert one_step(model)[2] == peak


def test_selective_keeps_products_and_computes_the_rest_again():
    class Counter(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.counts = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            self.counts[name] = self.counts.get(name, 0) + 1
            return func(*args, **(kwargs or {}))

    def counted(mode):
        model = Stack()
        checkpoint_activations(model, mode)
        with Counter() as counter:
            one_step(model)
        return counter.counts

    plain, full, selective = counted(False), counted(True), counted("selective")
    assert full["addmm"] > plain["addmm"] == selective["addmm"] == 12
    assert full["gelu"] == selective["gelu"] == 2 * plain["gelu"] == 12


def test_selective_composes_with_work_in_place():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Linear(16, 64), nn.ReLU(inplace=True), nn.Linear(64, 16))
                for _ in range(2)
            )

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x)
            return x

    torch.manual_seed(0)
    model = Block()
    loss, gradients, _ = one_step(model)
    model.zero_grad()
    checkpoint_activations(model, "selective")
    saved_loss, saved_gradients, _ = one_step(model)
    assert saved_loss == loss
    for one, other in zip(gradients, saved_gradients, strict=True):
        assert torch.equal(one, other)
    remove_checkpointing(model)
    assert all(layer[1].inplace for layer in model.layers)


@pytest.mark.parametrize(
    "operator",
    [
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
    ],
)
def test_selective_computes_again_what_draws(operator):
    # A kept output would not advance the generator, and the dropout after it would differ.
    names = [argument.name for argument in operator._schema.arguments]
    args = [0.0 if name == "dropout_p" else None for name in names]
    assert _policy(None, operator, *args) is CheckpointPolicy.MUST_SAVE
    args[names.index("dropout_p")] = 0.1
    assert _policy(None, operator, *args) is CheckpointPolicy.PREFER_RECOMPUTE
    keyword = {"dropout_p": args.pop(names.index("dropout_p"))}
    assert _policy(None, operator, *args[:3], **keyword) is CheckpointPolicy.PREFER_RECOMPUTE


def test_selective_under_autocast_with_a_block_used_twice():
    shared = nn.Sequential(nn.Linear(16, 16), nn.GELU())
    model = nn.ModuleDict({"blocks": nn.ModuleList([shared])})

    def step():
        model.zero_grad()
        torch.manual_seed(3)
        x = torch.randn(8, 16)
        with torch.autocast("cpu", torch.bfloat16):
            loss = shared(shared(x)).float().square().mean()
        loss.backward()
        return [weight.grad.clone() for weight in model.parameters()]

    plain = step()
    checkpoint_activations(model, "selective")
    for one, other in zip(plain, step(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-4)


class Normalised(nn.Module):
    """A residual block that keeps running statistics."""

    def __init__(self, momentum: float | None) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(16, 64), nn.BatchNorm1d(64, momentum=momentum), nn.GELU(), nn.Linear(64, 16)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


@pytest.mark.parametrize("mode", [True, "selective"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_blocks_of_a_sequence_count_running_statistics_once(mode, momentum):
    torch.manual_seed(0)
    plain, saving = (nn.Sequential(*(Normalised(momentum) for _ in range(3))) for _ in range(2))
    saving.load_state_dict(plain.state_dict())
    assert checkpoint_activations(saving, mode) == 3
    for _ in range(2):
        loss, gradients, peak = one_step(plain)
        saved_loss, saved_gradients, saved_peak = one_step(saving)
        assert saved_loss == loss
        for one, other in zip(gradients, saved_gradients, strict=True):
            assert torch.equal(one, other)
    assert saved_peak < peak
    for name, value in saving.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
    assert saving[0].layers[1].momentum == momentum


@pytest.mark.parametrize("mode", [True, "selective"])
def test_a_block_does_not_write_over_its_own_input(mode):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.SiLU(inplace=True), nn.Linear(16, 16)

        def forward(self, x):
            return self.second(self.first(x))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), Block(), Block())
    _, gradients, _ = one_step(model)
    model.zero_grad()
    assert checkpoint_activations(model, mode) == 2
    _, saved_gradients, _ = one_step(model)
    for one, other in zip(gradients, saved_gradients, strict=True):
        assert torch.equal(one, other)


def test_nested_needs_less_where_one_block_is_most_of_the_peak():
    from expt.jobs.clips.resnet import ResNet

    def made() -> nn.Module:
        torch.manual_seed(0)
        return ResNet(3, 50, 4, (3, 3, 3), (1, 1, 1), pool=False)

    def step(model: nn.Module) -> tuple[float, list[torch.Tensor], int]:
        x = torch.randn(4, 3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        with StorageLedger() as ledger:
            loss = model(x).square().mean()
            loss.backward()
        return loss.item(), [weight.grad for weight in model.parameters()], ledger.peak_bytes

    plain, outer, nested = made(), made(), made()
    assert checkpoint_activations(outer, True) == checkpoint_activations(nested, "nested") == 16
    results = [step(model) for model in (plain, outer, nested)]
    for loss, gradients, _ in results[1:]:
        assert loss == results[0][0]
        for one, other in zip(results[0][1], gradients, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)
    peaks = [peak for *_, peak in results]
    assert peaks[2] < 0.9 * peaks[1] < 0.9 * peaks[0]
    for one, other in zip(plain.buffers(), nested.buffers(), strict=True):
        assert torch.allclose(one.float(), other.float(), rtol=1e-5)  # counted once
    assert remove_checkpointing(nested) > 16
    assert remove_checkpointing(nested) == 0


class Asking(nn.Module):
    """Takes another branch where two of its arguments are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, y: Tensor, *, scale: Tensor | None = None) -> Tensor:
        if x is not y:
            return self.one(x) + self.other(y).sin()
        return x + self.one(y) if scale is x else self.one(x).tanh()


class Alike(nn.Module):
    """A block whose part gets one tensor several times, by position and by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Asking()

    def forward(self, x: Tensor) -> Tensor:
        x = self.part(x, x) + self.part(x, y=x.sin(), scale=x)
        return x + self.part(x, y=x, scale=x).tanh()


class Encoder(nn.Module):
    """torch's encoder, whose attention gets one tensor three times."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x.view(8, -1, 16))


@pytest.mark.parametrize("mode", [True, "selective", "nested"])
@pytest.mark.parametrize(
    "make", [lambda: nn.Sequential(Alike(), Alike()), lambda: Encoder(dropout=0.5)]
)
def test_a_tensor_given_twice_is_one_tensor_when_it_is_computed_again(make, mode):
    torch.manual_seed(0)
    plain, saving = make(), make()
    saving.load_state_dict(plain.state_dict())
    assert checkpoint_activations(saving, mode) > 1
    loss, gradients, _ = one_step(plain)
    saved_loss, saved_gradients, _ = one_step(saving)
    assert saved_loss == loss
    for one, other in zip(gradients, saved_gradients, strict=True):
        assert torch.equal(one, other)


def test_nested_needs_less_where_attention_is_most_of_a_block():
    peaks = {}
    for mode in (True, "nested"):
        torch.manual_seed(0)
        model = Encoder(dropout=0.0)
        checkpoint_activations(model, mode)
        peaks[mode] = one_step(model)[2]
    assert peaks["nested"] < peaks[True]
