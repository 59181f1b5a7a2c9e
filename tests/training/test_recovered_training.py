"""The loop under injected lacks of memory: same weights, no batch lost, every event recorded."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from expt.config.schema import Device, Precision, TrainerConfig
from expt.job import Batch, Metric
from expt.memory.measuring.budget import Budget
from expt.memory.measuring.meter import LedgerMeter, meter_for
from expt.memory.recovery.event import OomEvent
from expt.memory.recovery.limits import Limits
from expt.memory.recovery.recovery import Recovery
from expt.memory.techniques.techniques import Techniques, apply
from expt.tracking.tracker import NullTracker
from expt.training.batches import ResidentSamples
from expt.training.device import make_fabric
from expt.training.display import SilentDisplay
from expt.training.evaluate import evaluate, predict
from expt.training.interruption import Interruption
from expt.training.profiler import StepProfiler
from expt.training.stopping import Ending
from expt.training.trainer import Trainer

NUM_TRAIN, NUM_VAL, WIDTH = 52, 10, 6
EPOCHS, STEPS = 3, 21
OPTIMIZER_POINTS = ("optimizer_start", "optimizer_middle", "optimizer_end")
PHASES = ("forward", "backward", *OPTIMIZER_POINTS)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Run in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Faults:
    """Raises once at every (optimizer step, phase); test-only."""

    def __init__(
        self, *points: tuple[int, str], kind: Callable[[str], Exception] = torch.OutOfMemoryError
    ):
        self.left = set(points)
        self.fired: list[tuple[int, str]] = []
        self.kind = kind
        self.step: Callable[[], int] = lambda: -1

    def __call__(self, phase: str) -> None:
        point = (self.step(), phase)
        if point in self.left:
            self.left.remove(point)
            self.fired.append(point)
            raise self.kind("CPU out of memory. Tried to allocate 2.50 KiB. 1.00 KiB is free")


class RaiseInBackward(torch.autograd.Function):
    """The identity, whose backward pass may run out of memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, faults: Faults) -> Tensor:
        ctx.faults = faults
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.faults("backward")
        return gradients[0], None


class RaiseAfter(TorchDispatchMode):
    """Raises after a number of operators: in the middle of whatever runs inside."""

    def __init__(self, operators: int, faults: Faults) -> None:
        super().__init__()
        self.left, self.faults = operators, faults

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.left -= 1
        if self.left == 0:
            self.faults("optimizer_middle")
        return result


class Sums:
    """Mean absolute error over a split; counts a batch in two parts, with a fault in between."""

    def __init__(self, faults: Faults) -> None:
        self.total, self.count, self.faults = 0.0, 0, faults

    def update(self, prediction: Tensor, batch: Batch) -> None:
        self.count += len(batch.target)
        self.faults("metrics")
        self.total += float((prediction - batch.target).abs().sum())

    def compute(self) -> dict[str, float]:
        return {"mae": self.total / self.count}


class Curve:
    """y = sin of a sum, with unequal weights, so that accumulation by means would show."""

    batch_size, eval_batch_size, metrics = 8, 4, (Metric("mae"),)

    def __init__(self, faults: Faults, count: int = NUM_TRAIN) -> None:
        generator = torch.Generator().manual_seed(1)
        self.count = count
        self.x = torch.randn(count + NUM_VAL, WIDTH, generator=generator)
        self.y = self.x.sum(dim=1).sin()
        self.observed = torch.rand(len(self.x), generator=generator) > 0.3
        self.faults = faults

    def to(self, device: torch.device) -> None: ...

    def size(self, split: str) -> int:
        return self.count if split == "train" else NUM_VAL

    def gather(self, split: str, indices: Tensor) -> Batch:
        at = indices + (0 if split == "train" else self.count)
        return Batch({"x": self.x[at], "observed": self.observed[at]}, self.y[at])

    def weight(self, split: str, indices: Tensor) -> Tensor:
        return self.observed[indices].sum().clamp(min=1)

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        return ((prediction - batch.target).abs() * batch.inputs["observed"]).sum()

    def accumulator(self) -> Sums:
        return Sums(self.faults)


