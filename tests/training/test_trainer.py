"""The loop on a tiny problem: accumulation, limits, resuming from any step, verdicts."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expt.config.schema import Device, Precision, Schedule, TrainerConfig
from expt.errors import BrokenStepError, ConfigError, DataError, RecoveryError, StorageError
from expt.files import replace_atomically
from expt.job import Batch, Metric
from expt.memory.measuring.meter import LedgerMeter
from expt.memory.recovery.recovery import Recovery
from expt.memory.techniques.techniques import Techniques
from expt.tracking.tracker import NullTracker
from expt.training.checkpoint import weights_sha256
from expt.training.device import make_fabric
from expt.training.display import SilentDisplay
from expt.training.interruption import Interruption
from expt.training.profiler import StepProfiler
from expt.training.ranks import OneRank
from expt.training.trainer import Trainer

NUM_TRAIN, NUM_VAL, WIDTH = 50, 10, 3


class Sums:
    """Mean absolute error over a split."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, prediction: Tensor, batch: Batch) -> None:
        self.total += float((prediction - batch.target).abs().sum())
        self.count += len(batch.target)

    def compute(self) -> dict[str, float]:
        return {"mae": self.total / self.count}


class Line:
    """y = x w + noise, with unequal weights, so that accumulation by means would show."""

    batch_size, eval_batch_size, metrics = 8, 4, (Metric("mae"),)

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(NUM_TRAIN + NUM_VAL, WIDTH, generator=generator)
        self.y = self.x.sum(dim=1) + 0.1 * torch.randn(len(self.x), generator=generator)
        self.observed = torch.rand(len(self.x), generator=generator) > 0.4

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
    def __init__(self, hook: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.hook = hook

    def forward(self, x: Tensor, observed: Tensor) -> Tensor:
        self.hook()
        return self.layers(x).squeeze(1)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Trainer]:
    """Build a trainer; `name` is its run directory, other arguments its settings."""

    def build(
        name: str = "run",
        accumulation: int = 1,
        dropout: bool = True,
        precision: Precision = Precision.fp32,
        hook: Callable[[], None] = lambda: None,
        interruption: Interruption | None = None,
        data: Any = None,
        **settings: Any,
    ) -> Trainer:
        fabric = make_fabric(Device.cpu, precision)
        fabric.seed_everything(0, verbose=False)
        model = Net(hook)
        if not dropout:
            model.layers[1].p = 0.0
        model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        return Trainer(
            fabric=fabric,
            model=model,
            optimizer=optimizer,
            data=data or Line(),
            settings=TrainerConfig(**{"epochs": 3, "log_every_steps": 1, **settings}),
            recovery=Recovery(Techniques(accumulation), fabric.device),
            meter=LedgerMeter(),
            tracker=NullTracker(),
            display=SilentDisplay(),
            interruption=interruption or Interruption(),
            profiler=StepProfiler(),
            run_dir=tmp_path / name,
        )

    return build


def test_an_epoch_uses_every_sample_once_and_the_last_batch_is_smaller(make):
    trainer = make(epochs=1)
    seen: list[int] = []
    step = trainer.train_step
    trainer.steps.run = lambda samples: (seen.extend(samples.indices.tolist()), step(samples))[1]
    outcome = trainer.fit()
    assert (outcome.status, outcome.reason, outcome.step) == ("completed", "epochs", 7)
    assert sorted(seen) == list(range(NUM_TRAIN))


def test_what_the_data_say_of_themselves_comes_first(make, monkeypatch, capsys):
    make("silent", epochs=1).fit()
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(Line, "describe", lambda self: "data: a line", raising=False)
    make(epochs=1).fit()
    assert capsys.readouterr().out == "data: a line\n"


