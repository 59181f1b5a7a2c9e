"""A data set with features offers all that it offered, and its items without what they replace."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from expt.job import (
    Batch,
    Collated,
    Exemplary,
    Named,
    Plotted,
    Transformed,
    Weighted,
    WithoutInputs,
)
from expt.training.features import store
from expt.training.features.dataset import with_features
from expt.training.features.feature import Feature
from expt.training.features.store import RowWriter

FEATURE = Feature("f", (3,), torch.float32, torch.float32)
SIZES = {"train": 5, "val": 2, "test": 2}


class Data:
    metrics = ()

    def __init__(self) -> None:
        self.batch_size, self.eval_batch_size, self.scale = 2, 2, 1.0

    def size(self, split: str) -> int:
        return SIZES[split]

    def item(self, split: str, index: int, generator: torch.Generator) -> Batch:
        inputs = {"big": torch.ones(4), "small": torch.tensor(float(index))}
        return Batch(inputs, torch.tensor(index))

    def batch_weight(self, batch: Batch) -> Tensor:
        return self.scale * batch.inputs["small"].sum()

    def _private(self, index: int) -> Batch:
        return self.item("test", index, torch.Generator())

    def plots(self, predict, metrics, folder):
        return [predict(self._private(1)), predict(self.item("test", 0, torch.Generator()))]


class Together(Data):
    def collate(self, items: Sequence[Batch]) -> Batch:
        assert "f" not in items[0].inputs
        inputs = {"small": torch.stack([item.inputs["small"] for item in items])}
        return Batch(inputs, torch.stack([item.target for item in items]))


@pytest.fixture
def rows(tmp_path):
    made = store.create(tmp_path / "rows", [FEATURE], SIZES, {})
    writer = RowWriter(made)
    writer.write(list(range(9)), {"f": FEATURE.encode(torch.arange(27.0).reshape(9, 3))})
    writer.mark()
    return made


def test_items_have_features_in_the_place_of_inputs(rows) -> None:
    data = with_features(Data(), [FEATURE], ["big"], rows)
    item = data.item("val", 1, torch.Generator())
    assert set(item.inputs) == {"small", "f"}
    assert item.inputs["f"].view(torch.float32).tolist() == [18.0, 19.0, 20.0]
    assert item.target == 1
    again = pickle.loads(pickle.dumps(data)).item("val", 1, torch.Generator())
    assert torch.equal(again.inputs["f"], item.inputs["f"])


def test_it_offers_what_the_data_set_offers(rows) -> None:
    data = with_features(Data(), [FEATURE], ["big"], rows)
    for protocol, offered in (
        (Weighted, True), (Plotted, True), (Exemplary, True), (Collated, False), (Named, False),
        (Transformed, False), (WithoutInputs, False),
    ):  # fmt: skip
        assert isinstance(data, protocol) == offered, protocol
    assert data.size("train") == 5
    data.scale = 2.0  # a change reaches the data set itself
    assert data.base.scale == 2.0
    batch = Batch({"small": torch.ones(2)}, torch.zeros(2))
    assert data.batch_weight(batch) == 4.0


def test_figures_are_drawn_of_items_with_features(rows) -> None:
    data = with_features(Data(), [FEATURE], ["big"], rows)
    assert data.plots(lambda item: set(item.inputs), None, None) == [{"small", "f"}] * 2


def test_a_batch_of_its_own_gets_features_beside(rows) -> None:
    data = with_features(Together(), [FEATURE], ["big"], rows)
    assert isinstance(data, Collated)
    items = [data.item("train", index, torch.Generator()) for index in (0, 3)]
    batch = data.collate(items)
    assert batch.inputs["f"].view(torch.float32)[:, 0].tolist() == [0.0, 9.0]
    assert batch.inputs["small"].tolist() == [0.0, 3.0]


def test_a_plan_has_shapes_without_rows() -> None:
    data = with_features(Data(), [FEATURE], ["big"])
    batch = data.example("train", 3)
    assert {name: tuple(value.shape) for name, value in batch.inputs.items()} == {
        "small": (3,), "f": (3, 3),
    }  # fmt: skip
