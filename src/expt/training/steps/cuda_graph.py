"""Capturing and replaying on CUDA: streams, forbidden operations, random numbers.

Facts from torch's documentation of CUDA graphs and from `torch/cuda/graphs.py` (2.11 to 2.13): a
capture needs a stream other than the default one, and eager steps on that stream before it;
nothing in it may wait for the device; the default generator takes part by itself and a replay
draws what eager steps would have drawn; other generator states have to be registered before.
None of it can be tested without a card: docs/speed.md says what was.
"""

from __future__ import annotations

import gc
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from expt.errors import UserError
from expt.memory.recovery.attempt import release
from expt.memory.techniques.block_randomness import BlockRandomness, block_randomness
from expt.memory.techniques.techniques import Techniques
from expt.memory.techniques.wrapping import bare_optimizer

SYNCHRONISING = "synchronizing CUDA operation"
"""What torch's warning says in ``set_sync_debug_mode("warn")``."""
NOTICE = "Synchronization debug mode is a prototype feature"
"""What torch says of the mode itself when it is first set, which is no business of the user's."""


class CudaGraphs:
    """Captures work on `device`; implements `expt.training.steps.captured.Machinery`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # One for warming up and capturing, so that library workspaces are made outside a graph.
        self._stream = torch.cuda.Stream(device)
        self._broken: Any = None

    @contextmanager
    def warming(self, found: list[str] | None) -> Iterator[None]:
        """Run eager work on the stream of the capture; tell `found` what a capture forbids."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                if found is None:
                    yield
                else:
                    with watched(found):
                        yield
        finally:  # what recovery puts back must not be overtaken by the step that failed
            current.wait_stream(self._stream)

    def capture(self, work: Callable[[], Any], blocks: int, seed: int) -> tuple[Any, Any]:
        """Capture `work` without running it; return the graph and what `work` returned."""
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[self.device.index or 0]
        randomness = BlockRandomness(generator, blocks, graph.register_generator_state, seed)
        gc.collect()
        collecting = gc.isenabled()
        gc.disable()  # a graph that were collected in a capture would end it
        self._broken = graph
        try:
            # The outer context restores the stream if the end of the capture fails.
            with (
                torch.cuda.device(self.device),
                torch.cuda.stream(torch.cuda.current_stream(self.device)),
                block_randomness(randomness),
                torch.cuda.graph(
                    graph,
                    stream=self._stream,
                    # Other threads (a tracker, a loader) may call CUDA meanwhile.
                    capture_error_mode="thread_local",
                ),
            ):
                outputs = work()
        except torch.OutOfMemoryError:
            self._broken = None  # it was ended as it should, and its memory is wanted back
            raise
        finally:
            if collecting:
                gc.enable()
        self._broken = None
        return graph, outputs

    def reset_after_failed_capture(self) -> None:
        """Bring allocator and generator out of a capture that broke off.

        torch leaves both in it when the capture cannot even be ended; a capture that succeeds
        sets the generator's mark back.

        Raises:
            UserError: it cannot be done; the process has to be started again.

        """
        broken, self._broken = self._broken, None
        if broken is None:
            return
        with suppress(Exception):  # not public, and not needed where the capture was ended
            torch._C._cuda_endAllocateToPool(self.device.index or 0, broken.pool())
        del broken
        try:
            torch.cuda.synchronize(self.device)
            release(self.device)  # the capture below needs room, where memory has just run out
            with torch.cuda.device(self.device):
                current = torch.cuda.current_stream(self.device)
                with (
                    torch.cuda.stream(current),
                    torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._stream),
                ):
                    torch.zeros(1, device=self.device)
                torch.rand(1, device=self.device)
        except RuntimeError as error:
            raise UserError(
                "capturing the training step failed in a way that torch does not recover from "
                f"({error}); run it again with trainer.compile=off"
            ) from error


@contextmanager
def watched(found: list[str]) -> Iterator[None]:
    """Tell `found` what happens inside that a replay would leave out."""
    before = host_random_state()
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        if SYNCHRONISING in str(warning.message):
            found.append(
                f"the step waits for the device, at {warning.filename}:{warning.lineno} "
                "(a value is read, or the host decides something)"
            )
        elif NOTICE not in str(warning.message):
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    if host_random_state() != before:
        found.append("the step draws random numbers on the host")


def host_random_state() -> tuple[Any, ...]:
    """Return the states of the host's generators, to be compared."""
    legacy: Any = np.random.get_state(legacy=True)
    drawn = (legacy[1].tobytes(), *legacy[2:])
    return random.getstate(), drawn, torch.get_rng_state().numpy().tobytes()


CAPTURABLE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
"""Optimizers whose fused kernel reads its rate, and its count of steps, from the device."""


def why_not_captured(
    optimizer: Optimizer,
    techniques: Techniques,
    scaler: object = None,
    processes: int = 1,
    compiled: bool = False,
) -> str | None:
    """Return why a step with these cannot be captured; None: nothing speaks against it.

    Args:
        optimizer: with or without Fabric's wrapper.
        techniques: those in force.
        scaler: fp16's, None without one.
        processes: that train together.
        compiled: the model runs as `torch.compile` makes it.

    """
    bare = bare_optimizer(optimizer)
    name = type(bare).__name__
    if processes > 1:
        return f"{processes} processes train together, which was not tried"
    if scaler is not None:
        return "fp16's scaler decides on the host whether to step; try memory.precision=bf16"
    if compiled and techniques.activation_checkpointing is not False:
        return "torch.compile repeats checkpointed blocks with random states of its own"
    if techniques.optimizer_in_backward:
        return "memory.optimizer_in_backward=true steps from hooks of the backward pass"
    if techniques.saved_tensor_offload:
        return "memory.saved_tensor_offload=true copies to host memory made in every step"
    if techniques.weight_offload:
        return "memory.weight_offload=true brings weights from host memory in every step"
    if type(bare) not in CAPTURABLE or not all(group.get("fused") for group in bare.param_groups):
        return (
            f"{name} reads its learning rate on the host; torch's Adam, AdamW and SGD with "
            "fused=true do not (optimizer=adamw)"
        )
    if "step" in vars(bare):
        return f"{name}.step was replaced by another function"
    return None
