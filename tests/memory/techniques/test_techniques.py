"""What holds for every technique, over models of ours and one of torch's.

With dropout 0, each trains to the losses of the plain run: within 1e-5 relative, in fp32, over
four steps of Adam. `sliding_window` and `top_k` change the mathematics; what they compute is
tested in tests/models/test_attention_kernels.py, and here that they are as good as fused where
their window or number of keys covers everything.

Letters: `B` batch, `T` input steps, `N` sensors, `P` horizon, `D` width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from expt.errors import ConfigError
from expt.jobs.traffic.alternating import Alternating
from expt.jobs.traffic.phase1 import Phase1
from expt.jobs.traffic.stid import STID
from expt.memory.measuring.ledger import StorageLedger
from expt.memory.techniques import offload
from expt.memory.techniques.optimizer_in_backward import OptimizerInBackward
from expt.memory.techniques.techniques import Techniques, apply, problems
from expt.memory.techniques.wrapping import Wrapped

B, T, N, P, DAY = 8, 12, 20, 12, 288
TOLERANCE = 1e-5

TECHNIQUES = {
    "accumulation": Techniques(gradient_accumulation=4),
    "checkpointing": Techniques(activation_checkpointing=True),
    "checkpointing-2": Techniques(activation_checkpointing=2),
    "checkpointing-selective": Techniques(activation_checkpointing="selective"),
    "checkpointing-nested": Techniques(activation_checkpointing="nested"),
    "attention-math": Techniques(attention_kernel="math"),
    "attention-fused": Techniques(attention_kernel="fused"),
    "attention-window": Techniques(attention_kernel="sliding_window", attention_window=N),
    "attention-top-k": Techniques(attention_kernel="top_k", attention_top_k=3 * T),
    "offload": Techniques(saved_tensor_offload=True),
    "offload-checkpointing": Techniques(saved_tensor_offload=True, activation_checkpointing=True),
    "in-backward": Techniques(optimizer_in_backward=True),
    "chunks": Techniques(forward_chunks=3),
    "chunks-in-training": Techniques(forward_chunks=3, forward_chunks_in_training=True),
    "all": Techniques(
        activation_checkpointing="selective",
        attention_kernel="fused",
        saved_tensor_offload=True,
        optimizer_in_backward=True,
        forward_chunks=2,
        forward_chunks_in_training=True,
    ),
}
SAVES = ("accumulation", "checkpointing", "checkpointing-2", "checkpointing-selective")
"""What promises a lower peak of a training step; `in-backward` does for models of many weights."""
SAVES_NOTHING = {("stid", "checkpointing-selective")}
"""A block of matrix products alone keeps all of their outputs, two where backward needs one."""


class Torch(nn.Module):
    """torch's own encoder over time, every sensor by itself."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.embed = nn.Linear(1, 32)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(T * 32, P)

    def forward(
        self, speed: Tensor, observed: Tensor, time_of_day: Tensor, day_of_week: Tensor
    ) -> Tensor:
        tokens = self.embed(speed.transpose(1, 2).flatten(0, 1).unsqueeze(-1))  # [B*N, T, D]
        forecast = self.head(self.encoder(tokens).flatten(1))
        return forecast.view(len(speed), -1, P).transpose(1, 2)


SHAPES: dict[str, Any] = {"num_sensors": N, "input_steps": T, "horizon": P, "steps_per_day": DAY}
SMALL: dict[str, Any] = {"embed_dim": 32, "num_heads": 4, "ffn_ratio": 2, "dropout": 0.0}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "alternating": partial(
        Alternating,
        **SHAPES,
        **SMALL,
        num_layers=1,
        num_stages=2,
        patch_sizes=[1, 2],
        cross_stage_attention=True,
        sensor_dropout=0.0,
    ),
    "phase1": partial(Phase1, **SHAPES, **SMALL),
    "stid": partial(STID, **SHAPES, missing_value=-3.0, embed_dim=16, num_layers=3, dropout=0.0),
    "torch": Torch,
}
HAVE_NONE = {
    "phase1": "no repeated blocks",
    "stid": "no module of STID has a choice",
    "torch": "no module of Torch has a choice",
}
"""What a model cannot have; phase1's two encoders are no list, the others have no Attention."""


