"""Captured steps against eager ones, with a CUDA graph in software.

`Tape` does what a graph does: operators run again on the tensors they were captured with, and
nothing of the host's part of the step happens again. A rate or an index that was read on the host
at the capture would stay what it was then, and the weights would not be those of eager steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

from expt.config.schema import Compile, Device, Precision, Schedule, TrainerConfig
from expt.errors import UserError
from expt.job import Batch, Metric
from expt.memory.measuring.meter import LedgerMeter
from expt.memory.recovery.recovery import Recovery
from expt.memory.recovery.undo import RandomState
from expt.memory.techniques.techniques import Techniques, apply
from expt.tracking.tracker import NullTracker
from expt.training.device import make_fabric
from expt.training.display import SilentDisplay
from expt.training.interruption import Interruption
from expt.training.profiler import StepProfiler
from expt.training.steps.captured import WARM_STEPS, CapturedSteps
from expt.training.steps.choose import steps_for
from expt.training.steps.cuda_graph import why_not_captured
from expt.training.steps.eager import Steps
from expt.training.trainer import Trainer

NUM_TRAIN, NUM_VAL, WIDTH, BATCH = 36, 8, 4, 8
STEPS_PER_EPOCH, FULL_PER_EPOCH = 5, 4  # the last batch of an epoch has 4 samples
ITEM = torch.ops.aten._local_scalar_dense.default


class Recorded(TorchDispatchMode):
    """Writes down every operator with its tensors; reading a value is refused, as in a capture."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ITEM:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and not same_storage(old, new):
                    old.copy_(new)


def same_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


class Tape:
    """`Machinery` in software: what a capture does is undone after it."""

    def __init__(self, trainer: Trainer) -> None:
        self.model, self.optimizer = trainer.model, trainer.optimizer
        self.graphs: list[Recorded] = []
        self.warm = self.replays = self.resets = 0
        self.forbidden: list[str] = []

    @contextmanager
    def warming(self, found: list[str] | None) -> Iterator[None]:
        self.warm += 1
        yield
        if found is not None:
            found += self.forbidden

    def capture(self, work: Callable[[], Any], blocks: int, seed: int) -> tuple[Any, Any]:
        state = RandomState(torch.device("cpu"))
        kept = [*self.model.parameters(), *self.model.buffers()]
        kept += [v for s in self.optimizer.state.values() for v in s.values()]
        before = [tensor.detach().clone() for tensor in kept]
        graph = Recorded()
        with graph:
            outputs = work()
        with torch.no_grad():
            for tensor, value in zip(kept, before, strict=True):
                tensor.copy_(value)
        state.restore()
        self.graphs.append(graph)
        replay = graph.replay

        def counted() -> None:
            self.replays += 1
            replay()

        graph.replay = counted
        return graph, outputs

    def reset_after_failed_capture(self) -> None:
        self.resets += 1


class Sums:
    """Mean absolute error over a split, summed on the device."""

    def __init__(self) -> None:
        self.total, self.count = torch.zeros(()), 0

    def update(self, prediction: Tensor, batch: Batch) -> None:
        self.total += (prediction - batch.target).abs().sum()
        self.count += len(batch.target)

    def compute(self) -> dict[str, float]:
        return {"mae": float(self.total) / self.count}


class Curve:
    """y = sin of a sum, with unequal weights."""

    batch_size, eval_batch_size, metrics = BATCH, 4, (Metric("mae"),)

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(NUM_TRAIN + NUM_VAL, WIDTH, generator=generator)
        self.y = self.x.sum(dim=1).sin()
        self.observed = torch.rand(len(self.x), generator=generator) > 0.3

    def to(self, device: torch.device) -> None: ...

    def size(self, split: str) -> int:
        return NUM_TRAIN if split == "train" else NUM_VAL

    def gather(self, split: str, indices: Tensor) -> Batch:
        at = indices + (0 if split == "train" else NUM_TRAIN)
        return Batch({"x": self.x[at], "observed": self.observed[at]}, self.y[at])

    def weight(self, split: str, indices: Tensor) -> Tensor:
        return self.observed[indices].sum().clamp(min=1)

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        return ((prediction - batch.target).abs() * batch.inputs["observed"]).sum()

    def accumulator(self) -> Sums:
        return Sums()


