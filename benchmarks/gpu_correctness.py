"""Is the fast path right: against eager steps, and against the CPU.

Distances are relative, over all weights together: |a - b| / |b|. Steps that are equal to rounding
drift apart slowly, since rounding errors are trained on.
"""

from __future__ import annotations

from typing import Any

import torch
from common import do_step, make_trainer
from torch import Tensor

from expt.memory.techniques.techniques import apply
from expt.training.batches import Samples

CASES: dict[str, tuple[str, ...]] = {
    "fp32": ("memory.precision=fp32",),
    "fp32, accumulation 2": ("memory.precision=fp32", "memory.gradient_accumulation=2"),
    "fp32, checkpointing": ("memory.precision=fp32", "memory.activation_checkpointing=true"),
    "fp32, averaged weights": ("memory.precision=fp32", "trainer.ema_decay=0.99"),
    "bf16": ("memory.precision=bf16",),
}
"""Without dropout: with it, checkpointed and compiled blocks draw other numbers than eager ones."""


def against_eager(how: str, case: str, device: str, steps: int, *small: str) -> dict[str, Any]:
    """Train `steps` steps eagerly and as `trainer.compile=HOW`; return how far they are apart."""
    given = [*common(device), *CASES[case], *small]
    eager = trained([*given, "trainer.compile=off"], steps)
    fast = trained([*given, f"trainer.compile={how}"], steps)
    return {
        "how": how,
        "case": case,
        "steps": steps,
        "captured": bool(getattr(fast["trainer"].steps, "captured", False)),
        "said": fast["said"],
        "weights_distance": distance(fast["weights"], eager["weights"]),
        "largest_loss_difference": max(
            abs(one - other) for one, other in zip(fast["losses"], eager["losses"], strict=True)
        ),
        "last_loss": eager["losses"][-1],
    }


def with_dropout(how: str, device: str, steps: int, *small: str) -> dict[str, Any]:
    """Compare mean losses with dropout: the numbers drawn may differ, what is learnt may not."""
    found = {}
    for name, extra in {"plain": (), "checkpointed": CASES["fp32, checkpointing"]}.items():
        given = [*common(device), "memory.precision=fp32", *extra, *small, "model.dropout=0.1"]
        given = list(dict.fromkeys(given))
        for kind in ("off", how):
            losses = trained([*given, f"trainer.compile={kind}"], steps)["losses"]
            found[f"{name}, {kind}"] = sum(losses[steps // 2 :]) / (steps - steps // 2)
    return {"how": how, "steps": steps, "mean_loss_of_second_half": found}


def against_cpu(device: str, steps: int, *small: str) -> dict[str, Any]:
    """Train eagerly on the device and on the CPU with the same order; return the distance."""
    exact = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        runs = [
            trained([*common(at), *CASES["fp32"], *small, "trainer.compile=off"], steps)
            for at in (device, "cpu")
        ]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = exact
    return {"steps": steps, "weights_distance": distance(runs[0]["weights"], runs[1]["weights"])}


def common(device: str) -> list[str]:
    """Return minimal at 207 sensors without dropout."""
    return ["+memory=minimal", "data=metr_la_week", "model.dropout=0", f"trainer.device={device}"]


def trained(overrides: list[str], steps: int) -> dict[str, Any]:
    """Take `steps` steps of a run; return the trainer, its weights on the host, and every loss.

    `said` is why steps were not taken as asked for, if they were not.
    """
    keys = [line.partition("=")[0] for line in overrides]
    last = [line for n, line in enumerate(overrides) if keys[n] not in keys[n + 1 :]]
    trainer = make_trainer(*last, apply=apply)
    said: list[str] = []
    listen(trainer, said)
    trainer.model.train()
    losses = []
    for number, samples in enumerate(order(trainer, steps)):
        trainer._set_rate(number / steps)
        loss, _ = do_step(trainer, samples)
        trainer.average.update(number)
        losses.append(loss.detach().clone())
    weights = [weight.detach().cpu() for weight in trainer.model.parameters()]
    values = torch.stack(losses).tolist()
    return {"trainer": trainer, "weights": weights, "losses": values, "said": said}


def listen(trainer: Any, said: list[str]) -> None:
    """Let `said` get what a trainer says about staying eager."""
    for part in (trainer.steps, trainer.steps.run, getattr(trainer.steps, "function", None)):
        if hasattr(part, "_say"):
            part._say = said.append


def order(trainer: Any, steps: int) -> list[Samples]:
    """Return the samples of so many steps, epoch after epoch, as a run takes them."""
    batches: list[Samples] = []
    epoch = 0
    while len(batches) < steps:
        batches += trainer.batches.training(epoch, 0, steps - len(batches))
        epoch += 1
    return batches[:steps]


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return |ours - theirs| / |theirs| over all weights."""
    one, other = (
        torch.cat([part.double().flatten() for part in parts]) for parts in (ours, theirs)
    )
    return float((one - other).norm() / other.norm())
