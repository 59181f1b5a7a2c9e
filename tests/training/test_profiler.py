"""Profiling of the shared loop: its files, what they say, and what a run without it pays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.test_trainer import Line, Net

from expt.config.schema import Compile, Device, Precision, TrainerConfig
from expt.memory.measuring.allocator_history import history_of
from expt.memory.measuring.meter import LedgerMeter
from expt.memory.recovery.recovery import Recovery
from expt.memory.techniques.optimizer_in_backward import OptimizerInBackward
from expt.memory.techniques.techniques import Techniques
from expt.tracking.tracker import NullTracker
from expt.training.device import make_fabric
from expt.training.display import SilentDisplay
from expt.training.interruption import Interruption
from expt.training.profiler import NOWHERE, StepProfiler
from expt.training.trace_profiler import TraceProfiler
from expt.training.trainer import Trainer

PREDICTED = 123_456


class WideNet(Net):
    """The small net with more to remember, so that rounding does not hide a mistake."""

    def __init__(self, hook: Callable[[], None] = lambda: None) -> None:
        super().__init__(hook)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(3, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1)
        )


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Trainer]:
    """Build a trainer that is profiled."""

    def build(
        accumulation: int = 1,
        hook: Callable[[], None] = lambda: None,
        in_backward: bool = False,
        precision: Precision = Precision.fp32,
        **settings: Any,
    ) -> Trainer:
        fabric = make_fabric(Device.cpu, precision)
        fabric.seed_everything(0, verbose=False)
        model = WideNet(hook)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if in_backward:
            optimizer = OptimizerInBackward(optimizer)
        model, optimizer = fabric.setup(model, optimizer)
        return Trainer(
            fabric=fabric, model=model, optimizer=optimizer, data=Line(),
            settings=TrainerConfig(**{"epochs": 1, "log_every_steps": 1, **settings}),
            recovery=Recovery(Techniques(accumulation), fabric.device), meter=LedgerMeter(),
            tracker=NullTracker(), display=SilentDisplay(), interruption=Interruption(),
            profiler=TraceProfiler(tmp_path, PREDICTED), run_dir=tmp_path,
        )  # fmt: skip

    return build


def memory_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "profile_memory.json").read_text())
    return found


def hooks(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks]


def test_a_profiled_run_leaves_a_trace_tables_and_a_picture(make, tmp_path, capsys):
    trainer = make(accumulation=2, ema_decay=0.9)
    inner = trainer.optimizer.optimizer
    before = hooks(inner)
    trainer.fit()
    names = ["profile.json", "profile.txt", "profile_memory.json", "profile_memory.md"]
    picture = tmp_path / "plots/memory_timeline.png"
    assert trainer.profiler.files == [*(tmp_path / name for name in names), picture]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert hooks(inner) == before

    events = json.loads((tmp_path / "profile.json").read_text())["traceEvents"]
    ranges = [e["name"] for e in events if e.get("ph") == "X"]
    counts = {name: ranges.count(f"phase: {name}") for name in ("batch", "forward", "backward")}
    assert counts == {"batch": 6, "forward": 6, "backward": 6}
    assert ranges.count("phase: optimizer_step") == 3

    memory = memory_of(tmp_path)
    weights = sum(weight.nbytes for weight in trainer.model.parameters())
    peak = memory["by_category"]
    assert peak["parameters"] == 2 * weights  # and their average
    assert peak["optimizer_state"] == pytest.approx(2 * weights, abs=64)  # and counts of steps
    assert sum(peak.values()) == memory["peak_bytes"]
    # In the meter's third step a state of the random numbers replaces an older one. On some
    # processors the meter counted both, on others one.
    more = memory["measured_peak_bytes"] - memory["peak_bytes"]
    state = torch.get_rng_state().nbytes
    assert any(more == pytest.approx(size, abs=128) for size in (0, state))
    phases = {row["phase"]: row for row in memory["phases"]}
    assert [*phases][:5] == ["batch", "forward", "loss", "backward", "optimizer_step"]
    assert phases["forward"]["by_category"]["activations"] >= 4 * 256 * 4  # [samples, width]
    assert phases["optimizer_step"]["by_category"]["gradients"] == weights
    assert phases["optimizer_step"]["times"] == 3
    assert len(set(memory["steps"])) == 1

    table = (tmp_path / "profile_memory.md").read_text()
    assert "| optimizer step | 3 |" in table
    assert "| aten::addmm |" in table
    assert "predicted of a step were 0.1 MiB" in table
    assert capsys.readouterr().out.startswith("profiled 3 steps: at most ")


def test_a_run_that_is_cut_short_keeps_what_there_is(make, tmp_path, capsys):
    make(max_steps=5).fit()
    assert len(memory_of(tmp_path)["steps"]) == 2
    assert capsys.readouterr().out.startswith("profiled 2 steps: ")


def test_a_run_that_is_too_short_says_so(make, tmp_path, capsys):
    trainer = make(max_steps=2)
    trainer.fit()
    assert capsys.readouterr().out == (
        "trainer.profile=true profiles steps 4 to 6, and training ended after 2 steps: nothing was "
        "profiled; let it take 6 at least\n"
    )
    assert trainer.profiler.files == ()
    assert not (tmp_path / "profile.json").exists()


def test_a_run_that_dies_keeps_what_there_is(make, tmp_path):
    seen: list[None] = []

    def fail_in_the_fifth_step() -> None:
        seen.append(None)
        if len(seen) == 5:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make(hook=fail_in_the_fifth_step).fit()
    assert memory_of(tmp_path)["steps"][0] > 0


def test_gradients_are_known_where_the_optimizer_steps_in_backward(make, tmp_path):
    make(in_backward=True, precision=Precision.bf16).fit()
    phases = {row["phase"]: row for row in memory_of(tmp_path)["phases"]}
    assert phases["optimizer_step"]["by_category"]["gradients"] > 0
    assert phases["optimizer_step"]["times"] > 3  # one for every weight
    assert phases["between"]["by_category"]["gradients"] == 0


def test_a_run_without_profiling_gets_nothing():
    profiler = StepProfiler()
    assert profiler.phase("forward") is profiler.phase("loss") is NOWHERE
    assert profiler.compile(Compile.graph, torch.device("cuda")) is Compile.graph


@pytest.mark.parametrize(
    ("how", "device", "then", "said"),
    [
        (Compile.auto, "cuda", Compile.off, False),
        (Compile.graph, "cuda", Compile.off, True),
        (Compile.compile, "cuda", Compile.off, True),
        (Compile.off, "cuda", Compile.off, False),
        (Compile.compile, "cpu", Compile.compile, False),
    ],
)
def test_no_step_is_captured_while_it_is_profiled(tmp_path, how, device, then, said):
    lines: list[str] = []
    profiler = TraceProfiler(tmp_path, say=lines.append)
    assert profiler.compile(how, torch.device(device)) is then
    assert [line.startswith(f"trainer.compile={how.value}: ") for line in lines] == [True] * said


def test_cuda_s_allocator_is_recorded_and_written(tmp_path, monkeypatch):
    """Against a stand-in of torch.cuda.memory: there is no card here."""
    calls: list[Any] = []

    def record(enabled: str | None = "all", **settings: int) -> None:
        calls.append((enabled, settings))

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr(
        torch.cuda.memory, "_dump_snapshot", lambda name: Path(name).write_bytes(b"snapshot")
    )
    history = history_of(torch.device("cuda"))
    history.start()
    path = tmp_path / "memory_snapshot.pickle"
    assert history.write(path) == [path]
    assert path.read_bytes() == b"snapshot"
    assert calls == [("all", {"max_entries": 100_000}), (None, {})]
    assert history_of(torch.device("cpu")).write(path) == []
