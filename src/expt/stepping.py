"""How optimizer steps are taken: one after the other, operator by operator, or faster.

`Steps` takes them as they come; `expt.captured_steps` replays a captured one, `expt.compiled_take`
runs the model's forward and backward passes as `torch.compile` makes them. All give the same
results to rounding, and all end up here when something cannot be done, with a line that says why.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from expt.memory.recovery.recovery import Recovery
from expt.schema import Compile

Take = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Takes one whole step on samples [B]; returns its mean loss and its weight, on the device."""


class Steps:
    """Takes every step operator by operator, and again if memory runs out."""

    def __init__(self, take: Take, recovery: Recovery) -> None:
        self.take = take
        self.recovery = recovery

    def __call__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Take a step on samples [B]; the loss and weight are valid until the next one.

        Raises:
            RecoveryError: nothing is left to try.
            BrokenStepError: the optimizer had begun to write.

        """
        return self.recovery.step(partial(self.take, indices), len(indices))

    def forget(self) -> None:
        """Keep nothing that refers to optimizer state, which has just been replaced."""


def steps_for(
    how: Compile,
    take: Take,
    model: nn.Module,
    optimizer: Optimizer,
    recovery: Recovery,
    batch_size: int,
    *,
    scaler: object = None,
    processes: int = 1,
    on_capture: Callable[[bool], None] = lambda captured: None,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> Steps:
    """Return how steps are to be taken.

    Args:
        how: what `trainer.compile` asks for.
        take: see `Take`.
        model: on its device, with or without Fabric's wrapper.
        optimizer: with or without Fabric's wrapper.
        recovery: that the steps run under.
        batch_size: samples in every step but the last of an epoch.
        scaler: fp16's, None without one.
        processes: that train together.
        on_capture: told when a step is captured, and when it is given up.
        say: told why steps are not taken as asked for.

    """
    device = recovery.device
    if how is Compile.off or (how is Compile.auto and device.type != "cuda"):
        return Steps(take, recovery)
    if how is Compile.compile:
        from expt.compiled_take import CompiledTake

        take = CompiledTake(take, model, recovery, batch_size, say)
        if device.type != "cuda":
            return Steps(take, recovery)
    if device.type != "cuda":
        say(f"trainer.compile={how.value}: {device.type} has no CUDA graphs, so steps stay eager")
        return Steps(take, recovery)
    from expt.captured_steps import CapturedSteps
    from expt.cuda_graphs import CudaGraphs

    return CapturedSteps(
        take,
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
