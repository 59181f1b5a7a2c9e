from __future__ import annotations

import collections
import copy
import gc
import importlib
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import expt.memory
from expt.errors import BrokenStepError, ConfigError, RecoveryError
from expt.memory import recover
from expt.memory.measuring.budget import Budget
from expt.memory.recovery.decorator import count_samples
from expt.memory.recovery.limits import Limits
from expt.memory.techniques.optimizer_in_backward import OptimizerInBackward
from expt.memory.techniques.techniques import Techniques

CPU = torch.device("cpu")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))


def batches(count: int = 4) -> list[Tensor]:
    return list(torch.randn(count, 512, 8, generator=torch.Generator().manual_seed(1)))


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, **options):
    @recover(model, optimizer, **options)
    def train_step(batch: Tensor, techniques: Techniques) -> float:
        """Take one step."""
        total = 0.0
        for part in batch.chunk(techniques.gradient_accumulation):
            loss = model(part).square().sum() / len(batch)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return train_step


def test_anybodys_loop_goes_on_inside_a_budget(capsys):
    plain, model = net(), net()
    expected = [step(b) for step in [stepped(plain, sgd(plain))] for b in batches()]
    data = batches()
    with Budget(256 * 1024, "256KiB").enforce(CPU) as ledger:
        train_step = stepped(model, sgd(model))
        losses = [train_step(batch) for batch in data]
    assert train_step.__doc__ == "Take one step."
    assert losses == pytest.approx(expected, rel=1e-5)
    assert train_step.recovery.techniques.gradient_accumulation > 1
    assert [event["step"] for event in train_step.recovery.events] == [0] * ledger.refusals
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert capsys.readouterr().out.count("out of memory in a step at step 0") == ledger.refusals


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def test_what_the_failed_step_held_is_gone_when_it_is_taken_again():
    model = net()
    alive: list[int] = []
    kept: list[Exception] = []  # as a logger or a debugger might

    @recover(model, sgd(model), on_event=lambda event: None)
    def train_step(batch: Tensor, techniques: Techniques) -> None:
        gc.collect()
        alive.append(sum(type(one) is Marker for one in gc.get_objects()))
        try:
            fill(len(alive))
        except torch.OutOfMemoryError as error:
            kept.append(error)
            raise

    def fill(times: int) -> None:
        held = Marker(torch.ones(10))
        if times < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        del held

    train_step(batches(1)[0])
    assert alive == [0, 0, 0]


class Marker:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_a_step_that_breaks_in_the_optimizer_says_to_load_a_checkpoint():
    model = net()
    optimizer = sgd(model)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    failures = []

    @recover(model, optimizer, on_event=failures.append)
    def train_step(batch: Tensor, techniques: Techniques) -> None:
        model(batch).sum().backward()
        optimizer.step()
        if not failures:
            raise torch.OutOfMemoryError("CUDA out of memory")
        optimizer.zero_grad()

    with pytest.raises(BrokenStepError, match="checkpoint"):
        train_step(batches(1)[0])
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train_step(batches(1)[0])
    (event,) = train_step.recovery.events
    assert event["replayed"]


OPTIMIZERS = [
    (torch.optim.SGD, {"momentum": 0.9, "foreach": True}),
    (torch.optim.RMSprop, {"foreach": True}),
    (torch.optim.AdamW, {"foreach": True}),
    (torch.optim.SGD, {"fused": True}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_a_step_whose_optimizer_has_not_begun_is_taken_again(kind, options):
    model = net()
    optimizer = kind(model.parameters(), lr=0.01, **options)
    failing = iter([True, False, False])

    @recover(model, optimizer, on_event=lambda event: None)
    def train_step(batch: Tensor, techniques: Techniques) -> None:
        for part in batch.chunk(techniques.gradient_accumulation):
            model(part).square().sum().backward()
            if next(failing):
                raise torch.OutOfMemoryError("CUDA out of memory")
        optimizer.step()
        optimizer.zero_grad()

    train_step(batches(1)[0])
    (event,) = train_step.recovery.events
    assert (event["rung"], event["replayed"]) == ("halve_micro_batch", False)


def test_an_optimizer_without_memory_steps_weights_one_by_one(monkeypatch):
    plain, model = net(), net()
    stepped(plain, adamw(plain))(batches(1)[0])
    adam = importlib.import_module("torch.optim.adam")
    real = adam._multi_tensor_adam

    def all_at_once(weights: list[Tensor], *args: object, **options: object) -> None:
        if len(weights) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(weights, *args, **options)

    monkeypatch.setattr(adam, "_multi_tensor_adam", all_at_once)
    train_step = stepped(model, adamw(model), on_event=lambda event: None)
    train_step(batches(1)[0])
    (event,) = train_step.recovery.events
    assert (event["phase"], event["rung"]) == ("optimizer_step", "one_by_one")
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), foreach=True)


