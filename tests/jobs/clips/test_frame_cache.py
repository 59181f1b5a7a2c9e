"""Frames in memory that worker processes share."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np

from expt.jobs.clips import frame_cache
from expt.jobs.clips.frame_cache import FrameCache, cache_for

SHAPES = [(3, 4, 5, 3), (2, 6, 6, 1)]


def frames(shape: tuple[int, int, int, int], value: int) -> np.ndarray:
    return np.full(shape, value, np.uint8)


def test_what_is_put_is_got_also_by_another_process_s_copy():
    cache = FrameCache(SHAPES)
    other = pickle.loads(pickle.dumps(cache))
    assert cache.get(0, [0]) is None
    other.put(0, frames(SHAPES[0], 7))
    other.put(1, frames(SHAPES[1], 9))
    assert np.array_equal(cache.get(0, range(3)), frames(SHAPES[0], 7))
    assert np.array_equal(cache.get(1, range(2)), frames(SHAPES[1], 9))


def test_emptied_it_has_nothing_and_takes_again():
    cache = FrameCache([(40, 64, 64, 3)] * 3)
    other = pickle.loads(pickle.dumps(cache))
    for number in range(3):
        cache.put(number, frames((40, 64, 64, 3), 5))
    used = Path(cache._path).stat().st_blocks
    cache.clear()
    assert Path(cache._path).stat().st_blocks < used / 10
    assert other.get(1, [0]) is None
    other.put(1, frames((40, 64, 64, 3), 6))
    assert cache.get(1, [39, 0])[1, 0, 0, 0] == 6


def test_whoever_reads_while_it_is_emptied_decodes_instead(monkeypatch):
    cache = FrameCache(SHAPES)
    cache.put(0, frames(SHAPES[0], 7))
    real = cache._frames

    def emptied_meanwhile(number, turned):
        found = real(number, turned)
        cache.clear()
        return found

    monkeypatch.setattr(cache, "_frames", emptied_meanwhile)
    assert cache.get(0, [0]) is None


def test_what_is_written_while_it_is_emptied_is_not_there(monkeypatch):
    cache = FrameCache(SHAPES)
    real = cache._frames

    def emptied_meanwhile(number, turned):
        cache.clear()
        return real(number, turned)

    monkeypatch.setattr(cache, "_frames", emptied_meanwhile)
    cache.put(0, frames(SHAPES[0], 7))
    monkeypatch.undo()
    assert cache.get(0, [0]) is None


def test_a_video_that_is_turned_when_shown_is_kept():
    cache = FrameCache(SHAPES)
    cache.put(0, frames((3, 5, 4, 3), 3))
    assert cache.get(0, [1]).shape == (1, 5, 4, 3)


def test_what_a_killed_process_left_is_removed():
    left = Path(FrameCache(SHAPES)._path).with_name("expt-frames-4194311-left")
    left.write_bytes(b"x")
    FrameCache(SHAPES)
    assert not left.exists()


def test_frames_of_another_shape_are_not_kept():
    cache = FrameCache(SHAPES)
    cache.put(0, frames((2, 5, 4, 3), 1))
    assert cache.get(0, [0]) is None


def test_it_is_gone_with_its_owner():
    cache = FrameCache(SHAPES)
    path = Path(cache._path)
    other = pickle.loads(pickle.dumps(cache))
    del other
    assert path.exists()
    cache._remove()
    assert not path.exists()


def test_it_is_bounded(monkeypatch):
    assert isinstance(cache_for(SHAPES, 10_000), FrameCache)
    assert "needs" in str(cache_for(SHAPES, 100))
    monkeypatch.setattr(frame_cache, "_free_memory", lambda: 300)
    assert "and may have 0.0 MiB" in str(cache_for(SHAPES, 10_000))
