"""Models without weights: every tensor fake, shared ones still shared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from expt.memory.planning.fake import build_fake, fake_mode


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
    model = build_fake(Odd, fake_mode())
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
    mode = fake_mode()
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
    model = build_fake(Looks, fake_mode())
    assert model.layer.weight.shape == (2, 18)
    assert isinstance(model.layer.weight, FakeTensor)


def test_a_sparse_tensor_stays_real() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            empty = torch.zeros(2, 0, dtype=torch.long), torch.zeros(0)
            adjacency = torch.sparse_coo_tensor(*empty, (4, 4), check_invariants=False)
            self.register_buffer("adjacency", adjacency)

    model = build_fake(Graph, fake_mode())
    assert not isinstance(model.adjacency, FakeTensor)
    assert model.adjacency.device.type == "cpu"


def test_a_constructor_that_refuses_its_arguments_is_heard() -> None:
    def refusing() -> nn.Module:
        raise ValueError("width must be even")

    with pytest.raises(ValueError, match="width must be even"):
        build_fake(refusing, fake_mode())


def test_real_tensors_may_be_read_under_the_mode() -> None:
    data = torch.arange(6.0)
    with fake_mode():
        found: Tensor = data[:3] * 2
    assert isinstance(found, FakeTensor)
    assert data.sum() == 15
