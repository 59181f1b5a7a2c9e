"""Demonstrations made here, and that what is shipped was made by the command."""

from __future__ import annotations

import os
import sys
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from expt.errors import ConfigError, DataError
from expt.jobs.vla import demonstrate
from expt.jobs.vla.demonstrate import FIRST_SEED, Request, main, make, read_folder, sentence_of
from expt.jobs.vla.episodes import read_packed

SHIPPED = Path(str(files("expt.jobs.vla"))) / "files/metaworld_state.npz"
TWO = Request(("reach-v3", "button-press-v3"), 2, (), 32)


@pytest.fixture
def simulator() -> None:
    if os.environ.get("EXPT_REQUIRE_EXTRAS") != "1" and find_spec("metaworld") is None:
        pytest.skip("metaworld is not installed: pip install 'expt[sim]'")


def test_the_shipped_file_is_what_the_command_makes(simulator, tmp_path, capsys):
    packed = tmp_path / "packed.npz"
    given = ["--cameras", "--episodes", "2", "--tasks", "drawer-open-v3", "reach-v3"]
    main([str(tmp_path / "state"), *given, "--packed", str(packed)])
    assert "drawer-open-v3: 2 demonstrations" in capsys.readouterr().out
    shipped = {episode.name: episode for episode in read_packed(SHIPPED).episodes}
    made = read_packed(packed).episodes
    assert [episode.seed for episode in made] == [FIRST_SEED, FIRST_SEED + 1] * 2
    for episode in made:
        # Another processor may round otherwise, and a contact magnifies it.
        np.testing.assert_allclose(episode.state[:30], shipped[episode.name].state[:30], atol=2e-3)
        np.testing.assert_allclose(episode.action[0], shipped[episode.name].action[0], atol=2e-3)
        assert episode.sentence == shipped[episode.name].sentence
    assert SHIPPED.stat().st_size < 150_000


def test_pictures_are_drawn_of_every_step(simulator, tmp_path):
    request = Request(("reach-v3",), 1, ("front", "corner2"), 24)
    recordings = make(tmp_path / "seen", request, told=False)
    assert recordings.cameras == ("front", "corner2")
    assert recordings.pixels == 24
    episode = recordings.episodes[0]
    pictures = recordings.frames.read(0, len(episode) - 1, ["corner2", "front"])
    assert pictures.shape == (2, 3, 24, 24)
    assert pictures.std() > 20
    first = recordings.frames.read(0, 0, ["corner2", "front"])
    assert not np.array_equal(first, pictures), "the arm has moved"


def test_a_command_that_was_ended_goes_on(simulator, tmp_path, monkeypatch):
    folder, rolled = tmp_path / "two", []

    def counted(task: str, seed: int, **settings):
        if len(rolled) == 3:
            raise KeyboardInterrupt
        rolled.append((task, seed))
        return roll_out(task, seed, **settings)

    roll_out = demonstrate.roll_out
    monkeypatch.setattr(demonstrate, "roll_out", counted)
    with pytest.raises(KeyboardInterrupt):
        make(folder, TWO, told=False)
    with pytest.raises(DataError, match=r"1 of 2 demonstrations of button-press-v3: .* goes on"):
        read_folder(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")}
    monkeypatch.setattr(demonstrate, "roll_out", roll_out)
    whole = make(folder, TWO, told=False)
    assert [e.name for e in whole.episodes] == [
        f"{task}/{seed}" for task in TWO.tasks for seed in (FIRST_SEED, FIRST_SEED + 1)
    ]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert read_folder(folder).digest() == whole.digest()
    other = Request(TWO.tasks, 2, ("front",), 32)
    with pytest.raises(DataError, match=r"made with cameras=\[\]; give another folder"):
        make(folder, other)


def test_a_failed_episode_is_left_out_and_not_tried_again(simulator, tmp_path, monkeypatch):
    tried = []

    def fails_first(task: str, seed: int, **settings):
        tried.append(seed)
        steps = 3 if seed == FIRST_SEED else settings.pop("steps")
        return roll_out(task, seed, **{**settings, "steps": steps})

    roll_out = demonstrate.roll_out
    monkeypatch.setattr(demonstrate, "roll_out", fails_first)
    request = Request(("reach-v3",), 1, (), 32)
    for _ in range(2):
        assert make(tmp_path / "one", request, told=False).episodes[0].seed == FIRST_SEED + 1
    assert tried == [FIRST_SEED, FIRST_SEED + 1]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(("reach-v2",), 1, (), 32), "unknown task 'reach-v2'; did you mean 'reach-v3"),
        (Request(("reach-v3",), 1, ("frnt",), 32), "unknown camera 'frnt'"),
    ],
)
def test_a_mistake_is_one_line(simulator, tmp_path, request_, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make(tmp_path / "x", request_)
    assert "\n" not in str(caught.value)


def test_without_the_simulator_the_message_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "x"), "--cameras"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "pip install 'expt[sim]'" in said and "Traceback" not in said


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "settings.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match=r"settings.json does not say what the folder holds"):
        read_folder(tmp_path)


def test_every_task_has_a_sentence():
    assert sentence_of("push-v3") == "push the puck to the goal"
    assert sentence_of("door-unlock-v3") == "door unlock"
