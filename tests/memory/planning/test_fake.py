"""Models without weights: every tensor fake, shared ones still shared, none left in a cache."""

from __future__ import annotations

import functools
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from expt.memory import plan
from expt.memory.planning.fake import build_fake
from expt.memory.planning.hybrid import HybridFakeMode

pytestmark = pytest.mark.usefixtures("unfrozen")


class Odd(nn.Module):
    """Keeps tensors in every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.twin = self.layer
        self.scale = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("missing", None)
        self.plain = torch.ones(4)
        self.listed = [torch.ones(4), "word", {"inner": self.plain}]
        self.strided = torch.ones(4, 6).t()


def test_every_tensor_becomes_fake_and_keeps_its_kind() -> None:
    model = build_fake(Odd, HybridFakeMode())
    weights = [*model.parameters(), *model.buffers()]
    assert all(isinstance(weight, FakeTensor) for weight in weights)
    assert {str(weight.device) for weight in weights} == {"cpu"}
    assert isinstance(model.scale, nn.Parameter)
    assert not model.scale.requires_grad
    assert model.missing is None
    assert model.twin.weight is model.layer.weight
    assert isinstance(model.listed[0], FakeTensor)
    assert model.listed[1] == "word"
    assert model.listed[2]["inner"] is model.plain
    assert model.strided.stride() == (1, 6)
    assert set(model.state_dict()) == set(Odd().state_dict())


def test_modules_that_copy_themselves_or_keep_lists_of_weights_can_be_built() -> None:
    mode = HybridFakeMode()
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = build_fake(lambda: nn.TransformerEncoder(encoder, 3, enable_nested_tensor=False), mode)
    assert all(isinstance(weight, FakeTensor) for weight in model.parameters())
    lstm = build_fake(lambda: nn.LSTM(4, 8, 2), mode)
    with mode:
        output, _ = lstm(torch.randn(5, 2, 4))  # cuDNN's list of weights is in step
    assert output.shape == (5, 2, 8)


class Looks(nn.Module):
    """Reads values while it is built, which there are none of on meta."""

    def __init__(self) -> None:
        super().__init__()
        edges = torch.ones(3, 3).nonzero()
        self.layer = nn.Linear(int(edges.sum()), 2)


def test_a_model_that_reads_values_while_it_is_built_is_built_for_real() -> None:
    model = build_fake(Looks, HybridFakeMode())
    assert model.layer.weight.shape == (2, 18)
    assert isinstance(model.layer.weight, FakeTensor)


def test_a_sparse_tensor_stays_real() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            empty = torch.zeros(2, 0, dtype=torch.long), torch.zeros(0)
            adjacency = torch.sparse_coo_tensor(*empty, (4, 4), check_invariants=False)
            self.register_buffer("adjacency", adjacency)

    model = build_fake(Graph, HybridFakeMode())
    assert not isinstance(model.adjacency, FakeTensor)
    assert model.adjacency.device.type == "cpu"


def test_a_constructor_that_refuses_its_arguments_is_heard() -> None:
    def refusing() -> nn.Module:
        raise ValueError("width must be even")

    with pytest.raises(ValueError, match="width must be even"):
        build_fake(refusing, HybridFakeMode())


def test_a_large_real_tensor_may_be_read_under_the_mode() -> None:
    data = torch.ones(2**19)
    with HybridFakeMode():
        found: Tensor = data[:3] * 2
    assert isinstance(found, FakeTensor)
    assert data.sum() == 2**19


class Held(nn.Module):
    """A model that somebody has, with everything that a copy may not touch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.steps = nn.Linear(8, 8), 0
        self.norm = nn.BatchNorm1d(8)
        self.table = torch.ones(8)
        self.register_buffer("positions", torch.arange(4))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        rows = x[self.positions.tolist()]  # the values of a real model's small integers are known
        return self.norm(self.layer(rows)) * self.table


@pytest.mark.parametrize("wrap", [False, True])
def test_the_callers_own_model_is_left_as_it_is(wrap) -> None:
    model = Held()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = planned(lambda: nn.Sequential(model) if wrap else model)
    assert found.method == "trace", found.notes
    assert found.by_category["parameters"] >= 3 * 8 * 8
    assert type(model.layer.weight.data) is Tensor and type(model.table) is Tensor
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.steps == 0 and model.training and model.layer.weight.grad is None


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.LazyLinear(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_a_callers_model_is_known_where_objects_are_frozen() -> None:
    gc.freeze()  # as a server does
    model = nn.Linear(4, 4)
    plan(
        lambda: model, lambda: torch.ones(2, 4), lambda weights: torch.optim.SGD(weights, 0.1),
        lambda forward, x: forward(x).sum(), target="cpu",
    )  # fmt: skip
    assert not isinstance(model.weight, FakeTensor)
    assert model.weight.grad is None


def test_lazy_modules_get_their_weights_from_a_first_batch() -> None:
    found = planned(Lazy)
    assert found.method == "trace", found.notes
    assert found.by_category["parameters"] == 4 * (8 * 32 + 32 + 32 * 8 + 8)


def test_a_model_that_names_cuda_is_built_without_a_card() -> None:
    mode = HybridFakeMode()
    model = build_fake(lambda: nn.Linear(4, 4, device="cuda").cuda().to("cuda:0"), mode)
    assert isinstance(model.weight, FakeTensor)
    assert model.weight.device.type == "cpu"


KEPT: dict[int, Tensor] = {}
LONG = 2**19


@functools.lru_cache
def table(count: int) -> Tensor:
    return torch.linspace(0, 1, LONG)[:count]


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + table(8)


class Keeping(Cached):
    def forward(self, x: Tensor) -> Tensor:
        if LONG not in KEPT:
            KEPT[LONG] = torch.linspace(0, 1, LONG)
        return self.layer(x) + KEPT[LONG][:8]


def planned(model_fn):
    return plan(
        model_fn,
        lambda: torch.randn(4, 8),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        lambda model, batch: F.mse_loss(model(batch), batch),
        target="cpu",
    )


def test_a_function_cache_is_empty_after_a_plan():
    table.cache_clear()
    found = planned(Cached)
    assert not any("without values" in note for note in found.notes)
    assert type(table(8)) is Tensor
    assert type(Cached()(torch.randn(4, 8))) is not FakeTensor


def test_tensors_that_torch_or_another_holds_are_no_plans():
    with FakeTensorMode():
        held = torch.empty(3)
    table.cache_clear()
    assert not any("without values" in note for note in planned(Cached).notes)
    assert type(held) is FakeTensor


def test_any_other_cache_is_told_of():
    KEPT.clear()
    found = planned(Keeping)
    assert any("without values" in note for note in found.notes)
    KEPT.clear()
    assert not any("without values" in note for note in planned(Cached).notes)