def test_two_epochs_have_different_orders_but_the_same_ones_for_a_seed(make):
    def order(epoch: int, **settings: Any) -> list[int]:
        batches = make(**settings).batches.training(epoch, 0, 7)
        return torch.cat([samples.indices for samples in batches]).tolist()

    assert order(0) != order(1) == order(1)
    assert order(0) != order(0, seed=1)
    assert order(1, repeat_first_epoch=True) == order(0)


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_accumulation_does_not_change_the_mathematics(make, parts):
    whole, split = make("a", dropout=False), make("b", accumulation=parts, dropout=False)
    whole.fit()
    split.fit()
    for one, other in zip(whole.model.parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(make):
    hashes = []
    for name, seed in (("a", 0), ("b", 0), ("c", 5)):
        trainer = make(name, seed=seed)
        trainer.fit()
        hashes.append(weights_sha256(trainer.model))
    assert hashes[0] == hashes[1] != hashes[2]


class KilledError(Exception):
    """Stands for kill -9: nothing after it runs."""


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.fp16])
@pytest.mark.parametrize("at", [3, 6, 7, 8, 13])
@pytest.mark.parametrize("ema_decay", [None, 0.8])
def test_a_killed_run_resumes_to_the_same_weights(make, at, precision, ema_decay):
    settings = {"checkpoint_every_steps": 2, "precision": precision, "ema_decay": ema_decay}
    undisturbed = make("whole", **settings)
    undisturbed.fit()
    calls = 0

    def kill() -> None:
        nonlocal calls
        calls += torch.is_grad_enabled()
        if calls > at:
            raise KilledError

    killed = make("cut", hook=kill, **settings)
    with pytest.raises(KilledError):
        killed.fit()
    again = make("cut", **settings)
    step = again.resume()
    assert step == (at // 2 * 2 if at % 7 else at)
    torch.manual_seed(999)  # what resume restored must be what counts
    again.resume()
    outcome = again.fit()
    assert outcome.reason == "epochs"
    assert weights_sha256(again.model) == weights_sha256(undisturbed.model)
    losses = [
        [row[k] for k in ("epoch", "step", "loss", "val", "rate")] for row in again.progress.history
    ]
    expected = [
        [row[k] for k in ("epoch", "step", "loss", "val", "rate")]
        for row in undisturbed.progress.history
    ]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


@pytest.mark.parametrize("steps", [10, 12, 14])
def test_killed_in_the_last_validation_still_validates_after_the_resume(make, steps):
    whole = make("whole", max_steps=steps, checkpoint_every_steps=2)
    expected = whole.fit()

    def kill() -> None:
        if not torch.is_grad_enabled() and cut.progress.step == steps:
            raise KilledError

    cut = make("cut", max_steps=steps, checkpoint_every_steps=2, hook=kill)
    with pytest.raises(KilledError):
        cut.fit()
    again = make("cut", max_steps=steps, checkpoint_every_steps=2)
    assert again.resume() == steps
    assert again.fit() == expected
    assert weights_sha256(again.model) == weights_sha256(whole.model)
    assert [row["val"] for row in again.progress.history] == [
        row["val"] for row in whole.progress.history
    ]


def test_nothing_to_resume_starts_afresh(make):
    assert make().resume() == 0


def test_resuming_with_another_model_is_a_clear_message(make):
    trainer = make(epochs=1)
    trainer.fit()
    other = make(epochs=1)
    other.model.layers[0] = nn.Linear(WIDTH, 9)
    with pytest.raises(ValueError, match=r"trainer\.resume.*does not fit"):
        other.resume()


def test_resuming_on_other_data_is_told(make, capsys):
    first = make(max_steps=7)
    first.recipe = {"fingerprint": "old"}
    first.fit()
    stored = torch.load(first.folder / "last.pt")
    for known in ("old", ""):  # an earlier version kept it beside the best weights alone
        stored["progress"]["data"] = known
        torch.save(stored, first.folder / "last.pt")
        for fingerprint in ("old", "new"):
            again = make()
            again.recipe = {"fingerprint": fingerprint}
            assert again.resume() == 7
            said = capsys.readouterr().out
            assert ("the data, or how they are divided, have changed" in said) is (
                fingerprint == "new"
            )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_max_steps_counts_optimizer_steps_and_still_validates(make, accumulation):
    trainer = make(max_steps=10, accumulation=accumulation)
    outcome = trainer.fit()
    assert (outcome.status, outcome.reason, outcome.step) == ("completed", "max_steps", 10)
    assert [row["step"] for row in trainer.progress.history] == [7, 10]


def test_epochs_come_first_when_they_are_fewer(make):
    assert make(max_steps=1000, epochs=1).fit().reason == "epochs"


def test_the_time_limit_ends_a_run_as_completed(make):
    outcome = make(time_limit_seconds=1e-9).fit()
    assert (outcome.status, outcome.reason, outcome.step) == ("completed", "time_limit", 1)


def test_early_stopping_counts_epochs_without_a_better_validation(make):
    trainer = make(epochs=50, early_stopping_patience=2, schedule=Schedule.constant)
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0
    trainer._base_rates = [0.0]
    outcome = trainer.fit()
    assert (outcome.reason, trainer.progress.epoch) == ("early_stopping", 3)


def test_a_signal_saves_and_stops_and_the_rest_can_be_resumed(make):
    whole = make("whole")
    whole.fit()
    with Interruption() as interruption:
        calls = 0

        def interrupt() -> None:
            nonlocal calls
            calls += 1
            if calls == 5:
                signal.raise_signal(signal.SIGTERM)

        stopped = make("cut", hook=interrupt, interruption=interruption)
        outcome = stopped.fit()
    assert (outcome.status, outcome.reason, outcome.step) == ("stopped", "signal", 5)
    again = make("cut")
    assert again.resume() == 5
    again.fit()
    assert weights_sha256(again.model) == weights_sha256(whole.model)


def test_a_signal_during_validation_loses_nothing(make):
    whole = make("whole")
    whole.fit()
    with Interruption() as interruption:

        def interrupt() -> None:
            if not torch.is_grad_enabled():
                signal.raise_signal(signal.SIGINT)

        outcome = make("cut", hook=interrupt, interruption=interruption).fit()
    assert (outcome.status, outcome.step) == ("stopped", 7)
    again = make("cut")
    again.resume()
    again.fit()
    assert weights_sha256(again.model) == weights_sha256(whole.model)
    assert [row["val"] for row in again.progress.history] == [
        row["val"] for row in whole.progress.history
    ]


def test_a_non_finite_loss_stops_before_a_checkpoint_is_spoilt(make, tmp_path):
    trainer = make(checkpoint_every_steps=1)
    calls = 0

    def spoil() -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            with torch.no_grad():
                trainer.model.layers[0].weight.fill_(float("nan"))

    trainer.model.hook = spoil
    outcome = trainer.fit()
    assert (outcome.status, outcome.reason, outcome.step) == ("failed", "non_finite_loss", 4)
    saved = torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)
    assert saved["progress"]["step"] == 3
    assert all(torch.isfinite(weight).all() for weight in saved["model"].values())


