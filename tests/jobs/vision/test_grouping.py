"""Batches of images of about the same size."""

from __future__ import annotations

import random

import pytest
import torch
from torch.utils.data import DataLoader

from expt.errors import ConfigError, DataError
from expt.jobs.vision.grouping import GroupedBySize, ordered_by_size, padded, wasted


def spread(count: int) -> list[tuple[int, int]]:
    draw = random.Random(0)
    bounds = ((224, 336), (336, 768), (768, 1024))
    return [2 * (draw.randint(*draw.choices(bounds, (70, 25, 5))[0]),) for _ in range(count)]  # type: ignore[misc]


@pytest.mark.parametrize("count", [1, 15, 16, 100, 1000])
@pytest.mark.parametrize("epoch", [0, 3])
def test_every_sample_comes_once(count: int, epoch: int) -> None:
    order = ordered_by_size(spread(count), 16, 1, epoch)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(count))


def test_the_order_follows_from_seed_and_epoch() -> None:
    sizes = spread(200)
    first = ordered_by_size(sizes, 16, 1, 0)
    assert first.equal(ordered_by_size(sizes, 16, 1, 0))
    assert not first.equal(ordered_by_size(sizes, 16, 1, 1))
    assert not first.equal(ordered_by_size(sizes, 16, 2, 0))
    areas = [sizes[batch[0]][0] for batch in first.split(16)]
    assert areas != sorted(areas)  # batches are in no order


def test_samples_of_one_size_meet_others_in_the_next_epoch() -> None:
    sizes = [(8, 8)] * 64
    one, other = (ordered_by_size(sizes, 8, 0, epoch).split(8) for epoch in (0, 1))
    assert {frozenset(b.tolist()) for b in one} != {frozenset(b.tolist()) for b in other}


def test_little_of_a_grouped_batch_is_padding() -> None:
    sizes = spread(2000)
    mixed = torch.randperm(2000, generator=torch.Generator().manual_seed(0)).split(16)
    before = wasted(sizes, mixed)
    after = wasted(sizes, GroupedBySize(sizes, 16))
    assert before > 60
    assert after < 4


def test_portraits_and_landscapes_are_apart() -> None:
    sizes = [(20, 10), (10, 20)] * 32
    assert wasted(sizes, GroupedBySize(sizes, 8)) == 0
    assert wasted(sizes, [range(64)]) == 50
    assert wasted(sizes, []) == 0


def test_a_loader_takes_the_sampler() -> None:
    sizes = [(4, 4), (8, 8), (4, 4), (8, 6), (2, 2)]
    sampler = GroupedBySize(sizes, 2, seed=1)
    data = [torch.full((3, *size), float(i + 1)) for i, size in enumerate(sizes)]
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=padded)  # type: ignore[arg-type]
    assert len(loader) == 3
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append([batch.amax((1, 2, 3)).tolist() for batch, _ in loader])
        assert sorted(value for batch in orders[-1] for value in batch) == [1, 2, 3, 4, 5]
    assert orders[0] != orders[1] or orders[1] != orders[2]


def test_padding_is_to_the_right_and_below_and_masked() -> None:
    batch, mask = padded([torch.ones(3, 2, 5), torch.ones(3, 4, 1)])
    assert batch.shape == (2, 3, 4, 5)
    assert mask.sum((1, 2)).tolist() == [10, 4]
    assert batch[:, 0].bool().equal(mask)
    assert mask[0, :2].all()


def test_what_cannot_be_grouped_is_refused() -> None:
    with pytest.raises(ConfigError, match="got 0 and 4"):
        GroupedBySize([], 4)
    with pytest.raises(ConfigError, match="got 1 and 0"):
        GroupedBySize([(4, 4)], 0)
    with pytest.raises(DataError, match="sample 1 of 4 x 0 px"):
        GroupedBySize([(4, 4), (0, 4)], 1)
