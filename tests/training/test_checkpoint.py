"""The parts of a checkpoint that need no run: random states, and the hash of weights."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from expt.training.checkpoint import random_state, restore_random_state, weights_sha256


def draws() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        float(torch.rand(())),
        float(torch.randn(3).sum()),
        float(torch.randperm(1000)[0]),
    ]


@pytest.fixture(autouse=True)
def kept_generators():
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


def test_the_same_draws_follow_a_restored_state() -> None:
    draws()  # a half-used pair of Gaussians is part of the state
    state = random_state()
    expected = draws()
    assert draws() != expected
    restore_random_state(state)
    assert draws() == expected


def test_the_state_survives_a_file_without_pickled_code(tmp_path: Path) -> None:
    draws()
    torch.save(random_state(), tmp_path / "state.pt")
    expected = draws()
    restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draws() == expected


def test_a_state_is_not_changed_by_drawing() -> None:
    state = random_state()
    before = copy.deepcopy(state)
    draws()
    assert torch.equal(state["torch"], before["torch"])
    assert (state["python"], state["numpy"]) == (before["python"], before["numpy"])


def test_a_state_from_a_gpu_can_go_on_without_one() -> None:
    state = random_state()
    if not torch.cuda.is_available():
        assert state["cuda"] == []
        state["cuda"] = [torch.zeros(16, dtype=torch.uint8)]
    restore_random_state(state)


def test_fewer_cards_have_the_states_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    state = random_state()
    state["cuda"] = [torch.full((4,), card, dtype=torch.uint8) for card in range(4)]
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda own, card: given.append((int(own[0]), card))
    )
    restore_random_state(state)
    assert given == [(0, 0), (1, 1)]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))


def test_the_hash_is_of_names_and_values_only() -> None:
    model = net()
    digest = weights_sha256(model)
    assert len(digest) == 64
    assert weights_sha256(net()) == digest
    assert weights_sha256(copy.deepcopy(model).requires_grad_(False)) == digest
    transposed = copy.deepcopy(model)
    transposed[0].weight.data = model[0].weight.data.T.contiguous().T  # other strides
    assert weights_sha256(transposed) == digest


def test_the_order_of_the_state_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    digest = weights_sha256(model)
    backwards = OrderedDict(reversed(model.state_dict().items()))
    monkeypatch.setattr(model, "state_dict", lambda: backwards)
    assert weights_sha256(model) == digest


@pytest.mark.parametrize("name", [name for name, _ in net().named_parameters()])
def test_one_bit_changes_the_hash(name: str) -> None:
    model = net()
    digest = weights_sha256(model)
    bits = model.get_parameter(name).data.view(torch.int32).view(-1)
    bits[-1] ^= 1
    assert weights_sha256(model) != digest
    bits[-1] ^= 1
    assert weights_sha256(model) == digest


def test_a_name_and_a_buffer_change_the_hash() -> None:
    model = net()
    digests = {weights_sha256(model)}
    model.register_buffer("count", torch.zeros(1))
    digests.add(weights_sha256(model))
    model.count += 1
    digests.add(weights_sha256(model))
    del model.count
    model.register_buffer("other", torch.ones(1))
    digests.add(weights_sha256(model))
    assert len(digests) == 4


def test_two_weights_that_change_places_change_the_hash() -> None:
    model = nn.ParameterDict({"a": torch.zeros(3), "b": torch.ones(3)})
    swapped = nn.ParameterDict({"a": torch.ones(3), "b": torch.zeros(3)})
    assert weights_sha256(model) != weights_sha256(swapped)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_type_of_weight_has_a_hash(dtype: torch.dtype) -> None:
    assert weights_sha256(net().to(dtype)) != weights_sha256(net())


def test_a_model_with_batch_norm_has_a_hash() -> None:
    model = nn.BatchNorm1d(3)  # its num_batches_tracked is a whole number without axes
    before = weights_sha256(model)
    model(torch.randn(4, 3))
    assert weights_sha256(model) != before
