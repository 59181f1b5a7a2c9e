"""`task=rollout`: counting, the table, and a whole command where the simulator is installed."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from expt.commands.rollout import Player, figures, table_of, trials_of
from expt.config.command_nodes import RolloutConfig
from expt.errors import ConfigError, DataError
from expt.job import Batch, Trial


class Counting:
    """Tasks that are solved by going as many steps as their name says, when told to."""

    simulated_tasks = ("2", "5", "9")

    def __init__(self) -> None:
        self.groups: list[int] = []

    def fresh_seeds(self, count):
        return list(range(count))

    def simulator(self, trials, steps):
        self.groups.append(len(trials))
        return Walk(list(trials), steps)


class Walk:
    def __init__(self, trials: list[Trial], limit: int) -> None:
        self.trials, self.limit, self.steps = trials, limit, [0] * len(trials)
        self.closed = False

    @property
    def solved(self):
        told = [trial.told == trial.task for trial in self.trials]
        return [on and went >= int(t.task)
                for on, went, t in zip(told, self.steps, self.trials, strict=True)]  # fmt: skip

    @property
    def running(self):
        return [n for n, done in enumerate(self.solved) if not done and self.steps[n] < self.limit]

    def observe(self):
        return Batch({"x": torch.zeros(len(self.running), 4, 1)}, torch.zeros(len(self.running)))

    def act(self, predictions, steps):
        assert len(predictions) == len(self.running)
        for number in self.running:
            self.steps[number] = min(self.steps[number] + steps, self.limit)

    def film(self, number, path):
        raise DataError("nothing draws here")

    def close(self):
        self.closed = True


class Echo(nn.Module):
    def forward(self, x):
        return x


def play(node: RolloutConfig, data: Counting) -> tuple[list[dict], Player]:
    player = Player(data, Echo(), torch.device("cpu"), node, Path("videos"))
    trials = trials_of(data, node)
    size = node.at_once
    done = [
        entry
        for first in range(0, len(trials), size)
        for entry in player.play(trials[first : first + size])
    ]
    return done, player


def test_success_is_counted_by_task_and_with_other_sentences():
    data = Counting()
    done, player = play(RolloutConfig(run="r", seeds=4, steps=6, at_once=5), data)
    assert data.groups == [5, 5, 5, 5, 4]
    assert player.execute == 2, "half of a prediction"
    found = figures(done)
    assert found == {
        "success": pytest.approx(2 / 3), "success_2": 1, "success_5": 1, "success_9": 0,
        "exchanged": 0, "exchanged_2": 0, "exchanged_5": 0, "exchanged_9": 0,
    }  # fmt: skip
    assert table_of(done) == [
        ["task", "success", "mean steps", "sentences exchanged"],
        ["2", "4 of 4", "2", "0 of 4"],
        ["5", "4 of 4", "6", "0 of 4"],
        ["9", "0 of 4", "-", "0 of 4"],
        ["mean", "0.667", "", "0.000"],
    ]
    assert len(player.notes) == 1 and player.videos == []
    assert player.notes[0] == "there are no videos: nothing draws here"


def test_every_other_sentence_is_told_as_often():
    trials = trials_of(Counting(), RolloutConfig(run="r", seeds=4))
    assert len(trials) == 24
    told = [(t.task, t.told) for t in trials if t.told != t.task]
    assert {told.count(pair) for pair in told} == {2}
    assert len(set(told)) == 6
    plain = trials_of(Counting(), RolloutConfig(run="r", seeds=4, exchange_sentences=False))
    assert plain == [t for t in trials if t.told == t.task]
    assert [t.seed for t in plain[:4]] == [0, 1, 2, 3]
    one = trials_of(Counting(), RolloutConfig(run="r", seeds=4, tasks=["5"]))
    assert {t.told for t in one} == {"5", "2", "9"}


def test_one_task_has_no_other_sentence():
    data = Counting()
    data.simulated_tasks = ("5",)
    with pytest.raises(ConfigError, match=r"5 is the only task, .*exchange_sentences=false"):
        trials_of(data, RolloutConfig(run="r"))


def test_settings_out_of_range(expt, home) -> None:
    code, _, err = expt("task=rollout", "rollout.seeds=0", "rollout.at_once=0", small=False)
    assert code == 2
    for line in ("rollout.run must be", "rollout.seeds must be at least 1", "rollout.at_once must"):
        assert line in err


def test_data_without_a_simulator(expt, toys, home) -> None:
    line = (f"--config-dir={toys / 'conf'}", "data=blobs", "model=classifier", "hydra.run.dir=run")
    assert expt(*line, "tracking=none", "trainer.epochs=1", small=False)[0] == 0
    code, _, err = expt("task=rollout", "rollout.run=run", "hydra.run.dir=out", small=False)
    assert code == 2
    assert "there is no simulator for its data (Blobs)" in err and "Traceback" not in err


@pytest.fixture
def trained(expt, toys, home) -> Path:
    """A run of a few steps on the shipped demonstrations; no simulator is needed for it."""
    line = (f"--config-dir={toys / 'conf'}", "data=metaworld_state", "model=policy")
    words = "+data.tokenizer={model_type:words,vocab_size:2000}"
    small = ("trainer.epochs=1", "trainer.steps_per_epoch=3", "trainer.eval_batches=1")
    more = ("tracking=none", "trainer.progress=false", words.lstrip("+"), *small)
    code, _, err = expt(*line, *more, "hydra.run.dir=run", small=False)
    assert code == 0, err
    return home / "run"


def test_a_trained_policy_acts(expt, trained, home) -> None:
    if os.environ.get("EXPT_REQUIRE_EXTRAS") != "1" and find_spec("metaworld") is None:
        pytest.skip("metaworld is not installed: pip install 'expt[sim]'")
    line = (
        "task=rollout", "rollout.run=run", "rollout.seeds=1", "rollout.steps=5",
        "rollout.tasks=[reach-v3,push-v3]", "rollout.execute=3", "tracking=none",
    )  # fmt: skip
    code, out, err = expt(*line, "hydra.run.dir=out", small=False)
    assert code == 0, err
    assert "rollouts: 4 in" in out and "sentences exchanged" in out
    record = json.loads((home / "out/rollout.json").read_text())
    assert [(t["task"], t["told"], t["steps"]) for t in record["trials"]][:2] == [
        ("reach-v3", "reach-v3", 5), ("push-v3", "push-v3", 5),
    ]  # fmt: skip
    assert record["metrics"]["success"] == 0
    assert record["seeds"] == [0] and record["execute"] == 3 and record["step"] == 3
    assert record["videos"] == ["videos/reach-v3_0.mp4", "videos/push-v3_0.mp4"]
    assert all((home / "out" / name).stat().st_size > 1000 for name in record["videos"])
    assert "| push-v3 | 0 of 1 |" in (home / "out/rollout.md").read_text()


def test_without_the_simulator_a_line_says_how_to_get_it(expt, trained, home, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "mujoco", None)
    code, _, err = expt("task=rollout", "rollout.run=run", "hydra.run.dir=out", small=False)
    assert code == 2
    assert "pip install 'expt[sim]'" in err and "Traceback" not in err


def test_the_policy_predicts_on_its_own_test_part(expt, trained, home) -> None:
    code, out, err = expt(
        "task=predict", "predict.run=run", "predict.format=parquet", "hydra.run.dir=out",
        small=False,
    )  # fmt: skip
    assert code == 0, err
    record = json.loads((home / "out/predict.json").read_text())
    assert {"l1", "mse", "l1_x", "l1_gripper"} <= set(record["metrics"])
    assert (home / "out/predictions/test.parquet").stat().st_size > 1000
    code, out, err = expt(
        "task=predict", "predict.run=run", "data.tasks=[push-v3]", "hydra.run.dir=push",
        small=False,
    )  # fmt: skip
    assert code == 0, err
    assert "0 / 0 / 32 demonstrations" in out
