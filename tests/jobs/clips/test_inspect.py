"""Every file is opened once, and again only when it has changed."""

from __future__ import annotations

import json

import pytest
from videos import square, write_video

from expt.jobs.clips import inspect
from expt.jobs.clips.inspect import inspect_files

pytest.importorskip("av")


@pytest.fixture
def opened(monkeypatch):
    """The names of the files that were opened."""
    names: list[str] = []
    real = inspect.probe

    def noting(path):
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(inspect, "probe", noting)
    return names


def test_what_was_found_is_kept(tmp_path, opened):
    paths = [write_video(tmp_path / f"{n}.mp4", square(8 + n)) for n in range(3)]
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    cache = tmp_path / "cache"
    first = inspect_files([*paths, bad], cache)
    assert [first[path].probe.frames for path in paths] == [8, 9, 10]
    assert "bad.mp4 cannot be opened" in first[bad].problem
    assert sorted(opened) == ["0.mp4", "1.mp4", "2.mp4", "bad.mp4"]
    opened.clear()
    assert inspect_files([*paths, bad], cache) == first
    assert opened == ["bad.mp4"]  # its fault may have been passing
    opened.clear()
    write_video(paths[1], square(5))
    assert inspect_files([*paths, bad], cache)[paths[1]].probe.frames == 5
    assert sorted(opened) == ["1.mp4", "bad.mp4"]


def test_a_damaged_cache_is_made_anew(tmp_path, opened):
    path = write_video(tmp_path / "0.mp4", square(8))
    cache = tmp_path / "cache"
    inspect_files([path], cache)
    (kept,) = cache.iterdir()
    for content in ("{", json.dumps({"format": 0, "files": {}}), "[]"):
        kept.write_text(content)
        opened.clear()
        assert inspect_files([path], cache)[path].probe.frames == 8
        assert opened == ["0.mp4"]


def test_a_place_that_cannot_be_written_costs_nothing_but_time(tmp_path):
    path = write_video(tmp_path / "0.mp4", square(8))
    (tmp_path / "file").write_text("")
    assert inspect_files([path], tmp_path / "file" / "cache")[path].probe.frames == 8


def test_sharpness_is_of_every_frame(tmp_path):
    clip = square(6)
    clip[3] = 60  # nothing to see
    path = write_video(tmp_path / "0.mp4", clip)
    values = inspect_files([path], None, 32)[path].sharpness
    assert len(values) == 6
    assert min(values) == values[3] < 5 < sorted(values)[1]