def test_a_weight_without_elements_is_finite(make):
    trainer = make()
    trainer.model.nothing = nn.Parameter(torch.zeros(0))
    assert trainer._weights_finite()


def test_weights_that_the_last_update_of_an_epoch_spoilt_are_not_saved_by_a_stop(make, tmp_path):
    with Interruption() as interruption:

        def interrupt() -> None:
            if not torch.is_grad_enabled():
                signal.raise_signal(signal.SIGINT)

        trainer = make(hook=interrupt, interruption=interruption, checkpoint_every_steps=2)
        calls = 0

        def spoil(gradient: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return gradient * float("nan") if calls == 7 else gradient

        trainer.model.layers[0].weight.register_hook(spoil)
        assert trainer.fit().reason == "non_finite_loss"
    saved = torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)
    assert saved["progress"]["step"] == 6


@pytest.mark.parametrize("stopped", [False, True])
def test_an_update_that_spoils_the_weights_is_not_saved(make, tmp_path, stopped):
    """The loss of that step was finite: it was computed before."""
    with Interruption() as interruption:
        trainer = make(checkpoint_every_steps=1, interruption=interruption)
        calls = 0

        def spoil(gradient: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 4 and stopped:
                signal.raise_signal(signal.SIGTERM)
            return gradient * float("nan") if calls == 4 else gradient

        trainer.model.layers[0].weight.register_hook(spoil)
        outcome = trainer.fit()
    assert (outcome.status, outcome.reason, outcome.step) == ("failed", "non_finite_loss", 4)
    saved = torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)
    assert saved["progress"]["step"] == 3
    assert all(torch.isfinite(weight).all() for weight in saved["model"].values())


def test_a_run_that_is_extended_does_the_rest_of_the_epoch_in_which_it_ended(make):
    constant = {"schedule": Schedule.constant}
    whole = make("whole", **constant)
    whole.fit()
    make("cut", max_steps=10, **constant).fit()
    again = make("cut", max_steps=21, **constant)
    assert again.resume(extending=True) == 10
    assert again.fit().step == 21
    assert weights_sha256(again.model) == weights_sha256(whole.model)
    rows = [[row[k] for k in ("epoch", "step", "loss", "val")] for row in whole.progress.history]
    again_rows = [
        [row[k] for k in ("epoch", "step", "loss", "val")] for row in again.progress.history
    ]
    assert [row[:2] for row in again_rows] == [[1, 7], [2, 14], [3, 21]]
    np.testing.assert_allclose(again_rows, rows, rtol=1e-6)


def test_a_run_that_ended_with_its_epoch_begins_the_next_when_it_is_extended(make):
    make("cut", max_steps=14).fit()
    again = make("cut", max_steps=21)
    assert again.resume(extending=True) == 14
    assert (again.progress.epoch, again.progress.step_in_epoch) == (2, 0)


