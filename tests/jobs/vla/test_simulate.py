"""A model that acts in MetaWorld."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from robots import write_lerobot

from expt.errors import ConfigError, DataError
from expt.job import Simulated, Trial
from expt.jobs.vla.data import Demonstrations
from expt.jobs.vla.demonstrate import Request, make
from expt.jobs.vla.simulate import MetaWorldDemonstrations

SHIPPED = "expt://metaworld_state.npz"
SIZES: dict[str, Any] = {
    "chunk": 6, "batch_size": 8, "eval_batch_size": 8,
    "tokenizer": {"model_type": "words", "vocab_size": 2000},
}  # fmt: skip
DRAWER = Trial("drawer-open-v3", 2, "drawer-open-v3")


@pytest.fixture
def simulator() -> None:
    if os.environ.get("EXPT_REQUIRE_EXTRAS") != "1" and find_spec("metaworld") is None:
        pytest.skip("metaworld is not installed: pip install 'expt[sim]'")


@pytest.fixture(scope="module")
def data() -> MetaWorldDemonstrations:
    return MetaWorldDemonstrations(SHIPPED, **SIZES)


def test_who_can_be_simulated(data, tmp_path):
    assert isinstance(data, Simulated)
    assert not isinstance(Demonstrations(SHIPPED, **SIZES), Simulated)
    assert data.simulated_tasks == ["reach-v3", "push-v3", "drawer-open-v3", "button-press-v3"]
    assert data.fresh_seeds(3) == [0, 1, 2]
    assert not {e.seed for e in data.recordings.episodes} & set(data.fresh_seeds(2000))
    folder = write_lerobot(tmp_path / "other", pictures=None)
    with pytest.raises(DataError, match=r"have 3 and 2 values; those of MetaWorld have 39 and 4"):
        MetaWorldDemonstrations(str(folder), **SIZES)


def test_the_inputs_are_those_of_the_test_part(simulator, data):
    live = data.simulator([DRAWER, Trial("push-v3", 0, "reach-v3")], 10)
    try:
        seen = live.observe()
        example = data.example("test", 2)
        assert {n: (v.shape, v.dtype) for n, v in seen.inputs.items()} == {
            n: (v.shape, v.dtype) for n, v in example.inputs.items()
        }
        told = data.tokens_of(["open the drawer", "move the hand to the goal"])
        assert torch.equal(seen.inputs["tokens"][0][:3], told[0][:3])
        assert torch.equal(seen.inputs["tokens"][1], told[1])
        assert seen.inputs["state"].abs().max() < 10
    finally:
        live.close()


def test_demonstrated_actions_solve_the_task(simulator):
    # The expert's own actions, as a model would predict them: chunks of normalised actions.
    from expt.jobs.metaworld import roll_out

    data = MetaWorldDemonstrations(SHIPPED, **SIZES)
    shown = roll_out(DRAWER.task, DRAWER.seed, steps=120)
    actions = (shown.actions - data.action_mean) / data.action_std
    live = data.simulator([DRAWER, DRAWER], 110)
    try:
        done = 0
        while live.running:
            chunk = torch.from_numpy(actions[done : done + 6]).float()
            live.act(torch.stack([chunk, torch.zeros_like(chunk)])[: len(live.running)], 4)
            done += 4
        assert live.solved[0]
        assert live.steps[0] == shown.success_step + 1
    finally:
        live.close()


def test_a_trial_is_the_same_whatever_runs_beside_it(simulator, data):
    def moves(trials: list[Trial], number: int) -> tuple[np.ndarray, torch.Tensor]:
        live = data.simulator(trials, 8)
        try:
            for _ in range(2):
                seen = live.observe()
                live.act(seen.inputs["noise"], 4)  # K candidates, the first is taken
            assert live.running == [] and live.steps == [8] * len(trials)
            assert not any(live.solved)
            return live._simulations[number].joints, seen.inputs["noise"][number]
        finally:
            live.close()

    alone, noise = moves([DRAWER], 0)
    beside, same = moves([Trial("push-v3", 2, "push-v3"), DRAWER], 1)
    assert np.array_equal(alone, beside)
    assert torch.equal(noise, same)
    other, different = moves([Trial("drawer-open-v3", 2, "push-v3")], 0)
    assert not torch.equal(noise, different) and not np.array_equal(alone, other)
    assert len(alone) == 9


def test_pictures_are_drawn_as_in_the_demonstrations(simulator, tmp_path):
    made = make(tmp_path / "seen", Request(("reach-v3",), 3, ("front",), 16), told=False)
    data = MetaWorldDemonstrations(str(tmp_path / "seen"), **SIZES, pixels=16)
    seed = made.episodes[0].seed
    live = data.simulator([Trial("reach-v3", seed, "reach-v3")], 5)
    try:
        seen = live.observe().inputs
        assert np.array_equal(seen["images"][0].numpy(), made.frames.read(0, 0, ["front"]))
        state = torch.from_numpy(data.normalised(made.episodes[0].state[0]))
        torch.testing.assert_close(seen["state"][0], state)
    finally:
        live.close()
    with pytest.raises(DataError, match=r"drawn with 16 pixels of a side; data.pixels=16 takes"):
        MetaWorldDemonstrations(str(tmp_path / "seen"), **SIZES, pixels=32)


def test_a_film(simulator, data, tmp_path):
    av = pytest.importorskip("av")
    live = data.simulator([DRAWER], 9)
    try:
        live.act(torch.zeros(1, 6, 4), 6)
        live.film(0, tmp_path / "films/one.mp4")
    finally:
        live.close()
    with av.open(str(tmp_path / "films/one.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [frame.shape for frame in frames] == [(240, 240, 3)] * 2
    assert frames[0].std() > 20


def test_mistakes(simulator, data):
    with pytest.raises(ConfigError, match=r"rollout.tasks: MetaWorld has no 'push-v2'; did you"):
        data.simulator([Trial("push-v2", 0, "push-v2")], 5)
    live = data.simulator([DRAWER], 5)
    try:
        with pytest.raises(ConfigError, match=r"rollout.execute=9 is more than the 6 actions"):
            live.act(torch.zeros(1, 6, 4), 9)
    finally:
        live.close()
