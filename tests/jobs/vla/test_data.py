"""Demonstrations as samples: what they hold, what they depend on, and what is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet
from robots import CAMERA, moving, write_lerobot

from expt.errors import DataError, ModelError
from expt.job import Batch, protocol_problem
from expt.jobs.vla.augment import augmented
from expt.jobs.vla.data import Demonstrations
from expt.jobs.vla.predictions import write_actions
from expt.training.reading import sample_generator

SHIPPED = "expt://metaworld_state.npz"
WORDS = {"model_type": "words", "vocab_size": 2000}
"""Stands for a backbone whose tokens are hashes of words, so that no tokenizer is needed."""
SIZES: dict[str, Any] = {"chunk": 6, "batch_size": 8, "eval_batch_size": 8, "tokenizer": WORDS}


@pytest.fixture(scope="module")
def data() -> Demonstrations:
    return Demonstrations(SHIPPED, **SIZES)


@pytest.fixture(scope="module")
def pictured(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Demonstrations]:
    root = tmp_path_factory.mktemp("robot")
    folder = write_lerobot(root / "images", pictures="image")
    made = {**SIZES, "path": str(folder), "cache": str(root / "cache"), "pixels": 16}
    return lambda **settings: Demonstrations(**{**made, **settings})


def test_what_is_shipped(data):
    assert protocol_problem(Demonstrations) is None
    episodes = data.recordings.episodes
    assert len(episodes) == 128
    assert data.recordings.tasks == ["reach-v3", "push-v3", "drawer-open-v3", "button-press-v3"]
    assert len(data.sentences) == 4
    assert {episode.state.shape[1] for episode in episodes} == {39}
    assert {episode.action.shape[1] for episode in episodes} == {4}
    assert min(episode.seed for episode in episodes) == 1000, "those below are for rollouts"
    assert max(abs(episode.action).max() for episode in episodes) == 1
    assert len(data.recordings.state_names) == 39
    told = data.describe()
    assert "104 / 12 / 12 demonstrations" in told and "no pictures" in told and "4 sent" in told
    assert data.model_arguments() == {
        "action_size": 4, "state_size": 39, "chunk": 6, "cameras": 0, "pixels": 64, "num_tokens": 6,
    }  # fmt: skip


def test_a_sample_is_a_step_and_what_was_done_from_there(data):
    number = data.parts["train"][0]
    episode = data.recordings.episodes[number]
    item = data.item("train", 3, torch.Generator().manual_seed(0))
    assert {name: tuple(value.shape) for name, value in item.inputs.items()} == {
        "state": (39,), "noise": (1, 6, 4), "level": (), "actions": (6, 4), "tokens": (6,),
    }  # fmt: skip
    undone = item.target * torch.from_numpy(data.action_std) + torch.from_numpy(data.action_mean)
    np.testing.assert_allclose(undone, episode.action[3:9], atol=1e-6)
    assert torch.equal(item.inputs["actions"], item.target)
    last = data.item("train", len(episode) - 1, torch.Generator())
    assert last.target[0].isfinite().all() and last.target[1:].isnan().all()
    assert (last.inputs["actions"][1:] == 0).all()
    assert data.item("train", len(episode), torch.Generator()).target.isfinite().all()
    assert data.sample_name("train", 3).startswith("step 3 of reach-v3/")


def test_what_is_to_be_found_out_is_no_input_of_validation(data):
    assert "actions" not in data.item("val", 0, torch.Generator()).inputs
    assert "actions" not in data.example("test", 2).inputs
    many = Demonstrations(SHIPPED, **SIZES, samples=3)
    assert many.item("val", 0, torch.Generator()).inputs["noise"].shape == (3, 6, 4)
    assert many.item("train", 0, torch.Generator()).inputs["noise"].shape == (1, 6, 4)


def test_the_example_has_the_shapes_of_what_is_read(data, pictured):
    for found in (data, pictured(), pictured(tokenizer=None)):
        for split in ("train", "val"):
            read, shown = found.item(split, 0, torch.Generator()), found.example(split, 3)
            assert read.inputs.keys() == shown.inputs.keys()
            for name, value in read.inputs.items():
                assert shown.inputs[name].shape == (3, *value.shape), name
                assert shown.inputs[name].dtype == value.dtype, name
            assert shown.target.shape == (3, *read.target.shape)


def test_a_sample_depends_on_its_generator_alone(pictured):
    one = pictured(augmentation=True)
    torch.manual_seed(3)
    first = one.item("train", 2, sample_generator(0, 1, 2))
    torch.manual_seed(4)
    again = pickle.loads(pickle.dumps(one)).item("train", 2, sample_generator(0, 1, 2))
    for name, value in first.inputs.items():
        assert torch.equal(value, again.inputs[name]), name
    later = one.item("train", 2, sample_generator(0, 2, 2))
    for name in ("noise", "level"):
        assert not torch.equal(first.inputs[name], later.inputs[name]), name
    assert 0 <= first.inputs["level"] < 1


def test_an_augmented_picture_is_shifted_and_of_another_light(pictured):
    draw = np.random.default_rng(0)
    picture = torch.from_numpy(draw.integers(60, 180, (2, 3, 16, 16), dtype=np.uint8))
    moved = augmented(picture, torch.Generator().manual_seed(1))
    assert moved.shape == picture.shape and moved.dtype == torch.uint8
    assert not torch.equal(moved, picture)
    assert abs(moved.float().mean() / picture.float().mean() - 1) < 0.25
    assert pictured(augmentation=True).augments and not pictured().augments
    plain, lit = (
        pictured(augmentation=on).item("val", 0, torch.Generator()) for on in (False, True)
    )
    assert torch.equal(plain.inputs["images"], lit.inputs["images"])


def test_whole_episodes_of_every_task_are_in_each_part(data):
    members = [number for part in data.parts.values() for number in part]
    assert sorted(members) == list(range(128))
    for part in data.parts.values():
        tasks = [data.recordings.episodes[number].task for number in part]
        assert {tasks.count(task) for task in set(tasks)} == {len(part) // 4}
    again = Demonstrations(SHIPPED, **SIZES)
    assert again.parts == data.parts and again.fingerprint() == data.fingerprint()
    for changed in ({"chunk": 5}, {"tokenizer": {**WORDS, "vocab_size": 500}}, {"stride": 2}):
        other = Demonstrations(SHIPPED, **{**SIZES, **changed})
        assert other.fingerprint() != data.fingerprint(), changed


def test_an_episode_s_part_does_not_depend_on_other_tasks(data):
    one = Demonstrations(SHIPPED, **SIZES, tasks=["push-v3"])
    for split, part in one.parts.items():
        assert set(part) <= set(data.parts[split])


def test_an_episode_of_a_task_with_few_demonstrations_has_a_part_of_its_own(tmp_path):
    shown = [replace(moving(n), sentence=f"put {n} into the box") for n in range(20)]
    folder = write_lerobot(tmp_path / "unique", episodes=shown, pictures=None)
    data = Demonstrations(str(folder), **SIZES)
    members = [number for part in data.parts.values() for number in part]
    assert sorted(members) == list(range(20)) and all(data.parts.values())
    shares = {"val_fraction": 0.3, "test_fraction": 0.3}
    data = Demonstrations(str(folder), **SIZES, **shares)
    sentences = [f"put {n} into the box" for n in range(0, 20, 2)]
    half = Demonstrations(str(folder), **SIZES, **shares, tasks=sentences)
    for split, part in half.parts.items():
        assert part and set(part) <= set(data.parts[split])
    for n in range(17):  # whatever the hashes say, no part is empty
        tasks = [f"put {n + k} into the box" for k in range(3)]
        three = Demonstrations(str(folder), **SIZES, tasks=tasks)
        assert sorted(map(len, three.parts.values())) == [1, 1, 1]
    shown = [replace(moving(n), sentence="turn the key" if n else "Turn the key") for n in range(4)]
    folder = write_lerobot(tmp_path / "typo", episodes=shown, pictures=None)
    data = Demonstrations(str(folder), **SIZES, val_fraction=0.5, test_fraction=0.4)
    assert sorted(len(set(part) - {0}) for part in data.parts.values()) == [1, 1, 1]
    with pytest.raises(DataError, match=r"has 1 demonstrations of these tasks.* at least 3"):
        Demonstrations(str(folder), **SIZES, tasks=["Turn the key"])


def test_the_training_part_alone_normalises(data):
    states = np.concatenate([data.recordings.episodes[n].state for n in data.parts["train"]])
    np.testing.assert_allclose(data.state_mean, states.mean(axis=0, dtype=float), atol=1e-6)
    every = np.concatenate([episode.state for episode in data.recordings.episodes])
    assert np.abs(data.state_mean - every.mean(axis=0)).max() > 1e-4
    scaled = data.normalised(states)
    moves = states.std(axis=0) > 1e-6
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=0.05)  # a few lie beyond the limit
    np.testing.assert_allclose(scaled[:, moves].std(axis=0), 1, atol=0.05)
    assert (~moves).sum() > 10
    assert (data.normalised(states + 1)[:, ~moves] == 0).all()
    assert np.abs(data.normalised(states + 100)).max() == 10


def test_every_second_step(data):
    half = Demonstrations(SHIPPED, **SIZES, stride=2)
    lengths = [-(-len(data.recordings.episodes[n]) // 2) for n in data.parts["train"]]
    assert half.size("train") == sum(lengths)
    one, same = half.item("train", 4, torch.Generator()), data.item("train", 8, torch.Generator())
    assert torch.equal(one.inputs["state"], same.inputs["state"])


def test_what_something_else_stands_for_is_not_read(pictured, monkeypatch):
    whole = pictured()
    part = whole.without(["images", "tokens"])
    monkeypatch.setattr(whole.recordings.frames, "read", lambda *_: pytest.fail("read"))
    item = part.item("train", 0, torch.Generator().manual_seed(0))
    assert set(item.inputs) == {"state", "noise", "level", "actions"}
    assert set(part.example("train", 1).inputs) == set(item.inputs)
    with pytest.raises(pytest.fail.Exception):
        whole.item("train", 0, torch.Generator())
    assert part.fingerprint() == whole.fingerprint()


def batch(data: Demonstrations, count: int = 5) -> Batch:
    """Return the last samples of the first episode."""
    first = len(data.recordings.episodes[data.parts["val"][0]]) - count
    items = [data.item("val", first + n, torch.Generator()) for n in range(count)]
    inputs = {name: torch.stack([i.inputs[name] for i in items]) for name in items[0].inputs}
    return Batch(inputs, torch.stack([item.target for item in items]))


def test_loss_and_weight_are_sums_over_what_is_known(data):
    whole = batch(data)
    assert whole.target.isfinite().sum() == data.batch_weight(whole) == 4 * (5 + 4 + 3 + 2 + 1)
    prediction = torch.randn(whole.target.shape, generator=torch.Generator().manual_seed(0))
    parts = [whole.each(lambda v, n=n: v[n : n + 1]) for n in range(5)]
    summed = sum(data.loss(prediction[n : n + 1], part) for n, part in enumerate(parts))
    assert torch.allclose(data.loss(prediction, whole), summed)
    assert data.batch_weight(whole) == sum(data.batch_weight(part) for part in parts)
    assert data.loss(whole.target.nan_to_num(), whole) == 0
    with pytest.raises(ModelError, match=r"returned \[5, 3, 4\]; expected \[5, 6, 4\]"):
        data.loss(prediction[:, :3], whole)


def test_to_predict_all_is_test_and_the_trainings_values_normalise(data):
    kept = data.transforms()
    other = Demonstrations(SHIPPED, **SIZES, tasks=["push-v3"], transforms=kept)
    assert other.size("train") == other.size("val") == 0
    assert len(other.parts["test"]) == 32
    assert np.array_equal(other.state_mean, data.state_mean)
    assert other.sentences == ["push the puck to the goal"]
    short = {**kept, "action_mean": kept["action_mean"][:3]}
    with pytest.raises(DataError, match="actions of 4 values, and the model was trained with 3"):
        Demonstrations(SHIPPED, **SIZES, transforms=short)


def test_to_predict_values_and_cameras_are_found_by_their_names(tmp_path):
    side = "observation.images.side"
    trained = Demonstrations(str(write_lerobot(tmp_path / "one", pictures="image")), **SIZES)
    kept = {**trained.transforms(), "cameras": [side, CAMERA]}
    folder = write_lerobot(tmp_path / "other", pictures="image")
    info = json.loads((folder / "meta/info.json").read_text())
    features = info["features"]
    features[side] = features[CAMERA]
    features["action"]["names"].reverse()
    (folder / "meta/info.json").write_text(json.dumps(info))
    for path in folder.glob("data/*/*.parquet"):
        table = parquet.read_table(path)
        parquet.write_table(table.append_column(side, table[CAMERA]), path)
    other = Demonstrations(str(folder), **SIZES, transforms=kept)
    assert other.cameras == [side, CAMERA]
    assert np.array_equal(
        other.recordings.episodes[0].action, trained.recordings.episodes[0].action[:, ::-1]
    )
    assert other.recordings.action_names == trained.recordings.action_names
    with pytest.raises(DataError, match="trained with pictures of 2 cameras"):
        Demonstrations(str(folder), **SIZES, transforms=kept, cameras=["side"])
    features["action"]["names"] = ["Joint 0.pos", "gripper"]
    (folder / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=r"no value 'Joint 1.pos', with which the model was"):
        Demonstrations(str(folder), **SIZES, transforms=kept)


def test_predictions_in_the_robots_own_units(data, tmp_path):
    import pandas as pd

    whole = batch(data)
    first = len(data.recordings.episodes[data.parts["val"][0]]) - 5
    indices = torch.arange(first, first + 5)
    perfect = whole.target.nan_to_num()
    data.write_predictions("val", perfect, indices, tmp_path / "val.npz")
    with np.load(tmp_path / "val.npz") as stored:
        assert stored["action_names"].tolist() == ["x", "y", "z", "gripper"]
        assert stored["step"].tolist() == indices.tolist()
        known = np.isfinite(stored["demonstrated"])
        assert known.sum() == 60
        np.testing.assert_allclose(
            stored["predicted"][known], stored["demonstrated"][known], atol=1e-6
        )
    several = torch.stack([perfect, perfect + 1], dim=1)
    data.write_predictions("val", several, indices, tmp_path / "val.parquet")
    table = pd.read_parquet(tmp_path / "val.parquet")
    assert len(table) == 30
    assert (table.predicted_x - table.demonstrated_x).abs().max() < 1e-6


def test_actions_of_one_name_have_columns_of_their_own(tmp_path):
    import pandas as pd

    values = np.arange(6.0).reshape(1, 2, 3)
    columns = {"predicted": values, "demonstrated": values}
    columns |= {"episode": np.array(["a"]), "step": np.array([0])}
    write_actions(tmp_path / "a.parquet", ["joint", "joint", "grip"], columns)
    table = pd.read_parquet(tmp_path / "a.parquet")
    assert table.predicted_joint.tolist() == [0, 3]
    assert table.predicted_joint_1.tolist() == [1, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": None}, "data.path is not set. Give a LeRobot folder"),
        ({"path": "nowhere"}, "data.path=nowhere: there is no such file or folder"),
        ({"tasks": ["push-v2"]}, "no demonstration is of 'push-v2'; did you mean 'push-v3'"),
        ({"cameras": ["front"]}, "'front' has no images in the demonstrations .*data.cameras=.. t"),
    ],
)
def test_a_mistake_is_one_line(settings, message):
    with pytest.raises(DataError, match=message) as caught:
        Demonstrations(**{**SIZES, "path": SHIPPED, **settings})
    assert "\n" not in str(caught.value)


def test_impossible_settings_are_named_before_a_file_is_read():
    wrong = {"chunk": 0, "samples": 0, "pixels": 4, "val_fraction": 0.6, "test_fraction": 0.5}
    found = " ".join(Demonstrations.problems(wrong))
    for name in wrong:
        assert f"data.{name}" in found
    assert Demonstrations.problems({"chunk": 8}) == []
    assert "data.pixels is null" in Demonstrations.problems({"pixels": None})[0]


def test_a_damaged_file(tmp_path):
    path = Path(tmp_path / "cut.npz")
    path.write_bytes(b"PK not an archive")
    with pytest.raises(DataError, match=r"cut.npz holds no demonstrations: .*vla.demonstrate"):
        Demonstrations(str(path), **SIZES)
    np.savez(path, state=np.zeros(3))
    with pytest.raises(DataError, match=r"KeyError: 'state_differences"):
        Demonstrations(str(path), **SIZES)
