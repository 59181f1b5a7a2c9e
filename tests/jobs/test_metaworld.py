from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from expt.errors import ConfigError
from expt.jobs.metaworld import Camera, Simulation, positions, render, roll_out, task_names

TASK = "drawer-open-v3"
ABOVE = Camera(target=(0.0, 0.7, 0.1), distance=1.2, azimuth=-90.0, elevation=-50.0)


@pytest.fixture
def simulator() -> None:
    """Skip without the packages of the extra `sim`, unless they are asked for.

    Nothing is imported: the module says how to draw before it imports MuJoCo.
    """
    if os.environ.get("EXPT_REQUIRE_EXTRAS") != "1" and find_spec("metaworld") is None:
        pytest.skip("metaworld is not installed: pip install 'expt[sim]'")


def test_a_rollout_has_its_shapes_and_the_same_seed_gives_the_same_bytes(simulator):
    first, second = (
        roll_out(TASK, 3, cameras=("corner2", ABOVE), size=(32, 48), noise=0.2, steps=4)
        for _ in range(2)
    )
    assert first.observations.shape == (4, 39)
    assert first.actions.shape == (4, 4)
    assert [frames.shape for frames in first.frames] == [(4, 32, 48, 3)] * 2
    assert first.frames[0].dtype == np.uint8
    assert not first.success
    for name in ("observations", "actions", "joints"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name
    for one, other in zip(first.frames, second.frames, strict=True):
        assert one.std() > 20, "a picture with something in it"
        assert np.array_equal(one, other)
    assert not np.array_equal(*first.frames)
    other_seed = roll_out(TASK, 4, noise=0.2, steps=4)
    assert not np.array_equal(first.observations[0], other_seed.observations[0])
    assert not np.array_equal(first.actions[0], other_seed.actions[0])


def test_the_expert_solves_its_task_and_the_episode_ends_soon_after(simulator):
    rollout = roll_out(TASK, 3, steps=200, steps_after_success=5)
    assert rollout.success
    assert len(rollout.observations) == rollout.success_step + 6
    opened = rollout.joints[-1, -1] - rollout.joints[0, -1]
    assert opened < -0.15, "the drawer's joint, in metres"


def test_noise_and_speed_change_what_is_applied(simulator):
    plain = roll_out(TASK, 3, steps=3)
    slow = roll_out(TASK, 3, steps=3, speed=0.5)
    noisy = roll_out(TASK, 3, steps=3, noise=0.5)
    assert np.array_equal(plain.intended, plain.actions)
    assert np.array_equal(noisy.intended[0], plain.intended[0]), "what was wanted has no noise"
    assert np.allclose(slow.actions[0, :3], plain.actions[0, :3] / 2)
    assert slow.actions[0, 3] == plain.actions[0, 3], "the gripper's force is not a motion"
    assert not np.allclose(noisy.actions, plain.actions)
    assert np.abs(noisy.actions).max() <= 1


def test_a_recorded_rollout_is_drawn_again_as_it_was(simulator):
    rollout = roll_out(TASK, 3, cameras=("corner2",), size=(48, 48), steps=6)
    assert np.array_equal(render(rollout, "corner2", (48, 48)), rollout.frames[0])
    backwards = render(rollout, "corner2", (48, 48), at=[5, 0])
    assert np.array_equal(backwards, rollout.frames[0][[5, 0]])


def test_positions_of_bodies_agree_with_the_observation(simulator):
    rollout = roll_out(TASK, 3, steps=6)
    found = positions(rollout, ["hand", "drawer"], at=[1, 5])
    assert found.shape == (2, 2, 3)
    assert np.allclose(found[:, 0], rollout.observations[[1, 5], :3], atol=1e-6)
    assert np.array_equal(found[0, 1], found[1, 1]), "the drawer's case stands still"
    with pytest.raises(ConfigError, match="no body 'hnad'; did you mean"):
        positions(rollout, ["hnad"])


def test_a_policy_of_ones_own_sees_a_picture_per_camera_and_acts(simulator):
    seen = []

    def policy(observation, pictures):
        seen.append((observation.shape, [picture.shape for picture in pictures]))
        return np.array([1.0, -2.0, 0.0, 0.5])

    rollout = roll_out("reach-v3", 0, cameras=("corner", ABOVE), size=(24, 24), policy=policy,
                       steps=2)  # fmt: skip
    assert seen == [((39,), [(24, 24, 3)] * 2)] * 2
    assert np.allclose(rollout.actions, [[1.0, -1.0, 0.0, 0.5]] * 2)


def test_a_simulation_step_by_step_is_the_rollout(simulator):
    rollout = roll_out(TASK, 3, cameras=("corner2",), size=(24, 24), steps=4)
    live = Simulation(TASK, 3, ("corner2",), (24, 24))
    try:
        for step in range(4):
            assert np.array_equal(live.observation, rollout.observations[step])
            assert np.array_equal(live.draw()[0], rollout.frames[0][step])
            live.step(rollout.actions[step])
        assert not live.success
    finally:
        live.close()


def test_there_are_fifty_tasks(simulator):
    assert len(task_names()) == 50
    assert TASK in task_names()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "drawer-opne-v3"}, "unknown task 'drawer-opne-v3'; did you mean 'drawer-open-v3"),
        ({"cameras": ("cornr2",)}, "unknown camera 'cornr2'; did you mean 'corner2'"),
        ({"cameras": ("corner",), "size": (0, 96)}, "size=.0, 96.: height and width are 1 to 480"),
        ({"cameras": ("corner",), "size": (96, 481)}, "height and width are 1 to 480"),
        ({"noise": -0.1}, "noise=-0.1 is not between 0.0 and inf"),
        ({"speed": 0.0}, "speed=0.0 is not between 0.01 and 1.0"),
        ({"steps": 501}, "steps=501 is not between 1 and 500"),
        ({"seed": -1}, "seed=-1 is not between 0 and"),
    ],
)
def test_a_mistake_is_one_line(simulator, given, message):
    with pytest.raises(ConfigError, match=message) as caught:
        roll_out(**{"task": TASK, "seed": 0, **given})
    assert "\n" not in str(caught.value)


def test_without_the_package_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(
        ConfigError, match=r"package mujoco, .* pip install 'expt\[sim\]'"
    ) as caught:
        roll_out(TASK, 0)
    assert "\n" not in str(caught.value)


def test_without_a_library_that_draws_the_message_says_which(simulator, monkeypatch):
    task_names()  # imports it in the right way
    import mujoco

    def refuse(*_):
        raise RuntimeError("Cannot create an EGL context.\nat all")

    monkeypatch.setattr(mujoco, "Renderer", refuse)
    with pytest.raises(ConfigError, match=r"Cannot create an EGL context.*libegl1") as caught:
        roll_out(TASK, 0, cameras=("corner",), steps=1)
    assert "\n" not in str(caught.value)
