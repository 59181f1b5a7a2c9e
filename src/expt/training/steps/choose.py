"""How a run's steps are executed: as `trainer.compile` asks for, where that is possible."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

from expt.config.schema import Compile
from expt.memory.recovery.recovery import Recovery
from expt.training.steps.eager import StepFunction, Steps


def steps_for(
    how: Compile,
    function: StepFunction,
    model: nn.Module,
    optimizer: Optimizer,
    recovery: Recovery,
    batch_size: int,
    *,
    scaler: object = None,
    processes: int = 1,
    streamed: bool = False,
    on_capture: Callable[[bool], None] = lambda captured: None,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> Steps:
    """Return how steps are to be taken.

    Args:
        how: what `trainer.compile` asks for.
        function: does one step.
        model: on its device, with or without Fabric's wrapper.
        optimizer: with or without Fabric's wrapper.
        recovery: that the steps run under.
        batch_size: samples in every step but the last of an epoch.
        scaler: fp16's, None without one.
        processes: that train together.
        streamed: whether samples come from the host, so that no step can be captured.
        on_capture: told when a step is captured, and when it is given up.
        say: told why steps are not taken as asked for.

    """
    device = recovery.device
    if how is Compile.off or (how is Compile.auto and device.type != "cuda"):
        return Steps(function)
    if how is Compile.compile:
        from expt.training.steps.compiled import CompiledStep

        function = CompiledStep(function, model, recovery, batch_size, say)
        if device.type != "cuda":
            return Steps(function)
    if device.type != "cuda":
        say(f"trainer.compile={how.value}: {device.type} has no CUDA graphs, so steps stay eager")
        return Steps(function)
    if streamed:
        if how is not Compile.auto:
            say(
                f"trainer.compile={how.value}: streamed samples are copied from the host in every "
                "step, so steps are not captured"
            )
        return Steps(function)
    from expt.training.steps.captured import CapturedSteps
    from expt.training.steps.cuda_graph import CudaGraphs

    return CapturedSteps(
        function,
        optimizer,
        recovery,
        batch_size,
        CudaGraphs(torch.device(device)),
        scaler=scaler,
        processes=processes,
        compiled=how is Compile.compile,
        on_capture=on_capture,
        say=say,
    )
