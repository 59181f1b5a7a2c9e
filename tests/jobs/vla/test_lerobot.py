"""LeRobot folders of both layouts: what is read, and what is said of those that are wrong."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from robots import CAMERA, FPS, moving, write_lerobot
from videos import write_video

from expt.errors import DataError
from expt.jobs.vla.data import Demonstrations
from expt.jobs.vla.lerobot import read_lerobot

pytest.importorskip("av")
VERSIONS = ("v2.1", "v3.0")
SIZES: dict[str, Any] = {"chunk": 4, "batch_size": 4, "eval_batch_size": 4, "pixels": 16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("robots")
    return {version: write_lerobot(root / version, version) for version in VERSIONS}


def opened(folder: Path, cache: Path, **settings: Any) -> Demonstrations:
    return Demonstrations(str(folder), cache=str(cache), **{**SIZES, **settings})


@pytest.mark.parametrize("version", VERSIONS)
def test_states_actions_sentences_and_names(folders, tmp_path, version):
    found = read_lerobot(folders[version], 16, tmp_path)
    assert len(found.episodes) == 8
    assert found.frames_per_second == FPS
    assert found.cameras == (CAMERA,)
    assert found.state_names == ["s0", "s1", "s2"]
    assert found.action_names == ["Joint 0.pos", "Joint 1.pos"]
    for number, episode in enumerate(found.episodes):
        shown = moving(number)
        np.testing.assert_array_equal(episode.state, shown.state)
        np.testing.assert_array_equal(episode.action, shown.action)
        assert episode.sentence == shown.sentence


@pytest.mark.parametrize("version", VERSIONS)
def test_each_step_has_its_own_picture(folders, tmp_path, version):
    found = read_lerobot(folders[version], 16, tmp_path)
    for number, step in ((0, 0), (3, 7), (6, 11), (7, 2)):
        picture = found.frames.read(number, step, [CAMERA])
        assert picture.shape == (1, 3, 16, 16)
        assert picture.dtype == np.uint8
        # 10 grey levels lie between steps, and 1 between episodes; the codec is off by 1 or 2.
        assert abs(float(picture.mean()) - (10 * step + number)) < 3, (number, step)


def test_a_video_is_decoded_once_and_what_is_there_is_used_again(folders, tmp_path, monkeypatch):
    from expt.jobs.vla import footage

    first = read_lerobot(folders["v3.0"], 16, tmp_path)
    before = first.frames.read(2, 5, [CAMERA])
    assert len(list((tmp_path / "frames").glob("*.npy"))) == 1
    monkeypatch.setattr(footage, "read_frames", lambda *_: pytest.fail("decoded again"))
    again = pickle.loads(pickle.dumps(read_lerobot(folders["v3.0"], 16, tmp_path)))
    assert np.array_equal(again.frames.read(2, 5, [CAMERA]), before)
    with pytest.raises(pytest.fail.Exception):
        read_lerobot(folders["v3.0"], 8, tmp_path).frames.read(2, 5, [CAMERA])


@pytest.mark.parametrize("version", VERSIONS)
def test_images_inside_of_parquet(tmp_path, version):
    folder = write_lerobot(tmp_path / "images", version, pictures="image")
    data = opened(folder, tmp_path)
    item = data.item("train", 0, torch.Generator())
    number = data.parts["train"][0]
    assert item.inputs["images"].shape == (1, 3, 16, 16)
    assert item.inputs["images"].unique().tolist() == [number]


@pytest.mark.parametrize("version", VERSIONS)
def test_images_stand_in_the_order_of_the_steps(tmp_path, version):
    folder = write_lerobot(tmp_path / "images", version, pictures="image")
    for path in folder.glob("data/*/*.parquet"):
        table = parquet.read_table(path)
        parquet.write_table(table.take(list(reversed(range(len(table))))), path)
    data = opened(folder, tmp_path)
    for step in (0, 5):
        assert np.unique(data.recordings.frames.read(2, step, [CAMERA])) == [10 * step + 2]


def test_both_layouts_make_the_same_samples(folders, tmp_path):
    two, three = (opened(folders[version], tmp_path) for version in VERSIONS)
    assert two.parts == three.parts
    one, other = (data.item("train", 9, torch.Generator().manual_seed(0)) for data in (two, three))
    assert one.inputs.keys() == other.inputs.keys()
    for name in ("state", "actions"):
        assert torch.equal(one.inputs[name], other.inputs[name])
    assert "pictures are decoded once into" in two.describe()
    assert "8 demonstrations" not in two.describe()
    assert {metric.name for metric in two.metrics} == {
        "l1",
        "mse",
        "l1_joint_0_pos",
        "l1_joint_1_pos",
    }


def test_the_fingerprint_is_of_the_pictures_as_well(tmp_path):
    folder = write_lerobot(tmp_path / "robot", "v2.1")
    before, plain = opened(folder, tmp_path), opened(folder, tmp_path, cameras=[])
    told = before.fingerprint()
    assert told != plain.fingerprint()
    path = sorted(folder.rglob("*.mp4"))[2]
    write_video(path, np.flip(moving(2).pictures, 0) // 2, rate=FPS)
    after = opened(folder, tmp_path)
    assert after.fingerprint() != told
    assert opened(folder, tmp_path, cameras=[]).fingerprint() == plain.fingerprint()
    number = after.recordings.frames.read(2, 0, [CAMERA])
    assert abs(float(number.mean()) - 112 // 2) < 3, "what was decoded of the old video is not used"


def test_a_camera_by_its_short_name_or_none(folders, tmp_path):
    assert opened(folders["v2.1"], tmp_path, cameras=["top"]).cameras == [CAMERA]
    assert "images" not in opened(folders["v2.1"], tmp_path, cameras=[]).example("train", 2).inputs
    with pytest.raises(DataError, match=r"data.cameras: 'wrist' has no images in .*known names"):
        opened(folders["v2.1"], tmp_path, cameras=["wrist"])
    plain = write_lerobot(tmp_path / "plain", pictures=None)
    with pytest.raises(DataError, match=r"'top' has no images .*they have states alone"):
        opened(plain, tmp_path, cameras=["top"])
    assert opened(plain, tmp_path).cameras == []


def test_sentences_choose_episodes(folders, tmp_path):
    data = opened(folders["v3.0"], tmp_path, tasks=["turn the key"])
    assert sorted(number for part in data.parts.values() for number in part) == [1, 3, 5, 7]
    with pytest.raises(DataError, match="no demonstration is of 'turn the keys'; did you mean"):
        opened(folders["v3.0"], tmp_path, tasks=["turn the keys"])


def changed(folder: Path, **values: Any) -> None:
    path = folder / "meta/info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("missing", ["info.json", "tasks", "episodes"])
def test_a_missing_meta_file_is_named(tmp_path, version, missing):
    folder = write_lerobot(tmp_path / "robot", version, pictures=None)
    for path in sorted((folder / "meta").rglob("*"), reverse=True):
        if path.is_file() and missing in str(path.relative_to(folder)):
            path.unlink()
    with pytest.raises(DataError, match=rf"meta/{missing}\S* is missing") as caught:
        opened(folder, tmp_path)
    assert "\n" not in str(caught.value)


def test_an_unknown_version(tmp_path):
    folder = write_lerobot(tmp_path / "robot", pictures=None)
    changed(folder, codebase_version="v4.0")
    with pytest.raises(DataError, match=r"codebase_version=v4.0; versions .* v2.0, v2.1, v3.0"):
        opened(folder, tmp_path)
    changed(folder, codebase_version="v2.1", fps=0)
    with pytest.raises(DataError, match=r"info.json: fps must be a positive number; there is 0"):
        opened(folder, tmp_path)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_episode_of_another_robot_or_rate(tmp_path, version):
    episodes = [moving(number) for number in range(6)]
    other = [*episodes[:4], moving(4, sizes=(3, 5)), episodes[5]]
    folder = write_lerobot(tmp_path / "robot", version, other, pictures=None)
    with pytest.raises(DataError, match=r"action of episode 4 has 5 values, and .* says 2"):
        opened(folder, tmp_path)
    episodes[3].fps = 30
    folder = write_lerobot(tmp_path / "rate", version, episodes, pictures=None)
    with pytest.raises(DataError, match=r"steps of episode 3 are 0.03333 s apart, .* says fps=10"):
        opened(folder, tmp_path)


def test_a_number_that_is_none(tmp_path):
    episodes = [moving(number) for number in range(6)]
    episodes[2].state[4, 1] = np.nan
    folder = write_lerobot(tmp_path / "robot", "v2.1", episodes, pictures=None)
    with pytest.raises(DataError, match=r"observation.state of episode 2 has values that are no"):
        opened(folder, tmp_path)


def rewritten(folder: Path, number: int, **columns: Any) -> None:
    """Give the table of an episode other columns; None takes one away."""
    path = folder / f"data/chunk-000/episode_{number:06d}.parquet"
    table = parquet.read_table(path)
    for name, values in columns.items():
        place = table.column_names.index(name)
        table = table.remove_column(place)
        if values is not None:
            table = table.add_column(place, name, pa.array(values))
    parquet.write_table(table, path)


STATES = moving(2).state.tolist()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([*STATES[:4], None, *STATES[5:]], "has nothing (null) at step 4"),
        ([*STATES[:4], [1.0, None, 2.0], *STATES[5:]], "has values that are no numbers"),
        ([*STATES[:4], [1.0], *STATES[5:]], "has 1 values, and meta/info.json says 3"),
        ([["a", "b", "c"]] * 12, "must hold numbers; there is list<"),
        (["a"] * 12, "must hold numbers; there is string"),
        ([[[1.0, 2.0], [3.0]]] * 12, "cannot be read"),
    ],
)
def test_states_that_are_none(tmp_path, values, said):
    folder = write_lerobot(tmp_path / "robot", "v2.1", pictures=None)
    rewritten(folder, 2, **{"observation.state": values})
    with pytest.raises(DataError, match=re.escape(said)) as caught:
        read_lerobot(folder, 16, tmp_path)
    assert "000002.parquet: observation.state of episode 2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_of_sentences_and_times_that_are_none(tmp_path):
    folder = write_lerobot(tmp_path / "robot", "v2.1", pictures=None)
    rewritten(folder, 2, task_index=[None, *[0] * 11])
    with pytest.raises(DataError, match=r"task_index of episode 2 has nothing \(null\) at step 0"):
        read_lerobot(folder, 16, tmp_path)
    rewritten(folder, 2, task_index=[0] * 12, timestamp=[[0.0, 1.0]] * 12)
    with pytest.raises(DataError, match="timestamp of episode 2 has 2 values, and must have 1"):
        read_lerobot(folder, 16, tmp_path)
    rewritten(folder, 2, timestamp=None, task_index=None, frame_index=None)
    assert read_lerobot(folder, 16, tmp_path).episodes[2].sentence == moving(2).sentence


def test_a_gap_within_an_episode_is_named(tmp_path):
    folder = write_lerobot(tmp_path / "robot", "v2.1", pictures=None)
    times = np.arange(12) / FPS
    rewritten(folder, 2, timestamp=np.where(np.arange(12) < 3, times, times + 4.7))
    with pytest.raises(DataError, match=r"steps 2 and 3 of episode 2 are 4.8 s apart") as caught:
        read_lerobot(folder, 16, tmp_path)
    assert "\n" not in str(caught.value)
    # Float32 at 40,000 s is kept to 0.004 s, a 25th of a step.
    rewritten(folder, 2, timestamp=(times + 40_000).astype(np.float32))
    assert len(read_lerobot(folder, 16, tmp_path).episodes) == 8


def test_steps_are_in_the_order_of_their_numbers_and_all_there(tmp_path):
    folder = write_lerobot(tmp_path / "robot", "v2.1", pictures=None)
    path = folder / "data/chunk-000/episode_000002.parquet"
    table = parquet.read_table(path)
    order = np.random.default_rng(0).permutation(12)
    parquet.write_table(table.take(order), path)
    found = read_lerobot(folder, 16, tmp_path).episodes[2]
    np.testing.assert_array_equal(found.state, moving(2).state)
    rewritten(folder, 2, frame_index=np.where(order == 5, 6, order))
    with pytest.raises(
        DataError, match="episode 2 must go from 0 to 11; in the place of 5 there is 6"
    ):
        read_lerobot(folder, 16, tmp_path)


def test_fewer_steps_than_are_listed(tmp_path):
    folder = write_lerobot(tmp_path / "robot", "v2.1", pictures=None)
    (folder / "data/chunk-000/episode_000003.parquet").unlink()
    with pytest.raises(DataError, match=r"episode_000003.parquet is missing"):
        opened(folder, tmp_path)
    (folder / "data/chunk-000/episode_000003.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"episode_000003.parquet cannot be read"):
        opened(folder, tmp_path)
    path = folder / "meta/episodes.jsonl"
    folder = write_lerobot(tmp_path / "robot", "v2.1", pictures=None)
    path.write_text(path.read_text().replace('"length": 12', '"length": 13', 1))
    with pytest.raises(DataError, match="has 12 steps of episode 0, and meta lists 13"):
        opened(folder, tmp_path)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_broken_video_is_named_before_training(tmp_path, version):
    folder = write_lerobot(tmp_path / "robot", version)
    path = sorted(folder.rglob("*.mp4"))[0]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"1 of \d videos cannot be read: {path}") as caught:
        opened(folder, tmp_path)
    assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(DataError, match=f"1 files are missing: {path}"):
        opened(folder, tmp_path)
    assert opened(folder, tmp_path, cameras=[]).size("train") > 0


def test_a_video_of_another_rate_or_too_short(tmp_path):
    folder = write_lerobot(tmp_path / "rate", video_fps=25)
    with pytest.raises(DataError, match=r"has 25 frames a second, .* fps=10"):
        opened(folder, tmp_path)
    episodes = [moving(number) for number in range(6)]
    episodes[1].pictures = episodes[1].pictures[:9]
    folder = write_lerobot(tmp_path / "short", "v2.1", episodes)
    with pytest.raises(DataError, match=r"000001.mp4 has 9 frames; episode 1 needs 12"):
        opened(folder, tmp_path)


def test_a_full_disk_is_said_before_training(folders, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DataError, match=r"decoded pictures take .* and .* has .*data.cache=FOLDER"):
        opened(folders["v2.1"], tmp_path)
