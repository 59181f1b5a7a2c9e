"""Frozen weights that wait on the host: the same numbers, less memory, and predicted so.

There is no GPU here: `ANYWHERE` makes copies all the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expt.errors import ConfigError
from expt.memory.planning.predict import Plan, plan
from expt.memory.techniques import offload, weight_offload
from expt.memory.techniques.techniques import Techniques, apply
from expt.memory.techniques.weight_offload import keep_weights, offload_weights, place_others

WIDTH = 64


class Block(nn.Module):
    """Attention and a network, frozen, with a trained adapter beside the first matrix."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.first, self.second = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.requires_grad_(False)
        self.down, self.up = nn.Linear(width, 2), nn.Linear(2, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm(x)
        x = x + self.attention(seen, seen, seen, need_weights=False)[0]
        inner = self.first(x) + self.up(self.down(x))
        return x + self.second(nn.functional.dropout(inner.relu(), 0.1, self.training))


class Net(nn.Module):
    def __init__(self, blocks: int = 4, width: int = WIDTH) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_offload, "ANYWHERE", True)


def trained(techniques: Techniques, bf16: bool) -> dict[str, Tensor]:
    """Train three steps and return all weights and the gradient of the input."""
    torch.manual_seed(0)
    model = Net()
    apply(model, techniques)
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], 0.01)
    found = {}
    for _ in range(3):
        x = torch.randn(2, 5, WIDTH, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found["x"] = x.grad
    with torch.no_grad():
        found["evaluated"] = model.eval()(torch.ones(1, 3, WIDTH))
    return {**found, **model.state_dict()}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "others",
    [
        {},
        {"activation_checkpointing": True},
        {"activation_checkpointing": "selective"},
        {"saved_tensor_offload": True},
        {"forward_chunks": 2},
    ],
    ids=str,
)
def test_nothing_is_computed_otherwise(anywhere, monkeypatch, others, bf16: bool) -> None:
    monkeypatch.setattr(offload, "leaves_device", lambda tensor: True)
    monkeypatch.setattr(offload, "MIN_BYTES", 1)
    there = trained(Techniques(**others), bf16)
    waiting = trained(Techniques(weight_offload=True, **others), bf16)
    assert there.keys() == waiting.keys()
    for name in there:
        assert torch.equal(there[name], waiting[name]), name


def frozen_bytes(model: nn.Module) -> int:
    return sum(weight.nbytes for weight in model.parameters() if not weight.requires_grad)


@pytest.mark.parametrize("bf16", [False, True])
def test_no_copy_stays_after_its_block(anywhere, bf16: bool) -> None:
    model = Net()
    offload_weights(model)
    kept: list[int] = []
    x = torch.randn(2, 5, WIDTH, requires_grad=True)

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        loss = model(x).float().square().mean()
    largest = 2 * 5 * 4 * WIDTH * 4  # an activation
    of_head_and_adapters = 4 * WIDTH * 3
    assert max(kept) <= max(largest, of_head_and_adapters)
    loss.backward()
    assert x.grad is not None


def test_it_is_put_on_and_taken_off_while_the_model_lives(anywhere) -> None:
    model = Net()
    names = [name for name, _ in model.named_parameters()]
    before = {name: id(weight) for name, weight in model.named_parameters()}
    x = torch.randn(2, 5, WIDTH)
    expected = model.eval()(x)
    assert offload_weights(model) == 4
    assert offload_weights(model) == 4
    assert torch.equal(model(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
    doubled = model(x)
    assert keep_weights(model) == 4
    assert torch.equal(model(x), doubled) and not torch.equal(doubled, expected)
    assert [name for name, _ in model.named_parameters()] == names
    assert {name: id(weight) for name, weight in model.named_parameters()} == before


def test_only_what_does_not_wait_is_moved(monkeypatch) -> None:
    model = Net()
    model.register_buffer("scale", torch.ones(1))
    offload_weights(model)
    moved = []
    to = Tensor.to
    monkeypatch.setattr(
        Tensor, "to", lambda self, *a: (moved.append(self.data_ptr()), to(self, *a))[1]
    )
    place_others(model, torch.device("cpu"))
    names = {value.data_ptr(): name for name, value in model.state_dict().items()}
    found = {names[pointer] for pointer in moved}
    assert {"scale", "head.weight", "blocks.0.up.weight"} < found
    assert not found & {"blocks.0.first.weight", "blocks.3.norm.bias"}


def test_a_model_with_nothing_to_wait_is_refused() -> None:
    with pytest.raises(ConfigError, match="no repeated block with frozen weights"):
        apply(Net().requires_grad_(True), Techniques(weight_offload=True))
    with pytest.raises(ConfigError, match="nested"):
        apply(Net(), Techniques(weight_offload=True, activation_checkpointing="nested"))


def large() -> Net:
    return Net(width=256)


def predicted(target: str, techniques: Techniques, **settings: Any) -> Plan:
    return plan(
        large,
        lambda: torch.zeros(2, 5, 256),
        lambda weights: torch.optim.SGD([w for w in weights if w.requires_grad], 0.1),
        lambda model, x: model(x).square().mean(),
        target=target, prepare=lambda model: apply(model, techniques), **settings,
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_plan_sees_copies_and_not_what_waits(
    anywhere, measured: Callable[..., int], precision: str, checkpointing: bool
) -> None:
    techniques = Techniques(weight_offload=True, activation_checkpointing=checkpointing)
    planned = predicted("cpu", techniques, precision=precision)
    assert planned.method == "trace"
    peak = measured(
        large,
        lambda: torch.zeros(2, 5, 256),
        lambda weights: torch.optim.SGD([w for w in weights if w.requires_grad], 0.1),
        lambda model, x: model(x).square().mean(),
        precision=precision,
        prepare=lambda model: apply(model, techniques),
    )
    assert planned.peak_bytes == pytest.approx(peak - frozen_bytes(large()), rel=0.01)


def test_what_is_saved_is_all_but_one_block() -> None:
    live, waiting = (predicted("cuda", Techniques(weight_offload=on)) for on in (False, True))
    block = frozen_bytes(large()) // 4
    assert live.peak_bytes - waiting.peak_bytes == pytest.approx(3 * block, rel=0.05)
    assert waiting.by_category["parameters"] < block
