"""`task=plan` from its command line: plan.json, what is printed and recorded, every mistake."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from expt.commands import plan as module
from expt.config.validate import validated
from expt.memory.planning.plan import CATEGORIES
from expt.run import planner, savings
from expt.run.build import build
from expt.tracking.tracker import NullTracker
from expt.units import format_bytes

MIB = 2**20
KEYS = {
    "target", "peak_bytes", "reserved_bytes", "interval_bytes", "phase", "by_category", "by_module",
    "corrections", "captured_reserved_bytes", "budget_bytes", "fits", "method", "seconds",
    "savings",
}  # fmt: skip
STID = ("task=plan", "model=stid", "hydra.run.dir=run")


def written(home: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((home / "run/plan.json").read_text())
    return record


@pytest.fixture
def without_advice(monkeypatch) -> None:
    """Leave the changes out that would save most: each takes as long as the plan."""
    monkeypatch.setattr(savings, "_changes", lambda *_: [])


@pytest.mark.parametrize(("part", "lines"), [(0.9, 1), (0.999, 0)])
def test_what_saves_next_to_nothing_is_not_told(composed, monkeypatch, part, lines) -> None:
    settings = validated(composed("+memory=minimal", "model=stid"))
    data = build(settings, "data")
    planned = planner.plan_training(settings, data, "cuda")
    then = replace(planned, peak_bytes=int(part * planned.peak_bytes))
    monkeypatch.setattr(planner, "plan_training", lambda *arguments, **more: then)
    change = ("a=b", planner.Techniques(forward_chunks=7), None)
    monkeypatch.setattr(savings, "_changes", lambda *_: [change])
    assert len(savings.savings(planner.Planner(settings, data, planned.target, planned))) == lines


def test_a_batch_is_never_larger_than_the_training_part(composed, monkeypatch) -> None:
    settings = validated(composed("+memory=minimal", "model=stid"))
    data = build(settings, "data")
    monkeypatch.setattr(type(data), "size", lambda self, split: 48)
    peaks = [
        planner.plan_training(settings, data, "cpu", batch_size=count).peak_bytes
        for count in (24, 48, 5000)
    ]
    assert peaks[0] < peaks[1] == peaks[2]


@pytest.mark.parametrize(("phase", "asked"), [("forward", False), ("evaluation", True)])
def test_what_makes_only_evaluation_smaller_is_tried_where_that_is_the_peak(
    composed, monkeypatch, phase, asked
) -> None:
    settings = validated(composed("+memory=full", "model=stid"))
    planned = replace(planner.plan_training(settings, build(settings, "data"), "cpu"), phase=phase)
    asking = planner.Planner(settings, None, "cpu", planned)
    tried = []
    monkeypatch.setattr(
        planner, "plan_training", lambda *given, **more: (tried.append(given[3]), planned)[1]
    )
    savings.savings(asking)
    assert any(techniques.forward_chunks > 1 for techniques in tried) is asked
    assert tried


def test_a_plan_for_this_machine_says_what_it_has(expt, without_advice, monkeypatch) -> None:
    for there, said in ((MIB, 1), (1 << 50, 0)):
        monkeypatch.setattr(module, "host_bytes", lambda there=there: there)
        code, out, _ = expt(*STID, "memory.target=cpu")
        assert code == 0
        assert out.count("that is more than this machine has: 1.0 MiB") == said


def test_a_plan_is_printed_and_written(expt, home, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = expt(*STID)
    assert code == 0, err
    record = written(home)
    assert record.keys() >= KEYS
    assert tuple(record["by_category"]) == CATEGORIES
    assert sum(record["by_category"].values()) == record["peak_bytes"]
    low, high = record["interval_bytes"]
    assert low < record["peak_bytes"] < high
    assert (record["target"], record["method"], record["preset"]) == ("cuda", "trace", "minimal")
    assert (record["budget_bytes"], record["fits"]) == (None, None)
    assert record["reserved_bytes"] > record["peak_bytes"]
    assert (
        record["corrections"]["cuBLAS workspace"]
        == record["by_category"]["workspaces"] - (record["corrections"]["blocks not split"])
    )
    for saving in record["savings"]:
        assert saving["peak_bytes"] < record["peak_bytes"]
        line = next(line for line in out.splitlines() if f"would save: {saving['change']} " in line)
        saved = format_bytes(record["peak_bytes"] - saving["peak_bytes"])
        assert line.endswith(f" {saved}, leaving {format_bytes(saving['peak_bytes'])}")
    assert out.count("planned for cuda, which is not here; memory.target=cpu") == 1
    assert "predicted peak on cuda" in out
    assert "note: " in out
    assert "optimizer_state" in out
    assert not (home / "run/checkpoints").exists(), "nothing is trained"


@pytest.mark.parametrize(
    ("arguments", "target"),
    [
        (("trainer.device=cpu",), "cpu"),
        (("memory.target=cpu",), "cpu"),
        (("trainer.device=cpu", "memory.target=cuda"), "cuda"),
    ],
)
def test_the_target(expt, home, without_advice, arguments, target) -> None:
    code, out, _ = expt(*STID, *arguments)
    assert code == 0
    assert "planned for" not in out, "somebody chose it"
    record = written(home)
    assert record["target"] == target
    assert (record["reserved_bytes"] is None) == (target == "cpu")


@pytest.mark.parametrize(("budget", "fits"), [("1GiB", True), ("1MiB", False)])
def test_a_budget_is_compared_and_too_small_a_one_is_an_answer(
    expt, home, without_advice, budget, fits
) -> None:
    code, out, _ = expt(*STID, f"memory.budget={budget}")
    assert code == 0
    record = written(home)
    assert record["fits"] is fits
    assert record["budget_bytes"] == (1024 * MIB if fits else MIB)
    assert ("does NOT fit" in " ".join(out.split())) != fits


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("memory.target=tpu",), ["memory.target='tpu'", "cuda, cpu"]),
        (("memory.budget=6 gigs",), ["memory.budget=6 gigs", "GiB"]),
        (("memory.budget=80%", "memory.target=cuda"), ["memory.budget=80%", "24GiB", "target=cpu"]),
        (("memory.budget=auto",), ["memory.budget=auto", "24GiB"]),
        (("memory.budget=150%",), ["memory.budget=150%", "100%"]),
        (("memory.budget=-1",), ["memory.budget=-1", "positive"]),
        (("memory.budget=0",), ["memory.budget=0", "at least one byte"]),
        (("memory.attention_kernel=fused",), ["attention_kernel=fused", "no module of STID"]),
        (("memory.attention_kernel=fusd",), ["fusd", "'fused'"]),
    ],
)
def test_a_mistake_is_one_clear_message(expt, home, monkeypatch, arguments, words) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = expt(*STID, *arguments)
    assert code == 2
    assert "Traceback" not in err
    assert err.count("error:") == 1
    for word in words:
        assert word in err[err.index("error:") :]
    assert not (home / "run").exists()


def test_what_the_tracker_hears(expt, home, without_advice, monkeypatch) -> None:
    class Tracker(NullTracker):
        heard: dict[str, Any] = {"artifacts": []}  # noqa: RUF012

        def start(self, name, parameters, tags) -> None:
            self.heard |= {"name": name, "tags": tags}

        def metrics(self, figures, step) -> None:
            self.heard |= figures

        def artifact(self, path, folder=None) -> None:
            self.heard["artifacts"].append(path.name)

        def finish(self, status) -> None:
            self.heard["status"] = status

    monkeypatch.setattr(module, "open_tracker", lambda *arguments: Tracker())
    assert expt(*STID)[0] == 0
    record, heard = written(home), Tracker.heard
    assert heard["plan/peak_bytes"] == record["peak_bytes"]
    assert heard["plan/activations"] == record["by_category"]["activations"]
    assert heard["artifacts"] == ["plan.json"]
    assert heard["tags"]["kind"] == "plan"
    assert heard["name"].startswith("plan-minimal")
    assert heard["status"] == "FINISHED"


def test_a_multirun_ends_in_one_table(expt, home, without_advice) -> None:
    code, out, err = expt(
        "-m", "task=plan", "+memory=lite,minimal", "model=stid", "tracking=none",
        "hydra.sweep.dir=sweep", small=False,
    )  # fmt: skip
    assert code == 0, err
    table = out[out.rindex("preset") :]
    assert out.count("predicted peak on cuda") == 2
    assert "mostly" in table
    assert table.index("lite") < table.index("minimal")
    lines = (home / "sweep/comparison.md").read_text().splitlines()
    assert len(lines) == 4
    assert [line.split(" | ")[1] for line in lines[2:]] == ["lite", "minimal"]
    plans = [json.loads((home / f"sweep/{n}/plan.json").read_text()) for n in (0, 1)]
    assert [plan["preset"] for plan in plans] == ["lite", "minimal"]


def test_a_model_that_cannot_be_traced_is_estimated(expt, home, without_advice) -> None:
    (home / "lab_branch.py").write_text(
        """
from expt.jobs.traffic.stid import STID


class Net(STID):
    def forward(self, **inputs):
        output = super().forward(**inputs)
        return output if output.sum() > 0 else -output
"""
    )
    code, out, err = expt(*STID, "model._target_=lab_branch.Net", "memory.target=cpu")
    assert code == 0, err
    record = written(home)
    assert record["method"] == "estimate"
    assert "note: the model cannot be run on fake tensors" in out
    assert "taken for real" in record["notes"][0]
    assert expt("task=plan", "model=stid", "hydra.run.dir=other", "memory.target=cpu")[0] == 0
    traced = json.loads((home / "other/plan.json").read_text())
    assert record["peak_bytes"] == pytest.approx(traced["peak_bytes"], rel=0.03)