def test_the_best_epoch_is_chosen_by_one_metric(make):
    make(epochs=1, data=Scripted([0.5])).fit()
    other = make(epochs=2, data=Scripted([0.5]), monitor="mae")
    with pytest.raises(ConfigError, match=r"best epoch by accuracy, .* trainer\.monitor=accuracy"):
        other.resume()


def test_of_several_processes_one_that_cannot_read_does_not_wait_for_the_others(make, monkeypatch):
    trainer = make()

    def broken(*place: int) -> Any:
        raise DataError("clip 7 cannot be read")
        yield

    monkeypatch.setattr(OneRank, "count", 2)
    monkeypatch.setattr(trainer.batches, "training", broken)
    monkeypatch.setattr(trainer, "_save_last", lambda: pytest.fail("the others are in the step"))
    trainer.recovery.limits = replace(trainer.recovery.limits, enabled=False)
    with pytest.raises(DataError, match="clip 7"):
        trainer.fit()


def test_of_several_processes_one_that_lacks_memory_alone_says_so_to_all(make, monkeypatch):
    def lacking(*arguments: Any) -> None:
        trainer.recovery.alone = True
        raise RecoveryError("memory ran out in evaluation, and nothing is left")

    monkeypatch.setattr("expt.training.trainer.evaluate", lacking)
    trainer = make("one")
    assert trainer.fit().reason == "out_of_memory"
    monkeypatch.setattr(OneRank, "count", 2)
    trainer = make("two")
    with pytest.raises(RecoveryError, match="in evaluation"):
        trainer.fit()


def test_going_back_enters_the_stage_anew(make):
    """Or the state of what it does not train stays in the optimizer."""
    trainer = make(trainable={0: ["layers.0.*"], 1: ["layers.2.*"]}, epochs=2)
    run, broken = trainer.steps.run, [False]

    def step(samples: Any) -> Any:
        if trainer.progress.step == 8 and not broken[0]:
            broken[0] = True
            raise BrokenStepError("it had begun to write")
        return run(samples)

    trainer.steps.run = step
    assert trainer.fit().reason == "epochs"
    assert broken[0]
    first = trainer.model.layers[0].weight
    state = getattr(trainer.optimizer, "optimizer", trainer.optimizer).state
    assert not state.get(first), "it is not trained, and takes no memory"


def test_a_full_disk_stops_with_the_last_checkpoint_intact(make, tmp_path, monkeypatch):
    import errno

    from expt.training import checkpoint

    trainer = make(checkpoint_every_steps=2)
    writes = 0

    def limited(path: Path, write: Callable[[Path], None], durable: bool = True) -> None:
        def fail(temporary: Path) -> None:
            temporary.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(temporary))

        nonlocal writes
        writes += 1
        # The first is the state before the first step.
        replace_atomically(path, write if writes <= 2 else fail, durable)

    monkeypatch.setattr(checkpoint, "replace_atomically", limited)
    with pytest.raises(StorageError, match=r"No space left.*intact"):
        trainer.fit()
    monkeypatch.undo()
    assert make().resume() == 2
    previous = torch.load(tmp_path / "run/checkpoints/previous.pt", weights_only=True)
    assert previous["progress"]["step"] == 0, "it is another one than the last"
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


def test_progress_json_says_where_the_run_is(make, tmp_path):
    make(max_steps=9).fit()
    seen = json.loads((tmp_path / "run/checkpoints/progress.json").read_text())
    assert (seen["step"], seen["epoch"]) == (9, 2)
    assert seen["val/mae"] > 0


def test_clipping_bounds_the_step(make):
    norms = []
    for limit in (None, 1e-3):
        trainer = make(str(limit), gradient_clip_norm=limit)
        clip = trainer._clip_gradients

        def spy(trainer: Trainer = trainer, clip: Callable[[], None] = clip) -> None:
            clip()
            grads = [weight.grad.norm() for weight in trainer.model.parameters()]
            norms.append(float(torch.stack(grads).norm()))

        trainer._clip_gradients = spy
        trainer.train_step(trainer.batches.of(torch.arange(8)))
    assert norms[0] > 1e-2
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)


def test_peak_memory_is_measured_and_survives_a_resume(make):
    trainer = make(epochs=1)
    trainer.fit()
    weights = sum(weight.numel() * 4 for weight in trainer.model.parameters())
    peak = trainer.meter.peak_allocated_bytes()
    assert peak > 4 * weights  # weights, gradients, two moments
    again = make(epochs=1)
    again.resume()
    assert again.meter.peak_allocated_bytes() == peak


