"""`plan` against torch.profiler, and what it must never do: allocate, draw numbers, be counted."""

from __future__ import annotations

import gc
import random
import resource
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expt.memory import Plan, plan
from expt.memory.measuring.budget_ledger import BudgetLedger
from expt.memory.measuring.ledger import StorageLedger
from expt.memory.techniques.checkpointing import checkpoint_activations
from expt.memory.techniques.optimizer_in_backward import OptimizerInBackward

AdamW = partial(torch.optim.AdamW, lr=1e-3)
SGD = partial(torch.optim.SGD, lr=1e-3)

pytestmark = pytest.mark.usefixtures("unfrozen")


def floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def squares(forward: Callable[..., Tensor], batch: Tensor) -> Tensor:
    return forward(batch).square().mean()


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 2, 128, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
        nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 11 * 11, 10),
    )  # fmt: skip


class Blocks(nn.Module):
    """Residual blocks in a ModuleList, which checkpointing finds."""

    def __init__(self, depth: int = 6, width: int = 64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def mlp(width: int = 256) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def predict(model: Callable[[], nn.Module] = mlp, batch: Any = None, **settings: Any) -> Plan:
    settings = {"target": "cpu", "optimizer_fn": AdamW, **settings}
    optimizer = settings.pop("optimizer_fn")
    return plan(model, batch or floats(4, 256), optimizer, squares, **settings)


CASES = {
    "transformer": (transformer, floats(8, 64, 32), AdamW, {}),
    "transformer bf16": (transformer, floats(32, 64, 32), AdamW, {"precision": "bf16"}),
    "convolutions": (convolutions, floats(64, 3, 24, 24), SGD, {}),
    "gru": (lambda: _First(nn.GRU(16, 64, batch_first=True)), floats(8, 20, 16), AdamW, {}),
    "two micro-batches": (mlp, floats(64, 256), AdamW, {"micro_batches": 2}),
    "three micro-batches": (mlp, floats(64, 256), SGD, {"micro_batches": 3}),
    "checkpointing": (Blocks, floats(4096, 64), AdamW, {"prepare": checkpoint_activations}),
    "checkpointing bf16": (
        Blocks, floats(4096, 64), AdamW,
        {"prepare": checkpoint_activations, "precision": "bf16"},
    ),
    "adamw foreach": (mlp, floats(4, 256), partial(AdamW, foreach=True), {}),
    "adamw fused": (mlp, floats(4, 256), partial(AdamW, fused=True), {}),
    "momentum": (mlp, floats(4, 256), partial(SGD, momentum=0.9), {}),
    "adafactor": (mlp, floats(4, 256), torch.optim.Adafactor, {}),
}  # fmt: skip


class _First(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


@pytest.mark.parametrize("name", CASES)
def test_the_prediction_is_what_the_profiler_sees(measured, name: str) -> None:
    model, batch, optimizer, settings = CASES[name]
    planned = plan(model, batch, optimizer, squares, target="cpu", **settings)
    peak = measured(model, batch, optimizer, squares, **settings)
    assert planned.peak_bytes == pytest.approx(peak, rel=0.01)
    low, high = planned.interval_bytes
    assert low <= peak <= high
    assert planned.method == "trace", planned.notes


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_categories_sum_exactly_to_the_peak(target) -> None:
    planned = predict(convolutions, floats(8, 3, 24, 24), target=target, precision="bf16")
    assert sum(planned.by_category.values()) == planned.peak_bytes
    without = planned.by_category["workspaces"]
    assert sum(planned.by_module.values()) + without == planned.peak_bytes
    assert sum(planned.corrections.values()) == without
    assert (planned.reserved_bytes is None) == (target == "cpu")


def test_everything_has_its_category_and_module() -> None:
    planned = predict(mlp, floats(2, 256))
    weights = 2 * (256 * 256 + 256) * 4
    assert planned.by_category["parameters"] == weights
    assert planned.by_category["gradients"] == weights
    assert planned.by_category["optimizer_state"] == 2 * weights + 4 * 4  # and a step count each
    assert planned.by_category["inputs"] == 2 * 256 * 4
    assert planned.phase == "optimizer_step"
    assert planned.dominant == "optimizer_state"
    assert set(planned.by_module) >= {"0", "2"}
    assert planned.by_module["0"] == 2 * weights + 2 * 4  # weights, gradients, two moments
    assert "(parameters)" not in planned.by_module


def test_accumulation_keeps_gradients_alive() -> None:
    one = predict(mlp, floats(512, 256))
    two = predict(mlp, floats(512, 256), micro_batches=2)
    assert one.phase == two.phase == "backward"
    gradients = two.by_category["gradients"] - one.by_category["gradients"]
    assert gradients >= 256 * 256 * 4
    assert predict(mlp, floats(512, 256), micro_batches=8).peak_bytes == two.peak_bytes


def test_checkpointing_lowers_the_peak_and_keeps_what_it_must() -> None:
    plain = predict(Blocks, floats(2048, 64))
    saved = predict(Blocks, floats(2048, 64), prepare=checkpoint_activations)
    activations = saved.by_category["activations"]
    assert activations < 0.6 * plain.by_category["activations"]
    assert activations >= 6 * 2048 * 64 * 4  # the input of every block


def test_frozen_weights_have_neither_gradient_nor_state() -> None:
    def frozen() -> nn.Module:
        model = mlp()
        model[0].requires_grad_(False)
        return model

    layer = (256 * 256 + 256) * 4
    planned = predict(frozen, averaged=True)
    assert planned.by_category["gradients"] == layer
    assert planned.by_category["optimizer_state"] == 2 * layer + 2 * 4
    assert planned.by_category["parameters"] == 3 * layer  # and the average of the trained one
    assert planned.by_module["0"] == layer


def test_averaged_weights_are_counted() -> None:
    plain, averaged = predict(), predict(averaged=True)
    assert averaged.peak_bytes - plain.peak_bytes == 2 * (256 * 256 + 256) * 4
    assert averaged.by_module["0"] == plain.by_module["0"] + (256 * 256 + 256) * 4


class Tied(nn.Module):
    """An output layer that shares the embedding's weight, and a table that two modules hold."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(500, 64), nn.Linear(64, 500, bias=False)
        self.head.weight = self.embedding.weight
        table = torch.zeros(1000)
        self.register_buffer("table", table)
        self.head.register_buffer("table", table)
        self.tables = [table, table]  # nor does a list that torch does not know

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x)) + self.tables[0].sum()


def test_tied_weights_and_shared_buffers_are_counted_once() -> None:
    planned = predict(Tied, lambda: torch.zeros(3, dtype=torch.long), optimizer_fn=SGD)
    assert planned.by_category["parameters"] == 500 * 64 * 4 + 1000 * 4
    assert planned.by_module["embedding"] == 2 * 500 * 64 * 4


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.layer.register_buffer("adjacency", torch.eye(16).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.adjacency @ self.layer(x)


def test_a_sparse_buffer_is_counted_by_its_parts() -> None:
    planned = predict(Graph, floats(16, 16))
    assert planned.method == "trace", planned.notes
    assert planned.by_category["parameters"] == (16 * 16 + 16) * 4 + 16 * 2 * 8 + 16 * 4


def test_evaluation_is_part_of_the_peak() -> None:
    def evaluation(forward: Callable[..., Tensor]) -> None:
        forward(torch.randn(5000, 256))

    planned = predict(mlp, evaluation_fn=evaluation)
    assert planned.phase == "evaluation"
    assert planned.peak_bytes > 3 * 5000 * 256 * 4
    assert planned.peak_bytes > predict().peak_bytes


def test_a_data_set_on_the_device_counts_once_and_so_does_what_is_read_from_it() -> None:
    data = torch.randn(1000, 256)
    given = predict(mlp, lambda: data[:4], resident=[data])
    found = predict(mlp, lambda: data[:4])
    assert given.by_category["inputs"] == found.by_category["inputs"] == data.nbytes


def test_clipping_and_stepping_in_the_backward_pass() -> None:
    assert predict(mlp, clip_norm=1.0).peak_bytes >= predict().peak_bytes
    early = predict(mlp, optimizer_fn=lambda weights: OptimizerInBackward(AdamW(weights)))
    assert early.by_category["gradients"] == 0
    assert early.by_category["optimizer_state"] == predict().by_category["optimizer_state"] > 0
    saved = predict().peak_bytes - early.peak_bytes
    assert saved == pytest.approx(256 * 256 * 4, rel=0.05), "one of the two large gradients"
    assert early.notes == (), "nothing of the trace is left"


def test_pythons_collector_is_as_it_was_after_a_plan() -> None:
    """It is kept to what the plan makes meanwhile, which is a small part of all objects."""
    inside = []

    def model() -> nn.Module:
        inside.append(gc.get_freeze_count())
        return mlp()

    predict(model)
    assert inside[0] > 1000 and gc.get_freeze_count() == 0
    gc.freeze()
    before = gc.get_freeze_count()
    predict()
    assert gc.get_freeze_count() >= before * 0.9, "what others set aside stays aside"


def test_what_others_set_aside_is_counted_once(monkeypatch) -> None:
    gc.freeze()
    asked, count = [], gc.get_freeze_count
    monkeypatch.setattr(gc, "get_freeze_count", lambda: (asked.append(1), count())[1])
    predict()
    predict()
    assert len(asked) == 1


EVERY = [
    torch.optim.Adadelta, torch.optim.Adafactor, torch.optim.Adagrad, torch.optim.Adam,
    torch.optim.Adamax, torch.optim.AdamW, torch.optim.ASGD, torch.optim.NAdam,
    torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Rprop,
    partial(torch.optim.SGD, momentum=0.9),
]  # fmt: skip


@pytest.mark.parametrize("optimizer", EVERY)
@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_every_optimizer_of_torch_is_traced_also_in_the_backward_pass(optimizer, target) -> None:
    plain = predict(optimizer_fn=lambda weights: optimizer(weights, lr=1e-3), target=target)
    early = predict(
        optimizer_fn=lambda weights: OptimizerInBackward(optimizer(weights, lr=1e-3)),
        target=target,
    )
    for planned in (plain, early):
        assert planned.method == "trace", planned.notes
        assert not any("without values" in note for note in planned.notes)
    state = [one.by_category["optimizer_state"] for one in (plain, early)]
    assert state[0] == state[1] > 0


@pytest.mark.parametrize(
    ("optimizer", "copies"),
    [
        (AdamW, 1),  # torch's default on CUDA: all weights in one go
        (partial(AdamW, fused=True), 0),
        (partial(AdamW, fused=False), 0.3),  # said explicitly, it is one by one
        (partial(AdamW, foreach=False), 0.3),
        (torch.optim.Adafactor, 0.2),  # has the option and leaves it off
    ],
)
def test_temporaries_of_an_optimizer_on_cuda(optimizer, copies) -> None:
    def deep() -> nn.Module:
        return nn.Sequential(*[nn.Linear(128, 128, bias=False) for _ in range(10)])

    planned = predict(deep, floats(1, 128), optimizer_fn=optimizer, target="cuda")
    held = planned.by_category["temporaries"] / (10 * 128 * 128 * 4)
    assert held == pytest.approx(copies, abs=0.05)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_on_cuda_a_normalisation_keeps_fp32(precision) -> None:
    def normed() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64))

    batch = floats(1024, 64)
    cpu = predict(normed, batch, precision=precision)
    cuda = predict(normed, batch, precision=precision, target="cuda")
    # Kept for backward: its input as a half by the CPU, as an fp32 copy by CUDA.
    more = cuda.by_category["activations"] - cpu.by_category["activations"]
    assert more == pytest.approx(2 * 1024 * 64, rel=0.05)


def test_a_ledger_that_is_on_neither_counts_nor_refuses() -> None:
    alone = predict(mlp, floats(64, 256))
    with StorageLedger() as ledger:
        watched = predict(mlp, floats(64, 256))
    assert ledger.peak_bytes == 0
    with BudgetLedger(1000) as limit:
        limited = predict(mlp, floats(64, 256))
    assert limit.refusals == 0
    assert limit.peak_bytes == 0
    assert alone.peak_bytes == watched.peak_bytes == limited.peak_bytes


def test_a_big_model_is_planned_without_being_allocated() -> None:
    def big() -> nn.Module:
        return nn.Sequential(*[nn.Linear(8192, 8192, bias=False) for _ in range(8)])

    predict()  # what the first plan imports is not what is measured
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    planned = predict(big, floats(2, 8192), target="cuda")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert planned.by_category["parameters"] == 2 * 2**30
    assert planned.reserved_bytes >= planned.peak_bytes > 8 * 2**30
    assert grown < 2**26


def _drawing() -> nn.Module:
    random.random()
    np.random.random()
    torch.rand(3)
    return nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))


class Branching(nn.Module):
    """Looks at its values, and draws wherever one can draw."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = _drawing()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (2.0 if x.sum() > 0 else 1.0)


@pytest.mark.parametrize("model", [_drawing, Branching])
def test_random_numbers_are_afterwards_what_they_were_before(model) -> None:
    def batch() -> Tensor:
        random.random()
        return torch.randn(4, 8) + np.random.random()

    torch.manual_seed(7)
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    assert predict(model, batch).peak_bytes > 0
    assert random.getstate() == python
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy, strict=True))
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_a_shape_that_does_not_fit_is_the_users_own_error(capfd) -> None:
    def wrong() -> nn.Module:
        return nn.Sequential(nn.Linear(256, 10), nn.Linear(11, 3))

    with pytest.raises(RuntimeError, match="10"):
        predict(wrong)
    assert "Traceback" not in capfd.readouterr().err  # torch would log its own


