from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from expt.memory.watching import largest as module
from expt.memory.watching.largest import Names, find_largest, named_tensors


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(700, 900, bias=False), nn.BatchNorm1d(900))


class Data:
    def __init__(self) -> None:
        self._speed = torch.zeros(1000)
        self.starts = {"train": torch.ones(3)}


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4, 700)).sum().backward()
    optimizer.step()
    return optimizer


def test_weights_gradients_and_state_are_named(model: nn.Module) -> None:
    optimizer = trained(model)
    found = find_largest("cpu", named_tensors(model, optimizer, None), count=10**6)
    own = [tensor for tensor in found.largest if tensor.what.endswith(" 0.weight")]
    assert {tensor.what for tensor in own} >= {
        "parameter 0.weight",
        "gradient of 0.weight",
        "optimizer state exp_avg of 0.weight",
        "optimizer state exp_avg_sq of 0.weight",
    }
    first = own[0]
    assert (first.shape, first.dtype, first.device) == ((900, 700), "float32", "cpu")
    assert first.bytes == 700 * 900 * 4
    assert found.bytes >= 4 * first.bytes
    assert "[900, 700] float32, 2.40 MiB" in first.line()
    assert "buffer 1.running_mean" in dict(named_tensors(model, None, None))


def test_a_storage_counts_once_however_many_tensors_view_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = torch.empty(1_500_007)
    views = [whole[:10], whole.view(1, 1_500_007), whole[5:]]
    small = torch.empty(3)
    monkeypatch.setattr(module, "_alive", lambda: iter([*views, small, whole]))
    found = find_largest("cpu")
    assert found.bytes == 1_500_007 * 4 + 3 * 4
    assert [one.bytes for one in found.largest] == [1_500_007 * 4, 12]
    assert find_largest("cpu", count=1).largest[0].shape == (1, 1_500_007), "the first largest"
    named = find_largest("cpu", [("data speed", views[0])], count=1).largest[0]
    assert (named.what, named.bytes) == ("data speed", 6_000_028), "a name wins, whatever it views"


def test_what_has_no_name_tells_what_made_it() -> None:
    weight = torch.ones(2_000_003, requires_grad=True)
    made = weight * 2
    everything = find_largest("cpu", count=10**6).largest
    kinds = {tensor.what for tensor in everything if tensor.shape == (2_000_003,)}
    assert kinds == {"leaf that wants a gradient", "activation (MulBackward0)"}
    assert made.requires_grad


def test_other_devices_and_tensors_without_bytes_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    far = torch.zeros(10_000_000, device="meta")
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[0, 2]]), torch.ones(2), (10**9,), check_invariants=True
    )
    empty = torch.empty(0)
    monkeypatch.setattr(module, "_alive", lambda: iter([far, sparse, empty]))
    found = find_largest("cpu")
    assert {tensor.device for tensor in found.largest} == {"cpu"}
    assert sorted(tensor.bytes for tensor in found.largest) == [8, 16], "values and indices"
    assert find_largest("cuda").largest == ()
    assert find_largest("meta").largest[0].bytes == 40_000_000


def test_nothing_is_kept_alive(model: nn.Module) -> None:
    names, optimizer = Names(), trained(model)
    data = Data()
    names.know(model, optimizer, data)
    assert {"data speed", "data starts.train"} <= dict(names()).keys()
    del data
    assert "data speed" not in dict(names()), "nobody else held it"
    gone = [weakref.ref(model), weakref.ref(optimizer)]
    assert len(list(names())) > 8
    found = find_largest("cpu", names())
    assert found.largest
    del model, optimizer
    gc.collect()
    assert gone[1]() is None
    assert [what for what, _ in names() if "state" in what] == []
    names.know(None, None, {"a dictionary": 1})
    assert list(names()) == []


def test_a_view_that_will_not_say_what_made_it_is_an_activation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = torch.randn(411, 307, requires_grad=True).clone()
    views = whole.unbind(0)
    with torch.no_grad():
        views[0].mul_(2)
    with pytest.raises(RuntimeError):
        _ = views[0].grad_fn
    monkeypatch.setattr(module, "_alive", lambda: iter(views))
    (found,) = find_largest("cpu").largest
    assert (found.what, found.bytes) == ("activation", 411 * 307 * 4)
