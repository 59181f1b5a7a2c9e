"""Shares of samples: every one once, in the order of one process."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from expt.job import Batch
from expt.training.batches import HostSamples, SharedSamples
from expt.training.ranks import OneRank, Share


@pytest.mark.parametrize("count", [1, 2, 6, 7, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shares_are_even_and_in_order(count: int, ranks: int) -> None:
    shares = [Share.of(count, rank, ranks) for rank in range(ranks)]
    counted = [list(range(one.start, one.stop)) for one in shares if one.counts]
    assert list(chain(*counted)) == list(range(count))
    assert {one.largest for one in shares} == {max(map(len, counted))}
    assert all(one.stop - one.start == 1 for one in shares if not one.counts)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_every_process_runs_the_model_equally_often(parts: int) -> None:
    every = torch.arange(7)
    seen, lengths = [], set()
    for rank in range(2):
        share = Share.of(7, rank, 2)
        target = every[share.start : share.stop]
        own = HostSamples(None, Batch({}, target), torch.device("cpu"))
        found = list(SharedSamples(own, share, None).parts(parts, 4))
        lengths.add(len(found))
        seen += [value for part, counts in found if counts for value in part.host.target.tolist()]
    assert lengths == {min(parts, 4)}
    assert seen == every.tolist()


def test_every_process_takes_a_smaller_last_batch_in_as_many_parts() -> None:
    lengths = set()
    for rank in range(2):
        share = Share.of(3, rank, 2)
        own = HostSamples(
            None, Batch({}, torch.zeros(share.stop - share.start)), torch.device("cpu")
        )
        lengths.add(len(list(SharedSamples(own, share, None).parts(4, full=8))))
    assert lengths == {1}


def test_one_process_agrees_with_itself() -> None:
    one = OneRank()
    assert one.agree(True, 2.0) == (True, 2.0)
    assert one.gathered("a") == ["a"]
    assert one.from_first(lambda: 3) == 3
    with one.following(lambda batch: batch.target) as ask:
        assert ask(Batch({}, torch.ones(2))).sum() == 2