def cases() -> list[tuple[str, str]]:
    return [(model, name) for model in MODELS for name in TECHNIQUES]


def unfit(model: str, technique: Techniques) -> str | None:
    """Return the reason why a technique cannot be applied, as it should be."""
    kernel = technique.attention_kernel is not None
    blocks = technique.activation_checkpointing is not False
    refused = blocks if model == "phase1" else kernel if model in HAVE_NONE else False
    return HAVE_NONE[model] if refused else None


@pytest.fixture(autouse=True)
def everything_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the CPU for a device whose tensors are worth moving."""
    monkeypatch.setattr(offload, "leaves_device", lambda tensor: True)
    monkeypatch.setattr(offload, "MIN_BYTES", 1024)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def batch() -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    first = torch.randint(0, DAY - T, (B, 1), generator=generator)
    inputs = {
        "speed": torch.randn(B, T, N, generator=generator),
        "observed": torch.rand(B, T, N, generator=generator) > 0.1,
        "time_of_day": first + torch.arange(T),
        "day_of_week": torch.randint(0, 7, (B, 1), generator=generator).expand(B, T),
    }
    return inputs, torch.randn(B, P, N, generator=generator)


class Training:
    """A loop like the trainer's, with one technique after the other."""

    def __init__(self, name: str) -> None:
        self.model = build(name)
        self.plain = torch.optim.Adam(self.model.parameters(), lr=1e-3, fused=True)
        self.optimizer: torch.optim.Optimizer = self.plain
        self.technique = Techniques()

    def use(self, technique: Techniques) -> Training:
        if isinstance(self.optimizer, OptimizerInBackward):
            self.optimizer.remove()
        apply(self.model, technique)
        in_backward = technique.optimizer_in_backward
        self.optimizer = OptimizerInBackward(self.plain) if in_backward else self.plain
        self.technique = technique
        return self

    def step(self) -> float:
        inputs, target = batch()
        total = 0.0
        for part in torch.arange(B).tensor_split(self.technique.gradient_accumulation):
            forecast = self.model(**{key: value[part] for key, value in inputs.items()})
            loss = (forecast - target[part]).abs().sum() / target.numel()
            loss.backward()
            total += float(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def peak(self) -> int:
        self.step()  # the optimizer's state is made here
        with StorageLedger() as ledger:
            self.step()
        return ledger.peak_bytes


PLAIN: dict[str, list[float]] = {}


def plain_losses(name: str) -> list[float]:
    if name not in PLAIN:
        training = Training(name)
        PLAIN[name] = [training.step() for _ in range(4)]
    return PLAIN[name]


def test_every_technique_has_a_case() -> None:
    default = Techniques()
    changed = {
        part.name
        for technique in TECHNIQUES.values()
        for part in fields(Techniques)
        if getattr(technique, part.name) != getattr(default, part.name)
    }
    elsewhere = {"weight_offload"}  # for frozen weights: test_weight_offload.py
    assert changed == {part.name for part in fields(Techniques)} - elsewhere


@pytest.mark.parametrize(("model", "technique"), cases())
def test_the_losses_are_those_of_the_plain_run(model: str, technique: str) -> None:
    chosen, training = TECHNIQUES[technique], Training(model)
    if (reason := unfit(model, chosen)) is not None:
        assert any(reason in problem for problem in problems(training.model, chosen))
        with pytest.raises(ConfigError, match=reason):
            apply(training.model, chosen)
        assert not wrapped(training.model), "a refused technique leaves the model as it was"
        return
    training.use(chosen)
    losses = [training.step() for _ in range(4)]
    assert losses == pytest.approx(plain_losses(model), rel=TOLERANCE)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("model", MODELS)
def test_techniques_change_between_steps_of_a_live_model(model: str) -> None:
    training = Training(model)
    names = list(training.model.state_dict())
    losses = []
    fitting = [name for name in TECHNIQUES if unfit(model, TECHNIQUES[name]) is None]
    for name in (fitting[1], fitting[-1], "chunks-in-training"):
        losses.append(training.use(TECHNIQUES[name]).step())
    assert wrapped(training.model)
    losses.append(training.use(Techniques()).step())
    assert losses == pytest.approx(plain_losses(model), rel=TOLERANCE)
    assert list(training.model.state_dict()) == names
    assert not wrapped(training.model)


@pytest.mark.parametrize("model", ["alternating", "stid", "torch"])
def test_the_peak_is_lower(model: str) -> None:
    plain = Training(model).peak()
    for name in SAVES:
        lower = Training(model).use(TECHNIQUES[name]).peak() < plain
        assert lower is ((model, name) not in SAVES_NOTHING), name


def test_selective_is_between_plain_and_full_checkpointing() -> None:
    names = ("checkpointing", "checkpointing-selective", "checkpointing-2")
    full, selective, half = (Training("torch").use(TECHNIQUES[n]).peak() for n in names)
    assert full < 0.9 * selective
    assert full < 0.9 * half


def test_gradients_never_exist_at_once_in_backward() -> None:
    weights = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(8)))
    plain = torch.optim.SGD(weights.parameters(), lr=0.1)
    bytes_each = 4 * 128 * 128

    def peak(optimizer: torch.optim.Optimizer) -> int:
        with StorageLedger() as ledger:
            ledger.add(list(weights.parameters()))
            weights(torch.randn(4, 128)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return ledger.peak_bytes

    all_at_once = peak(plain)
    assert all_at_once > 2 * 8 * bytes_each
    assert peak(OptimizerInBackward(plain)) < all_at_once - 5 * bytes_each


def test_applying_twice_is_applying_once() -> None:
    model = build("alternating")
    first = apply(model, TECHNIQUES["all"])
    layers = wrapped(model)
    second = apply(model, TECHNIQUES["all"])
    assert first == second
    assert wrapped(model) == layers
    assert first.modules == {
        "activation_checkpointing": 8,
        "attention_kernel": 9,
        "saved_tensor_offload": 1,
        "forward_chunks": 1,
    }


def test_a_copy_of_the_model_uses_its_own_weights() -> None:
    model = build("alternating")
    apply(model, TECHNIQUES["all"])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    inputs, _ = batch()
    forecast = twin(**inputs)
    forecast.sum().backward()
    assert forecast.abs().max() > 0
    assert all(weight.grad is None for weight in model.parameters())
    assert all(weight.grad is not None for weight in twin.parameters())


def test_it_reaches_through_what_fabric_made_of_the_model() -> None:
    model = build("alternating")
    prepared = Fabric(accelerator="cpu", devices=1).setup(model)
    apply(prepared, TECHNIQUES["offload-checkpointing"])
    assert "forward" not in vars(prepared)
    assert wrapped(model)
    apply(prepared, Techniques())
    assert not wrapped(model)


def test_every_problem_comes_in_one_message() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    everything = replace(TECHNIQUES["all"], activation_checkpointing=3)
    with pytest.raises(ConfigError) as refused:
        apply(model, everything)
    assert len(refused.value.problems) == 3
    for word in ("activation_checkpointing=3", "attention_kernel=fused", "normalises over the ba"):
        assert word in str(refused.value)


def test_more_blocks_apart_than_there_are() -> None:
    model = build("torch")
    assert apply(model, Techniques(activation_checkpointing=4)).modules == {
        "activation_checkpointing": 1
    }
    with pytest.raises(ConfigError, match="has 4 blocks"):
        apply(model, Techniques(activation_checkpointing=5))


def test_it_works_on_meta_and_on_fake_weights() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"):
        apply(build("alternating"), TECHNIQUES["all"])
    mode = FakeTensorMode()
    with mode:
        model = build("alternating")
        inputs = {key: torch.empty_like(value) for key, value in batch()[0].items()}
    peaks = {}
    for name in ("plain", "checkpointing", "offload", "all"):
        apply(model, TECHNIQUES.get(name, Techniques()))
        with mode, StorageLedger() as ledger:
            model(**inputs).sum().backward()
            model.zero_grad()
        peaks[name] = ledger.peak_bytes
    assert peaks["checkpointing"] < 0.8 * peaks["plain"]
    assert peaks["offload"] < 0.8 * peaks["plain"]
    assert peaks["all"] < peaks["plain"]


def wrapped(model: nn.Module) -> Mapping[str, list[str]]:
    """Return the layers around each module's forward, by the module's name, outermost first."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        while isinstance(forward, Wrapped):
            found.setdefault(name, []).append(forward.name)
            forward = forward.inner
    return found