@pytest.mark.parametrize("stepped_before", [0, 1])
def test_weights_stepped_in_the_backward_pass_are_seen(stepped_before):
    model = net()
    inner = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    optimizer = OptimizerInBackward(inner)
    failures: list[object] = []

    @recover(model, optimizer, on_event=failures.append)
    def train_step(batch: Tensor, techniques: Techniques) -> None:
        loss = model(batch).sum()
        if stepped_before:
            loss.backward()
        if not failures:
            raise torch.OutOfMemoryError("CUDA out of memory")
        optimizer.step()

    with pytest.raises(BrokenStepError) if stepped_before else nullcontext():
        train_step(batches(1)[0])
    assert len(failures) == 1


def test_the_end_of_the_ladder_is_an_error_that_says_what_was_tried():
    model = net()

    @recover(model, sgd(model), on_event=lambda event: None, limits=Limits(per_step=30))
    def train_step(batch: Tensor, techniques: Techniques) -> None:
        raise MemoryError

    with pytest.raises(RecoveryError, match=r"nothing is left.*repeated blocks") as ended:
        train_step(batches(1)[0])
    assert ended.value.exit_code == 1
    rungs = [event["rung"] for event in train_step.recovery.events]
    assert rungs == [*["halve_micro_batch"] * 9, *["release"] * 3, None]


X, Y = torch.zeros(6, 8), torch.zeros(7)
Pair = collections.namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (X, 6),
        ((X, Y), 6),
        ([Y, X], 7),
        ({"x": X, "y": Y}, 6),
        (collections.UserDict(x=X), 6),
        (Pair(X, Y), 6),
        ({"step": torch.tensor(3), "inputs": {"parts": [(X,)]}}, 6),
        (("name", 3, None, [X]), 6),
        (pack_padded_sequence(torch.zeros(9, 5, 2), torch.tensor([9, 4, 4, 2, 1]), False), 5),
        (X.numpy(), 6),
        ((X.numpy(), Y.numpy()), 6),
        (["a", "b", "c"], 3),
        (range(4), 4),
    ],
)
def test_the_samples_of_a_batch_are_counted(batch, expected):
    assert count_samples(batch) == expected


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (5, "a int, which has no length"),
        (torch.tensor(5.0), "a Tensor, which has no length"),
        ({"texts": ["a", "b"]}, "a dict without a tensor in it"),
        ((["a", "b"], ["c", "d"]), "a tuple without a tensor in it"),
        (object(), "a object, which has no length"),
    ],
)
def test_a_batch_that_does_not_say_its_samples_is_refused(batch, reason):
    step = stepped(net(), sgd(net()))
    with pytest.raises(ConfigError, match=f"how many samples .* it is {reason}.*samples=lambda"):
        step(batch)
    assert step.recovery.events == []


@pytest.mark.parametrize("kind", ["tuple", "dict", "nested"])
def test_batches_of_a_loader_recover_like_a_tensor(kind):
    plain, model = net(), net()
    expected = [step(b) for step in [stepped(plain, sgd(plain))] for b in batches(2)]
    wrap = {
        "tuple": lambda x: (x, x[:, :1]),
        "dict": lambda x: {"x": x, "mask": torch.ones(len(x))},
        "nested": lambda x: {"meta": ("train", torch.tensor(1)), "inputs": [x]},
    }[kind]
    unwrap = {
        "tuple": lambda batch: batch[0],
        "dict": lambda batch: batch["x"],
        "nested": lambda batch: batch["inputs"][0],
    }[kind]
    optimizer = sgd(model)

    @recover(model, optimizer, on_event=lambda event: None)
    def train_step(batch, techniques: Techniques) -> float:
        x, total = unwrap(batch), 0.0
        for part in x.chunk(techniques.gradient_accumulation):
            loss = model(part).square().sum() / len(x)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return total

    with Budget(160 * 1024, "160KiB").enforce(CPU):
        losses = [train_step(wrap(x)) for x in batches(2)]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert train_step.recovery.techniques.gradient_accumulation > 2


def test_the_package_offers_them_by_name():
    assert expt.memory.recover is recover
    assert expt.memory.Budget is Budget
    assert {"Budget", "recover"} <= set(dir(expt.memory))
    with pytest.raises(AttributeError, match="nonsense"):
        expt.memory.nonsense  # noqa: B018
