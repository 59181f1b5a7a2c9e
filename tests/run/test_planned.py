"""What a training does with its plan: told, refused, adapted, or on all the same."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from expt.config.validate import validated
from expt.errors import ConfigError
from expt.memory.planning.plan import Plan
from expt.result import load_result
from expt.run import overflow as module
from expt.run import planner, savings
from expt.run.build import build
from expt.run.overflow import _inside
from expt.run.planner import plan_training
from expt.run.savings import Saving
from expt.units import MIB, format_bytes, parse_bytes

MODEL = """
import torch
from torch import nn


class Net(nn.Module):
    \"\"\"Blocks over the past of every sensor: small weights, large activations.\"\"\"

    def __init__(self, input_steps, horizon):
        super().__init__()
        self.first, self.last = nn.Linear(input_steps, 128), nn.Linear(128, horizon)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Dropout(0.1)) for _ in range(8)
        )

    def forward(self, speed, **others):
        x = self.first(speed.transpose(1, 2))
        for block in self.blocks:
            x = x + block(x)
        output = self.last(x).transpose(1, 2)
        {body}
"""
ON_A_CARD = Plan(
    "cuda", 50 * MIB, 60 * MIB, (40, 70), "forward", {"inputs": 1}, {}, {}, "trace", 0.0
)
RUN = (
    "memory=minimal", "debug=smoke", "tracking=none", "trainer.progress=false",
    "trainer.device=cpu", "data.batch_size=256", "data.eval_batch_size=8", "trainer.epochs=1",
    "trainer.steps_per_epoch=2", "trainer.max_steps=2", "model._target_=lab_planned.Net",
)  # fmt: skip


def lab(home: Path, name: str, body: str) -> str:
    """Write a model of the user's own."""
    (home / f"{name}.py").write_text(MODEL.format(body=body))
    return f"model._target_={name}.Net"


@pytest.fixture(autouse=True)
def _own_model(home: Path) -> None:
    lab(home, "lab_planned", "return output")


def train(expt, home: Path, *arguments: str, to: str = "run") -> tuple[int, str, str, Any]:
    """Run a training; an argument takes the place of one of `RUN`'s of the same name."""
    names = {argument.partition("=")[0] for argument in arguments}
    given = [line for line in RUN if line.partition("=")[0] not in names]
    code, out, err = expt(*given, *arguments, f"hydra.run.dir={to}", small=False)
    return code, out, err, load_result(home / to)


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
    weights = []
    for planned in ("true", "false"):
        code, out, err, result = train(expt, home, f"memory.plan={planned}", to=f"plan-{planned}")
        assert code == 0, err
        assert ("predicted peak" in out) == (planned == "true")
        weights.append(result.weights_sha256)
    assert weights[0] == weights[1]


@pytest.fixture(scope="module")
def whole(once) -> int:
    """The predicted peak of the plain run, in bytes."""
    model = MODEL.format(body="return output")
    folder = once(*RUN, "task=plan", "hydra.run.dir=run", files={"lab_planned.py": model})
    return int(json.loads((folder / "run/plan.json").read_text())["peak_bytes"])


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
    code, _, err, result = train(expt, home, "memory.budget=11MiB", "memory.on_overflow=adapt")
    assert code == 2
    assert result is None
    assert (
        "nothing is left on the ladder that would make it fit. No technique is predicted to fit"
        in err
    )
    least = parse_bytes(err.partition("the least they reach is ")[2].partition(";")[0])
    assert 11 * MIB < least < 100 * MIB
    code, _, err, _ = train(expt, home, "memory.budget=11MiB")
    assert code == 2
    assert "the least they reach is " in err
    assert "on_overflow=adapt" not in err, "it would end the same"


