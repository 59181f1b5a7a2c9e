"""Demonstrations of robot manipulation: a MetaWorld task, its scripted expert, and cameras.

`roll_out` lets a policy, by default MetaWorld's own expert, act in one of its 50 tasks and records
what it saw and did; in a `Simulation` somebody else decides step by step. `render` and `positions`
play a rollout back, for other cameras or a body's way through space. The same arguments give the
same bytes on one machine.

Letters: `T` steps, `V` cameras, `F` frames asked for, `J` bodies; `H`, `W` height and width.

Needs the extra `sim` (MetaWorld, MIT; MuJoCo, Apache-2.0), and for pictures a library of the
system that draws without a screen: EGL (Debian: libegl1 libgl1-mesa-dri) or OSMesa.
Source: Yu et al., "Meta-World", CoRL 2019; github.com/Farama-Foundation/Metaworld, 3.1.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from expt.errors import ConfigError, first_line, nearest

Array = npt.NDArray[Any]
Policy = Callable[[Array, tuple[Array, ...]], Array]
"""From an observation [39] and one picture [H, W, 3] per camera to an action [4] in -1..1."""

OBSERVATION_SIZE = 39
"""Hand, gripper and object now and one step before (18 each), then the goal's position (3)."""
ACTION_SIZE = 4
"""The hand's shift along x, y and z, in hundredths of a metre per step, and the gripper's force."""
MAX_STEPS = 500
"""MetaWorld ends an episode there."""
MAX_SIDE = 480
"""Pixels; MuJoCo's off-screen buffer in these models is not smaller."""


@dataclass(frozen=True)
class Camera:
    """A camera placed by hand: where it looks, from how far, and from which side.

    Attributes:
        target: The point looked at: x to the right of the robot, y away from it, z up, in metres.
        distance: Metres from there.
        azimuth: Degrees around the vertical axis; 90 looks from behind the robot's base along y.
        elevation: Degrees above the horizon, negative: -90 looks straight down.

    """

    target: tuple[float, float, float]
    distance: float
    azimuth: float
    elevation: float


@dataclass(frozen=True)
class Rollout:
    """What happened in one episode.

    Attributes:
        task, seed: What `roll_out` was given; they decide where things stand.
        observations: [T, 39] float64, each before the action of its step.
        actions: [T, 4] float32, as they were applied.
        intended: [T, 4] float32, what the policy wanted, without the noise.
        joints: [T, Q] float64, the simulator's joint positions before the action of each step,
            the robot's first and the task's objects' last: enough to draw the scene again.
        frames: One uint8 [T, H, W, 3] per camera, drawn before the action of each step.
        success_step: The first step after whose action MetaWorld calls the task solved, or None.

    """

    task: str
    seed: int
    observations: Array
    actions: Array
    intended: Array
    joints: Array
    frames: tuple[Array, ...]
    success_step: int | None

    @property
    def success(self) -> bool:
        """Whether the task was solved at any step."""
        return self.success_step is not None


def roll_out(
    task: str,
    seed: int,
    *,
    cameras: Sequence[str | Camera] = (),
    size: tuple[int, int] = (96, 96),
    policy: Policy | None = None,
    noise: float = 0.0,
    speed: float = 1.0,
    steps: int = 200,
    steps_after_success: int | None = None,
) -> Rollout:
    """Let `policy` act in `task`, whose objects stand where `seed` puts them.

    Args:
        task: A name such as ``drawer-open-v3``; `task_names` lists them.
        seed: Decides the objects' places and the noise.
        cameras: Names of the model's cameras (``corner2``) or cameras placed by hand.
        size: Height and width of the pictures, 1 to 480 pixels each.
        policy: None is MetaWorld's scripted expert of that task.
        noise: Standard deviation of the normal noise added to each action of -1..1.
        speed: 0 to 1; the hand's shift is multiplied by it, so that a motion takes more steps.
        steps: The longest episode, 1 to 500.
        steps_after_success: End that many steps after the task is solved; None goes on.

    Raises:
        ConfigError: An unknown task or camera, a value out of range, or something not installed.

    """
    for name, value, lowest, highest in (
        ("noise", noise, 0.0, np.inf),
        ("speed", speed, 0.01, 1.0),
        ("steps", steps, 1, MAX_STEPS),
        ("seed", seed, 0, 2**32 - 1),
    ):
        if not lowest <= value <= highest:
            raise ConfigError(f"{name}={value} is not between {lowest} and {highest}")
    rng = np.random.default_rng(seed)
    after = steps if steps_after_success is None else steps_after_success
    with _scene(task, seed, cameras, size) as scene:
        act = policy or scene.expert()
        observation = scene.reset()
        record, drawn, success_step = [], [], None
        for step in range(steps):
            pictures = scene.draw()
            asked = np.asarray(act(observation, pictures), dtype=np.float64)
            wanted = np.clip(asked, -1.0, 1.0)
            action = np.clip(asked + noise * rng.standard_normal(ACTION_SIZE), -1.0, 1.0)
            wanted[:3] *= speed
            action[:3] *= speed
            applied = action.astype(np.float32)
            record.append((observation, applied, wanted.astype(np.float32), scene.joints()))
            drawn.append(pictures)
            observation, solved = scene.step(applied)
            if success_step is None and solved:
                success_step = step
            if success_step is not None and step - success_step >= after:
                break
    frames = tuple(np.stack(of_camera) for of_camera in zip(*drawn, strict=True))
    observations, actions, intended, joints = (
        np.stack(of_kind) for of_kind in zip(*record, strict=True)
    )
    return Rollout(task, seed, observations, actions, intended, joints, frames, success_step)


