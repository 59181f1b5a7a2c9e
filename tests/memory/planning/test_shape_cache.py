"""Results that are remembered by shape are what the operator itself returns."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from expt.memory.planning import hybrid
from expt.memory.planning.hybrid import HybridFakeMode
from expt.memory.planning.shape_cache import ShapeCache

aten = torch.ops.aten


def described(value: object) -> object:
    if not isinstance(value, torch.Tensor):
        return value
    storage = value.untyped_storage()
    return value.shape, value.stride(), value.dtype, value.storage_offset(), storage.nbytes()


CALLS = {
    "a sum": lambda x: (aten.add.Tensor, (x, x), {}),
    "several results": lambda x: (aten.native_layer_norm.default, (x, [8], None, None, 1e-5), {}),
    "a view": lambda x: (aten.view.default, (x, [8, 4]), {}),
    "views": lambda x: (aten.split.Tensor, (x, 2), {}),
    "in place": lambda x: (aten.mul_.Tensor, (x, 2.0), {}),
    "several in place": lambda x: (aten._foreach_mul_.Scalar, ([x, x.clone()], 2.0), {}),
    "another type": lambda x: (aten._to_copy.default, (x,), {"dtype": torch.bfloat16}),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_remembered_result_is_the_operators_own(name, monkeypatch) -> None:
    cache = ShapeCache()
    monkeypatch.setattr(hybrid, "SHAPES", cache)
    mode, found = HybridFakeMode(), []
    asked: list[object] = []
    dispatch = FakeTensorMode.dispatch
    monkeypatch.setattr(
        FakeTensorMode, "dispatch", lambda *a: (asked.append(a[1]), dispatch(*a))[1]
    )
    for _ in range(2):
        with mode.faking():
            x = torch.empty(4, 8)
        func, args, kwargs = CALLS[name](x)
        asked.clear()
        with mode:
            result = func(*args, **kwargs)
        found.append((result, x, func in asked))
    (first, x, ran), (second, y, again) = found
    assert ran and not again, "the second is remembered"
    assert type(first) is type(second) or isinstance(first, tuple)
    for one, other in zip(tree_leaves(first), tree_leaves(second), strict=True):
        assert described(one) == described(other)
        if isinstance(one, torch.Tensor):
            assert isinstance(other, FakeTensor) and other.fake_mode is mode
            assert (one is x) == (other is y)
            assert vars(one).keys() == vars(other).keys()
            shares = [
                value.untyped_storage()._cdata == of.untyped_storage()._cdata
                for value, of in ((one, x), (other, y))
            ]
            assert shares[0] == shares[1]


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.resize_(16, 8),
        lambda x: x.t_(),
        lambda x: x.set_(torch.empty_like(x).untyped_storage()),
        lambda x: x.unsqueeze_(0),
    ],
)
def test_what_gives_a_tensor_another_shape_in_place_is_always_run(change, monkeypatch) -> None:
    monkeypatch.setattr(hybrid, "SHAPES", ShapeCache())
    mode, found = HybridFakeMode(), []
    for _ in range(2):
        with mode.faking():
            x = torch.empty(4, 8)
        before = x.untyped_storage()._cdata
        with mode:
            change(x)
        found.append((described(x), x.untyped_storage()._cdata == before))
    assert found[0] == found[1]


def test_what_is_written_to_by_name_is_no_new_tensor(monkeypatch) -> None:
    monkeypatch.setattr(hybrid, "SHAPES", ShapeCache())
    mode = HybridFakeMode()
    for _ in range(2):
        with mode.faking():
            x, out = torch.empty(4, 8), torch.empty(4, 8)
        with mode:
            assert torch.mul(x, 2.0, out=out).untyped_storage()._cdata == (
                out.untyped_storage()._cdata
            )


def test_the_address_of_a_remembered_result_may_be_asked_for_like_any_other(monkeypatch) -> None:
    monkeypatch.setattr(hybrid, "SHAPES", ShapeCache())
    mode = HybridFakeMode()
    with mode.faking():
        x = torch.empty(4, 8)
    with mode, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [(x + 1).data_ptr() for _ in range(2)]
    assert found[0] == found[1]