def test_what_the_machine_does_not_have_must_not_start(expt, home, whole, monkeypatch) -> None:
    # The system would end it without a word, and nothing can recover from that.
    monkeypatch.setattr(module, "total_bytes", lambda device: whole * 6 // 10)
    code, _, err, result = train(expt, home)
    assert code == 2
    assert result is None
    assert "the memory of this machine (" in err
    for word in (
        "What would fit: ",
        "on_overflow=adapt",
        "on_overflow=train",
        "memory.budget=auto",
    ):
        assert word in err
    assert train(expt, home, "memory.fallback=preset")[0] == 2, "no error, no fallback"
    code, out, err, result = train(expt, home, "memory.on_overflow=adapt", to="adapted")
    assert code == 0, err
    assert result.memory["peak_allocated_bytes"] <= whole * 6 // 10
    code, out, err, result = train(expt, home, "memory.on_overflow=train", to="all-the-same")
    assert code == 0, err
    assert "; there is no budget, and the memory of this machine (" in out
    assert "the system may end it" in out


@pytest.mark.parametrize(
    ("recover", "fallback", "then"),
    [
        ("true", "none", "(recovery)"),
        ("true", "preset", "(recovery, then memory.fallback)"),
        ("false", "preset", "(memory.fallback)"),
    ],
)
def test_a_card_without_a_budget_raises_by_itself(composed, recover, fallback, then) -> None:
    settings = validated(composed(f"memory.recover={recover}", f"memory.fallback={fallback}"))
    planned = Plan(
        "cuda", 50 * MIB, 60 * MIB, (40, 70), "backward", {"inputs": 1}, {}, {}, "trace", 0.0
    )
    limit = module.Limit(55 * MIB, None, "cuda")
    assert _inside(settings, None, planned, limit) == (settings, planned)
    line = module.remark(settings, planned, limit)
    assert line.startswith("; there is no budget, and the memory of this card (55.0 MiB) is less")
    assert line.endswith(f"goes on all the same {then}")
    assert module.remark(settings, planned, module.Limit(60 * MIB, None, "cuda")) == ""


def test_a_card_that_nothing_recovers_on_is_refused(composed, monkeypatch) -> None:
    settings = validated(composed("memory.recover=false"))
    planned = ON_A_CARD
    monkeypatch.setattr(savings, "single_changes", lambda planner: [])
    monkeypatch.setattr(module, "descend_by_plan", lambda *arguments: None)
    least = format_bytes(planned.demand_bytes)
    with pytest.raises(ConfigError, match=f"the least they reach is {re.escape(least)}"):
        _inside(settings, None, planned, module.Limit(55 * MIB, None, "cuda"))


def test_where_the_limit_is_not_known_there_is_none(composed) -> None:
    settings = validated(composed())
    assert module.limit_of(settings, None, "mps") is None, "it has an error of its own"
    assert module.limit_of(settings, 5, "mps").bytes == 5
    assert module.limit_of(settings, None, "cpu").bytes > 0


def test_adapting_is_offered_where_it_would_do(composed, monkeypatch) -> None:
    settings = validated(composed("+memory=minimal"))
    planned = Plan("cpu", 50 * MIB, None, (40, 60), "forward", {"inputs": 1}, {}, {}, "trace", 0.0)
    limit = module.Limit(30 * MIB, "30MiB", "cpu")
    monkeypatch.setattr(module, "descend_by_plan", lambda *arguments: None)
    ways = [Saving("memory.precision=bf16", 25 * MIB, 25 * MIB)]
    monkeypatch.setattr(savings, "single_changes", lambda planner: iter(ways))
    message = module.refusal(settings, None, planned, limit)
    assert (
        "What would fit: memory.precision=bf16 (25.0 MiB); or memory.on_overflow=train" in message
    )
    with pytest.raises(ConfigError, match=r"on the ladder .* What would fit: memory\.precision"):
        module.adapted(settings, None, planned, limit)
    ways.insert(0, Saving("memory.forward_chunks=4", 28 * MIB, 28 * MIB))
    assert "on_overflow=adapt" in module.refusal(settings, None, planned, limit)


def test_training_all_the_same_meets_the_budget_by_recovery(expt, home, whole) -> None:
    budget = whole * 6 // 10
    code, out, err, result = train(
        expt, home, f"memory.budget={budget}", "memory.on_overflow=train"
    )
    assert code == 0, err
    assert "goes on all the same" in out
    assert result.oom_events
    assert result.memory["peak_allocated_bytes"] <= budget


def test_a_model_that_cannot_be_traced_is_estimated_and_trained(expt, home) -> None:
    branch = lab(home, "lab_branching", "return output if output.sum() > 0 else -output")
    code, out, err, result = train(expt, home, branch)
    assert code == 0, err
    assert "predicted peak (estimate): " in out
    assert "note: the model cannot be run on fake tensors (it decides on values: a boolean" in out
    assert "lab_branching.py:" in out, "the line that asks"
    assert result.status == "completed"
    assert result.memory["prediction_error"] == pytest.approx(0, abs=0.05)


def test_without_an_upper_bound_no_prediction_is_recorded(expt, home, monkeypatch) -> None:
    from expt.memory.planning import estimate

    monkeypatch.setattr(estimate, "MAX_REAL_BYTES", 0)
    branch = lab(home, "lab_large", "return output * float(output.detach().numpy().max())")
    code, out, err, result = train(expt, home, branch, "memory.budget=1GiB")
    assert code == 0, err
    assert "to an unknown amount" in out
    assert "activations are NOT included" in out
    assert result.memory["predicted_peak_bytes"] is None
    assert result.memory["prediction_error"] is None


def test_the_users_own_error_is_said_by_the_plan_and_raised_by_the_training(expt, home) -> None:
    wrong = lab(home, "lab_wrong", "return output @ torch.ones(3, 3)")
    with pytest.raises(RuntimeError, match=r"Expected size|multiplied"):
        train(expt, home, wrong)
    assert load_result(home / "run").status == "failed"


def test_a_forward_that_does_not_take_the_inputs_is_refused(expt, home) -> None:
    (home / "lab_narrow.py").write_text(MODEL.format(body="return x").replace(", **others", ""))
    for more in ((), ("memory.plan=false",), ("task=plan",)):
        code, _, err, result = train(expt, home, "model._target_=lab_narrow.Net", *more)
        assert (code, result) == (2, None)
        assert "Net.forward(speed) does not take what the data gives it by name (speed, obs" in err
        assert "let **others take the rest" in err
        assert "Traceback" not in err
        assert not (home / "run").exists()


def test_a_forward_that_is_handed_something_else_by_a_hook_trains(expt, home) -> None:
    hook = "\n        self.register_forward_pre_hook(only, with_kwargs=True)\n"
    text = MODEL.format(body="return output").replace(", **others", "")
    text = text.replace("\n    def forward", f"{hook}\n    def forward")
    only = "def only(model, args, kwargs):\n    return (), {'speed': kwargs['speed']}\n"
    (home / "lab_hooked.py").write_text(text + "\n\n" + only)
    code, _, err, result = train(expt, home, "model._target_=lab_hooked.Net")
    assert code == 0, err
    assert result.status == "completed"


def test_a_wrong_shape_is_said_once_and_leaves_nothing(expt, home) -> None:
    wrong = lab(home, "lab_turned", "return output.transpose(1, 2)")
    code, out, err, result = train(expt, home, wrong)
    assert (code, result) == (2, None)
    assert (out + err).count("the model returned [") == 1
    assert not (home / "run").exists()


def test_the_plans_line_about_the_users_own_error(expt, home, capfd) -> None:
    wrong = lab(home, "lab_wrong_too", "return output @ torch.ones(3, 3)")
    with pytest.raises(RuntimeError):
        train(expt, home, wrong)
    said = capfd.readouterr()
    assert "peak memory not predicted: RuntimeError: " in said.out
    assert "failed while attempting to run meta" not in said.err


def test_a_plan_that_was_made_before_is_not_made_again(expt, home, monkeypatch) -> None:
    from expt.run import overflow as planned

    assert expt(*RUN, "hydra.run.dir=first", small=False)[0] == 0
    stored = json.loads((home / "first/plan.json").read_text())

    def again(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("it was planned again")

    with monkeypatch.context() as patched:
        patched.setattr(planned, "plan_training", again)
        code, _, err = expt(
            *RUN, "hydra.run.dir=second", "memory.plan_file=first/plan.json", small=False
        )
    assert code == 0, err
    result = load_result(home / "second")
    assert result.memory["predicted_peak_bytes"] == stored["peak_bytes"]
    assert json.loads((home / "second/plan.json").read_text()) == stored
    (home / "first/plan.json").write_text('{"peak_bytes": 5}')
    code, _, _ = expt(*RUN, "hydra.run.dir=third", "memory.plan_file=first/plan.json", small=False)
    assert code == 0
    assert load_result(home / "third").memory["predicted_peak_bytes"] == stored["peak_bytes"]


def test_steps_stay_eager_where_a_captured_one_is_predicted_not_to_fit(capsys) -> None:
    from expt.config.schema import Compile, MemoryConfig, TrackingConfig, TrainerConfig
    from expt.config.settings import Settings
    from expt.memory.planning.plan import Plan
    from expt.run.overflow import _without_capture

    def decide(how: Compile, captured: int | None, budget: int | None) -> Compile:
        planned = Plan("cuda", 50, 60, (40, 70), "backward", {}, {}, {}, "trace", 0.0, (), captured)
        given = Settings(TrainerConfig(compile=how), MemoryConfig(), TrackingConfig(), {})
        return _without_capture(given, planned, budget).trainer.compile

    assert decide(Compile.auto, 100, 120) is Compile.auto
    assert decide(Compile.auto, 100, None) is Compile.auto
    assert decide(Compile.auto, None, 80) is Compile.auto
    assert decide(Compile.graph, 100, 80) is Compile.graph
    assert capsys.readouterr().out == ""
    assert decide(Compile.auto, 100, 80) is Compile.off
    assert "steps stay eager" in capsys.readouterr().out


def test_what_would_fit_is_told_by_what_the_budget_counts(composed, monkeypatch) -> None:
    # On CUDA a budget is of reserved bytes: a way whose peak fits may still not.
    settings = validated(composed("+memory=minimal", "model=stid", "memory.budget=10MiB"))
    data = build(settings, "data")
    found = plan_training(settings, data, "cuda")
    large = replace(found, peak_bytes=12 * MIB, reserved_bytes=20 * MIB)
    ways = [Saving("too=much", 4 * MIB, 12 * MIB), Saving("enough=true", 5 * MIB, 9 * MIB)]
    monkeypatch.setattr(savings, "single_changes", lambda planner: iter(ways))
    message = module.refusal(settings, data, large, module.Limit(10 * MIB, "10MiB", "cuda"))
    assert "bytes reserved by the allocator, which are 20.0 MiB" in message
    assert "What would fit: enough=true (9.0 MiB)" in message
    assert "too=much" not in message


def test_a_refusal_is_planned_no_longer_than_until_something_fits(composed, monkeypatch) -> None:
    large = ("data.batch_size=256", "data.eval_batch_size=8", "model=stid")
    settings = validated(composed("+memory=lite", "memory.budget=40MiB", *large))
    data, traces = build(settings, "data"), []
    monkeypatch.setattr(
        planner, "plan_training", lambda *a, **k: (traces.append(a), plan_training(*a, **k))[1]
    )
    planned = planner.plan_training(settings, data, "cpu")
    message = module.refusal(settings, data, planned, module.Limit(40 * MIB, "40MiB", "cpu"))
    assert "What would fit: memory.gradient_accumulation=4" in message
    assert len(traces) == 2
    traces.clear()
    message = module.refusal(settings, data, planned, module.Limit(2 * MIB, "2MiB", "cpu"))
    assert "No technique is predicted to fit" in message
    tried = [str(trace[3:]) for trace in traces]
    assert len(tried) == len(set(tried)) <= 20, "nothing is planned twice"


@pytest.mark.parametrize(("stages", "offloaded"), [(1, True), (2, False)])
def test_no_rung_is_taken_that_the_settings_refuse(stages, offloaded):
    """Weights wait on the host as they were frozen at first, which several stages change."""
    from types import SimpleNamespace

    from expt.memory.techniques.techniques import Techniques
    from expt.run.overflow import descend_by_plan

    class Planner:
        settings = SimpleNamespace(
            trainer=SimpleNamespace(devices=1, sharded=False, stages=[None] * stages)
        )
        data = SimpleNamespace(batch_size=1, eval_batch_size=1, size=lambda split: 10)
        now, target = Techniques(activation_checkpointing=True), "cuda"

        def __call__(self, techniques):
            return 100 - 10 * techniques.saved_tensor_offload - 10 * techniques.weight_offload

        def refused(self, techniques):
            return None

    found = descend_by_plan(Planner(), 80)
    assert (found is not None and found.weight_offload) is offloaded
