"""A training step with its prediction, to be measured: one of ours, or of a model not ours."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import make_trainer, settings_for
from foreign_loops import Loop
from foreign_models import ForeignModel
from torch import Tensor, nn

Part = Callable[[], object]


@dataclass(frozen=True)
class PlannedStep:
    """A prediction, and what it is of: `parts` in order, of which the first trains."""

    predicted: Any
    parts: tuple[Part, ...]
    live: tuple[Callable[[], list[Tensor]], ...]  # what is held before each part


def ours(overrides: list[str], device: str) -> PlannedStep:
    """Return an eager training step and a batch of evaluation of one of our configurations.

    It is planned before the device is touched.
    """
    from expt.run.build import build
    from expt.run.planner import plan_training
    from expt.training.batches import kept_on_device

    settings = settings_for(*overrides)
    target: Any = device
    predicted = plan_training(settings, build(settings, "data"), target)
    given = [line for line in overrides if not line.startswith("trainer.device=")]
    trainer = make_trainer(*given, f"trainer.device={device}", "trainer.compile=off")
    data = trainer.data
    train = trainer.batches.of(torch.arange(min(data.batch_size, data.size("train"))))
    count = min(data.eval_batch_size, data.size("val"))
    val = next(trainer.batches.evaluation("val", count))
    # Of streamed samples those at hand are alive; the batch of the other part is not, in a run.
    held = {id(samples): samples.on_host() for samples in (train, val)}

    def evaluate() -> None:
        trainer.model.eval()
        with torch.no_grad():
            batch = val.batch()
            data.accumulator().update(trainer.model(**batch.inputs), batch)
        trainer.model.train()

    def live(samples: Any) -> list[Tensor]:
        kept = kept_on_device(data) + held[id(samples)]
        return [*kept, *state(trainer.model, trainer.optimizer)]

    parts = (lambda: trainer.train_step(train), evaluate)
    return PlannedStep(predicted, parts, (partial(live, train), partial(live, val)))


def foreign(
    made: ForeignModel,
    precision: str,
    size: int,
    optimizer_fn: Callable[..., torch.optim.Optimizer],
    device: str,
) -> PlannedStep:
    """Return a training step of a model from elsewhere, planned before the device is touched."""
    from expt.memory.planning.predict import plan

    predicted = plan(
        made.model,
        lambda: made.batch(size),
        optimizer_fn,
        made.loss,
        target=device,  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
        holds_outputs=False,  # what `step` makes is gone when it returns
    )
    model = made.model().to(device)
    optimizer = optimizer_fn(list(model.parameters()))

    def forward(x: Tensor) -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            output = model(x)
        if isinstance(output, Tensor):
            return output.float()
        output.logits = output.logits.float()
        return output

    def step() -> None:
        inputs, target = made.batch(size)
        made.loss(forward, (inputs.to(device), target.to(device))).backward()
        optimizer.step()
        optimizer.zero_grad()

    return PlannedStep(predicted, (step,), (lambda: state(model, optimizer),))


def loop(made: Loop) -> PlannedStep:
    """Return a step of any form, planned for the CPU."""
    from expt.memory.planning.predict import plan

    predicted = plan(
        made.model, made.batch, made.optimizer, step_fn=made.step, target="cpu",
        holds_outputs=False,
    )  # fmt: skip
    model = made.model()
    optimizer = made.optimizer(list(model.parameters()))
    optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    return PlannedStep(
        predicted,
        (lambda: made.step(model, optimizer, made.batch()),),
        (lambda: state(model, *optimizers),),
    )


def state(model: nn.Module, *optimizers: torch.optim.Optimizer) -> list[Tensor]:
    slots = [tensors(slot) for optimizer in optimizers for slot in optimizer.state.values()]
    return [*model.parameters(), *model.buffers(), *itertools.chain(*slots)]


def tensors(values: Any) -> list[Tensor]:
    if isinstance(values, dict):
        return list(itertools.chain(*(tensors(value) for value in values.values())))
    if isinstance(values, list | tuple):  # LBFGS keeps lists
        return list(itertools.chain(*(tensors(value) for value in values)))
    return [values] if isinstance(values, Tensor) else []
