"""Loops of other forms than one loss and one optimizer, for benchmarks of the plan.

Each entry makes a model, a batch, an optimizer (or several) and takes one step of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, ROWS = 512, 256


@dataclass(frozen=True)
class Loop:
    """Somebody's training step; `step(model, optimizer, batch)` is the whole of it."""

    model: Callable[[], nn.Module]
    batch: Callable[[], Any]
    optimizer: Callable[[list[nn.Parameter]], Any]
    step: Callable[[nn.Module, Any, Any], object]


class Pair(nn.Module):
    """A generator and a discriminator (Goodfellow et al., arXiv:1406.2661)."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.judge = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2), nn.Linear(WIDTH, 1))


def layers() -> nn.Module:
    return nn.Sequential(
        nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH), nn.GELU(),
        nn.Linear(WIDTH, 10),
    )  # fmt: skip


def rows() -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, WIDTH), torch.randint(10, (ROWS,))


def ordinary(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()
    optimizer.zero_grad()


def closed(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()


def read_out(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> float:
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def accumulated(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    for inputs, target in zip(batch[0].chunk(4), batch[1].chunk(4), strict=True):
        (F.cross_entropy(model(inputs), target) / 4).backward()
    optimizer.step()
    optimizer.zero_grad()


def penalised(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    inputs = batch[0].requires_grad_()
    output = model(inputs)
    (gradient,) = torch.autograd.grad(output.sum(), inputs, create_graph=True)
    (F.cross_entropy(output, batch[1]) + gradient.square().mean()).backward()
    optimizer.step()
    optimizer.zero_grad()


def sharpness_aware(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    """Two passes, at the weights and where the loss is worse (Foret et al., arXiv:2010.01412)."""
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    moved = []
    with torch.no_grad():
        for weight in model.parameters():
            move = 0.05 * weight.grad
            weight += move
            moved.append(move)
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    with torch.no_grad():
        for weight, move in zip(model.parameters(), moved, strict=True):
            weight -= move
    optimizer.step()
    optimizer.zero_grad()


def adversarial(model: Pair, optimizers: list[torch.optim.Optimizer], batch: Any) -> None:
    make, judge = optimizers
    fake = model.generator(torch.randn(ROWS, 64))
    real, false = model.judge(batch[0]), model.judge(fake.detach())
    ones, zeros = torch.ones_like(real), torch.zeros_like(false)
    loss = F.binary_cross_entropy_with_logits(real, ones)
    (loss + F.binary_cross_entropy_with_logits(false, zeros)).backward()
    judge.step()
    judge.zero_grad()
    F.binary_cross_entropy_with_logits(model.judge(fake), ones).backward()
    make.step()
    make.zero_grad()
    judge.zero_grad()


def halves(weights: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adam(weights[:4], 1e-4), torch.optim.Adam(weights[4:], 1e-4)]


def matrices(weights: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Muon takes matrices only; AdamW the rest."""
    return [
        torch.optim.Muon([w for w in weights if w.dim() == 2], 1e-4),
        torch.optim.AdamW([w for w in weights if w.dim() != 2], 1e-4),
    ]


def both(model: nn.Module, optimizers: list[torch.optim.Optimizer], batch: Any) -> None:
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def of(kind: str, **settings: Any) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return partial(getattr(torch.optim, kind), lr=1e-4, **settings)


class SparseTable(nn.Module):
    """A table with sparse gradients, and a head that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20_000, 64, sparse=True)
        self.head = nn.Linear(64, 10).requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).mean(1))


def ids() -> tuple[Tensor, Tensor]:
    return torch.randint(20_000, (ROWS, 32)), torch.randint(10, (ROWS,))


adam = of("Adam")
LOOPS: dict[str, Loop] = {
    **{
        f"{kind.lower()} {words}".strip(): Loop(layers, rows, of(kind, **settings), ordinary)
        for kind, words, settings in (
            ("Adam", "", {}), ("Adam", "amsgrad", {"amsgrad": True}),
            ("Adam", "foreach", {"foreach": True}), ("Adam", "fused", {"fused": True}),
            ("AdamW", "amsgrad foreach", {"amsgrad": True, "foreach": True}),
            ("Adagrad", "", {}), ("Adagrad", "foreach", {"foreach": True}),
            ("Adadelta", "", {}), ("Adadelta", "foreach", {"foreach": True}),
            ("Adamax", "", {}), ("NAdam", "", {}), ("NAdam", "foreach", {"foreach": True}),
            ("RAdam", "", {}), ("RMSprop", "", {}), ("RMSprop", "momentum", {"momentum": 0.9}),
            ("RMSprop", "centered foreach", {"centered": True, "foreach": True}),
            ("Rprop", "", {}), ("ASGD", "", {}), ("SGD", "", {}),
            ("SGD", "foreach", {"foreach": True}), ("Adafactor", "foreach", {"foreach": True}),
        )
    },
    "lbfgs": Loop(layers, rows, of("LBFGS", max_iter=4), closed),
    "sparse adam": Loop(
        SparseTable, ids,
        lambda weights: torch.optim.SparseAdam([w for w in weights if w.requires_grad], 1e-4),
        ordinary,
    ),
    "muon and adamw": Loop(layers, rows, matrices, both),
    "loss read": Loop(layers, rows, adam, read_out),
    "own accumulation": Loop(layers, rows, adam, accumulated),
    "gradient penalty": Loop(layers, rows, adam, penalised),
    "sharpness-aware": Loop(layers, rows, adam, sharpness_aware),
    "adversarial": Loop(Pair, rows, halves, adversarial),
}  # fmt: skip
