"""Clips as samples: what they hold, what they depend on, and what is refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from videos import square, write_classes, write_video

from expt.errors import DataError
from expt.job import protocol_problem
from expt.jobs.clips.augment import Crop, normalised, sharpness
from expt.jobs.clips.data import ClipData
from expt.jobs.clips.listing import key_of
from expt.jobs.clips.sampling import clip_frames, even_start, random_start
from expt.jobs.video.data import VideoClips
from expt.training.reading import sample_generator

pytest.importorskip("av")
SIZES: dict[str, Any] = {"frames": 4, "pixels": 16, "batch_size": 4, "eval_batch_size": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("clips"))


@pytest.fixture
def data(root: Path) -> Callable[..., VideoClips]:
    return lambda **settings: VideoClips(str(root), **{**SIZES, **settings})


def test_it_is_a_data_set(data):
    assert protocol_problem(VideoClips) is None
    found = data(clips_per_video=3)
    assert [found.size(split) for split in ("train", "val", "test")] == [6, 18, 18]
    assert found.classes == ["left", "right"]
    assert found.model_arguments()["num_classes"] == 2
    assert found.sample_name("val", 4).endswith(".mp4")
    assert found.sample_name("val", 3) == found.sample_name("val", 5)


def test_a_sample_depends_on_its_generator_alone(data):
    one, other = (
        data(flip=0.5, contrast=0.4, brightness=0.2),
        data(flip=0.5, contrast=0.4, brightness=0.2),
    )
    torch.manual_seed(3)
    first = one.item("train", 2, sample_generator(0, 1, 2))
    torch.manual_seed(4)
    again = pickle.loads(pickle.dumps(other)).item("train", 2, sample_generator(0, 1, 2))
    assert torch.equal(first.inputs["clip"], again.inputs["clip"])
    later = one.item("train", 2, sample_generator(0, 2, 2))
    assert not torch.equal(first.inputs["clip"], later.inputs["clip"])
    assert first.inputs["clip"].shape == (3, 4, 16, 16)
    assert first.inputs["clip"].dtype == torch.uint8


def test_evaluation_does_not_draw(data):
    found = data()
    clips = [found.item("val", 0, sample_generator(0, epoch, 0)).inputs["clip"] for epoch in (0, 1)]
    assert torch.equal(*clips)


def test_the_example_has_the_shapes_of_what_is_read(data, root):
    for settings in ({}, {"preprocess_on": "worker"}):
        found = data(**settings)
        read, shown = found.item("val", 0, torch.Generator()), found.example("val", 3)
        assert shown.inputs["clip"].shape == (3, *read.inputs["clip"].shape)
        assert shown.inputs["clip"].dtype == read.inputs["clip"].dtype
        assert shown.target.shape == (3, *read.target.shape)
        assert shown.target.dtype == read.target.dtype


def test_normalising_here_or_on_the_device_is_the_same(data):
    there = normalised(data().item("val", 1, torch.Generator()).inputs["clip"])
    here = data(preprocess_on="worker").item("val", 1, torch.Generator()).inputs["clip"]
    assert torch.equal(there, here)
    assert normalised(here) is here


def test_a_short_video_repeats_its_last_frame_and_is_counted(data):
    found = data(frames=20)
    assert "12 frames" not in found.describe()
    assert "18 of 18 videos are shorter than a clip and repeat their last frame" in found.describe()
    clip = found.item("val", 0, torch.Generator()).inputs["clip"]
    assert torch.equal(clip[:, 12], clip[:, 19])


def test_one_frame_and_ten_thousand(tmp_path):
    for part in ("train", "val", "test"):
        write_video(tmp_path / part / "a" / "one.mp4", square(1))
        write_video(tmp_path / part / "b" / "many.mp4", np.repeat(square(100), 100, axis=0))
    found = VideoClips(str(tmp_path), **SIZES, stride=2)
    clips = [found.item("train", index, sample_generator(0, 0, index)) for index in range(2)]
    assert all(clip.inputs["clip"].shape == (3, 4, 16, 16) for clip in clips)


def test_sizes_and_rates_may_differ(tmp_path):
    for part in ("train", "val", "test"):
        big = np.repeat(np.repeat(square(12), 2, axis=1), 3, axis=2)
        write_video(tmp_path / part / "a" / "big.mp4", big, rate=30)
        write_video(tmp_path / part / "b" / "small.mp4", square(12), rate=10)
    found = VideoClips(str(tmp_path), **SIZES, frames_per_second=10)
    strides = {video.path.name: found._stride(at) for at, video in enumerate(found.videos)}
    assert strides == {"big.mp4": 3, "small.mp4": 1}
    shapes = {found.item("val", i, torch.Generator()).inputs["clip"].shape for i in range(2)}
    assert shapes == {(3, 4, 16, 16)}


def test_files_that_cannot_be_read_are_all_named_at_the_start(tmp_path):
    root = write_classes(tmp_path / "clips")
    for name in ("train/left/x.mp4", "val/right/y.mp4"):
        (root / name).write_bytes(b"text")
    with pytest.raises(DataError, match=r"2 of 20 videos cannot be read: .*x.mp4.*y.mp4") as caught:
        VideoClips(str(root), **SIZES)
    assert "loader.on_bad_sample=skip leaves them out" in str(caught.value)
    found = VideoClips(str(root), **SIZES, on_bad_clip="skip")
    assert found.size("train") == 6
    assert "2 videos cannot be read and are left out" in found.describe()


def test_frames_that_are_not_sharp_are_dropped_and_counted(tmp_path):
    clip = square(12)
    clip[4:8] = 60
    for part in ("train", "val", "test"):
        write_video(tmp_path / part / "a" / "1.mp4", clip)
        write_video(tmp_path / part / "b" / "1.mp4", square(12, seed=1))
    found = VideoClips(str(tmp_path), **SIZES, min_sharpness=5.0)
    assert "12 of 72 frames are less sharp than data.min_sharpness=5 and dropped" in (
        found.describe()
    )
    at = next(at for at, video in enumerate(found.videos) if video.label == "a")
    assert found._usable[at] == [0, 1, 2, 3, 8, 9, 10, 11]
    with pytest.raises(DataError, match="6 videos have no frame as sharp as"):
        VideoClips(str(tmp_path), **SIZES, min_sharpness=1e9)


def test_the_frame_cache_changes_nothing_but_who_decodes(data, monkeypatch):
    plain, cached = data(), data(frame_cache="50MB")
    assert "the frame cache takes up to" in cached.describe()
    for _ in range(2):
        for index in range(6):
            one = plain.item("train", index, sample_generator(0, 0, index)).inputs["clip"]
            other = cached.item("train", index, sample_generator(0, 0, index)).inputs["clip"]
            assert torch.equal(one, other)
    monkeypatch.setattr("expt.jobs.clips.data.read_frames", lambda *a: pytest.fail("decoded"))
    cached.item("train", 0, sample_generator(0, 0, 0))
    cached.clear()
    with pytest.raises(pytest.fail.Exception):
        cached.item("train", 0, sample_generator(0, 0, 0))


def test_a_frame_cache_that_does_not_fit_is_said(data):
    found = data(frame_cache="1kB")
    assert found.cache is None
    assert "there is no frame cache: it needs" in found.describe()


def test_keypoints_go_with_the_frames(root, data, tmp_path):
    with pytest.raises(DataError, match=r"load_kpt=true: there is no .*keypoints.npz"):
        data(load_kpt=True)
    plain = data()
    arrays = {
        str(video.path.relative_to(root).with_suffix("")): np.arange(12.0)[:, None, None]
        * np.ones((12, 3, 2))
        for video in plain.videos
    }
    file = tmp_path / "points.npz"
    np.savez(file, **arrays)
    found = data(load_kpt=True, keypoints_path=str(file))
    assert found.model_arguments()["num_keypoints"] == 3
    read = found.item("val", 0, torch.Generator()).inputs["keypoints"]
    assert read.shape == (4, 3, 2)
    assert torch.allclose(read.diff(dim=0), read.diff(dim=0)[:1])
    assert found.example("val", 2).inputs["keypoints"].shape == (2, 4, 3, 2)
    name = next(iter(arrays))
    np.savez(file, **{**arrays, name: arrays[name] * np.nan})
    unseen = data(load_kpt=True, keypoints_path=str(file))
    at = next(v for v in unseen.videos if key_of(v.path, root) == name)
    assert unseen.keypoints.of(at, [0]).abs().sum() == 0
    np.savez(file, **{**arrays, name: arrays[name][:3]})
    with pytest.raises(DataError, match="has 12 frames, and its keypoints are of 3"):
        data(load_kpt=True, keypoints_path=str(file))
    file.write_text("no array")
    with pytest.raises(DataError, match="must be an npz file"):
        data(load_kpt=True, keypoints_path=str(file))
    arrays.popitem()
    np.savez(file, **arrays)
    with pytest.raises(DataError, match="there are no keypoints for"):
        data(load_kpt=True, keypoints_path=str(file))


def test_keypoints_that_hardly_move_or_go_far_stay_in_bounds(root, data, tmp_path):
    draw = np.random.default_rng(0)
    trained = {video.path for video in data().parts["train"]}
    arrays = {}
    for video in data().videos:
        values = np.full((12, 2, 1), 1000 / 3) + draw.normal(size=(12, 2, 1)) * [[0.0], [1.0]]
        if video.path not in trained:
            values += 1000
        arrays[str(video.path.relative_to(root).with_suffix(""))] = values
    file = tmp_path / "points.npz"
    np.savez(file, **arrays)
    found = data(load_kpt=True, keypoints_path=str(file))
    still, moving = found.item("val", 0, torch.Generator()).inputs["keypoints"].unbind(1)
    assert torch.equal(still, torch.zeros(4, 1))
    assert torch.equal(moving, torch.full((4, 1), 10.0))
    seen = found.item("train", 0, torch.Generator()).inputs["keypoints"]
    assert 0 < seen.abs().max() < 5


def test_the_fingerprint_is_of_files_and_parts(data, root, tmp_path):
    assert data().fingerprint() == data(frames=8).fingerprint()
    other = VideoClips(str(write_classes(tmp_path / "c", videos=8)), **SIZES)
    assert other.fingerprint() != data().fingerprint()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": 0}, "data.frames must be at least 1"),
        ({"flip": 1.5}, "data.flip must be from 0 to 1"),
        (
            {"load_kpt": True, "flip": 0.5},
            "keypoints are not mirrored with their clip; set data.fl",
        ),
        ({"layout": "folder"}, "did you mean 'folders'"),
        ({"resize": 100, "pixels": 112}, "data.resize=100 is less than data.pixels=112"),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, "leave a part for training"),
        ({"frame_cache": "much"}, "data.frame_cache=much is not an amount of memory"),
        ({"group_pattern": "("}, "is no regular expression"),
        ({"preprocess_on": "gpu"}, "must be device or worker"),
        ({"frames_per_second": 0}, "must be positive or null"),
    ],
)
def test_impossible_arguments_are_found_before_anything_is_read(arguments, message):
    (problem,) = ClipData.problems(arguments)
    assert message in problem


@pytest.mark.parametrize("fitting", [{"flip": 0.0}, {"augmentation": False, "flip": 0.5}])
def test_keypoints_with_clips_that_are_not_mirrored(fitting):
    assert ClipData.problems({"load_kpt": True, **fitting}) == []


def test_a_path_that_is_not_given_or_not_there(tmp_path):
    with pytest.raises(DataError, match=r"data.path is not set\. Give the folder"):
        VideoClips(None, **SIZES)
    with pytest.raises(DataError, match="there is no such folder"):
        VideoClips(str(tmp_path / "absent"), **SIZES)


def test_where_clips_start_and_end():
    assert clip_frames(5, 4, 2, 1) == [1, 3, 4, 4]
    assert [even_start(20, 4, 2, n, 3) for n in range(3)] == [0, 6, 13]
    assert even_start(20, 4, 2, 0, 1) == 6
    assert even_start(3, 4, 2, 0, 1) == 0
    starts = {random_start(10, 4, 2, sample_generator(0, n, 0)) for n in range(50)}
    assert starts == {0, 1, 2, 3}


def test_a_crop_mirrors_all_frames_or_none():
    frames = np.random.default_rng(0).integers(0, 255, (3, 10, 12, 3), dtype=np.uint8)
    crop = Crop(8, flip=1.0)
    found = crop.random(frames, torch.Generator().manual_seed(0))
    unflipped = Crop(8).random(frames, torch.Generator().manual_seed(0))
    assert torch.equal(found.flip(-1), unflipped)
    brighter = Crop(8, brightness=0.5).random(frames, torch.Generator().manual_seed(0))
    change = (brighter.float() - unflipped.float()).flatten(2)
    assert change.std() < change.abs().mean()  # one draw for the clip
    assert sharpness(frames).shape == (3,)