def test_a_plan_as_plain_values() -> None:
    import json

    planned = predict()
    stored = json.loads(json.dumps(planned.as_dict()))
    assert stored["by_category"] == planned.by_category
    assert stored["interval_bytes"] == list(planned.interval_bytes)
    assert planned.fits(None) is None
    assert planned.fits(planned.peak_bytes) is True
    assert planned.fits(planned.peak_bytes - 1) is False


def test_an_inplace_activation_and_a_loss_with_targets() -> None:
    def loss(forward: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(forward(batch[0]), batch[1])

    def batch() -> tuple[Tensor, Tensor]:
        return torch.randn(8, 3, 24, 24), torch.randint(10, (8,))

    planned = plan(convolutions, batch, SGD, loss, target="cpu")
    assert planned.by_category["inputs"] == 8 * 3 * 24 * 24 * 4 + 8 * 8


def test_a_captured_step_reserves_its_own_pool_and_the_rest_another() -> None:
    evaluated = {"evaluation_fn": lambda forward: squares(forward, floats(64, 256)())}
    small = predict(mlp, floats(64, 256), target="cuda")
    both = predict(mlp, floats(64, 256), target="cuda", **evaluated)
    for planned in (small, both):
        assert planned.reserved_bytes is not None
        assert planned.captured_reserved_bytes is not None
        assert planned.captured_reserved_bytes > planned.reserved_bytes
        assert sum(planned.corrections.values()) == planned.by_category["workspaces"]
    assert predict(mlp, floats(64, 256)).captured_reserved_bytes is None


def test_what_evaluation_takes_comes_on_top_of_a_captured_step() -> None:
    large = 4096  # samples of a step, and of evaluation, so that rounding to segments is small
    evaluated = {"evaluation_fn": lambda forward: squares(forward, floats(large, 256)())}
    without = predict(mlp, floats(large, 256), target="cuda")
    planned = predict(mlp, floats(large, 256), target="cuda", **evaluated)
    # Eager steps and evaluation take turns in the same memory; captured ones cannot.
    assert planned.reserved_bytes == without.reserved_bytes
    assert planned.captured_reserved_bytes is not None
    assert without.captured_reserved_bytes is not None
    assert planned.captured_reserved_bytes - without.captured_reserved_bytes >= large * 256 * 4
