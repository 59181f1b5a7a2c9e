"""Loops of every form, and what is said where one of the given functions is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expt.errors import UserError
from expt.memory import Plan, plan

Adam = partial(torch.optim.Adam, lr=1e-3)
SGD = partial(torch.optim.SGD, lr=1e-3)
WIDTH = 128
LAYER = (WIDTH * WIDTH + WIDTH) * 4

pytestmark = pytest.mark.usefixtures("unfrozen")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def deep() -> nn.Module:
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(5)])


def floats(rows: int = 512) -> Callable[[], Tensor]:
    return lambda: torch.randn(rows, WIDTH)


def squares(forward: Callable[..., Tensor], batch: Tensor) -> Tensor:
    return forward(batch).square().mean()


def predict(
    model: Callable[[], nn.Module] = mlp,
    batch: Callable[[], Any] | None = None,
    optimizer: Callable[..., Any] = Adam,
    loss: Callable[..., Any] | None = squares,
    **settings: Any,
) -> Plan:
    return plan(model, batch or floats(), optimizer, loss, **{"target": "cpu", **settings})


class Partly(nn.Module):
    """Half of its weights take no part."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.other = nn.Linear(WIDTH, 8), nn.Linear(4 * WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_weights_without_a_gradient_get_no_state(measured) -> None:
    planned = predict(Partly)
    assert planned.by_category["optimizer_state"] == 2 * (WIDTH * 8 + 8) * 4 + 2 * 4
    assert planned.peak_bytes == pytest.approx(measured(Partly, floats(), Adam, squares), rel=0.01)


def sparse() -> nn.Module:
    return nn.Embedding(5000, 32, sparse=True)


def matrices() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 64, bias=False))


@pytest.mark.parametrize(
    ("model", "batch", "optimizer"),
    [
        (mlp, floats(), partial(torch.optim.Adam, amsgrad=True)),
        (matrices, floats(), torch.optim.Muon),
        (sparse, lambda: torch.arange(600).repeat(2), torch.optim.SparseAdam),
        (sparse, lambda: torch.arange(600).repeat(2), SGD),
    ],
)
def test_optimizers_make_their_own_state(measured, model, batch, optimizer) -> None:
    planned = predict(model, batch, optimizer)
    assert planned.method == "trace", planned.notes
    peak = measured(model, batch, optimizer, squares)
    assert planned.peak_bytes == pytest.approx(peak, rel=0.01)


class Sharpness(torch.optim.Optimizer):
    """A second forward and backward pass inside `step`, away from the weights."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        super().__init__(weights, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        assert closure is not None, "a closure is needed"
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight]["old"] = weight.clone()
                weight.add_(weight.grad, alpha=0.05)
        with torch.enable_grad():
            closure()
        for group in self.param_groups:
            for weight in group["params"]:
                weight.copy_(self.state[weight]["old"]).sub_(weight.grad, alpha=0.1)


def test_an_optimizer_that_asks_for_a_closure_gets_one() -> None:
    planned = predict(optimizer=Sharpness)
    assert planned.method == "trace", planned.notes
    assert planned.by_category["optimizer_state"] == 2 * LAYER


def test_a_history_that_grows_with_every_step_leaves_the_bound_open() -> None:
    planned = predict(optimizer=partial(torch.optim.LBFGS, max_iter=3))
    assert planned.by_category["optimizer_state"] > 10 * LAYER
    assert planned.interval_bytes[1] is None
    assert planned.interval_bytes[0] < planned.peak_bytes / 2
    assert any("every step leaves" in note for note in planned.notes)


class Plain:
    """An optimizer that has only the ways of torch's."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.param_groups = [{"params": weights}]

    @torch.no_grad()
    def step(self) -> None:
        for weight in self.param_groups[0]["params"]:
            weight.sub_(weight.grad, alpha=1e-3)

    def zero_grad(self) -> None:
        for weight in self.param_groups[0]["params"]:
            weight.grad = None


def test_an_optimizer_of_somebody_elses_is_taken(measured) -> None:
    planned = predict(optimizer=Plain)
    assert planned.method == "trace", planned.notes
    peak = measured(mlp, floats(), SGD, squares)
    assert planned.peak_bytes == pytest.approx(peak, rel=0.01)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.maker, self.judge = mlp(), nn.Sequential(nn.Linear(WIDTH, 64), nn.Linear(64, 1))


def in_turns(model: Any, optimizers: Any, batch: Tensor) -> None:
    made = model.maker(torch.randn_like(batch))
    optimizers["judge"].zero_grad()
    (F.softplus(-model.judge(batch)).mean() + model.judge(made.detach()).mean()).backward()
    optimizers["judge"].step()
    optimizers["maker"].zero_grad()
    F.softplus(-model.judge(made)).mean().backward()
    optimizers["maker"].step()


