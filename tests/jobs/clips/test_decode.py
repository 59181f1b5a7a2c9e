"""Frames of files, sound and damaged."""

from __future__ import annotations

import subprocess
import sys
import weakref
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from videos import HEIGHT, WIDTH, square, write_video

from expt.errors import DataError
from expt.jobs.clips.decode import Probe, _read_late, is_clip, probe, read_frames

pytest.importorskip("av")


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return write_video(tmp_path / "a.mp4", square(12))


def noise(frames: int, seed: int = 0) -> np.ndarray:
    """Frames that do not compress away, so that damage has something to hit."""
    coarse = np.random.default_rng(seed).integers(0, 255, (frames, 8, 10, 3), dtype=np.uint8)
    return np.repeat(np.repeat(coarse, 8, axis=1), 8, axis=2)


def test_a_video_says_what_it_holds(video):
    found = probe(video)
    assert found == Probe(12, WIDTH, HEIGHT, 10.0, found.first_time, found.frame_time)


def test_frames_are_those_asked_for_and_scaled(video):
    whole = read_frames(video, range(12))
    assert whole.shape == (12, HEIGHT, WIDTH, 3)
    some = read_frames(video, [2, 2, 7])
    assert np.array_equal(some, whole[[2, 2, 7]])
    assert read_frames(video, [0], short_side=16).shape == (1, 16, 20, 3)
    assert abs(whole.astype(int) - square(12)).mean() < 6  # what h264 loses


