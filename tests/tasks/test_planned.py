"""What a training does with its plan: told, refused, adapted, or on all the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from expt.results import load_result

MIB = 2**20
RUN = (
    "memory=minimal", "model=alternating", "debug=smoke", "tracking=none", "trainer.progress=false",
    "trainer.device=cpu", "data.batch_size=32", "data.eval_batch_size=8", "trainer.epochs=1",
    "trainer.steps_per_epoch=2", "trainer.max_steps=2", "hydra.run.dir=run",
)  # fmt: skip
STID = (*(line for line in RUN if not line.startswith("model=")), "model=stid")


def train(expt, home: Path, *arguments: str, base=RUN) -> tuple[int, str, str, Any]:
    code, out, err = expt(*base, *arguments, small=False)
    return code, out, err, load_result(home / "run")


def test_a_training_is_predicted_and_the_error_recorded(expt, home) -> None:
    code, out, err, result = train(expt, home)
    assert code == 0, err
    assert out.count("predicted peak: ") == 1
    memory = result.memory
    assert memory["prediction_error"] == pytest.approx(0, abs=0.02)
    assert memory["peak_allocated_bytes"] == pytest.approx(memory["predicted_peak_bytes"], rel=0.02)
    planned = json.loads((home / "run/plan.json").read_text())
    assert planned["peak_bytes"] == memory["predicted_peak_bytes"]


def test_planning_changes_nothing_but_what_is_said(expt, home) -> None:
    weights = {}
    for planned in ("true", "false"):
        code, out, err = expt(
            *STID, f"memory.plan={planned}", f"hydra.run.dir={planned}", small=False
        ) if False else expt(
            *(line for line in STID if not line.startswith("hydra")),
            f"memory.plan={planned}", f"hydra.run.dir={planned}", small=False,
        )  # fmt: skip
        assert code == 0, err
        assert ("predicted peak" in out) == (planned == "true")
        weights[planned] = load_result(home / planned).weights_sha256
    assert weights["true"] == weights["false"]


@pytest.fixture
def whole(expt, home) -> int:
    """The predicted peak of the plain run, in bytes."""
    arguments = [line for line in RUN if not line.startswith(("hydra", "debug"))]
    assert expt(*arguments, "task=plan", "hydra.run.dir=before", small=False)[0] == 0
    return int(json.loads((home / "before/plan.json").read_text())["peak_bytes"])


def test_what_would_not_fit_is_refused_with_what_would(expt, home, whole) -> None:
    code, _, err, result = train(expt, home, f"memory.budget={whole * 6 // 10}")
    assert code == 2
    assert result is None
    assert "Traceback" not in err
    for word in ("predicted to be too small", "What would fit: ", "on_overflow=adapt"):
        assert word in err
    change = err.partition("What would fit: ")[2].split(" ")[0]
    code, _, err, result = train(expt, home, f"memory.budget={whole * 6 // 10}", change)
    assert code == 0, err
    assert result.memory["peak_allocated_bytes"] <= whole * 6 // 10
    assert result.oom_events == []


def test_adapting_stays_inside_the_budget_as_measured(expt, home, whole) -> None:
    budget = whole * 6 // 10
    code, out, err, result = train(
        expt, home, f"memory.budget={budget}", "memory.on_overflow=adapt"
    )
    assert code == 0, err
    assert "memory.on_overflow=adapt: going on with memory." in out
    assert result.status == "completed"
    assert result.memory["peak_allocated_bytes"] <= budget
    assert result.memory["predicted_peak_bytes"] <= budget
    assert result.oom_events == [], "predicted, not found out"


def test_adapting_to_what_nothing_fits_is_refused(expt, home) -> None:
    code, _, err, result = train(
        expt, home, "memory.budget=12MiB", "memory.on_overflow=adapt", "data.eval_batch_size=1",
        base=[line for line in RUN if "eval_batch" not in line],
    )  # fmt: skip
    assert code == 2
    assert result is None
    assert "nothing is left that would make it fit" in err
    assert "halve_micro_batch: " in err


def test_training_all_the_same_meets_the_budget_by_recovery(expt, home, whole) -> None:
    budget = whole * 6 // 10
    code, out, err, result = train(
        expt, home, f"memory.budget={budget}", "memory.on_overflow=train"
    )
    assert code == 0, err
    assert "goes on all the same" in out
    assert result.oom_events
    assert result.memory["peak_allocated_bytes"] <= budget


MODEL = """
import torch
from expt.models.stid import STID


class Net(STID):
    def forward(self, **inputs):
        output = super().forward(**inputs)
        {body}
"""


def lab(home: Path, name: str, body: str) -> tuple[str, ...]:
    (home / f"{name}.py").write_text(MODEL.format(body=body))
    return (f"model._target_={name}.Net",)


def test_a_model_that_cannot_be_traced_is_estimated_and_trained(expt, home) -> None:
    branch = lab(home, "lab_branching", "return output if output.sum() > 0 else -output")
    code, out, err, result = train(expt, home, *branch, base=STID)
    assert code == 0, err
    assert "predicted peak (estimate): " in out
    assert "note: the model cannot be run on fake tensors (DataDependentOutputException" in out
    assert result.status == "completed"
    assert result.memory["prediction_error"] == pytest.approx(0, abs=0.05)


def test_without_an_upper_bound_no_prediction_is_recorded(expt, home, monkeypatch) -> None:
    from expt.memory import estimate

    monkeypatch.setattr(estimate, "MAX_REAL_BYTES", 0)
    branch = lab(home, "lab_large", "return output if output.sum() > 0 else -output")
    code, out, err, result = train(expt, home, *branch, "memory.budget=1GiB", base=STID)
    assert code == 0, err
    assert "to an unknown amount" in out
    assert "activations are NOT included" in out
    assert result.memory["predicted_peak_bytes"] is None
    assert result.memory["prediction_error"] is None


def test_the_users_own_error_is_said_by_the_plan_and_raised_by_the_training(expt, home) -> None:
    wrong = lab(home, "lab_wrong", "return output @ torch.ones(3, 3)")
    with pytest.raises(RuntimeError, match="cannot be multiplied|must match"):
        train(expt, home, *wrong, base=STID)
    assert load_result(home / "run").status == "failed"


def test_the_plans_line_about_the_users_own_error(expt, home, capfd) -> None:
    wrong = lab(home, "lab_wrong_too", "return output @ torch.ones(3, 3)")
    with pytest.raises(RuntimeError):
        expt(*STID, *wrong, small=False)
    said = capfd.readouterr()
    assert "peak memory not predicted: RuntimeError: " in said.out
    assert "failed while attempting to run meta" not in said.err
