from __future__ import annotations

import pickle
import threading
from pathlib import Path

import numpy as np
import pytest

from expt.errors import DataError
from expt.jobs.vla import episodes
from expt.jobs.vla.episodes import Episode, Recordings, StoredFrames, read_packed, write_packed


def recordings(scale: float = 1.0) -> Recordings:
    draw = np.random.default_rng(0)
    episodes = [
        Episode(
            f"task/{n}", "task", "do it",
            (scale * draw.uniform(-1.5, 1.5, (5 + n, 3))).astype(np.float32),
            draw.uniform(-1, 1, (5 + n, 2)).astype(np.float32),
            None if n == 0 else n,
        )
        for n in range(3)
    ]  # fmt: skip
    return Recordings(episodes, ["a", "b", "c"], ["x", "y"], 80.0)


def test_a_packed_file_has_the_values_rounded_and_always_the_same_bytes(tmp_path):
    made = recordings()
    write_packed(tmp_path / "one.npz", made)
    read = read_packed(tmp_path / "one.npz")
    for one, other in zip(made.episodes, read.episodes, strict=True):
        np.testing.assert_allclose(one.state, other.state, atol=5.1e-5)
        np.testing.assert_allclose(one.action, other.action, atol=5.1e-4)
        assert (one.name, one.task, one.sentence, one.seed) == (
            other.name, other.task, other.sentence, other.seed,
        )  # fmt: skip
    assert (read.state_names, read.action_names) == (made.state_names, made.action_names)
    assert read.frames_per_second == 80
    write_packed(tmp_path / "two.npz", read)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    assert read_packed(tmp_path / "two.npz").digest() == read.digest() != made.digest()


def test_values_that_do_not_fit_a_packed_file(tmp_path):
    with pytest.raises(DataError, match=r"do not fit a packed file"):
        write_packed(tmp_path / "one.npz", recordings(scale=10.0))
    assert not list(tmp_path.iterdir())


def test_pictures_are_made_once_and_a_damaged_file_is_named(tmp_path):
    made = []

    def make(episode: int, camera: str) -> np.ndarray:
        made.append((episode, camera))
        return np.full((4, 3, 2, 2), episode + len(camera), np.uint8)

    frames = StoredFrames(["a", "bb"], lambda e, c: tmp_path / f"{e}{c}.npy", make)
    assert frames.read(5, 3, ["bb", "a"])[:, 0, 0, 0].tolist() == [7, 6]
    assert frames.read(5, 0, ["bb"]).shape == (1, 3, 2, 2)
    assert made == [(5, "bb"), (5, "a")]
    frames._make, frames._place = None, _Place(str(tmp_path))
    again = pickle.loads(pickle.dumps(frames))
    assert len(pickle.dumps(frames)) < 1000, "no array goes along"
    assert np.array_equal(again.read(5, 1, ["a"]), frames.read(5, 1, ["a"]))
    (tmp_path / "5a.npy").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"5a.npy cannot be read"):
        pickle.loads(pickle.dumps(frames)).read(5, 1, ["a"])
    with pytest.raises(DataError, match=r"6a.npy cannot be read: FileNotFoundError"):
        frames.read(6, 1, ["a"])


class _Place:
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, episode: int, camera: str):
        return Path(self.folder) / f"{episode}{camera}.npy"


def test_two_that_make_the_same_file_do_not_disturb_each_other(tmp_path, monkeypatch):
    both = threading.Barrier(2)
    saved = episodes.save

    def slow(path: Path, array: np.ndarray) -> None:
        saved(path, array)
        both.wait(timeout=20)  # both have written, and neither has put it in its place

    monkeypatch.setattr(episodes, "save", slow)
    found: list[np.ndarray] = []

    def read() -> None:
        frames = StoredFrames(
            ["a"], lambda *_: tmp_path / "one.npy", lambda *_: np.full((9, 3, 4, 4), 7, np.uint8)
        )
        found.append(frames.read(0, 8, ["a"]))

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [int(picture.min()) for picture in found] == [7, 7]
    assert [path.name for path in tmp_path.iterdir()] == ["one.npy"]


def test_many_files_are_not_all_open(tmp_path):
    frames = StoredFrames(
        ["a"], lambda e, _: tmp_path / f"{e}.npy", lambda e, _: np.full((1, 3, 1, 1), e, np.uint8)
    )
    for episode in range(80):
        assert frames.read(episode, 0, ["a"]).ravel()[0] == episode
    assert len(frames._open) == 64