class Net(nn.Module):
    """Two blocks that can be checkpointed; `hook` is the host's part of the forward pass."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 16), nn.Linear(16, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(dropout)) for _ in range(2)
        )
        self.hook: Callable[[], None] = lambda: None

    def forward(self, x: Tensor, observed: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        self.hook()
        return self.last(x).squeeze(1)


class Run:
    """A trainer, its tape if steps are to be captured, and what it said."""

    def __init__(
        self,
        folder: Path,
        captured: bool = True,
        *,
        techniques: Techniques | None = None,
        precision: Precision = Precision.fp32,
        dropout: float = 0.0,
        optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
        options: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        fabric = make_fabric(Device.cpu, precision)
        fabric.seed_everything(0, verbose=False)
        self.net = Net(dropout)
        apply(self.net, techniques or Techniques())
        chosen = {"lr": 1e-2, "fused": True} if options is None else options
        model, wrapped = fabric.setup(self.net, optimizer(self.net.parameters(), **chosen))
        recovery = Recovery(techniques or Techniques(), fabric.device, apply=apply)
        self.trainer = Trainer(
            fabric=fabric,
            model=model,
            optimizer=wrapped,
            data=Curve(),
            settings=TrainerConfig(**{"epochs": 4, "log_every_steps": 1, **settings}),
            recovery=recovery,
            meter=LedgerMeter(),
            tracker=NullTracker(),
            display=SilentDisplay(),
            interruption=Interruption(),
            profiler=StepProfiler(),
            run_dir=folder,
        )
        self.said: list[str] = []
        self.tape = Tape(self.trainer)
        self.captures: list[bool] = []
        if captured:
            self.trainer.steps = CapturedSteps(
                lambda samples: self.trainer.train_step(samples),
                wrapped,
                recovery,
                BATCH,
                self.tape,
                scaler=self.trainer._scaler,
                on_capture=self.captures.append,
                say=self.said.append,
            )

    def fit(self) -> Run:
        assert self.trainer.fit().status == "completed"
        return self

    @property
    def rungs(self) -> list[tuple[int, str]]:
        return [(event["step"], event["rung"]) for event in self.trainer.recovery.events]

    @property
    def weights(self) -> Tensor:
        return torch.cat([weight.detach().flatten() for weight in self.net.parameters()])


def assert_the_same(run: Run, other: Run, tolerance: float = 1e-5) -> None:
    assert run.trainer.progress.step == other.trainer.progress.step
    distance = (run.weights - other.weights).norm() / other.weights.norm()
    assert float(distance) < tolerance
    for name in ("loss", "val", "rate"):
        rows = [[row[name] for row in one.trainer.progress.history] for one in (run, other)]
        assert rows[0] == pytest.approx(rows[1], rel=1e-4), name


@pytest.mark.parametrize(
    ("techniques", "settings"),
    [
        (Techniques(), {}),
        (Techniques(gradient_accumulation=3), {"gradient_clip_norm": 0.05}),
        (Techniques(), {"ema_decay": 0.9, "dropout": 0.3}),
        (Techniques(), {"optimizer": torch.optim.SGD, "schedule": Schedule.constant}),
    ],
    ids=["plain", "accumulation and clipping", "dropout and averages", "SGD"],
)
def test_two_hundred_steps_are_those_of_eager_mode(tmp_path, techniques, settings):
    given = {"techniques": techniques, "epochs": 40, "early_stopping_patience": None, **settings}
    if settings.get("optimizer"):
        given["options"] = {"lr": 1e-2, "momentum": 0.9, "fused": True}
    eager = Run(tmp_path / "eager", captured=False, **given).fit()
    fast = Run(tmp_path / "fast", **given).fit()
    assert fast.trainer.progress.step == 200
    assert (fast.tape.warm, len(fast.tape.graphs)) == (WARM_STEPS, 1)
    assert fast.tape.replays == 40 * FULL_PER_EPOCH - WARM_STEPS
    assert (fast.said, fast.captures, fast.rungs) == ([], [True], [])
    assert_the_same(fast, eager)


def test_bf16_is_that_of_eager_mode(tmp_path):
    eager = Run(tmp_path / "eager", captured=False, precision=Precision.bf16).fit()
    fast = Run(tmp_path / "fast", precision=Precision.bf16).fit()
    assert fast.tape.replays > 0
    assert_the_same(fast, eager, tolerance=1e-3)


def test_nothing_of_the_hosts_is_left_in_the_optimizer(tmp_path):
    run = Run(tmp_path).fit()
    (group,) = run.trainer.optimizer.param_groups
    assert isinstance(group["lr"], float)
    assert group["capturable"] is False
    assert all(weight.grad is None for weight in run.net.parameters())


def test_a_step_that_reads_a_value_stays_eager_and_says_so(tmp_path):
    eager = Run(tmp_path / "eager", captured=False).fit()
    run = Run(tmp_path / "run")
    run.tape.forbidden = ["the step waits for the device, at model.py:12"]
    run.fit()
    assert run.tape.replays == 0
    assert run.said == [
        "steps are not captured as a CUDA graph: the step waits for the device, at model.py:12"
    ]
    assert_the_same(run, eager)


def test_a_capture_that_fails_is_reset_and_changes_nothing(tmp_path):
    eager = Run(tmp_path / "eager", captured=False, dropout=0.3).fit()
    run = Run(tmp_path / "run", dropout=0.3)
    run.net.hook = lambda: float(run.net.last.bias.detach()) if capturing() else None
    run.fit()
    assert (run.tape.resets, run.tape.replays, len(run.said)) == (1, 0, 1)
    assert "the capture failed (RuntimeError: operation not permitted" in run.said[0]
    assert_the_same(run, eager)


def test_a_capture_that_cannot_be_ended_says_what_broke_it_off(tmp_path):
    run = Run(tmp_path)
    run.net.hook = lambda: float(run.net.last.bias.detach()) if capturing() else None
    begun = run.tape.capture

    def capture(*given: Any) -> Any:
        try:
            return begun(*given)
        finally:
            if not run.tape.graphs:  # as torch's own end of a capture does
                raise RuntimeError("operation failed due to a previous error during capture")

    run.tape.capture = capture
    run.fit()
    assert "operation not permitted when stream is capturing" in run.said[0]


def test_running_out_of_memory_in_a_capture_leaves_eager_steps(tmp_path):
    eager = Run(tmp_path / "eager", captured=False).fit()
    run = Run(tmp_path / "run")
    run.net.hook = raising_in_capture()
    run.fit()
    assert run.rungs == [(WARM_STEPS, "eager")]
    assert run.trainer.recovery.events[0]["phase"] == "capture"
    assert (run.tape.replays, run.tape.resets) == (0, 0)
    assert_the_same(run, eager)


def test_what_a_failed_capture_began_is_not_held_against_the_eager_step(tmp_path):
    given = {"optimizer": torch.optim.SGD, "options": {"lr": 1e-2, "fused": True}}
    eager = Run(tmp_path / "eager", captured=False, **given).fit()
    run = Run(tmp_path / "run", **given)
    words = "CUDA out of memory. Tried to allocate 2.00 MiB."
    raised = list[str]()

    def fail(at: str) -> None:
        raised.append(at)
        raise torch.OutOfMemoryError(words)

    def in_step(*_: object) -> None:
        if capturing() and not raised:
            fail("capture")

    run.net.hook = lambda: fail("forward") if raised == ["capture"] else None
    run.trainer.optimizer.optimizer.register_step_pre_hook(in_step)
    run.fit()
    events = [(event["phase"], event["replayed"]) for event in run.trainer.recovery.events]
    assert events == [("capture", False), ("forward", False)]
    assert_the_same(run, eager)


LIBRARIES = [
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "CUDA driver error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
]


@pytest.mark.parametrize("cannot_be_ended", [False, True])
@pytest.mark.parametrize("words", LIBRARIES)
def test_a_library_without_memory_in_a_capture_leaves_eager_steps(
    tmp_path, monkeypatch, words, cannot_be_ended
):
    eager = Run(tmp_path / "eager", captured=False, epochs=2).fit()
    run = Run(tmp_path / "run", epochs=2)
    run.net.hook = raising_in_capture(RuntimeError(words))
    begun, reset, order = run.tape.capture, run.tape.reset_after_failed_capture, list[str]()

    def capture(*given: Any) -> Any:
        try:
            return begun(*given)
        finally:
            if cannot_be_ended:
                raise RuntimeError("operation failed due to a previous error during capture")

    run.tape.capture = capture
    run.tape.reset_after_failed_capture = lambda: (order.append("reset"), reset())[1]
    released = "expt.memory.recovery.recovery.release"
    monkeypatch.setattr(released, lambda device: order.append("released"))
    run.fit()
    assert run.rungs == [(WARM_STEPS, "eager")]
    assert run.trainer.recovery.events[0]["phase"] == "capture"
    # While the allocator believes in the capture, it refuses to release anything.
    assert order == ["reset", "released"]
    assert (run.tape.replays, run.tape.resets) == (0, 1)
    assert ["not enough memory to capture it" in line for line in run.said] == [True]
    assert_the_same(run, eager)


def test_what_cannot_be_reset_ends_the_run_and_is_said(tmp_path):
    run = Run(tmp_path)
    run.net.hook = raising_in_capture(RuntimeError(LIBRARIES[0]))

    def reset_after_failed_capture() -> None:
        raise UserError("run it again with trainer.compile=off")

    run.tape.reset_after_failed_capture = reset_after_failed_capture
    with pytest.raises(UserError, match=r"trainer\.compile=off"):
        run.trainer.fit()
    assert run.said == [], "no eager step is taken on a device that cannot be used"
    assert run.trainer.progress.step == WARM_STEPS


def raising_in_capture(error: Exception | None = None) -> Callable[[], None]:
    raised = itertools.count()
    words = "CUDA out of memory. Tried to allocate 2.00 MiB."

    def hook() -> None:
        if capturing() and next(raised) == 0:
            raise error or torch.OutOfMemoryError(words)

    return hook


def capturing() -> bool:
    return any(isinstance(mode, Recorded) for mode in _get_current_dispatch_mode_stack())


@pytest.mark.parametrize("at", ["the smaller batch", "evaluation"])
def test_a_captured_step_is_the_first_to_go_when_memory_is_short(tmp_path, at):
    eager = Run(tmp_path / "eager", captured=False).fit()
    run = Run(tmp_path / "run")
    calls = itertools.count()

    def hook() -> None:
        wanted = torch.is_grad_enabled() == (at == "the smaller batch")
        outside = run.captures == [True] and wanted
        if outside and next(calls) == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    run.net.hook = hook
    run.fit()
    assert [rung for _, rung in run.rungs] == ["eager"]
    assert run.captures == [True, False]
    assert run.trainer.recovery.techniques == Techniques()
    assert run.trainer.recovery.evaluation_batch_size is None
    assert 0 < run.tape.replays < 4
    assert_the_same(run, eager)


def test_other_techniques_are_captured_anew(tmp_path):
    eager = Run(tmp_path / "eager", captured=False, epochs=6).fit()
    run = Run(tmp_path / "run", epochs=6)
    fit_epoch = run.trainer._epoch
    epochs = itertools.count()

    def changed() -> Any:
        if next(epochs) == 3:
            ladder = run.trainer.recovery.ladder
            ladder.techniques = replace(ladder.techniques, gradient_accumulation=2)
        return fit_epoch()

    run.trainer._epoch = changed
    run.fit()
    assert run.captures == [True, False, True]
    assert (run.tape.warm, len(run.tape.graphs)) == (2 * WARM_STEPS, 2)
    assert_the_same(run, eager)


def test_a_resumed_run_forgets_what_refers_to_replaced_state(tmp_path):
    whole = Run(tmp_path / "whole", epochs=6).fit()
    cut = Run(tmp_path / "cut", epochs=6)
    cut.trainer.settings = replace(cut.trainer.settings, epochs=3)
    cut.fit()
    cut.trainer.settings = replace(cut.trainer.settings, epochs=6)
    assert cut.trainer.resume() == 3 * STEPS_PER_EPOCH
    assert not cut.trainer.steps.captured
    cut.fit()
    assert len(cut.tape.graphs) == 2
    assert_the_same(cut, whole)


@pytest.mark.parametrize(
    ("optimizer", "techniques", "scaler", "processes", "words"),
    [
        ((torch.optim.AdamW, {"fused": True}), Techniques(), None, 1, None),
        ((torch.optim.Adam, {"fused": True}), Techniques(True), None, 1, None),
        ((torch.optim.SGD, {"fused": True}), Techniques(), None, 1, None),
        ((torch.optim.AdamW, {}), Techniques(), None, 1, "optimizer=adamw"),
        ((torch.optim.Adafactor, {}), Techniques(), None, 1, "Adafactor reads"),
        ((torch.optim.AdamW, {"fused": True}), Techniques(), object(), 1, "memory.precision=bf16"),
        ((torch.optim.AdamW, {"fused": True}), Techniques(), None, 2, "2 processes"),
        (
            (torch.optim.AdamW, {"fused": True}),
            Techniques(saved_tensor_offload=True), None, 1, "saved_tensor_offload",
        ),
        (
            (torch.optim.AdamW, {"fused": True}),
            Techniques(optimizer_in_backward=True), None, 1, "optimizer_in_backward",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_captured_says_why(optimizer, techniques, scaler, processes, words):
    kind, options = optimizer
    made = kind([nn.Parameter(torch.zeros(1))], **options)
    reason = why_not_captured(made, techniques, scaler, processes)
    assert (reason is None) if words is None else (words in str(reason))


def test_compiled_checkpoints_are_not_captured():
    made = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], fused=True)
    saving = Techniques(activation_checkpointing=True)
    assert why_not_captured(made, saving) is None
    assert why_not_captured(made, Techniques(), compiled=True) is None
    assert "torch.compile" in str(why_not_captured(made, saving, compiled=True))


def test_an_optimizer_that_cannot_be_captured_trains_eagerly(tmp_path):
    options = {"lr": 1e-2}
    eager = Run(tmp_path / "eager", captured=False, options=options).fit()
    run = Run(tmp_path / "run", options=options).fit()
    assert (run.tape.warm, run.tape.replays, len(run.said)) == (0, 0, 1)
    assert_the_same(run, eager, tolerance=1e-12)


@pytest.mark.parametrize(
    ("how", "line"),
    [(Compile.auto, None), (Compile.off, None), (Compile.graph, "cpu has no CUDA graphs")],
)
def test_a_cpu_takes_eager_steps(tmp_path, how, line):
    run = Run(tmp_path, captured=False)
    said: list[str] = []
    trainer = run.trainer
    found = steps_for(
        how, trainer.train_step, trainer.model, trainer.optimizer, trainer.recovery, BATCH,
        say=said.append,
    )  # fmt: skip
    assert type(found) is Steps
    assert [line in one for one in said] == ([] if line is None else [True])