class Net(nn.Module):
    """Two blocks that can be checkpointed; `hidden` decides what a step takes."""

    def __init__(self, faults: Faults, hidden: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, hidden), nn.Linear(hidden, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh(), nn.Dropout(dropout))
            for _ in range(2)
        )
        self.faults = faults

    def forward(self, x: Tensor, observed: Tensor) -> Tensor:
        self.faults("forward" if torch.is_grad_enabled() else "evaluation")
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(RaiseInBackward.apply(x, self.faults)).squeeze(1)


class Run:
    """A trainer with faults, and what it did."""

    def __init__(
        self,
        folder: Path,
        faults: Faults | None = None,
        *,
        hidden: int = 16,
        dropout: float = 0.0,
        limits: Limits | None = None,
        precision: Precision = Precision.fp32,
        middle: int = 5,
        optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
        options: dict[str, Any] | None = None,
        meter: LedgerMeter | None = None,
        budget_bytes: int | None = None,
        batch_size: int = 8,
        **settings: Any,
    ) -> None:
        self.faults = faults or Faults()
        self.told: list[OomEvent] = []
        fabric = make_fabric(Device.cpu, precision)
        fabric.seed_everything(0, verbose=False)
        model = Net(self.faults, hidden, dropout)
        raw = optimizer(model.parameters(), **{"lr": 1e-3, **(options or {})})
        model, wrapped = fabric.setup(model, raw)
        self.recovery = Recovery(
            Techniques(),
            fabric.device,
            apply=apply,
            limits=limits,
            on_event=self.told.append,
            budget_bytes=budget_bytes,
        )
        data = Curve(self.faults, max(batch_size, NUM_TRAIN))
        data.batch_size = batch_size
        self.trainer = Trainer(
            fabric=fabric,
            model=model,
            optimizer=wrapped,
            data=data,
            settings=TrainerConfig(**{"epochs": EPOCHS, "log_every_steps": 1, **settings}),
            recovery=self.recovery,
            meter=meter or LedgerMeter(),
            tracker=NullTracker(),
            display=SilentDisplay(),
            interruption=Interruption(),
            profiler=StepProfiler(),
            run_dir=folder,
        )
        self.faults.step = lambda: self.trainer.progress.step
        self.batches: dict[int, list[int]] = {}
        train_step = self.trainer.train_step

        def noted(samples: ResidentSamples) -> tuple[Tensor, Tensor]:
            self.batches[self.trainer.progress.step] = samples.indices.tolist()
            return train_step(samples)

        self.trainer.steps.run = noted
        step = type(raw).step

        def faulty(closure: Any = None) -> None:
            self.faults("optimizer_start")
            with RaiseAfter(middle, self.faults):
                step(raw)
            self.faults("optimizer_end")

        raw.step = faulty

    def fit(self) -> Ending:
        return self.trainer.fit()

    @property
    def weights(self) -> Tensor:
        return torch.cat([weight.detach().flatten() for weight in self.trainer.model.parameters()])

    @property
    def validation(self) -> list[float]:
        return [row["val"] for row in self.trainer.progress.history]


def assert_the_same(run: Run, plain: Run, tolerance: float = 1e-6) -> None:
    distance = (run.weights - plain.weights).norm() / plain.weights.norm()
    assert float(distance) < tolerance
    assert run.batches == plain.batches, "every step had its own batch"
    assert run.trainer.progress.step == plain.trainer.progress.step
    assert run.validation == pytest.approx(plain.validation, rel=1e-5)


def random_points(seed: int, count: int = 20) -> list[tuple[int, str]]:
    every = [(step, phase) for step in range(STEPS) for phase in PHASES]
    every += [(step, phase) for step in (7, 14, 21) for phase in ("evaluation", "metrics")]
    return random.Random(seed).sample(every, count)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("plain"))
    assert run.fit().reason == "epochs"
    return run