class Simulation:
    """A task that a policy acts in step by step, for policies that act in many at once.

    Args:
        task, seed, cameras, size: As for `roll_out`.

    Raises:
        ConfigError: An unknown task or camera, or something not installed.

    Attributes:
        task, seed: What it was given.
        observation: [39] float64, of now.
        success: Whether MetaWorld has called the task solved, at any step so far.

    """

    def __init__(
        self,
        task: str,
        seed: int,
        cameras: Sequence[str | Camera] = (),
        size: tuple[int, int] = (96, 96),
    ) -> None:
        self.task, self.seed = task, seed
        self._scene = _Scene(task, seed, cameras, size)
        self.observation: Array = self._scene.reset()
        self.success = False
        self._joints = [self._scene.joints()]

    @property
    def joints(self) -> Array:
        """Joint positions float64 [1 + T, Q], before the first action and after each."""
        return np.stack(self._joints)

    def draw(self) -> tuple[Array, ...]:
        """Return one picture uint8 [H, W, 3] per camera."""
        return self._scene.draw()

    def step(self, action: Array) -> None:
        """Apply an action [4], clipped to -1..1."""
        applied = np.clip(np.asarray(action, dtype=np.float32), -1.0, 1.0)
        self.observation, solved = self._scene.step(applied)
        self.success = self.success or solved
        self._joints.append(self._scene.joints())

    def close(self) -> None:
        """Free what it draws with."""
        self._scene.close()


def render(
    rollout: Rollout | Simulation,
    camera: str | Camera,
    size: tuple[int, int] = (96, 96),
    at: Sequence[int] | None = None,
) -> Array:
    """Draw recorded steps of a rollout -> uint8 [F, H, W, 3]; `at` None is every step."""
    chosen = range(len(rollout.joints)) if at is None else at
    with _scene(rollout.task, rollout.seed, (camera,), size) as scene:
        frames = []
        for step in chosen:
            scene.place(rollout.joints[step])
            frames.append(scene.draw()[0])
    return np.stack(frames)


def positions(rollout: Rollout, bodies: Sequence[str], at: Sequence[int] | None = None) -> Array:
    """Return where bodies of the model are at recorded steps -> float64 [F, J, 3], in metres."""
    chosen = range(len(rollout.joints)) if at is None else at
    with _scene(rollout.task, rollout.seed, (), (1, 1)) as scene:
        model = scene.environment.model
        known = [model.body(index).name for index in range(model.nbody)]
        for body in bodies:
            if body not in known:
                raise ConfigError(f"{rollout.task} has no body {body!r}; {nearest(body, known)}")
        found = []
        for step in chosen:
            scene.place(rollout.joints[step])
            found.append([scene.environment.data.body(body).xpos.copy() for body in bodies])
    return np.array(found)


def task_names() -> list[str]:
    """Return the names of MetaWorld's tasks that have a scripted expert."""
    return sorted(_packages()[1].ENV_POLICY_MAP)


def _packages() -> tuple[Any, Any, Any]:
    """Return mujoco, metaworld.policies and metaworld.env_dict, or say what is missing."""
    if sys.platform == "linux":  # MuJoCo asks when it is imported; unset means a screen
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        import mujoco
        from metaworld import env_dict, policies
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"MetaWorld's tasks need the package {error.name}, which is not installed; "
            "pip install 'expt[sim]'"
        ) from error
    except (ImportError, AttributeError, RuntimeError) as error:  # what PyOpenGL says without EGL
        raise ConfigError(_cannot_draw(error)) from error
    return mujoco, policies, env_dict