def test_the_peak_has_the_average_of_the_weights_in_it(make, monkeypatch):
    # What the allocator tells of a step is, in so small a model, of the size of the average.
    monkeypatch.setattr("expt.memory.measuring.meter.can_be_watched", lambda: False)
    peaks = []
    for decay in (None, 0.9):
        trainer = make(f"run_{decay}", epochs=1, ema_decay=decay)
        trainer.fit()
        peaks.append(trainer.meter.peak_allocated_bytes())
    weights = sum(weight.numel() * 4 for weight in trainer.model.parameters())
    assert peaks[1] - peaks[0] == weights


@pytest.mark.parametrize("parts", [3, 5, 8, 20])
def test_a_batch_is_cut_into_as_many_parts_as_were_asked_for(make, parts):
    sizes: list[int] = []
    trainer = make(accumulation=parts)
    gather = trainer.data.gather
    trainer.data.gather = lambda split, at: (sizes.append(len(at)), gather(split, at))[1]
    trainer.train_step(trainer.batches.of(torch.arange(8)))
    assert len(sizes) == min(parts, 8)
    assert sum(sizes) == 8
    assert max(sizes) - min(sizes) <= 1


class Scripted(Line):
    """Line, whose validations come out as they are told to."""

    metrics = (Metric("accuracy", goal="max"), Metric("mae"))

    def __init__(self, figures: list[float]) -> None:
        super().__init__()
        self.figures = iter(figures)

    def accumulator(self) -> Any:
        data = self

        class Told(Sums):
            def compute(self) -> dict[str, float]:
                value = next(data.figures)
                return {"accuracy": value, "mae": value}

        return Told()


@pytest.mark.parametrize("kind", [np.float64, np.float32, torch.tensor])
def test_figures_of_any_kind_are_kept_as_numbers(make, tmp_path, kind) -> None:
    trainer = make(epochs=1, data=Scripted([kind(0.5)]))
    trainer.fit()
    stored = torch.load(tmp_path / "run/checkpoints/best.pt", weights_only=True)
    assert type(stored["val"]) is float
    assert stored["val"] == 0.5


@pytest.mark.parametrize("figure", [[0.5, 0.6], torch.ones(2), None, np.ones(2)])
def test_a_figure_that_is_no_number_is_said(make, figure) -> None:
    with pytest.raises(DataError, match="compute must return a number by each name"):
        make(epochs=1, data=Scripted([figure])).fit()


@pytest.mark.parametrize(
    ("monitor", "best", "reason"), [(None, (0.9, 2), "early_stopping"), ("mae", (0.2, 4), "epochs")]
)
def test_what_is_best_follows_the_goal_of_the_metric(make, tmp_path, monitor, best, reason):
    trainer = make(
        epochs=5, monitor=monitor, early_stopping_patience=2,
        data=Scripted([0.5, 0.9, 0.4, 0.2] if monitor is None else [0.5, 0.4, 0.6, 0.2, 0.3]),
    )  # fmt: skip
    ending = trainer.fit()
    assert (trainer.progress.best, trainer.progress.best_epoch) == best
    assert ending.reason == reason
    stored = torch.load(tmp_path / "run/checkpoints/best.pt", weights_only=True)
    assert (stored["val"], stored["epoch"]) == best


class Points(NullTracker):
    """Remembers every point."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, int], float] = {}

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.found |= {(name, step): value for name, value in values.items()}


def test_an_epoch_is_recorded_before_it_is_saved_and_alike_when_it_is_done_again(make, monkeypatch):
    class KilledError(BaseException):
        pass

    def killed(trainer: Trainer) -> None:
        if trainer.progress.epoch == 2:
            raise KilledError
        save(trainer)

    save = Trainer._save_last
    first, second = Points(), Points()
    trainer = make()
    trainer.tracker = first
    with monkeypatch.context() as patched, pytest.raises(KilledError):
        patched.setattr(Trainer, "_save_last", killed)
        trainer.fit()
    assert ("val/mae", 14) in first.found
    trainer = make()
    trainer.tracker = second
    assert trainer.resume() == 7
    trainer.fit()
    redone = {point for point in first.found if point[1] > 7}
    names = ("train/loss", "train/loss_step", "val/mae", "best/val/mae", "learning_rate")
    assert {point[0] for point in redone} > set(names)
    for name, step in redone:
        if name in names:
            assert second.found[name, step] == first.found[name, step], name