def test_a_long_video_is_entered_by_a_seek(tmp_path):
    frames = np.stack([np.full((HEIGHT, WIDTH, 3), number // 2, np.uint8) for number in range(400)])
    path = write_video(tmp_path / "long.mp4", frames, rate=25)
    found = probe(path)
    assert found.frame_time > 0
    late = read_frames(path, [300, 350, 399], probed=found)
    assert np.abs(late.mean(axis=(1, 2, 3)) - [150, 175, 199]).max() < 2
    assert np.array_equal(late, read_frames(path, [300, 350, 399]))


def test_after_a_seek_no_more_is_held_than_was_asked_for():
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = []

    class Frame:
        is_corrupt, width, height, rotation = False, 4, 4, 0

        def __init__(self, pts):
            self.pts = pts
            alive.add(self)

        def to_ndarray(self, **how):
            most.append(len(alive))
            return np.full((2, 2, 3), self.pts, dtype=np.uint8)

    container = SimpleNamespace(
        seek=lambda at, stream: None, decode=lambda stream: (Frame(n) for n in range(60, 160))
    )
    probed = Probe(200, 4, 4, first_time=0, frame_time=1)
    found = _read_late(container, None, range(64, 164), 2, probed)
    assert found is None and max(most) <= 2
    found = _read_late(container, None, [64, 64, 99], 2, probed)
    assert found[:, 0, 0, 0].tolist() == [64, 64, 99]


def test_unevenly_spaced_frames_are_counted_from_the_start(tmp_path):
    import av

    path = tmp_path / "uneven.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=25)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 100)
        for number in range(200):
            picture = np.full((HEIGHT, WIDTH, 3), number, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture)
            frame.pts, frame.time_base = 4 * number + 40 * (number > 100), Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    found = probe(path)
    assert (found.frames, found.frame_time) == (200, 0)
    late = read_frames(path, [90, 150, 199], probed=found)
    assert np.abs(late.mean(axis=(1, 2, 3)) - [90, 150, 199]).max() < 2


@pytest.mark.parametrize("name", ["a.ts", "a.avi", "a.mkv", "a.mpg"])
def test_a_seek_that_is_not_exact_is_not_used(tmp_path, name):
    codec = "mpeg2video" if name == "a.mpg" else "h264"
    frames = np.stack([np.full((HEIGHT, WIDTH, 3), number, np.uint8) for number in range(200)])
    path = write_video(tmp_path / name, frames, codec, rate=25)
    found = probe(path)
    wanted = [100, 140, 180, found.frames - 1]
    whole = read_frames(path, range(found.frames))
    assert np.array_equal(read_frames(path, wanted, probed=found), whole[wanted])


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format"),
    [("a.mkv", "ffv1", "gray"), ("a.mov", "png", "rgba"), ("a.avi", "mpeg4", "yuv420p")],
)
def test_grey_and_alpha_become_colours(tmp_path, name, codec, pixel_format):
    frames = square(4)
    if pixel_format == "rgba":
        frames = np.concatenate([frames, np.full((*frames.shape[:3], 1), 99, np.uint8)], axis=-1)
    path = write_video(tmp_path / name, frames, codec, pixel_format)
    assert read_frames(path, range(4)).shape == (4, HEIGHT, WIDTH, 3)


def test_a_folder_of_images_is_a_clip_in_the_order_of_numbers(tmp_path):
    from PIL import Image

    folder = tmp_path / "clip"
    folder.mkdir()
    for number in (10, 2, 1):
        Image.fromarray(np.full((20, 24, 3), 20 * number, np.uint8)).save(folder / f"f{number}.png")
    assert is_clip(folder)
    assert not is_clip(tmp_path)
    assert probe(folder).frames == 3
    assert read_frames(folder, [0, 1, 2])[:, 0, 0, 0].tolist() == [20, 40, 200]
    with pytest.raises(DataError, match="has 3 frames; frame 3"):
        read_frames(folder, [3])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: whole[: len(whole) // 2], "cannot be opened as a video: Invalid data"),
        (lambda whole: bytes(len(whole)), "cannot be opened as a video: Invalid data"),
        (lambda whole: b"", "cannot be opened as a video: Invalid data"),
        (lambda whole: b"some text\n" * 50, "cannot be opened as a video: Invalid data"),
    ],
    ids=["cut", "zeroed", "empty", "text"],
)
def test_a_file_that_is_no_video_is_named(tmp_path, damage, message):
    whole = write_video(tmp_path / "a.mp4", noise(20)).read_bytes()
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(damage(whole))
    with pytest.raises(DataError, match=message) as caught:
        probe(bad)
    assert str(bad) in str(caught.value)
    assert str(caught.value).count("bad.mp4") == 1


@pytest.mark.parametrize(("name", "codec"), [("a.avi", "mpeg4"), ("a.mkv", "h264")])
def test_a_container_that_says_how_much_it_holds_is_known_to_be_cut(tmp_path, name, codec):
    whole = write_video(tmp_path / name, noise(30), codec).read_bytes()
    cut = tmp_path / f"cut-{name}"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut short: it should hold \d+ frames, and \d+ are there"):
        probe(cut)


PLACES = (0.2, 0.35, 0.5, 0.65)


@pytest.mark.parametrize("share", PLACES)
def test_bytes_that_are_lost_are_found_when_they_are_decoded(tmp_path, share):
    path = write_video(tmp_path / "a.mp4", noise(30))
    whole = path.read_bytes()
    place = int(len(whole) * share)
    # Several frames' worth, whatever the encoder made of them: their lengths cannot be right.
    path.write_bytes(whole[:place] + bytes(2000) + whole[place + 2000 :])
    assert probe(path).frames == 30
    with pytest.raises(DataError, match=r"a\.mp4.*(damaged|cannot be decoded)"):
        read_frames(path, range(30))


def test_a_byte_that_is_flipped_is_found_or_decoded_and_never_anything_else(tmp_path):
    path = write_video(tmp_path / "a.mp4", noise(30))
    whole = path.read_bytes()
    for place in range(len(whole) // 8, len(whole) * 3 // 4, len(whole) // 16):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        assert probe(path).frames == 30
        # Whether a byte matters is the encoder's and the decoder's affair.
        try:
            assert read_frames(path, range(30)).shape == (30, 64, 80, 3)
        except DataError as error:
            assert "damaged" in str(error) or "cannot be decoded" in str(error)


def test_sound_without_pictures_is_said(tmp_path):
    import av

    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(DataError, match="no video stream, only audio"):
        probe(path)


def test_asking_for_more_than_there_is_names_the_file(video):
    with pytest.raises(DataError, match="frame 12 was to be decoded, and it ends after 12"):
        read_frames(video, [3, 12])


def test_without_the_package_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    path = tmp_path / "a.mp4"
    path.write_bytes(b"x")
    with pytest.raises(DataError, match=r"pip install 'expt\[video\]'"):
        probe(path)


def test_importing_the_job_does_not_import_av():
    code = "import sys, expt.jobs.video.data; sys.exit('av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