def _cannot_draw(error: BaseException) -> str:
    return (
        f"MuJoCo cannot draw with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')} "
        f"({first_line(error)}); install EGL, on Debian and Ubuntu `apt-get install libegl1 "
        "libgl1-mesa-dri`, or set MUJOCO_GL=osmesa where libosmesa6 is installed; a program that "
        "imports mujoco earlier has to set MUJOCO_GL=egl before"
    )


class _Scene:
    """One task's simulator, and what draws it through its cameras."""

    def __init__(self, task: str, seed: int, cameras: Sequence[str | Camera], size: Sequence[int]):
        mujoco, policies, env_dict = _packages()
        if task not in policies.ENV_POLICY_MAP:
            raise ConfigError(f"unknown task {task!r}; {nearest(task, policies.ENV_POLICY_MAP)}")
        if len(size) != 2 or not all(1 <= side <= MAX_SIDE for side in size):
            raise ConfigError(f"size={tuple(size)}: height and width are 1 to {MAX_SIDE} pixels")
        self._mujoco = mujoco
        self._policy = policies.ENV_POLICY_MAP[task]
        maker = env_dict.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-goal-observable"]
        self.environment = maker(seed=seed)
        model = self.environment.model
        known = [model.camera(index).name for index in range(model.ncam)]
        self._cameras = [self._camera(camera, known) for camera in cameras]
        self._renderer = None
        if self._cameras:
            # Shadows and smoothed edges take seven eighths of the time to draw.
            model.vis.quality.shadowsize = 0
            model.vis.quality.offsamples = 0
            try:
                self._renderer = mujoco.Renderer(model, *size)
            except (ImportError, RuntimeError, UserWarning, mujoco.FatalError) as error:
                raise ConfigError(_cannot_draw(error)) from error
        self._options = mujoco.MjvOption()
        self._options.sitegroup[:] = 0  # marks of the goal, which no real camera would see

    def _camera(self, camera: str | Camera, known: Sequence[str]) -> Any:
        if isinstance(camera, str):
            if camera not in known:
                raise ConfigError(f"unknown camera {camera!r}; {nearest(camera, known)}")
            return camera
        placed = self._mujoco.MjvCamera()
        placed.type = self._mujoco.mjtCamera.mjCAMERA_FREE
        placed.lookat[:] = camera.target
        placed.distance = camera.distance
        placed.azimuth = camera.azimuth
        placed.elevation = camera.elevation
        return placed

    def expert(self) -> Policy:
        """Return MetaWorld's scripted policy, which looks at the observation alone."""
        scripted = self._policy()

        def act(observation: Array, _: tuple[Array, ...]) -> Array:
            with warnings.catch_warnings():
                # It asks for more than -1..1 on purpose, and says so at every step.
                warnings.filterwarnings("ignore", message="Constant.*may be too high")
                return np.asarray(scripted.get_action(observation.copy()))

        return act

    def reset(self) -> Array:
        """Put everything where the seed says, and return the first observation."""
        observation: Array = self.environment.reset()[0]
        self.place(self.environment.data.qpos)  # the reset moves objects, not yet their pictures
        return observation

    def step(self, action: Array) -> tuple[Array, bool]:
        """Apply an action float32 [4]; return the observation and whether the task is solved."""
        observation, _, _, _, info = self.environment.step(action)
        return observation, bool(info["success"])

    def joints(self) -> Array:
        """Return the joint positions of now, float64 [Q]."""
        found: Array = self.environment.data.qpos.copy()
        return found

    def place(self, joints: Array) -> None:
        """Put every joint where it was."""
        self.environment.data.qpos[:] = joints
        self._mujoco.mj_forward(self.environment.model, self.environment.data)

    def draw(self) -> tuple[Array, ...]:
        """Return one picture uint8 [H, W, 3] per camera."""
        pictures = []
        for camera in self._cameras:
            assert self._renderer is not None
            self._renderer.update_scene(self.environment.data, camera, self._options)
            pictures.append(self._renderer.render().copy())
        return tuple(pictures)

    def close(self) -> None:
        """Free the drawing context now: when Python exits, EGL is gone before it."""
        if self._renderer is not None:
            self._renderer.close()
        self.environment.close()


@contextlib.contextmanager
def _scene(
    task: str, seed: int, cameras: Sequence[str | Camera], size: tuple[int, int]
) -> Iterator[_Scene]:
    scene = _Scene(task, seed, cameras, size)
    try:
        yield scene
    finally:
        scene.close()
