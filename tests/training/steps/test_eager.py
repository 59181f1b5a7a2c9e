"""No step, and nothing around it, waits for the device: read values are what would make it wait."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from expt.config.schema import Device, Precision, TrainerConfig
from expt.jobs.traffic.alternating import Alternating
from expt.jobs.traffic.data import TrafficData
from expt.memory.measuring.meter import LedgerMeter
from expt.memory.recovery.recovery import Recovery
from expt.memory.techniques.techniques import Techniques
from expt.tracking.tracker import NullTracker
from expt.training.device import make_fabric
from expt.training.display import SilentDisplay
from expt.training.evaluate import evaluate
from expt.training.interruption import Interruption
from expt.training.profiler import StepProfiler
from expt.training.trainer import Trainer

WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal",
    "aten::masked_select", "aten::_unique2", "aten::repeat_interleave.Tensor",
    "aten::unique_consecutive", "aten::bincount",
}  # fmt: skip
"""Operators after which the host of a GPU waits: their values or shapes are read."""


class Waits(TorchDispatchMode):
    """Counts operators that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name in WAITING:
            self.seen[name] += 1
        if name.startswith("aten::index") and any(
            isinstance(leaf, Tensor) and leaf.dtype is torch.bool for leaf in tree_leaves(args[1:])
        ):
            self.seen[f"{name} by a mask"] += 1
        return func(*args, **(kwargs or {}))


def make(tmp_path: Any, precision: Precision = Precision.fp32, **settings: Any) -> Trainer:
    data = TrafficData(
        "expt://metr_la_week.npz",
        None,
        "",
        207,
        12,
        12,
        2,
        2,
        0.7,
        0.2,
        "mph",
    )
    fabric = make_fabric(Device.cpu, precision)
    fabric.seed_everything(0, verbose=False)
    model = Alternating(
        **{key: data.model_arguments()[key] for key in ("num_sensors", "input_steps", "horizon")},
        steps_per_day=288, embed_dim=8, num_heads=2, num_layers=1, num_stages=2,
        patch_sizes=[1, 2], cross_stage_attention=True, ffn_ratio=2, dropout=0.1,
        sensor_dropout=0.1,
    )  # fmt: skip
    wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), fused=True))
    return Trainer(
        fabric=fabric,
        model=wrapped,
        optimizer=optimizer,
        data=data,
        settings=TrainerConfig(
            **{"epochs": 1, "eval_batches": 2, "checkpoint_every_steps": None, **settings}
        ),
        recovery=Recovery(Techniques(gradient_accumulation=2), fabric.device),
        meter=LedgerMeter(),
        tracker=NullTracker(),
        display=SilentDisplay(),
        interruption=Interruption(),
        profiler=StepProfiler(),
        run_dir=tmp_path,
    )


def test_the_counter_counts() -> None:
    x = torch.arange(3.0)
    with Waits() as waits:
        float(x[0])
        x[x > 1]
        x[torch.tensor([0, 1])]
        if x.sum() > 0:
            x.nonzero()
    assert waits.seen["aten::_local_scalar_dense"] + waits.seen["aten::is_nonzero"] == 2
    assert waits.seen["aten::nonzero"] >= 1
    assert sum(waits.seen.values()) >= 4


def do_step(trainer: Trainer, samples: Any) -> Any:
    return trainer.recovery.step(trainer.steps.run, samples, len(samples))


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
def test_a_step_waits_for_nothing(tmp_path, precision) -> None:
    trainer = make(tmp_path, precision, ema_decay=0.9)
    samples = trainer.batches.of(torch.arange(4))
    do_step(trainer, samples)
    total = torch.zeros(())
    with Waits() as waits:
        for number in range(3):
            trainer._set_rate(number / 10)
            trainer.recovery.position = (number, 0)
            loss, weight = do_step(trainer, samples)
            trainer.average.update(number)
            total += loss * weight
    assert not waits.seen
    assert total > 0


def test_evaluation_waits_for_nothing_but_its_figures(tmp_path) -> None:
    trainer = make(tmp_path)
    with Waits() as waits:
        metrics = evaluate(trainer.model, trainer.batches, "val", trainer.meter, max_batches=3)
    assert not waits.seen
    assert metrics is not None
    assert metrics.compute()["mae"] > 0


def test_an_epoch_reads_as_often_however_long_it_is(tmp_path) -> None:
    found = []
    for steps in (3, 9):
        trainer = make(tmp_path / str(steps), steps_per_epoch=steps, log_every_steps=2)
        with Waits() as waits:
            trainer.fit()
        found.append(waits.seen)
    assert found[0] == found[1]
