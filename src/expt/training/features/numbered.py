"""A streamed data set whose samples say which row of the store is theirs.

A sample that cannot be read may have another one in its place, whose row it is then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from expt.job import Batch, Collated, Split, StreamedDataSet
from expt.training.features.store import Rows
from expt.training.reading import sample_name

ROW = "feature_row"
"""Input under which the number of a sample's row travels."""


class Numbered:
    """A streamed data set whose items say which row they are."""

    def __init__(self, base: StreamedDataSet, rows: Rows | None) -> None:
        self.base, self.rows = base, rows
        self.batch_size, self.eval_batch_size = base.batch_size, base.eval_batch_size

    def size(self, split: Split) -> int:
        """Return the number of samples in a split."""
        return self.base.size(split)

    def item(self, split: Split, index: int, generator: torch.Generator) -> Batch:
        """Read one sample."""
        item = self.base.item(split, index, generator)
        if self.rows is None:
            return item
        row = torch.tensor(self.rows.row(split, index))
        return Batch({**item.inputs, ROW: row}, item.target)

    def sample_name(self, split: Split, index: int) -> str:
        """Return where a sample comes from."""
        return sample_name(self.base, (split, 0, index))


class NumberedCollated(Numbered):
    """The same of a data set that makes batches itself."""

    def collate(self, items: Sequence[Batch]) -> Batch:
        """Return samples as one batch."""
        return collate_numbered(self.base, items)


def collate_numbered(base: Any, items: Sequence[Batch]) -> Batch:
    """Return numbered samples as one batch, by the data set's own function."""
    numbers = [item.inputs[ROW] for item in items if ROW in item.inputs]
    bare = [
        Batch({k: v for k, v in item.inputs.items() if k != ROW}, item.target) for item in items
    ]
    batch: Batch = base.collate(bare)
    return Batch({**batch.inputs, ROW: torch.stack(numbers)}, batch.target) if numbers else batch


def numbered(data: StreamedDataSet, rows: Rows | None) -> StreamedDataSet:
    """Return the data set with the numbers of rows among its inputs; without `rows`, as it is."""
    kind = NumberedCollated if isinstance(data, Collated) else Numbered
    return cast(StreamedDataSet, kind(data, rows))
