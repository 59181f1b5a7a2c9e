"""What rules a capture out, with torch's check for waiting played by a stand-in."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from expt.training.steps.cuda_graph import CudaGraphs, watched


@pytest.fixture(autouse=True)
def modes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Note the modes that are set; there is no CUDA here to take them."""
    seen: list[object] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", seen.append)
    yield seen


def test_a_step_that_does_neither_is_fit(modes: list[object]) -> None:
    found: list[str] = []
    with watched(found):
        torch.ones(2).sum()
    assert found == []
    assert modes == ["warn", 0]


def test_waiting_is_told_with_its_place(modes: list[object]) -> None:
    found: list[str] = []
    with watched(found):
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
    assert len(found) == 1
    assert "waits for the device" in found[0]
    assert "test_cuda_graph.py:" in found[0]


@pytest.mark.parametrize(
    "draw",
    [random.random, lambda: np.random.rand(), lambda: torch.rand(1)],
    ids=["random", "numpy", "torch"],
)
def test_random_numbers_of_the_host_are_told(draw) -> None:
    found: list[str] = []
    with watched(found):
        draw()
    assert found == ["the step draws random numbers on the host"]


def test_other_warnings_are_given_as_ever() -> None:
    with pytest.warns(UserWarning, match="something else"), watched([]):
        warnings.warn("something else", stacklevel=1)


def test_what_torch_says_of_the_mode_itself_is_not_passed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def mode(value: object) -> None:
        warnings.warn(
            "Synchronization debug mode is a prototype feature and does not yet detect all "
            "synchronizing operations",
            stacklevel=1,
        )

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", mode)
    found: list[str] = []
    with warnings.catch_warnings(record=True) as heard, watched(found):
        torch.ones(2).sum()
    assert (found, heard) == ([], [])


class Stream:
    """Notes whom it waited for."""

    def __init__(self, device: object = None) -> None:
        self.waited: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)


def test_a_step_that_fails_is_waited_for_before_anything_is_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    current = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    graphs = CudaGraphs(torch.device("cuda:0"))
    with pytest.raises(torch.OutOfMemoryError), graphs.warming(None):
        raise torch.OutOfMemoryError
    assert current.waited == [graphs._stream]
    assert graphs._stream.waited == [current]


def test_the_mode_is_set_back_after_an_error(modes: list[object]) -> None:
    with pytest.raises(torch.OutOfMemoryError), watched([]):
        raise torch.OutOfMemoryError
    assert modes == ["warn", 0]


def test_nothing_is_reset_where_nothing_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: pytest.fail("touched"))
    CudaGraphs(torch.device("cuda:0")).reset_after_failed_capture()


def test_memory_is_released_before_resetting_asks_for_some(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    zeros = torch.zeros
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Stream)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda given: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(
        "expt.training.steps.cuda_graph.release", lambda device: done.append("released")
    )
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: _noting(done, "captured"))
    monkeypatch.setattr(torch, "zeros", lambda count, device: zeros(count))
    monkeypatch.setattr(torch, "rand", lambda count, device: zeros(count))
    graphs = CudaGraphs(torch.device("cuda:0"))
    graphs._broken = object()
    graphs.reset_after_failed_capture()
    assert done == ["released", "captured"]


def _noting(done: list[str], word: str) -> nullcontext[None]:
    done.append(word)
    return nullcontext()