@pytest.mark.parametrize("seed", range(6))
def test_twenty_random_failures_in_one_run_change_nothing(tmp_path, plain, seed):
    faults = Faults(*random_points(seed))
    run = Run(tmp_path, faults, middle=3 + 7 * seed, checkpoint_every_steps=2)
    assert run.fit().reason == "epochs"
    assert not faults.left
    assert len(run.recovery.events) == len(run.told) == 20
    assert_the_same(run, plain)


@pytest.mark.parametrize("phase", [*PHASES, "evaluation", "metrics"])
@pytest.mark.parametrize("step", [0, 7])
def test_one_failure_is_recorded_and_changes_nothing(tmp_path, plain, phase, step):
    if phase in ("evaluation", "metrics"):
        step = 7
    run = Run(tmp_path, Faults((step, phase)))
    run.fit()
    assert_the_same(run, plain)
    (event,) = run.recovery.events
    recorded = {**dict.fromkeys(OPTIMIZER_POINTS, "optimizer_step"), "metrics": "evaluation"}
    assert event["phase"] == recorded.get(phase, phase)
    epoch = 0 if event["phase"] == "evaluation" else step // 7
    assert (event["step"], event["epoch"]) == (step, epoch)
    assert (event["bytes_requested"], event["bytes_free"]) == (2560, 1024)
    # In the middle of the very first step, the optimizer only sets up its state.
    begun = phase == "optimizer_end" or (phase == "optimizer_middle" and step > 0)
    assert event["replayed"] == begun
    rungs = {"forward": "halve_micro_batch", "backward": "halve_micro_batch"}
    rungs |= dict.fromkeys(("evaluation", "metrics"), "halve_evaluation_batch")
    assert event["rung"] == rungs.get(phase, "release")
    assert f"at step {event['step']}" in run.told[0].line()


def test_every_rung_is_taken_in_turn_and_the_skipped_ones_say_why(tmp_path, plain):
    run = Run(tmp_path, Faults(*((step, "forward") for step in range(6))))
    run.fit()
    rungs = [event["rung"] for event in run.recovery.events]
    assert rungs == [*["halve_micro_batch"] * 3, "activation_checkpointing", "release", "release"]
    reasons = {one["rung"]: one["reason"] for one in run.recovery.events[-1]["skipped"]}
    assert "own attention kernel" in reasons["fused_attention"]
    assert "single sample" in reasons["halve_micro_batch"]
    assert "already" in reasons["activation_checkpointing"]
    assert "cpu" in reasons["saved_tensor_offload"]
    assert "adafactor" in reasons["lighter_optimizer"]
    assert_the_same(run, plain)


def test_failures_again_and_again_in_one_step(tmp_path, plain):
    class Stubborn(Faults):
        def __call__(self, phase: str) -> None:
            if phase == "backward" and self.step() == 3 and len(self.fired) < 4:
                self.left.add((3, "backward"))
            super().__call__(phase)

    run = Run(tmp_path, Stubborn())
    run.fit()
    assert [event["step"] for event in run.recovery.events] == [3] * 4
    assert_the_same(run, plain)


@pytest.mark.parametrize(
    "point", [(2, "optimizer_start"), (5, "optimizer_middle"), (9, "optimizer_end")]
)
def test_dropout_draws_the_same_numbers_again_where_the_batch_is_not_cut(tmp_path, point):
    undisturbed = Run(tmp_path / "a", dropout=0.3)
    undisturbed.fit()
    run = Run(tmp_path / "b", Faults(point), dropout=0.3)
    run.fit()
    assert run.recovery.techniques == Techniques()
    assert torch.equal(run.weights, undisturbed.weights)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.Adafactor, {}),
        (torch.optim.AdamW, {"fused": True}),
    ],
)
def test_other_optimizers(tmp_path, optimizer, options):
    settings = {"optimizer": optimizer, "options": options}
    undisturbed = Run(tmp_path / "a", **settings)
    undisturbed.fit()
    points = [(0, "optimizer_middle"), (4, "optimizer_end"), (9, "backward")]
    run = Run(tmp_path / "b", Faults(*points), middle=2, **settings)
    run.fit()
    assert len(run.recovery.events) == 3
    assert_the_same(run, undisturbed, 1e-5 if optimizer is torch.optim.Adafactor else 1e-6)


