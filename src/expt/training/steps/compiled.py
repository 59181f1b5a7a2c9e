"""Steps whose model runs as `torch.compile` makes it: fewer, fused kernels.

Only steps of a full batch are compiled, with fixed shapes, so that nothing is compiled again for
the last batch of an epoch or for evaluation, which stay eager. Compiling takes from seconds to
minutes, once, and needs a C++ compiler on the CPU and Triton on CUDA; where it fails, the step is
taken eagerly, and so are all later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from expt.memory.recovery.attempt import shortage
from expt.memory.recovery.recovery import Recovery
from expt.memory.recovery.undo import RandomState
from expt.memory.techniques.techniques import Techniques
from expt.memory.techniques.wrapping import bare
from expt.training.batches import Samples
from expt.training.steps.eager import StepFunction

EAGER_STEPS = 1
"""Steps before compiling on CUDA: the second compiles, the third is watched before a capture."""
LEDGER_STEPS = 3
"""Steps that the CPU's ledger watches, operator by operator (`expt.memory.measuring.meter`)."""


class CompiledStep:
    """Does a step with compiled kernels, or eagerly; a `StepFunction`."""

    def __init__(
        self,
        function: StepFunction,
        model: nn.Module,
        recovery: Recovery,
        batch_size: int,
        say: Callable[[str], None],
        backend: str | Callable[..., object] = "inductor",
    ) -> None:
        self._function = function
        self._backend = backend
        self._model = bare(model)
        self._recovery = recovery
        self._batch_size = batch_size
        self._say = say
        self._eager_left = EAGER_STEPS if recovery.device.type == "cuda" else LEDGER_STEPS
        self._given_up = self._proved = False
        self._techniques: Techniques | None = None
        self._compiled: Callable[..., object] | None = None

    def __call__(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Do one whole step."""
        if self._given_up or len(samples) != self._batch_size:
            return self._function(samples)
        if self._eager_left > 0:
            self._eager_left -= 1
            return self._function(samples)
        if _get_current_dispatch_mode() is not None:
            return self._eager_for_good(
                samples, "every operator is watched, as by a memory.budget on this device"
            )
        if self._techniques != self._recovery.techniques:
            self._compile()
        if self._proved:
            with self._in_force():
                return self._function(samples)
        before, reason = RandomState(self._recovery.device), ""
        try:
            with self._in_force():
                result = self._function(samples)
            self._proved = True
            return result
        except Exception as error:
            # The user's own mistakes are made again in eager mode, and seen there.
            if shortage(error) is not None or self._recovery.phase == "optimizer_step":
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        # Outside the handler, whose traceback holds what the step had made.
        for weight in self._model.parameters():
            weight.grad = None
        before.restore()
        return self._eager_for_good(samples, reason)

    def _compile(self) -> None:
        """Compile anew, lazily, for techniques that may have changed the model's forward."""
        if self._compiled is not None:
            torch.compiler.reset()
        self._techniques, self._proved = self._recovery.techniques, False
        self._model.compile(dynamic=False, backend=self._backend)
        self._compiled, self._model._compiled_call_impl = self._model._compiled_call_impl, None

    @contextmanager
    def _in_force(self) -> Iterator[None]:
        self._model._compiled_call_impl = self._compiled
        try:
            yield
        finally:
            self._model._compiled_call_impl = None

    def _eager_for_good(self, samples: Samples, reason: str) -> tuple[Tensor, Tensor]:
        self._given_up = True
        self._say(f"the model is not compiled: {reason}")
        return self._function(samples)