def penalised(model: Any, optimizer: Any, batch: Tensor) -> None:
    optimizer.zero_grad()
    batch = batch.requires_grad_()
    (slope,) = torch.autograd.grad(model(batch).sum(), batch, create_graph=True)
    (slope.norm(2, 1) - 1).square().mean().backward()
    optimizer.step()


class Accumulating:
    """Steps with every fourth batch."""

    def __init__(self) -> None:
        self.batches = 0

    def __call__(self, model: Any, optimizer: Any, batch: Tensor) -> None:
        squares(model, batch).backward()
        self.batches += 1
        if self.batches % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()


LOOPS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], Callable[[], Any]]] = {
    "two optimizers": (
        Two,
        lambda weights: {"maker": Adam(weights[:4]), "judge": Adam(weights[4:])},
        lambda: in_turns,
    ),
    "penalty": (mlp, Adam, lambda: penalised),
    "accumulation": (mlp, Adam, Accumulating),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_step_of_the_users_own(measured_step, name: str) -> None:
    model_fn, optimizer_fn, step_fn = LOOPS[name]
    planned = predict(model_fn, None, optimizer_fn, None, step_fn=step_fn())
    assert planned.method == "trace", planned.notes
    assert planned.phase in ("forward", "backward", "optimizer_step")
    assert planned.by_category["optimizer_state"] > 0
    peak = measured_step(model_fn, floats(), optimizer_fn, step_fn(), 8)
    assert planned.peak_bytes == pytest.approx(peak, rel=0.01)


def test_a_users_step_has_the_precision_that_was_asked_for() -> None:
    def step(model: Any, optimizer: Any, batch: Tensor) -> None:
        squares(model, batch).backward()
        optimizer.step()

    full, half = (
        predict(deep, floats(8192), SGD, None, step_fn=step, precision=precision)
        for precision in ("fp32", "bf16")
    )
    assert half.by_category["activations"] < full.by_category["activations"]


def test_the_phase_of_the_peak_is_named_whichever_step_it_is_in() -> None:
    assert predict(batch=floats(1)).phase == "optimizer_step"
    assert predict(batch=floats(8192)).phase in ("forward", "backward")


def generator() -> Any:
    yield torch.zeros(1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": lambda: 3}, r"model_fn must return a torch\.nn\.Module, got int"),
        ({"batch": lambda: None}, "batch_fn must return one batch, got None"),
        ({"batch": generator}, "got a generator: wrap it"),
        ({"optimizer": lambda weights: SGD([nn.Parameter(torch.zeros(1))])}, "over the weights"),
        ({"optimizer": lambda weights: None}, "must return an optimizer"),
        ({"loss": lambda model, batch: model(batch)}, r"a scalar tensor, got shape \(512, 128\)"),
        ({"loss": lambda model, batch: 3.0}, "a scalar tensor, got float"),
        ({"loss": lambda model, batch: batch.sum()}, "the loss has no graph"),
        ({"loss": None}, "needs a loss_fn"),
        ({"loss": None, "step_fn": lambda *given: None}, r"no optimizer's step\(\) in 8 batches"),
    ],
)
def test_what_is_wrong_with_a_given_function_is_one_line(changed, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        predict(**changed)
    assert "\n" not in str(caught.value)


def test_a_loader_that_comes_to_its_end_is_enough() -> None:
    batches = iter([torch.randn(64, WIDTH)] * 2)
    assert predict(batch=lambda: next(batches)).method == "trace"
    with pytest.raises(UserError, match="no batch"):
        predict(batch=lambda: next(iter(())))


@dataclass
class Pair:
    """A batch of a class of its own."""

    inputs: Tensor
    target: Tensor


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_what_lies_on_a_device_already_is_planned_as_if_it_did_not(target: str) -> None:
    # meta stands for a card: a device that holds no tensor of the plan.
    here = (torch.randn(512, WIDTH), torch.randn(512, WIDTH))
    there = tuple(tensor.to("meta") for tensor in here)
    model = mlp()
    weight = torch.rand(WIDTH)

    def expected(forward: Callable[..., Tensor], batch: Any) -> Tensor:
        found, goal = (batch.inputs, batch.target) if isinstance(batch, Pair) else batch
        return ((forward(found[:256]) - goal[:256]).square() * weight).mean()

    plain = predict(mlp, lambda: here, loss=expected, target=target)
    for held in (lambda: there, lambda: list(there), lambda: Pair(*there)):
        for made in (mlp, lambda: model, lambda: model.to("meta")):
            found = predict(made, held, loss=expected, target=target)
            assert (found.method, found.peak_bytes) == ("trace", plain.peak_bytes)
            assert found.by_category == plain.by_category
    weight = weight.to("meta")  # which no batch holds
    found = predict(mlp, lambda: there, loss=expected, target=target)
    assert found.method == "trace"
    assert found.peak_bytes == pytest.approx(plain.peak_bytes, rel=0.01)