def test_an_optimizer_that_steps_all_weights_at_once_then_steps_them_one_by_one(tmp_path):
    undisturbed = Run(tmp_path / "a", options={"foreach": True})
    undisturbed.fit()
    points = [(3, "optimizer_middle"), (9, "backward")]
    run = Run(tmp_path / "b", Faults(*points), options={"foreach": True})
    run.fit()
    assert [event["rung"] for event in run.recovery.events] == ["one_by_one", "halve_micro_batch"]
    assert run.recovery.events[0]["replayed"]
    assert_the_same(run, undisturbed)
    again = Run(tmp_path / "b", options={"foreach": True})
    again.trainer.resume()
    assert again.recovery.ladder.one_by_one


@pytest.mark.parametrize("phase", PHASES)
def test_fp16_unscales_the_gradients_once(tmp_path, phase):
    undisturbed = Run(tmp_path / "a", precision=Precision.fp16)
    undisturbed.fit()
    run = Run(tmp_path / "b", Faults((3, phase)), precision=Precision.fp16)
    run.fit()
    assert_the_same(run, undisturbed, 1e-3)


class KilledError(Exception):
    """Stands for kill -9: nothing after it runs."""


@pytest.mark.parametrize("at", [6, 11, 15])
def test_a_recovered_run_that_is_killed_goes_on_where_it_was(tmp_path, plain, at):
    points = [(2, "backward"), (4, "optimizer_middle"), (9, "forward"), (14, "optimizer_end")]
    faults = Faults(*points)
    cut = Run(tmp_path, faults, checkpoint_every_steps=2)
    step = cut.trainer.steps.run

    def killed(samples: ResidentSamples) -> tuple[Tensor, Tensor]:
        if cut.trainer.progress.step == at:
            raise KilledError
        return step(samples)

    cut.trainer.steps.run = killed
    with pytest.raises(KilledError):
        cut.fit()
    saved_at = max(at // 2 * 2, at // 7 * 7)
    seen = [point for point in faults.fired if point[0] < saved_at]
    again = Run(tmp_path, Faults(*(set(points) - set(faults.fired))), checkpoint_every_steps=2)
    assert again.trainer.resume() == saved_at
    assert len(again.recovery.events) == len(seen)
    assert again.recovery.techniques.gradient_accumulation == 2 * len(
        [point for point in seen if point[1] in ("forward", "backward")]
    )
    assert again.fit().reason == "epochs"
    later = set(points) - set(faults.fired)
    assert len(again.recovery.events) == len(seen) + len(later)
    again.batches = {**cut.batches, **again.batches}
    assert_the_same(again, plain)


def test_techniques_configured_anew_win_over_those_of_the_checkpoint(tmp_path):
    Run(tmp_path, Faults((1, "forward")), epochs=1).fit()
    again = Run(tmp_path)
    again.recovery.ladder.configured = again.recovery.ladder.techniques = Techniques(8)
    again.trainer.resume()
    assert again.recovery.techniques == Techniques(8)
    assert len(again.recovery.events) == 1


def test_a_checkpoint_from_before_there_was_recovery_still_loads(tmp_path):
    run = Run(tmp_path, epochs=1)
    run.fit()
    path = tmp_path / "checkpoints/last.pt"
    saved = torch.load(path, weights_only=True)
    del saved["progress"]["recovery"]
    torch.save(saved, path)
    again = Run(tmp_path)
    assert again.trainer.resume() == 7
    assert again.recovery.techniques == Techniques()


def test_without_recovery_the_run_fails_with_its_checkpoint_intact(tmp_path):
    run = Run(tmp_path, Faults((5, "backward")), limits=Limits(False), checkpoint_every_steps=2)
    outcome = run.fit()
    assert (outcome.status, outcome.reason, outcome.step) == ("failed", "out_of_memory", 5)
    assert "memory.recover=false" in outcome.message
    assert [event["rung"] for event in run.recovery.events] == [None]
    assert torch.load(tmp_path / "checkpoints/last.pt", weights_only=True)["progress"]["step"] == 4


class Always(Faults):
    """Raises whenever a phase comes."""

    def __init__(self, phase: str) -> None:
        super().__init__()
        self.phase = phase

    def __call__(self, phase: str) -> None:
        if phase == self.phase:
            self.left.add((self.step(), phase))
        super().__call__(phase)


@pytest.mark.parametrize("phase", [*PHASES, "evaluation", "metrics"])
def test_a_lack_that_nothing_helps_against_ends_the_run(tmp_path, phase):
    run = Run(tmp_path, Always(phase), checkpoint_every_steps=2)
    outcome = run.fit()
    assert (outcome.status, outcome.reason) == ("failed", "out_of_memory")
    assert "nothing is left to try" in outcome.message
    assert len(run.recovery.events) < 12
    assert run.recovery.events[-1]["rung"] is None


@pytest.mark.parametrize(
    ("limits", "count", "word"),
    [
        (Limits(per_run=2), 3, "memory.max_recoveries=2"),
        (Limits(per_step=1), 2, "memory.max_recoveries_per_step=1"),
    ],
)
def test_the_limits_hold(tmp_path, limits, count, word):
    run = Run(tmp_path, Always("forward"), limits=limits)
    assert word in run.fit().message
    assert len(run.recovery.events) == count


def test_a_failure_between_two_steps_goes_back_to_the_checkpoint(tmp_path, plain):
    run = Run(tmp_path, Faults((5, "between")), checkpoint_every_steps=2)
    after_step = run.trainer._after_step

    def fail(*arguments: Any) -> Any:
        run.faults("between")
        return after_step(*arguments)

    run.trainer._after_step = fail
    run.fit()
    (event,) = run.recovery.events
    assert (event["phase"], event["rung"], event["replayed"]) == ("loop", "halve_micro_batch", True)
    assert_the_same(run, plain)


def test_another_error_is_not_taken_for_a_lack_of_memory(tmp_path):
    decoy = RuntimeError("out of resource: shared memory, Required: 270336, Hardware limit: 232448")
    run = Run(tmp_path, Faults((2, "backward"), kind=lambda _: decoy))
    with pytest.raises(RuntimeError, match="out of resource"):
        run.fit()
    assert run.recovery.events == []


def test_a_lack_of_host_memory_is_one_too(tmp_path, plain):
    run = Run(tmp_path, Faults((2, "forward"), kind=MemoryError))
    run.fit()
    assert_the_same(run, plain)


def test_a_prediction_is_made_in_parts(tmp_path):
    run = Run(tmp_path, epochs=1)
    data = run.trainer.data
    batch = data.gather("val", torch.arange(7))
    whole = predict(run.trainer.model, batch)
    run.faults.left = {(0, "evaluation")}
    parts = predict(run.trainer.model, batch, run.recovery)
    torch.testing.assert_close(parts, whole)
    assert run.recovery.evaluation_batch_size == 4
    metrics = evaluate(
        run.trainer.model,
        run.trainer.batches,
        "val",
        run.trainer.meter,
        2,
        recovery=run.recovery,
    )
    assert metrics.count == 8


def test_a_run_inside_sixty_percent_of_its_peak_ends_with_the_same_weights(tmp_path):
    wide = {"epochs": 6, "batch_size": 800}
    measure = meter_for(torch.device("cpu"))
    free = Run(tmp_path / "free", meter=measure, **wide)
    free.fit()
    peak = measure.peak_allocated_bytes()
    budget = Budget(int(0.6 * peak), "60% of the plain peak")
    with budget.enforce(torch.device("cpu")) as ledger:
        meter = meter_for(torch.device("cpu"), ledger)
        run = Run(tmp_path / "budget", meter=meter, budget_bytes=budget.bytes, **wide)
        outcome = run.fit()
    assert outcome.status == "completed", outcome.message
    assert ledger.refusals == len(run.recovery.events) > 0
    assert run.recovery.events[0]["budget_bytes"] == budget.bytes
    assert 0.3 * peak < meter.peak_allocated_bytes() <= budget.bytes < peak
    assert_the_same(run, free)
