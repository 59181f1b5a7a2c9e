"""``data.batch_size=auto``: found before a training, recorded as a number, kept on resuming."""

from __future__ import annotations

import json

import pytest

from expt.config.validate import validated
from expt.result import load_launch, load_result
from expt.run.batch_size import _replaced
from expt.units import MIB

AUTO = ("data.batch_size=auto", "trainer.device=cpu", "model.embed_dim=16", "hydra.run.dir=run")
STOP = """
import os, signal
from torch._subclasses.fake_tensor import FakeTensor
from expt.jobs.traffic.stid import STID


class Net(STID):
    def forward(self, **inputs):
        planned = isinstance(next(self.parameters()), FakeTensor)
        if os.environ.get("LAB") and not planned:
            signal.raise_signal(signal.SIGTERM)
        return super().forward(**inputs)
"""


def batch_of(home) -> int:
    lines = load_launch(home / "run")["overrides"]
    assert sum(line.startswith("data.batch_size=") for line in lines) == 1
    return int(next(line for line in lines if line.startswith("data.b")).partition("=")[2])


def test_it_takes_the_largest_that_fits(expt, home):
    code, out, err = expt(*AUTO, "memory.budget=24MiB", "memory.gradient_accumulation=2")
    assert code == 0, err
    size = batch_of(home)
    assert f"data.batch_size=auto: {size} (micro-batch {size // 2}" in out
    assert f"batch_size: {size}\n" in (home / "run/config.yaml").read_text()
    result = load_result(home / "run")
    assert size > 8
    assert not result.oom_events
    assert 0.7 * 24 * MIB < result.memory["peak_allocated_bytes"] <= 24 * MIB
    predicted = json.loads((home / "run/plan.json").read_text())["peak_bytes"]
    assert predicted <= 0.9 * 24 * MIB


@pytest.mark.parametrize("again", ["directory", "same command"])
def test_a_resumed_run_keeps_its_batch(expt, home, monkeypatch, again):
    (home / "lab_auto.py").write_text(STOP)
    monkeypatch.setenv("LAB", "stop")
    given = (
        "model=stid", "model._target_=lab_auto.Net", *AUTO, "fit.max_batch=24",
        "memory.budget=200MiB",
    )  # fmt: skip
    assert expt(*given)[0] == 143
    assert batch_of(home) == 24
    monkeypatch.delenv("LAB")
    if again == "directory":
        code, out, err = expt(
            "trainer.resume=run", "fit.max_batch=12", "tracking=none", small=False
        )
    else:
        code, out, err = expt(*given, "trainer.resume=true", "fit.max_batch=12")
    assert code == 0, err
    assert "data.batch_size=auto" not in out, "nothing is searched for"
    assert batch_of(home) == 24
    assert "batch_size: 24\n" in (home / "run/config.yaml").read_text()
    assert load_result(home / "run").resumed_from_step == 1


@pytest.mark.parametrize("word", ["Auto", "maximal", "1.5", "null"])
def test_other_words_are_refused(expt, home, word):
    code, _, err = expt(f"data.batch_size={word}")
    assert code == 2
    assert "data.batch_size=" in err
    assert "int or the word auto" in err


def test_the_word_is_judged_like_a_number(composed):
    settings = validated(composed("data.batch_size=auto", "memory.gradient_accumulation=3"))
    assert settings.batch_is_auto
    assert not validated(composed("data.batch_size=3")).batch_is_auto


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["task=plan"], ["data.batch_size=auto", "task=fit_batch"]),
        (["task=cards"], ["data.batch_size=auto", "give a number"]),
        (["memory.budget=20KiB"], ["memory.budget=20KiB", "weights"]),
        (["memory.budget=11MiB"], ["not even a micro-batch of one", "What would help"]),
    ],
)
def test_where_nothing_can_be_found_it_says_so(expt, home, arguments, words):
    code, _, err = expt(*AUTO, *arguments)
    assert code == 2
    for word in words:
        assert word in err
    assert not (home / "run").exists()


def test_the_number_takes_the_place_of_the_word():
    assert list(_replaced(["a=1", "+data.batch_size=auto"], 7)) == ["a=1", "+data.batch_size=7"]
    assert list(_replaced(["a=1"], 7)) == ["a=1", "data.batch_size=7"]
