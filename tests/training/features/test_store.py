"""Rows on disk: written anywhere, read by their sample, there once they are marked."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from expt.errors import ConfigError, ModelError
from expt.training.features import store
from expt.training.features.feature import Feature, FeatureInputs, features_of
from expt.training.features.store import MissingRowError, Rows, RowWriter

HALF = Feature("a", (2, 3), torch.float32, torch.bfloat16)
MASK = Feature("mask", (2,), torch.bool, torch.bool)
SCALAR = Feature("count", (), torch.int64, torch.int64)
SIZES = {"train": 4, "val": 2}


def made(folder: Path) -> Rows:
    return store.create(folder / "part", [HALF, MASK, SCALAR], SIZES, {"key": "k"})


def values(count: int) -> dict[str, torch.Tensor]:
    plain = {
        "a": torch.arange(6.0 * count).reshape(count, 2, 3),
        "mask": torch.ones(count, 2, dtype=torch.bool),
        "count": torch.arange(count),
    }
    return {one.name: one.encode(plain[one.name]) for one in (HALF, MASK, SCALAR)}


def test_rows_are_read_by_their_sample_once_they_are_marked(tmp_path) -> None:
    rows = made(tmp_path)
    assert (rows.count, rows.bytes) == (6, 6 * (12 + 2 + 8))
    writer = RowWriter(rows)
    writer.write([5, 1, 2], values(3))
    with pytest.raises(MissingRowError):
        rows.read("val", 1)
    writer.mark()
    writer.close()
    found = rows.read("val", 1)
    assert found["a"].view(torch.bfloat16).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert rows.read("train", 2)["count"] == 2
    assert rows.done().tolist() == [False, True, True, False, False, True]
    with pytest.raises(MissingRowError):
        rows.read("train", 0)


def test_another_process_maps_them_itself(tmp_path) -> None:
    rows = made(tmp_path)
    writer = RowWriter(rows)
    writer.write(list(range(6)), values(6))
    writer.mark()
    rows.read("train", 0)
    copy = pickle.loads(pickle.dumps(rows))
    assert torch.equal(copy.read("val", 0)["a"], rows.read("val", 0)["a"])


def test_a_store_that_was_begun_goes_on_and_another_begins_anew(tmp_path) -> None:
    rows = made(tmp_path)
    writer = RowWriter(rows)
    writer.write([3], values(1))
    writer.mark()
    assert made(tmp_path).done().sum() == 1
    other = store.create(tmp_path / "part", [HALF], SIZES, {})
    assert other.done().sum() == 0
    final = store.finish(tmp_path / "part", tmp_path / "whole")
    assert final.folder == tmp_path / "whole"
    assert final.features == [HALF]
    assert store.opened(tmp_path / "part") is None


def test_what_is_kept_comes_back_as_it_was_computed() -> None:
    value = torch.randn(4, 5)
    for name, exact in (("auto", True), ("fp32", True), ("fp16", False), ("bf16", False)):
        (feature,) = features_of({"x": value}, 4, name)
        again = FeatureInputs([feature])(lambda x: x, x=feature.encode(value))
        assert again.dtype is torch.float32
        assert torch.equal(again, value) == exact
        assert torch.allclose(again, value, atol=2e-2)
    (feature,) = features_of({"x": value.bfloat16()}, 4, "auto")
    assert feature.stored is torch.bfloat16
    assert feature.encode(value.bfloat16()).numpy().dtype == np.int16
    assert Feature.from_dict(feature.as_dict()) == feature


def test_features_that_cannot_be_kept_are_refused() -> None:
    (feature,) = features_of({"x": torch.zeros(4, 5)}, 4, "fp16")
    with pytest.raises(ConfigError, match="values above 65504"):
        feature.encode(torch.full((4, 5), 1e6))
    with pytest.raises(ModelError, match="must all have the same"):
        feature.encode(torch.zeros(4, 6))
    for wrong in ([torch.zeros(4)], {}, {"x": torch.zeros(3)}, {"x": 1.0}):
        with pytest.raises(ModelError):
            features_of(wrong, 4, "auto")
